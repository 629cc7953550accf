//! The simulated cloud over a bad line: calls fail before or after their effect, answers are late, lists are stale. What was
//! sent takes effect even if nobody waits for the answer any more.

use std::sync::Arc;
use std::time::Duration;

use omni_infra_provider::backends::sim::{Sim, SimClass, Zone};
use omni_infra_provider::cloud::{
    BootProfile, BoxFuture, Cloud, CloudError, Console, ErrorKind, Found, ImageKey, ImageRef, ImageSource,
    ImageStream, Instance, InstanceRef, InstanceSpec, Legacy, Limits, Marked, Replace, Result, UserData,
};
use tokio::time::sleep;

use super::gate::Gate;
use super::script::CloudTrouble;
use super::watchman::Watchman;

/// One daemon's way to the cloud.
#[derive(Clone)]
pub(super) struct Rough {
    pub(super) sim: Sim,
    pub(super) gate: Gate,
    pub(super) watchman: Arc<Watchman>,
    /// Which daemon, for the trace.
    pub(super) daemon: usize,
}

impl Rough {
    /// Sends one call, which takes effect in a task of its own, and waits for the answer.
    async fn call<T: Send + 'static>(
        &self,
        verb: &'static str,
        on: &str,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.gate.pass().await;
        let trouble = self.watchman.cloud_trouble(verb);
        self.watchman
            .trace(|| format!("daemon {} {verb} {on} {trouble:?}", self.daemon));
        let fault = |kind, what: &str| Err(CloudError::new("sim", verb, kind, format!("{on}: {what}")));
        let (before, after) = match trouble {
            Some(CloudTrouble::Fails(kind)) => return fault(kind, "as told"),
            Some(CloudTrouble::Slow(late)) => (late, Duration::ZERO),
            Some(CloudTrouble::SlowAnswer(late)) => (Duration::ZERO, late),
            Some(CloudTrouble::Lost | CloudTrouble::Stale(_)) | None => Default::default(),
        };
        let watchman = self.watchman.clone();
        let flight = watchman.takes_off();
        let sent = tokio::spawn(async move {
            if !before.is_zero() {
                sleep(before).await;
            }
            let result = call.await;
            // At once: nothing else may happen between the effect and the check.
            watchman.check_cloud();
            drop(flight);
            result
        });
        let result = sent.await.unwrap();
        if !after.is_zero() {
            sleep(after).await;
        }
        self.gate.pass().await;
        if trouble == Some(CloudTrouble::Lost) {
            return fault(ErrorKind::Unavailable, "the answer was lost");
        }
        result
    }
}

impl Cloud for Rough {
    type Class = SimClass;
    type Scope = Zone;

    const KIND: &'static str = Sim::KIND;
    const LIMITS: Limits = Sim::LIMITS;

    fn validate(class: &SimClass) -> Vec<String> {
        Sim::validate(class)
    }

    fn scopes(class: &SimClass) -> Vec<Zone> {
        Sim::scopes(class)
    }

    fn boot(class: &SimClass) -> BootProfile {
        Sim::boot(class)
    }

    fn replace(class: &SimClass) -> Replace {
        Sim::replace(class)
    }

    fn legacy(spec: &[u8]) -> Option<Legacy<Zone>> {
        Sim::legacy(spec)
    }

    async fn check(&self) -> Result<()> {
        let sim = self.sim.clone();
        self.call("check", "", async move { sim.check().await }).await
    }

    async fn find_image(&self, scope: &Zone, key: &ImageKey) -> Result<Option<ImageRef>> {
        let (sim, scope, key) = (self.sim.clone(), scope.clone(), key.clone());
        self.call(
            "find image",
            "",
            async move { sim.find_image(&scope, &key).await },
        )
        .await
    }

    async fn import_image(
        &self,
        scope: &Zone,
        key: &ImageKey,
        _source: &dyn ImageSource,
    ) -> Result<ImageRef> {
        let (sim, scope, key) = (self.sim.clone(), scope.clone(), key.clone());
        self.call("import image", "", async move {
            sim.import_image(&scope, &key, &Nowhere).await
        })
        .await
    }

    async fn find_instance(&self, instance: &InstanceRef<Zone>) -> Result<Found> {
        let (sim, instance) = (self.sim.clone(), instance.clone());
        let name = instance.name.clone();
        self.call("find instance", &name, async move {
            sim.find_instance(&instance).await
        })
        .await
    }

    async fn create_instance(&self, spec: &InstanceSpec<Zone, SimClass>) -> Result<()> {
        let (sim, spec) = (self.sim.clone(), spec.clone());
        let name = spec.instance.name.clone();
        self.call("create instance", &name, async move {
            sim.create_instance(&spec).await
        })
        .await
    }

    async fn start_instance(&self, instance: &InstanceRef<Zone>, user_data: &UserData) -> Result<()> {
        let (sim, instance, user_data) = (self.sim.clone(), instance.clone(), user_data.clone());
        let name = instance.name.clone();
        self.call("start instance", &name, async move {
            sim.start_instance(&instance, &user_data).await
        })
        .await
    }

    async fn read_console(&self, instance: &InstanceRef<Zone>) -> Result<Option<Console>> {
        self.sim.read_console(instance).await
    }

    async fn delete_instance(&self, instance: &InstanceRef<Zone>) -> Result<()> {
        let (sim, instance) = (self.sim.clone(), instance.clone());
        let name = instance.name.clone();
        self.call("delete instance", &name, async move {
            sim.delete_instance(&instance).await
        })
        .await
    }

    async fn list_instances(
        &self,
        scope: &Zone,
        provider: &str,
        installation: &str,
    ) -> Result<Vec<Instance>> {
        let sim = self.sim.clone();
        let (place, provider, installation) = (scope.clone(), provider.to_owned(), installation.to_owned());
        let stale = self.watchman.stale_list();
        let mut listed = self
            .call("list instances", &scope.0, async move {
                sim.list_instances(&place, &provider, &installation).await
            })
            .await?;
        if let Some(age) = stale {
            listed.retain(|instance| !self.watchman.is_younger(&instance.name, age));
        }
        Ok(listed)
    }

    async fn list_scopes(&self) -> Result<Vec<Zone>> {
        let sim = self.sim.clone();
        self.call("list scopes", "", async move { sim.list_scopes().await })
            .await
    }

    async fn list_marked(&self, scope: &Zone, provider: &str) -> Result<Vec<Marked>> {
        let sim = self.sim.clone();
        let (place, provider) = (scope.clone(), provider.to_owned());
        self.call("list marked", &scope.0, async move {
            sim.list_marked(&place, &provider).await
        })
        .await
    }
}

/// The simulated cloud reads no bytes of an image.
struct Nowhere;

impl ImageSource for Nowhere {
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>> {
        Box::pin(std::future::pending())
    }
}
