//! Decides what a failed call means, before anybody knows which verb it failed.
//!
//! Nexus answers errors as JSON with a code, a message and a request ID (`common/src/api/external/error.rs`);
//! what comes from a proxy, or from nobody, is sorted here as well. No text of ours holds a header, an
//! address or a body.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use oxide::types;

use super::convert::KIND;
use crate::cloud::{CloudError, ErrorKind};
use crate::words::one_line;

/// Most characters of the API's own words that are shown.
const MESSAGE_CHARS: usize = 500;

/// What the failure of a call comes down to, before anybody knows which verb it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    /// 404: it is not there, or not ours to see. Nexus does not tell the two apart.
    NotFound,
    /// The name of what we asked for is taken.
    AlreadyExists,
    /// Everything whose meaning does not depend on the verb.
    Kind(ErrorKind),
}

/// A call that failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// What it comes down to.
    pub(super) sort: Sort,
    /// The API's own words, or ours where it said nothing. Hold no secret.
    pub(super) words: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Failure {
    /// The error of a verb that has nothing more to say about it.
    pub(super) fn error(self, verb: &'static str, what: impl fmt::Display) -> CloudError {
        let kind = match self.sort {
            Sort::Kind(kind) => kind,
            Sort::AlreadyExists => ErrorKind::Foreign,
            // Whatever the request refers to is missing; if that is the project, it may as well be hidden
            // from us.
            Sort::NotFound if is_about_project(&self.words) => ErrorKind::Denied,
            Sort::NotFound => ErrorKind::Rejected,
        };
        self.error_of(kind, verb, what)
    }

    /// The error of a verb that knows better what it means.
    pub(super) fn error_of(self, kind: ErrorKind, verb: &'static str, what: impl fmt::Display) -> CloudError {
        let error = CloudError::new(KIND, verb, kind, format!("{what}: {}", self.words));
        match self.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }

    /// Stops, deletes and the like carry nothing that could be wrong: a refusal is about the state of the
    /// thing right now.
    pub(super) fn busy_if_refused(mut self) -> Self {
        if self.sort == Sort::Kind(ErrorKind::Rejected) {
            self.sort = Sort::Kind(ErrorKind::Busy);
        }
        self
    }

    /// A call that we gave up waiting for.
    pub(super) fn unanswered() -> Self {
        Self {
            sort: Sort::Kind(ErrorKind::Unavailable),
            words: "no answer in time".to_owned(),
            source: None,
        }
    }

    /// A list whose pages lead nowhere.
    pub(super) fn endless() -> Self {
        Self {
            sort: Sort::Kind(ErrorKind::Unexpected),
            words: "the API's list does not end".to_owned(),
            source: None,
        }
    }

    /// A refusal of our own, before anything was sent.
    pub(super) fn rejected(words: String) -> Self {
        Self {
            sort: Sort::Kind(ErrorKind::Rejected),
            words,
            source: None,
        }
    }
}

/// Whether a 404 names the project as what was not found (nexus: `not found: project with name "x"`).
pub(super) fn is_about_project(words: &str) -> bool {
    words.contains("not found: project with ")
}

impl From<oxide::Error<types::Error>> for Failure {
    fn from(error: oxide::Error<types::Error>) -> Self {
        use oxide::Error as Theirs;
        let of_status = |status: u16| Self {
            sort: sort(status, None, "", None),
            words: format!("the API answered HTTP {status}"),
            source: None,
        };
        match error {
            Theirs::ErrorResponse(response) => {
                let after = response
                    .headers()
                    .get(http::header::RETRY_AFTER)
                    .and_then(|value| value.to_str().ok())
                    .and_then(|value| value.trim().parse().ok())
                    .map(Duration::from_secs);
                let status = response.status().as_u16();
                let body = response.into_inner();
                let code = body.error_code.as_deref();
                let sort = sort(status, code, &body.message, after);
                let advice = advice(status, code, &body.message);
                Self {
                    sort,
                    words: format!(
                        "{} (HTTP {status}){advice}",
                        one_line(&body.message, MESSAGE_CHARS)
                    ),
                    // Another one each time: it is for the log, not for a status line that is compared.
                    source: Some(format!("request {} of the API", body.request_id).into()),
                }
            }
            Theirs::UnexpectedResponse(response) if response.status().is_redirection() => Self {
                sort: Sort::Kind(ErrorKind::Denied),
                words: format!(
                    "the API answered with a redirect (HTTP {}): is the host right?",
                    response.status().as_u16()
                ),
                source: None,
            },
            Theirs::UnexpectedResponse(response) => of_status(response.status().as_u16()),
            Theirs::InvalidRequest(words) | Theirs::Custom(words) => Self::rejected(words),
            // Its Display would print the whole body. The status is lost; what is no JSON comes from
            // something between us and the API, which is rarely a lasting condition.
            Theirs::InvalidResponsePayload(_, source) if source.is_data() => Self {
                sort: Sort::Kind(ErrorKind::Unexpected),
                words: "the API's answer has another form than this version knows".to_owned(),
                source: Some(source.into()),
            },
            Theirs::InvalidResponsePayload(_, source) => Self {
                sort: Sort::Kind(ErrorKind::Unavailable),
                words: "the answer is not the API's: something in between gave it".to_owned(),
                source: Some(source.into()),
            },
            Theirs::CommunicationError(source)
            | Theirs::ResponseBodyError(source)
            | Theirs::InvalidUpgrade(source) => Self {
                sort: Sort::Kind(ErrorKind::Unavailable),
                words: if source.is_timeout() {
                    "no answer in time".to_owned()
                } else if source.is_connect() {
                    "no connection to the API".to_owned()
                } else {
                    "the connection broke".to_owned()
                },
                source: Some(source.into()),
            },
        }
    }
}

/// What nexus means by an error response.
pub(super) fn sort(status: u16, code: Option<&str>, message: &str, after: Option<Duration>) -> Sort {
    Sort::Kind(match (status, code) {
        (400, Some("ObjectAlreadyExists")) => return Sort::AlreadyExists,
        (404, _) => return Sort::NotFound,
        // Dropshot's word for a client that is newer than the rack: every call is refused until somebody
        // acts.
        (400, _) if is_version_refusal(message) => ErrorKind::Denied,
        (400 | 413 | 414 | 415 | 422, _) => ErrorKind::Rejected,
        (401 | 403, _) => ErrorKind::Denied,
        (409, _) => ErrorKind::Busy,
        (429, _) => ErrorKind::Throttled { after },
        // Both capacity and quota; the message tells which.
        (507, _) => ErrorKind::Exhausted,
        (408 | 500..=599, _) => ErrorKind::Unavailable,
        _ => ErrorKind::Unexpected,
    })
}

fn is_version_refusal(message: &str) -> bool {
    message.contains("does not support this API version")
}

/// Whose turn it is, where the API's words leave that open.
fn advice(status: u16, code: Option<&str>, message: &str) -> &'static str {
    match (status, code) {
        (400, _) if is_version_refusal(message) => ": the rack is older than API 2026060800; update the rack",
        (401, _) => ": check the token",
        (403, _) => ": the token's owner lacks the right",
        (507, _) if message.contains("Limit Exceeded") => ": this is the silo's quota",
        (507, _) => ": this is the rack's capacity",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_its_kind() {
        use ErrorKind::{Busy, Denied, Exhausted, Rejected, Throttled, Unavailable, Unexpected};
        let after = Some(Duration::from_secs(9));
        for (status, code, message, expected) in [
            (
                400,
                Some("InvalidRequest"),
                "All interfaces must be in the same VPC",
                Sort::Kind(Rejected),
            ),
            (
                400,
                Some("InvalidValue"),
                "unsupported value for \"size\"",
                Sort::Kind(Rejected),
            ),
            (400, None, "unable to parse JSON body", Sort::Kind(Rejected)),
            (
                400,
                Some("ObjectAlreadyExists"),
                "already exists: disk \"web\"",
                Sort::AlreadyExists,
            ),
            (
                400,
                None,
                "server does not support this API version: 2026060800.0.0",
                Sort::Kind(Denied),
            ),
            (
                401,
                Some("Unauthorized"),
                "credentials missing or invalid",
                Sort::Kind(Denied),
            ),
            (403, Some("Forbidden"), "Forbidden", Sort::Kind(Denied)),
            (
                404,
                Some("ObjectNotFound"),
                "not found: instance with name \"web\"",
                Sort::NotFound,
            ),
            (408, None, "", Sort::Kind(Unavailable)),
            (
                409,
                Some("Conflict"),
                "instance must finish stopping",
                Sort::Kind(Busy),
            ),
            (418, None, "", Sort::Kind(Unexpected)),
            (429, None, "", Sort::Kind(Throttled { after })),
            (
                500,
                Some("Internal"),
                "Internal Server Error",
                Sort::Kind(Unavailable),
            ),
            (503, Some("ServiceNotAvailable"), "", Sort::Kind(Unavailable)),
            (
                507,
                Some("InsufficientCapacity"),
                "Failed to place instance",
                Sort::Kind(Exhausted),
            ),
        ] {
            assert_eq!(sort(status, code, message, after), expected, "{status} {message}");
        }
    }

    #[test]
    fn quota_capacity_and_an_old_rack_say_whose_turn_it_is() {
        for (status, message, told) in [
            (
                507,
                "Insufficient capacity: vCPU Limit Exceeded: Not enough vCPUs",
                "quota",
            ),
            (507, "Insufficient capacity: Failed to place instance", "capacity"),
            (
                400,
                "server does not support this API version: 1",
                "older than API 2026060800",
            ),
            (401, "credentials missing or invalid", "token"),
        ] {
            let response = oxide::ResponseValue::new(
                types::Error {
                    error_code: None,
                    message: message.to_owned(),
                    request_id: "r-1".to_owned(),
                },
                http::StatusCode::from_u16(status).unwrap(),
                http::HeaderMap::new(),
            );
            let error = Failure::from(oxide::Error::ErrorResponse(response)).error("start instance", "web");
            let text = error.to_string();
            assert!(text.contains(told) && text.contains(message), "{text}");
            assert!(!text.contains("r-1"), "{text}");
            assert_eq!(
                std::error::Error::source(&error).unwrap().to_string(),
                "request r-1 of the API"
            );
        }
    }

    #[test]
    fn a_rack_that_asks_for_a_pause_gets_it() {
        for (header, after) in [("7", Some(7)), ("Sat, 21 Nov 2026 00:00:00 GMT", None)] {
            let headers = [(http::header::RETRY_AFTER, header.parse().unwrap())];
            let response = oxide::ResponseValue::new(
                types::Error {
                    error_code: None,
                    message: "slow down".to_owned(),
                    request_id: "r-1".to_owned(),
                },
                http::StatusCode::TOO_MANY_REQUESTS,
                http::HeaderMap::from_iter(headers),
            );
            let failure = Failure::from(oxide::Error::ErrorResponse(response));
            let after = after.map(Duration::from_secs);
            assert_eq!(
                failure.sort,
                Sort::Kind(ErrorKind::Throttled { after }),
                "{header}"
            );
        }
    }

    #[test]
    fn a_missing_project_is_not_allowed_and_a_missing_vpc_is_a_fault_of_the_class() {
        let missing = |what: &str| {
            let failure = Failure {
                sort: Sort::NotFound,
                words: format!("not found: {what} with name \"x\" (HTTP 404)"),
                source: None,
            };
            failure.error("create instance", "web").kind
        };
        assert_eq!(missing("project"), ErrorKind::Denied);
        assert_eq!(missing("vpc"), ErrorKind::Rejected);
    }
}
