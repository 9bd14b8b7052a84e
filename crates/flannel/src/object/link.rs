//! Links of the daemon: the devices of the backends.

use std::fmt;
use std::net::IpAddr;

use super::{Item, Key, Policy};
use crate::backend::wireguard::device_family;
use crate::net::{Family, IfName, Mac, Vni};
use crate::wireguard::PublicKey;

/// A link of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface name.
    pub name: IfName,
    /// Its kind, with attributes most of which can be changed only by recreating the link.
    pub kind: LinkKind,
    /// MAC address.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
}

/// The kind of a link, with what identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A VXLAN device (RFC 7348; attributes of `linux/if_link.h`).
    Vxlan {
        /// Network identifier.
        vni: Vni,
        /// UDP destination port.
        port: u16,
        /// Source address of the outer packets.
        local: IpAddr,
        /// The interface that sends the outer packets.
        lower: IfName,
        /// Whether the group-based policy extension is enabled.
        gbp: bool,
        /// Whether source-address learning is enabled.
        learning: bool,
    },
    /// An IPIP device without a remote address (RFC 2003): the gateway of the route is the destination of the outer packet.
    Ipip {
        /// Source address of the outer packets.
        local: IpAddr,
    },
    /// A TUN device whose packets the daemon carries in UDP.
    Udp {
        /// The address that the socket is bound to.
        local: IpAddr,
        /// UDP port of this and every other host.
        port: u16,
    },
    /// A WireGuard device. Its private key is no part of it: the kernel crate has it.
    WireGuard {
        /// UDP port, of both address families.
        port: u16,
        /// The key that belongs to the device's private key.
        public_key: PublicKey,
    },
    /// A link of another kind that has the name of a daemon's link: its `IFLA_INFO_KIND`, or empty.
    Other(String),
}

impl Link {
    /// Whether `have` can be changed into this link in place. Learning, the lower interface, the local address (within its family), MAC,
    /// MTU, state, and port and key of a WireGuard device can be changed; anything else needs a new device. (A lower interface with another name is the renamed old one.)
    pub fn can_replace_in_place(&self, have: &Link) -> bool {
        match (&self.kind, &have.kind) {
            (
                LinkKind::Vxlan { vni, port, local, gbp, lower: _, learning: _ },
                LinkKind::Vxlan { vni: vni2, port: port2, local: local2, gbp: gbp2, lower: _, learning: _ },
            ) => (vni, port, local.is_ipv4(), gbp) == (vni2, port2, local2.is_ipv4(), gbp2),
            (LinkKind::Ipip { .. }, LinkKind::Ipip { .. }) => true,
            (LinkKind::Udp { .. }, LinkKind::Udp { .. }) => self.kind == have.kind,
            (LinkKind::WireGuard { .. }, LinkKind::WireGuard { .. }) => true,
            // It has no key yet.
            (LinkKind::WireGuard { .. }, LinkKind::Other(kind)) => kind == "wireguard",
            (
                LinkKind::Vxlan { .. } | LinkKind::Ipip { .. } | LinkKind::Udp { .. } | LinkKind::WireGuard { .. } | LinkKind::Other(_),
                _,
            ) => false,
        }
    }
}

impl Item for Link {
    fn key(&self) -> Key {
        Key::Link(self.name)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        let family = match self.kind {
            LinkKind::Vxlan { local, .. } | LinkKind::Ipip { local } | LinkKind::Udp { local, .. } => Some(Family::of(local)),
            LinkKind::WireGuard { .. } => Some(device_family(self.name)),
            LinkKind::Other(_) => None,
        };
        Policy { family, never_deleted: false, optional: false }
    }

    fn advice(&self, errno: i32) -> Option<&'static str> {
        const EOPNOTSUPP: i32 = 95;
        let advice = match self.kind {
            LinkKind::Vxlan { .. } => {
                "the kernel lacks this kind of device, or has not loaded its module: run `modprobe vxlan` on the host, or use host-gw"
            }
            LinkKind::Ipip { .. } => {
                "the kernel lacks this kind of device, or has not loaded its module: run `modprobe ipip` on the host, or use vxlan"
            }
            LinkKind::WireGuard { .. } => {
                "the kernel has no WireGuard, or has not loaded its module: run `modprobe wireguard` on the host, or use vxlan"
            }
            LinkKind::Udp { .. } | LinkKind::Other(_) => return None,
        };
        (errno == EOPNOTSUPP).then_some(advice)
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Link { name, kind, mac, mtu, up } = self;
        write!(f, "link {name} {mac} mtu {mtu} {}", if *up { "up" } else { "down" })?;
        match kind {
            LinkKind::Other(kind) => write!(f, " {kind}"),
            LinkKind::Ipip { local } => write!(f, " ipip local {local}"),
            LinkKind::Udp { local, port } => write!(f, " udp {local}:{port}"),
            LinkKind::WireGuard { port, public_key } => write!(f, " wireguard port {port} key {public_key}"),
            LinkKind::Vxlan { vni, port, local, lower, gbp, learning } => {
                let (gbp, learning) = (if *gbp { " gbp" } else { "" }, if *learning { "learning" } else { "nolearning" });
                write!(f, " vxlan id {vni} dstport {port} local {local} dev {lower} {learning}{gbp}")
            }
        }
    }
}
