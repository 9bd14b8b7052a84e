//! Backends: how packets reach the pods of a peer. A backend is a function from (configuration, node, leases) to
//! [`Object`]s; there is one loop elsewhere, and no backend has a socket.

pub mod extension;
mod host_gw;
pub mod udp;
mod vxlan;

pub use vxlan::{device_name, vtep_mac};

use std::net::IpAddr;

use thiserror::Error;

use crate::alloc::is_mine;
use crate::config::{BackendConfig, Config};
use crate::desired::Object;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, IfName, Mac, PerFamily, Subnet};
use crate::node::Node;

/// The backend of this node, made by [`Backend::new`] from the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Leases a subnet, programs nothing.
    Alloc,
    /// A route per peer.
    HostGw,
    /// A route, a neighbour and a forwarding entry per peer.
    Vxlan(vxlan::Vxlan),
    /// A TUN device, and an entry in this process's own table per peer.
    Udp {
        /// UDP port of every host.
        port: u16,
    },
    /// The operator's own commands per peer.
    Extension {
        /// This host's `BackendData`, as JSON.
        data: Option<Box<str>>,
    },
}

/// What a backend needs to know to describe objects.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The network configuration.
    pub config: &'a Config,
    /// This host.
    pub node: &'a Node,
    /// This host's lease.
    pub own: LeaseKey,
}

/// One lease's share of the picture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part {
    /// What shall be in the kernel for it.
    pub objects: Vec<Object>,
    /// What cannot be, and why. The other family and all other peers are not affected.
    pub refusals: Vec<Refusal>,
}

/// Why a peer, or one family of it, gets no route.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Its subnet is no part of the pod network.
    #[error("its subnet {0} lies outside the pod network {1}")]
    Outside(Subnet, Subnet),
    /// Its subnet would take addresses of this host's pods away.
    #[error("its subnet {0} overlaps this host's own {1}")]
    OverlapsOwn(Subnet, Subnet),
    /// It speaks another encapsulation, or none.
    #[error("its backend type is {0:?}, this host's is {1:?}")]
    OtherBackend(Box<str>, &'static str),
    /// It names no host to send to.
    #[error("it publishes no {0} address")]
    NoPublicIp(Family),
    /// What it names is no host.
    #[error("its public address {0} is not a unicast host address")]
    BadPublicIp(IpAddr),
    /// It names this host.
    #[error("its public address {0} is this host's own: a stale lease of this host, or a second daemon")]
    OwnPublicIp(IpAddr),
    /// Packets to it would be sent to it, for ever.
    #[error("its public address {0} lies inside the pod network {1}")]
    PublicIpInside(IpAddr, Subnet),
    /// host-gw needs one L2 network.
    #[error("its address {0} is not on the link of {1} (it is behind a router): host-gw cannot reach it; use vxlan")]
    NotOnLink(IpAddr, IfName),
    /// The udp backend has no IPv6.
    #[error("udp carries IPv4 only")]
    OnlyIpv4,
    /// The data that its backend published cannot be used.
    #[error("its BackendData cannot be used: {0}")]
    BadData(String),
    /// Its VTEP has the address of ours.
    #[error("its VTEP MAC {0} is this host's own: a cloned machine?")]
    OwnMac(Mac),
}

impl Backend {
    /// The backend that the configuration asks for. `macs` are the link-layer addresses of this host's VTEPs.
    pub fn new(config: &Config, node: &Node, macs: PerFamily<Mac>) -> Backend {
        match &config.backend {
            BackendConfig::Alloc => Backend::Alloc,
            BackendConfig::HostGw => Backend::HostGw,
            BackendConfig::Vxlan(vxlan) => Backend::Vxlan(vxlan::Vxlan::new(vxlan, config, node, macs)),
            BackendConfig::Udp { port } => Backend::Udp { port: *port },
            BackendConfig::Extension(_) => Backend::Extension { data: None },
        }
    }

    /// The same on this host as it is now: its interface has another address or MTU. The VTEPs keep their addresses.
    #[must_use]
    pub fn moved(&self, config: &Config, node: &Node) -> Backend {
        self.with_macs(config, node, self.macs())
    }

    /// The same with other link-layer addresses of this host's VTEPs.
    #[must_use]
    pub fn with_macs(&self, config: &Config, node: &Node, macs: PerFamily<Mac>) -> Backend {
        match &config.backend {
            BackendConfig::Vxlan(vxlan) => Backend::Vxlan(vxlan::Vxlan::new(vxlan, config, node, macs)),
            _ => self.clone(),
        }
    }

    /// The link-layer addresses of this host's VTEPs; none where there are none.
    pub fn macs(&self) -> PerFamily<Mac> {
        match self {
            Backend::Vxlan(vxlan) => vxlan.macs(),
            _ => PerFamily::default(),
        }
    }

    /// With what the extension's first command printed as this host's `BackendData`.
    #[must_use]
    pub fn with_output(self, output: &str) -> Backend {
        let text = output.trim();
        match self {
            Backend::Extension { .. } if !text.is_empty() => {
                Backend::Extension { data: Some(serde_json::Value::from(text).to_string().into()) }
            }
            other => other,
        }
    }

    /// What this host publishes with its lease.
    pub fn own_peer(&self, config: &Config, node: &Node) -> Peer {
        let backend_type = match self {
            Backend::Alloc | Backend::Udp { .. } => "",
            _ => config.backend.name(),
        };
        let backend_data = match self {
            Backend::Vxlan(vxlan) => vxlan.backend_data(),
            Backend::Extension { data } => PerFamily { v4: data.clone(), v6: None },
            _ => PerFamily::default(),
        };
        let public = match self {
            Backend::Udp { .. } => PerFamily { v6: None, ..node.public },
            // Commands are about the interface itself.
            Backend::Extension { .. } => node.addrs,
            _ => node.public,
        };
        Peer { public, backend_type: backend_type.into(), backend_data }
    }

    /// The MTU for pods, in bytes.
    pub fn mtu(&self, node: &Node) -> u32 {
        match self {
            Backend::Alloc | Backend::HostGw | Backend::Extension { .. } => node.mtu,
            Backend::Vxlan(vxlan) => vxlan.mtu(),
            Backend::Udp { .. } => udp::mtu(node),
        }
    }

    /// This host's own objects: its devices and their addresses.
    pub fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        match self {
            Backend::Alloc | Backend::HostGw | Backend::Extension { .. } => Vec::new(),
            Backend::Vxlan(vxlan) => vxlan.node_objects(context),
            Backend::Udp { port } => udp::node_objects(context, *port),
        }
    }

    /// One peer's objects. This host's own lease has none.
    pub fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        let mut part = Part::default();
        if *key == context.own || *self == Backend::Alloc {
            return part;
        }
        let ours = context.config.backend.name();
        // Who carries packets in UDP says no type, and neither asks for one.
        if &*peer.backend_type != ours && !matches!(self, Backend::Udp { .. }) {
            part.refusals.push(Refusal::OtherBackend(peer.backend_type.clone(), ours));
            return part;
        }
        for (family, subnet) in key.subnets().iter() {
            // A family that this host does not use is no fault of the peer's.
            let Some(network) = context.config.network(family) else { continue };
            let objects = admit(context, network, *subnet, peer).and_then(|public| match self {
                Backend::Alloc | Backend::Extension { .. } => Ok(Vec::new()),
                Backend::Udp { .. } => udp::peer_objects(*subnet, public),
                Backend::HostGw => host_gw::route(context.node, network, *subnet, public).map(|route| vec![route]),
                Backend::Vxlan(vxlan) => vxlan.peer_objects(context, network, *subnet, public, peer),
            });
            match objects {
                Ok(objects) => part.objects.extend(objects),
                Err(refusal) => part.refusals.push(refusal),
            }
        }
        if let (BackendConfig::Extension(extension), true) = (&context.config.backend, part.refusals.is_empty()) {
            part.objects = extension::peer_objects(extension, key, peer);
        }
        part
    }
}

/// The checks that every backend needs: the subnet may be routed, and there is a host to send it to.
fn admit(context: Context<'_>, network: Subnet, subnet: Subnet, peer: &Peer) -> Result<IpAddr, Refusal> {
    let family = subnet.family();
    if !network.covers(subnet) {
        return Err(Refusal::Outside(subnet, network));
    }
    if let Some(own) = context.own.subnets().get(family).filter(|own| own.overlaps(subnet)) {
        return Err(Refusal::OverlapsOwn(subnet, *own));
    }
    let public = *peer.public.get(family).ok_or(Refusal::NoPublicIp(family))?;
    let broadcast = matches!(public, IpAddr::V4(ip) if ip.is_broadcast());
    if public.is_loopback() || public.is_multicast() || broadcast {
        return Err(Refusal::BadPublicIp(public));
    }
    if is_mine(&peer.public, &context.node.public) || context.node.addrs.get(family) == Some(&public) {
        return Err(Refusal::OwnPublicIp(public));
    }
    if network.contains(public) {
        return Err(Refusal::PublicIpInside(public, network));
    }
    Ok(public)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use expect_test::{Expect, expect};

    /// A node at 192.0.2.1/24 with lease 10.244.1.0/24 and VTEP MAC 0e:00:00:00:00:01. Each peer is "key value".
    #[track_caller]
    pub(super) fn check(backend: &str, peers: &[(&str, &str)], want: Expect) {
        let dual = peers.iter().any(|(key, _)| key.contains('&'));
        let v6 = if dual { r#","EnableIPv6":true,"IPv6Network":"fc00::/48""# } else { "" };
        let config = Config::parse(&format!(r#"{{"Network":"10.244.0.0/16"{v6},"Backend":{backend}}}"#)).unwrap();
        let addrs = PerFamily { v4: "192.0.2.1".parse().ok(), v6: dual.then(|| "2001:db8::1".parse().unwrap()) };
        let routes = vec![("192.0.2.0/24".parse().unwrap(), true), ("2001:db8::/64".parse().unwrap(), true)];
        let node = Node { ext: "eth0".parse().unwrap(), mtu: 1500, addrs, public: addrs, routes };
        let macs = PerFamily { v4: Some(Mac([0x0e, 0, 0, 0, 0, 1])), v6: Some(Mac([0x0e, 0, 0, 0, 6, 1])) };
        let backend = Backend::new(&config, &node, macs);
        let own = PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: dual.then(|| "fc00:0:0:1::/64".parse().unwrap()) };
        let context = Context { config: &config, node: &node, own: LeaseKey::new(own).unwrap() };

        let mut text = format!("publishes {}\nmtu {}\n", wire::value(&backend.own_peer(&config, &node)), backend.mtu(&node));
        for object in backend.node_objects(context) {
            text.push_str(&format!("{object}\n"));
        }
        for (key, value) in peers {
            let part = backend.peer_part(context, &wire::parse_key(key).unwrap(), &wire::parse_value(value.as_bytes()).unwrap());
            text.push_str(&format!("{key}:\n"));
            for object in part.objects {
                text.push_str(&format!("  {object}\n"));
            }
            for refusal in part.refusals {
                text.push_str(&format!("  refused: {refusal}\n"));
            }
        }
        want.assert_eq(&text);
    }

    #[test]
    fn what_no_backend_may_route() {
        check(
            r#"{"Type":"host-gw"}"#,
            &[
                ("10.245.2.0-24", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.0.0.0-8", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.244.0.0-16", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.244.1.0-25", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#),
                ("10.244.2.0-24", r#"{"BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"224.0.0.1","BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"10.244.2.9","BackendType":"host-gw"}"#),
                ("10.244.1.0-24", r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#),
            ],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}
                mtu 1500
                10.245.2.0-24:
                  refused: its subnet 10.245.2.0/24 lies outside the pod network 10.244.0.0/16
                10.0.0.0-8:
                  refused: its subnet 10.0.0.0/8 lies outside the pod network 10.244.0.0/16
                10.244.0.0-16:
                  refused: its subnet 10.244.0.0/16 overlaps this host's own 10.244.1.0/24
                10.244.1.0-25:
                  refused: its subnet 10.244.1.0/25 overlaps this host's own 10.244.1.0/24
                10.244.2.0-24:
                  refused: its backend type is "vxlan", this host's is "host-gw"
                10.244.2.0-24:
                  refused: its backend type is "", this host's is "host-gw"
                10.244.2.0-24:
                  refused: it publishes no IPv4 address
                10.244.2.0-24:
                  refused: its public address 224.0.0.1 is not a unicast host address
                10.244.2.0-24:
                  refused: its public address 192.0.2.1 is this host's own: a stale lease of this host, or a second daemon
                10.244.2.0-24:
                  refused: its public address 10.244.2.9 lies inside the pod network 10.244.0.0/16
                10.244.1.0-24:
            "#]],
        );
    }

    #[test]
    fn alloc_programs_nothing() {
        check(
            r#"{"Type":"alloc"}"#,
            &[("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null}
                mtu 1500
                10.244.2.0-24:
            "#]],
        );
    }
}
