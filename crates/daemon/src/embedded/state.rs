//! The store's state and what requests do to it: keys with revisions, leases, and the history that watchers read.
//! Pure: the time is an argument, and what must be written to disk is collected in [`State::take_changes`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::{Duration, Instant};

use tonic::Status;

use crate::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::etcd::event::EventType;
use crate::etcd::range_request::{SortOrder, SortTarget};
use crate::etcd::request_op::Request;
use crate::etcd::response_op::Response;
use crate::etcd::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, Event, KeyValue, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp,
    ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};

/// Events that are kept for watchers which come back; older ones are compacted away, and such a watcher lists anew.
const HISTORY: usize = 10_000;

/// Events in one answer to a watcher, beyond which it is split (never within a revision).
const WATCH_EVENTS: usize = 1_000;

/// The longest life that etcd grants a lease, in seconds.
const MAX_TTL: i64 = 9_000_000_000;

/// The shortest, which a shorter wish is raised to, in seconds.
const MIN_TTL: i64 = 2;

/// A change that must be on disk before anybody hears of it.
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

/// Everything there is.
#[derive(Debug, Clone)]
pub(super) struct State {
    cluster: u64,
    revision: i64,
    compacted: i64,
    kvs: BTreeMap<Vec<u8>, KeyValue>,
    leases: BTreeMap<i64, LeaseState>,
    history: VecDeque<Event>,
    changes: Vec<Change>,
}

/// What the disk holds at start.
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
    /// These, and where to go on.
    Next(Vec<Event>, i64),
    /// They are forgotten before this revision.
    Compacted(i64),
}

impl State {
    /// The state that the disk holds. Leases begin their whole life anew: that the store was away is not the fault of
    /// their holders.
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
        State {
            cluster: saved.cluster,
            // An empty store has revision 1, as etcd has.
            revision: saved.revision.max(1),
            compacted: saved.compacted,
            kvs: saved.kvs.into_iter().map(|kv| (kv.key.clone(), kv)).collect(),
            leases,
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

    /// What was changed since the last call, in order.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    pub(super) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Status> {
        self.check_range(request)?;
        let past;
        let kvs = if request.revision > 0 && request.revision < self.revision {
            past = self.at(request.revision);
            &past
        } else {
            &self.kvs
        };
        let mut found: Vec<&KeyValue> = kvs.range::<[u8], _>(bounds(&request.key, &request.range_end)).map(|(_, kv)| kv).collect();
        let count = i64::try_from(found.len()).unwrap_or(i64::MAX);
        if request.count_only {
            return Ok(RangeResponse { header: self.header(), kvs: Vec::new(), more: false, count });
        }
        // As in etcd, the count is that of the keys before these bounds. 0 is none.
        let within = |revision: i64, min: i64, max: i64| revision >= min && (max == 0 || revision <= max);
        found.retain(|kv| {
            within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
                && within(kv.create_revision, request.min_create_revision, request.max_create_revision)
        });
        match request.sort_target() {
            SortTarget::Key => {}
            SortTarget::Version => found.sort_by_key(|kv| kv.version),
            SortTarget::Create => found.sort_by_key(|kv| kv.create_revision),
            SortTarget::Mod => found.sort_by_key(|kv| kv.mod_revision),
            SortTarget::Value => found.sort_by(|a, b| a.value.cmp(&b.value)),
        }
        if request.sort_order() == SortOrder::Descend {
            found.reverse();
        }
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let more = found.len() > limit;
        let copy = |kv: &KeyValue| match request.keys_only {
            true => KeyValue { value: Vec::new(), ..kv.clone() },
            false => kv.clone(),
        };
        Ok(RangeResponse { header: self.header(), kvs: found.into_iter().take(limit).map(copy).collect(), more, count })
    }

    /// The keys as they were at a past revision: today's, with every later event undone.
    fn at(&self, revision: i64) -> BTreeMap<Vec<u8>, KeyValue> {
        let mut kvs = self.kvs.clone();
        for event in self.history.iter().rev().take_while(|event| revision_of(event) > revision) {
            let Some(kv) = &event.kv else { continue };
            match &event.prev_kv {
                Some(previous) => drop(kvs.insert(kv.key.clone(), previous.clone())),
                None => drop(kvs.remove(&kv.key)),
            }
        }
        kvs
    }

    pub(super) fn put(&mut self, request: PutRequest) -> Result<PutResponse, Status> {
        self.check_put(&request)?;
        self.revision += 1;
        let mut response = self.do_put(request, self.revision);
        response.header = self.header();
        self.trim();
        Ok(response)
    }

    pub(super) fn delete(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Status> {
        check_key(&request.key)?;
        let mut response = self.do_delete(request, self.revision + 1);
        if response.deleted > 0 {
            self.revision += 1;
        }
        response.header = self.header();
        self.trim();
        Ok(response)
    }

    pub(super) fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Status> {
        let mut puts = BTreeSet::new();
        self.check_txn(request, &mut puts)?;
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

    /// All that could fail is asked before anything is done, so that a transaction is done whole or not at all.
    fn check_txn(&self, request: &TxnRequest, puts: &mut BTreeSet<Vec<u8>>) -> Result<(), Status> {
        for compare in &request.compare {
            check_key(&compare.key)?;
        }
        for branch in [&request.success, &request.failure] {
            // Only one branch is taken, so the two may name the same key.
            let mut inner = puts.clone();
            for RequestOp { request } in branch {
                match request {
                    Some(Request::RequestRange(range)) => self.check_range(range)?,
                    Some(Request::RequestPut(put)) => {
                        self.check_put(put)?;
                        if !inner.insert(put.key.clone()) {
                            return Err(Status::invalid_argument("etcdserver: duplicate key given in txn request"));
                        }
                    }
                    Some(Request::RequestDeleteRange(delete)) => check_key(&delete.key)?,
                    Some(Request::RequestTxn(txn)) => self.check_txn(txn, &mut inner)?,
                    None => return Err(Status::invalid_argument("etcdserver: key is not provided")),
                }
            }
        }
        Ok(())
    }

    fn check_range(&self, request: &RangeRequest) -> Result<(), Status> {
        check_key(&request.key)?;
        if request.revision > self.revision {
            return Err(Status::out_of_range("etcdserver: mvcc: required revision is a future revision"));
        }
        if request.revision > 0 && request.revision < self.compacted {
            return Err(Status::out_of_range("etcdserver: mvcc: required revision has been compacted"));
        }
        Ok(())
    }

    fn check_put(&self, request: &PutRequest) -> Result<(), Status> {
        check_key(&request.key)?;
        if (request.ignore_value || request.ignore_lease) && !self.kvs.contains_key(&request.key) {
            return Err(Status::invalid_argument("etcdserver: key not found"));
        }
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(Status::not_found("etcdserver: requested lease not found"));
        }
        Ok(())
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
        self.changes.push(Change::Event(event.clone()));
        self.history.push_back(event);
    }

    /// Bounds the history; in steps, so that the cost of a put does not follow its length.
    fn trim(&mut self) {
        if self.history.len() > 2 * HISTORY {
            let last = self.history.get(self.history.len() - HISTORY).map_or(self.revision, revision_of);
            self.forget(last);
        }
    }

    fn forget(&mut self, revision: i64) {
        self.compacted = revision;
        while self.history.front().is_some_and(|event| revision_of(event) < revision) {
            self.history.pop_front();
        }
        self.changes.push(Change::Compacted(revision));
    }

    fn holds(&self, compare: &Compare) -> bool {
        let one = |kv: Option<&KeyValue>| {
            let ordering = match (compare.target(), &compare.target_union) {
                (CompareTarget::Version, Some(TargetUnion::Version(v))) => kv.map_or(0, |kv| kv.version).cmp(v),
                (CompareTarget::Create, Some(TargetUnion::CreateRevision(r))) => kv.map_or(0, |kv| kv.create_revision).cmp(r),
                (CompareTarget::Mod, Some(TargetUnion::ModRevision(r))) => kv.map_or(0, |kv| kv.mod_revision).cmp(r),
                (CompareTarget::Lease, Some(TargetUnion::Lease(l))) => kv.map_or(0, |kv| kv.lease).cmp(l),
                // An absent key equals no value.
                (CompareTarget::Value, Some(TargetUnion::Value(value))) => match kv {
                    Some(kv) => kv.value.cmp(value),
                    None => return false,
                },
                // A default value is left out on the wire.
                (CompareTarget::Value, None) => return kv.is_some_and(|kv| kv.value.is_empty()),
                (target, _) => {
                    let number = match target {
                        CompareTarget::Version => kv.map_or(0, |kv| kv.version),
                        CompareTarget::Create => kv.map_or(0, |kv| kv.create_revision),
                        CompareTarget::Lease => kv.map_or(0, |kv| kv.lease),
                        _ => kv.map_or(0, |kv| kv.mod_revision),
                    };
                    number.cmp(&0)
                }
            };
            match compare.result() {
                CompareResult::Equal => ordering.is_eq(),
                CompareResult::NotEqual => ordering.is_ne(),
                CompareResult::Greater => ordering.is_gt(),
                CompareResult::Less => ordering.is_lt(),
            }
        };
        if compare.range_end.is_empty() {
            return one(self.kvs.get(&compare.key));
        }
        let mut range = self.kvs.range::<[u8], _>(bounds(&compare.key, &compare.range_end)).peekable();
        // A range without keys compares as one key that is not there.
        if range.peek().is_none() { one(None) } else { range.all(|(_, kv)| one(Some(kv))) }
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

    /// Grants a lease and returns its identifier and its life in seconds. `random` is the identifier where the request
    /// leaves the choice.
    pub(super) fn grant(&mut self, id: i64, ttl: i64, random: i64, now: Instant) -> Result<(i64, i64), Status> {
        let ttl = ttl.max(MIN_TTL);
        let id = if id == 0 { random } else { id };
        if ttl > MAX_TTL {
            return Err(Status::out_of_range("etcdserver: too large lease TTL"));
        }
        if self.leases.contains_key(&id) {
            return Err(Status::failed_precondition("etcdserver: lease already exists"));
        }
        self.leases.insert(id, LeaseState { ttl, expires: after(now, ttl), keys: BTreeSet::new() });
        self.changes.push(Change::Lease(id, Some(ttl)));
        Ok((id, ttl))
    }

    /// Ends a lease: its keys go with it, in one revision.
    pub(super) fn revoke(&mut self, id: i64) -> Result<(), Status> {
        let lease = self.leases.remove(&id).ok_or_else(|| Status::not_found("etcdserver: requested lease not found"))?;
        self.changes.push(Change::Lease(id, None));
        let next = self.revision + 1;
        let removed = lease.keys.iter().filter_map(|key| self.remove(key, next)).count();
        if removed > 0 {
            self.revision = next;
        }
        self.trim();
        Ok(())
    }

    /// Begins a lease's life anew and returns its length in seconds; 0 for one that is not there.
    pub(super) fn keep_alive(&mut self, id: i64, now: Instant) -> i64 {
        let Some(lease) = self.leases.get_mut(&id) else { return 0 };
        lease.expires = after(now, lease.ttl);
        lease.ttl
    }

    /// Seconds left, seconds granted and keys of a lease; `None` for one that is not there.
    pub(super) fn time_to_live(&self, id: i64, now: Instant) -> Option<(i64, i64, Vec<Vec<u8>>)> {
        let lease = self.leases.get(&id)?;
        let left = lease.expires.saturating_duration_since(now).as_secs();
        Some((i64::try_from(left).unwrap_or(i64::MAX), lease.ttl, lease.keys.iter().cloned().collect()))
    }

    pub(super) fn lease_ids(&self) -> Vec<i64> {
        self.leases.keys().copied().collect()
    }

    /// Begins the lives of all leases anew.
    pub(super) fn begin_leases_anew(&mut self, now: Instant) {
        self.leases.values_mut().for_each(|lease| lease.expires = after(now, lease.ttl));
    }

    /// When the next lease ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.expires).min()
    }

    /// Ends the leases whose time has come.
    pub(super) fn expire(&mut self, now: Instant) {
        let due: Vec<i64> = self.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect();
        for id in due {
            // It was there a line ago.
            let _ = self.revoke(id);
        }
    }

    /// A watcher's events from revision `from` on, within a key range.
    pub(super) fn events(&self, from: i64, key: &[u8], range_end: &[u8]) -> Events {
        if from < self.compacted {
            return Events::Compacted(self.compacted);
        }
        let start = self.history.partition_point(|event| revision_of(event) < from);
        let mut found: Vec<Event> = Vec::new();
        for event in self.history.range(start..) {
            let revision = revision_of(event);
            if found.len() >= WATCH_EVENTS && found.last().map(revision_of) != Some(revision) {
                return Events::Next(found, revision);
            }
            if event.kv.as_ref().is_some_and(|kv| within(&kv.key, key, range_end)) {
                found.push(event.clone());
            }
        }
        Events::Next(found, self.revision + 1)
    }
}

fn check_key(key: &[u8]) -> Result<(), Status> {
    if key.is_empty() { Err(Status::invalid_argument("etcdserver: key is not provided")) } else { Ok(()) }
}

fn after(now: Instant, seconds: i64) -> Instant {
    let life = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    // A life beyond what the clock can say is a century.
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
    fn revisions_count_changes_and_the_past_can_be_read() {
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
    fn a_transaction_is_one_revision_and_refused_whole() {
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
        assert!(!s.txn(&txn).unwrap().succeeded, "x is there now");
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
    fn a_watcher_gets_every_event_or_hears_of_compaction() {
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
    fn the_history_is_bounded() {
        let mut s = state();
        for _ in 0..3 * HISTORY {
            put(&mut s, "a", "", 0);
        }
        assert!(s.history.len() <= 2 * HISTORY);
        assert!(s.take_changes().iter().any(|change| matches!(change, Change::Compacted(_))));
    }
}
