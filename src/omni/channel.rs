//! Opens signed gRPC channels to Omni: address rules, TLS, proxy, keep-alive, limits.
//!
//! Unary calls and watches have a channel each: Omni allows 250 streams per connection and lets further ones
//! hang, silently. Connections are made when they are needed, and made again after they broke; a call that
//! meets a broken one fails.
//!
//! *Cancel safety*: the background work of a channel ends when the last clone of it is dropped.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use http::uri::{Authority, Scheme};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_platform_verifier::Verifier;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_rustls::TlsConnector;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tower::ServiceExt;
use tracing::warn;
use url::Url;

use super::auth::{KeyError, ServiceAccount, Signer};
use crate::secret::Secret;

/// Omni's own limit for messages it receives, and what upstream's clients receive. tonic's default of 4 MiB
/// is too small for lists.
pub(super) const MESSAGE_LIMIT: usize = 32 * 1024 * 1024;

/// Upstream's clients ping after a minute of silence, and wait 20 seconds for the answer.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// For name resolution, proxy and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Window of an in-memory connection.
const DUPLEX_BYTES: usize = 256 * 1024;

/// Where Omni is, and who we are to it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `https://host[:port]`; with `http://` and `grpc://` in clear text.
    pub endpoint: String,
    /// The service account key, as Omni handed it out.
    pub key: Secret,
    /// The provider ID.
    pub provider_id: String,
    /// More roots to trust, in PEM, beside those of the operating system.
    pub ca_bundle: Option<PathBuf>,
    /// Whether Omni's certificate goes unchecked.
    pub insecure: bool,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No usable address.
    #[error("the Omni endpoint {endpoint:?} is no URL like https://omni.example.com: {reason}")]
    Endpoint {
        /// As configured.
        endpoint: String,
        /// What is wrong.
        reason: String,
    },
    /// No usable key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No usable provider ID.
    #[error(
        "the provider ID {0:?} is not usable: Omni takes 1 to 63 lower-case letters, digits and hyphens, the \
         first and the last no hyphen"
    )]
    ProviderId(String),
    /// The CA bundle cannot be read.
    #[error("the CA bundle {} cannot be used: {reason}", path.display())]
    CaBundle {
        /// As configured.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
}

/// How connections are made.
#[derive(Debug, Clone, Default)]
pub enum Dial {
    /// Over the network, through the proxy of the environment if there is one.
    #[default]
    Tcp,
    /// In memory, to a server in the same process: no sockets, so it runs under a paused clock.
    Memory(UnboundedSender<DuplexStream>),
}

/// A way to dial in memory, and what arrives: one stream per connection. While the receiver is closed,
/// connecting fails.
#[must_use]
pub fn memory() -> (Dial, UnboundedReceiver<DuplexStream>) {
    let (sender, receiver) = unbounded_channel();
    (Dial::Memory(sender), receiver)
}

/// A channel that signs every call.
pub(super) type Signed = InterceptedService<Channel, Signer>;

/// What the clients of Omni's services are made of.
#[derive(Debug, Clone)]
pub(super) struct Channels {
    /// For calls that end.
    pub(super) calls: Signed,
    /// For streams that do not.
    pub(super) watches: Signed,
    /// The key that both sign with.
    pub(super) signer: Signer,
    /// A client for image factories, which trusts the same roots.
    pub(super) factory: reqwest::Client,
}

impl Channels {
    /// Checks the settings and prepares the channels; connects to nothing yet. Needs a tokio runtime.
    pub(super) fn new(settings: &Settings, dial: &Dial) -> Result<Self, SettingsError> {
        let provider = provider_header(&settings.provider_id)?;
        let account = ServiceAccount::parse(&settings.key)?;
        let target = Target::parse(&settings.endpoint)?;
        let roots = Roots::needed(settings, dial, &target);
        let tls = tls_config(settings.ca_bundle.as_deref(), roots)?;
        let factory = reqwest::Client::builder()
            .tls_backend_preconfigured(tls.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|error| SettingsError::Tls(chain(&error)))?;
        let connector = match dial {
            Dial::Memory(peers) => Connector::Memory(peers.clone()),
            Dial::Tcp => {
                let tcp = Tcp::new(target.clone(), tls, settings.insecure, &Matcher::from_env())?;
                Connector::Tcp(Arc::new(tcp))
            }
        };
        let calls = target.open(connector.clone())?;
        let watches = target.open(connector)?;
        let signer = Signer::new(account, provider, calls.clone());
        Ok(Self {
            calls: InterceptedService::new(calls, signer.clone()),
            watches: InterceptedService::new(watches, signer.clone()),
            signer,
            factory,
        })
    }
}

/// Whether Omni takes it for a provider ID: a DNS label.
#[must_use]
pub fn is_provider_id(id: &str) -> bool {
    (1..=63).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !id.starts_with('-')
        && !id.ends_with('-')
}

/// A provider ID as a header value.
fn provider_header(id: &str) -> Result<MetadataValue<Ascii>, SettingsError> {
    let error = || SettingsError::ProviderId(id.to_owned());
    if !is_provider_id(id) {
        return Err(error());
    }
    MetadataValue::try_from(id).map_err(|_| error())
}

/// An endpoint, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    tls: bool,
    host: String,
    port: u16,
    authority: Authority,
}

impl Target {
    /// `https` is TLS, everything else clear text; path and query are ignored.
    fn parse(endpoint: &str) -> Result<Self, SettingsError> {
        let refuse = |reason: &str| SettingsError::Endpoint {
            endpoint: endpoint.to_owned(),
            reason: reason.to_owned(),
        };
        let url = Url::parse(endpoint.trim()).map_err(|error| refuse(&error.to_string()))?;
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| refuse("it names no host"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(SettingsError::Endpoint {
                endpoint: "<redacted>".to_owned(),
                reason: "it holds a user name or password, which Omni has no use for".to_owned(),
            });
        }
        let tls = url.scheme() == "https";
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        Ok(Self {
            tls,
            host: host.to_owned(),
            port: url.port().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.parse().map_err(|_| refuse("its host is not one"))?,
        })
    }

    fn uri(&self, scheme: Scheme) -> Result<Uri, SettingsError> {
        Uri::builder()
            .scheme(scheme)
            .authority(format!("{}:{}", self.host, self.port))
            .path_and_query("/")
            .build()
            .map_err(|error| SettingsError::Endpoint {
                endpoint: self.authority.to_string(),
                reason: error.to_string(),
            })
    }

    fn scheme(&self) -> Scheme {
        if self.tls { Scheme::HTTPS } else { Scheme::HTTP }
    }

    /// Whether the host is this very machine; such a host is never reached through a proxy.
    fn is_loopback(&self) -> bool {
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        bare.eq_ignore_ascii_case("localhost")
            || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    fn open(&self, connector: Connector) -> Result<Channel, SettingsError> {
        let refuse = |error: &dyn Error| SettingsError::Endpoint {
            endpoint: self.authority.to_string(),
            reason: error.to_string(),
        };
        let origin = Uri::builder()
            .scheme(self.scheme())
            .authority(self.authority.clone())
            .path_and_query("/")
            .build()
            .map_err(|error| refuse(&error))?;
        // The connector does the TLS, so tonic is told a clear-text address; what Omni sees is the origin.
        let endpoint = Endpoint::new(self.uri(Scheme::HTTP)?)
            .and_then(|endpoint| {
                endpoint.user_agent(concat!("omni-infra-provider/", env!("CARGO_PKG_VERSION")))
            })
            .map_err(|error| refuse(&error))?
            .origin(origin)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            // A list of thousands is megabytes: the default window of 64 KiB would make it crawl.
            .initial_stream_window_size(Some(4 * 1024 * 1024))
            .initial_connection_window_size(Some(8 * 1024 * 1024));
        Ok(
            endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let connector = connector.clone();
                async move { connector.connect().await.map(TokioIo::new) }
            })),
        )
    }
}

/// A connected stream of whatever sort.
trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}
type BoxStream = Pin<Box<dyn Stream>>;
type Connecting = Pin<Box<dyn Future<Output = io::Result<TokioIo<BoxStream>>> + Send>>;

#[derive(Clone)]
enum Connector {
    Tcp(Arc<Tcp>),
    Memory(UnboundedSender<DuplexStream>),
}

impl Connector {
    async fn connect(self) -> io::Result<BoxStream> {
        match self {
            Self::Tcp(tcp) => tcp.connect().await,
            Self::Memory(peers) => {
                let (ours, theirs) = tokio::io::duplex(DUPLEX_BYTES);
                peers
                    .send(theirs)
                    .map_err(|_| io::Error::new(io::ErrorKind::ConnectionRefused, "nobody listens"))?;
                Ok(Box::pin(ours))
            }
        }
    }
}

/// Connects over the network: directly, or through an HTTP proxy; then TLS, where the endpoint asks for it.
struct Tcp {
    target: Target,
    uri: Uri,
    proxy: Option<Intercept>,
    omni: Option<TlsConnector>,
    to_proxy: TlsConnector,
}

impl Tcp {
    fn new(
        target: Target,
        tls: ClientConfig,
        insecure: bool,
        proxies: &Matcher,
    ) -> Result<Self, SettingsError> {
        let uri = target.uri(target.scheme())?;
        let proxy = match target.is_loopback() {
            true => None,
            false => proxies.intercept(&uri),
        };
        if let Some(proxy) = &proxy
            && !matches!(proxy.uri().scheme_str(), Some("http" | "https"))
        {
            return Err(SettingsError::Endpoint {
                endpoint: target.authority.to_string(),
                reason: format!(
                    "its proxy {} is neither http nor https: change the proxy variables, or name the host in \
                     NO_PROXY",
                    proxy.uri()
                ),
            });
        }
        let to_proxy = TlsConnector::from(Arc::new(tls.clone()));
        let omni = target.tls.then(|| {
            let mut tls = tls;
            tls.alpn_protocols = vec![b"h2".to_vec()];
            if insecure {
                let verifier = Unverified(Arc::clone(tls.crypto_provider()));
                tls.dangerous().set_certificate_verifier(Arc::new(verifier));
            }
            TlsConnector::from(Arc::new(tls))
        });
        Ok(Self {
            target,
            uri,
            proxy,
            omni,
            to_proxy,
        })
    }

    async fn connect(self: Arc<Self>) -> io::Result<BoxStream> {
        let stream = match self.proxy.clone() {
            None => open(self.uri.clone()).await?,
            Some(proxy) => tunnel(proxy, self.to_proxy.clone(), self.uri.clone()).await?,
        };
        let Some(tls) = &self.omni else {
            return Ok(stream);
        };
        let stream = tls.connect(server_name(&self.target.host)?, stream).await?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            let words = "the server, or the proxy before it, does not offer HTTP/2 (ALPN h2)";
            return Err(io::Error::other(words));
        }
        Ok(Box::pin(stream))
    }
}

/// Asks the proxy for a tunnel with CONNECT.
async fn tunnel(proxy: Intercept, tls: TlsConnector, target: Uri) -> io::Result<BoxStream> {
    let mut tunnel = Tunnel::new(proxy.uri().clone(), ToProxy(tls));
    if let Some(auth) = proxy.basic_auth() {
        tunnel = tunnel.with_auth(auth.clone());
    }
    let refused = format!("the proxy {}", proxy.uri());
    match tunnel.oneshot(target).await {
        Ok(stream) => Ok(stream.into_inner()),
        Err(error) => Err(io::Error::other(format!("{refused}: {}", chain(&error)))),
    }
}

/// Connects to the proxy itself, in TLS where its address says https.
struct ToProxy(TlsConnector);

impl tower::Service<Uri> for ToProxy {
    type Response = TokioIo<BoxStream>;
    type Error = io::Error;
    type Future = Connecting;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Connecting {
        let tls = self.0.clone();
        Box::pin(async move {
            let host = uri.host().unwrap_or_default().to_owned();
            let encrypted = uri.scheme() == Some(&Scheme::HTTPS);
            let stream = open(uri).await?;
            let stream: BoxStream = match encrypted {
                true => Box::pin(tls.connect(server_name(&host)?, stream).await?),
                false => stream,
            };
            Ok(TokioIo::new(stream))
        })
    }
}

/// A TCP connection to the host and port of an address, whatever its scheme.
async fn open(uri: Uri) -> io::Result<BoxStream> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(KEEP_ALIVE));
    let stream = tcp
        .oneshot(uri)
        .await
        .map_err(|error| io::Error::other(chain(&error)))?;
    Ok(Box::pin(stream.into_inner()))
}

fn server_name(host: &str) -> io::Result<ServerName<'static>> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(bare.to_owned()).map_err(io::Error::other)
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many wrappers print their source already.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// What becomes of a machine without a single root certificate, such as a bare container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Roots {
    /// Omni cannot be reached without them.
    Required,
    /// Nothing but an image factory may need them: it is then not trusted.
    Useful,
    /// Nobody is reached over the network; reading hundreds of roots would only cost time.
    Unused,
}

impl Roots {
    fn needed(settings: &Settings, dial: &Dial, target: &Target) -> Self {
        match dial {
            Dial::Memory(_) => Self::Unused,
            Dial::Tcp if target.tls && !settings.insecure => Self::Required,
            Dial::Tcp => Self::Useful,
        }
    }
}

/// TLS as everywhere in this program: aws-lc-rs, the roots of the operating system, and the bundle.
fn tls_config(ca_bundle: Option<&Path>, needed: Roots) -> Result<ClientConfig, SettingsError> {
    let refuse = |error: rustls::Error| SettingsError::Tls(error.to_string());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(refuse)?;
    let extra = ca_bundle.map(read_bundle).transpose()?.unwrap_or_default();
    let verifier = match needed {
        Roots::Unused => None,
        _ => match Verifier::new_with_extra_roots(extra, provider) {
            Ok(verifier) => Some(verifier),
            Err(error) if needed == Roots::Required => return Err(refuse(error)),
            Err(error) => {
                warn!(%error, "no server that speaks TLS will be trusted");
                None
            }
        },
    };
    Ok(match verifier {
        Some(verifier) => config
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth(),
        None => config
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth(),
    })
}

fn read_bundle(path: &Path) -> Result<Vec<CertificateDer<'static>>, SettingsError> {
    let refuse = |reason: String| SettingsError::CaBundle {
        path: path.to_owned(),
        reason,
    };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| refuse(chain(&error)))?;
    if certificates.is_empty() {
        return Err(refuse("it holds no PEM certificate".to_owned()));
    }
    Ok(certificates)
}

/// Accepts any certificate: what `insecure` asks for.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(tcp) => write!(f, "Connector({})", tcp.target.authority),
            Self::Memory(_) => f.write_str("Connector(memory)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::ServerConfig;
    use rustls::pki_types::PrivateKeyDer;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinSet;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const CERTIFICATE: &str = include_str!("testdata/tls.pem");

    fn parts(endpoint: &str) -> (bool, String, u16, String) {
        let target = Target::parse(endpoint).unwrap();
        (target.tls, target.host, target.port, target.authority.to_string())
    }

    #[test]
    fn the_scheme_decides_on_tls_and_port() {
        let omni = || "omni.example.com".to_owned();
        assert_eq!(parts("https://omni.example.com"), (true, omni(), 443, omni()));
        assert_eq!(
            parts("https://omni.example.com:8443/path?query"),
            (true, omni(), 8443, "omni.example.com:8443".to_owned())
        );
        assert_eq!(parts("http://omni.example.com"), (false, omni(), 80, omni()));
        assert_eq!(
            parts("grpc://omni.example.com:8080"),
            (false, omni(), 8080, "omni.example.com:8080".to_owned())
        );
        assert_eq!(parts(" h2c://omni.example.com\n"), (false, omni(), 80, omni()));
        assert_eq!(
            parts("https://[::1]:8099"),
            (true, "[::1]".to_owned(), 8099, "[::1]:8099".to_owned())
        );
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_hint() {
        for endpoint in [
            "",
            "omni.example.com",
            "omni.example.com:443",
            "https://",
            "/run/omni.sock",
        ] {
            let error = Target::parse(endpoint).unwrap_err().to_string();
            assert!(error.contains("https://omni.example.com"), "{error}");
        }
        let error = Target::parse("https://me:geheim@omni.example.com")
            .unwrap_err()
            .to_string();
        assert!(!error.contains("geheim"), "{error}");
    }

    #[test]
    fn a_provider_id_is_a_dns_label() {
        for id in ["oxide", "a", "oxide-2", &"x".repeat(63)] {
            assert!(provider_header(id).is_ok(), "{id}");
        }
        for id in [
            "",
            "Oxide",
            "-oxide",
            "oxide-",
            "ox ide",
            "ox.ide",
            &"x".repeat(64),
        ] {
            assert!(provider_header(id).is_err(), "{id}");
        }
    }

    fn proxied(endpoint: &str, proxies: &Matcher) -> Result<Option<String>, SettingsError> {
        let tls = tls_config(None, Roots::Unused)?;
        let tcp = Tcp::new(Target::parse(endpoint)?, tls, false, proxies)?;
        Ok(tcp.proxy.map(|proxy| proxy.uri().to_string()))
    }

    #[test]
    fn the_proxy_of_the_environment_is_used_but_never_for_loopback() {
        let proxies = Matcher::builder()
            .all("http://proxy:3128")
            .no("internal.example.com")
            .build();
        let proxy = Some("http://proxy:3128/".to_owned());
        assert_eq!(proxied("https://omni.example.com", &proxies).unwrap(), proxy);
        assert_eq!(proxied("grpc://omni.example.com", &proxies).unwrap(), proxy);
        for direct in [
            "https://omni.internal.example.com",
            "https://localhost:8099",
            "https://127.1.2.3",
            "https://[::1]:8099",
        ] {
            assert_eq!(proxied(direct, &proxies).unwrap(), None, "{direct}");
        }
        let socks = Matcher::builder().all("socks5://proxy:1080").build();
        let error = proxied("https://omni.example.com", &socks)
            .unwrap_err()
            .to_string();
        assert!(error.contains("NO_PROXY"), "{error}");
    }

    #[test]
    fn a_ca_bundle_without_certificates_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = tls_config(Some(file.path()), Roots::Required)
            .unwrap_err()
            .to_string();
        assert!(error.contains("no PEM certificate"), "{error}");
        let error = tls_config(Some(Path::new("/nowhere/ca.pem")), Roots::Unused)
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/ca.pem"), "{error}");
    }

    /// A TLS server on loopback that echoes; its port. The certificate and key in `testdata/` are of no use
    /// elsewhere.
    async fn echo(servers: &mut JoinSet<()>, alpn: &[&str]) -> u16 {
        let certificates = vec![CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("testdata/tls.key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        listen(servers, move |stream| {
            let acceptor = acceptor.clone();
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    let (mut read, mut write) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                }
            }
        })
        .await
    }

    /// A proxy that leads every CONNECT with the right password to one port, whatever host is asked for.
    async fn proxy(servers: &mut JoinSet<()>, to: u16) -> u16 {
        listen(servers, move |mut stream| async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            let allowed = head.contains("Proxy-Authorization: Basic bWU6cHc=");
            if !head.starts_with("CONNECT omni.test:443 ") || !allowed {
                let _ = stream.write_all(b"HTTP/1.1 407 Nope\r\n\r\n").await;
                return;
            }
            let mut upstream = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
        })
        .await
    }

    async fn listen<F: Future<Output = ()> + Send + 'static>(
        servers: &mut JoinSet<()>,
        serve: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        servers.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream));
            }
        });
        port
    }

    /// Connects, and exchanges a few bytes.
    async fn exchange(endpoint: &str, trusted: bool, insecure: bool, proxies: &Matcher) -> io::Result<()> {
        let mut bundle = tempfile::NamedTempFile::new()?;
        std::io::Write::write_all(&mut bundle, CERTIFICATE.as_bytes())?;
        let tls = tls_config(trusted.then_some(bundle.path()), Roots::Required).unwrap();
        let tcp = Tcp::new(Target::parse(endpoint).unwrap(), tls, insecure, proxies).unwrap();
        let mut stream = Connector::Tcp(Arc::new(tcp)).connect().await?;
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        assert_eq!(&answer, b"ping");
        Ok(())
    }

    #[tokio::test]
    async fn tls_trusts_the_bundle_or_whatever_there_is_if_told_so() {
        let mut servers = JoinSet::new();
        let direct = Matcher::builder().build();
        let endpoint = format!("https://localhost:{}", echo(&mut servers, &["h2"]).await);
        exchange(&endpoint, true, false, &direct).await.unwrap();
        exchange(&endpoint, false, true, &direct).await.unwrap();
        let error = exchange(&endpoint, false, false, &direct)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("certificate"), "{error}");
        let wrong_name = endpoint.replace("localhost", "127.0.0.1");
        let error = exchange(&wrong_name, true, false, &direct)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("not valid for name"), "{error}");
    }

    #[tokio::test]
    async fn a_server_without_http_2_is_named_as_such() {
        let mut servers = JoinSet::new();
        let direct = Matcher::builder().build();
        let endpoint = format!("https://localhost:{}", echo(&mut servers, &[]).await);
        let error = exchange(&endpoint, true, false, &direct)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("HTTP/2"), "{error}");
    }

    #[tokio::test]
    async fn a_tunnel_leads_through_the_proxy() {
        let mut servers = JoinSet::new();
        let behind = echo(&mut servers, &["h2"]).await;
        let port = proxy(&mut servers, behind).await;
        let through = |user: &str| {
            Matcher::builder()
                .all(format!("http://{user}127.0.0.1:{port}"))
                .build()
        };
        exchange("https://omni.test", true, false, &through("me:pw@"))
            .await
            .unwrap();
        let error = exchange("https://omni.test", true, false, &through(""))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("proxy authorization required"), "{error}");
        assert!(error.contains(&port.to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_closed_in_memory_listener_refuses() {
        let (dial, receiver) = memory();
        let Dial::Memory(peers) = dial else {
            return;
        };
        let connector = Connector::Memory(peers);
        assert!(connector.clone().connect().await.is_ok());
        drop(receiver);
        assert!(connector.connect().await.is_err());
    }
}
