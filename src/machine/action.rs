//! The words of a decision: the one action of a pass, what to tell people, when to look again, what has to be seen first.

use std::time::Duration;

use crate::cloud::Timestamp;

use super::observed::{Failure, Portion};
use super::replace::Loss;

/// The one mutation of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action<S> {
    /// R1: put our finalizer on the request.
    AddFinalizer,
    /// R3: create the status, without a claim.
    CreateStatus,
    /// R4, R12: write the claim with these scopes.
    WriteClaim {
        /// Every scope tried; the last is the current one.
        scopes: Vec<S>,
    },
    /// R12: take the lease, for a moment.
    TakeLease,
    /// R10: register the schematic.
    RegisterSchematic,
    /// R11: bring the image into the scope; runs beside the queue.
    StartImport {
        /// Where.
        scope: S,
    },
    /// R13: create the instance, after fresh Gets of request and status.
    CreateInstance {
        /// Where.
        scope: S,
    },
    /// R18: start the stopped instance.
    StartInstance {
        /// Where.
        scope: S,
        /// The vendor's ID.
        id: String,
    },
    /// R8: remove what a failed creation left; never an instance.
    DeleteLeftovers {
        /// Where.
        scope: S,
    },
    /// T5: take a step of the way to nothing, after a fresh Get of the status.
    DeleteInstance {
        /// Where.
        scope: S,
        /// The vendor's ID; `None` where only leftovers were seen.
        id: Option<String>,
    },
    /// L4: note in the ledger that a lost machine is about to be replaced.
    SpendReplacement {
        /// How it was lost.
        loss: Loss,
    },
    /// L4: note on the status that its replacement is under way.
    BeginReplacement {
        /// How it was lost.
        loss: Loss,
    },
    /// N2: the machine is back, before anything was taken from it: take that note off.
    CancelReplacement,
    /// N3: take a step of the deletion of a lost instance, after fresh Gets of request and status and a fresh find.
    DeleteLost {
        /// How it was lost.
        loss: Loss,
        /// Where.
        scope: S,
        /// The vendor's ID.
        id: String,
    },
    /// R17: write a patch.
    WritePatch {
        /// Its ID.
        id: String,
    },
    /// T1: ask for the end of a patch.
    TearDownPatch {
        /// Its ID.
        id: String,
    },
    /// T1, R17: end a patch that nothing holds.
    DestroyPatch {
        /// Its ID.
        id: String,
    },
    /// T2: ask for the end of the status, and with it for Omni's drain.
    TearDownStatus,
    /// T6: end the status, and with it the claim, after a fresh Get.
    DestroyStatus,
    /// T6: end the Go library's machine resource.
    DestroyMachineResource,
    /// T7: take our finalizer off the request.
    RemoveFinalizer,
}

/// The kinds of actions, for what is remembered of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActionKind {
    /// A write to Omni.
    Omni,
    /// Registering the schematic.
    Schematic,
    /// Creating the instance.
    Create,
    /// Starting it.
    Start,
    /// Deleting it or its leftovers.
    Delete,
    /// Starting an import; its failures are the import's own.
    Import,
    /// Taking the lease.
    Lease,
}

impl<S> Action<S> {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ActionKind {
        match self {
            Self::RegisterSchematic => ActionKind::Schematic,
            Self::StartImport { .. } => ActionKind::Import,
            Self::TakeLease => ActionKind::Lease,
            Self::CreateInstance { .. } => ActionKind::Create,
            Self::StartInstance { .. } => ActionKind::Start,
            Self::DeleteLeftovers { .. } | Self::DeleteInstance { .. } | Self::DeleteLost { .. } => {
                ActionKind::Delete
            }
            Self::AddFinalizer
            | Self::CreateStatus
            | Self::WriteClaim { .. }
            | Self::SpendReplacement { .. }
            | Self::BeginReplacement { .. }
            | Self::CancelReplacement
            | Self::WritePatch { .. }
            | Self::TearDownPatch { .. }
            | Self::DestroyPatch { .. }
            | Self::TearDownStatus
            | Self::DestroyStatus
            | Self::DestroyMachineResource
            | Self::RemoveFinalizer => ActionKind::Omni,
        }
    }
}

/// What is being done, in the words of a status line.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step {
    /// Making ready.
    Preparing,
    /// Registering the schematic.
    PreparingImage,
    /// Bringing the image; so much of it has come.
    ImportingImage(Option<Portion>),
    /// Creating the instance.
    Creating,
    /// Starting it.
    Starting,
    /// Trying the next scope.
    NextScope,
    /// Deleting the instance.
    Deleting,
}

/// What to tell people.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Finding {
    /// What is shown stays.
    Keep,
    /// Under way. The stage becomes PROVISIONING, but for a machine that ran.
    Step(Step),
    /// An action failed and waits for its next try.
    Blocked {
        /// What was being done.
        step: Step,
        /// Why it failed.
        failure: Failure,
    },
    /// The look failed: the stage is kept.
    Unseen(Failure),
    /// A person or a change is needed.
    Failed(Reason),
    /// It runs.
    Provisioned,
}

impl Finding {
    /// Whether it says that the instance was seen running, joined or not.
    #[must_use]
    pub fn is_of_running(&self) -> bool {
        match self {
            Self::Provisioned => true,
            Self::Failed(reason) => reason.loss() == Some(Loss::NeverJoined),
            Self::Keep | Self::Step(_) | Self::Blocked { .. } | Self::Unseen(_) => false,
        }
    }
}

/// Why a person or a change is needed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The status is tearing down while its request runs, or belongs to an earlier request of the same ID.
    StatusTornDown,
    /// The request cannot be answered as it is written.
    Invalid(String),
    /// The name is taken by somebody else's.
    Foreign(String),
    /// It ran, and is gone.
    Vanished {
        /// Its name in the cloud.
        name: String,
        /// The UUID that was published, which on most clouds is, or leads to, the vendor's ID; empty if none.
        uuid: String,
        /// When this process last saw it running, by our clock.
        last_seen: Option<Timestamp>,
    },
    /// It ran, and was stopped outside of Omni.
    Stopped,
    /// The cloud says that it is broken, in its own words.
    Broken(String),
    /// It runs, and did not join by the deadline; when it was started.
    NotJoined {
        /// By the cloud's clock.
        started: Timestamp,
        /// What its console tells, in a sentence.
        diagnosis: Option<String>,
    },
    /// It is lost, and its class asks for a replacement.
    Lost {
        /// What is the matter with it.
        what: Box<Reason>,
        /// What becomes of it.
        then: Then,
    },
    /// It is lost, and is being replaced.
    Replacing(Loss),
}

impl Reason {
    /// How the machine was lost, if it was.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        match self {
            Self::Vanished { .. } => Some(Loss::Vanished),
            Self::Stopped => Some(Loss::Stopped),
            Self::NotJoined { .. } => Some(Loss::NeverJoined),
            Self::Lost { what, .. } => what.loss(),
            Self::Replacing(loss) => Some(*loss),
            Self::StatusTornDown | Self::Invalid(_) | Self::Foreign(_) | Self::Broken(_) => None,
        }
    }
}

/// What becomes of a lost machine whose class asks for a replacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Then {
    /// It is replaced if it stays lost for so long.
    ReplacedIn(Duration),
    /// Not now: the hour's replacements are used up.
    UsedUp,
    /// Not now: too many are lost.
    TooMany {
        /// Lost ones.
        lost: usize,
        /// All that ran.
        ran: usize,
    },
}

/// When to look at the request again, if no event comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Look {
    /// As soon as the action is done.
    Now,
    /// Something is under way.
    Soon,
    /// At this moment of our clock.
    At(Timestamp),
    /// Nothing to do: a slow look.
    Slow,
    /// Only an event can change anything.
    Event,
    /// Never: there is nothing left to look at.
    Done,
}

/// The decision of one pass.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plan<S> {
    /// The one mutation.
    pub action: Option<Action<S>>,
    /// What to tell people.
    pub finding: Finding,
    /// When to look again.
    pub look: Look,
}

/// Something that has to be seen before a decision can be made. Each is asked at most once a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ask {
    /// What is there of the instance, in every scope of *where*; a list that is recent enough will do.
    Instance,
    /// The same, with a find of its own for each scope, begun now.
    InstanceByFind,
    /// Whether the current scope has the image.
    Image,
    /// Why the instance, which runs, has not joined.
    Diagnosis,
    /// A fresh Get of the request.
    Request,
    /// Whether the limits allow a replacement.
    Budget,
    /// A fresh Get of the former machine, as Omni knows it.
    Former,
}

/// Either a question or a plan.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Decision<S> {
    /// Look first, then decide again.
    Ask(Ask),
    /// Do this.
    Plan(Plan<S>),
}
