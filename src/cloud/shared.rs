//! One question for all who ask it at the same time.
//!
//! *Guarantees.* Every answer is that of a question which was put no earlier than it was asked for; at most one is on its way. A
//! failure is told to the one who met it: the next asks anew.
//!
//! *Cancel safety.* An asker may be dropped at any time; the next one puts the question.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Mutex;
use tokio::time::Instant;

/// The answers to one question.
#[derive(Debug)]
pub struct Shared<T> {
    latest: Mutex<Option<(Instant, Arc<T>)>>,
    waiting: AtomicUsize,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self {
            latest: Mutex::new(None),
            waiting: AtomicUsize::new(0),
        }
    }
}

impl<T> Shared<T> {
    /// The answer to a question that is put from now on, by whomever. It is kept only while somebody waits.
    ///
    /// # Errors
    ///
    /// As `question`.
    pub async fn ask<E>(&self, question: impl Future<Output = Result<T, E>>) -> Result<Arc<T>, E> {
        let asked = Instant::now();
        let _waiting = Waiting::new(&self.waiting);
        let mut latest = self.latest.lock().await;
        if let Some((put, answer)) = latest.as_ref()
            && *put >= asked
        {
            let answer = answer.clone();
            if self.waiting.load(Ordering::Relaxed) == 1 {
                *latest = None;
            }
            return Ok(answer);
        }
        *latest = None;
        let put = Instant::now();
        let answer = Arc::new(question.await?);
        if self.waiting.load(Ordering::Relaxed) > 1 {
            *latest = Some((put, answer.clone()));
        }
        Ok(answer)
    }
}

/// Counts an asker while it waits, however that ends.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time::sleep;

    use super::*;

    /// Answers with the moment at which it was put.
    async fn question(put: &AtomicUsize) -> Result<Instant, &'static str> {
        put.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        sleep(Duration::from_millis(20)).await;
        Ok(now)
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_puts_few_questions_and_nobody_gets_an_old_answer() {
        let (shared, put) = (Shared::default(), AtomicUsize::new(0));
        let askers = (0..100_u64).map(|n| {
            let (shared, put) = (&shared, &put);
            async move {
                sleep(Duration::from_millis(n)).await;
                let asked = Instant::now();
                assert!(*shared.ask(question(put)).await.unwrap() >= asked);
            }
        });
        join_all(askers).await;
        // Each takes 20 ms of the 100.
        assert_eq!(put.load(Ordering::Relaxed), 6);
        assert!(shared.latest.lock().await.is_none(), "nothing is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_or_fails_holds_nobody_up() {
        let (shared, put) = (Shared::default(), AtomicUsize::new(0));
        let leaving = tokio::time::timeout(Duration::from_millis(5), shared.ask(question(&put)));
        let failing = shared.ask(async { Err::<Instant, _>("no") });
        let (left, failed, got) = tokio::join!(leaving, failing, shared.ask(question(&put)));
        assert!(left.is_err() && failed == Err("no") && got.is_ok());
    }
}
