//! Ports of the host that lead to containers, as the portmap plugin wants them: table `cni_hostport` of each family, shared
//! with the reference plugin, whose rules carry the container's id as comment (specification, section 7.5).

use std::net::IpAddr;

use flannel::traffic::{Match, Rule, Verdict};
use flannel::{Cidr, Family, Subnet};

use crate::netlink::{APPEND, Batch, Body, CREATE, NetlinkError, Protocol, Socket};
use crate::nft::{self, Jump, Part, Removal};

pub(crate) const TABLE: &str = "cni_hostport";
const HOSTPORTS: &str = "hostports";
/// Empty: what older releases of the reference plugin wrote stands here.
const HOSTIP_HOSTPORTS: &str = "hostip_hostports";
const ALL: &str = "hostports_all";
const MASQUERADING: &str = "masquerading";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";

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
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let rules = |batch: &mut Batch| encode(batch, id, container, mappings, snat);
    nft::add_rules(&mut socket, &place(Family::of(container.addr)), rules)
}

/// The table of a family: chains, and the rules that all containers share.
pub(crate) fn place(family: Family) -> nft::Shared {
    let proto = proto(family);
    let frame = move |batch: &mut Batch, part: Part| match part {
        Part::Chains => {
            batch.message(nft::kind(nft::NEWTABLE), CREATE, |body| {
                body.bytes(&proto).attr_str(nft::TABLE, TABLE);
            });
            for (chain, base) in [
                (HOSTIP_HOSTPORTS, None),
                (HOSTPORTS, None),
                (ALL, None),
                (PREROUTING, Some((0, -100))),
                (OUTPUT, Some((3, -100))),
                (MASQUERADING, Some((4, 100))),
            ] {
                nft::encode_chain(batch, proto, TABLE, chain, base.map(|(hook, priority)| (hook, priority, "nat")));
            }
        }
        Part::Rules => {
            for chain in [PREROUTING, OUTPUT] {
                rule(batch, family, chain, "", |list| {
                    nft::encode_local_destination(list);
                    nft::encode_jump(list, Jump::Call, ALL);
                });
            }
            for chain in [HOSTIP_HOSTPORTS, HOSTPORTS] {
                rule(batch, family, ALL, "", |list| nft::encode_jump(list, Jump::Call, chain));
            }
        }
    };
    nft::Shared { proto, table: TABLE, shared: &[PREROUTING, OUTPUT, ALL], own: &[HOSTPORTS, MASQUERADING], frame: Box::new(frame) }
}

fn rule(batch: &mut Batch, family: Family, chain: &str, comment: &str, expressions: impl FnOnce(&mut Body<'_>)) {
    batch.message(nft::kind(nft::NEWRULE), CREATE | APPEND, |body| {
        body.bytes(&proto(family)).attr_str(nft::TABLE, TABLE).attr_str(nft::RULE_CHAIN, chain).nest(nft::RULE_EXPRESSIONS, expressions);
        if !comment.is_empty() {
            body.attr(nft::RULE_USERDATA, &nft::comment(comment));
        }
    });
}

/// Appends the rules of a container.
pub(crate) fn encode(batch: &mut Batch, id: &str, container: Cidr, mappings: &[Mapping], snat: Snat) {
    let family = Family::of(container.addr);
    for mapping in mappings {
        rule(batch, family, HOSTPORTS, id, |list| {
            if let Some(ip) = mapping.host_ip.filter(|ip| !ip.is_unspecified()) {
                nft::encode_matches(list, &[Match::Destination { net: single(ip), not: false }]);
            }
            nft::encode_port(list, mapping.protocol, mapping.host_port);
            nft::encode_dnat(list, container.addr, mapping.container_port);
        });
    }
    let to = Match::Destination { net: single(container.addr), not: false };
    for (source, mapping) in sources(container, snat).iter().flat_map(|source| mappings.iter().map(move |mapping| (*source, mapping))) {
        rule(batch, family, MASQUERADING, id, |list| {
            // Only what came by this mapping: pods that speak to each other keep their addresses, and so do clients of a
            // service, whose destination somebody else translated.
            nft::encode_translated(list, mapping.protocol, mapping.host_port);
            let matches = vec![Match::Source { net: source, not: false }, to];
            nft::encode_rule(list, &Rule { matches, verdict: Verdict::Masquerade { fully_random: false } });
        });
    }
}

/// How many rules [`encode`] appends.
pub(crate) fn size(container: Cidr, mappings: &[Mapping], snat: Snat) -> usize {
    mappings.len() * (1 + sources(container, snat).len())
}

/// Whose source address changes on the way to a container.
fn sources(container: Cidr, snat: Snat) -> Vec<Subnet> {
    let family = Family::of(container.addr);
    match (snat, family) {
        (Snat::No, _) => Vec::new(),
        (Snat::All, _) => vec![Subnet::new(family.unspecified(), 0).expect("length 0 is in range")],
        (Snat::Local, Family::V4) => vec![container.subnet(), "127.0.0.1/32".parse().expect("it is a prefix")],
        (Snat::Local, Family::V6) => vec![container.subnet()],
    }
}

fn single(ip: IpAddr) -> Subnet {
    Subnet::new(ip, Family::of(ip).bits()).expect("a whole address is a prefix")
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
    for family in Family::ALL {
        let mut rules = nft::handles(&mut socket, proto(family), TABLE)?;
        rules.retain(|rule| rule.comment == comment(id));
        nft::delete_handles(&mut socket, proto(family), TABLE, &rules)?;
    }
    Ok(Removal::of(socket))
}

/// How many rules of a container there are in a family: one a mapping.
///
/// # Errors
/// What the kernel answers.
pub fn count(id: &str, family: Family) -> Result<usize, NetlinkError> {
    let rules = nft::handles(&mut Socket::open(Protocol::Netfilter)?, proto(family), TABLE)?;
    Ok(rules.iter().filter(|rule| rule.comment == comment(id) && rule.chain == HOSTPORTS).count())
}

fn proto(family: Family) -> [u8; 4] {
    [crate::addr::family_number(family), 0, 0, 0]
}
