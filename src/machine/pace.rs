//! Every interval, deadline and brake of the daemon, in one place that tests can scale.

use std::time::Duration;

/// How fast the daemon goes about its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// First interval between two looks while something is under way; doubles up to [`Pace::step_most`].
    pub step: Duration,
    /// Longest interval between two looks while something is under way.
    pub step_most: Duration,
    /// Interval between two looks at a machine that needs nothing; jittered by a fifth. Also what bounds the time until a
    /// vanished or stopped instance is reported.
    pub slow: Duration,
    /// How long a creation may take, at most: the deadline of the verb, and the age from which remains are leftovers.
    pub create: Duration,
    /// How long after a teardown was first seen another process's creation may still land. Not less than `create`.
    pub settle: Duration,
    /// How long a machine may take to join after it was started.
    pub join: Duration,
    /// A mere step is shown only when it has lasted this long: most are over sooner, and a write costs Omni more than it tells.
    pub report_step: Duration,
    /// The same cause is written again at most this often.
    pub report_same: Duration,
    /// Between two heartbeats. Omni takes a provider for lost after 31 s.
    pub heartbeat: Duration,
    /// Between two looks for orphans; jittered by a fifth.
    pub orphan_look: Duration,
    /// How long, at least, something has to look orphaned to be one, and a request that was never torn down has to be gone before its
    /// instance is deleted: longer than any loss of Omni's data that nobody would notice.
    pub orphan_age: Duration,
    /// How long running cloud calls may take to end after SIGTERM.
    pub shutdown: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            step: Duration::from_millis(250),
            step_most: Duration::from_secs(5),
            slow: Duration::from_secs(300),
            create: Duration::from_secs(60),
            settle: Duration::from_secs(90),
            join: Duration::from_secs(15 * 60),
            report_step: Duration::from_secs(2),
            report_same: Duration::from_secs(15),
            heartbeat: Duration::from_secs(10),
            orphan_look: Duration::from_secs(10 * 60),
            orphan_age: Duration::from_secs(30 * 60),
            shutdown: Duration::from_secs(20),
        }
    }
}
