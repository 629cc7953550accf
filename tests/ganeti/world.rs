//! The whole daemon between an embedded Omni and the real cluster, over real sockets. Every call that changes something can be the
//! daemon's last, or lose its answer.
#![expect(
    clippy::disallowed_methods,
    reason = "a test's runtime ends with the test, and all its tasks with it"
)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::Response;
use futures_util::future::BoxFuture;
use omni_infra_provider::backends::ganeti::{Ganeti, Settings as Site, Trust};
use omni_infra_provider::daemon::{self, Parts};
use omni_infra_provider::engine::download;
use omni_infra_provider::engine::orphans::Policy;
use omni_infra_provider::machine::Pace;
use omni_infra_provider::media::{self, Media};
use omni_infra_provider::omni::kinds::{
    ConfigPatchRequests, InfraProviderHealthStatuses, InfraProviderStatusSpec, MachineRequestSpec,
    MachineRequestStatusSpec, MachineRequestStatuses, MachineRequests,
};
use omni_infra_provider::omni::{self, Dial, Settings};
use omni_infra_provider::sandbox::omni::{Call, Delays, Moment, Omni, OmniOptions, Verdict};
use omni_infra_provider::secret::Secret;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::TcpListenerStream;

use super::cluster::Cluster;

pub(crate) const PROVIDER: &str = "ganeti";

/// No step of a story takes longer, however busy the machine is. A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(120);

/// The largest body that is passed on.
const BODY: usize = 16 * 1024 * 1024;

/// What becomes of a call that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The daemon dies before it takes effect.
    DiesBefore,
    /// It takes effect, and the daemon dies before it hears of it.
    DiesAfter,
    /// It takes effect, and the daemon hears of nothing.
    AnswerLost,
}

/// Which of the calls that change something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Point {
    /// The k-th of all.
    Nth(usize),
    /// The first of these words.
    Call(String),
}

/// Counts the calls that change something, on both sides, and carries out their fate.
#[derive(Default)]
pub(crate) struct Tap {
    calls: AtomicUsize,
    struck: Mutex<Option<String>>,
    doom: Mutex<Option<(Point, Fate)>>,
    daemon: Mutex<Option<AbortHandle>>,
    trace: Mutex<Vec<String>>,
    /// All calls of the RAPI, reads as well.
    rapi: AtomicUsize,
}

impl Tap {
    /// A call that changes something begins; its fate.
    fn strike(&self, what: String) -> Option<Fate> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.trace.lock().unwrap().push(what.clone());
        let doomed = |(point, _): &mut (Point, Fate)| match point {
            Point::Nth(k) => *k == number,
            Point::Call(call) => *call == what,
        };
        let (_, fate) = self.doom.lock().unwrap().take_if(doomed)?;
        *self.struck.lock().unwrap() = Some(format!("{fate:?} at call {number}, {what}"));
        if fate == Fate::DiesBefore {
            self.kill();
        }
        Some(fate)
    }

    fn kill(&self) {
        if let Some(daemon) = self.daemon.lock().unwrap().take() {
            daemon.abort();
        }
    }
}

/// Passes calls on to the RAPI.
#[derive(Clone)]
struct Proxy {
    tap: Arc<Tap>,
    upstream: String,
    http: reqwest::Client,
}

async fn pass_on(State(proxy): State<Proxy>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    proxy.tap.rapi.fetch_add(1, Ordering::Relaxed);
    let path = parts
        .uri
        .path_and_query()
        .map(ToString::to_string)
        .unwrap_or_default();
    let changes = match parts.method {
        Method::GET => false,
        Method::PUT => !path.starts_with("/2/query/"),
        _ => true,
    };
    let fate = changes
        .then(|| proxy.tap.strike(format!("{} {path}", parts.method)))
        .flatten();
    if fate == Some(Fate::DiesBefore) {
        return std::future::pending().await;
    }
    let body = to_bytes(body, BODY).await.unwrap();
    let mut upstream = proxy
        .http
        .request(parts.method, format!("{}{path}", proxy.upstream))
        .body(body);
    for name in ["authorization", "content-type"] {
        if let Some(value) = parts.headers.get(name) {
            upstream = upstream.header(name, value);
        }
    }
    let answer = upstream.send().await;
    match fate {
        Some(Fate::DiesAfter) => {
            proxy.tap.kill();
            std::future::pending().await
        }
        Some(Fate::AnswerLost) => {
            // It breaks off in the middle.
            let broken = futures_util::stream::iter([
                Ok(Bytes::from_static(b"1")),
                Err(std::io::Error::other("lost on purpose")),
            ]);
            Response::new(Body::from_stream(broken))
        }
        _ => {
            let Ok(answer) = answer else {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::BAD_GATEWAY;
                return response;
            };
            let status = answer.status();
            let mut response = Response::new(Body::from(answer.bytes().await.unwrap_or_default()));
            *response.status_mut() = status;
            let headers = response.headers_mut();
            headers.insert("content-type", HeaderValue::from_static("application/json"));
            // As the RAPI does.
            headers.insert("connection", HeaderValue::from_static("close"));
            response
        }
    }
}

/// A world.
pub(crate) struct World {
    pub(crate) omni: Omni,
    pub(crate) cluster: Cluster,
    pub(crate) tap: Arc<Tap>,
    pub(crate) pace: Pace,
    pub(crate) nameservers: Vec<std::net::IpAddr>,
    /// The password that the daemon is given.
    pub(crate) password: Secret,
    /// What the daemon serves, and where it listens.
    pub(crate) media: Option<(Media, SocketAddr)>,
    key: Secret,
    omni_url: String,
    rapi_url: String,
    daemon: Option<JoinHandle<()>>,
    tasks: JoinSet<()>,
}

impl World {
    /// An Omni that runs, a way to the cluster, and a daemon.
    pub(crate) async fn start(cluster: Cluster) -> Self {
        let mut world = Self::without_daemon(cluster).await;
        world.start_daemon();
        world
    }

    pub(crate) async fn without_daemon(cluster: Cluster) -> Self {
        let mut world = Self::without_machines(cluster, String::new()).await;
        world.tasks.spawn(play(world.omni.clone(), world.cluster.clone()));
        world
    }

    /// Nobody plays the machines: they boot. Images are at this factory.
    pub(crate) async fn without_machines(cluster: Cluster, factory: String) -> Self {
        let omni = Omni::new(OmniOptions {
            delays: Delays {
                join: Duration::from_millis(100),
                ..Delays::default()
            },
            image_factory_base_url: factory,
            ..OmniOptions::default()
        });
        let key = omni.add_provider(PROVIDER).unwrap();
        let tap = Arc::new(Tap::default());
        let mut tasks = JoinSet::new();

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let omni_url = format!("http://{}", listener.local_addr().unwrap());
        let served = omni.clone();
        tasks.spawn(async move { served.serve(TcpListenerStream::new(listener)).await });
        listen(&omni, &tap);

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let rapi_url = format!("http://{}", listener.local_addr().unwrap());
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .tls_danger_accept_invalid_certs(true)
            .build()
            .unwrap();
        let proxy = Proxy {
            tap: tap.clone(),
            upstream: cluster.endpoint.clone(),
            http,
        };
        let router = Router::new().fallback(pass_on).with_state(proxy);
        tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });

        let password = cluster.settings().password;
        Self {
            omni,
            cluster,
            tap,
            pace: Pace {
                heartbeat: Duration::from_secs(60),
                // To submit a job takes a second or two; nothing of another process lands later. The time between the two is for
                // the reads before a creation.
                create: Duration::from_secs(10),
                settle: Duration::from_secs(25),
                slow: Duration::from_secs(20),
                ..Pace::default()
            },
            nameservers: Vec::new(),
            password,
            media: None,
            key,
            omni_url,
            rapi_url,
            daemon: None,
            tasks,
        }
    }

    pub(crate) fn start_daemon(&mut self) {
        let settings = Settings {
            endpoint: self.omni_url.clone(),
            key: self.key.clone(),
            provider_id: PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        let site = Site {
            endpoint: self.rapi_url.clone(),
            password: self.password.clone(),
            trust: Trust::Authorities(None),
            media: self.media.as_ref().map(|(media, _)| media.clone()),
            ..self.cluster.settings()
        };
        let parts = Parts {
            omni: omni::Omni::new(&settings, Dial::Tcp).unwrap(),
            cloud: Ganeti::new(&site).unwrap(),
            registration: InfraProviderStatusSpec {
                schema: "{}".to_owned(),
                name: "Ganeti".to_owned(),
                ..InfraProviderStatusSpec::default()
            },
            downloads: download::Settings::default(),
            orphans: Policy::Report,
            nameservers: self.nameservers.clone(),
            concurrency: 16,
            pace: self.pace,
        };
        let media = self.media.clone();
        let daemon = tokio::spawn(async move {
            let serve_media = async {
                let Some((media, address)) = media else {
                    return std::future::pending().await;
                };
                let listener = TcpListener::bind(address).await.unwrap();
                media::serve(media, listener).await.unwrap();
            };
            tokio::select! {
                served = daemon::serve(parts, tokio_util::sync::CancellationToken::new()) => served.unwrap(),
                () = serve_media => {}
            }
        });
        *self.tap.daemon.lock().unwrap() = Some(daemon.abort_handle());
        self.daemon = Some(daemon);
    }

    /// The daemon dies after this call, and stays dead until something is waited for again.
    pub(crate) async fn die_after(&self, call: &str) {
        self.doom(Point::Call(call.to_owned()), Fate::DiesAfter);
        let begun = Instant::now();
        while self.struck().is_none() {
            assert!(begun.elapsed() < PATIENCE, "never came: {call}\n{self}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// What becomes of one call that changes something.
    pub(crate) fn doom(&self, point: Point, fate: Fate) {
        *self.tap.doom.lock().unwrap() = Some((point, fate));
    }

    /// Every call so far that changed something.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.tap.trace.lock().unwrap().clone()
    }

    /// What was struck, if it came to it.
    pub(crate) fn struck(&self) -> Option<String> {
        self.tap.struck.lock().unwrap().clone()
    }

    pub(crate) fn kill_daemon(&self) {
        self.tap.kill();
    }

    /// What the provider's health says in Omni.
    pub(crate) fn health(&self) -> String {
        let health = self.omni.get::<InfraProviderHealthStatuses>(PROVIDER, PROVIDER);
        health.map(|health| health.spec.error).unwrap_or_default()
    }

    /// Starts the daemon again wherever it died, for as long as this is awaited.
    pub(crate) async fn revive(&mut self) {
        loop {
            if self.daemon.as_ref().is_some_and(JoinHandle::is_finished) {
                self.start_daemon();
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn request(&self, id: &str, provider_data: &str) {
        let spec = MachineRequestSpec {
            talos_version: "1.12.0".to_owned(),
            provider_data: provider_data.to_owned(),
            ..MachineRequestSpec::default()
        };
        self.omni.create_request(id, PROVIDER, &spec).unwrap();
    }

    pub(crate) fn status(&self, id: &str) -> MachineRequestStatusSpec {
        let status = self.omni.get::<MachineRequestStatuses>(PROVIDER, id);
        status.map(|status| status.spec).unwrap_or_default()
    }

    /// What a patch of Omni's says; empty where there is none.
    pub(crate) fn patch(&self, id: &str) -> String {
        let patch = self.omni.get::<ConfigPatchRequests>(PROVIDER, id);
        patch.and_then(|patch| patch.spec.data).unwrap_or_default()
    }

    /// Everything that a task does beside the daemon.
    pub(crate) fn beside(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// How often this was called.
    pub(crate) fn count(&self, call: &str) -> usize {
        self.calls().iter().filter(|made| *made == call).count()
    }

    /// Waits for a condition; starts the daemon again when it dies.
    pub(crate) async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !condition(self) {
            assert!(begun.elapsed() < PATIENCE, "never came: {what}\n{self}");
            let _ = tokio::time::timeout(Duration::from_millis(100), self.revive()).await;
        }
    }

    /// Waits until the machine of a request runs and has joined.
    pub(crate) async fn until_joined(&mut self, id: &str) {
        use omni_infra_provider::omni::kinds::Stage;
        self.until(&format!("{id} joined"), |world| {
            let status = world.status(id);
            status.stage == Stage::Provisioned && world.omni.is_joined(&status.id)
        })
        .await;
    }

    /// Tears a request down, and waits until it is gone.
    pub(crate) async fn end(&mut self, id: &str) {
        self.omni.teardown_request(id).unwrap();
        self.until_gone(id).await;
    }

    pub(crate) async fn until_gone(&mut self, id: &str) {
        self.until(&format!("the end of {id}"), |world| {
            world.omni.get::<MachineRequests>(PROVIDER, id).is_none()
        })
        .await;
    }

    /// Nothing is left, on either side.
    pub(crate) async fn assert_nothing_left(&self, id: &str) {
        assert_eq!(self.cluster.left(id).await, [""; 0], "{self}");
        assert!(
            self.omni.list::<MachineRequestStatuses>(PROVIDER).is_empty(),
            "{self}"
        );
        assert!(
            self.omni.list::<ConfigPatchRequests>(PROVIDER).is_empty(),
            "{self}"
        );
        assert_eq!(self.omni.violations(), [""; 0], "{self}");
    }

    /// Calls of the RAPI so far.
    pub(crate) fn rapi_calls(&self) -> usize {
        self.tap.rapi.load(Ordering::Relaxed)
    }
}

/// Everything that a person needs to understand a failure.
impl std::fmt::Display for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "--- calls that changed something")?;
        for call in self.tap.trace.lock().unwrap().iter() {
            writeln!(f, "{call}")?;
        }
        writeln!(f, "--- struck: {:?}", self.struck())?;
        for status in self.omni.list::<MachineRequestStatuses>(PROVIDER) {
            writeln!(f, "{}: {:?}", status.metadata.id, status.spec)?;
        }
        writeln!(f, "violations: {:?}", self.omni.violations())?;
        writeln!(f, "refused joins: {:?}", self.omni.refused_joins())
    }
}

fn listen(omni: &Omni, tap: &Arc<Tap>) {
    let tap = tap.clone();
    let fates: Arc<Mutex<BTreeMap<u64, Fate>>> = Arc::default();
    omni.set_hook(Arc::new(
        move |call: &Call, moment: Moment| -> BoxFuture<'static, Verdict> {
            let heartbeat = call.kind.starts_with("InfraProvider");
            let mut fates = fates.lock().unwrap();
            let verdict = match moment {
                _ if !call.rpc.writes() || heartbeat => Verdict::Proceed,
                Moment::Before => match tap.strike(call.to_string()) {
                    Some(Fate::DiesBefore) => Verdict::Hang,
                    Some(fate) => {
                        fates.insert(call.number, fate);
                        Verdict::Proceed
                    }
                    None => Verdict::Proceed,
                },
                Moment::After => match fates.remove(&call.number) {
                    Some(Fate::DiesAfter) => {
                        tap.kill();
                        Verdict::Hang
                    }
                    Some(Fate::AnswerLost) => Verdict::Drop,
                    Some(Fate::DiesBefore) | None => Verdict::Proceed,
                },
            };
            Box::pin(async move { verdict })
        },
    ));
}

/// Plays the machines: what runs on the cluster for one of our requests boots, and reads the kernel arguments of its image.
async fn play(omni: Omni, cluster: Cluster) {
    let mut booted: BTreeMap<String, bool> = BTreeMap::new();
    loop {
        let machines = seen_by_all(&cluster).await;
        for request in omni.list::<MachineRequests>(PROVIDER) {
            let machine = machines.iter().find(|row| row[0] == request.metadata.id.as_str());
            let (Some(uuid), Some(args)) = (machine.and_then(|row| row[1].as_str()), kernel_args(&omni))
            else {
                continue;
            };
            let runs = machine.is_some_and(|row| row[2] == "running");
            match booted.insert(uuid.to_owned(), runs) {
                Some(true) if !runs => omni.machine_stopped(uuid),
                None | Some(false) if runs => omni.machine_booted_with_kernel_args(uuid, &args),
                _ => {}
            }
        }
        sleep(GLANCE).await;
    }
}

/// Between two looks at what runs.
const GLANCE: Duration = Duration::from_millis(500);

/// Name, UUID and status of all instances; all worlds share a look, since each costs the cluster a process.
async fn seen_by_all(cluster: &Cluster) -> Arc<Vec<Vec<Value>>> {
    type Glance = Option<(Instant, Arc<Vec<Vec<Value>>>)>;
    static LATEST: tokio::sync::Mutex<Glance> = tokio::sync::Mutex::const_new(None);
    let mut latest = LATEST.lock().await;
    if let Some((at, seen)) = &*latest
        && at.elapsed() < GLANCE
    {
        return seen.clone();
    }
    let seen = Arc::new(cluster.query("instance", &["name", "uuid", "status"]).await);
    *latest = Some((Instant::now(), seen.clone()));
    seen
}

/// The kernel arguments of the last schematic that brings a machine here.
pub(crate) fn kernel_args(omni: &Omni) -> Option<String> {
    let schematics = omni.schematics();
    schematics.values().rev().find_map(|yaml| kernel_args_of(yaml))
}

/// The kernel arguments of a schematic that brings a machine here.
pub(crate) fn kernel_args_of(yaml: &[u8]) -> Option<String> {
    let schematic: Value = serde_saphyr::from_str(std::str::from_utf8(yaml).ok()?).ok()?;
    let args = schematic["customization"]["extraKernelArgs"].as_array()?;
    let args: Vec<&str> = args.iter().filter_map(Value::as_str).collect();
    let joined = args.join(" ");
    joined.contains("siderolink.api=").then_some(joined)
}

impl Drop for World {
    fn drop(&mut self) {
        self.tap.kill();
        self.tasks.abort_all();
    }
}
