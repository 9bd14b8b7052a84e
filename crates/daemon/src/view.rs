//! The view: an immutable snapshot of what this node knows, wants and could not do, published by the loop after each change. `/state`,
//! `/readyz`, `/metrics` and Events read it; nothing asks the loop.

use std::net::IpAddr;

use flannel::check::Finding;
use flannel::object::Key;
use flannel::probe::Point;
use flannel::{IfName, LeaseKey, PerFamily};
use kernel::Drops;

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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Store {
    /// Is it being followed right now?
    pub connected: bool,
    /// Leases, this node's included.
    pub leases: usize,
    /// Leases that a store which lost data does not know, until their hosts have written them again.
    pub doubtful: usize,
    /// Did it ever say that a list was complete?
    pub complete: bool,
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
