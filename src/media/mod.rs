//! Serves boot media to machines whose cloud takes an address and no upload: ISOs, NoCloud seeds, and a plain HTTP server before
//! them.
//!
//! *Guarantees.* The ISOs are a cache: it may vanish at any time, and what is missing is brought anew by whoever needs it. Nothing
//! is there that is not whole. An installed machine needs neither the files nor the server.

use std::path::PathBuf;

mod connection;
mod folder;
mod range;
pub mod seed;
pub mod server;
pub mod shelf;
#[cfg(test)]
mod tests;

pub use seed::{Seed, Seeds};
pub use server::serve;
pub use shelf::Shelf;

/// What is served at one address, from one folder. Clones are the same.
#[derive(Debug, Clone)]
pub struct Media {
    /// The ISOs.
    pub shelf: Shelf,
    /// The seeds.
    pub seeds: Seeds,
}

impl Media {
    /// Media in a folder, which is made when it is needed; the server is reached at `url`.
    pub fn new(folder: impl Into<PathBuf>, url: impl Into<String>) -> Self {
        let (folder, url) = (folder.into(), url.into());
        Self {
            shelf: Shelf::new(&folder, &url),
            seeds: Seeds::new(&folder, &url),
        }
    }
}
