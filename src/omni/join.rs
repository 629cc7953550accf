//! What a machine needs to join, kept up to date: the provider's join config and the SideroLink API config,
//! or the connection parameters of an Omni before 1.0.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch as signal;
use tracing::{debug, warn};

use super::kinds::{ConnectionParams, Kind, ProviderJoinConfigs, ResourceDefinitions, SiderolinkApiConfigs};
use super::resource::Resource;
use super::state::{State, jittered};
use super::store::{OnChange, Store};
use crate::secret::Secret;

/// The only SideroLink API config, and the only connection parameters.
const CONFIG: &str = "siderolink-config";

/// What an Omni with provider join configs lists among the kinds it knows.
const PROVIDER_JOIN_CONFIGS: &str = "providerjoinconfigs.omni.sidero.dev";

/// The longest wait before Omni is asked again which kinds it knows.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The inputs of a join config, as Omni has them right now. Never stored: the token can rotate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinInputs {
    /// The machine API's advertised URL.
    pub api_url: String,
    /// The raw join token.
    pub token: Secret,
    /// Port of the event sink.
    pub events_port: i32,
    /// Port of the kernel log receiver.
    pub logs_port: i32,
    /// 2 where Omni has provider join configs, else 1.
    pub token_version: u8,
}

/// Whose tokens this Omni gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tokens {
    /// Each provider's own, version 2.
    Provider,
    /// The account's, version 1.
    Account,
}

/// Keeps the join inputs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Join {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    tokens: signal::Sender<Option<Tokens>>,
    join: Store<ProviderJoinConfigs>,
    api: Store<SiderolinkApiConfigs>,
    legacy: Store<ConnectionParams>,
}

impl Join {
    /// Knows nothing until it runs.
    #[must_use]
    pub fn new(state: State) -> Self {
        Self {
            inner: Arc::new(Inner {
                tokens: signal::Sender::new(None),
                join: Store::new(state.clone(), by_id),
                api: Store::new(state.clone(), by_id),
                legacy: Store::new(state.clone(), by_id),
                state,
            }),
        }
    }

    /// Watches for ever.
    pub async fn run(self) {
        let inner = &self.inner;
        let tokens = self.whose_tokens().await;
        debug!(?tokens, "join tokens");
        inner.tokens.send_replace(Some(tokens));
        // Nothing waits for these: whoever needs them looks at each pass.
        let quiet: OnChange = Arc::new(|_| {});
        match tokens {
            Tokens::Provider => {
                tokio::join!(
                    inner.join.clone().run(Arc::clone(&quiet)),
                    inner.api.clone().run(quiet)
                );
            }
            Tokens::Account => inner.legacy.clone().run(quiet).await,
        }
    }

    /// Asks until Omni answers.
    async fn whose_tokens(&self) -> Tokens {
        let mut wait = Duration::from_secs(1);
        loop {
            match self.inner.state.list::<ResourceDefinitions>(&[]).await {
                Ok(kinds) if kinds.iter().any(|kind| kind.id() == PROVIDER_JOIN_CONFIGS) => {
                    return Tokens::Provider;
                }
                // An Omni that knows no kind at all has not told the truth yet.
                Ok(kinds) if !kinds.is_empty() => return Tokens::Account,
                Ok(_) => warn!("Omni lists no kinds of resources, asking again"),
                Err(error) => warn!(%error, "cannot tell which join tokens Omni gives, asking again"),
            }
            tokio::time::sleep(jittered(wait)).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Waits until the inputs have been looked for once.
    pub async fn bootstrapped(&self) {
        let mut known = self.inner.tokens.subscribe();
        // It fails only when the sender is gone, and we hold it.
        let tokens = known
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|tokens| *tokens);
        match tokens {
            Some(Tokens::Account) => self.inner.legacy.bootstrapped().await,
            _ => {
                self.inner.join.bootstrapped().await;
                self.inner.api.bootstrapped().await;
            }
        }
    }

    /// The inputs of this moment; an error says which of them Omni does not have yet.
    pub fn inputs(&self) -> Result<JoinInputs, String> {
        let inner = &self.inner;
        match *inner.tokens.borrow() {
            None => Err("Omni has not told yet which join tokens it gives".to_owned()),
            Some(Tokens::Provider) => {
                let provider = inner.state.provider();
                let join = known(&inner.join, provider)?;
                let api = known(&inner.api, CONFIG)?;
                complete(JoinInputs {
                    api_url: api.spec.machine_api_advertised_url.clone(),
                    token: Secret::new(join.spec.join_token.clone()),
                    events_port: api.spec.events_port,
                    logs_port: api.spec.logs_port,
                    token_version: 2,
                })
            }
            Some(Tokens::Account) => {
                let params = known(&inner.legacy, CONFIG)?;
                complete(JoinInputs {
                    api_url: params.spec.api_endpoint.clone(),
                    token: Secret::new(params.spec.join_token.clone()),
                    events_port: params.spec.events_port,
                    logs_port: params.spec.logs_port,
                    token_version: 1,
                })
            }
        }
    }
}

/// What is in these stores is looked for by its ID.
#[expect(clippy::unnecessary_wraps, reason = "the shape that stores want")]
fn by_id<K: Kind>(resource: &Resource<K>) -> Option<String> {
    Some(resource.id().to_owned())
}

fn known<K: Kind>(store: &Store<K>, id: &str) -> Result<Arc<Resource<K>>, String> {
    store.get(id).ok_or_else(|| match store.is_bootstrapped() {
        true => format!("Omni has no {} {id} (yet)", K::NAME),
        false => format!("the {} {id} has not been read yet", K::NAME),
    })
}

fn complete(inputs: JoinInputs) -> Result<JoinInputs, String> {
    for (missing, what) in [
        (inputs.api_url.is_empty(), "machine API URL"),
        (inputs.token.expose().is_empty(), "join token"),
        (inputs.events_port <= 0, "events port"),
        (inputs.logs_port <= 0, "logs port"),
    ] {
        if missing {
            return Err(format!("Omni has no {what} for machines that join (yet)"));
        }
    }
    // Machines are made with it, by clouds that may quote what they are told.
    inputs.token.guard();
    Ok(inputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> JoinInputs {
        JoinInputs {
            api_url: "https://omni.example.com:8090/".into(),
            token: Secret::new("abcd"),
            events_port: 8091,
            logs_port: 8092,
            token_version: 2,
        }
    }

    #[test]
    fn whatever_is_missing_is_named() {
        assert_eq!(complete(inputs()), Ok(inputs()));
        type Spoil = fn(&mut JoinInputs);
        let spoil: [(Spoil, &str); 4] = [
            (|inputs| inputs.api_url.clear(), "URL"),
            (|inputs| inputs.token = Secret::default(), "join token"),
            (|inputs| inputs.events_port = 0, "events port"),
            (|inputs| inputs.logs_port = -1, "logs port"),
        ];
        for (spoil, named) in spoil {
            let mut inputs = inputs();
            spoil(&mut inputs);
            let error = complete(inputs).err().unwrap_or_default();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_debug_print_hides_the_token() {
        assert!(!format!("{:?}", inputs()).contains("abcd"));
    }
}
