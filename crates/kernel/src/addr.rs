//! Reads and writes interface addresses (`linux/if_addr.h`).

use flannel::node::InterfaceAddr;
use flannel::{Cidr, Family};

use crate::netlink::{Body, CREATE, EXCL, NetlinkError, REPLACE, Socket, attrs, ip_in, u32_at};

pub(crate) const RTM_NEWADDR: u16 = 20;
pub(crate) const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;

const IFA_F_TEMPORARY: u32 = 0x01;
const IFA_F_NODAD: u8 = 0x02;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_PERMANENT: u32 = 0x80;

pub(crate) fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// An address and the index of its interface. The scope identifies a link-local IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddrInfo {
    /// Interface index.
    pub index: u32,
    /// The address with its flags.
    pub addr: InterfaceAddr,
    /// Whether its scope is the link (`RT_SCOPE_LINK`).
    pub link_scope: bool,
    /// Whether duplicate address detection is still running (`IFA_F_TENTATIVE`).
    pub tentative: bool,
    /// Whether duplicate address detection failed (`IFA_F_DADFAILED`).
    pub duplicate: bool,
}

/// Decodes an address message (without its netlink header).
pub fn decode(body: &[u8]) -> Option<AddrInfo> {
    let (len, flags, scope) = (*body.get(1)?, u32::from(*body.get(2)?), *body.get(3)?);
    let index = u32_at(body, 4)?;
    let (mut address, mut local, mut flags) = (None, None, flags);
    for (kind, value) in attrs(body.get(8..)?) {
        match kind {
            IFA_ADDRESS => address = ip_in(value),
            IFA_LOCAL => local = ip_in(value),
            IFA_FLAGS => flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    let ip = local.or(address)?;
    if len > Family::of(ip).bits() {
        return None;
    }
    let addr = InterfaceAddr {
        cidr: Cidr { addr: ip, len },
        permanent: flags & IFA_F_PERMANENT != 0,
        temporary: flags & IFA_F_TEMPORARY != 0,
        deprecated: flags & IFA_F_DEPRECATED != 0,
    };
    let (tentative, duplicate) = (flags & IFA_F_TENTATIVE != 0, flags & IFA_F_DADFAILED != 0);
    Some(AddrInfo { index, addr, link_scope: scope == 253, tentative, duplicate })
}

/// Reads the addresses of both families, of one interface or, for index 0, of all.
///
/// # Errors
/// The error that the kernel returns.
pub fn list(socket: &mut Socket, index: u32) -> Result<Vec<AddrInfo>, NetlinkError> {
    let mut header = [0; 8];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    socket.dump(
        RTM_GETADDR,
        |body| {
            body.bytes(&header);
        },
        decode,
    )
}

fn write(body: &mut Body<'_>, index: u32, cidr: Cidr, broadcast: bool, dad: bool) {
    let mut header = [0; 8];
    header[0] = family_number(Family::of(cidr.addr));
    header[1] = cidr.len;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if cidr.addr.is_ipv6() && !dad {
        header[2] = IFA_F_NODAD;
    }
    body.bytes(&header).attr_ip(IFA_LOCAL, cidr.addr).attr_ip(IFA_ADDRESS, cidr.addr);
    if broadcast && cidr.addr.is_ipv4() && cidr.len < 31 {
        body.attr_ip(IFA_BROADCAST, cidr.subnet().last());
    }
}

/// Adds an address, or replaces it if it exists.
///
/// # Errors
/// The error that the kernel returns.
pub fn set(socket: &mut Socket, index: u32, cidr: Cidr) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWADDR, CREATE | REPLACE, |body| write(body, index, cidr, false, false))
}

/// Adds an address with its broadcast address, as the bridge plugin and the lab do. An IPv6 address is used without duplicate address
/// detection, because its subnet is leased to this host alone.
///
/// # Errors
/// The error that the kernel returns; `is_exists` when it is there already.
pub fn add(socket: &mut Socket, index: u32, cidr: Cidr) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWADDR, CREATE | EXCL, |body| write(body, index, cidr, true, false))
}

/// Like [`add`], but an IPv6 address can be used only after duplicate address detection on the link (RFC 4862, section 5.4), which
/// takes a second.
///
/// # Errors
/// The error that the kernel returns; `is_exists` when it is there already.
pub fn add_with_dad(socket: &mut Socket, index: u32, cidr: Cidr) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWADDR, CREATE | EXCL, |body| write(body, index, cidr, true, true))
}

/// Removes an address.
///
/// # Errors
/// The error that the kernel returns; `is_not_found` when it is not there.
pub fn delete(socket: &mut Socket, index: u32, cidr: Cidr) -> Result<(), NetlinkError> {
    socket.request(RTM_DELADDR, 0, |body| write(body, index, cidr, false, false))
}
