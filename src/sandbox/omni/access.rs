//! Decides who may come near which type and namespace.
//!
//! Two layers, as in Omni: types that belong to providers have rules of their own (own label only, some
//! read-only but for finalizers, some with a fixed ID); everything else goes by role. Codes and messages are
//! Omni 1.10.4's, where clients may match on them.
//!
//! *Not here*: what then happens to the resource ([`super::rules`]).

use tonic::Status;

use super::resources::Stored;
use super::signature::Actor;
use super::{Inner, types};

/// What an account may do. Each role may do what those before it may, but for what only a provider may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Nothing.
    None,
    /// What a provider's account may: less than a reader outside its own types.
    InfraProvider,
    /// Read everything.
    Reader,
    /// Change machines and clusters.
    Operator,
    /// Everything.
    Admin,
}

impl Role {
    /// The word that `CurrentUsers/current` shows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::InfraProvider => "InfraProvider",
            Self::Reader => "Reader",
            Self::Operator => "Operator",
            Self::Admin => "Admin",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Read,
    Create,
    Update,
    Destroy,
}

/// What the second layer found out about a permitted call.
#[derive(Debug, Clone, Default)]
pub(super) struct Access {
    /// Only resources labelled with this provider are visible.
    pub(super) provider: Option<String>,
    /// Providers may change the finalizers alone.
    pub(super) read_only: bool,
    /// The ID has to be the provider's.
    pub(super) own_id: bool,
}

impl Access {
    /// Whether the caller may see that resource.
    pub(super) fn sees(&self, resource: &Stored) -> bool {
        self.provider
            .as_deref()
            .is_none_or(|provider| resource.get_label(types::LABEL_PROVIDER) == Some(provider))
    }
}

/// The rules of a type that providers share, if it is one.
fn shared_type(kind: &str) -> Option<Access> {
    let (read_only, own_id) = match kind {
        types::REGISTRATIONS | types::MACHINE_REQUESTS | types::PROVIDER_JOIN_CONFIGS => (true, false),
        types::MACHINE_REQUEST_STATUSES | types::CONFIG_PATCH_REQUESTS => (false, false),
        types::INFRA_PROVIDER_STATUSES | types::INFRA_PROVIDER_HEALTH | types::INFRA_PROVIDERS => {
            (false, true)
        }
        _ => return None,
    };
    Some(Access {
        provider: None,
        read_only,
        own_id,
    })
}

/// Lets the caller at a type and namespace, or says why not.
pub(super) fn access(
    inner: &Inner,
    actor: &Actor,
    namespace: &str,
    kind: &str,
    verb: Verb,
) -> Result<Access, Status> {
    if !inner.options.eula_accepted {
        return Err(Status::failed_precondition(
            "EULA has not been accepted: an administrator has to accept it",
        ));
    }
    // A suspended account is everybody's downgrade to a reader.
    let role = if inner.options.suspended {
        Role::Reader
    } else {
        actor.role
    };
    let own_namespace = namespace.starts_with(types::INFRA_OWN_PREFIX);
    let hidden = kind == types::PROVIDER_JOIN_CONFIGS && !inner.options.provider_join_configs;
    let shared = if own_namespace {
        Some(Access::default())
    } else if hidden {
        None
    } else {
        shared_type(kind)
    };
    let Some(rules) = shared else {
        by_role(role, kind, verb)?;
        return Ok(Access::default());
    };
    at_least(role, Role::InfraProvider)?;
    if role == Role::InfraProvider {
        return as_provider(inner, actor, namespace, kind, rules);
    }
    if verb != Verb::Read {
        if kind != types::INFRA_PROVIDERS && kind != types::MACHINE_REQUESTS {
            return Err(Status::permission_denied(format!(
                "users are not allowed to modify {kind:?} resources"
            )));
        }
        if role < Role::Operator {
            return Err(Status::permission_denied(format!(
                "only operators and admins are allowed to modify {kind:?} resources"
            )));
        }
    }
    Ok(Access::default())
}

fn as_provider(
    inner: &Inner,
    actor: &Actor,
    namespace: &str,
    kind: &str,
    rules: Access,
) -> Result<Access, Status> {
    let provider = actor.provider.clone().unwrap_or_default();
    if inner
        .store
        .get(types::INFRA, types::INFRA_PROVIDERS, &provider)
        .is_none()
    {
        return Err(Status::permission_denied(format!(
            "infra provider with name {provider:?} is not registered in the system"
        )));
    }
    if namespace == types::INFRA || namespace == types::INFRA_EPHEMERAL {
        return Ok(Access {
            provider: Some(provider),
            ..rules
        });
    }
    let own = format!("{}{provider}", types::INFRA_OWN_PREFIX);
    if namespace == own {
        let suffix = format!(".{provider}{}", types::OWN_TYPE_SUFFIX);
        if !kind.ends_with(&suffix) {
            return Err(Status::invalid_argument(format!(
                "resources in namespace {namespace:?} must have a type suffix {suffix:?}"
            )));
        }
        return Ok(Access::default());
    }
    Err(Status::permission_denied(format!(
        "namespace not allowed, must be one of: {}, {}, {own}",
        types::INFRA,
        types::INFRA_EPHEMERAL,
    )))
}

fn by_role(role: Role, kind: &str, verb: Verb) -> Result<(), Status> {
    match kind {
        types::MACHINES | types::API_CONFIGS | types::CONNECTION_PARAMS => {
            at_least(role, Role::InfraProvider)?
        }
        types::RESOURCE_DEFINITIONS
        | types::NAMESPACES
        | types::FEATURES_CONFIGS
        | types::TALOS_VERSIONS
        | types::SYS_VERSIONS
        | types::CURRENT_USERS => {}
        types::MACHINE_REQUEST_SETS | types::LINKS | types::CONFIG_PATCHES => {
            let needed = if verb == Verb::Read {
                Role::Reader
            } else {
                Role::Operator
            };
            at_least(role, needed)?;
            return Ok(());
        }
        _ => return Err(Status::permission_denied("no access is permitted")),
    }
    if verb == Verb::Read {
        Ok(())
    } else {
        Err(Status::permission_denied("only read access is permitted"))
    }
}

fn at_least(role: Role, needed: Role) -> Result<(), Status> {
    if role >= needed {
        Ok(())
    } else {
        Err(Status::permission_denied(format!(
            "unauthorized: access denied: insufficient role: {:?}",
            role.name()
        )))
    }
}
