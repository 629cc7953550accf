//! Machine requests and the sets that make them.

use std::sync::Arc;

use rand::Rng as _;

use super::super::resources::Stored;
use super::super::{Inner, types};
use super::providers::is_going;
use super::tear_down;
use crate::omni::wire::specs;

/// The letters of Kubernetes' random names: no vowels, nothing that looks alike.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Puts Omni's finalizer on a request.
pub(super) fn hold(inner: &mut Inner, id: &str) {
    let now = inner.now();
    inner
        .store
        .modify(types::INFRA, types::MACHINE_REQUESTS, id, now, |request| {
            if !request.tearing_down() {
                request.finalizers.insert(types::REQUEST_FINALIZER.to_owned());
            }
        });
}

/// Takes it off, if nobody else holds the request.
pub(super) fn release(inner: &mut Inner, id: &str) {
    let now = inner.now();
    inner
        .store
        .modify(types::INFRA, types::MACHINE_REQUESTS, id, now, |request| {
            if request.finalizers.len() == 1 {
                request.finalizers.remove(types::REQUEST_FINALIZER);
            }
        });
}

/// A machine goes: its request is torn down, so that the set makes another (`MachineRequestSetStatusController`; a request without a set
/// stays). Omni does it when it sees the machine go, before the machine is gone.
pub(super) fn lose_machine(inner: &mut Inner, uuid: &str) {
    let request = inner
        .store
        .get(types::DEFAULT, types::MACHINES, uuid)
        .and_then(|machine| machine.get_label(types::LABEL_REQUEST))
        .and_then(|request| inner.store.get(types::INFRA, types::MACHINE_REQUESTS, request))
        .cloned();
    let Some(request) = request else { return };
    let has_set = request.get_label(types::LABEL_SET).is_some_and(|set| {
        inner
            .store
            .get(types::DEFAULT, types::MACHINE_REQUEST_SETS, set)
            .is_some()
    });
    if has_set && !request.tearing_down() {
        tear_down(inner, types::INFRA, types::MACHINE_REQUESTS, &request.id);
    }
}

/// Matches the requests of a set to its count.
pub(super) fn set(inner: &mut Inner, id: &str) {
    let Some(set) = inner
        .store
        .get(types::DEFAULT, types::MACHINE_REQUEST_SETS, id)
        .cloned()
    else {
        return;
    };
    let requests: Vec<Arc<Stored>> = inner
        .store
        .list(types::INFRA, types::MACHINE_REQUESTS)
        .into_iter()
        .filter(|request| request.get_label(types::LABEL_SET) == Some(id))
        .collect();
    let spec: specs::MachineRequestSetSpec = set.decode();
    if set.tearing_down() {
        for request in &requests {
            if is_going(inner, &spec.provider_id) {
                strip(inner, &request.id);
            }
            tear_down(inner, types::INFRA, types::MACHINE_REQUESTS, &request.id);
        }
        if requests.is_empty() {
            inner
                .store
                .remove(types::DEFAULT, types::MACHINE_REQUEST_SETS, id);
        }
        return;
    }
    let mut running: Vec<Arc<Stored>> = requests
        .into_iter()
        .filter(|request| !request.tearing_down())
        .collect();
    let wanted = usize::try_from(spec.machine_count).unwrap_or(0);
    if running.len() > wanted {
        // What no machine came of goes first, then the oldest.
        running.sort_by_key(|request| (in_use(inner, &request.id), request.created));
        let surplus = running.len() - wanted;
        for request in running.iter().take(surplus) {
            tear_down(inner, types::INFRA, types::MACHINE_REQUESTS, &request.id);
        }
        return;
    }
    for _ in running.len()..wanted {
        create_request(inner, id, &spec);
    }
}

/// Whether a machine of that request was accepted: stands for Omni's "in a cluster".
fn in_use(inner: &Inner, request: &str) -> bool {
    inner
        .store
        .get(types::INFRA, types::MACHINE_REQUEST_STATUSES, request)
        .map(|status| status.decode::<specs::MachineRequestStatusSpec>().id)
        .is_some_and(|uuid| inner.store.get(types::DEFAULT, types::MACHINES, &uuid).is_some())
}

fn create_request(inner: &mut Inner, set: &str, spec: &specs::MachineRequestSetSpec) {
    let request = specs::MachineRequestSpec {
        talos_version: spec.talos_version.clone(),
        overlay: None,
        extensions: spec.extensions.clone(),
        kernel_args: spec.kernel_args.clone(),
        meta_values: spec.meta_values.clone(),
        provider_data: spec.provider_data.clone(),
        grpc_tunnel: spec.grpc_tunnel,
    };
    // A name that is taken is drawn again, a hundred times at most.
    for _ in 0..100 {
        let mut id = format!("{set}-");
        for _ in 0..6 {
            let letter = ALPHABET
                .get(inner.rng.gen_range(0..ALPHABET.len()))
                .copied()
                .unwrap_or(b'x');
            id.push(char::from(letter));
        }
        if inner
            .store
            .get(types::INFRA, types::MACHINE_REQUESTS, &id)
            .is_none()
        {
            let request = Stored::new(types::INFRA, types::MACHINE_REQUESTS, &id)
                .spec(&request)
                .label(types::LABEL_PROVIDER, &spec.provider_id)
                .label(types::LABEL_SET, set);
            inner.add_request(request);
            return;
        }
    }
}

/// Takes all finalizers but Omni's off a request.
pub(in super::super) fn strip(inner: &mut Inner, request: &str) -> bool {
    let now = inner.now();
    inner
        .store
        .modify(types::INFRA, types::MACHINE_REQUESTS, request, now, |request| {
            request
                .finalizers
                .retain(|finalizer| finalizer == types::REQUEST_FINALIZER);
        })
}
