//! What is there of an instance: a few askers get a find each, a crowd in one scope is answered by one list.
//!
//! *Guarantees.* Every answer comes from a look that was begun no earlier than the asker demands. A look that failed is Unknown.
//!
//! *Cancel safety.* An asker may be dropped at any time; a list that it was making is made by the next.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cloud::{Cloud, CloudError, Found, Guarded, Instance, InstanceRef, Timestamp};
use crate::machine::observed::By;

use super::clock::Clock;

/// From this many finds under way in one scope on, the next asker makes a list for all.
const CROWD: usize = 4;

/// More finds than this in one [`WINDOW`] and scope, and a patient asker makes a list.
const OFTEN: usize = 16;

/// Over which finds are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// Everything of ours in one scope, at one moment.
#[derive(Debug)]
struct Snapshot {
    begun: Timestamp,
    /// By name.
    instances: Vec<Arc<Instance>>,
}

#[derive(Debug, Default)]
struct Scoped {
    snapshot: Option<Arc<Snapshot>>,
    finding: usize,
    finds: usize,
    window: Timestamp,
    listing: Arc<tokio::sync::Mutex<()>>,
}

/// An answer: what was found, how, and when the look was begun.
pub type Answer = (Found, By, Timestamp);

/// The inventory of one site.
#[derive(Debug)]
pub struct Inventory<C: Cloud> {
    cloud: Arc<Guarded<C>>,
    clock: Clock,
    provider: String,
    installation: String,
    scopes: Mutex<HashMap<C::Scope, Scoped>>,
}

impl<C: Cloud> Inventory<C> {
    /// An inventory that knows nothing yet.
    pub fn new(cloud: Arc<Guarded<C>>, clock: Clock, provider: String, installation: String) -> Self {
        Self {
            cloud,
            clock,
            provider,
            installation,
            scopes: Mutex::new(HashMap::new()),
        }
    }

    /// A look of its own, begun now.
    ///
    /// # Errors
    ///
    /// As [`Cloud::find_instance`].
    pub async fn find(&self, instance: &InstanceRef<C::Scope>) -> Result<Answer, CloudError> {
        let begun = self.clock.now();
        let finding = Finding::begin(self, &instance.scope, begun);
        let found = self.cloud.find_instance(instance).await?;
        drop(finding);
        Ok((found, By::Find, begun))
    }

    /// A look that was begun no earlier than `no_older`. `patient` askers have nothing under way and take a list rather than
    /// make one find after the other.
    ///
    /// # Errors
    ///
    /// As [`Cloud::find_instance`] or [`Cloud::list_instances`].
    pub async fn look(
        &self,
        instance: &InstanceRef<C::Scope>,
        no_older: Timestamp,
        patient: bool,
    ) -> Result<Answer, CloudError> {
        if let Some(snapshot) = self.snapshot(&instance.scope, no_older) {
            return Ok(answer(&snapshot, instance));
        }
        let listing = {
            let mut scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
            let scoped = scopes.entry(instance.scope.clone()).or_default();
            let crowded = scoped.finding >= CROWD
                || scoped.listing.try_lock().is_err()
                || (patient && scoped.finds >= OFTEN && self.clock.age(scoped.window) < WINDOW);
            crowded.then(|| scoped.listing.clone())
        };
        let Some(listing) = listing else {
            return self.find(instance).await;
        };
        let turn = listing.lock().await;
        // The one before us may have made the list that we need.
        if let Some(snapshot) = self.snapshot(&instance.scope, no_older) {
            return Ok(answer(&snapshot, instance));
        }
        let begun = self.clock.now();
        let listed = self
            .cloud
            .list_instances(&instance.scope, &self.provider, &self.installation)
            .await?;
        let mut instances: Vec<Arc<Instance>> = listed.into_iter().map(Arc::new).collect();
        instances.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        let snapshot = Arc::new(Snapshot { begun, instances });
        self.scopes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(instance.scope.clone())
            .or_default()
            .snapshot = Some(snapshot.clone());
        drop(turn);
        Ok(answer(&snapshot, instance))
    }

    fn snapshot(&self, scope: &C::Scope, no_older: Timestamp) -> Option<Arc<Snapshot>> {
        let scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = scopes.get(scope)?.snapshot.as_ref()?;
        (snapshot.begun >= no_older).then(|| snapshot.clone())
    }
}

/// Counts a find while it lasts, however it ends.
struct Finding<'a, C: Cloud> {
    inventory: &'a Inventory<C>,
    scope: &'a C::Scope,
}

impl<'a, C: Cloud> Finding<'a, C> {
    fn begin(inventory: &'a Inventory<C>, scope: &'a C::Scope, now: Timestamp) -> Self {
        let mut scopes = inventory.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        let scoped = scopes.entry(scope.clone()).or_default();
        scoped.finding += 1;
        if now.since(scoped.window) >= WINDOW {
            scoped.window = now;
            scoped.finds = 0;
        }
        scoped.finds += 1;
        Self { inventory, scope }
    }
}

impl<C: Cloud> Drop for Finding<'_, C> {
    fn drop(&mut self) {
        let mut scopes = self
            .inventory
            .scopes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(scoped) = scopes.get_mut(self.scope) {
            scoped.finding = scoped.finding.saturating_sub(1);
        }
    }
}

/// What a list says of one instance. A list knows no leftovers and no strangers: absence in it is for a find to confirm
/// wherever it would cost something.
fn answer<S>(snapshot: &Snapshot, instance: &InstanceRef<S>) -> Answer {
    let instances = &snapshot.instances;
    let place = instances.binary_search_by(|listed| listed.name.cmp(&instance.name));
    let found = match place.ok().and_then(|place| instances.get(place)) {
        Some(found)
            if found
                .mark
                .as_ref()
                .map_or(instance.adopt_bare, |mark| *mark == instance.mark) =>
        {
            Found::Ours(found.clone())
        }
        _ => Found::Nothing,
    };
    (found, By::List, snapshot.begun)
}
