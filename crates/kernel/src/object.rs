//! Applies and reads each kind of object, one file per kind, and decodes the kernel's notifications of it. Matches are exhaustive, so a
//! kind that is not handled does not compile.
//!
//! Operations are executed in the given order, with an outcome for each. Neighbours, FDB entries, routes and WireGuard's peers, of
//! which there are many, are sent in batches.

pub(crate) mod addr;
pub(crate) mod blackhole;
pub(crate) mod bridge;
pub(crate) mod env_file;
pub(crate) mod extension;
pub(crate) mod fdb;
pub(crate) mod forward;
pub(crate) mod iptables;
pub(crate) mod link;
pub(crate) mod neigh;
pub(crate) mod pod_rules;
pub(crate) mod route;
pub(crate) mod ruleset;
pub(crate) mod sysctl;
pub(crate) mod wg_peer;

use std::collections::BTreeMap;

use flannel::object::{Kind, Lane, Object};
use flannel::scope::Scope;
use flannel::{IfName, Observed, Op, Outcome};

use crate::Kernel;
use crate::link::LinkInfo;
use crate::netlink::{Batch, NetlinkError};
use crate::wireguard::Device;

/// A change of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Create it, or replace the object with its key.
    Set,
    /// Delete it.
    Delete,
}

/// The state of executing a list of operations.
struct Run<'a> {
    ops: &'a [Op],
    batch: Batch,
    /// For each message of the batch, the index of its operation.
    carried: Vec<usize>,
    /// The indexes of pending operations on WireGuard's peers. Either these or the batch are pending.
    peers: Vec<usize>,
    outcomes: Vec<Outcome>,
}

impl Run<'_> {
    /// Records whether the message of the next operation was added to the batch.
    fn batched(&mut self, enqueued: Result<(), NetlinkError>) {
        let at = self.outcomes.len();
        if enqueued.is_ok() {
            self.carried.push(at);
        }
        self.outcomes.push(outcome(&self.ops[at], enqueued));
    }
}

impl Kernel {
    /// Executes operations. The outcomes are in the order of the operations.
    pub fn apply(&mut self, ops: &[Op]) -> Vec<Outcome> {
        self.indexes.clear();
        let mut run = Run { ops, batch: Batch::new(), carried: Vec::new(), peers: Vec::new(), outcomes: Vec::with_capacity(ops.len()) };
        for op in ops {
            let change = if matches!(op, Op::Set(_)) { Change::Set } else { Change::Delete };
            let is_peer = matches!(op.object(), Object::WgPeer(_) | Object::AllowedIp(_));
            if is_peer == run.peers.is_empty() {
                self.flush(&mut run);
            }
            match op.object() {
                Object::WgPeer(_) | Object::AllowedIp(_) => {
                    run.peers.push(run.outcomes.len());
                    run.outcomes.push(Ok(()));
                }
                Object::Fdb(fdb) => {
                    let enqueued = fdb::enqueue(self, change, fdb, &mut run.batch);
                    run.batched(enqueued);
                }
                Object::Neigh(neigh) => {
                    let enqueued = neigh::enqueue(self, change, neigh, &mut run.batch);
                    run.batched(enqueued);
                }
                Object::Route(route) => {
                    let enqueued = route::enqueue(self, change, route, &mut run.batch);
                    run.batched(enqueued);
                }
                Object::Link(link) => self.single(&mut run, |kernel| link::apply(kernel, change, link)),
                Object::Addr(addr) => self.single(&mut run, |kernel| addr::apply(kernel, change, addr)),
                Object::Bridge(bridge) => self.single(&mut run, |kernel| bridge::apply(kernel, change, bridge)),
                Object::Sysctl(sysctl) => self.single(&mut run, |kernel| sysctl::apply(kernel, change, sysctl)),
                Object::Forward(forward) => self.single(&mut run, |kernel| forward::apply(kernel, change, forward)),
                Object::Blackhole(blackhole) => self.single(&mut run, |kernel| blackhole::apply(kernel, change, blackhole)),
                Object::Ruleset(ruleset) => self.single(&mut run, |kernel| ruleset::apply(kernel, change, ruleset)),
                Object::Iptables(rules) => self.single(&mut run, |kernel| iptables::apply(kernel, change, rules)),
                Object::PodRules(_) => self.single(&mut run, |kernel| pod_rules::apply(kernel, change)),
                Object::Extension(peer) => self.single(&mut run, |kernel| extension::apply(kernel, change, peer)),
                Object::EnvFile(file) => self.single(&mut run, |_| env_file::apply(change, file)),
            }
        }
        self.flush(&mut run);
        run.outcomes
    }

    /// Sends the pending batch, and then executes an operation that is not part of a batch.
    fn single(&mut self, run: &mut Run<'_>, apply: impl FnOnce(&mut Kernel) -> Result<(), NetlinkError>) {
        self.flush(run);
        let result = apply(self);
        run.outcomes.push(outcome(&run.ops[run.outcomes.len()], result));
    }

    fn flush(&mut self, run: &mut Run<'_>) {
        let peers = std::mem::take(&mut run.peers);
        let ops: Vec<&Op> = peers.iter().map(|at| &run.ops[*at]).collect();
        for (at, result) in peers.iter().zip(wg_peer::apply(self, &ops)) {
            run.outcomes[*at] = outcome(&run.ops[*at], result);
        }
        if run.batch.is_empty() {
            return;
        }
        let results = self.route.execute(std::mem::take(&mut run.batch));
        for (at, result) in std::mem::take(&mut run.carried).into_iter().zip(results) {
            run.outcomes[at] = outcome(&run.ops[at], result);
        }
    }

    fn index(&mut self, name: IfName) -> Result<u32, NetlinkError> {
        if let Some(index) = self.indexes.get(&name) {
            return Ok(*index);
        }
        let link = crate::link::get(&mut self.route, name)?;
        let link = link.ok_or_else(|| NetlinkError::Refused { errno: libc::ENODEV, message: format!("there is no interface {name}") })?;
        self.indexes.insert(name, link.index);
        Ok(link.index)
    }
}

/// Converts a result into an outcome: deleting an object that does not exist succeeds.
fn outcome(op: &Op, result: Result<(), NetlinkError>) -> Outcome {
    match result {
        Ok(()) => Ok(()),
        Err(error) if matches!(op, Op::Delete(_)) && error.is_not_found() => Ok(()),
        Err(error) => Err(error.into_op_error(&op.summary())),
    }
}

fn io_error(error: std::io::Error) -> NetlinkError {
    NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EIO), message: error.to_string() }
}

/// The input of a read of the kernel: all links with their names, because routes and VXLAN devices refer to interfaces by index.
pub(crate) struct Reading<'a> {
    scope: &'a Scope,
    links: Vec<LinkInfo>,
    names: BTreeMap<u32, IfName>,
    /// The WireGuard devices in scope, with their peers.
    wireguard: BTreeMap<IfName, Device>,
}

impl Reading<'_> {
    /// The links in scope that exist.
    fn ours(&self) -> impl Iterator<Item = &LinkInfo> {
        self.links.iter().filter(|link| self.scope.links.contains(&link.name))
    }

    fn name(&self, index: u32) -> Option<IfName> {
        self.names.get(&index).copied()
    }
}

impl Kernel {
    /// Reads the objects in `scope`.
    ///
    /// # Errors
    /// See [`Kernel::observe_lane`].
    pub fn observe(&mut self, scope: &Scope) -> Result<Observed, NetlinkError> {
        let mut observed = self.observe_lane(scope, Lane::Fast)?;
        observed.extend(self.observe_lane(scope, Lane::Slow)?.into_objects());
        Ok(observed)
    }

    /// Reads the objects in `scope`, of the kinds of one lane.
    ///
    /// # Errors
    /// When the kernel refuses a dump. Then the state is unknown, which differs from an empty state.
    pub fn observe_lane(&mut self, scope: &Scope, lane: Lane) -> Result<Observed, NetlinkError> {
        let needs_links = lane == Lane::Fast
            && !(scope.links.is_empty() && scope.networks.is_empty() && scope.sysctls.is_empty() && scope.gateways.is_empty());
        let links = if needs_links { crate::link::list(&mut self.route)? } else { Vec::new() };
        let names = links.iter().map(|link| (link.index, link.name)).collect();
        let mut reading = Reading { scope, links, names, wireguard: BTreeMap::new() };
        reading.wireguard = self.wireguard_devices(&reading)?;
        // Collected first: a map that is built at once is half as large.
        let mut found: Vec<Object> = Vec::new();
        for kind in Kind::ALL.iter().filter(|kind| kind.lane() == lane) {
            match kind {
                Kind::Link => link::observe(self, &reading, &mut found),
                Kind::WgPeer => wg_peer::observe_peers(&reading, &mut found),
                Kind::AllowedIp => wg_peer::observe_allowed(&reading, &mut found),
                Kind::Addr => addr::observe(self, &reading, &mut found)?,
                Kind::Bridge => bridge::observe(self, &reading, &mut found)?,
                Kind::Sysctl => sysctl::observe(self, &reading, &mut found),
                Kind::Fdb => fdb::observe(self, &reading, &mut found)?,
                Kind::Neigh => neigh::observe(self, &reading, &mut found)?,
                Kind::Forward => forward::observe(self, &reading, &mut found),
                Kind::Route => route::observe(self, &reading, &mut found)?,
                Kind::Blackhole => blackhole::observe(self, &reading, &mut found)?,
                Kind::Ruleset => ruleset::observe(self, &reading, &mut found)?,
                Kind::Iptables => iptables::observe(self, &reading, &mut found),
                Kind::PodRules => pod_rules::observe(self, &reading, &mut found),
                Kind::Extension => extension::observe(self, &reading, &mut found),
                Kind::EnvFile => env_file::observe(&reading, &mut found),
            }
        }
        Ok(found.into_iter().collect())
    }
}
