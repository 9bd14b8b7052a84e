//! The table of tracked connections is nearly full.

use super::{Facts, Finding};

pub(super) const CODE: &str = "conntrack-full";
pub(super) const REASON: &str = "When the table is full, the kernel drops the first packet of each new connection.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let usage = facts.host.conntrack.filter(|usage| usage.is_nearly_full());
    let finding = usage.map(|usage| {
        Finding::warning(
            CODE,
            format!("more than nine tenths of {} connections are tracked: when the table is full, new ones are dropped", usage.limit),
            format!("sysctl -w net.netfilter.nf_conntrack_max={}", usage.limit.saturating_mul(2)),
        )
    });
    finding.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, Usage, fixture::findings};
    use expect_test::expect;

    #[test]
    fn nine_tenths_are_nearly_full() {
        let with = |used| HostFacts { conntrack: Some(Usage { used, limit: 1000 }), ..HostFacts::default() };
        assert_eq!(findings(Check::Conntrack, &with(899)), "");
        expect![[r#"
            warning conntrack-full more than nine tenths of 1000 connections are tracked: when the table is full, new ones are dropped; fix: sysctl -w net.netfilter.nf_conntrack_max=2000
        "#]]
        .assert_eq(&findings(Check::Conntrack, &with(900)));
        let none = HostFacts { conntrack: Some(Usage { used: 0, limit: 0 }), ..HostFacts::default() };
        assert_eq!(findings(Check::Conntrack, &none), "", "no limit is no finding");
    }
}
