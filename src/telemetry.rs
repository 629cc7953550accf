//! Decides what a log line looks like and which ones are written.
//!
//! Lines go to standard error: standard output belongs to what a command was asked for.

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Installs the subscriber for the whole process. A second call changes nothing.
pub fn init(log: &LogConfig) {
    let filter = EnvFilter::builder().parse_lossy(&log.filter);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // The one failure is that there is a subscriber already: a test's own, which stays.
    let _ = match log.format {
        LogFormat::Human => {
            use std::io::IsTerminal;
            builder
                .with_target(false)
                .with_ansi(std::io::stderr().is_terminal())
                .try_init()
        }
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
    };
}

/// Whether the text is a filter.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_filter(text: &str) -> Result<(), String> {
    EnvFilter::builder()
        .parse(text)
        .map(|_| ())
        .map_err(|error| error.to_string())
}
