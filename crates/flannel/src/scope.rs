//! The scope of the daemon: the kernel objects that it reads, compares and may delete.

use std::path::PathBuf;

use crate::net::{Cidr, Family, IfName, Subnet};
use crate::object::{BOOT_PROTOCOL, ROUTE_PROTOCOL, Route};

/// The kernel objects that this daemon owns: these links and their dependents, these sysctls and tables, and the routes into these
/// networks that a flanneld added ([`Scope::has_route`]). Another flanneld on the same host has another network, so its routes are
/// not in scope.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Links by name.
    pub links: Vec<IfName>,
    /// Sysctls by path, with their desired values.
    pub sysctls: Vec<(String, String)>,
    /// nftables tables by family.
    pub rulesets: Vec<Family>,
    /// iptables chains by family.
    pub iptables: Vec<Family>,
    /// The pod networks.
    pub networks: Vec<Subnet>,
    /// Pod networks of an earlier run on this host, whose rules and routes are leftovers.
    pub retired: Vec<Subnet>,
    /// The file for the CNI plugins.
    pub file: Option<PathBuf>,
    /// Gateway addresses of this host's pods: the bridge that has one of them is the pods' bridge.
    pub gateways: Vec<Cidr>,
    /// The name of that bridge once it is known, because it may lose the addresses.
    pub bridge: Option<IfName>,
    /// Whether the rules that the plugins wrote for this host's pods are in scope.
    pub pod_rules: bool,
    /// Plain routes that a Go flanneld may have left, while the daemon looks for them.
    pub adopt: Option<Adopt>,
}

/// The form of a Go flanneld's plain routes (host-gw, and vxlan with `DirectRouting`): through the external interface, with protocol
/// boot and the default metric, to one whole subnet of the pod network. A route of the operator may look the same, so the daemon looks
/// for them only once, on a host where a Go flanneld has run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopt {
    /// The external interface.
    pub dev: IfName,
    /// The pod networks, each with the prefix length of the hosts' subnets.
    pub subnets: Vec<(Subnet, u8)>,
}

impl Adopt {
    /// Whether a Go flanneld may have left this route.
    pub fn has_route(&self, route: &Route) -> bool {
        let whole = self.subnets.iter().any(|(network, len)| network.covers(route.dst) && route.dst.prefix_len() == *len);
        let default_metric = matches!((route.dst.family(), route.metric), (Family::V4, 0) | (Family::V6, 1024));
        route.dev == self.dev && route.protocol == BOOT_PROTOCOL && route.via.is_some() && default_metric && whole
    }
}

impl Scope {
    /// Whether this daemon or its predecessor owns this route: the destination and the protocol decide. On a link of the daemon the
    /// protocol of Go flanneld counts as well.
    pub fn has_route(&self, route: &Route) -> bool {
        let into = self.networks.iter().chain(&self.retired).any(|network| network.covers(route.dst));
        let adopted = route.protocol == BOOT_PROTOCOL && route.via.is_some() && self.links.contains(&route.dev);
        into && (route.protocol == ROUTE_PROTOCOL || adopted) || self.adopt.as_ref().is_some_and(|adopt| adopt.has_route(route))
    }
}
