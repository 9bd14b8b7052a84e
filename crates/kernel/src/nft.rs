//! Reads and writes nf_tables by netlink (`linux/netfilter/nf_tables.h`), without running `nft`. A table is replaced in one transaction
//! and read rule by rule.

mod shared;

use std::net::IpAddr;

use flannel::net::bits_of;
use flannel::traffic::{Chain, Hook, Match, Rule, Ruleset, Verdict, table_name};
use flannel::{Family, Subnet};

use crate::netlink::{Batch, Body, CREATE, NetlinkError, Socket, attrs, ip_in, str_in};

pub(crate) use shared::{
    Jump, encode_chain, encode_dnat, encode_input_interface, encode_jump, encode_local_destination, encode_port, encode_source_mac,
    encode_translated, encode_verdict, is_without_nf_tables, open,
};

pub(crate) const SUBSYSTEM: u16 = 10;
pub(crate) const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
pub(crate) const DELTABLE: u16 = 2;
pub(crate) const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
pub(crate) const DELCHAIN: u16 = 5;
pub(crate) const NEWRULE: u16 = 6;
pub(crate) const GETRULE: u16 = 7;
pub(crate) const DELRULE: u16 = 8;

/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE` and `NFTA_RULE_TABLE` have the same number.
pub(crate) const TABLE: u16 = 1;
pub(crate) const TABLE_USERDATA: u16 = 6;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const CHAIN_HOOK: u16 = 4;
pub(crate) const CHAIN_POLICY: u16 = 5;
pub(crate) const CHAIN_TYPE: u16 = 7;
const CHAIN_USERDATA: u16 = 12;
pub(crate) const HOOK_NUM: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_HANDLE: u16 = 3;
pub(crate) const RULE_EXPRESSIONS: u16 = 4;
pub(crate) const RULE_USERDATA: u16 = 7;
const LIST_ELEM: u16 = 1;
pub(crate) const EXPR_NAME: u16 = 1;
pub(crate) const EXPR_DATA: u16 = 2;
pub(crate) const DATA_VALUE: u16 = 1;
pub(crate) const DATA_VERDICT: u16 = 2;
pub(crate) const VERDICT_CODE: u16 = 1;

const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
const NF_ACCEPT: u32 = 1;
pub(crate) const NF_DROP: u32 = 0;
pub(crate) const NFT_RETURN: u32 = (-5i32).cast_unsigned();
const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
pub(crate) const VERDICT_CHAIN: u16 = 2;
const NETWORK_HEADER: u32 = 1;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const RANDOM_FULLY: u32 = 16;

pub(crate) fn kind(message: u16) -> u16 {
    SUBSYSTEM << 8 | message
}

/// `struct nfgenmsg`
fn header(family: Family) -> [u8; 4] {
    [crate::addr::family_number(family), 0, 0, 0]
}

/// Offset and length of the source and destination address in the network header.
fn address_field(family: Family, source: bool) -> (u32, u32) {
    match (family, source) {
        (Family::V4, true) => (12, 4),
        (Family::V4, false) => (16, 4),
        (Family::V6, true) => (8, 16),
        (Family::V6, false) => (24, 16),
    }
}

/// Replaces the daemon's table of the ruleset's family: either the old or the new rules apply to every packet.
///
/// # Errors
/// The error that the kernel returns; then the old rules are in force.
pub fn replace(socket: &mut Socket, ruleset: &Ruleset) -> Result<(), NetlinkError> {
    let (family, table) = (ruleset.family, table_name(ruleset.family));
    let mut batch = Batch::new();
    let add_table = |batch: &mut Batch| {
        let userdata = comment(&format!("rules for {table}"));
        batch.message(kind(NEWTABLE), CREATE, |body| {
            body.bytes(&header(family)).attr_str(TABLE, table).attr(TABLE_USERDATA, &userdata);
        });
    };
    // Adding the table first makes the deletion succeed whether or not it existed.
    add_table(&mut batch);
    batch.message(kind(DELTABLE), 0, |body| {
        body.bytes(&header(family)).attr_str(TABLE, table);
    });
    add_table(&mut batch);
    for chain in &ruleset.chains {
        batch.message(kind(NEWCHAIN), CREATE, |body| {
            body.bytes(&header(family)).attr_str(TABLE, table).attr_str(CHAIN_NAME, &chain.name);
            let (hook, priority, name, text) = match chain.hook {
                Hook::Forward => (2u32, 0u32, "filter", "chain to accept flannel traffic"),
                Hook::Postrouting => (4, 100, "nat", "chain to manage traffic masquerading by flannel"),
            };
            encode_hook(body, hook, priority);
            body.attr(CHAIN_POLICY, &NF_ACCEPT.to_be_bytes()).attr_str(CHAIN_TYPE, name);
            body.attr(CHAIN_USERDATA, &comment(text));
        });
    }
    for chain in &ruleset.chains {
        for rule in &chain.rules {
            // With NLM_F_APPEND and without a position, the kernel appends the rule.
            batch.message(kind(NEWRULE), CREATE | crate::netlink::APPEND, |body| {
                body.bytes(&header(family)).attr_str(TABLE, table).attr_str(RULE_CHAIN, &chain.name);
                body.nest(RULE_EXPRESSIONS, |list| encode_rule(list, rule));
            });
        }
    }
    socket.transaction(SUBSYSTEM, batch)
}

/// Encodes a comment as user data of an object: type 0, length, text with its terminating zero. A text of more than 127 bytes is
/// truncated to nft's limit of 128 bytes.
pub(crate) fn comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(127)];
    let mut userdata = vec![0, u8::try_from(text.len() + 1).expect("the text has at most 127 bytes")];
    userdata.extend(text);
    userdata.push(0);
    userdata
}

/// Deletes the daemon's table of a family.
///
/// # Errors
/// The error that the kernel returns; `is_not_found` when it is not there.
pub fn delete(socket: &mut Socket, family: Family) -> Result<(), NetlinkError> {
    let mut batch = Batch::new();
    batch.message(kind(DELTABLE), 0, |body| {
        body.bytes(&header(family)).attr_str(TABLE, table_name(family));
    });
    socket.transaction(SUBSYSTEM, batch)
}

pub(crate) fn encode_rule(list: &mut Body<'_>, rule: &Rule) {
    rule.matches.iter().for_each(|condition| encode_match(list, condition));
    match rule.verdict {
        Verdict::Masquerade { fully_random } => expression(list, "masq", |masq| {
            if fully_random {
                be(masq, 1, RANDOM_FULLY);
            }
        }),
        Verdict::Accept | Verdict::Return => expression(list, "immediate", |immediate| {
            let code = if rule.verdict == Verdict::Accept { NF_ACCEPT } else { NFT_RETURN };
            be(immediate, 1, REG_VERDICT).nest(2, |data| {
                data.nest(DATA_VERDICT, |verdict| {
                    be(verdict, VERDICT_CODE, code);
                });
            });
        }),
    }
}

pub(crate) fn encode_match(list: &mut Body<'_>, condition: &Match) {
    let (data, mask, value, negated) = match *condition {
        Match::Mark(bits) => {
            expression(list, "meta", |meta| {
                be(meta, 2, META_MARK).attr(1, &REG_1.to_be_bytes());
            });
            // A mark is compared in host byte order.
            (4, bits.to_ne_bytes().to_vec(), bits.to_ne_bytes().to_vec(), false)
        }
        Match::Source { net, not } => address(list, net, true, not),
        Match::Destination { net, not } => address(list, net, false, not),
    };
    expression(list, "bitwise", |bitwise| {
        be(be(be(bitwise, 1, REG_1), 2, REG_1), 3, data);
        bitwise.nest(4, |m| {
            m.attr(DATA_VALUE, &mask);
        });
        bitwise.nest(5, |x| {
            x.attr(DATA_VALUE, &vec![0; mask.len()]);
        });
    });
    expression(list, "cmp", |cmp| {
        be(be(cmp, 1, REG_1), 2, if negated { CMP_NEQ } else { CMP_EQ });
        cmp.nest(3, |v| {
            v.attr(DATA_VALUE, &value);
        });
    });
}

/// Appends the hook and the priority of a base chain.
pub(crate) fn encode_hook(body: &mut Body<'_>, hook: u32, priority: u32) {
    body.nest(CHAIN_HOOK, |inner| {
        inner.attr(HOOK_NUM, &hook.to_be_bytes()).attr(HOOK_PRIORITY, &priority.to_be_bytes());
    });
}

/// Appends a match on the packet's family, which address matches need first in a table of both families.
pub(crate) fn encode_family(list: &mut Body<'_>, family: Family) {
    expression(list, "meta", |meta| {
        be(meta, 2, META_NFPROTO).attr(1, &REG_1.to_be_bytes());
    });
    expression(list, "cmp", |cmp| {
        be(be(cmp, 1, REG_1), 2, CMP_EQ).nest(3, |v| {
            v.attr(DATA_VALUE, &[crate::addr::family_number(family)]);
        });
    });
}

fn address(list: &mut Body<'_>, net: Subnet, source: bool, not: bool) -> (u32, Vec<u8>, Vec<u8>, bool) {
    let family = net.family();
    let (offset, length) = address_field(family, source);
    expression(list, "payload", |payload| {
        be(be(be(be(payload, 1, REG_1), 2, NETWORK_HEADER), 3, offset), 4, length);
    });
    // The mask has all bits set except the host bits.
    let host = bits_of(net.last()) ^ bits_of(net.network());
    (length, octets(family.address(!host)), octets(net.network()), not)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn expression(list: &mut Body<'_>, name: &str, data: impl FnOnce(&mut Body<'_>)) {
    list.nest(LIST_ELEM, |element| {
        element.attr_str(EXPR_NAME, name).nest(EXPR_DATA, data);
    });
}

fn be<'a, 'b>(body: &'a mut Body<'b>, kind: u16, value: u32) -> &'a mut Body<'b> {
    body.attr(kind, &value.to_be_bytes())
}

/// Reads the daemon's table of a family; `None` if it does not exist. If a chain has a rule that the daemon does not write, all its
/// rules are omitted, so that the table counts as different.
///
/// # Errors
/// The error that the kernel returns.
pub fn list(socket: &mut Socket, family: Family) -> Result<Option<Ruleset>, NetlinkError> {
    let table = table_name(family);
    let answer = socket.get(
        kind(GETTABLE),
        |body| {
            body.bytes(&header(family)).attr_str(TABLE, table);
        },
        |_| Some(()),
    );
    match answer {
        Ok(()) => {}
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    }
    let in_table = |body: &[u8]| find(body.get(4..).unwrap_or(&[]), TABLE).and_then(str_in) == Some(table);
    let only = |body: &mut Body<'_>| {
        body.bytes(&header(family)).attr_str(TABLE, table);
    };
    let mut chains = socket.dump(
        kind(GETCHAIN),
        |body| {
            body.bytes(&header(family));
        },
        |body| in_table(body).then(|| decode_chain(body.get(4..)?))?,
    )?;
    let rules = socket.dump(kind(GETRULE), only, |body| {
        if !in_table(body) {
            return None;
        }
        let bytes = body.get(4..)?;
        let chain = find(bytes, RULE_CHAIN).and_then(str_in)?.to_owned();
        Some((chain, find(bytes, RULE_EXPRESSIONS).and_then(|list| decode_rule(list, family))))
    })?;
    for chain in &mut chains {
        let own = rules.iter().filter(|(name, _)| *name == chain.name).map(|(_, rule)| rule.clone());
        chain.rules = own.collect::<Option<Vec<Rule>>>().unwrap_or_default();
    }
    Ok(Some(Ruleset { family, chains }))
}

/// Whether this table has this chain.
pub(crate) fn has_chain(socket: &mut Socket, family: Family, table: &str, chain: &str) -> Result<bool, NetlinkError> {
    let answer = socket.get(
        kind(GETCHAIN),
        |body| {
            body.bytes(&header(family)).attr_str(TABLE, table).attr_str(CHAIN_NAME, chain);
        },
        |_| Some(()),
    );
    match answer {
        Ok(()) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads the encoded expressions of each rule of a chain; empty if the chain does not exist.
pub(crate) fn raw_rules(socket: &mut Socket, family: Family, table: &str, chain: &str) -> Result<Vec<Vec<u8>>, NetlinkError> {
    let only = |body: &mut Body<'_>| {
        body.bytes(&header(family)).attr_str(TABLE, table).attr_str(RULE_CHAIN, chain);
    };
    let read = |body: &[u8]| {
        let bytes = body.get(4..)?;
        let there = find(bytes, TABLE).and_then(str_in) == Some(table) && find(bytes, RULE_CHAIN).and_then(str_in) == Some(chain);
        there.then(|| find(bytes, RULE_EXPRESSIONS).unwrap_or_default().to_vec())
    };
    match socket.dump(kind(GETRULE), only, read) {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

/// Appends a rule's expressions except counters, which change with traffic.
pub(crate) fn without_counters(expressions: &[u8], bytes: &mut Vec<u8>) {
    for (_, element) in attrs(expressions) {
        if find(element, EXPR_NAME).and_then(str_in) != Some("counter") {
            bytes.extend(element);
        }
    }
}

pub(crate) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(crate) fn be_in(bytes: &[u8], wanted: u16) -> Option<u32> {
    find(bytes, wanted)?.try_into().ok().map(u32::from_be_bytes)
}

fn decode_chain(bytes: &[u8]) -> Option<Chain> {
    let name = find(bytes, CHAIN_NAME).and_then(str_in)?.to_owned();
    let hook = find(bytes, CHAIN_HOOK).and_then(|hook| Some((be_in(hook, HOOK_NUM)?, be_in(hook, HOOK_PRIORITY)?)));
    let accepts = be_in(bytes, CHAIN_POLICY) == Some(NF_ACCEPT);
    let hook = match (hook, find(bytes, CHAIN_TYPE).and_then(str_in)) {
        (Some((2, 0)), Some("filter")) if accepts => Hook::Forward,
        (Some((4, 100)), Some("nat")) if accepts => Hook::Postrouting,
        // A chain of another type: mark it as foreign, so that it counts as different.
        _ => return Some(Chain { name: format!("{name} (foreign)"), hook: Hook::Forward, rules: Vec::new() }),
    };
    Some(Chain { name, hook, rules: Vec::new() })
}

/// Decodes a rule of the form that `encode_rule` writes; `None` for other forms.
pub fn decode_rule(list: &[u8], family: Family) -> Option<Rule> {
    enum Loaded {
        Mark,
        Source,
        Destination,
    }
    let mut matches = Vec::new();
    let mut loaded = None;
    let mut mask = None;
    let mut elements = attrs(list);
    for (_, element) in elements.by_ref() {
        let name = find(element, EXPR_NAME).and_then(str_in)?;
        let data = find(element, EXPR_DATA).unwrap_or(&[]);
        match name {
            "meta" if be_in(data, 2)? == META_MARK => loaded = Some(Loaded::Mark),
            "payload" if be_in(data, 2)? == NETWORK_HEADER => {
                let field = (be_in(data, 3)?, be_in(data, 4)?);
                loaded = [(true, Loaded::Source), (false, Loaded::Destination)]
                    .into_iter()
                    .find(|(source, _)| address_field(family, *source) == field)
                    .map(|(_, l)| l);
                loaded.as_ref()?;
            }
            "bitwise" => {
                let xor = find(find(data, 5)?, DATA_VALUE)?;
                mask = Some(find(find(data, 4)?, DATA_VALUE)?).filter(|_| xor.iter().all(|b| *b == 0));
                mask?;
            }
            "cmp" => {
                let not = match be_in(data, 2)? {
                    CMP_EQ => false,
                    CMP_NEQ => true,
                    _ => return None,
                };
                let value = find(find(data, 3)?, DATA_VALUE)?;
                let mask = mask.take()?;
                let prefix = || {
                    let ones = bits_of(ip_in(mask)?).count_ones();
                    Subnet::new(ip_in(value)?, u8::try_from(ones).ok()?).ok()
                };
                matches.push(match loaded.take()? {
                    Loaded::Mark => Match::Mark(u32::from_ne_bytes(mask.try_into().ok().filter(|_| mask == value && !not)?)),
                    Loaded::Source => Match::Source { net: prefix()?, not },
                    Loaded::Destination => Match::Destination { net: prefix()?, not },
                });
            }
            "masq" => {
                let fully_random = match find(data, 1) {
                    None => false,
                    Some(_) => be_in(data, 1)? == RANDOM_FULLY,
                };
                let last = elements.next().is_none() && loaded.is_none();
                return last.then_some(Rule { matches, verdict: Verdict::Masquerade { fully_random } });
            }
            "immediate" => {
                let verdict = match be_in(find(find(data, 2)?, DATA_VERDICT)?, VERDICT_CODE)? {
                    NF_ACCEPT => Verdict::Accept,
                    NFT_RETURN => Verdict::Return,
                    _ => return None,
                };
                let last = elements.next().is_none() && loaded.is_none();
                return last.then_some(Rule { matches, verdict });
            }
            _ => return None,
        }
    }
    None
}
