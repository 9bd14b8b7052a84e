//! What in the kernel is ours: the limits within which it is read, compared and deleted.

use std::path::PathBuf;

use crate::net::{Cidr, Family, IfName, Subnet};
use crate::object::{BOOT_PROTOCOL, ROUTE_PROTOCOL, Route};

/// What in the kernel counts as ours: these links with all that stands on them, these sysctls, these tables, and the
/// routes into these networks that a flanneld made ([`Scope::has_route`]). Another flanneld on the same host has
/// another network, and its routes are none of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Links by name.
    pub links: Vec<IfName>,
    /// Sysctls by path, with the value that they shall have.
    pub sysctls: Vec<(String, String)>,
    /// nftables tables by family.
    pub rulesets: Vec<Family>,
    /// Chains of iptables by family.
    pub iptables: Vec<Family>,
    /// The pod networks.
    pub networks: Vec<Subnet>,
    /// Pod networks of an earlier run on this host: rules that name them are leftovers of ours.
    pub retired: Vec<Subnet>,
    /// The file for the CNI plugins.
    pub file: Option<PathBuf>,
    /// Addresses of this host's pods' gateways: the bridge that has one of them is the pods'.
    pub gateways: Vec<Cidr>,
    /// That bridge, once it is known: it may have lost them.
    pub bridge: Option<IfName>,
    /// Rules that the plugins wrote for this host's pods.
    pub pod_rules: bool,
    /// Plain routes that a Go flanneld left, while they are looked for.
    pub adopt: Option<Adopt>,
}

/// What a Go flanneld's plain routes look like (host-gw, and vxlan with `DirectRouting`): through the external
/// interface, of protocol boot and without a metric, to one whole subnet of the pod network. An operator's route may look
/// the same, so they are looked for only once, on a host where a Go flanneld has run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopt {
    /// The external interface.
    pub dev: IfName,
    /// The pod networks, and the length of each host's subnet.
    pub subnets: Vec<(Subnet, u8)>,
}

impl Adopt {
    /// May a Go flanneld have left this route?
    pub fn has_route(&self, route: &Route) -> bool {
        let whole = self.subnets.iter().any(|(network, len)| network.covers(route.dst) && route.dst.prefix_len() == *len);
        let default_metric = matches!((route.dst.family(), route.metric), (Family::V4, 0) | (Family::V6, 1024));
        route.dev == self.dev && route.protocol == BOOT_PROTOCOL && route.via.is_some() && default_metric && whole
    }
}

impl Scope {
    /// Is this route ours, or a predecessor's of ours? By its destination, and by its protocol; on a link of ours the
    /// protocol of Go flanneld counts as well.
    pub fn has_route(&self, route: &Route) -> bool {
        let into = self.networks.iter().chain(&self.retired).any(|network| network.covers(route.dst));
        let adopted = route.protocol == BOOT_PROTOCOL && route.via.is_some() && self.links.contains(&route.dev);
        into && (route.protocol == ROUTE_PROTOCOL || adopted) || self.adopt.as_ref().is_some_and(|adopt| adopt.has_route(route))
    }
}
