//! Turns the address of an image into a stream of its decompressed bytes, hashed, in bounded memory.
//!
//! *Guarantees.* The end is reported only when the whole body came and the format's own checksums agreed: a
//! cut-off or damaged download is an error, never a short image. No error and no log holds the address or a
//! header: both may be secrets. A header goes to the host it was meant for and to no other, wherever that one
//! redirects.
//!
//! *Time.* There is no limit on the whole: a slow line is no fault. A body that stands still is given up; where the server names
//! the version of the body (a strong `ETag`), it is asked for the rest. Otherwise the body is asked for anew, and what had come of
//! it is passed over, if its hash is the same: whoever unpacks and uploads goes on where it was.
//!
//! *Cancel safety.* Dropping a stream closes its connection. Nothing is kept on disk.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use sha2::{Digest, Sha256};
use url::Url;

use crate::cloud::{BoxFuture, CloudError, ErrorKind, ImageSource, ImageStream, Result};
use crate::machine::observed::Portion;
use crate::net;
use crate::secret::Secret;

use super::decode::{Decoder, Format};

/// Who failed, in errors: no cloud, but shown in the same place.
const FACTORY: &str = "image factory";
const VERB: &str = "download image";
/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for the first byte: the factory may have to build the image first, which takes it minutes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// Most redirects on the way to the image: the factory sends to its object storage, and that seldom any
/// further.
const REDIRECTS: usize = 10;
/// How often one body is asked for its rest after it broke off.
const RESUMES: u32 = 5;
/// How often one stream begins anew where the rest of a body cannot be had.
const RESTARTS: u32 = 2;

/// Where an image is right now.
#[derive(Debug, Clone)]
pub struct Location {
    /// Its address. It may hold credentials.
    pub url: Secret,
    /// Headers to send to that host.
    pub headers: Vec<(String, Secret)>,
    /// The format of what is there: `raw`, `iso`, `raw.xz`, `raw.zst` or `raw.gz`.
    pub format: String,
}

/// Finds out where the image is. Asked at each opening, since addresses can be short-lived.
pub type Locate = Arc<dyn Fn() -> BoxFuture<'static, Result<Location>> + Send + Sync>;

/// Bounds of a download.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most bytes of a decompressed image.
    pub max_bytes: u64,
    /// Longest time without a byte of the body.
    pub idle_timeout: Duration,
    /// Pause before the rest of a body that broke off is asked for; doubles each time.
    pub pause: Duration,
    /// PEM bundle of certificate authorities to trust besides the system's.
    pub ca_bundle: Option<PathBuf>,
}

impl Default for Settings {
    /// 16 GiB, thirteen times a nocloud image; a minute; a second.
    fn default() -> Self {
        Self {
            max_bytes: 16 * 1024 * 1024 * 1024,
            idle_timeout: Duration::from_secs(60),
            pause: Duration::from_secs(1),
            ca_bundle: None,
        }
    }
}

/// How far a download is, in bytes of the body as it comes over the wire.
#[derive(Debug, Default)]
pub struct Progress {
    received: AtomicU64,
    /// Zero: not known.
    total: AtomicU64,
}

impl Progress {
    /// How much has come since the last opening, if anything has.
    #[must_use]
    pub fn portion(&self) -> Option<Portion> {
        let received = self.received.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        (received > 0).then(|| Portion {
            received,
            total: Some(total).filter(|total| *total > 0),
        })
    }
}

/// An image at the factory: the source that an import opens.
#[derive(Clone)]
pub struct Download {
    locate: Locate,
    /// Which image, for errors.
    what: String,
    settings: Settings,
    progress: Arc<Progress>,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download")
            .field("what", &self.what)
            .field("settings", &self.settings)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl Download {
    /// A download of the image that a person knows as `what`. Nothing is asked for before it is opened.
    pub fn new(what: impl Into<String>, locate: Locate, settings: Settings) -> Self {
        Self {
            locate,
            what: what.into(),
            settings,
            progress: Arc::default(),
        }
    }

    /// How far the latest stream of this download is.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn error(&self, kind: ErrorKind, words: impl fmt::Display) -> CloudError {
        CloudError::new(FACTORY, VERB, kind, format!("{}: {words}", self.what))
    }

    async fn open(&self) -> Result<Arriving> {
        let (response, format) = self.begin().await?;
        let body = Body {
            download: self.clone(),
            response,
            rest: Bytes::new(),
            received: 0,
            hasher: Sha256::new(),
            resumes: 0,
            restarts: 0,
        };
        let chunks = stream::unfold(body, |mut body| async move {
            let chunk = body.next().await.transpose()?;
            Some((chunk.map_err(|fault| io::Error::other(Fault(fault))), body))
        });
        let decoder = self.decode(format, chunks)?;
        Ok(Arriving::new(self, decoder, format))
    }

    /// Waits before another try, twice as long after each.
    async fn pause(&self, tries: u32) {
        tokio::time::sleep(self.settings.pause * 2_u32.saturating_pow(tries)).await;
    }

    /// Asks for the whole body.
    async fn begin(&self) -> Result<(reqwest::Response, Format)> {
        let location = (self.locate)().await?;
        let format = Format::parse(&location.format).ok_or_else(|| {
            self.error(
                ErrorKind::Rejected,
                format!("format {:?} is not understood", location.format),
            )
        })?;
        let response = self.fetch(&location, None).await?;
        if !format.has_end() && !has_end(&response) {
            let words = "an uncompressed image without a length cannot be told from a cut-off one";
            return Err(self.error(ErrorKind::Rejected, words));
        }
        self.progress.received.store(0, Ordering::Relaxed);
        self.progress
            .total
            .store(response.content_length().unwrap_or(0), Ordering::Relaxed);
        Ok((response, format))
    }

    fn decode(
        &self,
        format: Format,
        body: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<Decoder> {
        Decoder::start(format, body).map_err(|error| {
            self.error(ErrorKind::Unavailable, "it cannot be unpacked")
                .with_source(error)
        })
    }

    /// The image in a body that came in such chunks; `None` for a format that is not known. For tests of bad input, without
    /// a server.
    #[doc(hidden)]
    #[must_use]
    pub fn decode_chunks(&self, format: &str, chunks: Vec<Bytes>) -> Option<Box<dyn ImageStream>> {
        let chunks = stream::iter(chunks.into_iter().map(Ok));
        let format = Format::parse(format)?;
        let decoder = self.decode(format, chunks).ok()?;
        Some(Box::new(Arriving::new(self, decoder, format)))
    }

    /// Asks for the body, or for the rest of it from a byte of a version on; follows redirects.
    async fn fetch(
        &self,
        location: &Location,
        rest: Option<(u64, &HeaderValue)>,
    ) -> Result<reqwest::Response> {
        let unusable = |what: &str| self.error(ErrorKind::Rejected, format!("{what} cannot be used"));
        let mut url = Url::parse(location.url.expose()).map_err(|_| unusable("its address"))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &location.headers {
            let name = HeaderName::try_from(name).map_err(|_| unusable("the name of a header"))?;
            let mut value =
                HeaderValue::from_str(value.expose()).map_err(|_| unusable("the value of a header"))?;
            value.set_sensitive(true);
            headers.append(name, value);
        }
        for _ in 0..=REDIRECTS {
            let mut request = self
                .client(&url)?
                .get(url.clone())
                .headers(headers.clone())
                // The body's own compression is part of its format; another one on top would only hide its
                // length.
                .header(header::ACCEPT_ENCODING, "identity");
            if let Some((from, version)) = rest {
                request = request
                    .header(header::RANGE, format!("bytes={from}-"))
                    .header(header::IF_RANGE, version);
            }
            let response = match tokio::time::timeout(ANSWER_TIMEOUT, request.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    let words = if error.is_connect() {
                        "no connection to the image factory"
                    } else {
                        "no answer from the image factory"
                    };
                    return Err(self
                        .error(ErrorKind::Unavailable, words)
                        .with_source(error.without_url()));
                }
                Err(_) => return Err(self.error(ErrorKind::Unavailable, "no answer in time")),
            };
            if !response.status().is_redirection() {
                return self.accept(response, rest.is_some());
            }
            let next = response
                .headers()
                .get(header::LOCATION)
                .and_then(|next| next.to_str().ok())
                .and_then(|next| url.join(next).ok())
                .ok_or_else(|| self.error(ErrorKind::Unexpected, "a redirect to nowhere"))?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(self.error(
                    ErrorKind::Rejected,
                    "a redirect from https to plain http is not followed",
                ));
            }
            if next.origin() != url.origin() {
                headers.clear();
            }
            url = next;
        }
        Err(self.error(ErrorKind::Unexpected, "too many redirects"))
    }

    /// What an answer means.
    fn accept(&self, response: reqwest::Response, rest: bool) -> Result<reqwest::Response> {
        let after = response
            .headers()
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.trim().parse().ok())
            .map(Duration::from_secs);
        let status = response.status();
        let (kind, words) = match status.as_u16() {
            // To the question for the rest too, if the server has another version by now, or knows no ranges.
            200 => return Ok(response),
            206 if rest => return Ok(response),
            400 | 404 | 410 => (
                ErrorKind::Rejected,
                "the image factory has no such image: is the Talos version or an extension wrong?",
            ),
            401 | 403 => (ErrorKind::Denied, "the image factory refuses us"),
            429 => (
                ErrorKind::Throttled { after },
                "the image factory asks us to slow down",
            ),
            408 | 500..=599 => (ErrorKind::Unavailable, "the image factory has a fault"),
            _ => (
                ErrorKind::Unexpected,
                "the image factory's answer is not understood",
            ),
        };
        Err(self.error(kind, format!("{words} (HTTP {})", StatusCode::as_u16(&status))))
    }

    fn client(&self, url: &Url) -> Result<reqwest::Client> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            // Followed here: the client would carry all headers but the well-known ones to the next host.
            .redirect(reqwest::redirect::Policy::none());
        if net::is_loopback(url) {
            // No proxy can reach what listens on this machine alone.
            builder = builder.no_proxy();
        }
        if let Some(path) = &self.settings.ca_bundle {
            let refused = |words: String| self.error(ErrorKind::Rejected, words);
            let certificates = net::authorities(path, refused)?;
            builder = builder.tls_certs_merge(certificates);
        }
        builder.build().map_err(|error| {
            self.error(ErrorKind::Unexpected, "the HTTP client cannot be built")
                .with_source(error)
        })
    }
}

impl ImageSource for Download {
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>> {
        Box::pin(async { Ok(Box::new(Self::open(self).await?) as Box<dyn ImageStream>) })
    }
}

/// The bytes of the body as they come.
struct Body {
    download: Download,
    response: reqwest::Response,
    /// Of what came, what was not handed out yet.
    rest: Bytes,
    /// Bytes handed out.
    received: u64,
    /// Of what was handed out.
    hasher: Sha256,
    resumes: u32,
    restarts: u32,
}

impl Body {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let bytes = loop {
            if !self.rest.is_empty() {
                break std::mem::take(&mut self.rest);
            }
            match self.read().await {
                Ok(Some(bytes)) => break bytes,
                Ok(None) => return Ok(None),
                Err(fault) => self.go_on(fault).await?,
            }
        };
        self.received = self.received.saturating_add(bytes.len() as u64);
        self.note(self.received);
        // Nothing that is compressed is longer than its image, unless it has no end.
        let most = self.download.settings.max_bytes;
        if self.received > most {
            return Err(self.download.error(
                ErrorKind::Rejected,
                format!("the download has more than {most} bytes, the most that an image may have"),
            ));
        }
        self.hasher.update(&bytes);
        Ok(Some(bytes))
    }

    async fn read(&mut self) -> Result<Option<Bytes>> {
        let idle = self.download.settings.idle_timeout;
        match tokio::time::timeout(idle, self.response.chunk()).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) => Err(self
                .download
                .error(ErrorKind::Unavailable, "the connection broke")
                .with_source(error.without_url())),
            Err(_) => Err(self.download.error(
                ErrorKind::Unavailable,
                format!("nothing came for {} seconds", idle.as_secs()),
            )),
        }
    }

    fn note(&self, received: u64) {
        self.download.progress.received.store(received, Ordering::Relaxed);
    }

    /// Goes on after the body broke off with that fault; the fault stays where that cannot be done.
    async fn go_on(&mut self, fault: CloudError) -> Result<()> {
        let mut whole = match self.resume(fault).await {
            Ok(None) => return Ok(()),
            Ok(Some(whole)) => Ok(whole),
            Err(fault) => Err(fault),
        };
        loop {
            let passed = match whole {
                Ok(response) => {
                    self.response = response;
                    self.pass_over().await
                }
                Err(fault) => Err(fault),
            };
            match passed {
                Ok(true) => return Ok(()),
                Ok(false) => {
                    let words = "it broke off, and is another image by now";
                    return Err(self.download.error(ErrorKind::Unavailable, words));
                }
                Err(fault) if is_passing(&fault) && self.restarts < RESTARTS => {}
                Err(fault) => return Err(fault),
            }
            self.download.pause(self.restarts).await;
            self.restarts += 1;
            self.resumes = 0;
            whole = self.download.begin().await.map(|(response, _)| response);
        }
    }

    /// Asks for the rest; gives the whole, where the server sends that instead.
    async fn resume(&mut self, fault: CloudError) -> Result<Option<reqwest::Response>> {
        // Without the name of its version, the rest may be that of another body.
        let version = self.response.headers().get(header::ETAG).cloned();
        let Some(version) = version.filter(|version| !version.as_bytes().starts_with(b"W/")) else {
            return Err(fault);
        };
        while self.resumes < RESUMES {
            self.download.pause(self.resumes).await;
            self.resumes += 1;
            let location = (self.download.locate)().await?;
            let rest = Some((self.received, &version));
            match self.download.fetch(&location, rest).await {
                Ok(response) if response.status() == StatusCode::OK => return Ok(Some(response)),
                Ok(response) if starts_at(&response, self.received) => {
                    self.response = response;
                    return Ok(None);
                }
                Ok(_) => return Err(fault),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(fault)
    }

    /// Reads as much as was handed out before; tells whether it is the same.
    async fn pass_over(&mut self) -> Result<bool> {
        let mut hasher = Sha256::new();
        let mut left = self.received;
        while left > 0 {
            let Some(mut bytes) = self.read().await? else {
                return Ok(false);
            };
            let part = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            hasher.update(bytes.split_to(part));
            left -= part as u64;
            self.note(self.received - left);
            self.rest = bytes;
        }
        Ok(hasher.finalize() == self.hasher.clone().finalize())
    }
}

/// Whether the same may succeed in a while.
fn is_passing(error: &CloudError) -> bool {
    matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Throttled { .. })
}

/// Whether the protocol itself tells a body's end from a broken connection.
fn has_end(response: &reqwest::Response) -> bool {
    response.content_length().is_some()
        || response.headers().contains_key(header::TRANSFER_ENCODING)
        || response.version() >= http::Version::HTTP_2
}

/// Whether a partial answer begins at that byte (`Content-Range: bytes 7-9/10`).
fn starts_at(response: &reqwest::Response, byte: u64) -> bool {
    response
        .headers()
        .get(header::CONTENT_RANGE)
        .and_then(|range| range.to_str().ok())
        .and_then(|range| range.strip_prefix("bytes "))
        .and_then(|range| range.split_once('-'))
        .is_some_and(|(start, _)| start.parse() == Ok(byte))
}

/// A failure of the body on its way through a decoder, which knows I/O errors alone.
#[derive(Debug)]
struct Fault(CloudError);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for Fault {}

/// The image, as it arrives.
struct Arriving {
    download: Download,
    decoder: Decoder,
    /// Of a chunk that was unpacked, what nobody took yet.
    rest: Bytes,
    length: u64,
    /// Fewest bytes that it can have.
    least: u64,
    /// After a failure no end may be reported, however often one asks.
    failed: bool,
}

impl Arriving {
    fn new(download: &Download, decoder: Decoder, format: Format) -> Self {
        Self {
            download: download.clone(),
            decoder,
            rest: Bytes::new(),
            length: 0,
            least: format.least(),
            failed: false,
        }
    }

    async fn next_or_fail(&mut self, size: usize) -> Result<Option<Bytes>> {
        if self.failed {
            return Err(self
                .download
                .error(ErrorKind::Unavailable, "the download failed before"));
        }
        let chunk = self.read(size).await;
        self.failed = chunk.is_err();
        chunk
    }

    async fn read(&mut self, size: usize) -> Result<Option<Bytes>> {
        let chunk = self.take(size).await.map_err(|error| self.explain(error))?;
        if chunk.is_empty() {
            if self.length == 0 {
                return Err(self.download.error(ErrorKind::Unavailable, "the image is empty"));
            }
            if self.length < self.least {
                let words = "the image is cut off, or is in another format than was said";
                return Err(self.download.error(ErrorKind::Unavailable, words));
            }
            return Ok(None);
        }
        self.length = self.length.saturating_add(chunk.len() as u64);
        let most = self.download.settings.max_bytes;
        if self.length > most {
            return Err(self.download.error(
                ErrorKind::Rejected,
                format!("the image has more than {most} bytes, the most that is allowed"),
            ));
        }
        Ok(Some(chunk))
    }

    /// So many bytes of what is unpacked; fewer only at the end.
    async fn take(&mut self, size: usize) -> io::Result<Bytes> {
        if self.rest.is_empty() {
            self.rest = self.decoder.next().await?;
        }
        if self.rest.len() >= size || self.rest.is_empty() {
            return Ok(self.rest.split_to(size.min(self.rest.len())));
        }
        let mut chunk = BytesMut::with_capacity(size);
        while chunk.len() < size {
            if self.rest.is_empty() {
                self.rest = self.decoder.next().await?;
            }
            if self.rest.is_empty() {
                break;
            }
            let part = self.rest.len().min(size - chunk.len());
            chunk.extend_from_slice(&self.rest.split_to(part));
        }
        Ok(chunk.freeze())
    }

    /// What an error of the decoder means.
    fn explain(&self, error: io::Error) -> CloudError {
        let error = match error.downcast::<Fault>() {
            Ok(Fault(fault)) => return fault,
            Err(error) => error,
        };
        let words = if error.kind() == io::ErrorKind::UnexpectedEof {
            "the image is cut off"
        } else {
            "the image is damaged, or is in another format than was said"
        };
        self.download
            .error(ErrorKind::Unavailable, words)
            .with_source(error)
    }
}

impl ImageStream for Arriving {
    fn next(&mut self, size: usize) -> BoxFuture<'_, Result<Option<Bytes>>> {
        Box::pin(self.next_or_fail(size))
    }

    fn sha256(&self) -> String {
        self.decoder.sha256()
    }
}

#[cfg(test)]
#[cfg(feature = "sandbox")]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read as _, Write as _};
    use std::sync::Mutex;

    use axum::Router;
    use axum::body::Body as HttpBody;
    use axum::extract::{Path, State};
    use axum::response::Response;
    use axum::routing::get;
    use futures_util::stream::StreamExt as _;
    use tokio::task::JoinSet;

    use super::*;

    /// A factory on loopback: files, and what it was asked.
    #[derive(Clone, Default)]
    struct Factory {
        files: Arc<BTreeMap<String, Vec<u8>>>,
        asked: Arc<Mutex<Vec<(String, HeaderMap)>>>,
        /// Serves until the last clone is gone.
        server: Arc<Mutex<JoinSet<()>>>,
    }

    impl Factory {
        async fn serve(files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> (Self, String) {
            let factory = Self {
                files: Arc::new(
                    files
                        .into_iter()
                        .map(|(name, file)| (name.to_owned(), file))
                        .collect(),
                ),
                ..Self::default()
            };
            let router = Router::new()
                .route("/file/{name}", get(file))
                .route("/status/{status}", get(status))
                .route("/to", get(redirect))
                .route("/breaks/{name}", get(breaks))
                .route("/stands/still", get(stands_still))
                .with_state(factory.clone());
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let base = format!("http://{}", listener.local_addr().unwrap());
            let server = async move { axum::serve(listener, router).await.unwrap() };
            factory.server.lock().unwrap().spawn(server);
            (factory, base)
        }

        fn note(&self, path: &str, headers: &HeaderMap) {
            self.asked
                .lock()
                .unwrap()
                .push((path.to_owned(), headers.clone()));
        }
    }

    async fn file(State(factory): State<Factory>, Path(name): Path<String>, headers: HeaderMap) -> Response {
        factory.note(&name, &headers);
        let file = factory.files.get(&name).unwrap().clone();
        Response::new(HttpBody::from(file))
    }

    async fn status(Path(status): Path<u16>) -> Response {
        Response::builder()
            .status(status)
            .header("retry-after", "7")
            .body(HttpBody::empty())
            .unwrap()
    }

    async fn redirect(State(factory): State<Factory>, uri: http::Uri, headers: HeaderMap) -> Response {
        factory.note("to", &headers);
        Response::builder()
            .status(302)
            .header("location", uri.query().unwrap())
            .body(HttpBody::empty())
            .unwrap()
    }

    /// Breaks off in the middle of the file at first, and gives the rest when asked for it.
    async fn breaks(
        State(factory): State<Factory>,
        Path(name): Path<String>,
        headers: HeaderMap,
    ) -> Response {
        factory.note(&name, &headers);
        let mut file = factory.files.get(&name).unwrap().clone();
        let is_first = factory.asked.lock().unwrap().len() == 1;
        let is_whole = matches!(name.as_str(), "once" | "in-full");
        if is_whole && !is_first {
            file = factory.files.get("again").cloned().unwrap_or(file);
            return Response::new(HttpBody::from(file));
        }
        let half = file.len() / 2;
        if let Some(range) = headers.get("range") {
            assert_eq!(range.to_str().unwrap(), format!("bytes={half}-"));
            assert_eq!(headers.get("if-range").unwrap(), "\"v1\"");
            return Response::builder()
                .status(206)
                .header(
                    "content-range",
                    format!("bytes {half}-{}/{}", file.len() - 1, file.len()),
                )
                .body(HttpBody::from(file[half..].to_vec()))
                .unwrap();
        }
        let head = Ok(Bytes::from(file[..half].to_vec()));
        // A pause, so that the first half leaves before the connection breaks.
        let broken = stream::iter([head]).chain(stream::once(async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Err(io::Error::other("broken on purpose"))
        }));
        let mut response = Response::builder();
        if matches!(name.as_str(), "image" | "in-full") {
            response = response.header("etag", "\"v1\"");
        }
        response.body(HttpBody::from_stream(broken)).unwrap()
    }

    async fn stands_still() -> Response {
        let head = stream::iter([Ok::<_, io::Error>(Bytes::from_static(b"a"))]);
        Response::new(HttpBody::from_stream(head.chain(stream::pending())))
    }

    fn image() -> Vec<u8> {
        let mut image: Vec<u8> = (0..3_000_000_u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        image.extend(vec![0; 500_001]);
        image
    }

    fn compress(format: &str, image: &[u8]) -> Vec<u8> {
        match format {
            "raw.xz" => liblzma::encode_all(image, 1).unwrap(),
            "raw.zst" => zstd::encode_all(image, 1).unwrap(),
            "raw.gz" => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(image).unwrap();
                encoder.finish().unwrap()
            }
            _ => image.to_vec(),
        }
    }

    /// As several threads pack it: in blocks, whose lengths stand before them.
    fn compress_in_blocks(image: &[u8], size: u64) -> Vec<u8> {
        let stream = liblzma::stream::MtStreamBuilder::new()
            .threads(2)
            .preset(0)
            .block_size(size)
            .encoder()
            .unwrap();
        let mut packed = Vec::new();
        liblzma::read::XzEncoder::new_stream(image, stream)
            .read_to_end(&mut packed)
            .unwrap();
        packed
    }

    fn download(url: String, format: &str, settings: Settings) -> Download {
        let format = format.to_owned();
        Download::new(
            "Talos 1.12.0 for nocloud",
            Arc::new(move || {
                let location = Location {
                    url: Secret::new(url.clone()),
                    headers: vec![("X-Factory-Key".to_owned(), Secret::new("hush-hush"))],
                    format: format.clone(),
                };
                Box::pin(async { Ok(location) })
            }),
            settings,
        )
    }

    async fn read(download: &Download) -> Result<(Vec<u8>, String)> {
        let mut stream = download.open().await?;
        let mut image = Vec::new();
        let mut last = usize::MAX;
        while let Some(chunk) = stream.next(65_536).await? {
            assert_eq!(last.min(65_536), 65_536, "only the last chunk may be short");
            last = chunk.len();
            image.extend_from_slice(&chunk);
        }
        Ok((image, stream.sha256()))
    }

    /// The usual bounds, with short pauses.
    fn hasty() -> Settings {
        Settings {
            pause: Duration::from_millis(1),
            ..Settings::default()
        }
    }

    async fn fails(url: String, format: &str) -> CloudError {
        read(&download(url, format, Settings::default()))
            .await
            .expect_err("it must fail")
    }

    const FORMATS: [&str; 4] = ["raw", "raw.xz", "raw.zst", "raw.gz"];

    #[tokio::test]
    async fn every_format_arrives_whole_and_hashed() {
        let image = image();
        for format in FORMATS {
            let (_, base) = Factory::serve([("image", compress(format, &image))]).await;
            let download = download(format!("{base}/file/image"), format, Settings::default());
            let (received, sha256) = read(&download).await.unwrap();
            assert_eq!(received, image, "{format}");
            assert_eq!(sha256, hex::encode(Sha256::digest(&image)), "{format}");
            let portion = download.progress().portion().unwrap();
            assert_eq!(portion.total, Some(portion.received), "{format}");
        }
    }

    #[tokio::test]
    async fn an_image_of_several_compressed_members_arrives_whole() {
        let image = image();
        for format in ["raw.xz", "raw.zst", "raw.gz"] {
            let mut body = Vec::new();
            for part in image.chunks(1_000_000) {
                body.extend(compress(format, part));
            }
            let (_, base) = Factory::serve([("image", body)]).await;
            let download = download(format!("{base}/file/image"), format, Settings::default());
            assert_eq!(read(&download).await.unwrap().0, image, "{format}");
        }
    }

    #[tokio::test]
    async fn a_cut_off_image_is_an_error() {
        for format in ["raw.xz", "raw.zst", "raw.gz"] {
            let whole = compress(format, &image());
            for length in [whole.len() / 2, whole.len() - 1, 5] {
                let (_, base) = Factory::serve([("image", whole[..length].to_vec())]).await;
                let error = fails(format!("{base}/file/image"), format).await;
                assert_eq!(error.kind, ErrorKind::Unavailable, "{format} {length}: {error:?}");
                assert!(
                    error.to_string().contains("cut off"),
                    "{format} {length}: {error:?}"
                );
            }
        }
    }

    #[tokio::test]
    async fn garbage_is_an_error() {
        for format in ["raw.xz", "raw.zst", "raw.gz"] {
            let (_, base) = Factory::serve([("image", vec![b'<'; 100_000])]).await;
            let error = fails(format!("{base}/file/image"), format).await;
            assert!(error.to_string().contains("damaged"), "{format}: {error:?}");
            let mut damaged = compress(format, &image());
            let middle = damaged.len() / 2;
            damaged[middle] ^= 0x55;
            let (_, base) = Factory::serve([("image", damaged)]).await;
            let error = fails(format!("{base}/file/image"), format).await;
            assert!(error.to_string().contains("damaged"), "{format}: {error:?}");
        }
    }

    /// ECMA-119, 6.2.1 and 8.1.2: what sector 16 of an ISO has.
    const ISO_MAGIC: &[u8] = b"CD001";
    const ISO_MAGIC_AT: usize = 32_769;

    #[tokio::test]
    async fn an_iso_is_told_from_an_error_page() {
        let mut iso = image();
        iso[ISO_MAGIC_AT..ISO_MAGIC_AT + ISO_MAGIC.len()].copy_from_slice(ISO_MAGIC);
        let files = [
            ("iso", iso.clone()),
            ("other", image()),
            ("page", b"<html>".to_vec()),
        ];
        let (_, base) = Factory::serve(files).await;
        let good = download(format!("{base}/file/iso"), "iso", Settings::default());
        assert_eq!(read(&good).await.unwrap().0, iso);
        for name in ["other", "page"] {
            let error = fails(format!("{base}/file/{name}"), "iso").await;
            assert_eq!(error.kind, ErrorKind::Unavailable, "{name}: {error:?}");
            assert!(error.to_string().contains("another format"), "{name}: {error:?}");
        }
        // However the chunks fall.
        for size in [1, 32_770, 40_000] {
            let chunks = iso[..40_000].chunks(size).map(Bytes::copy_from_slice).collect();
            let mut stream = good.decode_chunks("iso", chunks).unwrap();
            assert_eq!(
                stream.next(40_000).await.unwrap().unwrap(),
                iso[..40_000],
                "{size}"
            );
        }
    }

    #[tokio::test]
    async fn an_empty_body_is_an_error() {
        for format in FORMATS {
            let (_, base) = Factory::serve([("image", Vec::new())]).await;
            fails(format!("{base}/file/image"), format).await;
        }
    }

    #[tokio::test]
    async fn a_failed_stream_never_reports_an_end() {
        let (_, base) = Factory::serve([("image.unversioned", image())]).await;
        let download = download(format!("{base}/breaks/image.unversioned"), "raw", hasty());
        let mut stream = download.open().await.unwrap();
        while stream.next(1_000_000).await.is_ok() {}
        for _ in 0..3 {
            stream.next(1_000_000).await.expect_err("it must stay failed");
        }
    }

    #[tokio::test]
    async fn an_image_above_the_bound_is_refused() {
        let (_, base) = Factory::serve([("image", compress("raw.xz", &image()))]).await;
        let settings = Settings {
            max_bytes: 1_000_000,
            ..Settings::default()
        };
        let download = download(format!("{base}/file/image"), "raw.xz", settings);
        let error = read(&download).await.expect_err("it must fail");
        assert_eq!(error.kind, ErrorKind::Rejected);
    }

    #[tokio::test]
    async fn a_body_above_the_bound_is_refused_even_where_no_image_comes_of_it() {
        let nothing = compress("raw.gz", b"");
        let (_, base) = Factory::serve([("image", nothing.repeat(20_000))]).await;
        let settings = Settings {
            max_bytes: 100_000,
            ..Settings::default()
        };
        let download = download(format!("{base}/file/image"), "raw.gz", settings);
        let error = read(&download).await.expect_err("it must fail");
        assert_eq!(error.kind, ErrorKind::Rejected, "{error:?}");
    }

    #[tokio::test]
    async fn what_has_no_checksum_is_no_xz() {
        let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
        let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
        let mut old = Vec::new();
        liblzma::read::XzEncoder::new_stream(image().as_slice(), stream)
            .read_to_end(&mut old)
            .unwrap();
        let (_, base) = Factory::serve([("image", old)]).await;
        let error = fails(format!("{base}/file/image"), "raw.xz").await;
        assert!(error.to_string().contains("damaged"), "{error:?}");
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_resumed_where_its_version_is_known() {
        let image = image();
        for format in FORMATS {
            let body = compress(format, &image);
            let (factory, base) = Factory::serve([("image", body)]).await;
            let download = download(format!("{base}/breaks/image"), format, hasty());
            assert_eq!(read(&download).await.unwrap().0, image, "{format}");
            assert_eq!(factory.asked.lock().unwrap().len(), 2, "{format}");
        }
    }

    #[tokio::test]
    async fn a_download_that_has_to_begin_anew_goes_on_where_it_was_if_it_is_still_the_same() {
        let image = image();
        for format in FORMATS {
            let body = compress(format, &image);
            // A server that names no version, and one that knows no ranges.
            for name in ["once", "in-full"] {
                let (factory, base) = Factory::serve([(name, body.clone())]).await;
                let same = download(format!("{base}/breaks/{name}"), format, hasty());
                assert_eq!(
                    read(&same).await.unwrap(),
                    (image.clone(), hex::encode(Sha256::digest(&image))),
                    "{format}"
                );
                assert_eq!(factory.asked.lock().unwrap().len(), 2, "{format}");

                let (_, base) =
                    Factory::serve([(name, body.clone()), ("again", compress(format, &image[1..]))]).await;
                let other = fails(format!("{base}/breaks/{name}"), format).await;
                assert!(
                    other.to_string().contains("another image by now"),
                    "{format}: {other:?}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_stream_of_many_blocks_arrives_whole_whatever_their_size() {
        let image = image();
        for size in [64 * 1024, 1 << 20, 64 << 20] {
            let (_, base) = Factory::serve([("image", compress_in_blocks(&image, size))]).await;
            let download = download(format!("{base}/file/image"), "raw.xz", hasty());
            assert_eq!(read(&download).await.unwrap().0, image, "{size}");
        }
    }

    #[tokio::test]
    async fn a_body_that_stands_still_is_given_up() {
        let (_, base) = Factory::serve([]).await;
        let settings = Settings {
            idle_timeout: Duration::from_millis(100),
            ..Settings::default()
        };
        let download = download(format!("{base}/stands/still"), "raw", settings);
        let error = read(&download).await.expect_err("it must fail");
        assert!(error.to_string().contains("nothing came"), "{error}");
    }

    #[tokio::test]
    async fn the_factorys_refusals_have_their_kinds() {
        let (_, base) = Factory::serve([]).await;
        let after = Some(Duration::from_secs(7));
        for (status, kind) in [
            (400, ErrorKind::Rejected),
            (401, ErrorKind::Denied),
            (403, ErrorKind::Denied),
            (404, ErrorKind::Rejected),
            (418, ErrorKind::Unexpected),
            (429, ErrorKind::Throttled { after }),
            (500, ErrorKind::Unavailable),
            (503, ErrorKind::Unavailable),
        ] {
            let error = fails(format!("{base}/status/{status}"), "raw").await;
            assert_eq!(error.kind, kind, "{status}");
            assert_eq!(error.cloud, "image factory");
        }
        let gone = {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            format!("http://{}/x", listener.local_addr().unwrap())
        };
        assert_eq!(fails(gone, "raw").await.kind, ErrorKind::Unavailable);
        assert_eq!(fails(base, "qcow2").await.kind, ErrorKind::Rejected);
    }

    #[tokio::test]
    async fn headers_go_to_the_host_they_were_meant_for_and_to_no_other() {
        let (other, elsewhere) = Factory::serve([("image", image())]).await;
        let (factory, base) = Factory::serve([("image", image())]).await;
        let here = download(format!("{base}/to?/file/image"), "raw", Settings::default());
        read(&here).await.unwrap();
        let there = download(
            format!("{base}/to?{elsewhere}/file/image"),
            "raw",
            Settings::default(),
        );
        read(&there).await.unwrap();
        let keys = |factory: &Factory| -> Vec<_> {
            let asked = factory.asked.lock().unwrap();
            asked
                .iter()
                .map(|(path, headers)| (path.clone(), headers.contains_key("x-factory-key")))
                .collect()
        };
        assert_eq!(
            keys(&factory),
            [
                ("to".to_owned(), true),
                ("image".to_owned(), true),
                ("to".to_owned(), true)
            ]
        );
        assert_eq!(keys(&other), [("image".to_owned(), false)]);
        let endless = fails(format!("{base}/to?/to?/to?"), "raw").await;
        assert!(!format!("{endless:?}").contains("hush"), "{endless:?}");
    }

    #[tokio::test]
    async fn no_error_shows_the_address_or_a_header() {
        let nowhere = "http://user:hunter2@127.0.0.1:1/path?token=s3cr3t".to_owned();
        let error = fails(nowhere, "raw").await;
        let mut shown = format!("{error} {error:?}");
        let mut source = error.source();
        while let Some(inner) = source {
            shown.push_str(&format!(" {inner} {inner:?}"));
            source = inner.source();
        }
        for secret in ["hunter2", "s3cr3t", "hush", "/path"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        let download = download("http://user:hunter2@host/".to_owned(), "raw", Settings::default());
        assert!(!format!("{download:?}").contains("hunter2"));
    }
}
