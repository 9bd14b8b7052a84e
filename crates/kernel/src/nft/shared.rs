//! What the CNI plugins need of nf_tables: tables that they share with others, in which a rule is found again by its
//! comment, and the expressions of their rules.

use std::net::IpAddr;

use flannel::traffic::Match;
use flannel::{Family, Mac};

use super::{
    CHAIN_NAME, CHAIN_POLICY, CHAIN_TYPE, CHAIN_USERDATA, CMP_EQ, CMP_NEQ, DATA_VALUE, DATA_VERDICT, DELRULE, GETRULE, NEWCHAIN, NF_ACCEPT,
    REG_1, REG_VERDICT, RULE_CHAIN, SUBSYSTEM, TABLE, VERDICT_CHAIN, VERDICT_CODE, be, comment, encode_hook, expression, find, kind,
    octets,
};
use crate::netlink::{Batch, Body, CREATE, NetlinkError, Protocol, Socket, str_in};

const RULE_HANDLE: u16 = 3;
pub(crate) const RULE_USERDATA: u16 = 7;
const NFT_JUMP: u32 = (-3i32).cast_unsigned();
const NFT_GOTO: u32 = (-4i32).cast_unsigned();
const LINK_HEADER: u32 = 0;
const TRANSPORT_HEADER: u32 = 2;
const META_IIFNAME: u32 = 6;
const META_L4PROTO: u32 = 16;
const REG_2: u32 = 2;
/// `IPS_DST_NAT` of `linux/netfilter/nf_conntrack_common.h`
const DESTINATION_WAS_TRANSLATED: u32 = 0x20;

/// A rule in a shared table.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(crate) chain: String,
    handle: Vec<u8>,
    /// Its comment; may be empty.
    pub(crate) comment: String,
}

/// A socket for what may be there; `None` in a kernel without nf_tables, where nothing is.
pub(crate) fn open() -> Result<Option<Socket>, NetlinkError> {
    match Socket::open(Protocol::Netfilter) {
        Err(error) if is_without_nf_tables(&error) => Ok(None),
        other => other.map(Some),
    }
}

fn is_without_nf_tables(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL))
}

/// The rules of a table; none if there is no such table. `proto` is the `nfgenmsg` that names the family.
pub(crate) fn handles(socket: &mut Socket, proto: [u8; 4], table: &str) -> Result<Vec<Handle>, NetlinkError> {
    let only = |body: &mut Body<'_>| {
        body.bytes(&proto).attr_str(TABLE, table);
    };
    let read = |body: &[u8]| {
        let bytes = body.get(4..)?;
        if find(bytes, TABLE).and_then(str_in)? != table {
            return None;
        }
        // Type and length come before the text.
        let comment = find(bytes, RULE_USERDATA).and_then(|data| data.get(2..)).and_then(str_in).unwrap_or_default();
        Some(Handle {
            chain: find(bytes, RULE_CHAIN).and_then(str_in)?.to_owned(),
            handle: find(bytes, RULE_HANDLE)?.to_vec(),
            comment: comment.to_owned(),
        })
    };
    match socket.dump(kind(GETRULE), only, read) {
        Err(error) if error.is_not_found() || is_without_nf_tables(&error) => Ok(Vec::new()),
        other => other,
    }
}

/// A table that many share.
pub(crate) struct Shared {
    /// The `nfgenmsg` that names its family.
    pub(crate) proto: [u8; 4],
    /// Its name.
    pub(crate) table: &'static str,
    /// The chains whose rules all share: they lead to the others.
    pub(crate) shared: &'static [&'static str],
    /// Those in which each has its own.
    pub(crate) own: &'static [&'static str],
    /// Describes the table.
    pub(crate) frame: Frame,
}

/// Appends what a table is made of.
pub(crate) type Frame = Box<dyn Fn(&mut Batch, Part)>;

/// What of a shared table is described.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// The table with its chains.
    Chains,
    /// The rules that all share.
    Rules,
}

impl Shared {
    /// Are all the rules there that lead to each one's own? None of their chains is empty, then.
    pub(crate) fn is_whole(&self, rules: &[Handle]) -> bool {
        self.shared.iter().all(|chain| rules.iter().any(|rule| rule.chain == *chain))
    }

    /// All rules of the table.
    pub(crate) fn handles(&self, socket: &mut Socket) -> Result<Vec<Handle>, NetlinkError> {
        handles(socket, self.proto, self.table)
    }
}

/// Adds rules to a table that many share. Its chains are named only if they are not there: the kernel
/// takes a chain that is named again for a change of it, and the closing of the socket then waits for an RCU grace period (10 ms).
pub(crate) fn add_rules(socket: &mut Socket, place: &Shared, rules: impl Fn(&mut Batch)) -> Result<(), NetlinkError> {
    let mut batch = Batch::new();
    if place.is_whole(&place.handles(socket)?) {
        rules(&mut batch);
        match socket.transaction(SUBSYSTEM, std::mem::take(&mut batch)) {
            // Somebody just deleted a part of it.
            Err(error) if error.is_not_found() => {}
            outcome => return outcome,
        }
    }
    (place.frame)(&mut batch, Part::Chains);
    if !place.is_whole(&place.handles(socket)?) {
        // What is left of them would be there twice.
        for chain in place.shared {
            batch.message(kind(DELRULE), 0, |body| {
                body.bytes(&place.proto).attr_str(TABLE, place.table).attr_str(RULE_CHAIN, chain);
            });
        }
        (place.frame)(&mut batch, Part::Rules);
    }
    rules(&mut batch);
    socket.transaction(SUBSYSTEM, batch)
}

/// Appends the request to delete a rule.
pub(crate) fn encode_delete(batch: &mut Batch, proto: [u8; 4], table: &str, rule: &Handle) {
    batch.message(kind(DELRULE), 0, |body| {
        body.bytes(&proto).attr_str(TABLE, table).attr_str(RULE_CHAIN, &rule.chain).attr(RULE_HANDLE, &rule.handle);
    });
}

/// Deletes rules. That they are gone already is success.
pub(crate) fn delete_handles(socket: &mut Socket, proto: [u8; 4], table: &str, rules: &[Handle]) -> Result<(), NetlinkError> {
    if rules.is_empty() {
        return Ok(());
    }
    let delete = |socket: &mut Socket, rules: &[Handle]| {
        let mut batch = Batch::new();
        rules.iter().for_each(|rule| encode_delete(&mut batch, proto, table, rule));
        socket.transaction(SUBSYSTEM, batch)
    };
    match delete(socket, rules) {
        // One that somebody else just deleted keeps the others: each by itself, then.
        Err(error) if error.is_not_found() => rules.iter().try_for_each(|rule| match delete(socket, std::slice::from_ref(rule)) {
            Err(error) if error.is_not_found() => Ok(()),
            other => other,
        }),
        other => other,
    }
}

/// What is left of a removal: the kernel frees the rules after an RCU grace period, and whoever closes the socket before
/// waits for that, about 10 ms. So it is dropped after other work.
#[derive(Debug, Default)]
#[must_use = "dropped at once it waits"]
pub struct Removal(#[expect(dead_code, reason = "held open")] Option<Socket>);

impl Removal {
    pub(crate) fn of(socket: Socket) -> Removal {
        Removal(Some(socket))
    }
}

/// Appends the request to make a chain be there; a base chain has hook, priority and type, and lets everything pass.
pub(crate) fn encode_chain(batch: &mut Batch, proto: [u8; 4], table: &str, name: &str, base: Option<(u32, i32, &str)>) {
    encode_chain_with(batch, proto, table, name, base, "");
}

/// The same with a comment.
pub(crate) fn encode_chain_with(batch: &mut Batch, proto: [u8; 4], table: &str, name: &str, base: Option<(u32, i32, &str)>, text: &str) {
    batch.message(kind(NEWCHAIN), CREATE, |body| {
        body.bytes(&proto).attr_str(TABLE, table).attr_str(CHAIN_NAME, name);
        if let Some((hook, priority, chain_type)) = base {
            encode_hook(body, hook, priority.cast_unsigned());
            body.attr(CHAIN_POLICY, &NF_ACCEPT.to_be_bytes()).attr_str(CHAIN_TYPE, chain_type);
        }
        if !text.is_empty() {
            body.attr(CHAIN_USERDATA, &comment(text));
        }
    });
}

/// How a rule goes on in another chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Jump {
    /// And comes back.
    Call,
    /// And does not come back.
    Goto,
}

pub(crate) fn encode_jump(list: &mut Body<'_>, jump: Jump, chain: &str) {
    let code = match jump {
        Jump::Call => NFT_JUMP,
        Jump::Goto => NFT_GOTO,
    };
    expression(list, "immediate", |immediate| {
        be(immediate, 1, REG_VERDICT).nest(2, |data| {
            data.nest(DATA_VERDICT, |verdict| {
                be(verdict, VERDICT_CODE, code).attr_str(VERDICT_CHAIN, chain);
            });
        });
    });
}

pub(crate) fn encode_verdict(list: &mut Body<'_>, code: u32) {
    expression(list, "immediate", |immediate| {
        be(immediate, 1, REG_VERDICT).nest(2, |data| {
            data.nest(DATA_VERDICT, |verdict| {
                be(verdict, VERDICT_CODE, code);
            });
        });
    });
}

fn compare(list: &mut Body<'_>, operation: u32, value: &[u8]) {
    expression(list, "cmp", |cmp| {
        be(be(cmp, 1, REG_1), 2, operation).nest(3, |data| {
            data.attr(DATA_VALUE, value);
        });
    });
}

fn payload(list: &mut Body<'_>, base: u32, offset: u32, length: u32) {
    expression(list, "payload", |payload| {
        be(be(be(be(payload, 1, REG_1), 2, base), 3, offset), 4, length);
    });
}

fn meta(list: &mut Body<'_>, key: u32) {
    expression(list, "meta", |meta| {
        be(meta, 2, key).attr(1, &REG_1.to_be_bytes());
    });
}

/// Address matches without a verdict.
pub(crate) fn encode_matches(list: &mut Body<'_>, matches: &[Match]) {
    for condition in matches {
        super::encode_match(list, condition);
    }
}

/// The destination is an address of this host (`fib daddr type local`).
pub(crate) fn encode_local_destination(list: &mut Body<'_>) {
    const RESULT_ADDRTYPE: u32 = 3;
    const FLAG_DADDR: u32 = 2;
    const RTN_LOCAL: u32 = 2;
    expression(list, "fib", |fib| {
        be(be(be(fib, 1, REG_1), 2, RESULT_ADDRTYPE), 3, FLAG_DADDR);
    });
    compare(list, CMP_EQ, &RTN_LOCAL.to_ne_bytes());
}

/// The transport protocol and its destination port.
pub(crate) fn encode_port(list: &mut Body<'_>, protocol: u8, port: u16) {
    meta(list, META_L4PROTO);
    compare(list, CMP_EQ, &[protocol]);
    payload(list, TRANSPORT_HEADER, 2, 2);
    compare(list, CMP_EQ, &port.to_be_bytes());
}

/// Sends the packet to another address and port.
pub(crate) fn encode_dnat(list: &mut Body<'_>, to: IpAddr, port: u16) {
    const DNAT: u32 = 1;
    let load = |list: &mut Body<'_>, register: u32, value: &[u8]| {
        expression(list, "immediate", |immediate| {
            be(immediate, 1, register).nest(2, |data| {
                data.attr(DATA_VALUE, value);
            });
        });
    };
    load(list, REG_1, &octets(to));
    load(list, REG_2, &port.to_be_bytes());
    expression(list, "nat", |nat| {
        let family = u32::from(crate::addr::family_number(Family::of(to)));
        be(be(be(be(nat, 1, DNAT), 2, family), 3, REG_1), 5, REG_2);
    });
}

/// The connection's destination was translated from this port (`ct status dnat`, `ct original proto-dst`).
pub(crate) fn encode_translated(list: &mut Body<'_>, protocol: u8, port: u16) {
    const CT_STATUS: u32 = 2;
    const CT_PROTO_DST: u32 = 12;
    const ORIGINAL: u8 = 0;
    meta(list, META_L4PROTO);
    compare(list, CMP_EQ, &[protocol]);
    expression(list, "ct", |ct| {
        be(be(ct, 1, REG_1), 2, CT_PROTO_DST).attr(3, &[ORIGINAL]);
    });
    compare(list, CMP_EQ, &port.to_be_bytes());
    expression(list, "ct", |ct| {
        be(be(ct, 1, REG_1), 2, CT_STATUS);
    });
    expression(list, "bitwise", |bitwise| {
        be(be(be(bitwise, 1, REG_1), 2, REG_1), 3, 4);
        bitwise.nest(4, |mask| {
            mask.attr(DATA_VALUE, &DESTINATION_WAS_TRANSLATED.to_ne_bytes());
        });
        bitwise.nest(5, |xor| {
            xor.attr(DATA_VALUE, &[0; 4]);
        });
    });
    compare(list, CMP_NEQ, &[0; 4]);
}

/// The packet came in by this interface.
pub(crate) fn encode_input_interface(list: &mut Body<'_>, name: &str) {
    meta(list, META_IIFNAME);
    let mut value = [0; 16];
    value.iter_mut().zip(name.bytes().take(15)).for_each(|(to, from)| *to = from);
    compare(list, CMP_EQ, &value);
}

/// The frame's source is this MAC.
pub(crate) fn encode_source_mac(list: &mut Body<'_>, mac: Mac) {
    payload(list, LINK_HEADER, 6, 6);
    compare(list, CMP_EQ, &mac.0);
}
