//! The bridge of this host's pods. The CNI plugin makes it, with the first pod; the daemon keeps it: one that somebody deletes, sets
//! down or takes the gateway's address from would cut off every pod of the host until that pod is made anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Item, Key, Policy};
use crate::net::{Cidr, IfName, Mac};

/// A bridge with its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Interface name.
    pub name: IfName,
    /// Link-layer address.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up?
    pub up: bool,
    /// Does it take frames for everybody?
    pub promiscuous: bool,
    /// Does it tell VLANs apart? Then it is not kept, because VLANs of ports are not known.
    pub vlans: bool,
    /// May packets to 127.0.0.0/8 leave by it? So the portmap plugin wants it.
    pub route_localnet: bool,
    /// Its addresses within this host's subnets.
    pub addrs: BTreeSet<Cidr>,
    /// The pods' ends.
    pub ports: BTreeMap<IfName, Port>,
    /// Ends of containers that are a port of nothing: those of pods that lost their bridge, and others'. What is there; nobody
    /// wants it otherwise.
    pub loose: BTreeSet<IfName>,
}

/// How a link behaves as the port of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Port {
    /// May frames leave by the port that they came in by?
    pub hairpin: bool,
    /// Are frames between this port and other isolated ports dropped?
    pub isolated: bool,
}

/// What the bridge shall be, by what it was known to be and what it is. One that was never seen with a gateway's address is not
/// known, and nothing is wanted of it; neither of one that tells VLANs apart, or that was given another gateway's address. While it
/// is well, whatever the plugin makes of it is right.
pub fn keep(known: Option<&Bridge>, is: Option<&Bridge>, gateways: &[Cidr]) -> Option<Bridge> {
    let known = known.filter(|known| gateways.iter().any(|gateway| known.addrs.contains(gateway)));
    let Some(is) = is else { return known.cloned() };
    if is.vlans {
        return None;
    }
    let mut want = is.clone();
    if let Some(known) = known.filter(|known| known.name == is.name) {
        want.up = true;
        // Who gave it another one of the same subnet meant that.
        let is_free = |gateway: &&Cidr| !is.addrs.iter().any(|addr| gateway.subnet().contains(addr.addr));
        want.addrs.extend(gateways.iter().filter(|gateway| known.addrs.contains(gateway)).filter(is_free));
        // Its ends are there and belong to nothing: they were its ports.
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

    /// `up ADDRESS… | PORT… | LOOSE…`
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
    fn what_is_well_is_right_as_it_is() {
        check("", "up 10.244.1.1/24 | a b", expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a b"]);
        // Pods came and went; other ends have nothing to do with it.
        check(
            "up 10.244.1.1/24 | a b",
            "up 10.244.1.1/24 | b c | x",
            expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: b c"],
        );
    }

    #[test]
    fn what_was_lost_comes_back() {
        check("up 10.244.1.1/24 | a b", "", expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a b"]);
        check("up 10.244.1.1/24 | a b", "down | a b", expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a b"]);
        // The plugin made it anew for its next pod, c; b ended meanwhile.
        check(
            "up 10.244.1.1/24 | a b",
            "up 10.244.1.1/24 | c | a x",
            expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.244.1.1/24, 2 ports: a c"],
        );
    }

    #[test]
    fn a_renamed_bridge_is_the_one_and_one_with_vlans_is_none() {
        let gateways = ["10.244.1.1/24".parse().unwrap()];
        let known = bridge("up 10.244.1.1/24 | a b").unwrap();
        let renamed = Bridge { name: "pods".parse().unwrap(), ..known.clone() };
        assert_eq!(keep(Some(&known), Some(&renamed), &gateways), Some(renamed));
        assert_eq!(keep(Some(&known), Some(&Bridge { vlans: true, ..known.clone() }), &gateways), None);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        check("", "", expect!["nothing"]);
        check("", "up 192.168.0.1/24 | a", expect!["nothing"]);
        // Somebody moved the gateway; the other family's, or another network's, address is no gateway.
        check("up 10.244.1.1/24 | a", "up 10.244.1.254/24 | a", expect!["nothing"]);
        check(
            "up 10.244.1.1/24 | a",
            "up 10.9.0.1/24 | a",
            expect!["bridge cni0 02:00:00:00:00:01 mtu 1450 up 10.9.0.1/24 10.244.1.1/24, 1 ports: a"],
        );
        // This node has another subnet by now.
        check("up 10.244.9.1/24 | a", "", expect!["nothing"]);
    }
}
