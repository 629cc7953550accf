//! What a machine class may say about machines that were lost: which of them the daemon replaces by itself, and how many.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most replacements in an hour that a class may ask for.
pub const MOST_PER_HOUR: u32 = 10;

/// Which lost machines are replaced without being asked for. By default none: a lost machine is reported, and replaced by whoever
/// tears its request down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Replace {
    /// A machine whose instance was deleted outside of Omni.
    pub vanished: bool,
    /// A machine whose instance was stopped outside of Omni. The instance is deleted with its disks.
    pub stopped: bool,
    /// A machine that did not join Omni in time. The instance is deleted with its disks.
    pub never_joined: bool,
    /// Most replacements in an hour, of all machines of one request set.
    #[schemars(range(min = 1, max = MOST_PER_HOUR))]
    pub per_hour: u32,
}

impl Default for Replace {
    fn default() -> Self {
        Self {
            vanished: false,
            stopped: false,
            never_joined: false,
            per_hour: 1,
        }
    }
}

impl Replace {
    /// What is wrong with it, for a person.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let allowed = (1..=MOST_PER_HOUR).contains(&self.per_hour);
        (!allowed).then(|| {
            format!(
                "replace.per_hour must be between 1 and {MOST_PER_HOUR}, not {}",
                self.per_hour
            )
        })
    }
}
