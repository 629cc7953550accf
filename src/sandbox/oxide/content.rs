//! Keeps the bytes of an imported disk, without its zeros, so that a test can tell whether an image arrived
//! whole.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// 64 KiB: small enough that a sparse image stays small, large enough that a page costs little.
const PAGE: usize = 64 * 1024;

/// What was written to a disk; everything else is zero.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pages: BTreeMap<u64, Box<[u8]>>,
    /// How many bytes may be kept; beyond that the content is forgotten and no digest can be had.
    budget: usize,
    forgotten: bool,
    /// Chunks that were written, repeated ones included.
    pub(super) writes: u64,
}

impl Content {
    pub(super) fn new(budget: usize) -> Self {
        Self {
            budget,
            ..Self::default()
        }
    }

    /// Writes bytes at an offset, over whatever was there.
    pub(super) fn write(&mut self, offset: u64, mut bytes: &[u8]) {
        self.writes += 1;
        if self.forgotten {
            return;
        }
        let size = PAGE as u64;
        let mut at = offset;
        while !bytes.is_empty() {
            let start = usize::try_from(at % size).unwrap_or_default();
            let (now, later) = bytes.split_at(bytes.len().min(PAGE - start));
            let index = at / size;
            if now.iter().any(|byte| *byte != 0) || self.pages.contains_key(&index) {
                let page = self
                    .pages
                    .entry(index)
                    .or_insert_with(|| vec![0; PAGE].into_boxed_slice());
                if let Some(target) = page.get_mut(start..start + now.len()) {
                    target.copy_from_slice(now);
                }
            }
            at += now.len() as u64;
            bytes = later;
        }
        if self.pages.len() * PAGE > self.budget {
            self.forgotten = true;
            self.pages.clear();
        }
    }

    /// The SHA-256, in hex, of the first `length` bytes; `None` once the content was too large to keep.
    pub(super) fn sha256(&self, length: u64) -> Option<String> {
        if self.forgotten {
            return None;
        }
        let zeros = vec![0; PAGE];
        let size = PAGE as u64;
        let mut digest = Sha256::new();
        let mut at = 0;
        while at < length {
            let page = self.pages.get(&(at / size)).map_or(zeros.as_slice(), |page| page);
            let now = usize::try_from(length - at).unwrap_or(PAGE).min(PAGE);
            digest.update(page.get(..now).unwrap_or(page));
            at += now as u64;
        }
        Some(hex::encode(digest.finalize()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(bytes: &[u8]) -> String {
        hex::encode(Sha256::digest(bytes))
    }

    #[test]
    fn skipped_zeros_count_as_zeros_and_overlapping_writes_as_the_last_one() {
        let mut expected = vec![0_u8; 300_000];
        let mut content = Content::new(10 * PAGE);
        for (offset, length, byte) in [
            (1024_usize, 70_000_usize, 7_u8),
            (60_000, 20_000, 9),
            (262_144, 512, 1),
        ] {
            content.write(offset as u64, &vec![byte; length]);
            expected[offset..offset + length].fill(byte);
        }
        content.write(0, &[0; 2048]);
        expected[..2048].fill(0);
        assert_eq!(content.sha256(300_000), Some(plain(&expected)));
        expected.truncate(65_000);
        assert_eq!(content.sha256(65_000), Some(plain(&expected)));
        assert_eq!(content.writes, 4);
    }

    #[test]
    fn content_beyond_its_budget_has_no_digest() {
        let mut content = Content::new(PAGE);
        content.write(0, &[1; 2 * PAGE]);
        assert_eq!(content.sha256(1), None);
    }
}
