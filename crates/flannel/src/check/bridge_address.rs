//! The pods' bridge has an address that belongs to a former subnet of this node: the pod network, or the node's lease, changed while the
//! bridge stayed.

use super::{Address, Facts, Finding, SeenLink};
use crate::net::{Family, Subnet};

pub(super) const CODE: &str = "bridge-address";
pub(super) const REASON: &str = "The bridge plugin refuses to add a pod while the bridge has an address of another subnet, and pods with the former addresses get no packets from other hosts.";

/// The name of the pods' bridge, unless the CNI configuration gives another.
const DEFAULT: &str = "cni0";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (family, own) in facts.expected.own.iter() {
        let of_family = |address: &&Address| Family::of(address.cidr.addr) == family && !is_link_local(address);
        for link in facts.host.links.iter().filter(|link| link.kind == "bridge") {
            let addresses: Vec<&Address> = facts.host.addresses.iter().filter(of_family).filter(|found| found.link == link.name).collect();
            // The plugin accepts the bridge if it has the gateway's address, whatever it has beside.
            if addresses.iter().any(|address| own.contains(address.cidr.addr)) {
                continue;
            }
            let old = addresses.into_iter().filter(|address| is_former(address, link, &facts));
            findings.extend(old.map(|address| finding(address, link, *own)));
        }
    }
    findings
}

/// The bridge plugin refuses another IPv4 address; an IPv6 one beside the gateway's does no harm to new pods.
fn finding(address: &Address, link: &SeenLink, own: Subnet) -> Finding {
    let (name, cidr) = (link.name, address.cidr);
    let text = format!("bridge {name} has address {cidr}, which is not in this node's subnet {own}");
    let fix = format!("ip addr del {cidr} dev {name}, then create the pods with such addresses again");
    match own.family() {
        Family::V4 => Finding::error(CODE, format!("{text}: no pod can be added, and pods with such addresses are cut off"), fix),
        Family::V6 => Finding::warning(CODE, format!("{text}: pods with such addresses are cut off"), fix),
    }
}

/// Whether the address is a gateway of before: on the pods' bridge, or on one with pods, in a pod network of now or of an earlier run.
fn is_former(address: &Address, link: &SeenLink, facts: &Facts<'_>) -> bool {
    let networks = || facts.expected.networks.iter().map(|(_, network)| network).chain(&facts.expected.retired);
    let is_ours = facts.expected.bridge.map_or(link.name.as_str() == DEFAULT, |bridge| bridge == link.name);
    is_ours || (link.has_pods && networks().any(|network| network.contains(address.cidr.addr)))
}

fn is_link_local(address: &Address) -> bool {
    match address.cidr.addr {
        std::net::IpAddr::V4(ip) => ip.is_link_local(),
        std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(bridges: &[(&str, bool, &[&str])], want: Expect) {
        let mut host = HostFacts::default();
        for (name, has_pods, addresses) in bridges {
            let link = name.parse().unwrap();
            host.links.push(SeenLink { name: link, kind: "bridge".to_owned(), vxlan: None, has_pods: *has_pods });
            let address = |text: &&str| Address { link, cidr: text.parse().unwrap(), duplicate: false, tentative: None };
            host.addresses.extend(addresses.iter().map(address));
        }
        want.assert_eq(&findings(Check::BridgeAddress, &host));
    }

    #[test]
    fn address_of_a_former_subnet_is_an_error() {
        check(
            &[("cni0", true, &["10.99.1.1/24", "fe80::1/64", "fd00:244:0:1::1/64"])],
            expect![[r#"
                error bridge-address bridge cni0 has address 10.99.1.1/24, which is not in this node's subnet 10.244.1.0/24: no pod can be added, and pods with such addresses are cut off; fix: ip addr del 10.99.1.1/24 dev cni0, then create the pods with such addresses again
            "#]],
        );
        // Another name, known by its pods and the network.
        check(
            &[("pods0", true, &["10.244.7.1/24"])],
            expect![[r#"
                error bridge-address bridge pods0 has address 10.244.7.1/24, which is not in this node's subnet 10.244.1.0/24: no pod can be added, and pods with such addresses are cut off; fix: ip addr del 10.244.7.1/24 dev pods0, then create the pods with such addresses again
            "#]],
        );
    }

    #[test]
    fn other_bridges_and_further_addresses_are_no_finding() {
        check(
            &[
                ("cni0", true, &["10.244.1.1/24", "169.254.1.1/32", "192.168.9.1/24"]),
                ("docker0", true, &["172.17.0.1/16"]),
                ("virbr0", false, &["10.244.9.1/24"]),
                ("br0", false, &[]),
            ],
            expect![""],
        );
    }
}
