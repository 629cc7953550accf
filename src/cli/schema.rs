//! `schema`: prints the JSON schema of the provider data, as Omni gets it.

use std::process::ExitCode;

use super::{CloudName, print};

#[derive(Debug, clap::Args)]
pub(super) struct SchemaArgs {
    /// The cloud.
    #[arg(long, value_enum, default_value_t = CloudName::DEFAULT)]
    cloud: CloudName,
}

pub(super) fn schema(arguments: &SchemaArgs) -> ExitCode {
    let schema = (arguments.cloud.class().schema)();
    // `{:#}` of a JSON value is its indented form.
    print(format_args!("{schema:#}\n"));
    ExitCode::SUCCESS
}
