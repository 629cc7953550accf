//! What every verb of every cloud is wrapped in: a deadline, a bound on calls at once, the rate that the site takes, a pause when told to slow down, a log line.
//!
//! *Not here.* When to look again after a failure: `engine/retry.rs`.

use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::debug;

use super::Cloud;
use super::error::{CloudError, ErrorKind, Result};
use super::rate::Rate;
use super::types::{
    BootProfile, Found, ImageKey, ImageRef, ImageSource, Instance, InstanceRef, InstanceSpec, Legacy, Limits,
    Marked,
};

/// How long a look, a start or a step of a deletion may take. Some of Oxide's calls run a saga inside the request.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long the whole site rests after a 429 that did not say how long.
const REST: Duration = Duration::from_secs(1);

/// A cloud behind its guard.
#[derive(Debug)]
pub struct Guarded<C> {
    cloud: C,
    create_deadline: Duration,
    permits: Semaphore,
    resting_until: Mutex<Option<Instant>>,
    rate: Mutex<Rate>,
}

impl<C: Cloud> Guarded<C> {
    /// Guards a cloud: at most `at_once` calls at a time, creations bounded by `create_deadline`, their waiting included.
    pub fn new(cloud: C, at_once: usize, create_deadline: Duration) -> Self {
        Self {
            cloud,
            create_deadline,
            permits: Semaphore::new(at_once),
            resting_until: Mutex::new(None),
            rate: Mutex::new(Rate::new(Instant::now())),
        }
    }

    /// The cloud itself.
    pub fn inner(&self) -> &C {
        &self.cloud
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        on: &str,
        deadline: Duration,
        call: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        self.rest().await;
        let begun = Instant::now();
        let call = async {
            let slot = self.rate().slot(Instant::now());
            if slot > Instant::now() {
                sleep_until(slot).await;
            }
            // The semaphore is never closed.
            let _permit = self.permits.acquire().await.ok();
            call.await
        };
        // The deadline is asked first: what was not sent before a pause of this process is not sent after it.
        let result = tokio::select! {
            biased;
            () = sleep(deadline) => Err(CloudError::new(
                C::KIND,
                verb,
                ErrorKind::Unavailable,
                format!("{on}: no answer within {} s", deadline.as_secs()),
            )),
            result = call => result,
        };
        match &result {
            Err(error) if matches!(error.kind, ErrorKind::Throttled { .. }) => {
                self.rate().refused(Instant::now());
            }
            Ok(_) | Err(_) => self.rate().answered(Instant::now()),
        }
        if let Err(error) = &result
            && let ErrorKind::Throttled { after } = error.kind
        {
            let until = Instant::now() + after.unwrap_or(REST);
            let mut resting = self.resting_until.lock().unwrap_or_else(PoisonError::into_inner);
            *resting = Some(resting.map_or(until, |earlier| earlier.max(until)));
        }
        debug!(
            verb,
            on,
            result = result.as_ref().map_or_else(|error| error.kind.label(), |_| "ok"),
            millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "cloud call"
        );
        result
    }

    fn rate(&self) -> MutexGuard<'_, Rate> {
        self.rate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the site rests.
    async fn rest(&self) {
        while let Some(until) = self.resting() {
            sleep_until(until).await;
        }
    }

    /// Until when the site rests, if it does.
    fn resting(&self) -> Option<Instant> {
        let mut resting = self.resting_until.lock().unwrap_or_else(PoisonError::into_inner);
        *resting = resting.filter(|until| *until > Instant::now());
        *resting
    }
}

impl<C: Cloud> Cloud for Guarded<C> {
    type Class = C::Class;
    type Scope = C::Scope;

    const KIND: &'static str = C::KIND;
    const LIMITS: Limits = C::LIMITS;

    fn validate(class: &Self::Class) -> Vec<String> {
        C::validate(class)
    }

    fn scopes(class: &Self::Class) -> Vec<Self::Scope> {
        C::scopes(class)
    }

    fn boot(class: &Self::Class) -> BootProfile {
        C::boot(class)
    }

    fn legacy(spec: &[u8]) -> Option<Legacy<Self::Scope>> {
        C::legacy(spec)
    }

    async fn check(&self) -> Result<()> {
        self.call("check", "the site", DEADLINE, self.cloud.check()).await
    }

    async fn find_image(&self, scope: &Self::Scope, key: &ImageKey) -> Result<Option<ImageRef>> {
        self.call(
            "find image",
            &key.schematic,
            DEADLINE,
            self.cloud.find_image(scope, key),
        )
        .await
    }

    /// Without deadline and permit: an import takes as long as its bytes, and must not hold up a teardown.
    async fn import_image(
        &self,
        scope: &Self::Scope,
        key: &ImageKey,
        source: &dyn ImageSource,
    ) -> Result<ImageRef> {
        self.cloud.import_image(scope, key, source).await
    }

    async fn find_instance(&self, instance: &InstanceRef<Self::Scope>) -> Result<Found> {
        self.call(
            "find instance",
            &instance.name,
            DEADLINE,
            self.cloud.find_instance(instance),
        )
        .await
    }

    /// Waiting for its turn counts: what other processes conclude rests on a creation landing within its deadline of the fresh
    /// reads that allowed it, or never. So while the site rests it is refused and not kept waiting.
    async fn create_instance(&self, spec: &InstanceSpec<Self::Scope, Self::Class>) -> Result<()> {
        if let Some(until) = self.resting() {
            let after = Some(until.saturating_duration_since(Instant::now()));
            return Err(CloudError::new(
                C::KIND,
                "create instance",
                ErrorKind::Throttled { after },
                format!("{}: the site rests", spec.instance.name),
            ));
        }
        self.call(
            "create instance",
            &spec.instance.name,
            self.create_deadline,
            self.cloud.create_instance(spec),
        )
        .await
    }

    async fn start_instance(&self, instance: &InstanceRef<Self::Scope>) -> Result<()> {
        self.call(
            "start instance",
            &instance.name,
            DEADLINE,
            self.cloud.start_instance(instance),
        )
        .await
    }

    async fn delete_instance(&self, instance: &InstanceRef<Self::Scope>) -> Result<()> {
        self.call(
            "delete instance",
            &instance.name,
            DEADLINE,
            self.cloud.delete_instance(instance),
        )
        .await
    }

    async fn list_instances(
        &self,
        scope: &Self::Scope,
        provider: &str,
        installation: &str,
    ) -> Result<Vec<Instance>> {
        self.call(
            "list instances",
            &scope.to_string(),
            DEADLINE,
            self.cloud.list_instances(scope, provider, installation),
        )
        .await
    }

    async fn list_scopes(&self) -> Result<Vec<Self::Scope>> {
        self.call("list scopes", "the site", DEADLINE, self.cloud.list_scopes())
            .await
    }

    async fn list_marked(&self, scope: &Self::Scope, provider: &str) -> Result<Vec<Marked>> {
        self.call(
            "list marked",
            &scope.to_string(),
            DEADLINE,
            self.cloud.list_marked(scope, provider),
        )
        .await
    }
}
