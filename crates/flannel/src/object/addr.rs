//! Addresses on links of the daemon.

use std::fmt;

use super::{Item, Key, Policy};
use crate::net::{Cidr, Family, IfName};

/// An address on a link of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addr {
    /// The link.
    pub link: IfName,
    /// The address with its prefix length.
    pub cidr: Cidr,
}

impl Item for Addr {
    fn key(&self) -> Key {
        Key::Addr(self.link, self.cidr)
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.link == link
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(Family::of(self.cidr.addr)), never_deleted: false, optional: false }
    }

    fn advice(&self, errno: i32) -> Option<&'static str> {
        const EACCES: i32 = 13;
        const EINVAL: i32 = 22;
        // net/ipv6/addrconf.c: a device has no IPv6 if disable_ipv6 is set, or if its MTU is below 1280 (RFC 8200, section 5).
        (self.cidr.addr.is_ipv6() && matches!(errno, EACCES | EINVAL)).then_some(
            "IPv6 is disabled on this device: check the sysctls net.ipv6.conf.*.disable_ipv6, and that the external interface's MTU leaves it at least 1280 bytes (vxlan takes 70)",
        )
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Addr { link, cidr } = self;
        write!(f, "addr {cidr} dev {link}")
    }
}
