//! What happens in a schedule: a seed becomes a list of wishes, faults and kills, each at its moment. The same seed always makes
//! the same script; how the daemons come through it also depends on their own jitter.

use std::fmt;
use std::time::Duration;

use omni_infra_provider::cloud::ErrorKind;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// The machine request sets of every script.
pub(super) const SETS: [&str; 2] = ["w", "v"];
/// The names of single requests: made, torn down, and made again.
pub(super) const SINGLES: [&str; 3] = ["s1", "s2", "s3"];
/// What machine classes say.
pub(super) const CLASSES: [&str; 6] = [
    "",
    "zones: [b]",
    "zones: [a, b]",
    "nameservers: [10.0.0.53]",
    "size: 0",
    "sise: 2",
];
/// The zones of the cloud.
pub(super) const ZONES: [&str; 2] = ["a", "b"];

/// Whether such a class can be answered.
pub(super) fn is_valid(class: &str) -> bool {
    !class.starts_with("si")
}

/// A way for one call to the cloud to go wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum CloudTrouble {
    /// It fails, without effect.
    Fails(ErrorKind),
    /// It takes effect, and the answer is lost.
    Lost,
    /// It takes effect so much later, and is answered then.
    Slow(Duration),
    /// The answer, right at its time, comes so much later.
    SlowAnswer(Duration),
    /// A list lacks what is younger than this; other calls are not concerned.
    Stale(Duration),
}

/// A way for one call to Omni to go wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum OmniTrouble {
    /// 5xx of a proxy, a server that goes away: no effect.
    Unavailable,
    /// The connection breaks before the call has an effect.
    DropBefore,
    /// It takes effect, and the answer is lost.
    Lost,
    /// It fails as if somebody else had written meanwhile.
    Conflict,
    /// It takes effect so much later.
    Slow(Duration),
    /// Its answer comes so much later.
    SlowAnswer(Duration),
    /// All connections break in the middle of it.
    Reset,
    /// Etcd's quota, Omni's write throttle.
    Exhausted,
}

/// One happening.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Event {
    // Wishes.
    /// An operator sets how many machines a set has.
    Scale(&'static str, u32),
    /// An operator edits the class of a set: what is requested from now on differs.
    Edit(&'static str, &'static str),
    /// An operator makes a single request.
    Request(&'static str, &'static str),
    /// An operator tears a single request down.
    TearDown(&'static str),
    /// An operator tears down the n-th request of a set, which then makes another.
    TearDownOne(&'static str, usize),

    // The cloud.
    /// The next calls of that verb go wrong, so many of them.
    Cloud(&'static str, CloudTrouble, u32),
    /// The rights on all zones are lost for so long.
    Blind(Duration),
    /// Somebody else makes an instance of a single request's name, if that is free.
    Stranger(&'static str, &'static str),
    /// Somebody deletes the n-th instance of ours, with its disk.
    Vanish(usize),
    /// Somebody stops it.
    Stop(usize),
    /// It breaks.
    Break(usize),
    /// Somebody deletes all images.
    ForgetImages,

    // Omni.
    /// The next calls of that sort go wrong, so many of them.
    Omni(&'static str, OmniTrouble, u32),
    /// Omni is killed, and started again so much later.
    RestartOmni(Duration),
    /// All watches end.
    CutWatches,
    /// All connections break.
    CutConnections,
    /// Watches go silent for so long.
    HoldWatches(Duration),
    /// Bookmarks expire, and watches end.
    ExpireBookmarks,
    /// What is read from Omni's caches lags this far behind from now on.
    Lag(Duration),
    /// Drains do not end for so long.
    HoldDrains(Duration),
    /// The account is suspended for so long: everybody is a reader.
    Suspend(Duration),
    /// Omni's clock is off by so many seconds, for so long.
    Clock(i64, Duration),
    /// The provider's join token changes.
    RotateToken,
    /// The provider's key changes; daemons learn of the new one so much later, and the old one is void at once.
    RotateKey(Duration),
    /// Somebody else writes to every request and every status: versions move on.
    Touch,
    /// The provider is deleted, if Omni lets it.
    DeleteProvider,

    // The daemons.
    /// That daemon dies, and is started again so much later.
    Kill(usize, Duration),
    /// It is told to stop, and started again so much later.
    Restart(usize, Duration),
    /// Nothing goes into it or comes out of it for so long.
    Pause(usize, Duration),
}

/// A schedule.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Script {
    /// What it was made from.
    pub(super) seed: u64,
    /// How many daemons serve the one provider ID.
    pub(super) daemons: usize,
    /// Strangers that were there before.
    pub(super) strangers: Vec<(&'static str, &'static str)>,
    /// How long Omni takes to drain a machine.
    pub(super) drain: Duration,
    /// What happens, in order of time.
    pub(super) events: Vec<(Duration, Event)>,
    /// When, after the last of it, all faults end.
    pub(super) respite: Duration,
}

impl Script {
    /// The script of a seed.
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice(StdRng::seed_from_u64(seed));
        let daemons = dice.0.gen_range(1..=2);
        let strangers = match dice.0.gen_range(0..4) {
            0 => vec![("a", "stranger"), ("b", SINGLES[0])],
            1 => vec![("a", SINGLES[1])],
            _ => vec![("a", "stranger")],
        };
        let drain = dice.millis(&[0, 1000, 3000, 30_000]);
        // One in twelve: it changes what the end looks like.
        let ends_with_provider = dice.0.gen_ratio(1, 12);
        // Dense where a machine is made, thin over the minutes of waits.
        let span = dice.of(&[8_000, 8_000, 30_000, 150_000]);
        let mut events = vec![(Duration::ZERO, dice.first_wish())];
        let many = dice.0.gen_range(3..=12);
        for _ in 0..many {
            let at = Duration::from_millis(dice.0.gen_range(0..span));
            let event = dice.event(daemons);
            events.push((at, event));
        }
        if ends_with_provider {
            // Omni refuses it once a machine has joined; the first joins about eight seconds after it was asked for.
            let at = Duration::from_millis(dice.0.gen_range(0..span.min(9_000)));
            events.push((at, Event::DeleteProvider));
        }
        events.sort_by_key(|(at, _)| *at);
        let respite = dice.millis(&[0, 500, 10_000, 100_000, 400_000]);
        Self {
            seed,
            daemons,
            strangers,
            drain,
            events,
            respite,
        }
    }

    /// Until all faults end.
    pub(super) fn length(&self) -> Duration {
        self.events.last().map(|(at, _)| *at).unwrap_or_default() + self.respite
    }
}

struct Dice(StdRng);

impl Dice {
    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        *all.choose(&mut self.0).unwrap()
    }

    fn millis(&mut self, all: &[u64]) -> Duration {
        Duration::from_millis(self.of(all))
    }

    fn seconds(&mut self, all: &[u64]) -> Duration {
        Duration::from_secs(self.of(all))
    }

    fn class(&mut self) -> &'static str {
        if self.0.gen_ratio(1, 2) {
            CLASSES[0]
        } else {
            self.of(&CLASSES)
        }
    }

    fn first_wish(&mut self) -> Event {
        if self.0.gen_ratio(1, 3) {
            Event::Request(self.of(&SINGLES), self.class())
        } else {
            Event::Scale(SETS[0], self.0.gen_range(1..=3))
        }
    }

    fn event(&mut self, daemons: usize) -> Event {
        match self.0.gen_range(0..100) {
            0..28 => self.wish(),
            28..48 => self.cloud(),
            48..52 => self.behind_our_back(),
            52..82 => self.omni(),
            _ => self.daemon(daemons),
        }
    }

    fn wish(&mut self) -> Event {
        match self.0.gen_range(0..10) {
            0..4 => Event::Scale(self.of(&SETS), self.0.gen_range(0..=4)),
            4 => Event::Edit(self.of(&SETS), self.class()),
            5..7 => Event::Request(self.of(&SINGLES), self.class()),
            7..9 => Event::TearDown(self.of(&SINGLES)),
            _ => Event::TearDownOne(self.of(&SETS), self.0.gen_range(0..4)),
        }
    }

    fn cloud(&mut self) -> Event {
        let verbs = [
            "create instance",
            "create instance",
            "start instance",
            "delete instance",
            "delete instance",
            "find instance",
            "list instances",
            "find image",
            "import image",
            "check",
        ];
        let verb = self.of(&verbs);
        if verb == "list instances" && self.0.gen_ratio(1, 2) {
            let stale = self.seconds(&[1, 5, 60]);
            return Event::Cloud(verb, CloudTrouble::Stale(stale), self.0.gen_range(1..=5));
        }
        let throttled = ErrorKind::Throttled {
            after: self.of(&[
                None,
                Some(Duration::from_secs(20)),
                Some(Duration::from_secs(200)),
            ]),
        };
        let trouble = match self.0.gen_range(0..16) {
            0..3 => CloudTrouble::Fails(ErrorKind::Unavailable),
            3..5 => CloudTrouble::Fails(throttled),
            5 => CloudTrouble::Fails(ErrorKind::Busy),
            6 => CloudTrouble::Fails(ErrorKind::Exhausted),
            7 => {
                CloudTrouble::Fails(self.of(&[ErrorKind::Rejected, ErrorKind::Denied, ErrorKind::Unexpected]))
            }
            8..12 => CloudTrouble::Lost,
            // Past the deadline of 60 s nobody waits any more; nothing is in flight as long as `Pace::settle`.
            12..14 => CloudTrouble::Slow(self.millis(&[300, 3_000, 20_000, 62_000, 75_000])),
            _ => CloudTrouble::SlowAnswer(self.millis(&[300, 3_000, 20_000, 62_000])),
        };
        Event::Cloud(verb, trouble, self.0.gen_range(1..=3))
    }

    fn behind_our_back(&mut self) -> Event {
        match self.0.gen_range(0..6) {
            0 => Event::Blind(self.seconds(&[1, 30, 400])),
            1 => Event::Stranger(self.of(&ZONES), self.of(&SINGLES)),
            2 => Event::Vanish(self.0.gen_range(0..4)),
            3 => Event::Stop(self.0.gen_range(0..4)),
            4 => Event::Break(self.0.gen_range(0..4)),
            _ => Event::ForgetImages,
        }
    }

    fn omni(&mut self) -> Event {
        let calls = [
            "get MachineRequests",
            "get MachineRequestStatuses",
            "update MachineRequests",
            "create MachineRequestStatuses",
            "update MachineRequestStatuses",
            "teardown MachineRequestStatuses",
            "destroy MachineRequestStatuses",
            "create ConfigPatchRequests",
            "update ConfigPatchRequests",
            "teardown ConfigPatchRequests",
            "destroy ConfigPatchRequests",
            "create schematic",
            "watch MachineRequests",
            "watch MachineRequestStatuses",
            "watch ConfigPatchRequests",
            "create",
            "update",
            "update",
            "get",
            "",
        ];
        match self.0.gen_range(0..24) {
            0..10 => {
                let trouble = match self.0.gen_range(0..12) {
                    0..2 => OmniTrouble::Unavailable,
                    2 => OmniTrouble::DropBefore,
                    3..6 => OmniTrouble::Lost,
                    6 => OmniTrouble::Conflict,
                    7..9 => OmniTrouble::Slow(self.millis(&[100, 1_000, 20_000])),
                    9 => OmniTrouble::SlowAnswer(self.millis(&[100, 1_000, 20_000])),
                    10 => OmniTrouble::Reset,
                    _ => OmniTrouble::Exhausted,
                };
                Event::Omni(self.of(&calls), trouble, self.0.gen_range(1..=4))
            }
            10..12 => Event::RestartOmni(self.millis(&[0, 500, 5_000, 60_000])),
            12 => Event::CutWatches,
            13 => Event::CutConnections,
            14..16 => Event::HoldWatches(self.seconds(&[1, 10, 120])),
            16 => Event::ExpireBookmarks,
            17 => Event::Lag(self.millis(&[0, 50, 2_000, 20_000])),
            18 => Event::HoldDrains(self.seconds(&[10, 200])),
            19 => Event::Suspend(self.seconds(&[1, 60])),
            20 => Event::Clock(self.of(&[-200, 200, -4_000, 4_000]), self.seconds(&[1, 60])),
            21 => Event::RotateToken,
            22 => Event::RotateKey(self.seconds(&[0, 1, 60])),
            _ => Event::Touch,
        }
    }

    fn daemon(&mut self, daemons: usize) -> Event {
        let daemon = self.0.gen_range(0..daemons);
        match self.0.gen_range(0..10) {
            0..5 => Event::Kill(daemon, self.millis(&[0, 1_000, 20_000, 100_000])),
            5..6 => Event::Restart(daemon, self.millis(&[0, 1_000, 20_000])),
            _ => Event::Pause(daemon, self.millis(&[200, 2_000, 20_000, 70_000, 300_000])),
        }
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} daemon(s); strangers {:?}; a drain takes {:?}",
            self.daemons, self.strangers, self.drain
        )?;
        for (at, event) in &self.events {
            writeln!(f, "{:>9.3} s  {event:?}", at.as_secs_f64())?;
        }
        writeln!(f, "{:>9.3} s  all faults end", self.length().as_secs_f64())
    }
}
