//! Reads nf_tables' chains for forwarded packets, of every table. An expression that is not understood makes its rule's condition, or
//! verdict, unknown.

use std::collections::{BTreeMap, BTreeSet};

use flannel::check::filter::{BaseChain, Condition, Filter, FilterRule, Sense, Tool, Verdict};
use flannel::traffic::iptables::Variant;
use flannel::traffic::table_name;
use flannel::{Family, IfName, PerFamily, Subnet};

use crate::addr::family_number;
use crate::netlink::{NetlinkError, Socket, attrs, ip_in, str_in, u32_at};
use crate::nft;

const GETCHAIN: u16 = 4;
const GETSETELEM: u16 = 13;
const NFPROTO_INET: u8 = 1;
const HOOK_FORWARD: u32 = 2;
/// Chains of one table that are followed.
const CHAINS: usize = 200;

/// Forward chains of nf_tables.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) chains: PerFamily<Filter>,
    pub(super) has_kube_proxy: bool,
}

/// A base chain as the kernel lists it.
struct Listed {
    proto: u8,
    table: String,
    name: String,
    /// Whether it sees forwarded packets.
    forwards: bool,
    drops: bool,
}

pub(super) fn read(socket: &mut Socket, names: &BTreeMap<u32, IfName>) -> Result<Found, NetlinkError> {
    let listed = socket.dump(
        nft::kind(GETCHAIN),
        |body| {
            body.bytes(&[0; 4]);
        },
        list_chain,
    )?;
    let has_kube_proxy = listed.iter().any(|chain| chain.name == "KUBE-SERVICES" || chain.table == "kube-proxy");
    let mut found = Found { has_kube_proxy, ..Found::default() };
    for family in Family::ALL {
        let concerns = |chain: &&Listed| chain.forwards && (chain.proto == NFPROTO_INET || chain.proto == family_number(family));
        let mut filter = Filter::default();
        for chain in listed.iter().filter(concerns).filter(|chain| chain.table != table_name(family)) {
            filter.chains.push(base_chain(socket, chain, family, names)?);
        }
        found.chains.set(family, (!filter.chains.is_empty()).then_some(filter));
    }
    Ok(found)
}

fn list_chain(body: &[u8]) -> Option<Listed> {
    let (proto, bytes) = (*body.first()?, body.get(4..)?);
    let text = |kind| nft::find(bytes, kind).and_then(str_in).map(ToOwned::to_owned);
    let (table, name) = (text(nft::TABLE)?, text(nft::CHAIN_NAME)?);
    let hook = nft::find(bytes, nft::CHAIN_HOOK).and_then(|hook| nft::be_in(hook, nft::HOOK_NUM));
    let forwards = hook == Some(HOOK_FORWARD) && nft::find(bytes, nft::CHAIN_TYPE).and_then(str_in) == Some("filter");
    let is_wanted = forwards || name == "KUBE-SERVICES" || table == "kube-proxy";
    let drops = nft::be_in(bytes, nft::CHAIN_POLICY) == Some(nft::NF_DROP);
    is_wanted.then_some(Listed { proto, table, name, forwards, drops })
}

fn base_chain(socket: &mut Socket, chain: &Listed, family: Family, names: &BTreeMap<u32, IfName>) -> Result<BaseChain, NetlinkError> {
    let is_iptables = chain.proto != NFPROTO_INET && chain.name == "FORWARD";
    let tool = match (is_iptables, chain.proto) {
        (true, _) => Tool::Iptables(Variant::Nft),
        (false, NFPROTO_INET) => Tool::Nft("inet"),
        (false, _) => Tool::Nft(if family == Family::V4 { "ip" } else { "ip6" }),
    };
    let mut reader = Reader { proto: chain.proto, table: &chain.table, family, names, by_position: is_iptables, sets: BTreeMap::new() };
    let rules = reader.rules(socket, &chain.name)?;
    let (mut called, mut seen) = (BTreeMap::new(), BTreeSet::new());
    let mut pending = targets(&rules);
    while let Some(name) = pending.pop() {
        if called.len() < CHAINS && seen.insert(name.clone()) {
            let rules = reader.rules(socket, &name)?;
            pending.extend(targets(&rules));
            called.insert(name, rules);
        }
    }
    Ok(BaseChain { tool, table: chain.table.clone(), name: chain.name.clone(), drops_by_policy: chain.drops, rules, called })
}

fn targets(rules: &[FilterRule]) -> Vec<String> {
    let chain = |rule: &FilterRule| match &rule.verdict {
        Verdict::Call(chain) | Verdict::Goto(chain) => Some(chain.clone()),
        _ => None,
    };
    rules.iter().filter_map(chain).collect()
}

struct Reader<'a> {
    proto: u8,
    table: &'a str,
    family: Family,
    names: &'a BTreeMap<u32, IfName>,
    /// Whether rules are named by their place in the chain, as iptables does.
    by_position: bool,
    /// Elements of the table's sets that were asked for; `None` if they are not single values.
    sets: BTreeMap<String, Option<Vec<Vec<u8>>>>,
}

impl Reader<'_> {
    fn rules(&mut self, socket: &mut Socket, chain: &str) -> Result<Vec<FilterRule>, NetlinkError> {
        let header = [self.proto, 0, 0, 0];
        let table = self.table;
        let dump = socket.dump(
            nft::kind(nft::GETRULE),
            |body| {
                body.bytes(&header).attr_str(nft::TABLE, table).attr_str(nft::RULE_CHAIN, chain);
            },
            |body| {
                let bytes = body.get(4..)?;
                let is_there = nft::find(bytes, nft::TABLE).and_then(str_in) == Some(table)
                    && nft::find(bytes, nft::RULE_CHAIN).and_then(str_in) == Some(chain);
                let handle = nft::find(bytes, nft::RULE_HANDLE).and_then(|handle| handle.try_into().ok()).map_or(0, u64::from_be_bytes);
                is_there.then(|| (handle, nft::find(bytes, nft::RULE_EXPRESSIONS).unwrap_or_default().to_vec()))
            },
        );
        let raw = match dump {
            Err(error) if error.is_not_found() => Vec::new(),
            other => other?,
        };
        let mut rules = Vec::new();
        for (place, (handle, expressions)) in (1..).zip(raw) {
            self.read_sets(socket, &expressions)?;
            let (conditions, verdict) = self.decode(&expressions);
            rules.push(FilterRule { number: if self.by_position { place } else { handle }, conditions, verdict });
        }
        Ok(rules)
    }

    /// Reads the sets that a rule looks up.
    fn read_sets(&mut self, socket: &mut Socket, expressions: &[u8]) -> Result<(), NetlinkError> {
        for (_, element) in attrs(expressions) {
            let Some(name) = looked_up(element).filter(|name| !self.sets.contains_key(*name)) else { continue };
            let (header, table) = ([self.proto, 0, 0, 0], self.table);
            let lists = socket.dump(
                nft::kind(GETSETELEM),
                |body| {
                    body.bytes(&header).attr_str(1, table).attr_str(2, name);
                },
                |body| Some(nft::find(body.get(4..)?, 3)?.to_vec()),
            );
            let values = match lists {
                Err(error) if error.is_not_found() => None,
                other => other?.iter().flat_map(|list| attrs(list).map(|(_, element)| single_value(element)).collect::<Vec<_>>()).collect(),
            };
            self.sets.insert(name.to_owned(), values);
        }
        Ok(())
    }

    /// Decodes the expressions of a rule.
    fn decode(&self, expressions: &[u8]) -> (Vec<Condition>, Verdict) {
        let (mut conditions, mut loads, mut mask) = (Vec::new(), Vec::new(), None);
        for (_, element) in attrs(expressions) {
            let name = nft::find(element, nft::EXPR_NAME).and_then(str_in).unwrap_or_default();
            let data = nft::find(element, nft::EXPR_DATA).unwrap_or_default();
            match name {
                "counter" | "log" | "notrack" | "dynset" | "objref" | "dup" | "flow_offload" => {}
                "meta" | "ct" | "payload" | "fib" | "rt" | "socket" | "exthdr" | "hash" | "numgen" | "osf" | "tunnel" | "xfrm"
                    if is_load(name, data) =>
                {
                    loads.push(self.load(name, data));
                }
                // Sets a mark or a field.
                "meta" | "ct" | "payload" | "exthdr" => {}
                "bitwise" => mask = Some(mask_in(data)),
                "cmp" => {
                    let load = loads.pop().filter(|_| loads.is_empty()).unwrap_or(Load::Unknown);
                    loads.clear();
                    conditions.push(self.compare(load, mask.take(), data));
                }
                "lookup" => {
                    let load = loads.pop().filter(|_| loads.is_empty() && mask.is_none()).unwrap_or(Load::Unknown);
                    loads.clear();
                    if nft::find(data, 3).is_some() {
                        return (conditions, Verdict::Unknown);
                    }
                    conditions.push(self.member(load, data));
                }
                "match" => conditions.extend(extension(data)),
                "target" => match target(data) {
                    Verdict::Continue => {}
                    verdict => return (conditions, verdict),
                },
                "reject" => return (conditions, Verdict::Reject),
                "immediate" => match verdict_in(data) {
                    None | Some(Verdict::Continue) => {}
                    Some(verdict) => return (conditions, verdict),
                },
                "limit" | "quota" | "connlimit" | "range" => conditions.push(Condition::Unknown),
                _ => return (conditions, Verdict::Unknown),
            }
        }
        (conditions, Verdict::Continue)
    }

    fn load(&self, name: &str, data: &[u8]) -> Load {
        let (source, destination) = match self.family {
            Family::V4 => (12, 16),
            Family::V6 => (8, 24),
        };
        match (name, nft::be_in(data, 2)) {
            ("meta", Some(1 | 15)) => Load::Family,
            ("meta", Some(3)) => Load::Mark,
            ("meta", Some(4)) => Load::InputIndex,
            ("meta", Some(5)) => Load::OutputIndex,
            ("meta", Some(6)) => Load::Input,
            ("meta", Some(7)) => Load::Output,
            ("ct", Some(0)) => Load::State,
            ("payload", Some(1)) if nft::be_in(data, 3) == Some(source) => Load::Source,
            ("payload", Some(1)) if nft::be_in(data, 3) == Some(destination) => Load::Destination,
            _ => Load::Unknown,
        }
    }

    fn compare(&self, load: Load, mask: Option<Option<Vec<u8>>>, data: &[u8]) -> Condition {
        let negated = match nft::be_in(data, 2) {
            Some(0) => false,
            Some(1) => true,
            _ => return Condition::Unknown,
        };
        let Some(value) = nft::find(data, 3).and_then(|value| nft::find(value, nft::DATA_VALUE)) else { return Condition::Unknown };
        let sense = Sense::negated(negated);
        match (load, mask) {
            (Load::Source | Load::Destination, mask) => match self.prefix(value, mask) {
                Some(net) if load == Load::Source => Condition::Source(net, sense),
                Some(net) => Condition::Destination(net, sense),
                None => Condition::Unknown,
            },
            (Load::State | Load::Mark, Some(Some(mask))) => {
                let (Some(bits), Some(value)) = (u32_at(&mask, 0), u32_at(value, 0)) else { return Condition::Unknown };
                // "& bits != 0" and "& bit == bit" have the same meaning for one bit.
                let sense = match (value, negated) {
                    (0, negated) => Sense::negated(!negated),
                    (value, negated) if value == bits && bits.is_power_of_two() => Sense::negated(negated),
                    _ => return Condition::Unknown,
                };
                if load == Load::State { Condition::State(bits, sense) } else { Condition::Mark(bits, sense) }
            }
            (load, None) => self.equals(load, std::slice::from_ref(&value), sense),
            _ => Condition::Unknown,
        }
    }

    /// The condition that a loaded value is one of these.
    fn equals<V: AsRef<[u8]>>(&self, load: Load, values: &[V], sense: Sense) -> Condition {
        let names = |name: &dyn Fn(&[u8]) -> Option<String>| values.iter().map(|value| name(value.as_ref())).collect::<Option<Vec<_>>>();
        let by_index = |value: &[u8]| self.names.get(&u32_at(value, 0)?).map(ToString::to_string);
        let condition = match load {
            Load::Input => names(&interface_name).map(|names| Condition::Input(names, sense)),
            Load::Output => names(&interface_name).map(|names| Condition::Output(names, sense)),
            Load::InputIndex => names(&by_index).map(|names| Condition::Input(names, sense)),
            Load::OutputIndex => names(&by_index).map(|names| Condition::Output(names, sense)),
            Load::State => {
                let bits = values.iter().map(|value| u32_at(value.as_ref(), 0)).try_fold(0, |all, bits| Some(all | bits?));
                bits.map(|bits| Condition::State(bits, sense))
            }
            Load::Family => match values {
                [value] => family_in(value.as_ref()).map(|family| Condition::Family(family, sense)),
                _ => None,
            },
            Load::Mark | Load::Source | Load::Destination | Load::Unknown => None,
        };
        condition.unwrap_or(Condition::Unknown)
    }

    fn member(&self, load: Load, data: &[u8]) -> Condition {
        let values = nft::find(data, 1).and_then(str_in).and_then(|name| self.sets.get(name)).and_then(Option::as_ref);
        let sense = Sense::negated(nft::be_in(data, 5).is_some_and(|flags| flags & 1 != 0));
        values.map_or(Condition::Unknown, |values| self.equals(load, values, sense))
    }

    /// A prefix: a value of fewer bytes than an address means its first bytes.
    fn prefix(&self, value: &[u8], mask: Option<Option<Vec<u8>>>) -> Option<Subnet> {
        let full = usize::from(self.family.bits() / 8);
        let len = match mask {
            None => value.len() * 8,
            Some(mask) => {
                let mask = mask?;
                let ones: u32 = mask.iter().map(|byte| byte.leading_ones()).sum();
                let is_prefix = mask.iter().map(|byte| byte.count_ones()).sum::<u32>() == ones
                    && mask.windows(2).all(|pair| pair[0] == 0xff || pair[1] == 0);
                is_prefix.then_some(usize::try_from(ones).ok()?)?
            }
        };
        let mut bytes = value.to_vec();
        bytes.resize(full, 0);
        Subnet::new(ip_in(&bytes)?, u8::try_from(len).ok()?).ok()
    }
}

/// A field that was loaded into a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    Source,
    Destination,
    Input,
    Output,
    InputIndex,
    OutputIndex,
    State,
    Mark,
    Family,
    Unknown,
}

/// Whether the expression loads a field, rather than sets one: it has a destination register.
fn is_load(name: &str, data: &[u8]) -> bool {
    match name {
        "meta" | "ct" | "payload" => nft::find(data, 1).is_some(),
        "exthdr" => nft::find(data, 1).is_some(),
        _ => true,
    }
}

/// The mask of a bitwise expression without exclusive-or; `Some(None)` for another operation.
fn mask_in(data: &[u8]) -> Option<Vec<u8>> {
    const OPERATION: u16 = 6;
    let plain = nft::be_in(data, OPERATION).is_none_or(|operation| operation == 0);
    let xor = nft::find(data, 5).and_then(|xor| nft::find(xor, nft::DATA_VALUE))?;
    let mask = nft::find(data, 4).and_then(|mask| nft::find(mask, nft::DATA_VALUE))?;
    (plain && xor.iter().all(|byte| *byte == 0)).then(|| mask.to_vec())
}

fn interface_name(value: &[u8]) -> Option<String> {
    // A value without a terminating zero is a prefix of the name.
    let text = str_in(value)?.to_owned();
    Some(if value.contains(&0) { text } else { format!("{text}*") })
}

fn family_in(value: &[u8]) -> Option<Family> {
    match value {
        [2] | [8, 0] => Some(Family::V4),
        [10] | [0x86, 0xdd] => Some(Family::V6),
        _ => None,
    }
}

/// The set that an expression looks up.
fn looked_up(element: &[u8]) -> Option<&str> {
    let is_lookup = nft::find(element, nft::EXPR_NAME).and_then(str_in) == Some("lookup");
    nft::find(element, nft::EXPR_DATA).filter(|_| is_lookup).and_then(|data| nft::find(data, 1)).and_then(str_in)
}

/// The key of an element that is a single value.
fn single_value(element: &[u8]) -> Option<Vec<u8>> {
    const KEY: u16 = 1;
    const FLAGS: u16 = 3;
    let is_plain = nft::be_in(element, FLAGS).unwrap_or(0) == 0;
    Some(nft::find(element, KEY).filter(|_| is_plain).and_then(|key| nft::find(key, nft::DATA_VALUE))?.to_vec())
}

fn verdict_in(data: &[u8]) -> Option<Verdict> {
    // Any other register holds a value, not a verdict.
    let verdict = nft::find(data, 2).filter(|_| nft::be_in(data, 1) == Some(0)).and_then(|data| nft::find(data, nft::DATA_VERDICT))?;
    let chain = || nft::find(verdict, nft::VERDICT_CHAIN).and_then(str_in).unwrap_or_default().to_owned();
    Some(match nft::be_in(verdict, nft::VERDICT_CODE)?.cast_signed() {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        -1 => Verdict::Continue,
        -3 => Verdict::Call(chain()),
        -4 => Verdict::Goto(chain()),
        -5 => Verdict::Return,
        _ => Verdict::Unknown,
    })
}

/// A match extension of iptables; `None` for a comment.
fn extension(data: &[u8]) -> Option<Condition> {
    let name = nft::find(data, 1).and_then(str_in).unwrap_or_default();
    super::legacy::extension(name, nft::be_in(data, 2).unwrap_or(0), nft::find(data, 3).unwrap_or_default())
}

/// A target extension of iptables.
fn target(data: &[u8]) -> Verdict {
    super::legacy::target(nft::find(data, 1).and_then(str_in).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader<'a>(names: &'a BTreeMap<u32, IfName>) -> Reader<'a> {
        Reader { proto: 2, table: "filter", family: Family::V4, names, by_position: true, sets: BTreeMap::new() }
    }

    #[test]
    fn prefixes_of_any_form_are_read() {
        let names = BTreeMap::new();
        let reader = reader(&names);
        let prefix =
            |value: &[u8], mask: Option<&[u8]>| reader.prefix(value, mask.map(|mask| Some(mask.to_vec()))).map(|net| net.to_string());
        assert_eq!(prefix(&[10, 244], None).as_deref(), Some("10.244.0.0/16"));
        assert_eq!(prefix(&[10, 244, 2, 0], Some(&[255, 255, 254, 0])).as_deref(), Some("10.244.2.0/23"));
        assert_eq!(prefix(&[10, 244, 2, 1], None).as_deref(), Some("10.244.2.1/32"));
        assert_eq!(prefix(&[10, 0, 0, 1], Some(&[255, 0, 0, 255])), None, "no prefix");
        assert_eq!(reader.prefix(&[10, 0, 0, 0], Some(None)), None, "another operation");
    }

    #[test]
    fn interface_names_may_be_prefixes() {
        assert_eq!(interface_name(b"cni0\0\0\0\0\0\0\0\0\0\0\0\0").as_deref(), Some("cni0"));
        assert_eq!(interface_name(b"cali").as_deref(), Some("cali*"));
    }

    #[test]
    fn garbled_rules_are_unknown() {
        let names = BTreeMap::new();
        let reader = reader(&names);
        assert_eq!(reader.decode(&[]), (vec![], Verdict::Continue));
        // An expression without a name.
        assert_eq!(reader.decode(&[8, 0, 1, 0, 1, 2, 3, 4]), (vec![], Verdict::Unknown));
    }
}
