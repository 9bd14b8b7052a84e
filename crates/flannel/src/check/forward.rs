//! The packet filter drops forwarded packets of pods, and no rule accepts them before.

use super::filter::{BaseChain, Place, PodPacket, Tool};
use super::{Facts, Finding};
use crate::net::{Family, Subnet};
use crate::traffic::iptables::Variant;

pub(super) const CODE: &str = "forward-drop";
pub(super) const REASON: &str =
    "Packets between pods of different hosts are forwarded; a chain that drops them does so whatever other tables accept.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in Family::ALL {
        let Some((network, own)) = facts.expected.subnets_in_use(family) else { continue };
        let chains = facts.host.filter.get(family).map(|filter| filter.chains.as_slice()).unwrap_or_default();
        let (bridge, outside) = (facts.expected.bridge, facts.expected.outgoing(family));
        let leaving = PodPacket { family, from: own, to: network, input: bridge, output: outside };
        let arriving = PodPacket { family, from: network, to: own, input: outside, output: bridge };
        for chain in chains {
            let Some(place) = [leaving, arriving].iter().find_map(|packet| chain.drops(packet)) else { continue };
            let text = match place {
                Place::Policy => {
                    format!("{chain} drops forwarded packets of {family} pods: its policy is drop, and none of its rules accepts them")
                }
                Place::Rule { chain: name, number, is_reject } => {
                    let verb = if is_reject { "rejects" } else { "drops" };
                    let rule = if matches!(chain.tool, Tool::Nft(_)) { "the rule with handle" } else { "rule" };
                    let called = if name == chain.name { String::new() } else { format!(" of chain {name}") };
                    format!("{chain} {verb} forwarded packets of {family} pods: by {rule} {number}{called}")
                }
            };
            findings.push(Finding::error(CODE, text, fix(chain, network)));
        }
    }
    findings
}

fn fix(chain: &BaseChain, network: Subnet) -> String {
    let BaseChain { tool, table, name, .. } = chain;
    let v4 = network.family() == Family::V4;
    match tool {
        Tool::Nft(_) if table == "firewalld" => {
            format!("firewall-cmd --permanent --zone=trusted --add-source={network} && firewall-cmd --reload")
        }
        Tool::Nft(family) => {
            let ip = if v4 { "ip" } else { "ip6" };
            let insert = |field: &str| format!("nft insert rule {family} {table} {name} {ip} {field} {network} accept");
            format!("{}; {}", insert("saddr"), insert("daddr"))
        }
        Tool::Iptables(variant) => {
            let stem = if v4 { "iptables" } else { "ip6tables" };
            let program = match variant {
                Variant::Nft => stem.to_owned(),
                Variant::Legacy => format!("{stem}-legacy"),
            };
            format!("{program} -I {name} -s {network} -j ACCEPT; {program} -I {name} -d {network} -j ACCEPT")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::filter::{Condition, Filter, FilterRule, STATE_NEW, Sense, Verdict};
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use crate::net::PerFamily;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(tool: Tool, table: &str, drops_by_policy: bool, rules: Vec<FilterRule>, want: Expect) {
        let name = if matches!(tool, Tool::Nft(_)) { "forward" } else { "FORWARD" };
        let chain = BaseChain { tool, table: table.to_owned(), name: name.to_owned(), drops_by_policy, rules, called: [].into() };
        let filter = PerFamily { v4: Some(Filter { chains: vec![chain] }), v6: None };
        want.assert_eq(&findings(Check::Forward, &HostFacts { filter, ..HostFacts::default() }));
    }

    fn rule(number: u64, conditions: Vec<Condition>, verdict: Verdict) -> FilterRule {
        FilterRule { number, conditions, verdict }
    }

    #[test]
    fn chain_that_drops_is_named_with_rule_and_fix() {
        check(
            Tool::Iptables(Variant::Nft),
            "filter",
            false,
            vec![rule(1, vec![Condition::State(6, Sense::Is)], Verdict::Accept), rule(2, vec![], Verdict::Reject)],
            expect![[r#"
                error forward-drop chain FORWARD of iptables-nft table filter rejects forwarded packets of IPv4 pods: by rule 2; fix: iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT; iptables -I FORWARD -d 10.244.0.0/16 -j ACCEPT
            "#]],
        );
        check(
            Tool::Nft("inet"),
            "policy",
            true,
            vec![],
            expect![[r#"
                error forward-drop chain forward of nftables table inet policy drops forwarded packets of IPv4 pods: its policy is drop, and none of its rules accepts them; fix: nft insert rule inet policy forward ip saddr 10.244.0.0/16 accept; nft insert rule inet policy forward ip daddr 10.244.0.0/16 accept
            "#]],
        );
        check(
            Tool::Nft("inet"),
            "firewalld",
            false,
            vec![rule(9, vec![], Verdict::Reject)],
            expect![[r#"
                error forward-drop chain forward of nftables table inet firewalld rejects forwarded packets of IPv4 pods: by the rule with handle 9; fix: firewall-cmd --permanent --zone=trusted --add-source=10.244.0.0/16 && firewall-cmd --reload
            "#]],
        );
    }

    #[test]
    fn one_direction_is_enough() {
        let arriving = Condition::Input(vec!["flannel.1".to_owned()], Sense::Is);
        check(
            Tool::Iptables(Variant::Legacy),
            "filter",
            false,
            vec![rule(1, vec![arriving, Condition::State(STATE_NEW, Sense::Is)], Verdict::Drop)],
            expect![[r#"
                error forward-drop chain FORWARD of iptables-legacy table filter drops forwarded packets of IPv4 pods: by rule 1; fix: iptables-legacy -I FORWARD -s 10.244.0.0/16 -j ACCEPT; iptables-legacy -I FORWARD -d 10.244.0.0/16 -j ACCEPT
            "#]],
        );
    }

    #[test]
    fn chain_that_accepts_is_no_finding() {
        let network = "10.244.0.0/16".parse().unwrap();
        let accepts = vec![
            rule(1, vec![Condition::Source(network, Sense::Is)], Verdict::Accept),
            rule(2, vec![Condition::Destination(network, Sense::Is)], Verdict::Accept),
        ];
        check(Tool::Nft("ip"), "filter", true, accepts, expect![""]);
        check(Tool::Nft("ip"), "filter", false, vec![rule(1, vec![Condition::Unknown], Verdict::Drop)], expect![""]);
    }
}
