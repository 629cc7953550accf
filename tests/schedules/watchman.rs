//! Watches a schedule: hands out its faults, and checks at every change on either side what must hold at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::BoxFuture;
use omni_infra_provider::backends::sim::{Did, Sim};
use omni_infra_provider::omni::kinds::{MachineRequestStatuses, MachineRequests, Stage};
use omni_infra_provider::omni::{Phase, Resource};
use omni_infra_provider::sandbox::omni::{Call, FailCode, Moment, Omni, Rpc, Verdict, types};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::script::{CloudTrouble, OmniTrouble};

/// The provider ID.
pub(super) const PROVIDER: &str = "sim";
/// The daemon's finalizer.
const FINALIZER: &str = "sim.ProvisionController";
/// The claim: what `engine/observe.rs` calls `ANNOTATION_PLACEMENT`.
const CLAIM: &str = "omni-infra-provider/placement";
/// What it calls `ANNOTATION_RAN`.
const RAN: &str = "omni-infra-provider/ran";
/// As long as a call may be under way.
const IN_FLIGHT: Duration = Duration::from_secs(80);
/// A schedule is through with a tenth of so many lines; one that is not runs in a circle.
const TRACE: usize = 3000;
/// A runtime that sleeps more often than this in such a time is spinning: looks once a millisecond are ten thousand.
const SPIN: (Duration, u64) = (Duration::from_secs(10), 7_000);
/// Of those, what a person reads.
const READ: usize = 700;

/// Watches over both sides.
pub(super) struct Watchman {
    omni: Omni,
    sim: Sim,
    begun: Instant,
    notes: Mutex<Notes>,
    circling: Notify,
}

#[derive(Default)]
struct Notes {
    trace: Vec<(Duration, String)>,
    wrongs: Vec<String>,
    cloud: Vec<(&'static str, CloudTrouble, u32)>,
    omni: Vec<(&'static str, OmniTrouble, u32)>,
    /// Strangers as they should be.
    strangers: Vec<String>,
    /// When an instance was made, by name.
    made: BTreeMap<String, Instant>,
    /// Requests whose instance was seen running, by any daemon, in any life.
    ran: BTreeSet<String>,
    /// Calls that are under way or on the wire.
    flying: u32,
    /// Since when the provider is being deleted.
    deleted: Option<Instant>,
    /// What was left by creations that took longer than the whole life of a machine.
    outlived: u32,
}

/// A call that was sent; dropped when it has landed.
pub(super) struct Flight(Arc<Watchman>);

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.notes().flying -= 1;
    }
}

type Request = Option<Resource<MachineRequests>>;
type Status = Option<Resource<MachineRequestStatuses>>;

impl Watchman {
    pub(super) fn new(omni: &Omni, sim: &Sim) -> Arc<Self> {
        let watchman = Arc::new(Self {
            omni: omni.clone(),
            sim: sim.clone(),
            begun: Instant::now(),
            notes: Mutex::default(),
            circling: Notify::new(),
        });
        let hooked = watchman.clone();
        omni.set_hook(Arc::new(move |call: &Call, moment: Moment| {
            hooked.omni_call(call, moment)
        }));
        watchman
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap()
    }

    // Faults.

    pub(super) fn arm_cloud(&self, verb: &'static str, trouble: CloudTrouble, times: u32) {
        self.notes().cloud.push((verb, trouble, times));
    }

    pub(super) fn arm_omni(&self, call: &'static str, trouble: OmniTrouble, times: u32) {
        self.notes().omni.push((call, trouble, times));
    }

    /// From now on nothing goes wrong any more.
    pub(super) fn disarm(&self) {
        let mut notes = self.notes();
        notes.cloud.clear();
        notes.omni.clear();
    }

    pub(super) fn cloud_trouble(&self, verb: &str) -> Option<CloudTrouble> {
        draw(&mut self.notes().cloud, |on, trouble| {
            on == verb && !matches!(trouble, CloudTrouble::Stale(_))
        })
    }

    pub(super) fn stale_list(&self) -> Option<Duration> {
        let stale = draw(&mut self.notes().cloud, |_, trouble| {
            matches!(trouble, CloudTrouble::Stale(_))
        });
        match stale {
            Some(CloudTrouble::Stale(age)) => Some(age),
            _ => None,
        }
    }

    pub(super) fn is_younger(&self, name: &str, age: Duration) -> bool {
        self.notes()
            .made
            .get(name)
            .is_some_and(|made| made.elapsed() < age)
    }

    pub(super) fn takes_off(self: &Arc<Self>) -> Flight {
        self.notes().flying += 1;
        Flight(self.clone())
    }

    /// Whether some call has not landed yet.
    pub(super) fn is_anything_flying(&self) -> bool {
        self.notes().flying > 0
    }

    /// What Omni's hook says of a call.
    fn omni_call(self: &Arc<Self>, call: &Call, moment: Moment) -> BoxFuture<'static, Verdict> {
        if moment == Moment::After {
            self.check_omni(call);
        }
        let trouble = draw(&mut self.notes().omni, |on, trouble| {
            let after = matches!(trouble, OmniTrouble::Lost | OmniTrouble::SlowAnswer(_));
            (moment == Moment::After) == after && is_of(call, on)
        });
        if moment == Moment::Before && !is_routine(call) || trouble.is_some() {
            self.trace(|| format!("Omni {call} {moment:?} {trouble:?}"));
        }
        let fail = |code, message: &str| Verdict::Fail(code, message.to_owned());
        let (wait, verdict) = match trouble {
            None => return Box::pin(std::future::ready(Verdict::Proceed)),
            Some(OmniTrouble::Unavailable) => (
                Duration::ZERO,
                fail(FailCode::Unavailable, "upstream connect error"),
            ),
            Some(OmniTrouble::DropBefore | OmniTrouble::Lost) => (Duration::ZERO, Verdict::Drop),
            Some(OmniTrouble::Conflict) => (
                Duration::ZERO,
                fail(
                    FailCode::FailedPrecondition,
                    "update conflict: expected version \"0\"",
                ),
            ),
            Some(OmniTrouble::Slow(late) | OmniTrouble::SlowAnswer(late)) => (late, Verdict::Proceed),
            Some(OmniTrouble::Reset) => (Duration::ZERO, Verdict::Reset),
            Some(OmniTrouble::Exhausted) => (
                Duration::ZERO,
                fail(FailCode::ResourceExhausted, "etcdserver: too many requests"),
            ),
        };
        Box::pin(async move {
            sleep(wait).await;
            verdict
        })
    }

    // What must hold at any time.

    fn wrong(&self, what: String) {
        self.trace(|| format!("WRONG: {what}"));
        self.notes().wrongs.push(what);
    }

    fn request(&self, id: &str) -> (Request, Status) {
        (self.omni.get(PROVIDER, id), self.omni.get(PROVIDER, id))
    }

    /// After every call to the cloud, before anything else happens.
    pub(super) fn check_cloud(&self) {
        for change in self.sim.take_changes() {
            let (did, zone, name) = (change.did, &change.zone, &change.name);
            self.trace(|| format!("cloud: {did:?} {zone}/{name}"));
            let Some(id) = change.request else {
                self.wrong(format!("{did:?} of {zone}/{name}, which is not ours"));
                continue;
            };
            if did == Did::Create {
                self.notes().made.insert(name.clone(), Instant::now());
            }
            let (request, status) = self.request(&id);
            let claimed = is_claimed(&request, &status) || self.is_in_flight_since_deletion();
            match did {
                Did::Create if !claimed && self.outlived(&id) => self.sim.vanish(zone, name),
                Did::Create | Did::Start if !claimed => {
                    self.wrong(format!("{did:?} of {zone}/{name} without finalizer and claim"));
                }
                Did::Stop | Did::Remove if !is_drained(&request, &status) => {
                    self.wrong(format!("{did:?} of {zone}/{name} before Omni had drained it"));
                }
                Did::Sweep if !claimed && !is_drained(&request, &status) => {
                    self.wrong(format!("{did:?} of {zone}/{name} without a claim or an end"));
                }
                Did::Create | Did::Start | Did::Stop | Did::Remove | Did::Sweep => {}
            }
        }
        let mut instances: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for owned in self.sim.owned() {
            if owned.instance.is_some() {
                let place = format!("{}/{}", owned.zone, owned.name);
                instances.entry(owned.request).or_default().push(place);
            }
        }
        for (request, places) in instances {
            if places.len() > 1 {
                self.wrong(format!("{request} has {} instances: {places:?}", places.len()));
            }
        }
        self.check_strangers();
    }

    fn check_strangers(&self) {
        let now = self.sim.strangers();
        let before = self.notes().strangers.clone();
        if now != before {
            self.wrong(format!("strangers were {before:?} and are {now:?}"));
            self.notes().strangers = now;
        }
    }

    /// After every call to Omni that took effect.
    fn check_omni(&self, call: &Call) {
        let kind = call.kind.split('.').next().unwrap_or_default();
        let id = &call.id;
        let left = || {
            let owned = self.sim.owned();
            let left: Vec<_> = owned.iter().filter(|owned| owned.request == *id).collect();
            (!left.is_empty()).then(|| format!("{left:?}"))
        };
        match (call.rpc, kind) {
            (Rpc::Update, "MachineRequests") if call.detail.contains("-finalizer") => {
                if let Some(left) = left() {
                    self.wrong(format!("the finalizer of {id} went, and there is {left}"));
                }
                if self.request(id).1.is_some() {
                    self.wrong(format!("the finalizer of {id} went before the status"));
                }
            }
            (Rpc::Destroy, "MachineRequestStatuses") => {
                if let Some(left) = left() {
                    self.wrong(format!("the claim of {id} went, and there is {left}"));
                }
            }
            (Rpc::Create | Rpc::Update | Rpc::Teardown, "MachineRequestStatuses") => {
                let (request, status) = self.request(id);
                let held = |request: Resource<MachineRequests>| {
                    request.metadata.finalizers.iter().any(|held| held == FINALIZER)
                };
                if call.rpc == Rpc::Create && !request.is_none_or(held) {
                    self.wrong(format!("the status of {id} came before the finalizer"));
                }
                let registered = || {
                    let all = self.omni.list_raw(types::INFRA, types::REGISTRATIONS);
                    all.iter()
                        .any(|one| one.labels.get(types::LABEL_REQUEST) == Some(id))
                };
                let ran = |status: Resource<MachineRequestStatuses>| {
                    status.spec.stage == Stage::Provisioned || status.metadata.annotations.contains_key(RAN)
                };
                if status.is_some_and(ran) || registered() {
                    self.notes().ran.insert(id.clone());
                }
            }
            _ => {}
        }
    }

    /// Whether a creation without a claim is one that took longer than the whole life of its machine: another creation was
    /// faster, that machine ran and went. Only the orphan collector can help there, which this world plays.
    fn outlived(&self, id: &str) -> bool {
        let mut notes = self.notes();
        let known = notes.ran.contains(id);
        notes.outlived += u32::from(known);
        known
    }

    pub(super) fn outlived_count(&self) -> u32 {
        self.notes().outlived
    }

    /// Once the provider is being deleted, Omni takes away what the daemon's right to act hangs on.
    pub(super) fn provider_is_deleted(&self) {
        self.notes().deleted = Some(Instant::now());
    }

    /// What was under way when the provider was deleted still lands.
    fn is_in_flight_since_deletion(&self) -> bool {
        let deleted = self.notes().deleted;
        deleted.is_some_and(|deleted| deleted.elapsed() < IN_FLIGHT)
    }

    /// What the script itself does to the cloud is right.
    pub(super) fn behind_our_back(&self, act: impl FnOnce(&Sim)) {
        self.check_strangers();
        act(&self.sim);
        let strangers = self.sim.strangers();
        self.notes().strangers = strangers;
    }

    // For people.

    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        let at = self.begun.elapsed();
        let mut notes = self.notes();
        notes.trace.push((at, what()));
        if notes.trace.len() == TRACE {
            self.circling.notify_one();
        }
    }

    /// Ends if the world runs in a circle.
    pub(super) async fn circles(&self) -> String {
        let mut parked = parked();
        let circling = self.circling.notified();
        let mut circling = std::pin::pin!(circling);
        loop {
            tokio::select! {
                () = &mut circling => return "it runs in a circle: far too many calls".to_owned(),
                () = sleep(SPIN.0) => {}
            }
            let now = self::parked();
            if now - parked > SPIN.1 {
                return format!(
                    "it runs in a circle: it woke {} times in {:?}",
                    now - parked,
                    SPIN.0
                );
            }
            parked = now;
        }
    }

    pub(super) fn wrongs(&self) -> Vec<String> {
        self.notes().wrongs.clone()
    }

    pub(super) fn told(&self) -> String {
        let mut told = String::new();
        for (at, what) in self.notes().trace.iter().take(READ) {
            writeln!(told, "{:>9.3} s  {what}", at.as_secs_f64()).unwrap();
        }
        told
    }
}

/// How often the runtime went to sleep: once for each moment at which something was due.
fn parked() -> u64 {
    Handle::current().metrics().worker_park_count(0)
}

fn draw<T: Copy>(
    armed: &mut Vec<(&'static str, T, u32)>,
    fits: impl Fn(&'static str, T) -> bool,
) -> Option<T> {
    let at = armed.iter().position(|(on, trouble, _)| fits(on, *trouble))?;
    let (_, trouble, times) = &mut armed[at];
    let trouble = *trouble;
    *times -= 1;
    if *times == 0 {
        armed.remove(at);
    }
    Some(trouble)
}

/// Whether a call is of such a sort: "update MachineRequests", "update", or any.
fn is_of(call: &Call, sort: &str) -> bool {
    let (rpc, kind) = match sort {
        "create schematic" => return call.rpc == Rpc::CreateSchematic,
        _ => sort.split_once(' ').unwrap_or((sort, "")),
    };
    (rpc.is_empty() || call.rpc.to_string() == rpc)
        && (kind.is_empty() || call.kind.split('.').next() == Some(kind))
}

fn is_routine(call: &Call) -> bool {
    call.kind.starts_with("InfraProviderHealthStatuses")
}

/// Create and start need finalizer and claim.
fn is_claimed(request: &Request, status: &Status) -> bool {
    request
        .as_ref()
        .is_some_and(|request| request.metadata.finalizers.iter().any(|held| held == FINALIZER))
        && status
            .as_ref()
            .is_some_and(|status| status.metadata.annotations.contains_key(CLAIM))
}

/// Deletion needs a request that is torn down or gone, and a status that Omni has let go.
fn is_drained(request: &Request, status: &Status) -> bool {
    request
        .as_ref()
        .is_none_or(|request| request.metadata.phase == Phase::TearingDown)
        && status.as_ref().is_none_or(|status| {
            status.metadata.phase == Phase::TearingDown && status.metadata.finalizers.is_empty()
        })
}
