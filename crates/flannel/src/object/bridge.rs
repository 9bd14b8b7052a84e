//! The bridge of this host's pods. The CNI plugin creates it with the first pod, and the daemon repairs it: if another program deletes
//! the bridge, sets it down or removes the gateway address, every pod of the host is cut off until it is recreated.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Item, Key, Policy};
use crate::net::{Cidr, IfName, Mac};

/// A bridge with its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Interface name.
    pub name: IfName,
    /// MAC address.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is in promiscuous mode.
    pub promiscuous: bool,
    /// Whether it filters VLANs. Then the daemon does not repair it, because it does not know the VLANs of the ports.
    pub vlans: bool,
    /// Whether it may route packets to 127.0.0.0/8, which the portmap plugin needs (sysctl `route_localnet`).
    pub route_localnet: bool,
    /// Its addresses within this host's subnets.
    pub addrs: BTreeSet<Cidr>,
    /// The host ends of the pods' veth pairs.
    pub ports: BTreeMap<IfName, Port>,
    /// Host ends of veth pairs that are no bridge port: of pods that lost their bridge, and of others. Observed only; the desired
    /// state has the same.
    pub loose: BTreeSet<IfName>,
}

/// The settings of a bridge port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Port {
    /// Whether frames may leave by the port on which they arrived.
    pub hairpin: bool,
    /// Whether frames between this port and other isolated ports are dropped.
    pub isolated: bool,
}

/// Computes the desired bridge from its last known state and its present state. Returns `None` for a bridge that was never seen with a
/// gateway address, that filters VLANs, or that has another gateway address now. Changes that the plugin makes to an intact bridge are
/// accepted.
pub fn keep(known: Option<&Bridge>, is: Option<&Bridge>, gateways: &[Cidr]) -> Option<Bridge> {
    let known = known.filter(|known| gateways.iter().any(|gateway| known.addrs.contains(gateway)));
    let Some(is) = is else { return known.cloned() };
    if is.vlans {
        return None;
    }
    let mut want = is.clone();
    if let Some(known) = known.filter(|known| known.name == is.name) {
        want.up = true;
        // Another address in the gateway's subnet was set on purpose.
        let is_free = |gateway: &&Cidr| !is.addrs.iter().any(|addr| gateway.subnet().contains(addr.addr));
        want.addrs.extend(gateways.iter().filter(|gateway| known.addrs.contains(gateway)).filter(is_free));
        // Former ports that still exist and have no bridge are added again.
        let lost = known.ports.iter().filter(|(name, _)| is.loose.contains(*name));
        want.ports.extend(lost.map(|(name, port)| (*name, *port)));
    }
    want.addrs.iter().any(|addr| gateways.contains(addr)).then_some(want)
}

impl Item for Bridge {
    fn key(&self) -> Key {
        Key::Bridge(self.name)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: None, never_deleted: true, optional: true }
    }
}

impl fmt::Display for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bridge { name, mac, mtu, up, promiscuous, vlans: _, route_localnet: _, addrs, ports, loose: _ } = self;
        let (up, promiscuous) = (if *up { "up" } else { "down" }, if *promiscuous { " promisc" } else { "" });
        write!(f, "bridge {name} {mac} mtu {mtu} {up}{promiscuous}")?;
        addrs.iter().try_for_each(|addr| write!(f, " {addr}"))?;
        write!(f, ", {} ports", ports.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    /// Parses `up ADDRESS… | PORT… | LOOSE…`.
    fn bridge(text: &str) -> Option<Bridge> {
        let mut parts = text.split('|').map(|part| part.split_whitespace());
        let mut words = parts.next()?;
        let up = words.next()? == "up";
        let names = |part: Option<std::str::SplitWhitespace<'_>>| -> Vec<IfName> {
            part.into_iter().flatten().map(|name| name.parse().unwrap()).collect()
        };
        Some(Bridge {
            name: "cni0".parse().unwrap(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            up,
            promiscuous: false,
            vlans: false,
            route_localnet: false,
            addrs: words.map(|addr| addr.parse().unwrap()).collect(),
            ports: names(parts.next()).into_iter().map(|name| (name, Port { hairpin: true, isolated: false })).collect(),
            loose: names(parts.next()).into_iter().collect(),
        })
    }

    fn check(known: &str, is: &str, want: Expect) {
        let kept = keep(bridge(known).as_ref(), bridge(is).as_ref(), &["10.244.1.1/24".parse().unwrap()]);
        let ports = |kept: &Bridge| kept.ports.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        want.assert_eq(&kept.map_or("nothing".to_owned(), |kept| format!("{kept}: {}", ports(&kept))));
    }

    #[test]
    fn intact_bridge_is_accepted_as_it_is() {
        check("", "up 10.244.1.1/24 | a b", expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a b"]);
        // Pods were added and removed; an unrelated veth end is ignored.
        check(
            "up 10.244.1.1/24 | a b",
            "up 10.244.1.1/24 | b c | x",
            expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: b c"],
        );
    }

    #[test]
    fn lost_state_and_ports_are_restored() {
        check("up 10.244.1.1/24 | a b", "", expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a b"]);
        check("up 10.244.1.1/24 | a b", "down | a b", expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a b"]);
        // The plugin recreated the bridge for the next pod, c; pod b was deleted meanwhile.
        check(
            "up 10.244.1.1/24 | a b",
            "up 10.244.1.1/24 | c | a x",
            expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a c"],
        );
    }

    #[test]
    fn renamed_bridge_is_followed_and_vlan_bridge_is_ignored() {
        let gateways = ["10.244.1.1/24".parse().unwrap()];
        let known = bridge("up 10.244.1.1/24 | a b").unwrap();
        let renamed = Bridge { name: "pods".parse().unwrap(), ..known.clone() };
        assert_eq!(keep(Some(&known), Some(&renamed), &gateways), Some(renamed));
        assert_eq!(keep(Some(&known), Some(&Bridge { vlans: true, ..known.clone() }), &gateways), None);
    }

    #[test]
    fn unrelated_bridges_are_ignored() {
        check("", "", expect!["nothing"]);
        check("", "up 192.168.0.1/24 | a", expect!["nothing"]);
        // The gateway address was changed within its subnet; an address of another network is not a gateway.
        check("up 10.244.1.1/24 | a", "up 10.244.1.254/24 | a", expect!["nothing"]);
        check(
            "up 10.244.1.1/24 | a",
            "up 10.9.0.1/24 | a",
            expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.9.0.1/24 10.244.1.1/24, 1 ports: a"],
        );
        // This node has another subnet now.
        check("up 10.244.9.1/24 | a", "", expect!["nothing"]);
    }
}
