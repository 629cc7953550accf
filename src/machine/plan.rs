//! Decides the next thing to do for one machine request: at most one action, one finding, and when to look again.
//!
//! *Guarantees.* Pure and total. The rows are those of the two tables in `ARCHITECTURE.adoc`, in their order; the first that
//! matches wins. Each odd-looking condition is there because its absence made two machines, lost one, or hung.
//!
//! *Assumptions.* The stores are bootstrapped. The fresh Gets of R13 and T5 to T7 are made by whoever carries the action out, just
//! before it; a disagreement ends the pass.
//!
//! *Not here.* How long to wait after a failure (`engine/retry.rs`); the words (`machine/status.rs`).

use crate::cloud::{ErrorKind, Instance, InstanceState, Scope, Timestamp};

use super::action::{Action, ActionKind, Ask, Decision, Finding, Look, Plan, Reason, Step};
use super::desired::Goal;
use super::observed::{By, Created, Failure, ImageSeen, Observed, Overall, PatchSeen, StatusSeen};
use super::pace::Pace;

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
        Overall::Nothing(..) | Overall::Remains(..) if seen.ran() => fail(Reason::Vanished {
            last_seen: seen.last_running,
        }),
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
        Overall::Nothing(by, _) => absent(class_scopes, invalid, seen, now, by, pace),
        Overall::Ours(scope, instance) => {
            // R14, R15
            match &instance.state {
                InstanceState::Stopped if seen.ran() => return fail(Reason::Stopped),
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
                // R18
                InstanceState::Stopped => match invalid {
                    Some(reason) => fail(Reason::Invalid(reason.clone())),
                    None => attempt(
                        seen,
                        now,
                        Action::StartInstance {
                            scope: scope.clone(),
                            id: instance.id.clone(),
                        },
                        Step::Starting,
                    ),
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
                        fail(Reason::NotJoined { started })
                    } else {
                        wait(Finding::Provisioned, Look::At(deadline.min(now.after(pace.slow))))
                    }
                }
            }
        }
    }
}

/// Rows R9 to R13: nothing is there, and it never ran.
fn absent<S: Scope>(
    class_scopes: &[S],
    invalid: Option<&String>,
    seen: &Observed<S>,
    now: Timestamp,
    by: By,
    pace: &Pace,
) -> Decision<S> {
    // R9
    if let Some(reason) = invalid {
        return fail(Reason::Invalid(reason.clone()));
    }
    let Some(scope) = seen.placement().and_then(|placement| placement.scopes.last()) else {
        return wait(Finding::Keep, Look::Event);
    };
    // R10
    if !seen.schematic {
        return attempt(seen, now, Action::RegisterSchematic, Step::PreparingImage);
    }
    // R11
    match &seen.image {
        ImageSeen::Unasked => return Decision::Ask(Ask::Image),
        ImageSeen::Absent => {
            let scope = scope.clone();
            return attempt(
                seen,
                now,
                Action::StartImport { scope },
                Step::ImportingImage(None),
            );
        }
        ImageSeen::Importing(percent) => {
            return wait(Finding::Step(Step::ImportingImage(*percent)), Look::Event);
        }
        ImageSeen::Failed(failure) => {
            return wait(
                Finding::Blocked {
                    step: Step::ImportingImage(None),
                    failure: failure.clone(),
                },
                Look::At(failure.not_before),
            );
        }
        ImageSeen::Present => {}
    }
    // R12: a creation that has no answer yet would land beside the one in the next scope.
    let is_settled = seen.unsettled.is_none_or(|since| since.after(pace.settle) <= now);
    if seen.created == Some(Created::Failed(ErrorKind::Exhausted))
        && is_settled
        && seen.lease
        && let Some(next) = next_scope(class_scopes, seen)
    {
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
    // R13
    let scope = scope.clone();
    attempt(seen, now, Action::CreateInstance { scope }, Step::Creating)
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
    // T1
    if let Some(decision) = end_patches(&seen.patches, seen, now) {
        return decision;
    }
    if let Some(StatusSeen {
        tearing_down, held, ..
    }) = &seen.status
    {
        // T2
        if !tearing_down {
            return write(seen, now, Action::TearDownStatus, Finding::Keep);
        }
        // T3: Omni drains; this may take many minutes.
        if *held {
            return wait(Finding::Keep, Look::Event);
        }
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
    match seen.overall() {
        Overall::Unasked => return Decision::Ask(Ask::Instance),
        // T4
        Overall::Unknown(failure) => {
            return wait(Finding::Unseen(failure.clone()), Look::At(failure.not_before));
        }
        // T5
        // A request that nobody was seen to tear down may come back, with all that Omni lost.
        Overall::Ours(..) | Overall::Remains(..)
            if vanished_lately(request_held, superseded, seen, now, pace) =>
        {
            return wait(Finding::Keep, Look::At(since.after(pace.orphan_age)));
        }
        // Our last step is taking effect: another would only be told to wait.
        Overall::Ours(_, instance)
            if instance.state == InstanceState::Starting
                && seen.deleting.is_some_and(|at| now.since(at) < pace.create) =>
        {
            return wait(Finding::Keep, Look::Soon);
        }
        Overall::Ours(scope, instance) => {
            let action = Action::DeleteInstance {
                scope: scope.clone(),
                id: Some(instance.id.clone()),
            };
            return attempt(seen, now, action, Step::Deleting);
        }
        Overall::Remains(scope, _) => {
            let action = Action::DeleteInstance {
                scope: scope.clone(),
                id: None,
            };
            return attempt(seen, now, action, Step::Deleting);
        }
        Overall::Foreign(..) | Overall::Nothing(..) => {}
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
