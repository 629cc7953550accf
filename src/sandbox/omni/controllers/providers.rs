//! The end of a provider.

use super::super::{Inner, signature, types};
use super::{end_if_free, tear_down};

pub(super) fn is_going(inner: &Inner, provider: &str) -> bool {
    inner
        .store
        .get(types::INFRA, types::INFRA_PROVIDERS, provider)
        .is_none_or(|provider| provider.tearing_down())
}

/// What Omni does when a provider is deleted. That it tears down every ownerless set of the account, whosever
/// it is, is upstream's.
pub(super) fn provider(inner: &mut Inner, id: &str) {
    let going = inner
        .store
        .get(types::INFRA, types::INFRA_PROVIDERS, id)
        .is_some_and(|provider| provider.tearing_down());
    if !going {
        return;
    }
    let own = [
        (types::INFRA, types::INFRA_PROVIDER_STATUSES),
        (types::INFRA_EPHEMERAL, types::INFRA_PROVIDER_HEALTH),
    ];
    for (namespace, kind) in own {
        let ownerless = inner
            .store
            .get(namespace, kind, id)
            .is_some_and(|status| status.owner.is_empty());
        if ownerless && tear_down(inner, namespace, kind, id) {
            end_if_free(inner, namespace, kind, id);
        }
    }
    inner
        .keys
        .retain(|_, key| key.identity != signature::identity(&format!("infra-provider:{id}")));
    for link in inner.store.list(types::DEFAULT, types::LINKS) {
        if link.get_label(types::LABEL_PROVIDER) == Some(id) {
            tear_down(inner, types::DEFAULT, types::LINKS, &link.id);
        }
    }
    for status in inner.store.list(types::INFRA, types::MACHINE_REQUEST_STATUSES) {
        if status.get_label(types::LABEL_PROVIDER) == Some(id) {
            tear_down(inner, types::INFRA, types::MACHINE_REQUEST_STATUSES, &status.id);
            end_if_free(inner, types::INFRA, types::MACHINE_REQUEST_STATUSES, &status.id);
        }
    }
    let statuses_left = inner
        .store
        .list(types::INFRA, types::MACHINE_REQUEST_STATUSES)
        .iter()
        .any(|status| status.get_label(types::LABEL_PROVIDER) == Some(id));
    for set in inner.store.list(types::DEFAULT, types::MACHINE_REQUEST_SETS) {
        if set.owner.is_empty() {
            tear_down(inner, types::DEFAULT, types::MACHINE_REQUEST_SETS, &set.id);
        }
    }
    let sets_left = inner
        .store
        .list(types::DEFAULT, types::MACHINE_REQUEST_SETS)
        .iter()
        .any(|set| set.owner.is_empty());
    if !statuses_left && !sets_left {
        inner.store.remove(types::INFRA, types::PROVIDER_JOIN_CONFIGS, id);
        inner.store.remove(types::INFRA, types::INFRA_PROVIDERS, id);
    }
}
