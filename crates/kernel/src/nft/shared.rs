//! Expressions of the rules that CNI plugins keep for pods.

use std::net::IpAddr;

use flannel::{Family, Mac};

use super::{
    CHAIN_NAME, CHAIN_POLICY, CHAIN_TYPE, CHAIN_USERDATA, CMP_EQ, CMP_NEQ, DATA_VALUE, DATA_VERDICT, NEWCHAIN, NF_ACCEPT, REG_1,
    REG_VERDICT, TABLE, VERDICT_CHAIN, VERDICT_CODE, be, comment, encode_hook, expression, kind, octets,
};
use crate::netlink::{Batch, Body, CREATE, NetlinkError, Protocol, Socket};

const NFT_JUMP: u32 = (-3i32).cast_unsigned();
const NFT_GOTO: u32 = (-4i32).cast_unsigned();
const LINK_HEADER: u32 = 0;
const TRANSPORT_HEADER: u32 = 2;
const META_IIFNAME: u32 = 6;
const META_L4PROTO: u32 = 16;
const REG_2: u32 = 2;
/// `IPS_DST_NAT` of `linux/netfilter/nf_conntrack_common.h`
const DESTINATION_WAS_TRANSLATED: u32 = 0x20;

/// Opens a netfilter socket; `None` if the kernel has no nf_tables, and so no rules.
pub(crate) fn open() -> Result<Option<Socket>, NetlinkError> {
    match Socket::open(Protocol::Netfilter) {
        Err(error) if is_without_nf_tables(&error) => Ok(None),
        other => other.map(Some),
    }
}

pub(crate) fn is_without_nf_tables(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL))
}

/// Appends a request that creates a chain if it does not exist; a base chain has a hook, a priority and a type, and policy accept.
pub(crate) fn encode_chain(batch: &mut Batch, proto: [u8; 4], table: &str, name: &str, base: Option<(u32, i32, &str)>, text: &str) {
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

/// How a rule continues in another chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Jump {
    /// Evaluation returns to the calling chain (`jump`).
    Call,
    /// Evaluation does not return (`goto`).
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

/// Appends a match on a destination address of this host (`fib daddr type local`).
pub(crate) fn encode_local_destination(list: &mut Body<'_>) {
    const RESULT_ADDRTYPE: u32 = 3;
    const FLAG_DADDR: u32 = 2;
    const RTN_LOCAL: u32 = 2;
    expression(list, "fib", |fib| {
        be(be(be(fib, 1, REG_1), 2, RESULT_ADDRTYPE), 3, FLAG_DADDR);
    });
    compare(list, CMP_EQ, &RTN_LOCAL.to_ne_bytes());
}

/// Appends a match on the transport protocol and its destination port.
pub(crate) fn encode_port(list: &mut Body<'_>, protocol: u8, port: u16) {
    meta(list, META_L4PROTO);
    compare(list, CMP_EQ, &[protocol]);
    payload(list, TRANSPORT_HEADER, 2, 2);
    compare(list, CMP_EQ, &port.to_be_bytes());
}

/// Appends a DNAT to an address and port.
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

/// Appends a match on connections whose destination was translated from this port (`ct status dnat`, `ct original proto-dst`).
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

/// Appends a match on the input interface.
pub(crate) fn encode_input_interface(list: &mut Body<'_>, name: &str) {
    meta(list, META_IIFNAME);
    let mut value = [0; 16];
    value.iter_mut().zip(name.bytes().take(15)).for_each(|(to, from)| *to = from);
    compare(list, CMP_EQ, &value);
}

/// Appends a match on the source MAC address.
pub(crate) fn encode_source_mac(list: &mut Body<'_>, mac: Mac) {
    payload(list, LINK_HEADER, 6, 6);
    compare(list, CMP_EQ, &mac.0);
}
