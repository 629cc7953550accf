//! `run`: loads the settings and runs the daemon.

use std::collections::BTreeMap;
use std::process::ExitCode;

use super::{USAGE, block_on, complain, failure};
use crate::config::setting::Flags;
use crate::config::{self, Loaded};
use crate::{daemon, telemetry};

pub(super) fn run(flags: &Flags) -> ExitCode {
    let loaded = match load(flags) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    telemetry::init(&loaded.config.log);
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    match block_on(daemon::run(loaded.config)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&anyhow::Error::new(error).context("cannot start the runtime")),
    }
}

/// Loads the settings from flags, environment and file; complains of all that is wrong with them.
pub(super) fn load(flags: &Flags) -> Result<Loaded, ExitCode> {
    // A variable that is no UTF-8 cannot be a value of ours.
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    config::load(flags, &environment).map_err(|faults| {
        complain(format_args!("error: {faults}"));
        ExitCode::from(USAGE)
    })
}
