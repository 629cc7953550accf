//! Unpacks an image beside whoever fetches its body and whoever takes its bytes.
//!
//! *Guarantees.* The end is told only when the whole body was taken and the format's own checksums agreed. Memory is bounded: by a
//! few chunks on both sides, and by the decoder, which works on several blocks at once as far as [`XZ_THREADS_MEMORY`] goes.
//!
//! *Threads.* One chunk is unpacked ahead, in a step of its own on a thread for what blocks. A step never waits: where the body
//! has not come far enough it ends, and the next one goes on from there.
//!
//! *Cancel safety.* [`Decoder::next`] may be dropped and called again. Dropping the decoder ends the body at once, and a step soon.

use std::io::{self, BufRead, Read};
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::{future, mem, thread};

use bytes::{Buf as _, Bytes};
use futures_util::stream::{Stream, StreamExt as _};
use liblzma::bufread::XzDecoder;
use liblzma::stream::MtStreamBuilder;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

/// Most memory of the xz decoder. The highest preset of xz takes 65 MiB; a header that asks for more is no
/// image.
const XZ_MEMORY: u64 = 256 * 1024 * 1024;
/// Up to this much memory the xz decoder takes several blocks at once. Talos's are of 1 MiB (`xz -0 -T 0`) and take three times that;
/// a stream of one block, or of big ones, is read by one thread in little more than its dictionary.
const XZ_THREADS_MEMORY: u64 = 24 * 1024 * 1024;

/// How the xz format begins. Its decoder would also take the older lzma format, which has no checksum.
const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
/// What stands in every ISO 9660 image, and where (ECMA-119, 6.2.1 and 8.1.2): the first volume descriptor, in sector 16. The format
/// has no checksum; this tells it from an error page.
const ISO_MAGIC: &[u8] = b"CD001";
const ISO_MAGIC_AT: usize = 16 * 2048 + 1;

/// Bytes of one unpacked chunk.
const CHUNK: usize = 512 * 1024;
/// Pieces of the body that wait to be unpacked; each is what one read of the connection gave, up to some 100 KiB.
const PIECES: usize = 8;

/// How a raw image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    /// Raw as well, but known by its look.
    Iso,
    Xz,
    Zstd,
    Gzip,
}

impl Format {
    pub(super) fn parse(format: &str) -> Option<Self> {
        Some(match format {
            "raw" => Self::Raw,
            "iso" => Self::Iso,
            "raw.xz" => Self::Xz,
            "raw.zst" => Self::Zstd,
            "raw.gz" => Self::Gzip,
            _ => return None,
        })
    }

    /// Whether the format itself tells a cut-off body from a whole one.
    pub(super) fn has_end(self) -> bool {
        !matches!(self, Self::Raw | Self::Iso)
    }

    /// Fewest bytes of an image of this format.
    pub(super) fn least(self) -> u64 {
        match self {
            Self::Iso => (ISO_MAGIC_AT + ISO_MAGIC.len()) as u64,
            Self::Raw | Self::Xz | Self::Zstd | Self::Gzip => 1,
        }
    }

    /// What a body of this format has to have, and at which byte, where its decoder is not strict about that.
    fn magic(self) -> (usize, &'static [u8]) {
        match self {
            Self::Xz => (0, XZ_MAGIC),
            Self::Iso => (ISO_MAGIC_AT, ISO_MAGIC),
            Self::Raw | Self::Zstd | Self::Gzip => (0, &[]),
        }
    }

    /// A reader of what is packed in the body. Several members make one image: parallel compressors write them.
    fn unpack(self, body: Body) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::Raw | Self::Iso => Box::new(body),
            Self::Xz => Box::new(Xz {
                stream: Some(xz(body)?),
                ended: false,
            }),
            Self::Zstd => Box::new(zstd::Decoder::with_buffer(body)?),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(body)),
        })
    }
}

/// An image that is being unpacked.
pub(super) struct Decoder {
    work: Work,
    /// Of everything, once the end came.
    sha256: String,
    incoming: Arc<Incoming>,
    /// What reads the body.
    _body: JoinSet<()>,
}

/// Where the unpacking is.
enum Work {
    /// A step is under way.
    Running(JoinHandle<(Unpacking, io::Result<()>)>),
    /// More of the body has to come first.
    Starved(Unpacking),
    /// It came to its end, or failed.
    Over,
}

impl Decoder {
    /// Begins to unpack a body of that format.
    pub(super) fn start(
        format: Format,
        body: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> io::Result<Self> {
        let (pieces, queue) = mpsc::channel(PIECES);
        let mut reading = JoinSet::new();
        reading.spawn(async move {
            let mut body = std::pin::pin!(has_magic(format.magic(), body));
            while let Some(piece) = body.next().await {
                if pieces.send(piece).await.is_err() {
                    return;
                }
            }
        });
        let incoming = Arc::new(Incoming(Mutex::new(Queue {
            pieces: queue,
            first: None,
        })));
        let body = Body {
            incoming: Arc::clone(&incoming),
            piece: Bytes::new(),
        };
        Ok(Self {
            work: Work::Starved(Unpacking {
                reader: format.unpack(body)?,
                chunk: Vec::new(),
                hasher: Sha256::new(),
            }),
            sha256: String::new(),
            incoming,
            _body: reading,
        })
    }

    /// The SHA-256, in lower-case hex, of everything that was unpacked; empty before the end.
    pub(super) fn sha256(&self) -> String {
        self.sha256.clone()
    }

    /// The next bytes; none at the end, and after it.
    ///
    /// # Errors
    ///
    /// What the body or the decoder failed with.
    pub(super) async fn next(&mut self) -> io::Result<Bytes> {
        loop {
            match &mut self.work {
                Work::Over => return Ok(Bytes::new()),
                Work::Starved(_) => {
                    future::poll_fn(|context| self.incoming.poll_ready(context)).await;
                    if let Work::Starved(unpacking) = mem::replace(&mut self.work, Work::Over) {
                        self.work = unpacking.go_on();
                    }
                }
                Work::Running(step) => {
                    let stepped = step.await;
                    self.work = Work::Over;
                    match stepped? {
                        (mut unpacking, Ok(())) => {
                            let chunk = mem::take(&mut unpacking.chunk);
                            if chunk.is_empty() {
                                self.sha256 = hex::encode(unpacking.hasher.finalize());
                            } else {
                                self.work = unpacking.go_on();
                            }
                            return Ok(chunk.into());
                        }
                        (unpacking, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.work = Work::Starved(unpacking);
                        }
                        (_, Err(error)) => return Err(error),
                    }
                }
            }
        }
    }
}

/// What a step takes and gives back.
struct Unpacking {
    reader: Box<dyn Read + Send>,
    /// What has been unpacked of the next chunk.
    chunk: Vec<u8>,
    /// Of everything that has been unpacked.
    hasher: Sha256,
}

impl Unpacking {
    fn go_on(mut self) -> Work {
        // Here and not in the step: the allocator keeps for each thread what it has freed.
        self.chunk.reserve_exact(CHUNK - self.chunk.len());
        Work::Running(spawn_blocking(move || {
            let filled = self.fill();
            (self, filled)
        }))
    }

    /// Unpacks until the chunk is full or there is no more; `WouldBlock`, where the body has to come first.
    fn fill(&mut self) -> io::Result<()> {
        let before = self.chunk.len();
        let mut length = before;
        self.chunk.resize(CHUNK, 0);
        let mut result = Ok(());
        while let Some(room) = self.chunk.get_mut(length..).filter(|room| !room.is_empty()) {
            match self.reader.read(room) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.chunk.truncate(length);
        self.hasher.update(self.chunk.get(before..).unwrap_or_default());
        result
    }
}

/// What has come of the body and waits to be unpacked.
struct Incoming(Mutex<Queue>);

struct Queue {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    /// Taken from the queue already, by whoever waited for it.
    first: Option<io::Result<Bytes>>,
}

impl Incoming {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready once there is a piece, or will never be one.
    fn poll_ready(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut queue = self.lock();
        if queue.first.is_none() {
            queue.first = ready!(queue.pieces.poll_recv(context));
        }
        Poll::Ready(())
    }

    /// The next piece; none at the end.
    fn take(&self) -> io::Result<Option<Bytes>> {
        let mut queue = self.lock();
        if let Some(first) = queue.first.take() {
            return first.map(Some);
        }
        match queue.pieces.try_recv() {
            Ok(piece) => piece.map(Some),
            Err(mpsc::error::TryRecvError::Empty) => Err(io::ErrorKind::WouldBlock.into()),
            Err(mpsc::error::TryRecvError::Disconnected) => Ok(None),
        }
    }
}

/// The body, as a step reads it.
struct Body {
    incoming: Arc<Incoming>,
    piece: Bytes,
}

impl BufRead for Body {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() {
            match self.incoming.take()? {
                Some(piece) => self.piece = piece,
                None => break,
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, amount: usize) {
        self.piece.advance(amount);
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

fn xz(body: Body) -> io::Result<XzDecoder<Body>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let stream = MtStreamBuilder::new()
        .threads(u32::try_from(threads).unwrap_or(1))
        .memlimit_threading(XZ_THREADS_MEMORY)
        .memlimit_stop(XZ_MEMORY)
        .decoder()?;
    Ok(XzDecoder::new_stream(body, stream))
}

/// All streams of an xz body.
struct Xz {
    /// `None` only while one stream follows another.
    stream: Option<XzDecoder<Body>>,
    /// Whether this stream is over.
    ended: bool,
}

impl Read for Xz {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(stream) = &mut self.stream {
            if !self.ended {
                let count = stream.read(buffer)?;
                if count > 0 || buffer.is_empty() {
                    return Ok(count);
                }
                self.ended = true;
            }
            if stream.get_mut().fill_buf()?.is_empty() {
                break;
            }
            let body = self.stream.take().map(XzDecoder::into_inner);
            self.stream = body.map(xz).transpose()?;
            self.ended = false;
        }
        Ok(0)
    }
}

/// A body that fails where it has other bytes there.
fn has_magic(
    (at, magic): (usize, &'static [u8]),
    body: impl Stream<Item = io::Result<Bytes>>,
) -> impl Stream<Item = io::Result<Bytes>> {
    let (mut ahead, mut rest) = (at, magic);
    body.map(move |chunk| {
        let chunk = chunk?;
        let skipped = ahead.min(chunk.len());
        ahead -= skipped;
        let there = chunk.slice(skipped..);
        let (expected, later) = rest.split_at(rest.len().min(there.len()));
        if !there.starts_with(expected) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        rest = later;
        Ok(chunk)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use futures_util::stream;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// The decoder has to wait for each piece.
    async fn unpack(format: Format, pieces: Vec<Vec<u8>>) -> Vec<u8> {
        let body = stream::iter(pieces).then(|piece| async {
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
            Ok(Bytes::from(piece))
        });
        let mut decoder = Decoder::start(format, body).unwrap();
        let mut image = Vec::new();
        loop {
            let chunk = decoder.next().await.unwrap();
            if chunk.is_empty() {
                return image;
            }
            image.extend_from_slice(&chunk);
        }
    }

    #[tokio::test]
    async fn an_image_arrives_whole_wherever_its_body_is_cut() {
        let image: Vec<u8> = (0..5_000_u32).flat_map(u32::to_le_bytes).collect();
        let members = || image.chunks(3_000);
        for (format, packed) in [
            (Format::Raw, members().map(<[u8]>::to_vec).collect::<Vec<_>>()),
            (
                Format::Xz,
                members()
                    .map(|part| liblzma::encode_all(part, 0).unwrap())
                    .collect(),
            ),
            (
                Format::Zstd,
                members().map(|part| zstd::encode_all(part, 1).unwrap()).collect(),
            ),
            (Format::Gzip, members().map(gzip).collect()),
        ] {
            assert!(
                unpack(format, packed.clone()).await == image,
                "{format:?}, by members"
            );
            for size in [16, 1000] {
                let cut = packed.concat().chunks(size).map(<[u8]>::to_vec).collect();
                let got = unpack(format, cut).await;
                assert!(got == image, "{format:?}, by {size}");
            }
        }
    }
}
