//! What a test may do to calls on their way, and what it hears of instances.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use http::Method;
use uuid::Uuid;

/// One call to the API, as a hook sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The HTTP method; everything but `GET` changes something.
    pub method: Method,
    /// The SDK's name for it, such as `instance_create`.
    pub operation: &'static str,
    /// The name or ID that it is about; for a creation the new name.
    pub target: Option<String>,
    /// The `project` parameter.
    pub project: Option<String>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation, self.target.as_deref().unwrap_or("-"))
    }
}

/// When a hook is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The call arrived; nothing has happened.
    Before,
    /// The call had its effect; the answer has not been sent.
    After,
}

/// What becomes of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Proceed,
    /// Answer with this error instead.
    Status {
        /// The HTTP status.
        status: u16,
        /// `error_code` of the body.
        error_code: Option<String>,
        /// `message` of the body.
        message: String,
    },
    /// Answer with this body instead, whatever it is.
    Raw {
        /// The HTTP status.
        status: u16,
        /// The whole body.
        body: String,
    },
    /// Close the connection without an answer.
    Drop,
    /// Never answer.
    Hang,
}

/// Decides what becomes of calls.
pub type Hook = Arc<dyn Fn(&Call, Moment) -> BoxFuture<'static, Verdict> + Send + Sync>;

/// What happens to an instance, as the machine inside would notice.
#[derive(Clone, PartialEq, Eq)]
pub enum Happening {
    /// It runs and its operating system has read its user data. Repeated at every boot.
    Booted {
        /// The instance, which is also the UUID that Talos reports.
        id: Uuid,
        /// Its user data, decoded.
        user_data: Vec<u8>,
    },
    /// It does not run any more.
    Stopped {
        /// The instance.
        id: Uuid,
    },
    /// It does not exist any more.
    Gone {
        /// The instance.
        id: Uuid,
    },
}

impl fmt::Debug for Happening {
    /// Hides the user data, which holds the join token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Booted { id, .. } => write!(f, "Booted({id})"),
            Self::Stopped { id } => write!(f, "Stopped({id})"),
            Self::Gone { id } => write!(f, "Gone({id})"),
        }
    }
}
