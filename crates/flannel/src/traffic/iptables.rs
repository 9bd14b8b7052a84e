//! The traffic rules in the syntax of iptables: two chains, each with one jump to it from a base chain (specification, sections 6.1 and
//! 6.2). Other flannelds on the host share the chains, so the daemon owns only the rules in them that name its networks, or none.

use std::fmt;

use super::{Chain, Hook, Match, Rule, Ruleset, Verdict};
use crate::net::{Family, Subnet};

/// The kernel's packet filter that `iptables` writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// nf_tables, by `iptables-nft`.
    Nft,
    /// ip_tables, by `iptables-legacy`.
    Legacy,
}

impl Variant {
    /// Both packet filters.
    pub const ALL: [Variant; 2] = [Variant::Nft, Variant::Legacy];
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        })
    }
}

/// The daemon's iptables rules of one family in one packet filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iptables {
    /// The family.
    pub family: Family,
    /// The packet filter.
    pub variant: Variant,
    /// The chains that exist.
    pub chains: Vec<UserChain>,
}

/// A chain of the daemon. Rules are in the format of `iptables-save`, without `-A CHAIN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserChain {
    /// Which of the daemon's chains it is.
    pub place: Place,
    /// The rules of the base chain that jump to it, without those that a rule makes void ([`Saved::void_from`]).
    pub jumps: Vec<String>,
    /// Its rules.
    pub rules: Vec<String>,
}

/// The daemon's chains, by table and base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `FLANNEL-POSTRTG`, jumped to from POSTROUTING of table nat.
    Masquerade,
    /// `FLANNEL-FWD`, jumped to from FORWARD of table filter.
    Forward,
    /// `FLANNEL-FWD` in table nat, which some releases of upstream create by mistake when they clean up.
    Stray,
}

impl Place {
    /// All chains.
    pub const ALL: [Place; 3] = [Place::Masquerade, Place::Forward, Place::Stray];

    /// The table.
    pub fn table(self) -> &'static str {
        match self {
            Place::Masquerade | Place::Stray => "nat",
            Place::Forward => "filter",
        }
    }

    /// The chain's name.
    pub fn chain(self) -> &'static str {
        match self {
            Place::Masquerade => "FLANNEL-POSTRTG",
            Place::Forward | Place::Stray => "FLANNEL-FWD",
        }
    }

    /// The base chain that jumps to it.
    pub fn base(self) -> &'static str {
        match self {
            Place::Masquerade => "POSTROUTING",
            Place::Forward | Place::Stray => "FORWARD",
        }
    }

    fn comment(self) -> &'static str {
        match self {
            Place::Masquerade => "flanneld masq",
            Place::Forward | Place::Stray => "flanneld forward",
        }
    }
}

impl Iptables {
    /// Converts a ruleset into iptables chains.
    pub fn new(ruleset: &Ruleset, variant: Variant) -> Iptables {
        let mut chains: Vec<UserChain> = ruleset.chains.iter().map(chain).collect();
        chains.sort_by_key(|chain| chain.place);
        Iptables { family: ruleset.family, variant, chains }
    }

    /// Selects the daemon's rules from the output of `iptables-save`: those that name one of `networks`, or no network at all. Returns
    /// `None` if there are no chains and rules of the daemon.
    pub fn read(family: Family, variant: Variant, saved: &[(Place, Saved)], networks: &[Subnet]) -> Option<Iptables> {
        let mut chains = Vec::new();
        for (place, saved) in saved {
            let rules = own_rules(saved, networks);
            let foreign_only =
                rules.iter().all(|rule| named(rule).next().is_none()) && saved.rules.iter().any(|rule| !is_ours(rule, networks));
            if (saved.exists || !saved.jumps.is_empty()) && !foreign_only {
                let jumps = if saved.is_jump_void() { Vec::new() } else { saved.jumps.clone() };
                chains.push(UserChain { place: *place, jumps, rules });
            }
        }
        chains.sort_by_key(|chain| chain.place);
        (!chains.is_empty()).then_some(Iptables { family, variant, chains })
    }
}

/// The content of one of the daemon's chains in the kernel, including rules of others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    /// Whether the chain exists.
    pub exists: bool,
    /// The rules of the base chain that jump to it.
    pub jumps: Vec<String>,
    /// Its rules.
    pub rules: Vec<String>,
    /// The number of the first rule of the base chain, before any jump, that drops or rejects every packet: a jump behind it is void.
    pub void_from: Option<usize>,
}

impl Saved {
    /// Whether there is a jump, but no packet reaches it.
    fn is_jump_void(&self) -> bool {
        !self.jumps.is_empty() && self.void_from.is_some()
    }
}

/// Parses the output of `iptables-save -t TABLE`.
pub fn parse_save(table: &str, text: &str) -> Vec<(Place, Saved)> {
    let mut found: Vec<(Place, Saved)> =
        Place::ALL.into_iter().filter(|place| place.table() == table).map(|place| (place, Saved::default())).collect();
    let mut numbers = vec![0; found.len()];
    for line in text.lines() {
        for ((place, saved), number) in found.iter_mut().zip(&mut numbers) {
            if let Some(rest) = line.strip_prefix(':') {
                saved.exists |= rest.split(' ').next() == Some(place.chain());
            }
            let Some((chain, rule)) = line.strip_prefix("-A ").map(|rest| rest.split_once(' ').unwrap_or((rest, ""))) else { continue };
            if chain == place.chain() {
                saved.rules.push(rule.to_owned());
            } else if chain == place.base() {
                *number += 1;
                if jumps_to(rule, place.chain()) {
                    saved.jumps.push(rule.to_owned());
                } else if saved.jumps.is_empty() && saved.void_from.is_none() && stops_all(rule, text) {
                    saved.void_from = Some(*number);
                }
            }
        }
    }
    found
}

/// Whether a rule drops or rejects every packet, itself or by a chain that does nothing else.
fn stops_all(rule: &str, text: &str) -> bool {
    let Some(target) = unconditional_target(rule) else { return false };
    let chain = format!("-A {target} ");
    matches!(target, "DROP" | "REJECT")
        || text
            .lines()
            .find_map(|line| line.strip_prefix(&chain))
            .and_then(unconditional_target)
            .is_some_and(|target| matches!(target, "DROP" | "REJECT"))
}

/// The target of a rule without conditions, where a comment is none.
fn unconditional_target(rule: &str) -> Option<&str> {
    let rest = match rule.strip_prefix("-m comment --comment ") {
        // A comment of several words is quoted.
        Some(rest) => match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once("\" ")?.1,
            None => rest.split_once(' ')?.1,
        },
        None => rule,
    };
    let target = rest.strip_prefix("-j ").or_else(|| rest.strip_prefix("-g "))?;
    target.split(' ').next()
}

fn jumps_to(rule: &str, chain: &str) -> bool {
    ["-j", "-g"].iter().any(|verb| rule.ends_with(&format!("{verb} {chain}")))
}

/// The input for `iptables-restore --noflush` that sets the `wanted` rules and keeps the rules of others in the chains. Each table is
/// replaced in one step, so that either the old or the new rules apply to every packet.
pub fn restore(wanted: &Iptables, saved: &[(Place, Saved)], networks: &[Subnet]) -> String {
    let mut text = String::new();
    for table in ["nat", "filter"] {
        let mut lines = String::new();
        for (place, saved) in saved.iter().filter(|(place, _)| place.table() == table) {
            let chain = place.chain();
            let want = wanted.chains.iter().find(|chain| chain.place == *place);
            let foreign: Vec<&String> = saved.rules.iter().filter(|rule| !is_ours(rule, networks)).collect();
            match want {
                Some(want)
                    if saved.exists && saved.jumps == want.jumps && !saved.is_jump_void() && own_rules(saved, networks) == want.rules => {}
                Some(want) => {
                    // Declaring a chain creates or flushes it.
                    lines.push_str(&format!(":{chain} - [0:0]\n"));
                    // Rules that name no network are shared by all flannelds, and come first.
                    let (named, common): (Vec<&String>, Vec<&String>) = want.rules.iter().partition(|rule| names_a_network(rule));
                    for rule in common.into_iter().chain(foreign.iter().copied()).chain(named) {
                        lines.push_str(&format!("-A {chain} {rule}\n"));
                    }
                    // One correct jump is kept in place: the operator decides its position among other rules, and network policies go
                    // before it. Only behind a rule that stops every packet it would be void.
                    let keep = want.jumps.first().filter(|jump| saved.jumps.contains(jump) && !saved.is_jump_void());
                    let mut kept = false;
                    for jump in &saved.jumps {
                        if Some(jump) == keep && !std::mem::replace(&mut kept, true) {
                            continue;
                        }
                        lines.push_str(&format!("-D {} {jump}\n", place.base()));
                    }
                    if keep.is_none() {
                        // Jumps that were just deleted came after that rule, so its number is the same.
                        let add = match saved.void_from {
                            Some(number) => format!("-I {} {number}", place.base()),
                            None => format!("-A {}", place.base()),
                        };
                        want.jumps.iter().for_each(|jump| lines.push_str(&format!("{add} {jump}\n")));
                    }
                }
                None if !foreign.is_empty() => {
                    lines.push_str(&format!(":{chain} - [0:0]\n"));
                    let common = own_rules(saved, networks).into_iter().filter(|rule| !names_a_network(rule));
                    common.for_each(|rule| lines.push_str(&format!("-A {chain} {rule}\n")));
                    foreign.iter().for_each(|rule| lines.push_str(&format!("-A {chain} {rule}\n")));
                }
                None => {
                    saved.jumps.iter().for_each(|jump| lines.push_str(&format!("-D {} {jump}\n", place.base())));
                    if saved.exists {
                        lines.push_str(&format!("-F {chain}\n-X {chain}\n"));
                    }
                }
            }
        }
        if !lines.is_empty() {
            text.push_str(&format!("*{table}\n{lines}COMMIT\n"));
        }
    }
    text
}

/// The daemon's rules of a chain. Rules that name no network are the same for every flanneld; only one copy of each is returned.
fn own_rules(saved: &Saved, networks: &[Subnet]) -> Vec<String> {
    let mut rules: Vec<String> = Vec::new();
    for rule in saved.rules.iter().filter(|rule| is_ours(rule, networks)) {
        if names_a_network(rule) || !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    rules
}

fn names_a_network(rule: &str) -> bool {
    named(rule).next().is_some()
}

/// The networks that a rule names, except multicast.
fn named(rule: &str) -> impl Iterator<Item = Subnet> {
    let mut after = "";
    rule.split(' ').filter_map(move |word| {
        let is_address = matches!(std::mem::replace(&mut after, word), "-s" | "-d");
        let net: Subnet = is_address.then(|| word.parse().ok())??;
        (!net.family().multicast().covers(net)).then_some(net)
    })
}

fn is_ours(rule: &str, networks: &[Subnet]) -> bool {
    let mut nets = named(rule).peekable();
    nets.peek().is_none() || nets.any(|net| networks.iter().any(|network| network.overlaps(net)))
}

fn chain(chain: &Chain) -> UserChain {
    let place = match chain.hook {
        Hook::Postrouting => Place::Masquerade,
        Hook::Forward => Place::Forward,
    };
    let comment = place.comment();
    let jump = format!("-m comment --comment \"{comment}\" -j {}", place.chain());
    UserChain { place, jumps: vec![jump], rules: chain.rules.iter().map(|r| rule(r, comment)).collect() }
}

fn rule(rule: &Rule, comment: &str) -> String {
    let mut text = String::new();
    for condition in &rule.matches {
        let (not, words) = match condition {
            Match::Source { net, not } => (*not, format!("-s {net} ")),
            Match::Destination { net, not } => (*not, format!("-d {net} ")),
            Match::Mark(bits) => (false, format!("-m mark --mark {bits:#x}/{bits:#x} ")),
        };
        text.push_str(if not { "! " } else { "" });
        text.push_str(&words);
    }
    let target = match rule.verdict {
        Verdict::Accept => "ACCEPT",
        Verdict::Return => "RETURN",
        Verdict::Masquerade { fully_random: true } => "MASQUERADE --random-fully",
        Verdict::Masquerade { fully_random: false } => "MASQUERADE",
    };
    format!("{text}-m comment --comment \"{comment}\" -j {target}")
}

impl fmt::Display for Iptables {
    /// Renders the chains as `iptables -S` does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for UserChain { place, jumps, rules } in &self.chains {
            for jump in jumps {
                writeln!(f, "-A {} {jump}", place.base())?;
            }
            writeln!(f, "-N {}", place.chain())?;
            for rule in rules {
                writeln!(f, "-A {} {rule}", place.chain())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Flavour, TrafficConfig, rulesets};
    use super::*;
    use crate::net::PerFamily;
    use expect_test::expect;

    const ALL: TrafficConfig =
        TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: Flavour::Iptables(Variant::Nft) };

    fn wanted(config: TrafficConfig) -> Iptables {
        let networks = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: None };
        let mine = PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: None };
        Iptables::new(&rulesets(config, &networks, &mine)[0], Variant::Nft)
    }

    fn networks() -> Vec<Subnet> {
        vec!["10.244.0.0/16".parse().unwrap()]
    }

    fn nothing() -> Vec<(Place, Saved)> {
        [parse_save("nat", ""), parse_save("filter", "")].concat()
    }

    #[test]
    fn rules_match_upstream() {
        expect![[r#"
            -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
            -N FLANNEL-POSTRTG
            -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
            -A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
            -A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
            -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
            -A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
            -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
            -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
            -N FLANNEL-FWD
            -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
        "#]]
        .assert_eq(&wanted(ALL).to_string());
    }

    #[test]
    fn missing_rules_are_created_in_one_step_per_table() {
        expect![[r#"
            *filter
            :FLANNEL-FWD - [0:0]
            -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
            COMMIT
        "#]]
        .assert_eq(&restore(&wanted(TrafficConfig { masquerade: false, ..ALL }), &nothing(), &networks()));
    }

    /// Output of `iptables-save` with a rule of another flanneld, a duplicate jump and a wrong verdict.
    const BROKEN: &str = r#"*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [7:7]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FORWARD -s 1.2.3.4/32 -j ACCEPT
-A FORWARD -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.7.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j DROP
COMMIT
"#;

    #[test]
    fn foreign_rules_are_kept_and_wrong_rules_replaced() {
        let saved = [parse_save("nat", ""), parse_save("filter", BROKEN)].concat();
        let found = Iptables::read(Family::V4, Variant::Nft, &saved, &networks()).unwrap();
        assert_eq!(found.chains[0].rules, [r#"-s 10.244.0.0/16 -m comment --comment "flanneld forward" -j DROP"#]);
        expect![[r#"
            *filter
            :FLANNEL-FWD - [0:0]
            -A FLANNEL-FWD -s 10.7.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -D FORWARD -j FLANNEL-FWD
            COMMIT
        "#]]
        .assert_eq(&restore(&wanted(TrafficConfig { masquerade: false, ..ALL }), &saved, &networks()));
        // On removal, a rule of another flanneld keeps the chain.
        let none = Iptables { chains: Vec::new(), ..found };
        expect![[r#"
            *filter
            :FLANNEL-FWD - [0:0]
            -A FLANNEL-FWD -s 10.7.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            COMMIT
        "#]]
        .assert_eq(&restore(&none, &saved, &networks()));
    }

    #[test]
    fn jump_goes_before_the_rule_that_stops_every_packet() {
        let want = wanted(TrafficConfig { masquerade: false, ..ALL });
        let restored = |base: &str| {
            let chain = "-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n";
            let text = format!(
                ":FORWARD ACCEPT [0:0]\n:FLANNEL-FWD - [0:0]\n:STOP - [0:0]\n:SOME - [0:0]\n{base}{chain}-A STOP -j REJECT --reject-with icmp-port-unreachable\n-A SOME -i eth9 -j DROP\n-A SOME -j DROP\n"
            );
            let saved = [parse_save("nat", ""), parse_save("filter", &text)].concat();
            let read = Iptables::read(Family::V4, Variant::Nft, &saved, &networks()).unwrap();
            let text = restore(&want, &saved, &networks());
            assert_eq!(text.is_empty(), read == want, "what differs is written, and nothing else: {base}");
            text.lines().filter(|line| line.contains(" FORWARD ")).map(|line| format!("{line}\n")).collect::<String>()
        };
        let jump = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";
        // CentOS: connections that exist pass, all others are rejected.
        let established = "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
        let reject = "-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n";
        expect![[r#"
            -D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
            -I FORWARD 2 -m comment --comment "flanneld forward" -j FLANNEL-FWD
        "#]]
        .assert_eq(&restored(&format!("{established}{reject}{jump}")));
        expect![[r#"
            -I FORWARD 1 -m comment --comment "flanneld forward" -j FLANNEL-FWD
        "#]]
        .assert_eq(&restored("-A FORWARD -m comment --comment \"all gone\" -j STOP\n"));
        // The jump is where it works. Network policies of other programs stay before it.
        for before in [
            "",
            established,
            "-A FORWARD -m comment --comment cali:x -j cali-FORWARD\n",
            "-A FORWARD -i eth9 -j DROP\n",
            "-A FORWARD -j SOME\n",
        ] {
            assert_eq!(restored(&format!("{before}{jump}{reject}")), "", "{before}");
        }
    }

    #[test]
    fn correct_rules_are_left_unchanged() {
        let want = wanted(ALL);
        let text = |place: Place| {
            let shown = want.to_string();
            let lines = shown.lines().filter(|line| line.contains(place.chain())).map(|line| line.replace("-N ", ":"));
            lines.collect::<Vec<_>>().join("\n")
        };
        let saved = [parse_save("nat", &text(Place::Masquerade)), parse_save("filter", &text(Place::Forward))].concat();
        let read = Iptables::read(Family::V4, Variant::Nft, &saved, &networks()).unwrap();
        assert_eq!(read, want);
        assert_eq!(restore(&want, &saved, &networks()), "");
        let gone = restore(&Iptables { chains: Vec::new(), ..read }, &saved, &networks());
        assert!(gone.contains("-F FLANNEL-POSTRTG\n-X FLANNEL-POSTRTG\n") && gone.contains("-D FORWARD -m comment"), "{gone}");
    }

    #[test]
    fn two_flannelds_on_a_host_converge() {
        let theirs = {
            let networks = PerFamily { v4: "10.7.0.0/16".parse().ok(), v6: None };
            let mine = PerFamily { v4: "10.7.1.0/24".parse().ok(), v6: None };
            Iptables::new(&rulesets(ALL, &networks, &mine)[0], Variant::Nft)
        };
        let their_networks = vec!["10.7.0.0/16".parse().unwrap()];
        // Applies a restore, and returns the tables as iptables-save would print them.
        let apply = |wanted: &Iptables, networks: &[Subnet], saved: &[(Place, Saved)]| {
            let text = restore(wanted, saved, networks);
            let nat: String = text.split("*filter").next().unwrap_or_default().to_owned();
            let filter = text.strip_prefix(&nat).unwrap_or_default().to_owned();
            let kept = |table: &str, place: Place| {
                saved
                    .iter()
                    .filter(|(p, _)| p.table() == table && *p == place)
                    .flat_map(|(_, s)| s.jumps.clone())
                    .map(|j| format!("-A {} {j}\n", place.base()))
                    .collect::<String>()
            };
            [parse_save("nat", &(kept("nat", Place::Masquerade) + &nat)), parse_save("filter", &(kept("filter", Place::Forward) + &filter))]
                .concat()
        };
        let first = apply(&wanted(ALL), &networks(), &nothing());
        let second = apply(&theirs, &their_networks, &first);
        assert_eq!(restore(&wanted(ALL), &second, &networks()), "", "the second flanneld does not undo the rules of the first");
        assert_eq!(restore(&theirs, &second, &their_networks), "");
        let marks = second[0].1.rules.iter().filter(|rule| rule.contains("--mark")).count();
        assert_eq!((marks, second[0].1.rules.len()), (1, 11));
    }

    #[test]
    fn chain_with_foreign_rules_only_is_ignored() {
        let text = BROKEN.replace("-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j DROP\n", "");
        let saved = parse_save("filter", &text);
        assert_eq!(Iptables::read(Family::V4, Variant::Nft, &saved, &networks()), None);
        assert!(
            Iptables::read(Family::V4, Variant::Nft, &parse_save("filter", ":FLANNEL-FWD - [0:0]"), &networks()).is_some(),
            "an empty chain is a leftover"
        );
    }
}
