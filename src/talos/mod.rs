//! What we boot: schematics, images, join configs and patches, as pure functions.

pub mod image;
pub mod inline;
pub mod join;
pub mod patch;
pub mod scalar;
pub mod schematic;
