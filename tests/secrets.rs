//! The daemon as a process: no secret is seen in anything that it says, new ones are used without a restart, and nobody reads its
//! memory.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use omni_infra_provider::omni::Kind;
use omni_infra_provider::omni::kinds::{
    InfraProviderHealthStatuses, MachineRequestStatuses, ProviderJoinConfigs, Stage,
};
use omni_infra_provider::sandbox::omni::Omni;
use omni_infra_provider::sandbox::oxide::{OxideOptions, Verdict};
use omni_infra_provider::sandbox::{Ports, SET, Sandbox, SandboxOptions};
use omni_infra_provider::secret::Secret;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::canaries::Canaries;

const PROVIDER: &str = "oxide";
const TOKEN: &str = "oxide-token-c4n4ry-0123456789abcdef";
const PASSWORD: &str = "pr0xy/c4n4ry+password";

/// A guard against hanging, generous because builds may run beside.
const PATIENCE: Duration = Duration::from_secs(120);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("never came: {what}"))
}

/// A sandbox in this process, and the secrets in it.
struct World {
    sandbox: Sandbox,
    canaries: Canaries,
    _serving: JoinSet<()>,
}

impl World {
    async fn start() -> Self {
        let options = SandboxOptions {
            ports: Ports::FREE,
            oxide: OxideOptions {
                token: TOKEN.to_owned(),
                ..OxideOptions::default()
            },
            ..SandboxOptions::default()
        };
        let (sandbox, doors) = Sandbox::open(&options).await.unwrap();
        let mut serving = JoinSet::new();
        let served = sandbox.clone();
        serving.spawn(async move { served.serve(doors).await.unwrap() });
        let mut canaries = Canaries::default();
        canaries.add("the Oxide token", TOKEN);
        canaries.add("the proxy's password", PASSWORD);
        let world = Self {
            sandbox,
            canaries,
            _serving: serving,
        };
        let mut canaries = world.canaries.clone();
        canaries.add_key(&world.variable("OMNI_SERVICE_ACCOUNT_KEY"));
        canaries.add("the join token", &world.join_token());
        Self { canaries, ..world }
    }

    fn omni(&self) -> &Omni {
        self.sandbox.omni.as_ref().unwrap()
    }

    fn variable(&self, name: &str) -> Secret {
        let variables = self.sandbox.environment();
        variables.into_iter().find(|(known, _)| *known == name).unwrap().1
    }

    fn join_token(&self) -> String {
        let config = self.omni().get::<ProviderJoinConfigs>(PROVIDER, PROVIDER);
        config.unwrap().spec.join_token
    }

    /// What the daemon is started with: the most verbose log, and a proxy that nothing here is behind.
    fn environment(&self) -> Vec<(String, String)> {
        let mut variables: Vec<(String, String)> = self
            .sandbox
            .environment()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.expose().to_owned()))
            .collect();
        variables.extend(
            [
                ("LOG", "trace"),
                ("LOG_FORMAT", "json"),
                ("HTTPS_PROXY", &format!("http://me:{PASSWORD}@127.0.0.1:1")),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        variables
    }

    /// Everything that the daemon wrote into Omni.
    fn written(&self) -> String {
        let theirs = |kind: &str| kind.starts_with("MachineRequests.") || kind.contains("JoinConfig");
        let resources = self.omni().everything();
        let ours = resources
            .iter()
            .filter(|stored| stored.kind.contains("omni.sidero.dev") && !theirs(&stored.kind))
            .filter(|stored| stored.namespace.starts_with("infra-provider"));
        ours.map(|stored| {
            let spec = String::from_utf8_lossy(&stored.spec).into_owned();
            format!("{stored:?} {spec} {}\n", hex::encode(&stored.spec))
        })
        .collect()
    }

    async fn machines(&self, count: u32) {
        self.sandbox.scale(SET, count);
        let count = usize::try_from(count).unwrap();
        let there = self.omni().until(|omni| {
            let statuses = omni.list::<MachineRequestStatuses>(PROVIDER);
            let good = statuses
                .iter()
                .filter(|status| status.spec.stage == Stage::Provisioned);
            (good.count() == count && statuses.len() == count).then_some(())
        });
        within(&format!("{count} machines"), there).await;
    }

    /// Every call to the rack ends so from now on.
    fn rack(&self, verdict: Option<Verdict>) {
        self.sandbox.oxide.set_hook(
            verdict.map(|verdict| -> omni_infra_provider::sandbox::oxide::Hook {
                Arc::new(move |_, _| {
                    let verdict = verdict.clone();
                    Box::pin(async move { verdict })
                })
            }),
        );
    }

    /// Something that our daemon said of itself or of a request in Omni.
    async fn told<K: Kind>(&self, what: &str, words: impl Fn(&K::Spec) -> bool) {
        let told = self.omni().until(|omni| {
            let found = omni.list::<K>(PROVIDER).iter().any(|found| words(&found.spec));
            found.then_some(())
        });
        within(what, told).await;
    }
}

/// A process of ours, and all that it says.
struct Process {
    child: Child,
    said: Arc<Mutex<String>>,
    _listening: JoinSet<()>,
}

impl Process {
    fn start(arguments: &[&str], environment: Vec<(String, String)>) -> Self {
        let program = Command::new(env!("CARGO_BIN_EXE_omni-infra-provider"));
        Self::spawn(program, arguments, environment)
    }

    fn spawn(mut program: Command, arguments: &[&str], environment: Vec<(String, String)>) -> Self {
        let mut child = program
            .args(arguments)
            .env_clear()
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let said = Arc::<Mutex<String>>::default();
        let mut listening = JoinSet::new();
        let (out, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        listening.spawn(listen(out, said.clone()));
        listening.spawn(listen(errors, said.clone()));
        Self {
            child,
            said,
            _listening: listening,
        }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    async fn until_said(&self, words: &str, times: usize) {
        let said = async {
            while self.said().matches(words).count() < times {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(PATIENCE, said).await.is_err() {
            panic!("never said: {words}\n{}", self.said());
        }
    }

    fn pid(&self) -> String {
        self.child.id().unwrap().to_string()
    }

    fn signal(&self, signal: &str) {
        let sent = std::process::Command::new("kill")
            .args([signal, &self.pid()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Waits for its end: its exit code, and all that it said.
    async fn end(mut self) -> (Option<i32>, String) {
        let status = within("the end of the process", self.child.wait()).await.unwrap();
        within("the end of its words", async {
            while self._listening.join_next().await.is_some() {}
        })
        .await;
        (status.code(), self.said())
    }
}

async fn listen(from: impl AsyncRead + Unpin, said: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let mut said = said.lock().unwrap();
        said.push_str(&line);
        said.push('\n');
    }
}

fn echo(status: u16, message: String) -> Verdict {
    Verdict::Status {
        status,
        error_code: None,
        message,
    }
}

/// Variables that differ from the good ones, with their values.
type Changes<'a> = &'a [(&'a str, &'a str)];

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_shows_no_secret_whatever_goes_wrong() {
    let world = World::start().await;
    let daemon = Process::start(&[], world.environment());
    world.machines(1).await;

    // The rack echoes what it was sent, and the join token, which it got as user data.
    let echoed = format!("no such token: Bearer {TOKEN}; {}", world.join_token());
    world.rack(Some(echo(401, echoed)));
    world.sandbox.scale(SET, 2);
    world
        .told::<MachineRequestStatuses>("the rack's refusal in a status", |status| {
            format!("{status:?}").contains("no such token: Bearer <redacted>; <redacted>")
        })
        .await;
    world
        .told::<InfraProviderHealthStatuses>("the rack's refusal in the provider's health", |health| {
            health
                .error
                .contains("no such token: Bearer <redacted>; <redacted>")
        })
        .await;
    daemon.until_said("no such token: Bearer <redacted>", 1).await;

    // Omni refuses the key.
    world.omni().revoke_keys(PROVIDER);
    daemon
        .until_said("does not accept the service account key", 1)
        .await;

    daemon.signal("-TERM");
    let (code, said) = daemon.end().await;
    assert_eq!(code, Some(0), "{said}");
    world.canaries.assert_unseen("the log", &said);
    world.canaries.assert_unseen("Omni", &world.written());
    // The watch over Omni can fail.
    assert!(world.written().contains("no such token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_shows_no_secret_whatever_goes_wrong() {
    let world = World::start().await;
    let good = world.environment();
    let with = |changes: &[(&str, &str)]| {
        let mut variables = good.clone();
        variables.retain(|(name, _)| changes.iter().all(|(changed, _)| changed != name));
        variables.extend(
            changes
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        variables
    };
    let check = async |what: &str, variables, expected| {
        let (code, said) = Process::start(&["check"], variables).end().await;
        assert_eq!(code, Some(expected), "{what}: {said}");
        world.canaries.assert_unseen(what, &said);
        said
    };
    check("a good check", good.clone(), 0).await;

    let echoed = format!("no such token: Bearer {TOKEN}");
    for (what, verdict) in [
        ("a refusal that echoes", echo(401, echoed.clone())),
        ("a rejection that echoes", echo(400, echoed.clone())),
        (
            "a page that echoes",
            Verdict::Raw {
                status: 502,
                body: echoed.clone(),
            },
        ),
        (
            "an answer that is none",
            Verdict::Raw {
                status: 200,
                body: format!("\"{echoed}\""),
            },
        ),
        ("no answer", Verdict::Drop),
    ] {
        world.rack(Some(verdict));
        check(what, good.clone(), 1).await;
    }
    world.rack(None);

    let omni = world
        .variable("OMNI_ENDPOINT")
        .expose()
        .replace("http:", "https:");
    let oxide = world.variable("OXIDE_HOST").expose().replace("http:", "https:");
    let socks = format!("socks5://me:{PASSWORD}@127.0.0.1:1");
    let far = "https://omni.invalid";
    let cases: [(&str, Changes<'_>, i32); 8] = [
        ("no TLS at Omni", &[("OMNI_ENDPOINT", &omni)], 1),
        ("no TLS at the rack", &[("OXIDE_HOST", &oxide)], 1),
        ("a proxy before Omni", &[("OMNI_ENDPOINT", far)], 1),
        ("a proxy before the rack", &[("OXIDE_HOST", far)], 1),
        (
            "a proxy of another sort",
            &[("OMNI_ENDPOINT", far), ("HTTPS_PROXY", &socks)],
            1,
        ),
        (
            "a token that is no header",
            &[("OXIDE_TOKEN", &format!("{TOKEN}\u{7}x"))],
            1,
        ),
        ("a key that is none", &[("OMNI_SERVICE_ACCOUNT_KEY", TOKEN)], 2),
        (
            "a token in a URL",
            &[("OXIDE_HOST", &format!("https://{TOKEN}@oxide.invalid"))],
            2,
        ),
    ];
    for (what, changes, code) in cases {
        check(what, with(changes), code).await;
    }

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    for (what, text) in [
        ("a line that is no TOML", format!("[oxide]\ntoken = {TOKEN}\n")),
        (
            "a token of another form",
            format!("[oxide]\ntoken = [\"{TOKEN}\", {{ a = \"{TOKEN}\" }}]\n"),
        ),
        (
            "a token in a file that does not end",
            format!("[oxide]\ntoken = \"\"\"{TOKEN}\n"),
        ),
    ] {
        fs::write(&file, text).unwrap();
        let variables = with(&[("CONFIG", file.to_str().unwrap()), ("OXIDE_TOKEN", "")]);
        check(what, variables, 2).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_secrets_in_their_files_are_used_without_a_restart() {
    let world = World::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (key, token) = (folder.path().join("key"), folder.path().join("token"));
    let write = |file: &Path, secret: &str| {
        fs::write(file, secret).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    };
    write(&key, world.variable("OMNI_SERVICE_ACCOUNT_KEY").expose());
    write(&token, TOKEN);
    let mut variables = world.environment();
    variables.retain(|(name, _)| !matches!(name.as_str(), "OMNI_SERVICE_ACCOUNT_KEY" | "OXIDE_TOKEN"));
    for (name, file) in [
        ("OMNI_SERVICE_ACCOUNT_KEY_FILE", &key),
        ("OXIDE_TOKEN_FILE", &token),
    ] {
        variables.push((name.to_owned(), file.to_str().unwrap().to_owned()));
    }
    let daemon = Process::start(&[], variables);
    world.machines(1).await;

    // What cannot be used is told, and changes nothing.
    write(&key, "another-c4n4ry-0123456789");
    write(&token, "another\u{7}c4n4ry-0123456789");
    daemon.signal("-HUP");
    for file in [&key, &token] {
        let words = format!("\"file\":\"{}\"", file.display());
        daemon.until_said(&words, 1).await;
    }
    daemon.until_said("the old one stays in use", 2).await;
    world.machines(2).await;

    // The old ones are worth nothing any more.
    world.omni().revoke_keys(PROVIDER);
    let renewed = world
        .omni()
        .renew_key(PROVIDER, Duration::from_secs(3600))
        .unwrap();
    world.sandbox.oxide.add_token("oxide-token-c4n4ry-new", "sandbox");
    write(&key, renewed.expose());
    write(&token, "oxide-token-c4n4ry-new\n");
    daemon.signal("-HUP");
    daemon.until_said("in use from now on", 2).await;
    world.sandbox.oxide.revoke_token(TOKEN);
    world.machines(3).await;

    daemon.signal("-TERM");
    let (code, said) = daemon.end().await;
    assert_eq!(code, Some(0), "{said}");
    let mut canaries = world.canaries.clone();
    canaries.add_key(&renewed);
    canaries.add("a new secret", "oxide-token-c4n4ry-new");
    canaries.add("a bad secret", "c4n4ry-0123456789");
    canaries.assert_unseen("the log", &said);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reads_the_memory_of_a_daemon() {
    let world = World::start().await;
    // Root owns what is root's, so that nothing could be told: then the daemon is somebody else's.
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("daemon");
    let mut program = Command::new(env!("CARGO_BIN_EXE_omni-infra-provider"));
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if is_root {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_omni-infra-provider"), &copy).unwrap();
        program = Command::new(&copy);
        program.uid(65534).gid(65534);
    }
    let daemon = Process::spawn(program, &[], world.environment());
    daemon.until_said("ready", 1).await;
    let process = Path::new("/proc").join(daemon.pid());
    let limits = fs::read_to_string(process.join("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    let limits: Vec<&str> = core.split_whitespace().skip(4).take(2).collect();
    assert_eq!(limits, ["0", "0"], "{core}");
    // The files of a process are its user's, but of one that may not be dumped they are root's.
    assert_eq!(fs::metadata(process.join("mem")).unwrap().uid(), 0);
    let status = fs::read_to_string(process.join("status")).unwrap();
    let user = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert_ne!(
        user.split_whitespace().nth(1),
        Some("0"),
        "nothing can be told of root's"
    );
}

#[test]
fn a_bad_key_and_a_bad_provider_id_are_told_with_all_other_faults() {
    let (code, _, errors) = crate::command_line::run(
        &["run"],
        &[
            ("OMNI_SERVICE_ACCOUNT_KEY", "c4n4ry!"),
            ("PROVIDER_ID", "Oxide_1"),
            ("OXIDE_HOST", "nowhere"),
        ],
        "",
    );
    assert_eq!(code, Some(2), "{errors}");
    for fault in [
        "OMNI_ENDPOINT",
        "OMNI_SERVICE_ACCOUNT_KEY is not base64",
        "`Oxide_1` is not usable",
        "`nowhere` is not a URL",
        "OXIDE_TOKEN",
    ] {
        assert!(errors.contains(fault), "{fault} in {errors}");
    }
}
