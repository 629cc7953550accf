//! What this process remembers of one request between two passes: nothing that it could not do without.
//!
//! Losing it, as every restart does, costs a call or a wait, never a machine.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::cloud::{Cloud, ErrorKind, InstanceState, Timestamp};
use crate::machine::action::{ActionKind, Step};
use crate::machine::desired::Parsed;
use crate::machine::observed::{Created, Failure, Overall, Seen};
use crate::machine::replace::Loss;
use crate::machine::status::Shown;

/// No more actions for one request than this in this time: three lives of a machine from its request to its end.
const ACTIONS: (u32, Duration) = (40, Duration::from_secs(10));

/// A look at the instance, in every scope.
#[derive(Debug)]
pub struct Looked<S> {
    /// What was seen.
    pub scopes: Vec<(S, Seen)>,
    /// When the first look was begun.
    pub at: Timestamp,
}

/// What is remembered of one request.
#[derive(Debug)]
pub struct Memory<C: Cloud> {
    /// The incarnation of the request that this memory is about.
    pub created_at: Option<Timestamp>,
    /// The request, read once.
    pub parsed: Option<Arc<Parsed<C>>>,
    /// The last failure of each kind of action.
    pub failures: BTreeMap<ActionKind, Failure>,
    /// How many failures in a row each kind of action had.
    pub failed: BTreeMap<ActionKind, u32>,
    /// How many looks in a row failed.
    pub blind: u32,
    /// How the last creation ended, and where.
    pub created: Option<(C::Scope, Created)>,
    /// The scopes of the claim, and since when they have been known.
    pub claimed: Option<(Vec<C::Scope>, Timestamp)>,
    /// Whether this process has known a claim.
    pub claim_known: bool,
    /// When the teardown was first seen.
    pub teardown_seen: Option<Timestamp>,
    /// Whether the request was seen tearing down.
    pub request_torn_down: bool,
    /// Whether a Get, made for a deletion, showed the status gone or tearing down without finalizers.
    pub drained: bool,
    /// Whether the status was destroyed in this teardown.
    pub ended: bool,
    /// The version of a resource when its teardown was answered: until a newer one is seen, finalizers count as present.
    pub torn_down: HashMap<String, (Timestamp, u64)>,
    /// When this process first learned that the instance ran, from whomever.
    pub ran_since: Option<Timestamp>,
    /// Since when the instance has been seen running, and when last.
    pub running: Option<(Timestamp, Timestamp)>,
    /// Whether its replacement was under way when it was last looked at.
    pub replacing: bool,
    /// How it was last seen lost, and since when.
    pub lost: Option<(Loss, Timestamp)>,
    /// Why it has not joined, and when that was asked.
    pub diagnosed: Option<(Timestamp, Option<String>)>,
    /// When the last mutation of the instance ended: no older look counts.
    pub mutated: Option<Timestamp>,
    /// The last look at the instance.
    pub looked: Option<Looked<C::Scope>>,
    /// When a step of the deletion was last accepted.
    pub deleting: Option<Timestamp>,
    /// Whether the next look has to be a find: after an error, a list would not tell enough.
    pub find_next: bool,
    /// How many looks in a row saw something under way.
    pub soon: u32,
    /// How many passes in a row asked for another at once.
    pub hurried: u32,
    /// How many writes in a row met a newer version.
    pub conflicts: u32,
    /// How many actions were begun, and since when that is counted.
    pub begun: (Timestamp, u32),
    /// The step under way, and since when.
    pub step: Option<(Step, Timestamp)>,
    /// When the status was last written by this process, for its text.
    pub reported: Option<Timestamp>,
    /// The last text that this process wrote into it.
    pub said: Option<Shown>,
}

impl<C: Cloud> Default for Memory<C> {
    fn default() -> Self {
        Self {
            created_at: None,
            parsed: None,
            failures: BTreeMap::new(),
            failed: BTreeMap::new(),
            blind: 0,
            created: None,
            claim_known: false,
            claimed: None,
            teardown_seen: None,
            request_torn_down: false,
            drained: false,
            ended: false,
            torn_down: HashMap::new(),
            ran_since: None,
            running: None,
            replacing: false,
            lost: None,
            diagnosed: None,
            mutated: None,
            looked: None,
            deleting: None,
            find_next: false,
            soon: 0,
            hurried: 0,
            conflicts: 0,
            begun: (Timestamp(0), 0),
            step: None,
            reported: None,
            said: None,
        }
    }
}

impl<C: Cloud> Memory<C> {
    /// Forgets a machine that was replaced, or is not to be replaced any more. What the cloud was last told stays: no older look may
    /// count for the next one.
    pub fn begin_anew(&mut self) {
        let former = std::mem::take(self);
        self.created_at = former.created_at;
        self.parsed = former.parsed;
        self.mutated = former.mutated;
        self.begun = former.begun;
        self.find_next = true;
    }

    /// Counts an action that is about to begin; if there were too many of late, until when none is.
    ///
    /// Whatever undoes our work, a second daemon that has not heard the news or another controller, costs a few calls and no storm.
    pub fn begin_action(&mut self, now: Timestamp) -> Result<(), Timestamp> {
        let (since, count) = &mut self.begun;
        if now >= since.after(ACTIONS.1) {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        if *count > ACTIONS.0 {
            Err(since.after(ACTIONS.1))
        } else {
            Ok(())
        }
    }

    /// Notes that an action of this kind succeeded. What the cloud has accepted may fail yet, as a job of its own: the row of
    /// failures goes on until [`Self::saw`].
    pub fn succeeded(&mut self, kind: ActionKind) {
        self.failures.remove(&kind);
        if !matches!(kind, ActionKind::Create | ActionKind::Start | ActionKind::Delete) {
            self.failed.remove(&kind);
        }
        self.conflicts = 0;
        self.soon = 0;
    }

    /// Notes which scopes are claimed; since when they have been. What is known of a creation elsewhere says nothing of the
    /// current one.
    pub fn claims(&mut self, scopes: &[C::Scope], now: Timestamp) -> Timestamp {
        if let Some((at, _)) = &self.created
            && scopes.last() != Some(at)
        {
            self.created = None;
            self.failures.remove(&ActionKind::Create);
            self.failed.remove(&ActionKind::Create);
        }
        match &self.claimed {
            Some((known, since)) if known == scopes => *since,
            _ => {
                self.claimed = Some((scopes.to_vec(), now));
                now
            }
        }
    }

    /// Notes what a look showed: whatever was accepted and took effect ends its row of failures.
    pub fn saw<S>(&mut self, overall: &Overall<'_, S>) {
        let done: &[ActionKind] = match overall {
            Overall::Nothing(..) | Overall::Foreign(..) => &[ActionKind::Delete],
            Overall::Ours(_, instance) => match instance.state {
                InstanceState::Running => &[ActionKind::Create, ActionKind::Start],
                InstanceState::Stopped | InstanceState::Broken(_) => &[ActionKind::Create],
                InstanceState::Starting => &[],
            },
            Overall::Remains(..) | Overall::Unasked | Overall::Unknown(_) => &[],
        };
        for kind in done {
            self.failed.remove(kind);
        }
    }

    /// Notes that an action failed, and plans its next try.
    pub fn failed(&mut self, kind: ActionKind, error: ErrorKind, cause: String, now: Timestamp) {
        let count = self.failed.entry(kind).or_default();
        // To be told to wait is no failure.
        if error != ErrorKind::Busy {
            *count = count.saturating_add(1);
        }
        let not_before = now.after(super::retry::wait(error, *count));
        self.failures.insert(
            kind,
            Failure {
                kind: error,
                cause,
                not_before,
            },
        );
    }
}
