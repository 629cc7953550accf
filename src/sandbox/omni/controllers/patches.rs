//! Config patches, made of what a provider asks for.

use super::super::resources::Stored;
use super::super::{Inner, types};
use crate::omni::wire::specs;

/// Makes a config patch of a patch request. The finalizer comes first, as cosi-project/runtime's transforms
/// do it.
pub(super) fn patch(inner: &mut Inner, id: &str) {
    let now = inner.now();
    let Some(request) = inner
        .store
        .get(types::INFRA, types::CONFIG_PATCH_REQUESTS, id)
        .cloned()
    else {
        remove_patch(inner, id);
        return;
    };
    if request.tearing_down() {
        remove_patch(inner, id);
        inner
            .store
            .modify(types::INFRA, types::CONFIG_PATCH_REQUESTS, id, now, |request| {
                request.finalizers.remove(types::PATCH_FINALIZER);
            });
        return;
    }
    inner
        .store
        .modify(types::INFRA, types::CONFIG_PATCH_REQUESTS, id, now, |request| {
            request.finalizers.insert(types::PATCH_FINALIZER.to_owned());
        });
    let status = request.get_label(types::LABEL_REQUEST).and_then(|request| {
        inner
            .store
            .get(types::INFRA, types::MACHINE_REQUEST_STATUSES, request)
    });
    let Some(status) = status else {
        remove_patch(inner, id);
        return;
    };
    let uuid = status.decode::<specs::MachineRequestStatusSpec>().id;
    if uuid.is_empty() {
        return;
    }
    // A patch that a user made under that ID stays: the collision is silent.
    let taken = inner
        .store
        .get(types::DEFAULT, types::CONFIG_PATCHES, id)
        .is_some_and(|patch| patch.owner != types::PATCH_FINALIZER);
    if taken {
        return;
    }
    let mut patch = Stored::new(types::DEFAULT, types::CONFIG_PATCHES, id).owner(types::PATCH_FINALIZER);
    patch.labels = request.labels.clone();
    patch.spec = request.spec.clone();
    let patch = patch
        .label(types::LABEL_SYSTEM_PATCH, "")
        .label(types::LABEL_MACHINE, &uuid);
    inner.store.put(patch, now);
}

fn remove_patch(inner: &mut Inner, id: &str) {
    let ours = inner
        .store
        .get(types::DEFAULT, types::CONFIG_PATCHES, id)
        .is_some_and(|patch| patch.owner == types::PATCH_FINALIZER);
    if ours {
        inner.store.remove(types::DEFAULT, types::CONFIG_PATCHES, id);
    }
}
