//! Makes instances and what they boot from: schematic, image, user data, creation, deletion.
//!
//! *Guarantees.* Nothing is created without fresh reads of request and status that agree with the plan; nothing is deleted before a
//! fresh read showed that Omni has drained.

use std::sync::{Arc, PoisonError};

use tokio::time::sleep;
use tracing::info;

use crate::cloud::{Cloud, CloudError, ErrorKind, InstanceSpec};
use crate::machine::action::{ActionKind, Finding};
use crate::machine::observed::Created;
use crate::omni::OmniErrorKind;
use crate::omni::management::AssetRequest;

use super::act::meaning;
use super::download::{Download, Location};
use super::observe::{ANNOTATION_RAN, placement};
use super::reconcile::{Engine, Outcome, Pass};
use super::stores::read_afresh;

/// Most schematic IDs that are remembered.
const SCHEMATICS: usize = 1024;

impl<C: Cloud> Engine<C> {
    pub(super) async fn register_schematic(&self, pass: &mut Pass<'_, C>) -> Outcome {
        let (Some(request), Some(desired)) = (&pass.request, pass.desired()) else {
            return Outcome::Moved;
        };
        let schematic = match self.schematic(desired, &request.spec) {
            Ok(schematic) => schematic.into_owned(),
            Err(error) => return self.failed(pass, ActionKind::Schematic, error.kind, &error),
        };
        let cell = {
            let mut schematics = self.schematics.lock().unwrap_or_else(PoisonError::into_inner);
            // As many as there are classes and Talos versions in use; a bound all the same.
            if schematics.len() >= SCHEMATICS {
                schematics.clear();
            }
            schematics.entry(schematic.input_hash()).or_default().clone()
        };
        let register = || {
            self.management
                .create_schematic(schematic.yaml(), &desired.talos_version)
        };
        match cell.get_or_try_init(register).await {
            Ok(_) => Outcome::Done,
            Err(error) => {
                let kind = match error.kind {
                    OmniErrorKind::Invalid => ErrorKind::Rejected,
                    other => meaning(other),
                };
                self.failed(pass, ActionKind::Schematic, kind, &error)
            }
        }
    }

    pub(super) fn start_import(&self, pass: &mut Pass<'_, C>, scope: &C::Scope) -> Outcome {
        let (Some(key), Some(format)) = (
            self.image_key(pass),
            pass.desired().and_then(|desired| desired.boot.format),
        ) else {
            return Outcome::Moved;
        };
        let asset = AssetRequest {
            talos_version: key.talos_version.clone(),
            schematic: key.schematic.clone(),
            platform: key.platform.clone(),
            arch: key.arch.clone(),
            format: format.to_owned(),
        };
        let management = self.management.clone();
        let locate = move || {
            let (management, asset) = (management.clone(), asset.clone());
            Box::pin(async move {
                let found = management.disk_asset(&asset).await.map_err(|error| {
                    CloudError::new("Omni", "locate image", meaning(error.kind), error.to_string())
                })?;
                Ok(Location {
                    url: found.url,
                    headers: found.headers,
                    format: asset.format,
                })
            }) as crate::cloud::BoxFuture<'static, _>
        };
        let what = format!("Talos {} for {} {}", key.talos_version, key.platform, key.arch);
        let source = Download::new(what, Arc::new(locate), self.downloads.clone());
        self.imports.start((scope.clone(), key), source, pass.key);
        Outcome::Done
    }

    /// R13, after fresh Gets of request and status that agree with what the plan was made from.
    pub(super) async fn create_instance(
        &self,
        pass: &mut Pass<'_, C>,
        scope: &C::Scope,
        finding: &Finding,
    ) -> Outcome {
        let begun = self.clock.now();
        if let Err(outcome) = self.agreed(pass).await {
            return outcome;
        }
        // What a teardown waits for (`Pace::settle`) covers the deadline of the creation and a third of the rest for these reads;
        // after a pause of this process they are old news.
        if self.clock.age(begun) > self.pace.settle.saturating_sub(self.pace.create) / 3 {
            return Outcome::Moved;
        }
        let Some(place) = self.image_key(pass).map(|key| (scope.clone(), key)) else {
            return Outcome::Moved;
        };
        let Some(desired) = pass.desired() else {
            return Outcome::Moved;
        };
        let image = match desired.boot.format {
            Some(_) => self.imports.image(&place),
            None => Some(place.1.reference()),
        };
        let Some(image) = image else {
            return Outcome::Moved;
        };
        let user_data = match self.user_data(pass) {
            Ok(user_data) => user_data,
            Err(error) => return self.failed(pass, ActionKind::Create, error.kind, &error),
        };
        let spec = InstanceSpec {
            instance: self.instance(pass, scope),
            class: desired.class.clone(),
            image,
            user_data,
        };
        info!(%scope, instance = %spec.instance.name, "creating instance");
        let call = self.cloud.create_instance(&spec);
        let result = self.shown_while(pass, finding, call).await;
        let created = match &result {
            Ok(()) => Created::Accepted,
            Err(error) => Created::Failed(error.kind),
        };
        pass.memory.created = Some((scope.clone(), created));
        if result.is_err() {
            // Perhaps somebody deleted the image: it is looked at again before the next try.
            self.imports.doubt(&place);
        }
        self.mutated(pass, ActionKind::Create, result)
    }

    pub(super) async fn delete_instance(
        &self,
        pass: &mut Pass<'_, C>,
        scope: &C::Scope,
        id: Option<String>,
    ) -> Outcome {
        if let Err(outcome) = self.drained(pass, ActionKind::Delete).await {
            return outcome;
        }
        let mut instance = self.instance(pass, scope);
        instance.id = id;
        info!(%scope, instance = %instance.name, "deleting instance");
        let result = self.cloud.delete_instance(&instance).await;
        pass.memory.deleting = result.is_ok().then(|| self.clock.now());
        match &result {
            Err(error) if error.kind != ErrorKind::Busy => self.health.stuck(pass.key, error.to_string()),
            _ => self.health.unstuck(pass.key),
        }
        self.mutated(pass, ActionKind::Delete, result)
    }

    /// Notes how a mutation of the cloud ended. Whatever was seen before it no longer counts.
    pub(super) fn mutated(
        &self,
        pass: &mut Pass<'_, C>,
        kind: ActionKind,
        result: Result<(), CloudError>,
    ) -> Outcome {
        pass.memory.mutated = Some(self.clock.now());
        match result {
            Ok(()) => {
                self.health.cloud_works();
                Outcome::Done
            }
            Err(error) => {
                pass.memory.find_next = true;
                self.health.cloud_failed(&error);
                self.failed(pass, kind, error.kind, &error)
            }
        }
    }

    /// The fresh Gets of R13: the request runs, is the same one and carries our finalizer; the claim is ours and unchanged, and
    /// the instance never ran.
    pub(super) async fn agreed(&self, pass: &mut Pass<'_, C>) -> Result<(), Outcome> {
        let request = match read_afresh(&self.state, &self.stores.requests, pass.key).await {
            Ok(request) => request,
            Err(error) => return Err(self.failed(pass, ActionKind::Create, meaning(error.kind), &error)),
        };
        let status = match read_afresh(&self.state, &self.stores.statuses, pass.key).await {
            Ok(status) => status,
            Err(error) => return Err(self.failed(pass, ActionKind::Create, meaning(error.kind), &error)),
        };
        let request_agrees = request
            .as_ref()
            .zip(pass.request.as_ref())
            .is_some_and(|(fresh, known)| {
                fresh.same_incarnation(known)
                    && !fresh.tearing_down()
                    && fresh.metadata.finalizers.contains(&self.identity.controller())
            });
        let status_agrees = status.as_ref().is_some_and(|fresh| {
            !fresh.tearing_down()
                && !fresh.metadata.annotations.contains_key(ANNOTATION_RAN)
                && fresh.spec.stage != crate::omni::kinds::Stage::Provisioned
                && placement::<C::Scope>(fresh).as_ref() == pass.seen.placement()
        });
        if request_agrees && status_agrees {
            // A version that moved since (Omni adds its finalizer) is what the next write has to be based on.
            pass.status = self.stores.statuses.get(pass.key);
            Ok(())
        } else {
            Err(Outcome::Moved)
        }
    }

    /// Waits for a call; shows the step in Omni if the call lasts.
    pub(super) async fn shown_while<T>(
        &self,
        pass: &mut Pass<'_, C>,
        finding: &Finding,
        call: impl Future<Output = T>,
    ) -> T {
        let mut call = std::pin::pin!(call);
        tokio::select! {
            biased;
            result = &mut call => return result,
            () = sleep(self.pace.report_step) => {}
        }
        let (result, _) = tokio::join!(call, self.report(pass, finding));
        result
    }
}
