//! Machines: who may join, and what Omni makes of a link.

use std::sync::Arc;

use super::super::resources::Stored;
use super::super::{Inner, join, types};
use super::providers::is_going;
use super::{end_if_free, requests, tear_down};
use crate::omni::wire::specs;

/// What a link keeps of its machine.
#[derive(Clone, PartialEq, prost::Message)]
struct LinkSpec {
    #[prost(string, tag = "1")]
    node_subnet: String,
    #[prost(bool, tag = "4")]
    connected: bool,
}

/// What everybody may see of a machine.
#[derive(Clone, PartialEq, prost::Message)]
struct MachineSpec {
    #[prost(string, tag = "1")]
    management_address: String,
    #[prost(bool, tag = "2")]
    connected: bool,
}

/// Lets a booted machine join, or notes why not.
pub(super) fn let_join(inner: &mut Inner, uuid: &str) {
    let Some(machine) = inner.machines.get(uuid).filter(|machine| machine.running) else {
        return;
    };
    let token = machine
        .api_url
        .clone()
        .and_then(|url| join::token_of_url(&url, &inner.options.api_url))
        .and_then(|token| admit(inner, uuid, &token).map(|()| token));
    let token = match token {
        Ok(token) => token,
        Err(reason) => {
            tracing::debug!(uuid, reason, "a machine may not join");
            inner.refused_joins.push((uuid.to_owned(), reason));
            inner.bump();
            return;
        }
    };
    let now = inner.now();
    let connected = LinkSpec {
        node_subnet: address(uuid),
        connected: true,
    };
    if inner.store.get(types::DEFAULT, types::LINKS, uuid).is_some() {
        // Labels come from the token of the first join alone.
        inner
            .store
            .modify(types::DEFAULT, types::LINKS, uuid, now, |link| {
                link.spec = prost::Message::encode_to_vec(&connected).into();
            });
        return;
    }
    let mut link = Stored::new(types::DEFAULT, types::LINKS, uuid).spec(&connected);
    for key in [types::LABEL_PROVIDER, types::LABEL_REQUEST] {
        if let Some(value) = token.extra.get(key) {
            link = link.label(key, value);
        }
    }
    inner.store.put(link, now);
}

fn admit(inner: &Inner, uuid: &str, token: &join::Token) -> Result<(), String> {
    let secret = match token.provider() {
        Some(provider) => {
            inner
                .store
                .get(types::INFRA, types::PROVIDER_JOIN_CONFIGS, provider)
                .ok_or_else(|| format!("provider {provider} has no join config"))?
                .decode::<specs::ProviderJoinConfigSpec>()
                .join_token
        }
        None => inner.options.default_join_token.expose().to_owned(),
    };
    if !token.verify(&secret) {
        return Err("the join token is not valid".to_owned());
    }
    if let Some(provider) = token.extra.get(types::LABEL_PROVIDER)
        && is_going(inner, provider)
    {
        return Err("the infra provider is being deleted or doesn't exist".to_owned());
    }
    if inner
        .store
        .get(types::DEFAULT, types::LINKS, uuid)
        .is_some_and(|link| link.tearing_down())
    {
        return Err(
            "the machine with the same UUID is already registered in Omni and is in the tearing down phase"
                .to_owned(),
        );
    }
    Ok(())
}

/// Derives registration and machine from a link, and labels the link by the status that names its UUID.
pub(super) fn link(inner: &mut Inner, uuid: &str) {
    let Some(link) = inner.store.get(types::DEFAULT, types::LINKS, uuid).cloned() else {
        return;
    };
    if link.tearing_down() {
        return;
    }
    let now = inner.now();
    let named_by: Vec<Arc<Stored>> = inner
        .store
        .list(types::INFRA, types::MACHINE_REQUEST_STATUSES)
        .into_iter()
        .filter(|status| status.decode::<specs::MachineRequestStatusSpec>().id == uuid)
        .collect();
    for status in named_by {
        inner
            .store
            .modify(types::DEFAULT, types::LINKS, uuid, now, |link| {
                link.labels
                    .insert(types::LABEL_REQUEST.to_owned(), status.id.clone());
                if let Some(set) = status.get_label(types::LABEL_SET) {
                    link.labels.insert(types::LABEL_SET.to_owned(), set.to_owned());
                }
            });
    }
    let Some(link) = inner.store.get(types::DEFAULT, types::LINKS, uuid).cloned() else {
        return;
    };
    if link.get_label(types::LABEL_PROVIDER).is_some() {
        let mut registration =
            Stored::new(types::INFRA, types::REGISTRATIONS, uuid).owner("InfraMachineRegistrationController");
        registration.labels = link.labels.clone();
        inner.store.put(registration, now);
    }
    if accepted(inner, &link) {
        let spec: LinkSpec = link.decode();
        let mut machine = Stored::new(types::DEFAULT, types::MACHINES, uuid)
            .owner("MachineController")
            .spec(&MachineSpec {
                management_address: spec.node_subnet,
                connected: spec.connected,
            });
        machine.labels = link.labels.clone();
        inner.store.put(machine, now);
    }
}

/// Whether Omni makes a machine of a link: one of a provider needs the request, its status, and the UUID in
/// that.
fn accepted(inner: &Inner, link: &Stored) -> bool {
    let Some(provider) = link.get_label(types::LABEL_PROVIDER) else {
        return true;
    };
    let Some(request) = link.get_label(types::LABEL_REQUEST) else {
        return false;
    };
    let registered = inner
        .store
        .get(types::INFRA, types::INFRA_PROVIDER_STATUSES, provider)
        .is_some_and(|status| status.get_label(types::LABEL_STATIC).is_none());
    let requested = inner
        .store
        .get(types::INFRA, types::MACHINE_REQUESTS, request)
        .is_some();
    let named = inner
        .store
        .get(types::INFRA, types::MACHINE_REQUEST_STATUSES, request)
        .is_some_and(|status| !status.decode::<specs::MachineRequestStatusSpec>().id.is_empty());
    registered && requested && named
}

/// Removes what was derived from a link that is torn down, then the link.
pub(super) fn end_link(inner: &mut Inner, uuid: &str) {
    let going = inner
        .store
        .get(types::DEFAULT, types::LINKS, uuid)
        .is_some_and(|link| link.tearing_down());
    if !going {
        return;
    }
    requests::lose_machine(inner, uuid);
    inner.store.remove(types::DEFAULT, types::MACHINES, uuid);
    if tear_down(inner, types::INFRA, types::REGISTRATIONS, uuid) {
        end_if_free(inner, types::INFRA, types::REGISTRATIONS, uuid);
    }
    let held = inner
        .store
        .get(types::INFRA, types::REGISTRATIONS, uuid)
        .is_some();
    if !held {
        end_if_free(inner, types::DEFAULT, types::LINKS, uuid);
    }
}

/// A machine went down: its link is not connected any more. That its request is on the way out and Omni has
/// not drained it yet is the provider's fault.
pub(in super::super) fn went_down(inner: &mut Inner, uuid: &str, gone: bool) {
    let up = inner.machines.get(uuid).is_some_and(|machine| machine.running);
    if up && let Some(request) = undrained(inner, uuid) {
        let how = if gone { "was deleted" } else { "was stopped" };
        inner.violations.push(format!(
            "machine {uuid} of {request} {how} before Omni had drained it"
        ));
    }
    if gone {
        inner.machines.remove(uuid);
    } else if let Some(machine) = inner.machines.get_mut(uuid) {
        machine.running = false;
    }
    let now = inner.now();
    inner
        .store
        .modify(types::DEFAULT, types::LINKS, uuid, now, |link| {
            let mut spec: LinkSpec = link.decode();
            spec.connected = false;
            link.spec = prost::Message::encode_to_vec(&spec).into();
        });
    inner.bump();
}

/// The request of an accepted machine, if it is on the way out and its status is still held for the drain.
fn undrained(inner: &Inner, uuid: &str) -> Option<String> {
    inner.store.get(types::DEFAULT, types::MACHINES, uuid)?;
    let status = inner
        .store
        .list(types::INFRA, types::MACHINE_REQUEST_STATUSES)
        .into_iter()
        .find(|status| status.decode::<specs::MachineRequestStatusSpec>().id == uuid)?;
    let leaving = status.tearing_down()
        || inner
            .store
            .get(types::INFRA, types::MACHINE_REQUESTS, &status.id)
            .is_some_and(|request| request.tearing_down());
    let held = status.finalizers.contains(types::STATUS_FINALIZER);
    (leaving && held).then(|| status.id.clone())
}

/// A machine's address in the tunnel, made of its UUID: stable and unlike others.
fn address(uuid: &str) -> String {
    let digits: Vec<char> = uuid.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    let groups: Vec<String> = digits.chunks(4).map(|group| group.iter().collect()).collect();
    format!("fdae:41e4:649b:9303:{}/64", groups.join(":"))
}
