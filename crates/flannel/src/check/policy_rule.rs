//! A policy rule (`ip rule`) before that of the main table sends pods' packets elsewhere.

use super::{Facts, Finding, PolicyAction, PolicyRule, RouteKind, SeenRoute};
use crate::net::{Family, Subnet};

pub(super) const CODE: &str = "rule-diverts-pods";
pub(super) const REASON: &str = "The daemon's routes are in the main table; packets that another table answers for first never reach them.";

/// `RT_TABLE_MAIN`
const MAIN: u32 = 254;

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in Family::ALL {
        let Some((network, own)) = facts.expected.subnets_in_use(family) else { continue };
        let rules = facts.host.rules.get(family).map(Vec::as_slice).unwrap_or_default();
        for rule in rules.iter().filter(|rule| concerns(rule, network, own, &facts)) {
            let lookup = |table: u32, suppressed: Option<u8>| {
                let routes = facts.host.tables.get(&(family, table)).map(Vec::as_slice).unwrap_or_default();
                routes.iter().find(|route| takes_peers(route, suppressed, rule, network, own, &facts))
            };
            match rule.action {
                // From here on the main table decides.
                PolicyAction::Lookup(MAIN, suppressed)
                    if suppressed.is_none_or(|len| len < own.prefix_len()) && is_general(rule, network) =>
                {
                    break;
                }
                PolicyAction::Lookup(MAIN, _) | PolicyAction::Other => {}
                PolicyAction::Lookup(table, suppressed) => {
                    let Some(route) = lookup(table, suppressed) else { continue };
                    findings.push(Finding::error(
                        CODE,
                        format!("rule {} sends packets between pods to table {table}, where they take route \"{route}\"", text(rule)),
                        format!("{} rule del pref {}, or {}", super::ip(family), rule.priority, route.removal(Some(table))),
                    ));
                }
                PolicyAction::Refuse(verb) => findings.push(Finding::error(
                    CODE,
                    format!("rule {} {verb} packets between pods", text(rule)),
                    format!("{} rule del pref {}", super::ip(family), rule.priority),
                )),
            }
        }
    }
    findings
}

/// Whether ordinary packets between this node's pods and peers may match the rule, in one direction or the other.
fn concerns(rule: &PolicyRule, network: Subnet, own: Subnet, facts: &Facts<'_>) -> bool {
    let meets = |condition: Option<Subnet>, net: Subnet| condition.is_none_or(|prefix| prefix.overlaps(net));
    let leaves = meets(rule.from, own) && meets(rule.to, network);
    let arrives = meets(rule.from, network) && meets(rule.to, own);
    let passes = rule.iif.is_none_or(|iif| facts.expected.interfaces().contains(&iif));
    !rule.is_special && passes && (leaves || arrives)
}

/// Whether every packet between pods matches the rule.
fn is_general(rule: &PolicyRule, network: Subnet) -> bool {
    let covers = |condition: Option<Subnet>| condition.is_none_or(|prefix| prefix.covers(network));
    rule.iif.is_none() && covers(rule.from) && covers(rule.to)
}

/// Whether packets for pods of peers take the route. One that leads to the daemon's own device or to the pods' bridge does no harm.
fn takes_peers(route: &SeenRoute, suppressed: Option<u8>, rule: &PolicyRule, network: Subnet, own: Subnet, facts: &Facts<'_>) -> bool {
    let counts = suppressed.is_none_or(|len| route.dst.prefix_len() > len);
    let to = rule.to.unwrap_or(network);
    let reaches = route.dst.overlaps(network) && route.dst.overlaps(to) && !own.covers(route.dst);
    let leads_there = route.kind == RouteKind::Unicast
        && route.dev.is_some_and(|dev| {
            let device = facts.expected.devices.get(network.family()).copied();
            Some(dev) == device || Some(dev) == facts.expected.bridge
        });
    counts && reaches && !route.is_ours() && !leads_there && !matches!(route.kind, RouteKind::Throw | RouteKind::Other)
}

/// The rule in the syntax of `ip rule`.
fn text(rule: &PolicyRule) -> String {
    let prefix = |net: Option<Subnet>| net.map_or("all".to_owned(), |net| net.to_string());
    let mut text = format!("\"{}: from {}", rule.priority, prefix(rule.from));
    rule.to.iter().for_each(|to| text.push_str(&format!(" to {to}")));
    rule.iif.iter().for_each(|iif| text.push_str(&format!(" iif {iif}")));
    match rule.action {
        PolicyAction::Lookup(table, _) => text.push_str(&format!(" lookup {table}\"")),
        PolicyAction::Refuse(_) | PolicyAction::Other => text.push('"'),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use crate::net::PerFamily;
    use expect_test::{Expect, expect};

    fn rule(priority: u32, from: &str, to: &str, action: PolicyAction) -> PolicyRule {
        PolicyRule { priority, from: from.parse().ok(), to: to.parse().ok(), iif: None, is_special: false, action }
    }

    fn main() -> PolicyRule {
        rule(32766, "", "", PolicyAction::Lookup(MAIN, None))
    }

    #[track_caller]
    fn check(rules: &[PolicyRule], routes: &[(u32, &str, RouteKind)], want: Expect) {
        let mut host = HostFacts { rules: PerFamily { v4: Some(rules.to_vec()), v6: None }, ..HostFacts::default() };
        for (table, dst, kind) in routes {
            let dev = "tun0".parse().ok();
            let route = SeenRoute { dst: dst.parse().unwrap(), kind: *kind, metric: 0, via: None, dev, protocol: 3 };
            host.tables.entry((Family::V4, *table)).or_default().push(route);
        }
        want.assert_eq(&findings(Check::PolicyRule, &host));
    }

    #[test]
    fn table_with_a_route_for_peers_is_named() {
        check(
            &[rule(100, "", "10.244.0.0/16", PolicyAction::Lookup(52, None)), main()],
            &[(52, "0.0.0.0/0", RouteKind::Unicast)],
            expect![[r#"
                error rule-diverts-pods rule "100: from all to 10.244.0.0/16 lookup 52" sends packets between pods to table 52, where they take route "0.0.0.0/0 dev tun0"; fix: ip rule del pref 100, or ip route del 0.0.0.0/0 dev tun0 table 52
            "#]],
        );
        check(
            &[rule(7, "10.244.1.0/24", "", PolicyAction::Refuse("discards")), main()],
            &[],
            expect![[r#"
                error rule-diverts-pods rule "7: from 10.244.1.0/24" discards packets between pods; fix: ip rule del pref 7
            "#]],
        );
    }

    #[test]
    fn rules_for_other_packets_are_no_finding() {
        let special = PolicyRule { is_special: true, ..rule(1, "", "", PolicyAction::Lookup(100, None)) };
        let other_iif = PolicyRule { iif: "tun0".parse().ok(), ..rule(2, "", "", PolicyAction::Lookup(100, None)) };
        check(
            &[
                special,
                other_iif,
                rule(3, "192.0.2.1/32", "", PolicyAction::Lookup(100, None)),
                // As wg-quick does: all but the default routes of the main table, then the tunnel.
                rule(4, "", "", PolicyAction::Lookup(MAIN, Some(0))),
                rule(5, "", "", PolicyAction::Lookup(100, None)),
                main(),
            ],
            &[(100, "0.0.0.0/0", RouteKind::Unicast)],
            expect![""],
        );
        // A table without a route for peers, and one that is asked after the main table.
        check(
            &[rule(5, "", "", PolicyAction::Lookup(100, None)), main(), rule(40000, "", "", PolicyAction::Lookup(101, None))],
            &[(100, "10.9.0.0/16", RouteKind::Unicast), (100, "10.244.0.0/16", RouteKind::Throw), (101, "0.0.0.0/0", RouteKind::Unicast)],
            expect![""],
        );
    }
}
