//! Says a finding to people: what Omni's screen should show of a request.
//!
//! While a request runs, Omni shows the status line alone, and the error only at FAILED; so both say the same. The line is
//! always *step · cause · what to do · next try*. Times of day do not appear in it: a line that is true for ever need not be
//! written again.

use std::time::Duration;

use crate::cloud::{ErrorKind, Scope};
use crate::omni::kinds::{MachineRequestStatusSpec, Stage};

use super::action::{Finding, Reason, Step, Then};
use super::observed::{Failure, Observed};
use super::replace::Loss;

/// What a status should show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The stage.
    pub stage: Stage,
    /// What makes two lines the same to a person: they differ in progress at most.
    pub cause: String,
    /// The line; begins with the cause.
    pub line: String,
    /// Whether this is a mere step, over soon.
    pub step: bool,
}

impl Shown {
    /// Whether a status shows this already, or the same cause with other progress.
    #[must_use]
    pub fn is_cause_of(&self, status: &MachineRequestStatusSpec) -> bool {
        let text = if self.stage == Stage::Failed {
            &status.error
        } else {
            &status.status
        };
        status.stage == self.stage && text.starts_with(&self.cause)
    }

    /// Whether a status shows exactly this.
    #[must_use]
    pub fn is_line_of(&self, status: &MachineRequestStatusSpec) -> bool {
        let mut shown = status.clone();
        self.write_into(&mut shown);
        shown == *status
    }

    /// Puts it into a status.
    pub fn write_into(&self, status: &mut MachineRequestStatusSpec) {
        status.stage = self.stage;
        status.status.clone_from(&self.line);
        status.error.clear();
        if self.stage == Stage::Failed {
            status.error.clone_from(&self.line);
        }
    }
}

/// What to show for a finding; `None` keeps what is shown.
#[must_use]
pub fn shown<S: Scope>(finding: &Finding, seen: &Observed<S>) -> Option<Shown> {
    match finding {
        Finding::Keep => None,
        Finding::Provisioned => Some(Shown {
            stage: Stage::Provisioned,
            cause: "running".to_owned(),
            line: "running".to_owned(),
            step: false,
        }),
        // What ran keeps its stage until it is known to be lost.
        Finding::Step(_) | Finding::Unseen(_) if seen.ran() => None,
        Finding::Step(step) => {
            let cause = words(step).to_owned();
            let line = match step {
                Step::ImportingImage(Some(portion)) => format!("{cause} · {portion}"),
                _ => cause.clone(),
            };
            Some(Shown {
                stage: Stage::Provisioning,
                cause,
                line,
                step: true,
            })
        }
        Finding::Unseen(failure) => {
            let stage = match seen.status.as_ref().map(|status| status.stage) {
                Some(Stage::Failed) => Stage::Failed,
                _ => Stage::Provisioning,
            };
            Some(settled(stage, blocked("looking for the instance", failure)))
        }
        Finding::Blocked { step, failure } => {
            let stage = match failure.kind {
                ErrorKind::Rejected | ErrorKind::Denied | ErrorKind::Foreign => Stage::Failed,
                ErrorKind::Unavailable
                | ErrorKind::Throttled { .. }
                | ErrorKind::Busy
                | ErrorKind::Exhausted
                | ErrorKind::Unexpected => Stage::Provisioning,
            };
            Some(settled(stage, blocked(words(step), failure)))
        }
        Finding::Failed(reason) => {
            let cause = explain(reason);
            // Each process last saw it at another time: that is no news.
            let line = match last_seen(reason) {
                Some(seen) => format!("{cause} · {seen}"),
                None => cause.clone(),
            };
            Some(Shown {
                cause,
                line,
                ..settled(Stage::Failed, String::new())
            })
        }
    }
}

fn settled(stage: Stage, line: String) -> Shown {
    Shown {
        stage,
        cause: line.clone(),
        line,
        step: false,
    }
}

fn words(step: &Step) -> &'static str {
    match step {
        Step::Preparing => "preparing",
        Step::PreparingImage => "preparing the image",
        Step::ImportingImage(_) => "importing the image",
        Step::Creating => "creating the instance",
        Step::Starting => "starting the instance",
        Step::NextScope => "trying the next place",
        Step::Deleting => "deleting the instance",
    }
}

fn blocked(step: &str, failure: &Failure) -> String {
    let advice = advice(failure.kind);
    let within = minutes(longest_wait(failure.kind));
    format!("{step} · {} · {advice} · next try within {within}", failure.cause)
}

/// What the person who reads it can do.
fn advice(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unavailable => "nothing to do unless it lasts",
        ErrorKind::Throttled { .. } | ErrorKind::Busy => "nothing to do",
        ErrorKind::Exhausted => "free capacity or raise the quota",
        ErrorKind::Rejected => "correct the machine class, then replace this request",
        ErrorKind::Denied => "check the provider's credentials and what they may see",
        ErrorKind::Foreign => "remove or rename it, or replace this request",
        ErrorKind::Unexpected => "please report this to the provider's maintainers",
    }
}

/// The longest time until the next try after a failure of this kind, whatever the backoff. `engine/retry.rs` keeps to it.
#[must_use]
pub fn longest_wait(kind: ErrorKind) -> Duration {
    match kind {
        ErrorKind::Unavailable | ErrorKind::Unexpected => Duration::from_secs(60),
        ErrorKind::Throttled { after } => after.unwrap_or_default().max(Duration::from_secs(60)),
        ErrorKind::Busy => Duration::from_secs(5),
        ErrorKind::Denied => Duration::from_secs(5 * 60),
        ErrorKind::Exhausted | ErrorKind::Rejected | ErrorKind::Foreign => Duration::from_secs(10 * 60),
    }
}

fn minutes(wait: Duration) -> String {
    match wait.as_secs() {
        seconds @ ..60 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

fn explain(reason: &Reason) -> String {
    match reason {
        Reason::StatusTornDown => "the status of this request is being torn down, but the request is not · \
                                   it cannot be answered any more · tear down the request; Omni replaces it"
            .to_owned(),
        Reason::Invalid(why) => {
            format!(
                "this request cannot be answered · {why} · correct the machine class, then replace this request"
            )
        }
        Reason::Foreign(what) => format!(
            "creating the instance · its name is taken: {what} · remove or rename that, or replace this request · \
             next try within 10 min"
        ),
        Reason::Vanished { name, uuid, .. } => {
            let id = match uuid.as_str() {
                "" => String::new(),
                uuid => format!(" ({uuid})"),
            };
            format!(
                "the instance is gone · asked for by its name, the cloud has none; it was deleted outside of Omni: the cloud's \
                 audit log may say by whom, look for {name}{id} · replace this request"
            )
        }
        Reason::Stopped => "the instance is stopped · it was running and was stopped outside of Omni · \
                            start it in the cloud and it is taken back, or replace this request"
            .to_owned(),
        Reason::Broken(word) => {
            format!(
                "the instance is broken · the cloud says: {word} · repair it in the cloud, or replace this request"
            )
        }
        Reason::NotJoined { started, diagnosis } => {
            let advice = diagnosis.as_deref().unwrap_or(
                "look at its console, at the way from it to Omni, and whether the join token was revoked",
            );
            format!(
                "the instance runs but did not join · started at {started} · {advice}; or replace this request"
            )
        }
        Reason::Lost { what, then } => {
            let then = match then {
                Then::ReplacedIn(wait) => {
                    format!("its machine class asks for a replacement: it gets one if it stays so for {}", minutes(*wait))
                }
                Then::UsedUp => "its machine class asks for a replacement, but there were as many within the last hour as it allows · \
                                 next try within 60 min"
                    .to_owned(),
                Then::TooMany { lost, ran } => format!(
                    "its machine class asks for a replacement, but {lost} of {ran} machines are lost: that looks like another \
                     fault than theirs, and none is replaced while it lasts"
                ),
            };
            format!("{} · {then}", explain(what))
        }
        Reason::Replacing(loss) => {
            let what = match loss {
                Loss::Vanished => "the instance is gone",
                Loss::Stopped => "the instance was stopped outside of Omni",
                Loss::NeverJoined => "the machine did not join",
            };
            format!(
                "{what} · it is being replaced, as its machine class asks for: Omni lets go of the former machine first, which may \
                 take some minutes"
            )
        }
    }
}

/// When a vanished instance was last seen.
fn last_seen(reason: &Reason) -> Option<String> {
    match reason {
        Reason::Vanished { last_seen, .. } => Some(last_seen.map_or_else(
            || "it had been running before this provider started".to_owned(),
            |at| format!("last seen running at {at}"),
        )),
        Reason::Lost { what, .. } => last_seen(what),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::observed::Portion;
    use super::*;
    use crate::cloud::Timestamp;

    #[test]
    fn a_line_says_step_cause_what_to_do_and_next_try() {
        let failure = Failure {
            kind: ErrorKind::Exhausted,
            cause: "cannot start instance on oxide: no sled has room".to_owned(),
            not_before: Timestamp(0),
        };
        assert_eq!(
            blocked(words(&Step::Starting), &failure),
            "starting the instance · cannot start instance on oxide: no sled has room · \
             free capacity or raise the quota · next try within 10 min"
        );
    }

    #[test]
    fn when_it_was_last_seen_is_no_news_and_what_becomes_of_it_is() {
        let vanished = |last_seen| Reason::Vanished {
            name: "web".to_owned(),
            uuid: String::new(),
            last_seen,
        };
        let lost = |last_seen, then| {
            let what = Box::new(vanished(last_seen));
            Reason::Lost { what, then }
        };
        let at = Some(Timestamp(1_000_000));
        assert_eq!(explain(&vanished(None)), explain(&vanished(at)));
        assert_eq!(
            explain(&lost(None, Then::UsedUp)),
            explain(&lost(at, Then::UsedUp))
        );
        let ripens = Then::ReplacedIn(Duration::from_secs(600));
        assert_ne!(explain(&lost(at, Then::UsedUp)), explain(&lost(at, ripens)));
        assert!(last_seen(&lost(at, ripens)).is_some_and(|seen| seen.starts_with("last seen")));
    }

    #[test]
    fn progress_is_the_same_cause_and_another_line() {
        let mut status = MachineRequestStatusSpec::default();
        let shown = |mib: u64| {
            let portion = Portion {
                received: mib << 20,
                total: Some(200 << 20),
            };
            Shown {
                stage: Stage::Provisioning,
                cause: "importing the image".to_owned(),
                line: format!("importing the image · {portion}"),
                step: true,
            }
        };
        assert!(shown(4).line.ends_with("2 % (4 of 200 MiB)"));
        shown(4).write_into(&mut status);
        assert!(shown(9).is_cause_of(&status));
        assert!(!shown(9).is_line_of(&status));
        assert!(shown(4).is_line_of(&status));
    }
}
