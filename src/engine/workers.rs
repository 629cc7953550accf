//! N workers over one queue. A worker never waits for anything but its own calls.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::cloud::Cloud;

use super::queue::{Line, Queue};
use super::reconcile::{Engine, Next};

/// Works through the queue until `stop`, then lets every pass under way end. Dropping it drops the passes.
pub async fn run<C: Cloud>(engine: Arc<Engine<C>>, workers: usize, stop: CancellationToken) {
    let mut running = JoinSet::new();
    for _ in 0..workers {
        running.spawn(fenced(engine.clone(), stop.clone()));
    }
    while let Some(ended) = running.join_next().await {
        if ended.is_err_and(|ended| ended.is_panic()) && !stop.is_cancelled() {
            error!("a pass panicked: this is a fault of the provider; its request is looked at again later");
            running.spawn(fenced(engine.clone(), stop.clone()));
        }
    }
}

/// A pass that lost the right to act ends in the middle, as in a crash.
async fn fenced<C: Cloud>(engine: Arc<Engine<C>>, stop: CancellationToken) {
    let fence = engine.fence.clone();
    fence.guard(work(engine, stop)).await;
}

/// When a request whose pass panicked is looked at again.
const AFTER_PANIC: Duration = Duration::from_secs(60);

/// Gives a key back to its queue, however the pass ends.
struct Held<'a> {
    queue: &'a Queue,
    key: &'a str,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.queue
                .push_at(self.key, Instant::now() + AFTER_PANIC, Line::Second);
        }
        self.queue.done(self.key);
    }
}

async fn work<C: Cloud>(engine: Arc<Engine<C>>, stop: CancellationToken) {
    loop {
        let key = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            key = engine.queue.next() => key,
        };
        let held = Held {
            queue: &engine.queue,
            key: &key,
        };
        match engine.pass(&key).await {
            Next::Now => engine.queue.push(&key, engine.stores.line(&key)),
            Next::At(at) => engine.queue.push_at(&key, at, engine.stores.line(&key)),
            Next::Never => {}
        }
        drop(held);
    }
}
