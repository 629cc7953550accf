//! Omni's side of the world: the only code, with the sandbox, that knows gRPC and protobuf.

pub mod auth;
pub mod channel;
pub mod error;
pub mod join;
pub mod kinds;
pub mod management;
pub mod resource;
pub mod state;
pub mod store;
pub mod watch;
pub mod wire;

#[cfg(test)]
#[cfg(feature = "sandbox")]
mod tests;

pub use auth::{ServiceAccount, Signer};
pub use channel::{Dial, Settings, SettingsError, memory};
pub use error::{OmniError, OmniErrorKind};
pub use join::Join;
pub use kinds::Kind;
pub use management::Management;
pub use resource::{Metadata, Phase, RawSpec, Resource};
pub use state::State;
pub use store::Store;

use channel::Channels;
use kinds::{CurrentUserSpec, CurrentUsers};

/// Everything that a provider needs of Omni, signed in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Omni {
    /// COSI resources.
    pub state: State,
    /// Schematics and boot assets.
    pub management: Management,
    /// The key that signs, to look at and to replace.
    pub signer: Signer,
}

/// The role of a provider's service account.
const ROLE: &str = "InfraProvider";

/// Why we are not who we should be.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IdentityError {
    /// Omni did not tell.
    #[error(transparent)]
    Omni(#[from] OmniError),
    /// The key is another account's.
    #[error(
        "the service account key belongs to {found:?}, not to infra provider {provider:?}: set the provider \
         ID to the one that the key was made for, or make a key with \
         `omnictl infraprovider create {provider}`"
    )]
    Identity {
        /// Whose key it is.
        found: String,
        /// Our provider ID.
        provider: String,
    },
    /// The account's rights are not a provider's.
    #[error(
        "Omni gives this service account the role {found:?} instead of \"{ROLE}\": the Omni account is \
         suspended, or the service account was not made by `omnictl infraprovider create {provider}`"
    )]
    Role {
        /// The role that Omni told.
        found: String,
        /// Our provider ID.
        provider: String,
    },
}

impl Omni {
    /// Checks the settings and prepares everything; connects to nothing yet. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// Says which setting cannot be used, and why.
    pub fn new(settings: &Settings, dial: Dial) -> Result<Self, SettingsError> {
        let channels = Channels::new(settings, &dial)?;
        let state = State::new(&channels, &settings.provider_id);
        Ok(Self {
            management: Management::new(&channels, state.clone()),
            signer: channels.signer,
            state,
        })
    }

    /// Asks Omni who we are, and checks it: with another role reads are unfiltered, and look as if everything
    /// were ours or nothing existed.
    ///
    /// # Errors
    ///
    /// Omni's refusal, or what is wrong with the account. An Omni that cannot tell is believed.
    pub async fn who_am_i(&self) -> Result<(), IdentityError> {
        who_am_i(&self.state).await
    }
}

/// As [`Omni::who_am_i`].
///
/// # Errors
///
/// As there.
pub async fn who_am_i(state: &State) -> Result<(), IdentityError> {
    match state.get::<CurrentUsers>("current").await {
        Ok(Some(user)) => check_identity(&user.spec, state.provider()),
        Ok(None) => Ok(()),
        // An older Omni has no such resource, or lets only people read it; what cannot be told now will show
        // at the first write.
        Err(error) if matches!(error.kind, OmniErrorKind::Invalid | OmniErrorKind::Unimplemented) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn check_identity(user: &CurrentUserSpec, provider: &str) -> Result<(), IdentityError> {
    let expected = format!("{provider}@infra-provider.serviceaccount.omni.sidero.dev");
    if user.identity != expected {
        return Err(IdentityError::Identity {
            found: user.identity.clone(),
            provider: provider.to_owned(),
        });
    }
    if user.role != ROLE {
        return Err(IdentityError::Role {
            found: user.role.clone(),
            provider: provider.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod identity_tests {
    use super::*;

    fn user(identity: &str, role: &str) -> CurrentUserSpec {
        CurrentUserSpec {
            identity: identity.into(),
            role: role.into(),
        }
    }

    #[test]
    fn only_our_own_account_with_a_providers_role_will_do() {
        let ours = "oxide@infra-provider.serviceaccount.omni.sidero.dev";
        assert!(check_identity(&user(ours, "InfraProvider"), "oxide").is_ok());
        assert!(matches!(
            check_identity(&user(ours, "Reader"), "oxide"),
            Err(IdentityError::Role { .. })
        ));
        assert!(matches!(
            check_identity(&user(ours, "InfraProvider"), "ganeti"),
            Err(IdentityError::Identity { .. })
        ));
        assert!(check_identity(&user("me@example.com", "InfraProvider"), "oxide").is_err());
    }
}
