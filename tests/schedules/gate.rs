//! Pauses a daemon as its surroundings see it: while its gate is shut nothing goes in and nothing comes out, and what was under
//! way arrives when it opens. Its timers run on, as those of a process behind a broken network do.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// A gate, open at first. Clones are the same gate.
#[derive(Clone, Default)]
pub(super) struct Gate(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// How many pauses are under way; they may overlap.
    shut: u32,
    waiting: Vec<Waker>,
}

impl Gate {
    pub(super) fn shut(&self) {
        self.0.lock().unwrap().shut += 1;
    }

    pub(super) fn open(&self) {
        let mut state = self.0.lock().unwrap();
        state.shut = state.shut.saturating_sub(1);
        if state.shut == 0 {
            for waker in state.waiting.drain(..) {
                waker.wake();
            }
        }
    }

    /// Waits until it is open.
    pub(super) async fn pass(&self) {
        poll_fn(|context| self.poll(context)).await;
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.lock().unwrap();
        if state.shut == 0 {
            return Poll::Ready(());
        }
        let known = state.waiting.iter().any(|waker| waker.will_wake(context.waker()));
        if !known {
            state.waiting.push(context.waker().clone());
        }
        Poll::Pending
    }
}

/// Omni's half of a daemon's connection, behind the daemon's gate.
pub(super) struct Gated {
    pub(super) stream: DuplexStream,
    pub(super) gate: Gate,
}

macro_rules! behind_the_gate {
    ($this:ident, $context:ident) => {
        if $this.gate.poll($context).is_pending() {
            return Poll::Pending;
        }
    };
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        behind_the_gate!(self, context);
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        behind_the_gate!(self, context);
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
