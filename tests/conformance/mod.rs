//! The laws of `Cloud`, once, for every cloud: each law is a test of each cloud's door.
//!
//! A door is what the suite needs besides the contract: strangers' things, a look at what is left that does not go through the
//! backend, and requests that must fail. A cloud whose door cannot be opened here is left out by the door, which says so.

use std::fmt::Debug;
use std::time::Duration;

use omni_infra_provider::cloud::{
    Cloud, CloudError, ErrorKind, Found, ImageKey, ImageRef, Instance, InstanceRef, InstanceSpec,
    InstanceState, Mark, UserData,
};
use tokio::time::{Instant, sleep};

pub(crate) mod laws;
mod oxide;
mod sim;
mod source;

/// Between two looks. A real cloud has a process for each.
const STEP: Duration = Duration::from_millis(300);
/// No step of any cloud takes longer; a guard against hanging.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) type Class<D> = <<D as Door>::Cloud as Cloud>::Class;
pub(crate) type Scope<D> = <<D as Door>::Cloud as Cloud>::Scope;
pub(crate) type Ref<D> = InstanceRef<Scope<D>>;
pub(crate) type Spec<D> = InstanceSpec<Scope<D>, Class<D>>;

/// A cloud, and the way into it that its vendor gives.
pub(crate) trait Door: Sized {
    /// The backend.
    type Cloud: Cloud;

    /// Opens it; `None`: not on this machine, and it was said.
    async fn open() -> Option<Self>;
    /// The backend with all rights.
    fn cloud(&self) -> &Self::Cloud;
    /// Another backend for the same cloud, as another process has it.
    fn another(&self) -> Self::Cloud;
    /// A backend whose credentials are refused.
    async fn refused(&self) -> Self::Cloud;
    /// A backend whose endpoint nobody serves.
    async fn unreachable(&self) -> Self::Cloud;
    /// A class that works.
    fn class(&self) -> Class<Self>;
    /// Classes that refer to what does not exist.
    fn impossible_classes(&self) -> Vec<Class<Self>>;
    /// Classes that ask for more than there is.
    fn huge_classes(&self) -> Vec<Class<Self>>;
    /// Two scopes. The class works in the first.
    fn scopes(&self) -> [Scope<Self>; 2];
    /// Somebody else makes an instance.
    async fn plant_stranger(&self, name: &str);
    /// Somebody else removes it, if it is there; false if it is not.
    async fn remove_stranger(&self, name: &str) -> bool;
    /// All that exists of this name, by the vendor's own door: instances, disks, addresses.
    async fn left(&self, name: &str) -> Vec<String>;
    /// Fails unless the instance is as the class says, by the vendor's own door.
    async fn assert_as_asked(&self, spec: &Spec<Self>);
    /// The user data that its machine would read; `None` where this boot needs none.
    async fn user_data(&self, name: &str) -> Option<Vec<u8>>;
    /// How many images of that key there are.
    async fn images(&self, key: &ImageKey) -> usize;
}

/// A name that no earlier run used: what they left must not be met.
fn fresh(name: &str) -> String {
    format!("{name}-{:06x}", rand::random::<u32>() & 0xff_ffff)
}

fn asked<D: Door>(door: &D, name: &str) -> Ref<D> {
    InstanceRef {
        scope: door.scopes()[0].clone(),
        name: name.to_owned(),
        id: None,
        mark: Mark {
            provider: "conformance".to_owned(),
            request: name.to_owned(),
            installation: "9b7e1a62-0000-4000-8000-000000000001".to_owned(),
        },
        adopt_bare: false,
    }
}

fn key<D: Door>(door: &D) -> ImageKey {
    let boot = D::Cloud::boot(&door.class());
    ImageKey {
        talos_version: "1.12.0".to_owned(),
        schematic: "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba".to_owned(),
        platform: boot.platform.to_owned(),
        arch: boot.arch.to_owned(),
    }
}

/// The image that the class boots, imported where it has to be.
async fn image<D: Door>(door: &D) -> ImageRef {
    let (scope, key) = (&door.scopes()[0], key(door));
    if D::Cloud::boot(&door.class()).format.is_none() {
        return key.reference();
    }
    match door.cloud().find_image(scope, &key).await.unwrap() {
        Some(image) => image,
        None => door
            .cloud()
            .import_image(scope, &key, &source::Source::whole())
            .await
            .unwrap(),
    }
}

async fn spec<D: Door>(door: &D, name: &str) -> Spec<D> {
    InstanceSpec {
        instance: asked(door, name),
        class: door.class(),
        image: image(door).await,
        user_data: UserData(b"apiVersion: v1alpha1\nkind: SideroLinkConfig\n".to_vec()),
    }
}

/// Waits for an answer, bounded; says what was last seen.
async fn until<T: Debug, F: Future<Output = T>>(
    what: &str,
    mut ask: impl FnMut() -> F,
    mut met: impl FnMut(&T) -> bool,
) -> T {
    let begun = Instant::now();
    loop {
        let answer = ask().await;
        if met(&answer) {
            return answer;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "never came: {what}; last seen: {answer:?}"
        );
        sleep(STEP).await;
    }
}

async fn find<D: Door>(door: &D, asked: &Ref<D>) -> Found {
    door.cloud().find_instance(asked).await.unwrap()
}

fn ours(found: &Found) -> Option<&Instance> {
    match found {
        Found::Ours(instance) => Some(instance),
        Found::Nothing | Found::Remains { .. } | Found::Foreign { .. } => None,
    }
}

/// Waits until our instance is in a state; returns how the engine would name it then.
async fn until_state<D: Door>(door: &D, asked: &Ref<D>, state: InstanceState) -> Ref<D> {
    let found = until(
        &format!("{state:?}"),
        || find(door, asked),
        |found| ours(found).is_some_and(|instance| instance.state == state),
    )
    .await;
    InstanceRef {
        id: ours(&found).map(|instance| instance.id.clone()),
        ..asked.clone()
    }
}

/// Creates, and waits until it is stopped.
async fn create<D: Door>(door: &D, spec: &Spec<D>) -> Ref<D> {
    door.cloud().create_instance(spec).await.unwrap();
    until_state(door, &spec.instance, InstanceState::Stopped).await
}

/// Starts, and waits until it runs.
async fn start<D: Door>(door: &D, stopped: &Ref<D>) {
    door.cloud()
        .start_instance(stopped, &UserData(Vec::new()))
        .await
        .unwrap();
    until_state(door, stopped, InstanceState::Running).await;
}

/// What the engine does: find, delete what is there, again, until nothing of ours is left.
async fn delete<D: Door>(door: &D, asked: &Ref<D>) -> Found {
    let begun = Instant::now();
    loop {
        let found = find(door, asked).await;
        let id = match &found {
            Found::Nothing | Found::Foreign { .. } => return found,
            Found::Remains { .. } => None,
            Found::Ours(instance) => Some(instance.id.clone()),
        };
        assert!(begun.elapsed() < PATIENCE, "never gone: {found:?}");
        match door
            .cloud()
            .delete_instance(&InstanceRef { id, ..asked.clone() })
            .await
        {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::Busy => {}
            Err(error) => panic!("{error}"),
        }
        sleep(STEP).await;
    }
}

/// Creates again and again, as the engine does, until the cloud refuses: at once, or when a job of its failed.
async fn refusal<D: Door>(door: &D, spec: &Spec<D>) -> CloudError {
    let refusal = until(
        "a refusal",
        || async {
            match find(door, &spec.instance).await {
                Found::Nothing => door.cloud().create_instance(spec).await.err(),
                Found::Remains { .. } => {
                    let removed = door.cloud().delete_instance(&spec.instance).await;
                    removed.err().filter(|error| error.kind != ErrorKind::Busy)
                }
                Found::Ours(_) | Found::Foreign { .. } => None,
            }
        },
        |refused| {
            refused
                .as_ref()
                .is_some_and(|error| error.kind != ErrorKind::Busy)
        },
    )
    .await;
    refusal.unwrap()
}

/// Makes a test of each law for a door; the attribute says on which clock.
macro_rules! conformance {
    ($door:ty, $test:meta) => {
        crate::conformance::conformance!(@ $door, $test,
            creating_twice_makes_one,
            what_is_created_is_found_until_it_is_gone,
            a_deletion_advances_and_repeats,
            absence_means_that_nothing_is_left,
            a_list_has_ours_and_nobody_elses,
            a_stranger_is_never_touched,
            an_import_can_be_repeated,
            every_failure_has_its_kind,
            names_and_user_data_at_the_limit_work,
            what_is_dropped_anywhere_converges,
            every_mark_of_the_provider_is_listed,
        );
    };
    (@ $door:ty, $test:meta, $($law:ident),* $(,)?) => {
        $(
            #[$test]
            async fn $law() {
                if let Some(door) = <$door as crate::conformance::Door>::open().await {
                    crate::conformance::laws::$law(&door).await;
                }
            }
        )*
    };
}
pub(crate) use conformance;
