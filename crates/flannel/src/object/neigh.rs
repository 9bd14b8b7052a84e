//! Permanent neighbour entries.

use std::fmt;
use std::net::IpAddr;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName, Mac};

/// A permanent neighbour entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neigh {
    /// The link.
    pub link: IfName,
    /// The IP address to resolve.
    pub ip: IpAddr,
    /// The MAC address that it resolves to.
    pub mac: Mac,
}

impl Item for Neigh {
    fn key(&self) -> Key {
        Key::Neigh(self.link, self.ip)
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.link == link
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(Family::of(self.ip)), never_deleted: false, optional: false }
    }
}

impl fmt::Display for Neigh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Neigh { link, ip, mac } = self;
        write!(f, "neigh {ip} lladdr {mac} dev {link}")
    }
}
