//! The kernel's table of neighbours is nearly full.

use super::{Facts, Finding};
use crate::net::Family;

pub(super) const CODE: &str = "neighbour-table-full";
pub(super) const REASON: &str =
    "When the table is full, the kernel cannot resolve the addresses of pods and hosts and drops packets for them.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let full = facts.host.neighbours.iter().filter(|(_, usage)| usage.is_nearly_full());
    let finding = |(family, usage): (Family, &super::Usage)| {
        let version = match family {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        };
        let (first, second, third) = (usage.limit, usage.limit.saturating_mul(2), usage.limit.saturating_mul(4));
        let base = format!("net.{version}.neigh.default.gc_thresh");
        Finding::warning(
            CODE,
            format!(
                "more than nine tenths of {} {family} neighbour entries are in use: when all are, packets for other addresses are dropped",
                usage.limit
            ),
            format!("sysctl -w {base}3={third} {base}2={second} {base}1={first}"),
        )
    };
    full.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Check, HostFacts, Usage, fixture::findings};
    use crate::net::PerFamily;
    use expect_test::expect;

    #[test]
    fn nearly_full_table_is_a_finding() {
        let usage = |used| Some(Usage { used, limit: 1024 });
        let host = HostFacts { neighbours: PerFamily { v4: usage(1000), v6: usage(5) }, ..HostFacts::default() };
        expect![[r#"
            warning neighbour-table-full more than nine tenths of 1024 IPv4 neighbour entries are in use: when all are, packets for other addresses are dropped; fix: sysctl -w net.ipv4.neigh.default.gc_thresh3=4096 net.ipv4.neigh.default.gc_thresh2=2048 net.ipv4.neigh.default.gc_thresh1=1024
        "#]]
        .assert_eq(&findings(Check::Neighbours, &host));
    }
}
