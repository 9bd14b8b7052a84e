//! Tables that the CNI plugins share, ours and the reference plugins: rules of [`flannel::pod`] are encoded, read and
//! deleted by netlink, without running `nft`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel::Family;
use flannel::pod::{Chain, Condition, Found, Layout, Owner, Rule, Table, TableFamily, Tag, Verdict};
use flannel::traffic;

use crate::netlink::{APPEND, Batch, Body, CREATE, NetlinkError, Protocol, Socket, attrs, ip_in, str_in};
use crate::nft::{self, Jump, find};

/// Types of the entries in a rule's user data: `NFTNL_UDATA_RULE_COMMENT`, and ours, which `nft` passes over.
const USERDATA_COMMENT: u8 = 0;
const USERDATA_TAG: u8 = 0xf1;

/// A rule in the kernel, and how it is named there.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    /// What it is recognised by.
    pub(crate) found: Found,
    handle: Vec<u8>,
}

/// The open socket of a removal. The kernel frees the rules after an RCU grace period, and closing the socket earlier waits
/// for that, about 10 ms; so it is dropped after other work.
#[derive(Debug, Default)]
#[must_use = "dropped at once it waits"]
pub struct Removal(#[expect(dead_code, reason = "held open")] Option<Socket>);

impl Removal {
    pub(crate) fn of(socket: Socket) -> Removal {
        Removal(Some(socket))
    }
}

/// Adds rules to a table.
///
/// # Errors
/// What the kernel answers; then no rule was added.
pub fn add(table: Table, rules: &[Rule]) -> Result<(), NetlinkError> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    add_with(&mut socket, table, |batch| rules.iter().for_each(|rule| encode_rule(batch, table, rule)))
}

/// Adds chains, which may exist, and rules to a table, in one transaction.
///
/// # Errors
/// What the kernel answers; then nothing was added.
pub fn add_with_chains(table: Table, chains: &[Chain], rules: &[Rule]) -> Result<(), NetlinkError> {
    let mut batch = Batch::new();
    encode_table(&mut batch, table, "");
    chains.iter().for_each(|chain| encode_chain(&mut batch, table, chain));
    rules.iter().for_each(|rule| encode_rule(&mut batch, table, rule));
    Socket::open(Protocol::Netfilter)?.transaction(nft::SUBSYSTEM, batch)
}

/// Removes the rules that `wanted` selects from some tables. That there are none is success.
///
/// # Errors
/// What the kernel answers.
pub fn remove(tables: &[Table], wanted: impl Fn(&Found) -> bool) -> Result<Removal, NetlinkError> {
    let Some(mut socket) = nft::open()? else { return Ok(Removal::default()) };
    remove_with(&mut socket, tables, wanted)?;
    Ok(Removal::of(socket))
}

/// The same with an open socket.
pub(crate) fn remove_with(socket: &mut Socket, tables: &[Table], wanted: impl Fn(&Found) -> bool) -> Result<(), NetlinkError> {
    for table in tables {
        let mut rules = read(socket, *table)?;
        rules.retain(|rule| wanted(&rule.found));
        delete(socket, *table, &rules)?;
    }
    Ok(())
}

/// Removes chains, which must be empty. That one does not exist is success.
///
/// # Errors
/// What the kernel answers.
pub fn remove_chains(table: Table, chains: &[String]) -> Result<(), NetlinkError> {
    let Some(mut socket) = nft::open()? else { return Ok(()) };
    for name in chains {
        let mut batch = Batch::new();
        batch.message(nft::kind(nft::DELCHAIN), 0, |body| {
            body.bytes(&proto(table)).attr_str(nft::TABLE, table.name()).attr_str(nft::CHAIN_NAME, name);
        });
        match socket.transaction(nft::SUBSYSTEM, batch) {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The rules of a table; none if it does not exist.
///
/// # Errors
/// What the kernel answers.
pub fn list(table: Table) -> Result<Vec<Found>, NetlinkError> {
    let Some(mut socket) = nft::open()? else { return Ok(Vec::new()) };
    Ok(read(&mut socket, table)?.into_iter().map(|rule| rule.found).collect())
}

/// Makes a table have its chains and shared rules.
///
/// # Errors
/// What the kernel answers.
pub fn ensure(table: Table) -> Result<(), NetlinkError> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    if is_whole(&mut socket, table, &table.layout())? {
        return Ok(());
    }
    add_with(&mut socket, table, |_| {})
}

/// Adds what `rules` appends. Chains are named only if the shared rules are missing: the kernel takes a chain that is named
/// again for a change of it, and the closing of the socket then waits for an RCU grace period (10 ms).
pub(crate) fn add_with(socket: &mut Socket, table: Table, rules: impl Fn(&mut Batch)) -> Result<(), NetlinkError> {
    let layout = table.layout();
    let mut batch = Batch::new();
    if is_whole(socket, table, &layout)? {
        rules(&mut batch);
        match socket.transaction(nft::SUBSYSTEM, std::mem::take(&mut batch)) {
            // Another program just deleted a part of it.
            Err(error) if error.is_not_found() => {}
            outcome => return outcome,
        }
    }
    encode_table(&mut batch, table, layout.comment);
    layout.chains.iter().for_each(|chain| encode_chain(&mut batch, table, chain));
    if !is_whole(socket, table, &layout)? {
        // The ones that are left would exist twice.
        let mut chains: Vec<&str> = layout.shared.iter().map(|rule| rule.chain.as_str()).collect();
        chains.dedup();
        for chain in chains {
            batch.message(nft::kind(nft::DELRULE), 0, |body| {
                body.bytes(&proto(table)).attr_str(nft::TABLE, table.name()).attr_str(nft::RULE_CHAIN, chain);
            });
        }
        layout.shared.iter().for_each(|rule| encode_rule(&mut batch, table, rule));
    }
    rules(&mut batch);
    socket.transaction(nft::SUBSYSTEM, batch)
}

/// Are the shared rules of a table in place? Of each rule the chain alone is read.
fn is_whole(socket: &mut Socket, table: Table, layout: &Layout) -> Result<bool, NetlinkError> {
    let chain = |rule: RawRule<'_>| Some(rule.chain.to_owned());
    let chains: BTreeSet<String> = dump(socket, table, chain)?.into_iter().collect();
    Ok(layout.is_whole(|chain| chains.contains(chain)))
}

pub(crate) fn founds(rules: &[Handle]) -> Vec<Found> {
    rules.iter().map(|rule| rule.found.clone()).collect()
}

/// Reads the rules of a table; none if it does not exist.
pub(crate) fn read(socket: &mut Socket, table: Table) -> Result<Vec<Handle>, NetlinkError> {
    dump(socket, table, |rule| {
        let found = Found {
            chain: rule.chain.to_owned(),
            owner: decode_owner(find(rule.attributes, nft::RULE_USERDATA).unwrap_or_default()),
            addresses: decode_addresses(find(rule.attributes, nft::RULE_EXPRESSIONS).unwrap_or_default()),
        };
        Some(Handle { found, handle: find(rule.attributes, nft::RULE_HANDLE)?.to_vec() })
    })
}

/// A rule as the kernel sends it.
struct RawRule<'a> {
    chain: &'a str,
    attributes: &'a [u8],
}

fn dump<T>(socket: &mut Socket, table: Table, decode: impl Fn(RawRule<'_>) -> Option<T>) -> Result<Vec<T>, NetlinkError> {
    let only = |body: &mut Body<'_>| {
        body.bytes(&proto(table)).attr_str(nft::TABLE, table.name());
    };
    let rule = |body: &[u8]| {
        let attributes = body.get(4..)?;
        if find(attributes, nft::TABLE).and_then(str_in)? != table.name() {
            return None;
        }
        decode(RawRule { chain: find(attributes, nft::RULE_CHAIN).and_then(str_in)?, attributes })
    };
    match socket.dump(nft::kind(nft::GETRULE), only, rule) {
        Err(error) if error.is_not_found() || nft::is_without_nf_tables(&error) => Ok(Vec::new()),
        other => other,
    }
}

/// Deletes rules. That they are gone already is success.
fn delete(socket: &mut Socket, table: Table, rules: &[Handle]) -> Result<(), NetlinkError> {
    if rules.is_empty() {
        return Ok(());
    }
    let delete = |socket: &mut Socket, rules: &[Handle]| {
        let mut batch = Batch::new();
        rules.iter().for_each(|rule| encode_delete(&mut batch, table, rule));
        socket.transaction(nft::SUBSYSTEM, batch)
    };
    match delete(socket, rules) {
        // One that another program just deleted fails the whole transaction: each by itself, then.
        Err(error) if error.is_not_found() => rules.iter().try_for_each(|rule| match delete(socket, std::slice::from_ref(rule)) {
            Err(error) if error.is_not_found() => Ok(()),
            other => other,
        }),
        other => other,
    }
}

/// Appends the request to delete a rule.
pub(crate) fn encode_delete(batch: &mut Batch, table: Table, rule: &Handle) {
    batch.message(nft::kind(nft::DELRULE), 0, |body| {
        body.bytes(&proto(table)).attr_str(nft::TABLE, table.name());
        body.attr_str(nft::RULE_CHAIN, &rule.found.chain).attr(nft::RULE_HANDLE, &rule.handle);
    });
}

/// Appends the request to add a rule at its chain's end.
pub(crate) fn encode_rule(batch: &mut Batch, table: Table, rule: &Rule) {
    batch.message(nft::kind(nft::NEWRULE), CREATE | APPEND, |body| {
        body.bytes(&proto(table)).attr_str(nft::TABLE, table.name()).attr_str(nft::RULE_CHAIN, &rule.chain);
        body.nest(nft::RULE_EXPRESSIONS, |list| {
            rule.conditions.iter().for_each(|condition| encode_condition(list, condition));
            encode_verdict(list, &rule.verdict);
        });
        if let Some(owner) = &rule.owner {
            body.attr(nft::RULE_USERDATA, &encode_owner(owner));
        }
    });
}

fn encode_condition(list: &mut Body<'_>, condition: &Condition) {
    match condition {
        Condition::Family(family) => nft::encode_family(list, *family),
        Condition::Match(condition) => nft::encode_match(list, condition),
        Condition::Port { protocol, port } => nft::encode_port(list, *protocol, *port),
        Condition::Translated { protocol, port } => nft::encode_translated(list, *protocol, *port),
        Condition::LocalDestination => nft::encode_local_destination(list),
        Condition::Input(name) => nft::encode_input_interface(list, name.as_str()),
        Condition::SourceMac(mac) => nft::encode_source_mac(list, *mac),
    }
}

fn encode_verdict(list: &mut Body<'_>, verdict: &Verdict) {
    let rule = |verdict| traffic::Rule { matches: Vec::new(), verdict };
    match verdict {
        Verdict::Jump(chain) => nft::encode_jump(list, Jump::Call, chain),
        Verdict::Goto(chain) => nft::encode_jump(list, Jump::Goto, chain),
        Verdict::Dnat(to, port) => nft::encode_dnat(list, *to, *port),
        Verdict::Masquerade => nft::encode_rule(list, &rule(traffic::Verdict::Masquerade { fully_random: false })),
        Verdict::Return => nft::encode_verdict(list, nft::NFT_RETURN),
        Verdict::Drop => nft::encode_verdict(list, nft::NF_DROP),
    }
}

fn encode_table(batch: &mut Batch, table: Table, comment: &str) {
    batch.message(nft::kind(nft::NEWTABLE), CREATE, |body| {
        body.bytes(&proto(table)).attr_str(nft::TABLE, table.name());
        if !comment.is_empty() {
            body.attr(nft::TABLE_USERDATA, &nft::comment(comment));
        }
    });
}

fn encode_chain(batch: &mut Batch, table: Table, chain: &Chain) {
    nft::encode_chain(batch, proto(table), table.name(), &chain.name, chain.hook, chain.comment);
}

fn encode_owner(owner: &Owner) -> Vec<u8> {
    let mut userdata = nft::comment(&owner.comment);
    if let Some(Tag(tag)) = owner.tag {
        userdata.extend([USERDATA_TAG, u8::try_from(tag.len()).expect("it has 16 bytes")]);
        userdata.extend(tag);
    }
    userdata
}

fn decode_owner(userdata: &[u8]) -> Owner {
    let mut owner = Owner::default();
    let mut rest = userdata;
    // Each entry: its type, its length, its value.
    while let [kind, length, more @ ..] = rest {
        let Some((value, next)) = more.split_at_checked(usize::from(*length)) else { break };
        match *kind {
            USERDATA_COMMENT => owner.comment = str_in(value).unwrap_or_default().to_owned(),
            USERDATA_TAG => owner.tag = value.try_into().ok().map(Tag),
            _ => {}
        }
        rest = next;
    }
    owner
}

/// Values in the rule's expressions that have the length of an address: operands of comparisons, and what is loaded for a
/// translation.
fn decode_addresses(expressions: &[u8]) -> Vec<IpAddr> {
    let value = |(_, element): (u16, &[u8])| {
        let data = find(element, nft::EXPR_DATA)?;
        let operand = match find(element, nft::EXPR_NAME).and_then(str_in)? {
            "immediate" => find(data, 2)?,
            "cmp" => find(data, 3)?,
            _ => return None,
        };
        find(operand, nft::DATA_VALUE).and_then(ip_in)
    };
    attrs(expressions).filter_map(value).collect()
}

/// The `nfgenmsg` that names a table's family.
fn proto(table: Table) -> [u8; 4] {
    /// `NFPROTO_INET` and `NFPROTO_BRIDGE`
    const INET: u8 = 1;
    const BRIDGE: u8 = 7;
    let family = match table.family() {
        TableFamily::Ip(family) => crate::addr::family_number(family),
        TableFamily::Inet => INET,
        TableFamily::Bridge => BRIDGE,
    };
    [family, 0, 0, 0]
}

/// The tables of host ports.
pub const PORTS: [Table; 2] = [Table::Ports(Family::V4), Table::Ports(Family::V6)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_read_back_and_foreign_user_data_is_passed_over() {
        for (comment, tag) in [("c1", Some(Tag([7; 16]))), ("c1", None), (&"x".repeat(127), Some(Tag([9; 16])))] {
            let owner = Owner { comment: comment.to_owned(), tag };
            assert_eq!(decode_owner(&encode_owner(&owner)), owner);
        }
        assert_eq!(decode_owner(&[1, 2, 9, 9, 0, 3, b'a', b'b', 0]).comment, "ab");
        for broken in [&[][..], &[0], &[0, 9, 1], &[USERDATA_TAG, 2, 1, 1]] {
            assert_eq!(decode_owner(broken), Owner::default());
        }
    }
}
