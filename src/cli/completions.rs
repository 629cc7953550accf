//! `completions`: a script that teaches a shell our commands and flags.

use std::process::ExitCode;

use clap::CommandFactory;

use super::{Arguments, print};

#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: clap_complete::Shell,
}

pub(super) fn completions(arguments: &CompletionsArgs) -> ExitCode {
    let mut script = Vec::new();
    let mut command = Arguments::command();
    let name = command.get_name().to_owned();
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    print(String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}
