//! IPv6 is disabled on an interface that carries an IPv6 pod network.

use super::{Facts, Finding};
use crate::net::Family;

pub(super) const CODE: &str = "ipv6-disabled";
pub(super) const REASON: &str =
    "An interface with disable_ipv6 has no IPv6 address and forwards no IPv6 packet; pods of this node are given IPv4 only.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let expected = facts.expected;
    if expected.networks.get(Family::V6).is_none() {
        return Vec::new();
    }
    let needed = [expected.external, expected.devices.get(Family::V6).copied(), expected.bridge];
    let disabled: Vec<String> =
        needed.into_iter().flatten().filter(|name| facts.host.ipv6_disabled.contains(name)).map(|name| name.to_string()).collect();
    if disabled.is_empty() {
        return Vec::new();
    }
    let commands = disabled.iter().map(|name| format!(" net.ipv6.conf.{}.disable_ipv6=0", name.replace('.', "/")));
    vec![Finding::warning(
        CODE,
        format!("IPv6 is disabled on {} (sysctl disable_ipv6), but the network config has EnableIPv6", disabled.join(", ")),
        format!("sysctl -w net.ipv6.conf.all.disable_ipv6=0{}, or set EnableIPv6 to false", commands.collect::<String>()),
    )]
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Expected, Facts, HostFacts, fixture};
    use super::*;
    use expect_test::expect;

    #[test]
    fn disabled_interfaces_are_named_if_the_network_has_ipv6() {
        let names = ["lo", "eth0", "flannel-v6.1"].map(|name| name.parse().unwrap());
        let host = HostFacts { ipv6_disabled: names.to_vec(), ..HostFacts::default() };
        expect![[r#"
            warning ipv6-disabled IPv6 is disabled on eth0, flannel-v6.1 (sysctl disable_ipv6), but the network config has EnableIPv6; fix: sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.eth0.disable_ipv6=0 net.ipv6.conf.flannel-v6/1.disable_ipv6=0, or set EnableIPv6 to false
        "#]]
        .assert_eq(&fixture::findings(Check::Ipv6Disabled, &host));
        let mut expected = fixture::expected();
        expected.networks.set(Family::V6, None);
        assert_eq!(run(Facts { expected: &expected, host: &host }), []);
        assert_eq!(run(Facts { expected: &Expected::default(), host: &host }), []);
    }
}
