//! The client over Omni's own wire, against the embedded Omni, on a paused clock.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::DuplexStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::kinds::{
    ConfigPatchRequestSpec, ConfigPatchRequests, LABEL_PROVIDER, LABEL_REQUEST, MachineRequestSpec,
    MachineRequestStatusSpec, MachineRequestStatuses, MachineRequests, Stage,
};
use super::management::AssetRequest;
use super::*;
use crate::sandbox::omni::types::{MACHINE_REQUEST_STATUSES, MACHINE_REQUESTS};
use crate::sandbox::omni::{self as sandbox, FailCode, Moment, OmniOptions, Role, Rpc, Verdict};
use crate::secret::Secret;

const OWNER: &str = "test.ProvisionController";
const FINALIZER: &str = OWNER;

/// An Omni that runs, and a client of it.
struct World {
    server: sandbox::Omni,
    client: Omni,
    dial: Dial,
    incoming: Arc<tokio::sync::Mutex<UnboundedReceiver<DuplexStream>>>,
    serving: JoinSet<()>,
    stores: JoinSet<()>,
    heard: Arc<Mutex<BTreeSet<String>>>,
}

impl World {
    fn new() -> Self {
        Self::with(OmniOptions::default())
    }

    fn with(options: OmniOptions) -> Self {
        let server = sandbox::Omni::new(options);
        let key = server.add_provider("test").unwrap();
        let (dial, incoming) = memory();
        let mut world = Self {
            client: Omni::new(&settings(&key), dial.clone()).unwrap(),
            server,
            dial,
            incoming: Arc::new(tokio::sync::Mutex::new(incoming)),
            serving: JoinSet::new(),
            stores: JoinSet::new(),
            heard: Arc::default(),
        };
        world.serve();
        world
    }

    fn serve(&mut self) {
        let (server, incoming) = (self.server.clone(), Arc::clone(&self.incoming));
        self.serving.spawn(async move {
            let mut incoming = incoming.lock().await;
            let accepted = futures_util::stream::poll_fn(|context| {
                incoming
                    .poll_recv(context)
                    .map(|stream| stream.map(std::io::Result::Ok))
            });
            server.serve(accepted).await;
        });
    }

    async fn crash(&mut self) {
        self.serving.shutdown().await;
    }

    fn login(&self, key: &Secret) -> Omni {
        Omni::new(&settings(key), self.dial.clone()).unwrap()
    }

    async fn request(&self, id: &str) {
        self.server
            .create_request(id, "test", &MachineRequestSpec::default())
            .unwrap();
        sleep(Duration::from_millis(200)).await;
    }

    async fn status(&self, id: &str) -> Resource<MachineRequestStatuses> {
        let mut status = Resource::new(id, MachineRequestStatusSpec::default());
        status.metadata.owner = OWNER.to_owned();
        self.client.state.create(&status).await.unwrap()
    }

    async fn store(&mut self) -> Store<MachineRequestStatuses> {
        let store = Store::new(self.client.state.clone(), |resource| {
            Some(resource.id().to_owned())
        });
        let heard = Arc::clone(&self.heard);
        let on_change: store::OnChange = Arc::new(move |group: &str| {
            heard.lock().unwrap().insert(group.to_owned());
        });
        self.stores.spawn(store.clone().run(on_change));
        within(store.bootstrapped()).await;
        store
    }

    fn heard(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }

    fn fail(&self, rpc: Rpc, moment: Moment, verdict: Verdict) {
        self.server.set_hook(Arc::new(move |call, at| {
            let hit = call.rpc == rpc && at == moment;
            let verdict = if hit { verdict.clone() } else { Verdict::Proceed };
            async move { verdict }.boxed()
        }));
    }
}

fn settings(key: &Secret) -> Settings {
    Settings {
        endpoint: "http://omni.test".into(),
        key: key.clone(),
        provider_id: "test".into(),
        ca_bundle: None,
        insecure: false,
    }
}

async fn within<T>(wait: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(600), wait).await.unwrap()
}

async fn until(what: &str, mut look: impl FnMut() -> bool) {
    for _ in 0..100_000 {
        if look() {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert!(look(), "never: {what}");
}

fn names<K: Kind>(resources: &[Arc<Resource<K>>]) -> Vec<String> {
    resources
        .iter()
        .map(|resource| resource.id().to_owned())
        .collect()
}

fn kind<T>(result: state::Result<T>) -> Option<OmniErrorKind> {
    result.err().map(|error| error.kind)
}

#[tokio::test(start_paused = true)]
async fn a_status_lives_from_create_to_destroy() {
    let world = World::new();
    let state = &world.client.state;
    world.request("a").await;

    let mut new = Resource::<MachineRequestStatuses>::new("a", MachineRequestStatusSpec::default());
    new.metadata.owner = OWNER.to_owned();
    new.metadata.annotations.insert("placement".into(), "{}".into());
    let created = state.create(&new).await.unwrap();
    assert_eq!(created.metadata.version, 1);
    assert_eq!(created.metadata.owner, OWNER);
    assert_eq!(
        created.metadata.labels.get(LABEL_PROVIDER).map(String::as_str),
        Some("test")
    );
    assert_eq!(kind(state.create(&new).await), Some(OmniErrorKind::AlreadyExists));

    // Omni's finalizer has moved the version by now.
    sleep(Duration::from_millis(100)).await;
    assert_eq!(
        kind(state.update(&created, None).await),
        Some(OmniErrorKind::Conflict)
    );
    let changed = state
        .modify::<MachineRequestStatuses>("a", |status| {
            status.spec.stage = Stage::Provisioned;
            true
        })
        .await
        .unwrap()
        .unwrap();
    assert_eq!(changed.spec.stage, Stage::Provisioned);
    assert!(!changed.metadata.finalizers.is_empty());
    assert_eq!(changed.metadata.annotations.len(), 1);

    // A change that changes nothing is not sent.
    let same = state
        .modify::<MachineRequestStatuses>("a", |_| true)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(same.metadata.version, changed.metadata.version);

    let listed = state.list::<MachineRequestStatuses>(&[]).await.unwrap();
    assert_eq!(listed, [changed]);
    let none = state
        .list::<MachineRequestStatuses>(&[(LABEL_REQUEST, "a")])
        .await
        .unwrap();
    assert_eq!(none, []);

    let foreign = state.destroy::<MachineRequestStatuses>("a", "x").await;
    assert_eq!(kind(foreign), Some(OmniErrorKind::WrongOwner));
    let held = state.destroy::<MachineRequestStatuses>("a", OWNER).await;
    assert_eq!(kind(held), Some(OmniErrorKind::PendingFinalizers));
    assert!(
        !state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    sleep(Duration::from_secs(5)).await;
    assert!(
        state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    let mut torn = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
    torn.spec.error = "gone".into();
    let running = state.update(&torn, Some(Phase::Running)).await;
    assert_eq!(kind(running), Some(OmniErrorKind::WrongPhase));
    state.destroy::<MachineRequestStatuses>("a", OWNER).await.unwrap();
    assert_eq!(state.get::<MachineRequestStatuses>("a").await.unwrap(), None);
    let gone = state.destroy::<MachineRequestStatuses>("a", OWNER).await;
    assert_eq!(kind(gone), Some(OmniErrorKind::NotFound));
}

#[tokio::test(start_paused = true)]
async fn a_request_takes_our_finalizer_and_nothing_else() {
    let world = World::with(OmniOptions {
        future_fields: true,
        ..OmniOptions::default()
    });
    let state = &world.client.state;
    world.request("a").await;
    let held = state
        .modify::<MachineRequests>("a", |request| {
            request.metadata.finalizers.insert(FINALIZER.into())
        })
        .await
        .unwrap()
        .unwrap();
    assert!(held.metadata.finalizers.contains(FINALIZER));
    let labelled = state
        .modify::<MachineRequests>("a", |request| {
            request.metadata.labels.insert("x".into(), "y".into());
            true
        })
        .await;
    assert_eq!(kind(labelled), Some(OmniErrorKind::Denied));
    let missing = state.modify::<MachineRequests>("b", |_| true).await.unwrap();
    assert_eq!(missing, None);
}

#[tokio::test(start_paused = true)]
async fn a_stale_copy_of_a_request_is_read_again() {
    let world = World::new();
    world.request("a").await;
    let mut looks = 0;
    let modified = world
        .client
        .state
        .modify::<MachineRequests>("a", |request| {
            looks += 1;
            if looks == 1 {
                // Omni compares our copy with this before it looks at the version, and says that we may not.
                let labelled = world
                    .server
                    .modify_raw("infra-provider", MACHINE_REQUESTS, "a", |stored| {
                        stored.labels.insert("new".into(), String::new());
                    });
                labelled.unwrap();
            }
            request.metadata.finalizers.insert(FINALIZER.into())
        })
        .await
        .unwrap()
        .unwrap();
    assert_eq!(looks, 2);
    assert!(modified.metadata.labels.contains_key("new"));
}

#[tokio::test(start_paused = true)]
async fn conflicts_and_denials_end_after_a_few_tries() {
    let world = World::new();
    world.request("a").await;
    world.status("a").await;
    let state = &world.client.state;
    let refuse =
        |code, message: &str| world.fail(Rpc::Update, Moment::Before, Verdict::Fail(code, message.into()));
    let changes = AtomicU32::new(0);
    let tries = || changes.swap(0, Ordering::Relaxed);

    refuse(FailCode::FailedPrecondition, "update conflict");
    let change = |status: &mut Resource<MachineRequestStatuses>| {
        changes.fetch_add(1, Ordering::Relaxed);
        status.metadata.annotations.insert("x".into(), "y".into());
        true
    };
    assert_eq!(
        kind(state.modify("a", change).await),
        Some(OmniErrorKind::Conflict)
    );
    assert_eq!(tries(), 5);
    for (code, message, meaning) in [
        (
            FailCode::FailedPrecondition,
            "EULA has not been accepted",
            OmniErrorKind::Eula,
        ),
        (
            FailCode::PermissionDenied,
            "users are not allowed to modify",
            OmniErrorKind::Denied,
        ),
        (FailCode::Unavailable, "", OmniErrorKind::Unavailable),
    ] {
        refuse(code, message);
        assert_eq!(kind(state.modify("a", change).await), Some(meaning));
        assert_eq!(tries(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_omni_tears_down_by_update() {
    let world = World::with(OmniOptions {
        teardown_rpc: false,
        ..OmniOptions::default()
    });
    let state = &world.client.state;
    world.request("a").await;
    world.status("a").await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(
        kind(state.teardown::<MachineRequestStatuses>("a", "x").await),
        Some(OmniErrorKind::WrongOwner)
    );
    assert!(
        !state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    sleep(Duration::from_secs(5)).await;
    assert!(
        state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    let missing = state.teardown::<MachineRequestStatuses>("b", OWNER).await;
    assert_eq!(kind(missing), Some(OmniErrorKind::NotFound));
}

#[tokio::test(start_paused = true)]
async fn what_is_another_providers_is_not_seen() {
    let world = World::new();
    let key = world.server.add_provider("other").unwrap();
    let mut other = settings(&key);
    other.provider_id = "other".into();
    let other = Omni::new(&other, world.dial.clone()).unwrap();
    let mut patch = Resource::<ConfigPatchRequests>::new("theirs", ConfigPatchRequestSpec::default());
    patch.spec.data = Some("machine: {}".into());
    other.state.create(&patch).await.unwrap();
    assert_eq!(
        other.state.list::<ConfigPatchRequests>(&[]).await.unwrap().len(),
        1
    );

    let state = &world.client.state;
    assert_eq!(state.list::<ConfigPatchRequests>(&[]).await.unwrap(), []);
    assert_eq!(state.get::<ConfigPatchRequests>("theirs").await.unwrap(), None);
    // A suspended account reads everybody's.
    world.server.configure(|options| options.suspended = true);
    assert_eq!(state.get::<ConfigPatchRequests>("theirs").await.unwrap(), None);
    assert_eq!(state.list::<ConfigPatchRequests>(&[]).await.unwrap(), []);
    let store = Store::<ConfigPatchRequests>::new(state.clone(), |patch| Some(patch.id().to_owned()));
    let mut watching = JoinSet::new();
    watching.spawn(store.clone().run(Arc::new(|_| {})));
    within(store.bootstrapped()).await;
    assert_eq!(names(&store.all()), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_store_sees_what_others_do_and_keeps_what_we_wrote() {
    let mut world = World::new();
    world.request("a").await;
    world.status("a").await;
    let store = world.store().await;
    assert_eq!(names(&store.all()), ["a"]);
    assert!(store.is_current());

    world.request("b").await;
    world.heard();
    let created = world.status("b").await;
    store.put(created);
    assert_eq!(names(&store.all()), ["a", "b"]);
    until("Omni's finalizer", || {
        store
            .get("b")
            .is_some_and(|status| !status.metadata.finalizers.is_empty())
    })
    .await;
    assert!(world.heard().contains("b"));
    world
        .server
        .force_destroy("infra-provider", MACHINE_REQUEST_STATUSES, "a")
        .unwrap();
    until("the end of a", || store.get("a").is_none()).await;
    assert!(world.heard().contains("a"));
}

#[tokio::test(start_paused = true)]
async fn a_store_heals_from_a_restart_of_omni() {
    let mut world = World::new();
    for id in ["a", "b"] {
        world.request(id).await;
        world.status(id).await;
    }
    let store = world.store().await;
    sleep(Duration::from_secs(60)).await;
    world.heard();

    world.crash().await;
    until("a stale store", || !store.is_current()).await;
    assert_eq!(names(&store.all()), ["a", "b"]);
    world
        .server
        .force_destroy("infra-provider", MACHINE_REQUEST_STATUSES, "a")
        .unwrap();
    sleep(Duration::from_secs(3600)).await;
    assert!(!store.is_current());
    assert!(store.is_bootstrapped());
    world.serve();
    until("a current store", || store.is_current()).await;
    until("the missed end of a", || names(&store.all()) == ["b"]).await;
    assert!(world.heard().contains("a"));
    assert!(store.breaks() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_compacted_bookmark_is_replaced_by_a_full_reading() {
    let mut world = World::new();
    world.request("a").await;
    world.status("a").await;
    let store = world.store().await;
    world.crash().await;
    world.request("b").await;
    world.server.compact();
    world.serve();
    until("a current store", || store.is_current()).await;
    world.status("b").await;
    until("b", || names(&store.all()) == ["a", "b"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_bookmark_from_the_future_is_found_out() {
    let mut world = World::new();
    let backup = world.server.backup();
    for id in ["a", "b"] {
        world.request(id).await;
        world.status(id).await;
    }
    let store = world.store().await;
    sleep(Duration::from_secs(300)).await;
    assert_eq!(names(&store.all()), ["a", "b"]);
    world.crash().await;
    world.server.restore(&backup);
    world.serve();
    until("nothing", || store.all().is_empty()).await;
    assert!(store.is_current());
}

#[tokio::test(start_paused = true)]
async fn everything_is_read_anew_from_time_to_time() {
    let mut world = World::new();
    world.request("a").await;
    world.status("a").await;
    let store = world.store().await;
    let watches = world.server.count(Rpc::Watch);
    sleep(Duration::from_secs(3600)).await;
    let anew = world.server.count(Rpc::Watch) - watches;
    assert!((4..=8).contains(&anew), "{anew}");
    assert!(store.is_current());
    assert_eq!(store.breaks(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_store_watches_no_more() {
    let mut world = World::new();
    let store = world.store().await;
    assert!(store.is_current());
    world.stores.shutdown().await;
    assert!(!store.is_current());
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_an_unknown_outcome() {
    let world = World::new();
    world.request("a").await;
    world.fail(Rpc::Create, Moment::After, Verdict::Drop);
    let mut status = Resource::<MachineRequestStatuses>::new("a", MachineRequestStatusSpec::default());
    status.metadata.owner = OWNER.into();
    let error = world.client.state.create(&status).await.err().unwrap();
    assert!(error.outcome_unknown(), "{error}");
    assert!(
        error.to_string().contains("create machine request status a"),
        "{error}"
    );
    world.server.clear_hook();
    assert!(
        world
            .client
            .state
            .get::<MachineRequestStatuses>("a")
            .await
            .unwrap()
            .is_some()
    );
}

#[tokio::test(start_paused = true)]
async fn a_silent_omni_is_left_after_the_deadline() {
    let world = World::new();
    for rpc in [Rpc::Get, Rpc::List] {
        world.fail(rpc, Moment::Before, Verdict::Hang);
        let begun = Instant::now();
        let state = &world.client.state;
        let result = match rpc {
            Rpc::Get => kind(state.get::<MachineRequests>("a").await),
            _ => kind(state.list::<MachineRequests>(&[]).await),
        };
        assert_eq!(result, Some(OmniErrorKind::Unavailable));
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_tell_whose_turn_it_is() {
    let world = World::new();
    let state = &world.client.state;
    world.server.configure(|options| options.eula_accepted = false);
    assert_eq!(
        kind(state.get::<MachineRequests>("a").await),
        Some(OmniErrorKind::Eula)
    );
    world.server.configure(|options| options.eula_accepted = true);

    world.fail(
        Rpc::Get,
        Moment::Before,
        Verdict::Fail(FailCode::Cancelled, "Timeout expired".into()),
    );
    assert_eq!(
        kind(state.get::<MachineRequests>("a").await),
        Some(OmniErrorKind::Unavailable)
    );
    world.server.clear_hook();

    world.server.revoke_keys("test");
    let error = state.get::<MachineRequests>("a").await.err().unwrap();
    assert_eq!(error.kind, OmniErrorKind::Unauthenticated);
    assert!(
        error.message.contains("omnictl infraprovider renewkey test"),
        "{error}"
    );

    let renewed = world.server.renew_key("test", Duration::from_secs(3600)).unwrap();
    world
        .client
        .signer
        .replace(ServiceAccount::parse(&renewed).unwrap());
    assert_eq!(state.get::<MachineRequests>("a").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn we_know_who_we_are() {
    let world = World::new();
    world.client.who_am_i().await.unwrap();
    let key = world.server.add_service_account("robot", Role::Operator).unwrap();
    let error = world.login(&key).who_am_i().await.err().unwrap();
    assert!(matches!(error, IdentityError::Identity { .. }), "{error}");
    world.server.configure(|options| options.suspended = true);
    let error = world.client.who_am_i().await.err().unwrap();
    assert!(matches!(error, IdentityError::Role { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn join_inputs_follow_omni() {
    let world = World::new();
    let join = Join::new(world.client.state.clone());
    assert!(join.inputs().is_err());
    let mut watching = JoinSet::new();
    watching.spawn(join.clone().run());
    within(join.bootstrapped()).await;
    let before = join.inputs().unwrap();
    assert_eq!(
        (before.token_version, before.events_port, before.logs_port),
        (2, 8091, 8092)
    );
    assert_eq!(before.api_url, "https://omni.sandbox.internal:8090/");
    world.server.rotate_join_token("test");
    until("the new token", || join.inputs().unwrap().token != before.token).await;
}

#[tokio::test(start_paused = true)]
async fn an_old_omni_gives_the_accounts_token() {
    let world = World::with(OmniOptions {
        provider_join_configs: false,
        ..OmniOptions::default()
    });
    let join = Join::new(world.client.state.clone());
    let mut watching = JoinSet::new();
    watching.spawn(join.clone().run());
    within(join.bootstrapped()).await;
    let inputs = join.inputs().unwrap();
    assert_eq!(inputs.token_version, 1);
    assert_eq!(inputs.token.expose(), "the-default-join-token-of-the-sandbox");
}

#[tokio::test(start_paused = true)]
async fn schematics_and_images_are_omnis_to_name() {
    let world = World::new();
    let management = &world.client.management;
    let id = management
        .create_schematic("customization: {}\n", "1.13.0")
        .await
        .unwrap();
    assert_eq!(
        id,
        "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba"
    );
    let asset = AssetRequest {
        talos_version: "1.13.0".into(),
        schematic: id.clone(),
        platform: "nocloud".into(),
        arch: "amd64".into(),
        format: "raw.xz".into(),
    };
    let path = format!("/image/{id}/v1.13.0/nocloud-amd64.raw.xz");
    let found = management.disk_asset(&asset).await.unwrap();
    assert_eq!(found.url.expose(), format!("https://factory.talos.dev{path}"));

    // Omni is upgraded, and asked again after a while.
    world
        .server
        .configure(|options| options.boot_asset_base_url = Some("https://new".into()));
    sleep(Duration::from_secs(600)).await;
    let found = management.disk_asset(&asset).await.unwrap();
    assert!(
        found.url.expose().starts_with("https://new"),
        "{}",
        found.url.expose()
    );
}
