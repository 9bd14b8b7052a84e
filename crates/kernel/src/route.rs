//! Reads and writes unicast and blackhole routes of the main table (`linux/rtnetlink.h`).

use std::net::IpAddr;

use flannel::node::{Reach, RouteFact};
use flannel::object::ROUTE_PROTOCOL;
use flannel::{Family, Subnet};

use crate::addr::family_number;
use crate::netlink::{Batch, Body, CREATE, EXCL, NetlinkError, REPLACE, Socket, attrs, ip_in, u32_at};

pub(crate) const RTM_NEWROUTE: u16 = 24;
pub(crate) const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
const RTA_TABLE: u16 = 15;

const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_NOWHERE: u8 = 255;
const RTPROT_BOOT: u8 = 3;
const RTNH_F_ONLINK: u32 = 4;

/// A unicast route of the main table, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteInfo {
    /// Destination.
    pub dst: Subnet,
    /// Index of the output interface; 0 for a multipath route.
    pub oif: u32,
    /// Gateway.
    pub via: Option<IpAddr>,
    /// Whether it has a gateway, of either family.
    pub gateway: bool,
    /// Metric.
    pub metric: u32,
    /// `rtm_protocol`
    pub protocol: u8,
    /// `RTNH_F_ONLINK`
    pub onlink: bool,
    /// Whether it has several nexthops.
    pub multipath: bool,
    /// Of a multipath route, the interface of the first usable next hop; else 0.
    pub first_hop: u32,
}

/// Decodes a route message (without its netlink header). Returns `None` for routes of other tables and types.
pub fn decode(body: &[u8]) -> Option<RouteInfo> {
    let [family, dst_len, _, _, table, protocol, _, kind] = *body.first_chunk::<8>()?;
    let family = match family {
        2 => Family::V4,
        10 => Family::V6,
        _ => return None,
    };
    let onlink = u32_at(body, 8)? & RTNH_F_ONLINK != 0;
    let (mut dst, mut oif, mut via, mut metric, mut table) = (family.unspecified(), 0, None, 0, u32::from(table));
    let (mut multipath, mut first_hop, mut gateway) = (false, 0, false);
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            RTA_DST => dst = ip_in(value)?,
            RTA_OIF => oif = u32_at(value, 0)?,
            RTA_GATEWAY => {
                via = ip_in(value);
                gateway = true;
            }
            // A gateway of the other family (RFC 5549).
            RTA_VIA => gateway = true,
            RTA_PRIORITY => metric = u32_at(value, 0)?,
            RTA_TABLE => table = u32_at(value, 0)?,
            RTA_MULTIPATH => {
                multipath = true;
                first_hop = first_usable_hop(value);
            }
            _ => {}
        }
    }
    let dst = Subnet::new(dst, dst_len).ok().filter(|dst| dst.family() == family)?;
    let wanted = table == u32::from(RT_TABLE_MAIN) && kind == RTN_UNICAST;
    wanted.then_some(RouteInfo { dst, oif, via, metric, protocol, onlink, multipath, first_hop, gateway })
}

/// The interface of the first next hop that is neither dead nor without carrier, in the value of `RTA_MULTIPATH`: a list of `struct
/// rtnexthop` (`linux/rtnetlink.h`), each with attributes of its own. 0 if there is none.
fn first_usable_hop(mut hops: &[u8]) -> u32 {
    const RTNH_F_DEAD: u8 = 1;
    const RTNH_F_LINKDOWN: u8 = 16;
    while let Some(&[a, b, flags, _]) = hops.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        if flags & (RTNH_F_DEAD | RTNH_F_LINKDOWN) == 0 {
            return u32_at(hops, 4).unwrap_or(0);
        }
        // A length of 0 would go on for ever; each entry is padded to four bytes.
        let Some(rest) = hops.get(length.max(8).next_multiple_of(4)..) else { break };
        hops = rest;
    }
    0
}

/// The routes that a dump returns; the kernel does the filtering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Every unicast route of the main table.
    All,
    /// Routes with flanneld's protocol.
    Ours,
    /// Routes through this interface.
    Oif(u32),
    /// Routes through this interface with the protocol of Go flanneld (boot).
    BootOif(u32),
}

/// Reads the routes of a family.
///
/// # Errors
/// The error that the kernel returns.
pub fn list(socket: &mut Socket, family: Family, filter: Filter) -> Result<Vec<RouteInfo>, NetlinkError> {
    let protocol = match filter {
        Filter::All | Filter::Oif(_) => 0,
        Filter::Ours => ROUTE_PROTOCOL,
        Filter::BootOif(_) => RTPROT_BOOT,
    };
    let header = [family_number(family), 0, 0, 0, RT_TABLE_MAIN, protocol, 0, RTN_UNICAST, 0, 0, 0, 0];
    let body = |body: &mut Body<'_>| {
        body.bytes(&header).attr_u32(RTA_TABLE, u32::from(RT_TABLE_MAIN));
        if let Filter::Oif(index) | Filter::BootOif(index) = filter {
            body.attr_u32(RTA_OIF, index);
        }
    };
    match socket.dump(RTM_GETROUTE, body, decode) {
        // A table or family that does not exist in the kernel (yet) holds no routes.
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(Vec::new()),
        other => other,
    }
}

/// A route of any table, kind and program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AnyRoute {
    pub(crate) dst: Subnet,
    /// `rtm_type`
    pub(crate) kind: u8,
    pub(crate) table: u32,
    pub(crate) metric: u32,
    pub(crate) via: Option<IpAddr>,
    /// Index of the output interface; of a multipath route that of its first usable next hop.
    pub(crate) oif: u32,
    pub(crate) protocol: u8,
}

/// Decodes a route message of any table and kind.
pub(crate) fn decode_any(body: &[u8]) -> Option<AnyRoute> {
    let [family, dst_len, _, _, table, protocol, _, kind] = *body.first_chunk::<8>()?;
    let family = Family::ALL.into_iter().find(|known| family_number(*known) == family)?;
    let mut dst = family.unspecified();
    let mut found = AnyRoute { dst: Subnet::new(dst, 0).ok()?, kind, table: table.into(), metric: 0, via: None, oif: 0, protocol };
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            RTA_DST => dst = ip_in(value)?,
            RTA_OIF => found.oif = u32_at(value, 0)?,
            RTA_GATEWAY => found.via = ip_in(value),
            RTA_PRIORITY => found.metric = u32_at(value, 0)?,
            RTA_TABLE => found.table = u32_at(value, 0)?,
            RTA_MULTIPATH => found.oif = first_usable_hop(value),
            _ => {}
        }
    }
    found.dst = Subnet::new(dst, dst_len).ok().filter(|dst| dst.family() == family)?;
    Some(found)
}

/// Reads a table, with routes of every kind and program.
pub(crate) fn dump_table<T>(
    socket: &mut Socket,
    family: Family,
    table: u32,
    read: impl FnMut(&[u8]) -> Option<T>,
) -> Result<Vec<T>, NetlinkError> {
    let header = [family_number(family), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let dump = socket.dump(
        RTM_GETROUTE,
        |body| {
            body.bytes(&header).attr_u32(RTA_TABLE, table);
        },
        read,
    );
    match dump {
        // A table or family that does not exist in the kernel (yet) holds no routes.
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(Vec::new()),
        other => other,
    }
}

/// Reads the routes that the choice of the external interface needs.
///
/// # Errors
/// The error that the kernel returns.
pub fn facts(socket: &mut Socket) -> Result<Vec<RouteFact>, NetlinkError> {
    let mut facts = Vec::new();
    for family in Family::ALL {
        let routes = list(socket, family, Filter::All)?;
        facts.extend(routes.iter().map(|r| RouteFact {
            dst: r.dst,
            oif: if r.multipath { r.first_hop } else { r.oif },
            gateway: r.gateway || r.multipath,
        }));
    }
    Ok(facts)
}

/// Looks up the route to an address, like `ip route get`.
///
/// # Errors
/// The error that the kernel returns: `ENETUNREACH` when it has no route.
pub fn reach(socket: &mut Socket, ip: IpAddr) -> Result<Reach, NetlinkError> {
    let family = Family::of(ip);
    let header = [family_number(family), family.bits(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let decode = |body: &[u8]| {
        let mut reach = Reach { oif: 0, source: None };
        for (kind, value) in attrs(body.get(12..)?) {
            match kind {
                RTA_OIF => reach.oif = u32_at(value, 0)?,
                RTA_PREFSRC => reach.source = ip_in(value),
                _ => {}
            }
        }
        Some(reach)
    };
    socket.get(
        RTM_GETROUTE,
        |body| {
            body.bytes(&header).attr_ip(RTA_DST, ip);
        },
        decode,
    )
}

/// Appends a request that adds a route, or replaces the one with the same destination and metric.
pub(crate) fn set(batch: &mut Batch, route: &flannel::object::Route, oif: u32) {
    batch.message(RTM_NEWROUTE, CREATE | REPLACE, |body| {
        let scope = if route.via.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        let flags = if route.onlink { RTNH_F_ONLINK } else { 0 };
        write(body, route.dst, route.protocol, scope, RTN_UNICAST, flags);
        body.attr_u32(RTA_OIF, oif).attr_u32(RTA_PRIORITY, route.metric);
        if let Some(via) = route.via {
            body.attr_ip(RTA_GATEWAY, via);
        }
    });
}

/// Appends a request that deletes a route. The request names the protocol, because the kernel takes metric 0 as any metric: deleting
/// the route of a Go flanneld must not delete ours, which has another metric.
pub(crate) fn delete(batch: &mut Batch, route: &flannel::object::Route, oif: u32) {
    batch.message(RTM_DELROUTE, 0, |body| {
        write(body, route.dst, route.protocol, RT_SCOPE_NOWHERE, 0, 0);
        body.attr_u32(RTA_OIF, oif).attr_u32(RTA_PRIORITY, route.metric);
        if let Some(via) = route.via {
            body.attr_ip(RTA_GATEWAY, via);
        }
    });
}

fn write(body: &mut Body<'_>, dst: Subnet, protocol: u8, scope: u8, kind: u8, flags: u32) {
    let family = family_number(dst.family());
    body.bytes(&[family, dst.prefix_len(), 0, 0, RT_TABLE_MAIN, protocol, scope, kind]).bytes(&flags.to_ne_bytes());
    if dst.prefix_len() > 0 {
        body.attr_ip(RTA_DST, dst.network());
    }
}

/// The metric of the daemon's blackhole routes: the highest, so that every other route to the same destination is preferred, above
/// all the one of the pods' bridge.
const BLACKHOLE_METRIC: u32 = u32::MAX;

/// Adds or replaces a blackhole route of the daemon.
pub(crate) fn set_blackhole(socket: &mut Socket, dst: Subnet) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWROUTE, CREATE | REPLACE, |body| {
        write(body, dst, ROUTE_PROTOCOL, RT_SCOPE_UNIVERSE, RTN_BLACKHOLE, 0);
        body.attr_u32(RTA_PRIORITY, BLACKHOLE_METRIC);
    })
}

/// Deletes a blackhole route of the daemon.
pub(crate) fn delete_blackhole(socket: &mut Socket, dst: Subnet) -> Result<(), NetlinkError> {
    socket.request(RTM_DELROUTE, 0, |body| {
        write(body, dst, ROUTE_PROTOCOL, RT_SCOPE_NOWHERE, RTN_BLACKHOLE, 0);
        body.attr_u32(RTA_PRIORITY, BLACKHOLE_METRIC);
    })
}

/// Reads the daemon's blackhole routes of a family.
pub(crate) fn list_blackholes(socket: &mut Socket, family: Family) -> Result<Vec<Subnet>, NetlinkError> {
    let header = [family_number(family), 0, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, 0, RTN_BLACKHOLE, 0, 0, 0, 0];
    let dump = socket.dump(
        RTM_GETROUTE,
        |body| {
            body.bytes(&header).attr_u32(RTA_TABLE, u32::from(RT_TABLE_MAIN));
        },
        decode_blackhole,
    );
    match dump {
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(Vec::new()),
        other => other,
    }
}

/// Decodes the destination and metric of a route of the main table, of any type: the kernel identifies a route to replace by these.
pub(crate) fn decode_key(body: &[u8]) -> Option<(Subnet, u32)> {
    let [family, dst_len, _, _, table, ..] = *body.first_chunk::<8>()?;
    let (mut dst, mut metric) = (None, 0);
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            RTA_DST => dst = ip_in(value),
            RTA_PRIORITY => metric = u32_at(value, 0)?,
            _ => {}
        }
    }
    let dst = Subnet::new(dst?, dst_len).ok().filter(|dst| family_number(dst.family()) == family && table == RT_TABLE_MAIN)?;
    Some((dst, metric))
}

/// Decodes the destination of a blackhole route of the daemon; `None` for other routes.
pub(crate) fn decode_blackhole(body: &[u8]) -> Option<Subnet> {
    let [family, dst_len, _, _, table, protocol, _, kind] = *body.first_chunk::<8>()?;
    let ours = table == RT_TABLE_MAIN && protocol == ROUTE_PROTOCOL && kind == RTN_BLACKHOLE;
    let dst = attrs(body.get(12..)?).find(|(kind, _)| *kind == RTA_DST).and_then(|(_, value)| ip_in(value))?;
    Subnet::new(dst, dst_len).ok().filter(|dst| ours && family_number(dst.family()) == family)
}

/// Optional attributes of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Path MTU in bytes.
    pub mtu: Option<u32>,
    /// The TCP MSS to advertise, in bytes.
    pub advmss: Option<u32>,
    /// Metric.
    pub priority: Option<u32>,
    /// Routing table; `None` means the main table.
    pub table: Option<u32>,
    /// `rtm_scope`
    pub scope: Option<u8>,
}

/// What became of a route that was to be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// It was added.
    New,
    /// It existed: same destination, gateway and interface.
    Existed,
    /// Another route to the same destination exists, and stays.
    Taken,
}

/// Adds a route that is not flanneld's: a pod's or a lab host's. It has protocol boot, as `ip route add` gives it.
///
/// # Errors
/// The error that the kernel returns; `is_exists` when there is another route to the same destination.
pub fn add(socket: &mut Socket, dst: Subnet, via: Option<IpAddr>, oif: u32) -> Result<(), NetlinkError> {
    match add_with(socket, dst, via, oif, Options::default())? {
        Added::New | Added::Existed => Ok(()),
        Added::Taken => Err(NetlinkError::Refused { errno: libc::EEXIST, message: format!("another route to {dst} exists") }),
    }
}

/// Like [`add`], with options.
///
/// # Errors
/// The error that the kernel returns.
pub fn add_with(socket: &mut Socket, dst: Subnet, via: Option<IpAddr>, oif: u32, options: Options) -> Result<Added, NetlinkError> {
    match request_add(socket, dst, via, oif, options) {
        Ok(()) => Ok(Added::New),
        Err(error) if error.is_exists() => match has(socket, dst, via, oif, options)? {
            true => Ok(Added::Existed),
            false => Ok(Added::Taken),
        },
        Err(error) => Err(error),
    }
}

/// Is there a route to this destination by this gateway and interface? Without a gateway any by the interface counts.
fn has(socket: &mut Socket, dst: Subnet, via: Option<IpAddr>, oif: u32, options: Options) -> Result<bool, NetlinkError> {
    let table = options.table.filter(|table| *table != 0).unwrap_or(u32::from(RT_TABLE_MAIN));
    let family = family_number(dst.family());
    let matches = |body: &[u8]| {
        let dst_len = *body.get(1)?;
        let (mut found, mut gateway, mut interface) = (dst.family().unspecified(), None, 0);
        for (kind, value) in attrs(body.get(12..)?) {
            match kind {
                RTA_DST => found = ip_in(value)?,
                RTA_GATEWAY => gateway = ip_in(value),
                RTA_OIF => interface = u32_at(value, 0)?,
                _ => {}
            }
        }
        let is_it = dst_len == dst.prefix_len() && found == dst.network() && interface == oif && via.is_none_or(|via| gateway == Some(via));
        is_it.then_some(())
    };
    let body = |body: &mut Body<'_>| {
        body.bytes(&[family, 0, 0, 0, 0, 0, 0, RTN_UNICAST, 0, 0, 0, 0]).attr_u32(RTA_TABLE, table).attr_u32(RTA_OIF, oif);
    };
    Ok(!socket.dump(RTM_GETROUTE, body, matches)?.is_empty())
}

fn request_add(socket: &mut Socket, dst: Subnet, via: Option<IpAddr>, oif: u32, options: Options) -> Result<(), NetlinkError> {
    const RTA_METRICS: u16 = 8;
    const RTAX_MTU: u16 = 2;
    const RTAX_ADVMSS: u16 = 8;
    socket.request(RTM_NEWROUTE, CREATE | EXCL, |body| {
        let scope = options.scope.unwrap_or(if via.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK });
        let start = body.offset();
        write(body, dst, RTPROT_BOOT, scope, RTN_UNICAST, 0);
        body.attr_u32(RTA_OIF, oif);
        if let Some(via) = via {
            body.attr_ip(RTA_GATEWAY, via);
        }
        if let Some(priority) = options.priority {
            body.attr_u32(RTA_PRIORITY, priority);
        }
        if let Some(table) = options.table {
            // The table field of the header has one byte; the kernel reads the attribute instead.
            body.set(start + 4, 0);
            body.attr_u32(RTA_TABLE, table);
        }
        if options.mtu.is_some() || options.advmss.is_some() {
            body.nest(RTA_METRICS, |metrics| {
                for (kind, value) in [(RTAX_MTU, options.mtu), (RTAX_ADVMSS, options.advmss)] {
                    if let Some(value) = value {
                        metrics.attr_u32(kind, value);
                    }
                }
            });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A next hop of `struct rtnexthop`, with a gateway attribute behind it.
    fn hop(flags: u8, index: u32) -> Vec<u8> {
        let mut bytes = vec![16, 0, flags, 0];
        bytes.extend(index.to_ne_bytes());
        bytes.extend([8, 0, 5, 0, 192, 0, 2, 1]);
        bytes
    }

    #[test]
    fn first_usable_next_hop_of_a_multipath_route_counts() {
        assert_eq!(first_usable_hop(&[hop(0, 3), hop(0, 4)].concat()), 3);
        assert_eq!(first_usable_hop(&[hop(1, 3), hop(16, 4), hop(0, 5)].concat()), 5);
        assert_eq!(first_usable_hop(&hop(1, 3)), 0);
        for garbled in [&[][..], &[0, 0, 1, 0], &[0, 0, 1, 0, 0, 0, 0, 0], &[255, 255, 1, 0, 1]] {
            assert_eq!(first_usable_hop(garbled), 0);
        }
    }
}
