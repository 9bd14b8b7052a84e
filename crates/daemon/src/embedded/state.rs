//! The store's state and what requests do to it: keys with revisions, leases, and the history that watchers read.
//! Pure: the time is an argument, and what must be written to disk is collected in [`State::take_changes`].

mod check;
mod leases;
mod range;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::{Duration, Instant};

use prost::Message;
use tonic::Status;

use self::check::check_key;
use super::limits;
use crate::etcd::event::EventType;
use crate::etcd::request_op::Request;
use crate::etcd::response_op::Response;
use crate::etcd::{
    DeleteRangeRequest, DeleteRangeResponse, Event, KeyValue, PutRequest, PutResponse, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};

/// Events in one answer to a watcher, beyond which it is split (never within a revision).
const WATCH_EVENTS: usize = 1_000;

/// A change that must be on disk before a client sees it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    /// A key was put or deleted.
    Event(Event),
    /// A lease was granted with this life in seconds, or (`None`) ended.
    Lease(i64, Option<i64>),
    /// Events before this revision were forgotten.
    Compacted(i64),
}

#[derive(Debug, Clone)]
struct LeaseState {
    ttl: i64,
    expires: Instant,
    keys: BTreeSet<Vec<u8>>,
}

/// All data.
#[derive(Debug, Clone)]
pub(super) struct State {
    cluster: u64,
    revision: i64,
    compacted: i64,
    kvs: BTreeMap<Vec<u8>, KeyValue>,
    /// What the keys cost, against [`limits::DATABASE`].
    bytes: usize,
    leases: BTreeMap<i64, LeaseState>,
    /// When which lease ends.
    ends: BTreeSet<(Instant, i64)>,
    history: VecDeque<Event>,
    /// What the history costs, against [`limits::HISTORY_BYTES`].
    history_bytes: usize,
    changes: Vec<Change>,
}

/// The data on disk at the start.
#[derive(Debug, Default)]
pub(super) struct Saved {
    pub(super) cluster: u64,
    pub(super) revision: i64,
    pub(super) compacted: i64,
    pub(super) kvs: Vec<KeyValue>,
    pub(super) leases: Vec<(i64, i64)>,
    pub(super) history: Vec<Event>,
}

/// A watcher's next events.
#[derive(Debug, PartialEq)]
pub(super) enum Events {
    /// These, and the revision to go on from.
    Next(Vec<Event>, i64),
    /// Those before this revision are compacted.
    Compacted(i64),
}

impl State {
    /// The state on disk. Leases get their whole life again, because their holders could not renew them while the store was down.
    pub(super) fn new(saved: Saved, now: Instant) -> State {
        let mut leases: BTreeMap<i64, LeaseState> = saved
            .leases
            .iter()
            .map(|(id, ttl)| (*id, LeaseState { ttl: *ttl, expires: after(now, *ttl), keys: BTreeSet::new() }))
            .collect();
        for kv in saved.kvs.iter().filter(|kv| kv.lease != 0) {
            if let Some(lease) = leases.get_mut(&kv.lease) {
                lease.keys.insert(kv.key.clone());
            }
        }
        let ends = leases.iter().map(|(id, lease)| (lease.expires, *id)).collect();
        State {
            cluster: saved.cluster,
            // An empty store has revision 1, as etcd has.
            revision: saved.revision.max(1),
            compacted: saved.compacted,
            bytes: saved.kvs.iter().map(cost).sum(),
            kvs: saved.kvs.into_iter().map(|kv| (kv.key.clone(), kv)).collect(),
            leases,
            ends,
            history_bytes: saved.history.iter().map(event_bytes).sum(),
            history: saved.history.into(),
            changes: Vec::new(),
        }
    }

    pub(super) fn header(&self) -> Option<ResponseHeader> {
        Some(ResponseHeader { cluster_id: self.cluster, member_id: 1, revision: self.revision, raft_term: 1 })
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    /// The changes since the last call, in order.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    pub(super) fn put(&mut self, request: PutRequest) -> Result<PutResponse, Status> {
        check_size(request.encoded_len())?;
        self.check_put(&request)?;
        self.check_space(request.key.len() + request.value.len() + limits::KEY_OVERHEAD)?;
        self.revision += 1;
        let mut response = self.do_put(request, self.revision);
        response.header = self.header();
        self.trim();
        Ok(response)
    }

    pub(super) fn delete(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Status> {
        check_key(&request.key)?;
        if request.prev_kv {
            check_answer(self.deleted_bytes(request))?;
        }
        let mut response = self.do_delete(request, self.revision + 1);
        if response.deleted > 0 {
            self.revision += 1;
        }
        response.header = self.header();
        self.trim();
        Ok(response)
    }

    pub(super) fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Status> {
        self.check_txn(request)?;
        let next = self.revision + 1;
        let (mut response, wrote) = self.do_txn(request, next);
        if wrote {
            self.revision = next;
        }
        response.header = self.header();
        self.trim();
        Ok(response)
    }

    fn do_txn(&mut self, request: &TxnRequest, revision: i64) -> (TxnResponse, bool) {
        let succeeded = request.compare.iter().all(|compare| self.holds(compare));
        let ops = if succeeded { &request.success } else { &request.failure };
        let mut wrote = false;
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let response = match &op.request {
                Some(Request::RequestRange(range)) => self.range(range).ok().map(Response::ResponseRange),
                Some(Request::RequestPut(put)) => {
                    wrote = true;
                    Some(Response::ResponsePut(self.do_put(put.clone(), revision)))
                }
                Some(Request::RequestDeleteRange(delete)) => {
                    let response = self.do_delete(delete, revision);
                    wrote |= response.deleted > 0;
                    Some(Response::ResponseDeleteRange(response))
                }
                Some(Request::RequestTxn(txn)) => {
                    let (response, inner) = self.do_txn(txn, revision);
                    wrote |= inner;
                    Some(Response::ResponseTxn(response))
                }
                None => None,
            };
            responses.push(ResponseOp { response });
        }
        (TxnResponse { header: None, succeeded, responses }, wrote)
    }

    fn do_put(&mut self, request: PutRequest, revision: i64) -> PutResponse {
        let previous = self.kvs.get(&request.key).cloned();
        let kept = previous.as_ref();
        let kv = KeyValue {
            create_revision: kept.map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            version: kept.map_or(0, |kv| kv.version) + 1,
            value: if request.ignore_value { kept.map(|kv| kv.value.clone()).unwrap_or_default() } else { request.value },
            lease: if request.ignore_lease { kept.map_or(0, |kv| kv.lease) } else { request.lease },
            key: request.key,
        };
        self.detach(previous.as_ref());
        if let Some(lease) = self.leases.get_mut(&kv.lease) {
            lease.keys.insert(kv.key.clone());
        }
        self.bytes += cost(&kv);
        self.bytes -= previous.as_ref().map_or(0, cost);
        self.kvs.insert(kv.key.clone(), kv.clone());
        self.record(Event { r#type: EventType::Put.into(), kv: Some(kv), prev_kv: previous.clone() });
        PutResponse { header: None, prev_kv: previous.filter(|_| request.prev_kv) }
    }

    fn do_delete(&mut self, request: &DeleteRangeRequest, revision: i64) -> DeleteRangeResponse {
        let keys: Vec<Vec<u8>> = self.kvs.range::<[u8], _>(bounds(&request.key, &request.range_end)).map(|(key, _)| key.clone()).collect();
        let removed: Vec<KeyValue> = keys.iter().filter_map(|key| self.remove(key, revision)).collect();
        let deleted = i64::try_from(removed.len()).unwrap_or(i64::MAX);
        DeleteRangeResponse { header: None, deleted, prev_kvs: if request.prev_kv { removed } else { Vec::new() } }
    }

    fn remove(&mut self, key: &[u8], revision: i64) -> Option<KeyValue> {
        let previous = self.kvs.remove(key)?;
        self.bytes -= cost(&previous);
        self.detach(Some(&previous));
        let kv = KeyValue { key: key.to_vec(), mod_revision: revision, ..KeyValue::default() };
        self.record(Event { r#type: EventType::Delete.into(), kv: Some(kv), prev_kv: Some(previous.clone()) });
        Some(previous)
    }

    fn detach(&mut self, previous: Option<&KeyValue>) {
        if let Some(kv) = previous
            && let Some(lease) = self.leases.get_mut(&kv.lease)
        {
            lease.keys.remove(&kv.key);
        }
    }

    fn record(&mut self, event: Event) {
        self.history_bytes += event_bytes(&event);
        self.changes.push(Change::Event(event.clone()));
        self.history.push_back(event);
    }

    /// Bounds the history; in steps, so that the cost of a put does not follow its length.
    fn trim(&mut self) {
        if self.history.len() <= 2 * limits::HISTORY && self.history_bytes <= limits::HISTORY_BYTES {
            return;
        }
        // The newest events stay: at most so many, and half the bytes.
        let mut bytes = 0;
        let kept = self.history.iter().rev().take(limits::HISTORY).take_while(|event| {
            bytes += event_bytes(event);
            bytes <= limits::HISTORY_BYTES / 2
        });
        let kept = kept.count();
        let first = self.history.get(self.history.len() - kept).map_or(self.revision + 1, revision_of);
        // A revision is forgotten whole or not at all.
        let is_cut = kept > 0 && self.history.get((self.history.len() - kept).wrapping_sub(1)).map(revision_of) == Some(first);
        self.forget(if is_cut { first + 1 } else { first });
    }

    fn forget(&mut self, revision: i64) {
        self.compacted = revision;
        while self.history.front().is_some_and(|event| revision_of(event) < revision) {
            self.history_bytes -= self.history.pop_front().as_ref().map_or(0, event_bytes);
        }
        self.changes.push(Change::Compacted(revision));
    }

    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Status> {
        if revision > self.revision {
            return Err(Status::out_of_range("etcdserver: mvcc: required revision is a future revision"));
        }
        if revision <= self.compacted {
            return Err(Status::out_of_range("etcdserver: mvcc: required revision has been compacted"));
        }
        self.forget(revision);
        Ok(())
    }

    /// A watcher's events from revision `from` on, within a key range.
    pub(super) fn events(&self, from: i64, key: &[u8], range_end: &[u8]) -> Events {
        if from < self.compacted {
            return Events::Compacted(self.compacted);
        }
        let start = self.history.partition_point(|event| revision_of(event) < from);
        let mut found: Vec<Event> = Vec::new();
        let mut bytes = 0;
        for event in self.history.range(start..) {
            let revision = revision_of(event);
            let is_full = found.len() >= WATCH_EVENTS || bytes >= limits::SMALL / 2;
            if is_full && found.last().map(revision_of) != Some(revision) {
                return Events::Next(found, revision);
            }
            if event.kv.as_ref().is_some_and(|kv| within(&kv.key, key, range_end)) {
                bytes += event_bytes(event);
                found.push(event.clone());
            }
        }
        Events::Next(found, self.revision + 1)
    }
}

/// What a key costs.
fn cost(kv: &KeyValue) -> usize {
    kv.key.len() + kv.value.len() + limits::KEY_OVERHEAD
}

/// What an event costs: twice that of its key and value, before and after.
fn event_bytes(event: &Event) -> usize {
    [&event.kv, &event.prev_kv].into_iter().flatten().map(cost).sum()
}

fn check_size(bytes: usize) -> Result<(), Status> {
    if bytes > limits::REQUEST { Err(Status::invalid_argument("etcdserver: request is too large")) } else { Ok(()) }
}

fn check_answer(bytes: usize) -> Result<(), Status> {
    if bytes <= limits::ANSWER {
        return Ok(());
    }
    Err(Status::resource_exhausted(format!("the answer would be larger than {} MiB: ask for fewer keys", limits::ANSWER >> 20)))
}

fn after(now: Instant, seconds: i64) -> Instant {
    let life = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    // A life beyond the clock's range is a century.
    now.checked_add(life).unwrap_or_else(|| now + Duration::from_secs(3_000_000_000))
}

pub(super) fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

/// The key range of the API: no end means the one key, an end of one zero byte means all from the key on.
fn bounds<'a>(key: &'a [u8], end: &'a [u8]) -> (Bound<&'a [u8]>, Bound<&'a [u8]>) {
    match end {
        [] => (Bound::Included(key), Bound::Included(key)),
        [0] => (Bound::Included(key), Bound::Unbounded),
        end if end <= key => (Bound::Included(key), Bound::Excluded(key)),
        end => (Bound::Included(key), Bound::Excluded(end)),
    }
}

fn within(candidate: &[u8], key: &[u8], end: &[u8]) -> bool {
    match end {
        [] => candidate == key,
        [0] => candidate >= key,
        end => candidate >= key && candidate < end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::compare::{CompareTarget, TargetUnion};
    use crate::etcd::{Compare, RangeRequest, RequestOp};

    fn state() -> State {
        State::new(Saved::default(), Instant::now())
    }

    fn put(state: &mut State, key: &str, value: &str, lease: i64) -> i64 {
        state.put(PutRequest { key: key.into(), value: value.into(), lease, ..PutRequest::default() }).unwrap().header.unwrap().revision
    }

    fn keys(state: &State, revision: i64) -> Vec<String> {
        let request = RangeRequest { key: vec![0], range_end: vec![0], revision, ..RangeRequest::default() };
        let kvs = state.range(&request).unwrap().kvs;
        kvs.iter().map(|kv| format!("{}={}", String::from_utf8_lossy(&kv.key), String::from_utf8_lossy(&kv.value))).collect()
    }

    #[test]
    fn revisions_count_changes_and_past_is_readable() {
        let mut s = state();
        assert_eq!(put(&mut s, "a", "1", 0), 2);
        assert_eq!(put(&mut s, "b", "1", 0), 3);
        assert_eq!(put(&mut s, "a", "2", 0), 4);
        s.delete(&DeleteRangeRequest { key: b"b".to_vec(), ..Default::default() }).unwrap();
        assert_eq!(
            s.delete(&DeleteRangeRequest { key: b"b".to_vec(), ..Default::default() }).unwrap().header.unwrap().revision,
            5,
            "nothing deleted is no change"
        );
        assert_eq!(keys(&s, 0), ["a=2"]);
        assert_eq!(keys(&s, 4), ["a=2", "b=1"]);
        assert_eq!(keys(&s, 3), ["a=1", "b=1"]);
        assert_eq!(keys(&s, 2), ["a=1"]);
        s.compact(3).unwrap();
        assert!(s.range(&RangeRequest { key: b"a".to_vec(), revision: 2, ..Default::default() }).is_err());
        assert!(s.range(&RangeRequest { key: b"a".to_vec(), revision: 9, ..Default::default() }).is_err());
    }

    #[test]
    fn transaction_is_one_revision_and_refused_whole() {
        let mut s = state();
        let op = |key: &str, lease| RequestOp {
            request: Some(Request::RequestPut(PutRequest { key: key.into(), lease, ..Default::default() })),
        };
        let absent = Compare {
            key: b"x".to_vec(),
            target: CompareTarget::Version.into(),
            target_union: Some(TargetUnion::Version(0)),
            ..Default::default()
        };
        let txn = TxnRequest { compare: vec![absent], success: vec![op("x", 0), op("y", 0)], failure: vec![] };
        let first = s.txn(&txn).unwrap();
        assert!(first.succeeded);
        assert_eq!(first.header.unwrap().revision, 2);
        assert!(!s.txn(&txn).unwrap().succeeded, "x exists now");
        assert_eq!(s.revision(), 2, "an empty branch changes nothing");
        assert!(s.txn(&TxnRequest { success: vec![op("p", 0), op("q", 99)], ..Default::default() }).is_err(), "no such lease");
        assert!(s.txn(&TxnRequest { success: vec![op("p", 0), op("p", 0)], ..Default::default() }).is_err(), "duplicate key");
        assert_eq!(keys(&s, 0), ["x=", "y="]);
    }

    #[test]
    fn keys_end_with_their_lease_unless_kept_alive() {
        let mut s = state();
        let now = Instant::now();
        let (lease, _) = s.grant(0, 10, 7, now).unwrap();
        put(&mut s, "a", "1", lease);
        put(&mut s, "b", "1", lease);
        put(&mut s, "b", "2", 0);
        s.expire(now + Duration::from_secs(9));
        assert_eq!(s.keep_alive(lease, now + Duration::from_secs(9)), 10);
        s.expire(now + Duration::from_secs(18));
        assert_eq!(keys(&s, 0).len(), 2);
        s.expire(now + Duration::from_secs(19));
        assert_eq!(keys(&s, 0), ["b=2"], "b was put without the lease");
        assert_eq!(s.keep_alive(lease, now), 0);
    }

    #[test]
    fn watcher_gets_every_event_or_a_compaction() {
        let mut s = state();
        for i in 0..2_500 {
            put(&mut s, &format!("p{i}"), "", 0);
        }
        put(&mut s, "q", "", 0);
        let (mut from, mut seen) = (2, 0);
        loop {
            let Events::Next(events, next) = s.events(from, b"p", b"q") else { panic!("nothing is compacted") };
            seen += events.len();
            if next == from || next > s.revision() {
                break;
            }
            from = next;
        }
        assert_eq!(seen, 2_500);
        s.compact(100).unwrap();
        assert_eq!(s.events(99, b"p", b"q"), Events::Compacted(100));
        assert!(matches!(s.events(100, b"p", b"q"), Events::Next(..)));
    }

    #[test]
    fn history_is_bounded_in_events() {
        let mut s = state();
        for _ in 0..3 * limits::HISTORY {
            put(&mut s, "a", "", 0);
        }
        assert!(s.history.len() <= 2 * limits::HISTORY);
        assert!(s.take_changes().iter().any(|change| matches!(change, Change::Compacted(_))));
    }

    fn big(n: usize) -> String {
        "x".repeat(n)
    }

    #[test]
    fn history_is_bounded_in_bytes_and_memory_is_given_back() {
        let mut s = state();
        for _ in 0..200 {
            put(&mut s, "a", &big(1_000_000), 0);
        }
        assert!(s.history_bytes <= limits::HISTORY_BYTES);
        assert_eq!(s.history_bytes, s.history.iter().map(event_bytes).sum::<usize>());
        let oldest = s.history.front().map(revision_of).unwrap();
        assert!(matches!(s.events(oldest - 1, b"a", b""), Events::Compacted(_)), "a watcher that is behind must list");
        assert!(matches!(s.events(oldest, b"a", b""), Events::Next(..)));
    }

    #[test]
    fn database_size_is_bounded() {
        let mut s = state();
        let put = |s: &mut State, n: usize, size: usize| {
            s.put(PutRequest { key: format!("k{n}").into(), value: big(size).into(), ..PutRequest::default() })
        };
        let full = (0..100).find_map(|n| put(&mut s, n, 1_000_000).err()).unwrap();
        assert_eq!((full.code(), full.message()), (tonic::Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"));
        assert!(s.bytes <= limits::DATABASE);
        s.delete(&DeleteRangeRequest { key: vec![0], range_end: vec![0], ..Default::default() }).unwrap();
        assert_eq!(s.bytes, 0);
        put(&mut s, 1, 1_000_000).unwrap();
        assert_eq!(put(&mut s, 1, limits::REQUEST).unwrap_err().message(), "etcdserver: request is too large");
    }

    fn nested(depth: usize, inner: Vec<RequestOp>) -> TxnRequest {
        let success = match depth {
            0 => inner,
            _ => vec![RequestOp { request: Some(Request::RequestTxn(nested(depth - 1, inner))) }],
        };
        TxnRequest { success, ..TxnRequest::default() }
    }

    #[test]
    fn transactions_are_bounded_in_operations_and_depth() {
        let mut s = state();
        let range = || RequestOp { request: Some(Request::RequestRange(RangeRequest { key: b"a".to_vec(), ..Default::default() })) };
        let txn = |n| TxnRequest { success: vec![range(); n], ..TxnRequest::default() };
        s.txn(&txn(limits::OPERATIONS)).unwrap();
        assert_eq!(s.txn(&txn(limits::OPERATIONS + 1)).unwrap_err().message(), "etcdserver: too many operations in txn request");
        let compare = Compare { key: b"a".to_vec(), ..Compare::default() };
        let compares = TxnRequest { compare: vec![compare; limits::OPERATIONS + 1], ..TxnRequest::default() };
        assert!(s.txn(&compares).is_err());
        s.txn(&nested(limits::NESTING, vec![range()])).unwrap();
        assert!(s.txn(&nested(limits::NESTING + 1, vec![range()])).unwrap_err().message().contains("nested"));
        let inner = RequestOp { request: Some(Request::RequestTxn(txn(limits::OPERATIONS))) };
        let wide = TxnRequest { success: vec![inner; 100], ..TxnRequest::default() };
        assert!(s.txn(&wide).unwrap_err().message().contains("too many operations"));
    }

    #[test]
    fn answers_are_bounded() {
        let mut s = state();
        for n in 0..20 {
            put(&mut s, &format!("k{n:02}"), &big(1_000_000), 0);
        }
        let all = RangeRequest { key: vec![0], range_end: vec![0], ..RangeRequest::default() };
        assert_eq!(s.range(&all).unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert_eq!(s.range(&RangeRequest { limit: 10, ..all.clone() }).unwrap().kvs.len(), 10);
        assert_eq!(s.range(&RangeRequest { keys_only: true, ..all.clone() }).unwrap().kvs.len(), 20);
        assert_eq!(s.range(&RangeRequest { count_only: true, ..all }).unwrap().count, 20);
        let one = RequestOp { request: Some(Request::RequestRange(RangeRequest { key: b"k00".to_vec(), ..Default::default() })) };
        let before = s.revision();
        let many = TxnRequest { success: vec![one; 60], ..TxnRequest::default() };
        assert_eq!(s.txn(&many).unwrap_err().code(), tonic::Code::ResourceExhausted);
        let delete = DeleteRangeRequest { key: vec![0], range_end: vec![0], prev_kv: true };
        assert_eq!(s.delete(&delete).unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert_eq!(s.revision(), before, "nothing was done");
        // The events of a watch come in parts.
        let Events::Next(events, next) = s.events(2, &[0], &[0]) else { panic!("nothing is compacted") };
        assert_eq!((events.len(), next), (1, 3));
    }

    #[test]
    fn leases_are_bounded_and_the_longest_life_is_no_overflow() {
        let mut s = state();
        let now = Instant::now();
        for id in 1..=i64::try_from(limits::LEASES).unwrap() {
            s.grant(id, 60, 0, now).unwrap();
        }
        assert_eq!(s.grant(0, 60, i64::MAX, now).unwrap_err().code(), tonic::Code::ResourceExhausted);
        s.expire(now + Duration::from_secs(61));
        assert_eq!((s.lease_ids().len(), s.next_expiry()), (0, None));
        assert_eq!(s.grant(7, i64::MAX, 0, now).unwrap_err().code(), tonic::Code::OutOfRange);
        s.grant(7, 9_000_000_000, 0, now).unwrap();
        assert_eq!(s.keep_alive(7, now), 9_000_000_000);
    }
}
