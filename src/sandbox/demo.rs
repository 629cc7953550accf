//! Tells one story for whoever watches: no machines, three, one, none, with this program's own daemon as a
//! child process.
//!
//! The daemon is started as an operator would start it, with nothing but the four variables that the sandbox
//! prints. On a terminal the story is a live table, elsewhere a line for each change. It ends well only if
//! every machine ran and joined, the daemon ended with 0 when it was asked to, and nothing is left but
//! images, which are the factory's byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::view::{self, Row};
use super::{PROJECT, Ports, SET, Sandbox, SandboxOptions, TALOS_VERSION};
use crate::omni::kinds::InfraProviderStatuses;

/// What the daemon inherits: where programs, homes and trusted certificates are, and nothing that configures
/// it.
const INHERITED: [&str; 6] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RUST_BACKTRACE",
];
/// How long the daemon may take to end once it was asked to: its own bound, and then some.
const SHUTDOWN: Duration = Duration::from_secs(30);
/// Changes that come together are shown together; a person sees no difference, a terminal does not flicker.
const BREATH: Duration = Duration::from_millis(30);
/// How often the clock on a terminal moves when nothing else does.
const TICK: Duration = Duration::from_millis(500);
/// How much of the daemon's log a failure shows.
const TAIL: usize = 25;

/// How the story is told.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// The daemon.
    pub program: PathBuf,
    /// Its arguments; none means `run`.
    pub arguments: Vec<OsString>,
    /// The sandbox that it meets.
    pub sandbox: SandboxOptions,
    /// How long the whole story may take.
    pub limit: Duration,
    /// Whether lines can be drawn over.
    pub terminal: bool,
}

impl DemoOptions {
    /// This program's own daemon, within two minutes: many times what it takes, in a debug build on a slow
    /// machine.
    ///
    /// # Errors
    /// When this program cannot be found.
    pub fn new(terminal: bool) -> io::Result<Self> {
        Ok(Self {
            program: std::env::current_exe()?,
            arguments: Vec::new(),
            sandbox: SandboxOptions {
                ports: Ports::FREE,
                ..SandboxOptions::default()
            },
            limit: Duration::from_secs(120),
            terminal,
        })
    }
}

/// Why the story did not end well.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DemoError(String);

impl From<io::Error> for DemoError {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Tells the story on `out`.
///
/// # Errors
/// What went wrong, after it was told on `out` with what is left and the end of the daemon's log.
pub async fn tell(options: DemoOptions, out: impl Write) -> Result<(), DemoError> {
    let (sandbox, doors) = Sandbox::open(&options.sandbox)
        .await
        .map_err(|error| DemoError(error.to_string()))?;
    let mut servers = JoinSet::new();
    let served = sandbox.clone();
    servers.spawn(async move { served.serve(doors).await });

    let log = log_file()?;
    let mut screen = Screen::new(out, options.terminal);
    screen.say(&format!("The daemon's log: {}", log.display()))?;
    let daemon = start(&options, &sandbox, &log)?;
    let mut story = Story {
        deadline: Instant::now() + options.limit,
        limit: options.limit,
        interrupt: signal(SignalKind::interrupt())?,
        terminate: signal(SignalKind::terminate())?,
        ran: BTreeSet::new(),
        sandbox,
        servers,
        daemon,
        screen,
    };
    let told = story.tell().await;
    if let Err(error) = &told {
        story.explain(error, &log)?;
    }
    told
}

/// A folder of its own: the log may tell more than other users of this machine should read.
fn log_file() -> io::Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("omni-infra-provider-demo-{}", uuid::Uuid::new_v4()));
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&folder)?;
    Ok(folder.join("daemon.log"))
}

fn start(options: &DemoOptions, sandbox: &Sandbox, log: &Path) -> Result<Child, DemoError> {
    let log = File::create(log)?;
    let mut command = Command::new(&options.program);
    command.args(&options.arguments).env_clear().envs(
        INHERITED
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?))),
    );
    for (name, value) in sandbox.environment() {
        command.env(name, value.expose());
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| DemoError(format!("cannot start {}: {error}", options.program.display())))
}

struct Story<W> {
    sandbox: Sandbox,
    servers: JoinSet<io::Result<()>>,
    daemon: Child,
    screen: Screen<W>,
    interrupt: Signal,
    terminate: Signal,
    deadline: Instant,
    limit: Duration,
    /// Requests whose machine was once all that it should be.
    ran: BTreeSet<String>,
}

impl<W: Write> Story<W> {
    async fn tell(&mut self) -> Result<(), DemoError> {
        self.until("the daemon to register with Omni", |sandbox, _| {
            let omni = sandbox.omni.as_ref();
            omni.is_some_and(|omni| {
                omni.get::<InfraProviderStatuses>(&sandbox.provider, &sandbox.provider)
                    .is_some()
            })
        })
        .await?;
        let mut chapters = Vec::new();
        for (machines, title) in [
            (3, "0 -> 3: machines are made, start, and join"),
            (1, "3 -> 1: two are drained and deleted"),
            (0, "1 -> 0: the last one goes"),
        ] {
            self.screen.say(title)?;
            self.sandbox.scale(SET, machines);
            let took = self
                .until(&format!("{machines} machines"), |sandbox, rows| {
                    let all = usize::try_from(machines).is_ok_and(|machines| rows.len() == machines);
                    all && rows.iter().all(Row::is_done)
                        && (machines > 0 || view::leftovers(sandbox).is_empty())
                })
                .await?;
            chapters.push(format!("{machines} after {:.1} s", took.as_secs_f64()));
        }
        let ended = self.stop().await?;
        self.judge(ended)?;
        self.screen.clear()?;
        self.screen.say(&format!(
            "Done: {}; {} machines ran and joined, every one left nothing behind; {} stays; the daemon ended \
             with 0.",
            chapters.join(", "),
            self.ran.len(),
            view::summary(&self.sandbox)
                .rsplit(", ")
                .next()
                .unwrap_or_default(),
        ))?;
        Ok(())
    }

    /// Shows what happens until something is so, and says how long it took.
    async fn until(
        &mut self,
        what: &str,
        reached: impl Fn(&Sandbox, &[Row]) -> bool,
    ) -> Result<Duration, DemoError> {
        let began = Instant::now();
        let mut rack = self.sandbox.oxide.changes();
        let mut omni = self.sandbox.omni.as_ref().map(|omni| omni.changes());
        loop {
            rack.mark_unchanged();
            if let Some(omni) = &mut omni {
                omni.mark_unchanged();
            }
            let rows = view::rows(&self.sandbox);
            let done = rows.iter().filter(|row| row.is_done());
            self.ran.extend(done.map(|row| row.request.clone()));
            self.screen.show(&rows, &view::summary(&self.sandbox))?;
            if reached(&self.sandbox, &rows) {
                return Ok(began.elapsed());
            }
            let omni_changed = async {
                match &mut omni {
                    Some(omni) => omni.changed().await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = rack.changed() => {}
                _ = omni_changed => {}
                () = tokio::time::sleep(TICK), if self.screen.terminal => {}
                status = self.daemon.wait() => {
                    return Err(DemoError(format!("the daemon ended by itself, with {}", status?)));
                }
                ended = self.servers.join_next() => {
                    return Err(DemoError(format!("the sandbox ended: {ended:?}")));
                }
                _ = self.interrupt.recv() => return Err(DemoError("interrupted".to_owned())),
                _ = self.terminate.recv() => return Err(DemoError("told to end".to_owned())),
                () = tokio::time::sleep_until(self.deadline) => {
                    return Err(DemoError(format!(
                        "waited for {what}, and {} s for the whole story are over",
                        self.limit.as_secs()
                    )));
                }
            }
            tokio::time::sleep(BREATH).await;
        }
    }

    /// Asks the daemon to end, as a service manager would.
    async fn stop(&mut self) -> Result<ExitStatus, DemoError> {
        let Some(id) = self.daemon.id() else {
            return Err(DemoError("the daemon ended by itself".to_owned()));
        };
        // The standard library sends SIGKILL alone, and the system call would be unsafe code.
        let mut kill = Command::new("sh");
        kill.args(["-c", "kill -TERM \"$1\"", "sh", &id.to_string()]);
        let sent = kill.stdin(Stdio::null()).status().await?;
        if !sent.success() {
            return Err(DemoError(format!("could not send SIGTERM: {sent}")));
        }
        tokio::time::timeout(SHUTDOWN, self.daemon.wait())
            .await
            .map_err(|_| {
                DemoError(format!(
                    "the daemon did not end within {} s after SIGTERM",
                    SHUTDOWN.as_secs()
                ))
            })?
            .map_err(DemoError::from)
    }

    /// What cannot be seen from the table.
    fn judge(&self, ended: ExitStatus) -> Result<(), DemoError> {
        let mut wrong = view::leftovers(&self.sandbox);
        for left in &mut wrong {
            left.insert_str(0, "left behind: ");
        }
        if !ended.success() {
            wrong.push(format!("the daemon ended with {ended}"));
        }
        if self.ran.len() < 3 {
            wrong.push(format!("only {} machines ran and joined", self.ran.len()));
        }
        if let Some(omni) = &self.sandbox.omni {
            wrong.extend(omni.violations());
            let refused = omni.refused_joins().into_iter();
            wrong.extend(refused.map(|(uuid, why)| format!("machine {uuid} was not let in: {why}")));
            let raw: BTreeMap<String, u64> = omni
                .schematics()
                .keys()
                .map(|schematic| {
                    let image = self
                        .sandbox
                        .factory
                        .raw_image(schematic, TALOS_VERSION, "nocloud", "amd64");
                    let hash = self
                        .sandbox
                        .factory
                        .raw_sha256(schematic, TALOS_VERSION, "nocloud", "amd64");
                    (hash, image.len() as u64)
                })
                .collect();
            for image in self.sandbox.oxide.images(PROJECT) {
                let whole = raw.iter().any(|(hash, length)| {
                    let kept = self.sandbox.oxide.image_sha256(PROJECT, &image.name, *length);
                    kept.as_ref() == Some(hash)
                });
                if !whole {
                    wrong.push(format!(
                        "image {} is not what the factory made",
                        image.name.as_str()
                    ));
                }
            }
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(DemoError(wrong.join("; ")))
        }
    }

    /// Says what went wrong, what there is, and what the daemon said last.
    fn explain(&mut self, error: &DemoError, log: &Path) -> io::Result<()> {
        self.screen.keep();
        self.screen.say(&format!("FAILED: {error}"))?;
        for left in view::leftovers(&self.sandbox) {
            self.screen.say(&format!("  there is: {left}"))?;
        }
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default();
        self.screen
            .say(&format!("The end of the daemon's log, {}:", log.display()))?;
        for line in tail {
            self.screen.say(&format!("  {line}"))?;
        }
        Ok(())
    }
}

/// Where the story is shown: lines that stay, and on a terminal a table below them that is drawn anew.
struct Screen<W> {
    out: W,
    terminal: bool,
    began: Instant,
    /// The table as it stands on the terminal.
    drawn: Vec<String>,
    /// What was last said of each row where nothing can be drawn over.
    said: BTreeMap<String, String>,
}

impl<W: Write> Screen<W> {
    fn new(out: W, terminal: bool) -> Self {
        Self {
            out,
            terminal,
            began: Instant::now(),
            drawn: Vec::new(),
            said: BTreeMap::new(),
        }
    }

    fn time(&self) -> String {
        format!("{:>6.1} s", self.began.elapsed().as_secs_f64())
    }

    /// A line that stays.
    fn say(&mut self, text: &str) -> io::Result<()> {
        let table = std::mem::take(&mut self.drawn);
        self.erase(table.len())?;
        let time = self.time();
        writeln!(self.out, "{time}  {text}")?;
        self.draw(table)?;
        self.out.flush()
    }

    /// The rows as they are now.
    fn show(&mut self, rows: &[Row], summary: &str) -> io::Result<()> {
        if self.terminal {
            let mut table = vec![format!("{}  {summary}", self.time())];
            table.extend(view::table(rows));
            let before = std::mem::take(&mut self.drawn);
            self.erase(before.len())?;
            self.draw(table)?;
            return self.out.flush();
        }
        let mut gone = std::mem::take(&mut self.said);
        for row in rows {
            let line = view::line(row);
            if gone.remove(&row.request).as_ref() != Some(&line) {
                let time = self.time();
                writeln!(self.out, "{time}  {line}")?;
            }
            self.said.insert(row.request.clone(), line);
        }
        for request in gone.keys() {
            let time = self.time();
            writeln!(self.out, "{time}  {request}: gone")?;
        }
        self.out.flush()
    }

    /// Takes the table away, for good.
    fn clear(&mut self) -> io::Result<()> {
        let table = std::mem::take(&mut self.drawn);
        self.erase(table.len())
    }

    /// Leaves the table where it is, and goes on below it.
    fn keep(&mut self) {
        self.drawn.clear();
    }

    fn erase(&mut self, lines: usize) -> io::Result<()> {
        if lines == 0 {
            return Ok(());
        }
        // Up to the table's first line, and all below it away.
        write!(self.out, "\x1b[{lines}A\x1b[J")
    }

    fn draw(&mut self, table: Vec<String>) -> io::Result<()> {
        for line in &table {
            // Clipped at the edge: a line that wraps would be two when it is erased.
            writeln!(self.out, "\x1b[?7l{line}\x1b[?7h")?;
        }
        self.drawn = table;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(script: &str) -> DemoOptions {
        DemoOptions {
            program: "sh".into(),
            arguments: vec!["-c".into(), script.into()],
            limit: Duration::from_secs(20),
            ..DemoOptions::new(false).unwrap()
        }
    }

    #[tokio::test]
    async fn a_daemon_that_ends_by_itself_fails_the_story_and_its_log_is_shown() {
        let mut out = Vec::new();
        let script = "echo endpoint=${OMNI_ENDPOINT%:*} host=${OXIDE_HOST%:*} id=$PROVIDER_ID \
                      key=${OMNI_SERVICE_ACCOUNT_KEY:+set} token=${OXIDE_TOKEN:+set}; exit 3";
        let error = tell(options(script), &mut out).await.unwrap_err();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(
            error.to_string(),
            "the daemon ended by itself, with exit status: 3"
        );
        assert!(out.contains("FAILED: the daemon ended by itself"), "{out}");
        assert!(
            out.contains("endpoint=http://127.0.0.1 host=http://127.0.0.1 id= key=set token=set"),
            "{out}"
        );
    }

    #[tokio::test]
    async fn a_daemon_that_does_nothing_fails_the_story_in_time() {
        let mut out = Vec::new();
        let told = tell(
            DemoOptions {
                limit: Duration::from_millis(300),
                ..options("sleep 60")
            },
            &mut out,
        );
        let error = told.await.unwrap_err().to_string();
        assert!(error.starts_with("waited for the daemon to register"), "{error}");
    }

    #[test]
    fn elsewhere_than_on_a_terminal_only_changes_are_told() {
        let mut out = Vec::new();
        let mut screen = Screen::new(&mut out, false);
        let row = Row {
            request: "workers-a".to_owned(),
            ..Row::default()
        };
        screen.show(std::slice::from_ref(&row), "").unwrap();
        screen.show(std::slice::from_ref(&row), "").unwrap();
        screen.show(&[], "nothing").unwrap();
        let out = String::from_utf8(out).unwrap();
        let lines: Vec<_> = out.lines().map(|line| line.split_at(10).1).collect();
        assert_eq!(lines, ["workers-a: -, instance -", "workers-a: gone"]);
    }

    #[test]
    fn on_a_terminal_the_table_is_drawn_over_itself() {
        let mut out = Vec::new();
        let mut screen = Screen::new(&mut out, true);
        screen.show(&[], "nothing").unwrap();
        screen.say("a line that stays").unwrap();
        screen.show(&[], "nothing").unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.matches("\x1b[2A\x1b[J").count(), 2, "{out:?}");
        assert_eq!(out.matches("a line that stays").count(), 1);
    }
}
