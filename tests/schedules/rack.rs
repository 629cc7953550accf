//! The same over the wire: the daemon with its Oxide backend against the sandbox's rack and image factory, on loopback.
//!
//! The clock is paused here too. What is sent over loopback is there at once, before the runtime finds nothing to do and lets
//! time pass; where it is not, a timer fires early, which is one more fault.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::BoxFuture;
use omni_infra_provider::backends::oxide::{self, Oxide};
use omni_infra_provider::daemon::{self, Parts};
use omni_infra_provider::engine::download;
use omni_infra_provider::machine::Pace;
use omni_infra_provider::omni::kinds::{
    InfraProviderStatusSpec, MachineRequestSpec, MachineRequestStatuses, MachineRequests, Stage,
};
use omni_infra_provider::omni::{self, Phase, Settings};
use omni_infra_provider::sandbox::factory::{self, Factory, FactoryOptions};
use omni_infra_provider::sandbox::omni::{Omni, OmniOptions};
use omni_infra_provider::sandbox::oxide::{Call, Happening, Moment, OxideApi, OxideOptions, Verdict};
use omni_infra_provider::sandbox::{PROJECT, PROVIDER_DATA};
use omni_infra_provider::secret::Secret;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

const PROVIDER: &str = "oxide";
const SET: &str = "w";
/// As the rack's default options have it.
const TOKEN: &str = "oxide-token-sandbox";
/// In the rack's time, as for the simulated cloud.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What happens at its moment.
#[derive(Debug, Clone)]
enum Event {
    Scale(u32),
    /// The next calls of an operation go wrong, so many of them.
    Call(&'static str, Fault, u32),
    /// The project is out of the token's sight for so long: a 404 for everything in it.
    Hide(Duration),
    /// The factory's next answers go wrong.
    Factory(factory::Fault, u32),
    /// The daemon dies, and is started again so much later.
    Kill(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Status(u16, Moment),
    Drop(Moment),
    Hang(Moment),
}

/// A seed's script.
struct Script {
    events: Vec<(Duration, Event)>,
}

impl Script {
    fn new(seed: u64) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        let mut events = vec![(Duration::ZERO, Event::Scale(dice.gen_range(1..=3)))];
        for _ in 0..dice.gen_range(2..=8) {
            let at = Duration::from_millis(dice.gen_range(0..10_000));
            events.push((at, event(&mut dice)));
        }
        events.sort_by_key(|(at, _)| *at);
        Self { events }
    }
}

fn event(dice: &mut StdRng) -> Event {
    let operations = [
        "instance_create",
        "instance_start",
        "instance_stop",
        "instance_delete",
        "instance_view",
        "instance_list",
        "disk_list",
        "disk_list",
        "disk_create",
        "disk_delete",
        "disk_bulk_write_import_start",
        "disk_bulk_write_import",
        "disk_bulk_write_import_stop",
        "disk_finalize_import",
        "image_create",
        "image_view",
        "snapshot_delete",
    ];
    let seconds = |dice: &mut StdRng| Duration::from_secs(*[0, 1, 20, 100].choose(dice).unwrap());
    match dice.gen_range(0..20) {
        0..4 => Event::Scale(dice.gen_range(0..=3)),
        4..14 => {
            let moment = *[Moment::Before, Moment::After].choose(dice).unwrap();
            let fault = match dice.gen_range(0..5) {
                0..2 => Fault::Status(*[429, 500, 503].choose(dice).unwrap(), moment),
                2..4 => Fault::Drop(moment),
                _ => Fault::Hang(moment),
            };
            Event::Call(operations.choose(dice).unwrap(), fault, dice.gen_range(1..=3))
        }
        14 => Event::Hide(seconds(dice)),
        15..17 => {
            let faults = [
                factory::Fault::Truncated(1000),
                factory::Fault::Status(503),
                factory::Fault::Garbage,
            ];
            Event::Factory(*faults.choose(dice).unwrap(), dice.gen_range(1..=2))
        }
        _ => Event::Kill(seconds(dice)),
    }
}

#[derive(Default)]
struct Notes {
    trace: String,
    wrongs: Vec<String>,
    armed: Vec<(&'static str, Fault, u32)>,
    /// Names of everything that was ever requested.
    ours: BTreeSet<String>,
}

struct World {
    omni: Omni,
    rack: OxideApi,
    factory: Factory,
    notes: Arc<Mutex<Notes>>,
    begun: Instant,
    key: Secret,
    host: String,
    dial: omni::Dial,
    daemon: Option<JoinHandle<()>>,
}

fn lock(notes: &Mutex<Notes>) -> MutexGuard<'_, Notes> {
    notes.lock().unwrap()
}

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    (listener, address)
}

impl World {
    async fn new(seed: u64) -> Self {
        let rack = OxideApi::new(OxideOptions {
            seed: Some(seed),
            // A list of a few disks has pages, and each may fail.
            page: 2,
            ..OxideOptions::default()
        });
        rack.add_project(PROJECT).unwrap();
        rack.plant_instance(PROJECT, "stranger", "not ours").unwrap();
        let detached = ::oxide::types::DiskState::Detached;
        rack.plant_disk(PROJECT, "stranger", "not ours", detached)
            .unwrap();
        let factory = Factory::new(FactoryOptions {
            image_size: 64 * 1024,
            ..FactoryOptions::default()
        });
        let (rack_door, host) = listener().await;
        let (factory_door, factory_at) = listener().await;
        let omni = Omni::new(OmniOptions {
            seed,
            check_signatures: false,
            image_factory_base_url: factory_at,
            ..OmniOptions::default()
        });
        let key = omni.add_provider(PROVIDER).unwrap();
        let schematics = omni.clone();
        factory.also_knows(move |id| schematics.schematic(id).is_some());
        let (dial, mut dialled) = omni::memory();
        let (served, rack_served, factory_served) = (omni.clone(), rack.clone(), factory.clone());
        tokio::spawn(async move {
            let dialled = futures_util::stream::poll_fn(move |context| {
                dialled
                    .poll_recv(context)
                    .map(|stream| stream.map(std::io::Result::Ok))
            });
            served.serve(dialled).await;
        });
        tokio::spawn(async move { rack_served.serve(rack_door).await });
        tokio::spawn(async move { factory_served.serve(factory_door).await });
        let (mut happenings, machines) = (rack.happenings(), omni.clone());
        tokio::spawn(async move {
            while let Some(happening) = happenings.recv().await {
                match happening {
                    Happening::Booted { id, user_data } => {
                        machines.machine_booted(&id.to_string(), &user_data);
                    }
                    Happening::Stopped { id } => machines.machine_stopped(&id.to_string()),
                    Happening::Gone { id } => machines.machine_gone(&id.to_string()),
                }
            }
        });
        let mut world = Self {
            omni,
            rack,
            factory,
            notes: Arc::default(),
            begun: Instant::now(),
            key,
            host,
            dial,
            daemon: None,
        };
        world.watch();
        world.start_daemon();
        world
    }

    fn start_daemon(&mut self) {
        if self.daemon.is_some() {
            return;
        }
        let cloud = Oxide::new(&oxide::Settings {
            host: self.host.clone(),
            token: Secret::new(TOKEN),
            ca_bundle: None,
            provider_id: PROVIDER.to_owned(),
        });
        let settings = Settings {
            endpoint: "http://omni.test".to_owned(),
            key: self.key.clone(),
            provider_id: PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        let parts = Parts {
            omni: omni::Omni::new(&settings, self.dial.clone()).unwrap(),
            cloud: cloud.unwrap(),
            registration: InfraProviderStatusSpec::default(),
            downloads: download::Settings::default(),
            nameservers: Vec::new(),
            concurrency: 8,
            orphans: omni_infra_provider::engine::orphans::Policy::Report,
            pace: Pace {
                heartbeat: Duration::from_secs(120),
                ..Pace::default()
            },
        };
        self.daemon = Some(tokio::spawn(async move {
            daemon::serve(parts, CancellationToken::new()).await.unwrap();
        }));
    }

    /// Hands out faults, and checks every mutation of the rack.
    fn watch(&self) {
        let (notes, omni, rack, begun) = (
            self.notes.clone(),
            self.omni.clone(),
            self.rack.clone(),
            self.begun,
        );
        self.rack.set_hook(Some(Arc::new(
            move |call: &Call, moment: Moment| -> BoxFuture<'static, Verdict> {
                if moment == Moment::After {
                    for wrong in wrong(call, &omni, &rack, &lock(&notes).ours) {
                        lock(&notes).wrongs.push(wrong);
                    }
                }
                let mut notes = lock(&notes);
                let at = notes.armed.iter().position(|(operation, fault, _)| {
                    let (Fault::Status(_, when) | Fault::Drop(when) | Fault::Hang(when)) = *fault;
                    *operation == call.operation && when == moment
                });
                let fault = at.map(|at| {
                    let (_, fault, times) = &mut notes.armed[at];
                    let fault = *fault;
                    *times -= 1;
                    if *times == 0 {
                        notes.armed.remove(at);
                    }
                    fault
                });
                let seconds = begun.elapsed().as_secs_f64();
                if moment == Moment::Before || fault.is_some() {
                    writeln!(notes.trace, "{seconds:>9.3} s  {call} {moment:?} {fault:?}").unwrap();
                }
                let verdict = match fault {
                    None => Verdict::Proceed,
                    Some(Fault::Status(status, _)) => Verdict::Status {
                        status,
                        error_code: None,
                        message: "as told".to_owned(),
                    },
                    Some(Fault::Drop(_)) => Verdict::Drop,
                    Some(Fault::Hang(_)) => Verdict::Hang,
                };
                Box::pin(std::future::ready(verdict))
            },
        )));
    }

    async fn happen(&mut self, event: &Event) {
        let seconds = self.begun.elapsed().as_secs_f64();
        writeln!(lock(&self.notes).trace, "{seconds:>9.3} s  == {event:?}").unwrap();
        match *event {
            Event::Scale(count) => self.scale(count),
            Event::Call(operation, fault, times) => lock(&self.notes).armed.push((operation, fault, times)),
            Event::Hide(time) => {
                self.rack.hide_project(TOKEN, PROJECT, true);
                sleep(time).await;
                self.rack.hide_project(TOKEN, PROJECT, false);
            }
            Event::Factory(fault, times) => self.factory.set_fault("GET /image", Some(fault), Some(times)),
            Event::Kill(time) => {
                if let Some(daemon) = self.daemon.take() {
                    daemon.abort();
                    let _ = daemon.await;
                }
                sleep(time).await;
                self.start_daemon();
            }
        }
    }

    fn scale(&self, count: u32) {
        if self.omni.scale(SET, count).is_err() {
            let template = MachineRequestSpec {
                talos_version: "1.12.0".to_owned(),
                provider_data: PROVIDER_DATA.to_owned(),
                ..MachineRequestSpec::default()
            };
            self.omni.create_request_set(SET, PROVIDER, count, &template);
        }
    }

    async fn until(&self, missing: impl Fn(&Self) -> Option<String>) -> Result<(), String> {
        let begun = Instant::now();
        while let Some(missing) = missing(self) {
            if begun.elapsed() > PATIENCE {
                return Err(missing);
            }
            for request in self.omni.list::<MachineRequests>(PROVIDER) {
                lock(&self.notes).ours.insert(request.id().to_owned());
            }
            sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }

    fn unsettled(&self, count: usize) -> Option<String> {
        let requests = self.omni.list::<MachineRequests>(PROVIDER);
        let names: Vec<String> = self.names();
        let wanted: Vec<String> = requests.iter().map(|request| request.id().to_owned()).collect();
        let mut expected: Vec<String> = wanted.iter().cloned().chain(["stranger".to_owned()]).collect();
        expected.sort_unstable();
        if wanted.len() != count || names != expected {
            return Some(format!("{wanted:?} are wanted, {names:?} are there"));
        }
        wanted.iter().find_map(|id| {
            let status = self.omni.get::<MachineRequestStatuses>(PROVIDER, id);
            let good = status.as_ref().is_some_and(|status| {
                status.spec.stage == Stage::Provisioned && self.omni.is_joined(&status.spec.id)
            });
            (!good).then(|| format!("{id} is {:?}", status.map(|status| status.spec)))
        })
    }

    fn left(&self) -> Option<String> {
        if let Some(unsettled) = self.unsettled(0) {
            return Some(unsettled);
        }
        let disks: Vec<String> = self
            .rack
            .disks(PROJECT)
            .iter()
            .map(|disk| disk.name.to_string())
            .collect();
        let snapshots = self.rack.snapshots(PROJECT).len();
        (disks != ["stranger"] || snapshots > 0).then(|| format!("disks {disks:?}, {snapshots} snapshots"))
    }

    fn names(&self) -> Vec<String> {
        let instances = self.rack.instances(PROJECT);
        instances
            .iter()
            .map(|instance| instance.name.to_string())
            .collect()
    }

    /// Strangers, byte for byte.
    fn strangers(&self) -> String {
        let instances = self.rack.instances(PROJECT);
        let disks = self.rack.disks(PROJECT);
        let instance = instances
            .iter()
            .find(|instance| instance.name.as_str() == "stranger");
        let disk = disks.iter().find(|disk| disk.name.as_str() == "stranger");
        format!("{instance:?} {disk:?}")
    }
}

/// What a call that took effect must not have done.
fn wrong(call: &Call, omni: &Omni, rack: &OxideApi, ours: &BTreeSet<String>) -> Vec<String> {
    let Some(target) = &call.target else {
        return Vec::new();
    };
    let named = |instances: &[::oxide::types::Instance]| {
        let found = instances
            .iter()
            .find(|one| one.id.to_string() == *target || one.name.as_str() == target);
        found.map(|one| one.name.to_string())
    };
    let name = match call.operation {
        "instance_create" => Some(target.clone()),
        "instance_start" | "instance_stop" => named(&rack.instances(PROJECT)),
        _ => None,
    };
    let Some(name) = name else { return Vec::new() };
    let request = omni.get::<MachineRequests>(PROVIDER, &name);
    let status = omni.get::<MachineRequestStatuses>(PROVIDER, &name);
    let claimed = request
        .as_ref()
        .is_some_and(|request| !request.metadata.finalizers.is_empty())
        && status
            .as_ref()
            .is_some_and(|status| !status.metadata.annotations.is_empty());
    let drained = request.is_none_or(|request| request.metadata.phase == Phase::TearingDown)
        && status.is_none_or(|status| status.metadata.finalizers.is_empty());
    let good = if call.operation == "instance_stop" {
        drained && (ours.contains(&name) || name != "stranger")
    } else {
        claimed
    };
    if good {
        Vec::new()
    } else {
        vec![format!("{call} of {name}")]
    }
}

/// Plays the schedule of a seed in a runtime of its own; what went wrong, in full.
pub(super) fn play(seed: u64) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(live(seed))
}

async fn live(seed: u64) -> Result<(), String> {
    let script = Script::new(seed);
    let mut world = World::new(seed).await;
    let strangers = world.strangers();
    let mut wanted = 0;
    for (at, event) in &script.events {
        tokio::time::sleep_until(world.begun + *at).await;
        world.happen(event).await;
        if let Event::Scale(count) = event {
            wanted = *count as usize;
        }
    }
    lock(&world.notes).armed.clear();
    world.factory.set_fault("GET /image", None, None);
    let mut wrongs = Vec::new();
    if let Err(missing) = world.until(|world| world.unsettled(wanted)).await {
        wrongs.push(format!("it does not settle: {missing}"));
    } else {
        world.scale(0);
        if let Err(left) = world.until(World::left).await {
            wrongs.push(format!("it does not end: {left}"));
        }
    }
    wrongs.extend(lock(&world.notes).wrongs.clone());
    wrongs.extend(world.omni.violations());
    if world.strangers() != strangers {
        wrongs.push(format!(
            "strangers were {strangers} and are {}",
            world.strangers()
        ));
    }
    if world.daemon.as_ref().is_none_or(JoinHandle::is_finished) {
        wrongs.push("the daemon is dead".to_owned());
    }
    if wrongs.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{}\n--- script\n{:#?}\n--- trace\n{}",
        wrongs.join("\n"),
        script.events,
        lock(&world.notes).trace
    ))
}
