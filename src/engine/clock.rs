//! The clock of the engine: the wall clock at the start, and monotonic time since. A jump of the wall clock moves no deadline.

use std::time::SystemTime;

use tokio::time::{Duration, Instant};

use crate::cloud::Timestamp;

/// A monotonic clock that shows wall time. Follows tokio's clock, so that a test that pauses tokio pauses it.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Timestamp,
    start: Instant,
}

impl Clock {
    /// A clock that shows the wall time of this moment.
    #[must_use]
    pub fn start() -> Self {
        Self {
            wall: SystemTime::now().into(),
            start: Instant::now(),
        }
    }

    /// This moment.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.wall.after(self.start.elapsed())
    }

    /// The tokio instant of a moment that this clock shows; now, if it lies in the past.
    #[must_use]
    pub fn instant(&self, at: Timestamp) -> Instant {
        Instant::now() + at.since(self.now())
    }

    /// How long ago, or zero.
    #[must_use]
    pub fn age(&self, at: Timestamp) -> Duration {
        self.now().since(at)
    }
}
