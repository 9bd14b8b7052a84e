//! Permanent FDB entries of VXLAN devices.

use std::fmt;
use std::net::IpAddr;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName, Mac};

/// A permanent FDB entry of a VXLAN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fdb {
    /// The VXLAN device.
    pub link: IfName,
    /// The destination MAC address of frames.
    pub mac: Mac,
    /// The address of the host that they are sent to.
    pub dst: IpAddr,
}

impl Item for Fdb {
    fn key(&self) -> Key {
        Key::Fdb(self.link, self.mac)
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.link == link
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(Family::of(self.dst)), never_deleted: false, optional: false }
    }
}

impl fmt::Display for Fdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fdb { link, mac, dst } = self;
        write!(f, "fdb {mac} dst {dst} dev {link}")
    }
}
