//! A real Ganeti: the laws, whole machines, errors that tell an operator what to change. `make test-ganeti` starts the cluster.
//!
//! Without one the tests are left out, and one line says so; where `GANETI_TEST=required` they fail instead.

mod boot;
mod cluster;
mod door;
mod many;
mod stories;
mod world;
