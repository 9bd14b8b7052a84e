//! The wire between a daemon and its store: it delays, refuses, goes silent, and loses answers to what was done.

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

/// How a wire behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A few milliseconds, nothing lost.
    Open,
    /// Nobody listens at the other end.
    Refused,
    /// Nothing arrives, nobody says so.
    Silent,
    /// Everything takes so many milliseconds.
    Slow(u64),
    /// Requests arrive and are done, answers do not come back.
    Deaf,
}

/// After so long without a sign of life a connection is given up (HTTP/2 keep-alive of the client).
const PATIENCE: Duration = Duration::from_secs(15);

fn jitter(millis: u64) -> Duration {
    Duration::from_micros(fastrand::u64(0..=millis * 1000))
}

/// One connection's view of its cable: how that behaves, and how often it broke so far.
type View = watch::Receiver<(Mode, u32)>;

/// Waits as long as the wire takes; fails if it does not let anything through, or broke since it was laid.
async fn pass(view: &mut View, laid: u32) -> Result<(), Status> {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let (mode, broken) = *view.borrow_and_update();
        if broken != laid {
            return Err(Status::unavailable("connection reset"));
        }
        match mode {
            Mode::Open | Mode::Deaf => tokio::time::sleep(jitter(2)).await,
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
        return match view.borrow().1 == laid {
            true => Ok(()),
            false => Err(Status::unavailable("connection reset")),
        };
    }
}

/// What a host's wires have in common. Each has a channel of its own: who of several receivers of one is woken first is left
/// to chance.
#[derive(Debug, Clone)]
pub(crate) struct Cable(Arc<Mutex<Ends>>, Arc<AtomicUsize>);

/// How the cable behaves and how often it broke, and its wires.
type Ends = ((Mode, u32), Vec<watch::Sender<(Mode, u32)>>);

impl Cable {
    pub(crate) fn new() -> Cable {
        Cable(Arc::new(Mutex::new(((Mode::Open, 0), Vec::new()))), Arc::default())
    }

    /// Behaves otherwise from now on; returns how it did before.
    pub(crate) fn set(&self, mode: Mode) -> Mode {
        let mut inner = self.0.lock().unwrap();
        inner.1.retain(|wire| !wire.is_closed());
        let (before, broken) = inner.0;
        inner.0 = (mode, broken + u32::from(mode == Mode::Refused));
        for wire in &inner.1 {
            wire.send_replace(inner.0);
        }
        before
    }

    /// How many requests went over it so far.
    pub(crate) fn requests(&self) -> usize {
        self.1.load(Ordering::Relaxed)
    }

    fn subscribe(&self) -> View {
        self.1.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.0.lock().unwrap();
        let (tell, view) = watch::channel(inner.0);
        inner.1.push(tell);
        view
    }
}

/// A wire to a store.
pub(crate) fn wire(store: &Memory, cable: &Cable) -> Transport {
    let (store, cable) = (store.clone(), cable.clone());
    Transport::new(tower::service_fn(move |request| {
        let (store, view) = (store.clone(), cable.subscribe());
        async move { Ok(carry(request, store, view).await) }
    }))
}

async fn carry(request: http::Request<Body>, store: Memory, mut view: View) -> http::Response<Body> {
    let laid = view.borrow().1;
    if let Err(status) = pass(&mut view, laid).await {
        return status.into_http();
    }
    let Ok(response) = store.routes().oneshot(request).await;
    if view.borrow().0 == Mode::Deaf {
        return Status::unavailable("connection reset").into_http();
    }
    if let Err(status) = pass(&mut view, laid).await {
        return status.into_http();
    }
    let (head, mut body) = response.into_parts();
    let (put, taken) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                // What was on its way when the wire broke is lost, and the stream with it.
                changed = view.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if let Err(status) = pass(&mut view, laid).await {
                        let _ = put.send(Err(status)).await;
                        return;
                    }
                }
                frame = body.frame() => {
                    let Some(Ok(frame)) = frame else { return };
                    // Frames are carried in order, each in its time; the rest of one answer comes with its beginning.
                    let is_data = frame.is_data();
                    if put.send(Ok(frame)).await.is_err() {
                        return;
                    }
                    if is_data && let Err(status) = pass(&mut view, laid).await {
                        let _ = put.send(Err(status)).await;
                        return;
                    }
                }
                () = put.closed() => return,
            }
        }
    });
    http::Response::from_parts(head, Body::new(StreamBody::new(ReceiverStream::new(taken))))
}
