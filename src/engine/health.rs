//! Registers the provider, and tells Omni every few seconds that it lives and what ails it: worst news first, in a sentence.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::{Duration, MissedTickBehavior, interval};
use tracing::{info, warn};
use uuid::Uuid;

use crate::cloud::{Cloud, CloudError, ErrorKind, Guarded};
use crate::omni::kinds::{
    InfraProviderHealthStatusSpec, InfraProviderHealthStatuses, InfraProviderStatusSpec,
    InfraProviderStatuses,
};
use crate::omni::{OmniError, OmniErrorKind, Phase, Resource, State};

use super::clock::Clock;
use super::queue::Key;

/// The installation, on our InfraProviderStatus.
pub const ANNOTATION_INSTALLATION: &str = "omni-infra-provider/installation";

/// Every so many heartbeats the cloud is asked whether endpoint and credentials are good.
const CHECK_EVERY: u32 = 6;

/// What ails the provider.
#[derive(Debug, Default)]
pub struct Health {
    ailments: Mutex<Ailments>,
}

#[derive(Debug, Default)]
struct Ailments {
    /// The cloud refuses us as a whole.
    denied: Option<String>,
    /// Why machines cannot be deleted, or not worked on at all, by request: on the way out Omni has no other place that would show it.
    stuck: BTreeMap<Key, String>,
    /// What there is to say of instances that no request wants.
    orphans: Option<String>,
}

impl Health {
    /// A call to the cloud failed; only what concerns the provider as a whole is kept.
    pub fn cloud_failed(&self, error: &CloudError) {
        if error.kind == ErrorKind::Denied {
            self.lock().denied = Some(error.to_string());
        }
    }

    /// The cloud took a mutation.
    pub fn cloud_works(&self) {
        self.lock().denied = None;
    }

    /// A deletion failed.
    pub fn stuck(&self, key: &str, cause: String) {
        self.lock().stuck.insert(key.to_owned(), cause);
    }

    /// A deletion went on, or nothing is left to delete.
    pub fn unstuck(&self, key: &str) {
        self.lock().stuck.remove(key);
    }

    /// What there is to say of instances that no request wants; `None` where there are none.
    pub fn orphans(&self, sentence: Option<String>) {
        self.lock().orphans = sentence;
    }

    fn lock(&self) -> MutexGuard<'_, Ailments> {
        self.ailments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sentence for Omni; empty when healthy.
    #[must_use]
    pub fn sentence(&self) -> String {
        let ailments = self.lock();
        if let Some(denied) = &ailments.denied {
            return denied.clone();
        }
        let Some((key, cause)) = ailments.stuck.first_key_value() else {
            return ailments.orphans.clone().unwrap_or_default();
        };
        match ailments.stuck.len() - 1 {
            0 => format!("{key} is stuck: {cause}"),
            more => format!("{key} and {more} more are stuck: {cause}"),
        }
    }
}

/// Registers the provider and returns its installation, made at the first registration.
///
/// This is the first write of the daemon: where it is refused, nothing else is tried.
///
/// # Errors
///
/// As Omni says.
pub async fn register(state: &State, spec: &InfraProviderStatusSpec) -> Result<String, OmniError> {
    loop {
        let held = state.get::<InfraProviderStatuses>(state.provider()).await?;
        let mut wanted = held
            .clone()
            .unwrap_or_else(|| Resource::new(state.provider(), spec.clone()));
        wanted.spec = spec.clone();
        let installation = wanted
            .metadata
            .annotations
            .entry(ANNOTATION_INSTALLATION.to_owned())
            .or_insert_with(|| Uuid::new_v4().to_string())
            .clone();
        let result = match &held {
            Some(held) if held.spec == wanted.spec && held.metadata == wanted.metadata => {
                return Ok(installation);
            }
            Some(_) => state.update(&wanted, Some(Phase::Running)).await,
            None => state.create(&wanted).await,
        };
        match result {
            Ok(_) => {
                info!(installation, "registered with Omni");
                return Ok(installation);
            }
            // Another daemon of the same ID was faster: its installation is ours too.
            Err(error) if matches!(error.kind, OmniErrorKind::Conflict | OmniErrorKind::AlreadyExists) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Beats for ever.
pub async fn beat<C: Cloud>(
    state: &State,
    cloud: &Guarded<C>,
    health: &Health,
    clock: Clock,
    every: Duration,
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut beats = 0;
    let mut lost = false;
    loop {
        ticks.tick().await;
        if beats % CHECK_EVERY == 0 {
            match cloud.check().await {
                Ok(()) => health.cloud_works(),
                Err(error) => health.lock().denied = Some(error.to_string()),
            }
        }
        beats = beats.wrapping_add(1);
        let spec = InfraProviderHealthStatusSpec {
            last_heartbeat: clock.now(),
            error: health.sentence(),
        };
        match beat_once(state, spec).await {
            Ok(()) if lost => {
                lost = false;
                info!("heartbeats reach Omni again");
            }
            Ok(()) => {}
            Err(error) if !lost => {
                lost = true;
                warn!(%error, "heartbeats do not reach Omni");
            }
            Err(_) => {}
        }
    }
}

/// The resource lives in Omni's memory: after a restart of Omni it is made anew.
async fn beat_once(state: &State, spec: InfraProviderHealthStatusSpec) -> Result<(), OmniError> {
    match state.get::<InfraProviderHealthStatuses>(state.provider()).await? {
        Some(mut held) => {
            held.spec = spec;
            state.update(&held, Some(Phase::Running)).await?;
        }
        None => {
            let mut new: Resource<InfraProviderHealthStatuses> = Resource::new(state.provider(), spec);
            new.metadata.owner = format!("{}.ProviderHealthStatusController", state.provider());
            state.create(&new).await?;
        }
    }
    Ok(())
}
