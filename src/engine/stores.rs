//! Everything that Omni tells us, cached by watches: a pass costs Omni no read.

use std::sync::Arc;

use futures_util::future::join;

use crate::machine::release::{ANNOTATION_RELEASED, released_requests};
use crate::omni::kinds::{
    ConfigPatchRequests, InfraProviderStatuses, LABEL_REQUEST, MachineRegistrations, MachineRequestStatuses,
    MachineRequests, MachineResources,
};
use crate::omni::store::OnChange;
use crate::omni::{Kind, OmniError, Resource, State, Store};

/// The stores of one provider. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stores {
    /// What Omni asks for.
    pub requests: Store<MachineRequests>,
    /// Our answers, and in them the claims.
    pub statuses: Store<MachineRequestStatuses>,
    /// The patches that we wrote.
    pub patches: Store<ConfigPatchRequests>,
    /// The machines that joined.
    pub registrations: Store<MachineRegistrations>,
    /// What the Go provider left, if it was here before us.
    pub machine_resources: Store<MachineResources>,
    /// Our registration, and on it what operators took back.
    pub registration: Store<InfraProviderStatuses>,
}

impl Stores {
    /// Empty stores.
    #[must_use]
    pub fn new(state: &State) -> Self {
        Self {
            requests: Store::new(state.clone(), by_id),
            statuses: Store::new(state.clone(), by_id),
            patches: Store::new(state.clone(), by_request),
            registrations: Store::new(state.clone(), by_request),
            machine_resources: Store::new(state.clone(), by_id),
            registration: Store::new(state.clone(), by_id),
        }
    }

    /// Watches for ever; `on_change` hears the request's ID of every change that others made.
    pub async fn run(&self, on_change: OnChange) {
        let requests = self.requests.clone().run(on_change.clone());
        let statuses = self.statuses.clone().run(on_change.clone());
        let patches = self.patches.clone().run(on_change.clone());
        let registrations = self.registrations.clone().run(on_change.clone());
        let machine_resources = self.machine_resources.clone().run(on_change.clone());
        let held = self.registration.clone();
        let registration = self.registration.clone().run(Arc::new(move |provider: &str| {
            let released = held.get(provider).map(|registration| {
                released_requests(registration.metadata.annotations.get(ANNOTATION_RELEASED))
            });
            for request in released.unwrap_or_default() {
                on_change(&request);
            }
        }));
        let answers = join(statuses, patches);
        let others = join(join(registrations, machine_resources), registration);
        join(requests, join(answers, others)).await;
    }

    /// Waits until every store has seen everything that existed: before that, nothing may be concluded.
    pub async fn bootstrapped(&self) {
        self.requests.bootstrapped().await;
        self.statuses.bootstrapped().await;
        self.patches.bootstrapped().await;
        self.registrations.bootstrapped().await;
        self.machine_resources.bootstrapped().await;
        self.registration.bootstrapped().await;
    }

    /// Whether every watch is up right now and shows everything.
    #[must_use]
    pub fn are_current(&self) -> bool {
        self.requests.is_current()
            && self.statuses.is_current()
            && self.patches.is_current()
            && self.registrations.is_current()
            && self.machine_resources.is_current()
            && self.registration.is_current()
    }

    /// Every request of which anything exists.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = Vec::new();
        keys.extend(self.requests.all().iter().map(|r| r.id().to_owned()));
        keys.extend(self.statuses.all().iter().map(|r| r.id().to_owned()));
        keys.extend(self.machine_resources.all().iter().map(|r| r.id().to_owned()));
        keys.extend(self.patches.all().iter().filter_map(|r| by_request(r)));
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

fn by_id<K: Kind>(resource: &Resource<K>) -> Option<String> {
    Some(resource.id().to_owned())
}

fn by_request<K: Kind>(resource: &Resource<K>) -> Option<String> {
    resource.metadata.labels.get(LABEL_REQUEST).cloned()
}

/// Reads a resource afresh and takes the answer in.
pub(super) async fn read_afresh<K: Kind>(
    state: &State,
    store: &Store<K>,
    id: &str,
) -> Result<Option<Resource<K>>, OmniError> {
    // An absence ends what was known before the Get, not what arrives while it is under way.
    let known = store.get(id);
    let answer = state.get::<K>(id).await?;
    match (&answer, known) {
        (Some(fresh), _) => store.put(fresh.clone()),
        (None, Some(known)) if !is_served_from_a_cache::<K>() => store.remove(&known),
        (None, _) => store.put_absent(id),
    }
    Ok(answer)
}

/// Omni answers Gets of patches from a cache that lags behind its store: absence there proves nothing, and only a watch or our
/// own Destroy shows that one is gone.
fn is_served_from_a_cache<K: Kind>() -> bool {
    K::NAME == ConfigPatchRequests::NAME
}
