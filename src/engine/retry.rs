//! When to look again after a failure: the only such table. Nothing below the engine repeats a mutation.

use std::time::Duration;

use rand::Rng;

use crate::cloud::ErrorKind;
use crate::machine::status::longest_wait;

/// How long to wait after the `failures`-th failure in a row of this kind (1 for the first).
#[must_use]
pub fn wait(kind: ErrorKind, failures: u32) -> Duration {
    let most = longest_wait(kind);
    match kind {
        // Full jitter: after an outage a crowd must not come back as one.
        ErrorKind::Unavailable | ErrorKind::Unexpected => {
            let ceiling = doubled(Duration::from_secs(1), failures, most);
            jitter(ceiling / 10, ceiling)
        }
        ErrorKind::Throttled { after: Some(after) } => after.max(Duration::from_secs(1)),
        ErrorKind::Throttled { after: None } => {
            let ceiling = doubled(Duration::from_secs(2), failures, most);
            jitter(ceiling / 2, ceiling)
        }
        ErrorKind::Busy => most,
        ErrorKind::Exhausted => doubled(Duration::from_secs(60), failures, most),
        ErrorKind::Rejected | ErrorKind::Denied | ErrorKind::Foreign => most,
    }
}

fn doubled(first: Duration, failures: u32, most: Duration) -> Duration {
    let factor = 1u32 << failures.saturating_sub(1).min(16);
    first.saturating_mul(factor).min(most)
}

fn jitter(least: Duration, most: Duration) -> Duration {
    rand::thread_rng().gen_range(least..=most.max(least))
}

/// `around`, moved by up to a fifth either way, so that slow looks spread out.
#[must_use]
pub fn spread(around: Duration) -> Duration {
    jitter(around.mul_f64(0.8), around.mul_f64(1.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_wait_is_longer_than_the_status_line_says() {
        let kinds = [
            ErrorKind::Unavailable,
            ErrorKind::Throttled { after: None },
            ErrorKind::Throttled {
                after: Some(Duration::from_secs(300)),
            },
            ErrorKind::Busy,
            ErrorKind::Exhausted,
            ErrorKind::Rejected,
            ErrorKind::Denied,
            ErrorKind::Foreign,
            ErrorKind::Unexpected,
        ];
        for kind in kinds {
            for failures in [1, 2, 7, 1000] {
                let wait = wait(kind, failures);
                assert!(
                    wait > Duration::ZERO && wait <= longest_wait(kind),
                    "{kind:?}: {wait:?}"
                );
            }
        }
    }
}
