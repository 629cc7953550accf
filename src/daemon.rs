//! Wires everything together once, runs it, and shuts it down in order.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
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
use crate::engine::reconcile::{Engine, Identity};
use crate::engine::stores::Stores;
use crate::engine::{orphans, release, retry, workers};
use crate::machine::Pace;
use crate::machine::orphan::{Verdict, judge};
use crate::omni::kinds::{InfraProviderStatusSpec, InfraProviderStatuses};
use crate::omni::{Dial, IdentityError, Join, Omni, OmniError, OmniErrorKind, Settings};

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
    let Parts {
        omni,
        cloud,
        registration,
        downloads,
        nameservers,
        concurrency,
        pace,
        orphans: policy,
    } = parts;
    let state = omni.state.clone();
    let clock = Clock::start();
    let installation = tokio::select! {
        registered = register(&omni, &registration) => registered?,
        () = stop.cancelled() => return Ok(()),
    };
    let cloud = Arc::new(Guarded::new(
        cloud,
        concurrency.saturating_mul(CALLS_PER_WORKER),
        pace.create,
    ));
    let queue = Arc::new(Queue::default());
    let health = Arc::new(Health::default());
    let stores = Stores::new(&state);
    let join = Join::new(state.clone());
    let (imports, orders) = Imports::new(cloud.clone(), clock, queue.clone());
    let imports = Arc::new(imports);
    let identity = Identity {
        provider: state.provider().to_owned(),
        installation,
    };
    let engine = Arc::new(Engine {
        cloud: cloud.clone(),
        state: state.clone(),
        management: omni.management.clone(),
        join: join.clone(),
        stores: stores.clone(),
        inventory: Inventory::new(
            cloud.clone(),
            clock,
            identity.provider.clone(),
            identity.installation.clone(),
        ),
        imports: imports.clone(),
        queue: queue.clone(),
        health: health.clone(),
        downloads,
        clock,
        pace,
        identity,
        nameservers,
        schematics: Mutex::new(HashMap::new()),
        memories: Mutex::new(HashMap::new()),
    });

    // Everything that lives as long as the daemon; dropping the set ends it all.
    let mut background = JoinSet::new();
    background.spawn(join.clone().run());
    background.spawn(imports.run(orders));
    background.spawn({
        let (stores, queue) = (stores.clone(), queue.clone());
        async move { stores.run(Arc::new(move |key: &str| queue.push(key))).await }
    });
    background.spawn({
        let (state, health) = (state.clone(), health.clone());
        async move { health::beat(&state, &cloud, &health, clock, pace.heartbeat).await }
    });

    let bootstrapped = async {
        stores.bootstrapped().await;
        join.bootstrapped().await;
    };
    tokio::select! {
        () = bootstrapped => {}
        () = stop.cancelled() => return Ok(()),
    }
    let keys = stores.keys();
    info!(requests = keys.len(), "ready");
    for key in keys {
        queue.push(&key);
    }

    background.spawn(orphans::run(engine.clone(), policy));
    let mut working = JoinSet::new();
    working.spawn(workers::run(engine, concurrency, stop.clone()));
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

/// Registers, again and again while Omni is out of reach.
async fn register(omni: &Omni, registration: &InfraProviderStatusSpec) -> Result<String, IdentityError> {
    let mut failures = 0;
    loop {
        let result = async {
            omni.who_am_i().await?;
            Ok(health::register(&omni.state, registration).await?)
        };
        let error = match result.await {
            Ok(installation) => return Ok(installation),
            Err(IdentityError::Omni(error)) if waits(&error) => error,
            Err(error) => return Err(error),
        };
        failures += 1;
        let wait = retry::wait(ErrorKind::Unavailable, failures);
        let retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        warn!(%error, retry_in_ms, "cannot register with Omni yet");
        tokio::time::sleep(wait).await;
    }
}

/// Whether waiting may cure it.
fn waits(error: &OmniError) -> bool {
    matches!(
        error.kind,
        OmniErrorKind::Unavailable | OmniErrorKind::Eula | OmniErrorKind::Conflict
    )
}

/// Runs the daemon until SIGTERM or SIGINT; a second one ends it at once. SIGHUP does nothing: there is nothing to read anew.
///
/// # Errors
///
/// What kept it from starting, or from going on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let told_twice = heed_signals(stop.clone())?;
    let served = async {
        match &config.cloud {
            #[cfg(feature = "oxide")]
            CloudConfig::Oxide(site) => serve(parts(oxide(site, &config)?, &config)?, stop).await?,
            #[cfg(feature = "ganeti")]
            CloudConfig::Ganeti(site) => serve(parts(ganeti(site)?, &config)?, stop).await?,
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

/// Tries everything that the daemon needs, live, without changing anything.
///
/// # Errors
///
/// What does not work.
pub async fn check(config: &Config) -> anyhow::Result<()> {
    let omni = omni(config)?;
    omni.who_am_i()
        .await
        .context("cannot act as this provider in Omni")?;
    omni.state
        .get::<InfraProviderStatuses>(omni.state.provider())
        .await
        .context("Omni does not let us read our own registration")?;
    match &config.cloud {
        #[cfg(feature = "oxide")]
        CloudConfig::Oxide(site) => oxide(site, config)?
            .check()
            .await
            .context("cannot use the silo")?,
        #[cfg(feature = "ganeti")]
        CloudConfig::Ganeti(site) => ganeti(site)?.check().await.context("cannot use the cluster")?,
    }
    Ok(())
}

/// Something that carries our mark and that no request wants, for a person.
#[derive(Debug)]
pub struct OrphanRow {
    /// Where it is.
    pub scope: String,
    /// The instance's name.
    pub name: String,
    /// The vendor's ID; `None` for what is left of an instance.
    pub id: Option<String>,
    /// The machine request that it was made for, where its mark says so.
    pub request: Option<String>,
    /// Why no request wants it; `None` where Omni could not be asked whether one does.
    pub verdict: Option<Verdict>,
}

/// What carries our mark and no request wants.
#[derive(Debug)]
pub struct OrphanList {
    /// Everything of it; everything with our mark where Omni could not be asked.
    pub rows: Vec<OrphanRow>,
    /// Why Omni could not be asked.
    pub omni: anyhow::Result<()>,
}

/// Lists what carries our mark and no request wants, without changing anything.
///
/// # Errors
///
/// What could not be seen of the cloud.
pub async fn orphans(config: &Config) -> anyhow::Result<OrphanList> {
    let omni = omni(config)?;
    match &config.cloud {
        #[cfg(feature = "oxide")]
        CloudConfig::Oxide(site) => rows(&omni, &oxide(site, config)?).await,
        #[cfg(feature = "ganeti")]
        CloudConfig::Ganeti(site) => rows(&omni, &ganeti(site)?).await,
    }
}

async fn rows<C: Cloud>(omni: &Omni, cloud: &C) -> anyhow::Result<OrphanList> {
    let survey = orphans::survey(cloud, omni.state.provider()).await?;
    let word = orphans::ask::<C>(&omni.state).await;
    let judged = survey.marked.into_iter().map(|(scope, marked)| OrphanRow {
        scope: scope.to_string(),
        verdict: word
            .as_ref()
            .ok()
            .map(|word| judge(&scope, &marked, &word.answerable, &word.released)),
        name: marked.name,
        id: marked.id,
        request: marked.mark.map(|mark| mark.request),
    });
    Ok(OrphanList {
        rows: judged
            .filter(|row| row.verdict != Some(Verdict::Wanted))
            .collect(),
        omni: word.map(drop).context(
            "Omni could not be asked what it wants: the list is of everything with this provider's mark",
        ),
    })
}

/// What was given back, for a person.
#[derive(Debug)]
pub struct GivenBack {
    /// Scope, name and, where it is known, the vendor's ID of each.
    pub instances: Vec<(String, String, Option<String>)>,
    /// Why the cloud could not be seen, if so.
    pub unseen: Option<String>,
}

/// Gives an instance back to the operator.
///
/// # Errors
///
/// Why it cannot be.
pub async fn release(config: &Config, name: &str, scope: Option<&str>) -> anyhow::Result<GivenBack> {
    let omni = omni(config)?;
    match &config.cloud {
        #[cfg(feature = "oxide")]
        CloudConfig::Oxide(site) => give_back(&omni, &oxide(site, config)?, name, scope).await,
        #[cfg(feature = "ganeti")]
        CloudConfig::Ganeti(site) => give_back(&omni, &ganeti(site)?, name, scope).await,
    }
}

async fn give_back<C: Cloud>(
    omni: &Omni,
    cloud: &C,
    name: &str,
    scope: Option<&str>,
) -> anyhow::Result<GivenBack> {
    let released = release::release(&omni.state, cloud, name, scope).await?;
    let instances = released.releases.into_iter();
    Ok(GivenBack {
        instances: instances
            .map(|release| (release.scope.to_string(), release.name, release.id))
            .collect(),
        unseen: released.unseen.map(|error| error.to_string()),
    })
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

#[cfg(feature = "ganeti")]
fn ganeti(site: &GanetiConfig) -> anyhow::Result<Ganeti> {
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
    };
    Ok(Ganeti::new(&settings)?)
}

fn parts<C: Cloud>(cloud: C, config: &Config) -> anyhow::Result<Parts<C>> {
    let schema = class_schema::<C::Class>();
    Ok(Parts {
        omni: omni(config)?,
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
    })
}

/// Listens from now on; the future it returns acts on what comes, and ends when told to stop for the second time.
fn heed_signals(stop: CancellationToken) -> std::io::Result<impl Future<Output = ()>> {
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
                    info!("SIGHUP: nothing to read anew");
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
