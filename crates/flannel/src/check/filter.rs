//! The packet filter's chains for forwarded packets as values, and what they do to a packet between pods.
//!
//! The evaluation is cautious: what is not understood may be true or false, and only a drop that is certain is reported.

use std::collections::BTreeMap;
use std::fmt;

use crate::net::{Family, IfName, Subnet};
use crate::traffic::KUBE_MASQUERADE_MARK;
use crate::traffic::iptables::Variant;

/// The base chains that forwarded packets of one family pass, in any order: each of them can drop a packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// The chains.
    pub chains: Vec<BaseChain>,
}

/// A base chain with the chains that it calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// The program that shows and changes it.
    pub tool: Tool,
    /// The table's name.
    pub table: String,
    /// The chain's name.
    pub name: String,
    /// Whether packets that no rule decides about are dropped.
    pub drops_by_policy: bool,
    /// Its rules, in order.
    pub rules: Vec<FilterRule>,
    /// The rules of the table's other chains, as far as they are called from here. A missing chain is an unknown one.
    pub called: BTreeMap<String, Vec<FilterRule>>,
}

/// The program that shows and changes a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tool {
    /// `nft`, with the family of the table: `ip`, `ip6` or `inet`.
    Nft(&'static str),
    /// `iptables` of this variant.
    Iptables(Variant),
}

/// A rule: a verdict for packets that meet all conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterRule {
    /// The handle of nft, or the number of iptables.
    pub number: u64,
    /// The conditions.
    pub conditions: Vec<Condition>,
    /// The verdict.
    pub verdict: Verdict,
}

/// What a rule does with packets that match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// They pass this base chain.
    Accept,
    /// They are discarded.
    Drop,
    /// They are refused with an error message.
    Reject,
    /// They go through this chain, and come back.
    Call(String),
    /// They go through this chain, and do not come back to this one.
    Goto(String),
    /// They go back to the calling chain.
    Return,
    /// Nothing that matters here: counted, logged, marked.
    Continue,
    /// Something that is not known here.
    Unknown,
}

/// The state bits of a connection, as in nf_tables.
pub const STATE_NEW: u32 = 8;

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The source address is in the prefix.
    Source(Subnet, Sense),
    /// The destination address is in the prefix.
    Destination(Subnet, Sense),
    /// The packet arrived by one of these interfaces; a name that ends in `*` is a prefix.
    Input(Vec<String>, Sense),
    /// It leaves by one of these interfaces.
    Output(Vec<String>, Sense),
    /// The connection has one of these state bits.
    State(u32, Sense),
    /// All these bits of the mark are set.
    Mark(u32, Sense),
    /// The packet is of this family.
    Family(Family, Sense),
    /// Not known here.
    Unknown,
}

/// Whether a condition is negated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sense {
    /// It must be met.
    Is,
    /// It must not be met.
    Not,
}

impl Sense {
    /// By a flag of the packet filter.
    pub fn negated(is_negated: bool) -> Sense {
        if is_negated { Sense::Not } else { Sense::Is }
    }
}

/// The first packet of a connection between pods of two hosts.
#[derive(Debug, Clone, Copy)]
pub(super) struct PodPacket {
    pub(super) family: Family,
    /// All addresses that it may come from.
    pub(super) from: Subnet,
    /// All addresses that it may go to.
    pub(super) to: Subnet,
    pub(super) input: Option<IfName>,
    pub(super) output: Option<IfName>,
}

/// Where a packet is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// By a rule of a chain.
    Rule { chain: String, number: u64, is_reject: bool },
    /// By the base chain's policy.
    Policy,
}

/// What a chain does with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Accepted,
    Dropped(Place),
    /// No rule decides.
    Returned,
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Yes,
    No,
    Unknown,
}

/// How deep chains may call each other, and how many rules are looked at.
const DEPTH: u32 = 16;
const RULES: u32 = 20_000;

impl BaseChain {
    /// Where the packet is certainly dropped.
    pub(super) fn drops(&self, packet: &PodPacket) -> Option<Place> {
        let mut budget = RULES;
        match self.walk(&self.name, &self.rules, packet, DEPTH, &mut budget) {
            Outcome::Dropped(place) => Some(place),
            Outcome::Returned => self.drops_by_policy.then_some(Place::Policy),
            Outcome::Accepted | Outcome::Unknown => None,
        }
    }

    fn walk(&self, name: &str, rules: &[FilterRule], packet: &PodPacket, depth: u32, budget: &mut u32) -> Outcome {
        for rule in rules {
            *budget = budget.saturating_sub(1);
            if *budget == 0 {
                return Outcome::Unknown;
            }
            let truth = rule.conditions.iter().map(|condition| condition.test(packet)).fold(Truth::Yes, Truth::and);
            if truth == Truth::No {
                continue;
            }
            let mut call = |chain: &String| match (depth, self.called.get(chain)) {
                (0, _) | (_, None) => Outcome::Unknown,
                (_, Some(rules)) => self.walk(chain, rules, packet, depth - 1, budget),
            };
            let outcome = match &rule.verdict {
                Verdict::Continue => continue,
                Verdict::Accept => Outcome::Accepted,
                Verdict::Drop | Verdict::Reject => {
                    let is_reject = rule.verdict == Verdict::Reject;
                    Outcome::Dropped(Place::Rule { chain: name.to_owned(), number: rule.number, is_reject })
                }
                Verdict::Return => Outcome::Returned,
                Verdict::Call(chain) => match call(chain) {
                    Outcome::Returned => continue,
                    other => other,
                },
                Verdict::Goto(chain) => call(chain),
                Verdict::Unknown => Outcome::Unknown,
            };
            match (truth, outcome) {
                (Truth::Yes, outcome) => return outcome,
                // The packet may be dropped here; whether it is dropped further on decides.
                (_, Outcome::Dropped(_)) => {}
                (_, Outcome::Accepted | Outcome::Returned | Outcome::Unknown) => return Outcome::Unknown,
            }
        }
        Outcome::Returned
    }
}

impl Truth {
    fn and(self, other: Truth) -> Truth {
        match (self, other) {
            (Truth::No, _) | (_, Truth::No) => Truth::No,
            (Truth::Yes, Truth::Yes) => Truth::Yes,
            _ => Truth::Unknown,
        }
    }

    fn of(is_true: bool) -> Truth {
        if is_true { Truth::Yes } else { Truth::No }
    }

    fn with(self, sense: Sense) -> Truth {
        match (self, sense) {
            (truth, Sense::Is) => truth,
            (Truth::Yes, Sense::Not) => Truth::No,
            (Truth::No, Sense::Not) => Truth::Yes,
            (Truth::Unknown, Sense::Not) => Truth::Unknown,
        }
    }
}

impl Condition {
    fn test(&self, packet: &PodPacket) -> Truth {
        match self {
            Condition::Source(net, sense) => within(packet.from, *net).with(*sense),
            Condition::Destination(net, sense) => within(packet.to, *net).with(*sense),
            Condition::Input(names, sense) => matches_name(packet.input, names).with(*sense),
            Condition::Output(names, sense) => matches_name(packet.output, names).with(*sense),
            Condition::State(bits, sense) => Truth::of(bits & STATE_NEW != 0).with(*sense),
            // Packets between pods carry no mark of kube-proxy's. Other programs' marks are their own business.
            Condition::Mark(KUBE_MASQUERADE_MARK, sense) => Truth::No.with(*sense),
            Condition::Family(family, sense) => Truth::of(*family == packet.family).with(*sense),
            Condition::Mark(..) | Condition::Unknown => Truth::Unknown,
        }
    }
}

fn within(addresses: Subnet, net: Subnet) -> Truth {
    match (net.covers(addresses), net.overlaps(addresses)) {
        (true, _) => Truth::Yes,
        (false, true) => Truth::Unknown,
        (false, false) => Truth::No,
    }
}

fn matches_name(interface: Option<IfName>, names: &[String]) -> Truth {
    let Some(interface) = interface else { return Truth::Unknown };
    Truth::of(names.iter().any(|name| match name.strip_suffix('*') {
        Some(prefix) => interface.as_str().starts_with(prefix),
        None => interface.as_str() == name,
    }))
}

impl fmt::Display for BaseChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tool {
            Tool::Nft(family) => write!(f, "chain {} of nftables table {family} {}", self.name, self.table),
            Tool::Iptables(variant) => write!(f, "chain {} of iptables-{variant} table {}", self.name, self.table),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> PodPacket {
        PodPacket {
            family: Family::V4,
            from: "10.244.1.0/24".parse().unwrap(),
            to: "10.244.0.0/16".parse().unwrap(),
            input: "cni0".parse().ok(),
            output: "flannel.1".parse().ok(),
        }
    }

    /// Parses a rule: conditions, and as the last word the verdict.
    fn rule(number: u64, text: &str) -> FilterRule {
        let (conditions, verdict) = text.rsplit_once(' ').unwrap_or(("", text));
        let condition = |word: &str| {
            let (word, sense) = word.strip_prefix('!').map_or((word, Sense::Is), |word| (word, Sense::Not));
            match word.split_once('=') {
                Some(("s", net)) => Condition::Source(net.parse().unwrap(), sense),
                Some(("d", net)) => Condition::Destination(net.parse().unwrap(), sense),
                Some(("i", name)) => Condition::Input(vec![name.to_owned()], sense),
                Some(("o", name)) => Condition::Output(vec![name.to_owned()], sense),
                Some(("state", bits)) => Condition::State(bits.parse().unwrap(), sense),
                Some(("mark", bits)) => Condition::Mark(bits.parse().unwrap(), sense),
                _ => Condition::Unknown,
            }
        };
        let verdict = match verdict {
            "accept" => Verdict::Accept,
            "drop" => Verdict::Drop,
            "reject" => Verdict::Reject,
            "return" => Verdict::Return,
            "log" => Verdict::Continue,
            other => match other.split_once(':') {
                Some(("jump", chain)) => Verdict::Call(chain.to_owned()),
                Some(("goto", chain)) => Verdict::Goto(chain.to_owned()),
                _ => Verdict::Unknown,
            },
        };
        FilterRule { number, conditions: conditions.split_whitespace().map(condition).collect(), verdict }
    }

    fn rules(text: &str) -> Vec<FilterRule> {
        text.split(';').map(str::trim).filter(|rule| !rule.is_empty()).zip(1..).map(|(text, number)| rule(number, text)).collect()
    }

    /// Where the packet is dropped, by chains in the form `name: rule; rule`; the first is the base chain.
    fn dropped(policy: &str, chains: &[(&str, &str)]) -> String {
        let chain = BaseChain {
            tool: Tool::Iptables(Variant::Nft),
            table: "filter".to_owned(),
            name: chains[0].0.to_owned(),
            drops_by_policy: policy == "drop",
            rules: rules(chains[0].1),
            called: chains[1..].iter().map(|(name, text)| ((*name).to_owned(), rules(text))).collect(),
        };
        match chain.drops(&packet()) {
            None => "passes".to_owned(),
            Some(Place::Policy) => "policy".to_owned(),
            Some(Place::Rule { chain, number, is_reject }) => format!("{chain} {number}{}", if is_reject { " reject" } else { "" }),
        }
    }

    #[test]
    fn certain_drops_are_found() {
        assert_eq!(dropped("accept", &[("F", "reject")]), "F 1 reject");
        assert_eq!(dropped("drop", &[("F", "")]), "policy");
        // CentOS: connections that exist pass, all others are rejected.
        assert_eq!(dropped("accept", &[("F", "state=6 accept; log; reject")]), "F 3 reject");
        // Docker: only its own bridge passes.
        assert_eq!(
            dropped("drop", &[("F", "jump:USER; o=docker0 state=6 accept; i=docker0 !o=docker0 accept"), ("USER", "return")]),
            "policy"
        );
        // firewalld: a chain that is called decides.
        assert_eq!(
            dropped(
                "accept",
                &[("F", "state=6 accept; i=lo accept; jump:P; reject"), ("P", "i=eth0 goto:Z; goto:Z"), ("Z", "jump:D"), ("D", "")]
            ),
            "F 4 reject"
        );
        assert_eq!(dropped("accept", &[("F", "goto:Z"), ("Z", "s=10.244.0.0/16 drop")]), "Z 1");
        // kube-proxy's rules do not concern packets without its mark.
        assert_eq!(dropped("drop", &[("F", "jump:K"), ("K", "state=1 drop; mark=16384 accept; state=6 accept")]), "policy");
    }

    #[test]
    fn accepted_packets_pass() {
        assert_eq!(dropped("drop", &[("F", "jump:FLANNEL-FWD; reject"), ("FLANNEL-FWD", "s=10.244.0.0/16 accept")]), "passes");
        assert_eq!(dropped("drop", &[("F", "i=cni* accept")]), "passes");
        assert_eq!(dropped("accept", &[("F", "state=1 drop; i=virbr0 reject; d=192.0.2.0/24 drop; !d=10.0.0.0/8 drop")]), "passes");
    }

    #[test]
    fn uncertain_drops_are_no_finding() {
        // A port, a part of the subnet, a set, a foreign mark, an unknown target.
        assert_eq!(dropped("accept", &[("F", "? drop; s=10.244.1.7/32 drop")]), "passes");
        assert_eq!(dropped("drop", &[("F", "? accept")]), "passes");
        assert_eq!(dropped("drop", &[("F", "mark=65536 accept; drop")]), "passes");
        assert_eq!(dropped("drop", &[("F", "queue; drop")]), "passes");
        assert_eq!(dropped("drop", &[("F", "jump:MISSING; drop")]), "passes");
        assert_eq!(dropped("drop", &[("F", "jump:P; drop"), ("P", "? accept")]), "passes");
        assert_eq!(dropped("drop", &[("F", "? goto:P; reject"), ("P", "")]), "passes");
        // It may be dropped early, and is dropped at last.
        assert_eq!(dropped("drop", &[("F", "? drop")]), "policy");
    }

    #[test]
    fn endless_chains_end() {
        assert_eq!(dropped("drop", &[("F", "jump:A"), ("A", "jump:A")]), "passes");
    }
}
