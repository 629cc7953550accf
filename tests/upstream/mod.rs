//! Upstream's own code judges ours: its provider runs on our sandbox, and its functions render what ours do.

mod classes;
mod configs;
mod dice;
mod join;
mod keys;
mod oxide;
mod provider;
mod schematic;
mod vectors;
