//! The daemon over Omni's real wire, in memory, with a cloud; every call is traced and can be the daemon's last.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use expect_test::Expect;
use omni_infra_provider::backends::sim::Sim;
use omni_infra_provider::cloud::ErrorKind;
use omni_infra_provider::daemon::{self, Parts};
use omni_infra_provider::engine::download;
use omni_infra_provider::engine::orphans::Policy;
use omni_infra_provider::machine::Pace;
use omni_infra_provider::omni::kinds::{
    ConfigPatchRequests, InfraProviderStatusSpec, MachineRequestSpec, MachineRequestStatusSpec,
    MachineRequestStatuses, MachineRequests, MachineResources,
};
use omni_infra_provider::omni::{self, Dial, Kind, Settings};
use omni_infra_provider::sandbox::omni::{Delays, Omni, OmniOptions};
use omni_infra_provider::secret::Secret;
use tokio::io::DuplexStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::cloud::{Machine, TestCloud};
use super::tap::{Doom, Entry, Tap, tap_omni};

pub(crate) const PROVIDER: &str = Sim::PROVIDER;

/// A world is quiet when no call was traced for so long: longer than everything but a slow look.
const QUIET: Duration = Duration::from_secs(120);

/// No story takes longer, in the world's time.
const STORY: Duration = Duration::from_secs(3 * 3600);

/// A world.
pub(crate) struct World<C: TestCloud = Sim> {
    pub(crate) omni: Omni,
    pub(crate) cloud: C,
    pub(crate) pace: Pace,
    pub(crate) nameservers: Vec<std::net::IpAddr>,
    pub(crate) orphans: Policy,
    tap: Arc<Tap>,
    key: Secret,
    dial: Dial,
    incoming: Arc<tokio::sync::Mutex<UnboundedReceiver<DuplexStream>>>,
    serving: Option<JoinHandle<()>>,
    daemon: Option<(JoinHandle<()>, CancellationToken)>,
}

impl World {
    /// An Omni that runs, a simulated cloud, and a daemon that is ready.
    pub(crate) async fn start() -> Self {
        let mut world = Self::without_daemon().await;
        world.start_daemon().await;
        world
    }

    /// The same, without the daemon.
    pub(crate) async fn without_daemon() -> Self {
        Self::open().await
    }
}

impl<C: TestCloud> World<C> {
    /// An Omni that runs, and a cloud.
    pub(crate) async fn open() -> Self {
        let tap = Arc::new(Tap::default());
        let mut cloud = C::open(&tap).await;
        let mut options = OmniOptions {
            check_signatures: false,
            delays: Delays {
                drain: Duration::from_secs(3),
                ..Delays::default()
            },
            ..OmniOptions::default()
        };
        cloud.introduce(&mut options);
        let omni = Omni::new(options);
        let key = omni.add_provider(C::PROVIDER).unwrap();
        let (dial, incoming) = omni::memory();
        tap_omni(&omni, &tap);
        cloud.connect(&omni);
        let mut world = Self {
            omni,
            cloud,
            pace: Pace {
                heartbeat: Duration::from_secs(60),
                ..Pace::default()
            },
            nameservers: Vec::new(),
            orphans: Policy::Report,
            tap,
            key,
            dial,
            incoming: Arc::new(tokio::sync::Mutex::new(incoming)),
            serving: None,
            daemon: None,
        };
        world.start_omni();
        world
    }

    pub(crate) fn start_omni(&mut self) {
        let (omni, incoming) = (self.omni.clone(), self.incoming.clone());
        self.serving = Some(tokio::spawn(async move {
            let mut incoming = incoming.lock().await;
            let accepted = futures_util::stream::poll_fn(|context| {
                incoming
                    .poll_recv(context)
                    .map(|stream| stream.map(std::io::Result::Ok))
            });
            omni.serve(accepted).await;
        }));
    }

    /// Omni dies: connections break, its memory is lost.
    pub(crate) async fn kill_omni(&mut self) {
        let serving = self.serving.take().unwrap();
        serving.abort();
        let _ = serving.await;
    }

    pub(crate) async fn start_daemon(&mut self) {
        let settings = Settings {
            endpoint: "http://omni.test".to_owned(),
            key: self.key.clone(),
            provider_id: C::PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        let parts = Parts {
            omni: omni::Omni::new(&settings, self.dial.clone()).unwrap(),
            cloud: self.cloud.backend(),
            registration: InfraProviderStatusSpec {
                schema: "{}".to_owned(),
                name: C::PROVIDER.to_owned(),
                ..InfraProviderStatusSpec::default()
            },
            downloads: download::Settings::default(),
            nameservers: self.nameservers.clone(),
            concurrency: 16,
            pace: self.pace,
            orphans: self.orphans,
        };
        let stop = CancellationToken::new();
        let token = stop.clone();
        let daemon = tokio::spawn(async move {
            daemon::serve(parts, token).await.unwrap();
        });
        *self.tap.daemon.lock().unwrap() = Some(daemon.abort_handle());
        self.daemon = Some((daemon, stop));
    }

    /// SIGTERM; returns how long it took.
    pub(crate) async fn stop_daemon(&mut self) -> Duration {
        let begun = Instant::now();
        let (daemon, stop) = self.daemon.take().unwrap();
        stop.cancel();
        daemon.await.unwrap();
        begun.elapsed()
    }

    /// SIGKILL.
    pub(crate) async fn kill_daemon(&mut self) {
        if let Some((daemon, _)) = self.daemon.take() {
            daemon.abort();
            let _ = daemon.await;
        }
    }

    pub(crate) fn daemon_is_dead(&self) -> bool {
        self.daemon
            .as_ref()
            .is_none_or(|(daemon, _)| daemon.is_finished())
    }

    /// Counts calls from now on; one of them may be fatal.
    pub(crate) fn doom(&self, doom: Option<Doom>) {
        self.tap.doom(doom);
    }

    /// How many calls there were since then, and whether the fatal one was among them.
    pub(crate) fn counted(&self) -> (usize, bool) {
        self.tap.counted()
    }

    /// Which of them changed nothing.
    pub(crate) fn reads(&self) -> Vec<usize> {
        self.tap.reads()
    }

    /// Forgets which instances there were.
    pub(crate) fn forget_made(&self) {
        *self.tap.made.lock().unwrap() = self.names_and_ids();
    }

    /// Name and ID of every instance that there was since then.
    pub(crate) fn made(&self) -> Vec<(String, String)> {
        self.tap.made.lock().unwrap().iter().cloned().collect()
    }

    fn names_and_ids(&self) -> std::collections::BTreeSet<(String, String)> {
        let machines = self.cloud.machines().into_iter();
        machines.map(|it| (it.name, it.id)).collect()
    }

    /// The next `times` calls of a cloud verb fail so, without effect.
    pub(crate) fn fail(&self, verb: &'static str, times: usize, kind: ErrorKind) {
        self.tap.faults.lock().unwrap().insert(verb, (times, kind));
    }

    pub(crate) fn request(&self, id: &str) -> &Self {
        self.request_of(id, C::CLASS)
    }

    pub(crate) fn request_of(&self, id: &str, provider_data: &str) -> &Self {
        let spec = Self::template(provider_data);
        self.omni.create_request(id, C::PROVIDER, &spec).unwrap();
        self
    }

    /// What a machine of that class asks for.
    pub(crate) fn template(provider_data: &str) -> MachineRequestSpec {
        MachineRequestSpec {
            talos_version: "1.12.0".to_owned(),
            provider_data: provider_data.to_owned(),
            ..MachineRequestSpec::default()
        }
    }

    pub(crate) fn tear_down(&self, id: &str) -> &Self {
        self.omni.teardown_request(id).unwrap();
        self
    }

    /// Waits until the daemon has died of a call.
    pub(crate) async fn dies(&self) {
        self.tap.died.notified().await;
    }

    /// Waits until nothing happens any more.
    pub(crate) async fn settle(&self) {
        if !self.settles().await {
            panic!("the world does not settle\n{self}");
        }
    }

    /// The same; false if it goes on and on.
    pub(crate) async fn settles(&self) -> bool {
        let quiet = async {
            let mut seen = self.trace_length();
            let mut since = Instant::now();
            while since.elapsed() < QUIET {
                sleep(Duration::from_secs(1)).await;
                let now = self.trace_length();
                if now != seen {
                    seen = now;
                    since = Instant::now();
                }
            }
        };
        timeout(STORY, quiet).await.is_ok()
    }

    /// Waits for a condition, bounded; says what the world is like if it never comes.
    pub(crate) async fn until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let met = async {
            while !condition(self) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(STORY, met).await.is_err() {
            panic!("never came: {what}\n{self}");
        }
    }

    pub(crate) async fn until_traced(&self, key: &str, what: &str) {
        let name = format!("{what} of {key:?}");
        self.until(&name, |world| world.trace(key).contains(what)).await;
    }

    /// Whether any such call was traced, whomever it concerned.
    pub(crate) fn has_traced(&self, what: &str) -> bool {
        let trace = self.tap.trace.lock().unwrap();
        trace.iter().any(|entry| entry.what.starts_with(what))
    }

    fn trace_length(&self) -> usize {
        self.tap.trace.lock().unwrap().len()
    }

    pub(crate) fn forget_trace(&self) {
        self.tap.trace.lock().unwrap().clear();
    }

    /// What was done for a request, a line each.
    pub(crate) fn trace(&self, key: &str) -> String {
        let trace = self.tap.trace.lock().unwrap();
        let mut lines = String::new();
        for entry in trace.iter().filter(|entry| entry.key == key) {
            writeln!(lines, "{}", entry.what).unwrap();
        }
        lines
    }

    #[track_caller]
    pub(crate) fn assert_trace(&self, key: &str, expected: Expect) {
        expected.assert_eq(&self.trace(key));
    }

    fn position(&self, key: &str, what: &str) -> usize {
        let trace = self.tap.trace.lock().unwrap();
        let found = trace
            .iter()
            .position(|entry| entry.key == key && entry.what.starts_with(what));
        drop(trace);
        found.unwrap_or_else(|| panic!("never happened: {what} of {key:?}\n{self}"))
    }

    /// One thing happened before the other.
    #[track_caller]
    pub(crate) fn assert_before(&self, first: (&str, &str), second: (&str, &str)) {
        let (one, other) = (self.position(first.0, first.1), self.position(second.0, second.1));
        assert!(one < other, "{first:?} did not come before {second:?}\n{self}");
    }

    #[track_caller]
    pub(crate) fn assert_count(&self, key: &str, what: &str, count: usize) {
        let trace = self.tap.trace.lock().unwrap();
        let matching = |entry: &&Entry| entry.key == key && entry.what.starts_with(what);
        let found = trace.iter().filter(matching).count();
        drop(trace);
        assert_eq!(found, count, "{what} of {key:?}\n{self}");
    }

    pub(crate) fn status(&self, id: &str) -> MachineRequestStatusSpec {
        self.omni
            .get::<MachineRequestStatuses>(C::PROVIDER, id)
            .map(|status| status.spec)
            .unwrap_or_default()
    }

    /// What is left of any request in Omni, and what the provider did there that it must not do.
    pub(crate) fn left_in_omni(&self) -> Vec<String> {
        fn left<K: Kind, C: TestCloud>(omni: &Omni) -> Vec<String> {
            let found = omni.list::<K>(C::PROVIDER).into_iter();
            found.map(|it| format!("{} {}", K::NAME, it.id())).collect()
        }
        let violations = self.omni.violations().into_iter();
        [
            left::<MachineRequests, C>(&self.omni),
            left::<MachineRequestStatuses, C>(&self.omni),
            left::<ConfigPatchRequests, C>(&self.omni),
            left::<MachineResources, C>(&self.omni),
            violations.map(|it| format!("violation: {it}")).collect(),
        ]
        .concat()
    }

    /// Names of all instances, whoever's.
    pub(crate) fn instances(&self) -> Vec<String> {
        let machines = self.cloud.machines().into_iter();
        machines.map(|Machine { name, .. }| name).collect()
    }
}

impl World {
    /// Nothing is left but images.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        self.assert_left(&[]);
    }

    /// Nothing is left but images and these instances with their disks.
    #[track_caller]
    pub(crate) fn assert_left(&self, instances: &[&str]) {
        assert_eq!(self.instances(), instances, "instances\n{self}");
        let disks: Vec<String> = self.cloud.disks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(disks, instances, "disks\n{self}");
        assert_eq!(self.left_in_omni(), Vec::<String>::new(), "{self}");
    }
}

impl<C: TestCloud> Drop for World<C> {
    /// The hooks hold what holds them.
    fn drop(&mut self) {
        self.cloud.unhook();
        self.omni.clear_hook();
    }
}

/// Everything that a person needs to understand a failure.
impl<C: TestCloud> std::fmt::Display for World<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "--- trace")?;
        for entry in self.tap.trace.lock().unwrap().iter() {
            writeln!(f, "{:12} {}", entry.key, entry.what)?;
        }
        writeln!(f, "--- cloud")?;
        for thing in self.cloud.things() {
            writeln!(f, "{thing}")?;
        }
        writeln!(f, "{} images", self.cloud.images())?;
        writeln!(f, "--- Omni")?;
        for resource in self.omni.everything() {
            let line = format!("{resource:?}");
            if line.contains("MachineRequest") || line.contains("ConfigPatchRequest") {
                writeln!(f, "{line}")?;
            }
        }
        for violation in self.omni.violations() {
            writeln!(f, "violation: {violation}")?;
        }
        for refused in self.omni.refused_joins() {
            writeln!(f, "refused join: {refused:?}")?;
        }
        Ok(())
    }
}
