//! The contract: what the engine asks of a cloud, and what a cloud promises.
//!
//! A backend has verbs; it owns no policy. It does not sleep, loop until something happens, or repeat a mutation: the engine
//! looks again. Everything that a backend has to promise is a law below, and each law is a conformance test.

use std::fmt::Debug;
use std::future::Future;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

pub mod class;
pub mod error;
pub mod guard;
mod rate;
pub mod replace;
pub mod schema;
pub mod shared;
pub mod types;

pub use error::{CloudError, ErrorKind, Result};
pub use guard::Guarded;
pub use replace::Replace;
pub use shared::Shared;
pub use types::{
    BootProfile, BoxFuture, Console, Found, ImageKey, ImageRef, ImageSource, ImageStream, Instance,
    InstanceRef, InstanceSpec, InstanceState, Legacy, Limits, Mark, Marked, Scope, Timestamp, UserData,
};

/// One site of one cloud: the verbs the engine needs, and nothing else.
///
/// # Laws
///
///  1. `create_instance` twice with one spec makes one instance.
///  2. What is created is found, by name, until it is gone; it carries our mark, class and user data unchanged.
///  3. `delete_instance` advances by at least one step, or says Busy; nothing there is Ok; repeated, it reaches Nothing. Without
///     a vendor ID it removes leftovers only, never an instance.
///  4. `find_instance` is `Nothing` only when nothing of it is left, no disk, address or interface, and we were allowed to look;
///     what is left of it without an instance is `Remains`; a creation in flight is `Ours`, starting.
///  5. `list_instances` returns all of ours in the scope and none of anybody else's (the Go provider's bare sentence: with no
///     mark, never an orphan).
///  6. A name taken by something without our mark is `Foreign`, never adopted, never deleted. Ours > Remains > Foreign: a
///     stranger never hides our leftovers.
///  7. An import sweeps its own leftovers first; two at once leave one image; a cut-off one can be repeated.
///  8. Every failure has the right [`ErrorKind`]; not-found is never an error, not-allowed never looks like not-found.
///  9. Names at the limit work; user data at the limit arrives.
/// 10. Any future may be dropped at any await; the next call converges.
/// 11. `list_marked` returns every instance that carries a mark of the provider ID, whatever the installation, and what is left of
///     such instances, once for each; `list_scopes` every scope that can be looked into. What could not be seen is an error.
pub trait Cloud: Send + Sync + 'static {
    /// What a user writes as provider data in a machine class.
    type Class: DeserializeOwned + JsonSchema + Clone + Debug + Send + Sync;
    /// Where names are unique.
    type Scope: Scope;

    /// Metric label, scheme of the node provider ID, feature name.
    const KIND: &'static str;
    /// Limits of names and user data.
    const LIMITS: Limits;

    /// Checks what the schema cannot say. One sentence for each fault, each naming its field; nothing is asked of the cloud.
    fn validate(class: &Self::Class) -> Vec<String>;
    /// The scopes that a class allows, in the order to try; most have one.
    fn scopes(class: &Self::Class) -> Vec<Self::Scope>;
    /// What the class boots.
    fn boot(class: &Self::Class) -> BootProfile;
    /// Which lost machines of the class are replaced without being asked for.
    fn replace(class: &Self::Class) -> Replace;
    /// Reads the Go library's machine resource; most clouds have none.
    fn legacy(spec: &[u8]) -> Option<Legacy<Self::Scope>>;

    /// Cheap and authenticated: are the endpoint and the credentials good?
    fn check(&self) -> impl Future<Output = Result<()>> + Send;

    /// The image of this key, if the scope can boot it.
    fn find_image(
        &self,
        scope: &Self::Scope,
        key: &ImageKey,
    ) -> impl Future<Output = Result<Option<ImageRef>>> + Send;

    /// Brings the image into the scope. Long; runs beside the queue. Sweeps what an earlier, cut-off import left.
    fn import_image(
        &self,
        scope: &Self::Scope,
        key: &ImageKey,
        source: &dyn ImageSource,
    ) -> impl Future<Output = Result<ImageRef>> + Send;

    /// What is there of this instance.
    fn find_instance(
        &self,
        instance: &InstanceRef<Self::Scope>,
    ) -> impl Future<Output = Result<Found>> + Send;

    /// Asks for the instance; returns when the cloud has accepted. Where the cloud can, it is created stopped. The truth is the
    /// next `find_instance`.
    fn create_instance(
        &self,
        spec: &InstanceSpec<Self::Scope, Self::Class>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Starts a stopped instance. Starting a running one is Ok. `user_data` is what the creation was given, rendered anew: for a
    /// cloud that keeps none, and hands it to the machine while it boots.
    fn start_instance(
        &self,
        instance: &InstanceRef<Self::Scope>,
        user_data: &UserData,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Takes one step of the way to nothing: stop, delete, remove what is left.
    fn delete_instance(&self, instance: &InstanceRef<Self::Scope>)
    -> impl Future<Output = Result<()>> + Send;

    /// The last few KiB of the instance's serial console since it was started; `None` where the cloud keeps none, or none of this
    /// instance as it is now. Asked for people alone: nothing is decided by it.
    fn read_console(
        &self,
        instance: &InstanceRef<Self::Scope>,
    ) -> impl Future<Output = Result<Option<Console>>> + Send;

    /// Every instance of this provider and installation in the scope, all pages.
    fn list_instances(
        &self,
        scope: &Self::Scope,
        provider: &str,
        installation: &str,
    ) -> impl Future<Output = Result<Vec<Instance>>> + Send;

    /// Every scope of the site that we may look into.
    fn list_scopes(&self) -> impl Future<Output = Result<Vec<Self::Scope>>> + Send;

    /// Everything in the scope that carries a mark of this provider ID, of any installation, all pages.
    fn list_marked(
        &self,
        scope: &Self::Scope,
        provider: &str,
    ) -> impl Future<Output = Result<Vec<Marked>>> + Send;
}
