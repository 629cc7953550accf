//! `release`: gives an instance back to the operator.

use std::process::ExitCode;

use super::{block_on, complain, failure, print, run};
use crate::config::setting::Flags;
use crate::{daemon, telemetry};

#[derive(Debug, clap::Args)]
pub(super) struct ReleaseArgs {
    /// The name of the instance, or the ID of its machine request.
    name: String,
    /// Where it is, if there is one of that name in several places: for Oxide, the project.
    #[arg(long)]
    scope: Option<String>,
    #[command(flatten)]
    flags: Flags,
}

pub(super) fn release(arguments: &ReleaseArgs) -> ExitCode {
    let loaded = match run::load(&arguments.flags) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    telemetry::init(&loaded.config.log);
    let released = daemon::release(&loaded.config, &arguments.name, arguments.scope.as_deref());
    match block_on(released) {
        Ok(Ok(released)) => {
            if let Some(why) = &released.unseen {
                complain(format_args!("warning: the cloud could not be seen: {why}"));
            }
            for (scope, name, id) in &released.instances {
                let id = id.as_deref().map(|id| format!(" (ID {id})")).unwrap_or_default();
                print(format_args!(
                    "{name}{id} in {scope} is yours: the provider never touches it again\n"
                ));
            }
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&anyhow::Error::new(error).context("cannot start the runtime")),
    }
}
