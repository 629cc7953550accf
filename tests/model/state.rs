//! The small world: one request of at most two incarnations, one or two scopes, one or two daemons. Plain data, and its words.

use std::fmt;

/// Index of a scope: 0 is the first of the class.
pub(super) type Place = usize;

/// A machine request, as Omni holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Request {
    /// 0, or 1 for the one made anew with the same ID.
    pub(super) incarnation: u8,
    pub(super) running: bool,
    /// Ours.
    pub(super) finalizer: bool,
}

/// The scopes of a claim, in the order tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Tried {
    A,
    B,
    Ab,
    Ba,
}

impl Tried {
    pub(super) fn places(self) -> &'static [Place] {
        match self {
            Self::A => &[0],
            Self::B => &[1],
            Self::Ab => &[0, 1],
            Self::Ba => &[1, 0],
        }
    }

    pub(super) fn of(places: &[Place]) -> Self {
        match places {
            [0] => Self::A,
            [1] => Self::B,
            [0, 1] => Self::Ab,
            [1, 0] => Self::Ba,
            other => panic!("no class allows {other:?}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Claim {
    pub(super) incarnation: u8,
    pub(super) tried: Tried,
}

/// The stages that make a difference to the planner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Provisioning,
    Provisioned,
    Failed,
}

/// A reference to an instance. When the instance goes, every reference to it becomes one to what was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Uuid {
    None,
    Of(Place),
    Past,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Status {
    pub(super) running: bool,
    /// By Omni's finalizer.
    pub(super) held: bool,
    pub(super) claim: Option<Claim>,
    pub(super) ran: bool,
    pub(super) stage: Stage,
    pub(super) uuid: Uuid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Patch {
    pub(super) running: bool,
    pub(super) held: bool,
    /// Whose provider ID it says.
    pub(super) of: Uuid,
}

/// The Go library's machine resource; it may name the instance in the first scope, or nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Resource {
    pub(super) running: bool,
    pub(super) names: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Power {
    Stopped,
    Starting,
    Running,
    Stopping,
    Broken,
}

/// What a scope holds under the request's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Slot {
    Nothing,
    /// A disk of ours.
    Remains,
    Foreign,
    Ours {
        power: Power,
        /// It carries the bare sentence of the Go provider.
        bare: bool,
    },
}

impl Slot {
    /// Whether it is an instance that one of our daemons, or the Go provider, made.
    pub(super) fn is_instance(self) -> bool {
        matches!(self, Self::Ours { .. })
    }
}

/// Omni and the cloud, and what the properties need to remember of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) request: Option<Request>,
    pub(super) status: Option<Status>,
    pub(super) patch: Option<Patch>,
    pub(super) resource: Option<Resource>,
    /// A machine registered; which incarnation of the request was there then.
    pub(super) registered: Option<u8>,
    pub(super) slots: [Slot; 2],
    /// A creation without an answer, on its way to the cloud.
    pub(super) in_flight: [bool; 2],
    /// Our status has said of this incarnation that it ran.
    pub(super) ran: bool,
    /// An instance ran while this incarnation was there, whether or not anybody noticed.
    pub(super) lived: bool,
    /// Omni let go of the status in this teardown.
    pub(super) drained: bool,
    /// Somebody took our finalizer off.
    pub(super) stripped: bool,
    /// The request was made anew.
    pub(super) anew: bool,
}

impl World {
    /// Omni stores what one of our daemons wrote.
    pub(super) fn take_status(&mut self, status: Status) {
        if self.status.is_none() && self.request.is_some_and(|request| request.running) {
            self.drained = false;
        }
        self.status = Some(status);
        let of_this = status.claim.is_none_or(|claim| {
            self.request
                .is_some_and(|request| request.incarnation == claim.incarnation)
        });
        self.ran |= of_this && (status.ran || status.stage == Stage::Provisioned);
    }
}

/// How this process's last creation ended, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Made {
    Fine,
    Failed,
    Exhausted,
}

/// Whether a creation may be on its way of which this process has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Doubt {
    /// It has not seen a claim yet.
    Unasked,
    Open,
    /// It wrote the claim, and had an answer to all it did; or `Pace::settle` has passed since.
    Settled,
}

/// When the teardown was first seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Teardown {
    Unseen,
    Seen,
    /// `Pace::settle` has passed since.
    Settled,
}

/// What a look showed of a scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Look {
    Unasked,
    Unknown,
    Nothing {
        by_find: bool,
    },
    Remains,
    Foreign,
    Ours {
        power: Power,
        bare: bool,
        /// The vendor's ID still names what is there.
        current: bool,
    },
}

pub(super) type Looks = [Look; 2];

/// Where a pass is: always just before its next call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum At {
    Idle,
    /// A fresh Get said that the request is gone.
    Gone,
    /// Looking; or it has looked.
    Looking {
        looks: Looks,
        by_find: bool,
    },
    /// R13: the request's fresh Get agreed.
    RequestAgreed(Place),
    /// R13: the status's agreed too.
    Agreed(Place),
    /// T5: the fresh Get said that Omni has drained.
    Delete {
        place: Place,
        leftovers: bool,
        current: bool,
    },
    /// T6.
    DestroyStatus,
    /// T6, twice: teardown, destroy.
    EndResource,
    /// T7.
    RemoveFinalizer,
}

/// A daemon: its stores, its memory of the request, and its pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Daemon {
    pub(super) request: Option<Request>,
    pub(super) status: Option<Status>,
    pub(super) patch: Option<Patch>,
    pub(super) resource: Option<Resource>,
    pub(super) registered: Option<u8>,
    /// The class is good in this process's eyes.
    pub(super) valid: bool,
    /// The status in the store is the version that this process tore down.
    pub(super) status_torn: bool,
    pub(super) patch_torn: bool,
    /// The incarnation that the memory is about.
    pub(super) known: Option<u8>,
    pub(super) made: Made,
    /// Noted only where a class has a second scope: elsewhere nobody asks.
    pub(super) doubt: Doubt,
    pub(super) teardown: Teardown,
    pub(super) drained: bool,
    pub(super) ended: bool,
    /// The last look, while it is good to be used again, and when it was made.
    pub(super) looked: Option<(Looks, Teardown)>,
    pub(super) at: At,
}

impl Daemon {
    /// A process just started: its stores are bootstrapped, its memory is empty.
    pub(super) fn started(world: &World, valid: bool) -> Self {
        Self {
            request: world.request,
            status: world.status,
            patch: world.patch,
            resource: world.resource,
            registered: world.registered,
            valid,
            status_torn: false,
            patch_torn: false,
            known: None,
            made: Made::Fine,
            doubt: Doubt::Unasked,
            teardown: Teardown::Unseen,
            drained: false,
            ended: false,
            looked: None,
            at: At::Idle,
        }
    }

    /// Drops the memory, not the stores.
    pub(super) fn forget(&mut self) {
        self.status_torn = false;
        self.patch_torn = false;
        self.known = None;
        self.made = Made::Fine;
        self.doubt = Doubt::Unasked;
        self.teardown = Teardown::Unseen;
        self.drained = false;
        self.ended = false;
        self.looked = None;
    }

    /// Something newer than an own teardown shows phase and finalizers as they are.
    pub(super) fn hear_status(&mut self, status: Option<Status>) {
        self.status = status;
        self.status_torn = false;
    }

    pub(super) fn hear_patch(&mut self, patch: Option<Patch>) {
        self.patch = patch;
        self.patch_torn = false;
    }

    /// Between its fresh Gets and the end of its creation.
    pub(super) fn is_creating(&self) -> bool {
        matches!(self.at, At::RequestAgreed(_) | At::Agreed(_))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) world: World,
    pub(super) daemons: [Option<Daemon>; 2],
}

impl State {
    pub(super) fn daemon(&self, who: usize) -> &Daemon {
        self.daemons[who].as_ref().unwrap()
    }

    pub(super) fn daemon_mut(&mut self, who: usize) -> &mut Daemon {
        self.daemons[who].as_mut().unwrap()
    }

    pub(super) fn who(&self) -> impl Iterator<Item = usize> + use<> {
        0..self.daemons.iter().flatten().count()
    }

    /// Whether a creation may land that began before something else did: until none may, `Pace::settle` does not pass.
    pub(super) fn creation_may_land(&self) -> bool {
        self.world.in_flight != [false; 2] || self.daemons.iter().flatten().any(Daemon::is_creating)
    }

    /// Whether an instance has to be there still: what ran does not go before a creation that began earlier has ended.
    pub(super) fn outlives(&self, place: Place) -> bool {
        self.world.lived && self.world.slots[place].is_instance() && self.creation_may_land()
    }

    /// Puts something else where an instance was; every reference to it is now one to what was.
    pub(super) fn put(&mut self, place: Place, slot: Slot) {
        let was = std::mem::replace(&mut self.world.slots[place], slot);
        if !was.is_instance() || slot.is_instance() {
            return;
        }
        let forget_uuid = |uuid: &mut Uuid| {
            if *uuid == Uuid::Of(place) {
                *uuid = Uuid::Past;
            }
        };
        let forget_look = |look: &mut Look| {
            if let Look::Ours { current, .. } = look {
                *current = false;
            }
        };
        for status in [&mut self.world.status]
            .into_iter()
            .chain(self.daemons.iter_mut().flatten().map(|daemon| &mut daemon.status))
            .flatten()
        {
            forget_uuid(&mut status.uuid);
        }
        for patch in [&mut self.world.patch]
            .into_iter()
            .chain(self.daemons.iter_mut().flatten().map(|daemon| &mut daemon.patch))
            .flatten()
        {
            forget_uuid(&mut patch.of);
        }
        for daemon in self.daemons.iter_mut().flatten() {
            if let Some((looks, _)) = &mut daemon.looked {
                forget_look(&mut looks[place]);
            }
            match &mut daemon.at {
                At::Looking { looks, .. } => forget_look(&mut looks[place]),
                At::Delete {
                    place: at, current, ..
                } if *at == place => *current = false,
                _ => {}
            }
        }
    }
}

const PLACES: [&str; 2] = ["a", "b"];

pub(super) fn place_name(place: Place) -> &'static str {
    PLACES[place]
}

fn or_none<T: fmt::Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn phase(running: bool) -> &'static str {
    if running { "running" } else { "tearing down" }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let finalizer = if self.finalizer { ", our finalizer" } else { "" };
        write!(f, "#{} {}{finalizer}", self.incarnation, phase(self.running))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", phase(self.running), self.stage)?;
        if self.held {
            write!(f, ", held")?;
        }
        match self.claim {
            Some(claim) => write!(f, ", claim #{} {:?}", claim.incarnation, claim.tried)?,
            None => write!(f, ", no claim")?,
        }
        if self.ran {
            write!(f, ", ran")?;
        }
        write!(f, ", uuid {:?}", self.uuid)
    }
}

impl fmt::Display for Patch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = if self.held { ", held" } else { "" };
        write!(f, "{}{held}, of {:?}", phase(self.running), self.of)
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = if self.names { ", names a" } else { ", empty" };
        write!(f, "{}{names}", phase(self.running))
    }
}

/// The facts of a state, each on a line; a trace shows those that a move changed.
pub(super) fn facts(state: &State) -> Vec<String> {
    let world = &state.world;
    let mut facts = vec![
        format!("request: {}", or_none(world.request)),
        format!("status: {}", or_none(world.status)),
        format!("patch: {}", or_none(world.patch)),
        format!("machine resource: {}", or_none(world.resource)),
        format!("registered: {}", world.registered.is_some()),
    ];
    for (place, name) in PLACES.iter().enumerate() {
        facts.push(format!("scope {name}: {:?}", world.slots[place]));
        facts.push(format!(
            "creation on its way to {name}: {}",
            world.in_flight[place]
        ));
    }
    for who in state.who() {
        let daemon = state.daemon(who);
        facts.extend([
            format!("daemon {who} knows request: {}", or_none(daemon.request)),
            format!("daemon {who} knows status: {}", or_none(daemon.status)),
            format!("daemon {who} knows patch: {}", or_none(daemon.patch)),
            format!("daemon {who} knows resource: {}", or_none(daemon.resource)),
            format!("daemon {who} pass: {:?}", daemon.at),
            format!(
                "daemon {who} remembers: creation {:?} (doubt {:?}), teardown {:?}, drained {}, ended {}, looked {:?}",
                daemon.made, daemon.doubt, daemon.teardown, daemon.drained, daemon.ended, daemon.looked
            ),
        ]);
    }
    facts
}
