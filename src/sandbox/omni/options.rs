//! What kind of Omni it is: its age, its pace, its moods.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::secret::Secret;

/// A wall clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// A clock that asks `now`.
    pub fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new(SystemTime::now)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// How long Omni's controllers take. Watched on Omni 1.10.4 where a number is odd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delays {
    /// Until a new machine request carries Omni's finalizer: about 45 ms.
    pub request_finalizer: Duration,
    /// Each of the two steps by which a request ends once nobody else holds it: 12 ms together at most.
    pub request_end: Duration,
    /// Until a new machine request status carries the cleanup finalizer: before its creator can update it.
    pub status_finalizer: Duration,
    /// Between any other cause and its effect.
    pub react: Duration,
    /// The drain of a machine that was accepted. Minutes in a real cluster.
    pub drain: Duration,
    /// From the boot of a machine to its join.
    pub join: Duration,
    /// From the teardown of a link to its end.
    pub link_end: Duration,
}

impl Default for Delays {
    fn default() -> Self {
        Self {
            request_finalizer: Duration::from_millis(45),
            request_end: Duration::from_millis(5),
            status_finalizer: Duration::from_millis(10),
            react: Duration::from_millis(5),
            drain: Duration::from_secs(1),
            join: Duration::from_secs(2),
            link_end: Duration::from_millis(500),
        }
    }
}

/// What kind of Omni it is. Can be changed while it runs ([`super::Omni::configure`]).
#[derive(Debug, Clone)]
pub struct OmniOptions {
    /// Seeds all random choices: request names, tokens. Read once.
    pub seed: u64,
    /// Omni's wall clock: signatures, key expiry, creation times.
    pub clock: Clock,
    /// How long its controllers take.
    pub delays: Delays,
    /// Drains begin but do not end.
    pub hold_drains: bool,
    /// The version in `SysVersions/current`.
    pub version: String,
    /// The machine API's advertised URL.
    pub api_url: String,
    /// Port of the event sink.
    pub events_port: i32,
    /// Port of the kernel log receiver.
    pub logs_port: i32,
    /// The account's own join token.
    pub default_join_token: Secret,
    /// `FeaturesConfigs/features-config`: where the image factory is. Empty: the public one.
    pub image_factory_base_url: String,
    /// Off plays an Omni before 1.8.
    pub teardown_rpc: bool,
    /// Off plays an Omni before 1.0: no provider join configs, connection parameters instead.
    pub provider_join_configs: bool,
    /// Off plays an Omni before 1.8.
    pub create_schematic: bool,
    /// On plays an Omni from 1.11: it answers `GetBootAssetURL` with this base URL.
    pub boot_asset_base_url: Option<String>,
    /// How far the cache behind Get and List of some types lags.
    pub cache_staleness: Duration,
    /// How many changes the log keeps: whoever is further behind has to bootstrap anew.
    pub history: usize,
    /// Off believes the key's fingerprint and skips the OpenPGP arithmetic, which costs milliseconds in debug
    /// builds. All other checks stay.
    pub check_signatures: bool,
    /// Machine requests carry a spec field that no client of today knows.
    pub future_fields: bool,
    /// Everybody is a reader.
    pub suspended: bool,
    /// Until it is, every call fails.
    pub eula_accepted: bool,
    /// Watches get no event until it is off again: every client's view is stale.
    pub hold_watches: bool,
}

impl Default for OmniOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            clock: Clock::default(),
            delays: Delays::default(),
            hold_drains: false,
            version: "v1.10.4".to_owned(),
            api_url: "https://omni.sandbox.internal:8090/".to_owned(),
            events_port: 8091,
            logs_port: 8092,
            default_join_token: Secret::new("the-default-join-token-of-the-sandbox"),
            image_factory_base_url: String::new(),
            teardown_rpc: true,
            provider_join_configs: true,
            create_schematic: true,
            boot_asset_base_url: None,
            cache_staleness: Duration::ZERO,
            history: 10_000,
            check_signatures: true,
            future_fields: false,
            suspended: false,
            eula_accepted: true,
            hold_watches: false,
        }
    }
}
