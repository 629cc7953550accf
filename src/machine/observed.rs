//! Everything seen this pass. What was not asked for is `Unasked`; what could not be seen is `Unknown`, never an absence.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cloud::{ErrorKind, Found, Instance, InstanceState, Legacy, Replace, Scope, Timestamp};
use crate::omni::kinds::Stage;

use super::action::ActionKind;
use super::replace::{Budget, Loss};

/// Where one request's instance was placed, as written to Omni before the first cloud mutation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(bound = "S: Scope")]
pub struct Placement<S> {
    /// When the request was made, in milliseconds since the epoch by Omni's clock: tells one incarnation of an ID from the next.
    pub created: u64,
    /// Every scope tried; the last is the current one.
    pub scopes: Vec<S>,
}

/// Our status of the request, as Omni holds it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StatusSeen<S> {
    /// Whether somebody asked for its end.
    pub tearing_down: bool,
    /// Whether finalizers hold it; true as long as nothing newer than our own teardown shows that none do.
    pub held: bool,
    /// The stage it shows.
    pub stage: Stage,
    /// The UUID it shows; empty if none.
    pub uuid: String,
    /// The claim's placement.
    pub placement: Option<Placement<S>>,
    /// The claim's note that the instance was seen running.
    pub ran: bool,
    /// The note that the machine is being replaced, and why.
    pub replacing: Option<Loss>,
}

/// A config patch of the request, as Omni holds it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PatchSeen {
    /// Its ID.
    pub id: String,
    /// Whether somebody asked for its end.
    pub tearing_down: bool,
    /// Whether finalizers hold it; counted as for the status.
    pub held: bool,
    /// Whether it is one of those that we want, with other content than we want.
    pub differs: bool,
}

/// How something was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum By {
    /// With a look of its own.
    Find,
    /// In a list of the scope, which shows instances alone.
    List,
}

/// What one scope shows of the instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Seen {
    /// Nobody looked yet this pass.
    Unasked,
    /// The look failed.
    Unknown(Failure),
    /// The look succeeded.
    Known {
        /// What was found.
        found: Found,
        /// How.
        by: By,
        /// When the look was begun, by our clock.
        at: Timestamp,
    },
}

/// A failure, and until when not to try again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Failure {
    /// What it means.
    pub kind: ErrorKind,
    /// For a person; holds no secret.
    pub cause: String,
    /// By our clock.
    pub not_before: Timestamp,
}

/// How much of a download has come, in bytes as they come over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Portion {
    /// What has come.
    pub received: u64,
    /// All of it, where the server said so.
    pub total: Option<u64>,
}

impl fmt::Display for Portion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1024 * 1024;
        let received = self.received / MIB;
        match self.total.filter(|total| *total > 0) {
            Some(total) => {
                let percent = u128::from(self.received) * 100 / u128::from(total);
                write!(
                    f,
                    "{} % ({received} of {} MiB)",
                    percent.min(100),
                    total.div_ceil(MIB)
                )
            }
            None => write!(f, "{received} MiB"),
        }
    }
}

/// What is known of the image in the current scope.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageSeen {
    /// Nobody looked yet this pass.
    Unasked,
    /// It is not there, and nobody is bringing it.
    Absent,
    /// Under way; so much of it has come, where that is known.
    Importing(Option<Portion>),
    /// The look or the last import failed.
    Failed(Failure),
    /// It is there.
    Present,
}

/// What is known of why the instance has not joined.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Diagnosis {
    /// Nobody looked yet this pass.
    Unasked,
    /// Somebody looked; a sentence for a person, where there was something to see. Holds no secret.
    Known(Option<String>),
}

/// What Omni knows of a machine that is being replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Former {
    /// Nobody looked yet this pass.
    Unasked,
    /// Omni still has a machine of the UUID that was published.
    There,
    /// It has none.
    Gone,
}

/// How the last creation by this process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Created {
    /// The cloud accepted.
    Accepted,
    /// It failed; the kind says how.
    Failed(ErrorKind),
}

/// Everything seen this pass.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Observed<S> {
    /// The instance's name in the cloud.
    pub name: String,
    /// Whether the request carries our finalizer.
    pub finalizer: bool,
    /// Whether a fresh Get of the request, made this pass, agreed with the goal.
    pub request_confirmed: bool,
    /// Our status of the request.
    pub status: Option<StatusSeen<S>>,
    /// Whether the Go library's machine resource of this request exists.
    pub machine_resource: bool,
    /// What it says.
    pub legacy: Option<Legacy<S>>,
    /// Every patch of the request that exists.
    pub patches: Vec<PatchSeen>,
    /// The patches that we want and that do not exist, by ID.
    pub missing_patches: Vec<String>,
    /// Whether a machine registered that carries this request.
    pub registered: bool,
    /// Every scope of *where*, in order.
    pub scopes: Vec<(S, Seen)>,
    /// Whether the schematic's ID is known.
    pub schematic: bool,
    /// The image in the current scope.
    pub image: ImageSeen,
    /// Whether the machine reads its image while it boots for the first time.
    pub boots_from_medium: bool,
    /// The last failure of each kind of action, by this process.
    pub failures: BTreeMap<ActionKind, Failure>,
    /// How the last creation by this process ended, if it was in the current scope.
    pub created: Option<Created>,
    /// Since when this process has known the claim with these scopes, by our clock.
    pub claimed_since: Option<Timestamp>,
    /// When a step of the deletion was last accepted, by our clock.
    pub deleting: Option<Timestamp>,
    /// Whether this process destroyed the status in this teardown: what T6 asks for held then, and nobody creates without a claim.
    pub ended: bool,
    /// When this process first saw the teardown, by our clock.
    pub teardown_seen: Option<Timestamp>,
    /// Whether this process saw the request tearing down, not only gone.
    pub torn_down: bool,
    /// Whether this process saw a claim of this incarnation of the request before.
    pub claim_lost: bool,
    /// Since when this process has seen the instance run, by our clock.
    pub running_since: Option<Timestamp>,
    /// When the instance was last seen running by this process, by our clock.
    pub last_running: Option<Timestamp>,
    /// Why it has not joined.
    pub diagnosis: Diagnosis,
    /// Which lost machines of the class are replaced.
    pub replace: Replace,
    /// How this process last saw it lost, and since when, by our clock.
    pub lost: Option<(Loss, Timestamp)>,
    /// Whether it may be replaced now.
    pub budget: Budget,
    /// What Omni knows of the machine that is being replaced.
    pub former: Former,
    /// Whether this process holds the lease.
    pub lease: bool,
}

/// What there is of the instance over all scopes: the first of the list that any scope shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overall<'a, S> {
    /// A scope was not looked at yet.
    Unasked,
    /// Our instance.
    Ours(&'a S, &'a Instance),
    /// A scope could not be seen.
    Unknown(&'a Failure),
    /// Leftovers.
    Remains(&'a S, Option<Timestamp>),
    /// The name is a stranger's.
    Foreign(&'a S, &'a str),
    /// Nothing anywhere; whether every scope was asked with a find, and when the earliest look was begun.
    Nothing(By, Timestamp),
}

impl<S: Scope> Observed<S> {
    /// Whether this instance was ever seen running, by any process.
    #[must_use]
    pub fn ran(&self) -> bool {
        self.registered || self.is_noted_as_run()
    }

    /// Whether our status says that it ran. This alone is in the fresh Gets of R13, and so forbids a creation to every process.
    #[must_use]
    pub fn is_noted_as_run(&self) -> bool {
        self.status
            .as_ref()
            .is_some_and(|status| status.ran || status.stage == Stage::Provisioned)
    }

    /// The claim's placement.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement<S>> {
        self.status.as_ref()?.placement.as_ref()
    }

    /// Ours > Unknown > Remains > Foreign > Nothing.
    #[must_use]
    pub fn overall(&self) -> Overall<'_, S> {
        let mut unknown = None;
        let mut remains = None;
        let mut foreign = None;
        let mut unasked = false;
        let mut by = By::Find;
        let mut earliest = Timestamp(u64::MAX);
        for (scope, seen) in &self.scopes {
            match seen {
                Seen::Unasked => unasked = true,
                // Of several failures the one that is longest in the way: nobody looks before.
                Seen::Unknown(failure) => {
                    unknown = unknown
                        .filter(|known: &&Failure| known.not_before >= failure.not_before)
                        .or(Some(failure));
                }
                Seen::Known { found, by: how, at } => {
                    match found {
                        Found::Ours(instance) => return Overall::Ours(scope, instance),
                        Found::Remains { since } => remains = remains.or(Some((scope, *since))),
                        Found::Foreign { what } => foreign = foreign.or(Some((scope, what.as_str()))),
                        Found::Nothing => {}
                    }
                    if *how == By::List {
                        by = By::List;
                    }
                    earliest = earliest.min(*at);
                }
            }
        }
        match (unasked, unknown, remains, foreign) {
            (true, ..) => Overall::Unasked,
            (_, Some(failure), ..) => Overall::Unknown(failure),
            (_, _, Some((scope, since)), _) => Overall::Remains(scope, since),
            (_, _, _, Some((scope, what))) => Overall::Foreign(scope, what),
            _ => Overall::Nothing(by, earliest),
        }
    }

    /// Whether every scope was looked at with a find, begun no earlier than `since`, and shows nothing that is ours.
    #[must_use]
    pub fn nothing_of_ours(&self, since: Timestamp) -> bool {
        self.scopes.iter().all(|(_, seen)| {
            matches!(
                seen,
                Seen::Known { found: Found::Nothing | Found::Foreign { .. }, by: By::Find, at } if *at >= since
            )
        })
    }
}

/// What the planner needs to know of an instance's state.
#[must_use]
pub fn is_running(instance: &Instance) -> bool {
    instance.state == InstanceState::Running
}
