//! One integration test binary.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]
mod command_line;
mod conformance;
mod cosi;
mod crash;
#[cfg(feature = "ganeti")]
mod ganeti;
mod house;
mod planner;
mod stories;
mod support;
mod upstream;
