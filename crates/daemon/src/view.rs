//! The view: an immutable snapshot of what this node knows, wants and could not do, published by the loop after each change. `/state`,
//! `/readyz`, `/metrics` and Events read it; nothing asks the loop.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use flannel::check::Finding;
use flannel::object::{Key, Kind};
use flannel::probe::Point;
use flannel::{IfName, LeaseKey, PerFamily, Vni};
use kernel::Drops;
use tokio::time::Instant;

/// Repairs that are remembered.
pub const REPAIRS: usize = 100;

/// The whole snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// This node; `None` until it has its lease and was compared with the kernel.
    pub node: Option<Node>,
    /// What the store said.
    pub store: Store,
    /// The other hosts, ordered by subnet.
    pub peers: Vec<PeerView>,
    /// Objects in the kernel.
    pub objects: Objects,
    /// With the udp backend, the packets that it dropped: counters, which show the present number.
    pub drops: Option<Drops>,
    /// Problems of this node, the severe ones first.
    pub findings: Vec<Finding>,
}

/// This node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// `Backend.Type`
    pub backend: &'static str,
    /// Its lease.
    pub subnet: LeaseKey,
    /// The VNI of its tunnel, with vxlan.
    pub vni: Option<Vni>,
    /// The UDP port of its tunnel, with vxlan and udp.
    pub port: Option<u16>,
    /// The form of the traffic rules: `nftables`, `iptables-nft`, `iptables-legacy` or `none`.
    pub rules: &'static str,
    /// Whether the kernel forwards packets, in each family of the pod network.
    pub is_forwarding: bool,
    /// The external interface.
    pub interface: IfName,
    /// That interface's addresses.
    pub addresses: PerFamily<IpAddr>,
    /// The published addresses.
    pub published: PerFamily<IpAddr>,
    /// MTU for pods, in bytes.
    pub mtu: u32,
    /// The MTU of each family's data path, in bytes.
    pub path_mtus: PerFamily<u32>,
    /// Where the paths to peers' pods can be measured.
    pub probe: Option<Point>,
}

/// What the store said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Store {
    /// Is it being followed right now?
    pub connected: bool,
    /// Leases, this node's included.
    pub leases: usize,
    /// Leases that a store which lost data does not know, until their hosts have written them again.
    pub doubtful: usize,
    /// Did it ever say that a list was complete?
    pub complete: bool,
    /// Its address, without credentials.
    pub endpoint: Arc<str>,
    /// When its last event came: a list, or a change of a lease.
    pub last_event: Option<Instant>,
    /// When this node's lease is renewed next, where leases end.
    pub renewal: Option<Instant>,
}

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerView {
    /// Its lease.
    pub subnet: LeaseKey,
    /// Its published addresses.
    pub public: PerFamily<IpAddr>,
    /// What was done for it.
    pub state: PeerState,
    /// With WireGuard, when the last handshake with it was, as of the last audit.
    pub handshake: Option<Instant>,
}

/// What was done for a peer. Whether packets arrive is measured: [`crate::probe`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerState {
    /// Its objects are in the kernel.
    Programmed,
    /// It, or one family of it, gets no route, for these reasons.
    Refused(Vec<String>),
    /// The kernel refuses an object of it, this one among them, or another program keeps changing it.
    Failed(Key),
    /// Its objects are in the kernel, but a store that lost data does not know its lease.
    Doubtful,
}

impl PeerState {
    /// Its name, for machines.
    pub fn name(&self) -> &'static str {
        match self {
            PeerState::Programmed => "programmed",
            PeerState::Refused(_) => "refused",
            PeerState::Failed(_) => "failed",
            PeerState::Doubtful => "doubtful",
        }
    }
}

/// Objects in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objects {
    /// How many there should be.
    pub desired: usize,
    /// Those that the kernel refuses, and those in conflict.
    pub failed: Vec<Failed>,
    /// Repairs since the start.
    pub repaired: u64,
    /// The last of them.
    pub repairs: Arc<Repairs>,
    /// How often the kernel's notifications were lost, after which all was read again.
    pub overruns: u64,
    /// Those that another program keeps changing.
    pub conflicts: Vec<Conflicted>,
}

/// An object that the kernel refuses.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Failed {
    /// Its name.
    pub object: String,
    /// What the kernel said.
    pub error: String,
    /// Attempts.
    pub attempts: u32,
}

/// An object that another program keeps changing.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Conflicted {
    /// Its name.
    pub object: String,
    /// The program, where the kernel names it.
    pub by: Option<String>,
    /// Repairs.
    pub times: u32,
}

/// The last repairs, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repairs {
    list: VecDeque<Repair>,
    /// Repairs that were noted since the start.
    noted: u64,
}

impl Repairs {
    /// Notes a repair, and forgets the oldest one if there are too many.
    pub fn note(&mut self, kind: Kind, action: String, by: Option<String>, at: Instant) {
        self.noted += 1;
        if self.list.len() == REPAIRS {
            self.list.pop_front();
        }
        self.list.push_back(Repair { number: self.noted, at, kind, action, by });
    }

    /// Counts repairs that are not remembered, because more than [`REPAIRS`] are made together.
    pub fn skip(&mut self, count: usize) {
        self.noted += u64::try_from(count).unwrap_or(u64::MAX);
    }

    /// The repairs, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Repair> {
        self.list.iter()
    }

    /// Repairs that were noted since the start.
    pub fn noted(&self) -> u64 {
        self.noted
    }
}

/// A repair of an object that another program changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Its number since the start, from 1 on.
    pub number: u64,
    /// When it was made.
    pub at: Instant,
    /// The kind of the object.
    pub kind: Kind,
    /// What was done, with the object's name.
    pub action: String,
    /// The program that had changed the object, where the kernel names it.
    pub by: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn last_hundred_repairs_are_remembered() {
        let mut repairs = Repairs::default();
        (0..250).for_each(|n| repairs.note(Kind::Route, format!("set route {n}"), None, Instant::now()));
        let numbers: Vec<u64> = repairs.iter().map(|repair| repair.number).collect();
        assert_eq!((numbers.len(), numbers[0], numbers[99], repairs.noted()), (REPAIRS, 151, 250, 250));
        repairs.skip(50);
        repairs.note(Kind::Route, "set route".to_owned(), None, Instant::now());
        assert_eq!((repairs.iter().next_back().unwrap().number, repairs.noted()), (301, 301));
    }
}
