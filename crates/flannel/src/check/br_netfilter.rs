//! kube-proxy's rules do not apply to packets between pods of this node, because bridged packets pass by the rules for routed ones.

use super::{Facts, Finding};
use crate::net::Family;

pub(super) const CODE: &str = "br-netfilter";
pub(super) const REASON: &str = "A pod that reaches a pod of the same node by a service's address gets the answer from the wrong address, because the bridge delivers it past kube-proxy's rules.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    if !facts.host.has_kube_proxy {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (family, _) in facts.expected.networks.iter() {
        let setting = match family {
            Family::V4 => "net.bridge.bridge-nf-call-iptables",
            Family::V6 => "net.bridge.bridge-nf-call-ip6tables",
        };
        let (text, fix) = match facts.host.bridge_calls.get(family) {
            Some(true) => continue,
            Some(false) => (format!("sysctl {setting} is 0"), format!("sysctl -w {setting}=1")),
            None => ("the module br_netfilter is not loaded".to_owned(), format!("modprobe br_netfilter; sysctl -w {setting}=1")),
        };
        findings.push(Finding::warning(
            CODE,
            format!("{text}: kube-proxy's rules do not apply to {family} packets between pods of this node, so services may not answer"),
            fix,
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use crate::net::PerFamily;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(has_kube_proxy: bool, v4: Option<bool>, v6: Option<bool>, want: Expect) {
        let host = HostFacts { has_kube_proxy, bridge_calls: PerFamily { v4, v6 }, ..HostFacts::default() };
        want.assert_eq(&findings(Check::BrNetfilter, &host));
    }

    #[test]
    fn missing_module_matters_beside_kube_proxy_only() {
        check(
            true,
            None,
            Some(false),
            expect![[r#"
                warning br-netfilter the module br_netfilter is not loaded: kube-proxy's rules do not apply to IPv4 packets between pods of this node, so services may not answer; fix: modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1
                warning br-netfilter sysctl net.bridge.bridge-nf-call-ip6tables is 0: kube-proxy's rules do not apply to IPv6 packets between pods of this node, so services may not answer; fix: sysctl -w net.bridge.bridge-nf-call-ip6tables=1
            "#]],
        );
        check(true, Some(true), Some(true), expect![""]);
        check(false, None, None, expect![""]);
    }
}
