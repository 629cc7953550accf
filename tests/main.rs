//! One integration test binary.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]
mod bad_input;
mod command_line;
mod conformance;
mod cosi;
mod crash;
mod fairness;
#[cfg(feature = "ganeti")]
mod ganeti;
mod guard;
mod house;
mod lease;
mod model;
mod orphans;
mod planner;
mod replacement;
mod schedules;
mod secrets;
mod stories;
mod support;
mod upstream;
