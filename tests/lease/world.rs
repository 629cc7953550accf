//! Several daemons of one provider over one Omni and one cloud, each behind a wire to Omni and a view of the cloud of its own,
//! that a test can stop and let go on.
#![expect(
    clippy::disallowed_methods,
    reason = "a test's runtime ends with the test, and all its tasks with it"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use omni_infra_provider::backends::sim::{Event, Sim, SimClass, SimPace, Zone};
use omni_infra_provider::cloud::{
    BootProfile, Cloud, CloudError, Console, ErrorKind, Found, ImageKey, ImageRef, ImageSource, Instance,
    InstanceRef, InstanceSpec, Legacy, Limits, Marked, Replace, Result, UserData,
};
use omni_infra_provider::daemon::{self, Parts};
use omni_infra_provider::engine::download;
use omni_infra_provider::engine::orphans::Policy;
use omni_infra_provider::machine::Pace;
use omni_infra_provider::omni::kinds::{
    InfraProviderStatusSpec, Leases, MachineRequestSpec, MachineRequestStatusSpec, MachineRequestStatuses,
};
use omni_infra_provider::omni::{self, Settings};
use omni_infra_provider::sandbox::omni::{Call, Moment, Omni, OmniOptions, Rpc, Verdict};
use omni_infra_provider::secret::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

pub(super) const PROVIDER: &str = "sim";

/// No story takes more calls: two daemons that undo each other's work would not let the time go by.
const CALLS: usize = 2000;

/// No story takes longer, in the world's time.
const STORY: Duration = Duration::from_secs(600);

/// Something that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// The daemon that called the cloud; empty for a write to Omni, whoever's.
    pub(super) who: &'static str,
    /// What.
    pub(super) what: String,
}

/// All that was done, and a word to whoever waits for more.
#[derive(Debug, Clone, Default)]
struct Log {
    lines: Arc<Mutex<Vec<Line>>>,
    grown: Arc<Notify>,
}

impl Log {
    fn push(&self, who: &'static str, what: String) {
        self.lines.lock().unwrap().push(Line { who, what });
        self.grown.notify_waiters();
    }
}

/// Lets pass, or makes wait.
#[derive(Debug, Clone)]
pub(super) struct Gate(watch::Sender<bool>);

impl Gate {
    fn new() -> Self {
        Self(watch::Sender::new(true))
    }

    pub(super) fn open(&self) {
        self.0.send_replace(true);
    }

    pub(super) fn close(&self) {
        self.0.send_replace(false);
    }

    async fn pass(&self) {
        self.0.subscribe().wait_for(|open| *open).await.unwrap();
    }
}

/// One daemon, and what stands between it and the world.
pub(super) struct Daemon {
    /// Its wire to Omni, both ways.
    pub(super) wire: Gate,
    /// Its calls to the cloud, before they take effect.
    pub(super) calls: Gate,
    /// The cloud's answers.
    pub(super) answers: Gate,
    /// Zones that have no room for it.
    full: Arc<Mutex<BTreeSet<String>>>,
    task: JoinHandle<()>,
    stop: CancellationToken,
}

pub(super) struct World {
    pub(super) omni: Omni,
    pub(super) sim: Sim,
    pub(super) pace: Pace,
    log: Log,
    key: Secret,
    running: Option<JoinHandle<()>>,
    daemons: BTreeMap<&'static str, Daemon>,
}

impl World {
    /// An Omni that runs and a cloud; no daemon.
    pub(super) fn start() -> Self {
        let omni = Omni::new(OmniOptions {
            check_signatures: false,
            ..OmniOptions::default()
        });
        let key = omni.add_provider(PROVIDER).unwrap();
        let log = Log::default();
        let hooked = log.clone();
        omni.set_hook(Arc::new(
            move |call: &Call, moment: Moment| -> BoxFuture<'static, Verdict> {
                if moment == Moment::Before && call.rpc.writes() && !call.kind.contains("Health") {
                    hooked.push("", call.to_string());
                }
                Box::pin(async { Verdict::Proceed })
            },
        ));
        let sim = Sim::new(SimPace::default());
        let machines = omni.clone();
        sim.set_on_event(Arc::new(move |event| {
            let omni = machines.clone();
            match event {
                Event::Started {
                    uuid,
                    user_data,
                    after,
                } => {
                    tokio::spawn(async move {
                        sleep(after).await;
                        omni.machine_booted(&uuid, &user_data.0);
                    });
                }
                Event::Stopped { uuid } => omni.machine_stopped(&uuid),
            }
        }));
        let mut world = Self {
            omni,
            sim,
            pace: Pace {
                heartbeat: Duration::from_secs(60),
                ..Pace::default()
            },
            log,
            key,
            running: None,
            daemons: BTreeMap::new(),
        };
        world.start_omni();
        world
    }

    pub(super) fn start_omni(&mut self) {
        self.running = Some(tokio::spawn(self.omni.run()));
    }

    /// Omni dies: connections break, its memory is lost.
    pub(super) async fn kill_omni(&mut self) {
        let running = self.running.take().unwrap();
        running.abort();
        drop(running.await);
    }

    /// Starts a daemon that believes itself alone.
    pub(super) fn start_alone(&mut self, name: &'static str) {
        self.start_daemon(name, false);
    }

    /// Starts a daemon that takes turns.
    pub(super) fn start_in_turns(&mut self, name: &'static str) {
        self.start_daemon(name, true);
    }

    fn start_daemon(&mut self, name: &'static str, in_turns: bool) {
        let (dial, mut incoming) = omni::memory();
        let (omni, wire) = (self.omni.clone(), Gate::new());
        let through = wire.clone();
        tokio::spawn(async move {
            while let Some(stream) = incoming.recv().await {
                // Without an Omni the stream is dropped, and the connection breaks.
                if let Ok(server) = omni.dial() {
                    connect(stream, server, &through);
                }
            }
        });
        let settings = Settings {
            endpoint: "http://omni.test".to_owned(),
            key: self.key.clone(),
            provider_id: PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        let view = View {
            who: name,
            sim: self.sim.clone(),
            log: self.log.clone(),
            calls: Gate::new(),
            answers: Gate::new(),
            full: Arc::default(),
        };
        let (calls, answers, full) = (view.calls.clone(), view.answers.clone(), view.full.clone());
        let parts = Parts {
            omni: omni::Omni::new(&settings, dial).unwrap(),
            cloud: view,
            registration: InfraProviderStatusSpec {
                schema: "{}".to_owned(),
                name: "Sim".to_owned(),
                ..InfraProviderStatusSpec::default()
            },
            downloads: download::Settings::default(),
            nameservers: Vec::new(),
            concurrency: 16,
            pace: self.pace,
            orphans: Policy::Delete,
        };
        let stop = CancellationToken::new();
        let token = stop.clone();
        let task = tokio::spawn(async move {
            match in_turns {
                true => daemon::serve_in_turns(parts, token).await.unwrap(),
                false => daemon::serve(parts, token).await.unwrap(),
            }
        });
        let daemon = Daemon {
            wire,
            calls,
            answers,
            full,
            task,
            stop,
        };
        self.daemons.insert(name, daemon);
    }

    pub(super) fn daemon(&self, name: &str) -> &Daemon {
        &self.daemons[name]
    }

    /// SIGKILL.
    pub(super) async fn kill(&mut self, name: &str) {
        let daemon = self.daemons.remove(name).unwrap();
        daemon.task.abort();
        drop(daemon.task.await);
    }

    /// SIGTERM, and waits for the end.
    pub(super) async fn stop(&mut self, name: &str) {
        let daemon = self.daemons.remove(name).unwrap();
        daemon.stop.cancel();
        daemon.task.await.unwrap();
    }

    /// A zone has no room for that daemon.
    pub(super) fn fill(&self, name: &str, zone: &str) {
        self.daemons[name].full.lock().unwrap().insert(zone.to_owned());
    }

    pub(super) fn request(&self, id: &str, provider_data: &str) {
        let spec = MachineRequestSpec {
            talos_version: "1.12.0".to_owned(),
            provider_data: provider_data.to_owned(),
            ..MachineRequestSpec::default()
        };
        self.omni.create_request(id, PROVIDER, &spec).unwrap();
    }

    pub(super) fn status(&self, id: &str) -> MachineRequestStatusSpec {
        self.omni
            .get::<MachineRequestStatuses>(PROVIDER, id)
            .map(|status| status.spec)
            .unwrap_or_default()
    }

    /// Who holds the lease; empty if nobody does.
    pub(super) fn holder(&self) -> String {
        self.omni
            .get::<Leases>(PROVIDER, "active")
            .map(|lease| lease.spec.holder)
            .unwrap_or_default()
    }

    /// How many calls that concern this kind there were.
    pub(super) fn calls(&self, kind: &str, of: impl Fn(Rpc) -> bool) -> u64 {
        let calls = self.omni.calls();
        let matching = calls
            .iter()
            .filter(|((rpc, name), _)| name.starts_with(kind) && of(*rpc));
        matching.map(|(_, count)| count).sum()
    }

    /// What was done since `from`, but for the lease.
    pub(super) fn log(&self, from: usize) -> Vec<Line> {
        let log = self.log.lines.lock().unwrap();
        let lines = log[from..].iter().filter(|line| !line.what.contains(" Lease/"));
        lines.cloned().collect()
    }

    pub(super) fn log_length(&self) -> usize {
        self.log.lines.lock().unwrap().len()
    }

    /// Zone and name of all instances.
    pub(super) fn instances(&self) -> Vec<(String, String)> {
        let instances = self.sim.instances().into_iter();
        instances.map(|(zone, name, _)| (zone, name)).collect()
    }

    /// Waits for a condition, bounded; how long it took.
    pub(super) async fn until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) -> Duration {
        let begun = Instant::now();
        let met = async {
            loop {
                let grown = self.log.grown.notified();
                if condition(self) || self.log_length() >= CALLS {
                    break;
                }
                drop(timeout(Duration::from_millis(100), grown).await);
            }
            self.log_length() < CALLS
        };
        if timeout(STORY, met).await != Ok(true) {
            panic!("never came: {what}\n{self}");
        }
        begun.elapsed()
    }

    pub(super) async fn until_logged(&self, who: &str, what: &str) {
        let name = format!("{who}: {what}");
        self.until(&name, |world| world.did(who, what)).await;
    }

    /// A write to Omni, or a call of the cloud by that daemon.
    pub(super) fn did(&self, who: &str, what: &str) -> bool {
        let log = self.log.lines.lock().unwrap();
        log.iter().any(|line| line.who == who && line.what.contains(what))
    }

    pub(super) async fn until_shown(&self, id: &str, words: &str) {
        let name = format!("{words} of {id}");
        self.until(&name, |world| world.status(id).status.contains(words))
            .await;
    }
}

/// Everything that a person needs to understand a failure.
impl std::fmt::Display for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in self.log.lines.lock().unwrap().iter() {
            writeln!(f, "{:4} {}", line.who, line.what)?;
        }
        writeln!(
            f,
            "instances {:?}, lease of {:?}",
            self.instances(),
            self.holder()
        )?;
        for status in self.omni.list::<MachineRequestStatuses>(PROVIDER) {
            writeln!(
                f,
                "{} {:?} {:?}",
                status.id(),
                status.spec,
                status.metadata.annotations
            )?;
        }
        Ok(())
    }
}

fn connect(client: DuplexStream, server: DuplexStream, gate: &Gate) {
    let (client, to_client) = tokio::io::split(client);
    let (server, to_server) = tokio::io::split(server);
    tokio::spawn(carry(client, to_server, gate.clone()));
    tokio::spawn(carry(server, to_client, gate.clone()));
}

async fn carry(mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>, gate: Gate) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        gate.pass().await;
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    drop(to.shutdown().await);
}

/// The cloud as one daemon reaches it.
struct View {
    who: &'static str,
    sim: Sim,
    log: Log,
    calls: Gate,
    answers: Gate,
    full: Arc<Mutex<BTreeSet<String>>>,
}

impl View {
    async fn call<T>(&self, what: String, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.log.push(self.who, what);
        // Time for a test to shut the gate.
        sleep(Duration::from_millis(5)).await;
        self.calls.pass().await;
        let result = call.await;
        self.answers.pass().await;
        result
    }
}

impl Cloud for View {
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
        self.sim.check().await
    }

    async fn find_image(&self, scope: &Zone, key: &ImageKey) -> Result<Option<ImageRef>> {
        self.call("find image".to_owned(), self.sim.find_image(scope, key))
            .await
    }

    async fn import_image(&self, scope: &Zone, key: &ImageKey, source: &dyn ImageSource) -> Result<ImageRef> {
        self.call(
            "import image".to_owned(),
            self.sim.import_image(scope, key, source),
        )
        .await
    }

    async fn find_instance(&self, instance: &InstanceRef<Zone>) -> Result<Found> {
        let what = format!("find {}", instance.name);
        self.call(what, self.sim.find_instance(instance)).await
    }

    async fn read_console(&self, instance: &InstanceRef<Zone>) -> Result<Option<Console>> {
        self.sim.read_console(instance).await
    }

    async fn create_instance(&self, spec: &InstanceSpec<Zone, SimClass>) -> Result<()> {
        let place = format!("{} in {}", spec.instance.name, spec.instance.scope);
        let full = self.full.lock().unwrap().contains(&spec.instance.scope.0);
        let what = format!("create {place}");
        self.call(what, async {
            if full {
                let kind = ErrorKind::Exhausted;
                return Err(CloudError::new(
                    "sim",
                    "create instance",
                    kind,
                    format!("{place}: no room for {}", self.who),
                ));
            }
            self.sim.create_instance(spec).await
        })
        .await
    }

    async fn start_instance(&self, instance: &InstanceRef<Zone>, user_data: &UserData) -> Result<()> {
        let what = format!("start {}", instance.name);
        self.call(what, self.sim.start_instance(instance, user_data))
            .await
    }

    async fn delete_instance(&self, instance: &InstanceRef<Zone>) -> Result<()> {
        let what = format!("delete {}", instance.name);
        self.call(what, self.sim.delete_instance(instance)).await
    }

    async fn list_instances(
        &self,
        scope: &Zone,
        provider: &str,
        installation: &str,
    ) -> Result<Vec<Instance>> {
        let listing = self.sim.list_instances(scope, provider, installation);
        self.call(format!("list {scope}"), listing).await
    }

    async fn list_scopes(&self) -> Result<Vec<Zone>> {
        self.call("list scopes".to_owned(), self.sim.list_scopes()).await
    }

    async fn list_marked(&self, scope: &Zone, provider: &str) -> Result<Vec<Marked>> {
        self.call(
            format!("list marked {scope}"),
            self.sim.list_marked(scope, provider),
        )
        .await
    }
}
