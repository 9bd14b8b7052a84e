//! The etcd client: configuration, leases, and the watch whose every end is a fresh snapshot.

mod keeper;
mod seen;

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use flannel::wire::{self, WireError};
use flannel::{Config, Lease, LeaseKey, Peer, PerFamily, StoreEvent};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

pub use self::keeper::{AcquireError, Keeper};
use self::seen::Seen;
use super::connect::{Access, Connection, Endpoints, Transport, describe};
use super::{Claim, LeaseHandle, Link, Store, StoreError};
use crate::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::etcd::event::EventType;
use crate::etcd::kv_client::KvClient;
use crate::etcd::lease_client::LeaseClient;
use crate::etcd::request_op::Request as Op;
use crate::etcd::watch_client::WatchClient;
use crate::etcd::watch_request::RequestUnion;
use crate::etcd::{
    Compare, DeleteRangeRequest, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
    RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, prefix_end,
};
use crate::notice::Notice;

/// How long an endpoint may take to answer before the next one is asked.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a list of all leases may take at most: the first time as long as any answer, and twice as long each time that this was
/// not enough. Thousands of leases over a slow line, or from a store of which all hosts want them at once, need more.
const LIST: Duration = Duration::from_secs(80);
/// How long a list is believed that was asked for by another part of the start.
const SEED: Duration = Duration::from_secs(5);

/// What a store could not do.
#[derive(Debug, Clone, Error)]
pub enum EtcdError {
    /// `--etcd-endpoints` cannot be used.
    #[error("--etcd-endpoints: {0:?}: {1}")]
    Endpoint(String, String),
    /// A certificate or key file cannot be used.
    #[error("{0} {1}: {2}")]
    File(&'static str, String, String),
    /// No endpoint answers.
    #[error("no etcd endpoint answers ({endpoints}); the last said: {last}")]
    Unreachable {
        /// All endpoints.
        endpoints: String,
        /// What the last one said.
        last: String,
        /// Did it say nothing in time?
        is_slow: bool,
    },
    /// The store refused.
    #[error("etcd refused to {act}: {message}")]
    Refused {
        /// What was asked.
        act: &'static str,
        /// What it said.
        message: String,
    },
}

/// A client of the store. Clones share connections.
#[derive(Debug, Clone)]
pub struct Etcd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoints: Endpoints,
    /// The endpoint that answered last.
    current: AtomicUsize,
    prefix: String,
    /// The list by which the first lease was chosen, with that lease in it, and when that was: who follows next need not ask
    /// for it again.
    seed: Mutex<Option<(Snapshot, Instant)>>,
    /// Counts how often this host got another address.
    moves: watch::Sender<u32>,
    /// How long a list may take now.
    patience: Mutex<Duration>,
}

/// A lease as it is stored.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The subnets that the key names.
    pub key: LeaseKey,
    /// The owner; `None` if the value cannot be read.
    pub peer: Option<Peer>,
    /// The revision at which the key was made: of two leases, this tells which is older.
    pub create_revision: i64,
    /// The key's revision, by which a change is made conditional.
    pub mod_revision: i64,
    /// The etcd lease on it; 0 for a reservation, which never expires.
    pub lease: i64,
}

/// All leases at one revision.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The leases.
    pub entries: Vec<Entry>,
    /// The store's revision.
    pub revision: i64,
    unreadable: Vec<Unreadable>,
}

#[derive(Debug, Clone)]
struct Unreadable {
    key: String,
    revision: i64,
    reason: String,
}

impl Etcd {
    /// A client of the store. Nothing is connected yet. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`EtcdError::Endpoint`] and [`EtcdError::File`].
    pub fn new(access: &Access) -> Result<Etcd, EtcdError> {
        let prefix = access.prefix.trim_end_matches('/').to_owned();
        Ok(Etcd::with(Endpoints::new(access)?, prefix))
    }

    /// A client that reaches its store by wires of the caller's, laid anew when this host moves.
    pub fn over(name: &str, lay: impl Fn() -> Transport + Send + Sync + 'static, prefix: &str) -> Etcd {
        Etcd::with(Endpoints::over(vec![name.to_owned()], vec![Box::new(lay)], None), prefix.to_owned())
    }

    fn with(endpoints: Endpoints, prefix: String) -> Etcd {
        let (current, moves) = (AtomicUsize::new(0), watch::channel(0).0);
        Etcd(Arc::new(Inner { endpoints, current, prefix, seed: Mutex::default(), moves, patience: Mutex::new(TIMEOUT) }))
    }

    /// Keeps a list for who asks next.
    fn cache_snapshot(&self, snapshot: Snapshot) {
        *self.0.seed.lock().unwrap_or_else(PoisonError::into_inner) = Some((snapshot, Instant::now()));
    }

    /// The list that was kept, if it is not too old to be believed.
    fn take_cached(&self) -> Option<Snapshot> {
        let seed = self.0.seed.lock().unwrap_or_else(PoisonError::into_inner).take();
        seed.filter(|(_, at)| at.elapsed() < SEED).map(|(snapshot, _)| snapshot)
    }

    /// A client of a store that wants neither TLS nor a password.
    ///
    /// # Errors
    /// [`EtcdError::Endpoint`].
    pub fn plain(endpoints: &str, prefix: &str) -> Result<Etcd, EtcdError> {
        Etcd::new(&Access { endpoints: endpoints.to_owned(), prefix: prefix.to_owned(), ..Access::default() })
    }

    /// This host has another address: what was connected from the old one is dead, though nobody says so.
    fn reconnect(&self) {
        self.0.endpoints.renew();
        self.0.moves.send_modify(|count| *count += 1);
    }

    /// The key of the network configuration.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.0.prefix)
    }

    fn lease_key(&self, key: &LeaseKey) -> String {
        format!("{}{}", self.subnets(), wire::key(key))
    }

    fn subnets(&self) -> String {
        format!("{}/subnets/", self.0.prefix)
    }

    /// The network configuration's text; `None` if there is none.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn config(&self) -> Result<Option<Vec<u8>>, EtcdError> {
        let request = RangeRequest { key: self.config_key().into_bytes(), ..RangeRequest::default() };
        let answer = self.call("read the network config", |channel| range(channel, request.clone())).await?;
        Ok(answer.kvs.into_iter().next().map(|kv| kv.value))
    }

    /// Writes the network configuration.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn put_config(&self, text: &str) -> Result<(), EtcdError> {
        let request = PutRequest { key: self.config_key().into_bytes(), value: text.as_bytes().to_vec(), ..PutRequest::default() };
        self.call("write the network config", |channel| put(channel, request.clone())).await.map(drop)
    }

    /// Deletes every key below the prefix: the end of a lab.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn delete_everything(&self) -> Result<(), EtcdError> {
        let key = format!("{}/", self.0.prefix).into_bytes();
        let request = DeleteRangeRequest { range_end: prefix_end(&key), key, ..DeleteRangeRequest::default() };
        let ask = |channel| {
            let request = request.clone();
            async move { KvClient::new(channel).delete_range(request).await }
        };
        self.call("delete the keys of a lab", ask).await.map(drop)
    }

    /// All leases at one revision.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn snapshot(&self) -> Result<Snapshot, EtcdError> {
        let key = self.subnets().into_bytes();
        self.snapshot_of(RangeRequest { range_end: prefix_end(&key), key, ..RangeRequest::default() }).await
    }

    /// The leases that were created after a revision.
    async fn created_since(&self, revision: i64) -> Result<Snapshot, EtcdError> {
        let key = self.subnets().into_bytes();
        let min_create_revision = revision + 1;
        self.snapshot_of(RangeRequest { range_end: prefix_end(&key), key, min_create_revision, ..RangeRequest::default() }).await
    }

    async fn snapshot_of(&self, request: RangeRequest) -> Result<Snapshot, EtcdError> {
        let mut patience = *self.0.patience.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        let answer = self.call_within(patience, "read the leases", |channel| range(channel, request.clone())).await;
        match &answer {
            Err(EtcdError::Unreachable { is_slow: true, .. }) => patience = (patience * 2).min(LIST),
            Ok(_) if began.elapsed() < TIMEOUT / 2 => patience = TIMEOUT,
            _ => {}
        }
        *self.0.patience.lock().unwrap_or_else(PoisonError::into_inner) = patience;
        let answer = answer?;
        let revision = answer.header.map_or(0, |header| header.revision);
        let mut snapshot = Snapshot { entries: Vec::with_capacity(answer.kvs.len()), revision, unreadable: Vec::new() };
        for kv in &answer.kvs {
            let (entry, unreadable) = self.read(kv);
            snapshot.entries.extend(entry);
            snapshot.unreadable.extend(unreadable);
        }
        // The store's order is that of text. Who is given them in order has less to do.
        snapshot.entries.sort_unstable_by_key(|entry| entry.key);
        Ok(snapshot)
    }

    /// Reads a stored lease, as far as it can be read, and says what cannot.
    fn read(&self, kv: &KeyValue) -> (Option<Entry>, Option<Unreadable>) {
        let text = String::from_utf8_lossy(&kv.key);
        let unreadable = |reason: String| Unreadable { key: text.to_string(), revision: kv.mod_revision, reason };
        let name = text.strip_prefix(&self.subnets()).unwrap_or(&text);
        let key = match wire::parse_key(name) {
            // Two spellings of one subnet would let the end of the one take the other away.
            Ok(key) if wire::key(&key) != name => {
                return (None, Some(unreadable(format!("the key of {key} is spelled {}", wire::key(&key)))));
            }
            Ok(key) => key,
            Err(error) => return (None, Some(unreadable(error.to_string()))),
        };
        let (peer, problem): (_, Option<WireError>) = match wire::parse_value(&kv.value) {
            Ok(peer) => (Some(peer), None),
            Err(error) => (None, Some(error)),
        };
        let entry = Entry { key, peer, create_revision: kv.create_revision, mod_revision: kv.mod_revision, lease: kv.lease };
        (Some(entry), problem.map(|error| unreadable(error.to_string())))
    }

    /// Grants an etcd lease of `ttl` and returns its identifier.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn grant(&self, ttl: Duration) -> Result<i64, EtcdError> {
        let request = LeaseGrantRequest { ttl: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX), id: 0 };
        self.call("grant a lease", |channel| async move { LeaseClient::new(channel).lease_grant(request).await })
            .await
            .map(|answer| answer.id)
    }

    /// Gives an etcd lease back; that it is gone already is as good.
    pub async fn revoke(&self, id: i64) {
        let request = LeaseRevokeRequest { id };
        // If this fails the lease ends by itself.
        let _ = self.call("revoke a lease", |channel| async move { LeaseClient::new(channel).lease_revoke(request).await }).await;
    }

    /// Begins an etcd lease's life anew. Returns its length, or `None` if the lease is gone. No key is written, so no
    /// peer hears of it, and it cannot renew what is somebody else's by now.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn keep_alive(&self, id: i64) -> Result<Option<Duration>, EtcdError> {
        let ask = |channel: Connection| async move {
            let requests = tokio_stream::once(LeaseKeepAliveRequest { id });
            let mut answers = LeaseClient::new(channel).lease_keep_alive(requests).await?.into_inner();
            answers.message().await?.map(Response::new).ok_or_else(|| Status::unavailable("no answer to a keep-alive"))
        };
        let answer = self.call("renew the lease", ask).await?;
        Ok(u64::try_from(answer.ttl).ok().filter(|ttl| *ttl > 0).map(Duration::from_secs))
    }

    /// Writes a lease if its key still has this revision (0: if it does not exist); false if somebody was faster.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn put_lease(&self, lease: &Lease, etcd_lease: i64, expected: i64) -> Result<bool, EtcdError> {
        let key = self.lease_key(&lease.key).into_bytes();
        let put = PutRequest { key: key.clone(), value: wire::value(&lease.peer).into_bytes(), lease: etcd_lease, ..PutRequest::default() };
        self.conditional("write the lease", key, expected, Op::RequestPut(put)).await
    }

    /// Deletes a lease if its key still has this revision; false if somebody was faster.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn delete_lease(&self, key: &LeaseKey, expected: i64) -> Result<bool, EtcdError> {
        let key = self.lease_key(key).into_bytes();
        let delete = DeleteRangeRequest { key: key.clone(), ..DeleteRangeRequest::default() };
        self.conditional("delete a lease", key, expected, Op::RequestDeleteRange(delete)).await
    }

    async fn conditional(&self, act: &'static str, key: Vec<u8>, expected: i64, op: Op) -> Result<bool, EtcdError> {
        let target_union = Some(TargetUnion::ModRevision(expected));
        let compare =
            Compare { result: CompareResult::Equal.into(), target: CompareTarget::Mod.into(), key, range_end: Vec::new(), target_union };
        let request = TxnRequest { compare: vec![compare], success: vec![RequestOp { request: Some(op) }], failure: Vec::new() };
        let answer = self.call(act, |channel| {
            let request = request.clone();
            async move { KvClient::new(channel).txn(request).await }
        });
        Ok(answer.await?.succeeded)
    }

    /// Asks the endpoint that answered last, then the others in turn. One whose token is too old is asked again with a
    /// new one.
    async fn call<T, F, A>(&self, act: &'static str, ask: F) -> Result<T, EtcdError>
    where
        F: Fn(Connection) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(TIMEOUT, act, ask).await
    }

    /// The same, with so much time for each.
    async fn call_within<T, F, A>(&self, patience: Duration, act: &'static str, ask: F) -> Result<T, EtcdError>
    where
        F: Fn(Connection) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let Inner { endpoints, current, .. } = &*self.0;
        let (mut last, mut is_slow) = (String::new(), false);
        let mut tries = endpoints.len();
        let mut logins = 1;
        while tries > 0 {
            let at = current.load(Ordering::Relaxed);
            let answer = async { ask(endpoints.connection(at).await?).await };
            let status = match tokio::time::timeout(patience, answer).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {} s", patience.as_secs())),
            };
            if endpoints.forget_stale_token(&status) && logins > 0 {
                logins -= 1;
                continue;
            }
            let elsewhere =
                matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal);
            if !elsewhere {
                return Err(EtcdError::Refused { act, message: status.message().to_owned() });
            }
            last = describe(&status);
            is_slow = status.code() == Code::DeadlineExceeded;
            tries -= 1;
            // Another task may have moved on already.
            let _ = current.compare_exchange(at, at + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        endpoints.renew_certificates();
        Err(EtcdError::Unreachable { endpoints: endpoints.names.join(","), last, is_slow })
    }

    /// One snapshot and the watch from its revision on. Returns why it ended.
    async fn snapshot_and_watch(&self, events: &mpsc::Sender<Vec<StoreEvent>>, link: &mut Link, seen: &mut Seen) -> String {
        let snapshot = match self.take_cached() {
            Some(snapshot) => snapshot,
            None => match self.snapshot().await {
                Ok(snapshot) => snapshot,
                Err(error) => return error.to_string(),
            },
        };
        seen.report(&snapshot.unreadable);
        let revision = snapshot.revision;
        let mut list = vec![StoreEvent::Init];
        list.extend(seen.list(revision, &snapshot.entries).then_some(StoreEvent::Older));
        list.extend(snapshot.entries.into_iter().map(event));
        list.push(StoreEvent::InitDone);
        if events.send(list).await.is_err() {
            return "nobody listens".to_owned();
        }
        seen.told();

        let key = self.subnets().into_bytes();
        let create = WatchCreateRequest { range_end: prefix_end(&key), key, start_revision: revision + 1, ..WatchCreateRequest::default() };
        // The sender is kept: the watch lives as long as the stream of requests.
        let (requests, stream) = mpsc::channel(1);
        let _ = requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await;
        let mut request = Request::new(ReceiverStream::new(stream));
        // A member without a leader would be silent for ever; with this it ends the watch.
        request.metadata_mut().insert("hasleader", tonic::metadata::MetadataValue::from_static("true"));
        let Inner { endpoints, current, .. } = &*self.0;
        let connection = match endpoints.connection(current.load(Ordering::Relaxed)).await {
            Ok(connection) => connection,
            Err(status) => return format!("the watch cannot begin: {}", describe(&status)),
        };
        let mut client = WatchClient::new(connection).max_decoding_message_size(usize::MAX);
        let opened = tokio::time::timeout(TIMEOUT, client.watch(request)).await;
        let mut answers = match opened {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                endpoints.forget_stale_token(&status);
                return format!("the watch cannot begin: {}", describe(&status));
            }
            Err(_) => return "the watch cannot begin: no answer".to_owned(),
        };
        loop {
            let answer = match answers.message().await {
                Ok(Some(answer)) => answer,
                Ok(None) => return "the store ended the watch".to_owned(),
                Err(status) => return format!("the watch broke: {}", describe(&status)),
            };
            if answer.canceled {
                // A list does not tell when it is the token that is too old: the next try logs in.
                endpoints.forget_stale_token(&Status::unknown(answer.cancel_reason.clone()));
                let compacted = if answer.compact_revision > 0 {
                    format!(" (compacted at revision {})", answer.compact_revision)
                } else {
                    String::new()
                };
                return format!("the store cancelled the watch: {}{compacted}", answer.cancel_reason);
            }
            if link.up() {
                tracing::info!(revision, "following the store");
            }
            let mut news = Vec::with_capacity(answer.events.len());
            for change in &answer.events {
                let Some(kv) = &change.kv else { continue };
                let (entry, unreadable) = self.read(kv);
                let is_there = change.r#type() == EventType::Put;
                if let Some(entry) = &entry {
                    seen.change(entry.key, kv.mod_revision, is_there);
                }
                if is_there {
                    seen.report(unreadable.as_slice());
                    news.extend(entry.map(event));
                } else {
                    // A deletion carries no value, so only its key is read.
                    news.extend(entry.map(|entry| StoreEvent::Delete(entry.key)));
                }
            }
            if !news.is_empty() && events.send(news).await.is_err() {
                return "nobody listens".to_owned();
            }
        }
    }
}

impl Store for Etcd {
    async fn config(&self) -> Result<Config, StoreError> {
        let key = self.config_key();
        match Etcd::config(self).await {
            Ok(Some(text)) => {
                let text = String::from_utf8(text).with_context(|| format!("{key} in etcd is no UTF-8 text"));
                let config = text.and_then(|text| Config::parse(&text).with_context(|| format!("{key} in etcd cannot be used")));
                config.map_err(StoreError::Lasting)
            }
            Ok(None) => {
                let text = format!("there is no network config in etcd yet: put one at {key}");
                Err(StoreError::Passing(Notice::new("NoNetworkConfig", text)))
            }
            Err(error) => Err(StoreError::Passing(Notice::new("StoreUnreachable", error.to_string()))),
        }
    }

    async fn node_public(&self) -> Result<PerFamily<IpAddr>, StoreError> {
        Ok(PerFamily::default())
    }

    async fn published(&self, _: &Config, public: PerFamily<IpAddr>) -> Result<Option<Peer>, StoreError> {
        let snapshot = self.snapshot().await.map_err(AcquireError::from)?;
        let mut peers = snapshot.entries.iter().filter_map(|entry| entry.peer.as_ref());
        let found = peers.find(|peer| flannel::alloc::is_mine(&peer.public, &public)).cloned();
        self.cache_snapshot(snapshot);
        Ok(found)
    }

    async fn acquire(&self, claim: &Claim) -> Result<LeaseHandle, StoreError> {
        let keeper = Keeper { store: self.clone(), claim: claim.clone() };
        Ok(keeper.acquire(&claim.previous, true).await?)
    }

    async fn keep(self, claims: watch::Receiver<Claim>, held: watch::Sender<LeaseHandle>, lost: mpsc::Receiver<()>) {
        let claim = claims.borrow().clone();
        Keeper { store: self, claim }.run(claims, held, lost).await;
    }

    /// However the watch ends (compaction, cancellation, a lost connection or leader), a fresh snapshot follows, so
    /// that nothing that happened in between is missed, and nothing is believed gone that was not seen gone.
    async fn follow(self, _: Config, events: mpsc::Sender<Vec<StoreEvent>>, mut link: Link) {
        let mut seen = Seen::default();
        let mut moves = self.0.moves.subscribe();
        loop {
            // A turn that is given up costs nothing: the next begins with a fresh snapshot.
            let outcome = tokio::select! {
                biased;
                outcome = self.snapshot_and_watch(&events, &mut link, &mut seen) => outcome,
                _ = moves.changed() => "this host has another address: connecting anew".to_owned(),
            };
            if events.is_closed() {
                return;
            }
            link.down(outcome).await;
        }
    }
}

impl From<AcquireError> for StoreError {
    fn from(error: AcquireError) -> StoreError {
        match error {
            AcquireError::Store(EtcdError::Unreachable { .. }) | AcquireError::Races => {
                StoreError::Passing(Notice::new("NoLease", error.to_string()))
            }
            error => StoreError::Lasting(anyhow::Error::new(error).context("cannot acquire a lease")),
        }
    }
}

fn event(entry: Entry) -> StoreEvent {
    match entry.peer {
        Some(peer) => StoreEvent::Apply(Lease { key: entry.key, peer }),
        None => StoreEvent::Keep(entry.key),
    }
}

async fn range(channel: Connection, request: RangeRequest) -> Result<Response<crate::etcd::RangeResponse>, Status> {
    // A list of ten thousand leases is 2.5 MB; the client's default limit is 4.
    KvClient::new(channel).max_decoding_message_size(usize::MAX).range(request).await
}

async fn put(channel: Connection, request: PutRequest) -> Result<Response<crate::etcd::PutResponse>, Status> {
    KvClient::new(channel).put(request).await
}
