//! The hands: I/O and time. No vendor, no protobuf.
//!
//! A trigger is just a request's ID: it enters [`queue`], one of [`workers`] takes it, [`reconcile`] makes one pass.

pub mod act;
pub mod clock;
mod decode;
pub mod diagnose;
pub mod download;
pub mod health;
pub mod imports;
pub mod inventory;
mod joined;
pub mod memory;
pub mod observe;
pub mod orphans;
pub mod provision;
pub mod queue;
pub mod readings;
pub mod reconcile;
pub mod release;
pub mod replace;
pub mod report;
pub mod retry;
pub mod stores;
pub mod workers;
pub mod write;
