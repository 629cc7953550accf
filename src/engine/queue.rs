//! Which request is looked at next: a keyed, deduplicating, delaying queue of two lines.
//!
//! *Guarantees.* A key is never handed out twice at once; a trigger that arrives while its key is worked on is not lost; an
//! earlier time wins over a later one; what is due in the first line goes before what is due in the other. Holds nothing of keys that are neither due, delayed nor worked on.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// A request's ID: all that a trigger says.
pub type Key = String;

/// In which line a key waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Line {
    /// Everything else.
    #[default]
    Second,
    /// What ends: it costs money, and makes room for what is to be.
    First,
}

#[derive(Debug, Default)]
struct Entry {
    /// The best that was asked for since it was last handed out.
    line: Line,
    ready: bool,
    working: bool,
    /// When it becomes due, if it is neither ready nor due already.
    due: Option<Instant>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    first: VecDeque<Key>,
    second: VecDeque<Key>,
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
    pub fn push(&self, key: &str, line: Line) {
        let mut inner = self.lock();
        inner.cancel_delay(key);
        let entry = inner.entries.entry(key.to_owned()).or_default();
        let moves_up = entry.ready && !entry.working && line > entry.line;
        entry.line = entry.line.max(line);
        if moves_up {
            inner.stand_in_line(key);
        }
        inner.make_ready(key);
        drop(inner);
        self.changed.notify_one();
    }

    /// Asks for a look at `at`, unless an earlier one is planned.
    pub fn push_at(&self, key: &str, at: Instant, line: Line) {
        if at <= Instant::now() {
            return self.push(key, line);
        }
        let mut inner = self.lock();
        let entry = inner.entries.entry(key.to_owned()).or_default();
        entry.line = entry.line.max(line);
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
                if let Some(key) = inner.pop() {
                    if let Some(entry) = inner.entries.get_mut(&key) {
                        entry.ready = false;
                        entry.working = true;
                        entry.line = Line::Second;
                    }
                    if !(inner.first.is_empty() && inner.second.is_empty()) {
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
            inner.stand_in_line(key);
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
            }
            self.make_ready(&key);
        }
    }

    fn make_ready(&mut self, key: &str) {
        if let Some(entry) = self.entries.get_mut(key)
            && !std::mem::replace(&mut entry.ready, true)
            && !entry.working
        {
            self.stand_in_line(key);
        }
    }

    fn stand_in_line(&mut self, key: &str) {
        match self.entries.get(key).map(|entry| entry.line) {
            Some(Line::First) => self.first.push_back(key.to_owned()),
            Some(Line::Second) => self.second.push_back(key.to_owned()),
            None => {}
        }
    }

    fn pop(&mut self) -> Option<Key> {
        while let Some(key) = self.first.pop_front().or_else(|| self.second.pop_front()) {
            // Who moved up stands in both lines.
            if self
                .entries
                .get(&key)
                .is_some_and(|entry| entry.ready && !entry.working)
            {
                return Some(key);
            }
        }
        None
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
        queue.push("a", Line::Second);
        queue.push("a", Line::Second);
        assert_eq!(queue.next().await, "a");
        queue.push("a", Line::Second);
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
        queue.push_at("a", start + Duration::from_secs(60), Line::Second);
        queue.push_at("a", start + Duration::from_secs(5), Line::Second);
        queue.push_at("a", start + Duration::from_secs(30), Line::Second);
        assert_eq!(queue.next().await, "a");
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        queue.done("a");
        queue.push_at("a", Instant::now() + Duration::from_secs(60), Line::Second);
        queue.push("a", Line::Second);
        assert_eq!(queue.next().await, "a");
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        queue.done("a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_that_ends_while_its_key_is_worked_on_is_not_lost() {
        let queue = Queue::default();
        queue.push("a", Line::Second);
        assert_eq!(queue.next().await, "a");
        queue.push_at("a", Instant::now() + Duration::from_millis(5), Line::Second);
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(nothing(&queue).await);
        queue.done("a");
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn what_ends_goes_first_however_it_came_to_be_due() {
        let queue = Queue::default();
        for key in ["a", "b", "c"] {
            queue.push(key, Line::Second);
        }
        queue.push("z", Line::First);
        queue.push("c", Line::First);
        let soon = Instant::now() + Duration::from_millis(5);
        queue.push_at("y", soon, Line::First);
        queue.push_at("x", soon, Line::Second);
        tokio::time::advance(Duration::from_millis(5)).await;
        let mut order = Vec::new();
        while let Ok(key) = timeout(Duration::from_millis(1), queue.next()).await {
            queue.done(&key);
            order.push(key);
        }
        assert!(queue.is_empty());
        assert_eq!(order, ["z", "c", "y", "a", "b", "x"]);
    }
}
