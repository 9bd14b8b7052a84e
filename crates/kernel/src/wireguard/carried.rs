//! A WireGuard device in user space, changed like one of the kernel.

use std::io;

use flannel::IfName;
use flannel::wireguard::{PrivateKey, PublicKey};

use super::user::Userspace;
use super::{Device, PeerChange, PeerConfig};
use crate::netlink::NetlinkError;

/// The settings of a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings<'a> {
    pub(super) name: IfName,
    pub(super) key: &'a PrivateKey,
    pub(super) port: u16,
    pub(super) mtu: u32,
}

/// Makes a device have these settings: it is changed, or started with the peers of the one before, whose port differs or which another
/// program deleted.
pub(super) fn set(before: Option<Userspace>, settings: Settings<'_>) -> io::Result<Userspace> {
    let Settings { name, key, port, mtu } = settings;
    let peers = match before {
        Some(running) if running.is_running() && running.port() == port => {
            running.set_mtu(mtu);
            if running.public_key() != key.public() {
                running.set_key(key);
            }
            return Ok(running);
        }
        // Device and port are free once it is dropped.
        Some(other) => other.peers(),
        None => Vec::new(),
    };
    let device = Userspace::start(name, key, port, mtu)?;
    let own = device.public_key();
    peers.iter().map(|peer| &peer.config).filter(|peer| peer.public_key != own).try_for_each(|peer| device.set_peer(peer))?;
    Ok(device)
}

/// Reads a device with its peers.
pub(super) fn status(device: &Userspace) -> Device {
    Device { public_key: Some(device.public_key()), port: Some(device.port()), peers: device.peers() }
}

/// Changes a peer.
pub(super) fn change(device: &Userspace, change: &PeerChange<'_>) -> Result<(), NetlinkError> {
    let bare = |public_key: PublicKey| PeerConfig { public_key, psk: None, endpoint: None, allowed: Vec::new(), keepalive: 0 };
    let changed = match change {
        PeerChange::Set(wanted) => device.update_peer(&PeerConfig {
            psk: wanted.psk.clone(),
            endpoint: wanted.endpoint,
            keepalive: wanted.keepalive,
            ..bare(wanted.public_key)
        }),
        PeerChange::Remove(key) => {
            device.remove_peer(key);
            Ok(())
        }
        PeerChange::Allow(allowed) if device.allow(&allowed.peer, allowed.subnet) => Ok(()),
        // As in the kernel, a peer that is missing is created.
        PeerChange::Allow(allowed) => device.update_peer(&PeerConfig { allowed: vec![allowed.subnet], ..bare(allowed.peer) }),
        PeerChange::Forbid(subnet) => {
            device.forbid(*subnet);
            Ok(())
        }
    };
    changed.map_err(|error| NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EINVAL), message: error.to_string() })
}
