//! A route of another program hides addresses of this node's own pods, such as the blackhole route of a former network.

use super::{Facts, Finding, RouteKind, SHOWN, SeenRoute};
use crate::net::Family;

pub(super) const CODE: &str = "route-hides-pods";
pub(super) const REASON: &str = "Packets for this node's own pods take that route instead of the pods' bridge.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (family, own) in facts.expected.own.iter() {
        let within = |route: &&SeenRoute| own.covers(route.dst);
        let routes: Vec<&SeenRoute> = facts.host.routes.iter().filter(within).collect();
        let bridge = routes.iter().position(|route| route.dst == *own && route.is_connected());
        for (at, route) in routes.iter().enumerate().filter(|(_, route)| diverts(route)) {
            let whole = route.dst == *own;
            // The route of a bridge that does not exist yet will have the kernel's metric, and come after those that have it already.
            let (metric, place) = bridge.map_or((default_metric(family), usize::MAX), |bridge| (routes[bridge].metric, bridge));
            if whole && (route.metric, at) > (metric, place) {
                continue;
            }
            let text = match whole {
                true => format!("route \"{route}\" of another program hides this node's own pods {own}"),
                false => format!("route \"{route}\" of another program hides a part of this node's own pods {own}"),
            };
            let finding = if whole { Finding::error } else { Finding::warning };
            findings.push(finding(CODE, text, route.removal(None)));
        }
    }
    findings.truncate(SHOWN);
    findings
}

/// Whether packets for a pod of this node that take the route are lost. A route without a gateway leads to the pods: another plugin, such as
/// ptp, has one for each.
fn diverts(route: &SeenRoute) -> bool {
    let leads_away = match route.kind {
        RouteKind::Blackhole | RouteKind::Unreachable | RouteKind::Prohibit | RouteKind::Throw => true,
        RouteKind::Unicast => route.via.is_some(),
        RouteKind::Other => false,
    };
    leads_away && !route.is_ours()
}

/// The metric of the kernel's route for an address.
fn default_metric(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        Family::V6 => 256,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use expect_test::{Expect, expect};

    fn route(dst: &str, kind: RouteKind, via: &str, protocol: u8, metric: u32) -> SeenRoute {
        let dev = if kind == RouteKind::Unicast { "cni0".parse().ok() } else { None };
        SeenRoute { dst: dst.parse().unwrap(), kind, metric, via: via.parse().ok(), dev, protocol }
    }

    #[track_caller]
    fn check(routes: Vec<SeenRoute>, want: Expect) {
        want.assert_eq(&findings(Check::HiddenPods, &HostFacts { routes, ..HostFacts::default() }));
    }

    #[test]
    fn route_before_that_of_the_bridge_is_an_error() {
        let (foreign, bridge) =
            (route("10.244.1.0/24", RouteKind::Blackhole, "", 12, 0), route("10.244.1.0/24", RouteKind::Unicast, "", 2, 0));
        for routes in [vec![foreign, bridge], vec![foreign]] {
            check(
                routes,
                expect![[r#"
                    error route-hides-pods route "blackhole 10.244.1.0/24 proto bird" of another program hides this node's own pods 10.244.1.0/24; fix: ip route del blackhole 10.244.1.0/24 proto bird
                "#]],
            );
        }
        // The kernel takes the first of two with one metric.
        check(vec![bridge, foreign], expect![""]);
    }

    #[test]
    fn part_of_the_subnet_is_a_warning() {
        check(
            vec![
                route("10.244.1.0/24", RouteKind::Unicast, "", 2, 0),
                route("10.244.1.64/26", RouteKind::Blackhole, "", 12, 0),
                // One pod of the ptp plugin, and the daemon's own blackhole route.
                route("10.244.1.7/32", RouteKind::Unicast, "", 3, 0),
                route("10.244.1.0/24", RouteKind::Blackhole, "", 241, u32::MAX),
            ],
            expect![[r#"
                warning route-hides-pods route "blackhole 10.244.1.64/26 proto bird" of another program hides a part of this node's own pods 10.244.1.0/24; fix: ip route del blackhole 10.244.1.64/26 proto bird
            "#]],
        );
    }
}
