//! One pass over one machine request: observe, decide, at most one action, report.
//!
//! *Guarantees.* One mutation of the world at most, then the key is looked at again. Every await may be the last: what the next
//! process sees is enough to go on.
//!
//! *Not here.* What to do is `machine/plan.rs`; how, `act.rs`; what to say, `report.rs`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;
use tracing::{Instrument, debug, info_span, warn};

use crate::cloud::{Cloud, Guarded, InstanceRef, Mark, Timestamp};
use crate::machine::action::{Ask, Decision, Look, Plan};
use crate::machine::desired::{Goal, Parsed, goal, name};
use crate::machine::observed::{Observed, Placement};
use crate::machine::plan::plan;
use crate::machine::replace::ANNOTATION_REPLACING;
use crate::machine::{Pace, desired};
use crate::omni::join::Join;
use crate::omni::kinds::{MachineRequestSpec, MachineRequestStatuses, MachineRequests};
use crate::omni::management::Management;
use crate::omni::{Fence, Lease, Resource, State};

use super::clock::Clock;
use super::download;
use super::health::Health;
use super::imports::Imports;
use super::inventory::Inventory;
use super::memory::Memory;
use super::queue::{Key, Queue};
use super::readings::Readings;
use super::retry;
use super::stores::Stores;

/// A pass that asks for another at once so often in a row runs in a circle: it is slowed down, and said.
const HURRIED: u32 = 30;

/// Who this daemon is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The provider ID.
    pub provider: String,
    /// The installation: one Omni account's provider.
    pub installation: String,
}

impl Identity {
    /// Our finalizer on requests, and the owner of what we write: the Go library's, so that either can take over.
    #[must_use]
    pub fn controller(&self) -> String {
        format!("{}.ProvisionController", self.provider)
    }
}

/// Everything that a pass needs.
pub struct Engine<C: Cloud> {
    /// The cloud.
    pub cloud: Arc<Guarded<C>>,
    /// Omni's state.
    pub state: State,
    /// Omni's management API.
    pub management: Management,
    /// The join parameters of this moment.
    pub join: Join,
    /// What Omni told us.
    pub stores: Stores,
    /// What the cloud told us.
    pub inventory: Inventory<C>,
    /// Images on their way.
    pub imports: Arc<Imports<C>>,
    /// Which of several daemons may act.
    pub lease: Lease,
    /// What lets this one act, and lets nothing pass when it may not.
    pub fence: Fence,
    /// Who is looked at next.
    pub queue: Arc<Queue>,
    /// What the provider's health says.
    pub health: Arc<Health>,
    /// Bounds of image downloads.
    pub downloads: download::Settings,
    /// The time.
    pub clock: Clock,
    /// Intervals and deadlines.
    pub pace: Pace,
    /// Who we are.
    pub identity: Identity,
    /// The daemon's own nameservers.
    pub nameservers: Vec<IpAddr>,
    /// Schematic IDs by the hash of their input; a cell makes one registration serve all who want the same.
    pub schematics: Mutex<HashMap<String, Arc<OnceCell<String>>>>,
    /// Requests that were read.
    pub readings: Readings<Parsed<C>>,
    /// What is remembered of each live request.
    pub memories: Mutex<HashMap<Key, Box<Memory<C>>>>,
}

/// One request in the middle of a pass.
pub(super) struct Pass<'a, C: Cloud> {
    pub(super) key: &'a str,
    pub(super) request: Option<Arc<Resource<MachineRequests>>>,
    pub(super) status: Option<Arc<Resource<MachineRequestStatuses>>>,
    pub(super) parsed: Option<Arc<Parsed<C>>>,
    pub(super) goal: Goal<C::Scope>,
    pub(super) seen: Observed<C::Scope>,
    pub(super) memory: &'a mut Memory<C>,
}

/// How an action or a report ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It took effect.
    Done,
    /// The world had moved on; nothing was done and the next pass sees it.
    Moved,
    /// It failed; the failure is remembered.
    Failed,
}

/// When a key is looked at again, if no event comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// At once.
    Now,
    /// At this instant.
    At(Instant),
    /// Never: nothing is left.
    Never,
}

impl<C: Cloud> Engine<C> {
    /// Makes one pass and plans the next.
    pub async fn pass(&self, key: &str) -> Next {
        let mut memory = self.take(key);
        let span = info_span!("pass", request = key);
        let next = self.observe_and_act(key, &mut memory).instrument(span).await;
        match next {
            Next::Never => self.health.unstuck(key),
            Next::Now | Next::At(_) => {
                self.memories
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(key.to_owned(), memory);
            }
        }
        next
    }

    fn take(&self, key: &str) -> Box<Memory<C>> {
        self.memories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(key)
            .unwrap_or_default()
    }

    async fn observe_and_act(&self, key: &str, memory: &mut Memory<C>) -> Next {
        if let Err(next) = self.read_dirty(key, memory).await {
            return next;
        }
        let mut pass = match self.begin(key, memory).await {
            Ok(pass) => pass,
            Err(next) => return next,
        };
        let plan = match self.decide(&mut pass).await {
            Ok(plan) => plan,
            Err(next) => return next,
        };
        debug!(goal = ?pass.goal, action = ?plan.action, finding = ?plan.finding, look = ?plan.look, "decided");
        let now = self.clock.now();
        pass.note_step(&plan, now);
        pass.note_lost(&plan.finding, now);
        if plan.action.is_some()
            && let Err(until) = pass.memory.begin_action(now)
        {
            debug!(action = ?plan.action, "what was done for this request is undone again and again");
            return Next::At(self.clock.instant(until));
        }
        let acted = match &plan.action {
            Some(action) => self.act(&mut pass, action, &plan).await,
            None => Outcome::Done,
        };
        let reported = if plan.action.is_none() {
            self.report(&mut pass, &plan.finding).await
        } else {
            Outcome::Done
        };
        self.when(&mut pass, &plan, acted, reported)
    }

    /// Fixes the goal, from the stores alone wherever they suffice.
    async fn begin<'a>(&self, key: &'a str, memory: &'a mut Memory<C>) -> Result<Pass<'a, C>, Next> {
        let request = self.stores.requests.get(key);
        let status = self.stores.statuses.get(key);
        if request.is_none() {
            let left = status.is_some()
                || self.stores.machine_resources.get(key).is_some()
                || !self.stores.patches.group(key).is_empty();
            if !left {
                return Err(Next::Never);
            }
            self.confirm_gone(key, memory).await?;
        }
        let created = request.as_ref().map(|request| request.metadata.created);
        if let Some(created) = created
            && memory.created_at.is_some_and(|known| known != created)
        {
            *memory = Memory::default();
        }
        memory.created_at = created.or(memory.created_at);
        let replacing = status
            .as_ref()
            .is_some_and(|status| status.metadata.annotations.contains_key(ANNOTATION_REPLACING));
        if std::mem::replace(&mut memory.replacing, replacing) && !replacing {
            memory.begin_anew();
        }
        if memory.parsed.is_none()
            && let Some(request) = &request
        {
            let read = |request: &MachineRequestSpec| Parsed::read(request, &self.nameservers);
            memory.parsed = Some(self.readings.of(&request.spec, read));
        }
        let parsed = memory.parsed.clone();
        let claim: Option<Placement<C::Scope>> = status
            .as_ref()
            .and_then(|status| super::observe::placement(status));
        memory.claim_known |= claim.is_some();
        let unreadable = status
            .as_ref()
            .is_some_and(|status| super::observe::is_claim_unreadable::<C::Scope>(status));
        let mut goal = goal(
            request
                .as_ref()
                .zip(parsed.as_ref())
                .map(|(request, parsed)| (&request.metadata, parsed.as_ref())),
            claim.as_ref().map(|claim| Timestamp(claim.created)),
            &self.identity.controller(),
        );
        if unreadable {
            let cause = "its claim was written by a newer version of this provider: run that version";
            self.health.stuck(key, cause.to_owned());
            goal = Goal::Leave;
        }
        memory.request_torn_down |= request.as_ref().is_some_and(|request| request.tearing_down());
        match goal {
            Goal::TearDown { .. } | Goal::Gone { .. } => {
                memory.teardown_seen.get_or_insert_with(|| self.clock.now());
            }
            Goal::Leave | Goal::Run { .. } | Goal::Invalid { .. } => {
                memory.teardown_seen = None;
                memory.drained = false;
                memory.ended = false;
            }
        }
        let seen = self.read_stores(key, request.as_deref(), status.as_deref(), &goal, memory);
        Ok(Pass {
            key,
            request,
            status,
            parsed,
            goal,
            seen,
            memory,
        })
    }

    /// Answers the planner's questions until it has a plan.
    async fn decide(&self, pass: &mut Pass<'_, C>) -> Result<Plan<C::Scope>, Next> {
        let mut asked: Vec<Ask> = Vec::new();
        loop {
            let now = self.clock.now();
            match plan(&pass.goal, &pass.seen, now, &self.pace) {
                Decision::Plan(plan) => return Ok(plan),
                Decision::Ask(ask) if asked.contains(&ask) => {
                    warn!(?ask, "the planner asked twice: this is a fault of the provider");
                    return Err(self.after(self.pace.step_most));
                }
                Decision::Ask(ask) => {
                    asked.push(ask);
                    self.answer(pass, ask).await?;
                }
            }
        }
    }

    /// When to look again.
    fn when(&self, pass: &mut Pass<'_, C>, plan: &Plan<C::Scope>, acted: Outcome, reported: Outcome) -> Next {
        let now = self.clock.now();
        let hurry = |pass: &mut Pass<'_, C>| {
            pass.memory.hurried = pass.memory.hurried.saturating_add(1);
            if pass.memory.hurried > HURRIED {
                warn!(action = ?plan.action, finding = ?plan.finding, "passes follow each other without an end");
                return self.after(self.pace.step_most);
            }
            Next::Now
        };
        if reported == Outcome::Failed {
            return self.after(self.pace.step_most);
        }
        if acted == Outcome::Moved || reported == Outcome::Moved {
            pass.memory.conflicts = pass.memory.conflicts.saturating_add(1);
            // A reader that lags behind its writer (Omni serves some kinds from a cache) must not make us spin.
            return match pass.memory.conflicts {
                ..=3 => hurry(pass),
                more => self.after(self.pace.step.saturating_mul(more).min(self.pace.step_most)),
            };
        }
        if acted == Outcome::Failed {
            return hurry(pass);
        }
        if plan.look != Look::Now {
            pass.memory.hurried = 0;
        }
        if plan.look != Look::Soon {
            pass.memory.soon = 0;
        }
        let look = match plan.look {
            Look::Now => return hurry(pass),
            Look::Done => return Next::Never,
            Look::Soon => {
                let wait = self.pace.step.saturating_mul(1 << pass.memory.soon.min(10));
                pass.memory.soon = pass.memory.soon.saturating_add(1);
                now.after(wait.min(self.pace.step_most))
            }
            Look::At(at) => at,
            Look::Slow | Look::Event => now.after(retry::spread(self.pace.slow)),
        };
        let look = self.report_due(pass, plan).map_or(look, |due| due.min(look));
        Next::At(self.clock.instant(look.max(now.after(Duration::from_millis(1)))))
    }

    pub(super) fn after(&self, wait: Duration) -> Next {
        Next::At(Instant::now() + retry::spread(wait))
    }

    /// The instance of a request in one scope.
    pub(super) fn instance(&self, pass: &Pass<'_, C>, scope: &C::Scope) -> InstanceRef<C::Scope> {
        let live = match pass.goal {
            Goal::Run { .. } | Goal::Invalid { .. } | Goal::TearDown { .. } => true,
            Goal::Leave | Goal::Gone { .. } => pass.seen.legacy.is_some(),
        };
        InstanceRef {
            scope: scope.clone(),
            name: name::<C>(pass.key),
            id: None,
            mark: Mark {
                provider: self.identity.provider.clone(),
                request: pass.key.to_owned(),
                installation: self.identity.installation.clone(),
            },
            adopt_bare: live,
        }
    }
}

impl<C: Cloud> Pass<'_, C> {
    /// The request, where it can be answered.
    pub(super) fn desired(&self) -> Option<&desired::Desired<C>> {
        self.parsed.as_ref()?.good()
    }
}
