//! Puts what a daemon of the model sees into the planner's own words, and asks the real `goal`, `plan` and `shown`.
//!
//! The same sight gives the same thought, so each is thought once.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use omni_infra_provider::backends::sim::{Sim, Zone};
use omni_infra_provider::cloud::{
    ErrorKind, Found, Instance, InstanceState, Legacy, Mark, Replace, Timestamp,
};
use omni_infra_provider::machine::action::{Action, ActionKind, Ask, Decision, Finding, Plan, Reason};
use omni_infra_provider::machine::desired::{Parsed, goal};
use omni_infra_provider::machine::observed::{
    By, Created, Diagnosis, Failure, Former, ImageSeen, Observed, PatchSeen, Placement, Seen, StatusSeen,
};
use omni_infra_provider::machine::replace::{Budget, HOUR, Loss};
use omni_infra_provider::machine::status::shown;
use omni_infra_provider::machine::{Goal, Pace, plan};
use omni_infra_provider::omni::kinds::{self, MachineRequestSpec};
use omni_infra_provider::omni::resource::{Metadata, Phase};

use super::state::{
    Daemon, Doubt, Look, Looks, Made, Patch, Place, Power, Request, Resource, Stage, Status, Teardown, Tried,
    Uuid, place_name,
};

const FINALIZER: &str = "sim.ProvisionController";
const PATCH: &str = "provider-id-web";
/// When the teardown was first seen, in every world.
const SEEN: Timestamp = Timestamp(1_000_000_000);
const MOMENT: Duration = Duration::from_secs(1);

/// Everything that a decision depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Sight {
    request: Option<Request>,
    status: Option<Status>,
    status_torn: bool,
    patch: Option<Patch>,
    patch_torn: bool,
    resource: Option<Resource>,
    registered: bool,
    valid: bool,
    made: Made,
    doubt: Doubt,
    teardown: Teardown,
    ended: bool,
    lease: bool,
    looks: Looks,
    /// When they were begun.
    looked: Teardown,
    confirmed: bool,
    spent: bool,
    former: Former,
}

impl Sight {
    pub(super) fn of(
        daemon: &Daemon,
        looks: Looks,
        looked: Teardown,
        confirmed: bool,
        former: Former,
        lease: bool,
    ) -> Self {
        Self {
            request: daemon.request,
            status: daemon.status,
            status_torn: daemon.status_torn,
            patch: daemon.patch,
            patch_torn: daemon.patch_torn,
            resource: daemon.resource,
            // observe.rs, `read_stores`: the machine of an earlier request with the same ID does not count.
            registered: daemon.registered.is_some_and(|registered| {
                daemon
                    .request
                    .is_none_or(|request| registered >= request.incarnation)
            }),
            valid: daemon.valid,
            made: daemon.made,
            doubt: daemon.doubt,
            teardown: daemon.teardown,
            ended: daemon.ended,
            lease,
            looks,
            looked,
            confirmed,
            spent: daemon.spent,
            former,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Ask(Ask),
    Act(Action<Zone>),
    Wait,
}

/// One decision that the planner makes of a sight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) kind: Kind,
    /// The stage to show, and whether it is a mere step's.
    pub(super) shown: Option<(Stage, bool)>,
    /// The finding says that it runs.
    pub(super) runs: bool,
    pub(super) torn_down: bool,
    /// Taken only of leftovers older than any creation that is under way.
    pub(super) needs_age: bool,
}

#[derive(Debug)]
pub(super) struct Thought {
    pub(super) goal: Goal<Zone>,
    /// *Where*, in order.
    pub(super) places: Vec<Place>,
    pub(super) ran: bool,
    /// The first is that of a healthy world.
    pub(super) choices: Vec<Choice>,
}

pub(super) struct Mind {
    patches: bool,
    good: Parsed<Sim>,
    bad: Parsed<Sim>,
    goals: HashMap<(Option<Request>, Option<u8>, bool), Goal<Zone>>,
    thoughts: HashMap<Sight, Rc<Thought>>,
}

impl Mind {
    /// `two`: the class names two scopes. `patches`: the node's provider ID has to be patched in. `replaces`: the class asks for a
    /// replacement of whatever is lost.
    pub(super) fn new(two: bool, patches: bool, replaces: bool) -> Self {
        let zones = if two { "zones: [a, b]" } else { "zones: [a]" };
        let replace = if replaces {
            "replace: {vanished: true, stopped: true, never_joined: true}"
        } else {
            ""
        };
        let zones = format!("{zones}\n{replace}");
        let read = |class: String| {
            let request = MachineRequestSpec {
                talos_version: "1.12.0".to_owned(),
                provider_data: class,
                ..MachineRequestSpec::default()
            };
            Parsed::read(&request, &[])
        };
        let (good, bad) = (read(zones.clone()), read(format!("{zones}\nsize: 0")));
        assert!(good.good().is_some() && bad.good().is_none());
        Self {
            patches,
            good,
            bad,
            goals: HashMap::new(),
            thoughts: HashMap::new(),
        }
    }

    /// How many different sights the planner was asked about.
    pub(super) fn thoughts(&self) -> usize {
        self.thoughts.len()
    }

    /// The real goal of what the stores hold. Without a request, a fresh Get has said that it is gone.
    pub(super) fn goal(&mut self, daemon: &Daemon) -> Goal<Zone> {
        let claimed = daemon
            .status
            .and_then(|status| status.claim)
            .map(|claim| claim.incarnation);
        self.goal_of(daemon.request, claimed, daemon.valid)
    }

    fn goal_of(&mut self, request: Option<Request>, claimed: Option<u8>, valid: bool) -> Goal<Zone> {
        let parsed = if valid { &self.good } else { &self.bad };
        let made = |incarnation: u8| Timestamp(created(incarnation));
        let read = || {
            let metadata = request.map(|request| Metadata {
                id: "web".to_owned(),
                phase: if request.running {
                    Phase::Running
                } else {
                    Phase::TearingDown
                },
                created: made(request.incarnation),
                finalizers: request
                    .finalizer
                    .then(|| FINALIZER.to_owned())
                    .into_iter()
                    .collect(),
                ..Metadata::default()
            });
            goal::<Sim>(
                metadata.as_ref().map(|metadata| (metadata, parsed)),
                claimed.map(made),
                FINALIZER,
            )
        };
        self.goals
            .entry((request, claimed, valid))
            .or_insert_with(read)
            .clone()
    }

    /// Every decision that the real planner makes of a sight, over what the model leaves open: how old leftovers and a last
    /// step of a deletion are, whether the join deadline has passed, whether a machine was lost only lately, whether an earlier failure forbids a try right now.
    pub(super) fn think(&mut self, sight: &Sight) -> Rc<Thought> {
        if let Some(known) = self.thoughts.get(sight) {
            return known.clone();
        }
        let claimed = sight
            .status
            .and_then(|status| status.claim)
            .map(|claim| claim.incarnation);
        let goal = self.goal_of(sight.request, claimed, sight.valid);
        let places = places(sight, &goal);
        let mut choices: Vec<Choice> = Vec::new();
        // Healthy first. Old leftovers come after young ones, to know what only their age allows.
        for old in [false, true] {
            for open in 0..16u8 {
                let open = Open {
                    old,
                    late: open & 1 != 0,
                    first: open & 2 != 0,
                    blocked: open & 4 != 0,
                    lately: open & 8 != 0,
                };
                let mut choice = self.decide(sight, &goal, &places, &open);
                if choices.iter().any(|known| {
                    let mut known = known.clone();
                    known.needs_age = false;
                    known == choice
                }) {
                    continue;
                }
                choice.needs_age = old;
                choices.push(choice);
            }
        }
        let ran = observed(sight, &places, &Open::default()).ran();
        // In a healthy world leftovers grow old, and nothing forbids a try.
        choices.sort_by_key(|choice| !choice.needs_age);
        let thought = Rc::new(Thought {
            goal,
            places,
            ran,
            choices,
        });
        self.thoughts.insert(*sight, thought.clone());
        thought
    }

    fn decide(&self, sight: &Sight, goal: &Goal<Zone>, places: &[Place], open: &Open) -> Choice {
        let mut observed = observed(sight, places, open);
        if !self.patches {
            observed.missing_patches.clear();
        }
        if sight.valid {
            observed.replace = self.good.good().map(|good| good.replace).unwrap_or_default();
        }
        let now = now(sight.teardown);
        let pace = Pace::default();
        let mut decision = plan(goal, &observed, now, &pace);
        if let Some(loss) = lost(&decision).filter(|_| !open.lately) {
            observed.lost = Some((loss, now.before(pace.replace)));
            decision = plan(goal, &observed, now, &pace);
        }
        match decision {
            Decision::Ask(ask) => Choice {
                kind: Kind::Ask(ask),
                shown: None,
                runs: false,
                torn_down: false,
                needs_age: false,
            },
            Decision::Plan(plan) => Choice {
                kind: plan.action.map_or(Kind::Wait, Kind::Act),
                shown: shown(&plan.finding, &observed).map(|shown| {
                    let stage = match shown.stage {
                        kinds::Stage::Unknown | kinds::Stage::Provisioning => Stage::Provisioning,
                        kinds::Stage::Provisioned => Stage::Provisioned,
                        kinds::Stage::Failed => Stage::Failed,
                    };
                    (stage, shown.step)
                }),
                // report.rs: what says so writes that it ran.
                runs: plan.finding.is_of_running(),
                torn_down: plan.finding == Finding::Failed(Reason::StatusTornDown),
                needs_age: false,
            },
        }
    }
}

/// How the machine is lost, if that is what is found.
fn lost<S>(decision: &Decision<S>) -> Option<Loss> {
    match decision {
        Decision::Plan(Plan {
            finding: Finding::Failed(reason),
            ..
        }) => reason.loss(),
        _ => None,
    }
}

/// What the model leaves open.
#[derive(Debug, Default)]
struct Open {
    /// Leftovers are older than `Pace::create`.
    old: bool,
    /// The join deadline has passed.
    late: bool,
    /// No step of a deletion was accepted lately.
    first: bool,
    /// The last try of every kind failed, and its time has not come.
    blocked: bool,
    /// The machine has not been lost for `Pace::replace`.
    lately: bool,
}

fn created(incarnation: u8) -> u64 {
    u64::from(incarnation) + 1
}

fn zone(place: Place) -> Zone {
    Zone(place_name(place).to_owned())
}

pub(super) fn place(zone: &Zone) -> Place {
    usize::from(zone.0 == place_name(1))
}

fn now(teardown: Teardown) -> Timestamp {
    match teardown {
        Teardown::Unseen => SEEN,
        Teardown::Seen => SEEN.after(MOMENT),
        Teardown::Settled => SEEN.after(Pace::default().settle).after(MOMENT),
    }
}

/// observe.rs, `read_stores`: the claim's scopes, else the machine resource's, else the class's.
fn places(sight: &Sight, goal: &Goal<Zone>) -> Vec<Place> {
    match (sight.status.and_then(|status| status.claim), sight.resource) {
        (Some(claim), _) => claim.tried.places().to_vec(),
        (None, Some(Resource { names: true, .. })) => vec![0],
        (None, _) => goal.class_scopes().iter().map(place).collect(),
    }
}

/// The vendor's ID of an instance.
fn id(place: Place, current: bool) -> String {
    let age = if current { "now" } else { "past" };
    format!("{}-{age}", place_name(place))
}

/// The instance that an ID names, if it is still there.
pub(super) fn is_current(id: &str) -> bool {
    id.ends_with("-now")
}

fn uuid(uuid: Uuid) -> String {
    match uuid {
        Uuid::None => String::new(),
        Uuid::Of(place) => id(place, true),
        Uuid::Past => id(0, false),
    }
}

fn observed(sight: &Sight, places: &[Place], open: &Open) -> Observed<Zone> {
    let now = now(sight.teardown);
    let patch_of = places.iter().find_map(|place| match sight.looks[*place] {
        Look::Ours { current, .. } => Some(if current { Uuid::Of(*place) } else { Uuid::Past }),
        _ => None,
    });
    // observe.rs, `compare_patches`: wanted is the provider ID of the instance that was seen.
    let differs = |patch: &Patch| patch_of.is_some_and(|of| of != patch.of);
    let failure = |kind| Failure {
        kind,
        cause: "no".to_owned(),
        not_before: now.after(MOMENT),
    };
    let kinds = [
        ActionKind::Omni,
        ActionKind::Create,
        ActionKind::Start,
        ActionKind::Delete,
    ];
    Observed {
        name: "web".to_owned(),
        finalizer: sight.request.is_some_and(|request| request.finalizer),
        request_confirmed: sight.confirmed,
        status: sight.status.map(|status| StatusSeen {
            // observe.rs, `phase`: until something newer than our own teardown is seen, finalizers count as present.
            tearing_down: !status.running || sight.status_torn,
            held: status.held || sight.status_torn,
            stage: match status.stage {
                Stage::Provisioning => kinds::Stage::Provisioning,
                Stage::Provisioned => kinds::Stage::Provisioned,
                Stage::Failed => kinds::Stage::Failed,
            },
            uuid: uuid(status.uuid),
            placement: status.claim.map(|claim| Placement {
                created: created(claim.incarnation),
                scopes: claim.tried.places().iter().copied().map(zone).collect(),
            }),
            ran: status.ran,
            replacing: status.replacing,
        }),
        machine_resource: sight.resource.is_some(),
        legacy: sight.resource.filter(|resource| resource.names).map(|_| Legacy {
            scope: zone(0),
            id: Some(id(0, true)),
        }),
        patches: sight
            .patch
            .iter()
            .map(|patch| PatchSeen {
                id: PATCH.to_owned(),
                tearing_down: !patch.running || sight.patch_torn,
                held: patch.held || sight.patch_torn,
                differs: differs(patch),
            })
            .collect(),
        missing_patches: (patch_of.is_some() && sight.patch.is_none())
            .then(|| PATCH.to_owned())
            .into_iter()
            .collect(),
        registered: sight.registered,
        scopes: places
            .iter()
            .map(|place| (zone(*place), seen(*place, sight.looks[*place], sight, open)))
            .collect(),
        // Schematic and image hold a creation up, and nothing else.
        schematic: true,
        image: ImageSeen::Present,
        boots_from_medium: false,
        failures: if open.blocked {
            kinds
                .into_iter()
                .map(|kind| (kind, failure(ErrorKind::Rejected)))
                .collect()
        } else {
            BTreeMap::new()
        },
        created: match sight.made {
            Made::Fine => None,
            Made::Failed => Some(Created::Failed(ErrorKind::Unavailable)),
            Made::Exhausted => Some(Created::Failed(ErrorKind::Exhausted)),
        },
        claimed_since: Some(if sight.doubt == Doubt::Open {
            now
        } else {
            Timestamp(0)
        }),
        deleting: (!open.first).then_some(now),
        ended: sight.ended,
        teardown_seen: (sight.teardown != Teardown::Unseen).then_some(SEEN),
        // A request that vanished unseen, or a claim that did, only makes the planner wait or ask: here it does neither, and so may do
        // more.
        torn_down: true,
        claim_lost: false,
        running_since: None,
        last_running: None,
        diagnosis: Diagnosis::Known(None),
        replace: Replace::default(),
        lost: None,
        // replace.rs, `judge`, of one replacement in an hour.
        budget: match (sight.spent, sight.status.is_some_and(|status| status.second)) {
            (false, _) => Budget::Free,
            (true, false) => Budget::Spent,
            (true, true) => Budget::UsedUp(now.after(HOUR)),
        },
        former: sight.former,
        lease: sight.lease,
    }
}

fn seen(place: Place, look: Look, sight: &Sight, open: &Open) -> Seen {
    let pace = Pace::default();
    let now = now(sight.teardown);
    let at = match sight.looked {
        Teardown::Unseen => SEEN.before(MOMENT),
        Teardown::Seen => SEEN.after(MOMENT),
        Teardown::Settled => SEEN.after(pace.settle).after(MOMENT),
    };
    let known = |found, by| Seen::Known { found, by, at };
    match look {
        Look::Unasked => Seen::Unasked,
        Look::Unknown => Seen::Unknown(Failure {
            kind: ErrorKind::Unavailable,
            cause: "no".to_owned(),
            not_before: now.after(MOMENT),
        }),
        Look::Nothing { by_find } => known(Found::Nothing, if by_find { By::Find } else { By::List }),
        Look::Remains => {
            let since = if open.old { now.before(pace.create) } else { now };
            known(Found::Remains { since: Some(since) }, By::Find)
        }
        Look::Foreign => known(
            Found::Foreign {
                what: "a stranger".to_owned(),
            },
            By::Find,
        ),
        Look::Ours { power, bare, current } => {
            let started = if open.late {
                now.before(pace.join).before(MOMENT)
            } else {
                now
            };
            let instance = Instance {
                name: "web".to_owned(),
                id: id(place, current),
                uuid: Some(id(place, current)),
                node_provider_id: Some(id(place, current)),
                state: match power {
                    Power::Stopped => InstanceState::Stopped,
                    Power::Starting | Power::Stopping => InstanceState::Starting,
                    Power::Running => InstanceState::Running,
                    Power::Broken => InstanceState::Broken("broken".to_owned()),
                },
                started: Some(started),
                mark: (!bare).then(|| Mark {
                    provider: "sim".to_owned(),
                    request: "web".to_owned(),
                    installation: "one".to_owned(),
                }),
            };
            known(Found::Ours(Arc::new(instance)), By::Find)
        }
    }
}

pub(super) fn tried(scopes: &[Zone]) -> Tried {
    let places: Vec<Place> = scopes.iter().map(place).collect();
    Tried::of(&places)
}
