//! The mind: pure data and pure functions. No async, no I/O, no clock.
//!
//! [`desired`] reads what Omni asks for, [`observed`] is what was seen this pass, [`mod@plan`] decides, [`status`] says it to people.

pub mod action;
pub mod desired;
pub mod name;
pub mod observed;
pub mod orphan;
pub mod pace;
pub mod plan;
pub mod release;
pub mod status;

pub use action::{Action, Decision, Plan};
pub use desired::{Desired, Goal};
pub use observed::Observed;
pub use pace::Pace;
pub use plan::plan;
