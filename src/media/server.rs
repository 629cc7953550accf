//! Answers for media: ranges and lengths, as QEMU's curl driver needs them, the files of a seed, and nothing else.
//!
//! *Guarantees.* Nothing is served but what was asked for by its whole name; no folder is listed, nothing tells a wrong name from
//! what is not here. No line of the log has a path.

use std::io::SeekFrom;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use axum::{Router, serve as serve_http};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::io::ReaderStream;
use tracing::{debug, info, warn};

use super::connection::{Bounded, Peer};
use super::range::{Part, part};
use super::{Media, seed};

/// How much is read at once.
const CHUNK: usize = 64 * 1024;
/// How often seeds that are over are removed.
const SWEEP: Duration = Duration::from_secs(600);

/// Serves media until the future is dropped, and removes seeds that are over.
///
/// # Errors
///
/// When nothing can be accepted any more.
pub async fn serve(media: Media, listener: TcpListener) -> std::io::Result<()> {
    if let Ok(address) = listener.local_addr() {
        info!(%address, "serving boot media");
    }
    if let Err(error) = media.shelf.prepare().await {
        warn!(%error, "boot media cannot be served");
    }
    let router = Router::new().fallback(answer).with_state(media.clone());
    let service = router.into_make_service_with_connect_info::<Peer>();
    tokio::select! {
        served = serve_http(Bounded::new(listener), service).into_future() => served,
        never = sweep(&media) => never,
    }
}

async fn sweep(media: &Media) -> std::io::Result<()> {
    loop {
        if let Err(error) = media.seeds.sweep().await {
            warn!(%error, "boot seeds that are over cannot be removed");
        }
        sleep(SWEEP).await;
    }
}

async fn answer(
    State(media): State<Media>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    let (head, _) = request.into_parts();
    let method = &head.method;
    let response = match *method {
        Method::GET if let Some((name, part)) = seed::asked(head.uri.path()) => {
            return tell(&media, name, part, peer).await;
        }
        Method::GET | Method::HEAD => medium(&media, &head).await,
        _ => {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED);
            let allow = HeaderValue::from_static("GET, HEAD");
            response.headers_mut().insert(header::ALLOW, allow);
            response
        }
    };
    let status = response.status().as_u16();
    let bytes = text(response.headers(), header::CONTENT_LENGTH);
    // A guest asks for a part at a time, thousands of times.
    match response.status() {
        StatusCode::PARTIAL_CONTENT => debug!(%peer, %method, status, bytes, "boot medium"),
        _ => info!(%peer, %method, status, bytes, "boot medium"),
    }
    response
}

/// One file of a seed.
async fn tell(media: &Media, name: &str, part: seed::Part, peer: SocketAddr) -> Response {
    let response = match media.seeds.read(name, part, peer.ip().to_canonical()).await {
        Ok(Some(text)) => {
            let mut response = Response::new(Body::from(text));
            set(&mut response, header::CONTENT_TYPE, "text/yaml");
            set(&mut response, header::CACHE_CONTROL, "private, no-store");
            response
        }
        // Of a machine that is installed as well: it is no fault.
        Ok(None) if part != seed::Part::User => plain(StatusCode::NO_CONTENT),
        Ok(None) => plain(StatusCode::NOT_FOUND),
        Err(error) => {
            warn!(%error, "a boot seed cannot be read");
            plain(StatusCode::SERVICE_UNAVAILABLE)
        }
    };
    info!(%peer, file = ?part, status = response.status().as_u16(), "boot seed");
    response
}

async fn medium(media: &Media, asked: &Parts) -> Response {
    let file = match media.shelf.open(asked.uri.path()).await {
        Ok(Some(file)) => file,
        Ok(None) => return plain(StatusCode::NOT_FOUND),
        Err(error) => {
            warn!(%error, "a boot medium cannot be read");
            return plain(StatusCode::SERVICE_UNAVAILABLE);
        }
    };
    match send(file, &asked.headers, asked.method == Method::HEAD).await {
        Ok(response) => response,
        Err(error) => {
            warn!(%error, "a boot medium cannot be read");
            plain(StatusCode::SERVICE_UNAVAILABLE)
        }
    }
}

async fn send(mut file: File, asked: &HeaderMap, is_head: bool) -> std::io::Result<Response> {
    let metadata = file.metadata().await?;
    let length = metadata.len();
    // Every import is a file of its own, and never changes.
    let born = metadata.created().unwrap_or(std::time::UNIX_EPOCH);
    let born = born.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let version = format!("\"{:x}-{length:x}-{:x}\"", metadata.ino(), born.as_nanos());

    // A rest of another version would be no rest of this one.
    let is_current = text(asked, header::IF_RANGE).is_none_or(|condition| condition == version);
    let range = text(asked, header::RANGE).filter(|_| is_current && !is_head);
    let (status, first, count) = match part(range, length) {
        Part::Whole => (StatusCode::OK, 0, length),
        Part::Bytes(first, last) => (
            StatusCode::PARTIAL_CONTENT,
            first,
            last.saturating_sub(first).saturating_add(1),
        ),
        Part::Beyond => {
            let mut response = plain(StatusCode::RANGE_NOT_SATISFIABLE);
            set(&mut response, header::CONTENT_RANGE, &format!("bytes */{length}"));
            return Ok(response);
        }
    };
    let mut response = Response::new(if is_head {
        Body::empty()
    } else {
        file.seek(SeekFrom::Start(first)).await?;
        Body::from_stream(ReaderStream::with_capacity(file.take(count), CHUNK))
    });
    *response.status_mut() = status;
    if status == StatusCode::PARTIAL_CONTENT {
        let last = first.saturating_add(count).saturating_sub(1);
        set(
            &mut response,
            header::CONTENT_RANGE,
            &format!("bytes {first}-{last}/{length}"),
        );
    }
    set(&mut response, header::CONTENT_LENGTH, &count.to_string());
    set(&mut response, header::ETAG, &version);
    // QEMU reads nothing where the answer to its HEAD lacks it.
    set(&mut response, header::ACCEPT_RANGES, "bytes");
    set(&mut response, header::CONTENT_TYPE, "application/x-iso9660-image");
    // It holds a join token.
    set(&mut response, header::CACHE_CONTROL, "private, no-store");
    Ok(response)
}

fn plain(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn set(response: &mut Response, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}
