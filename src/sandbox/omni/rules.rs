//! Decides what a permitted call does, and in which words it is refused.
//!
//! Codes and messages are Omni 1.10.4's, where clients may match on them.
//!
//! *Not here*: whether the caller may come near the type at all ([`super::access`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use tonic::Status;

use super::access::{Role, Verb, access};
use super::resources::{Stored, fields};
use super::signature::Actor;
use super::store::{Refusal, Refused};
use super::{Inner, types};
use crate::omni::Phase;

/// The RPC whose answer a refusal of the store becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Create,
    Update,
    Destroy,
    Teardown,
}

/// Whether Get and List of a type are answered from a cache: unfiltered, and late.
pub(super) fn cached(kind: &str) -> bool {
    matches!(
        kind,
        types::CONFIG_PATCH_REQUESTS
            | types::PROVIDER_JOIN_CONFIGS
            | types::API_CONFIGS
            | types::CONNECTION_PARAMS
            | types::TALOS_VERSIONS
    )
}

/// Reads one resource.
pub(super) fn get(
    inner: &Inner,
    actor: &Actor,
    namespace: &str,
    kind: &str,
    id: &str,
) -> Result<Arc<Stored>, Status> {
    let access = access(inner, actor, namespace, kind, Verb::Read)?;
    let missing = || Status::not_found(Refused::not_found(namespace, kind, id).message);
    if kind == types::CURRENT_USERS {
        return if id == types::CURRENT_ID {
            Ok(Arc::new(current_user(inner, actor)))
        } else {
            Err(missing())
        };
    }
    if cached(kind) {
        return inner
            .store
            .list_stale(namespace, kind, inner.options.cache_staleness)
            .remove(id)
            .ok_or_else(missing);
    }
    let resource = inner.store.get(namespace, kind, id).ok_or_else(missing)?;
    if access.sees(resource) {
        Ok(resource.clone())
    } else {
        Err(Status::not_found("not found"))
    }
}

/// Reads all resources of a type.
pub(super) fn list(
    inner: &Inner,
    actor: &Actor,
    namespace: &str,
    kind: &str,
) -> Result<Vec<Arc<Stored>>, Status> {
    let access = access(inner, actor, namespace, kind, Verb::Read)?;
    if kind == types::CURRENT_USERS {
        return Ok(vec![Arc::new(current_user(inner, actor))]);
    }
    if cached(kind) {
        // Watched on Omni 1.10.4: what comes from the cache is not filtered by provider.
        return Ok(inner
            .store
            .list_stale(namespace, kind, inner.options.cache_staleness)
            .into_values()
            .collect());
    }
    let mut all = inner.store.list(namespace, kind);
    all.retain(|resource| access.sees(resource));
    Ok(all)
}

/// Creates a resource.
pub(super) fn create(
    inner: &mut Inner,
    actor: &Actor,
    mut resource: Stored,
    owner: &str,
) -> Result<Arc<Stored>, Status> {
    let access = access(inner, actor, &resource.namespace, &resource.kind, Verb::Create)?;
    validate(&resource, None)?;
    if let Some(provider) = &access.provider {
        if access.read_only {
            return Err(Status::permission_denied(format!(
                "infra providers are not allowed to create {:?} resources",
                resource.kind
            )));
        }
        if access.own_id && resource.id != *provider {
            return Err(Status::invalid_argument(format!(
                "resource ID must match the infra provider ID {provider:?}"
            )));
        }
        resource
            .labels
            .insert(types::LABEL_PROVIDER.to_owned(), provider.clone());
    }
    store_form(&mut resource)?;
    let now = inner.now();
    inner
        .store
        .create(resource, owner, now)
        .map_err(|refused| status(&refused, Asked::Create))
}

/// Replaces a resource.
pub(super) fn update(
    inner: &mut Inner,
    actor: &Actor,
    mut resource: Stored,
    version: Option<u64>,
    owner: &str,
    expected: Option<Phase>,
    asked: Asked,
) -> Result<Arc<Stored>, Status> {
    let access = access(inner, actor, &resource.namespace, &resource.kind, Verb::Update)?;
    let old = inner
        .store
        .get(&resource.namespace, &resource.kind, &resource.id)
        .cloned()
        .ok_or_else(|| {
            let missing = Refused::not_found(&resource.namespace, &resource.kind, &resource.id);
            Status::not_found(missing.message)
        })?;
    validate(&resource, Some(&old))?;
    if let Some(provider) = &access.provider {
        // Before the version: a stale copy of a read-only resource is refused for what differs in it.
        if access.read_only && !same_but_finalizers(&old, &resource) {
            return Err(Status::permission_denied(format!(
                "infra providers are not allowed to update {:?} resources other than setting finalizers",
                resource.kind
            )));
        }
        if !access.sees(&old) {
            return Err(Status::not_found("not found"));
        }
        resource
            .labels
            .insert(types::LABEL_PROVIDER.to_owned(), provider.clone());
    }
    if resource.kind == types::MACHINE_REQUESTS && fields(&old.spec) != fields(&resource.spec) {
        return Err(Status::invalid_argument(
            "failed to validate: machine request spec is immutable",
        ));
    }
    store_form(&mut resource)?;
    let now = inner.now();
    inner
        .store
        .update(resource, version, owner, expected, now)
        .map_err(|refused| status(&refused, asked))
}

/// Asks for the end of a resource; true if nothing holds it. As cosi-project/runtime does: a get, and an
/// update if it runs.
pub(super) fn teardown(
    inner: &mut Inner,
    actor: &Actor,
    namespace: &str,
    kind: &str,
    id: &str,
    owner: &str,
) -> Result<bool, Status> {
    let access = access(inner, actor, namespace, kind, Verb::Destroy)?;
    let current = inner
        .store
        .get(namespace, kind, id)
        .cloned()
        .ok_or_else(|| Status::not_found(Refused::not_found(namespace, kind, id).message))?;
    if !access.sees(&current) {
        return Err(Status::not_found("not found"));
    }
    if current.tearing_down() {
        return Ok(current.finalizers.is_empty());
    }
    let mut resource = (*current).clone();
    resource.phase = Phase::TearingDown;
    let stored = update(
        inner,
        actor,
        resource,
        Some(current.version),
        owner,
        Some(Phase::Running),
        Asked::Teardown,
    )?;
    Ok(stored.finalizers.is_empty())
}

/// Ends a resource that nothing holds.
pub(super) fn destroy(
    inner: &mut Inner,
    actor: &Actor,
    namespace: &str,
    kind: &str,
    id: &str,
    owner: &str,
) -> Result<(), Status> {
    let access = access(inner, actor, namespace, kind, Verb::Destroy)?;
    let current = inner
        .store
        .get(namespace, kind, id)
        .cloned()
        .ok_or_else(|| Status::not_found(Refused::not_found(namespace, kind, id).message))?;
    if access.provider.is_some() {
        if access.read_only {
            return Err(Status::permission_denied(format!(
                "infra providers are not allowed to destroy {kind:?} resources"
            )));
        }
        if !access.sees(&current) {
            return Err(Status::not_found("not found"));
        }
    }
    inner
        .store
        .destroy(namespace, kind, id, owner)
        .map_err(|refused| status(&refused, Asked::Destroy))
}

/// Who is asking, as a resource of its own.
fn current_user(inner: &Inner, actor: &Actor) -> Stored {
    let role = if inner.options.suspended {
        Role::Reader
    } else {
        actor.role
    };
    let mut user = Stored::new(types::VIRTUAL, types::CURRENT_USERS, types::CURRENT_ID).spec(
        &crate::omni::wire::specs::CurrentUserSpec {
            identity: actor.identity.clone(),
            role: role.name().to_owned(),
        },
    );
    user.version = 1;
    user
}

/// Whether two copies of a read-only resource differ in nothing but version and finalizers. Unknown spec
/// fields count.
fn same_but_finalizers(old: &Stored, new: &Stored) -> bool {
    old.phase == new.phase
        && old.owner == new.owner
        && old.labels == new.labels
        && old.annotations == new.annotations
        && (old.spec == new.spec || fields(&old.spec) == fields(&new.spec))
}

/// What Omni keeps of a resource: of types that it knows it decodes the spec, of others it keeps what was
/// sent.
fn store_form(resource: &mut Stored) -> Result<(), Status> {
    /// What etcd's client sends in one message.
    const MESSAGE: usize = 2 << 20;
    /// What etcd takes as one value.
    const VALUE: usize = 3 << 19;

    if types::DEFINED.contains(&resource.kind.as_str()) {
        resource.yaml = String::new();
        if fields(&resource.spec).is_none() {
            return Err(Status::unknown("proto: cannot parse invalid wire-format data"));
        }
    }
    let map = |map: &BTreeMap<String, String>| -> usize {
        map.iter().map(|(key, value)| key.len() + value.len()).sum()
    };
    let size = resource.spec.len() + resource.yaml.len() + map(&resource.labels) + map(&resource.annotations);
    if size > MESSAGE {
        return Err(Status::resource_exhausted(format!(
            "trying to send message larger than max ({size} vs. {MESSAGE})"
        )));
    }
    if size > VALUE {
        return Err(Status::unknown("etcdserver: request is too large"));
    }
    Ok(())
}

/// The limits of metadata: on all of a new resource, on the changed entries of an old one.
fn validate(new: &Stored, old: Option<&Stored>) -> Result<(), Status> {
    const ID: usize = 1024;
    const ENTRIES: usize = 256;
    const VALUE: usize = 16 << 10;

    let refuse = |what: String| Err(Status::invalid_argument(format!("failed to validate: {what}")));
    let control = |text: &str| text.chars().any(char::is_control);
    if old.is_none() && (new.id.is_empty() || new.id.len() > ID || control(&new.id)) {
        return refuse("the resource ID is empty, too long, or has control characters".to_owned());
    }
    let maps = [
        ("label", &new.labels, old.map(|old| &old.labels)),
        ("annotation", &new.annotations, old.map(|old| &old.annotations)),
    ];
    for (what, entries, before) in maps {
        if entries.len() > ENTRIES {
            return refuse(format!("more than {ENTRIES} {what}s"));
        }
        for (key, value) in entries {
            if before.and_then(|before| before.get(key)) == Some(value) {
                continue;
            }
            if key.is_empty() || key.len() > ID || control(key) {
                return refuse(format!(
                    "the key of a {what} is empty, too long, or has control characters"
                ));
            }
            if value.len() > VALUE {
                return refuse(format!("{what} {key:?} is longer than {VALUE} bytes"));
            }
            if control(value) {
                return refuse(format!("{what} {key:?} has control characters"));
            }
        }
    }
    Ok(())
}

/// The answer of an RPC to a refusal of the store.
pub(super) fn status(refused: &Refused, asked: Asked) -> Status {
    let message = refused.message.clone();
    match (refused.refusal, asked) {
        (Refusal::NotFound, _) => Status::not_found(message),
        (Refusal::Owner, _) => Status::permission_denied(message),
        (Refusal::Exists, _) => Status::already_exists(message),
        (Refusal::Phase, Asked::Update) => Status::invalid_argument(message),
        (Refusal::Phase | Refusal::Version | Refusal::Finalizers, _) => Status::failed_precondition(message),
        (Refusal::Malformed, _) => Status::unknown(message),
    }
}
