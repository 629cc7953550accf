//! Writes to Omni: finalizers, status and claim, patches, and their ends.
//!
//! *Guarantees.* Every write is based on the version that the plan was made from. A refusal is read; a lost answer marks its entry
//! dirty; nothing is repeated.

use tracing::info;

use crate::cloud::Cloud;
use crate::machine::action::{ActionKind, Finding};
use crate::machine::observed::Placement;
use crate::machine::status::shown;
use crate::omni::kinds::{
    ConfigPatchRequestSpec, ConfigPatchRequests, LABEL_PROVIDER, LABEL_REQUEST, MachineRequestStatusSpec,
};
use crate::omni::resource::Labels;
use crate::omni::{Kind, Metadata, OmniError, OmniErrorKind, Phase, RawSpec, Resource, Store};

use super::act::meaning;
use super::observe::{ANNOTATION_PLACEMENT, ANNOTATION_RAN};
use super::reconcile::{Engine, Outcome, Pass};
use super::stores::read_afresh;

impl<C: Cloud> Engine<C> {
    pub(super) async fn add_finalizer(&self, pass: &mut Pass<'_, C>) -> Outcome {
        let Some(request) = pass.request.clone() else {
            return Outcome::Moved;
        };
        let mut wanted = (*request).clone();
        wanted.metadata.finalizers.insert(self.identity.controller());
        let result = self.state.update(&wanted, Some(Phase::Running)).await;
        self.written(pass, &self.stores.requests, &request, result).await
    }

    pub(super) async fn remove_finalizer(&self, pass: &mut Pass<'_, C>) -> Outcome {
        if let Err(outcome) = self.drained(pass, ActionKind::Omni).await {
            return outcome;
        }
        let Some(request) = pass.request.clone() else {
            return Outcome::Moved;
        };
        let mut wanted = (*request).clone();
        wanted.metadata.finalizers.remove(&self.identity.controller());
        let result = self.state.update(&wanted, None).await;
        let outcome = self.written(pass, &self.stores.requests, &request, result).await;
        if outcome == Outcome::Done {
            info!("torn down");
        }
        outcome
    }

    pub(super) async fn create_status(
        &self,
        pass: &mut Pass<'_, C>,
        finding: &Finding,
        claim: Option<Vec<C::Scope>>,
    ) -> Outcome {
        let Some(request) = pass.request.clone() else {
            return Outcome::Moved;
        };
        let mut spec = MachineRequestStatusSpec::default();
        if let Some(shown) = shown(finding, &pass.seen) {
            shown.write_into(&mut spec);
        }
        let status = Resource {
            metadata: Metadata {
                id: pass.key.to_owned(),
                owner: self.identity.controller(),
                labels: request.metadata.labels.clone(),
                annotations: self.claim(pass, claim),
                ..Metadata::default()
            },
            spec,
            raw: RawSpec::default(),
        };
        let result = self.state.create(&status).await;
        self.written(pass, &self.stores.statuses, &status, result).await
    }

    /// R4 and R12: a versioned write, never blindly repeated.
    pub(super) async fn write_claim(
        &self,
        pass: &mut Pass<'_, C>,
        finding: &Finding,
        scopes: &[C::Scope],
    ) -> Outcome {
        let Some(status) = pass.status.clone() else {
            return self.create_status(pass, finding, Some(scopes.to_vec())).await;
        };
        let mut wanted = (*status).clone();
        let claim = self.claim(pass, Some(scopes.to_vec()));
        wanted.metadata.annotations.extend(claim);
        if let Some(shown) = shown(finding, &pass.seen) {
            shown.write_into(&mut wanted.spec);
        }
        let result = self.state.update(&wanted, Some(Phase::Running)).await;
        self.written(pass, &self.stores.statuses, &status, result).await
    }

    pub(super) fn claim(&self, pass: &Pass<'_, C>, scopes: Option<Vec<C::Scope>>) -> Labels {
        let mut annotations = Labels::new();
        if let Some((scopes, request)) = scopes.zip(pass.request.as_ref()) {
            let placement = Placement {
                created: request.metadata.created.0,
                scopes,
            };
            // Scopes are names and numbers: they always serialise.
            let text = serde_json::to_string(&placement).unwrap_or_default();
            annotations.insert(ANNOTATION_PLACEMENT.to_owned(), text);
        }
        if pass.seen.ran() {
            annotations.insert(ANNOTATION_RAN.to_owned(), "true".to_owned());
        }
        annotations
    }

    pub(super) async fn write_patch(&self, pass: &mut Pass<'_, C>, id: &str) -> Outcome {
        let Some(wanted) = self
            .wanted_patches(pass)
            .into_iter()
            .find(|wanted| wanted.id == id)
        else {
            return Outcome::Moved;
        };
        let spec = ConfigPatchRequestSpec {
            data: Some(wanted.data),
        };
        match self.stores.patches.get(id) {
            Some(held) => {
                let mut patch = (*held).clone();
                patch.spec = spec;
                let result = self.state.update(&patch, Some(Phase::Running)).await;
                self.written(pass, &self.stores.patches, &held, result).await
            }
            None => {
                let mut patch: Resource<ConfigPatchRequests> = Resource::new(id, spec);
                patch.metadata.owner = self.identity.controller();
                patch.metadata.labels = Labels::from_iter([
                    (LABEL_PROVIDER.to_owned(), self.identity.provider.clone()),
                    (LABEL_REQUEST.to_owned(), pass.key.to_owned()),
                ]);
                let result = self.state.create(&patch).await;
                self.written(pass, &self.stores.patches, &patch, result).await
            }
        }
    }

    pub(super) async fn destroy_machine_resource(&self, pass: &mut Pass<'_, C>) -> Outcome {
        if let Err(outcome) = self.drained(pass, ActionKind::Omni).await {
            return outcome;
        }
        let store = &self.stores.machine_resources;
        let Some(resource) = store.get(pass.key) else {
            return Outcome::Moved;
        };
        if !resource.tearing_down()
            && let Err(error) = self
                .state
                .teardown::<crate::omni::kinds::MachineResources>(pass.key, &resource.metadata.owner)
                .await
            && error.kind != OmniErrorKind::NotFound
        {
            return self.refused(pass, store, &resource, error).await;
        }
        self.destroy(pass, store, &resource).await
    }

    /// Asks for the end of a resource; its finalizers count as present until something newer shows otherwise.
    pub(super) async fn tear_down<K: Kind>(
        &self,
        pass: &mut Pass<'_, C>,
        store: &Store<K>,
        resource: &Resource<K>,
        name: &str,
    ) -> Outcome {
        match self
            .state
            .teardown::<K>(resource.id(), &resource.metadata.owner)
            .await
        {
            Ok(_) => {
                let version = (resource.metadata.created, resource.metadata.version);
                pass.memory.torn_down.insert(name.to_owned(), version);
                Outcome::Done
            }
            Err(error) if error.kind == OmniErrorKind::NotFound => {
                store.remove(resource);
                Outcome::Done
            }
            Err(error) => self.refused(pass, store, resource, error).await,
        }
    }

    pub(super) async fn destroy<K: Kind>(
        &self,
        pass: &mut Pass<'_, C>,
        store: &Store<K>,
        resource: &Resource<K>,
    ) -> Outcome {
        match self
            .state
            .destroy::<K>(resource.id(), &resource.metadata.owner)
            .await
        {
            Ok(()) => {
                store.remove(resource);
                Outcome::Done
            }
            Err(error) if error.kind == OmniErrorKind::NotFound => {
                store.remove(resource);
                Outcome::Done
            }
            Err(error) => self.refused(pass, store, resource, error).await,
        }
    }

    /// Takes in the answer of a create or an update.
    pub(super) async fn written<K: Kind>(
        &self,
        pass: &mut Pass<'_, C>,
        store: &Store<K>,
        based_on: &Resource<K>,
        result: Result<Resource<K>, OmniError>,
    ) -> Outcome {
        match result {
            Ok(stored) => {
                store.put(stored);
                Outcome::Done
            }
            Err(error) => self.refused(pass, store, based_on, error).await,
        }
    }

    /// A refused write: where the world has moved on, it is read; else the failure is remembered.
    pub(super) async fn refused<K: Kind>(
        &self,
        pass: &mut Pass<'_, C>,
        store: &Store<K>,
        based_on: &Resource<K>,
        error: OmniError,
    ) -> Outcome {
        let moved = match error.kind {
            OmniErrorKind::Conflict
            | OmniErrorKind::AlreadyExists
            | OmniErrorKind::NotFound
            | OmniErrorKind::PendingFinalizers
            | OmniErrorKind::WrongOwner
            | OmniErrorKind::WrongPhase => true,
            // Omni says "denied" to a finalizer write that was based on a stale request.
            OmniErrorKind::Denied => pass.memory.conflicts < 3,
            OmniErrorKind::Unauthenticated
            | OmniErrorKind::Eula
            | OmniErrorKind::Invalid
            | OmniErrorKind::TooLarge
            | OmniErrorKind::Unimplemented
            | OmniErrorKind::Unavailable => false,
        };
        if error.outcome_unknown() {
            store.mark_dirty(based_on.id());
        }
        if moved {
            match read_afresh(&self.state, store, based_on.id()).await {
                Ok(_) => return Outcome::Moved,
                Err(unreadable) => {
                    store.mark_dirty(based_on.id());
                    return self.failed(pass, ActionKind::Omni, meaning(unreadable.kind), &unreadable);
                }
            }
        }
        self.failed(pass, ActionKind::Omni, meaning(error.kind), &error)
    }
}
