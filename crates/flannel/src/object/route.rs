//! Unicast routes of the main table.

use std::fmt;
use std::net::IpAddr;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName, Subnet};

/// `RTPROT_BOOT`: the protocol of Go flanneld's routes, and of those that an operator adds by hand.
pub const BOOT_PROTOCOL: u8 = 3;

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: Subnet,
    /// Metric (`RTA_PRIORITY`), see [`route_metric`].
    pub metric: u32,
    /// Gateway.
    pub via: Option<IpAddr>,
    /// Output interface.
    pub dev: IfName,
    /// `RTNH_F_ONLINK`: the gateway is reachable on the interface, whatever its prefix.
    pub onlink: bool,
    /// `rtm_protocol`: [`ROUTE_PROTOCOL`], except for routes that a Go flanneld left behind.
    pub protocol: u8,
}

/// The daemon's number in `rtm_protocol`, which marks its routes. `linux/rtnetlink.h` leaves numbers above 4 to routing daemons; no
/// `rt_protos` file lists 241.
pub const ROUTE_PROTOCOL: u8 = 241;

/// The metric of a peer's route: for IPv4 the index of its subnet within the pod network.
///
/// The kernel hashes the nexthops of IPv4 routes by device, protocol and metric, not by gateway; ten thousand peers
/// with one metric share one bucket that each insertion walks (`fib_find_info`, `net/ipv4/fib_semantics.c`). Distinct
/// metrics give distinct buckets. IPv6 has no such table and keeps the kernel's default, 1024 (`IP6_RT_PRIO_USER`).
pub fn route_metric(network: Subnet, subnet: Subnet) -> u32 {
    match network.family() {
        Family::V4 => subnet.index_in(network),
        Family::V6 => 1024,
    }
}

impl Item for Route {
    fn key(&self) -> Key {
        Key::Route(self.dst, self.metric)
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.dev == link
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(self.dst.family()), never_deleted: false, optional: false }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { dst, metric, via, dev, onlink, protocol } = self;
        write!(f, "route {dst}")?;
        if let Some(via) = via {
            write!(f, " via {via}")?;
        }
        write!(f, " dev {dev} metric {metric}{}", if *onlink { " onlink" } else { "" })?;
        if *protocol == ROUTE_PROTOCOL { Ok(()) } else { write!(f, " proto {protocol}") }
    }
}
