//! `sandbox`: serves an Omni, an Oxide API and an image factory on loopback, shows them, scales them, or
//! tells the demo's story.
//!
//! What it prints first can be evaluated by a shell: lines of `export`, all else in comments.

use std::io::{IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::sandbox::demo::{self, DemoOptions};
use crate::sandbox::{Ports, SET, Sandbox, SandboxOptions};

/// A running sandbox answers at once; anything longer is no sandbox.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves an Omni, an Oxide API and an image factory on loopback, to try this program with.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct SandboxArgs {
    #[command(subcommand)]
    command: Option<SandboxCommand>,
    /// Run the daemon against it through one story, from no machines to three, one and none, and end
    #[arg(long)]
    demo: bool,
    /// Port of Omni; 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().omni, conflicts_with = "demo")]
    omni_port: u16,
    /// Port of the Oxide API; 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().oxide, conflicts_with = "demo")]
    oxide_port: u16,
    /// Port of the image factory; 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().factory, conflicts_with = "demo")]
    factory_port: u16,
    /// Port for `sandbox scale` and `sandbox status`; 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().admin, conflicts_with = "demo")]
    admin_port: u16,
    /// Machines that are asked for from the start
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with_all = ["demo", "only_oxide"])]
    machines: u32,
    /// The provider ID that the printed key is for
    #[arg(long, value_name = "ID", default_value = "oxide", conflicts_with_all = ["demo", "only_oxide"])]
    provider_id: String,
    /// No Omni: an Oxide API and an image factory beside a real one
    #[arg(long, conflicts_with = "demo")]
    only_oxide: bool,
}

#[derive(Debug, Subcommand)]
enum SandboxCommand {
    /// Set how many machines a set of a running sandbox has
    Scale {
        /// The set; it is made if there is none of that name
        set: String,
        /// How many machines it is to have
        machines: u32,
        #[command(flatten)]
        at: Running,
    },
    /// Show the machine requests of a running sandbox and what became of them
    Status {
        #[command(flatten)]
        at: Running,
    },
}

#[derive(Debug, Args)]
struct Running {
    /// Where the sandbox listens for this
    #[arg(long, value_name = "HOST:PORT", default_value_t = known_address())]
    address: SocketAddr,
}

fn known_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, Ports::default().admin).into()
}

/// Runs the command and returns its exit code.
pub async fn run(args: SandboxArgs) -> ExitCode {
    let done = match &args.command {
        Some(SandboxCommand::Scale { set, machines, at }) => {
            let query = url::form_urlencoded::Serializer::new(String::new())
                .append_pair("set", set)
                .append_pair("machines", &machines.to_string())
                .finish();
            ask(reqwest::Method::POST, at.address, &format!("scale?{query}")).await
        }
        Some(SandboxCommand::Status { at }) => ask(reqwest::Method::GET, at.address, "status").await,
        None if args.demo => tell().await,
        None => serve(&args).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = writeln!(std::io::stderr().lock(), "error: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Prints text. A reader that has gone away, such as `head`, is no failure of ours.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

async fn tell() -> Result<(), String> {
    let terminal = std::io::stdout().is_terminal();
    let options = DemoOptions::new(terminal).map_err(|error| error.to_string())?;
    demo::tell(options, std::io::stdout())
        .await
        .map_err(|_| "the demo failed, as told above".to_owned())
}

async fn serve(args: &SandboxArgs) -> Result<(), String> {
    let options = SandboxOptions {
        ports: Ports {
            omni: args.omni_port,
            oxide: args.oxide_port,
            factory: args.factory_port,
            admin: args.admin_port,
        },
        provider: args.provider_id.clone(),
        machines: args.machines,
        only_oxide: args.only_oxide,
        ..SandboxOptions::default()
    };
    let (sandbox, doors) = Sandbox::open(&options).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        format!(
            "{error}{}; other ports: --omni-port, --oxide-port, --factory-port, --admin-port (0: any \
             free one)",
            cause.unwrap_or_default()
        )
    })?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    print(&greeting(&sandbox));
    tokio::select! {
        served = sandbox.serve(doors) => served.map_err(|error| error.to_string()),
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// What a person, or a shell, has to know.
fn greeting(sandbox: &Sandbox) -> String {
    let mut text = String::new();
    for (name, value) in sandbox.environment() {
        text.push_str(&format!("export {name}={}\n", value.expose()));
    }
    let factory = sandbox.factory_address();
    let admin = sandbox.admin_address();
    let address = if admin == known_address() {
        String::new()
    } else {
        format!(" --address {admin}")
    };
    if sandbox.omni.is_some() {
        text.push_str(&format!(
            "# Export these lines in another shell and run the daemon there: omni-infra-provider\n\
             # Then ask for machines, and look: omni-infra-provider sandbox scale {SET} 3{address}\n\
             #                                 omni-infra-provider sandbox status{address}\n"
        ));
    } else {
        text.push_str(&format!(
            "# For a real Omni: --primary-factory-url=http://{factory} \
             --kubernetes-registry={factory}/siderolabs/kubelet\n\
             # Look at the rack: omni-infra-provider sandbox status{address}\n"
        ));
    }
    text.push_str("# Ctrl-C ends it and forgets everything.\n");
    text
}

/// Asks a running sandbox, and prints its answer.
async fn ask(method: reqwest::Method, address: SocketAddr, path: &str) -> Result<(), String> {
    let failed = |error: reqwest::Error| {
        format!("there is no sandbox at {address} (start one with: omni-infra-provider sandbox): {error}")
    };
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(PATIENCE)
        .build()
        .map_err(|error| error.to_string())?;
    let answer = client
        .request(method, format!("http://{address}/{path}"))
        .send()
        .await
        .map_err(failed)?;
    let status = answer.status();
    let text = answer.text().await.map_err(failed)?;
    if status.is_success() {
        print(&format!("{}\n", text.trim_end()));
        Ok(())
    } else {
        Err(text)
    }
}
