//! A small image in memory, and one that breaks off.

use bytes::Bytes;
use omni_infra_provider::cloud::{BoxFuture, CloudError, ErrorKind, ImageSource, ImageStream, Result};
use sha2::{Digest, Sha256};

/// Bytes of the image; no whole number of any block.
pub(crate) const LENGTH: usize = 3 * 512 * 1024 + 7;

pub(crate) struct Source {
    breaks_at: Option<usize>,
}

impl Source {
    pub(crate) fn whole() -> Self {
        Self { breaks_at: None }
    }

    /// Its stream fails with that many bytes left.
    pub(crate) fn broken() -> Self {
        Self {
            breaks_at: Some(LENGTH / 2),
        }
    }
}

struct Stream {
    left: Bytes,
    breaks_at: Option<usize>,
    hasher: Sha256,
}

impl ImageSource for Source {
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>> {
        let image: Vec<u8> = (0..LENGTH)
            .map(|index| u8::try_from(index % 251).unwrap())
            .collect();
        let stream = Stream {
            left: image.into(),
            breaks_at: self.breaks_at,
            hasher: Sha256::new(),
        };
        Box::pin(async { Ok(Box::new(stream) as Box<dyn ImageStream>) })
    }
}

impl ImageStream for Stream {
    fn next(&mut self, size: usize) -> BoxFuture<'_, Result<Option<Bytes>>> {
        Box::pin(async move {
            if self.breaks_at.is_some_and(|at| self.left.len() <= at) {
                let error = CloudError::new("test", "read", ErrorKind::Unavailable, "broken on purpose");
                return Err(error);
            }
            let chunk = self.left.split_to(size.min(self.left.len()));
            self.hasher.update(&chunk);
            Ok((!chunk.is_empty()).then_some(chunk))
        })
    }

    fn sha256(&self) -> String {
        hex::encode(self.hasher.clone().finalize())
    }
}
