//! An image factory on loopback with a small image for every schematic, and the two lists that a real Omni
//! wants from a registry.
//!
//! It serves schematics and disk images to the daemon (`/schematics`, `/image/…`), versions and extensions to
//! a real Omni that has it as its `--primary-factory-url`, and the registry's `/v2/` and tag list for
//! `--kubernetes-registry`: without tags Omni makes no `TalosVersion`, and without those it refuses every
//! request set (watched on Omni 1.10.4).
//!
//! *Guarantees*: the image of a schematic, version, platform and architecture is always the same, and no
//! other one is equal to it, so that a test can tell whether the right one arrived whole. A schematic's ID is
//! the SHA-256 of the bytes as they were sent, which is the real factory's for a client that sends canonical
//! YAML.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::stream;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

use super::line;

/// A schematic is a few hundred bytes; the real factory stops at this too.
const LARGEST_SCHEMATIC: usize = 4 * 1024 * 1024;
/// An answer that is slow, cut off or larger than this leaves in pieces of this size.
const PIECE: usize = 16 * 1024;

/// What the factory offers.
#[derive(Debug, Clone)]
pub struct FactoryOptions {
    /// Talos versions, each with its `v`.
    pub talos_versions: Vec<String>,
    /// Tags of the Kubernetes registry, each with its `v`.
    pub kubernetes_versions: Vec<String>,
    /// Official extensions, the same for every version.
    pub extensions: Vec<String>,
    /// Size of a raw image in bytes, rounded up to sectors of 512.
    pub image_size: usize,
}

impl Default for FactoryOptions {
    fn default() -> Self {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            // The oldest that a provider has to serve, the default of Omni 1.10, and what lies between.
            talos_versions: owned(&["v1.12.0", "v1.12.4", "v1.13.0", "v1.13.8"]),
            kubernetes_versions: (30..=36)
                .flat_map(|minor| (0..4).map(move |patch| format!("v1.{minor}.{patch}")))
                .collect(),
            extensions: owned(&[
                "siderolabs/amd-ucode",
                "siderolabs/hello-world-service",
                "siderolabs/iscsi-tools",
                "siderolabs/qemu-guest-agent",
                "siderolabs/util-linux-tools",
            ]),
            // No whole number of the chunks that anybody uploads in: the last one is short.
            image_size: 5 * 1024 * 1024 + 512,
        }
    }
}

/// What goes wrong with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It comes at this many bytes per second.
    Slow(usize),
    /// The connection ends after this many bytes of the body.
    Truncated(usize),
    /// It is this HTTP status.
    Status(u16),
    /// It has the right size and the wrong bytes.
    Garbage,
}

type Knows = Arc<dyn Fn(&str) -> bool + Send + Sync>;

#[derive(Default)]
struct Shelf {
    options: FactoryOptions,
    schematics: BTreeMap<String, Bytes>,
    knows: Option<Knows>,
    made: BTreeMap<(ImageName, Format), Packed>,
    /// Served instead of any packed image.
    instead: Option<Packed>,
    faults: BTreeMap<String, (Fault, Option<u32>)>,
    requests: BTreeMap<String, u64>,
}

/// The image factory. Clones share one.
#[derive(Clone)]
pub struct Factory(Arc<Mutex<Shelf>>);

impl fmt::Debug for Factory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Factory")
    }
}

impl Factory {
    /// A factory without schematics.
    #[must_use]
    pub fn new(options: FactoryOptions) -> Self {
        Self(Arc::new(Mutex::new(Shelf {
            options,
            ..Shelf::default()
        })))
    }

    /// Serves the factory until the future is dropped.
    ///
    /// # Errors
    /// When the listener cannot be served.
    pub async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        let router = Router::new().fallback(answer).with_state(self.clone());
        line::serve(listener, router).await
    }

    fn with<T>(&self, act: impl FnOnce(&mut Shelf) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Registers a schematic, as `POST /schematics` does, and returns its ID.
    pub fn add_schematic(&self, yaml: impl Into<Bytes>) -> String {
        let yaml = yaml.into();
        let id = hex::encode(Sha256::digest(&yaml));
        self.with(|shelf| shelf.schematics.insert(id.clone(), yaml));
        id
    }

    /// Asks somebody else about schematics that were not registered here: the embedded Omni takes them
    /// itself.
    pub fn also_knows(&self, knows: impl Fn(&str) -> bool + Send + Sync + 'static) {
        self.with(|shelf| shelf.knows = Some(Arc::new(knows)));
    }

    /// Makes answers go wrong whose path starts with `prefix`, such as `/image/`: so many times, or until it
    /// is `None` again.
    pub fn set_fault(&self, prefix: &str, fault: Option<Fault>, times: Option<u32>) {
        self.with(|shelf| match fault {
            Some(fault) => {
                shelf.faults.insert(prefix.to_owned(), (fault, times));
            }
            None => {
                shelf.faults.remove(prefix);
            }
        });
    }

    /// How often each method and path was asked for, such as `GET /versions`.
    #[must_use]
    pub fn requests(&self) -> BTreeMap<String, u64> {
        self.with(|shelf| shelf.requests.clone())
    }

    /// How many requests there were whose method and path start like this.
    #[must_use]
    pub fn requested(&self, prefix: &str) -> u64 {
        self.with(|shelf| {
            let matching = shelf.requests.iter().filter(|(line, _)| line.starts_with(prefix));
            matching.map(|(_, count)| count).sum()
        })
    }

    /// The raw image, as a machine would boot it.
    #[must_use]
    pub fn raw_image(&self, schematic: &str, version: &str, platform: &str, arch: &str) -> Bytes {
        let size = self.with(|shelf| shelf.options.image_size);
        raw(&ImageName::new(schematic, version, platform, arch), size)
    }

    /// The SHA-256 of the raw image, in hex.
    #[must_use]
    pub fn raw_sha256(&self, schematic: &str, version: &str, platform: &str, arch: &str) -> String {
        hex::encode(Sha256::digest(self.raw_image(schematic, version, platform, arch)))
    }

    /// Serves these bytes as every image from now on, in whatever format it is asked for.
    pub fn serve_instead(&self, bytes: Bytes) {
        let packed = Packed::new(bytes);
        self.with(|shelf| shelf.instead = Some(packed));
    }

    /// The image in one format, made when it is first asked for.
    async fn image(&self, name: ImageName, format: Format) -> io::Result<Packed> {
        if let Some(instead) = self.with(|shelf| shelf.instead.clone()) {
            return Ok(instead);
        }
        let key = (name, format);
        if let Some(made) = self.with(|shelf| shelf.made.get(&key).cloned()) {
            return Ok(made);
        }
        let raw = raw(&key.0, self.with(|shelf| shelf.options.image_size));
        let packed = Packed::new(compress(&raw, format)?);
        self.with(|shelf| shelf.made.insert(key, packed.clone()));
        Ok(packed)
    }

    fn has_schematic(&self, id: &str) -> bool {
        let (here, knows) = self.with(|shelf| (shelf.schematics.contains_key(id), shelf.knows.clone()));
        here || knows.is_some_and(|knows| knows(id))
    }

    /// Counts a request and says what is to go wrong with it.
    fn note(&self, method: &Method, path: &str) -> Option<Fault> {
        self.with(|shelf| {
            *shelf.requests.entry(format!("{method} {path}")).or_default() += 1;
            let (prefix, (fault, times)) = shelf
                .faults
                .iter_mut()
                .find(|(prefix, _)| path.starts_with(prefix.as_str()))?;
            let fault = *fault;
            if let Some(left) = times {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    let prefix = prefix.clone();
                    shelf.faults.remove(&prefix);
                }
            }
            Some(fault)
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ImageName {
    schematic: String,
    /// Without its `v`.
    version: String,
    /// Platform and architecture, joined by a dash.
    target: String,
}

impl ImageName {
    fn new(schematic: &str, version: &str, platform: &str, arch: &str) -> Self {
        Self {
            schematic: schematic.to_owned(),
            version: version.trim_start_matches('v').to_owned(),
            target: format!("{platform}-{arch}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Format {
    Raw,
    Xz,
    Zstd,
    Gzip,
}

impl Format {
    fn of(extension: &str) -> Option<Self> {
        match extension {
            "raw" => Some(Self::Raw),
            "raw.xz" => Some(Self::Xz),
            "raw.zst" => Some(Self::Zstd),
            "raw.gz" => Some(Self::Gzip),
            _ => None,
        }
    }
}

/// Mostly zeros, like a real image: something at the start, in the middle, and at the very end.
fn raw(name: &ImageName, size: usize) -> Bytes {
    let size = size.div_ceil(512) * 512;
    let mut bytes = vec![0; size];
    let seed = format!("{}/{}/{}", name.schematic, name.version, name.target);
    for (start, length) in [
        (0, 4096),
        (size / 2, 100_000),
        (size / 5 * 4, 20_000),
        (size.saturating_sub(512), 512),
    ] {
        let end = (start + length).min(size);
        let Some(part) = bytes.get_mut(start..end) else {
            continue;
        };
        for (index, block) in part.chunks_mut(32).enumerate() {
            let noise = Sha256::digest(format!("{seed}@{}", start + index * 32));
            for (byte, noise) in block.iter_mut().zip(noise) {
                *byte = noise;
            }
        }
    }
    bytes.into()
}

/// At the quickest levels: nobody measures this image.
fn compress(raw: &Bytes, format: Format) -> io::Result<Bytes> {
    let packed = match format {
        Format::Raw => return Ok(raw.clone()),
        Format::Xz => liblzma::encode_all(raw.as_ref(), 0)?,
        Format::Zstd => zstd::encode_all(raw.as_ref(), 1)?,
        Format::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(raw)?;
            encoder.finish()?
        }
    };
    Ok(packed.into())
}

/// A packed image and the name of its version: hashed once, and not for each answer.
#[derive(Clone)]
struct Packed {
    bytes: Bytes,
    tag: String,
}

impl Packed {
    fn new(bytes: Bytes) -> Self {
        let tag = format!("\"{}\"", hex::encode(Sha256::digest(&bytes)));
        Self { bytes, tag }
    }
}

/// What a path leads to, before anything goes wrong with it.
struct Found {
    status: StatusCode,
    kind: &'static str,
    body: Bytes,
    /// The name of its version, where parts of it can be asked for.
    tag: Option<String>,
}

impl Found {
    fn json(status: StatusCode, value: &serde_json::Value) -> Self {
        Self {
            status,
            kind: "application/json",
            body: value.to_string().into(),
            tag: None,
        }
    }

    fn text(status: StatusCode, text: impl Into<Bytes>) -> Self {
        Self {
            status,
            kind: "text/plain; charset=utf-8",
            body: text.into(),
            tag: None,
        }
    }

    fn missing(what: impl fmt::Display) -> Self {
        Self::text(StatusCode::NOT_FOUND, format!("{what} not found\n"))
    }
}

async fn answer(State(factory): State<Factory>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let fault = factory.note(&head.method, path);
    if let Some(Fault::Status(status)) = fault {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        return send(Found::text(status, "out of order\n"), &head.headers, None);
    }
    let found = match (&head.method, path) {
        (&Method::POST, "/schematics") => match axum::body::to_bytes(body, LARGEST_SCHEMATIC).await {
            Ok(yaml) => register(&factory, yaml),
            Err(_) => Found::text(StatusCode::BAD_REQUEST, "schematic is too large\n"),
        },
        (&Method::GET | &Method::HEAD, path) => {
            let broken = head
                .uri
                .query()
                .is_some_and(|query| query.contains("broken=true"));
            look_up(&factory, path, broken).await
        }
        _ => Found::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n"),
    };
    send(found, &head.headers, fault)
}

fn register(factory: &Factory, yaml: Bytes) -> Found {
    let parsed = std::str::from_utf8(&yaml)
        .ok()
        .and_then(|text| serde_saphyr::from_str::<serde_json::Value>(text).ok());
    if !parsed.is_some_and(|value| value.is_object()) {
        return Found::text(StatusCode::BAD_REQUEST, "invalid schematic\n");
    }
    let text = String::from_utf8_lossy(&yaml).into_owned();
    let id = factory.add_schematic(yaml);
    Found::json(StatusCode::CREATED, &json!({ "id": id, "schematic": text }))
}

async fn look_up(factory: &Factory, path: &str, broken: bool) -> Found {
    let segments: Vec<_> = path.trim_matches('/').split('/').collect();
    let options = factory.with(|shelf| shelf.options.clone());
    let has_version = |version: &str| {
        options
            .talos_versions
            .iter()
            .any(|known| known.trim_start_matches('v') == version.trim_start_matches('v'))
    };
    let ok = StatusCode::OK;
    match segments.as_slice() {
        ["versions"] if broken => Found::json(ok, &json!([])),
        ["versions"] => Found::json(ok, &json!(options.talos_versions)),
        // Omni asks without the `v`, others with it.
        ["version", version, "extensions" | "overlays", "official"] if !has_version(version) => {
            Found::missing(version)
        }
        ["version", _, "extensions", "official"] => {
            let entry = |name: &String| {
                json!({
                    "name": name,
                    "ref": format!("ghcr.io/{name}:1.0.0"),
                    "digest": format!("sha256:{}", hex::encode(Sha256::digest(name))),
                    "author": "Sidero Labs",
                    "description": "an extension of the sandbox",
                })
            };
            Found::json(
                ok,
                &json!(options.extensions.iter().map(entry).collect::<Vec<_>>()),
            )
        }
        ["version", _, "overlays", "official"] => Found::json(ok, &json!([])),
        ["schematics", id] => match factory.with(|shelf| shelf.schematics.get(*id).cloned()) {
            Some(body) => Found {
                status: ok,
                kind: "application/yaml",
                body,
                tag: None,
            },
            None => Found::missing("schematic"),
        },
        ["image", schematic, version, file] => {
            let named = file.split_once('.').and_then(|(target, extension)| {
                let (platform, arch) = target.rsplit_once('-')?;
                let format = Format::of(extension)?;
                matches!(arch, "amd64" | "arm64").then(|| {
                    let name = ImageName::new(schematic, version, platform, arch);
                    (name, format)
                })
            });
            let Some((name, format)) = named else {
                return Found::missing(file);
            };
            // The real one takes it without the `v` too, which is how the Go provider asks.
            if !has_version(version) {
                return Found::missing(version);
            }
            if !factory.has_schematic(schematic) {
                return Found::missing("schematic");
            }
            match factory.image(name, format).await {
                Ok(Packed { bytes, tag }) => Found {
                    status: ok,
                    kind: "application/octet-stream",
                    body: bytes,
                    tag: Some(tag),
                },
                Err(error) => Found::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            }
        }
        ["v2"] => Found::json(ok, &json!({})),
        ["v2", name @ .., "tags", "list"] => Found::json(
            ok,
            &json!({ "name": name.join("/"), "tags": options.kubernetes_versions }),
        ),
        _ => Found::missing(path),
    }
}

fn send(found: Found, headers: &HeaderMap, fault: Option<Fault>) -> Response {
    let whole = found.body.len();
    let mut status = found.status;
    let mut body = match fault {
        Some(Fault::Garbage) => garbage(whole),
        _ => found.body.clone(),
    };
    let mut response = Response::new(Body::empty());
    let answer = response.headers_mut();
    if let Some(tag) = &found.tag {
        answer.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        if let Ok(tag) = HeaderValue::from_str(tag) {
            answer.insert(ETAG, tag);
        }
        match range(headers, whole) {
            Range::All => {}
            Range::Part(start, end) => {
                status = StatusCode::PARTIAL_CONTENT;
                body = body.slice(start..end);
                let last = end.saturating_sub(1);
                if let Ok(value) = HeaderValue::from_str(&format!("bytes {start}-{last}/{whole}")) {
                    answer.insert(CONTENT_RANGE, value);
                }
            }
            Range::Beyond => {
                status = StatusCode::RANGE_NOT_SATISFIABLE;
                body = Bytes::new();
                if let Ok(value) = HeaderValue::from_str(&format!("bytes */{whole}")) {
                    answer.insert(CONTENT_RANGE, value);
                }
            }
        }
    }
    answer.insert(CONTENT_TYPE, HeaderValue::from_static(found.kind));
    answer.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    *response.status_mut() = status;
    *response.body_mut() = match fault {
        Some(Fault::Slow(rate)) => pieces(body, Some(rate.max(1)), None),
        Some(Fault::Truncated(after)) => pieces(body, None, Some(after)),
        // In one piece, it would be copied before its first byte leaves.
        _ if body.len() > PIECE => pieces(body, None, None),
        _ => Body::from(body),
    };
    response
}

/// A body that leaves in pieces, at a rate, or breaks off: the connection goes with it.
fn pieces(body: Bytes, rate: Option<usize>, after: Option<usize>) -> Body {
    let next = move |(mut rest, sent): (Bytes, usize)| async move {
        if after.is_some_and(|after| sent >= after) {
            // What was sent so far has to leave first.
            tokio::time::sleep(Duration::from_millis(10)).await;
            let error = io::Error::from(io::ErrorKind::ConnectionReset);
            return Some((Err(error), (Bytes::new(), 0)));
        }
        if rest.is_empty() {
            return None;
        }
        let left = after.map_or(usize::MAX, |after| after - sent);
        let piece = rest.split_to(rest.len().min(PIECE).min(left));
        if let Some(rate) = rate {
            let millis = (piece.len() as u64).saturating_mul(1000) / rate as u64;
            tokio::time::sleep(Duration::from_millis(millis)).await;
        }
        let sent = sent + piece.len();
        Some((Ok(piece), (rest, sent)))
    };
    Body::from_stream(stream::unfold((body, 0), next))
}

/// Bytes that no decompressor takes.
fn garbage(length: usize) -> Bytes {
    vec![b'?'; length].into()
}

enum Range {
    All,
    Part(usize, usize),
    Beyond,
}

/// One range of bytes; several at once are answered with everything, which the standard allows.
fn range(headers: &HeaderMap, whole: usize) -> Range {
    let Some((first, last)) = headers
        .get(RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("bytes="))
        .and_then(|value| value.split_once('-'))
    else {
        return Range::All;
    };
    match (first.parse::<usize>(), last.parse::<usize>()) {
        (Ok(first), _) if first >= whole => Range::Beyond,
        (Ok(first), Ok(last)) if last >= first => Range::Part(first, last.saturating_add(1).min(whole)),
        (Ok(first), Err(_)) if last.is_empty() => Range::Part(first, whole),
        (Err(_), Ok(0)) => Range::Beyond,
        (Err(_), Ok(suffix)) if first.is_empty() => Range::Part(whole.saturating_sub(suffix), whole),
        _ => Range::All,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use tokio::task::JoinSet;

    use super::*;

    struct World {
        factory: Factory,
        base: String,
        http: reqwest::Client,
        _server: JoinSet<()>,
    }

    impl World {
        async fn start() -> Self {
            let factory = Factory::new(FactoryOptions::default());
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let base = format!("http://{}", listener.local_addr().unwrap());
            let mut server = JoinSet::new();
            let served = factory.clone();
            server.spawn(async move { served.serve(listener).await.unwrap() });
            Self {
                factory,
                base,
                http: reqwest::Client::new(),
                _server: server,
            }
        }

        async fn get(&self, path: &str) -> reqwest::Response {
            self.http
                .get(format!("{}{path}", self.base))
                .send()
                .await
                .unwrap()
        }

        async fn register(&self) -> String {
            let sent = self.http.post(format!("{}/schematics", self.base));
            let answer = sent.body("customization: {}\n").send().await.unwrap();
            assert_eq!(answer.status(), 201);
            let body: serde_json::Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
            body["id"].as_str().unwrap().to_owned()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_schematic_is_named_by_its_canonical_bytes() {
        let world = World::start().await;
        let id = world.register().await;
        // The contract's vector.
        assert_eq!(
            id,
            "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba"
        );
        let yaml = world.get(&format!("/schematics/{id}")).await;
        assert_eq!(yaml.text().await.unwrap(), "customization: {}\n");
        let sent = world.http.post(format!("{}/schematics", world.base));
        assert_eq!(sent.body("- no").send().await.unwrap().status(), 400);
    }

    #[tokio::test(start_paused = true)]
    async fn every_format_holds_the_same_image_and_every_image_is_its_own() {
        let world = World::start().await;
        let id = world.register().await;
        let wanted = world.factory.raw_sha256(&id, "1.12.0", "nocloud", "amd64");
        for format in ["raw", "raw.xz", "raw.zst", "raw.gz"] {
            let path = format!("/image/{id}/v1.12.0/nocloud-amd64.{format}");
            let packed = world.get(&path).await.bytes().await.unwrap();
            let bytes = match format {
                "raw.xz" => liblzma::decode_all(packed.as_ref()).unwrap(),
                "raw.zst" => zstd::decode_all(packed.as_ref()).unwrap(),
                "raw.gz" => {
                    let mut bytes = Vec::new();
                    let mut decoder = flate2::read::GzDecoder::new(packed.as_ref());
                    decoder.read_to_end(&mut bytes).unwrap();
                    bytes
                }
                _ => packed.to_vec(),
            };
            assert_eq!(hex::encode(Sha256::digest(&bytes)), wanted, "{format}");
            let zeros = bytes.chunks(512 * 1024).filter(|it| it.iter().all(|b| *b == 0));
            assert!(zeros.count() > 3, "mostly zeros");
        }
        let others = [("1.13.0", "nocloud", "amd64"), ("1.12.0", "nocloud", "arm64")];
        for (version, platform, arch) in others {
            assert_ne!(world.factory.raw_sha256(&id, version, platform, arch), wanted);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_exist_is_not_found() {
        let world = World::start().await;
        let id = world.register().await;
        for path in [
            format!("/image/{}/v1.12.0/nocloud-amd64.raw.xz", "0".repeat(64)),
            format!("/image/{id}/v1.2.3/nocloud-amd64.raw.xz"),
            format!("/image/{id}/v1.12.0/nocloud-riscv.raw.xz"),
            format!("/image/{id}/v1.12.0/nocloud-amd64.floppy"),
            "/elsewhere".to_owned(),
        ] {
            assert_eq!(world.get(&path).await.status(), 404, "{path}");
        }
        world.factory.also_knows(|id| id == "elsewhere");
        let path = "/image/elsewhere/v1.12.0/nocloud-amd64.raw.xz";
        assert_eq!(world.get(path).await.status(), 200);
        let bare = world.get(&path.replace('v', "")).await;
        assert_eq!(bare.status(), 200, "a version without its v");
        assert_eq!(world.factory.requested("GET /image/"), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn heads_and_ranges_are_answered() {
        let world = World::start().await;
        let id = world.register().await;
        let url = format!("{}/image/{id}/v1.12.0/nocloud-amd64.raw", world.base);
        let head = world.http.head(&url).send().await.unwrap();
        assert_eq!(head.headers()[CONTENT_LENGTH], "5243392");
        assert!(head.bytes().await.unwrap().is_empty());
        let raw = world.factory.raw_image(&id, "1.12.0", "nocloud", "amd64");
        for (range, expected) in [
            ("bytes=0-9", 0..10),
            ("bytes=5243380-", 5_243_380..5_243_392),
            ("bytes=-7", 5_243_385..5_243_392),
        ] {
            let part = world.http.get(&url).header(RANGE, range).send().await.unwrap();
            assert_eq!(part.status(), 206);
            assert_eq!(part.bytes().await.unwrap(), raw[expected], "{range}");
        }
        let beyond = world.http.get(&url).header(RANGE, "bytes=5243392-").send();
        assert_eq!(beyond.await.unwrap().status(), 416);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_can_be_slow_short_refused_or_wrong() {
        let world = World::start().await;
        let id = world.register().await;
        let path = format!("/image/{id}/v1.12.0/nocloud-amd64.raw");
        let fault = |fault, times| world.factory.set_fault("/image/", Some(fault), times);
        fault(Fault::Status(503), Some(1));
        assert_eq!(world.get(&path).await.status(), 503);
        fault(Fault::Garbage, Some(1));
        let wrong = world.get(&path).await.bytes().await.unwrap();
        assert!(wrong.len() == 5_243_392 && wrong[0] == b'?');
        fault(Fault::Truncated(100_000), Some(1));
        assert!(world.get(&path).await.bytes().await.is_err());
        fault(Fault::Slow(1024 * 1024), None);
        let start = tokio::time::Instant::now();
        let whole = world.get(&path).await.bytes().await.unwrap();
        assert!(start.elapsed() > Duration::from_secs(4), "{:?}", start.elapsed());
        assert_eq!(whole.len(), 5_243_392);
        world.factory.set_fault("/image/", None, None);
        assert_eq!(world.get(&path).await.bytes().await.unwrap(), whole);
    }

    #[tokio::test(start_paused = true)]
    async fn a_real_omni_finds_its_lists() {
        let world = World::start().await;
        let json = |path: &'static str| {
            let answer = world.get(path);
            async move {
                let bytes = answer.await.bytes().await.unwrap();
                serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
            }
        };
        assert!(
            json("/versions")
                .await
                .as_array()
                .unwrap()
                .contains(&json!("v1.13.8"))
        );
        assert_eq!(json("/versions?broken=true").await, json!([]));
        let extensions = json("/version/1.13.8/extensions/official").await;
        assert_eq!(extensions[0]["name"], "siderolabs/amd-ucode");
        assert_eq!(world.get("/v2/").await.status(), 200);
        let tags = json("/v2/siderolabs/kubelet/tags/list?n=1000").await;
        assert_eq!(tags["name"], "siderolabs/kubelet");
        assert!(tags["tags"].as_array().unwrap().contains(&json!("v1.34.2")));
    }
}
