//! The ipip backend: one device, and for each peer a route whose gateway is the peer's public address (RFC 2003; specification,
//! section 5.4). With `DirectRouting`, a peer on the same link gets a plain route instead.

use std::net::IpAddr;

use super::{Admitted, Context, Driver, Local, Part, Refusal, each_family, host_gw, needs_ipv4};
use crate::config::{Config, ConfigError, typed};
use crate::json::Fields;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Cidr, Family, IfName, Mac, PerFamily};
use crate::node::Node;
use crate::object::{Addr, Link, LinkKind, Object, ROUTE_PROTOCOL, Route, route_metric};
use crate::probe::Point;

/// The bytes that IPIP adds to a packet: the outer IPv4 header.
const OVERHEAD: u32 = 20;

/// The ipip backend with its settings (specification, section 2.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipip {
    /// Uses plain routes to peers on the same L2 network.
    direct_routing: bool,
}

fn device_name() -> IfName {
    "flannel.ipip".parse().expect("the name has 12 bytes and no special characters")
}

impl Ipip {
    pub(super) fn parse(section: &Fields<'_>) -> Result<Ipip, ConfigError> {
        Ok(Ipip { direct_routing: typed(section, "Backend.DirectRouting", "directrouting")?.unwrap_or(false) })
    }

    fn peer_objects(&self, node: &Node, admitted: Admitted) -> Result<Vec<Object>, Refusal> {
        let Admitted { network, subnet, public } = admitted;
        if subnet.family() == Family::V6 {
            return Err(Refusal::OnlyIpv4(self.name()));
        }
        if self.direct_routing && node.is_on_link(public) {
            return host_gw::route(node, admitted).map(|route| vec![route]);
        }
        Ok(vec![Object::Route(Route {
            dst: subnet,
            metric: route_metric(network, subnet),
            via: Some(public),
            dev: device_name(),
            onlink: true,
            protocol: ROUTE_PROTOCOL,
        })])
    }
}

impl Driver for Ipip {
    fn name(&self) -> &'static str {
        "ipip"
    }

    fn published_addresses(&self, node: &Node) -> PerFamily<IpAddr> {
        PerFamily { v6: None, ..node.public }
    }

    fn published_data(&self, _: Local<'_>) -> PerFamily<Box<str>> {
        PerFamily::default()
    }

    fn annotates(&self, family: Family, _: &Peer) -> bool {
        family == Family::V4
    }

    fn mtu(&self, local: Local<'_>) -> u32 {
        local.node.mtu.saturating_sub(OVERHEAD)
    }

    fn check_config(&self, config: &Config) -> Result<(), ConfigError> {
        needs_ipv4(config, "ipip carries IPv4 only: use vxlan or host-gw")
    }

    fn probe_point(&self) -> Option<Point> {
        Some(Point::Device)
    }

    fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        let (Some(local), Some(own)) = (context.local.node.addrs.v4, context.own.subnets().v4) else { return Vec::new() };
        let link = device_name();
        // The kernel reports the local address where other links have a MAC.
        let device = Link { name: link, kind: LinkKind::Ipip { local }, mac: Mac([0; 6]), mtu: self.mtu(context.local), up: true };
        vec![Object::Link(Box::new(device)), Object::Addr(Addr { link, cidr: Cidr { addr: own.network(), len: 32 } })]
    }

    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        each_family(context, key, peer, |admitted| self.peer_objects(context.local.node, admitted))
    }

    fn device(&self, family: Family) -> Option<IfName> {
        (family == Family::V4).then(device_name)
    }

    fn has_plain_routes(&self) -> bool {
        self.direct_routing
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::tests::check;
    use expect_test::expect;

    const PEERS: &[(&str, &str)] = &[
        ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"ipip"}"#),
        ("10.244.3.0-24", r#"{"PublicIP":"198.51.100.3","BackendType":"ipip","BackendData":{"VNI":1}}"#),
        ("10.244.4.0-24", r#"{"PublicIP":"192.0.2.4","BackendType":"vxlan"}"#),
    ];

    #[test]
    fn each_peer_gets_a_route_through_the_device() {
        check(
            r#"{"Type":"ipip"}"#,
            PEERS,
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"ipip"}
                mtu 1480
                link flannel.ipip 00:00:00:00:00:00 mtu 1480 up ipip local 192.0.2.1
                addr 10.244.1.0/32 dev flannel.ipip
                10.244.2.0-24:
                  route 10.244.2.0/24 via 192.0.2.2 dev flannel.ipip metric 2 onlink
                10.244.3.0-24:
                  route 10.244.3.0/24 via 198.51.100.3 dev flannel.ipip metric 3 onlink
                10.244.4.0-24:
                  refused: its backend type is "vxlan", this host's is "ipip"
            "#]],
        );
    }

    #[test]
    fn direct_routing_spares_peers_on_the_link_the_device() {
        check(
            r#"{"Type":"ipip","DirectRouting":true}"#,
            PEERS,
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"ipip"}
                mtu 1480
                link flannel.ipip 00:00:00:00:00:00 mtu 1480 up ipip local 192.0.2.1
                addr 10.244.1.0/32 dev flannel.ipip
                10.244.2.0-24:
                  route 10.244.2.0/24 via 192.0.2.2 dev eth0 metric 2
                10.244.3.0-24:
                  route 10.244.3.0/24 via 198.51.100.3 dev flannel.ipip metric 3 onlink
                10.244.4.0-24:
                  refused: its backend type is "vxlan", this host's is "ipip"
            "#]],
        );
    }

    #[test]
    fn ipv6_of_a_peer_is_refused_and_ipv4_goes_on() {
        check(
            r#"{"Type":"ipip"}"#,
            &[("10.244.2.0-24&fc00:0:0:2::-64", r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"ipip"}"#)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"ipip"}
                mtu 1480
                link flannel.ipip 00:00:00:00:00:00 mtu 1480 up ipip local 192.0.2.1
                addr 10.244.1.0/32 dev flannel.ipip
                10.244.2.0-24&fc00:0:0:2::-64:
                  route 10.244.2.0/24 via 192.0.2.2 dev flannel.ipip metric 2 onlink
                  refused: ipip carries IPv4 only
            "#]],
        );
    }
}
