//! A route of another program goes before the daemon's route to a peer: it is more specific, or has a lower metric.

use std::collections::BTreeMap;

use super::{Facts, Finding, RouteKind, SHOWN, SeenRoute};
use crate::net::{Family, Subnet};

pub(super) const CODE: &str = "route-hides-peer";
pub(super) const REASON: &str = "The kernel takes the most specific route, and of equal ones the one with the lowest metric; packets for the peer's pods never reach the daemon's route.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in Family::ALL {
        let Some(network) = facts.expected.networks.get(family) else { continue };
        // Routes to this node's own pods are another check's.
        let is_own = |dst: Subnet| facts.expected.own.get(family).is_some_and(|own| own.covers(dst));
        let inside = |route: &&SeenRoute| network.covers(route.dst) && !is_own(route.dst);
        let routes: Vec<&SeenRoute> = facts.host.routes.iter().filter(inside).collect();
        let first = first_routes(&routes);
        for (at, route) in routes.iter().enumerate().filter(|(_, route)| is_foreign(route, &facts)) {
            // The route that this one hides: the longest prefix of ours that contains it.
            let hidden = covering(route.dst, *network).find_map(|dst| {
                let (ours_at, ours) = first.get(&dst)?;
                let goes_before = route.dst != dst || (route.metric, at) < (ours.metric, *ours_at);
                let leads_to_it = route.kind == RouteKind::Unicast && (route.dev, route.via) == (ours.dev, ours.via);
                Some((goes_before && !leads_to_it).then_some(dst))
            });
            let Some(peer) = hidden.flatten() else { continue };
            let part = if route.dst == peer { "" } else { "a part of " };
            // The udp backend has one route for all peers.
            let whom = if peer == *network { format!("the pod network {peer}") } else { format!("peer {peer}") };
            findings.push(Finding::warning(
                CODE,
                format!("route \"{route}\" of another program hides {part}{whom}: packets for its pods do not get there"),
                route.removal(None),
            ));
        }
    }
    findings.truncate(SHOWN);
    findings
}

/// The daemon's routes by destination, with their places in the kernel's order; of several the one that is taken.
fn first_routes<'a>(routes: &[&'a SeenRoute]) -> BTreeMap<Subnet, (usize, &'a SeenRoute)> {
    let mut first: BTreeMap<Subnet, (usize, &SeenRoute)> = BTreeMap::new();
    for (at, route) in routes.iter().enumerate().filter(|(_, route)| route.is_ours() && route.kind == RouteKind::Unicast) {
        let known = first.entry(route.dst).or_insert((at, route));
        if route.metric < known.1.metric {
            *known = (at, route);
        }
    }
    first
}

/// A prefix, and all prefixes within `network` that contain it, longest first.
fn covering(dst: Subnet, network: Subnet) -> impl Iterator<Item = Subnet> {
    let lengths = (network.prefix_len()..=dst.prefix_len()).rev();
    lengths.filter_map(move |len| Subnet::new(dst.network(), len).ok())
}

fn is_foreign(route: &SeenRoute, facts: &Facts<'_>) -> bool {
    let family = route.dst.family();
    // A Go flanneld's routes lead through the same device.
    let by_our_device = route.kind == RouteKind::Unicast && route.dev.is_some() && route.dev == facts.expected.devices.get(family).copied();
    !route.is_ours() && !by_our_device && route.kind != RouteKind::Other
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use expect_test::{Expect, expect};

    fn route(dst: &str, kind: RouteKind, via: &str, dev: &str, protocol: u8, metric: u32) -> SeenRoute {
        SeenRoute { dst: dst.parse().unwrap(), kind, metric, via: via.parse().ok(), dev: dev.parse().ok(), protocol }
    }

    #[track_caller]
    fn check(foreign: &[SeenRoute], want: Expect) {
        let mut routes = vec![
            route("10.244.2.0/24", RouteKind::Unicast, "10.244.2.0", "flannel.1", 241, 2),
            route("10.244.3.0/24", RouteKind::Unicast, "10.244.3.0", "flannel.1", 241, 3),
            route("fd00:244:0:2::/64", RouteKind::Unicast, "fd00:244:0:2::", "flannel-v6.1", 241, 1024),
        ];
        routes.extend(foreign);
        want.assert_eq(&findings(Check::HiddenPeer, &HostFacts { routes, ..HostFacts::default() }));
    }

    #[test]
    fn route_before_ours_is_named_with_its_removal() {
        check(
            &[route("10.244.2.0/24", RouteKind::Blackhole, "", "", 12, 0)],
            expect![[r#"
                warning route-hides-peer route "blackhole 10.244.2.0/24 proto bird" of another program hides peer 10.244.2.0/24: packets for its pods do not get there; fix: ip route del blackhole 10.244.2.0/24 proto bird
            "#]],
        );
        check(
            &[
                route("10.244.3.128/25", RouteKind::Unicast, "192.0.2.99", "eth0", 4, 100),
                route("fd00:244:0:2::7/128", RouteKind::Unreachable, "", "lo", 0, 1024),
            ],
            expect![[r#"
                warning route-hides-peer route "10.244.3.128/25 via 192.0.2.99 dev eth0 proto static metric 100" of another program hides a part of peer 10.244.3.0/24: packets for its pods do not get there; fix: ip route del 10.244.3.128/25 via 192.0.2.99 dev eth0 proto static metric 100
                warning route-hides-peer route "unreachable fd00:244:0:2::7/128 metric 1024" of another program hides a part of peer fd00:244:0:2::/64: packets for its pods do not get there; fix: ip -6 route del unreachable fd00:244:0:2::7/128 metric 1024
            "#]],
        );
    }

    #[test]
    fn route_that_is_not_taken_is_no_finding() {
        check(
            &[
                // A higher metric, a shorter prefix, no peer's addresses, another network, this node's own.
                route("10.244.2.0/24", RouteKind::Blackhole, "", "", 12, 900),
                route("10.244.0.0/16", RouteKind::Blackhole, "", "", 12, 0),
                route("10.244.9.0/24", RouteKind::Blackhole, "", "", 12, 0),
                route("10.9.0.0/24", RouteKind::Blackhole, "", "", 12, 0),
                route("10.244.1.0/24", RouteKind::Unicast, "", "cni0", 2, 0),
                // The same way as ours, and what a Go flanneld left.
                route("10.244.3.0/24", RouteKind::Unicast, "10.244.3.0", "flannel.1", 3, 0),
                route("10.244.3.0/24", RouteKind::Blackhole, "", "", 241, u32::MAX),
            ],
            expect![""],
        );
    }

    #[test]
    fn one_route_for_all_peers_is_hidden_by_foreign_routes_only() {
        let all = route("10.244.0.0/16", RouteKind::Unicast, "", "flannel0", 241, 0);
        let bridge = route("10.244.1.0/24", RouteKind::Unicast, "", "cni0", 2, 0);
        let foreign = route("10.244.9.0/24", RouteKind::Blackhole, "", "", 12, 0);
        let findings = |routes: &[SeenRoute]| findings(Check::HiddenPeer, &HostFacts { routes: routes.to_vec(), ..HostFacts::default() });
        assert_eq!(findings(&[all, bridge]), "");
        assert!(findings(&[all, bridge, foreign]).contains("hides a part of the pod network 10.244.0.0/16"));
    }

    #[test]
    fn findings_are_limited() {
        let foreign: Vec<SeenRoute> =
            (0..200).map(|host| route(&format!("10.244.2.{host}/32"), RouteKind::Blackhole, "", "", 4, 0)).collect();
        let routes = [vec![route("10.244.2.0/24", RouteKind::Unicast, "10.244.2.0", "flannel.1", 241, 2)], foreign].concat();
        let text = findings(Check::HiddenPeer, &HostFacts { routes, ..HostFacts::default() });
        assert_eq!(text.lines().count(), SHOWN);
    }
}
