//! The daemon over Omni's real wire, in memory, with a simulated cloud; every call is traced and can be the daemon's last.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use expect_test::Expect;
use futures_util::future::BoxFuture;
use omni_infra_provider::backends::sim::{self, Sim, SimPace};
use omni_infra_provider::cloud::{CloudError, ErrorKind};
use omni_infra_provider::daemon::{self, Parts};
use omni_infra_provider::engine::download;
use omni_infra_provider::engine::orphans::Policy;
use omni_infra_provider::machine::Pace;
use omni_infra_provider::omni::kinds::{
    ConfigPatchRequests, InfraProviderStatusSpec, MachineRequestSpec, MachineRequestStatusSpec,
    MachineRequestStatuses, MachineRequests,
};
use omni_infra_provider::omni::{self, Dial, Settings};
use omni_infra_provider::sandbox::omni::{Call, Delays, Moment, Omni, OmniOptions, Rpc, Verdict};
use omni_infra_provider::secret::Secret;
use tokio::io::DuplexStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

pub(crate) const PROVIDER: &str = "sim";

/// A world is quiet when no call was traced for so long: longer than everything but a slow look.
const QUIET: Duration = Duration::from_secs(120);

/// No story takes longer, in the world's time.
const STORY: Duration = Duration::from_secs(3 * 3600);

/// One traced call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The request it concerns; empty where it concerns all.
    pub(crate) key: String,
    /// What is done.
    pub(crate) what: String,
}

/// What the hooks share: the trace, and when the daemon has to die.
#[derive(Default)]
struct Tap {
    trace: Mutex<Vec<Entry>>,
    calls: AtomicUsize,
    death: Mutex<Option<(usize, bool)>>,
    lost: Mutex<BTreeSet<usize>>,
    daemon: Mutex<Option<AbortHandle>>,
    faults: Mutex<BTreeMap<&'static str, (usize, ErrorKind)>>,
}

impl Tap {
    /// Counts a call; true if the daemon dies of it now.
    fn before(&self, entry: Entry) -> (usize, bool) {
        self.trace.lock().unwrap().push(entry);
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        (number, self.dies(number, false))
    }

    fn dies(&self, number: usize, after: bool) -> bool {
        if *self.death.lock().unwrap() != Some((number, after)) {
            return false;
        }
        if let Some(daemon) = self.daemon.lock().unwrap().take() {
            daemon.abort();
        }
        true
    }
}

/// A world.
pub(crate) struct World {
    pub(crate) omni: Omni,
    pub(crate) sim: Sim,
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
    /// An Omni that runs, a cloud, and a daemon that is ready.
    pub(crate) async fn start() -> Self {
        let mut world = Self::without_daemon().await;
        world.start_daemon().await;
        world
    }

    /// The same, without the daemon.
    pub(crate) async fn without_daemon() -> Self {
        let options = OmniOptions {
            check_signatures: false,
            delays: Delays {
                drain: Duration::from_secs(3),
                ..Delays::default()
            },
            ..OmniOptions::default()
        };
        let omni = Omni::new(options);
        let key = omni.add_provider(PROVIDER).unwrap();
        let (dial, incoming) = omni::memory();
        let sim = Sim::new(SimPace::default());
        let tap = Arc::new(Tap::default());
        listen(&omni, &sim, &tap);
        let mut world = Self {
            omni,
            sim,
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
            provider_id: PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        let parts = Parts {
            omni: omni::Omni::new(&settings, self.dial.clone()).unwrap(),
            cloud: self.sim.clone(),
            registration: InfraProviderStatusSpec {
                schema: "{}".to_owned(),
                name: "Sim".to_owned(),
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

    pub(crate) fn daemon_is_dead(&self) -> bool {
        self.daemon
            .as_ref()
            .is_none_or(|(daemon, _)| daemon.is_finished())
    }

    /// The daemon dies at its k-th call from now on, before it takes effect or after.
    pub(crate) fn die_at(&self, k: usize, after: bool) {
        self.tap.calls.store(0, Ordering::SeqCst);
        *self.tap.death.lock().unwrap() = Some((k, after));
    }

    /// The k-th call from now on takes effect, and its answer is lost.
    pub(crate) fn lose_answer(&self, k: usize) {
        self.tap.calls.store(0, Ordering::SeqCst);
        *self.tap.death.lock().unwrap() = None;
        *self.tap.lost.lock().unwrap() = BTreeSet::from([k]);
    }

    pub(crate) fn live_for_ever(&self) {
        *self.tap.death.lock().unwrap() = None;
        self.tap.lost.lock().unwrap().clear();
    }

    /// How many calls there were since the last of the above.
    pub(crate) fn calls(&self) -> usize {
        self.tap.calls.load(Ordering::SeqCst)
    }

    /// The next `times` calls of a cloud verb fail so, without effect.
    pub(crate) fn fail(&self, verb: &'static str, times: usize, kind: ErrorKind) {
        self.tap.faults.lock().unwrap().insert(verb, (times, kind));
    }

    pub(crate) fn request(&self, id: &str) -> &Self {
        self.request_of(id, "")
    }

    pub(crate) fn request_of(&self, id: &str, provider_data: &str) -> &Self {
        let spec = MachineRequestSpec {
            talos_version: "1.12.0".to_owned(),
            provider_data: provider_data.to_owned(),
            ..MachineRequestSpec::default()
        };
        self.omni.create_request(id, PROVIDER, &spec).unwrap();
        self
    }

    pub(crate) fn tear_down(&self, id: &str) -> &Self {
        self.omni.teardown_request(id).unwrap();
        self
    }

    /// Waits until nothing happens any more.
    pub(crate) async fn settle(&self) {
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
        if timeout(STORY, quiet).await.is_err() {
            panic!("the world does not settle\n{self}");
        }
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
            .get::<MachineRequestStatuses>(PROVIDER, id)
            .map(|status| status.spec)
            .unwrap_or_default()
    }

    /// Names of all instances, whoever's.
    pub(crate) fn instances(&self) -> Vec<String> {
        self.sim
            .instances()
            .into_iter()
            .map(|(_, name, _)| name)
            .collect()
    }

    /// Nothing is left but images.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        self.assert_left(&[]);
    }

    /// Nothing is left but images and these instances with their disks.
    #[track_caller]
    pub(crate) fn assert_left(&self, instances: &[&str]) {
        assert_eq!(self.instances(), instances, "instances\n{self}");
        let disks: Vec<String> = self.sim.disks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(disks, instances, "disks\n{self}");
        assert!(
            self.omni.list::<MachineRequests>(PROVIDER).is_empty(),
            "requests\n{self}"
        );
        assert!(
            self.omni.list::<MachineRequestStatuses>(PROVIDER).is_empty(),
            "statuses\n{self}"
        );
        assert!(
            self.omni.list::<ConfigPatchRequests>(PROVIDER).is_empty(),
            "patches\n{self}"
        );
        assert_eq!(self.omni.violations(), Vec::<String>::new(), "{self}");
    }
}

/// Everything that a person needs to understand a failure.
impl std::fmt::Display for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "--- trace")?;
        for entry in self.tap.trace.lock().unwrap().iter() {
            writeln!(f, "{:12} {}", entry.key, entry.what)?;
        }
        writeln!(f, "--- cloud")?;
        for instance in self.sim.instances() {
            writeln!(f, "instance {instance:?}")?;
        }
        for disk in self.sim.disks() {
            writeln!(f, "disk {disk:?}")?;
        }
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

/// Connects the two sides: calls to the tap, and what happens to instances to Omni.
fn listen(omni: &Omni, sim: &Sim, tap: &Arc<Tap>) {
    let hooked = tap.clone();
    omni.set_hook(Arc::new(
        move |call: &Call, moment: Moment| -> BoxFuture<'static, Verdict> {
            let Some(entry) = omni_entry(call) else {
                return Box::pin(async { Verdict::Proceed });
            };
            let verdict = match moment {
                Moment::Before => match hooked.before(entry).1 {
                    true => Verdict::Hang,
                    false => Verdict::Proceed,
                },
                Moment::After => {
                    let number = hooked.calls.load(Ordering::SeqCst);
                    if hooked.dies(number, true) {
                        Verdict::Hang
                    } else if hooked.lost.lock().unwrap().remove(&number) {
                        Verdict::Drop
                    } else {
                        Verdict::Proceed
                    }
                }
            };
            Box::pin(async { verdict })
        },
    ));

    let hooked = tap.clone();
    sim.set_hook(Some(Arc::new(move |call: sim::Call, moment| {
        let hooked = hooked.clone();
        Box::pin(async move {
            // The orphan collector looks at its own time.
            if matches!(call.verb, "check" | "list scopes" | "list marked") {
                return None;
            }
            let fault = |kind, what: &str| {
                Some(CloudError::new(
                    "sim",
                    call.verb,
                    kind,
                    format!("{}: {what}", call.on),
                ))
            };
            match moment {
                sim::Moment::Before => {
                    let (_, dies) = hooked.before(sim_entry(&call));
                    if dies {
                        std::future::pending::<()>().await;
                    }
                    let mut faults = hooked.faults.lock().unwrap();
                    if let Some((times, kind)) = faults.get_mut(call.verb)
                        && *times > 0
                    {
                        *times -= 1;
                        return fault(*kind, "as told");
                    }
                    None
                }
                sim::Moment::After => {
                    let number = hooked.calls.load(Ordering::SeqCst);
                    if hooked.dies(number, true) {
                        std::future::pending::<()>().await;
                    }
                    let lost = hooked.lost.lock().unwrap().remove(&number);
                    if lost {
                        fault(ErrorKind::Unavailable, "the answer was lost")
                    } else {
                        None
                    }
                }
            }
        })
    })));

    let machines = omni.clone();
    sim.set_on_event(Arc::new(move |event| {
        let omni = machines.clone();
        match event {
            sim::Event::Started {
                uuid,
                user_data,
                after,
            } => {
                tokio::spawn(async move {
                    sleep(after).await;
                    omni.machine_booted(&uuid, &user_data.0);
                });
            }
            sim::Event::Stopped { uuid } => omni.machine_stopped(&uuid),
        }
    }));
}

fn sim_entry(call: &sim::Call) -> Entry {
    let key = match call.verb {
        "find image" | "import image" | "list instances" => String::new(),
        _ => call.on.clone(),
    };
    Entry {
        key,
        what: call.verb.to_owned(),
    }
}

/// The words of a trace. Watches, heartbeats and the registration are left out.
fn omni_entry(call: &Call) -> Option<Entry> {
    let kind = call.kind.split('.').next().unwrap_or_default();
    let detail = call.detail.as_str();
    let entry = |key: &str, what: String| {
        Some(Entry {
            key: key.to_owned(),
            what,
        })
    };
    match (call.rpc, kind) {
        (Rpc::Watch | Rpc::List, _)
        | (_, "InfraProviderStatuses" | "InfraProviderHealthStatuses" | "CurrentUsers") => None,
        (Rpc::CreateSchematic, _) => entry("", "register schematic".to_owned()),
        (rpc, "MachineRequests") => match rpc {
            Rpc::Get => entry(&call.id, "get request".to_owned()),
            _ if detail.contains("+finalizer") => entry(&call.id, "add finalizer".to_owned()),
            _ if detail.contains("-finalizer") => entry(&call.id, "remove finalizer".to_owned()),
            _ => entry(&call.id, format!("{rpc} request: {detail}")),
        },
        (rpc, "MachineRequestStatuses") => match rpc {
            Rpc::Get => entry(&call.id, "get status".to_owned()),
            Rpc::Create if detail.contains("placement") => entry(&call.id, "write claim".to_owned()),
            Rpc::Create => entry(&call.id, format!("create status: {detail}")),
            Rpc::Update if detail.contains("placement") => entry(&call.id, format!("update claim: {detail}")),
            Rpc::Update => entry(&call.id, format!("status: {}", shorten(detail))),
            _ => entry(&call.id, format!("{rpc} status")),
        },
        (rpc, "ConfigPatchRequests") => {
            let (patch, key) = ["provider-id", "nameservers"]
                .into_iter()
                .find_map(|name| Some((name, call.id.strip_prefix(name)?.strip_prefix('-')?)))
                .unwrap_or(("patch", call.id.as_str()));
            entry(key, format!("{rpc} patch {patch}"))
        }
        (rpc, other) => entry(&call.id, format!("{rpc} {other}")),
    }
}

/// Annotation names are longer than what they tell, and the time of day is another each day.
fn shorten(detail: &str) -> String {
    without_times(&detail.replace("+annotation omni-infra-provider/", "+"))
}

/// Replaces every time of day.
pub(crate) fn without_times(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    for index in 1..words.len() {
        if words[index].starts_with("UTC") {
            words[index - 1] = "<time>";
        }
    }
    words.join(" ")
}
