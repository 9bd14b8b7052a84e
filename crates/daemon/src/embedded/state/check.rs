//! All that can fail is checked before anything is done, so that a request is done whole or not at all.

use std::collections::BTreeSet;

use prost::Message;
use tonic::Status;

use super::{State, bounds, check_answer, check_size, cost};
use crate::embedded::limits;
use crate::etcd::request_op::Request;
use crate::etcd::{DeleteRangeRequest, PutRequest, RequestOp, TxnRequest};

/// What a transaction would cost.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    operations: usize,
    answer: usize,
    has_puts: bool,
}

impl State {
    pub(super) fn check_txn(&self, request: &TxnRequest) -> Result<(), Status> {
        check_size(request.encoded_len())?;
        let mut cost = Cost::default();
        self.check_branches(request, &mut BTreeSet::new(), 0, &mut cost)?;
        // Values that are put in the same transaction may be read in it as well.
        check_answer(cost.answer)?;
        if cost.has_puts { self.check_space(request.encoded_len() + cost.operations * limits::KEY_OVERHEAD) } else { Ok(()) }
    }

    fn check_branches(&self, request: &TxnRequest, puts: &mut BTreeSet<Vec<u8>>, depth: usize, cost: &mut Cost) -> Result<(), Status> {
        if depth > limits::NESTING {
            return Err(Status::invalid_argument(format!("transactions are nested more than {} deep", limits::NESTING)));
        }
        let longest = request.compare.len().max(request.success.len()).max(request.failure.len());
        cost.operations += request.success.len() + request.failure.len();
        if longest > limits::OPERATIONS || cost.operations > limits::NESTED_OPERATIONS {
            return Err(Status::invalid_argument("etcdserver: too many operations in txn request"));
        }
        for compare in &request.compare {
            check_key(&compare.key)?;
        }
        let before = cost.answer;
        let mut largest = before;
        for branch in [&request.success, &request.failure] {
            // Only one branch is taken, so the two may name the same key.
            let mut inner = puts.clone();
            cost.answer = before;
            for op in branch {
                self.check_operation(op, &mut inner, depth, cost)?;
            }
            largest = largest.max(cost.answer);
        }
        cost.answer = largest;
        Ok(())
    }

    fn check_operation(&self, op: &RequestOp, puts: &mut BTreeSet<Vec<u8>>, depth: usize, cost: &mut Cost) -> Result<(), Status> {
        match &op.request {
            Some(Request::RequestRange(range)) => {
                self.check_range(range)?;
                cost.answer += self.find(range).bytes;
            }
            Some(Request::RequestPut(put)) => {
                self.check_put(put)?;
                cost.has_puts = true;
                cost.answer += put.encoded_len();
                if !puts.insert(put.key.clone()) {
                    return Err(Status::invalid_argument("etcdserver: duplicate key given in txn request"));
                }
                if put.prev_kv {
                    cost.answer += self.kvs.get(&put.key).map_or(0, super::cost);
                }
            }
            Some(Request::RequestDeleteRange(delete)) => {
                check_key(&delete.key)?;
                if delete.prev_kv {
                    cost.answer += self.deleted_bytes(delete);
                }
            }
            Some(Request::RequestTxn(txn)) => self.check_branches(txn, puts, depth + 1, cost)?,
            None => return Err(Status::invalid_argument("etcdserver: key is not provided")),
        }
        Ok(())
    }

    pub(super) fn check_put(&self, request: &PutRequest) -> Result<(), Status> {
        check_key(&request.key)?;
        if (request.ignore_value || request.ignore_lease) && !self.kvs.contains_key(&request.key) {
            return Err(Status::invalid_argument("etcdserver: key not found"));
        }
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(Status::not_found("etcdserver: requested lease not found"));
        }
        Ok(())
    }

    /// Is there room for so many bytes more?
    pub(super) fn check_space(&self, bytes: usize) -> Result<(), Status> {
        if self.bytes + bytes <= limits::DATABASE {
            return Ok(());
        }
        Err(Status::resource_exhausted("etcdserver: mvcc: database space exceeded"))
    }

    /// The bytes of the keys that a request deletes.
    pub(super) fn deleted_bytes(&self, request: &DeleteRangeRequest) -> usize {
        self.kvs.range::<[u8], _>(bounds(&request.key, &request.range_end)).map(|(_, kv)| cost(kv)).sum()
    }
}

pub(super) fn check_key(key: &[u8]) -> Result<(), Status> {
    if key.is_empty() { Err(Status::invalid_argument("etcdserver: key is not provided")) } else { Ok(()) }
}
