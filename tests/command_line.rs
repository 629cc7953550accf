//! The binary as its users meet it: messages, exit codes, and secrets that no output shows.

use std::io::Write;
use std::process::{Command, Stdio};

use expect_test::expect;
use omni_infra_provider::engine::health::ANNOTATION_INSTALLATION;
use omni_infra_provider::omni::kinds::{InfraProviderStatuses, MachineRequests};
use omni_infra_provider::sandbox::{PROJECT, Ports, Sandbox, SandboxOptions};

/// A secret that no output may show.
const CANARY: &str = "c4n4ry";

/// Runs the binary with no environment but the given one; exit code, standard output, standard error.
pub(crate) fn run(
    arguments: &[&str],
    environment: &[(&str, &str)],
    input: &str,
) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_omni-infra-provider"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads nothing may be gone already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(
        !out.contains(CANARY) && !err.contains(CANARY),
        "a secret was shown:\n{out}\n{err}"
    );
    (output.status.code(), out, err)
}

/// The long help of a command; of the whole program for an empty one.
pub(crate) fn help(command: &str) -> String {
    let arguments = if command.is_empty() {
        vec!["--help"]
    } else {
        vec![command, "--help"]
    };
    let (code, help, errors) = run(&arguments, &[], "");
    assert_eq!(code, Some(0), "{errors}");
    help
}

const GOOD: [(&str, &str); 4] = [
    ("OMNI_ENDPOINT", "http://127.0.0.1:1"),
    (
        "OMNI_SERVICE_ACCOUNT_KEY",
        include_str!("../src/omni/testdata/keys/omnictl-create.txt"),
    ),
    ("OXIDE_HOST", "http://127.0.0.1:1"),
    ("OXIDE_TOKEN", "c4n4ry"),
];

#[test]
fn the_version_is_the_one_of_the_file() {
    let version = format!("omni-infra-provider {}", include_str!("../VERSION"));
    assert_eq!(run(&["--version"], &[], ""), (Some(0), version, String::new()));
}

#[test]
fn nothing_set_is_told_at_once() {
    for command in [&[][..], &["run"], &["check"]] {
        let (code, output, errors) = run(command, &[], "");
        assert_eq!((code, output.as_str()), (Some(2), ""));
        for name in [
            "OMNI_ENDPOINT",
            "OMNI_SERVICE_ACCOUNT_KEY",
            "OXIDE_HOST",
            "OXIDE_TOKEN",
            "[oxide]",
            "GANETI_ENDPOINT",
            "[ganeti]",
        ] {
            assert!(errors.contains(name), "{name} in {errors}");
        }
    }
}

#[test]
fn secrets_as_flags_are_refused() {
    for arguments in [
        &["--oxide-token", "c4n4ry"][..],
        &["--oxide-token=c4n4ry"],
        &["run", "--oxide-token", "c4n4ry"],
        &["check", "--omni-service-account-key=c4n4ry"],
        &["--omni-service-account-key", "c4n4ry", "--oxide-token", "c4n4ry"],
    ] {
        let (code, _, errors) = run(arguments, &GOOD, "");
        assert_eq!(code, Some(2), "{errors}");
        assert!(
            errors.contains("is refused") && errors.contains("-file"),
            "{errors}"
        );
    }
    // Misspelt ones are not quoted back either.
    for arguments in [
        &["--oxide-tokn=c4n4ry"][..],
        &["--omni-service-accountkey=c4n4ry"],
    ] {
        let (code, ..) = run(arguments, &GOOD, "");
        assert_eq!(code, Some(2));
    }
}

#[test]
fn help_offers_no_secret_as_a_flag() {
    let help = help("");
    assert!(
        help.contains("--nameserver <IP>") && help.contains("[env: OMNI_ENDPOINT]"),
        "{help}"
    );
    assert!(
        !help.contains("--oxide-token <") && !help.contains("--omni-service-account-key <"),
        "{help}"
    );
}

#[test]
fn check_prints_the_settings_without_secrets() {
    let (_, output, _) = run(&["check", "--nameserver", "10.0.0.1", "--log", "off"], &GOOD, "");
    expect![[r#"
        nameserver = ["10.0.0.1"]
        join_deadline = "900s"
        orphans = "report"
        high_availability = false
        log = "off"
        log_format = "json"

        [omni]
        endpoint = "http://127.0.0.1:1"
        service_account_key = "<redacted>"
        insecure_skip_tls_verify = false

        [oxide]
        host = "http://127.0.0.1:1"
        token = "<redacted>"

        [provider]
        id = "oxide"
        name = "Oxide"
        description = "Oxide Omni infrastructure provider."

        [provisioner]
        concurrency = 16
    "#]]
    .assert_eq(&output);
}

#[test]
fn the_schemas_are_those_in_machine_classes() {
    for (arguments, schema) in [
        (
            &["schema"][..],
            include_str!("../machine-classes/oxide.schema.json"),
        ),
        (
            &["schema", "--cloud", "ganeti"],
            include_str!("../machine-classes/ganeti.schema.json"),
        ),
    ] {
        let (code, printed, errors) = run(arguments, &[], "");
        assert_eq!(code, Some(0), "{errors}");
        assert!(printed == schema, "{arguments:?}: it is stale: run `make schema`");
    }
}

#[test]
fn completions_know_the_commands() {
    let (code, script, errors) = run(&["completions", "bash"], &[], "");
    assert_eq!(code, Some(0), "{errors}");
    assert!(script.contains("validate") && script.contains("--nameserver"));
}

const CLASS: &str = "\
metadata:
  namespace: default
  type: MachineClasses.omni.sidero.dev
  id: small
spec:
  autoprovision:
    providerid: oxide
    providerdata: |
      project: kubernetes
      network_interfaces:
        - {ip_config: v4, vpc_name: default, subnet_name: default}
";

#[test]
fn a_good_class_is_good_as_a_whole_and_as_provider_data() {
    let data = CLASS
        .split("providerdata: |\n")
        .nth(1)
        .unwrap()
        .replace("\n      ", "\n");
    for text in [CLASS, data.trim_start()] {
        let (code, output, errors) = run(&["validate", "-"], &[], text);
        assert_eq!((code, output.as_str()), (Some(0), "-: good\n"), "{errors}");
    }
}

#[test]
fn every_fault_of_a_class_is_named() {
    let faults = |text: &str| {
        let (code, output, errors) = run(&["validate", "-"], &[], text);
        assert_eq!((code, output.as_str()), (Some(1), ""));
        errors
    };
    expect![[r#"
        -: small: unknown field `autoprovision.providerId`: did you mean `providerid`?
        -: small: `autoprovision.providerid` is missing
        -: small: provider data: line 2: unknown field `memmory`: did you mean `memory`?
        -: small: provider data: unknown field `cpu`: did you mean `cpus`?
    "#]]
    .assert_eq(&faults(&CLASS.replace("providerid", "providerId").replace(
        "project: kubernetes",
        "project: kubernetes\n      memmory: 8\n      cpu: 2",
    )));
    expect![[r#"
        -: small: provider data: line 3: `network_interfaces[0].ip_config` cannot be `v5`: did you mean `v4`?
    "#]]
    .assert_eq(&faults(&CLASS.replace("ip_config: v4", "ip_config: v5")));
    expect![[r#"
        -: small: provider data: project is "Kubernetes", but it must start with a lower-case letter, or an ID must be given.
        -: small: provider data: memory must be between 1 and 1536 GiB, not 0.
    "#]].assert_eq(&faults(&CLASS.replace("project: kubernetes", "project: Kubernetes\n      memory: 0")));
    expect![[r#"
        -: has no resource of type MachineClasses.omni.sidero.dev
    "#]]
    .assert_eq(&faults(&CLASS.replace("MachineClasses", "Clusters")));
    expect![[r#"
        -: `project` is missing
    "#]]
    .assert_eq(&faults(""));
    expect![[r#"
        -: line 1: `project` must be a single value
    "#]]
    .assert_eq(&faults("project: [\n"));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let (code, _, errors) = run(&["validate", "/does/not/exist.yaml"], &[], "");
    assert_eq!(code, Some(1));
    assert!(
        errors.starts_with("/does/not/exist.yaml: cannot be read: "),
        "{errors}"
    );
}

#[test]
fn no_filter_makes_other_crates_print_the_key_that_they_parse() {
    for filter in ["trace", "pgp=trace,info"] {
        let (_, _, errors) = run(&["check", "--log", filter, "--log-format", "json"], &GOOD, "");
        // The parser of keys prints the secret part as hexadecimal digits.
        let told: Vec<&str> = errors.lines().filter(|line| line.contains("pgp::")).collect();
        assert!(told.is_empty(), "{told:#?}");
    }
}

/// A sandbox in this process, for the binary to talk to.
async fn with_sandbox(tell: impl AsyncFnOnce(&Sandbox, &[(&str, &str)])) {
    let options = SandboxOptions {
        ports: Ports::FREE,
        ..SandboxOptions::default()
    };
    let (sandbox, doors) = Sandbox::open(&options).await.unwrap();
    let environment = sandbox.environment();
    let environment: Vec<(&str, &str)> = environment
        .iter()
        .map(|(name, value)| (*name, value.expose()))
        .collect();
    tokio::select! {
        served = sandbox.serve(doors) => served.unwrap(),
        () = tell(&sandbox, &environment) => {}
    }
}

/// Runs the binary beside a sandbox in this process.
async fn run_beside(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let owned = |text: &&str| (*text).to_owned();
    let arguments: Vec<String> = arguments.iter().map(owned).collect();
    let environment: Vec<(String, String)> = environment
        .iter()
        .map(|(name, value)| (owned(name), owned(value)))
        .collect();
    let running = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let environment: Vec<(&str, &str)> = environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        run(&arguments, &environment, "")
    });
    running.await.unwrap()
}

#[tokio::test]
async fn orphans_are_listed_with_their_reasons_and_given_back() {
    with_sandbox(async |sandbox, environment| {
        let (code, out, errors) = run_beside(&["orphans"], environment).await;
        assert_eq!((code, out.as_str()), (Some(1), ""), "before the provider has registered: {errors}");

        let mut daemon = tokio::process::Command::new(env!("CARGO_BIN_EXE_omni-infra-provider"))
            .env_clear()
            .envs(environment.iter().copied())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let omni = sandbox.omni.as_ref().unwrap();
        let registered = omni.until(|omni| omni.get::<InfraProviderStatuses>("oxide", "oxide"));
        let registration = registered.await;
        let installation = &registration.metadata.annotations[&ANNOTATION_INSTALLATION.to_owned()];
        daemon.kill().await.unwrap();
        let (code, out, errors) = run_beside(&["orphans"], environment).await;
        assert_eq!((code, out.as_str()), (Some(0), ""));
        assert!(errors.starts_with("nothing is orphaned"), "{errors}");

        let sentence = "Managed by the Oxide Omni infrastructure provider (oxide).";
        let plant = |name: &str, description: &str| {
            sandbox.oxide.plant_instance(PROJECT, name, description).unwrap();
        };
        plant("lost", &format!("{sentence} request=lost installation={installation}"));
        plant("old", &format!("{sentence} request=old installation=before"));
        plant("theirs", sentence);
        plant("database", "not ours");
        let (code, out, errors) = run_beside(&["orphans"], environment).await;
        let words: Vec<String> = out
            .lines()
            .skip(1)
            .map(|line| {
                let words: Vec<&str> = line.split("   ").map(str::trim).filter(|word| !word.is_empty()).collect();
                [words[0], words[1], words[3], words[4]].join(" | ")
            })
            .collect();
        expect![[r#"
            talos | lost | lost | no machine request in Omni
            talos | old | old | made for another Omni account, or before this provider was created anew: never touched
            talos | theirs | - | made by the Go provider, for no request that Omni has: never touched"#]]
        .assert_eq(&words.join("\n"));
        assert_eq!(code, Some(0), "{errors}");

        let (code, out, errors) = run_beside(&["release", "lost"], environment).await;
        assert_eq!(code, Some(0), "{errors}");
        assert!(out.starts_with("lost (ID ") && out.ends_with(" in talos is yours: the provider never touches it again\n"), "{out}");
        let (_, out, _) = run_beside(&["orphans"], environment).await;
        assert!(out.contains("released to you: never touched again"), "{out}");

        // Its account is gone: what carries the mark is listed all the same.
        let mut without: Vec<(&str, &str)> = environment.to_vec();
        without.retain(|(name, _)| *name != "OMNI_ENDPOINT");
        without.push(("OMNI_ENDPOINT", "http://127.0.0.1:1"));
        let (code, out, errors) = run_beside(&["orphans"], &without).await;
        assert!(code == Some(1) && errors.contains("Omni could not be asked"), "{code:?}: {errors}");
        assert_eq!(out.lines().filter(|line| line.contains("Omni could not be asked")).count(), 3, "{out}");

        for (name, fault) in [
            ("old", "error: old: made for another Omni account, or before this provider was created anew"),
            ("database", "error: neither Omni nor the cloud has database"),
        ] {
            let (code, _, errors) = run_beside(&["release", name], environment).await;
            assert!(code == Some(1) && errors.starts_with(fault), "{code:?}: {errors}");
        }
        sandbox.scale("web", 1);
        let wanted = omni
            .until(|omni| Some(omni.list::<MachineRequests>("oxide").first()?.id().to_owned()))
            .await;
        let (code, _, errors) = run_beside(&["release", &wanted], environment).await;
        assert!(code == Some(1) && errors.contains("is wanted by a machine request that runs"), "{errors}");
    })
    .await;
}
