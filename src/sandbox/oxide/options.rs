//! What a sandbox rack is made of: how long things take on it, what it has room for, who may ask.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::disks::GIB;

/// How long things take on this rack.
#[derive(Debug, Clone)]
pub struct OxidePace {
    /// From the request to `stopped`: the creation saga, during which the instance shows as `creating`.
    pub create: Duration,
    /// From `starting` to `running`.
    pub start: Duration,
    /// From `running` to [`Happening::Booted`](super::Happening::Booted).
    pub boot: Duration,
    /// From `stopping` to `stopped`.
    pub stop: Duration,
    /// From `rebooting` to `running`.
    pub reboot: Duration,
    /// What is left of the deletion saga once the instance is out of sight.
    pub delete: Duration,
    /// A disk's creation, during which it shows as `creating`.
    pub disk_create: Duration,
    /// What is left of the deletion of a disk, a snapshot or an image.
    pub disk_delete: Duration,
    /// One bulk write.
    pub chunk: Duration,
    /// A snapshot, and with it the end of an import.
    pub finalize: Duration,
    /// What is left of an image's creation once it is visible.
    pub image_create: Duration,
    /// When the rack starts a failed instance again, unless its policy is `never`. `None`: not at all.
    pub auto_restart: Option<Duration>,
}

impl Default for OxidePace {
    /// Slow enough to be watched, fast enough not to be waited for.
    fn default() -> Self {
        let millis = Duration::from_millis;
        Self {
            create: millis(50),
            start: millis(300),
            boot: millis(700),
            stop: millis(300),
            reboot: millis(500),
            delete: millis(20),
            disk_create: millis(10),
            disk_delete: millis(10),
            chunk: Duration::ZERO,
            finalize: millis(50),
            image_create: millis(20),
            auto_restart: None,
        }
    }
}

impl OxidePace {
    /// A rack on which nothing takes time.
    #[must_use]
    pub fn instant() -> Self {
        Self {
            create: Duration::ZERO,
            start: Duration::ZERO,
            boot: Duration::ZERO,
            stop: Duration::ZERO,
            reboot: Duration::ZERO,
            delete: Duration::ZERO,
            disk_create: Duration::ZERO,
            disk_delete: Duration::ZERO,
            chunk: Duration::ZERO,
            finalize: Duration::ZERO,
            image_create: Duration::ZERO,
            auto_restart: None,
        }
    }
}

/// The CPU of a sled. Turin sleds also run what asks for Milan (`db-model/src/instance_cpu_platform.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SledFamily {
    /// AMD Milan.
    Milan,
    /// AMD Turin.
    Turin,
}

/// One server of the rack.
#[derive(Debug, Clone)]
pub struct Sled {
    /// Its CPU.
    pub family: SledFamily,
    /// vCPUs for instances.
    pub vcpus: u64,
    /// Memory for instances, in bytes.
    pub memory: u64,
    /// Space for local disks, in bytes.
    pub local_storage: u64,
}

/// What the rack has room for, and what the silo may take of it.
#[derive(Debug, Clone)]
pub struct Limits {
    /// vCPU quota; counts from an instance's start to its stop.
    pub vcpus: u64,
    /// Memory quota in bytes; counts like the vCPUs.
    pub memory: u64,
    /// Storage quota in bytes, for distributed disks and snapshots.
    pub storage: u64,
    /// The sleds.
    pub sleds: Vec<Sled>,
    /// Ephemeral addresses in the pool.
    pub external_ips: usize,
    /// Whether the fleet opted in to jumbo frames.
    pub jumbo_frames: bool,
}

impl Default for Limits {
    fn default() -> Self {
        let tib = 1024 * GIB;
        let sled = |family| Sled {
            family,
            vcpus: 200,
            memory: 2 * tib,
            local_storage: 50 * tib,
        };
        Self {
            vcpus: 1000,
            memory: 10 * tib,
            storage: 200 * tib,
            sleds: vec![
                sled(SledFamily::Milan),
                sled(SledFamily::Milan),
                sled(SledFamily::Turin),
                sled(SledFamily::Turin),
            ],
            external_ips: 256,
            jumbo_frames: false,
        }
    }
}

/// What a sandbox rack is made of.
#[derive(Debug, Clone)]
pub struct OxideOptions {
    /// The bearer token that may see everything at first. More come from [`OxideApi::add_token`](super::OxideApi::add_token).
    pub token: String,
    /// How long things take.
    pub pace: OxidePace,
    /// Room and quotas.
    pub limits: Limits,
    /// The largest page of a list, and its default size. Small values make clients page.
    pub page: usize,
    /// The newest API version that this rack serves; a client with a newer one gets a 400.
    pub newest_api: u64,
    /// Makes all IDs repeatable.
    pub seed: Option<u64>,
    /// What the rack's clock shows at the start; the present otherwise.
    pub epoch: Option<DateTime<Utc>>,
    /// How many bytes of one disk are kept for [`OxideApi::image_sha256`](super::OxideApi::image_sha256).
    pub kept_bytes: usize,
}

impl Default for OxideOptions {
    fn default() -> Self {
        Self {
            token: "oxide-token-sandbox".to_owned(),
            pace: OxidePace::default(),
            limits: Limits::default(),
            page: 100,
            newest_api: 2_026_060_800,
            seed: None,
            epoch: None,
            // A small image whole; of a real one (1.2 GiB) nothing.
            kept_bytes: 256 * 1024 * 1024,
        }
    }
}
