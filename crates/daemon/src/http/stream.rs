//! The stream of events at `/events` of the socket: a line of JSON for each. Each reader compares the views itself, with what it was sent
//! last: so there is no queue, a slow reader gets the sum of what it missed, and while no client reads, nothing is compared.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper::body::{Bytes, Frame};
use serde::Serialize;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::{Sources, limits};
use crate::clock;
use crate::events::{Event, Seen, between};

/// Frames that wait for a reader.
const WAITING: usize = 1;

/// The body of an answer that does not end.
pub(super) type Events = http_body_util::StreamBody<ReceiverStream<Result<Frame<Bytes>, Infallible>>>;

/// What a connection knows about the stream on it.
#[derive(Debug, Default)]
pub(super) struct Streaming {
    began: AtomicBool,
    stalled: Notify,
}

impl Streaming {
    /// Has a stream begun?
    pub(super) fn has_begun(&self) -> bool {
        self.began.load(Ordering::Relaxed)
    }

    /// Waits until the client does not read any more.
    pub(super) async fn stalled(&self) {
        self.stalled.notified().await;
    }
}

/// An event with its time.
#[derive(Debug, Serialize)]
struct Line<'a> {
    time: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

/// Begins a stream of events.
pub(super) fn begin(sources: Sources, streaming: Arc<Streaming>) -> Events {
    let (send, frames) = mpsc::channel(WAITING);
    streaming.began.store(true, Ordering::Relaxed);
    tokio::spawn(run(sources, send, streaming));
    http_body_util::StreamBody::new(ReceiverStream::new(frames))
}

async fn run(mut sources: Sources, send: mpsc::Sender<Result<Frame<Bytes>, Infallible>>, streaming: Arc<Streaming>) {
    let (mut view, mut paths) = (sources.view.borrow_and_update().clone(), sources.paths.borrow_and_update().clone());
    // The first line says that the stream has begun: what changes from now on will be in it.
    let mut text = "\n".to_owned();
    loop {
        if !text.is_empty() {
            match tokio::time::timeout(limits::STALLED, send.send(Ok(Frame::data(Bytes::from(text))))).await {
                Ok(Ok(())) => {}
                // The client has gone away.
                Ok(Err(_)) => return,
                Err(_) => return streaming.stalled.notify_one(),
            }
        }
        // Paths never end where they are not measured.
        let has_paths = sources.paths.has_changed().is_ok();
        text = tokio::select! {
            changed = sources.view.changed() => match changed {
                Ok(()) => String::new(),
                Err(_) => return,
            },
            Ok(()) = sources.paths.changed(), if has_paths => String::new(),
            // A client that is gone is known by writing to it.
            () = tokio::time::sleep(limits::BEAT) => "\n".to_owned(),
            () = send.closed() => return,
        };
        let (new_view, new_paths) = (sources.view.borrow_and_update().clone(), sources.paths.borrow_and_update().clone());
        let time = clock::now();
        let events = between(Seen { view: &view, paths: &paths }, Seen { view: &new_view, paths: &new_paths });
        for event in &events {
            text.push_str(&serde_json::to_string(&Line { time: &time, event }).unwrap_or_default());
            text.push('\n');
        }
        (view, paths) = (new_view, new_paths);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documented_fields_are_those_that_are_written() {
        let (subject, text, by) = ("route".to_owned(), "set route x".to_owned(), Some("ip, process 7".to_owned()));
        let event = Event { kind: "repair", action: "made", subject, text, by };
        let value = serde_json::to_value(Line { time: "2026-11-28T15:00:00.000Z", event: &event }).unwrap();
        assert_eq!(crate::state::fields(&value), crate::state::documented("/events"));
        let page = include_str!("../../../../docs/state.md");
        assert!(crate::events::TYPES.iter().all(|kind| page.contains(&format!("`{kind}`"))));
    }
}
