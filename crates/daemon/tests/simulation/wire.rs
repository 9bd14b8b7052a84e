//! The model connection between a daemon and its store: it delays, refuses, goes silent, and loses answers to executed requests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use daemon::embedded::memory::Memory;
use daemon::store::Transport;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tower::ServiceExt;

/// The behaviour of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It takes a few milliseconds and loses nothing.
    Open,
    /// It is refused, as by a host without a server.
    Refused,
    /// It drops everything without an error.
    Silent,
    /// It delays everything by this many milliseconds.
    Slow(u64),
    /// Requests are executed, but their answers are lost.
    NoAnswers,
}

/// The time after which the client closes a silent connection (HTTP/2 keep-alive).
const KEEP_ALIVE: Duration = Duration::from_secs(15);

fn jitter(millis: u64) -> Duration {
    Duration::from_micros(fastrand::u64(0..=millis * 1000))
}

/// A connection's view of its cable: the mode, and the number of breaks so far.
type View = watch::Receiver<(Mode, u32)>;

/// Waits for the delay of the connection; fails if it passes nothing, or broke since it was opened.
async fn pass(view: &mut View, opened: u32) -> Result<(), Status> {
    let end = tokio::time::Instant::now() + KEEP_ALIVE;
    loop {
        let (mode, broken) = *view.borrow_and_update();
        if broken != opened {
            return Err(Status::unavailable("connection reset"));
        }
        match mode {
            Mode::Open | Mode::NoAnswers => tokio::time::sleep(jitter(2)).await,
            Mode::Slow(millis) => tokio::time::sleep(Duration::from_millis(millis) + jitter(2)).await,
            Mode::Refused => {
                tokio::time::sleep(jitter(1)).await;
                return Err(Status::unavailable("connection refused"));
            }
            Mode::Silent => tokio::select! {
                biased;
                _ = view.changed() => continue,
                () = tokio::time::sleep_until(end) => return Err(Status::unavailable("keep-alive timed out")),
            },
        }
        return match view.borrow().1 == opened {
            true => Ok(()),
            false => Err(Status::unavailable("connection reset")),
        };
    }
}

/// The common state of a host's connections. Each connection has its own channel, because the order in which several receivers of one
/// channel wake up is random.
#[derive(Debug, Clone)]
pub(crate) struct Cable(Arc<Mutex<Ends>>, Arc<AtomicUsize>);

/// The mode of the cable, the number of breaks, and its connections.
type Ends = ((Mode, u32), Vec<watch::Sender<(Mode, u32)>>);

impl Cable {
    pub(crate) fn new() -> Cable {
        Cable(Arc::new(Mutex::new(((Mode::Open, 0), Vec::new()))), Arc::default())
    }

    /// Changes the mode, and returns the previous one.
    pub(crate) fn set(&self, mode: Mode) -> Mode {
        let mut inner = self.0.lock().unwrap();
        inner.1.retain(|connection| !connection.is_closed());
        let (before, broken) = inner.0;
        inner.0 = (mode, broken + u32::from(mode == Mode::Refused));
        for connection in &inner.1 {
            connection.send_replace(inner.0);
        }
        before
    }

    /// The number of requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.1.load(Ordering::Relaxed)
    }

    fn subscribe(&self) -> View {
        self.1.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.0.lock().unwrap();
        let (sender, view) = watch::channel(inner.0);
        inner.1.push(sender);
        view
    }
}

/// A connection to a store.
pub(crate) fn wire(store: &Memory, cable: &Cable) -> Transport {
    let (store, cable) = (store.clone(), cable.clone());
    Transport::new(tower::service_fn(move |request| {
        let (store, view) = (store.clone(), cable.subscribe());
        async move { Ok(carry(request, store, view).await) }
    }))
}

async fn carry(request: http::Request<Body>, store: Memory, mut view: View) -> http::Response<Body> {
    let opened = view.borrow().1;
    if let Err(status) = pass(&mut view, opened).await {
        return status.into_http();
    }
    let Ok(response) = store.routes().oneshot(request).await;
    if view.borrow().0 == Mode::NoAnswers {
        return Status::unavailable("connection reset").into_http();
    }
    if let Err(status) = pass(&mut view, opened).await {
        return status.into_http();
    }
    let (head, mut body) = response.into_parts();
    let (sender, frames) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                // When the connection breaks, data in flight is lost, and the stream ends.
                changed = view.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if let Err(status) = pass(&mut view, opened).await {
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                }
                frame = body.frame() => {
                    let Some(Ok(frame)) = frame else { return };
                    // Frames are delivered in order, each with its delay; the rest of an answer comes with its beginning.
                    let is_data = frame.is_data();
                    if sender.send(Ok(frame)).await.is_err() {
                        return;
                    }
                    if is_data && let Err(status) = pass(&mut view, opened).await {
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                }
                () = sender.closed() => return,
            }
        }
    });
    http::Response::from_parts(head, Body::new(StreamBody::new(ReceiverStream::new(frames))))
}
