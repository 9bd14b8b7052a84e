//! WireGuard devices: those of the kernel by generic netlink (`linux/wireguard.h`), and those that this process carries itself.

pub mod user;

use std::net::SocketAddr;
use std::time::Duration;

use flannel::Subnet;
use flannel::wireguard::{PublicKey, Secret};

/// The settings of a peer of a WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its public key, which identifies it.
    pub public_key: PublicKey,
    /// The preshared key, if any.
    pub psk: Option<Secret>,
    /// The address that packets to it are sent to; `None`: it is not known until the peer sends a packet.
    pub endpoint: Option<SocketAddr>,
    /// The subnets that it may send from, and whose packets are sent to it.
    pub allowed: Vec<Subnet>,
    /// Seconds between keepalive packets; 0: none are sent.
    pub keepalive: u16,
}

/// The state of a peer of a WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its settings. The endpoint is the one in use: WireGuard follows a peer that sends from another address.
    pub config: PeerConfig,
    /// The time since the last handshake; `None`: there was none.
    pub handshake: Option<Duration>,
    /// Bytes received from it.
    pub received: u64,
    /// Bytes sent to it.
    pub sent: u64,
}
