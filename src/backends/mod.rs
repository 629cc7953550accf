//! The clouds, one feature each, with the same file names in each.

#[cfg(feature = "ganeti")]
pub mod ganeti;
#[cfg(feature = "oxide")]
pub mod oxide;
#[cfg(feature = "sim")]
pub mod sim;
