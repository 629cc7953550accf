//! Says why a machine has not joined, from the end of its serial console: one sentence, and what to do about it.
//!
//! *Guarantees.* Pure. Nothing that looks like a secret leaves here: a console shows the kernel's arguments, and with them join
//! tokens ([`redact`]). The sentence is short, in one line, and without control characters.
//!
//! *Sources* of the wordings: Talos 1.12 to 1.14 (`controllers/siderolink/manager.go`, `network/operator/dhcp4.go`, `config/acquire.go`,
//! `internal/pkg/ntp/ntp.go`, `internal/app/init/main.go`, platform `nocloud/metadata.go`), the errors of gRPC, TLS and the resolver in
//! Go, what Omni 1.10 answers to a machine that wants to join (`internal/pkg/siderolink/provision.go`), and EDK II's firmware.
//!
//! *Not here.* When the console is read: `engine/observe.rs`.

use crate::secret::hide;
use crate::words::one_line;

/// Longest quotation of a console's line, in characters.
const LONGEST_QUOTE: usize = 160;
/// Shortest run of letters and digits that may be a token: the shortest that is one has 43.
const SHORTEST_TOKEN: usize = 24;
/// From here on a run needs no digit to be taken for a token.
const SURELY_TOKEN: usize = 40;
/// What stands for a secret.
const REDACTED: &str = "<redacted>";
/// Everything behind one of these, up to the end of the word, is a secret.
const SECRET_KEYS: &[&str] = &[
    "siderolink.api=",
    "talos.config=",
    "talos.config.inline=",
    "token=",
    "token:",
    "secret=",
    "password=",
    "authorization:",
];

/// Words that all have to stand in one line, in lower case; and what they mean.
type Known = (&'static [&'static str], &'static str);

/// How the way to Omni fails, in lines of Talos's SideroLink controller. The first that matches counts.
const SIDEROLINK: &[Known] = &[
    (
        &["permissiondenied"],
        "Omni refuses its join token · see whether the provider's join token was revoked or changed: a new machine gets the current one",
    ),
    (
        &["infra provider is being deleted"],
        "Omni says that this infra provider is being deleted or does not exist · see Omni's list of infra providers",
    ),
    (
        &["already registered in omni"],
        "Omni still removes an earlier machine of the same UUID · nothing to do unless it lasts",
    ),
    (
        &["registration limit reached"],
        "Omni has no room for another machine · remove machines, or raise the account's limit",
    ),
    (
        &["is not supported on this omni"],
        "Omni does not let this Talos version join · choose a newer one, or change Omni's join token mode",
    ),
    (
        &["expired or is not yet valid"],
        "its clock is wrong, or Omni's certificate is out of date · see that it reaches a time server, and renew the certificate",
    ),
    (
        &["x509:"],
        "it does not trust the certificate of Omni's machine API · use one that Talos trusts, or see what else answers there",
    ),
    (
        &["authentication handshake failed"],
        "no TLS connection to Omni's machine API · see that its address leads to Omni and to nothing in between",
    ),
    (
        &["lookup "],
        "it cannot resolve the name of Omni's machine API · see the nameservers of the machine class, and that it reaches them",
    ),
    (
        &["produced zero addresses"],
        "it cannot resolve the name of Omni's machine API · see the nameservers of the machine class, and that it reaches them",
    ),
    (
        &["connection refused"],
        "nothing listens where it looks for Omni's machine API · see the machine API's advertised address and port",
    ),
    (
        &["network is unreachable"],
        "it has no route to Omni · see the routes and the address translation of its subnet",
    ),
    (
        &["no route to host"],
        "it has no route to Omni · see the routes and the address translation of its subnet",
    ),
    (
        &["deadline"],
        "Omni does not answer it · see the firewalls on the way to Omni's machine API",
    ),
    (
        &["i/o timeout"],
        "Omni does not answer it · see the firewalls on the way to Omni's machine API",
    ),
    (
        &["unimplemented"],
        "something else than Omni's machine API answers it · see the machine API's advertised address",
    ),
    (
        &["unexpected http status code"],
        "something else than Omni's machine API answers it · see the machine API's advertised address, and that what is in between passes gRPC",
    ),
    (
        &["siderolink connection configured"],
        "Talos has its SideroLink connection, but Omni does not see the machine · see that UDP reaches Omni's WireGuard endpoint, \
         or have the class tunnel it through gRPC",
    ),
];

/// What else keeps a machine from joining. The newest line that matches counts.
const SYSTEM: &[Known] = &[
    (
        &["kernel panic - not syncing"],
        "its kernel panicked · see its console",
    ),
    (
        &["microarchitecture level", "required, halting"],
        "its CPU is too old for Talos · choose a newer CPU platform in the machine class",
    ),
    (
        &["no bootable"],
        "its firmware finds nothing to boot · see that the image has the architecture of the machine; remove the image from the \
         cloud to have it imported anew",
    ),
    (
        &["failed to load boot"],
        "its firmware cannot boot the disk · see that the image has the architecture of the machine; remove the image from the \
         cloud to have it imported anew",
    ),
    (
        &["dhcp request/renew failed"],
        "it gets no address by DHCP · see its network interfaces in the machine class, and the subnet's DHCP",
    ),
    (
        &["no link with matching mac address"],
        "its network configuration names an interface that it does not have · see its network interfaces in the machine class",
    ),
    (
        &["config", "via platform"],
        "Talos cannot use what the provider gave it as user data · please report this to the provider's maintainers",
    ),
    (
        &["time query error"],
        "it cannot get the time · see that it reaches a time server: without one, certificates may look invalid",
    ),
    (
        &["failed looking up server"],
        "it cannot resolve the name of its time server · see the nameservers of the machine class, and that it reaches them",
    ),
];

/// What the end of a console tells.
#[must_use]
pub fn diagnose(console: &str) -> String {
    let text = redact(&hide(&plain(console)));
    let lines: Vec<&str> = text.lines().map(message).filter(|line| tells(line)).collect();
    let Some(last) = lines.last() else {
        return "its serial console shows nothing · see that it boots from the right disk".to_owned();
    };
    let siderolink = |line: &&&str| line.to_lowercase().contains("siderolink.managercontroller");
    let newest = lines.iter().rev().filter(siderolink);
    newest
        .filter_map(|line| find(SIDEROLINK, line))
        .next()
        .or_else(|| lines.iter().rev().find_map(|line| find(SYSTEM, line)))
        .map_or_else(
            || {
                format!(
                    "its serial console ends with \"{}\"",
                    one_line(last, LONGEST_QUOTE)
                )
            },
            str::to_owned,
        )
}

fn find(known: &[Known], line: &str) -> Option<&'static str> {
    let line = line.to_lowercase();
    let (_, meaning) = known
        .iter()
        .find(|(words, _)| words.iter().all(|word| line.contains(word)))?;
    Some(meaning)
}

/// The text without escape sequences and control characters; lines end with a newline alone. What stands before the first line's end
/// is left out where there is more: the console may have been cut within it, and within a secret.
fn plain(console: &str) -> String {
    let mut text = String::with_capacity(console.len());
    let mut chars = console.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // CSI: parameters, then one final letter.
                Some('[') => while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {},
                // OSC: until BEL, or ESC and a backslash.
                Some(']') => {
                    while let Some(c) = chars.next() {
                        if c == '\u{7}' || (c == '\u{1b}' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                _ => {}
            },
            '\r' | '\n' => text.push('\n'),
            '\t' => text.push(' '),
            c if c.is_control() => {}
            c => text.push(c),
        }
    }
    match text.split_once('\n') {
        Some((_, rest)) if rest.lines().any(tells) => rest.to_owned(),
        _ => text,
    }
}

/// A line without the time that the kernel puts before it: else the same message would be another one at each look.
fn message(line: &str) -> &str {
    let line = line.trim();
    let Some((time, rest)) = line.strip_prefix('[').and_then(|line| line.split_once(']')) else {
        return line;
    };
    let is_time = time.trim().parse::<f64>().is_ok();
    if is_time { rest.trim_start() } else { line }
}

fn tells(line: &str) -> bool {
    line.chars().any(char::is_alphabetic)
}

/// The text with everything that looks like a secret taken out.
#[must_use]
pub fn redact(text: &str) -> String {
    let mut redacted = String::with_capacity(text.len());
    for word in text.split_inclusive(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | ',' | ';'))
    {
        let end =
            word.trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | ',' | ';'));
        let (word, separator) = word.split_at(end.len());
        redact_word(word, &mut redacted);
        redacted.push_str(separator);
    }
    redacted
}

fn redact_word(word: &str, redacted: &mut String) {
    let lower = word.to_ascii_lowercase();
    let secret = SECRET_KEYS
        .iter()
        .filter_map(|key| lower.find(key).map(|at| at + key.len()))
        .min();
    // ASCII alone changes its case, so the place is the same in both.
    let (shown, hidden) = word.split_at(secret.unwrap_or(word.len()));
    let mut run = String::new();
    for c in shown.chars() {
        if c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=' | '_' | '-' | '%') {
            run.push(c);
        } else {
            end_run(&mut run, redacted);
            redacted.push(c);
        }
    }
    end_run(&mut run, redacted);
    if !hidden.is_empty() {
        redacted.push_str(REDACTED);
    }
}

/// Takes a run of base64's letters over, unless it may be a token. A slash may be one of them, or part a path.
fn end_run(run: &mut String, redacted: &mut String) {
    let has = |is: fn(&char) -> bool| run.chars().any(|c| is(&c));
    let mixed = has(char::is_ascii_digit) && has(char::is_ascii_lowercase) && has(char::is_ascii_uppercase);
    if run.len() >= SURELY_TOKEN && mixed {
        redacted.push_str(REDACTED);
    } else {
        let parts: Vec<&str> = run
            .split('/')
            .map(|part| if may_be_token(part) { REDACTED } else { part })
            .collect();
        redacted.push_str(&parts.join("/"));
    }
    run.clear();
}

fn may_be_token(run: &str) -> bool {
    let has_digit = run.contains(|c: char| c.is_ascii_digit());
    let long = run.len() >= SURELY_TOKEN || (run.len() >= SHORTEST_TOKEN && has_digit);
    long && !is_uuid(run)
}

fn is_uuid(run: &str) -> bool {
    let groups: Vec<usize> = run.split('-').map(str::len).collect();
    groups == [8, 4, 4, 4, 12] && run.chars().all(|c| c == '-' || c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{diagnose, plain, redact};

    const RAW: &str = "Wn4bQx2vT9kLr7sHc1JdYpE5uAzGm8oXf3RiNt6VwKq";
    const SIGNED: &str = "v2:eyJleHRyYV9kYXRhIjp7Im9tbmkuc2lkZXJvLmRldi9pbmZyYS1wcm92aWRlci1pZCI6InRlc3QifSwic2lnbmF0dXJlIjoiWTNpZ285V2xJSVZOWWpXZmgyWlg5NnpnWW5UQjlwWTI3ZEJaVnJwNDJMZz0ifQ==";

    /// A line as Talos writes it to the console: the kernel's time, its prefix, a message, its fields.
    fn siderolink(error: &str) -> String {
        format!(
            "[   74.120411] [talos] controller failed {{\"component\": \"controller-runtime\", \
             \"controller\": \"siderolink.ManagerController\", \"error\": \"error provisioning: {error}\"}}\r\n"
        )
    }

    #[test]
    fn what_talos_says_about_its_way_to_omni_is_understood() {
        let dialing = |error: &str| {
            siderolink(&format!(
                "rpc error: code = Unavailable desc = connection error: desc = \\\"transport: Error while dialing: {error}\\\""
            ))
        };
        let handshake = |error: &str| {
            siderolink(&format!(
                "rpc error: code = Unavailable desc = connection error: desc = \\\"transport: authentication handshake failed: {error}\\\""
            ))
        };
        let mut seen = String::new();
        for line in [
            siderolink("rpc error: code = PermissionDenied desc = unauthorized"),
            siderolink("rpc error: code = PermissionDenied desc = invalid join token illegal base64 data at input byte 4"),
            siderolink("rpc error: code = NotFound desc = the infra provider is being deleted or doesn't exist"),
            siderolink(
                "rpc error: code = AlreadyExists desc = the machine with the same UUID is already registered in Omni and is in the tearing down phase",
            ),
            siderolink("rpc error: code = ResourceExhausted desc = machine registration limit reached: 5/5 machines registered"),
            siderolink(
                "rpc error: code = FailedPrecondition desc = Talos version v1.5.0 is not supported on this Omni instance as '--join-tokens-mode' is set to 'strict'",
            ),
            handshake("tls: failed to verify certificate: x509: certificate has expired or is not yet valid: current time 1970-01-01T00:01:14Z is before 2026-01-01T00:00:00Z"),
            handshake("tls: failed to verify certificate: x509: certificate signed by unknown authority"),
            handshake("EOF"),
            dialing("dial tcp: lookup omni.example.com on 10.0.0.53:53: no such host"),
            siderolink("rpc error: code = Unavailable desc = name resolver error: produced zero addresses"),
            dialing("dial tcp 192.0.2.7:8090: connect: connection refused"),
            dialing("dial tcp 192.0.2.7:8090: connect: network is unreachable"),
            dialing("dial tcp 192.0.2.7:8090: connect: no route to host"),
            siderolink("rpc error: code = DeadlineExceeded desc = context deadline exceeded while waiting for connections to become ready"),
            dialing("dial tcp 192.0.2.7:8090: i/o timeout"),
            siderolink("rpc error: code = Unimplemented desc = unknown service sidero.link.ProvisionService"),
            siderolink("rpc error: code = Unavailable desc = unexpected HTTP status code received from server: 502 (Bad Gateway)"),
            "[   12.0] [talos] siderolink connection configured {\"component\": \"controller-runtime\", \"controller\": \"siderolink.ManagerController\", \"endpoint\": \"https://omni.example.com:8090\"}\n".to_owned(),
        ] {
            let diagnosis = diagnose(&format!("firmware\n{line}"));
            assert!(!diagnosis.contains('"'), "{line}{diagnosis}");
            seen += &diagnosis;
            seen.push('\n');
        }
        expect_test::expect![[r#"
            Omni refuses its join token · see whether the provider's join token was revoked or changed: a new machine gets the current one
            Omni refuses its join token · see whether the provider's join token was revoked or changed: a new machine gets the current one
            Omni says that this infra provider is being deleted or does not exist · see Omni's list of infra providers
            Omni still removes an earlier machine of the same UUID · nothing to do unless it lasts
            Omni has no room for another machine · remove machines, or raise the account's limit
            Omni does not let this Talos version join · choose a newer one, or change Omni's join token mode
            its clock is wrong, or Omni's certificate is out of date · see that it reaches a time server, and renew the certificate
            it does not trust the certificate of Omni's machine API · use one that Talos trusts, or see what else answers there
            no TLS connection to Omni's machine API · see that its address leads to Omni and to nothing in between
            it cannot resolve the name of Omni's machine API · see the nameservers of the machine class, and that it reaches them
            it cannot resolve the name of Omni's machine API · see the nameservers of the machine class, and that it reaches them
            nothing listens where it looks for Omni's machine API · see the machine API's advertised address and port
            it has no route to Omni · see the routes and the address translation of its subnet
            it has no route to Omni · see the routes and the address translation of its subnet
            Omni does not answer it · see the firewalls on the way to Omni's machine API
            Omni does not answer it · see the firewalls on the way to Omni's machine API
            something else than Omni's machine API answers it · see the machine API's advertised address
            something else than Omni's machine API answers it · see the machine API's advertised address, and that what is in between passes gRPC
            Talos has its SideroLink connection, but Omni does not see the machine · see that UDP reaches Omni's WireGuard endpoint, or have the class tunnel it through gRPC
        "#]].assert_eq(&seen);
    }

    #[test]
    fn what_else_keeps_a_machine_from_joining_is_understood() {
        let mut seen = String::new();
        for line in [
            "[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
            "[    3.0] [talos] [initramfs] x86_64 microarchitecture level 2 or higher is required, halting",
            "BdsDxe: No bootable option or device was found.",
            "BdsDxe: failed to load Boot0001 \"UEFI Misc Device\" from PciRoot(0x0)/Pci(0x3,0x0): Not Found",
            "[   30.2] [talos] DHCP request/renew failed {\"component\": \"controller-runtime\", \"controller\": \"network.OperatorSpecController\", \"error\": \"got no response\", \"link\": \"enp0s8\"}",
            "[    9.2] [talos] nocloud: no link with matching MAC address \"a8:40:25:00:00:01\" (available []), defaulted to use name eth0 instead",
            "[   11.7] [talos] controller failed {\"controller\": \"config.AcquireController\", \"error\": \"failed to load config via platform nocloud: unknown keys found during decoding\"}",
            "[   31.5] [talos] time query error {\"controller\": \"time.SyncController\", \"server\": \"162.159.200.1\", \"error\": \"i/o timeout\"}",
            "[   31.5] [talos] failed looking up server, ignored {\"controller\": \"time.SyncController\", \"server\": \"time.cloudflare.com\", \"error\": \"no such host\"}",
        ] {
            let diagnosis = diagnose(&format!("firmware\r\n{line}\r\n"));
            seen += &diagnosis;
            seen.push('\n');
        }
        expect_test::expect![[r#"
            its kernel panicked · see its console
            its CPU is too old for Talos · choose a newer CPU platform in the machine class
            its firmware finds nothing to boot · see that the image has the architecture of the machine; remove the image from the cloud to have it imported anew
            its firmware cannot boot the disk · see that the image has the architecture of the machine; remove the image from the cloud to have it imported anew
            it gets no address by DHCP · see its network interfaces in the machine class, and the subnet's DHCP
            its network configuration names an interface that it does not have · see its network interfaces in the machine class
            Talos cannot use what the provider gave it as user data · please report this to the provider's maintainers
            it cannot get the time · see that it reaches a time server: without one, certificates may look invalid
            it cannot resolve the name of its time server · see the nameservers of the machine class, and that it reaches them
        "#]].assert_eq(&seen);
    }

    #[test]
    fn the_newest_word_of_siderolink_counts_more_than_anything_else() {
        let refused = siderolink("dial tcp 192.0.2.7:8090: connect: connection refused");
        let denied = siderolink("rpc error: code = PermissionDenied desc = unauthorized");
        let noise = "[  90.1] [talos] DHCP request/renew failed {\"link\": \"enp0s9\"}\n";
        let diagnosis = diagnose(&format!("firmware\n{refused}{denied}{noise}"));
        assert!(
            diagnosis.starts_with("Omni refuses its join token"),
            "{diagnosis}"
        );
        let diagnosis = diagnose(&format!("firmware\n{denied}{refused}{noise}"));
        assert!(diagnosis.starts_with("nothing listens"), "{diagnosis}");
    }

    #[test]
    fn a_console_that_nobody_knows_is_quoted_short_and_plain() {
        let lines = "firmware\n\u{1b}[2J\u{1b}[01;31m[   5.25] mount: \u{1b}]0;title\u{7}unknown\u{0} thing\t42\u{1b}[0m\r\n\r\n[  9.1]\r\n---\n";
        assert_eq!(
            diagnose(lines),
            "its serial console ends with \"mount: unknown thing 42\""
        );
        let long = diagnose(&format!("x\n{}", "words ".repeat(1000)));
        assert_eq!(
            long.chars().count(),
            "its serial console ends with \"\"".len() + 161
        );
    }

    #[test]
    fn a_console_without_a_word_says_so() {
        for nothing in ["", "\r\n", "\u{1b}[2J", "[    0.000000]\n"] {
            assert!(
                diagnose(nothing).starts_with("its serial console shows nothing"),
                "{nothing:?}"
            );
        }
    }

    #[test]
    fn tokens_are_taken_out_wherever_they_stand() {
        for secret in [RAW, SIGNED] {
            let encoded: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
            for line in [
                format!(
                    "Command line: BOOT_IMAGE=/A/vmlinuz siderolink.api=https://omni.example.com:8090/?jointoken={encoded} console=ttyS0"
                ),
                format!("siderolink.api=grpc://omni:8090?grpc_tunnel=true&jointoken={secret}"),
                format!("apiUrl: https://omni.example.com:8090/?JOINTOKEN={encoded}"),
                format!("{{\"token\": \"{secret}\"}}"),
                format!("token={secret}"),
                format!("Authorization: Bearer {secret}"),
                format!("it said {secret}, and left"),
                format!("\u{1b}[1m{secret}\u{1b}[0m"),
            ] {
                let console = format!("firmware\n{line}\n");
                let shown = diagnose(&console);
                let (start, end) = (&secret[3..20], &secret[secret.len() - 12..]);
                assert!(!shown.contains(start) && !shown.contains(end), "{line}\n{shown}");
            }
        }
        // Cut within the token.
        let cut = format!("{}\nafter\n", &RAW[25..]);
        assert_eq!(diagnose(&cut), "its serial console ends with \"after\"");
    }

    #[test]
    fn what_a_person_needs_is_not_taken_out() {
        for line in [
            "instance 0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11 of web-x7k9q2",
            "mount /usr/lib/modules/6.12.43/kernel/drivers/net/ethernet failed",
            "dial tcp 192.0.2.7:8090: connect: connection refused",
            "controller siderolink.ManagerController of controller-runtime",
        ] {
            assert_eq!(redact(line), line);
        }
    }

    proptest! {
        #[test]
        fn whatever_a_console_holds_the_diagnosis_is_one_short_line(console in "(?s).{0,400}") {
            let diagnosis = diagnose(&console);
            prop_assert!(diagnosis.chars().count() < 300);
            prop_assert!(!diagnosis.chars().any(char::is_control), "{diagnosis:?}");
            prop_assert_eq!(plain(&plain(&console)).contains('\u{1b}'), false);
        }

        #[test]
        fn no_token_survives_in_any_surroundings(before in "[ -~]{0,40}[ =?&:\"]", token in "[A-Za-z0-9]{43,51}", after in "[ &\"][ -~]{0,40}") {
            let shown = redact(&format!("{before}{token}{after}"));
            prop_assert!(!shown.contains(&token[..16]) && !shown.contains(&token[token.len() - 16..]), "{shown}");
        }
    }
}
