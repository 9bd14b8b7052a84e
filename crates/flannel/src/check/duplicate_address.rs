//! Duplicate address detection of IPv6 failed for an address that this node needs, or does not end.

use super::{Address, Facts, Finding};

pub(super) const CODE: &str = "address-duplicate";
pub(super) const REASON: &str = "The kernel does not use an address that another host on the link has, nor one that it is still checking.";

/// Detection takes one to two seconds; after so many it has a reason, such as a link without carrier.
const PATIENCE: u32 = 10;

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let is_in_use = |ip: std::net::IpAddr| facts.expected.addresses.iter().any(|(_, address)| *address == ip);
    let is_gateway = |ip: std::net::IpAddr| facts.expected.own.iter().any(|(_, own)| own.contains(ip));
    let needed = facts.host.addresses.iter().filter(|address| is_in_use(address.cidr.addr) || is_gateway(address.cidr.addr));
    needed.filter_map(finding).collect()
}

fn finding(address: &Address) -> Option<Finding> {
    let Address { link, cidr, duplicate, tentative } = address;
    if *duplicate {
        return Some(Finding::error(
            CODE,
            format!("address {} on {link} is in use by another host on the link (duplicate address detection failed)", cidr.addr),
            format!("give one of the two hosts another address, then: ip addr del {cidr} dev {link}; ip addr add {cidr} dev {link}"),
        ));
    }
    tentative.filter(|seconds| *seconds >= PATIENCE).map(|_| {
        Finding::warning(
            CODE,
            format!("address {} on {link} cannot be used: duplicate address detection does not end", cidr.addr),
            format!("check that {link} is up and has a carrier (ip link show {link})"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use super::*;
    use expect_test::expect;

    #[test]
    fn addresses_that_this_node_needs_are_named() {
        let address = |link: &str, cidr: &str, duplicate, tentative| Address {
            link: link.parse().unwrap(),
            cidr: cidr.parse().unwrap(),
            duplicate,
            tentative,
        };
        let addresses = vec![
            address("eth0", "2001:db8::1/64", true, None),
            address("cni0", "fd00:244:0:1::1/64", false, Some(60)),
            // Just added, of no interest, in order.
            address("cni0", "fd00:244:0:1::1/64", false, Some(2)),
            address("eth1", "2001:db8::9/64", true, None),
            address("eth0", "192.0.2.1/24", false, None),
        ];
        expect![[r#"
            error address-duplicate address 2001:db8::1 on eth0 is in use by another host on the link (duplicate address detection failed); fix: give one of the two hosts another address, then: ip addr del 2001:db8::1/64 dev eth0; ip addr add 2001:db8::1/64 dev eth0
            warning address-duplicate address fd00:244:0:1::1 on cni0 cannot be used: duplicate address detection does not end; fix: check that cni0 is up and has a carrier (ip link show cni0)
        "#]]
        .assert_eq(&findings(Check::DuplicateAddress, &HostFacts { addresses, ..HostFacts::default() }));
    }
}
