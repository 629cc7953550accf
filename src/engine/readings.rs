//! Requests as they were read: those of one set are written alike, and share one reading.
//!
//! *Guarantees.* A reading is kept no longer than somebody uses it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;

use crate::cloud::Cloud;
use crate::machine::desired::Parsed;
use crate::omni::Resource;
use crate::omni::kinds::MachineRequests;

/// Everything that has been read and is in use, by the spec as Omni sent it.
#[derive(Debug)]
pub struct Readings<C: Cloud>(Mutex<HashMap<Bytes, Weak<Parsed<C>>>>);

impl<C: Cloud> Default for Readings<C> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<C: Cloud> Readings<C> {
    /// What a request says. `read` reads it, if nobody has read another one like it.
    pub fn of(
        &self,
        request: &Resource<MachineRequests>,
        read: impl FnOnce() -> Parsed<C>,
    ) -> Arc<Parsed<C>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parsed) = known.get(&request.raw.0).and_then(Weak::upgrade) {
            return parsed;
        }
        if known.len() == known.capacity() {
            known.retain(|_, parsed| parsed.strong_count() > 0);
        }
        let parsed = Arc::new(read());
        known.insert(request.raw.0.clone(), Arc::downgrade(&parsed));
        parsed
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use crate::backends::sim::Sim;
    use crate::omni::RawSpec;
    use crate::omni::kinds::MachineRequestSpec;

    use super::*;

    #[test]
    fn requests_that_are_written_alike_share_a_reading_while_it_is_used() {
        let readings = Readings::<Sim>::default();
        let of = |id: usize, written: usize| {
            let mut request = Resource::new(id.to_string(), MachineRequestSpec::default());
            request.raw = RawSpec(written.to_string().into());
            readings.of(&request, || Parsed::Bad {
                reason: written.to_string(),
                scopes: None,
            })
        };
        let (first, other, same) = (of(0, 7), of(1, 8), of(2, 7));
        assert!(Arc::ptr_eq(&first, &same) && !Arc::ptr_eq(&first, &other));
        // Each of them is gone before the next comes.
        for written in 100..1000 {
            of(written, written);
        }
        assert!(readings.0.lock().unwrap().len() < 100);
        assert!(Arc::ptr_eq(&first, &of(3, 7)));
    }
}
