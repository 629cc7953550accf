//! Active or standby: one resource in the provider's own namespace of Omni says which of several daemons may act.
//!
//! No two machines' clocks are compared. Whoever holds the lease renews it, and counts its right from the moment before it sent the
//! last renewal that succeeded. Whoever does not, takes it over by a versioned update once it has not seen it change for as long
//! as the holder said, by its own clock. A margin lies between the two.
//!
//! *Guarantees.* Two rights never overlap while no clock runs faster than another by more than the margin. What a [`Fence`] guards
//! is polled only while the right lasts: a process that was paused and woken drops it, and goes no further. A right that was lost
//! and won again is another one.
//!
//! *Assumptions.* Nobody destroys the resource, and Omni's store does not go back in time while a right lasts.
//!
//! *Not here.* A call that has left this process cannot be called back by anybody: versions in Omni, names and marks in the cloud
//! make it harmless.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{Notify, watch as signal};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::error::{OmniError, OmniErrorKind};
use super::kinds::{Kind, LeaseSpec, Leases};
use super::resource::Resource;
use super::state::{Result, State};
use super::store::{OnChange, Store};
use crate::cloud::Timestamp;

/// The ID of the only lease.
const ID: &str = "active";

/// A moment of [`Clock`].
type Moment = Duration;

/// Why the lease could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody has it.
    #[error("another daemon of this provider holds the lease")]
    Elsewhere,
    /// Omni did not let us, or did not answer.
    #[error(transparent)]
    Omni(#[from] OmniError),
}

/// The lease of one provider, as one process sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Lease {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    store: Store<Leases>,
    clock: Clock,
    me: String,
    duration: Duration,
    seen: Mutex<Seen>,
    right: signal::Sender<Right>,
    taking: tokio::sync::Mutex<()>,
}

/// The version that was last seen, and since when.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    version: (Timestamp, u64),
    since: Moment,
}

/// The right to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Right {
    term: u64,
    until: Moment,
    renew: Moment,
}

impl Seen {
    /// Takes in that this version is the last; since when it has been.
    fn since(&mut self, version: (Timestamp, u64), now: Moment) -> Moment {
        if self.version != version {
            *self = Self { version, since: now };
        }
        self.since
    }
}

/// Whose turn it is.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// Ours, to take the lease or to renew it.
    Ours,
    /// Nobody's for so long.
    Later(Duration),
}

impl Right {
    /// What a write that was sent at that moment gives.
    fn from(sent: Moment, term: u64, duration: Duration) -> Self {
        Self {
            term,
            // The margin: for clocks that run at another rate, and for what a poll does before it returns.
            until: sent + duration - duration / 6,
            // Two more tries fit in before it ends.
            renew: sent + duration / 3,
        }
    }
}

/// Decides whether to write.
fn turn(lease: Option<&LeaseSpec>, me: &str, since: Moment, renew: Moment, now: Moment) -> Turn {
    let due = match lease {
        None => now,
        Some(lease) if lease.holder.is_empty() => now,
        Some(lease) if lease.holder == me => renew,
        Some(lease) => since.saturating_add(Duration::from_millis(lease.duration_ms)),
    };
    match due.saturating_sub(now) {
        Duration::ZERO => Turn::Ours,
        wait => Turn::Later(wait),
    }
}

impl Lease {
    /// The lease of `state`'s provider, for a process that does not have it. `duration` is how long after its last sign of life
    /// another process takes over.
    #[must_use]
    pub fn new(state: State, duration: Duration) -> Self {
        Self {
            inner: Arc::new(Inner {
                store: Store::new(state.clone(), |lease| Some(lease.id().to_owned())),
                state,
                clock: Clock::start(),
                me: Uuid::new_v4().to_string(),
                duration,
                seen: Mutex::default(),
                right: signal::Sender::new(Right::default()),
                taking: tokio::sync::Mutex::default(),
            }),
        }
    }

    /// Whether this process has the right to act.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.now() < self.right().until
    }

    /// A fence for the right of this moment.
    #[must_use]
    pub fn fence(&self) -> Fence {
        Fence {
            ticket: Some(Arc::new(Ticket {
                lease: self.clone(),
                term: self.right().term,
                lost: AtomicBool::new(false),
            })),
        }
    }

    /// Waits until this process has the right to act. Somebody has to [`Lease::keep`] the lease.
    pub async fn held(&self) -> Fence {
        let mut right = self.inner.right.subscribe();
        // It fails only when the sender is gone, and we hold it.
        drop(right.wait_for(|right| self.now() < right.until).await);
        self.fence()
    }

    /// Takes the lease for once, without renewing it, if nobody has it.
    ///
    /// # Errors
    ///
    /// Somebody has it, or Omni did not let us.
    pub async fn take(&self) -> std::result::Result<(), LeaseError> {
        let _taking = self.inner.taking.lock().await;
        if self.holds() {
            return Ok(());
        }
        self.look().await?;
        match self.turn() {
            Turn::Ours => Ok(self.write(&self.inner.me).await?),
            Turn::Later(_) => Err(LeaseError::Elsewhere),
        }
    }

    /// Takes the lease whenever it can be had, and renews it; after `stop`, lets go of it.
    pub async fn keep(self, stop: CancellationToken) {
        let woken = Arc::new(Notify::new());
        let on_change: OnChange = {
            let woken = woken.clone();
            Arc::new(move |_: &str| woken.notify_one())
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.inner.store.clone().run(on_change) => {}
            () = self.take_and_renew(&woken) => {}
        }
        self.let_go().await;
    }

    async fn take_and_renew(&self, woken: &Notify) {
        self.inner.store.bootstrapped().await;
        let mut standing_by = false;
        let mut failing = false;
        loop {
            let wait = match self.turn() {
                Turn::Later(wait) => {
                    if !self.holds() && !standing_by {
                        standing_by = true;
                        info!("standing by: another daemon of this provider is active");
                    }
                    wait
                }
                Turn::Ours => match self.write(&self.inner.me).await {
                    Ok(()) => {
                        (standing_by, failing) = (false, false);
                        continue;
                    }
                    Err(error) => {
                        if !failing && error.kind != OmniErrorKind::Conflict {
                            failing = true;
                            warn!(%error, "cannot take or renew the lease");
                        }
                        self.inner.duration / 12
                    }
                },
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = woken.notified() => {}
            }
        }
    }

    async fn let_go(&self) {
        if !self.holds() {
            return;
        }
        // Before it is sent: whoever takes over may act before we hear of it.
        self.inner.right.send_replace(Right::default());
        match self.write("").await {
            Ok(()) => info!("let go of the lease"),
            Err(error) => warn!(%error, "cannot let go of the lease: another daemon takes over when it ends"),
        }
    }

    fn turn(&self) -> Turn {
        let now = self.now();
        let known = self.inner.store.get(ID);
        let since = match &known {
            Some(known) => {
                let mut seen = self.inner.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.since((known.metadata.created, known.metadata.version), now)
            }
            None => now,
        };
        let spec = known.as_ref().map(|known| &known.spec);
        turn(spec, &self.inner.me, since, self.right().renew, now)
    }

    /// Writes the lease, on the version that is known; where that fails, reads it afresh.
    async fn write(&self, holder: &str) -> Result<()> {
        let inner = &self.inner;
        let known = inner.store.get(ID);
        let mut wanted = match &known {
            Some(known) => (**known).clone(),
            None => Resource::new(ID, LeaseSpec::default()),
        };
        let renewed = holder.is_empty() || wanted.spec.holder == holder;
        wanted.spec = LeaseSpec {
            holder: holder.to_owned(),
            term: wanted.spec.term + u64::from(!renewed),
            writes: wanted.spec.writes + 1,
            duration_ms: u64::try_from(inner.duration.as_millis()).unwrap_or(u64::MAX),
        };
        let term = wanted.spec.term;
        let sent = self.now();
        let call = async {
            match known {
                Some(_) => inner.state.update(&wanted, None).await,
                None => inner.state.create(&wanted).await,
            }
        };
        match self.soon("write", call).await {
            Ok(stored) => {
                inner.store.put(stored);
                if !holder.is_empty() {
                    inner.right.send_replace(Right::from(sent, term, inner.duration));
                }
                if !renewed {
                    info!(term, "took the lease");
                }
                Ok(())
            }
            Err(error) => {
                // Where this fails, too, the next write is refused for its version at worst.
                drop(self.look().await);
                Err(error)
            }
        }
    }

    async fn look(&self) -> Result<()> {
        let store = &self.inner.store;
        let known = store.get(ID);
        let fresh = self.soon("read", self.inner.state.get::<Leases>(ID)).await?;
        match (fresh, known) {
            (Some(fresh), _) => store.put(fresh),
            (None, Some(known)) => store.remove(&known),
            (None, None) => {}
        }
        Ok(())
    }

    /// A call that is of no use when it takes as long as calls may.
    async fn soon<T>(&self, verb: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
        let bound = self.inner.duration / 4;
        timeout(bound, call).await.unwrap_or_else(|_| {
            Err(OmniError {
                kind: OmniErrorKind::Unavailable,
                attempted: format!("{verb} {} {ID}", Leases::NAME),
                message: format!("no answer within {} s", bound.as_secs()),
            })
        })
    }

    fn now(&self) -> Moment {
        self.inner.clock.now()
    }

    fn right(&self) -> Right {
        *self.inner.right.borrow()
    }
}

/// Lets work go on only while a right lasts. What is lost for one of its clones is lost for all.
#[derive(Debug, Clone)]
pub struct Fence {
    ticket: Option<Arc<Ticket>>,
}

#[derive(Debug)]
struct Ticket {
    lease: Lease,
    term: u64,
    lost: AtomicBool,
}

impl Fence {
    /// A fence that lets everything pass: for a daemon that shares its work with nobody.
    #[must_use]
    pub const fn open() -> Self {
        Self { ticket: None }
    }

    /// Whether the right lasts.
    #[must_use]
    pub fn holds(&self) -> bool {
        let Some(ticket) = &self.ticket else { return true };
        let right = ticket.lease.right();
        if right.term != ticket.term || ticket.lease.now() >= right.until {
            ticket.lost.store(true, Ordering::Relaxed);
        }
        !ticket.lost.load(Ordering::Relaxed)
    }

    /// Waits for the end of the right.
    pub async fn lost(&self) {
        let Some(Ticket { lease, .. }) = self.ticket.as_deref() else {
            return std::future::pending().await;
        };
        while self.holds() {
            sleep(lease.right().until.saturating_sub(lease.now())).await;
        }
    }

    /// Polls `work` while the right lasts, and asks for it before every poll; `None` and a dropped `work` once it is lost.
    pub fn guard<T>(&self, work: impl Future<Output = T>) -> impl Future<Output = Option<T>> {
        // What is guarded is large, and each layer around it would hold it twice.
        let mut work = Box::pin(work);
        async move {
            let mut lost = pin!(self.lost());
            std::future::poll_fn(|context| {
                // The timer alone would not do: a process that wakes may run others first, and timers sleep with the machine.
                if !self.holds() || lost.as_mut().poll(context).is_ready() {
                    return Poll::Ready(None);
                }
                work.as_mut().poll(context).map(Some)
            })
            .await
        }
    }
}

/// Time since a start, the time that the machine slept included. Follows tokio's clock, so that a test that pauses tokio pauses it.
#[derive(Debug)]
struct Clock {
    start: Instant,
    slept: Duration,
}

impl Clock {
    fn start() -> Self {
        Self {
            start: Instant::now(),
            slept: slept(),
        }
    }

    fn now(&self) -> Moment {
        self.start.elapsed() + slept().saturating_sub(self.slept)
    }
}

/// How long this machine has slept since it was booted: tokio's clock stands still meanwhile.
fn slept() -> Duration {
    #[cfg(target_os = "linux")]
    {
        use rustix::time::{ClockId, clock_gettime};
        let read = |id| Duration::try_from(clock_gettime(id)).unwrap_or_default();
        // In this order, or the time between the two would count as sleep.
        let boot = read(ClockId::Boottime);
        boot.saturating_sub(read(ClockId::Monotonic))
    }
    #[cfg(not(target_os = "linux"))]
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const DURATION: Duration = Duration::from_secs(12);

    fn lease(holder: &str) -> LeaseSpec {
        LeaseSpec {
            holder: holder.to_owned(),
            duration_ms: 12_000,
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn it_is_our_turn_when_nobody_has_it_when_ours_is_due_and_when_anothers_has_not_changed_for_long() {
        let seconds = Duration::from_secs;
        let (since, renew) = (seconds(100), seconds(104));
        for (known, now, expected) in [
            (None, 0, Turn::Ours),
            (Some(lease("")), 100, Turn::Ours),
            (Some(lease("me")), 103, Turn::Later(seconds(1))),
            (Some(lease("me")), 104, Turn::Ours),
            (Some(lease("other")), 104, Turn::Later(seconds(8))),
            (Some(lease("other")), 111, Turn::Later(seconds(1))),
            (Some(lease("other")), 112, Turn::Ours),
        ] {
            let turn = turn(known.as_ref(), "me", since, renew, seconds(now));
            assert_eq!(turn, expected, "{known:?} at {now}");
        }
    }

    #[test]
    fn a_right_ends_before_others_take_over_and_is_renewed_with_time_for_two_more_tries() {
        let right = Right::from(Duration::from_secs(100), 7, DURATION);
        let expected = Right {
            term: 7,
            until: Duration::from_secs(110),
            renew: Duration::from_secs(104),
        };
        assert_eq!(right, expected);
    }

    /// A write on its way: on which version, when it was sent by its sender's clock, when it arrives and when it is answered.
    struct Write {
        based_on: u64,
        spec: LeaseSpec,
        sent: Moment,
        arrives: u64,
        answers: u64,
        accepted: Option<bool>,
    }

    /// A process whose clock runs at its own rate, that is paused at random, and sees the store late.
    #[derive(Default)]
    struct Process {
        name: String,
        rate: f64,
        right: Right,
        seen: Seen,
        known: (u64, LeaseSpec),
        write: Option<Write>,
        paused_until: u64,
    }

    impl Process {
        fn now(&self, now: u64) -> Moment {
            Duration::from_millis(now).mul_f64(self.rate)
        }

        fn knows(&mut self, version: u64, spec: &LeaseSpec) {
            if version > self.known.0 {
                self.known = (version, spec.clone());
            }
        }

        fn step(&mut self, now: u64, history: &[LeaseSpec], dice: &mut StdRng) {
            if let Some(write) = &self.write {
                let Some(accepted) = write.accepted.filter(|_| write.answers <= now) else {
                    return;
                };
                let (version, spec, sent) = (write.based_on + 1, write.spec.clone(), write.sent);
                // One answer in ten is lost.
                if accepted && dice.gen_ratio(9, 10) {
                    self.knows(version, &spec);
                    self.right = Right::from(sent, spec.term, DURATION);
                }
                self.write = None;
            }
            let seen = dice.gen_range(0..=history.len());
            if let Some(spec) = seen.checked_sub(1).and_then(|index| history.get(index)) {
                self.knows(seen as u64, spec);
            }
            let local = self.now(now);
            let (version, spec) = self.known.clone();
            let since = self.seen.since((Timestamp(0), version), local);
            let known = (version > 0).then_some(&spec);
            if turn(known, &self.name, since, self.right.renew, local) == Turn::Ours {
                let arrives = now + dice.gen_range(0..4000);
                self.write = Some(Write {
                    based_on: version,
                    spec: LeaseSpec {
                        term: spec.term + u64::from(spec.holder != self.name),
                        writes: spec.writes + 1,
                        ..lease(&self.name)
                    },
                    sent: local,
                    arrives,
                    answers: arrives + dice.gen_range(0..4000),
                    accepted: None,
                });
            }
        }
    }

    #[test]
    fn two_processes_never_have_the_right_at_once_however_late_paused_and_badly_timed_they_are() {
        let mut takeovers = 0;
        for seed in 0..200 {
            let mut dice = StdRng::seed_from_u64(seed);
            let mut processes: Vec<Process> = ["a", "b", "c"]
                .map(|name| Process {
                    name: name.to_owned(),
                    rate: dice.gen_range(0.95..1.05),
                    ..Process::default()
                })
                .into();
            // What the store has held, the oldest first: the version is the length.
            let mut history: Vec<LeaseSpec> = Vec::new();
            for now in (0..600_000).step_by(50) {
                for process in &mut processes {
                    if let Some(write) = &mut process.write
                        && write.accepted.is_none()
                        && write.arrives <= now
                    {
                        let accepted = write.based_on == history.len() as u64;
                        if accepted {
                            takeovers +=
                                usize::from(history.last().map(|last| last.term) != Some(write.spec.term));
                            history.push(write.spec.clone());
                        }
                        write.accepted = Some(accepted);
                    }
                    if process.paused_until <= now {
                        if dice.gen_ratio(1, 400) {
                            process.paused_until = now + dice.gen_range(0..40_000);
                        }
                        process.step(now, &history, &mut dice);
                    }
                }
                let holders: Vec<&str> = processes
                    .iter()
                    .filter(|process| process.now(now) < process.right.until)
                    .map(|process| process.name.as_str())
                    .collect();
                assert!(holders.len() < 2, "seed {seed}, at {now} ms: {holders:?}");
            }
        }
        println!("{takeovers} take-overs");
        assert!(takeovers > 1000, "{takeovers}");
    }
}
