//! Facts about this host, gathered once and then only read: which interface faces the other hosts, its addresses, its
//! MTU, what is on its link. The choice of the interface (specification, section 1.5) is made in `choose`, from facts
//! that the `kernel` crate reads.

use std::net::IpAddr;

use crate::net::{Cidr, IfName, PerFamily, Subnet};

mod choose;

pub use choose::{NodeError, Reach, Wanted, check_regex};

/// A network interface as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index, which orders the candidates.
    pub index: u32,
    /// Its name.
    pub name: IfName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses in the kernel's order.
    pub addrs: Vec<InterfaceAddr>,
}

/// An address of an interface, with the flags that decide its rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceAddr {
    /// The address and its on-link prefix.
    pub cidr: Cidr,
    /// `IFA_F_PERMANENT`
    pub permanent: bool,
    /// `IFA_F_TEMPORARY` (IPv6 privacy addresses; for IPv4 the same bit means "secondary")
    pub temporary: bool,
    /// `IFA_F_DEPRECATED`
    pub deprecated: bool,
}

/// A unicast route of the main table, as far as the choice of an interface needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteFact {
    /// Destination; length 0 for a default route.
    pub dst: Subnet,
    /// Index of the output interface; of a multipath route that of its first usable next hop, or 0.
    pub oif: u32,
    /// Is there a gateway? Without one the destination is on the link.
    pub gateway: bool,
}

/// The facts about this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The external interface: the one that faces the other hosts.
    pub ext: IfName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its own address of each enabled family.
    pub addrs: PerFamily<IpAddr>,
    /// The addresses to publish: the interface's, unless the operator gave others.
    pub public: PerFamily<IpAddr>,
    /// Where packets go: destinations, and whether the external interface reaches them without a gateway.
    pub routes: Vec<(Subnet, bool)>,
}

impl Node {
    /// Does the external interface reach this address without a gateway? The longest prefix decides, as in the kernel.
    pub fn is_on_link(&self, ip: IpAddr) -> bool {
        let matching = self.routes.iter().filter(|(dst, _)| dst.contains(ip));
        matching.max_by_key(|(dst, on_link)| (dst.prefix_len(), *on_link)).is_some_and(|(_, on_link)| *on_link)
    }
}
