//! Watches. Each pulls what it has not sent yet, so that a slow client costs no memory: it falls behind, and is cancelled when the
//! history is compacted, as etcd does it. A client that reads nothing at all loses its stream.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::Stream;
use prost::Message;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::connection::Handle;
use super::engine::Engine;
use super::guard::{Slot, Slots};
use super::limits;
use super::server::{Service, client};
use super::state::Events;
use crate::etcd::watch_create_request::FilterType;
use crate::etcd::watch_request::RequestUnion;
use crate::etcd::watch_server::Watch;
use crate::etcd::{ResponseHeader, WatchCancelRequest, WatchCreateRequest, WatchRequest, WatchResponse};

/// The identifier that etcd gives a watch that was not created.
const INVALID_ID: i64 = -1;

/// An answer, with its place if it is large.
type Item = (WatchResponse, Option<Arc<Slot>>);

/// The answers of a stream. A large one has its place until the next one is asked for.
#[derive(Debug)]
pub(super) struct Answers {
    receiver: mpsc::Receiver<Item>,
    slot: Option<Arc<Slot>>,
}

impl Stream for Answers {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.slot = None;
        self.receiver.poll_recv(cx).map(|item| {
            let (response, slot) = item?;
            self.slot = slot;
            Some(Ok(response))
        })
    }
}

#[tonic::async_trait]
impl Watch for Service {
    type WatchStream = Answers;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Answers>, Status> {
        let (answers, receiver) = mpsc::channel(1);
        let watches = Watches {
            engine: self.engine.clone(),
            slots: self.watch_slots.clone(),
            client: client(&request),
            answers,
            watchers: BTreeMap::new(),
            next_id: 0,
            total: self.watches.clone(),
        };
        tokio::spawn(watches.run(request.into_inner()));
        Ok(Response::new(Answers { receiver, slot: None }))
    }
}

/// The watches of one stream.
struct Watches {
    engine: Engine,
    slots: Slots,
    client: Option<Handle>,
    answers: mpsc::Sender<Item>,
    watchers: BTreeMap<i64, Watcher>,
    next_id: i64,
    /// Watches of all streams.
    total: Arc<AtomicUsize>,
}

struct Watcher {
    request: WatchCreateRequest,
    /// The first revision that was not looked at yet.
    next: i64,
}

/// The client is gone, or does not read.
struct Gone;

impl Drop for Watches {
    fn drop(&mut self) {
        self.total.fetch_sub(self.watchers.len(), Ordering::Relaxed);
    }
}

impl Watches {
    async fn run(mut self, mut requests: Streaming<WatchRequest>) {
        let mut revision = self.engine.revision();
        loop {
            let outcome = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.handle(request).await,
                    _ => Err(Gone),
                },
                changed = revision.changed() => match changed {
                    Ok(()) => self.pull_all().await,
                    Err(_) => Err(Gone),
                },
            };
            if outcome.is_err() {
                return;
            }
        }
    }

    async fn handle(&mut self, request: WatchRequest) -> Result<(), Gone> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create).await,
            Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })) => {
                if !self.remove(watch_id) {
                    return Ok(());
                }
                let header = self.header().await?.0;
                self.send(WatchResponse { header, watch_id, canceled: true, ..WatchResponse::default() }).await
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                self.pull_all().await?;
                let header = self.header().await?.0;
                self.send(WatchResponse { header, watch_id: INVALID_ID, ..WatchResponse::default() }).await
            }
            None => Ok(()),
        }
    }

    async fn create(&mut self, create: WatchCreateRequest) -> Result<(), Gone> {
        let (header, revision) = self.header().await?;
        let watch_id = match self.free_id(create.watch_id) {
            Ok(id) => id,
            Err(reason) => {
                let cancel_reason = reason.to_owned();
                let refusal = WatchResponse {
                    header,
                    watch_id: INVALID_ID,
                    created: true,
                    canceled: true,
                    cancel_reason,
                    ..WatchResponse::default()
                };
                return self.send(refusal).await;
            }
        };
        let next = if create.start_revision > 0 { create.start_revision } else { revision + 1 };
        self.total.fetch_add(1, Ordering::Relaxed);
        self.watchers.insert(watch_id, Watcher { request: create, next });
        self.send(WatchResponse { header, watch_id, created: true, ..WatchResponse::default() }).await?;
        self.pull(watch_id).await
    }

    /// The identifier of a new watch: the one that the client wants, or for 0 the next one that is free.
    fn free_id(&mut self, wanted: i64) -> Result<i64, &'static str> {
        if self.watchers.len() >= limits::STREAM_WATCHES || self.total.load(Ordering::Relaxed) >= limits::WATCHES {
            return Err("too many watches");
        }
        if wanted != 0 {
            return if self.watchers.contains_key(&wanted) { Err("mvcc: watch ID already exists") } else { Ok(wanted) };
        }
        while self.watchers.contains_key(&self.next_id) {
            self.next_id = self.next_id.checked_add(1).unwrap_or(0);
        }
        let id = self.next_id;
        self.next_id = id.checked_add(1).unwrap_or(0);
        Ok(id)
    }

    fn remove(&mut self, watch_id: i64) -> bool {
        let was_there = self.watchers.remove(&watch_id).is_some();
        self.total.fetch_sub(usize::from(was_there), Ordering::Relaxed);
        was_there
    }

    async fn header(&self) -> Result<(Option<ResponseHeader>, i64), Gone> {
        self.engine.call(|state, _| Ok((state.header(), state.revision()))).await.map_err(|_| Gone)
    }

    async fn pull_all(&mut self) -> Result<(), Gone> {
        for id in self.watchers.keys().copied().collect::<Vec<_>>() {
            self.pull(id).await?;
        }
        Ok(())
    }

    /// Sends a watch all that it has not sent yet.
    async fn pull(&mut self, watch_id: i64) -> Result<(), Gone> {
        let mut slot = None;
        loop {
            let Some(watcher) = self.watchers.get_mut(&watch_id) else { return Ok(()) };
            let WatchCreateRequest { key, range_end, .. } = watcher.request.clone();
            let from = watcher.next;
            let pulled = self.engine.call(move |state, _| Ok((state.header(), state.events(from, &key, &range_end))));
            let (header, mut events, next) = match pulled.await.map_err(|_| Gone)? {
                (header, Events::Compacted(compact_revision)) => return self.cancel_compacted(header, watch_id, compact_revision).await,
                (header, Events::Next(events, next)) => (header, events, next),
            };
            let unwanted: Vec<i32> = watcher.request.filters().map(|f| if f == FilterType::Noput { 0 } else { 1 }).collect();
            events.retain(|event| !unwanted.contains(&event.r#type));
            if !watcher.request.prev_kv {
                events.iter_mut().for_each(|event| event.prev_kv = None);
            }
            let response = WatchResponse { header, watch_id, events, ..WatchResponse::default() };
            if slot.is_none() && response.encoded_len() > limits::SMALL {
                // One revision may be large. While this waits for a place, it holds nothing.
                drop(response);
                slot = Some(self.slots.take(self.client.clone()).await.map_err(|_| Gone)?);
                continue;
            }
            // A watch may begin in the future: its beginning never moves back.
            watcher.next = watcher.next.max(next);
            let done = next <= from || response.header.is_none_or(|header| next > header.revision);
            if !response.events.is_empty() {
                self.send_large(response, slot.take()).await?;
            }
            if done {
                return Ok(());
            }
        }
    }

    async fn cancel_compacted(&mut self, header: Option<ResponseHeader>, watch_id: i64, compact_revision: i64) -> Result<(), Gone> {
        self.remove(watch_id);
        let cancel_reason = "etcdserver: mvcc: required revision has been compacted".to_owned();
        self.send(WatchResponse { header, watch_id, canceled: true, compact_revision, cancel_reason, ..WatchResponse::default() }).await
    }

    async fn send(&self, response: WatchResponse) -> Result<(), Gone> {
        self.send_large(response, None).await
    }

    async fn send_large(&self, response: WatchResponse, slot: Option<Arc<Slot>>) -> Result<(), Gone> {
        match tokio::time::timeout(limits::READING, self.answers.send((response, slot))).await {
            Ok(sent) => sent.map_err(|_| Gone),
            Err(_) => {
                tracing::debug!("stream of watches ended: its client does not read");
                if let Some(client) = &self.client {
                    client.close();
                }
                Err(Gone)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn watches_of_all_streams_are_bounded() {
        let total = Arc::new(AtomicUsize::new(limits::WATCHES - 1));
        let (answers, _receiver) = mpsc::channel(1);
        let engine = crate::embedded::engine::Memory::new().engine();
        let mut watches =
            Watches { engine, slots: Slots::new(), client: None, answers, watchers: BTreeMap::new(), next_id: 0, total: total.clone() };
        assert_eq!(watches.free_id(0), Ok(0));
        total.fetch_add(1, Ordering::Relaxed);
        assert_eq!(watches.free_id(0), Err("too many watches"));
    }
}
