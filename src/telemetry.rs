//! Decides what a log line looks like and which ones are written.
//!
//! Lines go to standard error: standard output belongs to what a command was asked for. Of other crates nothing below `info` is
//! written, whatever the filter says: some print what they parse, and one of them parses our key. What is guarded
//! ([`Secret::guard`](crate::secret::Secret::guard)) is taken out of every line.

use std::io::{self, IsTerminal, Write};

use tracing::{Level, Metadata, error};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{LogConfig, LogFormat};
use crate::secret::hide;

/// Installs the subscriber for the whole process, and has panics told as other lines are. A second call changes nothing.
pub fn init(log: &LogConfig) {
    let filter = EnvFilter::builder()
        .parse_lossy(&log.filter)
        .and(filter_fn(keeps_secrets));
    let lines = tracing_subscriber::fmt::layer().with_writer(|| Hiding(io::stderr()));
    let lines = match log.format {
        LogFormat::Human => {
            let colours = io::stderr().is_terminal();
            lines.with_target(false).with_ansi(colours).boxed()
        }
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true);
            lines.with_current_span(true).with_span_list(false).boxed()
        }
    };
    // The one failure is that there is a subscriber already: a test's own, which stays.
    let installed = tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .try_init();
    if installed.is_ok() {
        std::panic::set_hook(Box::new(|panic| {
            let words = panic.payload_as_str().unwrap_or("without words");
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            error!(place, "panic: {words}");
        }));
    }
}

/// Takes out what is guarded. A line comes in one piece.
struct Hiding<W>(W);

impl<W: Write> Write for Hiding<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        self.0.write_all(hide(&text).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Whether a line is known to hold no secret: it is ours, or above the levels at which crates print what they handle.
fn keeps_secrets(line: &Metadata<'_>) -> bool {
    line.target().starts_with(env!("CARGO_CRATE_NAME")) || *line.level() <= Level::INFO
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
