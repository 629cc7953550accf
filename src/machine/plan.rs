//! Decides the next thing to do for one machine request: at most one action, one finding, and when to look again.
//!
//! *Guarantees.* Pure and total. The rows are those of the tables in `ARCHITECTURE.adoc`, in their order; the first that
//! matches wins. Each odd-looking condition is there because its absence made two machines, lost one, or hung.
//!
//! *Assumptions.* The stores are bootstrapped. The fresh Gets of R13 and T5 to T7 are made by whoever carries the action out, just
//! before it; a disagreement ends the pass.
//!
//! *Not here.* How long to wait after a failure (`engine/retry.rs`); the words (`machine/status.rs`).

use crate::cloud::{ErrorKind, Instance, InstanceState, Scope, Timestamp};

use super::action::{Action, ActionKind, Ask, Decision, Finding, Look, Plan, Reason, Step};
use super::desired::Goal;
use super::observed::{By, Created, Diagnosis, Failure, ImageSeen, Observed, Overall, PatchSeen};
use super::pace::Pace;
use super::replace::Loss;

mod replacement;

/// Decides.
#[must_use]
pub fn plan<S: Scope>(goal: &Goal<S>, seen: &Observed<S>, now: Timestamp, pace: &Pace) -> Decision<S> {
    match goal {
        Goal::Leave => wait(Finding::Keep, Look::Event),
        Goal::Run { scopes } => run(scopes, None, seen, now, pace),
        Goal::Invalid { reason, scopes } => run(
            scopes.as_deref().unwrap_or_default(),
            Some(reason),
            seen,
            now,
            pace,
        ),
        Goal::TearDown { .. } => tear_down(false, true, seen, now, pace),
        Goal::Gone { superseded } => tear_down(*superseded, false, seen, now, pace),
    }
}

fn wait<S>(finding: Finding, look: Look) -> Decision<S> {
    Decision::Plan(Plan {
        action: None,
        finding,
        look,
    })
}

fn fail<S>(reason: Reason) -> Decision<S> {
    wait(Finding::Failed(reason), Look::Slow)
}

fn act<S>(action: Action<S>, finding: Finding) -> Decision<S> {
    Decision::Plan(Plan {
        action: Some(action),
        finding,
        look: Look::Now,
    })
}

/// The action, unless its last failure says not yet: then the finding is the cause.
fn attempt<S: Scope>(seen: &Observed<S>, now: Timestamp, action: Action<S>, step: Step) -> Decision<S> {
    match seen.failures.get(&action.kind()) {
        Some(failure) if failure.not_before > now => wait(
            Finding::Blocked {
                step,
                failure: failure.clone(),
            },
            Look::At(failure.not_before),
        ),
        _ => act(action, Finding::Step(step)),
    }
}

/// A write to Omni: its failures are not for the status line.
fn write<S: Scope>(seen: &Observed<S>, now: Timestamp, action: Action<S>, finding: Finding) -> Decision<S> {
    match seen.failures.get(&ActionKind::Omni) {
        Some(failure) if failure.not_before > now => wait(Finding::Keep, Look::At(failure.not_before)),
        _ => act(action, finding),
    }
}

/// Rows R1 to R21.
fn run<S: Scope>(
    class_scopes: &[S],
    invalid: Option<&String>,
    seen: &Observed<S>,
    now: Timestamp,
    pace: &Pace,
) -> Decision<S> {
    // R1
    if !seen.finalizer {
        return write(seen, now, Action::AddFinalizer, Finding::Keep);
    }
    // N1 to N8
    if let Some(loss) = seen.status.as_ref().and_then(|status| status.replacing) {
        return replacement::replacement(loss, seen, now, pace);
    }
    // R2: never destroy it, it holds the claim.
    if seen.status.as_ref().is_some_and(|status| status.tearing_down) {
        return if seen.request_confirmed {
            fail(Reason::StatusTornDown)
        } else {
            Decision::Ask(Ask::Request)
        };
    }
    // R3
    if let Some(reason) = invalid
        && seen.placement().is_none()
        && seen.legacy.is_none()
    {
        let finding = Finding::Failed(Reason::Invalid(reason.clone()));
        return if seen.status.is_none() {
            write(seen, now, Action::CreateStatus, finding)
        } else {
            wait(finding, Look::Event)
        };
    }
    // R4
    if seen.placement().is_none() {
        // A claim that vanished under its request: maybe the request vanished as well, with all that Omni lost. A new claim would be
        // the only thing that is left of it, and its instance would be taken for one to be deleted.
        if seen.claim_lost && !seen.request_confirmed {
            return Decision::Ask(Ask::Request);
        }
        return match claimed_scope(class_scopes, seen) {
            Claimed::Scope(scope) => write(
                seen,
                now,
                Action::WriteClaim { scopes: vec![scope] },
                Finding::Step(Step::Preparing),
            ),
            Claimed::Ask => Decision::Ask(Ask::Instance),
            Claimed::Unknown(failure) => {
                let look = Look::At(failure.not_before);
                wait(Finding::Unseen(failure), look)
            }
        };
    }
    match seen.overall() {
        Overall::Unasked => Decision::Ask(Ask::Instance),
        // R5
        Overall::Unknown(failure) => wait(Finding::Unseen(failure.clone()), Look::At(failure.not_before)),
        // R6
        Overall::Foreign(_, what) => fail(Reason::Foreign(what.to_owned())),
        // R7
        Overall::Nothing(By::List, _) if seen.ran() => Decision::Ask(Ask::InstanceByFind),
        Overall::Nothing(..) | Overall::Remains(..) if seen.ran() => {
            replacement::lost(Loss::Vanished, vanished(seen), seen, now, pace)
        }
        // R8
        Overall::Remains(scope, since) => {
            let failed = matches!(seen.created, Some(Created::Failed(_)));
            let ripe = since.map_or(now, |since| since.after(pace.create));
            if failed || ripe <= now {
                let scope = scope.clone();
                attempt(seen, now, Action::DeleteLeftovers { scope }, Step::Preparing)
            } else {
                wait(Finding::Step(Step::Preparing), Look::At(ripe))
            }
        }
        Overall::Nothing(by, at) => absent(class_scopes, invalid, seen, now, pace, (by, at)),
        Overall::Ours(scope, instance) => {
            // R14, R15
            match &instance.state {
                InstanceState::Stopped if seen.ran() => {
                    return replacement::lost(Loss::Stopped, Reason::Stopped, seen, now, pace);
                }
                InstanceState::Broken(word) => return fail(Reason::Broken(word.clone())),
                InstanceState::Stopped | InstanceState::Starting | InstanceState::Running => {}
            }
            // R16: the report publishes it. Omni ignores patches until it has the UUID.
            let published = seen.status.as_ref().map_or("", |status| status.uuid.as_str());
            if instance.uuid.as_ref().is_some_and(|uuid| uuid != published) {
                return wait(Finding::Keep, Look::Now);
            }
            // R17
            if invalid.is_none()
                && let Some(decision) = patches_wanted(seen, instance, now)
            {
                return decision;
            }
            match &instance.state {
                // R18: a medium may have gone since the creation.
                InstanceState::Stopped => match invalid {
                    Some(reason) => fail(Reason::Invalid(reason.clone())),
                    None if seen.boots_from_medium => match bring_image(scope, seen, now) {
                        Some(decision) => decision,
                        None => start(scope, instance, seen, now),
                    },
                    None => start(scope, instance, seen, now),
                },
                // R19
                InstanceState::Starting | InstanceState::Broken(_) => {
                    wait(Finding::Step(Step::Starting), Look::Soon)
                }
                // R20, R21
                InstanceState::Running => {
                    let started = instance.started.or(seen.running_since).unwrap_or(now);
                    let deadline = started.after(pace.join);
                    if seen.registered {
                        wait(Finding::Provisioned, Look::Slow)
                    } else if deadline <= now {
                        match &seen.diagnosis {
                            Diagnosis::Unasked => Decision::Ask(Ask::Diagnosis),
                            Diagnosis::Known(diagnosis) => {
                                let diagnosis = diagnosis.clone();
                                let reason = Reason::NotJoined { started, diagnosis };
                                replacement::lost(Loss::NeverJoined, reason, seen, now, pace)
                            }
                        }
                    } else {
                        wait(Finding::Provisioned, Look::At(deadline.min(now.after(pace.slow))))
                    }
                }
            }
        }
    }
}

fn start<S: Scope>(scope: &S, instance: &Instance, seen: &Observed<S>, now: Timestamp) -> Decision<S> {
    let action = Action::StartInstance {
        scope: scope.clone(),
        id: instance.id.clone(),
    };
    attempt(seen, now, action, Step::Starting)
}

fn vanished<S: Scope>(seen: &Observed<S>) -> Reason {
    Reason::Vanished {
        name: seen.name.clone(),
        uuid: seen
            .status
            .as_ref()
            .map(|status| status.uuid.clone())
            .unwrap_or_default(),
        last_seen: seen.last_running,
    }
}

/// Rows R9 to R13: nothing is there, and it never ran.
fn absent<S: Scope>(
    class_scopes: &[S],
    invalid: Option<&String>,
    seen: &Observed<S>,
    now: Timestamp,
    pace: &Pace,
    (by, at): (By, Timestamp),
) -> Decision<S> {
    // R9
    if let Some(reason) = invalid {
        return fail(Reason::Invalid(reason.clone()));
    }
    let Some(scope) = seen.placement().and_then(|placement| placement.scopes.last()) else {
        return wait(Finding::Keep, Look::Event);
    };
    // R10, R11
    if let Some(decision) = bring_image(scope, seen, now) {
        return decision;
    }
    // R12
    if seen.created == Some(Created::Failed(ErrorKind::Exhausted))
        && let Some(next) = next_scope(class_scopes, seen)
    {
        if !seen.lease {
            return attempt(seen, now, Action::TakeLease, Step::NextScope);
        }
        if by == By::List {
            return Decision::Ask(Ask::InstanceByFind);
        }
        let mut scopes = seen.placement().map(|p| p.scopes.clone()).unwrap_or_default();
        scopes.push(next);
        return write(
            seen,
            now,
            Action::WriteClaim { scopes },
            Finding::Step(Step::NextScope),
        );
    }
    // R13: a creation that another process began when fewer scopes were claimed may still land in one of them.
    if seen
        .placement()
        .is_some_and(|placement| placement.scopes.len() > 1)
    {
        let settled = seen.claimed_since.unwrap_or(now).after(pace.settle);
        if settled > now {
            return wait(Finding::Step(Step::NextScope), Look::At(settled));
        }
        if by == By::List || at < settled {
            return Decision::Ask(Ask::InstanceByFind);
        }
    }
    let scope = scope.clone();
    attempt(seen, now, Action::CreateInstance { scope }, Step::Creating)
}

/// Rows R10 and R11. `None` once the image is there.
fn bring_image<S: Scope>(scope: &S, seen: &Observed<S>, now: Timestamp) -> Option<Decision<S>> {
    if !seen.schematic {
        let step = Step::PreparingImage;
        return Some(attempt(seen, now, Action::RegisterSchematic, step));
    }
    Some(match &seen.image {
        ImageSeen::Unasked => Decision::Ask(Ask::Image),
        ImageSeen::Absent => {
            let scope = scope.clone();
            attempt(
                seen,
                now,
                Action::StartImport { scope },
                Step::ImportingImage(None),
            )
        }
        ImageSeen::Importing(percent) => wait(Finding::Step(Step::ImportingImage(*percent)), Look::Event),
        ImageSeen::Failed(failure) => wait(
            Finding::Blocked {
                step: Step::ImportingImage(None),
                failure: failure.clone(),
            },
            Look::At(failure.not_before),
        ),
        ImageSeen::Present => return None,
    })
}

fn next_scope<S: Scope>(class_scopes: &[S], seen: &Observed<S>) -> Option<S> {
    let tried = &seen.placement()?.scopes;
    class_scopes.iter().find(|scope| !tried.contains(scope)).cloned()
}

enum Claimed<S> {
    Scope(S),
    Ask,
    Unknown(Failure),
}

/// R4: the scope where ours was found, else the machine resource's, else the first.
fn claimed_scope<S: Scope>(class_scopes: &[S], seen: &Observed<S>) -> Claimed<S> {
    if let Some(legacy) = &seen.legacy {
        return Claimed::Scope(legacy.scope.clone());
    }
    let Some(first) = class_scopes.first() else {
        // A class that parses has a scope; without one there is R3.
        return Claimed::Ask;
    };
    if class_scopes.len() == 1 {
        return Claimed::Scope(first.clone());
    }
    match seen.overall() {
        Overall::Unasked => Claimed::Ask,
        Overall::Unknown(failure) => Claimed::Unknown(failure.clone()),
        Overall::Ours(scope, _) => Claimed::Scope(scope.clone()),
        Overall::Remains(..) | Overall::Foreign(..) | Overall::Nothing(..) => Claimed::Scope(first.clone()),
    }
}

/// R17: not for a machine that the Go provider made, whose patches are its own.
fn patches_wanted<S: Scope>(seen: &Observed<S>, instance: &Instance, now: Timestamp) -> Option<Decision<S>> {
    if seen.machine_resource && instance.mark.is_none() {
        return None;
    }
    for patch in &seen.patches {
        if patch.tearing_down {
            let id = patch.id.clone();
            return Some(if patch.held {
                wait(Finding::Step(Step::Preparing), Look::Event)
            } else {
                write(seen, now, Action::DestroyPatch { id }, Finding::Keep)
            });
        }
    }
    let missing = seen.missing_patches.first();
    let differs = seen
        .patches
        .iter()
        .find(|patch| patch.differs)
        .map(|patch| &patch.id);
    missing.or(differs).map(|id| {
        let id = id.clone();
        write(seen, now, Action::WritePatch { id }, Finding::Keep)
    })
}

/// Rows T1 to T7.
fn tear_down<S: Scope>(
    superseded: bool,
    request_held: bool,
    seen: &Observed<S>,
    now: Timestamp,
    pace: &Pace,
) -> Decision<S> {
    if let Some(decision) = drain(seen, now) {
        return decision;
    }
    if seen.ended {
        return end(superseded, request_held, seen, now);
    }
    // A look from before the teardown ends nothing; unless the status said that it ran, another process's creation may still land.
    // A registration does not do: no creation asks for it.
    let since = seen.teardown_seen.unwrap_or(now);
    let settled = match (seen.is_noted_as_run(), seen.scopes.is_empty()) {
        (true, _) | (_, true) => since,
        (false, false) => since.after(pace.settle),
    };
    // A request that nobody was seen to tear down may come back, with all that Omni lost.
    if matches!(seen.overall(), Overall::Ours(..) | Overall::Remains(..))
        && vanished_lately(request_held, superseded, seen, now, pace)
    {
        return wait(Finding::Keep, Look::At(since.after(pace.orphan_age)));
    }
    if let Some(decision) = clear(seen, now, pace) {
        return decision;
    }
    // T6, T7: by find, and settled.
    if settled > now {
        return wait(Finding::Keep, Look::At(settled));
    }
    if !seen.nothing_of_ours(settled) {
        return Decision::Ask(Ask::InstanceByFind);
    }
    end(superseded, request_held, seen, now)
}

/// Rows T1 to T3: Omni lets go of the machine. `None` once it has.
fn drain<S: Scope>(seen: &Observed<S>, now: Timestamp) -> Option<Decision<S>> {
    // T1
    if let Some(decision) = end_patches(&seen.patches, seen, now) {
        return Some(decision);
    }
    let status = seen.status.as_ref()?;
    // T2
    if !status.tearing_down {
        return Some(write(seen, now, Action::TearDownStatus, Finding::Keep));
    }
    // T3: Omni drains; this may take many minutes.
    status.held.then(|| wait(Finding::Keep, Look::Event))
}

/// Rows T4 and T5: nothing of ours is left in the cloud. `None` once a look, of whatever kind and time, says so.
fn clear<S: Scope>(seen: &Observed<S>, now: Timestamp, pace: &Pace) -> Option<Decision<S>> {
    let (scope, id) = match seen.overall() {
        Overall::Unasked => return Some(Decision::Ask(Ask::Instance)),
        // T4
        Overall::Unknown(failure) => {
            let look = Look::At(failure.not_before);
            return Some(wait(Finding::Unseen(failure.clone()), look));
        }
        // T5
        // Our last step is taking effect: another would only be told to wait.
        Overall::Ours(_, instance)
            if instance.state == InstanceState::Starting
                && seen.deleting.is_some_and(|at| now.since(at) < pace.create) =>
        {
            return Some(wait(Finding::Keep, Look::Soon));
        }
        Overall::Ours(scope, instance) => (scope.clone(), Some(instance.id.clone())),
        Overall::Remains(scope, _) => (scope.clone(), None),
        Overall::Foreign(..) | Overall::Nothing(..) => return None,
    };
    let action = Action::DeleteInstance { scope, id };
    Some(attempt(seen, now, action, Step::Deleting))
}

/// Whether the request vanished without a teardown that this process saw, not long ago.
fn vanished_lately<S: Scope>(
    request_held: bool,
    superseded: bool,
    seen: &Observed<S>,
    now: Timestamp,
    pace: &Pace,
) -> bool {
    let since = seen.teardown_seen.unwrap_or(now);
    !request_held && !superseded && !seen.torn_down && now.since(since) < pace.orphan_age
}

/// T6 and T7, once nothing of ours is left in the cloud.
fn end<S: Scope>(superseded: bool, request_held: bool, seen: &Observed<S>, now: Timestamp) -> Decision<S> {
    if seen.status.is_some() || seen.machine_resource {
        if superseded {
            return fail(Reason::StatusTornDown);
        }
        let action = if seen.status.is_some() {
            Action::DestroyStatus
        } else {
            Action::DestroyMachineResource
        };
        return write(seen, now, action, Finding::Keep);
    }
    if request_held {
        return write(seen, now, Action::RemoveFinalizer, Finding::Keep);
    }
    wait(Finding::Keep, Look::Done)
}

/// T1: tear each down, wait, destroy.
fn end_patches<S: Scope>(patches: &[PatchSeen], seen: &Observed<S>, now: Timestamp) -> Option<Decision<S>> {
    if patches.is_empty() {
        return None;
    }
    if let Some(patch) = patches.iter().find(|patch| !patch.tearing_down) {
        let id = patch.id.clone();
        return Some(write(seen, now, Action::TearDownPatch { id }, Finding::Keep));
    }
    if let Some(patch) = patches.iter().find(|patch| !patch.held) {
        let id = patch.id.clone();
        return Some(write(seen, now, Action::DestroyPatch { id }, Finding::Keep));
    }
    Some(wait(Finding::Keep, Look::Event))
}
