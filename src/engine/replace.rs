//! Replaces lost machines: what is spent, the note on the status, the deletion of an instance that Omni's drain cannot need.
//!
//! *Guarantees.* The hour's budget is written before the intent, the intent before anything is taken away; both writes are versioned,
//! so that of two daemons, or of two machines at the limit, one goes first and the other looks again.
//!
//! *Not here.* Whether and when: `machine/replace.rs` and the planner.

use tracing::info;

use crate::cloud::{Cloud, Found, InstanceState, Timestamp};
use crate::machine::action::{ActionKind, Finding};
use crate::machine::observed::Former;
use crate::machine::replace::{
    ANNOTATION_REPLACEMENTS, ANNOTATION_REPLACING, Budget, Fleet, Ledger, Loss, Spent, judge,
};
use crate::machine::status::shown;
use crate::omni::kinds::{InfraProviderStatuses, LABEL_REQUEST, LABEL_REQUEST_SET, Machines, Stage};
use crate::omni::{OmniError, Phase, Resource};

use super::act::meaning;
use super::observe::ANNOTATION_RAN;
use super::reconcile::{Engine, Outcome, Pass};
use super::stores::read_afresh;

/// The ledger on our registration.
fn ledger(registration: &Resource<InfraProviderStatuses>) -> Option<Ledger> {
    Ledger::read(registration.metadata.annotations.get(ANNOTATION_REPLACEMENTS))
}

impl<C: Cloud> Engine<C> {
    /// Whether the limits allow a replacement, by what the watches know: what is then spent is a versioned write.
    pub(super) fn budget(&self, pass: &Pass<'_, C>) -> Budget {
        let registration = self.stores.registration.get(&self.identity.provider);
        let ledger = registration.and_then(|registration| ledger(&registration));
        let (one, class) = (self.spending(pass), &pass.seen.replace);
        judge(
            ledger.as_ref(),
            &one,
            class,
            self.fleet(),
            self.pace.replaced_per_hour,
        )
    }

    fn spending(&self, pass: &Pass<'_, C>) -> Spent {
        let set = pass
            .request
            .as_ref()
            .and_then(|request| request.metadata.labels.get(LABEL_REQUEST_SET));
        let status = pass.status.as_ref().map(|status| status.metadata.created);
        Spent {
            at: self.clock.now(),
            set: set.cloned().unwrap_or_default(),
            request: pass.key.to_owned(),
            status: status.unwrap_or_default(),
        }
    }

    /// Counted in Omni, not in this process: a restart forgets no lost machine.
    fn fleet(&self) -> Fleet {
        let mut fleet = Fleet::default();
        for status in self.stores.statuses.all() {
            let ran = status.metadata.annotations.contains_key(ANNOTATION_RAN)
                || status.spec.stage == Stage::Provisioned;
            if ran && !status.tearing_down() {
                fleet.ran += 1;
                fleet.lost += usize::from(status.spec.stage == Stage::Failed);
            }
        }
        fleet
    }

    /// Whether Omni still has a machine of this request.
    pub(super) async fn former(&self, pass: &Pass<'_, C>) -> Result<Former, OmniError> {
        let machines = self.state.list::<Machines>(&[(LABEL_REQUEST, pass.key)]).await?;
        Ok(match machines.is_empty() {
            true => Former::Gone,
            false => Former::There,
        })
    }

    pub(super) async fn spend_replacement(&self, pass: &mut Pass<'_, C>, loss: Loss) -> Outcome {
        let store = &self.stores.registration;
        let Some(registration) = store.get(&self.identity.provider) else {
            return Outcome::Moved;
        };
        let Some(ledger) = ledger(&registration) else {
            return Outcome::Moved;
        };
        let mut wanted = (*registration).clone();
        ledger.put(self.spending(pass), &mut wanted.metadata.annotations);
        info!(%loss, "the machine is lost and will be replaced");
        let result = self.state.update(&wanted, Some(Phase::Running)).await;
        self.written(pass, store, &registration, result).await
    }

    pub(super) async fn begin_replacement(
        &self,
        pass: &mut Pass<'_, C>,
        loss: Loss,
        finding: &Finding,
    ) -> Outcome {
        let Some(status) = pass.status.clone() else {
            return Outcome::Moved;
        };
        let mut wanted = (*status).clone();
        let annotations = &mut wanted.metadata.annotations;
        annotations.insert(ANNOTATION_REPLACING.to_owned(), loss.to_string());
        annotations.insert(ANNOTATION_RAN.to_owned(), "true".to_owned());
        if let Some(shown) = shown(finding, &pass.seen) {
            shown.write_into(&mut wanted.spec);
        }
        info!(%loss, "replacing the machine");
        let result = self.state.update(&wanted, Some(Phase::Running)).await;
        self.written(pass, &self.stores.statuses, &status, result).await
    }

    pub(super) async fn cancel_replacement(&self, pass: &mut Pass<'_, C>) -> Outcome {
        let Some(status) = pass.status.clone() else {
            return Outcome::Moved;
        };
        let mut wanted = (*status).clone();
        wanted.metadata.annotations.remove(ANNOTATION_REPLACING);
        info!("the machine is back, it is not replaced");
        let result = self.state.update(&wanted, Some(Phase::Running)).await;
        self.written(pass, &self.stores.statuses, &status, result).await
    }

    /// N3, after a find that still shows it lost, and fresh Gets that still mean its replacement.
    pub(super) async fn delete_lost(
        &self,
        pass: &mut Pass<'_, C>,
        loss: Loss,
        scope: &C::Scope,
        id: &str,
    ) -> Outcome {
        let mut instance = self.instance(pass, scope);
        instance.id = Some(id.to_owned());
        let found = match self.inventory.find(&instance).await {
            Ok((found, ..)) => found,
            Err(error) => return self.mutated(pass, ActionKind::Delete, Err(error)),
        };
        let still_lost = matches!(
            &found,
            Found::Ours(found) if found.id == id && match loss {
                Loss::Vanished => false,
                Loss::Stopped => found.state != InstanceState::Running,
                Loss::NeverJoined => self.stores.registrations.group(pass.key).is_empty(),
            }
        );
        match self.is_being_replaced(pass).await {
            Ok(true) if still_lost => {}
            Ok(_) => {
                pass.memory.find_next = true;
                return Outcome::Moved;
            }
            Err(error) => return self.failed(pass, ActionKind::Delete, meaning(error.kind), &error),
        }
        info!(%scope, instance = %instance.name, %loss, "deleting the lost instance");
        let result = self.cloud.delete_instance(&instance).await;
        self.mutated(pass, ActionKind::Delete, result)
    }

    /// The fresh Gets of N3: the request runs, is the same one and ours; the status runs, and says that the machine is being replaced.
    async fn is_being_replaced(&self, pass: &Pass<'_, C>) -> Result<bool, OmniError> {
        let request = read_afresh(&self.state, &self.stores.requests, pass.key).await?;
        let status = read_afresh(&self.state, &self.stores.statuses, pass.key).await?;
        let requested = request.zip(pass.request.as_ref()).is_some_and(|(fresh, known)| {
            fresh.same_incarnation(known)
                && !fresh.tearing_down()
                && fresh.metadata.finalizers.contains(&self.identity.controller())
        });
        let replacing = status.is_some_and(|status| {
            !status.tearing_down() && status.metadata.annotations.contains_key(ANNOTATION_REPLACING)
        });
        Ok(requested && replacing)
    }
}

impl<C: Cloud> Pass<'_, C> {
    /// Notes since when the machine has been lost, if this plan says that it is.
    pub(super) fn note_lost(&mut self, finding: &Finding, now: Timestamp) {
        let loss = match finding {
            Finding::Failed(reason) => reason.loss(),
            // Nothing was seen that speaks against it.
            Finding::Keep | Finding::Unseen(_) => return,
            Finding::Step(_) | Finding::Blocked { .. } | Finding::Provisioned => None,
        };
        self.memory.lost = loss.map(|loss| match self.memory.lost {
            Some((known, since)) if known == loss => (known, since),
            _ => (loss, now),
        });
    }
}
