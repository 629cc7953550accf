//! `check`: are the settings good, and do Omni and the cloud accept them?

use std::process::ExitCode;

use super::{block_on, complain, failure, print, run};
use crate::config::setting::Flags;
use crate::{daemon, telemetry};

pub(super) fn check(flags: &Flags) -> ExitCode {
    let loaded = match run::load(flags) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    telemetry::init(&loaded.config.log);
    print(&loaded.config);
    for warning in &loaded.warnings {
        complain(format_args!("warning: {warning}"));
    }
    match block_on(daemon::check(&loaded.config)) {
        Ok(Ok(())) => {
            complain(format_args!("Omni and the cloud accept these settings"));
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&anyhow::Error::new(error).context("cannot start the runtime")),
    }
}
