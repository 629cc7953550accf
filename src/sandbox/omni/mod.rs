//! An Omni in this process: its COSI state and management services, with its rules for infrastructure
//! providers.
//!
//! The `sandbox` subcommand serves it on loopback; the tests run it beside the daemon on one paused clock,
//! over [`Omni::dial`]. [`Omni`] is the handle of both: an operator's and a machine's side of Omni
//! ([`admin`]), a view of everything stored, and the means to make it misbehave ([`Hook`], [`OmniOptions`],
//! dropping [`Omni::run`]).
//!
//! # Guarantees
//!
//! * The same seed and the same calls make the same requests in the same order.
//! * State outlives [`Omni::run`]: dropping that future is a crash, running it again a restart. What Omni
//!   keeps in memory is gone then, and so are the bookmarks of it.
//! * No call takes effect after the crash, not even one that was under way.
//! * A change and its event are one: who holds a bookmark misses nothing.
//!
//! # Assumptions
//!
//! What it imitates was watched on Omni 1.10.4, or read in Omni's and cosi-project/runtime's sources.

mod access;
pub mod admin;
mod agenda;
mod calls;
mod controllers;
mod join;
mod management;
mod options;
mod resources;
mod rules;
mod serve;
mod service;
mod signature;
mod store;
pub mod types;
mod watch;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, watch as channel};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use access::Role;
pub use calls::{Call, FailCode, Hook, Moment, Rpc, Verdict};
pub use options::{Clock, Delays, OmniOptions};
pub use resources::Stored;

use self::agenda::Agenda;
use self::signature::Keys;
use self::store::Store;
use crate::omni::Kind;
use crate::omni::resource::{Metadata, RawSpec, Resource};
use crate::omni::wire::specs;

/// Something that an operator cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Impossible(pub String);

/// What Omni knows of an instance before and after it joins.
#[derive(Debug, Clone)]
struct Machine {
    running: bool,
    api_url: Result<String, String>,
}

/// A drain under way.
#[derive(Debug, Clone)]
struct Drain {
    uuid: String,
    until: Instant,
    /// Whether there was anything to drain.
    member: bool,
}

/// Everything, under one lock. No await while it is held.
struct Inner {
    options: OmniOptions,
    store: Store,
    keys: Keys,
    machines: BTreeMap<String, Machine>,
    drains: BTreeMap<String, Drain>,
    schematics: BTreeMap<String, Bytes>,
    agenda: Agenda,
    rng: StdRng,
    violations: Vec<String>,
    refused_joins: Vec<(String, String)>,
    refused_signatures: Vec<String>,
    calls: BTreeMap<(Rpc, String), u64>,
    total_calls: u64,
    hook: Option<Hook>,
    /// Counts the runs: the second is the first restart.
    runs: u64,
    /// Takes the server's half of what [`Omni::dial`] makes.
    dialer: Option<mpsc::UnboundedSender<tokio::io::DuplexStream>>,
    /// Breaks all connections of this run.
    connections: CancellationToken,
    /// Counts [`Omni::break_watches`].
    watch_breaks: u64,
    /// Counts changes that the store does not.
    bumps: u64,
}

impl Inner {
    fn now(&self) -> SystemTime {
        self.options.clock.now()
    }

    /// Tells whoever waits for a change that there is one.
    fn bump(&mut self) {
        self.bumps = self.bumps.wrapping_add(1);
    }

    /// A number that changes whenever anything does.
    fn ticker(&self) -> u64 {
        self.bumps.wrapping_add(self.store.revision())
    }

    /// Stores a new machine request.
    fn add_request(&mut self, mut request: Stored) {
        if self.options.future_fields {
            // Field 1000, a varint of 1.
            let mut spec = request.spec.to_vec();
            spec.extend_from_slice(&[0xc0, 0x3e, 0x01]);
            request.spec = spec.into();
        }
        let now = self.now();
        self.store.put(request, now);
    }

    /// Stores a provider's join config with that token.
    fn put_join_config(&mut self, provider: &str, token: &str) {
        let options = &self.options;
        let spec = join::provider_join_config(
            provider,
            token,
            &options.api_url,
            options.events_port,
            options.logs_port,
        );
        let config = Stored::new(types::INFRA, types::PROVIDER_JOIN_CONFIGS, provider)
            .owner("ProviderJoinConfigController")
            .label(types::LABEL_PROVIDER, provider)
            .spec(&spec);
        let now = self.now();
        self.store.put(config, now);
    }

    /// Brings the resources that show options up to date with them.
    fn publish_options(&mut self) {
        let options = self.options.clone();
        let now = self.now();
        let api = specs::SiderolinkApiConfigSpec {
            machine_api_advertised_url: options.api_url.clone(),
            wireguard_advertised_endpoint: String::new(),
            enforce_grpc_tunnel: false,
            events_port: options.events_port,
            logs_port: options.logs_port,
        };
        let connection = specs::ConnectionParamsSpec {
            api_endpoint: options.api_url.clone(),
            join_token: options.default_join_token.expose().to_owned(),
            events_port: options.events_port,
            logs_port: options.logs_port,
            ..specs::ConnectionParamsSpec::default()
        };
        let features = specs::FeaturesConfigSpec {
            image_factory_base_url: options.image_factory_base_url.clone(),
            ..specs::FeaturesConfigSpec::default()
        };
        let version = specs::SysVersionSpec {
            backend_version: options.version.clone(),
            instance_name: "sandbox".to_owned(),
            backend_api_version: 1,
        };
        let published = [
            Stored::new(types::DEFAULT, types::API_CONFIGS, types::SIDEROLINK_CONFIG_ID).spec(&api),
            Stored::new(
                types::DEFAULT,
                types::CONNECTION_PARAMS,
                types::SIDEROLINK_CONFIG_ID,
            )
            .spec(&connection),
            Stored::new(types::DEFAULT, types::FEATURES_CONFIGS, types::FEATURES_CONFIG_ID).spec(&features),
            Stored::new(types::EPHEMERAL, types::SYS_VERSIONS, types::CURRENT_ID).spec(&version),
        ];
        for resource in published {
            self.store.put(resource, now);
        }
        for config in self.store.list(types::INFRA, types::PROVIDER_JOIN_CONFIGS) {
            let token = config.decode::<specs::ProviderJoinConfigSpec>().join_token;
            self.put_join_config(&config.id, &token);
        }
        for kind in types::DEFINED {
            let id = kind.to_lowercase();
            if *kind == types::PROVIDER_JOIN_CONFIGS && !options.provider_join_configs {
                self.store.remove(types::META, types::RESOURCE_DEFINITIONS, &id);
            } else {
                self.store
                    .put(Stored::new(types::META, types::RESOURCE_DEFINITIONS, &id), now);
            }
        }
    }
}

struct Shared {
    inner: Mutex<Inner>,
    changed: channel::Sender<u64>,
}

/// The handle of an embedded Omni. Cheap to clone; all clones are one Omni.
#[derive(Clone)]
pub struct Omni {
    shared: Arc<Shared>,
}

impl fmt::Debug for Omni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Omni")
    }
}

impl Default for Omni {
    fn default() -> Self {
        Self::new(OmniOptions::default())
    }
}

impl Omni {
    /// A new, empty Omni that nobody serves yet.
    #[must_use]
    pub fn new(options: OmniOptions) -> Self {
        let mut inner = Inner {
            store: Store::new(options.history.max(1), options.seed),
            keys: Keys::new(),
            machines: BTreeMap::new(),
            drains: BTreeMap::new(),
            schematics: BTreeMap::new(),
            agenda: Agenda::default(),
            rng: StdRng::seed_from_u64(options.seed),
            violations: Vec::new(),
            refused_joins: Vec::new(),
            refused_signatures: Vec::new(),
            calls: BTreeMap::new(),
            total_calls: 0,
            hook: None,
            runs: 0,
            dialer: None,
            connections: CancellationToken::new(),
            watch_breaks: 0,
            bumps: 0,
            options,
        };
        inner.publish_options();
        let (changed, _) = channel::channel(inner.ticker());
        Self {
            shared: Arc::new(Shared {
                inner: Mutex::new(inner),
                changed,
            }),
        }
    }

    /// Does something under the lock, and wakes who waits if it changed anything.
    fn with<R>(&self, work: impl FnOnce(&mut Inner) -> R) -> R {
        let (result, ticker) = {
            // A panic under the lock is a failed test; its state is of no use to the next one either way.
            let mut inner = self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let result = work(&mut inner);
            (result, inner.ticker())
        };
        self.shared.changed.send_if_modified(|seen| {
            let changed = *seen != ticker;
            *seen = ticker;
            changed
        });
        result
    }

    /// Changes what kind of Omni it is, and looks at everything anew.
    pub fn configure(&self, change: impl FnOnce(&mut OmniOptions)) {
        self.with(|inner| {
            change(&mut inner.options);
            inner.publish_options();
            inner.bump();
            controllers::rescan(inner);
        });
    }

    /// The options of this moment.
    #[must_use]
    pub fn options(&self) -> OmniOptions {
        self.with(|inner| inner.options.clone())
    }

    /// Asks that hook before and after every call from now on.
    pub fn set_hook(&self, hook: Hook) {
        self.with(|inner| inner.hook = Some(hook));
    }

    /// Asks nobody any more.
    pub fn clear_hook(&self) {
        self.with(|inner| inner.hook = None);
    }

    /// Tells of every change of anything; the number means nothing.
    #[must_use]
    pub fn changes(&self) -> channel::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Waits until `look` finds what it looks for. Waits for ever if that never comes: bound it.
    pub async fn until<T>(&self, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let mut changes = self.changes();
        loop {
            changes.borrow_and_update();
            if let Some(found) = look(self) {
                return found;
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// How many calls there were, by kind of call and type. Management calls have an empty type.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<(Rpc, String), u64> {
        self.with(|inner| inner.calls.clone())
    }

    /// How many calls of that kind there were, of all types.
    #[must_use]
    pub fn count(&self, rpc: Rpc) -> u64 {
        self.with(|inner| {
            inner
                .calls
                .iter()
                .filter(|((counted, _), _)| *counted == rpc)
                .map(|(_, count)| count)
                .sum()
        })
    }

    /// What a provider did that it must not do, and that Omni has no way to refuse: a machine that went down
    /// while Omni was draining it.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.with(|inner| inner.violations.clone())
    }

    /// Machines that were not let in, by UUID, and why.
    #[must_use]
    pub fn refused_joins(&self) -> Vec<(String, String)> {
        self.with(|inner| inner.refused_joins.clone())
    }

    /// Why signatures were refused; the wire does not say.
    #[must_use]
    pub fn signature_refusals(&self) -> Vec<String> {
        self.with(|inner| inner.refused_signatures.clone())
    }

    /// Schematics that were registered, by ID.
    #[must_use]
    pub fn schematics(&self) -> BTreeMap<String, Bytes> {
        self.with(|inner| inner.schematics.clone())
    }

    /// One schematic.
    #[must_use]
    pub fn schematic(&self, id: &str) -> Option<Bytes> {
        self.with(|inner| inner.schematics.get(id).cloned())
    }

    /// One resource of any type.
    #[must_use]
    pub fn get_raw(&self, namespace: &str, kind: &str, id: &str) -> Option<Arc<Stored>> {
        self.with(|inner| inner.store.get(namespace, kind, id).cloned())
    }

    /// All resources of a type, by ID.
    #[must_use]
    pub fn list_raw(&self, namespace: &str, kind: &str) -> Vec<Arc<Stored>> {
        self.with(|inner| inner.store.list(namespace, kind))
    }

    /// Everything there is, by namespace, type and ID.
    #[must_use]
    pub fn everything(&self) -> Vec<Arc<Stored>> {
        self.with(|inner| inner.store.everything())
    }

    /// One resource of a kind, of that provider where the kind is the provider's own. `None` also where its
    /// spec cannot be decoded.
    #[must_use]
    pub fn get<K: Kind>(&self, provider: &str, id: &str) -> Option<Resource<K>> {
        let stored = self.get_raw(&K::namespace(provider), &K::type_name(provider), id)?;
        typed(&stored)
    }

    /// All resources of a kind, by ID, of all providers unless the kind is the provider's own.
    #[must_use]
    pub fn list<K: Kind>(&self, provider: &str) -> Vec<Resource<K>> {
        self.list_raw(&K::namespace(provider), &K::type_name(provider))
            .iter()
            .filter_map(|stored| typed(stored))
            .collect()
    }
}

/// A stored resource as a client would decode it.
fn typed<K: Kind>(stored: &Stored) -> Option<Resource<K>> {
    Some(Resource {
        metadata: Metadata {
            id: stored.id.clone(),
            version: stored.version,
            owner: stored.owner.clone(),
            phase: stored.phase,
            created: stored.created.into(),
            finalizers: stored.finalizers.iter().cloned().collect(),
            labels: stored.labels.clone().into_iter().collect(),
            annotations: stored.annotations.clone().into_iter().collect(),
        },
        spec: K::decode(&stored.spec).ok()?,
        raw: RawSpec(stored.spec[..].into()),
    })
}
