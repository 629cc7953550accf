//! Decides what a failed call or a failed job means.
//!
//! RAPI answers errors as `{"code", "message", "explain"}`, its message escaped for HTML. A job that failed says why in its
//! result: `["OpPrereqError", ["text", "code"]]` (`lib/errors.py`), where everything but a prerequisite has no code, or a bare
//! text where somebody cancelled it.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use super::KIND;
use crate::cloud::{CloudError, ErrorKind};
use crate::media::seed;

/// How long the cluster is left alone when its job queue is full.
const QUEUE_FULL: Duration = Duration::from_secs(10);

/// What failed, before anybody knows which verb it failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// `None`: there is no such thing.
    pub(super) kind: Option<ErrorKind>,
    /// Ganeti's words, or ours where it had none. Hold no secret.
    pub(super) words: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Failure {
    pub(super) fn new(kind: ErrorKind, words: impl Into<String>) -> Self {
        Self {
            kind: Some(kind),
            words: words.into(),
            source: None,
        }
    }

    pub(super) fn is_absence(&self) -> bool {
        self.kind.is_none()
    }

    /// The error of a verb.
    pub(super) fn error(self, verb: &'static str, what: impl fmt::Display) -> CloudError {
        let kind = self.kind.unwrap_or(ErrorKind::Unexpected);
        let error = CloudError::new(KIND, verb, kind, format!("{what}: {}", self.words));
        match self.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }

    /// No connection, or no whole answer.
    pub(super) fn unreachable(error: reqwest::Error) -> Self {
        let mut words = if error.is_connect() {
            "no connection to the RAPI".to_owned()
        } else if error.is_timeout() {
            "no answer from the RAPI in time".to_owned()
        } else {
            "no answer from the RAPI".to_owned()
        };
        let chain = chain(&error);
        if chain.contains("is pinned") {
            words.push_str(
                "; another certificate than the pinned one: if it was renewed, set certificate_sha256 anew",
            );
        } else if chain.contains("UnsupportedCertVersion") || chain.contains("invalid peer certificate") {
            words.push_str(
                "; its certificate is not trusted: Ganeti's own can be pinned with certificate_sha256",
            );
        }
        Self {
            kind: Some(ErrorKind::Unavailable),
            words,
            source: Some(Box::new(error.without_url())),
        }
    }

    /// An answer that no RAPI gives.
    pub(super) fn not_rapi() -> Self {
        Self::new(
            ErrorKind::Unexpected,
            "the answer is none of a RAPI's: does the endpoint lead to one?",
        )
    }

    /// A refusal.
    pub(super) fn of_status(status: StatusCode, body: Option<&Value>) -> Self {
        let message = body
            .and_then(|body| body.get("message")?.as_str())
            .map(|message| seed::hide(&unescape(message)))
            .unwrap_or_default();
        let http = status.as_u16();
        let with = |kind, words: String| Self::new(kind, words);
        match status {
            StatusCode::NOT_FOUND => Self {
                kind: None,
                words: "there is none".to_owned(),
                source: None,
            },
            StatusCode::UNAUTHORIZED => with(
                ErrorKind::Denied,
                "the RAPI does not know this user, or the password is wrong: compare them with the cluster's \
                 rapi/users file (HTTP 401)"
                    .to_owned(),
            ),
            StatusCode::FORBIDDEN => with(
                ErrorKind::Denied,
                "the RAPI user may not write: its line in the cluster's rapi/users file must end in `write` (HTTP 403)"
                    .to_owned(),
            ),
            StatusCode::BAD_REQUEST | StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                with(ErrorKind::Rejected, format!("{message} (HTTP {http})"))
            }
            // The code means 503 and says 500.
            _ if message.contains("drained") => with(
                ErrorKind::Unavailable,
                "the cluster's job queue is drained: run `gnt-cluster queue undrain` when the work on it is done".to_owned(),
            ),
            _ if message.contains("queue") && message.contains("full") => with(
                ErrorKind::Throttled {
                    after: Some(QUEUE_FULL),
                },
                "the cluster's job queue is full".to_owned(),
            ),
            StatusCode::TOO_MANY_REQUESTS => {
                with(ErrorKind::Throttled { after: None }, format!("{message} (HTTP {http})"))
            }
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => with(
                ErrorKind::Unavailable,
                format!("the cluster's master daemon does not answer (HTTP {http})"),
            ),
            status if status.is_server_error() => {
                with(ErrorKind::Unavailable, format!("{message} (HTTP {http})"))
            }
            _ => with(ErrorKind::Unexpected, format!("{message} (HTTP {http})")),
        }
    }

    /// What the result of a job that did not succeed means.
    pub(super) fn of_job(id: u64, result: &Value) -> Self {
        let class = result.get(0).and_then(Value::as_str);
        let text = result.pointer("/1/0").and_then(Value::as_str);
        let code = result.pointer("/1/1").and_then(Value::as_str);
        let (Some(class), Some(text)) = (class, text) else {
            // Cancelled: "Job canceled by request".
            let words = result.as_str().map_or_else(|| result.to_string(), str::to_owned);
            return Self::new(ErrorKind::Unavailable, format!("job {id}: {words}"));
        };
        let kind = meaning(class, code, text);
        let advice = advice(text)
            .map(|advice| format!(" ({advice})"))
            .unwrap_or_default();
        // It may quote the whole command line of a guest.
        let text = seed::hide(&text.replace('\n', " "));
        Self::new(kind, format!("job {id}: {text}{advice}"))
    }
}

/// What the kinds of errors of Ganeti mean (`lib/errors.py`, `ECODE_*`).
fn meaning(class: &str, code: Option<&str>, text: &str) -> ErrorKind {
    // hail says this with the code of a lack of resources.
    if text.contains("Wrong number of elems found with name") {
        return ErrorKind::Rejected;
    }
    if text.contains("from the address pool") {
        return ErrorKind::Exhausted;
    }
    match (class, code) {
        (_, Some("insufficient_resources")) => ErrorKind::Exhausted,
        (_, Some("temp_insufficient_resources")) => ErrorKind::Busy,
        (_, Some("already_exists")) => ErrorKind::Foreign,
        (_, Some("environment_error")) => ErrorKind::Unavailable,
        (_, Some("internal_error")) => ErrorKind::Unexpected,
        ("OpPrereqError" | "TypeEnforcementError" | "TagError" | "ParameterError" | "HypervisorError", _) => {
            ErrorKind::Rejected
        }
        // A node that does not answer in the middle of it.
        ("OpExecError", _) if text.contains("Connection") || text.contains("connect to") => {
            ErrorKind::Unavailable
        }
        // Otherwise its own text says what a person has to change on the node or in the class.
        ("OpExecError", _) => ErrorKind::Rejected,
        ("JobLost", _) => ErrorKind::Unavailable,
        _ => ErrorKind::Unexpected,
    }
}

/// What an operator should change, where Ganeti's text does not say it.
fn advice(text: &str) -> Option<&'static str> {
    let table = [
        ("not found in search path", "set os_type to one of `gnt-os list`"),
        (
            "FailMem",
            "no node of the group has that much memory free: ask for less memory, or free some",
        ),
        (
            "FailDisk",
            "no node of the group has that much disk free: ask for less disk, or free some",
        ),
        (
            "FailCPU",
            "no node of the group has that many CPUs left: ask for fewer, or raise the policy's vcpu-ratio",
        ),
        (
            "FailN1",
            "the group would not survive the loss of a node; on a single node name it as primary_node",
        ),
        (
            "from the address pool",
            "the network has no free address left: enlarge it, or name another network",
        ),
        (
            "Wrong number of elems found with name",
            "there is no node group of that name: see `gnt-group list`",
        ),
        (
            "Network '",
            "see `gnt-network list`, and whether it is connected to the node group",
        ),
        ("is not enabled in cluster", "set disk_template to one of them"),
        ("Selected hypervisor", "set hypervisor to one of them"),
        (
            "not found in the search path",
            "set iallocator to one that the nodes have, for example hail",
        ),
        (
            "cdrom_image_path",
            "put the ISO there on every node, or correct boot_iso",
        ),
    ];
    table
        .iter()
        .find(|(sign, _)| text.contains(sign))
        .map(|(_, advice)| *advice)
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#x27;", "'")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_of_a_real_cluster_mean_what_they_should() {
        let exhausted = ErrorKind::Exhausted;
        let rejected = ErrorKind::Rejected;
        for (result, kind, words) in [
            (
                json!([
                    "OpExecError",
                    [
                        "OS Parameters validation failed on node n1.gt: Directory for OS nosuch not found in search path"
                    ]
                ]),
                rejected,
                "os_type",
            ),
            (
                json!([
                    "OpPrereqError",
                    [
                        "Can't compute nodes using iallocator 'hail': Request failed: Group default (preferred): No valid allocation solutions, failure reasons: FailMem: 1",
                        "insufficient_resources"
                    ]
                ]),
                exhausted,
                "memory",
            ),
            (
                json!([
                    "OpPrereqError",
                    [
                        "Can't compute nodes using iallocator 'hail': Request failed: Wrong number of elems found with name nogroup",
                        "insufficient_resources"
                    ]
                ]),
                rejected,
                "gnt-group list",
            ),
            (
                json!(["OpPrereqError", ["Network 'nonet' not found", "unknown_entity"]]),
                rejected,
                "gnt-network list",
            ),
            (
                json!([
                    "OpPrereqError",
                    [
                        "Unable to get a free IP for NIC 0 from the address pool",
                        "wrong_state"
                    ]
                ]),
                exhausted,
                "no free address",
            ),
            (
                json!([
                    "OpPrereqError",
                    [
                        "Disk template 'plain' is not enabled in cluster. Enabled disk templates are: file,sharedfile,diskless"
                    ]
                ]),
                rejected,
                "disk_template",
            ),
            (
                json!([
                    "OpPrereqError",
                    ["Instance 'web' is already in the cluster", "already_exists"]
                ]),
                ErrorKind::Foreign,
                "already",
            ),
            (
                json!([
                    "OpExecError",
                    [
                        "Could not add os for instance t on node n1.gt: OS create script failed (exited with exit code 3), last lines in the log file:\nboom"
                    ]
                ]),
                rejected,
                "file: boom",
            ),
            (
                json!(["TypeEnforcementError", ["Unknown parameter 'bogus'"]]),
                rejected,
                "bogus",
            ),
            (
                json!("Job canceled by request"),
                ErrorKind::Unavailable,
                "canceled",
            ),
            (json!(["NewError", ["what"]]), ErrorKind::Unexpected, "what"),
            (json!(null), ErrorKind::Unavailable, "null"),
        ] {
            let failure = Failure::of_job(7, &result);
            assert_eq!(failure.kind, Some(kind), "{result}");
            assert!(failure.words.contains(words), "{}", failure.words);
            assert!(failure.words.starts_with("job 7: "), "{}", failure.words);
        }
    }

    #[test]
    fn refusals_mean_what_they_should() {
        let body = |message: &str| json!({"code": 0, "message": message, "explain": ""});
        for (status, message, kind) in [
            (404, "Not Found", None),
            (401, "Unauthorized", Some(ErrorKind::Denied)),
            (403, "Forbidden", Some(ErrorKind::Denied)),
            (400, "the parameter &#x27;foo&#x27;", Some(ErrorKind::Rejected)),
            (500, "Queue drained", Some(ErrorKind::Unavailable)),
            (
                503,
                "Job queue is full",
                Some(ErrorKind::Throttled {
                    after: Some(QUEUE_FULL),
                }),
            ),
            (504, "", Some(ErrorKind::Unavailable)),
            (502, "", Some(ErrorKind::Unavailable)),
            (500, "boom", Some(ErrorKind::Unavailable)),
            (418, "tea", Some(ErrorKind::Unexpected)),
        ] {
            let failure = Failure::of_status(StatusCode::from_u16(status).unwrap(), Some(&body(message)));
            assert_eq!(failure.kind, kind, "{status} {message}");
            assert!(!failure.words.contains("&#x27;"), "{}", failure.words);
        }
    }
}
