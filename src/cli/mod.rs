//! The command line: which command runs, and what exit code it leaves.
//!
//! Exit codes: 0 for success, 1 for failure, 2 for bad usage or settings.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::setting::Flags;
use crate::process;
use crate::secret::hide;

pub mod check;
pub mod completions;
pub mod orphans;
pub mod release;
pub mod run;
#[cfg(feature = "sandbox")]
pub mod sandbox;
pub mod schema;
pub mod validate;

#[cfg(not(any(feature = "oxide", feature = "ganeti")))]
compile_error!("choose at least one cloud, for example with `--features oxide`");

/// The exit code of bad usage or settings; clap's own.
const USAGE: u8 = 2;

/// Answers the machine requests of Omni with Talos Linux instances in a cloud.
#[derive(Debug, Parser)]
#[command(version, about, args_conflicts_with_subcommands = true, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Without a command, `run` runs.
    #[command(flatten)]
    flags: Flags,
}

const AFTER_HELP: &str = "\
Each setting can also stand in the environment or in a TOML file; the command line is stronger than the
environment, and that is stronger than the file. Secrets come from variables such as
OMNI_SERVICE_ACCOUNT_KEY, OXIDE_TOKEN and GANETI_PASSWORD, or from the files that the same names with _FILE
behind them name; never from flags.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon until SIGTERM or SIGINT (the default).
    Run {
        #[command(flatten)]
        flags: Flags,
    },
    /// Check the settings, and that Omni and the cloud accept them; print them without secrets.
    Check {
        #[command(flatten)]
        flags: Flags,
    },
    /// Check a machine class, or its provider data alone, without asking anybody.
    Validate(validate::ValidateArgs),
    /// List instances that carry this provider's mark and that no machine request wants.
    Orphans {
        #[command(flatten)]
        flags: Flags,
    },
    /// Give an instance back: the provider never touches it again, and a teardown that waits for it goes on.
    Release(release::ReleaseArgs),
    /// Print the JSON schema of the provider data.
    Schema(schema::SchemaArgs),
    /// Print a completion script for a shell.
    Completions(completions::CompletionsArgs),
    /// Serve an Omni, an Oxide API and an image factory on loopback, to try this program with.
    #[cfg(feature = "sandbox")]
    Sandbox(sandbox::SandboxArgs),
}

/// Runs the program and returns its exit code.
#[must_use]
pub fn main() -> ExitCode {
    // Before anything is read that is secret. A system that refuses it is no reason not to run.
    if let Err(error) = process::close() {
        complain(format_args!("warning: core dumps cannot be turned off: {error}"));
    }
    let arguments = Arguments::parse();
    match arguments.command {
        None => run::run(&arguments.flags),
        Some(Command::Run { flags }) => run::run(&flags),
        Some(Command::Check { flags }) => check::check(&flags),
        Some(Command::Validate(arguments)) => validate::validate(&arguments),
        Some(Command::Orphans { flags }) => orphans::orphans(&flags),
        Some(Command::Release(arguments)) => release::release(&arguments),
        Some(Command::Schema(arguments)) => schema::schema(&arguments),
        Some(Command::Completions(arguments)) => completions::completions(&arguments),
        #[cfg(feature = "sandbox")]
        Some(Command::Sandbox(arguments)) => match block_on(sandbox::run(arguments)) {
            Ok(code) => code,
            Err(error) => failure(&anyhow::Error::new(error).context("cannot start the runtime")),
        },
    }
}

/// The clouds that this program was built with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CloudName {
    #[cfg(feature = "oxide")]
    Oxide,
    #[cfg(feature = "ganeti")]
    Ganeti,
}

impl CloudName {
    /// The one that commands are about where they are not told.
    #[cfg(feature = "oxide")]
    const DEFAULT: Self = Self::Oxide;
    #[cfg(all(feature = "ganeti", not(feature = "oxide")))]
    const DEFAULT: Self = Self::Ganeti;

    /// What classes of this cloud may say.
    fn class(self) -> ClassRules {
        match self {
            #[cfg(feature = "oxide")]
            Self::Oxide => ClassRules::of::<crate::backends::oxide::Oxide>(),
            #[cfg(feature = "ganeti")]
            Self::Ganeti => ClassRules::of::<crate::backends::ganeti::Ganeti>(),
        }
    }
}

/// What classes of one cloud may say.
struct ClassRules {
    /// The JSON schema.
    schema: fn() -> serde_json::Value,
    /// One sentence for each fault of provider data.
    faults: fn(&str) -> Vec<String>,
}

impl ClassRules {
    fn of<C: crate::cloud::Cloud>() -> Self {
        use crate::cloud::{class::parse_class, schema::class_schema};
        Self {
            schema: class_schema::<C::Class>,
            faults: |text| match parse_class(text) {
                Ok(class) => C::validate(&class),
                Err(faults) => faults,
            },
        }
    }
}

/// Writes to standard output. A reader that has gone away, such as `head`, is no failure of ours.
fn print(text: impl Display) {
    let _ = write!(std::io::stdout().lock(), "{text}");
}

/// Writes a line to standard error.
fn complain(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{}", hide(&text.to_string()));
}

/// Runs a future on the runtime of all commands that need one. It is one thread: the daemon waits most of its time, what computes for
/// long has threads of its own, and each further one would have a heap of its own.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, std::io::Error> {
    // One TLS stack for everything. The one failure is that a provider is installed already: a test's own,
    // which stays.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(future);
    // What is still blocked in a thread, such as a name look-up, must not hold up the end.
    runtime.shutdown_background();
    Ok(result)
}

/// Prints a failure with its causes, once.
fn failure(error: &anyhow::Error) -> ExitCode {
    complain(format_args!("error: {error:#}"));
    ExitCode::FAILURE
}
