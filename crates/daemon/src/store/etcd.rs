//! etcd as the store: the network config, and leases as keys with an etcd lease on them.

mod call;
mod follow;
mod keeper;
mod seen;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel::wire;
use flannel::{Age, Config, Lease, LeaseKey, Peer, PerFamily, StoreEvent};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::{Response, Status};

pub use self::call::EtcdError;
use self::call::TIMEOUT;
use self::follow::parse_config;
pub use self::keeper::{AcquireError, Keeper};
use self::seen::Seen;
use super::connect::{Access, Connection, Endpoints, Transport};
use super::{Claim, ConfigSource, LeaseHandle, Link, Outage, Store, StoreAbout, StoreError, check_peer, foreign_text, limits};
use crate::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::etcd::kv_client::KvClient;
use crate::etcd::lease_client::LeaseClient;
use crate::etcd::request_op::Request as Op;
use crate::etcd::response_op::Response as OpResponse;
use crate::etcd::{
    Compare, DeleteRangeRequest, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
    RangeResponse, RequestOp, TxnRequest, TxnResponse, prefix_end,
};
use crate::notice::Notice;

/// The longest that a list of all leases may take: at first as long as any answer, and twice as long after each list that was not
/// complete in time. Thousands of leases over a slow line, or from a store that all hosts ask at once, take longer.
const LIST: Duration = Duration::from_secs(80);
/// How long a list that one part of the start requested serves another part.
const CACHED: Duration = Duration::from_secs(5);

/// A client of the store. Clones share connections.
#[derive(Debug, Clone)]
pub struct Etcd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoints: Endpoints,
    /// The endpoint that answered last.
    current: AtomicUsize,
    prefix: String,
    /// Are these the default endpoints, which the operator did not name?
    is_default: bool,
    /// The list by which the first lease was chosen, with that lease in it, and its time: the follower, which comes next, need not
    /// request it again.
    cached: Mutex<Option<(Snapshot, Instant)>>,
    /// The network config that this node started with, and its text in etcd as far as it is known.
    config: Mutex<Option<NotedConfig>>,
    /// Counts how often this host got another address.
    moves: watch::Sender<u32>,
    /// How long a list may take now.
    patience: Mutex<Duration>,
    /// The lease of this node, and the etcd leases under which this node writes it.
    own: Mutex<(Option<LeaseKey>, BTreeSet<i64>)>,
    /// When this node's lease is renewed next; `None` before it has one, and for one that does not end.
    renewal: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct NotedConfig {
    now: Option<Vec<u8>>,
    in_use: Config,
}

/// A lease as it is stored.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The subnets that the key names.
    pub key: LeaseKey,
    /// The owner; `None` if the value cannot be read.
    pub peer: Option<Peer>,
    /// The revision at which the key was created: it shows which of two leases is older.
    pub create_revision: i64,
    /// The key's revision, by which a change is made conditional.
    pub mod_revision: i64,
    /// The etcd lease on it; 0 for a reservation, which never expires.
    pub lease: i64,
}

impl Entry {
    /// Which of two leases is older. A key that is deleted and put again has another revision.
    pub fn age(&self) -> Age {
        u64::try_from(self.create_revision).ok().filter(|revision| *revision > 0).map_or(Age::UNKNOWN, Age::created)
    }
}

/// All leases at one revision.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The leases.
    pub entries: Vec<Entry>,
    /// The store's revision.
    pub revision: i64,
    /// The network configuration's text.
    config: Option<Vec<u8>>,
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
        Ok(Etcd::with(Endpoints::new(access)?, prefix, access.is_default))
    }

    /// A client over transports of the caller's, which are made again when this host gets another address.
    pub fn over(name: &str, connect: impl Fn() -> Transport + Send + Sync + 'static, prefix: &str) -> Etcd {
        Etcd::with(Endpoints::over(vec![name.to_owned()], vec![Box::new(connect)], None), prefix.to_owned(), false)
    }

    fn with(endpoints: Endpoints, prefix: String, is_default: bool) -> Etcd {
        let (current, moves) = (AtomicUsize::new(0), watch::channel(0).0);
        let (cached, config, patience) = (Mutex::default(), Mutex::default(), Mutex::new(TIMEOUT));
        let (own, renewal) = (Mutex::default(), Mutex::default());
        Etcd(Arc::new(Inner { endpoints, current, prefix, is_default, cached, config, moves, patience, own, renewal }))
    }

    /// Keeps a list for the next part of the start.
    fn cache_snapshot(&self, snapshot: Snapshot) {
        *self.0.cached.lock().unwrap_or_else(PoisonError::into_inner) = Some((snapshot, Instant::now()));
    }

    /// The list that was kept, if it is recent.
    fn take_cached(&self) -> Option<Snapshot> {
        let cached = self.0.cached.lock().unwrap_or_else(PoisonError::into_inner).take();
        cached.filter(|(_, at)| at.elapsed() < CACHED).map(|(snapshot, _)| snapshot)
    }

    /// A client of a store without TLS and passwords.
    ///
    /// # Errors
    /// [`EtcdError::Endpoint`].
    pub fn plain(endpoints: &str, prefix: &str) -> Result<Etcd, EtcdError> {
        Etcd::new(&Access { endpoints: endpoints.to_owned(), prefix: prefix.to_owned(), ..Access::default() })
    }

    /// Notes when this node's lease is renewed next.
    fn note_renewal(&self, at: Option<Instant>) {
        *self.0.renewal.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    /// This host has another address: connections from the old one are dead, though no error says so.
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

    /// All leases, and the network config, at one revision.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn snapshot(&self) -> Result<Snapshot, EtcdError> {
        let key = self.subnets().into_bytes();
        let leases = RangeRequest { range_end: prefix_end(&key), key, ..RangeRequest::default() };
        let config = RangeRequest { key: self.config_key().into_bytes(), ..RangeRequest::default() };
        let both = [leases, config].map(|request| RequestOp { request: Some(Op::RequestRange(request)) });
        let request = TxnRequest { success: both.into(), ..TxnRequest::default() };
        let answer: TxnResponse = self.list(|channel| txn(channel, request.clone())).await?;
        let revision = answer.header.map_or(0, |header| header.revision);
        let mut ranges = answer.responses.into_iter().filter_map(|op| match op.response {
            Some(OpResponse::ResponseRange(range)) => Some(range.kvs),
            _ => None,
        });
        let (leases, config) = (ranges.next().unwrap_or_default(), ranges.next().unwrap_or_default());
        Ok(Snapshot { config: config.into_iter().next().map(|kv| kv.value), ..self.read_all(&leases, revision) })
    }

    /// The leases that were created after a revision.
    async fn created_since(&self, revision: i64) -> Result<Snapshot, EtcdError> {
        let key = self.subnets().into_bytes();
        let min_create_revision = revision + 1;
        let request = RangeRequest { range_end: prefix_end(&key), key, min_create_revision, ..RangeRequest::default() };
        let answer: RangeResponse = self.list(|channel| range(channel, request.clone())).await?;
        Ok(self.read_all(&answer.kvs, answer.header.map_or(0, |header| header.revision)))
    }

    /// A request whose answer may be long: it has more time after each that was not complete in time.
    async fn list<T, A: Future<Output = Result<Response<T>, Status>>>(&self, ask: impl Fn(Connection) -> A) -> Result<T, EtcdError> {
        let mut patience = *self.0.patience.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        let answer = self.call_within(patience, "read the leases", ask).await;
        match &answer {
            Err(EtcdError::Unreachable { is_slow: true, .. }) => patience = (patience * 2).min(LIST),
            Ok(_) if began.elapsed() < TIMEOUT / 2 => patience = TIMEOUT,
            _ => {}
        }
        *self.0.patience.lock().unwrap_or_else(PoisonError::into_inner) = patience;
        answer
    }

    fn read_all(&self, kvs: &[KeyValue], revision: i64) -> Snapshot {
        let mut snapshot = Snapshot { entries: Vec::with_capacity(kvs.len()), revision, config: None, unreadable: Vec::new() };
        for kv in kvs {
            let (entry, unreadable) = self.read(kv);
            snapshot.entries.extend(entry);
            snapshot.unreadable.extend(unreadable);
        }
        // The store orders by text. In the order of subnets, folding the list costs less.
        snapshot.entries.sort_unstable_by_key(|entry| entry.key);
        snapshot
    }

    /// Reads a stored lease, as far as it can be read, and reports what cannot.
    fn read(&self, kv: &KeyValue) -> (Option<Entry>, Option<Unreadable>) {
        let text = String::from_utf8_lossy(&kv.key);
        let unreadable = |reason: String| Unreadable { key: foreign_text(&text), revision: kv.mod_revision, reason: foreign_text(&reason) };
        let name = text.strip_prefix(&self.subnets()).unwrap_or(&text);
        let key = match wire::parse_key(name) {
            // With two spellings of one subnet, the end of one would take the other away.
            Ok(key) if wire::key(&key) != name => {
                return (None, Some(unreadable(format!("the key of {key} is spelled {}", wire::key(&key)))));
            }
            Ok(key) => key,
            Err(error) => return (None, Some(unreadable(error.to_string()))),
        };
        let (peer, problem) = match read_peer(&kv.value) {
            Ok(peer) => (Some(peer), None),
            Err(problem) => (None, Some(unreadable(problem))),
        };
        (Some(Entry { key, peer, create_revision: kv.create_revision, mod_revision: kv.mod_revision, lease: kv.lease }), problem)
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

    /// Renews an etcd lease. Returns its new life, or `None` if the lease is gone. No key is written, so no watch has an event,
    /// and a key that another host has taken is not renewed.
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
        Ok(u64::try_from(answer.ttl).ok().filter(|ttl| *ttl > 0).map(|ttl| Duration::from_secs(ttl.min(limits::LEASE_TTL))))
    }

    /// Takes note that this node is about to write its lease, with this etcd lease on it.
    fn note_own(&self, key: LeaseKey, etcd_lease: i64) {
        let mut own = self.0.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.0 = Some(key);
        own.1.insert(etcd_lease);
    }

    /// Whether an entry is this node's lease, but was written by another host. An operator may make it a reservation, without an etcd lease.
    fn is_foreign_write(&self, entry: &Entry) -> bool {
        let own = self.0.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.0 == Some(entry.key) && entry.lease != 0 && !own.1.contains(&entry.lease)
    }

    /// Writes a lease if its key still has this revision (0: if it does not exist); false if another host was faster.
    ///
    /// # Errors
    /// When the store cannot be asked or refuses.
    pub async fn put_lease(&self, lease: &Lease, etcd_lease: i64, expected: i64) -> Result<bool, EtcdError> {
        let key = self.lease_key(&lease.key).into_bytes();
        let put = PutRequest { key: key.clone(), value: wire::value(&lease.peer).into_bytes(), lease: etcd_lease, ..PutRequest::default() };
        self.conditional("write the lease", key, expected, Op::RequestPut(put)).await
    }

    /// Deletes a lease if its key still has this revision; false if another host was faster.
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
            txn(channel, request)
        });
        Ok(answer.await?.succeeded)
    }
}

impl Store for Etcd {
    fn about(&self) -> StoreAbout {
        let Inner { endpoints, current, renewal, .. } = &*self.0;
        let names = &endpoints.names;
        let name = names.get(current.load(Ordering::Relaxed) % names.len().max(1));
        let renewal = *renewal.lock().unwrap_or_else(PoisonError::into_inner);
        StoreAbout { endpoint: name.map_or_else(Arc::default, |name| name.as_str().into()), renewal }
    }

    fn config_source(&self) -> ConfigSource {
        if self.0.is_default { ConfigSource::DefaultStore } else { ConfigSource::NamedStore }
    }

    async fn config(&self) -> Result<Config, StoreError> {
        let key = self.config_key();
        let waiting = |reason, text: String| StoreError::Passing(Notice::new(reason, text));
        let Some(text) = Etcd::config(self).await? else {
            return Err(waiting("NoNetworkConfig", format!("there is no network config in etcd yet: put one at {key}")));
        };
        let in_use = parse_config(&key, &text).map_err(|problem| waiting("BadNetworkConfig", problem))?;
        *self.0.config.lock().unwrap_or_else(PoisonError::into_inner) = Some(NotedConfig { now: Some(text), in_use: in_use.clone() });
        Ok(in_use)
    }

    async fn node_public(&self) -> Result<PerFamily<IpAddr>, StoreError> {
        Ok(PerFamily::default())
    }

    async fn published(&self, _: &Config, public: PerFamily<IpAddr>) -> Result<Option<Peer>, StoreError> {
        let snapshot = self.snapshot().await?;
        // Another host may publish this host's address with a lease of its own.
        let is_mine = |entry: &&Entry| entry.peer.as_ref().is_some_and(|peer| flannel::alloc::is_mine(&peer.public, &public));
        let found = snapshot.entries.iter().filter(is_mine).min_by_key(|entry| entry.age()).and_then(|entry| entry.peer.clone());
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

    async fn follow(self, _: Config, events: mpsc::Sender<Vec<StoreEvent>>, mut link: Link) {
        let mut seen = Seen::default();
        let mut moves = self.0.moves.subscribe();
        loop {
            // A turn that is given up costs nothing: the next one starts with a fresh snapshot.
            let outage = tokio::select! {
                biased;
                outage = self.snapshot_and_watch(&events, &mut link, &mut seen) => outage,
                _ = moves.changed() => Outage::Lost("this host has another address; reconnecting".to_owned()),
            };
            if events.is_closed() {
                return;
            }
            link.down(outage).await;
        }
    }
}

impl From<AcquireError> for StoreError {
    fn from(error: AcquireError) -> StoreError {
        match error {
            AcquireError::Store(error) => error.into(),
            AcquireError::Full(_) => StoreError::Passing(Notice::new("NoSubnet", error.to_string())),
            AcquireError::Races => StoreError::Passing(Notice::new("NoLease", error.to_string())),
        }
    }
}

/// Reads a lease's value, within limits.
fn read_peer(value: &[u8]) -> Result<Peer, String> {
    if value.len() > limits::LEASE_VALUE {
        return Err(format!("the value has {} bytes, at most {} are read", value.len(), limits::LEASE_VALUE));
    }
    let peer = wire::parse_value(value).map_err(|error| error.to_string())?;
    check_peer(&peer).map(|()| peer)
}

async fn range(channel: Connection, request: RangeRequest) -> Result<Response<RangeResponse>, Status> {
    // A list of ten thousand leases is 2.5 MB; the client's default limit is 4.
    KvClient::new(channel).max_decoding_message_size(limits::ANSWER).range(request).await
}

async fn txn(channel: Connection, request: TxnRequest) -> Result<Response<TxnResponse>, Status> {
    KvClient::new(channel).max_decoding_message_size(limits::ANSWER).txn(request).await
}

async fn put(channel: Connection, request: PutRequest) -> Result<Response<crate::etcd::PutResponse>, Status> {
    KvClient::new(channel).put(request).await
}
