//! A WireGuard device in user space, changed like one of the kernel: peers and their subnets one by one.

use std::collections::BTreeMap;
use std::io;

use flannel::wireguard::{PrivateKey, PublicKey};
use flannel::{IfName, Subnet};

use super::user::Userspace;
use super::{Device, PeerChange, PeerConfig};
use crate::netlink::NetlinkError;

/// A device with what was set on it.
#[derive(Debug)]
pub(super) struct Carried {
    device: Userspace,
    /// The peers, without endpoints that may have moved since.
    peers: BTreeMap<PublicKey, PeerConfig>,
    /// The peer of each subnet.
    owners: BTreeMap<Subnet, PublicKey>,
}

impl Carried {
    pub(super) fn start(name: IfName, key: &PrivateKey, port: u16, mtu: u32) -> io::Result<Carried> {
        Ok(Carried { device: Userspace::start(name, key, port, mtu)?, peers: BTreeMap::new(), owners: BTreeMap::new() })
    }

    /// Starts the device again, with its peers: it has another key or port now, or another program deleted it.
    pub(super) fn restart(self, name: IfName, key: &PrivateKey, port: u16, mtu: u32) -> io::Result<Carried> {
        let Carried { device, mut peers, owners } = self;
        for status in device.peers() {
            if let Some(known) = peers.get_mut(&status.config.public_key) {
                known.endpoint = status.config.endpoint;
            }
        }
        // The device and the port are free only then.
        drop(device);
        let device = Userspace::start(name, key, port, mtu)?;
        let own = device.public_key();
        peers.values().filter(|peer| peer.public_key != own).try_for_each(|peer| device.set_peer(peer))?;
        Ok(Carried { device, peers, owners })
    }

    pub(super) fn is_running(&self) -> bool {
        self.device.is_running()
    }

    /// Whether it has this key and port.
    pub(super) fn has(&self, key: PublicKey, port: u16) -> bool {
        (self.device.public_key(), self.device.port()) == (key, port)
    }

    pub(super) fn set_mtu(&self, mtu: u32) {
        self.device.set_mtu(mtu);
    }

    pub(super) fn status(&self) -> Device {
        Device { public_key: Some(self.device.public_key()), port: Some(self.device.port()), peers: self.device.peers() }
    }

    pub(super) fn change(&mut self, change: &PeerChange<'_>) -> Result<(), NetlinkError> {
        match change {
            PeerChange::Set(wanted) => {
                let peer = self.peer(wanted.public_key);
                peer.psk.clone_from(&wanted.psk);
                peer.keepalive = wanted.keepalive;
                let config = PeerConfig { endpoint: wanted.endpoint, ..peer.clone() };
                self.device.set_peer(&config).map_err(refused)
            }
            PeerChange::Remove(key) => {
                self.peers.remove(key);
                self.owners.retain(|_, owner| owner != *key);
                self.device.remove_peer(key);
                Ok(())
            }
            PeerChange::Allow(allowed) => {
                self.take(allowed.subnet);
                self.owners.insert(allowed.subnet, allowed.peer);
                let peer = self.peer(allowed.peer);
                peer.allowed.push(allowed.subnet);
                let config = peer.clone();
                self.device.set_peer(&config).map_err(refused)
            }
            PeerChange::Forbid(subnet) => match self.take(*subnet) {
                Some(former) => self.device.set_peer(&former).map_err(refused),
                None => Ok(()),
            },
        }
    }

    fn peer(&mut self, public_key: PublicKey) -> &mut PeerConfig {
        let new = || PeerConfig { public_key, psk: None, endpoint: None, allowed: Vec::new(), keepalive: 0 };
        self.peers.entry(public_key).or_insert_with(new)
    }

    /// Takes a subnet from its peer, which is returned.
    fn take(&mut self, subnet: Subnet) -> Option<PeerConfig> {
        let owner = self.owners.remove(&subnet)?;
        let peer = self.peers.get_mut(&owner)?;
        peer.allowed.retain(|allowed| *allowed != subnet);
        Some(peer.clone())
    }
}

fn refused(error: io::Error) -> NetlinkError {
    NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EINVAL), message: error.to_string() }
}
