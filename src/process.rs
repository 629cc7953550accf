//! Closes this process to onlookers: its memory holds keys and tokens.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Has the system write no core dump of this process, and let nobody but root look into its memory.
///
/// # Errors
///
/// The system's refusal.
pub fn close() -> io::Result<()> {
    let nothing = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, nothing)?;
    // The limit alone says nothing where a program collects the dumps.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}
