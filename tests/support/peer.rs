//! Upstream's own code as a judge: builds the Go programs below `tests/peers` and runs them as processes that
//! end with the test.
//!
//! Where Go is missing their tests are left out, and one line says so; where `CI=true` they fail instead.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The tests that need Go, as people name them to `cargo test`.
const NEED_GO: &str = "upstream";

/// No program thinks longer about a command. A guard against hanging, generous because builds may run beside.
const ANSWER: Duration = Duration::from_secs(120);

/// Builds the Go program in a folder below `tests/peers`, once per run; `None` where Go is missing.
pub(crate) fn build(folder: &str) -> Option<PathBuf> {
    static BUILT: Mutex<BTreeMap<String, Option<PathBuf>>> = Mutex::new(BTreeMap::new());
    // Who waits here would only wait for the same build. A build that failed fails for the next one too.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(program) = built.get(folder) {
        return program.clone();
    }
    let program = match go_build(folder) {
        Ok(program) => Some(program),
        Err(Trouble::NoGo(reason)) => {
            no_go(&reason);
            None
        }
        Err(Trouble::Broken(reason)) => panic!("tests/peers/{folder} cannot be built: {reason}"),
    };
    built.insert(folder.to_owned(), program.clone());
    program
}

enum Trouble {
    NoGo(String),
    Broken(String),
}

fn go_build(folder: &str) -> Result<PathBuf, Trouble> {
    let go = |error: std::io::Error| Trouble::NoGo(format!("Go is not installed ({error})"));
    Command::new("go").arg("version").output().map_err(go)?;

    let output = output_folder().join(folder);
    if !output.exists() {
        say(&format!(
            "building tests/peers/{folder}; the first time this takes some minutes"
        ));
    }
    let built = Command::new("go")
        .args(["build", "-mod=readonly", "-ldflags=-s -w", "-o"])
        .arg(&output)
        .arg(".")
        .current_dir(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/peers")
                .join(folder),
        )
        // What is installed here, and what go.sum names: nothing else is fetched.
        .env("GOTOOLCHAIN", "local")
        .env("GOWORK", "off")
        // No C compiler, no libraries of this machine.
        .env("CGO_ENABLED", "0")
        .output()
        .map_err(go)?;
    if built.status.success() {
        return Ok(output);
    }
    let reason = String::from_utf8_lossy(&built.stderr).trim().to_owned();
    // "go.mod requires go >= 1.26.4 (running go 1.24.0; GOTOOLCHAIN=local)"
    Err(match reason.contains("requires go >=") {
        true => Trouble::NoGo(format!("Go is too old ({reason})")),
        false => Trouble::Broken(reason),
    })
}

/// Of this checkout: several may share a target folder.
fn output_folder() -> PathBuf {
    let mut hash = DefaultHasher::new();
    env!("CARGO_MANIFEST_DIR").hash(&mut hash);
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("peers-{:016x}", hash.finish()))
}

fn no_go(reason: &str) {
    static SAID: Once = Once::new();
    let line = format!("{reason}: tests against upstream's own code did not run ({NEED_GO})");
    assert!(env::var_os("CI").as_deref() != Some(OsStr::new("true")), "{line}");
    SAID.call_once(|| say(&line));
}

/// A line that is seen even of a test that passes: only what the print macros write is captured.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "\n{line}");
}

/// A running program that takes commands: a line of JSON in, a line of JSON out.
pub(crate) struct Peer {
    /// Dropping it kills the program.
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    log: Arc<Mutex<String>>,
    _logging: JoinSet<()>,
}

impl Peer {
    pub(crate) fn start(program: &Path, arguments: &[&OsStr]) -> Self {
        let mut child = tokio::process::Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut logging = JoinSet::new();
        let kept = Arc::clone(&log);
        logging.spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.push_str(&line);
                kept.push('\n');
            }
        });
        Self {
            commands: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()).lines(),
            child,
            log,
            _logging: logging,
        }
    }

    /// Gives one command and waits for its answer, which must not tell of an error.
    pub(crate) async fn ask(&mut self, command: &Value) -> Value {
        let mut line = command.to_string();
        line.push('\n');
        let asking = async {
            self.commands.write_all(line.as_bytes()).await.ok()?;
            self.commands.flush().await.ok()?;
            self.answers.next_line().await.ok()?
        };
        let answer = timeout(ANSWER, asking).await.ok().flatten();
        let answer = answer.and_then(|answer| serde_json::from_str::<Value>(&answer).ok());
        match answer {
            Some(answer) if answer.get("error").is_none() => answer,
            answer => {
                line.truncate(line.floor_char_boundary(300));
                panic!("{line}: {answer:?}\n--- its log\n{}", self.log())
            }
        }
    }

    /// SIGKILL, and waits for the end.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// What it wrote to its standard error so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
