//! What operators may write, and what they are told.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use clap::{Args as _, FromArgMatches as _};

use super::parse::{duration, endpoint};
use super::reader::loose;
use super::setting::Flags;
use super::{CloudConfig, Config, Faults, GanetiConfig, Loaded, LogFormat, OxideConfig, load};

/// A secret that no output may show.
const CANARY: &str = "c4n4ry";

/// A key that can be used; no output may show that either.
const KEY: &str = include_str!("../omni/testdata/keys/omnictl-create.txt");

fn flags(arguments: &[&str]) -> Flags {
    let command = Flags::augment_args(clap::Command::new("test").no_binary_name(true));
    Flags::from_arg_matches(&command.get_matches_from(arguments)).unwrap()
}

fn environment(variables: &[(&str, &str)]) -> BTreeMap<String, String> {
    variables
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect()
}

const GOOD: [(&str, &str); 4] = [
    ("OMNI_ENDPOINT", "https://omni.example.com:443/"),
    ("OMNI_SERVICE_ACCOUNT_KEY", KEY),
    ("OXIDE_HOST", "https://oxide.example.com/"),
    ("OXIDE_TOKEN", " c4n4ry-token\n"),
];

fn load_with(arguments: &[&str], more: &[(&str, &str)]) -> Result<Loaded, Faults> {
    let mut environment = environment(&GOOD);
    environment.extend(
        more.iter()
            .map(|(name, value)| (name.to_string(), value.to_string())),
    );
    load(&flags(arguments), &environment)
}

fn config(arguments: &[&str], more: &[(&str, &str)]) -> Config {
    load_with(arguments, more).unwrap().config
}

fn oxide(config: &Config) -> &OxideConfig {
    match &config.cloud {
        CloudConfig::Oxide(oxide) => oxide,
        other => panic!("{other:?}"),
    }
}

fn ganeti(config: &Config) -> &GanetiConfig {
    match &config.cloud {
        CloudConfig::Ganeti(ganeti) => ganeti,
        other => panic!("{other:?}"),
    }
}

fn faults(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let faults = load(&flags(arguments), &environment(variables))
        .unwrap_err()
        .to_string();
    assert!(!faults.contains(CANARY), "{faults}");
    faults
}

fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    file
}

#[test]
fn the_go_providers_four_variables_are_enough() {
    let loaded = load_with(&[], &[]).unwrap();
    let config = loaded.config;
    assert_eq!(config.omni.endpoint, "https://omni.example.com");
    assert_eq!(config.omni.service_account_key.expose(), KEY.trim());
    assert!(!config.omni.insecure);
    assert_eq!(oxide(&config).host, "https://oxide.example.com");
    assert_eq!(oxide(&config).token.expose(), "c4n4ry-token");
    assert_eq!(config.provider.id, "oxide");
    assert_eq!(config.provider.name, "Oxide");
    assert_eq!(config.provider.description, "Oxide Omni infrastructure provider.");
    assert_eq!(config.concurrency, 16);
    assert_eq!(config.join_deadline, Duration::from_secs(900));
    assert!(config.nameservers.is_empty());
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn the_command_line_is_stronger_than_the_environment_and_that_than_the_file() {
    let file = file(
        "nameserver = ['10.0.0.1', '10.0.0.2']\nlog_format = 'json'\n\
         [provider]\nid = 'file'\nname = 'file'\ndescription = 'file'\n[provisioner]\nconcurrency = 7\n",
        0o644,
    );
    let path = file.path().to_str().unwrap();
    let variables = [
        ("CONFIG", path),
        ("PROVIDER_NAME", "environment"),
        ("PROVIDER_ID", "environment"),
    ];
    let config = config(&["--provider-id", "flag"], &variables);
    assert_eq!(config.provider.id, "flag");
    assert_eq!(config.provider.name, "environment");
    assert_eq!(config.provider.description, "file");
    assert_eq!(config.concurrency, 7);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.nameservers.len(), 2);
}

#[test]
fn nameservers_come_repeated_or_in_a_list() {
    let wanted: Vec<std::net::IpAddr> = vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let by_flags = config(
        &["--nameserver", "10.0.0.1", "--nameserver=2001:db8::1"],
        &[("NAMESERVER", "9.9.9.9")],
    );
    assert_eq!(by_flags.nameservers, wanted);
    for list in [
        "10.0.0.1,2001:db8::1",
        "10.0.0.1 2001:db8::1",
        "10.0.0.1, 2001:db8::1,10.0.0.1 ",
    ] {
        assert_eq!(config(&[], &[("NAMESERVER", list)]).nameservers, wanted, "{list}");
    }
}

#[test]
fn an_empty_variable_is_not_set() {
    let config = config(
        &[],
        &[("PROVIDER_ID", ""), ("OMNI_CA_BUNDLE", " "), ("NAMESERVER", "")],
    );
    assert_eq!(config.provider.id, "oxide");
    assert_eq!(config.omni.ca_bundle, None);
}

#[test]
fn sideros_variable_goes_before_omnis() {
    let other = include_str!("../omni/testdata/keys/omnictl-renew.txt");
    let config = config(&[], &[("SIDERO_SERVICE_ACCOUNT_KEY", other)]);
    assert_eq!(config.omni.service_account_key.expose(), other.trim());
}

#[test]
fn everything_missing_is_named_at_once() {
    expect_test::expect![[r#"
        these settings have to be mended:
          - Omni's API endpoint is missing: set --omni-endpoint, OMNI_ENDPOINT or `endpoint` in [omni] of the file
          - the service account key that `omnictl infraprovider create` printed is missing: set SIDERO_SERVICE_ACCOUNT_KEY, OMNI_SERVICE_ACCOUNT_KEY or `service_account_key` in [omni] of the file; or name a file that holds it by --omni-service-account-key-file, OMNI_SERVICE_ACCOUNT_KEY_FILE or `service_account_key_file` in [omni] of the file
          - no cloud is chosen; this program knows Oxide ([oxide] of the file, or OXIDE_HOST, OXIDE_TOKEN, OXIDE_TOKEN_FILE, OXIDE_CA_BUNDLE); Ganeti ([ganeti] of the file, or GANETI_ENDPOINT, GANETI_USER, GANETI_PASSWORD, GANETI_PASSWORD_FILE, GANETI_CA_BUNDLE, GANETI_CERTIFICATE_SHA256, GANETI_INSECURE_SKIP_TLS_VERIFY)"#]].assert_eq(&faults(&[], &[]));
    let missing = faults(&[], &[("OXIDE_CA_BUNDLE", "/does/not/exist")]);
    assert!(
        missing.contains("OXIDE_HOST") && missing.contains("OXIDE_TOKEN_FILE"),
        "{missing}"
    );
    let missing = faults(&[], &[("GANETI_CERTIFICATE_SHA256", "12:34")]);
    for sign in [
        "GANETI_ENDPOINT",
        "GANETI_USER",
        "GANETI_PASSWORD_FILE",
        "`12:34` is not a SHA-256",
    ] {
        assert!(missing.contains(sign), "{sign} in {missing}");
    }
}

const CLUSTER: [(&str, &str); 5] = [
    ("OMNI_ENDPOINT", "https://omni.example.com"),
    ("OMNI_SERVICE_ACCOUNT_KEY", KEY),
    ("GANETI_ENDPOINT", "https://cluster.example.com:5080/"),
    ("GANETI_USER", "omni"),
    ("GANETI_PASSWORD", "c4n4ry-password"),
];

#[test]
fn isos_are_served_where_it_is_said() {
    let media = |more: &[(&str, &str)]| {
        let mut variables = environment(&CLUSTER);
        variables.extend(
            more.iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        load(&Flags::default(), &variables)
    };
    assert_eq!(ganeti(&media(&[]).unwrap().config).media, None);
    let loaded = media(&[("GANETI_MEDIA_ADDRESS", "10.0.0.1:8080")]).unwrap();
    let plain = ganeti(&loaded.config).media.clone().unwrap();
    assert_eq!(plain.url, "http://10.0.0.1:8080");
    assert!(plain.folder.is_absolute());
    assert!(
        loaded.warnings.concat().contains("join tokens"),
        "{:?}",
        loaded.warnings
    );
    let loaded = media(&[
        ("GANETI_MEDIA_ADDRESS", "[::]:8080"),
        ("GANETI_MEDIA_URL", "https://media.example.com/talos/"),
        ("GANETI_MEDIA_FOLDER", "/var/cache/talos"),
    ])
    .unwrap();
    let full = ganeti(&loaded.config).media.clone().unwrap();
    assert_eq!(full.url, "https://media.example.com/talos");
    assert_eq!(full.folder.to_str(), Some("/var/cache/talos"));
    let printed = loaded.config.to_string();
    let file = file(&printed.replacen("<redacted>", KEY.trim(), 1), 0o600);
    let again = load(
        &flags(&["--config", file.path().to_str().unwrap()]),
        &BTreeMap::new(),
    )
    .unwrap();
    assert_eq!(ganeti(&again.config).media, Some(full));
    for (more, fault) in [
        (
            &[("GANETI_MEDIA_ADDRESS", "0.0.0.0:8080")][..],
            "no node can reach",
        ),
        (
            &[("GANETI_MEDIA_ADDRESS", "8080")],
            "not an IP address with a port",
        ),
        (&[("GANETI_MEDIA_URL", "http://a")], "nothing is served"),
        (&[("GANETI_MEDIA_FOLDER", "/a")], "nothing is served"),
        (
            &[
                ("GANETI_MEDIA_ADDRESS", "0.0.0.0:1"),
                ("GANETI_MEDIA_URL", "ftp://a"),
            ],
            "not usable",
        ),
    ] {
        let Faults(faults) = media(more).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].contains(fault), "{faults:?}");
    }
}

#[test]
fn a_cluster_is_known_by_its_certificate_or_by_its_authority() {
    let pin =
        "89:06:9F:BB:B4:56:8C:9C:16:66:EA:2C:43:3D:1D:FD:EF:CB:63:39:59:AC:49:07:1E:18:A6:20:B2:CE:0F:94";
    let mut variables = environment(&CLUSTER);
    let plain = load(&Flags::default(), &variables).unwrap().config;
    assert_eq!(ganeti(&plain).endpoint, "https://cluster.example.com:5080");
    assert_eq!(
        (plain.provider.id.as_str(), plain.provider.name.as_str()),
        ("ganeti", "Ganeti")
    );
    variables.insert("GANETI_CERTIFICATE_SHA256".into(), pin.into());
    let pinned = load(&Flags::default(), &variables).unwrap().config;
    let kept = ganeti(&pinned).certificate_sha256.clone().unwrap();
    assert_eq!(kept, pin.replace(':', "").to_lowercase());
    let printed = pinned.to_string();
    assert!(!printed.contains(CANARY), "{printed}");
    let file = file(&printed.replacen("<redacted>", KEY.trim(), 1), 0o600);
    let again = load(
        &flags(&["--config", file.path().to_str().unwrap()]),
        &BTreeMap::new(),
    )
    .unwrap();
    assert_eq!(again.config.to_string(), printed);
    variables.insert("GANETI_INSECURE_SKIP_TLS_VERIFY".into(), "1".into());
    let Faults(both) = load(&Flags::default(), &variables).unwrap_err();
    assert!(
        both.concat().contains("a pinned certificate is trusted alone"),
        "{both:?}"
    );
    variables.remove("GANETI_CERTIFICATE_SHA256");
    let loaded = load(&Flags::default(), &variables).unwrap();
    assert!(ganeti(&loaded.config).insecure);
    assert!(
        loaded
            .warnings
            .concat()
            .contains("any certificate is accepted from Ganeti")
    );
}

#[test]
fn one_process_serves_one_cloud() {
    let Faults(two) = load_with(&[], &[("GANETI_USER", "omni")]).unwrap_err();
    assert_eq!(
        two,
        ["one process serves one cloud, but there are settings for Oxide and Ganeti: remove all but one"]
    );
}

#[test]
fn everything_wrong_is_named_at_once() {
    let file = file(
        "log = ['a', 'b']\nnameservers = []\n[omni]\nservice_account_key = 'c4n4ry'\n[oxyde]\nhost = 'x'\n\
         [oxide]\nhosst = 'x'\ntoken = 'c4n4ry'\n",
        0o600,
    );
    expect_test::expect![[r#"
        these settings have to be mended:
          - the file has an unknown key `nameservers`: did you mean `nameserver`?
          - the file has an unknown key `hosst` in [oxide]: did you mean `host`?
          - the file has an unknown table [oxyde]: did you mean [oxide]?
          - --omni-endpoint, OMNI_ENDPOINT or `endpoint` in [omni] of the file: `omni.example.com:443` is not usable, it must begin with https:// or http:// or grpc://
          - OMNI_SERVICE_ACCOUNT_KEY is not base64: copy the whole key, on one line, as Omni showed it
          - --omni-insecure-skip-tls-verify, OMNI_INSECURE_SKIP_TLS_VERIFY or `insecure_skip_tls_verify` in [omni] of the file: `maybe` is neither true nor false
          - --oxide-host, OXIDE_HOST or `host` in [oxide] of the file: a URL with a user name or password
          - --oxide-ca-bundle, OXIDE_CA_BUNDLE or `ca_bundle` in [oxide] of the file: cannot read /does/not/exist: No such file or directory (os error 2)
          - --log, LOG or `log` in the file: not a single value
          - --log-format, LOG_FORMAT or `log_format` in the file: `xml` is neither human nor json
          - --provisioner-concurrency, PROVISIONER_CONCURRENCY or `concurrency` in [provisioner] of the file: `0` is not a number from 1 to 1024
          - --join-deadline, JOIN_DEADLINE or `join_deadline` in the file: `soon` is not a time from 1s to 24h, such as 15m or 1h30m
          - --nameserver, NAMESERVER or `nameserver` in the file: `dns.example.com` is not an IP address
          - --provider-id, PROVIDER_ID or `id` in [provider] of the file: `A_b` is not usable: Omni takes 1 to 63 lower-case letters, digits and hyphens, the first and the last no hyphen"#]].assert_eq(&faults(
        &["--provisioner-concurrency", "0", "--nameserver", "dns.example.com", "--join-deadline=soon"],
        &[
            ("CONFIG", file.path().to_str().unwrap()),
            ("OMNI_ENDPOINT", "omni.example.com:443"),
            ("OMNI_INSECURE_SKIP_TLS_VERIFY", "maybe"),
            ("OXIDE_HOST", "https://user:c4n4ry@oxide.example.com"),
            ("OXIDE_CA_BUNDLE", "/does/not/exist"),
            ("PROVIDER_ID", "A_b"),
            ("LOG_FORMAT", "xml"),
        ],
    ));
}

#[test]
fn secrets_as_flags_are_refused_without_quoting_them() {
    expect_test::expect![[r#"
        these settings have to be mended:
          - --omni-service-account-key is refused, everybody on this machine could read it: use SIDERO_SERVICE_ACCOUNT_KEY or OMNI_SERVICE_ACCOUNT_KEY or --omni-service-account-key-file
          - --oxide-token is refused, everybody on this machine could read it: use OXIDE_TOKEN or --oxide-token-file"#]].assert_eq(&faults(
        &["--omni-service-account-key", "c4n4ry", "--oxide-token=c4n4ry"],
        &[("OMNI_ENDPOINT", "https://omni.example.com"), ("OXIDE_HOST", "https://oxide.example.com")],
    ));
}

#[test]
fn a_broken_file_is_not_quoted() {
    let mut seen = String::new();
    for text in [
        "[oxide]\ntoken = \"c4n4ry\n",
        "[oxide]\ntoken = c4n4ry\n",
        "[oxide]\ntoken = 'c4n4ry' 'c4n4ry'\n",
        "[oxide]\ntoken = 'c4n4ry'\ntoken = 'c4n4ry'\n",
        "c4n4ry\n",
    ] {
        let file = file(text, 0o600);
        let path = file.path().to_str().unwrap();
        writeln!(seen, "{}", faults(&["--config", path], &[]).replace(path, "FILE")).unwrap();
    }
    expect_test::expect![[r#"
        these settings have to be mended:
          - --config or CONFIG: FILE line 2 is not TOML: invalid basic string
        these settings have to be mended:
          - --config or CONFIG: FILE line 2 is not TOML: invalid string, expected `"`, `'`
        these settings have to be mended:
          - --config or CONFIG: FILE line 2 is not TOML: expected newline, `#`
        these settings have to be mended:
          - --config or CONFIG: FILE line 3 is not TOML: duplicate key `token` in table `oxide`
        these settings have to be mended:
          - --config or CONFIG: FILE line 1 is not TOML: expected `.`, `=`
    "#]]
    .assert_eq(&seen);
}

#[test]
fn a_secret_can_come_from_a_file() {
    let secret = file("from-file\n", 0o600);
    let path = secret.path().to_str().unwrap();
    let settings = file(
        &format!("[oxide]\nhost = 'https://oxide.example.com'\ntoken_file = '{path}'\n"),
        0o644,
    );
    let mut variables = environment(&GOOD);
    variables.remove("OXIDE_TOKEN");
    variables.insert("CONFIG".into(), settings.path().to_str().unwrap().into());
    let loaded = load(&Flags::default(), &variables).unwrap();
    assert_eq!(oxide(&loaded.config).token.expose(), "from-file");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);

    // The stronger layer decides between value and file.
    variables.insert("OXIDE_TOKEN".into(), "from-environment".into());
    let loaded = load(&Flags::default(), &variables).unwrap();
    assert_eq!(oxide(&loaded.config).token.expose(), "from-environment");
    let loaded = load(&flags(&["--oxide-token-file", path]), &variables).unwrap();
    assert_eq!(oxide(&loaded.config).token.expose(), "from-file");

    variables.insert("OXIDE_TOKEN_FILE".into(), path.into());
    let Faults(twice) = load(&Flags::default(), &variables).unwrap_err();
    assert!(twice.concat().contains("is there twice"), "{twice:?}");
}

#[test]
fn an_empty_or_absent_secret_file_is_a_fault() {
    let empty = file("\n", 0o600);
    let path = empty.path().to_str().unwrap();
    let of = |path: &str| {
        load_with(&["--oxide-token-file", path], &[])
            .unwrap_err()
            .0
            .concat()
    };
    assert!(of(path).contains("is empty"));
    assert!(of("/does/not/exist").contains("cannot read /does/not/exist"));
}

#[test]
fn a_file_without_end_is_not_read_to_its_end() {
    let Faults(faults) = load_with(&["--oxide-token-file", "/dev/zero"], &[]).unwrap_err();
    assert!(faults.concat().contains("/dev/zero is too large"), "{faults:?}");
}

#[test]
fn what_everybody_may_read_is_warned_about() {
    let secret = file(KEY, 0o604);
    let settings = file("[oxide]\ntoken = 'x'\n", 0o644);
    let path = secret.path().to_str().unwrap();
    let loaded = load_with(
        &[
            "--omni-service-account-key-file",
            path,
            "--config",
            settings.path().to_str().unwrap(),
        ],
        &[
            ("OMNI_ENDPOINT", "http://omni.example.com"),
            ("OXIDE_HOST", "http://127.0.0.1:1234"),
        ],
    )
    .unwrap();
    let warnings = loaded.warnings.join("\n");
    assert!(warnings.contains(path), "{warnings}");
    assert!(warnings.contains(settings.path().to_str().unwrap()), "{warnings}");
    assert!(
        warnings.contains("http://omni.example.com has no TLS"),
        "{warnings}"
    );
    assert_eq!(loaded.warnings.len(), 3, "{warnings}");
}

#[test]
fn a_file_of_a_secret_is_its_owners() {
    for (mode, ours, fault) in [
        (0o600, true, None),
        (0o400, true, None),
        (0o640, true, Some("its group")),
        (0o660, true, Some("its group")),
        (0o644, true, Some("everybody")),
        (0o601, true, Some("everybody")),
        // As Kubernetes and systemd hand them out: root's, and readable by our group.
        (0o440, false, None),
        (0o460, false, Some("its group")),
        (0o444, false, Some("everybody")),
    ] {
        let found = loose(mode, ours);
        assert_eq!(found.is_some(), fault.is_some(), "{mode:o}: {found:?}");
        assert!(
            found.unwrap_or_default().contains(fault.unwrap_or_default()),
            "{mode:o}: {found:?}"
        );
    }
}

#[test]
fn a_key_that_cannot_be_used_is_told_with_its_file() {
    let bad = file("c4n4ry!", 0o600);
    let path = bad.path().to_str().unwrap();
    let told = faults(
        &["--omni-service-account-key-file", path],
        &[("OMNI_ENDPOINT", "x")],
    );
    assert!(
        told.contains(&format!("{path}: OMNI_SERVICE_ACCOUNT_KEY is not base64")),
        "{told}"
    );
    assert!(told.contains("`x` is not a URL"), "{told}");
}

#[test]
fn a_ca_bundle_has_a_certificate() {
    let good = file("-----BEGIN CERTIFICATE-----\n", 0o644);
    let bad = file("certificate\n", 0o644);
    let path = good.path().to_str().unwrap();
    let of_factory = config(&["--factory-ca-bundle", path], &[]).factory_ca_bundle;
    assert_eq!(of_factory.as_deref(), Some(good.path()));
    let path = bad.path().to_str().unwrap();
    let Faults(faults) = load_with(&["--factory-ca-bundle", path], &[]).unwrap_err();
    assert!(faults.concat().contains("has no PEM certificate"), "{faults:?}");
}

#[test]
fn endpoints_lose_what_omnis_client_ignores() {
    for (given, kept) in [
        ("https://omni.example.com", "https://omni.example.com"),
        (
            "https://omni.example.com:8443/path?query",
            "https://omni.example.com:8443",
        ),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        ("grpc://[::1]:8080", "grpc://[::1]:8080"),
    ] {
        assert_eq!(endpoint(given).as_deref(), Ok(kept));
    }
    for bad in ["", "omni", "https://", "ftp://x", "localhost:1"] {
        assert!(endpoint(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn durations_are_written_as_in_go() {
    for (text, seconds) in [
        ("90", Some(90)),
        ("90s", Some(90)),
        ("1h30m", Some(5400)),
        ("15m", Some(900)),
    ] {
        assert_eq!(duration(text), seconds.map(Duration::from_secs), "{text}");
    }
    for text in [
        "m",
        "1",
        "1d",
        "-1s",
        "1.5h",
        "99999999999999999999h",
        "18446744073709551615h",
    ] {
        assert_eq!(duration(text).filter(|_| text != "1"), None, "{text}");
    }
}

#[test]
fn what_is_printed_has_no_secret_and_can_be_loaded_again() {
    let loaded = load_with(&["--nameserver", "10.0.0.1", "--log", "debug"], &[]).unwrap();
    let printed = loaded.config.to_string();
    for secret in [CANARY, KEY.trim()] {
        assert!(!printed.contains(secret) && !format!("{loaded:?}").contains(secret));
    }
    // But for its secrets.
    let file = file(&printed.replacen("<redacted>", KEY.trim(), 1), 0o600);
    let again = load(
        &flags(&["--config", file.path().to_str().unwrap()]),
        &BTreeMap::new(),
    )
    .unwrap();
    assert_eq!(again.config.to_string(), printed);
}
