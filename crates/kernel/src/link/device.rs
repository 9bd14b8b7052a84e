//! Links of the daemon as objects: the devices of the backends.

use std::net::{IpAddr, Ipv4Addr};

use flannel::object::{Link, LinkKind};
use flannel::{IfName, Mac, Vni};

use super::{
    IFF_UP, IFLA_ADDRESS, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_IPTUN_LOCAL, IFLA_IPTUN_REMOTE, IFLA_LINKINFO, IFLA_MTU, IFLA_TXQLEN,
    IFLA_VXLAN_GBP, IFLA_VXLAN_ID, IFLA_VXLAN_LEARNING, IFLA_VXLAN_LINK, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_PORT, LinkInfo,
    RTM_NEWLINK, get, ifinfomsg, linkinfo,
};
use crate::netlink::{CREATE, EXCL, NetlinkError, Socket};

const IFLA_IPTUN_TTL: u16 = 4;
const IFLA_IPTUN_TOS: u16 = 5;
const IFLA_IPTUN_PROTO: u16 = 9;
const IFLA_IPTUN_PMTUDISC: u16 = 10;

/// Creates the link, or changes those attributes that can be changed in place. The diff deletes a link first that differs in other
/// attributes.
pub(crate) fn set(socket: &mut Socket, link: &Link) -> Result<(), NetlinkError> {
    let flags = if link.up { IFF_UP } else { 0 };
    if matches!(link.kind, LinkKind::Udp { .. } | LinkKind::WireGuard { .. }) {
        // The device exists: it has just been created or found. It has no MAC address.
        return socket.request(RTM_NEWLINK, 0, |body| {
            body.bytes(&ifinfomsg(0, flags, IFF_UP)).attr_str(IFLA_IFNAME, link.name.as_str()).attr_u32(IFLA_MTU, link.mtu);
        });
    }
    if let LinkKind::Ipip { local } = link.kind {
        return set_ipip(socket, link, local);
    }
    let LinkKind::Vxlan { vni, port, local, lower, gbp, learning } = &link.kind else {
        return Err(NetlinkError::Garbled("cannot set a link of a foreign kind"));
    };
    let lower =
        get(socket, *lower)?.ok_or(NetlinkError::Refused { errno: libc::ENODEV, message: format!("there is no interface {lower}") })?;
    if let Some(have) = get(socket, link.name)? {
        // The kernel accepts changes of the MTU and of VXLAN attributes only in separate requests.
        if have.vxlan.is_some_and(|vxlan| (vxlan.learning, vxlan.local, vxlan.lower) != (*learning, Some(*local), lower.index)) {
            socket.request(RTM_NEWLINK, 0, |body| {
                body.bytes(&ifinfomsg(have.index, 0, 0));
                linkinfo(body, "vxlan", |data| {
                    data.attr_u32(IFLA_VXLAN_LINK, lower.index).attr(IFLA_VXLAN_LEARNING, &[u8::from(*learning)]);
                    data.attr_ip(if local.is_ipv4() { IFLA_VXLAN_LOCAL } else { IFLA_VXLAN_LOCAL6 }, *local);
                });
            })?;
        }
        return socket.request(RTM_NEWLINK, 0, |body| {
            body.bytes(&ifinfomsg(have.index, flags, IFF_UP)).attr_u32(IFLA_MTU, link.mtu);
            if have.mac != Some(link.mac) {
                body.attr(IFLA_ADDRESS, &link.mac.0);
            }
        });
    }
    socket.request(RTM_NEWLINK, CREATE | EXCL, |body| {
        body.bytes(&ifinfomsg(0, flags, IFF_UP));
        body.attr_str(IFLA_IFNAME, link.name.as_str()).attr_u32(IFLA_MTU, link.mtu).attr(IFLA_ADDRESS, &link.mac.0);
        body.attr_u32(IFLA_TXQLEN, 0);
        linkinfo(body, "vxlan", |data| {
            data.attr_u32(IFLA_VXLAN_ID, vni.get()).attr_u32(IFLA_VXLAN_LINK, lower.index);
            data.attr_ip(if local.is_ipv4() { IFLA_VXLAN_LOCAL } else { IFLA_VXLAN_LOCAL6 }, *local);
            data.attr(IFLA_VXLAN_PORT, &port.to_be_bytes()).attr(IFLA_VXLAN_LEARNING, &[u8::from(*learning)]);
            if *gbp {
                data.attr(IFLA_VXLAN_GBP, &[]);
            }
        });
    })
}

/// Creates or changes an IPIP device with the attributes of Go flanneld's: any remote, the TTL and TOS of the inner packet, any
/// protocol, no path MTU discovery of its own.
fn set_ipip(socket: &mut Socket, link: &Link, local: IpAddr) -> Result<(), NetlinkError> {
    let flags = if link.up { IFF_UP } else { 0 };
    let create = if get(socket, link.name)?.is_some() { 0 } else { CREATE | EXCL };
    socket.request(RTM_NEWLINK, create, |body| {
        body.bytes(&ifinfomsg(0, flags, IFF_UP)).attr_str(IFLA_IFNAME, link.name.as_str());
        linkinfo(body, "ipip", |data| {
            data.attr_ip(IFLA_IPTUN_LOCAL, local).attr_ip(IFLA_IPTUN_REMOTE, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            for attribute in [IFLA_IPTUN_TTL, IFLA_IPTUN_TOS, IFLA_IPTUN_PROTO, IFLA_IPTUN_PMTUDISC] {
                data.attr(attribute, &[0]);
            }
        });
    })?;
    // The kernel overwrites the MTU of a tunnel when it changes its attributes.
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, link.name.as_str()).attr_u32(IFLA_MTU, link.mtu);
    })
}

/// Creates a WireGuard device, administratively down and without a key.
pub(crate) fn create_wireguard(socket: &mut Socket, link: &Link) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, CREATE | EXCL, |body| {
        body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, link.name.as_str()).attr_u32(IFLA_MTU, link.mtu);
        body.attr_u32(IFLA_TXQLEN, 0).nest(IFLA_LINKINFO, |info| {
            info.attr_str(IFLA_INFO_KIND, "wireguard");
        });
    })
}

/// Converts a link into an object, for comparison with the desired one.
pub(crate) fn to_object(link: &LinkInfo, name_of: impl Fn(u32) -> Option<IfName>) -> Link {
    let vxlan = link.vxlan.and_then(|vxlan| {
        let (vni, local, lower) = (Vni::new(vxlan.vni)?, vxlan.local?, name_of(vxlan.lower)?);
        Some(LinkKind::Vxlan { vni, port: vxlan.port, local, lower, gbp: vxlan.gbp, learning: vxlan.learning })
    });
    let ipip = link.ipip.map(|local| LinkKind::Ipip { local });
    let kind = vxlan.or(ipip).unwrap_or_else(|| LinkKind::Other(link.kind.clone()));
    Link { name: link.name, kind, mac: link.mac.unwrap_or(Mac([0; 6])), mtu: link.mtu, up: link.up }
}
