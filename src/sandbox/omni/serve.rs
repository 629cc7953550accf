//! Runs Omni: serves its connections and drives its controllers, until the future is dropped, which is a
//! crash.
//!
//! tonic spawns a task for each connection and cannot be told where. Every connection is therefore wrapped so
//! that it breaks, and its task ends, when the run it belongs to is dropped; calls under way see the same
//! signal and take no effect any more.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::{Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tonic::codec::CompressionEncoding::Gzip;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::service::Service;
use super::{Omni, controllers};
use crate::omni::wire::cosi::state_server::StateServer;
use crate::omni::wire::management::management_service_server::ManagementServiceServer;

/// As Omni's own limit.
const MAX_MESSAGE: usize = 32 << 20;

/// How much either side of a dialled connection may be ahead of the other.
const PIPE: usize = 256 << 10;

/// Cleans up after a run, however it ends.
struct Run {
    omni: Omni,
    _life: DropGuard,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.omni.with(|inner| {
            inner.dialer = None;
            inner.connections.cancel();
            inner.agenda.clear();
        });
    }
}

impl Omni {
    /// Runs Omni for those who [`Omni::dial`] it, from this call until the future is dropped: that is a
    /// crash. Running it again is a restart. One run at a time.
    pub fn run(&self) -> impl Future<Output = ()> + Send + use<> {
        self.serve(futures_util::stream::pending::<io::Result<DuplexStream>>())
    }

    /// The same, and serves connections from `incoming` too: for the sandbox a `TcpListenerStream`.
    pub fn serve<S, IO>(&self, incoming: S) -> impl Future<Output = ()> + Send + use<S, IO>
    where
        S: Stream<Item = io::Result<IO>> + Send,
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let omni = self.clone();
        let life = CancellationToken::new();
        let (dialer, dialled) = mpsc::unbounded_channel();
        let restart = self.with(|inner| {
            inner.runs = inner.runs.wrapping_add(1);
            inner.runs > 1
        });
        if restart {
            self.restart_ephemeral();
        }
        self.with(|inner| {
            inner.dialer = Some(dialer);
            inner.connections = CancellationToken::new();
            inner.drains.clear();
            inner.bump();
        });
        let run = Run {
            omni: self.clone(),
            _life: life.clone().drop_guard(),
        };
        async move {
            let _run = run;
            omni.with(controllers::rescan);
            let wrapping = omni.clone();
            let dialled = UnboundedReceiverStream::new(dialled)
                .map(move |stream| io::Result::Ok(Breakable::new(&wrapping, Either::Dialled(stream))));
            let wrapping = omni.clone();
            let accepted = incoming.map(move |accepted| {
                accepted.map(|stream| Breakable::new(&wrapping, Either::Accepted(stream)))
            });
            let service = Service::new(omni.clone(), life);
            // Upstream's Go client compresses every request.
            let server = Server::builder()
                .add_service(
                    StateServer::new(service.clone())
                        .max_decoding_message_size(MAX_MESSAGE)
                        .max_encoding_message_size(MAX_MESSAGE)
                        .accept_compressed(Gzip)
                        .send_compressed(Gzip),
                )
                .add_service(
                    ManagementServiceServer::new(service)
                        .max_decoding_message_size(MAX_MESSAGE)
                        .accept_compressed(Gzip)
                        .send_compressed(Gzip),
                )
                .serve_with_incoming(futures_util::stream::select(dialled, accepted));
            tokio::select! {
                served = server => {
                    if let Err(error) = served {
                        tracing::warn!(%error, "the embedded Omni stopped serving");
                    }
                }
                () = omni.control() => {}
            }
        }
    }

    /// A connection to a running Omni.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` while nothing runs it.
    pub fn dial(&self) -> io::Result<DuplexStream> {
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, "Omni is not running");
        let dialer = self.with(|inner| inner.dialer.clone()).ok_or_else(refused)?;
        let (ours, theirs) = tokio::io::duplex(PIPE);
        dialer.send(theirs).map_err(|_| refused())?;
        Ok(ours)
    }

    /// Whether something runs it.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.with(|inner| inner.dialer.is_some())
    }

    /// Drives the controllers.
    async fn control(&self) {
        let mut changes = self.changes();
        loop {
            changes.borrow_and_update();
            let next = self.with(controllers::step);
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = due => {}
            }
        }
    }
}

/// Where a connection came from.
enum Either<IO> {
    Dialled(DuplexStream),
    Accepted(IO),
}

/// A connection that breaks when its run ends, or when all connections are broken.
struct Breakable<IO> {
    stream: Either<IO>,
    broken: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<IO> Breakable<IO> {
    fn new(omni: &Omni, stream: Either<IO>) -> Self {
        let connections = omni.with(|inner| inner.connections.clone());
        Self {
            stream,
            broken: Box::pin(connections.cancelled_owned()),
        }
    }
}

impl<IO: Unpin> Breakable<IO> {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.broken.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionReset, "Omni is gone")),
            Poll::Pending => Ok(()),
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Breakable<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        match &mut self.stream {
            Either::Dialled(stream) => Pin::new(stream).poll_read(context, buffer),
            Either::Accepted(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Breakable<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        match &mut self.stream {
            Either::Dialled(stream) => Pin::new(stream).poll_write(context, bytes),
            Either::Accepted(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Dialled(stream) => Pin::new(stream).poll_flush(context),
            Either::Accepted(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Dialled(stream) => Pin::new(stream).poll_shutdown(context),
            Either::Accepted(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl<IO> Connected for Breakable<IO> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
