//! Builds the HTTP client of one silo, and sends the two requests that the crate's own methods do not serve: one must not be logged,
//! and one is too large to be copied.
//!
//! The crate's own `ClientConfig` is not used: it panics where there is no home directory, gives every call
//! 15 seconds, and reads environment variables that are none of its business here.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use oxide::{Client, ClientInfo, ResponseValue, types};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{RequestBuilder, Response, StatusCode, redirect};
use uuid::Uuid;

use super::convert::KIND;
use super::failure::Failure;
use crate::cloud::{CloudError, ErrorKind};
use crate::net;
use crate::secret::Secret;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for an answer: create, start and finalize are sagas that nexus runs inside the request. The
/// crate's 15 s would give up on most of them. (The Go client waits 600 s.)
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// Which silo, and who asks.
#[derive(Clone)]
pub struct Settings {
    /// Address of the silo's API, for example `https://silo.sys.rack.example`.
    pub host: String,
    /// API token. It decides silo and rights.
    pub token: Secret,
    /// PEM bundle of certificate authorities to trust besides the system's.
    pub ca_bundle: Option<PathBuf>,
    /// The provider ID that this daemon serves: it is part of every mark.
    pub provider_id: String,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("host", &self.host)
            .field("token", &self.token)
            .field("ca_bundle", &self.ca_bundle)
            .field("provider_id", &self.provider_id)
            .finish()
    }
}

/// The API clients of a silo. Each has connections of its own.
#[derive(Clone)]
pub(super) struct Clients {
    pub(super) calls: Arc<Client>,
    /// For lists of a whole project. A connection keeps the largest buffer that it ever needed, and few connections see a list.
    pub(super) lists: Arc<Client>,
}

impl Clients {
    /// # Errors
    ///
    /// As [`build`].
    pub(super) fn new(settings: &Settings) -> Result<Self, CloudError> {
        Ok(Self {
            calls: Arc::new(build(settings)?),
            lists: Arc::new(build(settings)?),
        })
    }
}

/// An API client of a silo. Nothing is sent.
///
/// # Errors
///
/// `Rejected`, naming the setting that cannot be used: the host is no URL, the token no header value, the
/// bundle unreadable.
fn build(settings: &Settings) -> Result<Client, CloudError> {
    let host = settings.host.trim_end_matches('/');
    let url = url::Url::parse(host)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| refused(format!("host {host:?} is not an http or https address")))?;
    let mut bearer = HeaderValue::from_str(&format!("Bearer {}", settings.token.expose()))
        .map_err(|_| refused("the token has characters that no token has".to_owned()))?;
    bearer.set_sensitive(true);
    let mut builder = reqwest::Client::builder()
        .default_headers(HeaderMap::from_iter([(header::AUTHORIZATION, bearer)]))
        .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
        .http1_only()
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(ANSWER_TIMEOUT)
        // The API never redirects. Whoever does is not the API, and gets no token.
        .redirect(redirect::Policy::none());
    if net::is_loopback(&url) {
        // No proxy can reach what listens on this machine alone.
        builder = builder.no_proxy();
    }
    if let Some(path) = &settings.ca_bundle {
        let certificates = net::authorities(path, refused)?;
        builder = builder.tls_certs_merge(certificates);
    }
    let client = builder
        .build()
        .map_err(|error| refused("the HTTP client cannot be built".to_owned()).with_source(error))?;
    Ok(Client::new_with_client(host, client))
}

fn refused(what: String) -> CloudError {
    CloudError::new(KIND, "use the settings", ErrorKind::Rejected, what)
}

/// Sends an instance create.
///
/// The crate's own method logs the first KiB of every body at debug level, and this body holds the join
/// token.
pub(super) async fn create_instance(
    client: &Client,
    project: &types::NameOrId,
    body: &types::InstanceCreate,
) -> Result<types::Instance, Failure> {
    let request = post(client, "/v1/instances")
        .query(&[("project", project.to_string())])
        .json(body);
    let response = answer(request, StatusCode::CREATED).await?;
    let created = ResponseValue::<types::Instance>::from_response::<types::Error>(response).await?;
    Ok(created.into_inner())
}

/// Writes blocks of an import to a disk.
///
/// The crate's own method takes the data as text and copies it into its body byte by byte, in search of what JSON escapes: the text
/// is base64, and there are hundreds of MiB of it.
pub(super) async fn write_blocks(
    client: &Client,
    disk: Uuid,
    offset: u64,
    blocks: &[u8],
) -> Result<(), Failure> {
    const HEAD: &str = r#"{"base64_encoded_data":""#;
    let mut body = String::with_capacity(HEAD.len() + blocks.len().div_ceil(3) * 4 + 40);
    body.push_str(HEAD);
    BASE64.encode_string(blocks, &mut body);
    body.push_str(&format!(r#"","offset":{offset}}}"#));
    let request = post(client, &format!("/v1/disks/{disk}/bulk-write"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(body);
    answer(request, StatusCode::NO_CONTENT).await?;
    Ok(())
}

fn post(client: &Client, path: &str) -> RequestBuilder {
    client
        .client()
        .post(format!("{}{path}", client.baseurl()))
        .header(header::ACCEPT, "application/json")
        .header(HeaderName::from_static("api-version"), Client::api_version())
}

/// The answer to a request, if it is the one that is wanted.
async fn answer(request: RequestBuilder, wanted: StatusCode) -> Result<Response, Failure> {
    let response = request
        .send()
        .await
        .map_err(oxide::Error::<types::Error>::CommunicationError)?;
    let error = match response.status() {
        status if status == wanted => return Ok(response),
        status if status.is_client_error() || status.is_server_error() => {
            match ResponseValue::<types::Error>::from_response(response).await {
                Ok(told) => oxide::Error::ErrorResponse(told),
                Err(untold) => untold,
            }
        }
        _ => oxide::Error::UnexpectedResponse(response),
    };
    Err(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(host: &str) -> Settings {
        Settings {
            host: host.to_owned(),
            token: Secret::new("oxide-token-hush"),
            ca_bundle: None,
            provider_id: "oxide".to_owned(),
        }
    }

    #[test]
    fn a_host_is_an_address_with_or_without_a_slash() {
        for (host, base) in [
            ("https://silo.example", Some("https://silo.example")),
            ("https://silo.example/", Some("https://silo.example")),
            ("http://127.0.0.1:8080", Some("http://127.0.0.1:8080")),
            ("silo.example", None),
            ("ftp://silo.example", None),
            ("", None),
        ] {
            let client = build(&settings(host));
            assert_eq!(client.as_ref().ok().map(ClientInfo::baseurl), base, "{host}");
        }
    }

    #[test]
    fn nothing_shows_the_token() {
        let mut settings = settings("https://silo.example");
        let client = build(&settings).unwrap();
        let mut shown = format!("{settings:?} {client:?}");
        settings.token = Secret::new("hush\n");
        shown.push_str(&format!("{:?}", build(&settings).expect_err("no header value")));
        assert!(!shown.contains("hush"), "{shown}");
    }

    #[test]
    fn a_bundle_that_cannot_be_used_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut settings = settings("https://silo.example");
        for path in [file.path().to_owned(), file.path().with_extension("gone")] {
            settings.ca_bundle = Some(path.clone());
            let error = build(&settings).expect_err("it must fail");
            assert_eq!(error.kind, ErrorKind::Rejected);
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
    }
}
