//! Writes a request's status when it differs from what was found, and owns the pace of it.
//!
//! Compared are stage, cause, UUID and the claim's note that the instance ran, never times. A mere step is shown only when it has
//! lasted; the same cause is written again, for its progress, only now and then.

use tracing::info;

use crate::cloud::{Cloud, Found, Timestamp};
use crate::machine::action::{Finding, Plan, Reason, Step};
use crate::machine::desired::Goal;
use crate::machine::observed::Seen;
use crate::machine::status::{Shown, shown};
use crate::omni::kinds::MachineRequestStatusSpec;

use super::observe::ANNOTATION_RAN;
use super::reconcile::{Engine, Outcome, Pass};

impl<C: Cloud> Engine<C> {
    /// Writes the status, if there is something to write and it is time.
    pub(super) async fn report(&self, pass: &mut Pass<'_, C>, finding: &Finding) -> Outcome {
        if !speaks(&pass.goal, finding) {
            return Outcome::Done;
        }
        // A report never creates a status, and is never based on an older one than the store has.
        let Some(status) = self.stores.statuses.get(pass.key) else {
            return Outcome::Done;
        };
        let now = self.clock.now();
        let mut wanted = (*status).clone();
        let said = shown(finding, &pass.seen).filter(|shown| self.is_time(pass, shown, &status.spec, now));
        if let Some(said) = &said {
            said.write_into(&mut wanted.spec);
        }
        if let Some(uuid) = uuid(pass) {
            wanted.spec.id = uuid;
        }
        let runs = matches!(
            finding,
            Finding::Provisioned | Finding::Failed(Reason::NotJoined { .. })
        );
        if runs || pass.seen.ran() {
            let ran = wanted.metadata.annotations.entry(ANNOTATION_RAN.to_owned());
            ran.or_insert_with(|| "true".to_owned());
        }
        if wanted.spec == status.spec && wanted.metadata == status.metadata {
            return Outcome::Done;
        }
        // While only the note that it ran is missing there is nothing to tell: it goes with the next write.
        if wanted.spec == status.spec && !runs {
            return Outcome::Done;
        }
        if wanted.spec.stage != status.spec.stage {
            info!(stage = ?wanted.spec.stage, status = %wanted.spec.status, "status changed");
        }
        let result = self.state.update(&wanted, None).await;
        let outcome = self.written(pass, &self.stores.statuses, &status, result).await;
        if outcome == Outcome::Done {
            pass.memory.reported = Some(now);
            pass.memory.said = said.or(pass.memory.said.take());
        }
        outcome
    }

    fn is_time(
        &self,
        pass: &Pass<'_, C>,
        shown: &Shown,
        status: &MachineRequestStatusSpec,
        now: Timestamp,
    ) -> bool {
        if shown.is_line_of(status) {
            return false;
        }
        let lately = pass
            .memory
            .reported
            .is_some_and(|at| now.since(at) < self.pace.report_same);
        // Said before, and overwritten: another process sees it otherwise. Two that contradict each other must not do so at the
        // speed of their writes.
        if pass.memory.said.as_ref() == Some(shown) {
            return !lately;
        }
        if shown.is_cause_of(status) {
            return shown.step && !lately;
        }
        !shown.step
            || pass
                .memory
                .step
                .as_ref()
                .is_some_and(|(_, since)| now.since(*since) >= self.pace.report_step)
    }

    /// When a step that is under way has lasted long enough to be shown, when its progress may be shown again, or what another
    /// process has overwritten.
    pub(super) fn report_due(&self, pass: &Pass<'_, C>, plan: &Plan<C::Scope>) -> Option<Timestamp> {
        if !speaks(&pass.goal, &plan.finding) {
            return None;
        }
        let status = self.stores.statuses.get(pass.key)?;
        let shown = shown(&plan.finding, &pass.seen)?;
        let now = self.clock.now();
        let again = || {
            let due = pass.memory.reported.unwrap_or(now).after(self.pace.report_same);
            // Its time has come and nothing was written: there was nothing new to say.
            if due > now {
                due
            } else {
                now.after(self.pace.report_same)
            }
        };
        if shown.is_line_of(&status.spec) || shown.is_cause_of(&status.spec) {
            let progresses = matches!(plan.finding, Finding::Step(Step::ImportingImage(_)));
            return progresses.then(again);
        }
        if pass.memory.said.as_ref() == Some(&shown) {
            return Some(again());
        }
        if !shown.step {
            return None;
        }
        let (_, since) = pass.memory.step.as_ref()?;
        Some(since.after(self.pace.report_step))
    }
}

impl<C: Cloud> Pass<'_, C> {
    /// Notes since when the step of this plan has been under way.
    pub(super) fn note_step(&mut self, plan: &Plan<C::Scope>, now: Timestamp) {
        let step = match &plan.finding {
            Finding::Step(Step::ImportingImage(_)) => Some(Step::ImportingImage(None)),
            Finding::Step(step) => Some(step.clone()),
            Finding::Keep => return,
            _ => None,
        };
        match (step, &self.memory.step) {
            (Some(step), Some((known, _))) if step == *known => {}
            (Some(step), _) => self.memory.step = Some((step, now)),
            (None, _) => self.memory.step = None,
        }
    }
}

/// On the way out Omni shows a text of its own: what we would say costs a write and is not seen.
fn speaks<S>(goal: &Goal<S>, finding: &Finding) -> bool {
    match goal {
        Goal::Run { .. } | Goal::Invalid { .. } => true,
        Goal::Leave | Goal::TearDown { .. } | Goal::Gone { .. } => {
            *finding == Finding::Failed(Reason::StatusTornDown)
        }
    }
}

/// The UUID of the instance that was seen. Once published it stays: a machine that vanished keeps its name in Omni.
fn uuid<C: Cloud>(pass: &Pass<'_, C>) -> Option<String> {
    pass.seen.scopes.iter().find_map(|(_, seen)| match seen {
        Seen::Known {
            found: Found::Ours(instance),
            ..
        } => instance.uuid.clone(),
        _ => None,
    })
}
