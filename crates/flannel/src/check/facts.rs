//! The facts that checks are about, as plain data.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use super::filter::Filter;
use crate::net::{Cidr, Family, IfName, PerFamily, Subnet};
use crate::object::{Link, ROUTE_PROTOCOL};

/// The state that this node should be in, as far as checks need it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// The pod networks.
    pub networks: PerFamily<Subnet>,
    /// This node's subnets.
    pub own: PerFamily<Subnet>,
    /// The external interface.
    pub external: Option<IfName>,
    /// The addresses of the external interface that are in use.
    pub addresses: PerFamily<IpAddr>,
    /// The devices by which peers are reached, where the backend has one.
    pub devices: PerFamily<IfName>,
    /// The daemon's own links.
    pub links: Vec<Link>,
    /// Those links that the kernel refuses to create because they exist.
    pub refused: Vec<IfName>,
    /// Pod networks of earlier runs on this host.
    pub retired: Vec<Subnet>,
    /// The pods' bridge, once it is known.
    pub bridge: Option<IfName>,
    /// Whether the external interface was chosen by the default route, not by a flag.
    pub chosen_by_default_route: bool,
}

impl Expected {
    /// The interface by which packets to peers leave.
    pub(super) fn outgoing(&self, family: Family) -> Option<IfName> {
        self.devices.get(family).copied().or(self.external)
    }

    /// The pod network and this node's subnet of a family that works here: one without an address has no packets to lose.
    pub(super) fn subnets_in_use(&self, family: Family) -> Option<(Subnet, Subnet)> {
        self.addresses.get(family)?;
        Some((*self.networks.get(family)?, *self.own.get(family)?))
    }

    /// The names of all interfaces that pods' packets pass.
    pub(super) fn interfaces(&self) -> Vec<IfName> {
        let devices = self.devices.iter().map(|(_, device)| *device);
        self.external.into_iter().chain(devices).chain(self.bridge).collect()
    }
}

/// The state of the host. Parts that could not be read are empty, and named in `unreadable`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Routes of the main table within the pod networks, in the kernel's order.
    pub routes: Vec<SeenRoute>,
    /// Default routes of the main table.
    pub defaults: Vec<DefaultRoute>,
    /// Policy rules that come before the main table, in order, and its own.
    pub rules: PerFamily<Vec<PolicyRule>>,
    /// Routes of the tables that these rules name, as far as they concern the pod networks.
    pub tables: BTreeMap<(Family, u32), Vec<SeenRoute>>,
    /// The packet filter's chains for forwarded packets.
    pub filter: PerFamily<Filter>,
    /// All links.
    pub links: Vec<SeenLink>,
    /// Addresses of all links.
    pub addresses: Vec<Address>,
    /// VXLAN devices of the daemon that are in another network namespace.
    pub elsewhere: Vec<Elsewhere>,
    /// The effective `rp_filter` of the interfaces that pods' packets pass.
    pub rp_filter: Vec<(IfName, u8)>,
    /// Packets dropped by reverse-path filtering since the last look.
    pub rp_dropped: u64,
    /// Interfaces on which `disable_ipv6` is set.
    pub ipv6_disabled: Vec<IfName>,
    /// Whether kube-proxy has rules for a family on this host.
    pub has_kube_proxy: bool,
    /// Whether bridged packets of a family pass the rules for routed ones; `None` if br_netfilter is not loaded.
    pub bridge_calls: PerFamily<bool>,
    /// Tracked connections.
    pub conntrack: Option<Usage>,
    /// Neighbour entries that count against the limit.
    pub neighbours: PerFamily<Usage>,
    /// Devices of the daemon and the pods' bridge that another program manages.
    pub managed: Vec<(IfName, Manager)>,
    /// The parts that could not be read, each with the reason.
    pub unreadable: Vec<String>,
}

/// How much of a table with a limit is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Entries.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

impl Usage {
    /// Whether nine tenths are in use.
    pub(super) fn is_nearly_full(self) -> bool {
        self.limit > 0 && self.used.saturating_mul(10) >= self.limit.saturating_mul(9)
    }
}

/// What becomes of packets that take a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteKind {
    /// They are forwarded.
    Unicast,
    /// They are discarded without a word.
    Blackhole,
    /// They are refused with "host unreachable".
    Unreachable,
    /// They are refused with "administratively prohibited".
    Prohibit,
    /// The search goes on in the next table.
    Throw,
    /// Any other kind.
    Other,
}

/// A route, of any program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenRoute {
    /// Destination.
    pub dst: Subnet,
    /// Kind.
    pub kind: RouteKind,
    /// Metric.
    pub metric: u32,
    /// Gateway.
    pub via: Option<IpAddr>,
    /// Interface.
    pub dev: Option<IfName>,
    /// `rtm_protocol`
    pub protocol: u8,
}

impl SeenRoute {
    /// Whether a daemon of ours added it.
    pub(super) fn is_ours(&self) -> bool {
        self.protocol == ROUTE_PROTOCOL
    }

    /// Whether the kernel added it for an address of an interface.
    pub(super) fn is_connected(&self) -> bool {
        self.protocol == 2 && self.kind == RouteKind::Unicast && self.via.is_none()
    }

    /// The command that deletes it.
    pub(super) fn removal(&self, table: Option<u32>) -> String {
        let table = table.map(|table| format!(" table {table}")).unwrap_or_default();
        format!("{} route del {self}{table}", super::ip(self.dst.family()))
    }
}

impl fmt::Display for SeenRoute {
    /// The route in the syntax of `ip route`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SeenRoute { dst, kind, metric, via, dev, protocol } = self;
        f.write_str(match kind {
            RouteKind::Unicast | RouteKind::Other => "",
            RouteKind::Blackhole => "blackhole ",
            RouteKind::Unreachable => "unreachable ",
            RouteKind::Prohibit => "prohibit ",
            RouteKind::Throw => "throw ",
        })?;
        write!(f, "{dst}")?;
        via.iter().try_for_each(|via| write!(f, " via {via}"))?;
        // The kernel shows IPv6 routes that lead nowhere with the loopback interface.
        let dev = dev.filter(|_| *kind == RouteKind::Unicast);
        dev.iter().try_for_each(|dev| write!(f, " dev {dev}"))?;
        match protocol {
            0 | 3 => Ok(()),
            2 => f.write_str(" proto kernel"),
            4 => f.write_str(" proto static"),
            9 => f.write_str(" proto ra"),
            11 => f.write_str(" proto zebra"),
            12 => f.write_str(" proto bird"),
            16 => f.write_str(" proto dhcp"),
            186 => f.write_str(" proto bgp"),
            188 => f.write_str(" proto ospf"),
            number => write!(f, " proto {number}"),
        }?;
        if *metric == 0 { Ok(()) } else { write!(f, " metric {metric}") }
    }
}

/// A default route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Family.
    pub family: Family,
    /// Metric.
    pub metric: u32,
    /// Interface.
    pub dev: IfName,
}

/// What a policy rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyAction {
    /// Looks in this table; routes with a prefix of this length or shorter do not count.
    Lookup(u32, Option<u8>),
    /// Discards or refuses the packet.
    Refuse(&'static str),
    /// Anything else.
    Other,
}

/// A policy rule (`ip rule`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyRule {
    /// Its place in the order.
    pub priority: u32,
    /// Source prefix; `None` for any.
    pub from: Option<Subnet>,
    /// Destination prefix; `None` for any.
    pub to: Option<Subnet>,
    /// Interface on which the packet arrived; `None` for any.
    pub iif: Option<IfName>,
    /// Whether it has conditions that an ordinary packet of a pod does not meet, or that are not known here.
    pub is_special: bool,
    /// What it does.
    pub action: PolicyAction,
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenLink {
    /// Interface name.
    pub name: IfName,
    /// `IFLA_INFO_KIND`
    pub kind: String,
    /// VNI and UDP port of a VXLAN device.
    pub vxlan: Option<(u32, u16)>,
    /// Whether it is a bridge with a pod's link as port: a veth whose other end is in another network namespace.
    pub has_pods: bool,
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The link.
    pub link: IfName,
    /// The address and its on-link prefix.
    pub cidr: Cidr,
    /// Whether duplicate address detection found another host with it.
    pub duplicate: bool,
    /// For how long duplicate address detection has been running, in seconds; `None` if it is not running.
    pub tentative: Option<u32>,
}

/// A VXLAN device that is in another network namespace than it was created in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elsewhere {
    /// Its present name.
    pub name: IfName,
    /// VNI and UDP port.
    pub vxlan: (u32, u16),
    /// The namespace: a name of `ip netns`, or a process in it.
    pub place: Place,
}

/// How a network namespace is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A name of `ip netns`.
    Named(String),
    /// A process that is in it: its number and program.
    Process(u32, String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Named(name) => write!(f, "network namespace {name}"),
            Place::Process(pid, program) => write!(f, "the network namespace of process {pid} ({program})"),
        }
    }
}

/// A program that configures interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manager {
    /// NetworkManager.
    NetworkManager,
    /// systemd-networkd.
    Networkd,
}
