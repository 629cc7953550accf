//! What calls did to the simulated cloud, one entry for each change: what a test checks a daemon's doings by.
//!
//! Written under the cloud's lock, in the order of the changes. What people do behind the daemon's back is not in it.

use super::{Machine, Owner, Sim, World, Zone};

/// What a call changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    /// It made an instance and its disk.
    Create,
    /// It began to start an instance.
    Start,
    /// It began to stop an instance.
    Stop,
    /// It removed an instance; its disk is left.
    Remove,
    /// It removed a disk that was left.
    Sweep,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What.
    pub did: Did,
    /// Where.
    pub zone: String,
    /// The name of the instance or disk.
    pub name: String,
    /// The request in its mark; `None`: it carries none.
    pub request: Option<String>,
}

/// An instance or a disk that is left, with the request in its mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    /// Where.
    pub zone: String,
    /// Its name.
    pub name: String,
    /// The request in its mark.
    pub request: String,
    /// The installation in its mark.
    pub installation: String,
    /// The instance's ID; `None`: a disk alone.
    pub instance: Option<String>,
}

impl World {
    pub(super) fn note(&mut self, did: Did, key: &(Zone, String), mark: Option<&Owner>) {
        self.changes.push(Change {
            did,
            zone: key.0.0.clone(),
            name: key.1.clone(),
            request: request(mark),
        });
    }
}

fn request(mark: Option<&Owner>) -> Option<String> {
    match mark {
        Some(Owner::Ours(mark)) => Some(mark.request.clone()),
        Some(Owner::Bare(_)) | None => None,
    }
}

impl Sim {
    /// What calls changed since this was last asked.
    #[must_use]
    pub fn take_changes(&self) -> Vec<Change> {
        std::mem::take(&mut self.lock().changes)
    }

    /// Everything that carries a mark: each instance, and each disk without one.
    #[must_use]
    pub fn owned(&self) -> Vec<Owned> {
        let world = self.lock();
        let mut owned = Vec::new();
        let mut add = |key: &(Zone, String), mark: Option<&Owner>, instance: Option<&Machine>| {
            if let Some(Owner::Ours(mark)) = mark {
                owned.push(Owned {
                    zone: key.0.0.clone(),
                    name: key.1.clone(),
                    request: mark.request.clone(),
                    installation: mark.installation.clone(),
                    instance: instance.map(|machine| machine.id.clone()),
                });
            }
        };
        for (key, machine) in &world.machines {
            add(key, machine.mark.as_ref(), Some(machine));
        }
        for (key, disk) in &world.disks {
            let with_its_instance = world
                .machines
                .get(key)
                .is_some_and(|machine| machine.mark == disk.mark);
            if !with_its_instance {
                add(key, disk.mark.as_ref(), None);
            }
        }
        owned
    }

    /// Everything that carries no mark, in full.
    #[must_use]
    pub fn strangers(&self) -> Vec<String> {
        let world = self.lock();
        let machines = world
            .machines
            .iter()
            .filter(|(_, machine)| machine.mark.is_none())
            .map(|(key, machine)| format!("{key:?}: {machine:?}, user data {:?}", machine.user_data.0));
        let disks = world.disks.iter().filter(|(_, disk)| disk.mark.is_none());
        machines
            .chain(disks.map(|(key, disk)| format!("{key:?}: {disk:?}")))
            .collect()
    }
}
