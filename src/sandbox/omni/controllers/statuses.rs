//! The drain: what holds a machine request status until its machine has left the cluster.

use tokio::time::Instant;

use super::super::agenda::Task;
use super::super::{Drain, Inner, types};
use super::tear_down;
use crate::omni::wire::specs;

/// Puts the cleanup finalizer on a status.
pub(super) fn hold(inner: &mut Inner, id: &str) {
    let now = inner.now();
    inner
        .store
        .modify(types::INFRA, types::MACHINE_REQUEST_STATUSES, id, now, |status| {
            if !status.tearing_down() {
                status.finalizers.insert(types::STATUS_FINALIZER.to_owned());
            }
        });
}

/// Begins the drain of a status: there is one only where a machine of that UUID was accepted.
pub(super) fn drain(inner: &mut Inner, id: String) {
    let Some(status) = inner
        .store
        .get(types::INFRA, types::MACHINE_REQUEST_STATUSES, &id)
    else {
        return;
    };
    let uuid = status.decode::<specs::MachineRequestStatusSpec>().id;
    let member = !uuid.is_empty() && inner.store.get(types::DEFAULT, types::MACHINES, &uuid).is_some();
    let now = Instant::now();
    let until = if member {
        now + inner.options.delays.drain
    } else {
        now
    };
    inner.drains.insert(id.clone(), Drain { uuid, until, member });
    inner.agenda.plan(until, Task::Drained(id));
}

/// Ends a drain: the link goes without being waited for, the status is released.
pub(super) fn drained(inner: &mut Inner, id: &str) {
    let Some(drain) = inner.drains.get(id) else { return };
    if drain.until > Instant::now() {
        let until = drain.until;
        inner.agenda.plan(until, Task::Drained(id.to_owned()));
        return;
    }
    if drain.member && inner.options.hold_drains {
        return;
    }
    let uuid = drain.uuid.clone();
    inner.drains.remove(id);
    if !uuid.is_empty() {
        tear_down(inner, types::DEFAULT, types::LINKS, &uuid);
    }
    let now = inner.now();
    inner
        .store
        .modify(types::INFRA, types::MACHINE_REQUEST_STATUSES, id, now, |status| {
            status.finalizers.remove(types::STATUS_FINALIZER);
        });
}
