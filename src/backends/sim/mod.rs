//! An in-memory cloud: the reference semantics of the contract, for tests. Misbehaves on command.
//!
//! It is modelled on Oxide, the strictest of our clouds: names are unique in a zone, an instance is created stopped, must be
//! stopped before it is deleted, and leaves its disk behind. Time passes by tokio's clock.

mod ledger;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use crate::cloud::{
    BootProfile, BoxFuture, Cloud, CloudError, Console, ErrorKind, Found, ImageKey, ImageRef, ImageSource,
    Instance, InstanceRef, InstanceSpec, InstanceState, Legacy, Limits, Mark, Marked, Replace, Result, Scope,
    Timestamp, UserData,
};

pub use ledger::{Change, Did, Owned};

/// A zone of the simulated cloud.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Zone(pub String);

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Scope for Zone {}

/// What a machine class of the simulated cloud says.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SimClass {
    /// Zones, in the order to try.
    pub zones: Vec<String>,
    /// Size; at least 1.
    pub size: u32,
    /// Nameservers.
    pub nameservers: Vec<IpAddr>,
    /// Which lost machines are replaced.
    pub replace: Replace,
}

impl Default for SimClass {
    fn default() -> Self {
        Self {
            zones: vec!["a".to_owned()],
            size: 1,
            nameservers: Vec::new(),
            replace: Replace::default(),
        }
    }
}

/// How long things take.
#[derive(Debug, Clone, Copy)]
pub struct SimPace {
    /// From stopped to running.
    pub start: Duration,
    /// From running to stopped.
    pub stop: Duration,
    /// An import.
    pub import: Duration,
    /// Every call.
    pub call: Duration,
}

impl Default for SimPace {
    fn default() -> Self {
        Self {
            start: Duration::from_millis(100),
            stop: Duration::from_millis(100),
            import: Duration::from_secs(5),
            call: Duration::from_millis(10),
        }
    }
}

/// A call, for hooks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The verb: "create instance".
    pub verb: &'static str,
    /// On what: an instance's name, an image's schematic, a zone.
    pub on: String,
}

/// When a hook is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The call arrived and has no effect yet.
    Before,
    /// It took effect and is not answered yet.
    After,
}

/// Sees every call twice; an error becomes the answer. May wait for ever.
pub type Hook = Arc<dyn Fn(Call, Moment) -> BoxFuture<'static, Option<CloudError>> + Send + Sync>;

/// What happens to an instance, for whoever plays the machine in it.
#[derive(Debug, Clone)]
pub enum Event {
    /// It starts.
    Started {
        /// Its UUID.
        uuid: String,
        /// What it will read.
        user_data: UserData,
        /// Until it runs.
        after: Duration,
    },
    /// It stops, or is gone.
    Stopped {
        /// Its UUID.
        uuid: String,
    },
}

/// Hears of events.
pub type OnEvent = Arc<dyn Fn(Event) + Send + Sync>;

#[derive(Debug, Clone)]
enum Power {
    Stopped,
    Running,
    Broken(String),
    Changing { until: tokio::time::Instant, to: bool },
}

#[derive(Debug, Clone)]
struct Machine {
    id: String,
    /// `None`: somebody else's.
    mark: Option<Owner>,
    power: Power,
    started: Option<tokio::time::Instant>,
    user_data: UserData,
    /// What it has written to its console since it was started.
    console: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    Ours(Mark),
    /// The bare sentence of the Go provider, with its provider ID.
    Bare(String),
}

#[derive(Debug, Clone)]
struct Disk {
    mark: Option<Owner>,
    made: tokio::time::Instant,
}

#[derive(Default)]
struct World {
    machines: BTreeMap<(Zone, String), Machine>,
    disks: BTreeMap<(Zone, String), Disk>,
    images: BTreeMap<(Zone, ImageKey), String>,
    hook: Option<Hook>,
    on_event: Option<OnEvent>,
    blind: bool,
    /// How many creations are still accepted and come to nothing.
    failing: usize,
    /// What such a creation was for: the next try is told.
    failed: BTreeSet<(Zone, String)>,
    next_id: u64,
    changes: Vec<Change>,
}

/// The simulated cloud. Clones are the same cloud.
#[derive(Clone)]
pub struct Sim {
    world: Arc<Mutex<World>>,
    pace: SimPace,
    epoch: (Timestamp, tokio::time::Instant),
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sim")
    }
}

impl Sim {
    /// An empty cloud.
    #[must_use]
    pub fn new(pace: SimPace) -> Self {
        Self {
            world: Arc::default(),
            pace,
            epoch: (std::time::SystemTime::now().into(), tokio::time::Instant::now()),
        }
    }

    /// Sets the hook.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.lock().hook = hook;
    }

    /// Sets who hears of events.
    pub fn set_on_event(&self, on_event: OnEvent) {
        self.lock().on_event = Some(on_event);
    }

    /// Every instance, whoever's: zone, name and state.
    #[must_use]
    pub fn instances(&self) -> Vec<(String, String, InstanceState)> {
        let now = tokio::time::Instant::now();
        let world = self.lock();
        let all = world.machines.iter();
        all.map(|((zone, name), machine)| (zone.0.clone(), name.clone(), machine.state(now)))
            .collect()
    }

    /// The vendor's ID of an instance.
    #[must_use]
    pub fn instance_id(&self, zone: &str, name: &str) -> Option<String> {
        let key = (Zone(zone.to_owned()), name.to_owned());
        self.lock().machines.get(&key).map(|machine| machine.id.clone())
    }

    /// Every disk, whoever's.
    #[must_use]
    pub fn disks(&self) -> Vec<(String, String)> {
        let world = self.lock();
        world
            .disks
            .keys()
            .map(|(zone, name)| (zone.0.clone(), name.clone()))
            .collect()
    }

    /// How many images there are.
    #[must_use]
    pub fn images(&self) -> usize {
        self.lock().images.len()
    }

    /// The user data of an instance.
    #[must_use]
    pub fn user_data(&self, zone: &str, name: &str) -> Option<UserData> {
        let key = (Zone(zone.to_owned()), name.to_owned());
        self.lock()
            .machines
            .get(&key)
            .map(|machine| machine.user_data.clone())
    }

    /// Somebody else makes an instance of this name, running.
    pub fn plant_foreign(&self, zone: &str, name: &str) {
        self.plant(zone, name, None);
    }

    /// The Go provider made an instance of this name, running; returns its ID.
    pub fn plant_bare(&self, zone: &str, name: &str, provider: &str) -> String {
        self.plant(zone, name, Some(Owner::Bare(provider.to_owned())))
    }

    /// An instance that carries this mark, running; returns its ID.
    pub fn plant_marked(&self, zone: &str, name: &str, mark: Mark) -> String {
        self.plant(zone, name, Some(Owner::Ours(mark)))
    }

    fn plant(&self, zone: &str, name: &str, mark: Option<Owner>) -> String {
        let now = tokio::time::Instant::now();
        let mut world = self.lock();
        let id = world.id();
        let key = (Zone(zone.to_owned()), name.to_owned());
        world.disks.insert(
            key.clone(),
            Disk {
                mark: mark.clone(),
                made: now,
            },
        );
        let machine = Machine {
            id: id.clone(),
            mark,
            power: Power::Running,
            started: Some(now),
            user_data: UserData(Vec::new()),
            console: String::new(),
        };
        world.machines.insert(key, machine);
        id
    }

    /// Somebody deletes an instance and its disk behind the daemon's back.
    pub fn vanish(&self, zone: &str, name: &str) {
        let key = (Zone(zone.to_owned()), name.to_owned());
        let mut world = self.lock();
        world.machines.remove(&key);
        world.disks.remove(&key);
    }

    /// An instance goes and its disk stays, as after a creation that failed half-way.
    pub fn lose_instance(&self, zone: &str, name: &str) {
        let key = (Zone(zone.to_owned()), name.to_owned());
        self.lock().machines.remove(&key);
    }

    /// Somebody stops an instance behind the daemon's back.
    pub fn stop(&self, zone: &str, name: &str) {
        self.power(zone, name, Power::Stopped);
    }

    /// Somebody starts it again; nobody plays the machine in it.
    pub fn start(&self, zone: &str, name: &str) {
        self.power(zone, name, Power::Running);
    }

    /// An instance writes to its serial console.
    pub fn write_console(&self, zone: &str, name: &str, text: &str) {
        let key = (Zone(zone.to_owned()), name.to_owned());
        if let Some(machine) = self.lock().machines.get_mut(&key) {
            machine.console.push_str(text);
        }
    }

    /// An instance breaks.
    pub fn break_down(&self, zone: &str, name: &str, word: &str) {
        self.power(zone, name, Power::Broken(word.to_owned()));
    }

    /// Somebody deletes all images.
    pub fn forget_images(&self) {
        self.lock().images.clear();
    }

    /// The next `times` creations are accepted and fail later, for a lack of room: the next try is told, as by a cloud whose
    /// changes are jobs.
    pub fn fail_later(&self, times: usize) {
        self.lock().failing = times;
    }

    /// Takes the daemon's right to look away, or gives it back.
    pub fn set_blind(&self, blind: bool) {
        self.lock().blind = blind;
    }

    fn power(&self, zone: &str, name: &str, power: Power) {
        let key = (Zone(zone.to_owned()), name.to_owned());
        if let Some(machine) = self.lock().machines.get_mut(&key) {
            machine.power = power;
        }
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn time(&self, instant: tokio::time::Instant) -> Timestamp {
        self.epoch
            .0
            .after(instant.saturating_duration_since(self.epoch.1))
    }

    /// A call: asks the hook, takes its time, takes effect, asks the hook again.
    async fn call<T>(
        &self,
        verb: &'static str,
        on: &str,
        effect: impl FnOnce(&mut World, tokio::time::Instant) -> Result<T>,
    ) -> Result<T> {
        self.ask(verb, on, Moment::Before).await?;
        sleep(self.pace.call).await;
        let result = {
            let mut world = self.lock();
            if world.blind {
                let what = format!("{on}: the zone is not visible to this account");
                return Err(CloudError::new("sim", verb, ErrorKind::Denied, what));
            }
            effect(&mut world, tokio::time::Instant::now())
        };
        self.ask(verb, on, Moment::After).await?;
        result
    }

    async fn ask(&self, verb: &'static str, on: &str, moment: Moment) -> Result<()> {
        let hook = self.lock().hook.clone();
        let Some(hook) = hook else { return Ok(()) };
        let call = Call {
            verb,
            on: on.to_owned(),
        };
        hook(call, moment).await.map_or(Ok(()), Err)
    }

    fn instance(&self, name: &str, machine: &Machine, now: tokio::time::Instant) -> Instance {
        Instance {
            name: name.to_owned(),
            id: machine.id.clone(),
            uuid: Some(machine.id.clone()),
            node_provider_id: Some(format!("sim://{}", machine.id)),
            state: machine.state(now),
            started: machine.started.map(|at| self.time(at)),
            mark: match &machine.mark {
                Some(Owner::Ours(mark)) => Some(mark.clone()),
                Some(Owner::Bare(_)) | None => None,
            },
        }
    }
}

impl World {
    fn id(&mut self) -> String {
        self.next_id += 1;
        format!("00000000-0000-4000-8000-{:012}", self.next_id)
    }
}

impl Machine {
    fn state(&self, now: tokio::time::Instant) -> InstanceState {
        match &self.power {
            Power::Stopped => InstanceState::Stopped,
            Power::Running => InstanceState::Running,
            Power::Broken(word) => InstanceState::Broken(word.clone()),
            Power::Changing { until, .. } if *until > now => InstanceState::Starting,
            Power::Changing { to: true, .. } => InstanceState::Running,
            Power::Changing { to: false, .. } => InstanceState::Stopped,
        }
    }
}

impl Owner {
    fn owns(owner: Option<&Self>, instance: &InstanceRef<Zone>) -> bool {
        match owner {
            Some(Self::Ours(mark)) => *mark == instance.mark,
            Some(Self::Bare(provider)) => instance.adopt_bare && *provider == instance.mark.provider,
            None => false,
        }
    }
}

fn key(instance: &InstanceRef<Zone>) -> (Zone, String) {
    (instance.scope.clone(), instance.name.clone())
}

fn fault(verb: &'static str, kind: ErrorKind, what: String) -> CloudError {
    CloudError::new("sim", verb, kind, what)
}

impl Cloud for Sim {
    type Class = SimClass;
    type Scope = Zone;

    const KIND: &'static str = "sim";
    const LIMITS: Limits = Limits {
        name: 54,
        user_data: 32_768,
    };

    fn validate(class: &SimClass) -> Vec<String> {
        let mut faults = Vec::new();
        if class.size == 0 {
            faults.push("size must be at least 1".to_owned());
        }
        if class.zones.is_empty() {
            faults.push("zones must name at least one zone".to_owned());
        }
        faults.extend(class.replace.fault());
        faults
    }

    fn scopes(class: &SimClass) -> Vec<Zone> {
        class.zones.iter().cloned().map(Zone).collect()
    }

    fn boot(class: &SimClass) -> BootProfile {
        BootProfile {
            platform: "nocloud",
            arch: "amd64",
            format: Some("raw.xz"),
            kernel_args: Vec::new(),
            extensions: Vec::new(),
            nameservers: class.nameservers.clone(),
        }
    }

    fn replace(class: &SimClass) -> Replace {
        class.replace
    }

    fn legacy(spec: &[u8]) -> Option<Legacy<Zone>> {
        let text = std::str::from_utf8(spec).ok()?;
        let (zone, id) = text.split_once('/')?;
        Some(Legacy {
            scope: Zone(zone.to_owned()),
            id: Some(id.to_owned()),
        })
    }

    async fn check(&self) -> Result<()> {
        self.call("check", "", |_, _| Ok(())).await
    }

    async fn find_image(&self, scope: &Zone, image: &ImageKey) -> Result<Option<ImageRef>> {
        let place = (scope.clone(), image.clone());
        self.call("find image", &image.talos_version, |world, _| {
            Ok(world.images.get(&place).map(|id| ImageRef {
                id: id.clone(),
                name: id.clone(),
            }))
        })
        .await
    }

    async fn import_image(
        &self,
        scope: &Zone,
        image: &ImageKey,
        _source: &dyn ImageSource,
    ) -> Result<ImageRef> {
        sleep(self.pace.import).await;
        let place = (scope.clone(), image.clone());
        self.call("import image", &image.talos_version, |world, _| {
            let id = world.id();
            let id = world.images.entry(place).or_insert(id).clone();
            Ok(ImageRef {
                id: id.clone(),
                name: id,
            })
        })
        .await
    }

    async fn find_instance(&self, instance: &InstanceRef<Zone>) -> Result<Found> {
        self.call("find instance", &instance.name, |world, now| {
            let key = key(instance);
            let machine = world.machines.get(&key);
            if let Some(machine) = machine
                && Owner::owns(machine.mark.as_ref(), instance)
            {
                return Ok(Found::Ours(Arc::new(self.instance(&instance.name, machine, now))));
            }
            if let Some(disk) = world.disks.get(&key)
                && Owner::owns(disk.mark.as_ref(), instance)
            {
                return Ok(Found::Remains {
                    since: Some(self.time(disk.made)),
                });
            }
            if machine.is_some() {
                return Ok(Found::Foreign {
                    what: format!("instance {} without our mark", instance.name),
                });
            }
            if world.disks.contains_key(&key) {
                return Ok(Found::Foreign {
                    what: format!("disk {} without our mark", instance.name),
                });
            }
            Ok(Found::Nothing)
        })
        .await
    }

    async fn create_instance(&self, spec: &InstanceSpec<Zone, SimClass>) -> Result<()> {
        let instance = &spec.instance;
        self.call("create instance", &instance.name, |world, now| {
            let key = key(instance);
            if let Some(machine) = world.machines.get(&key) {
                if machine.mark == Some(Owner::Ours(instance.mark.clone())) {
                    return Ok(());
                }
                let what = format!("{}: the name is taken", instance.name);
                return Err(fault("create instance", ErrorKind::Foreign, what));
            }
            if world.disks.contains_key(&key) {
                let what = format!("{}: a disk of that name is left", instance.name);
                return Err(fault("create instance", ErrorKind::Busy, what));
            }
            let image = (instance.scope.clone(), spec.image.id.clone());
            if !world
                .images
                .iter()
                .any(|((zone, _), id)| *zone == image.0 && *id == image.1)
            {
                let what = format!("{}: no such image", instance.name);
                return Err(fault("create instance", ErrorKind::Rejected, what));
            }
            if world.failed.remove(&key) {
                let what = format!("{}: no room", instance.name);
                return Err(fault("create instance", ErrorKind::Exhausted, what));
            }
            if world.failing > 0 {
                world.failing -= 1;
                world.failed.insert(key);
                return Ok(());
            }
            let mark = Some(Owner::Ours(instance.mark.clone()));
            world.disks.insert(
                key.clone(),
                Disk {
                    mark: mark.clone(),
                    made: now,
                },
            );
            let machine = Machine {
                id: world.id(),
                mark,
                power: Power::Stopped,
                started: None,
                user_data: spec.user_data.clone(),
                console: String::new(),
            };
            world.note(Did::Create, &key, machine.mark.as_ref());
            world.machines.insert(key, machine);
            Ok(())
        })
        .await
    }

    async fn start_instance(&self, instance: &InstanceRef<Zone>, _: &UserData) -> Result<()> {
        let start = self.pace.start;
        self.call("start instance", &instance.name, |world, now| {
            let on_event = world.on_event.clone();
            let key = key(instance);
            let Some(machine) = world.machines.get_mut(&key) else {
                let what = format!("{}: it is gone", instance.name);
                return Err(fault("start instance", ErrorKind::Busy, what));
            };
            if !Owner::owns(machine.mark.as_ref(), instance) {
                let what = format!("{}: it is not ours", instance.name);
                return Err(fault("start instance", ErrorKind::Foreign, what));
            }
            if machine.state(now) == InstanceState::Stopped {
                machine.power = Power::Changing {
                    until: now + start,
                    to: true,
                };
                machine.started = Some(now);
                machine.console.clear();
                if let Some(on_event) = on_event {
                    on_event(Event::Started {
                        uuid: machine.id.clone(),
                        user_data: machine.user_data.clone(),
                        after: start,
                    });
                }
                let mark = machine.mark.clone();
                world.note(Did::Start, &key, mark.as_ref());
            }
            Ok(())
        })
        .await
    }

    async fn delete_instance(&self, instance: &InstanceRef<Zone>) -> Result<()> {
        let stop = self.pace.stop;
        self.call("delete instance", &instance.name, |world, now| {
            let key = key(instance);
            let on_event = world.on_event.clone();
            let ours = world
                .machines
                .get_mut(&key)
                .filter(|machine| Owner::owns(machine.mark.as_ref(), instance));
            if let Some(machine) = ours {
                if instance.id.as_ref() != Some(&machine.id) {
                    let what = format!("{}: an instance exists", instance.name);
                    return Err(fault("delete instance", ErrorKind::Busy, what));
                }
                let mark = machine.mark.clone();
                match machine.state(now) {
                    InstanceState::Running | InstanceState::Broken(_) => {
                        machine.power = Power::Changing {
                            until: now + stop,
                            to: false,
                        };
                        if let Some(on_event) = on_event {
                            on_event(Event::Stopped {
                                uuid: machine.id.clone(),
                            });
                        }
                        world.note(Did::Stop, &key, mark.as_ref());
                    }
                    InstanceState::Starting => {
                        let what = format!("{}: it is changing its state", instance.name);
                        return Err(fault("delete instance", ErrorKind::Busy, what));
                    }
                    InstanceState::Stopped => {
                        world.machines.remove(&key);
                        world.note(Did::Remove, &key, mark.as_ref());
                    }
                }
                return Ok(());
            }
            let ours = world
                .disks
                .get(&key)
                .is_some_and(|disk| Owner::owns(disk.mark.as_ref(), instance));
            if ours {
                let disk = world.disks.remove(&key);
                world.note(Did::Sweep, &key, disk.and_then(|disk| disk.mark).as_ref());
            }
            Ok(())
        })
        .await
    }

    async fn read_console(&self, instance: &InstanceRef<Zone>) -> Result<Option<Console>> {
        self.call("read console", &instance.name, |world, now| {
            let machine = world.machines.get(&key(instance));
            let running = machine.filter(|machine| machine.state(now) == InstanceState::Running);
            Ok(running.map(|machine| Console(machine.console.clone())))
        })
        .await
    }

    async fn list_instances(
        &self,
        scope: &Zone,
        provider: &str,
        installation: &str,
    ) -> Result<Vec<Instance>> {
        self.call("list instances", &scope.0, |world, now| {
            let ours = |mark: &Option<Owner>| match mark {
                Some(Owner::Ours(mark)) => mark.provider == provider && mark.installation == installation,
                Some(Owner::Bare(bare)) => bare == provider,
                None => false,
            };
            Ok(world
                .machines
                .iter()
                .filter(|((zone, _), machine)| zone == scope && ours(&machine.mark))
                .map(|((_, name), machine)| self.instance(name, machine, now))
                .collect())
        })
        .await
    }

    async fn list_scopes(&self) -> Result<Vec<Zone>> {
        self.call("list scopes", "", |world, _| {
            let places = world.machines.keys().chain(world.disks.keys());
            let zones: BTreeSet<Zone> = places.map(|(zone, _)| zone.clone()).collect();
            Ok(zones.into_iter().collect())
        })
        .await
    }

    async fn list_marked(&self, scope: &Zone, provider: &str) -> Result<Vec<Marked>> {
        self.call("list marked", &scope.0, |world, _| {
            let marked = |name: &str, id: Option<&String>, mark: Option<&Owner>| {
                let mark = match mark? {
                    Owner::Ours(mark) if mark.provider == provider => Some(mark.clone()),
                    Owner::Bare(bare) if bare == provider => None,
                    Owner::Ours(_) | Owner::Bare(_) => return None,
                };
                Some(Marked {
                    name: name.to_owned(),
                    id: id.cloned(),
                    mark,
                })
            };
            let here = |(zone, _): &&(Zone, String)| zone == scope;
            let machines = world.machines.iter().filter(|(key, _)| here(key));
            let disks = world
                .disks
                .iter()
                .filter(|(key, _)| here(key) && !world.machines.contains_key(key));
            let machines =
                machines.filter_map(|((_, name), it)| marked(name, Some(&it.id), it.mark.as_ref()));
            Ok(machines
                .chain(disks.filter_map(|((_, name), it)| marked(name, None, it.mark.as_ref())))
                .collect())
        })
        .await
    }
}
