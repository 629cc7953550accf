//! Does what Omni's controllers do: finalizers, request sets, drains, patches, joins, the end of a provider.
//!
//! Level-triggered: a change plans a look at a key, a look compares and acts. Nothing polls, so under a
//! paused clock time moves only where something is under way. All of it runs inside [`super::Omni::run`];
//! while that is not running, nothing happens.
//!
//! *Not here*: what a human does ([`super::admin`]).

mod machines;
mod patches;
mod providers;
mod requests;
mod statuses;

use std::sync::Arc;

use tokio::time::Instant;

pub(super) use self::machines::went_down;
pub(super) use self::requests::strip;
use super::agenda::Task;
use super::resources::Stored;
use super::store::Change;
use super::{Inner, types};
use crate::omni::Phase;
use crate::omni::wire::specs;

/// Looks at everything: at the start of a process, and after its options changed.
pub(super) fn rescan(inner: &mut Inner) {
    inner.store.unseen.clear();
    for stored in inner.store.everything() {
        observe(inner, None, Some(&stored));
    }
    let booted: Vec<String> = inner.machines.keys().cloned().collect();
    for uuid in booted {
        plan_join(inner, &uuid);
    }
}

/// Takes in all changes, does all that is due, and returns when the next thing is.
pub(super) fn step(inner: &mut Inner) -> Option<Instant> {
    loop {
        for change in std::mem::take(&mut inner.store.unseen) {
            let Change { old, new, .. } = &change;
            observe(inner, old.as_ref(), new.as_ref());
        }
        match inner.agenda.due(Instant::now()) {
            Some(task) => perform(inner, task),
            None if inner.store.unseen.is_empty() => return inner.agenda.next(),
            None => {}
        }
    }
}

/// Plans a join of a machine that runs.
pub(super) fn plan_join(inner: &mut Inner, uuid: &str) {
    if inner.machines.get(uuid).is_some_and(|machine| machine.running) {
        let at = Instant::now() + inner.options.delays.join;
        inner.agenda.plan(at, Task::Join(uuid.to_owned()));
    }
}

/// Plans what a change calls for.
fn observe(inner: &mut Inner, old: Option<&Arc<Stored>>, new: Option<&Arc<Stored>>) {
    let Some(subject) = new.or(old) else { return };
    let now = Instant::now();
    let delays = inner.options.delays.clone();
    let id = subject.id.clone();
    let gone = new.is_none();
    match subject.kind.as_str() {
        types::MACHINE_REQUESTS => {
            let free = subject
                .finalizers
                .iter()
                .all(|finalizer| finalizer == types::REQUEST_FINALIZER);
            if gone || (subject.tearing_down() && subject.finalizers.is_empty()) {
                plan_set(inner, subject, now);
            }
            if gone {
                return;
            }
            if !subject.tearing_down() {
                if !subject.finalizers.contains(types::REQUEST_FINALIZER) {
                    inner
                        .agenda
                        .plan(now + delays.request_finalizer, Task::HoldRequest(id));
                }
            } else if free {
                let task = if subject.finalizers.is_empty() {
                    Task::EndRequest(id)
                } else {
                    Task::ReleaseRequest(id)
                };
                inner.agenda.plan(now + delays.request_end, task);
            }
        }
        types::MACHINE_REQUEST_SETS => {
            inner.agenda.plan(now, Task::Set(id));
            for provider in inner.store.list(types::INFRA, types::INFRA_PROVIDERS) {
                plan_provider(inner, &provider.id, now);
            }
        }
        types::MACHINE_REQUEST_STATUSES => {
            let spec: specs::MachineRequestStatusSpec = subject.decode();
            if !spec.id.is_empty() && !gone {
                inner.agenda.plan(now + delays.react, Task::Link(spec.id));
            }
            for patch in inner.store.list(types::INFRA, types::CONFIG_PATCH_REQUESTS) {
                if patch.get_label(types::LABEL_REQUEST) == Some(&id) {
                    inner
                        .agenda
                        .plan(now + delays.react, Task::Patch(patch.id.clone()));
                }
            }
            if let Some(provider) = subject.get_label(types::LABEL_PROVIDER) {
                plan_provider(inner, provider, now);
            }
            if gone {
                inner.drains.remove(&id);
                return;
            }
            let held = subject.finalizers.contains(types::STATUS_FINALIZER);
            if subject.tearing_down() {
                if held && !inner.drains.contains_key(&id) {
                    inner.agenda.plan(now + delays.react, Task::Drain(id));
                } else if held {
                    inner.agenda.plan(now, Task::Drained(id));
                }
            } else if !held {
                inner
                    .agenda
                    .plan(now + delays.status_finalizer, Task::HoldStatus(id));
            }
        }
        types::CONFIG_PATCH_REQUESTS => inner.agenda.plan(now + delays.react, Task::Patch(id)),
        types::INFRA_PROVIDER_STATUSES => {
            for link in inner.store.list(types::DEFAULT, types::LINKS) {
                if link.get_label(types::LABEL_PROVIDER) == Some(&id) {
                    inner.agenda.plan(now + delays.react, Task::Link(link.id.clone()));
                }
            }
            plan_provider(inner, &id, now);
        }
        types::LINKS => {
            if gone {
                plan_join(inner, &id);
            } else if subject.tearing_down() {
                inner.agenda.plan(now + delays.link_end, Task::EndLink(id));
                let request = subject
                    .get_label(types::LABEL_REQUEST)
                    .and_then(|request| inner.store.get(types::INFRA, types::MACHINE_REQUESTS, request))
                    .cloned();
                if let Some(request) = request {
                    plan_set(inner, &request, now);
                }
            } else {
                inner.agenda.plan(now + delays.react, Task::Link(id));
            }
        }
        types::REGISTRATIONS if subject.tearing_down() && !gone => {
            inner.agenda.plan(now + delays.react, Task::EndLink(id));
        }
        types::INFRA_PROVIDERS => {
            plan_provider(inner, &id, now);
            for set in inner.store.list(types::DEFAULT, types::MACHINE_REQUEST_SETS) {
                if set.decode::<specs::MachineRequestSetSpec>().provider_id == id {
                    inner.agenda.plan(now, Task::Set(set.id.clone()));
                }
            }
        }
        _ => {}
    }
}

fn plan_set(inner: &mut Inner, request: &Stored, now: Instant) {
    if let Some(set) = request.get_label(types::LABEL_SET) {
        inner.agenda.plan(now, Task::Set(set.to_owned()));
    }
}

fn plan_provider(inner: &mut Inner, provider: &str, now: Instant) {
    let tearing_down = inner
        .store
        .get(types::INFRA, types::INFRA_PROVIDERS, provider)
        .is_some_and(|provider| provider.tearing_down());
    if tearing_down {
        inner.agenda.plan(now, Task::Provider(provider.to_owned()));
    }
}

fn perform(inner: &mut Inner, task: Task) {
    match task {
        Task::HoldRequest(id) => requests::hold(inner, &id),
        Task::ReleaseRequest(id) => requests::release(inner, &id),
        Task::EndRequest(id) => end_if_free(inner, types::INFRA, types::MACHINE_REQUESTS, &id),
        Task::HoldStatus(id) => statuses::hold(inner, &id),
        Task::Drain(id) => statuses::drain(inner, id),
        Task::Drained(id) => statuses::drained(inner, &id),
        Task::Patch(id) => patches::patch(inner, &id),
        Task::Set(id) => requests::set(inner, &id),
        Task::Join(uuid) => machines::let_join(inner, &uuid),
        Task::Link(uuid) => machines::link(inner, &uuid),
        Task::EndLink(uuid) => machines::end_link(inner, &uuid),
        Task::Provider(id) => providers::provider(inner, &id),
    }
}

/// Ends a resource that is torn down and that nobody holds.
fn end_if_free(inner: &mut Inner, namespace: &str, kind: &str, id: &str) {
    let free = inner
        .store
        .get(namespace, kind, id)
        .is_some_and(|stored| stored.tearing_down() && stored.finalizers.is_empty());
    if free {
        inner.store.remove(namespace, kind, id);
    }
}

/// Asks for the end of a resource.
pub(super) fn tear_down(inner: &mut Inner, namespace: &str, kind: &str, id: &str) -> bool {
    let now = inner.now();
    inner.store.modify(namespace, kind, id, now, |stored| {
        stored.phase = Phase::TearingDown;
    })
}
