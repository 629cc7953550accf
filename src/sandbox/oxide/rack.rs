//! Holds everything that the sandbox's rack knows, finds things in it, and says what is due when.
//!
//! All of it is plain data behind one lock: an operation changes it in one step and never waits while it
//! does. What takes time on a real rack is written on an agenda, and `OxideApi::serve` acts on it when it is
//! due.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use oxide::types;
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::answer::{Ask, Pick, Refusal, Result, check_name};
use super::content::Content;
use super::{Happening, Hook, Limits, OxideOptions, OxidePace};

/// A disk and what was written to it.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) view: types::Disk,
    pub(super) content: Content,
}

/// A snapshot: the content of its disk, frozen.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) view: types::Snapshot,
    pub(super) block_size: types::BlockSize,
    pub(super) content: Arc<Content>,
}

/// An image: a snapshot's content that disks can be made from.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) view: types::Image,
    pub(super) content: Arc<Content>,
}

/// An instance and all that the API does not show of it.
#[derive(Debug, Clone)]
pub(super) struct Instance {
    pub(super) view: types::Instance,
    /// Counts its state changes: what the agenda planned for an earlier state is void.
    pub(super) turn: u64,
    /// The sled its VMM is on, while it has one.
    pub(super) sled: Option<usize>,
    pub(super) user_data: Vec<u8>,
    /// What it has written to its serial console since it was started.
    pub(super) console: Vec<u8>,
    pub(super) nics: Vec<types::InstanceNetworkInterface>,
    pub(super) ips: Vec<types::ExternalIp>,
    pub(super) groups: BTreeSet<Uuid>,
    /// The request body that made it; `None` for one that was planted.
    pub(super) asked: Option<types::InstanceCreate>,
}

/// A bearer token.
#[derive(Debug, Clone, Default)]
pub(super) struct Token {
    pub(super) user: String,
    /// Projects that it lost: a 404 for them and everything in them.
    pub(super) hidden: BTreeSet<Uuid>,
}

/// What happens when its time has come, unless the thing moved on by itself.
#[derive(Debug, Clone)]
pub(super) enum Due {
    InstanceCreated { id: Uuid, turn: u64, start: bool },
    Running { id: Uuid, turn: u64 },
    Booted { id: Uuid, turn: u64 },
    Stopped { id: Uuid, turn: u64 },
    AutoRestart { id: Uuid, turn: u64 },
    DiskReady { id: Uuid, state: types::DiskState },
    Finalized { disk: Uuid, snapshot: Option<Uuid> },
}

/// The rack.
pub(super) struct Rack {
    pub(super) pace: OxidePace,
    pub(super) limits: Limits,
    pub(super) options: OxideOptions,
    pub(super) silo: Uuid,
    pub(super) pool: Uuid,
    pub(super) tokens: BTreeMap<String, Token>,
    pub(super) projects: BTreeMap<Uuid, types::Project>,
    pub(super) vpcs: BTreeMap<Uuid, types::Vpc>,
    pub(super) subnets: BTreeMap<Uuid, types::VpcSubnet>,
    pub(super) groups: BTreeMap<Uuid, types::AntiAffinityGroup>,
    pub(super) floating_ips: BTreeMap<Uuid, types::FloatingIp>,
    pub(super) disks: BTreeMap<Uuid, Disk>,
    pub(super) snapshots: BTreeMap<Uuid, Snapshot>,
    pub(super) images: BTreeMap<Uuid, Image>,
    pub(super) instances: BTreeMap<Uuid, Instance>,
    pub(super) hook: Option<Hook>,
    pub(super) counts: BTreeMap<&'static str, u64>,
    listeners: Vec<mpsc::UnboundedSender<Happening>>,
    agenda: BTreeMap<(Instant, u64), Due>,
    planned: u64,
    addresses: u32,
    dice: StdRng,
    epoch: (DateTime<Utc>, Instant),
    pub(super) changed: watch::Sender<u64>,
    pub(super) wake: Arc<Notify>,
}

impl Rack {
    pub(super) fn new(options: OxideOptions) -> Self {
        let mut dice = options
            .seed
            .map_or_else(StdRng::from_entropy, StdRng::seed_from_u64);
        let mut id = || random_id(&mut dice);
        let (silo, pool) = (id(), id());
        let mut tokens = BTreeMap::new();
        tokens.insert(
            options.token.clone(),
            Token {
                user: "sandbox".to_owned(),
                ..Token::default()
            },
        );
        Self {
            pace: options.pace.clone(),
            limits: options.limits.clone(),
            silo,
            pool,
            tokens,
            projects: BTreeMap::new(),
            vpcs: BTreeMap::new(),
            subnets: BTreeMap::new(),
            groups: BTreeMap::new(),
            floating_ips: BTreeMap::new(),
            disks: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            images: BTreeMap::new(),
            instances: BTreeMap::new(),
            hook: None,
            counts: BTreeMap::new(),
            listeners: Vec::new(),
            agenda: BTreeMap::new(),
            planned: 0,
            addresses: 0,
            dice,
            epoch: (options.epoch.unwrap_or_else(Utc::now), Instant::now()),
            changed: watch::Sender::new(0),
            wake: Arc::new(Notify::new()),
            options,
        }
    }

    pub(super) fn id(&mut self) -> Uuid {
        random_id(&mut self.dice)
    }

    /// The rack's clock. It follows tokio's, so that it stands still where that one is paused.
    pub(super) fn now(&self) -> DateTime<Utc> {
        let passed = chrono::Duration::from_std(self.epoch.1.elapsed()).unwrap_or_default();
        self.epoch.0 + passed
    }

    pub(super) fn name(text: &str) -> Result<types::Name> {
        check_name(text).map_err(Refusal::malformed)?;
        types::Name::try_from(text).map_err(|why| Refusal::malformed(why.to_string()))
    }

    /// A MAC address of Oxide's range, never given twice.
    pub(super) fn mac(&mut self) -> Result<types::MacAddr> {
        let [_, b, c, d] = self.next_address().to_be_bytes();
        types::MacAddr::try_from(format!("A8:40:25:{:02X}:{c:02X}:{d:02X}", 0xF0 | (b & 0x0F)))
            .map_err(|_| Refusal::internal())
    }

    /// An address of the external pool, never given twice.
    pub(super) fn external_ip(&mut self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(
            Ipv4Addr::new(198, 18, 0, 0).to_bits() + self.next_address() % 0x0001_FFFF,
        ))
    }

    pub(super) fn next_address(&mut self) -> u32 {
        self.addresses = self.addresses.wrapping_add(1);
        self.addresses
    }

    /// Tells everyone who waits that something changed.
    pub(super) fn touch(&self) {
        self.changed.send_modify(|revision| *revision += 1);
    }

    pub(super) fn listen(&mut self) -> mpsc::UnboundedReceiver<Happening> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.listeners.push(sender);
        receiver
    }

    pub(super) fn tell(&mut self, happening: &Happening) {
        self.listeners
            .retain(|listener| listener.send(happening.clone()).is_ok());
    }

    /// Writes something on the agenda; what takes no time happens at once.
    pub(super) fn plan(&mut self, delay: Duration, due: Due) {
        if delay.is_zero() {
            self.happen(due);
            return;
        }
        self.planned += 1;
        self.agenda.insert((Instant::now() + delay, self.planned), due);
        self.wake.notify_one();
    }

    /// Does everything that is due, in its order, and says when to come back.
    pub(super) fn act(&mut self, now: Instant) -> Option<Instant> {
        while let Some(entry) = self.agenda.first_entry() {
            if entry.key().0 > now {
                return Some(entry.key().0);
            }
            let due = entry.remove();
            self.happen(due);
        }
        None
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::InstanceCreated { id, turn, start } => self.instance_created(id, turn, start),
            Due::Running { id, turn } => self.instance_running(id, turn),
            Due::Booted { id, turn } => self.instance_booted(id, turn),
            Due::Stopped { id, turn } => self.instance_stopped(id, turn),
            Due::AutoRestart { id, turn } => self.instance_restarts(id, turn),
            Due::DiskReady { id, state } => self.disk_ready(id, state),
            Due::Finalized { disk, snapshot } => self.finalized(disk, snapshot),
        }
        self.touch();
    }

    /// The project that a `project` parameter names, if the caller may see it.
    pub(super) fn project(&self, ask: &Ask, text: &str) -> Result<Uuid> {
        let pick = Pick::parse(text)?;
        self.projects
            .values()
            .find(|project| match &pick {
                Pick::Id(id) => project.id == *id,
                Pick::Name(name) => project.name.as_str() == name,
            })
            .filter(|project| !ask.hidden.contains(&project.id))
            .map(|project| project.id)
            .ok_or_else(|| Refusal::not_found("project", &pick))
    }

    /// The `project` parameter of a call that cannot do without.
    pub(super) fn needed_project(&self, ask: &Ask, text: Option<&str>) -> Result<Uuid> {
        let text =
            text.ok_or_else(|| Refusal::malformed("unable to parse query string: missing field `project`"))?;
        self.project(ask, text)
    }

    /// Finds one thing by nexus's rule: an ID stands alone, a name needs its project.
    pub(super) fn find<'a, T: InProject>(
        &self,
        ask: &Ask,
        kind: &Kind,
        map: &'a BTreeMap<Uuid, T>,
        wanted: &str,
        project: Option<&str>,
    ) -> Result<&'a T> {
        let pick = Pick::parse(wanted)?;
        let found = match (&pick, project) {
            (Pick::Id(id), None) => map.get(id),
            (Pick::Name(name), Some(project)) => {
                let project = self.project(ask, project)?;
                map.values().find(|item| item.place() == (project, name.as_str()))
            }
            (Pick::Id(_), Some(_)) => {
                return Err(Refusal::invalid(format!(
                    "when providing {} as an ID project should not be specified",
                    kind.noun
                )));
            }
            (Pick::Name(_), None) => {
                return Err(Refusal::invalid(format!(
                    "{} should either be {} or project should be specified",
                    kind.noun, kind.id
                )));
            }
        };
        found
            .filter(|item| !ask.hidden.contains(&item.place().0))
            .ok_or_else(|| Refusal::not_found(kind.resource, &pick))
    }

    /// Finds the instance that a call names.
    pub(super) fn instance(&self, ask: &Ask, wanted: &str, project: Option<&str>) -> Result<Uuid> {
        self.find(ask, &Kind::INSTANCE, &self.instances, wanted, project)
            .map(|it| it.view.id)
    }
}

/// What has a name in a project.
pub(super) trait InProject {
    /// Its project and its name.
    fn place(&self) -> (Uuid, &str);
}

macro_rules! in_project {
    ($($type:ty: $($path:ident).*;)*) => {
        $(impl InProject for $type {
            fn place(&self) -> (Uuid, &str) {
                let view = &self$(.$path)*;
                (view.project_id, view.name.as_str())
            }
        })*
    };
}

in_project! {
    Instance: view;
    Disk: view;
    Snapshot: view;
    types::Vpc: ;
    types::AntiAffinityGroup: ;
    types::FloatingIp: ;
}

/// How nexus speaks of one kind of thing.
pub(super) struct Kind {
    /// In a refusal of the selector.
    noun: &'static str,
    /// What it calls an ID there.
    id: &'static str,
    /// In "not found" and "already exists".
    pub(super) resource: &'static str,
}

impl Kind {
    pub(super) const INSTANCE: Self = Self::new("instance", "UUID", "instance");
    pub(super) const DISK: Self = Self::new("disk", "UUID", "disk");
    pub(super) const SNAPSHOT: Self = Self::new("snapshot", "an ID", "snapshot");
    pub(super) const VPC: Self = Self::new("vpc", "an ID", "vpc");
    pub(super) const GROUP: Self = Self::new("anti_affinity_group", "UUID", "anti-affinity-group");
    pub(super) const FLOATING_IP: Self = Self::new("floating IP", "UUID", "floating-ip");

    const fn new(noun: &'static str, id: &'static str, resource: &'static str) -> Self {
        Self { noun, id, resource }
    }
}

fn random_id(dice: &mut StdRng) -> Uuid {
    let mut bytes = [0; 16];
    dice.fill_bytes(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}
