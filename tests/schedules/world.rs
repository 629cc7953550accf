//! One or two daemons, an embedded Omni and a simulated cloud on a paused clock, as a script would have them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::stream::poll_fn;
use omni_infra_provider::backends::sim::{self, Sim, SimPace};
use omni_infra_provider::cloud::InstanceState;
use omni_infra_provider::daemon::{self, Parts};
use omni_infra_provider::engine::download;
use omni_infra_provider::machine::Pace;
use omni_infra_provider::omni::auth::{ServiceAccount, Signer};
use omni_infra_provider::omni::kinds::{
    ConfigPatchRequests, InfraProviderStatusSpec, MachineRequestSpec, MachineRequestStatuses,
    MachineRequests, Stage,
};
use omni_infra_provider::omni::{self, Dial, Settings};
use omni_infra_provider::sandbox::omni::{Clock, Delays, Omni, OmniOptions, types};
use omni_infra_provider::secret::Secret;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::gate::{Gate, Gated};
use super::rough::Rough;
use super::script::{Event, SETS, Script, is_valid};
use super::watchman::{PROVIDER, Watchman};

/// How long a world may take to settle, in its own time: longer than the longest wait after a failure (10 min), twice, and the
/// join deadline.
const PATIENCE: Duration = Duration::from_secs(3600);

/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_secs(5);

/// As long as a supervisor waits before it starts a daemon that ended by itself.
const SUPERVISION: Duration = Duration::from_secs(5);

/// One daemon, dead or alive.
struct Daemon {
    dial: Dial,
    gate: Gate,
    life: Option<Life>,
}

struct Life {
    task: JoinHandle<()>,
    stop: CancellationToken,
    signer: Arc<Mutex<Option<Signer>>>,
}

/// The door to Omni while it runs.
type Door = Arc<Mutex<Option<UnboundedSender<Gated>>>>;

/// A world.
pub(super) struct World {
    omni: Omni,
    sim: Sim,
    pub(super) watchman: Arc<Watchman>,
    daemons: Vec<Daemon>,
    door: Door,
    serving: Option<JoinHandle<()>>,
    /// The key that daemons are started with.
    key: Arc<Mutex<Secret>>,
    /// The one that is valid; daemons learn of it later.
    valid_key: Secret,
    /// By how many seconds Omni's clock is off.
    clock: Arc<AtomicI64>,
    /// The class of each set.
    classes: [&'static str; 2],
    /// Requests of instances that somebody meddled with.
    spoiled: BTreeSet<String>,
    /// A machine that was made before may not join any more.
    token_rotated: bool,
    provider_deleted: bool,
    /// What ends later: faults and absences.
    later: Vec<(Instant, Ending)>,
}

/// The end of something that lasts.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Blind,
    OmniDown,
    Watches,
    Drains,
    Suspension,
    Clock,
    Key,
    Pause(usize),
    Death(usize),
}

impl World {
    pub(super) async fn new(script: &Script) -> Self {
        let clock = Arc::new(AtomicI64::new(0));
        let omni = Omni::new(options(script, clock.clone()));
        let key = omni.add_provider(PROVIDER).unwrap();
        let sim = Sim::new(SimPace::default());
        machines_join(&sim, &omni);
        let watchman = Watchman::new(&omni, &sim);
        for (zone, name) in &script.strangers {
            watchman.behind_our_back(|sim| sim.plant_foreign(zone, name));
        }
        let door = Door::default();
        let daemons = (0..script.daemons).map(|_| Daemon::new(&door)).collect();
        let mut world = Self {
            omni,
            sim,
            watchman,
            daemons,
            door,
            serving: None,
            key: Arc::new(Mutex::new(key.clone())),
            valid_key: key,
            clock,
            classes: [""; 2],
            spoiled: BTreeSet::new(),
            token_rotated: false,
            provider_deleted: false,
            later: Vec::new(),
        };
        world.start_omni();
        for number in 0..script.daemons {
            world.start_daemon(number);
        }
        world
    }

    fn start_omni(&mut self) {
        if self.serving.is_some() {
            return;
        }
        let (door, mut accepted) = unbounded_channel();
        *self.door.lock().unwrap() = Some(door);
        let omni = self.omni.clone();
        self.serving = Some(tokio::spawn(async move {
            let accepted = poll_fn(move |context| {
                let accepted = accepted.poll_recv(context);
                accepted.map(|stream| stream.map(std::io::Result::Ok))
            });
            omni.serve(accepted).await;
        }));
    }

    async fn kill_omni(&mut self) {
        if let Some(serving) = self.serving.take() {
            *self.door.lock().unwrap() = None;
            serving.abort();
            let _ = serving.await;
        }
    }

    /// Starts a daemon under a supervisor, which starts it again where it ends by itself.
    fn start_daemon(&mut self, number: usize) {
        let rough = Rough {
            sim: self.sim.clone(),
            gate: self.daemons[number].gate.clone(),
            watchman: self.watchman.clone(),
            daemon: number,
        };
        let daemon = &mut self.daemons[number];
        if daemon.life.is_some() {
            return;
        }
        let key = self.key.clone();
        let settings = move || Settings {
            endpoint: "http://omni.test".to_owned(),
            key: key.lock().unwrap().clone(),
            provider_id: PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        let stop = CancellationToken::new();
        let signer: Arc<Mutex<Option<Signer>>> = Arc::default();
        let (token, shown, dial) = (stop.clone(), signer.clone(), daemon.dial.clone());
        let watchman = self.watchman.clone();
        let task = tokio::spawn(async move {
            while !token.is_cancelled() {
                let omni = omni::Omni::new(&settings(), dial.clone()).unwrap();
                *shown.lock().unwrap() = Some(omni.signer.clone());
                let served = daemon::serve(parts(omni, rough.clone()), token.clone()).await;
                if let Err(error) = served {
                    watchman.trace(|| format!("daemon {number} ended: {error}"));
                    sleep(SUPERVISION).await;
                }
            }
        });
        daemon.life = Some(Life { task, stop, signer });
    }

    async fn end_daemon(&mut self, number: usize, politely: bool) {
        if let Some(life) = self.daemons[number].life.take() {
            let task: AbortHandle = life.task.abort_handle();
            if politely {
                life.stop.cancel();
                // One that is cut off from everything ends by its own bound.
                let _ = life.task.await;
            } else {
                task.abort();
                let _ = life.task.await;
            }
        }
    }

    fn end_later(&mut self, after: Duration, ending: Ending) {
        self.later.push((Instant::now() + after, ending));
    }

    /// Lets the whole script happen.
    pub(super) async fn live(&mut self, script: &Script) {
        let begun = Instant::now();
        let mut events = script.events.iter();
        let mut next = events.next();
        loop {
            let ending = self.later.iter().map(|(at, _)| *at).min();
            let happening = next.map_or(begun + script.length(), |(at, _)| begun + *at);
            match ending {
                Some(at) if at <= happening => {
                    tokio::time::sleep_until(at).await;
                    self.end_what_is_due().await;
                }
                _ => {
                    tokio::time::sleep_until(happening).await;
                    let Some((_, event)) = next else { return };
                    if self.provider_deleted {
                        // Nobody has any rights left, and daemons without rights are slow to watch.
                        return;
                    }
                    self.watchman.trace(|| format!("== {event:?}"));
                    self.happen(event).await;
                    next = events.next();
                }
            }
        }
    }

    async fn end_what_is_due(&mut self) {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.later)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.later = later;
        for (_, ending) in due {
            self.watchman.trace(|| format!("== end of {ending:?}"));
            self.end(ending);
        }
    }

    fn end(&mut self, ending: Ending) {
        match ending {
            Ending::Blind => self.sim.set_blind(false),
            Ending::OmniDown => self.start_omni(),
            Ending::Watches => self.omni.configure(|options| options.hold_watches = false),
            Ending::Drains => self.omni.configure(|options| options.hold_drains = false),
            Ending::Suspension => self.omni.configure(|options| options.suspended = false),
            Ending::Clock => self.clock.store(0, Ordering::Relaxed),
            Ending::Key => {
                self.valid_key.clone_into(&mut self.key.lock().unwrap());
                for life in self.daemons.iter().filter_map(|daemon| daemon.life.as_ref()) {
                    if let Some(signer) = life.signer.lock().unwrap().as_ref() {
                        signer.replace(ServiceAccount::parse(&self.valid_key).unwrap());
                    }
                }
            }
            Ending::Pause(number) => self.daemons[number].gate.open(),
            Ending::Death(number) => self.start_daemon(number),
        }
    }

    /// From now on nothing is wrong any more.
    pub(super) fn heal(&mut self) {
        self.watchman.trace(|| "== all faults end".to_owned());
        self.watchman.disarm();
        for (_, ending) in std::mem::take(&mut self.later) {
            self.end(ending);
        }
        self.omni
            .configure(|options| options.cache_staleness = Duration::ZERO);
    }

    async fn happen(&mut self, event: &Event) {
        match *event {
            Event::Scale(set, count) => {
                if !self.provider_deleted && self.omni.scale(set, count).is_err() {
                    self.template(set, count);
                }
            }
            Event::Edit(set, class) => {
                let at = SETS.iter().position(|name| *name == set).unwrap();
                self.classes[at] = class;
                if !self.provider_deleted {
                    let running = self.omni.list::<MachineRequests>(PROVIDER);
                    let of_set = format!("{set}-");
                    let count = running
                        .iter()
                        .filter(|request| request.id().starts_with(&of_set) && !request.tearing_down())
                        .count();
                    self.template(set, u32::try_from(count).unwrap());
                }
            }
            Event::Request(name, class) => {
                // Where there is one of that name still, nothing comes of the wish.
                let _ = self.omni.create_request(name, PROVIDER, &machine(class));
            }
            Event::TearDown(name) => {
                let _ = self.omni.teardown_request(name);
            }
            Event::TearDownOne(set, number) => {
                let of_set = format!("{set}-");
                let mut requests = self.omni.list::<MachineRequests>(PROVIDER);
                requests.retain(|request| request.id().starts_with(&of_set));
                if let Some(request) = pick(&requests, number) {
                    self.omni.teardown_request(request.id()).unwrap();
                }
            }
            Event::Cloud(verb, trouble, times) => self.watchman.arm_cloud(verb, trouble, times),
            Event::Blind(time) => {
                self.sim.set_blind(true);
                self.end_later(time, Ending::Blind);
            }
            Event::Stranger(zone, name) => {
                let is_free = |place: &str, of: &str| (place, of) != (zone, name);
                let free = self
                    .sim
                    .instances()
                    .iter()
                    .all(|(place, of, _)| is_free(place, of))
                    && self.sim.disks().iter().all(|(place, of)| is_free(place, of));
                if free {
                    self.watchman.behind_our_back(|sim| sim.plant_foreign(zone, name));
                }
            }
            Event::Vanish(number) => self.meddle(number, Sim::vanish),
            Event::Stop(number) => self.meddle(number, Sim::stop),
            Event::Break(number) => {
                self.meddle(number, |sim, zone, name| sim.break_down(zone, name, "failed"))
            }
            Event::ForgetImages => self.sim.forget_images(),
            Event::Omni(call, trouble, times) => self.watchman.arm_omni(call, trouble, times),
            Event::RestartOmni(time) => {
                self.kill_omni().await;
                self.end_later(time, Ending::OmniDown);
            }
            Event::CutWatches => self.omni.break_watches(),
            Event::CutConnections => self.omni.break_connections(),
            Event::HoldWatches(time) => {
                self.omni.configure(|options| options.hold_watches = true);
                self.end_later(time, Ending::Watches);
            }
            Event::ExpireBookmarks => {
                self.omni.compact();
                self.omni.break_watches();
            }
            Event::Lag(lag) => self.omni.configure(|options| options.cache_staleness = lag),
            Event::HoldDrains(time) => {
                self.omni.configure(|options| options.hold_drains = true);
                self.end_later(time, Ending::Drains);
            }
            Event::Suspend(time) => {
                self.omni.configure(|options| options.suspended = true);
                self.end_later(time, Ending::Suspension);
            }
            Event::Clock(seconds, time) => {
                self.clock.store(seconds, Ordering::Relaxed);
                self.end_later(time, Ending::Clock);
            }
            Event::RotateToken => {
                self.omni.rotate_join_token(PROVIDER);
                self.token_rotated = true;
            }
            Event::RotateKey(after) => {
                if !self.provider_deleted {
                    self.omni.revoke_keys(PROVIDER);
                    self.valid_key = self
                        .omni
                        .renew_key(PROVIDER, Duration::from_secs(365 * 24 * 3600))
                        .unwrap();
                    self.end_later(after, Ending::Key);
                }
            }
            Event::Touch => self.touch(),
            Event::DeleteProvider => {
                if self.omni.delete_provider(PROVIDER).is_ok() {
                    self.provider_deleted = true;
                    self.watchman.provider_is_deleted();
                } else {
                    self.watchman.trace(|| "it has machines: refused".to_owned());
                }
            }
            Event::Kill(number, time) => {
                self.end_daemon(number, false).await;
                self.end_later(time, Ending::Death(number));
            }
            Event::Restart(number, time) => {
                self.end_daemon(number, true).await;
                self.end_later(time, Ending::Death(number));
            }
            Event::Pause(number, time) => {
                self.daemons[number].gate.shut();
                self.end_later(time, Ending::Pause(number));
            }
        }
    }

    fn template(&self, set: &str, count: u32) {
        let at = SETS.iter().position(|name| *name == set).unwrap();
        let template = machine(self.classes[at]);
        self.omni.create_request_set(set, PROVIDER, count, &template);
    }

    fn meddle(&mut self, number: usize, act: impl FnOnce(&Sim, &str, &str)) {
        let owned = self.sim.owned();
        if let Some(owned) = pick(&owned, number) {
            self.spoiled.insert(owned.request.clone());
            self.watchman
                .behind_our_back(|sim| act(sim, &owned.zone, &owned.name));
        }
    }

    fn touch(&self) {
        for kind in [types::MACHINE_REQUESTS, types::MACHINE_REQUEST_STATUSES] {
            for stored in self.omni.list_raw(types::INFRA, kind) {
                let touched = (stored.version + 1).to_string();
                self.omni
                    .modify_raw(types::INFRA, kind, &stored.id, |stored| {
                        stored.labels.insert("touched".to_owned(), touched);
                    })
                    .unwrap();
            }
        }
    }

    /// Waits until the world is as the operators want it; says what is missing if that never comes.
    pub(super) async fn settles(&self) -> Result<(), String> {
        self.until(Self::unsettled).await
    }

    async fn until(&self, missing: impl Fn(&Self) -> Option<String>) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            match missing(self) {
                None => return Ok(()),
                Some(missing) if begun.elapsed() > PATIENCE => return Err(missing),
                Some(_) => sleep(LOOK).await,
            }
        }
    }

    fn unsettled(&self) -> Option<String> {
        let requests = self.omni.list::<MachineRequests>(PROVIDER);
        let instances = self.sim.instances();
        for owned in self.sim.owned() {
            if !requests.iter().any(|request| request.id() == owned.request) {
                return Some(format!("nobody wants {owned:?}"));
            }
        }
        for request in &requests {
            let id = request.id();
            if request.tearing_down() {
                return Some(format!("{id} is being torn down"));
            }
            let status = self.omni.get::<MachineRequestStatuses>(PROVIDER, id);
            let Some(status) = status else {
                return Some(format!("{id} has no status"));
            };
            let all_owned = self.sim.owned();
            let owned: Vec<_> = all_owned.iter().filter(|owned| owned.request == id).collect();
            let (stage, said) = (status.spec.stage, &status.spec.status);
            let excused = self.spoiled.contains(id)
                || !is_valid(&request.spec.provider_data)
                || self.is_taken(&request.spec.provider_data, id);
            let expected = match owned.as_slice() {
                [] => excused && stage == Stage::Failed,
                [one] => {
                    let state = instances
                        .iter()
                        .find(|(zone, name, _)| (zone, name) == (&one.zone, &one.name))
                        .map(|(_, _, state)| state.clone());
                    let runs = state == Some(InstanceState::Running) && one.instance.is_some();
                    let shown = one.instance.as_ref() == Some(&status.spec.id);
                    let joined = self.omni.is_joined(&status.spec.id) || self.token_rotated;
                    runs && shown && joined && (stage == Stage::Provisioned || self.token_rotated)
                        || self.spoiled.contains(id) && stage == Stage::Failed
                }
                _ => false,
            };
            if !expected {
                return Some(format!("{id} is {stage:?} {said:?} with {owned:?}"));
            }
        }
        None
    }

    /// Whether a stranger has the name of a single request where it may be: in the zone that a full one is left for, too.
    fn is_taken(&self, class: &str, id: &str) -> bool {
        let zones: &[&str] = match class {
            class if class.contains("[b]") => &["b"],
            class if class.contains("[a, b]") => &["a", "b"],
            _ => &["a"],
        };
        let strangers = self.sim.strangers();
        zones.iter().any(|zone| {
            let place = format!("(Zone({zone:?}), {id:?})");
            strangers.iter().any(|stranger| stranger.contains(&place))
        })
    }

    /// The operators want nothing any more.
    pub(super) async fn scale_to_nothing(&self) -> Result<(), String> {
        self.watchman
            .trace(|| "== everything is scaled to nothing".to_owned());
        for set in SETS {
            let _ = self.omni.scale(set, 0);
        }
        for request in self.omni.list::<MachineRequests>(PROVIDER) {
            let _ = self.omni.teardown_request(request.id());
        }
        self.until(Self::left).await
    }

    fn left(&self) -> Option<String> {
        if self.watchman.is_anything_flying() {
            return Some("a call is still under way".to_owned());
        }
        let owned = self.sim.owned();
        if !owned.is_empty() {
            return Some(format!("left in the cloud: {owned:?}"));
        }
        let mut left = String::new();
        for request in self.omni.list::<MachineRequests>(PROVIDER) {
            write!(left, " request {}", request.id()).unwrap();
        }
        for status in self.omni.list::<MachineRequestStatuses>(PROVIDER) {
            write!(left, " status {}", status.id()).unwrap();
        }
        for patch in self.omni.list::<ConfigPatchRequests>(PROVIDER) {
            write!(left, " patch {}", patch.id()).unwrap();
        }
        (!left.is_empty()).then(|| format!("left in Omni:{left}"))
    }

    /// Whether Omni took the provider away.
    pub(super) fn is_provider_deleted(&self) -> bool {
        self.provider_deleted
    }

    /// What carries our mark in the cloud.
    pub(super) fn owned(&self) -> Vec<String> {
        self.sim
            .owned()
            .iter()
            .map(|owned| format!("{owned:?}"))
            .collect()
    }

    /// Daemons that ended though nobody ended them: a supervisor only ends by a panic.
    pub(super) fn dead_daemons(&self) -> Vec<String> {
        let lives = self.daemons.iter().filter_map(|daemon| daemon.life.as_ref());
        lives
            .filter(|life| life.task.is_finished())
            .map(|_| "a daemon is dead".to_owned())
            .collect()
    }

    /// What a provider did that Omni has no way to refuse.
    pub(super) fn violations(&self) -> Vec<String> {
        self.omni.violations()
    }

    /// Everything that a person needs to understand a failure, but for the trace.
    pub(super) fn told(&self) -> String {
        let mut told = String::new();
        for instance in self.sim.instances() {
            writeln!(told, "instance {instance:?}").unwrap();
        }
        for owned in self.sim.owned() {
            writeln!(told, "ours {owned:?}").unwrap();
        }
        for stranger in self.sim.strangers() {
            writeln!(told, "stranger {stranger}").unwrap();
        }
        for stored in self.omni.everything() {
            let short = stored.kind.split('.').next().unwrap_or_default();
            if matches!(
                short,
                "MachineRequests" | "MachineRequestStatuses" | "ConfigPatchRequests"
            ) {
                writeln!(told, "{stored:?}").unwrap();
            }
        }
        for status in self.omni.list::<MachineRequestStatuses>(PROVIDER) {
            writeln!(told, "status {}: {:?}", status.id(), status.spec).unwrap();
        }
        told
    }
}

impl Daemon {
    fn new(door: &Door) -> Self {
        let gate = Gate::default();
        let (dial, mut dialled) = omni::memory();
        let (door, behind): (Door, Gate) = (door.clone(), gate.clone());
        tokio::spawn(async move {
            while let Some(stream) = dialled.recv().await {
                let gated = Gated {
                    stream,
                    gate: behind.clone(),
                };
                // Where nobody serves the connection is closed at once.
                if let Some(door) = door.lock().unwrap().as_ref() {
                    let _ = door.send(gated);
                }
            }
        });
        Self {
            dial,
            gate,
            life: None,
        }
    }
}

fn pick<T>(all: &[T], number: usize) -> Option<&T> {
    all.get(number % all.len().max(1))
}

fn machine(class: &str) -> MachineRequestSpec {
    MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        provider_data: class.to_owned(),
        ..MachineRequestSpec::default()
    }
}

fn options(script: &Script, clock: Arc<AtomicI64>) -> OmniOptions {
    OmniOptions {
        seed: script.seed,
        check_signatures: false,
        clock: Clock::new(move || {
            let off = clock.load(Ordering::Relaxed);
            let by = Duration::from_secs(off.unsigned_abs());
            match off {
                0.. => SystemTime::now() + by,
                _ => SystemTime::now() - by,
            }
        }),
        delays: Delays {
            drain: script.drain,
            ..Delays::default()
        },
        ..OmniOptions::default()
    }
}

fn parts(omni: omni::Omni, cloud: Rough) -> Parts<Rough> {
    Parts {
        omni,
        cloud,
        registration: InfraProviderStatusSpec {
            schema: "{}".to_owned(),
            name: "Sim".to_owned(),
            ..InfraProviderStatusSpec::default()
        },
        downloads: download::Settings::default(),
        nameservers: Vec::new(),
        concurrency: 8,
        orphans: omni_infra_provider::engine::orphans::Policy::Report,
        pace: Pace {
            // It is half of what an idle world does.
            heartbeat: Duration::from_secs(120),
            ..Pace::default()
        },
    }
}

/// Plays the machines in the instances.
fn machines_join(sim: &Sim, omni: &Omni) {
    let omni = omni.clone();
    sim.set_on_event(Arc::new(move |event| match event {
        sim::Event::Started {
            uuid,
            user_data,
            after,
        } => {
            let omni = omni.clone();
            tokio::spawn(async move {
                sleep(after).await;
                omni.machine_booted(&uuid, &user_data.0);
            });
        }
        sim::Event::Stopped { uuid } => omni.machine_stopped(&uuid),
    }));
}
