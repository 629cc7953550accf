//! What a refusal of Omni means.

use std::fmt;

use tonic::Code;

/// The meaning of a failed call. Several of them share one gRPC code; the message tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OmniErrorKind {
    /// There is no such resource, or it is another provider's.
    NotFound,
    /// A resource of that ID exists.
    AlreadyExists,
    /// The version that we based our update on is not the stored one.
    Conflict,
    /// Somebody's finalizer still holds the resource.
    PendingFinalizers,
    /// The resource belongs to another controller.
    WrongOwner,
    /// The resource is not in the phase that we expected.
    WrongPhase,
    /// Omni's access rules refuse it: wrong role, provider not registered, account suspended, read-only type.
    Denied,
    /// The signature was not accepted: unknown, expired or tampered key, or a clock that is off by minutes.
    Unauthenticated,
    /// An administrator has to accept Omni's EULA first.
    Eula,
    /// Omni refuses this content, as written.
    Invalid,
    /// The message is too large for Omni or its store.
    TooLarge,
    /// This Omni does not know the call.
    Unimplemented,
    /// No answer, or one that says nothing: the outcome of a write is unknown.
    Unavailable,
}

/// A failed call to Omni: what was attempted, on what, and what it means.
#[derive(Debug, Clone)]
pub struct OmniError {
    /// What it means.
    pub kind: OmniErrorKind,
    /// What was attempted, on what: "update machine request status web-x7k".
    pub attempted: String,
    /// Omni's own words, or the transport's. Holds no secret.
    pub message: String,
}

impl OmniError {
    /// Whether a write that failed so may have taken effect: its entry has to be read before it is trusted
    /// again.
    #[must_use]
    pub fn outcome_unknown(&self) -> bool {
        self.kind == OmniErrorKind::Unavailable
    }
}

impl fmt::Display for OmniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            attempted, message, ..
        } = self;
        match self.kind {
            OmniErrorKind::Unavailable => write!(f, "no answer from Omni to {attempted}: {message}"),
            _ => write!(f, "Omni refused to {attempted}: {message}"),
        }
    }
}

impl std::error::Error for OmniError {}

/// Which call failed: the same code means different things in different calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Get, list, watch.
    Read,
    /// Create.
    Create,
    /// Update.
    Update,
    /// Destroy and teardown.
    End,
    /// The management API.
    Management,
}

/// Parts of messages that tell the causes of one code apart. Omni gives no error details, only words.
mod words {
    pub(super) const OWNED: &str = "is owned by";
    pub(super) const FINALIZERS: &str = "has pending finalizers";
    pub(super) const PHASE: &str = "is not in phase";
    pub(super) const EULA: &str = "EULA has not been accepted";
    pub(super) const VALIDATION: &str = "failed to validate: ";
    pub(super) const MALFORMED: [&str; 4] = [
        "error parsing version",
        "unknown phase",
        "spec is missing",
        "metadata is missing",
    ];
    pub(super) const ETCD_TOO_LARGE: &str = "request is too large";
    /// tonic's own: something between us and Omni answered, in HTTP. Its 404 must not look like a call
    /// unknown to Omni.
    pub(super) const NOT_GRPC: &str = "mapped from HTTP status code";
}

/// What a status means.
pub(super) fn meaning(call: Call, code: Code, message: &str) -> OmniErrorKind {
    use OmniErrorKind as Kind;
    if message.contains(words::NOT_GRPC) {
        return Kind::Unavailable;
    }
    match code {
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::AlreadyExists,
        Code::Unauthenticated => Kind::Unauthenticated,
        Code::Unimplemented => Kind::Unimplemented,
        // OutOfRange is tonic's own word for a message above our limit.
        Code::ResourceExhausted | Code::OutOfRange => Kind::TooLarge,
        Code::PermissionDenied if message.contains(words::OWNED) => Kind::WrongOwner,
        Code::PermissionDenied => Kind::Denied,
        Code::InvalidArgument if message.starts_with(words::VALIDATION) => Kind::Invalid,
        Code::InvalidArgument if message.contains(words::PHASE) => Kind::WrongPhase,
        Code::InvalidArgument => Kind::Invalid,
        Code::FailedPrecondition if message.contains(words::EULA) => Kind::Eula,
        Code::FailedPrecondition if message.contains(words::FINALIZERS) => Kind::PendingFinalizers,
        Code::FailedPrecondition if message.contains(words::PHASE) => Kind::WrongPhase,
        Code::FailedPrecondition => match call {
            Call::Create | Call::Update | Call::End => Kind::Conflict,
            Call::Read | Call::Management => Kind::Invalid,
        },
        Code::Unknown if message.contains(words::ETCD_TOO_LARGE) => Kind::TooLarge,
        // So Omni 1.10.4 answers a teardown that meets another one.
        Code::Unknown if message.contains(words::PHASE) => Kind::WrongPhase,
        Code::Unknown
            if words::MALFORMED
                .iter()
                .any(|malformed| message.contains(malformed)) =>
        {
            Kind::Invalid
        }
        // Whatever else: a broken connection (tonic says Cancelled, Unknown or Unavailable), a time-out
        // (ours, or of Omni's write throttle), a server that is going away.
        _ => Kind::Unavailable,
    }
}

/// The longest message that is kept: status lines and logs are for reading.
const MESSAGE_CHARS: usize = 1000;

/// Omni's words, fit for one line: some messages hold raw bytes.
pub(super) fn one_line(message: &str) -> String {
    crate::words::one_line(message, MESSAGE_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_of_the_contract_has_its_meaning() {
        use OmniErrorKind as Kind;
        for (call, code, message, kind) in [
            (Call::Read, Code::NotFound, "not found", Kind::NotFound),
            (
                Call::Create,
                Code::AlreadyExists,
                "resource already exists",
                Kind::AlreadyExists,
            ),
            (
                Call::Update,
                Code::FailedPrecondition,
                "x update conflict: expected version \"1\"",
                Kind::Conflict,
            ),
            (
                Call::End,
                Code::FailedPrecondition,
                "x update conflict",
                Kind::Conflict,
            ),
            (
                Call::End,
                Code::FailedPrecondition,
                "x has pending finalizers &[a]",
                Kind::PendingFinalizers,
            ),
            (
                Call::End,
                Code::FailedPrecondition,
                "x is not in phase running",
                Kind::WrongPhase,
            ),
            (
                Call::Update,
                Code::InvalidArgument,
                "x is not in phase running",
                Kind::WrongPhase,
            ),
            (
                Call::Update,
                Code::InvalidArgument,
                "failed to validate: x is not in phase",
                Kind::Invalid,
            ),
            (
                Call::Create,
                Code::InvalidArgument,
                "resource ID must match the infra provider ID",
                Kind::Invalid,
            ),
            (
                Call::Update,
                Code::PermissionDenied,
                "x is owned by \"y\"",
                Kind::WrongOwner,
            ),
            (
                Call::Update,
                Code::PermissionDenied,
                "infra providers are not allowed to update \"x\" resources other than setting finalizers",
                Kind::Denied,
            ),
            (
                Call::Create,
                Code::PermissionDenied,
                "failed to validate: * denied",
                Kind::Denied,
            ),
            (
                Call::Read,
                Code::Unauthenticated,
                "invalid signature",
                Kind::Unauthenticated,
            ),
            (
                Call::Read,
                Code::FailedPrecondition,
                "EULA has not been accepted",
                Kind::Eula,
            ),
            (
                Call::Update,
                Code::FailedPrecondition,
                "EULA has not been accepted",
                Kind::Eula,
            ),
            (
                Call::Create,
                Code::Unknown,
                "error parsing version",
                Kind::Invalid,
            ),
            (
                Call::Update,
                Code::Unknown,
                "etcdserver: request is too large",
                Kind::TooLarge,
            ),
            (Call::Update, Code::ResourceExhausted, "too large", Kind::TooLarge),
            (
                Call::Read,
                Code::OutOfRange,
                "decoded message length too large",
                Kind::TooLarge,
            ),
            (
                Call::End,
                Code::Unimplemented,
                "unknown method Teardown",
                Kind::Unimplemented,
            ),
            (
                Call::Update,
                Code::DeadlineExceeded,
                "etcd write throttled out",
                Kind::Unavailable,
            ),
            (
                Call::Update,
                Code::Cancelled,
                "Timeout expired",
                Kind::Unavailable,
            ),
            (Call::Update, Code::Unknown, "transport error", Kind::Unavailable),
            (
                Call::Update,
                Code::Unavailable,
                "tcp connect error",
                Kind::Unavailable,
            ),
            (Call::Management, Code::Unknown, "factory: 500", Kind::Unavailable),
        ] {
            assert_eq!(meaning(call, code, message), kind, "{call:?} {code:?} {message}");
        }
    }

    #[test]
    fn an_http_answer_of_a_proxy_says_nothing_about_omni() {
        let message = "grpc-status header missing, mapped from HTTP status code 404";
        for code in [Code::Unimplemented, Code::PermissionDenied, Code::Unauthenticated] {
            assert_eq!(meaning(Call::End, code, message), OmniErrorKind::Unavailable);
        }
    }

    #[test]
    fn a_message_is_one_short_line() {
        assert_eq!(one_line("a\nb\u{1}c"), "a b c");
        assert_eq!(one_line(&"x".repeat(5000)).chars().count(), MESSAGE_CHARS + 1);
    }
}
