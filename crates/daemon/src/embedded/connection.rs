//! Connections of the embedded store: counted, closed when they never speak or have no certificate, and closed when their client does
//! not read.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::task::AtomicWaker;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::limits;
use super::tls::Tls;
use crate::newcomers::{self, Newcomers};

/// Descriptors that are not for connections: the file, the listener, the log.
const OWN_DESCRIPTORS: u64 = 64;
/// How many times a client that was refused is read from, and for how long, before its connection is closed.
const PARTING: (usize, Duration) = (16, Duration::from_secs(1));
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
pub(super) fn accept(listener: TcpListener, tls: Option<Tls>) -> impl Stream<Item = std::io::Result<Connection>> {
    let open = Open { by_address: Arc::default(), most: limits::CONNECTIONS.min(descriptors()) };
    let door = Door { listener, open, tls, handshakes: JoinSet::new(), newcomers: Newcomers::new(limits::HANDSHAKES) };
    futures_util::stream::unfold(door, async |mut door| Some((Ok(door.next().await), door)))
}

/// Where connections come in.
struct Door {
    listener: TcpListener,
    open: Open,
    tls: Option<Tls>,
    handshakes: JoinSet<Option<(Transport, SocketAddr)>>,
    newcomers: Newcomers,
}

impl Door {
    /// The next connection whose client has a certificate, where it needs one.
    async fn next(&mut self) -> Connection {
        loop {
            let (stream, from) = tokio::select! {
                accepted = self.listener.accept() => match (accepted, &self.tls) {
                    (Ok((stream, from)), None) => (Transport::Plain(stream), from),
                    (Ok((stream, from)), Some(tls)) => {
                        let place = self.newcomers.place().await;
                        let task = self.handshakes.spawn(handshake(tls.clone(), stream, from, place));
                        self.newcomers.add(from.ip(), task);
                        continue;
                    }
                    // A client that hung up before it was accepted, or a moment without descriptors, does not end the server.
                    (Err(_), _) => {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                Some(done) = self.handshakes.join_next() => match done {
                    Ok(Some(known)) => known,
                    _ => continue,
                },
            };
            let Some(place) = self.open.place(from.ip()) else {
                tracing::debug!(%from, "connection closed: too many");
                continue;
            };
            // Without this an answer in two segments waits for a delayed acknowledgement: 40 ms.
            stream.set_nodelay();
            let silence = Box::pin(tokio::time::sleep(limits::SENDING));
            return Connection { stream, _place: place, handle: Handle::default(), received: 0, silence: Some(silence) };
        }
    }
}

/// Makes sure that a client has a certificate.
async fn handshake(tls: Tls, stream: TcpStream, from: SocketAddr, _place: newcomers::Place) -> Option<(Transport, SocketAddr)> {
    match tokio::time::timeout(limits::SENDING, tls.acceptor().accept(stream).into_fallible()).await {
        Ok(Ok(stream)) => Some((Transport::Tls(Box::new(stream)), from)),
        Ok(Err((error, stream))) => {
            tls.refused(from, &error);
            part(stream).await;
            None
        }
        Err(_) => None,
    }
}

/// Ends a connection so that its client receives the alert that says why. The kernel discards it if bytes of the client are unread
/// when the connection is closed.
async fn part(mut stream: TcpStream) {
    let drain = async {
        let _ = stream.shutdown().await;
        let mut buffer = [0; 4096];
        for _ in 0..PARTING.0 {
            if !matches!(stream.read(&mut buffer).await, Ok(1..)) {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(PARTING.1, drain).await;
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

/// The bytes of a connection.
#[derive(Debug)]
enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Transport {
    fn set_nodelay(&self) {
        let stream = match self {
            Transport::Plain(stream) => stream,
            Transport::Tls(stream) => stream.get_ref().0,
        };
        // It is slower without, no more.
        let _ = stream.set_nodelay(true);
    }
}

/// Does the same with either kind.
macro_rules! each {
    ($transport:expr, $stream:ident => $do:expr) => {
        match $transport {
            Transport::Plain($stream) => $do,
            Transport::Tls($stream) => $do,
        }
    };
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Transport,
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
        let outcome = each!(&mut self.stream, stream => Pin::new(stream).poll_read(cx, buf));
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
        each!(&mut self.stream, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        each!(&mut self.stream, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        each!(&mut self.stream, stream => Pin::new(stream).poll_shutdown(cx))
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[std::io::IoSlice<'_>]) -> Poll<std::io::Result<usize>> {
        each!(&mut self.stream, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        each!(&self.stream, stream => stream.is_write_vectored())
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
