//! Executes operations in the order given, an outcome for each. Neighbours, forwarding entries and routes, of which
//! there are many, go out in batches.

use std::net::IpAddr;

use flannel::desired::{Key, Link, LinkKind, Object};
use flannel::traffic::iptables::{Iptables, Variant};
use flannel::{IfName, Op, OpError, Outcome, Subnet};

use crate::netlink::{Batch, NetlinkError};
use crate::tunnel::Tunnel;
use crate::{Kernel, addr, bridge, command, link, neigh, nft, route, sysctl};

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
                if let LinkKind::Udp { local, port } = wanted.kind {
                    self.start_tunnel(wanted, local, port)?;
                }
                link::set(&mut self.route, wanted)
            }
            Op::Delete(Object::Link(found)) => {
                self.indexes.clear();
                if self.tunnel.take_if(|tunnel| tunnel.name == found.name).is_some() {
                    return Ok(());
                }
                if found.kind == LinkKind::Other("tun".to_owned()) {
                    let message = format!("{} is another process's, perhaps a second flanneld's with the udp backend", found.name);
                    return Err(NetlinkError::Refused { errno: libc::EBUSY, message });
                }
                link::delete(&mut self.route, found.name)
            }
            Op::Set(Object::Forward(subnet, host)) => self.forward(*subnet, Some(*host)),
            Op::Delete(Object::Forward(subnet, _)) => self.forward(*subnet, None),
            Op::Set(Object::Extension(peer)) => {
                command::run(&peer.add).map_err(|error| NetlinkError::Refused { errno: libc::EIO, message: error.to_string() })?;
                self.extension.insert(peer.key, (**peer).clone());
                Ok(())
            }
            Op::Delete(Object::Extension(peer)) => {
                command::run(&peer.remove).map_err(|error| NetlinkError::Refused { errno: libc::EIO, message: error.to_string() })?;
                self.extension.remove(&peer.key);
                Ok(())
            }
            Op::Set(Object::Addr(link, cidr)) => {
                self.tunnel.iter().filter(|tunnel| tunnel.name == *link).for_each(|tunnel| tunnel.set_address(*cidr));
                self.index(*link).and_then(|index| addr::set(&mut self.route, index, *cidr))
            }
            Op::Delete(Object::Addr(link, cidr)) => self.index(*link).and_then(|index| addr::delete(&mut self.route, index, *cidr)),
            Op::Set(Object::Bridge(wanted)) => bridge::set(&mut self.route, wanted),
            Op::Set(Object::Sysctl(path, value)) => sysctl::set(&mut self.route, path, value),
            Op::Set(Object::Ruleset(ruleset)) => self.netfilter().and_then(|socket| nft::replace(socket, ruleset)),
            Op::Delete(Object::Ruleset(ruleset)) => self.netfilter().and_then(|socket| nft::delete(socket, ruleset.family)),
            Op::Set(Object::Iptables(rules)) => self.set_iptables(rules),
            Op::Delete(Object::Iptables(rules)) => self.set_iptables(&Iptables { chains: Vec::new(), ..rules.clone() }),
            Op::Set(Object::PodRules(_)) => self.restore_pod_rules(),
            Op::Set(Object::Blackhole(dst)) => route::set_blackhole(&mut self.route, *dst),
            Op::Delete(Object::Blackhole(dst)) => route::delete_blackhole(&mut self.route, *dst),
            Op::Set(Object::EnvFile(file)) => crate::file::write_env(file).map_err(io_error),
            // A sysctl and the bridge stay, the file always has a successor, and the rest is small and batched.
            Op::Delete(Object::Sysctl(..) | Object::EnvFile(_) | Object::Bridge(_) | Object::PodRules(_)) | Op::Set(_) | Op::Delete(_) => {
                Ok(())
            }
        }
    }

    /// Starts the udp backend's data path, if it does not run or its device is gone.
    fn start_tunnel(&mut self, wanted: &Link, local: IpAddr, port: u16) -> Result<(), NetlinkError> {
        let there = link::get(&mut self.route, wanted.name)?.is_some();
        let same = |tunnel: &Tunnel| (tunnel.name, tunnel.local, tunnel.port) == (wanted.name, local, port);
        if there && self.tunnel.as_ref().is_some_and(|tunnel| same(tunnel) && tunnel.is_running()) {
            return Ok(());
        }
        // Where packets go outlives the device.
        let entries = self.tunnel.take().map(|tunnel| tunnel.entries()).unwrap_or_default();
        let tunnel = Tunnel::start(wanted.name, local, port).map_err(io_error)?;
        entries.into_iter().for_each(|(subnet, host)| tunnel.set(subnet, Some(host)));
        self.tunnel = Some(tunnel);
        Ok(())
    }

    fn forward(&mut self, subnet: Subnet, host: Option<IpAddr>) -> Result<(), NetlinkError> {
        let missing = || NetlinkError::Refused { errno: libc::ENODEV, message: "the tunnel does not run".to_owned() };
        self.tunnel.as_ref().ok_or_else(missing).map(|tunnel| tunnel.set(subnet, host))
    }

    fn set_iptables(&mut self, rules: &Iptables) -> Result<(), NetlinkError> {
        if rules.variant == Variant::Nft {
            self.netfilter()?;
        }
        let Kernel { netfilter, iptables, networks, .. } = self;
        crate::iptables::set(netfilter.as_mut(), iptables, rules, networks)
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

fn io_error(error: std::io::Error) -> NetlinkError {
    NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EIO), message: error.to_string() }
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
        Object::Ruleset(_) | Object::Iptables(_) | Object::EnvFile(_) => error.into_op_error(&format_args!("set {}", key(op))),
        _ => error.into_op_error(op),
    }
}

fn key(op: &Op) -> Key {
    op.object().key()
}
