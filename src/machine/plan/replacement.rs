//! Rows L1 to L4 and N1 to N8: what was lost, and its replacement where the class asks for one.
//!
//! A replacement takes the way of a teardown while the request runs: the former machine leaves Omni and the cloud, then the claim
//! goes. Where the former machine had joined, Omni tears the request down as soon as it takes the machine's link away, and makes a
//! new request (`MachineRequestSetStatusController`): the rest is an ordinary teardown. Where it had not, the request stays, and R4
//! begins anew.

use crate::cloud::{Instance, InstanceState, Scope, Timestamp};

use super::super::action::{Action, Ask, Decision, Finding, Look, Reason, Step, Then};
use super::super::observed::{By, Former, Observed, Overall};
use super::super::pace::Pace;
use super::super::replace::{Budget, Loss};
use super::{attempt, clear, drain, fail, wait, write};

/// Rows L1 to L4: a machine is lost.
pub(super) fn lost<S: Scope>(
    loss: Loss,
    reason: Reason,
    seen: &Observed<S>,
    now: Timestamp,
    pace: &Pace,
) -> Decision<S> {
    // L1
    if !loss.is_replaced(&seen.replace) {
        return fail(reason);
    }
    let report = |then, look| {
        let what = Box::new(reason.clone());
        wait(Finding::Failed(Reason::Lost { what, then }), look)
    };
    // L2
    let since = match seen.lost {
        Some((known, since)) if known == loss => since,
        _ => now,
    };
    let ripe = since.after(pace.replace);
    if ripe > now {
        let look = Look::At(ripe.min(now.after(pace.slow)));
        return report(Then::ReplacedIn(pace.replace), look);
    }
    match seen.budget {
        Budget::Unasked => Decision::Ask(Ask::Budget),
        // L3
        Budget::UsedUp(until) => report(Then::UsedUp, Look::At(until.min(now.after(pace.slow)))),
        Budget::TooMany { lost, ran } => report(Then::TooMany { lost, ran }, Look::Slow),
        // L4: the hour's budget first, then the intent; only then is anything taken away.
        Budget::Free => write(
            seen,
            now,
            Action::SpendReplacement { loss },
            Finding::Failed(Reason::Replacing(loss)),
        ),
        Budget::Spent => write(
            seen,
            now,
            Action::BeginReplacement { loss },
            Finding::Failed(Reason::Replacing(loss)),
        ),
    }
}

/// Rows N1 to N8: a replacement is under way, as the status says.
pub(super) fn replacement<S: Scope>(
    loss: Loss,
    seen: &Observed<S>,
    now: Timestamp,
    pace: &Pace,
) -> Decision<S> {
    let begun = seen.status.as_ref().is_some_and(|status| status.tearing_down);
    if !begun {
        match seen.overall() {
            Overall::Unasked => return Decision::Ask(Ask::Instance),
            // N1
            Overall::Unknown(failure) => {
                let look = Look::At(failure.not_before);
                return wait(Finding::Unseen(failure.clone()), look);
            }
            // N2
            Overall::Ours(_, instance) if is_back(loss, instance, seen.registered) => {
                return write(seen, now, Action::CancelReplacement, Finding::Keep);
            }
            // N3: before Omni is asked to let go of the machine, so that it cannot join behind the drain's back.
            Overall::Ours(_, instance) if instance.state == InstanceState::Starting => {
                return wait(Finding::Keep, Look::Soon);
            }
            Overall::Ours(scope, instance) => {
                let action = Action::DeleteLost {
                    loss,
                    scope: scope.clone(),
                    id: instance.id.clone(),
                };
                return attempt(seen, now, action, Step::Deleting);
            }
            Overall::Nothing(By::List, _) => return Decision::Ask(Ask::InstanceByFind),
            Overall::Nothing(By::Find, _) | Overall::Remains(..) | Overall::Foreign(..) => {}
        }
    }
    // N4, N5: as T1 to T3, and as T4 and T5.
    if let Some(decision) = drain(seen, now).or_else(|| clear(seen, now, pace)) {
        return decision;
    }
    // N6: what Omni knows of the former machine would be taken for the next one's; and while it forgets a machine that had joined, it
    // tears the request down.
    if seen.registered {
        return wait(Finding::Keep, Look::Soon);
    }
    match seen.former {
        Former::Unasked => return Decision::Ask(Ask::Former),
        Former::There => return wait(Finding::Keep, Look::Soon),
        Former::Gone => {}
    }
    // N7. Nobody creates under a claim that ran: a find of any time will do.
    if !seen.nothing_of_ours(Timestamp(0)) {
        return Decision::Ask(Ask::InstanceByFind);
    }
    if !seen.request_confirmed {
        return Decision::Ask(Ask::Request);
    }
    // N8: the status last, since it holds the intent.
    let action = if seen.machine_resource {
        Action::DestroyMachineResource
    } else {
        Action::DestroyStatus
    };
    write(seen, now, action, Finding::Keep)
}

/// Whether the machine is not lost any more.
fn is_back(loss: Loss, instance: &Instance, registered: bool) -> bool {
    let runs = instance.state == InstanceState::Running;
    match loss {
        Loss::Vanished => true,
        Loss::Stopped => runs,
        Loss::NeverJoined => runs && registered,
    }
}
