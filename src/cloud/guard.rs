//! What every verb of every cloud is wrapped in: a deadline, a bound on calls at once, the rate that
//! its scope takes, a pause when told to slow down, a log line.
//!
//! *Not here.* When to look again after a failure: `engine/retry.rs`.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::debug;

use super::Cloud;
use super::error::{CloudError, ErrorKind, Result};
use super::rate::Rate;
use super::replace::Replace;
use super::types::{
    BootProfile, Console, Found, ImageKey, ImageRef, ImageSource, Instance, InstanceRef, InstanceSpec,
    Legacy, Limits, Marked, Scope, UserData,
};

/// How long a look, a start or a step of a deletion may take. Some of Oxide's calls run a saga inside the request.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long a scope rests after a 429 that did not say how long.
const REST: Duration = Duration::from_secs(1);

/// One in so many of all calls at once may wait for the turn of its scope.
const PATIENT: usize = 8;

/// A cloud behind its guard.
#[derive(Debug)]
pub struct Guarded<C: Cloud> {
    cloud: C,
    create_deadline: Duration,
    permits: Semaphore,
    /// How many may wait in one lane.
    patience: usize,
    lanes: Mutex<Lanes<C::Scope>>,
}

impl<C: Cloud> Guarded<C> {
    /// Guards a cloud: at most `at_once` calls at a time, creations bounded by `create_deadline`, their waiting included.
    pub fn new(cloud: C, at_once: usize, create_deadline: Duration) -> Self {
        Self {
            cloud,
            create_deadline,
            permits: Semaphore::new(at_once),
            patience: (at_once / PATIENT).max(1),
            lanes: Mutex::default(),
        }
    }

    /// The cloud itself.
    pub fn inner(&self) -> &C {
        &self.cloud
    }

    async fn call<T>(
        &self,
        scope: Option<&C::Scope>,
        verb: &'static str,
        on: &str,
        deadline: Duration,
        call: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let turn = self
            .turn(scope)
            .map_err(|wait| resting(C::KIND, verb, on, wait))?;
        let begun = Instant::now();
        let call = async {
            sleep_until(turn.slot).await;
            drop(turn);
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
        self.note(scope, &result);
        debug!(
            verb,
            on,
            result = result.as_ref().map_or_else(|error| error.kind.label(), |_| "ok"),
            millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "cloud call"
        );
        result
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes<C::Scope>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn in the scope's lane; if too many wait there already, or it rests for long, how long to stay away. Who waits keeps a
    /// worker from the other scopes.
    fn turn(&self, scope: Option<&C::Scope>) -> std::result::Result<Turn<'_, C::Scope>, Duration> {
        let now = Instant::now();
        let mut lanes = self.lanes();
        let lane = lanes.entry(scope.cloned()).or_insert_with(|| Lane::new(now));
        let rested = lane.rest(now).unwrap_or(now);
        let rest = rested.duration_since(now);
        let waits = !rest.is_zero() || lane.rate.is_busy(now);
        if rest > REST || (waits && lane.waiting >= self.patience) {
            return Err(rest.max(REST));
        }
        lane.waiting += 1;
        Ok(Turn {
            slot: lane.rate.slot(rested),
            lanes: &self.lanes,
            scope: scope.cloned(),
        })
    }

    fn note<T>(&self, scope: Option<&C::Scope>, result: &Result<T>) {
        let now = Instant::now();
        let mut lanes = self.lanes();
        let lane = lanes.entry(scope.cloned()).or_insert_with(|| Lane::new(now));
        match result {
            Err(CloudError {
                kind: ErrorKind::Throttled { after },
                ..
            }) => {
                lane.rate.refused(now);
                let until = now + after.unwrap_or(REST);
                lane.resting = lane.resting.max(Some(until));
            }
            Ok(_) | Err(_) => lane.rate.answered(now),
        }
    }
}

/// How one scope is driven; a site without its scopes has a lane as well.
#[derive(Debug)]
struct Lane {
    resting: Option<Instant>,
    rate: Rate,
    waiting: usize,
}

type Lanes<S> = HashMap<Option<S>, Lane>;

impl Lane {
    fn new(now: Instant) -> Self {
        Self {
            resting: None,
            rate: Rate::new(now),
            waiting: 0,
        }
    }

    /// Until when it rests, if it does.
    fn rest(&mut self, now: Instant) -> Option<Instant> {
        self.resting = self.resting.filter(|until| *until > now);
        self.resting
    }
}

/// One who waits in a lane, until dropped.
#[derive(Debug)]
struct Turn<'a, S: Scope> {
    slot: Instant,
    lanes: &'a Mutex<Lanes<S>>,
    scope: Option<S>,
}

impl<S: Scope> Drop for Turn<'_, S> {
    fn drop(&mut self) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get_mut(&self.scope) {
            lane.waiting = lane.waiting.saturating_sub(1);
        }
    }
}

fn resting(cloud: &'static str, verb: &'static str, on: &str, wait: Duration) -> CloudError {
    let kind = ErrorKind::Throttled { after: Some(wait) };
    CloudError::new(
        cloud,
        verb,
        kind,
        format!("{on}: it has been told to slow down, and waits for its turn"),
    )
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

    fn replace(class: &Self::Class) -> Replace {
        C::replace(class)
    }

    fn legacy(spec: &[u8]) -> Option<Legacy<Self::Scope>> {
        C::legacy(spec)
    }

    async fn check(&self) -> Result<()> {
        self.call(None, "check", "the site", DEADLINE, self.cloud.check())
            .await
    }

    async fn find_image(&self, scope: &Self::Scope, key: &ImageKey) -> Result<Option<ImageRef>> {
        self.call(
            Some(scope),
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
            Some(&instance.scope),
            "find instance",
            &instance.name,
            DEADLINE,
            self.cloud.find_instance(instance),
        )
        .await
    }

    /// Waiting for its turn counts: what other processes conclude rests on a creation landing within its deadline of the fresh
    /// reads that allowed it, or never. So while the scope rests it is refused and not kept waiting.
    async fn create_instance(&self, spec: &InstanceSpec<Self::Scope, Self::Class>) -> Result<()> {
        let (scope, name) = (&spec.instance.scope, &spec.instance.name);
        let now = Instant::now();
        let rest = self
            .lanes()
            .get_mut(&Some(scope.clone()))
            .and_then(|lane| lane.rest(now));
        if let Some(until) = rest {
            let wait = until.duration_since(now);
            return Err(resting(C::KIND, "create instance", name, wait));
        }
        self.call(
            Some(scope),
            "create instance",
            &spec.instance.name,
            self.create_deadline,
            self.cloud.create_instance(spec),
        )
        .await
    }

    async fn start_instance(&self, instance: &InstanceRef<Self::Scope>, user_data: &UserData) -> Result<()> {
        self.call(
            Some(&instance.scope),
            "start instance",
            &instance.name,
            DEADLINE,
            self.cloud.start_instance(instance, user_data),
        )
        .await
    }

    async fn delete_instance(&self, instance: &InstanceRef<Self::Scope>) -> Result<()> {
        self.call(
            Some(&instance.scope),
            "delete instance",
            &instance.name,
            DEADLINE,
            self.cloud.delete_instance(instance),
        )
        .await
    }

    async fn read_console(&self, instance: &InstanceRef<Self::Scope>) -> Result<Option<Console>> {
        self.call(
            Some(&instance.scope),
            "read console",
            &instance.name,
            DEADLINE,
            self.cloud.read_console(instance),
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
            Some(scope),
            "list instances",
            &scope.to_string(),
            DEADLINE,
            self.cloud.list_instances(scope, provider, installation),
        )
        .await
    }

    async fn list_scopes(&self) -> Result<Vec<Self::Scope>> {
        self.call(
            None,
            "list scopes",
            "the site",
            DEADLINE,
            self.cloud.list_scopes(),
        )
        .await
    }

    async fn list_marked(&self, scope: &Self::Scope, provider: &str) -> Result<Vec<Marked>> {
        self.call(
            Some(scope),
            "list marked",
            &scope.to_string(),
            DEADLINE,
            self.cloud.list_marked(scope, provider),
        )
        .await
    }
}
