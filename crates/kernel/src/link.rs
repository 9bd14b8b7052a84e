//! Reads and writes links: bridges, veth pairs and VXLAN devices (`linux/if_link.h`).

mod device;

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use flannel::object::bridge::Port;
use flannel::{IfName, Mac};

pub(crate) use self::device::{create_wireguard, set, to_object};
use crate::netlink::{Body, CREATE, EXCL, NetlinkError, Socket, attrs, ip_in, str_in, u16_at, u32_at};

pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;

const IFF_UP: u32 = 1;
const IFF_PROMISC: u32 = 0x100;
const IFF_ALLMULTI: u32 = 0x200;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_TXQLEN: u16 = 13;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_IFALIAS: u16 = 20;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_LINK_NETNSID: u16 = 37;

const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;

const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LINK: u16 = 3;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_GBP: u16 = 23;

/// Attributes of an IPIP device (`linux/if_tunnel.h`).
const IFLA_IPTUN_LOCAL: u16 = 2;
const IFLA_IPTUN_REMOTE: u16 = 3;

const IFLA_AF_SPEC: u16 = 26;
const IFLA_BR_VLAN_FILTERING: u16 = 7;

const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_ISOLATED: u16 = 33;

/// `IF_OPER_UP` (RFC 2863)
pub const OPER_UP: u8 = 6;
/// `IF_OPER_UNKNOWN`: the state of links that report none, such as VXLAN devices and `lo`.
pub const OPER_UNKNOWN: u8 = 0;

/// A link, as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkInfo {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: IfName,
    /// MAC address, if the link has an Ethernet address.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is in promiscuous mode.
    pub promiscuous: bool,
    /// Whether it receives all multicast frames.
    pub all_multicast: bool,
    /// Length of the transmit queue, in packets.
    pub tx_queue_len: u32,
    /// The other end of a veth pair, or the lower interface; 0 for none.
    pub link: u32,
    /// Operational state (RFC 2863).
    pub operstate: u8,
    /// Index of the bridge it is a port of; 0 for none.
    pub master: u32,
    /// `IFLA_INFO_KIND`, empty for a physical link.
    pub kind: String,
    /// The attributes of a VXLAN device.
    pub vxlan: Option<VxlanInfo>,
    /// The source address of an IPIP device that has no remote address.
    pub ipip: Option<IpAddr>,
    /// Its settings as a bridge port.
    pub port: Port,
    /// Whether its other end, or its lower interface, is in another network namespace.
    pub reaches_elsewhere: bool,
    /// This namespace's number for that one; -1 for none.
    pub netns: Option<i32>,
    /// Whether it is a bridge that filters VLANs.
    pub vlan_filtering: bool,
}

/// The attributes of a VXLAN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VxlanInfo {
    /// Network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source address of the outer packets.
    pub local: Option<IpAddr>,
    /// Index of the lower interface; 0 for none.
    pub lower: u32,
    /// Whether the group-based policy extension is enabled.
    pub gbp: bool,
    /// Whether source-address learning is enabled.
    pub learning: bool,
}

fn ifinfomsg(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

/// Decodes a link message (without its netlink header).
pub fn decode(body: &[u8]) -> Option<LinkInfo> {
    let index = u32_at(body, 4)?;
    let flags = u32_at(body, 8)?;
    let mut link = LinkInfo {
        index,
        name: "?".parse().ok()?,
        mac: None,
        mtu: 0,
        up: flags & IFF_UP != 0,
        promiscuous: flags & IFF_PROMISC != 0,
        all_multicast: flags & IFF_ALLMULTI != 0,
        tx_queue_len: 0,
        link: 0,
        operstate: 0,
        master: 0,
        kind: String::new(),
        vxlan: None,
        ipip: None,
        port: Port::default(),
        reaches_elsewhere: false,
        netns: None,
        vlan_filtering: false,
    };
    let mut named = false;
    for (kind, value) in attrs(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => {
                link.name = str_in(value)?.parse().ok()?;
                named = true;
            }
            IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_LINK => link.link = u32_at(value, 0)?,
            IFLA_TXQLEN => link.tx_queue_len = u32_at(value, 0)?,
            IFLA_MASTER => link.master = u32_at(value, 0)?,
            IFLA_OPERSTATE => link.operstate = *value.first()?,
            IFLA_LINK_NETNSID => {
                link.reaches_elsewhere = true;
                link.netns = u32_at(value, 0).map(u32::cast_signed);
            }
            IFLA_LINKINFO => {
                for (kind, value) in attrs(value) {
                    match kind {
                        IFLA_INFO_KIND => link.kind = str_in(value)?.to_owned(),
                        IFLA_INFO_DATA if link.kind == "vxlan" => link.vxlan = Some(decode_vxlan(value)?),
                        IFLA_INFO_DATA if link.kind == "ipip" => link.ipip = decode_ipip(value),
                        IFLA_INFO_DATA if link.kind == "bridge" => {
                            link.vlan_filtering = attrs(value).any(|(kind, on)| kind == IFLA_BR_VLAN_FILTERING && on.first() == Some(&1));
                        }
                        IFLA_INFO_SLAVE_DATA => link.port = decode_port(value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    named.then_some(link)
}

fn decode_port(bytes: &[u8]) -> Port {
    let is_set = |wanted| attrs(bytes).any(|(kind, on)| kind == wanted && on.first() == Some(&1));
    Port { hairpin: is_set(IFLA_BRPORT_MODE), isolated: is_set(IFLA_BRPORT_ISOLATED) }
}

fn decode_vxlan(bytes: &[u8]) -> Option<VxlanInfo> {
    let mut vxlan = VxlanInfo::default();
    for (kind, value) in attrs(bytes) {
        match kind {
            IFLA_VXLAN_ID => vxlan.vni = u32_at(value, 0)?,
            IFLA_VXLAN_LINK => vxlan.lower = u32_at(value, 0)?,
            IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => vxlan.local = ip_in(value),
            IFLA_VXLAN_LEARNING => vxlan.learning = *value.first()? != 0,
            IFLA_VXLAN_PORT => vxlan.port = u16::from_be(u16_at(value, 0)?),
            IFLA_VXLAN_GBP => vxlan.gbp = true,
            _ => {}
        }
    }
    Some(vxlan)
}

fn decode_ipip(bytes: &[u8]) -> Option<IpAddr> {
    let address = |wanted| attrs(bytes).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| ip_in(value));
    let is_open = address(IFLA_IPTUN_REMOTE).is_none_or(|remote| remote.is_unspecified());
    address(IFLA_IPTUN_LOCAL).filter(|_| is_open)
}

/// Reads one link by name; `None` if it does not exist.
///
/// # Errors
/// The error that the kernel returns.
pub fn get(socket: &mut Socket, name: IfName) -> Result<Option<LinkInfo>, NetlinkError> {
    let answer = socket.get(
        RTM_GETLINK,
        |body| {
            body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, name.as_str());
        },
        decode,
    );
    found(answer)
}

/// Reads one link by index; `None` if it does not exist.
///
/// # Errors
/// The error that the kernel returns.
pub fn get_index(socket: &mut Socket, index: u32) -> Result<Option<LinkInfo>, NetlinkError> {
    found(socket.get(
        RTM_GETLINK,
        |body| {
            body.bytes(&ifinfomsg(index, 0, 0));
        },
        decode,
    ))
}

fn found(answer: Result<LinkInfo, NetlinkError>) -> Result<Option<LinkInfo>, NetlinkError> {
    match answer {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads all links.
///
/// # Errors
/// The error that the kernel returns.
pub fn list(socket: &mut Socket) -> Result<Vec<LinkInfo>, NetlinkError> {
    // RTEXT_FILTER_SKIP_STATS: the counters are not used.
    socket.dump(
        RTM_GETLINK,
        |body| {
            body.bytes(&ifinfomsg(0, 0, 0)).attr_u32(IFLA_EXT_MASK, 1 << 3);
        },
        decode,
    )
}

fn linkinfo(body: &mut Body<'_>, kind: &str, data: impl FnOnce(&mut Body<'_>)) {
    body.nest(IFLA_LINKINFO, |info| {
        info.attr_str(IFLA_INFO_KIND, kind).nest(IFLA_INFO_DATA, data);
    });
}

/// Deletes a link.
///
/// # Errors
/// The error that the kernel returns; `is_not_found` when the link does not exist.
pub fn delete(socket: &mut Socket, name: IfName) -> Result<(), NetlinkError> {
    socket.request(RTM_DELLINK, 0, |body| {
        body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, name.as_str());
    })
}

/// Creates a bridge, administratively down. MTU 0 leaves the choice to the kernel. A bridge that is created with a MAC keeps it;
/// without one it takes the lowest of its ports, and another when that port goes.
///
/// # Errors
/// The error that the kernel returns; `is_exists` when the name is taken.
pub fn create_bridge(socket: &mut Socket, name: IfName, mtu: u32, mac: Option<Mac>) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, CREATE | EXCL, |body| {
        body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, name.as_str());
        if let Some(mac) = mac {
            body.attr(IFLA_ADDRESS, &mac.0);
        }
        if mtu != 0 {
            body.attr_u32(IFLA_MTU, mtu);
        }
        linkinfo(body, "bridge", |_| {});
    })
}

/// One end of a new veth pair.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// Interface name.
    pub name: IfName,
    /// MAC address; `None` lets the kernel choose a random one.
    pub mac: Option<Mac>,
    /// The network namespace to create it in; `None` means the namespace of the socket.
    pub netns: Option<BorrowedFd<'a>>,
}

/// Creates a veth pair. MTU 0 leaves the choice to the kernel.
///
/// # Errors
/// The error that the kernel returns; `is_exists` when a name is taken.
pub fn create_veth(socket: &mut Socket, mtu: u32, this: VethEnd<'_>, peer: VethEnd<'_>) -> Result<(), NetlinkError> {
    let end = |body: &mut Body<'_>, end: VethEnd<'_>| {
        body.attr_str(IFLA_IFNAME, end.name.as_str());
        if mtu != 0 {
            body.attr_u32(IFLA_MTU, mtu);
        }
        if let Some(mac) = end.mac {
            body.attr(IFLA_ADDRESS, &mac.0);
        }
        if let Some(netns) = end.netns {
            body.attr_u32(IFLA_NET_NS_FD, netns.as_raw_fd().cast_unsigned());
        }
    };
    socket.request(RTM_NEWLINK, CREATE | EXCL, |body| {
        body.bytes(&ifinfomsg(0, 0, 0));
        end(body, this);
        linkinfo(body, "veth", |data| {
            data.nest(VETH_INFO_PEER, |inner| {
                inner.bytes(&ifinfomsg(0, 0, 0));
                end(inner, peer);
            });
        });
    })
}

/// Sets a link administratively up or down.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_up(socket: &mut Socket, index: u32, up: bool) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, u32::from(up), IFF_UP));
    })
}

/// Switches promiscuous mode of a link on or off.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_promiscuous(socket: &mut Socket, index: u32, on: bool) -> Result<(), NetlinkError> {
    set_flag(socket, index, IFF_PROMISC, on)
}

/// Switches reception of all multicast frames on or off.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_all_multicast(socket: &mut Socket, index: u32, on: bool) -> Result<(), NetlinkError> {
    set_flag(socket, index, IFF_ALLMULTI, on)
}

fn set_flag(socket: &mut Socket, index: u32, flag: u32, on: bool) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, if on { flag } else { 0 }, flag));
    })
}

/// `IPV4_DEVCONF_FORWARDING` (`linux/ip.h`): packets that arrive on the link are forwarded.
pub const FORWARDING: u16 = 1;
/// `IPV4_DEVCONF_ARP_NOTIFY`: the kernel sends a gratuitous ARP when the link goes up.
pub const ARP_NOTIFY: u16 = 22;
/// `IPV4_DEVCONF_ROUTE_LOCALNET`: packets to 127.0.0.0/8 may be routed through the link.
pub const ROUTE_LOCALNET: u16 = 26;

/// Sets a sysctl of a link in `net/ipv4/conf/` by its number in `linux/ip.h`, without `/proc/sys`.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_ipv4_conf(socket: &mut Socket, index: u32, number: u16, value: u32) -> Result<(), NetlinkError> {
    const AF_INET: u16 = 2;
    const IFLA_INET_CONF: u16 = 1;
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, 0, 0)).nest(IFLA_AF_SPEC, |spec| {
            spec.nest(AF_INET, |inet| {
                inet.nest(IFLA_INET_CONF, |conf| {
                    conf.attr_u32(number, value);
                });
            });
        });
    })
}

/// Sets a link's MTU in bytes.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_mtu(socket: &mut Socket, index: u32, mtu: u32) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, 0, 0)).attr_u32(IFLA_MTU, mtu);
    })
}

/// Sets the length of a link's transmit queue, in packets.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_tx_queue_len(socket: &mut Socket, index: u32, length: u32) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, 0, 0)).attr_u32(IFLA_TXQLEN, length);
    })
}

/// Creates an intermediate functional block (ifb), up, which can shape the traffic that another link receives. The alias is a text for
/// [`alias`].
///
/// # Errors
/// The error that the kernel returns; `is_exists` when the name is taken.
pub fn create_ifb(socket: &mut Socket, name: IfName, mtu: u32, alias: &str) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, CREATE | EXCL, |body| {
        body.bytes(&ifinfomsg(0, IFF_UP, IFF_UP)).attr_str(IFLA_IFNAME, name.as_str()).attr_u32(IFLA_MTU, mtu);
        linkinfo(body, "ifb", |_| {});
    })?;
    // The kernel ignores an alias in the request that creates a link.
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, name.as_str()).attr(IFLA_IFALIAS, alias.as_bytes());
    })
}

/// Reads the alias of a link, empty if it has none; `None` if the link does not exist.
///
/// # Errors
/// The error that the kernel returns.
pub fn alias(socket: &mut Socket, name: IfName) -> Result<Option<String>, NetlinkError> {
    let answer = socket.get(
        RTM_GETLINK,
        |body| {
            body.bytes(&ifinfomsg(0, 0, 0)).attr_str(IFLA_IFNAME, name.as_str());
        },
        |body| {
            let found = attrs(body.get(16..)?).find(|(kind, _)| *kind == IFLA_IFALIAS).and_then(|(_, value)| str_in(value));
            Some(found.unwrap_or_default().to_owned())
        },
    );
    match answer {
        Ok(alias) => Ok(Some(alias)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Enables VLAN filtering of a bridge (IEEE 802.1Q).
///
/// # Errors
/// The error that the kernel returns, for example if it is built without VLAN filtering.
pub fn set_vlan_filtering(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, 0, 0));
        linkinfo(body, "bridge", |data| {
            data.attr(IFLA_BR_VLAN_FILTERING, &[1]);
        });
    })
}

/// A range of VLANs of a bridge port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vlans {
    /// First identifier, 1 to 4094.
    pub first: u16,
    /// Last identifier.
    pub last: u16,
    /// Whether untagged frames belong to the VLAN, and its frames leave untagged.
    pub untagged: bool,
}

/// Adds VLANs to a bridge port.
///
/// # Errors
/// The error that the kernel returns.
pub fn add_vlans(socket: &mut Socket, index: u32, vlans: Vlans) -> Result<(), NetlinkError> {
    // RTM_NEWLINK would answer success, and set nothing.
    change_vlans(socket, RTM_SETLINK, index, vlans)
}

/// Removes VLANs from a bridge port.
///
/// # Errors
/// The error that the kernel returns.
pub fn delete_vlans(socket: &mut Socket, index: u32, vlans: Vlans) -> Result<(), NetlinkError> {
    change_vlans(socket, RTM_DELLINK, index, vlans)
}

fn change_vlans(socket: &mut Socket, kind: u16, index: u32, vlans: Vlans) -> Result<(), NetlinkError> {
    const AF_BRIDGE: u8 = 7;
    // BRIDGE_VLAN_INFO_* of linux/if_bridge.h
    const PVID: u16 = 2;
    const UNTAGGED: u16 = 4;
    const BEGIN: u16 = 8;
    const END: u16 = 16;
    const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
    let mut header = ifinfomsg(index, 0, 0);
    header[0] = AF_BRIDGE;
    let flags = if vlans.untagged { PVID | UNTAGGED } else { 0 };
    let info = |flags: u16, id: u16| [flags.to_ne_bytes(), id.to_ne_bytes()].concat();
    socket.request(kind, 0, |body| {
        body.bytes(&header).nest(IFLA_AF_SPEC, |spec| {
            if vlans.first == vlans.last {
                spec.attr(IFLA_BRIDGE_VLAN_INFO, &info(flags, vlans.first));
            } else {
                spec.attr(IFLA_BRIDGE_VLAN_INFO, &info(flags | BEGIN, vlans.first));
                spec.attr(IFLA_BRIDGE_VLAN_INFO, &info(flags | END, vlans.last));
            }
        });
    })
}

/// Sets a link's MAC address. A bridge whose address was set keeps it when its ports change.
///
/// # Errors
/// The error that the kernel returns.
pub fn set_mac(socket: &mut Socket, index: u32, mac: Mac) -> Result<(), NetlinkError> {
    socket.request(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, 0, 0)).attr(IFLA_ADDRESS, &mac.0);
    })
}

/// Makes a link a port of a bridge and sets it up. The kernel accepts port settings only for a link that is a port already, so these
/// are two requests in one batch.
///
/// # Errors
/// The error that the kernel returns.
pub fn enslave(socket: &mut Socket, index: u32, bridge: u32, port: Port) -> Result<(), NetlinkError> {
    let mut batch = crate::netlink::Batch::new();
    batch.message(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, IFF_UP, IFF_UP)).attr_u32(IFLA_MASTER, bridge);
    });
    batch.message(RTM_NEWLINK, 0, |body| {
        body.bytes(&ifinfomsg(index, 0, 0)).nest(IFLA_LINKINFO, |info| {
            info.attr_str(IFLA_INFO_SLAVE_KIND, "bridge").nest(IFLA_INFO_SLAVE_DATA, |data| {
                data.attr(IFLA_BRPORT_MODE, &[u8::from(port.hairpin)]).attr(IFLA_BRPORT_ISOLATED, &[u8::from(port.isolated)]);
            });
        });
    });
    socket.execute(batch).into_iter().collect()
}
