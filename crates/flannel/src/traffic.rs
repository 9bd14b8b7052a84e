//! The rules for masquerading and forwarding as one value per family, the [`Ruleset`] (specification, section 6). It is written as an
//! nftables table that is replaced in one transaction, or as iptables chains.

pub mod iptables;

use std::fmt;

use crate::net::{Family, PerFamily, Subnet};
use crate::object::Object;
use iptables::{Iptables, Variant};

/// The complete content of a nftables table of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    /// The family, which also names the table: see [`table_name`].
    pub family: Family,
    /// Its chains.
    pub chains: Vec<Chain>,
}

/// The name of the table, the same as upstream's: `flannel-ipv4` in family `ip`, `flannel-ipv6` in family `ip6`.
pub fn table_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel-ipv4",
        Family::V6 => "flannel-ipv6",
    }
}

/// A base chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Its hook.
    pub hook: Hook,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// The type, hook and priority of a base chain; the policy is always accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Type filter, hook forward, priority 0 (`filter`).
    Forward,
    /// Type nat, hook postrouting, priority 100 (`srcnat`).
    Postrouting,
}

/// A rule: a verdict for packets that satisfy all matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The conditions.
    pub matches: Vec<Match>,
    /// The verdict.
    pub verdict: Verdict,
}

/// A condition on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The source address is in the prefix, or outside it if negated.
    Source {
        /// The prefix.
        net: Subnet,
        /// Whether the condition is negated.
        not: bool,
    },
    /// The destination address is in the prefix, or outside it if negated.
    Destination {
        /// The prefix.
        net: Subnet,
        /// Whether the condition is negated.
        not: bool,
    },
    /// All these bits of the packet mark are set.
    Mark(u32),
}

/// The verdict on a packet that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `accept`
    Accept,
    /// `return`
    Return,
    /// `masquerade`, with `fully-random` or without
    Masquerade {
        /// Whether the source port is chosen at random (`NF_NAT_RANGE_PROTO_RANDOM_FULLY`).
        fully_random: bool,
    },
}

/// The operator's settings for the traffic rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrafficConfig {
    /// `--ip-masq`
    pub masquerade: bool,
    /// Not `--ip-masq-fully-random-disable`
    pub fully_random: bool,
    /// `--iptables-forward-rules`
    pub forward: bool,
    /// The flavour, from `EnableNFTables` and the iptables of the host.
    pub flavour: Flavour,
}

/// The form in which the rules are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// nftables tables of the daemon.
    Nftables,
    /// Chains in the iptables tables.
    Iptables(Variant),
}

/// The mark of packets that kube-proxy masquerades itself, which need no second translation.
pub(crate) const KUBE_MASQUERADE_MARK: u32 = 0x4000;

/// The rules for these pod networks and this host's subnets as objects of the configured flavour.
pub fn objects(config: TrafficConfig, networks: &PerFamily<Subnet>, mine: &PerFamily<Subnet>) -> Vec<Object> {
    let object = |ruleset: Ruleset| match config.flavour {
        Flavour::Nftables => Object::Ruleset(ruleset),
        Flavour::Iptables(variant) => Object::Iptables(Iptables::new(&ruleset, variant)),
    };
    rulesets(config, networks, mine).into_iter().map(object).collect()
}

/// The rulesets for these pod networks and this host's subnets, one per family.
pub fn rulesets(config: TrafficConfig, networks: &PerFamily<Subnet>, mine: &PerFamily<Subnet>) -> Vec<Ruleset> {
    let families = networks.iter().filter_map(|(family, cluster)| Some((family, *cluster, *mine.get(family)?)));
    families
        .map(|(family, cluster, pod)| Ruleset { family, chains: chains(config, cluster, pod) })
        .filter(|r| !r.chains.is_empty())
        .collect()
}

fn chains(config: TrafficConfig, cluster: Subnet, pod: Subnet) -> Vec<Chain> {
    let from = |net| Match::Source { net, not: false };
    let to = |net| Match::Destination { net, not: false };
    let not_from = |net| Match::Source { net, not: true };
    let not_to = |net| Match::Destination { net, not: true };
    let rule = |matches: &[Match], verdict| Rule { matches: matches.to_vec(), verdict };
    let masquerade = Verdict::Masquerade { fully_random: config.fully_random };

    let mut chains = Vec::new();
    if config.forward {
        let rules = vec![rule(&[from(cluster)], Verdict::Accept), rule(&[to(cluster)], Verdict::Accept)];
        chains.push(Chain { name: "forward".to_owned(), hook: Hook::Forward, rules });
    }
    if config.masquerade {
        let rules = vec![
            rule(&[Match::Mark(KUBE_MASQUERADE_MARK)], Verdict::Return),
            // Packets between pods keep their source address.
            rule(&[from(pod), to(cluster)], Verdict::Return),
            rule(&[from(cluster), to(pod)], Verdict::Return),
            // Packets from outside to a pod of this host keep their source address.
            rule(&[not_from(cluster), to(pod)], Verdict::Return),
            // Packets from pods to the outside, and through this host to remote pods, get this host's address.
            rule(&[from(cluster), not_to(cluster.family().multicast())], masquerade),
            rule(&[not_from(cluster), to(cluster)], masquerade),
        ];
        chains.push(Chain { name: "postrtg".to_owned(), hook: Hook::Postrouting, rules });
    }
    chains
}

impl fmt::Display for Ruleset {
    /// Renders the ruleset in the syntax of `nft`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = match self.family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        writeln!(f, "table {ip} {} {{", table_name(self.family))?;
        for chain in &self.chains {
            let hook = match chain.hook {
                Hook::Forward => "type filter hook forward priority filter; policy accept;",
                Hook::Postrouting => "type nat hook postrouting priority srcnat; policy accept;",
            };
            writeln!(f, "\tchain {} {{\n\t\t{hook}", chain.name)?;
            for rule in &chain.rules {
                f.write_str("\t\t")?;
                for condition in &rule.matches {
                    match condition {
                        Match::Source { net, not } => write!(f, "{ip} saddr {}{net} ", if *not { "!= " } else { "" })?,
                        Match::Destination { net, not } => write!(f, "{ip} daddr {}{net} ", if *not { "!= " } else { "" })?,
                        Match::Mark(bits) => write!(f, "meta mark & {bits:#010x} == {bits:#010x} ")?,
                    }
                }
                writeln!(f, "{}", rule.verdict)?;
            }
            writeln!(f, "\t}}")?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Accept => "accept",
            Verdict::Return => "return",
            Verdict::Masquerade { fully_random: true } => "masquerade fully-random",
            Verdict::Masquerade { fully_random: false } => "masquerade",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    const ALL: TrafficConfig = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: Flavour::Nftables };

    fn text(config: TrafficConfig) -> String {
        let networks = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: None };
        let mine = PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: None };
        rulesets(config, &networks, &mine).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ruleset_masquerades_and_forwards() {
        expect![[r#"
            table ip flannel-ipv4 {
            	chain forward {
            		type filter hook forward priority filter; policy accept;
            		ip saddr 10.244.0.0/16 accept
            		ip daddr 10.244.0.0/16 accept
            	}
            	chain postrtg {
            		type nat hook postrouting priority srcnat; policy accept;
            		meta mark & 0x00004000 == 0x00004000 return
            		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
            		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
            		ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
            		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
            		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
            	}
            }
        "#]]
        .assert_eq(&text(ALL));
    }

    #[test]
    fn each_chain_exists_only_if_enabled() {
        assert_eq!(text(TrafficConfig { masquerade: false, forward: false, ..ALL }), "");
        assert!(!text(TrafficConfig { masquerade: false, ..ALL }).contains("postrtg"));
        assert!(!text(TrafficConfig { fully_random: false, ..ALL }).contains("random"));
    }
}
