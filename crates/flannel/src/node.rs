//! Facts about this host: its external interface with its addresses and MTU, and the prefixes on its link. The interface is chosen in
//! `choose` (specification, section 1.5), from facts that the `kernel` crate reads.

use std::net::IpAddr;

use crate::net::{Cidr, IfName, PerFamily, Subnet};

mod choose;

pub use choose::{NodeError, Reach, Wanted, check_regex};

/// A network interface, as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index; candidates are tried in this order.
    pub index: u32,
    /// Its name.
    pub name: IfName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses in the kernel's order.
    pub addrs: Vec<InterfaceAddr>,
}

/// An address of an interface, with the flags that determine its rank.
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

/// A unicast route of the main table: the fields that the choice of an interface needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteFact {
    /// Destination; length 0 for a default route.
    pub dst: Subnet,
    /// Index of the output interface; of a multipath route that of its first usable next hop, or 0.
    pub oif: u32,
    /// Whether the route has a gateway. Without one the destination is on the link.
    pub gateway: bool,
}

/// The facts about this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The external interface, which connects to the other hosts.
    pub ext: IfName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The address of this host for each enabled family.
    pub addrs: PerFamily<IpAddr>,
    /// The addresses to publish: those of the interface, unless the operator set others.
    pub public: PerFamily<IpAddr>,
    /// Route destinations, each with whether the external interface reaches it without a gateway.
    pub routes: Vec<(Subnet, bool)>,
}

impl Node {
    /// Whether the external interface reaches this address without a gateway, by longest prefix match.
    pub fn is_on_link(&self, ip: IpAddr) -> bool {
        let matching = self.routes.iter().filter(|(dst, _)| dst.contains(ip));
        matching.max_by_key(|(dst, on_link)| (dst.prefix_len(), *on_link)).is_some_and(|(_, on_link)| *on_link)
    }
}
