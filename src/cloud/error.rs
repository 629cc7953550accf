//! What a cloud's failure means, in eight words that every backend shares.
//!
//! A backend classifies where it understands; the engine reacts in one place (`engine/retry.rs`); the sink prints once.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

/// The meaning of a failure. When to look again and what to show follow from it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No answer, a server error, a time-out: the outcome of a mutation is unknown.
    Unavailable,
    /// The cloud told us to slow down, and for how long where it said so.
    Throttled {
        /// How long the cloud asked us to wait.
        after: Option<Duration>,
    },
    /// In another operation right now.
    Busy,
    /// A quota or the capacity is used up.
    Exhausted,
    /// This request, as written, is refused.
    Rejected,
    /// Not authenticated, or not allowed.
    Denied,
    /// The name belongs to something without our mark.
    Foreign,
    /// We failed to classify it: a gap to be closed.
    Unexpected,
}

impl ErrorKind {
    /// Whether a mutation that failed so may have taken effect, or may yet.
    #[must_use]
    pub fn outcome_unknown(self) -> bool {
        matches!(self, Self::Unavailable | Self::Unexpected)
    }

    /// The label of this kind in logs and metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Throttled { .. } => "throttled",
            Self::Busy => "busy",
            Self::Exhausted => "exhausted",
            Self::Rejected => "rejected",
            Self::Denied => "denied",
            Self::Foreign => "foreign",
            Self::Unexpected => "unexpected",
        }
    }
}

/// A cloud's failure: what was attempted, on what, and what it means.
///
/// `Display` prints this error alone, never its source: the sink prints the chain, once.
#[derive(Debug)]
pub struct CloudError {
    /// The kind of cloud, as in `Cloud::KIND`.
    pub cloud: &'static str,
    /// The verb that failed, as a person would say it: "create instance".
    pub verb: &'static str,
    /// On what, and the cloud's own words where it had any. Holds no secret.
    pub what: String,
    /// What it means.
    pub kind: ErrorKind,
    /// The underlying failure.
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl CloudError {
    /// A failure of `verb`, without an underlying error.
    pub fn new(cloud: &'static str, verb: &'static str, kind: ErrorKind, what: impl Into<String>) -> Self {
        Self {
            cloud,
            verb,
            what: what.into(),
            kind,
            source: None,
        }
    }

    /// The same failure with its underlying error.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for CloudError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} on {}: {}", self.verb, self.cloud, self.what)
    }
}

impl StdError for CloudError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

/// The result of a cloud verb.
pub type Result<T> = std::result::Result<T, CloudError>;
