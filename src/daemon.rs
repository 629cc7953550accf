//! Wires everything together once, runs it, and shuts it down in order.

mod commands;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

#[cfg(feature = "ganeti")]
use anyhow::Context as _;
#[cfg(feature = "ganeti")]
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

#[cfg(feature = "ganeti")]
use crate::backends::ganeti::{self, Ganeti};
#[cfg(feature = "oxide")]
use crate::backends::oxide::{self, Oxide};
use crate::cloud::schema::class_schema;
use crate::cloud::{Cloud, ErrorKind, Guarded, Timestamp};
#[cfg(feature = "ganeti")]
use crate::config::GanetiConfig;
#[cfg(feature = "oxide")]
use crate::config::OxideConfig;
use crate::config::{CloudConfig, Config, OrphanPolicy};
use crate::engine::clock::Clock;
use crate::engine::download;
use crate::engine::health::{self, Health};
use crate::engine::imports::Imports;
use crate::engine::inventory::Inventory;
use crate::engine::orphans::Policy;
use crate::engine::queue::Queue;
use crate::engine::readings::Readings;
use crate::engine::reconcile::{Engine, Identity};
use crate::engine::stores::Stores;
use crate::engine::{orphans, retry, workers};
use crate::machine::Pace;
#[cfg(feature = "ganeti")]
use crate::media::{self, Media};
use crate::omni::kinds::InfraProviderStatusSpec;
use crate::omni::{
    Dial, Fence, IdentityError, Join, Lease, Omni, OmniError, OmniErrorKind, ServiceAccount, Settings,
};
use crate::rotation::{self, SecretFile};
use crate::secret::Secret;

pub use commands::{GivenBack, OrphanList, OrphanRow, check, orphans, release};

/// What one daemon is made of.
pub struct Parts<C> {
    /// Omni.
    pub omni: Omni,
    /// The cloud.
    pub cloud: C,
    /// How the provider shows itself in Omni.
    pub registration: InfraProviderStatusSpec,
    /// Bounds of image downloads.
    pub downloads: download::Settings,
    /// Nameservers for every machine whose class names none.
    pub nameservers: Vec<IpAddr>,
    /// How many requests are worked on at once.
    pub concurrency: usize,
    /// Intervals and deadlines.
    pub pace: Pace,
    /// What happens to instances that no request wants.
    pub orphans: Policy,
}

/// Signals that follow each other faster than this are one.
const ONE_BREATH: Duration = Duration::from_secs(1);

/// A key that expires within this time is warned about at the start.
const KEY_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why a provider stopped before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Omni does not take us for the provider that we should be.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A part that lives as long as the daemon ended: without it the rest would look healthy and do nothing.
    #[error("a part of the provider stopped by itself: this is a fault of the provider; start it again")]
    Ended,
}

/// How many cloud calls may be under way for each worker: imports and heartbeats come on top of the workers' own.
const CALLS_PER_WORKER: usize = 2;

/// Runs a provider until `stop`, then lets the passes under way end, within a bound. Dropping it is a crash: everything ends at
/// once, and the next start goes on from what Omni and the cloud show.
///
/// # Errors
///
/// When Omni refuses the registration for a reason that waiting does not cure.
pub async fn serve<C: Cloud>(parts: Parts<C>, stop: CancellationToken) -> Result<(), ServeError> {
    let Some((site, mut background)) = Site::open(parts, &stop).await? else {
        return Ok(());
    };
    tokio::select! {
        ended = site.term(Fence::open(), &stop) => ended,
        Some(_) = background.join_next() => Err(ServeError::Ended),
    }
}

/// The same, taking turns with other daemons of the provider ID: it stands by, with warm stores, until it holds the lease, and
/// again when it has lost it. After `stop` it lets go of the lease.
///
/// # Errors
///
/// As [`serve`].
pub async fn serve_in_turns<C: Cloud>(parts: Parts<C>, stop: CancellationToken) -> Result<(), ServeError> {
    let Some((site, mut background)) = Site::open(parts, &stop).await? else {
        return Ok(());
    };
    let closing = CancellationToken::new();
    let mut keeping = JoinSet::new();
    keeping.spawn(site.lease.clone().keep(closing.clone()));
    let turns = async {
        loop {
            let fence = tokio::select! {
                fence = site.lease.held() => fence,
                () = stop.cancelled() => return Ok(()),
            };
            match fence.guard(site.term(fence.clone(), &stop)).await {
                Some(ended) => return ended,
                None => warn!("lost the lease; what was under way is dropped"),
            }
        }
    };
    let ended = tokio::select! {
        ended = turns => ended,
        Some(_) = background.join_next() => Err(ServeError::Ended),
        Some(_) = keeping.join_next() => Err(ServeError::Ended),
    };
    closing.cancel();
    while keeping.join_next().await.is_some() {}
    ended
}

/// What lives as long as the daemon, whoever's turn it is.
struct Site<C: Cloud> {
    omni: Omni,
    cloud: Arc<Guarded<C>>,
    registration: InfraProviderStatusSpec,
    downloads: download::Settings,
    nameservers: Vec<IpAddr>,
    concurrency: usize,
    pace: Pace,
    orphans: Policy,
    clock: Clock,
    queue: Arc<Queue>,
    stores: Stores,
    join: Join,
    lease: Lease,
}

impl<C: Cloud> Site<C> {
    /// Signs in and begins to watch; the tasks end with the set. `None` if `stop` came first.
    async fn open(
        parts: Parts<C>,
        stop: &CancellationToken,
    ) -> Result<Option<(Self, JoinSet<()>)>, ServeError> {
        let Parts {
            omni,
            cloud,
            registration,
            downloads,
            nameservers,
            concurrency,
            pace,
            orphans,
        } = parts;
        tokio::select! {
            signed_in = sign_in(&omni) => signed_in?,
            () = stop.cancelled() => return Ok(None),
        }
        let queue = Arc::new(Queue::default());
        let stores = Stores::new(&omni.state);
        let join = Join::new(omni.state.clone());
        let mut background = JoinSet::new();
        background.spawn(join.clone().run());
        background.spawn({
            let (stores, queue) = (stores.clone(), queue.clone());
            async move {
                let known = stores.clone();
                stores
                    .run(Arc::new(move |key: &str| queue.push(key, known.line(key))))
                    .await;
            }
        });
        let site = Self {
            cloud: Arc::new(Guarded::new(
                cloud,
                concurrency.saturating_mul(CALLS_PER_WORKER),
                pace.create,
            )),
            lease: Lease::new(omni.state.clone(), pace.lease),
            omni,
            registration,
            downloads,
            nameservers,
            concurrency,
            pace,
            orphans,
            clock: Clock::start(),
            queue,
            stores,
            join,
        };
        Ok(Some((site, background)))
    }

    /// Works until `stop`, or until it is dropped: for a lease, a crash. What was remembered of the requests ends with it, since
    /// others may act in between.
    async fn term(&self, fence: Fence, stop: &CancellationToken) -> Result<(), ServeError> {
        let Self {
            omni,
            cloud,
            pace,
            clock,
            ..
        } = self;
        let state = omni.state.clone();
        let installation = tokio::select! {
            registered = register(omni, &self.registration) => registered?,
            () = stop.cancelled() => return Ok(()),
        };
        let identity = Identity {
            provider: state.provider().to_owned(),
            installation,
        };
        let health = Arc::new(Health::default());
        let (imports, orders) = Imports::new(cloud.clone(), *clock, self.queue.clone());
        let imports = Arc::new(imports);
        let engine = Arc::new(Engine {
            cloud: cloud.clone(),
            state: state.clone(),
            management: omni.management.clone(),
            join: self.join.clone(),
            stores: self.stores.clone(),
            inventory: Inventory::new(
                cloud.clone(),
                *clock,
                identity.provider.clone(),
                identity.installation.clone(),
            ),
            imports: imports.clone(),
            lease: self.lease.clone(),
            fence: fence.clone(),
            queue: self.queue.clone(),
            health: health.clone(),
            downloads: self.downloads.clone(),
            clock: *clock,
            pace: *pace,
            identity,
            nameservers: self.nameservers.clone(),
            schematics: Mutex::new(HashMap::new()),
            readings: Readings::default(),
            memories: Mutex::new(HashMap::new()),
        });

        // Everything that lives as long as the term; dropping the set ends it all.
        let mut background = JoinSet::new();
        background.spawn(imports.run(orders, fence.clone()));
        background.spawn({
            let (cloud, clock, every, fence) = (cloud.clone(), *clock, pace.heartbeat, fence.clone());
            async move {
                let beating = health::beat(&state, &cloud, &health, clock, every);
                fence.guard(beating).await;
            }
        });

        let bootstrapped = async {
            self.stores.bootstrapped().await;
            self.join.bootstrapped().await;
        };
        tokio::select! {
            () = bootstrapped => {}
            () = stop.cancelled() => return Ok(()),
        }
        let keys = self.stores.keys();
        info!(requests = keys.len(), "ready");
        for key in keys {
            self.queue.push(&key, self.stores.line(&key));
        }

        background.spawn({
            let (engine, policy) = (engine.clone(), self.orphans);
            async move {
                fence.guard(orphans::run(engine, policy)).await;
            }
        });
        let mut working = JoinSet::new();
        working.spawn(workers::run(engine, self.concurrency, stop.clone()));
        tokio::select! {
            () = stop.cancelled() => {}
            Some(_) = background.join_next() => return Err(ServeError::Ended),
        }
        info!("stopping: no new work, waiting for what is under way");
        let ended = tokio::time::timeout(pace.shutdown, async {
            while working.join_next().await.is_some() {}
        });
        if ended.await.is_err() {
            warn!("some calls did not end in time; the next start looks at what became of them");
        }
        Ok(())
    }
}

/// Asks Omni who we are, again and again while it is out of reach.
async fn sign_in(omni: &Omni) -> Result<(), IdentityError> {
    let mut failures = 0;
    loop {
        match omni.who_am_i().await {
            Ok(()) => return Ok(()),
            Err(error) => wait_out(error, &mut failures).await?,
        }
    }
}

/// Registers, in the same way.
async fn register(omni: &Omni, registration: &InfraProviderStatusSpec) -> Result<String, IdentityError> {
    let mut failures = 0;
    loop {
        match health::register(&omni.state, registration).await {
            Ok(installation) => return Ok(installation),
            Err(error) => wait_out(error.into(), &mut failures).await?,
        }
    }
}

/// Waits before the next try, if waiting may cure it.
async fn wait_out(error: IdentityError, failures: &mut u32) -> Result<(), IdentityError> {
    let error = match error {
        IdentityError::Omni(error) if waits(&error) => error,
        error => return Err(error),
    };
    *failures += 1;
    let wait = retry::wait(ErrorKind::Unavailable, *failures);
    let retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    warn!(%error, retry_in_ms, "cannot register with Omni yet");
    tokio::time::sleep(wait).await;
    Ok(())
}

/// Whether waiting may cure it.
fn waits(error: &OmniError) -> bool {
    matches!(
        error.kind,
        OmniErrorKind::Unavailable | OmniErrorKind::Eula | OmniErrorKind::Conflict
    )
}

/// Runs the daemon until SIGTERM or SIGINT; a second one ends it at once. SIGHUP has the files of secrets read anew, which happens
/// by itself too.
///
/// # Errors
///
/// What kept it from starting, or from going on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let look = Arc::new(Notify::new());
    let told_twice = heed_signals(stop.clone(), look.clone())?;
    let omni = omni(&config)?;
    let mut files: Vec<SecretFile> = key_file(&config, &omni).into_iter().collect();
    let served = async {
        match &config.cloud {
            #[cfg(feature = "oxide")]
            CloudConfig::Oxide(site) => {
                let oxide = oxide(site, &config)?;
                files.extend(token_file(site, &oxide));
                serve_as_told(parts(omni, oxide, &config), &config, files, &look, stop).await?;
            }
            #[cfg(feature = "ganeti")]
            CloudConfig::Ganeti(site) => {
                let media = site.media.as_ref();
                let media = media.map(|media| Media::new(&media.folder, &media.url));
                let ganeti = ganeti(site, media.clone())?;
                files.extend(password_file(site, &ganeti));
                let serving = serve_as_told(parts(omni, ganeti, &config), &config, files, &look, stop);
                tokio::select! {
                    served = serving => served?,
                    served = serve_media(site, media) => served?,
                }
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        served = served => served?,
        () = told_twice => {}
    }
    info!("stopped");
    Ok(())
}

/// Serves, alone or in turns, and follows the files of secrets meanwhile.
async fn serve_as_told<C: Cloud>(
    parts: Parts<C>,
    config: &Config,
    files: Vec<SecretFile>,
    look: &Notify,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let serving = async {
        match config.high_availability {
            true => serve_in_turns(parts, stop).await,
            false => serve(parts, stop).await,
        }
    };
    tokio::select! {
        served = serving => served,
        () = rotation::follow(files, look) => Ok(()),
    }
}

fn omni(config: &Config) -> anyhow::Result<Omni> {
    let settings = Settings {
        endpoint: config.omni.endpoint.clone(),
        key: config.omni.service_account_key.clone(),
        provider_id: config.provider.id.clone(),
        ca_bundle: config.omni.ca_bundle.clone(),
        insecure: config.omni.insecure,
    };
    let omni = Omni::new(&settings, Dial::Tcp)?;
    let now = Timestamp::from(SystemTime::now());
    if let Some(expires) = omni.signer.account().expires()
        && expires < now.after(KEY_WARNING)
    {
        let days = expires.since(now).as_secs() / (24 * 3600);
        let provider = &config.provider.id;
        warn!(
            days,
            "the service account key expires soon: renew it with `omnictl infraprovider renewkey {provider}`"
        );
    }
    Ok(omni)
}

#[cfg(feature = "oxide")]
fn oxide(site: &OxideConfig, config: &Config) -> anyhow::Result<Oxide> {
    let settings = oxide::Settings {
        host: site.host.clone(),
        token: site.token.clone(),
        ca_bundle: site.ca_bundle.clone(),
        provider_id: config.provider.id.clone(),
    };
    Ok(Oxide::new(&settings)?)
}

/// The file of the key, if it came from one.
fn key_file(config: &Config, omni: &Omni) -> Option<SecretFile> {
    let file = config.omni.service_account_key_file.clone()?;
    let signer = omni.signer.clone();
    let replace = move |key: &Secret| {
        let account = ServiceAccount::parse(key).map_err(|error| error.to_string())?;
        signer.replace(account);
        Ok(())
    };
    Some(SecretFile::new(
        file,
        config.omni.service_account_key.clone(),
        replace,
    ))
}

/// The file of the token, if it came from one.
#[cfg(feature = "oxide")]
fn token_file(site: &OxideConfig, oxide: &Oxide) -> Option<SecretFile> {
    let credentials = oxide.credentials();
    let replace = move |token: &Secret| credentials.replace(token).map_err(|error| error.to_string());
    Some(SecretFile::new(
        site.token_file.clone()?,
        site.token.clone(),
        replace,
    ))
}

#[cfg(feature = "ganeti")]
fn ganeti(site: &GanetiConfig, media: Option<Media>) -> anyhow::Result<Ganeti> {
    let pin = site.certificate_sha256.as_deref().and_then(ganeti::Pin::parse);
    let trust = match (pin, site.insecure) {
        (Some(pin), _) => ganeti::Trust::Pinned(pin),
        (None, true) => ganeti::Trust::Anybody,
        (None, false) => ganeti::Trust::Authorities(site.ca_bundle.clone()),
    };
    let settings = ganeti::Settings {
        endpoint: site.endpoint.clone(),
        user: site.user.clone(),
        password: site.password.clone(),
        trust,
        media,
    };
    Ok(Ganeti::new(&settings)?)
}

/// Serves boot media, whoever's turn it is; without any it never ends.
#[cfg(feature = "ganeti")]
async fn serve_media(site: &GanetiConfig, media: Option<Media>) -> anyhow::Result<()> {
    let (Some(config), Some(media)) = (&site.media, media) else {
        return std::future::pending().await;
    };
    let listener = TcpListener::bind(config.address).await;
    let listener = listener.with_context(|| format!("cannot serve boot media on {}", config.address))?;
    media::serve(media, listener).await?;
    Ok(())
}

/// The file of the password, if it came from one.
#[cfg(feature = "ganeti")]
fn password_file(site: &GanetiConfig, ganeti: &Ganeti) -> Option<SecretFile> {
    let place = ganeti.password();
    let replace = move |password: &Secret| {
        password.clone_into(&mut place.write().unwrap_or_else(std::sync::PoisonError::into_inner));
        Ok(())
    };
    let file = site.password_file.clone()?;
    Some(SecretFile::new(file, site.password.clone(), replace))
}

fn parts<C: Cloud>(omni: Omni, cloud: C, config: &Config) -> Parts<C> {
    let schema = class_schema::<C::Class>();
    Parts {
        omni,
        cloud,
        registration: InfraProviderStatusSpec {
            schema: schema.to_string(),
            name: config.provider.name.clone(),
            description: config.provider.description.clone(),
            icon: String::new(),
            version: crate::VERSION.to_owned(),
        },
        downloads: download::Settings {
            ca_bundle: config.factory_ca_bundle.clone(),
            ..download::Settings::default()
        },
        nameservers: config.nameservers.clone(),
        concurrency: config.concurrency,
        pace: Pace {
            join: config.join_deadline,
            ..Pace::default()
        },
        orphans: match config.orphans {
            OrphanPolicy::Report => Policy::Report,
            OrphanPolicy::Delete => Policy::Delete,
        },
    }
}

/// Listens from now on; the future it returns acts on what comes, and ends when told to stop for the second time.
fn heed_signals(stop: CancellationToken, look: Arc<Notify>) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        let mut told: Option<Instant> = None;
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {
                    info!("SIGHUP: the files of secrets are read anew");
                    look.notify_one();
                    continue;
                }
            }
            // A supervisor may tell the process and its group in one breath: that is once.
            if told.is_some_and(|told| told.elapsed() > ONE_BREATH) {
                warn!("told to stop twice: ending at once");
                return;
            }
            told.get_or_insert_with(Instant::now);
            stop.cancel();
        }
    })
}
