//! What can be wrong on a host, one file per check: facts in, findings out.
//!
//! The kernel crate gathers [`HostFacts`] without judging them; the daemon adds what it [`Expected`]s of this node. A check never waits and
//! never guesses: a fact that could not be read is no finding. A new check is a file here and a line in `checks!`; the compiler names
//! what is missing.

mod br_netfilter;
mod bridge_address;
mod conntrack;
mod default_routes;
mod device;
mod duplicate_address;
mod facts;
pub mod filter;
mod forward;
mod hidden_peer;
mod hidden_pods;
mod ipv6_disabled;
mod manager;
mod neighbours;
mod policy_rule;
pub mod preflight;
mod rp_filter;
mod user_space;

use std::fmt;

use crate::net::Family;

pub use facts::{
    Address, DefaultRoute, Elsewhere, Expected, HostFacts, Manager, Place, PolicyAction, PolicyRule, RouteKind, SeenLink, SeenRoute, Usage,
};

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The data path of this node's own pods cannot work: the node is not ready.
    Error,
    /// Some packets are lost or may be, or a part does not work.
    Warning,
    /// Worth knowing.
    Info,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Info => "info",
        })
    }
}

/// Something that is wrong with this node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// The kind of problem, for machines; it never changes its meaning.
    pub code: &'static str,
    /// The problem in one line, with the object's name. It does not change while the problem lasts, so it has no counters.
    pub text: String,
    /// The fix: a command or a setting. Empty if the text has it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Finding {
    /// A finding that keeps this node from being ready.
    pub fn error(code: &'static str, text: String, fix: impl Into<String>) -> Finding {
        Finding { severity: Severity::Error, code, text, fix: fix.into() }
    }

    /// A finding that leaves this node ready.
    pub fn warning(code: &'static str, text: String, fix: impl Into<String>) -> Finding {
        Finding { severity: Severity::Warning, code, text, fix: fix.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fix.as_str() {
            "" => f.write_str(&self.text),
            fix => write!(f, "{}; fix: {fix}", self.text),
        }
    }
}

/// The input of every check.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The state that this node should be in.
    pub expected: &'a Expected,
    /// The state of the host.
    pub host: &'a HostFacts,
}

/// Defines [`Check`] from one list, so that each check is run, named and explained.
macro_rules! checks {
    ($($(#[$doc:meta])* $check:ident($module:ident),)*) => {
        /// The checks.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Check {
            $($(#[$doc])* $check,)*
        }

        impl Check {
            /// All checks.
            pub const ALL: &[Check] = &[$(Check::$check),*];

            /// Runs the check.
            pub fn run(self, facts: Facts<'_>) -> Vec<Finding> {
                match self {
                    $(Check::$check => $module::run(facts),)*
                }
            }

            /// The code of its findings.
            pub fn code(self) -> &'static str {
                match self {
                    $(Check::$check => $module::CODE,)*
                }
            }

            /// Why such a finding matters, in one sentence.
            pub fn reason(self) -> &'static str {
                match self {
                    $(Check::$check => $module::REASON,)*
                }
            }
        }
    };
}

checks! {
    /// A foreign route hides a peer.
    HiddenPeer(hidden_peer),
    /// A foreign route hides this node's own pods.
    HiddenPods(hidden_pods),
    /// A policy rule sends pods' packets to another table.
    PolicyRule(policy_rule),
    /// The packet filter drops forwarded packets of pods.
    Forward(forward),
    /// The pods' bridge has an address of another subnet.
    BridgeAddress(bridge_address),
    /// A device of the daemon was renamed, or moved to another network namespace.
    Device(device),
    /// IPv6 is disabled on an interface that needs it.
    Ipv6Disabled(ipv6_disabled),
    /// Duplicate address detection failed, or does not end.
    DuplicateAddress(duplicate_address),
    /// Several default routes have the same metric.
    DefaultRoutes(default_routes),
    /// Strict reverse-path filtering drops packets.
    RpFilter(rp_filter),
    /// kube-proxy runs, but bridged packets pass by its rules.
    BrNetfilter(br_netfilter),
    /// The connection tracking table is nearly full.
    Conntrack(conntrack),
    /// The neighbour table is nearly full.
    Neighbours(neighbours),
    /// Another program manages a device of the daemon.
    Manager(manager),
    /// The daemon carries WireGuard itself.
    UserSpace(user_space),
}

/// Runs all checks. Findings are in the order of severity, then of code and text.
pub fn run_all(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Check::ALL.iter().flat_map(|check| check.run(facts)).collect();
    findings.sort();
    findings.dedup();
    findings
}

/// The most findings of one check: a host with a thousand foreign routes needs no thousand lines.
const SHOWN: usize = 20;

/// `ip`, with the option for the family.
fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

/// The facts of a small host for tests: network 10.244.0.0/16 and fd00:244::/48, own subnet number 1, vxlan on eth0.
#[cfg(test)]
mod fixture {
    use super::{Check, Expected, Facts, HostFacts};
    use crate::net::PerFamily;

    pub(super) fn expected() -> Expected {
        Expected {
            networks: PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: "fd00:244::/48".parse().ok() },
            own: PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: "fd00:244:0:1::/64".parse().ok() },
            external: "eth0".parse().ok(),
            addresses: PerFamily { v4: "192.0.2.1".parse().ok(), v6: "2001:db8::1".parse().ok() },
            devices: PerFamily { v4: "flannel.1".parse().ok(), v6: "flannel-v6.1".parse().ok() },
            bridge: "cni0".parse().ok(),
            chosen_by_default_route: true,
            ..Expected::default()
        }
    }

    /// One line for each finding.
    pub(super) fn findings(check: Check, host: &HostFacts) -> String {
        let expected = expected();
        let line = |finding: &super::Finding| format!("{} {} {finding}\n", finding.severity, finding.code);
        check.run(Facts { expected: &expected, host }).iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn healthy_host_has_no_finding() {
        let expected = fixture::expected();
        let host = HostFacts::default();
        assert_eq!(run_all(Facts { expected: &expected, host: &host }), []);
        // Nor has a host of which nothing is known.
        assert_eq!(run_all(Facts { expected: &Expected::default(), host: &host }), []);
    }

    #[test]
    fn codes_are_distinct_and_explained() {
        let codes: BTreeSet<&str> = Check::ALL.iter().map(|check| check.code()).collect();
        assert_eq!(codes.len(), Check::ALL.len());
        for check in Check::ALL {
            assert!(
                include_str!("../../../docs/operations.md").contains(&format!("| `{}` |", check.code())),
                "{check:?} is not documented"
            );
            assert!(check.reason().ends_with('.') && !check.code().contains(char::is_uppercase), "{check:?}");
        }
    }

    #[test]
    fn findings_are_ordered_by_severity() {
        let mut all = [
            Finding::warning("b", "x".to_owned(), ""),
            Finding::error("z", "x".to_owned(), "do it"),
            Finding::warning("a", "x".to_owned(), ""),
        ];
        all.sort();
        assert_eq!(all.each_ref().map(|finding| finding.code), ["z", "a", "b"]);
        assert_eq!(all[0].to_string(), "x; fix: do it");
    }
}
