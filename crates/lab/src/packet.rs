//! An Ethernet frame as far as the lab looks into it: IP, VXLAN over UDP with a frame inside, and WireGuard over UDP.

use std::fmt;
use std::net::IpAddr;

use flannel::Mac;

/// A frame that carries IP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Destination MAC.
    pub to: Mac,
    /// Source MAC.
    pub from: Mac,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// What is inside.
    pub payload: Payload,
}

/// What an IP packet carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// An ICMP message of this type: an echo request is 8 and its reply 0, of ICMPv6 128 and 129.
    Icmp(u8),
    /// A frame in VXLAN (RFC 7348).
    Vxlan {
        /// UDP destination port.
        port: u16,
        /// Network identifier.
        vni: u32,
        /// The frame inside.
        inner: Box<Frame>,
    },
    /// A packet that WireGuard has encrypted.
    WireGuard {
        /// UDP destination port.
        port: u16,
        /// Bytes of the UDP payload.
        bytes: usize,
    },
    /// Something else, by its protocol number.
    Other(u8),
}

impl Frame {
    /// Reads a frame; `None` if it does not carry IP.
    pub fn parse(bytes: &[u8]) -> Option<Frame> {
        let mac = |at: usize| Some(Mac(bytes.get(at..at + 6)?.try_into().ok()?));
        let ip = bytes.get(14..)?;
        // Where the protocol, the time to live, the addresses and the payload are.
        let (protocol, ttl, src, dst, header) = match bytes.get(12..14)? {
            [0x08, 0x00] => (9, 8, 12..16, 16..20, usize::from(ip.first()? & 0xf) * 4),
            [0x86, 0xdd] => (6, 7, 8..24, 24..40, 40),
            _ => return None,
        };
        let address = |at| kernel::netlink::ip_in(ip.get(at)?);
        let body = ip.get(header..)?;
        let payload = match *ip.get(protocol)? {
            1 | 58 => Payload::Icmp(*body.first()?),
            17 => vxlan(body).or_else(|| wireguard(body)).unwrap_or(Payload::Other(17)),
            other => Payload::Other(other),
        };
        Some(Frame { to: mac(0)?, from: mac(6)?, src: address(src)?, dst: address(dst)?, ttl: *ip.get(ttl)?, payload })
    }

    /// The frame inside, if this one encapsulates, else this one.
    pub fn innermost(&self) -> &Frame {
        match &self.payload {
            Payload::Vxlan { inner, .. } => inner.innermost(),
            _ => self,
        }
    }
}

/// A UDP datagram whose payload begins as VXLAN does: the I flag set, reserved bits clear.
fn vxlan(udp: &[u8]) -> Option<Payload> {
    let port = u16::from_be_bytes(udp.get(2..4)?.try_into().ok()?);
    let header = udp.get(8..16)?;
    if header[0] != 8 || header[7] != 0 {
        return None;
    }
    let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
    let inner = Box::new(Frame::parse(udp.get(16..)?)?);
    Some(Payload::Vxlan { port, vni, inner })
}

/// A UDP datagram whose payload begins as a transport data message of WireGuard does: type 4, three reserved zeros.
fn wireguard(udp: &[u8]) -> Option<Payload> {
    let port = u16::from_be_bytes(udp.get(2..4)?.try_into().ok()?);
    let bytes = usize::from(u16::from_be_bytes(udp.get(4..6)?.try_into().ok()?)).checked_sub(8)?;
    (udp.get(8..12)? == [4, 0, 0, 0]).then_some(Payload::WireGuard { port, bytes })
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {} | {} > {} ttl {} | ", self.from, self.to, self.src, self.dst, self.ttl)?;
        match &self.payload {
            Payload::Icmp(8 | 128) => f.write_str("ICMP echo request"),
            Payload::Icmp(0 | 129) => f.write_str("ICMP echo reply"),
            Payload::Icmp(kind) => write!(f, "ICMP type {kind}"),
            Payload::Vxlan { port, vni, inner } => write!(f, "UDP {port} | VXLAN VNI {vni} | {inner}"),
            Payload::WireGuard { port, bytes } => write!(f, "UDP {port} | WireGuard, {bytes} bytes, encrypted"),
            Payload::Other(protocol) => write!(f, "IP protocol {protocol}"),
        }
    }
}
