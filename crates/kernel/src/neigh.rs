//! Reads and writes neighbour entries and the FDB entries of VXLAN devices, which the kernel treats as neighbours of the bridge family
//! (`linux/neighbour.h`).

use std::net::IpAddr;

use flannel::{Family, Mac};

use crate::addr::family_number;
use crate::netlink::{Batch, CREATE, NetlinkError, REPLACE, Socket, attrs, ip_in, u16_at, u32_at};

pub(crate) const RTM_NEWNEIGH: u16 = 28;
pub(crate) const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_IFINDEX: u16 = 8;

const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 2;
const RTN_UNICAST: u8 = 1;
const AF_BRIDGE: u8 = 7;

/// A neighbour entry, or an FDB entry of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeighInfo {
    /// Interface index.
    pub index: u32,
    /// Whether it is an FDB entry.
    pub fdb: bool,
    /// The IP address of the neighbour, or of the host that frames are sent to.
    pub ip: IpAddr,
    /// The MAC address.
    pub mac: Mac,
    /// Whether the entry is permanent.
    pub permanent: bool,
}

/// Decodes a neighbour message (without its netlink header). Returns `None` for entries without both addresses.
pub fn decode(body: &[u8]) -> Option<NeighInfo> {
    let (index, fdb, ip, mac) = decode_key(body)?;
    let permanent = u16_at(body, 8)? & NUD_PERMANENT != 0;
    Some(NeighInfo { index, fdb, ip: ip?, mac: mac?, permanent })
}

/// Decodes the identity of an entry, also from a message about its deletion, which may lack the other address.
pub(crate) fn decode_key(body: &[u8]) -> Option<(u32, bool, Option<IpAddr>, Option<Mac>)> {
    let (mut ip, mut mac) = (None, None);
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            NDA_DST => ip = ip_in(value),
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some((u32_at(body, 4)?, *body.first()? == AF_BRIDGE, ip, mac))
}

/// Reads the permanent neighbour entries of an interface, of both families.
///
/// # Errors
/// The error that the kernel returns.
pub fn list(socket: &mut Socket, index: u32) -> Result<Vec<NeighInfo>, NetlinkError> {
    list_family(socket, 0, index)
}

/// Reads the permanent FDB entries of a VXLAN device.
///
/// # Errors
/// The error that the kernel returns.
pub fn list_fdb(socket: &mut Socket, index: u32) -> Result<Vec<NeighInfo>, NetlinkError> {
    list_family(socket, AF_BRIDGE, index)
}

fn list_family(socket: &mut Socket, family: u8, index: u32) -> Result<Vec<NeighInfo>, NetlinkError> {
    let header = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let read = |body: &[u8]| decode(body).filter(|entry| entry.permanent && entry.index == index);
    socket.dump(
        RTM_GETNEIGH,
        |body| {
            body.bytes(&header).attr_u32(NDA_IFINDEX, index);
        },
        read,
    )
}

/// Counts the entries of a family that are not permanent.
///
/// # Errors
/// The error that the kernel returns.
pub(crate) fn count_transient(socket: &mut Socket, family: Family) -> Result<usize, NetlinkError> {
    let header = [family_number(family), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let found = socket.dump(
        RTM_GETNEIGH,
        |body| {
            body.bytes(&header);
        },
        |body| (u16_at(body, 8)? & NUD_PERMANENT == 0).then_some(()),
    )?;
    Ok(found.len())
}

fn ndmsg(family: u8, index: u32, flags: u8) -> [u8; 12] {
    let [a, b, c, d] = index.to_ne_bytes();
    let [s0, s1] = NUD_PERMANENT.to_ne_bytes();
    [family, 0, 0, 0, a, b, c, d, s0, s1, flags, RTN_UNICAST]
}

pub(crate) fn set(batch: &mut Batch, index: u32, ip: IpAddr, mac: Mac) {
    let family = family_number(Family::of(ip));
    batch.message(RTM_NEWNEIGH, CREATE | REPLACE, |body| {
        body.bytes(&ndmsg(family, index, 0)).attr_ip(NDA_DST, ip).attr(NDA_LLADDR, &mac.0);
    });
}

pub(crate) fn delete(batch: &mut Batch, index: u32, ip: IpAddr) {
    let family = family_number(Family::of(ip));
    batch.message(RTM_DELNEIGH, 0, |body| {
        body.bytes(&ndmsg(family, index, 0)).attr_ip(NDA_DST, ip);
    });
}

pub(crate) fn set_fdb(batch: &mut Batch, index: u32, mac: Mac, dst: IpAddr) {
    batch.message(RTM_NEWNEIGH, CREATE | REPLACE, |body| {
        body.bytes(&ndmsg(AF_BRIDGE, index, NTF_SELF)).attr(NDA_LLADDR, &mac.0).attr_ip(NDA_DST, dst);
    });
}

pub(crate) fn delete_fdb(batch: &mut Batch, index: u32, mac: Mac, dst: IpAddr) {
    batch.message(RTM_DELNEIGH, 0, |body| {
        body.bytes(&ndmsg(AF_BRIDGE, index, NTF_SELF)).attr(NDA_LLADDR, &mac.0).attr_ip(NDA_DST, dst);
    });
}
