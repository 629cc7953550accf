//! Which request is looked at next: a keyed, deduplicating, delaying queue.
//!
//! *Guarantees.* A key is never handed out twice at once; a trigger that arrives while its key is worked on is not lost; an
//! earlier time wins over a later one. Holds nothing of keys that are neither due, delayed nor worked on.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// A request's ID: all that a trigger says.
pub type Key = String;

#[derive(Debug, Default)]
struct Entry {
    ready: bool,
    working: bool,
    /// When it becomes due, if it is neither ready nor due already.
    due: Option<Instant>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    ready: VecDeque<Key>,
    delayed: BTreeSet<(Instant, Key)>,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    changed: Notify,
}

impl Queue {
    /// Asks for a look at once.
    pub fn push(&self, key: &str) {
        let mut inner = self.lock();
        inner.cancel_delay(key);
        let entry = inner.entries.entry(key.to_owned()).or_default();
        if !entry.ready {
            entry.ready = true;
            if !entry.working {
                inner.ready.push_back(key.to_owned());
            }
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Asks for a look at `at`, unless an earlier one is planned.
    pub fn push_at(&self, key: &str, at: Instant) {
        if at <= Instant::now() {
            return self.push(key);
        }
        let mut inner = self.lock();
        let entry = inner.entries.entry(key.to_owned()).or_default();
        if entry.ready || entry.due.is_some_and(|due| due <= at) {
            return;
        }
        inner.cancel_delay(key);
        inner.entries.entry(key.to_owned()).or_default().due = Some(at);
        inner.delayed.insert((at, key.to_owned()));
        drop(inner);
        self.changed.notify_one();
    }

    /// The next key that is due; it is held until [`Queue::done`].
    pub async fn next(&self) -> Key {
        loop {
            let changed = self.changed.notified();
            let due = {
                let mut inner = self.lock();
                inner.wake(Instant::now());
                if let Some(key) = inner.ready.pop_front() {
                    if let Some(entry) = inner.entries.get_mut(&key) {
                        entry.ready = false;
                        entry.working = true;
                    }
                    if !inner.ready.is_empty() {
                        self.changed.notify_one();
                    }
                    return key;
                }
                inner.delayed.first().map(|(at, _)| *at)
            };
            match due {
                Some(at) => {
                    tokio::select! {
                        () = changed => {}
                        () = sleep_until(at) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    /// Gives a key back. A trigger that came meanwhile makes it due at once.
    pub fn done(&self, key: &str) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(key) else {
            return;
        };
        entry.working = false;
        if entry.ready {
            inner.ready.push_back(key.to_owned());
            drop(inner);
            self.changed.notify_one();
        } else if entry.due.is_none() {
            inner.entries.remove(key);
        }
    }

    /// How many keys the queue holds in any way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn cancel_delay(&mut self, key: &str) {
        if let Some(due) = self.entries.get_mut(key).and_then(|entry| entry.due.take()) {
            self.delayed.remove(&(due, key.to_owned()));
        }
    }

    fn wake(&mut self, now: Instant) {
        while let Some((at, _)) = self.delayed.first()
            && *at <= now
            && let Some((_, key)) = self.delayed.pop_first()
        {
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.due = None;
                if !entry.ready {
                    entry.ready = true;
                    if !entry.working {
                        self.ready.push_back(key);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn nothing(queue: &Queue) -> bool {
        timeout(Duration::from_millis(1), queue.next()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_never_worked_on_twice_at_once() {
        let queue = Queue::default();
        queue.push("a");
        queue.push("a");
        assert_eq!(queue.next().await, "a");
        queue.push("a");
        assert!(nothing(&queue).await);
        queue.done("a");
        assert_eq!(queue.next().await, "a");
        queue.done("a");
        assert!(nothing(&queue).await);
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_look_wins_and_a_trigger_comes_first() {
        let queue = Queue::default();
        let start = Instant::now();
        queue.push_at("a", start + Duration::from_secs(60));
        queue.push_at("a", start + Duration::from_secs(5));
        queue.push_at("a", start + Duration::from_secs(30));
        assert_eq!(queue.next().await, "a");
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        queue.done("a");
        queue.push_at("a", Instant::now() + Duration::from_secs(60));
        queue.push("a");
        assert_eq!(queue.next().await, "a");
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        queue.done("a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_that_ends_while_its_key_is_worked_on_is_not_lost() {
        let queue = Queue::default();
        queue.push("a");
        assert_eq!(queue.next().await, "a");
        queue.push_at("a", Instant::now() + Duration::from_millis(5));
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(nothing(&queue).await);
        queue.done("a");
        assert_eq!(queue.next().await, "a");
    }
}
