//! What must hold: in every state, at every decision, at every effect; and how a healthy world ends.

use omni_infra_provider::backends::sim::Zone;
use omni_infra_provider::machine::Goal;
use omni_infra_provider::machine::action::{Action, ActionKind};

use super::Scenario;
use super::mind::{self, Thought};
use super::state::{Daemon, Look, Looks, Place, Power, Slot, Stage, State, Uuid};

/// In every state.
pub(super) fn of_state(state: &State, scenario: &Scenario) -> Option<&'static str> {
    let slots = &state.world.slots;
    if slots.iter().filter(|slot| slot.is_instance()).count() > 1 {
        return Some("two instances");
    }
    let forgotten = (0..slots.len()).any(|place| {
        // What the Go provider made and nothing names is the Go provider's.
        matches!(slots[place], Slot::Remains | Slot::Ours { bare: false, .. })
            && !is_written_down(state, scenario, place)
    });
    forgotten.then_some("something of ours is left, and nothing in Omni leads to it")
}

/// Whether a daemon that starts now would look there: *where*, for a request that is held or a claim that is left.
fn is_written_down(state: &State, scenario: &Scenario, place: Place) -> bool {
    let world = &state.world;
    if let Some(claim) = world.status.and_then(|status| status.claim) {
        return claim.tried.places().contains(&place);
    }
    if let Some(resource) = world.resource.filter(|resource| resource.names) {
        return resource.names && place == 0;
    }
    world.request.is_some_and(|request| request.finalizer) && (place == 0 || scenario.two_scopes)
}

/// At every decision: a mutation needs what it is based on to be seen.
pub(super) fn of_decision(
    daemon: &Daemon,
    looks: Looks,
    thought: &Thought,
    action: &Action<Zone>,
) -> Option<&'static str> {
    let held = daemon.request.is_some_and(|request| request.finalizer);
    let claim = daemon.status.and_then(|status| status.claim);
    let wanted = matches!(thought.goal, Goal::Run { .. } | Goal::Invalid { .. });
    if wanted && !held && *action != Action::AddFinalizer {
        return Some("something is done for a request before our finalizer is on it");
    }
    let claimed = |scope: &Zone| {
        claim.is_some_and(|claim| {
            let of_this = daemon
                .request
                .is_some_and(|request| request.incarnation == claim.incarnation);
            of_this && claim.tried.places().contains(&mind::place(scope))
        })
    };
    let unknown = thought
        .places
        .iter()
        .any(|place| matches!(looks[*place], Look::Unknown | Look::Unasked));
    let sees = |scope: &Zone| looks[mind::place(scope)];
    match action {
        Action::CreateInstance { scope } => {
            let is_there = thought
                .places
                .iter()
                .any(|place| !matches!(looks[*place], Look::Nothing { .. }));
            if !wanted || !claimed(scope) {
                return Some("an instance is created without a claim");
            }
            if unknown || is_there {
                return Some("an instance is created where not all is known to be empty");
            }
            if thought.ran {
                return Some("an instance is created again");
            }
        }
        Action::StartInstance { scope, .. } => {
            if !wanted || !claimed(scope) {
                return Some("an instance is started without a claim");
            }
            if thought.ran {
                return Some("an instance that ran is started against its owner's will");
            }
        }
        Action::DeleteInstance { id: None, scope } | Action::DeleteLeftovers { scope } => {
            if sees(scope) != Look::Remains {
                return Some("leftovers are deleted that were not seen to be ours");
            }
        }
        Action::DeleteInstance { id: Some(_), scope } => {
            if wanted || matches!(thought.goal, Goal::Leave) {
                return Some("a wanted instance is deleted");
            }
            if !matches!(sees(scope), Look::Ours { .. }) {
                return Some("an instance is deleted that was not seen to be ours");
            }
        }
        other => {
            if other.kind() != ActionKind::Omni {
                return Some("the cloud is changed in a way that the model does not know");
            }
        }
    }
    None
}

/// When an instance comes to be.
pub(super) fn of_creation(state: &State, place: Place) -> Option<&'static str> {
    if state.world.ran {
        return Some("a second creation after it ran");
    }
    of_start(state, place)
}

/// When an instance is created or started.
pub(super) fn of_start(state: &State, place: Place) -> Option<&'static str> {
    let world = &state.world;
    let held = world.stripped || world.request.is_some_and(|request| request.finalizer);
    let claimed = world
        .status
        .and_then(|status| status.claim)
        .is_some_and(|claim| claim.tried.places().contains(&place));
    if !held {
        return Some("the cloud is changed without our finalizer");
    }
    (!claimed).then_some("the cloud is changed without a claim")
}

/// When an instance loses something.
pub(super) fn of_deletion(state: &State) -> Option<&'static str> {
    let world = &state.world;
    let in_use = world.status.is_some_and(|status| status.running || status.held);
    (in_use && !world.drained).then_some("a deletion while Omni drains")
}

/// When the status is torn down.
pub(super) fn of_tearing_down(state: &State) -> Option<&'static str> {
    let world = &state.world;
    let wanted = world.request.zip(world.status).is_some_and(|(request, status)| {
        request.running
            && status
                .claim
                .is_none_or(|claim| claim.incarnation == request.incarnation)
    });
    wanted.then_some("the status of a wanted request is torn down")
}

/// When status, machine resource or finalizer go.
pub(super) fn of_the_end(state: &State) -> Option<&'static str> {
    let left = state
        .world
        .slots
        .iter()
        .any(|slot| matches!(slot, Slot::Remains | Slot::Ours { .. }));
    if left {
        return Some("the way to what is left is forgotten");
    }
    state
        .creation_may_land()
        .then_some("the way to a creation that may still land is forgotten")
}

/// How a healthy world ends, where nothing moves any more; what is wrong with it otherwise.
pub(super) fn of_the_settled(state: &State, scenario: &Scenario) -> Option<&'static str> {
    let world = &state.world;
    let ours = world
        .slots
        .iter()
        .copied()
        .find(|slot| matches!(slot, Slot::Remains | Slot::Ours { .. }));
    let Some(request) = world.request else {
        // An instance of the Go provider that nothing names is nobody's that we know of.
        if matches!(ours, Some(Slot::Ours { bare: true, .. })) && world.resource.is_none() {
            return None;
        }
        let left =
            ours.is_some() || world.status.is_some() || world.patch.is_some() || world.resource.is_some();
        return left.then_some("something is left for ever of a request that is gone");
    };
    if !request.running {
        return Some("a teardown never ends");
    }
    let Some(status) = world.status else {
        return Some("a request is never answered");
    };
    let failed = status.stage == Stage::Failed;
    let said = |failed: bool| (!failed).then_some("what needs a person is never said");
    if let Some(claim) = status.claim
        && claim.incarnation != request.incarnation
    {
        if ours.is_some() {
            return Some("an earlier request's instance stays for ever");
        }
        return said(failed);
    }
    if !status.running {
        return said(failed);
    }
    let Some(claim) = status.claim else {
        let invalid = state.daemons.iter().flatten().all(|daemon| !daemon.valid);
        return if invalid {
            said(failed)
        } else {
            Some("a request is never claimed")
        };
    };
    let here = claim.tried.places();
    let invalid = state.daemons.iter().flatten().any(|daemon| !daemon.valid);
    let ran = status.ran || status.stage == Stage::Provisioned;
    if ran && !world.lived {
        return Some("it is taken for one that ran, and never did");
    }
    let instance = here.iter().find_map(|place| match world.slots[*place] {
        Slot::Ours { power, bare } => Some((*place, power, bare)),
        _ => None,
    });
    match instance {
        Some((place, Power::Running, _)) => {
            if status.stage != Stage::Provisioned || !status.ran {
                return Some("a running instance is not shown as one");
            }
            if status.uuid != Uuid::Of(place) {
                return Some("a running instance's UUID is never published");
            }
            let patched = world.patch.is_some_and(|patch| patch.of == Uuid::Of(place));
            let exempt = invalid || world.resource.is_some();
            (scenario.patches && !patched && !exempt).then_some("a running instance's patch is never written")
        }
        Some((_, Power::Broken, _)) => said(failed),
        Some((_, Power::Stopped, _)) if ran || invalid => said(failed),
        Some(_) => Some("an instance is never started"),
        None if ran || invalid => said(failed),
        None if here.iter().any(|place| world.slots[*place] == Slot::Foreign) => said(failed),
        None => Some("an instance is never created"),
    }
}
