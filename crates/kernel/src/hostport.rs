//! Ports of the host that lead to containers, as the portmap plugin wants them: table `cni_hostport` of each family, shared
//! with the reference plugin, whose rules carry the container's id as comment (specification, section 7.5).

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel::traffic::{Match, Rule, Verdict};
use flannel::{Cidr, Family, Subnet};

use crate::netlink::{APPEND, Batch, Body, CREATE, NetlinkError, Protocol, Socket};
use crate::nft::{self, Jump, Removal};

pub(crate) const TABLE: &str = "cni_hostport";
const HOSTPORTS: &str = "hostports";
/// Empty: what older releases of the reference plugin wrote stands here.
const HOSTIP_HOSTPORTS: &str = "hostip_hostports";
const ALL: &str = "hostports_all";
const MASQUERADING: &str = "masquerading";
/// What comes from outside begins here.
const BASE: &str = "prerouting";

/// A port of the host that leads to a port of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Number of the transport protocol: 6 for TCP, 17 for UDP, 132 for SCTP.
    pub protocol: u8,
    /// The host's port.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// The address of the host that it is limited to; an unspecified one limits it to its family.
    pub host_ip: Option<IpAddr>,
}

/// Which connections to a container take the host's address as their source, so that answers come back this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snat {
    /// None.
    No,
    /// Those from the container's own subnet and from the host's loopback.
    Local,
    /// All.
    All,
}

/// Adds a container's mappings for one of its addresses.
///
/// # Errors
/// What the kernel answers; then no rule was added.
pub fn add(id: &str, container: Cidr, mappings: &[Mapping], snat: Snat) -> Result<(), NetlinkError> {
    add_by(&mut Socket::open(Protocol::Netfilter)?, id, container, mappings, snat)
}

pub(crate) fn add_by(socket: &mut Socket, id: &str, container: Cidr, mappings: &[Mapping], snat: Snat) -> Result<(), NetlinkError> {
    let family = Family::of(container.addr);
    let proto = proto(family);
    let rule = |batch: &mut Batch, chain: &str, comment: &str, expressions: &dyn Fn(&mut Body<'_>)| {
        batch.message(nft::kind(nft::NEWRULE), CREATE | APPEND, |body| {
            body.bytes(&proto).attr_str(nft::TABLE, TABLE).attr_str(nft::RULE_CHAIN, chain).nest(nft::RULE_EXPRESSIONS, expressions);
            if !comment.is_empty() {
                body.attr(nft::RULE_USERDATA, &nft::comment(comment));
            }
        });
    };
    let frame = |batch: &mut Batch, there: bool| {
        batch.message(nft::kind(nft::NEWTABLE), CREATE, |body| {
            body.bytes(&proto).attr_str(nft::TABLE, TABLE);
        });
        for (chain, base) in [
            (HOSTIP_HOSTPORTS, None),
            (HOSTPORTS, None),
            (ALL, None),
            (BASE, Some((0, -100))),
            ("output", Some((3, -100))),
            (MASQUERADING, Some((4, 100))),
        ] {
            nft::encode_chain(batch, proto, TABLE, chain, base.map(|(hook, priority)| (hook, priority, "nat")));
        }
        if there {
            return;
        }
        for chain in [BASE, "output"] {
            rule(batch, chain, "", &|list| {
                nft::encode_local_destination(list);
                nft::encode_jump(list, Jump::Call, ALL);
            });
        }
        for chain in [HOSTIP_HOSTPORTS, HOSTPORTS] {
            rule(batch, ALL, "", &|list| nft::encode_jump(list, Jump::Call, chain));
        }
    };
    let single = |ip: IpAddr| Subnet::new(ip, Family::of(ip).bits()).expect("a whole address is a prefix");
    let to = Match::Destination { net: single(container.addr), not: false };
    let everybody = Subnet::new(family.unspecified(), 0).expect("length 0 is in range");
    let mut sources = match snat {
        Snat::No => Vec::new(),
        Snat::Local => vec![container.subnet()],
        Snat::All => vec![everybody],
    };
    if snat == Snat::Local && family == Family::V4 {
        sources.push("127.0.0.1/32".parse().expect("it is a prefix"));
    }
    nft::add_rules(socket, (proto, TABLE, BASE), frame, |batch| {
        for mapping in mappings {
            rule(batch, HOSTPORTS, id, &|list| {
                if let Some(ip) = mapping.host_ip.filter(|ip| !ip.is_unspecified()) {
                    nft::encode_matches(list, &[Match::Destination { net: single(ip), not: false }]);
                }
                nft::encode_port(list, mapping.protocol, mapping.host_port);
                nft::encode_dnat(list, container.addr, mapping.container_port);
            });
        }
        for (source, mapping) in sources.iter().flat_map(|source| mappings.iter().map(move |mapping| (*source, mapping))) {
            rule(batch, MASQUERADING, id, &|list| {
                // Only what came by this mapping: pods that speak to each other keep their addresses, and so do clients of a
                // service, whose destination somebody else translated.
                nft::encode_translated(list, mapping.protocol, mapping.host_port);
                let matches = vec![Match::Source { net: source, not: false }, to];
                nft::encode_rule(list, &Rule { matches, verdict: Verdict::Masquerade { fully_random: false } });
            });
        }
    })
}

/// A comment as the kernel keeps it: 127 bytes of it.
pub(crate) fn comment(id: &str) -> &str {
    id.get(..127).unwrap_or(id)
}

/// Removes a container's mappings of both families. That there are none is success.
///
/// # Errors
/// What the kernel answers.
pub fn remove(id: &str) -> Result<Removal, NetlinkError> {
    let Some(mut socket) = nft::open()? else { return Ok(Removal::default()) };
    Family::ALL.into_iter().try_for_each(|family| remove_by(&mut socket, family, comment(id)))?;
    Ok(Removal::of(socket))
}

pub(crate) fn remove_by(socket: &mut Socket, family: Family, comment: &str) -> Result<(), NetlinkError> {
    let mut rules = nft::handles(socket, proto(family), TABLE)?;
    rules.retain(|rule| rule.comment == comment);
    nft::delete_handles(socket, proto(family), TABLE, &rules)
}

/// How many rules of a container there are in a family: one a mapping.
///
/// # Errors
/// What the kernel answers.
pub fn count(id: &str, family: Family) -> Result<usize, NetlinkError> {
    let rules = nft::handles(&mut Socket::open(Protocol::Netfilter)?, proto(family), TABLE)?;
    Ok(rules.iter().filter(|rule| rule.comment == comment(id) && rule.chain == HOSTPORTS).count())
}

/// The same of all containers, by their comments.
pub(crate) fn count_by(socket: &mut Socket, family: Family) -> Result<BTreeMap<String, usize>, NetlinkError> {
    Ok(nft::count(&nft::handles(socket, proto(family), TABLE)?, BASE, HOSTPORTS))
}

fn proto(family: Family) -> [u8; 4] {
    [crate::addr::family_number(family), 0, 0, 0]
}
