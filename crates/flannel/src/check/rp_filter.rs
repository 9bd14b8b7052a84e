//! Strict reverse-path filtering on an interface of the pods' path, while the kernel drops packets for it.

use super::{Facts, Finding};

pub(super) const CODE: &str = "rp-filter";
pub(super) const REASON: &str = "With rp_filter 1 the kernel drops a packet whose source address it would reach by another interface, which happens when two hosts choose different ways to each other.";

/// `rp_filter` for strict filtering.
const STRICT: u8 = 1;

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let strict = facts.host.rp_filter.iter().filter(|(_, value)| *value == STRICT);
    let names: Vec<String> = strict.map(|(name, _)| name.to_string()).collect();
    if names.is_empty() || facts.host.rp_dropped == 0 {
        return Vec::new();
    }
    let settings: String = names.iter().map(|name| format!(" net.ipv4.conf.{}.rp_filter=2", name.replace('.', "/"))).collect();
    vec![Finding::warning(
        CODE,
        format!(
            "strict rp_filter is on for {}, and reverse-path filtering drops packets on this host; they may be pods'",
            names.join(", ")
        ),
        format!("sysctl -w{settings}"),
    )]
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, fixture::findings};
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(filters: &[(&str, u8)], rp_dropped: u64, want: Expect) {
        let rp_filter = filters.iter().map(|(name, value)| (name.parse().unwrap(), *value)).collect();
        want.assert_eq(&findings(Check::RpFilter, &HostFacts { rp_filter, rp_dropped, ..HostFacts::default() }));
    }

    #[test]
    fn strict_filter_that_drops_is_a_finding() {
        check(
            &[("eth0", 1), ("flannel.1", 1), ("cni0", 2)],
            7,
            expect![[r#"
                warning rp-filter strict rp_filter is on for eth0, flannel.1, and reverse-path filtering drops packets on this host; they may be pods'; fix: sysctl -w net.ipv4.conf.eth0.rp_filter=2 net.ipv4.conf.flannel/1.rp_filter=2
            "#]],
        );
        // Many distributions set it, and it does no harm.
        check(&[("eth0", 1)], 0, expect![""]);
        check(&[("eth0", 2), ("cni0", 0)], 7, expect![""]);
    }
}
