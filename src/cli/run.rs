//! `run`: loads the settings and runs the daemon.

use std::collections::BTreeMap;
use std::process::ExitCode;

use url::Url;

use super::{USAGE, block_on, complain, failure};
use crate::config::setting::Flags;
use crate::config::{self, Loaded};
use crate::secret::Secret;
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

/// Guards the passwords of proxies, which are no settings of ours: the HTTP clients read them by themselves.
fn guard_proxies(environment: &BTreeMap<String, String>) {
    for (_, value) in environment
        .iter()
        .filter(|(name, _)| name.to_ascii_lowercase().ends_with("_proxy"))
    {
        if let Some(password) = Url::parse(value).ok().as_ref().and_then(Url::password) {
            Secret::new(password).guard();
        }
    }
}

/// Loads the settings from flags, environment and file; complains of all that is wrong with them.
pub(super) fn load(flags: &Flags) -> Result<Loaded, ExitCode> {
    // A variable that is no UTF-8 cannot be a value of ours.
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    guard_proxies(&environment);
    config::load(flags, &environment).map_err(|faults| {
        complain(format_args!("error: {faults}"));
        ExitCode::from(USAGE)
    })
}
