//! Requests as they were read: those of one set are written alike, and share one reading.
//!
//! *Guarantees.* A reading is kept no longer than somebody uses it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::omni::kinds::MachineRequestSpec;

/// Everything that has been read and is in use.
#[derive(Debug)]
pub struct Readings<T>(Mutex<HashMap<Arc<MachineRequestSpec>, Weak<T>>>);

impl<T> Default for Readings<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Readings<T> {
    /// What a request says. `read` reads it, if nobody has read another one like it.
    pub fn of(
        &self,
        request: &Arc<MachineRequestSpec>,
        read: impl FnOnce(&MachineRequestSpec) -> T,
    ) -> Arc<T> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reading) = known.get(request).and_then(Weak::upgrade) {
            return reading;
        }
        if known.len() == known.capacity() {
            known.retain(|_, reading| reading.strong_count() > 0);
        }
        let reading = Arc::new(read(request));
        known.insert(Arc::clone(request), Arc::downgrade(&reading));
        reading
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_are_written_alike_share_a_reading_while_it_is_used() {
        let readings = Readings::default();
        let of = |version: usize| {
            let request = MachineRequestSpec {
                talos_version: version.to_string(),
                ..MachineRequestSpec::default()
            };
            readings.of(&Arc::new(request), |request| request.talos_version.clone())
        };
        let (first, other, same) = (of(7), of(8), of(7));
        assert!(Arc::ptr_eq(&first, &same) && !Arc::ptr_eq(&first, &other));
        // Each of them is gone before the next comes.
        for version in 100..1000 {
            of(version);
        }
        assert!(readings.0.lock().unwrap().len() < 100);
        assert!(Arc::ptr_eq(&first, &of(7)));
    }
}
