//! Chooses the external interface and the addresses to publish (specification, section 1.5): each `--iface` in turn, then each
//! `--iface-regex`, then `--iface-can-reach`; without these flags the interface with the public address, or else the one of the
//! default route.

use std::net::IpAddr;

use regex_lite::Regex;
use thiserror::Error;

use super::{Interface, InterfaceAddr, Node, RouteFact};
use crate::config::Config;
use crate::net::{Family, IfName, PerFamily, Subnet};

/// The operator's flags for the interface and the addresses to publish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `--iface`, in order: names or addresses.
    pub iface: Vec<String>,
    /// `--iface-regex`, in order.
    pub iface_regex: Vec<String>,
    /// `--iface-can-reach`, and the result of the kernel's route lookup for it.
    pub can_reach: Option<(IpAddr, Result<Reach, String>)>,
    /// `--public-ip`, `--public-ipv6`.
    pub public: PerFamily<IpAddr>,
    /// The addresses in use. As long as they exist, an address that is added later (such as a virtual one that moves between hosts)
    /// does not replace them.
    pub current: PerFamily<IpAddr>,
    /// Whether IPv6 is left out if it has no address or default route, but IPv4 has. IPv4 identifies the host in etcd, so it is never left
    /// out.
    pub partial: bool,
}

/// The result of a route lookup for an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Index of the output interface.
    pub oif: u32,
    /// The source address that the kernel would choose.
    pub source: Option<IpAddr>,
}

/// The reason why no external interface can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NodeError {
    /// No flag of the operator matches a usable interface.
    #[error("{0}; the interfaces are {1}")]
    Nothing(String, String),
    /// `--public-ip` or `--public-ipv6` is on no interface and no interface was named.
    #[error("{0} {1}: no interface has this address; name the interface with --iface if it is reached through NAT")]
    PublicIp(&'static str, IpAddr),
    /// No flag names the interface, and there is no default route.
    #[error("cannot choose the external interface: there is no {0} default route: name the interface with --iface")]
    NoDefaultRoute(Family),
    /// The default routes of the families use different interfaces.
    #[error("the IPv4 default route uses {0}, the IPv6 default route uses {1}: name the interface with --iface")]
    TwoDefaultRoutes(IfName, IfName),
    /// The interface has no usable address of an enabled family.
    #[error("interface {0} has no usable {1} address")]
    NoAddress(IfName, Family),
    /// The interface has MTU 0.
    #[error("interface {0} has MTU 0")]
    NoMtu(IfName),
    /// The pod network contains an address of this host.
    #[error(
        "network config: {field}: the pod network {0} contains this host's own address {1} on {2}: choose a network that the hosts do not use",
        field = if .1.is_ipv4() { "Network" } else { "IPv6Network" }
    )]
    Overlap(Subnet, IpAddr, IfName),
}

fn compile(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| format!("it is not a valid regular expression: {error}"))
}

/// Checks the syntax of an `--iface-regex`.
///
/// # Errors
/// The syntax error, as text.
pub fn check_regex(text: &str) -> Result<(), String> {
    compile(text).map(drop)
}

/// An interface, and the addresses of it that the flag selected.
type Found<'a> = (&'a Interface, PerFamily<IpAddr>);

/// The input of the choice.
struct Choice<'a> {
    interfaces: &'a [Interface],
    routes: &'a [RouteFact],
    wanted: &'a Wanted,
    families: Vec<Family>,
    config: &'a Config,
}

impl Node {
    /// Chooses the external interface and gathers its facts.
    ///
    /// # Errors
    /// [`NodeError`], which names the flag or the fix.
    pub fn choose(interfaces: &[Interface], routes: &[RouteFact], wanted: &Wanted, config: &Config) -> Result<Node, NodeError> {
        let families = config.networks.iter().map(|(family, _)| family).collect();
        Choice { interfaces, routes, wanted, families, config }.node()
    }
}

impl<'a> Choice<'a> {
    fn node(&self) -> Result<Node, NodeError> {
        let wanted = self.wanted;
        if wanted.iface.is_empty() && wanted.iface_regex.is_empty() && wanted.can_reach.is_none() {
            let (interface, fixed) = match wanted.public.iter().next() {
                Some((family, ip)) => {
                    let flag = if family == Family::V4 { "--public-ip" } else { "--public-ipv6" };
                    self.by_address(*ip).map_err(|_| NodeError::PublicIp(flag, *ip))?
                }
                None => (self.by_default_route()?, PerFamily::default()),
            };
            return self.on(interface, fixed);
        }
        let by_iface = wanted.iface.iter().map(|text| {
            let found = match text.parse() {
                Ok(ip) => self.by_address(ip),
                Err(_) => self.by_name(text),
            };
            found.map_err(|problem| format!("--iface {text}: {problem}"))
        });
        let by_regex =
            wanted.iface_regex.iter().map(|text| self.by_regex(text).map_err(|problem| format!("--iface-regex {text}: {problem}")));
        let by_reach =
            wanted.can_reach.iter().map(|(ip, reach)| self.by_reach(reach).map_err(|problem| format!("--iface-can-reach {ip}: {problem}")));
        let mut reasons = Vec::new();
        for candidate in by_iface.chain(by_regex).chain(by_reach) {
            match candidate.map(|(interface, fixed)| self.on(interface, fixed)) {
                Ok(Ok(node)) => return Ok(node),
                // Another interface would not remove the overlap.
                Ok(Err(error @ NodeError::Overlap(..))) => return Err(error),
                Ok(Err(error)) => reasons.push(error.to_string()),
                Err(reason) => reasons.push(reason),
            }
        }
        let list = self.interfaces.iter().map(|i| {
            let addrs: Vec<String> = i.addrs.iter().map(|a| a.cidr.addr.to_string()).collect();
            format!("{}:[{}]", i.name, addrs.join(" "))
        });
        Err(NodeError::Nothing(reasons.join("; "), list.collect::<Vec<_>>().join(" ")))
    }

    /// The interface that holds the address. In dual stack, a `--public-ipv6` on another interface is an error for an IPv4 address
    /// and takes precedence over an IPv6 address.
    fn by_address(&self, ip: IpAddr) -> Result<Found<'a>, String> {
        let holder = |ip: IpAddr| self.interfaces.iter().find(|i| i.holds(ip) && !self.is_own(i));
        let mut found = holder(ip).ok_or("no interface has this address")?;
        let mut fixed = PerFamily::default();
        fixed.set(Family::of(ip), Some(ip));
        if let (2, Some(public)) = (self.families.len(), self.wanted.public.v6)
            && let Some(other) = holder(public)
        {
            match ip {
                IpAddr::V4(_) if other.index != found.index => {
                    return Err(format!("it is on {}, but --public-ipv6 {public} is on {}", found.name, other.name));
                }
                IpAddr::V4(_) => {}
                IpAddr::V6(_) => found = other,
            }
            fixed.v6 = Some(public);
        }
        Ok((found, fixed))
    }

    fn by_name(&self, name: &str) -> Result<Found<'a>, String> {
        let found = self.interfaces.iter().find(|i| i.name.as_str() == name);
        found.map(|i| (i, PerFamily::default())).ok_or_else(|| "there is no such interface".to_owned())
    }

    /// The first interface with a matching address (in dual stack: of each family), or else the first with a matching name.
    fn by_regex(&self, text: &str) -> Result<Found<'a>, String> {
        let regex = compile(text)?;
        for interface in self.interfaces.iter().filter(|interface| !self.is_own(interface)) {
            let mut fixed = PerFamily::default();
            for family in &self.families {
                fixed.set(*family, self.usable(interface, *family).into_iter().find(|ip| regex.is_match(&ip.to_string())));
            }
            if self.families.iter().all(|family| fixed.get(*family).is_some()) {
                return Ok((interface, fixed));
            }
        }
        let named = self.interfaces.iter().find(|i| !self.is_own(i) && regex.is_match(i.name.as_str()));
        named.map(|i| (i, PerFamily::default())).ok_or_else(|| "no interface's address or name matches".to_owned())
    }

    fn by_reach(&self, reach: &Result<Reach, String>) -> Result<Found<'a>, String> {
        let reach = reach.as_ref().map_err(Clone::clone)?;
        let found = self.interfaces.iter().find(|i| i.index == reach.oif).ok_or("the route uses no interface of this host")?;
        let mut fixed = PerFamily::default();
        if let Some(source) = reach.source {
            fixed.set(Family::of(source), Some(source));
        }
        Ok((found, fixed))
    }

    /// The interface of the default route; in dual stack both default routes must use it.
    /// Is it a device of our own backend? A DHCP client may have given it an address, or even a default route.
    fn is_own(&self, interface: &Interface) -> bool {
        self.families.iter().any(|family| self.config.backend.device(*family) == Some(interface.name))
    }

    fn by_default_route(&self) -> Result<&'a Interface, NodeError> {
        let mut chosen: Option<&Interface> = None;
        for &family in &self.families {
            let default = |route: &&RouteFact| route.dst.family() == family && route.dst.prefix_len() == 0;
            let interface = |route: &RouteFact| self.interfaces.iter().find(|i| i.index == route.oif && !self.is_own(i));
            let Some(interface) = self.routes.iter().filter(default).find_map(interface) else {
                if self.wanted.partial && chosen.is_some() {
                    continue;
                }
                return Err(NodeError::NoDefaultRoute(family));
            };
            match chosen {
                Some(first) if first.index != interface.index => return Err(NodeError::TwoDefaultRoutes(first.name, interface.name)),
                _ => chosen = Some(interface),
            }
        }
        chosen.ok_or(NodeError::NoDefaultRoute(Family::V4))
    }

    fn on(&self, interface: &Interface, fixed: PerFamily<IpAddr>) -> Result<Node, NodeError> {
        if interface.mtu == 0 {
            return Err(NodeError::NoMtu(interface.name));
        }
        let (mut addrs, mut public) = (PerFamily::default(), PerFamily::default());
        for &family in &self.families {
            let addr = fixed.get(family).copied().or_else(|| self.usable(interface, family).first().copied());
            let Some(addr) = addr else {
                if self.wanted.partial && !addrs.is_empty() {
                    continue;
                }
                return Err(NodeError::NoAddress(interface.name, family));
            };
            if let Some(network) = self.config.network(family).filter(|network| network.contains(addr)) {
                return Err(NodeError::Overlap(network, addr, interface.name));
            }
            addrs.set(family, Some(addr));
            public.set(family, self.wanted.public.get(family).copied().or(Some(addr)));
        }
        // Routes to pods belong to the daemon and change with the peers; no host has an address there. Link-local routes exist on
        // every device.
        let to_pods = |dst: Subnet| self.config.networks.iter().any(|(_, network)| network.network.covers(dst));
        let routes = self.routes.iter().filter(|r| !to_pods(r.dst) && !is_link_local(r.dst.network()));
        let routes = routes.map(|r| (r.dst, r.oif == interface.index && !r.gateway)).collect();
        Ok(Node { ext: interface.name, mtu: interface.mtu, addrs, public, routes })
    }
}

impl Choice<'_> {
    /// The usable addresses, best first: the one in use, then global before link-local, permanent before dynamic, stable before
    /// temporary; never a deprecated one.
    fn usable(&self, interface: &Interface, family: Family) -> Vec<IpAddr> {
        let is_usable = |a: &&InterfaceAddr| {
            let ip = a.cidr.addr;
            let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
            Family::of(ip) == family && !a.deprecated && !ip.is_loopback() && !ip.is_multicast() && !ip.is_unspecified() && !broadcast
        };
        let current = self.wanted.current.get(family);
        let mut usable: Vec<&InterfaceAddr> = interface.addrs.iter().filter(is_usable).collect();
        usable.sort_by_key(|a| (Some(&a.cidr.addr) != current, is_link_local(a.cidr.addr), !a.permanent, a.temporary));
        usable.iter().map(|a| a.cidr.addr).collect()
    }
}

impl Interface {
    fn holds(&self, ip: IpAddr) -> bool {
        self.addrs.iter().any(|a| a.cidr.addr == ip)
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

    const V4: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;
    const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw"}}"#;
    const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw"}}"#;

    /// Chooses by `flags`: "flag=value" pairs, separated by spaces.
    fn choose(config: &str, flags: &str) -> String {
        let interfaces = [
            interface(1, "lo", &["127.0.0.1/8", "::1/128"]),
            interface(2, "eth0", &["169.254.7.7/16", "192.0.2.9/24!", "192.0.2.10/24", "192.0.2.11/24", "fe80::2/64", "2001:db8::10/64"]),
            interface(3, "eth1", &["198.51.100.1/24", "fd00::1/64"]),
            interface(4, "eth2", &[]),
        ];
        let route = |dst: &str, oif, gateway| RouteFact { dst: dst.parse().unwrap(), oif, gateway };
        let routes = [
            route("192.0.2.0/24", 2, false),
            route("0.0.0.0/0", 0, true),
            route("0.0.0.0/0", 2, true),
            route("::/0", 2, true),
            route("198.51.100.0/24", 3, false),
            route("203.0.113.0/24", 2, true),
            route("192.0.2.192/26", 2, true),
        ];
        let mut wanted = Wanted::default();
        for (flag, value) in flags.split_whitespace().map(|flag| flag.split_once('=').unwrap()) {
            match flag {
                "iface" => wanted.iface.push(value.to_owned()),
                "regex" => wanted.iface_regex.push(value.to_owned()),
                "reach" => {
                    let reach = Reach { oif: 3, source: "198.51.100.1".parse().ok() };
                    let result = if value == "198.51.100.9" { Ok(reach) } else { Err("Network is unreachable".to_owned()) };
                    wanted.can_reach = Some((value.parse().unwrap(), result));
                }
                "current" => wanted.current.set(Family::of(value.parse().unwrap()), value.parse().ok()),
                "public" => wanted.public.set(Family::of(value.parse().unwrap()), value.parse().ok()),
                _ => panic!("{flag}"),
            }
        }
        match Node::choose(&interfaces, &routes, &wanted, &Config::parse(config).unwrap()) {
            Ok(node) => {
                let list = |ips: &PerFamily<IpAddr>| ips.iter().map(|(_, ip)| ip.to_string()).collect::<Vec<_>>().join(",");
                let near = ["192.0.2.77", "192.0.2.200", "198.51.100.9", "203.0.113.9"]
                    .into_iter()
                    .filter(|ip| node.is_on_link(ip.parse().unwrap()));
                let near: Vec<&str> = near.collect();
                let public = if node.public == node.addrs { String::new() } else { format!(" publishes {}", list(&node.public)) };
                format!("{} {}{public} near {}", node.ext, list(&node.addrs), near.join(","))
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn default_route_selects_the_interface() {
        assert_eq!(choose(V4, ""), "eth0 192.0.2.10 near 192.0.2.77");
        assert_eq!(choose(V6, ""), "eth0 2001:db8::10 near 192.0.2.77");
        assert_eq!(choose(DUAL, ""), "eth0 192.0.2.10,2001:db8::10 near 192.0.2.77");
    }

    #[test]
    fn usable_address_in_use_is_kept() {
        for (flags, want) in [
            ("", "192.0.2.10"),
            ("current=192.0.2.11", "192.0.2.11"),
            ("regex=^192 current=192.0.2.11", "192.0.2.11"),
            // The address in use is deprecated; it is gone; a flag names another.
            ("current=192.0.2.9", "192.0.2.10"),
            ("current=192.0.2.77", "192.0.2.10"),
            ("iface=192.0.2.10 current=192.0.2.11", "192.0.2.10"),
        ] {
            let chosen = choose(V4, flags);
            assert!(chosen.contains(&format!("{want} ")), "{flags}: {chosen}");
        }
    }

    #[test]
    fn default_routes_must_use_one_interface() {
        let interfaces = [interface(2, "eth0", &["192.0.2.1/24"]), interface(3, "eth1", &["2001:db8::1/64"])];
        let route = |dst: &str, oif| RouteFact { dst: dst.parse().unwrap(), oif, gateway: true };
        let error = |routes: &[RouteFact]| {
            Node::choose(&interfaces, routes, &Wanted::default(), &Config::parse(DUAL).unwrap()).unwrap_err().to_string()
        };
        assert_eq!(
            error(&[route("0.0.0.0/0", 2), route("::/0", 3)]),
            "the IPv4 default route uses eth0, the IPv6 default route uses eth1: name the interface with --iface"
        );
        assert_eq!(
            error(&[route("0.0.0.0/0", 2)]),
            "cannot choose the external interface: there is no IPv6 default route: name the interface with --iface"
        );
    }

    #[test]
    fn iface_names_or_addresses_are_tried_in_order() {
        assert_eq!(choose(V4, "iface=nope iface=eth1"), "eth1 198.51.100.1 near 198.51.100.9");
        assert_eq!(choose(V4, "iface=192.0.2.11 public=203.0.113.5"), "eth0 192.0.2.11 publishes 203.0.113.5 near 192.0.2.77");
        assert_eq!(choose(DUAL, "iface=eth1"), "eth1 198.51.100.1,fd00::1 near 198.51.100.9");
        assert_eq!(choose(DUAL, "iface=198.51.100.1"), "eth1 198.51.100.1,fd00::1 near 198.51.100.9");
        assert_eq!(choose(DUAL, "iface=fd00::1"), "eth1 198.51.100.1,fd00::1 near 198.51.100.9", "upstream crashes here");
        assert_eq!(choose(DUAL, "iface=fd00::1 public=2001:db8::10"), "eth0 192.0.2.10,2001:db8::10 near 192.0.2.77");
        assert!(choose(DUAL, "iface=198.51.100.1 public=2001:db8::10").contains("is on eth1, but --public-ipv6 2001:db8::10 is on eth0"));
    }

    #[test]
    fn regex_matches_addresses_before_names() {
        assert_eq!(choose(V4, r"regex=^192\.0\.2\.11$"), "eth0 192.0.2.11 near 192.0.2.77");
        assert_eq!(
            choose(V4, r"regex=^192\.0\.2\.9$ regex=eth.*"),
            "eth0 192.0.2.10 near 192.0.2.77",
            "a deprecated address does not match"
        );
        assert_eq!(choose(V4, "regex=th1"), "eth1 198.51.100.1 near 198.51.100.9", "unanchored");
        assert_eq!(choose(DUAL, r"regex=(198\.51\.100\..*|fd00::.*)"), "eth1 198.51.100.1,fd00::1 near 198.51.100.9");
        assert_eq!(choose(DUAL, r"regex=198\.51\.100\."), choose(DUAL, "regex=x").replace("regex x", r"regex 198\.51\.100\."));
        assert!(choose(V4, "regex=( regex=x").starts_with("--iface-regex (: it is not a valid regular expression"));
        assert_eq!(choose(V4, r"iface=nope regex=eth1 regex=eth0"), "eth1 198.51.100.1 near 198.51.100.9");
    }

    #[test]
    fn can_reach_is_tried_last() {
        assert_eq!(choose(V4, "reach=198.51.100.9"), "eth1 198.51.100.1 near 198.51.100.9");
        assert_eq!(choose(V4, "reach=198.51.100.9 regex=eth0"), "eth0 192.0.2.10 near 192.0.2.77");
        assert!(choose(V4, "reach=203.0.113.1").starts_with("--iface-can-reach 203.0.113.1: Network is unreachable; the interfaces are"));
    }

    #[test]
    fn public_ip_without_iface_must_be_on_an_interface() {
        assert_eq!(choose(V4, "public=198.51.100.1"), "eth1 198.51.100.1 near 198.51.100.9");
        assert_eq!(choose(V6, "public=fd00::1"), "eth1 fd00::1 near 198.51.100.9");
        assert_eq!(
            choose(V4, "public=203.0.113.5"),
            "--public-ip 203.0.113.5: no interface has this address; name the interface with --iface if it is reached through NAT"
        );
    }

    #[test]
    fn error_lists_flags_and_interfaces() {
        assert_eq!(
            choose(V4, "iface=nope iface=eth2"),
            "--iface nope: there is no such interface; interface eth2 has no usable IPv4 address; the interfaces are lo:[127.0.0.1 ::1] \
             eth0:[169.254.7.7 192.0.2.9 192.0.2.10 192.0.2.11 fe80::2 2001:db8::10] eth1:[198.51.100.1 fd00::1] eth2:[]"
        );
    }

    #[test]
    fn pod_network_that_contains_the_host_is_refused() {
        for (config, field) in [
            (
                r#"{"Network":"192.0.0.0/16","Backend":{"Type":"host-gw"}}"#,
                "Network: the pod network 192.0.0.0/16 contains this host's own address 192.0.2.10",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"2001:db8::/48","Backend":{"Type":"host-gw"}}"#,
                "IPv6Network: the pod network 2001:db8::/48 contains this host's own address 2001:db8::10",
            ),
        ] {
            assert_eq!(
                choose(config, "iface=eth0"),
                format!("network config: {field} on eth0: choose a network that the hosts do not use")
            );
        }
    }

    #[test]
    fn ipv6_without_address_is_left_out_if_partial() {
        let config = Config::parse(DUAL).unwrap();
        let route = |dst: &str| RouteFact { dst: dst.parse().unwrap(), oif: 2, gateway: true };
        let choose = |addrs: &[&str], routes: &[RouteFact], partial| {
            let wanted = Wanted { partial, ..Wanted::default() };
            Node::choose(&[interface(2, "eth0", addrs)], routes, &wanted, &config)
                .map(|node| (node.addrs.v4.is_some(), node.addrs.v6.is_some()))
        };
        let (v4, v6) = (route("0.0.0.0/0"), route("::/0"));
        assert_eq!(choose(&["192.0.2.1/24"], &[v4, v6], false), Err(NodeError::NoAddress("eth0".parse().unwrap(), Family::V6)));
        assert_eq!(choose(&["192.0.2.1/24"], &[v4], false), Err(NodeError::NoDefaultRoute(Family::V6)));
        assert_eq!(choose(&["192.0.2.1/24"], &[v4], true), Ok((true, false)));
        assert_eq!(choose(&["2001:db8::1/64"], &[v6], true), Err(NodeError::NoDefaultRoute(Family::V4)));
        assert_eq!(choose(&["2001:db8::1/64"], &[v4, v6], true), Err(NodeError::NoAddress("eth0".parse().unwrap(), Family::V4)));
        // An address alone is enough: peers may be on the link.
        assert_eq!(choose(&["192.0.2.1/24", "2001:db8::1/64"], &[v4], true), Ok((true, true)));
        assert_eq!(choose(&[], &[v4, v6], true), Err(NodeError::NoAddress("eth0".parse().unwrap(), Family::V4)));
        assert_eq!(choose(&[], &[], true), Err(NodeError::NoDefaultRoute(Family::V4)));
    }

    #[test]
    fn own_device_is_no_candidate_whatever_a_dhcp_client_gave_it() {
        let config = Config::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
        let interface = |index, name: &str, cidr: &str| Interface {
            index,
            name: name.parse().unwrap(),
            mtu: 1500,
            addrs: vec![InterfaceAddr { cidr: cidr.parse().unwrap(), permanent: true, temporary: false, deprecated: false }],
        };
        let interfaces = [interface(2, "eth0", "192.0.2.1/24"), interface(3, "flannel.1", "192.0.2.125/24")];
        let default = |oif| RouteFact { dst: "0.0.0.0/0".parse().unwrap(), oif, gateway: true };
        let node = |wanted: Wanted| Node::choose(&interfaces, &[default(3), default(2)], &wanted, &config).map(|node| node.ext.to_string());
        assert_eq!(node(Wanted::default()), Ok("eth0".to_owned()), "the first default route leads into our own device");
        let regex = Wanted { iface_regex: vec!["192\\.0\\.2\\.125|flannel".to_owned()], ..Wanted::default() };
        assert!(node(regex).unwrap_err().to_string().contains("no interface's address or name matches"));
    }
}
