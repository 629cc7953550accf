//! An Omni infrastructure provider: machine requests in, Talos Linux instances out, and back to nothing.
//!
//! The map: [`machine`] decides (pure), [`engine`] does (I/O and time), [`omni`] alone speaks gRPC, [`cloud`] is the contract
//! and [`backends`] its implementations. `ARCHITECTURE.adoc` has the arrows, the invariants and one story.

pub mod backends;
pub mod cli;
pub mod cloud;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod machine;
#[cfg(feature = "ganeti")]
pub mod media;
pub mod net;
pub mod omni;
pub mod process;
pub mod rotation;
#[cfg(feature = "sandbox")]
pub mod sandbox;
pub mod secret;
pub mod talos;
pub mod telemetry;
pub mod words;

/// The version of this program, from the file `VERSION`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
