//! A world for stories: the whole daemon, an embedded Omni and a cloud in one runtime on a paused clock.
#![expect(
    clippy::disallowed_methods,
    reason = "a test's runtime ends with the test, and all its tasks with it"
)]

pub(crate) mod cloud;
pub(crate) mod peer;
pub(crate) mod rack;
pub(crate) mod sandbox;
pub(crate) mod tap;
pub(crate) mod world;

pub(crate) use world::World;
