//! Carries out one action.
//!
//! *Guarantees.* The fresh Gets that creation and deletion need are made here, just before the call; a disagreement ends the
//! pass. Nothing is repeated: a refusal is read, a lost answer marks its entry dirty, and the next pass decides anew.
//!
//! *Cancel safety.* Every action may be dropped at any await and repeated.

use std::collections::BTreeSet;

use tracing::warn;

use crate::cloud::{Cloud, ErrorKind};
use crate::machine::action::{Action, ActionKind, Plan};
use crate::omni::OmniErrorKind;

use super::imports::Chain;
use super::reconcile::{Engine, Outcome, Pass};
use super::stores::read_afresh;

impl<C: Cloud> Engine<C> {
    /// Carries out the plan's action; a long one is reported while it lasts.
    pub(super) async fn act(
        &self,
        pass: &mut Pass<'_, C>,
        action: &Action<C::Scope>,
        plan: &Plan<C::Scope>,
    ) -> Outcome {
        let outcome = match action {
            Action::AddFinalizer => self.add_finalizer(pass).await,
            Action::CreateStatus => self.create_status(pass, &plan.finding, None).await,
            Action::WriteClaim { scopes } => {
                let outcome = self.write_claim(pass, &plan.finding, scopes).await;
                pass.memory.claim_known |= outcome == Outcome::Done;
                outcome
            }
            Action::RegisterSchematic => self.register_schematic(pass).await,
            Action::StartImport { scope } => self.start_import(pass, scope),
            Action::CreateInstance { scope } => self.create_instance(pass, scope, &plan.finding).await,
            Action::StartInstance { scope, id } => {
                let mut instance = self.instance(pass, scope);
                instance.id = Some(id.clone());
                let call = self.cloud.start_instance(&instance);
                let result = self.shown_while(pass, &plan.finding, call).await;
                self.mutated(pass, ActionKind::Start, result)
            }
            Action::DeleteLeftovers { scope } => {
                let instance = self.instance(pass, scope);
                let result = self.cloud.delete_instance(&instance).await;
                self.mutated(pass, ActionKind::Delete, result)
            }
            Action::DeleteInstance { scope, id } => self.delete_instance(pass, scope, id.clone()).await,
            Action::WritePatch { id } => self.write_patch(pass, id).await,
            Action::TearDownPatch { id } => match self.stores.patches.get(id) {
                Some(patch) => self.tear_down(pass, &self.stores.patches, &patch, id).await,
                None => Outcome::Moved,
            },
            Action::DestroyPatch { id } => match self.stores.patches.get(id) {
                Some(patch) => self.destroy(pass, &self.stores.patches, &patch).await,
                None => Outcome::Moved,
            },
            Action::TearDownStatus => match pass.status.clone() {
                Some(status) => {
                    self.tear_down(pass, &self.stores.statuses, &status, "status")
                        .await
                }
                None => Outcome::Moved,
            },
            Action::DestroyStatus => {
                match (self.drained(pass, ActionKind::Omni).await, pass.status.clone()) {
                    (Ok(()), Some(status)) => {
                        let outcome = self.destroy(pass, &self.stores.statuses, &status).await;
                        pass.memory.ended |= outcome == Outcome::Done;
                        outcome
                    }
                    (Ok(()), None) => Outcome::Moved,
                    (Err(outcome), _) => outcome,
                }
            }
            Action::DestroyMachineResource => self.destroy_machine_resource(pass).await,
            Action::RemoveFinalizer => self.remove_finalizer(pass).await,
        };
        if outcome == Outcome::Done {
            pass.memory.succeeded(action.kind());
        }
        outcome
    }

    pub(super) fn failed(
        &self,
        pass: &mut Pass<'_, C>,
        kind: ActionKind,
        meaning: ErrorKind,
        error: &(dyn std::error::Error + 'static),
    ) -> Outcome {
        match meaning {
            ErrorKind::Busy => {}
            _ => warn!(action = ?kind, kind = meaning.label(), error = %Chain(error), "action failed"),
        }
        pass.memory
            .failed(kind, meaning, error.to_string(), self.clock.now());
        Outcome::Failed
    }

    /// The fresh Get of T5 to T7: the status is gone, or tearing down without finalizers. Once seen, that holds.
    ///
    /// A read that fails counts as a failure of the action that needs it, and so delays that action.
    pub(super) async fn drained(&self, pass: &mut Pass<'_, C>, action: ActionKind) -> Result<(), Outcome> {
        if pass.memory.drained {
            return Ok(());
        }
        let status = match read_afresh(&self.state, &self.stores.statuses, pass.key).await {
            Ok(status) => status,
            Err(error) => return Err(self.failed(pass, action, meaning(error.kind), &error)),
        };
        let drained = status
            .as_ref()
            .is_none_or(|status| status.tearing_down() && status.metadata.finalizers == BTreeSet::new());
        if drained {
            pass.memory.drained = true;
            Ok(())
        } else {
            Err(Outcome::Moved)
        }
    }
}

/// What a failure of Omni means for the time of the next try.
pub(super) fn meaning(kind: OmniErrorKind) -> ErrorKind {
    match kind {
        OmniErrorKind::Denied | OmniErrorKind::Unauthenticated | OmniErrorKind::Eula => ErrorKind::Denied,
        OmniErrorKind::Invalid | OmniErrorKind::TooLarge | OmniErrorKind::Unimplemented => {
            ErrorKind::Rejected
        }
        OmniErrorKind::Unavailable => ErrorKind::Unavailable,
        OmniErrorKind::NotFound
        | OmniErrorKind::AlreadyExists
        | OmniErrorKind::Conflict
        | OmniErrorKind::PendingFinalizers
        | OmniErrorKind::WrongOwner
        | OmniErrorKind::WrongPhase => ErrorKind::Unexpected,
    }
}
