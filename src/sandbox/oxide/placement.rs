//! Decides which sled an instance starts on, and whether the silo's quota lets it.
//!
//! Rules and wording are nexus's: `db/datastore/sled.rs` (placement), `virtual_provisioning_collection_update.rs`
//! (quotas). Both refusals have the same code; only their words tell them apart.

use std::collections::BTreeSet;

use oxide::types;
use uuid::Uuid;

use super::SledFamily;
use super::answer::{Refusal, Result};
use super::rack::Rack;

/// What instances take of one sled.
#[derive(Debug, Default)]
struct Use {
    instances: usize,
    cpus: u64,
    memory: u64,
    local_storage: u64,
    /// Whether a member of one of the newcomer's `fail` groups is there.
    apart: bool,
    /// How many members of its `allow` groups are.
    rather_apart: usize,
}

impl Rack {
    /// vCPUs and memory of everything that has a VMM.
    pub(super) fn compute_used(&self) -> (u64, u64) {
        self.instances
            .values()
            .filter(|it| it.sled.is_some())
            .fold((0, 0), |(cpus, memory), it| {
                (cpus + u64::from(it.view.ncpus.0), memory + it.view.memory.0)
            })
    }

    /// Picks a sled: the CPU it needs, room, and no member of a `fail` group on it. A group of policy `allow`
    /// only prefers.
    pub(super) fn place(&self, id: Uuid) -> Result<usize> {
        let it = self.instances.get(&id).ok_or_else(Refusal::internal)?;
        let of_policy = |policy: types::AffinityPolicy| -> BTreeSet<_> {
            let named = it
                .groups
                .iter()
                .filter(|id| self.groups.get(id).is_some_and(|group| group.policy == policy));
            named.collect()
        };
        let (apart, rather_apart) = (
            of_policy(types::AffinityPolicy::Fail),
            of_policy(types::AffinityPolicy::Allow),
        );
        let mut used: Vec<Use> = self.limits.sleds.iter().map(|_| Use::default()).collect();
        for other in self.instances.values() {
            if let Some(there) = other.sled.and_then(|sled| used.get_mut(sled)) {
                there.instances += 1;
                there.cpus += u64::from(other.view.ncpus.0);
                there.memory += other.view.memory.0;
                there.apart |= other.groups.iter().any(|group| apart.contains(group));
                there.rather_apart +=
                    usize::from(other.groups.iter().any(|group| rather_apart.contains(group)));
            }
        }
        let mut needs_local = 0;
        for disk in self.disks.values().map(|disk| &disk.view) {
            let (types::DiskType::Local, types::DiskState::Attached(owner)) = (disk.disk_type, &disk.state)
            else {
                continue;
            };
            if *owner == id {
                needs_local += disk.size.0;
            }
            let sled = self.instances.get(owner).and_then(|owner| owner.sled);
            if let Some(there) = sled.and_then(|sled| used.get_mut(sled)) {
                there.local_storage += disk.size.0;
            }
        }
        let needs_turin = !matches!(
            it.view.cpu_platform,
            None | Some(types::InstanceCpuPlatform::AmdMilan)
        );
        let best = self
            .limits
            .sleds
            .iter()
            .zip(&used)
            .enumerate()
            .filter(|(_, (sled, there))| {
                !(needs_turin && sled.family == SledFamily::Milan)
                    && there.cpus + u64::from(it.view.ncpus.0) <= sled.vcpus
                    && there.memory + it.view.memory.0 <= sled.memory
                    && there.local_storage + needs_local <= sled.local_storage
                    && !there.apart
            })
            .min_by_key(|(_, (_, there))| (there.rather_apart, there.instances));
        best.map(|(index, _)| index).ok_or_else(|| {
            Refusal::capacity(
                "Failed to place instance: Could not find any valid sled on which this instance can be \
                 placed",
            )
        })
    }

    pub(super) fn check_compute(&self, id: Uuid) -> Result<()> {
        let it = self.instances.get(&id).ok_or_else(Refusal::internal)?;
        let (cpus, memory) = self.compute_used();
        let over = if cpus + u64::from(it.view.ncpus.0) > self.limits.vcpus {
            "vCPU Limit Exceeded: Not enough vCPUs"
        } else if memory + it.view.memory.0 > self.limits.memory {
            "Memory Limit Exceeded: Not enough memory"
        } else {
            return Ok(());
        };
        Err(Refusal::capacity(format!(
            "{over} to complete request. Either stop unused instances to free up resources or contact \
             the rack operator to request a capacity increase."
        )))
    }
}
