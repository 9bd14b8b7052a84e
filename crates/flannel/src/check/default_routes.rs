//! Several default routes with the same metric lead through different interfaces, and no flag names the external one.

use super::{DefaultRoute, Facts, Finding};
use crate::net::Family;

pub(super) const CODE: &str = "default-routes";
pub(super) const REASON: &str = "Which of two equal default routes the kernel and flanneld take depends on the order in which they were added, so a reboot may change the interface.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let Some(external) = facts.expected.external.filter(|_| facts.expected.chosen_by_default_route) else { return Vec::new() };
    let mut findings = Vec::new();
    for (family, _) in facts.expected.networks.iter() {
        let of_family = || facts.host.defaults.iter().filter(|route| route.family == family);
        let Some(lowest) = of_family().map(|route| route.metric).min() else { continue };
        let mut devices: Vec<String> =
            of_family().filter(|route| route.metric == lowest && !is_own(route, &facts)).map(|route| route.dev.to_string()).collect();
        devices.sort();
        devices.dedup();
        if devices.len() > 1 {
            findings.push(Finding::warning(
                CODE,
                format!("{family} default routes with metric {lowest} lead through {}; flanneld uses {external}", devices.join(" and ")),
                format!("name the interface with --iface={external}, or give one of the routes a higher metric"),
            ));
        }
    }
    findings
}

fn is_own(route: &DefaultRoute, facts: &Facts<'_>) -> bool {
    Family::ALL.iter().any(|family| facts.expected.devices.get(*family) == Some(&route.dev)) || facts.expected.bridge == Some(route.dev)
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(routes: &[(&str, u32)], want: Expect) {
        let route = |(dev, metric): &(&str, u32)| DefaultRoute { family: Family::V4, metric: *metric, dev: dev.parse().unwrap() };
        want.assert_eq(&findings(
            Check::DefaultRoutes,
            &HostFacts { defaults: routes.iter().map(route).collect(), ..HostFacts::default() },
        ));
    }

    #[test]
    fn equal_default_routes_are_named() {
        check(
            &[("eth0", 100), ("wlan0", 100), ("tun0", 600)],
            expect![[r#"
                warning default-routes IPv4 default routes with metric 100 lead through eth0 and wlan0; flanneld uses eth0; fix: name the interface with --iface=eth0, or give one of the routes a higher metric
            "#]],
        );
        check(&[("eth0", 100), ("wlan0", 600)], expect![""]);
        check(&[("eth0", 0), ("eth0", 0), ("flannel.1", 0)], expect![""]);
        check(&[], expect![""]);
    }
}
