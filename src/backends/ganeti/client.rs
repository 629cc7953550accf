//! Speaks HTTP to the RAPI of one cluster: one connection for each call, since the server closes it after every answer.
//!
//! RAPI takes JSON with a length, a content type without a charset, and no escapes in a path; it forks a child for each connection
//! and serves twenty at once.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::{Method, StatusCode};
use reqwest::redirect;
use serde_json::Value;
use tokio::sync::Semaphore;
use url::Url;

use super::KIND;
use super::failure::Failure;
use super::tls::{self, Pin};
use crate::cloud::{CloudError, ErrorKind};
use crate::media::Media;
use crate::net;
use crate::secret::Secret;

/// Longest wait for a connection, TLS included: with twenty clients RAPI accepts nobody until one has gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(45);
/// Longest wait for an answer. With its master daemon gone, RAPI itself waits 30 s before it says so.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// Calls at once: a fifth of what RAPI serves, so that people still get in.
const AT_ONCE: usize = 4;

/// How the cluster's certificate is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// By certificate authorities: the system's, and those of a PEM bundle.
    Authorities(Option<PathBuf>),
    /// It is this very certificate.
    Pinned(Pin),
    /// Not at all.
    Anybody,
}

/// Which cluster, and who asks.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address of the RAPI, for example `https://cluster.example:5080`. The cluster's own name follows its master.
    pub endpoint: String,
    /// RAPI user, with `write`.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// How the certificate is judged.
    pub trust: Trust,
    /// What the provider serves to nodes and machines itself. `None`: nothing.
    pub media: Option<Media>,
}

/// A client of one cluster.
pub(super) struct Client {
    http: reqwest::Client,
    endpoint: String,
    user: String,
    password: Arc<RwLock<Secret>>,
    permits: Semaphore,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("endpoint", &self.endpoint)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client. Nothing is sent.
    pub(super) fn new(settings: &Settings) -> Result<Self, CloudError> {
        let endpoint = settings.endpoint.trim_end_matches('/').to_owned();
        let url = Url::parse(&endpoint)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| refused(format!("endpoint {endpoint:?} is not an http or https address")))?;
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .pool_max_idle_per_host(0)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            // RAPI never redirects. Whoever does is not RAPI, and gets no password.
            .redirect(redirect::Policy::none());
        if net::is_loopback(&url) {
            // No proxy can reach what listens on this machine alone.
            builder = builder.no_proxy();
        }
        builder = match &settings.trust {
            Trust::Authorities(None) => builder,
            Trust::Authorities(Some(path)) => builder.tls_certs_merge(net::authorities(path, refused)?),
            Trust::Pinned(pin) => {
                let config = tls::pinned(*pin)
                    .map_err(|error| refused("TLS cannot be set up".to_owned()).with_source(error))?;
                builder.tls_backend_preconfigured(config)
            }
            Trust::Anybody => builder.tls_danger_accept_invalid_certs(true),
        };
        let http = builder
            .build()
            .map_err(|error| refused("the HTTP client cannot be built".to_owned()).with_source(error))?;
        Ok(Self {
            http,
            endpoint,
            user: settings.user.clone(),
            password: Arc::new(RwLock::new(settings.password.clone())),
            permits: Semaphore::new(AT_ONCE),
        })
    }

    /// Where the password is: what is put there is sent from then on.
    pub(super) fn password(&self) -> Arc<RwLock<Secret>> {
        self.password.clone()
    }

    /// Makes one call and returns the answer's JSON.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await.ok();
        let password = self
            .password
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.endpoint))
            .query(query)
            .basic_auth(&self.user, Some(password.expose()));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(Failure::unreachable)?;
        let status = answer.status();
        let text = answer.bytes().await.map_err(Failure::unreachable)?;
        let json = serde_json::from_slice(&text);
        match (status, json) {
            (StatusCode::OK, Ok(json)) => Ok(json),
            (StatusCode::OK, Err(_)) => Err(Failure::not_rapi()),
            (status, json) => Err(Failure::of_status(status, json.ok().as_ref())),
        }
    }

    /// Reads.
    pub(super) async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.call(Method::GET, path, &[], None).await
    }

    /// Reads fields of many things at once: rows of values, in the order of the fields.
    pub(super) async fn query(
        &self,
        what: &str,
        fields: &[&str],
        filter: Value,
    ) -> Result<Vec<Vec<Value>>, Failure> {
        let body = serde_json::json!({"fields": fields, "filter": filter});
        let answer = self
            .call(Method::PUT, &format!("/2/query/{what}"), &[], Some(&body))
            .await?;
        // Each cell is a pair of a code and a value; the value is null where the code is not 0, the one for "normal".
        let rows = answer
            .get("data")
            .and_then(Value::as_array)
            .ok_or_else(Failure::not_rapi)?;
        rows.iter()
            .map(|row| {
                let cells = row.as_array()?;
                cells
                    .iter()
                    .map(|cell| cell.get(1).cloned())
                    .collect::<Option<Vec<Value>>>()
                    .filter(|cells| cells.len() == fields.len())
            })
            .collect::<Option<_>>()
            .ok_or_else(Failure::not_rapi)
    }

    /// Submits a change and returns the ID of its job.
    pub(super) async fn submit(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<u64, Failure> {
        let answer = self.call(method, path, &[], body).await?;
        // A number; the manual shows text.
        let id = answer.as_u64().or_else(|| answer.as_str()?.parse().ok());
        id.ok_or_else(Failure::not_rapi)
    }
}

fn refused(what: String) -> CloudError {
    CloudError::new(KIND, "use the settings", ErrorKind::Rejected, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoint: &str) -> Settings {
        Settings {
            endpoint: endpoint.to_owned(),
            user: "omni".to_owned(),
            password: Secret::new("hush"),
            trust: Trust::Authorities(None),
            media: None,
        }
    }

    #[test]
    fn an_endpoint_is_an_address_with_or_without_a_slash() {
        for (endpoint, base) in [
            (
                "https://cluster.example:5080",
                Some("https://cluster.example:5080"),
            ),
            (
                "https://cluster.example:5080/",
                Some("https://cluster.example:5080"),
            ),
            ("http://127.0.0.1:5080", Some("http://127.0.0.1:5080")),
            ("cluster.example:5080", None),
            ("", None),
        ] {
            let client = Client::new(&settings(endpoint)).ok();
            assert_eq!(
                client.as_ref().map(|client| client.endpoint.as_str()),
                base,
                "{endpoint}"
            );
        }
    }

    #[test]
    fn nothing_shows_the_password() {
        let settings = settings("https://cluster.example");
        let shown = format!("{settings:?} {:?}", Client::new(&settings));
        assert!(!shown.contains("hush"), "{shown}");
    }
}
