//! Serves boot media to machines whose cloud takes an address and no upload: a shelf of ISOs, and a plain HTTP server before it.
//!
//! *Guarantees.* The shelf is a cache: it may vanish at any time, and what is missing is brought anew by whoever needs it. Nothing
//! is on it that is not whole. An installed machine needs neither the shelf nor the server.

mod range;
pub mod server;
pub mod shelf;
#[cfg(test)]
mod tests;

pub use server::serve;
pub use shelf::Shelf;
