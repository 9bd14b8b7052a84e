//! Executes operations in the order given, an outcome for each. Neighbours, forwarding entries and routes, of which
//! there are many, go out in batches.

use flannel::desired::{Key, Object};
use flannel::{IfName, Op, OpError, Outcome};

use crate::netlink::{Batch, NetlinkError};
use crate::{Kernel, addr, link, neigh, nft, route, sysctl};

impl Kernel {
    /// Executes `ops`. The outcomes are in the order of the operations.
    pub fn apply(&mut self, ops: &[Op]) -> Vec<Outcome> {
        self.indexes.clear();
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(ops.len());
        let mut batch = Batch::new();
        // For each message of the batch, the operation that it carries out.
        let mut carried: Vec<usize> = Vec::new();
        for (at, op) in ops.iter().enumerate() {
            match self.enqueue(op, &mut batch) {
                Some(Ok(())) => {
                    carried.push(at);
                    outcomes.push(Ok(()));
                }
                Some(Err(error)) => outcomes.push(judge(op, Err(error))),
                None => {
                    self.flush(ops, &mut batch, &mut carried, &mut outcomes);
                    let outcome = self.single(op);
                    outcomes.push(judge(op, outcome));
                }
            }
        }
        self.flush(ops, &mut batch, &mut carried, &mut outcomes);
        outcomes
    }

    /// Appends a small operation to the batch; `None` for an operation that is executed alone.
    fn enqueue(&mut self, op: &Op, batch: &mut Batch) -> Option<Result<(), NetlinkError>> {
        let link = match op.object() {
            Object::Neigh(neigh) => neigh.link,
            Object::Fdb(fdb) => fdb.link,
            Object::Route(route) => route.dev,
            _ => return None,
        };
        let index = match self.index(link) {
            Ok(index) => index,
            Err(error) => return Some(Err(error)),
        };
        match op {
            Op::Set(Object::Neigh(n)) => neigh::set(batch, index, n.ip, n.mac),
            Op::Delete(Object::Neigh(n)) => neigh::delete(batch, index, n.ip),
            Op::Set(Object::Fdb(f)) => neigh::set_fdb(batch, index, f.mac, f.dst),
            Op::Delete(Object::Fdb(f)) => neigh::delete_fdb(batch, index, f.mac, f.dst),
            Op::Set(Object::Route(r)) => route::set(batch, r, index),
            Op::Delete(Object::Route(r)) => route::delete(batch, r, index),
            _ => return None,
        }
        Some(Ok(()))
    }

    fn flush(&mut self, ops: &[Op], batch: &mut Batch, carried: &mut Vec<usize>, outcomes: &mut [Outcome]) {
        if batch.is_empty() {
            return;
        }
        let results = self.route.execute(std::mem::take(batch));
        for (at, result) in std::mem::take(carried).into_iter().zip(results) {
            outcomes[at] = judge(&ops[at], result);
        }
    }

    fn single(&mut self, op: &Op) -> Result<(), NetlinkError> {
        match op {
            Op::Set(Object::Link(wanted)) => {
                self.indexes.clear();
                link::set(&mut self.route, wanted)
            }
            Op::Delete(Object::Link(found)) => {
                self.indexes.clear();
                link::delete(&mut self.route, found.name)
            }
            Op::Set(Object::Addr(link, cidr)) => self.index(*link).and_then(|index| addr::set(&mut self.route, index, *cidr)),
            Op::Delete(Object::Addr(link, cidr)) => self.index(*link).and_then(|index| addr::delete(&mut self.route, index, *cidr)),
            Op::Set(Object::Sysctl(path, value)) => sysctl::write(path, value)
                .map_err(|error| NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EIO), message: error.to_string() }),
            Op::Set(Object::Ruleset(ruleset)) => self.netfilter().and_then(|socket| nft::replace(socket, ruleset)),
            Op::Delete(Object::Ruleset(ruleset)) => self.netfilter().and_then(|socket| nft::delete(socket, ruleset.family)),
            // A sysctl has no absence, and the rest is small and batched.
            Op::Delete(Object::Sysctl(..)) | Op::Set(_) | Op::Delete(_) => Ok(()),
        }
    }

    fn index(&mut self, name: IfName) -> Result<u32, NetlinkError> {
        if let Some(index) = self.indexes.get(&name) {
            return Ok(*index);
        }
        let link = link::get(&mut self.route, name)?;
        let link = link.ok_or_else(|| NetlinkError::Refused { errno: libc::ENODEV, message: format!("there is no interface {name}") })?;
        self.indexes.insert(name, link.index);
        Ok(link.index)
    }
}

/// The outcome of an operation: that something is gone already is what a deletion wanted.
fn judge(op: &Op, result: Result<(), NetlinkError>) -> Outcome {
    match result {
        Ok(()) => Ok(()),
        Err(error) if matches!(op, Op::Delete(_)) && error.is_not_found() => Ok(()),
        Err(error) => Err(refused(op, error)),
    }
}

fn refused(op: &Op, error: NetlinkError) -> OpError {
    // A ruleset's text is a page; its name will do.
    match op.object() {
        Object::Ruleset(_) => error.into_op_error(&format_args!("set {}", key(op))),
        _ => error.into_op_error(op),
    }
}

fn key(op: &Op) -> Key {
    op.object().key()
}
