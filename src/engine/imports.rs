//! Image imports in flight: started once per scope and image, beside the queue; when one ends, all who wait are woken.
//!
//! *Guarantees.* A worker is never held by an import, so a teardown is never held up by one. A failure is remembered with the
//! time of the next try, for all who want the image.

use std::collections::{BTreeSet, HashMap};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::cloud::{Cloud, CloudError, Guarded, ImageKey, ImageRef, Timestamp};
use crate::machine::observed::{Failure, ImageSeen};
use crate::omni::Fence;

use super::clock::Clock;
use super::download::{Download, Progress};
use super::queue::{Key, Line, Queue};
use super::retry;

/// How many images are brought at once. Each holds its decompressor's window and a few chunks in memory.
const AT_ONCE: usize = 2;

/// How often the log tells how far an import is.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Of how many images it is remembered that they are present.
const REMEMBERED: usize = 256;

/// An image in a scope.
type Place<C> = (<C as Cloud>::Scope, ImageKey);

#[derive(Debug)]
enum Import {
    Running {
        progress: Arc<Progress>,
        waiting: BTreeSet<Key>,
    },
    Failed(Failure),
    Present(ImageRef),
}

#[derive(Debug, Default)]
struct Known {
    import: Option<Import>,
    /// Failures in a row.
    failures: u32,
    /// Held while somebody looks whether the cloud has the image: one look serves all.
    looking: Arc<tokio::sync::Mutex<()>>,
}

struct Order<C: Cloud> {
    place: Place<C>,
    source: Download,
}

/// All imports of one site.
pub struct Imports<C: Cloud> {
    cloud: Arc<Guarded<C>>,
    clock: Clock,
    queue: Arc<Queue>,
    known: Mutex<HashMap<Place<C>, Known>>,
    orders: mpsc::UnboundedSender<Order<C>>,
}

/// What [`Imports::run`] works through.
pub struct Orders<C: Cloud>(mpsc::UnboundedReceiver<Order<C>>);

impl<C: Cloud> Imports<C> {
    /// No imports yet; the orders are for [`Imports::run`].
    pub fn new(cloud: Arc<Guarded<C>>, clock: Clock, queue: Arc<Queue>) -> (Self, Orders<C>) {
        let (orders, receiver) = mpsc::unbounded_channel();
        let imports = Self {
            cloud,
            clock,
            queue,
            known: Mutex::new(HashMap::new()),
            orders,
        };
        (imports, Orders(receiver))
    }

    /// Carries out imports for ever, while the fence lets them. Dropping it ends them; the next start sweeps what they left.
    pub async fn run(self: Arc<Self>, mut orders: Orders<C>, fence: Fence) {
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                order = orders.0.recv() => {
                    let Some(order) = order else { return };
                    let (imports, permits, fence) = (self.clone(), permits.clone(), fence.clone());
                    running.spawn(async move {
                        let permit = permits.acquire().await.ok();
                        fence.guard(imports.carry_out(order)).await;
                        drop(permit);
                    });
                }
                Some(_) = running.join_next() => {}
            }
        }
    }

    /// What is known of the image without asking the cloud; `key` is woken when a running import ends.
    pub fn known(&self, place: &Place<C>, key: &str) -> ImageSeen {
        let mut known = self.lock();
        let Some(entry) = known.get_mut(place) else {
            return ImageSeen::Unasked;
        };
        match &mut entry.import {
            None => ImageSeen::Unasked,
            Some(Import::Present(_)) => ImageSeen::Present,
            Some(Import::Failed(failure)) if failure.not_before > self.clock.now() => {
                ImageSeen::Failed(failure.clone())
            }
            Some(Import::Failed(_)) => ImageSeen::Unasked,
            Some(Import::Running { progress, waiting }) => {
                waiting.insert(key.to_owned());
                ImageSeen::Importing(progress.portion())
            }
        }
    }

    /// Asks the cloud for the image, once for all who ask at the same time.
    pub async fn look(&self, place: &Place<C>, key: &str) -> ImageSeen {
        let looking = self.lock().entry(place.clone()).or_default().looking.clone();
        let turn = looking.lock().await;
        let known = self.known(place, key);
        if known != ImageSeen::Unasked {
            return known;
        }
        let found = self.cloud.find_image(&place.0, &place.1).await;
        let mut known = self.lock();
        let entry = known.entry(place.clone()).or_default();
        let seen = match found {
            Ok(Some(image)) => {
                entry.import = Some(Import::Present(image));
                entry.failures = 0;
                ImageSeen::Present
            }
            Ok(None) => ImageSeen::Absent,
            Err(error) => ImageSeen::Failed(entry.fail(&error, self.clock.now())),
        };
        drop(known);
        drop(turn);
        seen
    }

    /// Starts an import, unless it runs already; `key` is woken when it ends.
    pub fn start(&self, place: Place<C>, source: Download, key: &str) {
        let mut known = self.lock();
        if known.len() >= REMEMBERED {
            // What is present is found again when it is wanted again.
            known.retain(|_, known| matches!(known.import, Some(Import::Running { .. } | Import::Failed(_))));
        }
        let entry = known.entry(place.clone()).or_default();
        if let Some(Import::Running { waiting, .. }) = &mut entry.import {
            waiting.insert(key.to_owned());
            return;
        }
        entry.import = Some(Import::Running {
            progress: source.progress(),
            waiting: BTreeSet::from([key.to_owned()]),
        });
        drop(known);
        // Without a receiver the daemon is on its way out.
        drop(self.orders.send(Order { place, source }));
    }

    /// The image itself, once it is present.
    pub fn image(&self, place: &Place<C>) -> Option<ImageRef> {
        match self.lock().get(place)?.import.as_ref()? {
            Import::Present(image) => Some(image.clone()),
            Import::Running { .. } | Import::Failed(_) => None,
        }
    }

    /// Forgets that an image is present: a creation from it failed, perhaps because somebody deleted it.
    pub fn doubt(&self, place: &Place<C>) {
        let mut known = self.lock();
        if let Some(entry) = known.get_mut(place)
            && matches!(entry.import, Some(Import::Present(_)))
        {
            entry.import = None;
        }
    }

    async fn carry_out(&self, order: Order<C>) {
        let (scope, image) = &order.place;
        info!(%scope, talos = %image.talos_version, schematic = %image.schematic, "importing image");
        let begun = self.clock.now();
        let import = self.cloud.import_image(scope, image, &order.source);
        let result = logged(import, &order.source.progress(), &image.schematic).await;
        let seconds = self.clock.age(begun).as_secs();
        match &result {
            Ok(image) => info!(%scope, image = %image.name, seconds, "imported image"),
            Err(error) => {
                warn!(%scope, schematic = %image.schematic, seconds, error = %Chain(error), "import failed")
            }
        }
        let mut known = self.lock();
        let entry = known.entry(order.place).or_default();
        let waiting = match entry.import.take() {
            Some(Import::Running { waiting, .. }) => waiting,
            _ => BTreeSet::new(),
        };
        match result {
            Ok(image) => {
                entry.import = Some(Import::Present(image));
                entry.failures = 0;
            }
            Err(error) => {
                entry.fail(&error, self.clock.now());
            }
        }
        drop(known);
        for key in waiting {
            self.queue.push(&key, Line::Second);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Place<C>, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries out an import, and logs now and then how far it is.
async fn logged<T>(import: impl Future<Output = T>, progress: &Progress, schematic: &str) -> T {
    let mut import = pin!(import);
    loop {
        match timeout(LOG_EVERY, &mut import).await {
            Ok(result) => return result,
            Err(_) => {
                let progress = progress.portion().map(tracing::field::display);
                info!(schematic, progress, "importing image");
            }
        }
    }
}

impl Known {
    fn fail(&mut self, error: &CloudError, now: Timestamp) -> Failure {
        self.failures = self.failures.saturating_add(1);
        let failure = Failure {
            kind: error.kind,
            cause: error.to_string(),
            not_before: now.after(retry::wait(error.kind, self.failures)),
        };
        self.import = Some(Import::Failed(failure.clone()));
        failure
    }
}

/// An error with its sources, for the one line that it gets in the log.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'a));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}
