//! Facts about this host, gathered once and then only read: which interface faces the other hosts, its addresses, its
//! MTU, what is on its link. The choice of the interface (specification, section 1.5) is made here from facts that
//! the `kernel` crate reads.

use std::net::IpAddr;

use thiserror::Error;

use crate::config::Config;
use crate::net::{Cidr, Family, IfName, PerFamily, Subnet};

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
    /// Index of the output interface; 0 for a multipath route.
    pub oif: u32,
    /// Is there a gateway? Without one the destination is on the link.
    pub gateway: bool,
}

/// What the operator said about the interface and the addresses to publish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `--iface`, in order: names or addresses.
    pub iface: Vec<String>,
    /// `--public-ip`.
    pub public: PerFamily<IpAddr>,
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

/// No usable interface.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NodeError {
    /// None of the `--iface` values leads to a usable interface.
    #[error("--iface: {0}; the interfaces are {1}")]
    Iface(String, String),
    /// `--public-ip` is on no interface and no `--iface` was given.
    #[error("--public-ip {0}: no interface has this address; name the interface with --iface if it is reached through NAT")]
    PublicIp(IpAddr),
    /// There is no default route to tell the interface.
    #[error("no {0} default route tells the external interface: name it with --iface")]
    NoDefaultRoute(Family),
    /// The interface has no usable address of an enabled family.
    #[error("interface {0} has no usable {1} address")]
    NoAddress(IfName, Family),
    /// The interface has MTU 0.
    #[error("interface {0} has MTU 0")]
    NoMtu(IfName),
    /// The pod network would swallow the hosts' own network.
    #[error(
        "network config: Network: the pod network {0} contains this host's own address {1} on {2}: choose a network that the hosts do not use"
    )]
    Overlap(Subnet, IpAddr, IfName),
}

impl Node {
    /// Chooses the external interface and gathers its facts: each `--iface` in order, else the interface that holds
    /// the public address, else the one of the default route.
    ///
    /// # Errors
    /// [`NodeError`], which names the flag and the fix.
    pub fn choose(interfaces: &[Interface], routes: &[RouteFact], wanted: &Wanted, config: &Config) -> Result<Node, NodeError> {
        let families: Vec<Family> = config.networks.iter().map(|(family, _)| family).collect();
        if wanted.iface.is_empty() {
            let chosen = match wanted.public.iter().next() {
                Some((_, ip)) => {
                    let holder = interfaces.iter().find(|i| i.holds(*ip)).ok_or(NodeError::PublicIp(*ip))?;
                    return Node::on(holder, Some(*ip), routes, wanted, &families, config);
                }
                None => {
                    let family = families.first().copied().unwrap_or(Family::V4);
                    let default = |route: &&RouteFact| route.dst.family() == family && route.dst.prefix_len() == 0 && route.oif != 0;
                    let route = routes.iter().find(default).ok_or(NodeError::NoDefaultRoute(family))?;
                    interfaces.iter().find(|i| i.index == route.oif).ok_or(NodeError::NoDefaultRoute(family))?
                }
            };
            return Node::on(chosen, None, routes, wanted, &families, config);
        }
        let mut reasons = Vec::new();
        for text in &wanted.iface {
            let address: Option<IpAddr> = text.parse().ok();
            let found = interfaces.iter().find(|i| match address {
                Some(ip) => i.holds(ip),
                None => i.name.as_str() == text,
            });
            let Some(interface) = found else {
                let what = if address.is_some() { "no interface has the address" } else { "there is no interface" };
                reasons.push(format!("{what} {text:?}"));
                continue;
            };
            match Node::on(interface, address, routes, wanted, &families, config) {
                Ok(node) => return Ok(node),
                Err(error @ NodeError::Overlap(..)) => return Err(error),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        let names: Vec<&str> = interfaces.iter().map(|i| i.name.as_str()).collect();
        Err(NodeError::Iface(reasons.join("; "), names.join(", ")))
    }

    fn on(
        interface: &Interface,
        fixed: Option<IpAddr>,
        routes: &[RouteFact],
        wanted: &Wanted,
        families: &[Family],
        config: &Config,
    ) -> Result<Node, NodeError> {
        if interface.mtu == 0 {
            return Err(NodeError::NoMtu(interface.name));
        }
        let (mut addrs, mut public) = (PerFamily::default(), PerFamily::default());
        for &family in families {
            let addr = fixed.filter(|ip| Family::of(*ip) == family).or_else(|| interface.preferred(family));
            let addr = addr.ok_or(NodeError::NoAddress(interface.name, family))?;
            if let Some(network) = config.network(family).filter(|network| network.contains(addr)) {
                return Err(NodeError::Overlap(network, addr, interface.name));
            }
            addrs.set(family, Some(addr));
            public.set(family, wanted.public.get(family).copied().or(Some(addr)));
        }
        let routes = routes.iter().map(|r| (r.dst, r.oif == interface.index && !r.gateway)).collect();
        Ok(Node { ext: interface.name, mtu: interface.mtu, addrs, public, routes })
    }

    /// Does the external interface reach this address without a gateway? The longest prefix decides, as in the kernel.
    pub fn is_on_link(&self, ip: IpAddr) -> bool {
        let matching = self.routes.iter().filter(|(dst, _)| dst.contains(ip));
        matching.max_by_key(|(dst, on_link)| (dst.prefix_len(), *on_link)).is_some_and(|(_, on_link)| *on_link)
    }
}

impl Interface {
    fn holds(&self, ip: IpAddr) -> bool {
        self.addrs.iter().any(|a| a.cidr.addr == ip)
    }

    /// The address to use: global before link-local, permanent before dynamic, stable before temporary; never a
    /// deprecated one.
    fn preferred(&self, family: Family) -> Option<IpAddr> {
        let usable = self.addrs.iter().filter(|a| {
            let ip = a.cidr.addr;
            Family::of(ip) == family && !a.deprecated && !ip.is_loopback() && !ip.is_multicast() && !ip.is_unspecified()
        });
        let best = usable.min_by_key(|a| (is_link_local(a.cidr.addr), !a.permanent, a.temporary));
        best.map(|a| a.cidr.addr)
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str, addrs: &[&str]) -> Interface {
        let addr = |text: &&str| {
            let (text, deprecated) = text.strip_suffix('!').map_or((*text, false), |text| (text, true));
            InterfaceAddr { cidr: text.parse().unwrap(), permanent: true, temporary: false, deprecated }
        };
        Interface { index, name: name.parse().unwrap(), mtu: 1500, addrs: addrs.iter().map(addr).collect() }
    }

    fn choose(iface: &[&str], public: Option<&str>) -> String {
        let interfaces = [
            interface(1, "lo", &["127.0.0.1/8"]),
            interface(2, "eth0", &["169.254.7.7/16", "192.0.2.9/24!", "192.0.2.10/24", "192.0.2.11/24"]),
            interface(3, "eth1", &["198.51.100.1/24", "fd00::1/64"]),
            interface(4, "eth2", &[]),
        ];
        let route = |dst: &str, oif, gateway| RouteFact { dst: dst.parse().unwrap(), oif, gateway };
        let routes = [
            route("192.0.2.0/24", 2, false),
            route("0.0.0.0/0", 2, true),
            route("198.51.100.0/24", 3, false),
            route("203.0.113.0/24", 2, true),
            route("192.0.2.192/26", 2, true),
        ];
        let wanted = Wanted {
            iface: iface.iter().map(ToString::to_string).collect(),
            public: PerFamily { v4: public.map(|ip| ip.parse().unwrap()), v6: None },
        };
        let config = Config::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#).unwrap();
        match Node::choose(&interfaces, &routes, &wanted, &config) {
            Ok(node) => {
                let near = ["192.0.2.77", "192.0.2.200", "198.51.100.9", "203.0.113.9"]
                    .into_iter()
                    .filter(|ip| node.is_on_link(ip.parse().unwrap()));
                let near: Vec<&str> = near.collect();
                format!("{} {} publishes {}, near {near:?}", node.ext, node.addrs.v4.unwrap(), node.public.v4.unwrap())
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_default_route_tells_the_interface() {
        assert_eq!(choose(&[], None), "eth0 192.0.2.10 publishes 192.0.2.10, near [\"192.0.2.77\"]");
    }

    #[test]
    fn iface_names_or_addresses_are_tried_in_order() {
        assert_eq!(choose(&["nope", "eth1"], None), "eth1 198.51.100.1 publishes 198.51.100.1, near [\"198.51.100.9\"]");
        assert_eq!(choose(&["192.0.2.11"], Some("203.0.113.5")), "eth0 192.0.2.11 publishes 203.0.113.5, near [\"192.0.2.77\"]");
    }

    #[test]
    fn a_public_ip_alone_must_be_on_an_interface() {
        assert_eq!(choose(&[], Some("198.51.100.1")), "eth1 198.51.100.1 publishes 198.51.100.1, near [\"198.51.100.9\"]");
        assert_eq!(
            choose(&[], Some("203.0.113.5")),
            "--public-ip 203.0.113.5: no interface has this address; name the interface with --iface if it is reached through NAT"
        );
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        assert_eq!(
            choose(&["nope", "eth2"], None),
            "--iface: there is no interface \"nope\"; interface eth2 has no usable IPv4 address; the interfaces are lo, eth0, eth1, eth2"
        );
    }

    #[test]
    fn a_pod_network_around_the_hosts_is_refused() {
        let config = Config::parse(r#"{"Network":"192.0.0.0/16","Backend":{"Type":"host-gw"}}"#).unwrap();
        let wanted = Wanted { iface: vec!["eth0".to_owned()], ..Wanted::default() };
        let error = Node::choose(&[interface(2, "eth0", &["192.0.2.10/24"])], &[], &wanted, &config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "network config: Network: the pod network 192.0.0.0/16 contains this host's own address 192.0.2.10 on eth0: choose a network that the hosts do not use"
        );
    }
}
