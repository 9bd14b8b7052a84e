//! Reads FORWARD of ip_tables, and extensions that iptables uses in nf_tables too (`linux/netfilter/x_tables.h`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel::check::filter::{BaseChain, Condition, FilterRule, Sense, Tool, Verdict};
use flannel::traffic::iptables::Variant;
use flannel::{Family, Subnet};

use crate::iptables::legacy::{self, Rule};
use crate::netlink::{NetlinkError, ip_in, str_in, u16_at, u32_at};

/// FORWARD of table filter; `None` if ip_tables does not have the table.
pub(super) fn forward(family: Family) -> Result<Option<BaseChain>, NetlinkError> {
    let Some(table) = legacy::filter_table(family)? else { return Ok(None) };
    let convert = |rules: &[Rule<'_>]| -> Vec<FilterRule> {
        let convert =
            |(number, rule): (u64, &Rule<'_>)| FilterRule { number, conditions: conditions(family, rule), verdict: verdict(family, rule) };
        (1..).zip(rules).map(convert).collect()
    };
    let chains = table.chains();
    let called: BTreeMap<String, Vec<FilterRule>> = chains.called.iter().map(|(name, rules)| (name.clone(), convert(rules))).collect();
    Ok(Some(BaseChain {
        tool: Tool::Iptables(Variant::Legacy),
        table: "filter".to_owned(),
        name: "FORWARD".to_owned(),
        drops_by_policy: chains.drops_by_policy,
        rules: convert(&chains.forward),
        called,
    }))
}

/// Whether kube-proxy has chains in ip_tables.
pub(super) fn has_kube_proxy() -> bool {
    Family::ALL.into_iter().any(|family| legacy::has_chain(family, "nat", "KUBE-SERVICES"))
}

fn verdict(family: Family, rule: &Rule<'_>) -> Verdict {
    const DROP: i32 = -1;
    const ACCEPT: i32 = -2;
    const RETURN: i32 = -5;
    match (&rule.jump, rule.standard) {
        (Some(chain), _) if rule.is_goto(family) => Verdict::Goto(chain.clone()),
        (Some(chain), _) => Verdict::Call(chain.clone()),
        (None, Some(DROP)) => Verdict::Drop,
        (None, Some(ACCEPT)) => Verdict::Accept,
        (None, Some(RETURN)) => Verdict::Return,
        // A rule without a target goes on with the next one.
        (None, Some(0..)) => Verdict::Continue,
        (None, Some(_)) => Verdict::Unknown,
        (None, None) => target(rule.target),
    }
}

fn conditions(family: Family, rule: &Rule<'_>) -> Vec<Condition> {
    const VIA_IN: u8 = 1;
    const VIA_OUT: u8 = 2;
    const SOURCE: u8 = 8;
    const DESTINATION: u8 = 0x10;
    const PROTOCOL: u8 = 0x40;
    // struct ipt_ip and struct ip6t_ip6: source, destination and their masks, names and their masks, protocol, flags.
    let (len, inverted, protocol) = match family {
        Family::V4 => (4, 83, 80),
        Family::V6 => (16, 132, 128),
    };
    let header = rule.header;
    let part = |at: usize, len: usize| header.get(at..at + len).unwrap_or_default();
    let inverted = header.get(inverted).copied().unwrap_or(0xff);
    let sense = |flag: u8| Sense::negated(inverted & flag != 0);
    let mut found = Vec::new();
    for (at, flag) in [(0, SOURCE), (len, DESTINATION)] {
        match prefix(part(at, len), part(at + 2 * len, len)) {
            Some(net) if net.prefix_len() == 0 && inverted & flag == 0 => {}
            Some(net) if flag == SOURCE => found.push(Condition::Source(net, sense(flag))),
            Some(net) => found.push(Condition::Destination(net, sense(flag))),
            None => found.push(Condition::Unknown),
        }
    }
    for (at, flag) in [(4 * len, VIA_IN), (4 * len + 16, VIA_OUT)] {
        let (name, mask) = (part(at, 16), part(at + 32, 16));
        let length = mask.iter().take_while(|byte| **byte != 0).count();
        if length == 0 {
            continue;
        }
        let name = &name[..length];
        let text = str_in(name).unwrap_or_default().to_owned();
        let names = vec![if name.contains(&0) { text } else { format!("{text}*") }];
        found.push(if flag == VIA_IN { Condition::Input(names, sense(flag)) } else { Condition::Output(names, sense(flag)) });
    }
    let known = VIA_IN | VIA_OUT | SOURCE | DESTINATION;
    if part(protocol, 2) != [0, 0] || inverted & !known & !PROTOCOL != 0 {
        found.push(Condition::Unknown);
    }
    found.extend(rule.matches.iter().filter_map(|(name, revision, info)| extension(name, (*revision).into(), info)));
    found
}

fn prefix(address: &[u8], mask: &[u8]) -> Option<Subnet> {
    let bits = |bytes: &[u8]| ip_in(bytes).map(flannel::net::bits_of);
    let ip: IpAddr = ip_in(address)?;
    let (mask, width) = (bits(mask)?, u32::from(Family::of(ip).bits()));
    let len = mask.count_ones();
    // Ones first, then zeros.
    let is_prefix = len == 0 || mask.trailing_zeros() == width - len;
    is_prefix.then(|| Subnet::new(ip, u8::try_from(len).ok()?).ok())?
}

/// A match extension; `None` if it is true for every packet.
pub(super) fn extension(name: &str, revision: u32, info: &[u8]) -> Option<Condition> {
    /// `XT_CONNTRACK_STATE`
    const BY_STATE: u16 = 1;
    /// `XT_CONNTRACK_STATE_ALIAS`: the rule was written as `-m state`.
    const ALIAS: u16 = 1 << 13;
    let state = |bits: u32, negated| Condition::State(from_xtables(bits), Sense::negated(negated));
    match (name, revision) {
        ("comment", _) => None,
        ("state", _) => Some(u32_at(info, 0).map_or(Condition::Unknown, |bits| state(bits, false))),
        // struct xt_conntrack_mtinfo2 and …3: eight addresses, two times, protocol, four ports, flags, inverted flags, state.
        ("conntrack", 2 | 3) => {
            let field = |at| u16_at(info, at);
            let (Some(flags), Some(inverted), Some(bits)) = (field(146), field(148), field(150)) else { return Some(Condition::Unknown) };
            Some(if flags & !ALIAS == BY_STATE { state(bits.into(), inverted & BY_STATE != 0) } else { Condition::Unknown })
        }
        ("mark", 1) => {
            let (Some(mark), Some(mask)) = (u32_at(info, 0), u32_at(info, 4)) else { return Some(Condition::Unknown) };
            let is_inverted = info.get(8) == Some(&1);
            Some(if mark == mask { Condition::Mark(mask, Sense::negated(is_inverted)) } else { Condition::Unknown })
        }
        _ => Some(Condition::Unknown),
    }
}

/// The state bits of x_tables are those of nf_tables: invalid, established, related, new, untracked.
fn from_xtables(bits: u32) -> u32 {
    bits & 0x7f
}

/// A target extension.
pub(super) fn target(name: &str) -> Verdict {
    match name {
        "REJECT" => Verdict::Reject,
        "LOG" | "NFLOG" | "TRACE" | "TCPMSS" | "MARK" | "CONNMARK" | "CT" | "SET" | "DSCP" | "TOS" | "CLASSIFY" => Verdict::Continue,
        _ => Verdict::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_that_are_no_prefix_are_unknown() {
        let show = |address: [u8; 4], mask: [u8; 4]| prefix(&address, &mask).map(|net| net.to_string());
        assert_eq!(show([10, 244, 0, 0], [255, 255, 0, 0]).as_deref(), Some("10.244.0.0/16"));
        assert_eq!(show([0; 4], [0; 4]).as_deref(), Some("0.0.0.0/0"));
        assert_eq!(show([10, 0, 0, 1], [255, 0, 0, 255]), None);
        assert_eq!(prefix(&[0; 16], &[0; 16]).map(|net| net.to_string()).as_deref(), Some("::/0"));
    }

    #[test]
    fn short_extensions_are_unknown() {
        assert_eq!(extension("comment", 0, &[]), None);
        for name in ["conntrack", "state", "mark", "tcp"] {
            assert_eq!(extension(name, 3, &[1]), Some(Condition::Unknown), "{name}");
        }
        assert_eq!(extension("state", 0, &6u32.to_ne_bytes()), Some(Condition::State(6, Sense::Is)));
    }
}
