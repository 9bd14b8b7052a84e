//! Blackhole routes of the main table.

use std::fmt;

use super::{Item, Key, Policy};
use crate::net::{IfName, Subnet};

/// A blackhole route of the main table, which drops packets that match no other route (`--ip-blackhole-route`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blackhole {
    /// Destination.
    pub dst: Subnet,
}

impl Item for Blackhole {
    fn key(&self) -> Key {
        Key::Blackhole(self.dst)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(self.dst.family()), never_deleted: false, optional: false }
    }
}

impl fmt::Display for Blackhole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route blackhole {}", self.dst)
    }
}
