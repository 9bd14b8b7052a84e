//! Entries of the udp backend's forwarding table.

use std::fmt;
use std::net::IpAddr;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName, Subnet};

/// An entry of the udp backend's forwarding table: packets for the subnet go to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Destination.
    pub dst: Subnet,
    /// The host's public address.
    pub host: IpAddr,
}

impl Item for Forward {
    fn key(&self) -> Key {
        Key::Forward(self.dst)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(Family::of(self.host)), never_deleted: false, optional: false }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Forward { dst, host } = self;
        write!(f, "forward {dst} to {host}")
    }
}
