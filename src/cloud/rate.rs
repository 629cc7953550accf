//! Finds the rate of calls that a scope takes: unbounded until it says "too many", then just below what it took.
//!
//! As TCP finds its rate: down by a share when refused, at most once a second, and up while all goes well, slowly at first and faster
//! the longer nothing is refused. The first bound is what was sent within a second and not refused: answers would tell too little,
//! since a refusal comes faster than they do. A cloud that refuses above ten calls a second is driven at about ten.

use std::time::Duration;

use tokio::time::Instant;

/// What is left of the rate after a refusal.
const CUT: f64 = 0.8;

/// What each answered call adds to the rate, in calls a second, just after a refusal: at ten calls a second a fifth of a call each
/// second.
const GROWTH: f64 = 0.02;

/// After so long without a refusal the rate grows twice as fast, after twice as long three times.
const FASTER: Duration = Duration::from_secs(5);

/// It never grows more than so many times as fast.
const FASTEST: f64 = 10.0;

/// Refusals that come closer together are about the same crowd of calls.
const ONE_CROWD: Duration = Duration::from_secs(1);

/// Without a refusal for so long there is no bound any more.
const FORGET: Duration = Duration::from_secs(300);

/// In calls a second. A slower site would not work at all.
const LEAST: f64 = 1.0;

/// The rate of calls to one scope.
#[derive(Debug)]
pub(super) struct Rate {
    bound: Option<Bound>,
    /// Calls begun since `second`, and in the second before.
    begun: (u32, u32),
    second: Instant,
}

#[derive(Debug)]
struct Bound {
    per_second: f64,
    next: Instant,
    cut: Instant,
    /// It is the first: how many were refused is still being learned.
    is_first: bool,
}

impl Rate {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            bound: None,
            begun: (0, 0),
            second: now,
        }
    }

    /// Whether a call that asks now has to wait.
    pub(super) fn is_busy(&self, now: Instant) -> bool {
        self.bound.as_ref().is_some_and(|bound| bound.next > now)
    }

    /// When the next call may start.
    pub(super) fn slot(&mut self, now: Instant) -> Instant {
        self.roll(now);
        self.begun.0 = self.begun.0.saturating_add(1);
        if self
            .bound
            .as_ref()
            .is_some_and(|bound| now.duration_since(bound.cut) > FORGET)
        {
            self.bound = None;
        }
        let Some(bound) = &mut self.bound else {
            return now;
        };
        let slot = bound.next.max(now);
        bound.next = slot + Duration::from_secs_f64(1.0 / bound.per_second);
        slot
    }

    /// A call was answered, whatever the answer.
    pub(super) fn answered(&mut self, now: Instant) {
        if let Some(bound) = &mut self.bound {
            let quiet = now.duration_since(bound.cut).div_duration_f64(FASTER);
            bound.per_second += GROWTH * (1.0 + quiet).min(FASTEST);
        }
    }

    /// The site told us to slow down.
    pub(super) fn refused(&mut self, now: Instant) {
        self.roll(now);
        match &mut self.bound {
            Some(bound) if now.duration_since(bound.cut) < ONE_CROWD => {
                if bound.is_first {
                    bound.per_second = (bound.per_second - 1.0).max(LEAST);
                }
            }
            Some(bound) => {
                bound.per_second = (bound.per_second * CUT).max(LEAST);
                bound.cut = now;
                bound.is_first = false;
            }
            None => {
                // Of the second before, as much as was within a second of now.
                let before = 1.0 - now.duration_since(self.second).as_secs_f64().min(1.0);
                let begun = f64::from(self.begun.0) + f64::from(self.begun.1) * before;
                self.bound = Some(Bound {
                    per_second: (begun - 1.0).max(LEAST),
                    next: now,
                    cut: now,
                    is_first: true,
                });
            }
        }
    }

    fn roll(&mut self, now: Instant) {
        let age = now.duration_since(self.second).as_secs();
        if age > 0 {
            let before = if age == 1 { self.begun.0 } else { 0 };
            self.begun = (0, before);
            self.second += Duration::from_secs(age);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A site that takes so many calls in each second of the clock, driven by a crowd that never ends.
    fn drive(takes: u32, at_once: usize, seconds: u64, latency: Duration) -> (u32, u32) {
        let begun = Instant::now();
        let end = begun + Duration::from_secs(seconds);
        let mut rate = Rate::new(begun);
        let (mut taken, mut refused) = (0, 0);
        let mut this_second = (0, 0);
        let mut workers = vec![begun; at_once];
        let mut answers = Vec::new();
        loop {
            workers.sort_unstable();
            for _ in answers.extract_if(.., |answer| *answer <= workers[0]) {
                rate.answered(workers[0]);
            }
            let now = rate.slot(workers[0]);
            if now >= end {
                return (taken, refused);
            }
            let second = now.duration_since(begun).as_secs();
            if this_second.0 != second {
                this_second = (second, 0);
            }
            if this_second.1 < takes {
                this_second.1 += 1;
                taken += 1;
                workers[0] = now + latency;
                answers.push(workers[0]);
            } else {
                refused += 1;
                rate.refused(now);
                // Whoever is refused looks again after a second.
                workers[0] = now + Duration::from_secs(1);
            }
        }
    }

    #[test]
    fn a_site_is_driven_at_what_it_takes_and_not_with_a_storm() {
        for (takes, at_once, latency) in [
            (10, 32, 20),
            (10, 4, 20),
            (50, 32, 20),
            (2, 16, 20),
            (10, 32, 900),
        ] {
            let seconds = 120;
            let (taken, refused) = drive(takes, at_once, seconds, Duration::from_millis(latency));
            let most = takes * u32::try_from(seconds).unwrap();
            assert!(taken * 100 >= most * 75, "{takes}/s: {taken} of {most}");
            assert!(
                refused * 10 <= taken + 400,
                "{takes}/s: {refused} refused, {taken} taken"
            );
        }
    }

    #[test]
    fn a_crowd_at_the_turn_of_a_second_is_one_crowd() {
        let begun = Instant::now();
        let mut rate = Rate::new(begun);
        let at = |millis| begun + Duration::from_millis(millis);
        for millis in [990; 20].into_iter().chain([1010; 12]) {
            rate.slot(at(millis));
        }
        for _ in 0..22 {
            rate.refused(at(1020));
        }
        rate.slot(at(1020));
        let pause = rate.slot(at(1020)) - at(1020);
        assert!((90..130).contains(&pause.as_millis()), "{pause:?}");
    }

    #[test]
    fn a_site_that_never_refuses_is_not_held_back() {
        let now = Instant::now();
        let mut rate = Rate::new(now);
        for _ in 0..1000 {
            assert_eq!(rate.slot(now), now);
            rate.answered(now);
        }
        rate.refused(now);
        assert!(rate.slot(now) == now && rate.slot(now) > now, "one by one");
        let later = now + FORGET + Duration::from_secs(1);
        assert_eq!((rate.slot(later), rate.slot(later)), (later, later), "forgotten");
    }
}
