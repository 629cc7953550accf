//! What a hook hears of a call, and what it may answer.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::resources::{Stored, phase_text};
use super::types;
use crate::omni::wire::specs;

/// The calls that Omni answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rpc {
    /// Reads one resource.
    Get,
    /// Reads all of a type. The hook hears of its opening.
    List,
    /// Watches. The hook hears of its opening.
    Watch,
    /// Creates a resource.
    Create,
    /// Replaces one.
    Update,
    /// Asks for the end of one.
    Teardown,
    /// Ends one.
    Destroy,
    /// Registers a schematic.
    CreateSchematic,
    /// Asks where a boot asset is.
    BootAsset,
}

impl Rpc {
    /// Whether the call changes anything.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(
            self,
            Self::Create | Self::Update | Self::Teardown | Self::Destroy | Self::CreateSchematic
        )
    }
}

impl fmt::Display for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Teardown => "teardown",
            Self::Destroy => "destroy",
            Self::CreateSchematic => "create schematic",
            Self::BootAsset => "boot asset",
        })
    }
}

/// One call, as a hook sees it: signed and parsed, not yet allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub rpc: Rpc,
    /// COSI namespace; empty for the management service.
    pub namespace: String,
    /// COSI type; empty for the management service.
    pub kind: String,
    /// Resource ID, or schematic ID; empty for List and for a Watch of a whole type.
    pub id: String,
    /// What a Create or Update would change: `+finalizer x`, `phase tearingDown`, `+annotation x`, `stage
    /// PROVISIONED`, `uuid`, `status "..."`, `error "..."`, `spec`; separated by commas.
    pub detail: String,
    /// The provider ID of the caller; its whole identity if it is no provider.
    pub provider: String,
    /// Counts all calls of this Omni, from 1.
    pub number: u64,
}

impl fmt::Display for Call {
    /// One line of a trace: `update MachineRequests/web-x7k: +finalizer oxide.ProvisionController`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rpc)?;
        if !self.kind.is_empty() {
            write!(f, " {}", types::short(&self.kind))?;
        }
        if !self.id.is_empty() {
            write!(f, "{}{}", if self.kind.is_empty() { " " } else { "/" }, self.id)?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

/// When the hook is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// Nothing happened yet.
    Before,
    /// It took effect, the answer is not sent. Not reached by a call that was refused.
    After,
}

/// What becomes of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Proceed,
    /// It fails with that code and message.
    Fail(FailCode, String),
    /// It fails as if its connection broke; the connection lives.
    Drop,
    /// All connections break, and every other call and watch with them.
    Reset,
    /// No answer ever comes.
    Hang,
}

/// gRPC codes to fail with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "gRPC's own names")]
pub enum FailCode {
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    Unimplemented,
    Internal,
    Unavailable,
    Unauthenticated,
}

/// Asked before and after every call.
pub type Hook = Arc<dyn Fn(&Call, Moment) -> BoxFuture<'static, Verdict> + Send + Sync>;

/// What differs between two states of a resource, in words for traces.
pub(super) fn describe(old: Option<&Stored>, new: &Stored) -> String {
    let blank = Stored::new(&new.namespace, &new.kind, &new.id);
    let creation = old.is_none();
    let old = old.unwrap_or(&blank);
    let mut words: Vec<String> = Vec::new();
    for finalizer in new.finalizers.difference(&old.finalizers) {
        words.push(format!("+finalizer {finalizer}"));
    }
    for finalizer in old.finalizers.difference(&new.finalizers) {
        words.push(format!("-finalizer {finalizer}"));
    }
    if new.phase != old.phase {
        words.push(format!("phase {}", phase_text(new.phase)));
    }
    if new.owner != old.owner && !creation {
        words.push(format!("owner {:?}", new.owner));
    }
    if new.kind == types::MACHINE_REQUEST_STATUSES {
        describe_status(old, new, &mut words);
    } else if new.spec != old.spec && !creation {
        words.push("spec".to_owned());
    }
    for (what, before, after) in [
        ("annotation", &old.annotations, &new.annotations),
        ("label", &old.labels, &new.labels),
    ] {
        // The labels of a new resource are always the same few.
        if creation && what == "label" {
            continue;
        }
        for (key, value) in after {
            match before.get(key) {
                None => words.push(format!("+{what} {key}")),
                Some(earlier) if earlier != value => words.push(format!("~{what} {key}")),
                Some(_) => {}
            }
        }
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            words.push(format!("-{what} {key}"));
        }
    }
    words.join(", ")
}

fn describe_status(old: &Stored, new: &Stored, words: &mut Vec<String>) {
    let (old, new): (specs::MachineRequestStatusSpec, specs::MachineRequestStatusSpec) =
        (old.decode(), new.decode());
    if new.stage != old.stage {
        words.push(format!("stage {}", new.stage().as_str_name()));
    }
    if new.id != old.id {
        words.push(if new.id.is_empty() { "no uuid" } else { "uuid" }.to_owned());
    }
    if new.error != old.error {
        words.push(format!("error {:?}", new.error));
    }
    if new.status != old.status {
        words.push(format!("status {:?}", new.status));
    }
}
