//! The host-gw backend: one route per peer, with the peer as gateway (specification, section 5.2). Packets are not encapsulated, so the
//! peer must be on the link: a router in between would drop them.

use super::{Admitted, Context, Driver, Local, Part, Problem, Refusal, each_family};
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, PerFamily};
use crate::node::Node;
use crate::object::{Object, ROUTE_PROTOCOL, Route, route_metric};
use crate::probe::Point;

/// The host-gw backend; it has no settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostGw;

impl Driver for HostGw {
    fn name(&self) -> &'static str {
        "host-gw"
    }

    fn published_data(&self, _: Local<'_>) -> PerFamily<Box<str>> {
        PerFamily::default()
    }

    fn annotates(&self, family: Family, peer: &Peer) -> bool {
        // Go peers read the IPv4 annotations of every node; without IPv4 the address is 0.0.0.0.
        family == Family::V4 || peer.public.v6.is_some()
    }

    fn mtu(&self, local: Local<'_>) -> u32 {
        local.node.mtu
    }

    fn problem(&self, local: Local<'_>, family: Family) -> Option<Problem> {
        let node = local.node;
        let (public, addr) = (node.public.get(family)?, node.addrs.get(family)?);
        let flag = if family == Family::V4 {
            "--public-ip (or the annotation node-public-ip)"
        } else {
            "--public-ipv6 (or the annotation node-public-ipv6)"
        };
        (public != addr).then(|| Problem {
            text: format!(
                "{flag}: {public} is not the address of {} ({addr}): set {addr}, because host-gw peers use it as gateway",
                node.ext
            ),
            is_published_address: true,
        })
    }

    fn probe_point(&self) -> Option<Point> {
        Some(Point::Bridge)
    }

    fn node_objects(&self, _: Context<'_>) -> Vec<Object> {
        Vec::new()
    }

    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        each_family(context, key, peer, |admitted| route(context.local.node, admitted).map(|route| vec![route]))
    }

    fn has_plain_routes(&self) -> bool {
        true
    }
}

/// The route to a peer's pods, with the peer as gateway.
pub(super) fn route(node: &Node, Admitted { network, subnet, public }: Admitted) -> Result<Object, Refusal> {
    if !node.is_on_link(public) {
        return Err(Refusal::NotOnLink(public, node.ext));
    }
    let metric = route_metric(network, subnet);
    Ok(Object::Route(Route { dst: subnet, metric, via: Some(public), dev: node.ext, onlink: false, protocol: ROUTE_PROTOCOL }))
}

#[cfg(test)]
mod tests {
    use crate::backend::tests::check;
    use expect_test::expect;

    #[test]
    fn peers_off_the_link_are_refused() {
        check(
            r#"{"Type":"host-gw"}"#,
            &[
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"host-gw"}"#),
                ("10.244.3.0-24", r#"{"PublicIP":"198.51.100.3","PublicIPv6":null,"BackendType":"host-gw"}"#),
            ],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}
                mtu 1500
                10.244.2.0-24:
                  route 10.244.2.0/24 via 192.0.2.2 dev eth0 metric 2
                10.244.3.0-24:
                  refused: its address 198.51.100.3 is not on the link of eth0 (it is behind a router): host-gw cannot reach it; use vxlan
            "#]],
        );
    }

    #[test]
    fn refusal_of_one_family_keeps_the_other() {
        check(
            r#"{"Type":"host-gw"}"#,
            &[("10.244.2.0-24&fc00:0:0:2::-64", r#"{"PublicIP":"198.51.100.2","PublicIPv6":"2001:db8::2","BackendType":"host-gw"}"#)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}
                mtu 1500
                10.244.2.0-24&fc00:0:0:2::-64:
                  route fc00:0:0:2::/64 via 2001:db8::2 dev eth0 metric 1024
                  refused: its address 198.51.100.2 is not on the link of eth0 (it is behind a router): host-gw cannot reach it; use vxlan
            "#]],
        );
    }
}
