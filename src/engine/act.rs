//! Carries out one action.
//!
//! *Guarantees.* The fresh Gets that creation and deletion need are made here, just before the call; a disagreement ends the
//! pass. Nothing is repeated: a refusal is read, a lost answer marks its entry dirty, and the next pass decides anew.
//!
//! *Cancel safety.* Every action may be dropped at any await and repeated.

use std::future::ready;

use tracing::warn;

use crate::cloud::{BoxFuture, Cloud, ErrorKind};
use crate::machine::action::{Action, ActionKind, Plan};
use crate::omni::{LeaseError, OmniErrorKind};

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
        // Boxed, or every pass would hold room for all of them.
        let acting: BoxFuture<'_, Outcome> = match action {
            Action::AddFinalizer => Box::pin(self.add_finalizer(pass)),
            Action::CreateStatus => Box::pin(self.create_status(pass, &plan.finding, None)),
            Action::WriteClaim { scopes } if scopes.len() > 1 => Box::pin(async {
                let fence = self.lease.fence();
                let claiming = self.write_claim(pass, &plan.finding, scopes);
                fence.guard(claiming).await.unwrap_or(Outcome::Moved)
            }),
            Action::WriteClaim { scopes } => Box::pin(async {
                let outcome = self.write_claim(pass, &plan.finding, scopes).await;
                pass.memory.claim_known |= outcome == Outcome::Done;
                outcome
            }),
            Action::TakeLease => Box::pin(self.take_lease(pass)),
            Action::RegisterSchematic => Box::pin(self.register_schematic(pass)),
            Action::StartImport { scope } => Box::pin(ready(self.start_import(pass, scope))),
            Action::CreateInstance { scope } => Box::pin(self.create_instance(pass, scope, &plan.finding)),
            Action::StartInstance { scope, id } => Box::pin(async {
                let mut instance = self.instance(pass, scope);
                instance.id = Some(id.clone());
                let user_data = match self.user_data(pass) {
                    Ok(user_data) => user_data,
                    Err(error) => return self.failed(pass, ActionKind::Start, error.kind, &error),
                };
                let call = self.cloud.start_instance(&instance, &user_data);
                let result = self.shown_while(pass, &plan.finding, call).await;
                if result.is_err()
                    && let Some(image) = self.image_key(pass)
                {
                    // Perhaps its medium is gone: it is looked for again before the next try.
                    self.imports.doubt(&(scope.clone(), image));
                }
                self.mutated(pass, ActionKind::Start, result)
            }),
            Action::DeleteLeftovers { scope } => Box::pin(async {
                let instance = self.instance(pass, scope);
                let result = self.cloud.delete_instance(&instance).await;
                self.mutated(pass, ActionKind::Delete, result)
            }),
            Action::DeleteInstance { scope, id } => Box::pin(self.delete_instance(pass, scope, id.clone())),
            Action::SpendReplacement { loss } => Box::pin(self.spend_replacement(pass, *loss)),
            Action::BeginReplacement { loss } => Box::pin(self.begin_replacement(pass, *loss, &plan.finding)),
            Action::CancelReplacement => Box::pin(self.cancel_replacement(pass)),
            Action::DeleteLost { loss, scope, id } => Box::pin(self.delete_lost(pass, *loss, scope, id)),
            Action::WritePatch { id } => Box::pin(self.write_patch(pass, id)),
            Action::TearDownPatch { id } => Box::pin(async {
                match self.stores.patches.get(id) {
                    Some(patch) => self.tear_down(pass, &self.stores.patches, &patch, id).await,
                    None => Outcome::Moved,
                }
            }),
            Action::DestroyPatch { id } => Box::pin(async {
                match self.stores.patches.get(id) {
                    Some(patch) => self.destroy(pass, &self.stores.patches, &patch).await,
                    None => Outcome::Moved,
                }
            }),
            Action::TearDownStatus => Box::pin(async {
                match pass.status.clone() {
                    Some(status) => {
                        self.tear_down(pass, &self.stores.statuses, &status, "status")
                            .await
                    }
                    None => Outcome::Moved,
                }
            }),
            Action::DestroyStatus => Box::pin(self.destroy_status(pass)),
            Action::DestroyMachineResource => Box::pin(self.destroy_machine_resource(pass)),
            Action::RemoveFinalizer => Box::pin(self.remove_finalizer(pass)),
        };
        let outcome = acting.await;
        if outcome == Outcome::Done {
            pass.memory.succeeded(action.kind());
        }
        outcome
    }

    async fn destroy_status(&self, pass: &mut Pass<'_, C>) -> Outcome {
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

    async fn take_lease(&self, pass: &mut Pass<'_, C>) -> Outcome {
        match self.lease.take().await {
            Ok(()) => Outcome::Done,
            Err(error) => {
                let kind = match &error {
                    LeaseError::Elsewhere => ErrorKind::Busy,
                    LeaseError::Omni(error) => meaning(error.kind),
                };
                self.failed(pass, ActionKind::Lease, kind, &error)
            }
        }
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
            .is_none_or(|status| status.tearing_down() && status.metadata.finalizers.is_empty());
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
