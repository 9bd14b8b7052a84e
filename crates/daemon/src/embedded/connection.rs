//! Connections of the embedded store: counted, closed when they never speak, and closed when their client does not read.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::task::AtomicWaker;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

use super::limits;

/// Descriptors that are not for connections: the file, the listener, the log.
const OWN_DESCRIPTORS: u64 = 64;
/// The bytes with which a connection of HTTP/2 begins (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// The open connections.
#[derive(Debug, Clone)]
struct Open {
    by_address: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    most: usize,
}

/// A place among the open connections.
#[derive(Debug)]
struct Place(Open, IpAddr);

impl Open {
    fn place(&self, address: IpAddr) -> Option<Place> {
        let mut open = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = open.values().sum();
        let own = open.get(&address).copied().unwrap_or(0);
        if total >= self.most || own >= limits::CONNECTIONS_PER_ADDRESS {
            return None;
        }
        open.insert(address, own + 1);
        Some(Place(self.clone(), address))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.0.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.1);
            }
        }
    }
}

/// The connections of a listener. One beyond the limits is closed at once.
pub(super) fn accept(listener: TcpListener) -> impl Stream<Item = std::io::Result<Connection>> {
    let open = Open { by_address: Arc::default(), most: limits::CONNECTIONS.min(descriptors()) };
    futures_util::stream::unfold((listener, open), async |(listener, open)| {
        loop {
            // A client that hung up before it was accepted, or a moment without descriptors, does not end the server.
            let Ok((stream, from)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Some(place) = open.place(from.ip()) else {
                tracing::debug!(%from, "connection closed: too many");
                continue;
            };
            // Without this an answer in two segments waits for a delayed acknowledgement: 40 ms.
            let _ = stream.set_nodelay(true);
            let silence = Box::pin(tokio::time::sleep(limits::SENDING));
            let connection = Connection { stream, _place: place, handle: Handle::default(), received: 0, silence: Some(silence) };
            return Some((Ok(connection), (listener, open)));
        }
    })
}

/// How many descriptors connections may take, after the limit was raised as far as it goes.
fn descriptors() -> usize {
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() && limit.current.is_some() {
        // Fewer connections are enough for few hosts.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
    let current = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(current.saturating_sub(OWN_DESCRIPTORS)).unwrap_or(usize::MAX).max(1)
}

/// Closes a connection from elsewhere. Clones close the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Handle(Arc<Closing>);

#[derive(Debug, Default)]
struct Closing {
    is_closed: AtomicBool,
    reader: AtomicWaker,
}

impl Handle {
    /// Closes the connection.
    pub(super) fn close(&self) {
        self.0.is_closed.store(true, Ordering::Release);
        self.0.reader.wake();
    }
}

#[cfg(test)]
impl Handle {
    pub(super) fn is_closed(&self) -> bool {
        self.0.is_closed.load(Ordering::Acquire)
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    _place: Place,
    handle: Handle,
    received: usize,
    /// Ends a connection that does not begin to speak HTTP/2.
    silence: Option<Pin<Box<Sleep>>>,
}

impl Connected for Connection {
    type ConnectInfo = Handle;

    fn connect_info(&self) -> Handle {
        self.handle.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        self.handle.0.reader.register(cx.waker());
        let is_silent = self.silence.as_mut().is_some_and(|silence| silence.as_mut().poll(cx).is_ready());
        if is_silent || self.handle.0.is_closed.load(Ordering::Acquire) {
            return Poll::Ready(Err(std::io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.silence.is_some() {
            self.received += buf.filled().len() - before;
            if self.received >= PREFACE {
                self.silence = None;
            }
        }
        outcome
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[std::io::IoSlice<'_>]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_bounded_in_all_and_for_each_address() {
        let open = Open { by_address: Arc::default(), most: limits::CONNECTIONS_PER_ADDRESS + 1 };
        let [one, two]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().unwrap());
        let mut places: Vec<Place> = (0..limits::CONNECTIONS_PER_ADDRESS).map(|_| open.place(one).unwrap()).collect();
        assert!(open.place(one).is_none(), "too many from one address");
        places.push(open.place(two).unwrap());
        assert!(open.place(two).is_none(), "too many");
        places.pop();
        assert!(open.place(two).is_some(), "a place is given back");
        drop(places);
        assert!(open.by_address.lock().unwrap().is_empty());
    }
}
