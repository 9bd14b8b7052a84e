//! WireGuard devices: those of the kernel by generic netlink, those that this process carries itself where the kernel has no WireGuard,
//! and the file with this host's private key.

mod carried;
mod generic;
pub mod user;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use flannel::object::{AllowedIp, WgPeer};
use flannel::wireguard::{KEY_LEN, PrivateKey, PublicKey, Secret};
use flannel::{IfName, Subnet};
use zeroize::Zeroizing;

use self::carried::Settings;
use self::generic::Generic;
use self::user::Userspace;
use crate::file::{Existing, How, put};
use crate::netlink::NetlinkError;

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

/// A WireGuard device with its peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// The public key that belongs to its private key, if it has one.
    pub public_key: Option<PublicKey>,
    /// Its UDP port.
    pub port: Option<u16>,
    /// Its peers.
    pub peers: Vec<PeerStatus>,
}

/// A change of a device's peers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PeerChange<'a> {
    /// Add a peer, or change it. Its subnets stay.
    Set(&'a WgPeer),
    /// Remove a peer with its subnets.
    Remove(&'a PublicKey),
    /// Give a subnet to a peer, and take it from the one that has it.
    Allow(&'a AllowedIp),
    /// Take a subnet from the peer that has it.
    Forbid(Subnet),
}

/// The WireGuard devices of a network namespace.
#[derive(Debug, Default)]
pub(crate) struct WireGuard {
    /// This host's key, which no object contains.
    key: Option<PrivateKey>,
    generic: Option<Generic>,
    /// The devices in user space, for a kernel without WireGuard.
    carried: BTreeMap<IfName, Userspace>,
}

impl WireGuard {
    /// Remembers this host's private key.
    pub(crate) fn set_key(&mut self, key: PrivateKey) {
        self.key = Some(key);
    }

    fn generic(&mut self) -> Result<&mut Generic, NetlinkError> {
        if self.generic.is_none() {
            self.generic = Generic::open()?;
        }
        let message = || "the kernel has no WireGuard, or has not loaded its module".to_owned();
        self.generic.as_mut().ok_or_else(|| NetlinkError::Refused { errno: libc::EOPNOTSUPP, message: message() })
    }

    /// Does something with the socket. The family's number changes when the module is loaded again, so it is asked for again after
    /// an error that may mean this.
    fn with<T>(&mut self, act: impl Fn(&mut Generic) -> Result<T, NetlinkError>) -> Result<T, NetlinkError> {
        match act(self.generic()?) {
            Err(error) if error.errno() == Some(libc::ENOENT) => {
                self.generic = None;
                act(self.generic()?)
            }
            other => other,
        }
    }

    /// Reads a device with its peers.
    pub(crate) fn device(&mut self, name: IfName) -> Result<Device, NetlinkError> {
        if let Some(carried) = self.carried.get(&name) {
            return Ok(carried::status(carried));
        }
        self.with(|generic| generic.device(name))
    }

    /// Gives an existing device this host's private key, which belongs to `public_key`, and its port.
    pub(crate) fn set_device(&mut self, name: IfName, public_key: PublicKey, port: u16) -> Result<(), NetlinkError> {
        let key = self.private_key(public_key)?;
        self.with(|generic| generic.set_device(name, &key, port))
    }

    fn private_key(&self, public_key: PublicKey) -> Result<PrivateKey, NetlinkError> {
        let message = || format!("the private key that belongs to {public_key} is not known");
        let key = self.key.clone().filter(|key| key.public() == public_key);
        key.ok_or_else(|| NetlinkError::Refused { errno: libc::ENOKEY, message: message() })
    }

    /// Starts a device in user space, unless it is running with this key and port. Its peers are kept.
    pub(crate) fn carry(&mut self, name: IfName, public_key: PublicKey, port: u16, mtu: u32) -> Result<(), NetlinkError> {
        let key = self.private_key(public_key)?;
        let started = carried::set(self.carried.remove(&name), Settings { name, key: &key, port, mtu });
        let io_error = |error: io::Error| {
            let errno = match error.kind() {
                io::ErrorKind::AddrInUse => libc::EADDRINUSE,
                _ => error.raw_os_error().unwrap_or(libc::EIO),
            };
            NetlinkError::Refused { errno, message: error.to_string() }
        };
        self.carried.insert(name, started.map_err(io_error)?);
        Ok(())
    }

    /// Whether this process carries the device.
    pub(crate) fn is_carried(&self, name: IfName) -> bool {
        self.carried.get(&name).is_some_and(Userspace::is_running)
    }

    /// Stops the device, if this process carries it, and returns whether it does.
    pub(crate) fn stop(&mut self, name: IfName) -> bool {
        self.carried.remove(&name).is_some()
    }

    /// Changes peers of a device, in order, with an outcome for each change.
    pub(crate) fn change(&mut self, name: IfName, changes: &[PeerChange<'_>]) -> Vec<Result<(), NetlinkError>> {
        if let Some(device) = self.carried.get(&name) {
            return changes.iter().map(|change| carried::change(device, change)).collect();
        }
        match self.generic() {
            Ok(generic) => generic.change(name, changes),
            Err(error) => {
                let (errno, message) = (error.errno().unwrap_or(libc::EIO), error.to_string());
                changes.iter().map(|_| Err(NetlinkError::Refused { errno, message: message.clone() })).collect()
            }
        }
    }
}

/// The largest key file that is read, in bytes.
const KEY_FILE: u64 = 1024;

/// Reads this host's private key from its file, or creates the file.
///
/// # Errors
/// The file, the problem and the fix; nothing of the content.
pub fn key_file(path: &Path) -> Result<PrivateKey, String> {
    let shown = path.display();
    if path.as_os_str().is_empty() {
        return Err("WIREGUARD_KEY_FILE is empty: unset it, or name a file".to_owned());
    }
    match read_key(path) {
        Ok(Some(key)) => return Ok(key),
        Ok(None) => {}
        Err(problem) => return Err(problem),
    }
    let fix = "make its folder writable for flanneld, or set WIREGUARD_KEY_FILE to another file";
    create_key(path).map_err(|error| format!("cannot create WireGuard key file {shown}: {error}: {fix}"))?;
    // Another process may have been faster.
    read_key(path)?.ok_or_else(|| format!("WireGuard key file {shown} was deleted when it was created; trying again"))
}

fn read_key(path: &Path) -> Result<Option<PrivateKey>, String> {
    let shown = path.display();
    let mut text = Zeroizing::new(String::new());
    let read = std::fs::File::open(path).and_then(|file| file.take(KEY_FILE).read_to_string(&mut text));
    match read {
        Ok(_) => PrivateKey::parse(&text).map(Some).map_err(|error| {
            format!("WireGuard key file {shown}: {error}: delete it, so that a new key is made, or put the output of `wg genkey` there")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read WireGuard key file {shown}: {error}: make it a file that flanneld's user can read")),
    }
}

fn create_key(path: &Path) -> io::Result<()> {
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    let mut filled = 0;
    while filled < KEY_LEN {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    let key = PrivateKey::from_random(*bytes);
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    }
    match put(path, key.text().as_bytes(), How { mode: 0o400, durable: true, existing: Existing::Keep }, |_| Ok(())) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn key_file_is_created_once_and_read_again() {
        let folder = std::env::temp_dir().join(format!("flannel-wgkey-{}", std::process::id()));
        let path = folder.join("sub/wgkey");
        let key = key_file(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
        assert_eq!(std::fs::metadata(folder.join("sub")).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), *key.text());
        assert_eq!(key_file(&path).unwrap(), key);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn bad_key_file_is_named_without_its_content() {
        let folder = std::env::temp_dir().join(format!("flannel-wgkey-bad-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("wgkey");
        std::fs::write(&path, "hunter2").unwrap();
        let error = key_file(&path).unwrap_err();
        let want = "it is not base64 (the standard alphabet, with padding): delete it, so that a new key is made, or put the output of `wg genkey` there";
        assert_eq!(error, format!("WireGuard key file {}: {want}", path.display()));
        assert!(key_file(&folder).unwrap_err().starts_with("cannot read WireGuard key file"));
        assert_eq!(key_file(Path::new("")).unwrap_err(), "WIREGUARD_KEY_FILE is empty: unset it, or name a file");
        let below = path.join("wgkey");
        assert!(key_file(&below).unwrap_err().contains(&below.display().to_string()));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
