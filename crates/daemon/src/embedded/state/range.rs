//! Reading: ranges of keys, now and at a past revision, and comparisons.

use std::collections::BTreeMap;

use tonic::Status;

use super::check::check_key;
use super::{State, bounds, check_answer, cost, revision_of, within};
use crate::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::etcd::range_request::{SortOrder, SortTarget};
use crate::etcd::{Compare, KeyValue, RangeRequest, RangeResponse};

/// What a range request finds.
pub(super) struct Found<'a> {
    kvs: Vec<&'a KeyValue>,
    count: i64,
    more: bool,
    /// What the answer costs.
    pub(super) bytes: usize,
}

impl State {
    pub(in crate::embedded) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Status> {
        self.check_range(request)?;
        let Found { kvs, count, more, bytes } = self.find(request);
        check_answer(bytes)?;
        let copy = |kv: &KeyValue| match request.keys_only {
            true => KeyValue {
                key: kv.key.clone(),
                create_revision: kv.create_revision,
                mod_revision: kv.mod_revision,
                version: kv.version,
                value: Vec::new(),
                lease: kv.lease,
            },
            false => kv.clone(),
        };
        Ok(RangeResponse { header: self.header(), kvs: kvs.into_iter().map(copy).collect(), more, count })
    }

    pub(super) fn check_range(&self, request: &RangeRequest) -> Result<(), Status> {
        check_key(&request.key)?;
        if request.revision > self.revision {
            return Err(Status::out_of_range("etcdserver: mvcc: required revision is a future revision"));
        }
        if request.revision > 0 && request.revision < self.compacted {
            return Err(Status::out_of_range("etcdserver: mvcc: required revision has been compacted"));
        }
        Ok(())
    }

    pub(super) fn find(&self, request: &RangeRequest) -> Found<'_> {
        let mut kvs: Vec<&KeyValue> = if request.revision > 0 && request.revision < self.revision {
            self.at(request.revision, &request.key, &request.range_end)
        } else {
            self.kvs.range::<[u8], _>(bounds(&request.key, &request.range_end)).map(|(_, kv)| kv).collect()
        };
        let count = i64::try_from(kvs.len()).unwrap_or(i64::MAX);
        if request.count_only {
            return Found { kvs: Vec::new(), count, more: false, bytes: 0 };
        }
        // As in etcd, the count is that of the keys before these bounds. 0 is none.
        let admits = |revision: i64, min: i64, max: i64| revision >= min && (max == 0 || revision <= max);
        kvs.retain(|kv| {
            admits(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
                && admits(kv.create_revision, request.min_create_revision, request.max_create_revision)
        });
        match request.sort_target() {
            SortTarget::Key => {}
            SortTarget::Version => kvs.sort_by_key(|kv| kv.version),
            SortTarget::Create => kvs.sort_by_key(|kv| kv.create_revision),
            SortTarget::Mod => kvs.sort_by_key(|kv| kv.mod_revision),
            SortTarget::Value => kvs.sort_by(|a, b| a.value.cmp(&b.value)),
        }
        if request.sort_order() == SortOrder::Descend {
            kvs.reverse();
        }
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let more = kvs.len() > limit;
        kvs.truncate(limit);
        let bytes = kvs.iter().map(|kv| if request.keys_only { cost(kv) - kv.value.len() } else { cost(kv) }).sum();
        Found { kvs, count, more, bytes }
    }

    /// The keys of a range as they were at a past revision: the present ones, with every later event undone.
    fn at(&self, revision: i64, key: &[u8], end: &[u8]) -> Vec<&KeyValue> {
        let mut kvs: BTreeMap<&[u8], &KeyValue> =
            self.kvs.range::<[u8], _>(bounds(key, end)).map(|(key, kv)| (key.as_slice(), kv)).collect();
        for event in self.history.iter().rev().take_while(|event| revision_of(event) > revision) {
            let Some(kv) = event.kv.as_ref().filter(|kv| within(&kv.key, key, end)) else { continue };
            match &event.prev_kv {
                Some(previous) => drop(kvs.insert(&kv.key, previous)),
                None => drop(kvs.remove(kv.key.as_slice())),
            }
        }
        kvs.into_values().collect()
    }

    pub(super) fn holds(&self, compare: &Compare) -> bool {
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
}
