//! Follows the leases: a snapshot, then the watch from its revision on. However a watch ends (compaction, cancellation, a lost
//! connection or leader), a fresh snapshot follows, so that nothing is missed.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use flannel::{Config, Lease, StoreEvent};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};

use super::call::TIMEOUT;
use super::seen::Seen;
use super::{Entry, Etcd, EtcdError, Inner};
use crate::etcd::event::EventType;
use crate::etcd::watch_client::WatchClient;
use crate::etcd::watch_request::RequestUnion;
use crate::etcd::{WatchCreateRequest, WatchRequest, WatchResponse, prefix_end};
use crate::store::link::Outage;
use crate::store::{Link, foreign_text, limits};

/// A watch, with the sender that keeps it open.
struct Watch {
    answers: Streaming<WatchResponse>,
    _requests: mpsc::Sender<WatchRequest>,
}

impl Etcd {
    /// Sends one snapshot and then every change, and returns why that ended.
    pub(super) async fn snapshot_and_watch(&self, events: &mpsc::Sender<Vec<StoreEvent>>, link: &mut Link, seen: &mut Seen) -> Outage {
        let snapshot = match self.take_cached() {
            Some(snapshot) => snapshot,
            None => match self.snapshot().await {
                Ok(snapshot) => snapshot,
                Err(error @ EtcdError::Refused { .. }) => return Outage::Refused(error.to_string()),
                Err(error) => return Outage::Lost(error.to_string()),
            },
        };
        link.set_leases(snapshot.entries.len());
        seen.report(&snapshot.unreadable);
        self.compare_config(snapshot.config.as_deref(), link);
        let revision = snapshot.revision;
        let mut list = vec![StoreEvent::Init];
        list.extend(seen.list(revision, &snapshot.entries).then_some(StoreEvent::Older));
        list.extend(snapshot.entries.into_iter().map(event));
        list.push(StoreEvent::InitDone);
        if events.send(list).await.is_err() {
            return closed();
        }
        seen.list_sent();
        let mut watch = match self.watch(revision + 1).await {
            Ok(watch) => watch,
            Err(outage) => return outage,
        };
        loop {
            let answer = match watch.answers.message().await {
                Ok(Some(answer)) => answer,
                Ok(None) => return Outage::Lost("etcd ended the watch".to_owned()),
                Err(status) => return Outage::Lost(format!("the watch broke: {}", self.explain(&status).await)),
            };
            if answer.canceled {
                return self.cancelled(&answer);
            }
            if link.up() {
                tracing::info!(revision, "store watch started");
            }
            let changes = self.changes(&answer, seen, link);
            if !changes.is_empty() && events.send(changes).await.is_err() {
                return closed();
            }
        }
    }

    /// Opens a stream with two watches: of the leases, and of the network config.
    async fn watch(&self, start_revision: i64) -> Result<Watch, Outage> {
        let key = self.subnets().into_bytes();
        let leases = WatchCreateRequest { range_end: prefix_end(&key), key, start_revision, ..WatchCreateRequest::default() };
        let config = WatchCreateRequest { key: self.config_key().into_bytes(), start_revision, ..WatchCreateRequest::default() };
        let (requests, stream) = mpsc::channel(2);
        for create in [leases, config] {
            let _ = requests.try_send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) });
        }
        let mut request = Request::new(ReceiverStream::new(stream));
        // A member without a leader would be silent for ever; with this it ends the watch.
        request.metadata_mut().insert("hasleader", tonic::metadata::MetadataValue::from_static("true"));
        let Inner { endpoints, current, .. } = &*self.0;
        let opened = async {
            let connection = endpoints.connection(current.load(Ordering::Relaxed)).await?;
            WatchClient::new(connection).max_decoding_message_size(limits::ANSWER).watch(request).await
        };
        match tokio::time::timeout(TIMEOUT, opened).await {
            Ok(Ok(answers)) => Ok(Watch { answers: answers.into_inner(), _requests: requests }),
            Ok(Err(status)) => {
                endpoints.forget_stale_token(&status);
                Err(Outage::Lost(format!("cannot open a watch: {}", self.explain(&status).await)))
            }
            Err(_) => Err(Outage::Lost("cannot open a watch: no answer in time".to_owned())),
        }
    }

    async fn explain(&self, status: &Status) -> String {
        let Inner { endpoints, current, .. } = &*self.0;
        endpoints.explain(current.load(Ordering::Relaxed) % endpoints.len(), status).await
    }

    /// etcd cancelled a watch.
    fn cancelled(&self, answer: &WatchResponse) -> Outage {
        if answer.compact_revision > 0 {
            return Outage::Lost("etcd cancelled the watch: its revision is compacted".to_owned());
        }
        let status = Status::permission_denied(answer.cancel_reason.clone());
        // A list does not say that the token is too old; the next attempt logs in again.
        if self.0.endpoints.forget_stale_token(&status) {
            return Outage::Lost(format!("etcd cancelled the watch: {}", foreign_text(&answer.cancel_reason)));
        }
        match self.refused("watch the leases", &status) {
            EtcdError::Refused { message, .. } if message.contains("denied") => {
                Outage::Refused(format!("etcd cancelled the watch: {message}"))
            }
            _ => Outage::Lost(format!("etcd cancelled the watch: {}", foreign_text(&answer.cancel_reason))),
        }
    }

    /// The lease events of an answer. A change of the network config is compared with the one in use.
    fn changes(&self, answer: &WatchResponse, seen: &mut Seen, link: &mut Link) -> Vec<StoreEvent> {
        let config_key = self.config_key();
        let mut changes = Vec::with_capacity(answer.events.len());
        for change in &answer.events {
            let Some(kv) = &change.kv else { continue };
            let is_put = change.r#type() == EventType::Put;
            if kv.key == config_key.as_bytes() {
                self.compare_config(is_put.then_some(kv.value.as_slice()), link);
                continue;
            }
            let (entry, unreadable) = self.read(kv);
            if let Some(entry) = &entry {
                seen.change(entry.key, kv.mod_revision, is_put);
            }
            if is_put {
                seen.report(unreadable.as_slice());
                if entry.as_ref().is_some_and(|entry| self.is_foreign_write(entry)) {
                    link.foreign_write();
                }
                changes.extend(entry.map(event));
            } else {
                // A deletion carries no value, so only its key is read.
                changes.extend(entry.map(|entry| StoreEvent::Delete(entry.key)));
            }
        }
        link.set_leases(seen.len());
        changes
    }

    /// Warns of a network config in etcd that is not the one in use. The running daemon keeps what it began with.
    fn compare_config(&self, now: Option<&[u8]>, link: &Link) {
        let mut noted = self.0.config.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = &*noted else {
            // Nothing was begun with: a follower alone has no config to compare.
            return;
        };
        if before.now.as_deref() == now {
            return;
        }
        let key = self.config_key();
        let text = match now.map(|text| parse_config(&key, text)) {
            None => format!("{key} in etcd was deleted; this node keeps the network config that it started with"),
            Some(Err(problem)) => format!("{problem}; this node keeps the network config that it started with"),
            Some(Ok(config)) if config == before.in_use => String::new(),
            Some(Ok(_)) => format!("{key} in etcd was changed; restart flanneld on each host to apply it"),
        };
        if text.is_empty() {
            tracing::info!("network config in etcd is the one in use again");
        } else {
            tracing::warn!(reason = %text, "network config in etcd differs from the one in use");
            link.notice("NetworkConfigChanged", text);
        }
        *noted = Some(super::NotedConfig { now: now.map(<[u8]>::to_vec), in_use: before.in_use.clone() });
    }
}

/// Reads the network config; the error names the key and the field.
pub(super) fn parse_config(key: &str, text: &[u8]) -> Result<Config, String> {
    if text.len() > limits::CONFIG {
        return Err(format!("{key} in etcd cannot be used: it has {} bytes, at most {} are read", text.len(), limits::CONFIG));
    }
    let text = std::str::from_utf8(text).map_err(|_| format!("{key} in etcd cannot be used: it is not UTF-8 text"))?;
    Config::parse(text).map_err(|error| format!("{key} in etcd cannot be used: {}", foreign_text(&error.to_string())))
}

fn closed() -> Outage {
    Outage::Lost("event channel closed".to_owned())
}

fn event(entry: Entry) -> StoreEvent {
    let age = entry.age();
    match entry.peer {
        Some(peer) => StoreEvent::Apply(Lease { key: entry.key, peer }, age),
        None => StoreEvent::Keep(entry.key, age),
    }
}
