//! Peers of WireGuard devices, and the subnets that belong to them. A peer is identified by its public key, a subnet by itself: WireGuard
//! gives each subnet to one peer, as a routing table does. They are objects of their own, because two leases of one host, such as a former
//! one that has not expired, share a peer.

use std::fmt;
use std::net::SocketAddr;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName, Subnet};
use crate::wireguard::{PublicKey, Secret};

/// A session of WireGuard lasts so many seconds after its handshake (`REJECT_AFTER_TIME` of the protocol): as long as packets pass, the
/// last handshake is not older.
pub const SESSION_S: u64 = 180;

/// A peer of a WireGuard device.
#[derive(Debug, Clone)]
pub struct WgPeer {
    /// The device.
    pub link: IfName,
    /// The peer's public key.
    pub public_key: PublicKey,
    /// The address that packets to it are sent to. An observed peer may have none.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalive packets; 0: none are sent.
    pub keepalive: u16,
    /// The preshared key.
    pub psk: Option<Secret>,
    /// Of an observed peer, the seconds since its last handshake. It is a measurement, so it is not compared.
    pub handshake: Option<u64>,
}

impl WgPeer {
    /// Whether an observed peer may have another endpoint than the desired one: WireGuard itself follows a peer that sends authenticated
    /// packets from another address, and the packets of a living session show that the address is right.
    pub fn may_roam(&self) -> bool {
        self.endpoint.is_some() && self.handshake.is_some_and(|age| age < SESSION_S)
    }
}

impl PartialEq for WgPeer {
    fn eq(&self, other: &WgPeer) -> bool {
        let fields = |peer: &WgPeer| (peer.link, peer.public_key, peer.endpoint, peer.keepalive);
        fields(self) == fields(other) && self.psk == other.psk
    }
}

impl Eq for WgPeer {}

impl Item for WgPeer {
    fn key(&self) -> Key {
        Key::WgPeer(self.link, self.public_key)
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.link == link
    }

    fn policy(&self) -> Policy {
        Policy { family: self.endpoint.map(|endpoint| Family::of(endpoint.ip())), never_deleted: false, optional: false }
    }
}

impl fmt::Display for WgPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WgPeer { link, public_key, endpoint, keepalive, psk, handshake: _ } = self;
        write!(f, "peer {public_key} dev {link}")?;
        if let Some(endpoint) = endpoint {
            write!(f, " endpoint {endpoint}")?;
        }
        if *keepalive > 0 {
            write!(f, " keepalive {keepalive}")?;
        }
        if psk.is_some() { f.write_str(" psk (secret)") } else { Ok(()) }
    }
}

/// A subnet of a WireGuard peer ("allowed IP"): packets for it are sent to that peer, and packets from it are accepted from that peer only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowedIp {
    /// The device.
    pub link: IfName,
    /// The subnet.
    pub subnet: Subnet,
    /// The public key of the peer that has it.
    pub peer: PublicKey,
}

impl Item for AllowedIp {
    fn key(&self) -> Key {
        Key::AllowedIp(self.link, self.subnet)
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.link == link
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(self.subnet.family()), never_deleted: false, optional: false }
    }
}

impl fmt::Display for AllowedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AllowedIp { link, subnet, peer } = self;
        write!(f, "allowed-ip {subnet} peer {peer} dev {link}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_text_hides_preshared_key_and_equality_ignores_handshake() {
        let key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        let peer = WgPeer {
            link: "flannel-wg".parse().unwrap(),
            public_key: key.parse().unwrap(),
            endpoint: "192.0.2.2:51820".parse().ok(),
            keepalive: 25,
            psk: Some(Secret::parse(key).unwrap()),
            handshake: None,
        };
        assert_eq!(peer.to_string(), format!("peer {key} dev flannel-wg endpoint 192.0.2.2:51820 keepalive 25 psk (secret)"));
        assert!(!format!("{peer:?}").contains("psk: Some([") && format!("{peer:?}").contains("Secret(redacted)"));
        assert_eq!(peer, WgPeer { handshake: Some(7), ..peer.clone() });
        assert_ne!(peer, WgPeer { psk: None, ..peer.clone() });
    }

    #[test]
    fn endpoint_may_roam_only_while_session_lives() {
        let peer = |endpoint: Option<&str>, handshake| WgPeer {
            link: "flannel-wg".parse().unwrap(),
            public_key: PublicKey([1; 32]),
            endpoint: endpoint.map(|text| text.parse().unwrap()),
            keepalive: 0,
            psk: None,
            handshake,
        };
        let at = Some("192.0.2.2:51820");
        assert_eq!([Some(0), Some(179), Some(180), None].map(|age| peer(at, age).may_roam()), [true, true, false, false]);
        assert!(!peer(None, Some(1)).may_roam());
    }
}
