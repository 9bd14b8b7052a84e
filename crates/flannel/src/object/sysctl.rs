//! A sysctl that is kept at a value.

use std::fmt;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName};

/// A sysctl with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below `/proc/sys`, with slashes.
    pub path: String,
    /// The value.
    pub value: String,
}

impl Sysctl {
    /// Does it switch forwarding of a whole family? Nothing else depends on a sysctl of ours.
    pub fn is_forwarding(&self) -> bool {
        Family::ALL.iter().any(|family| family.forwarding() == self.path) || Family::of_forwarding(&self.path).is_some()
    }
}

impl Item for Sysctl {
    fn key(&self) -> Key {
        Key::Sysctl(self.path.clone())
    }

    fn depends_on(&self, link: IfName) -> bool {
        self.path.split('/').any(|part| part == link.as_str())
    }

    fn policy(&self) -> Policy {
        Policy { family: None, never_deleted: true, optional: true }
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sysctl { path, value } = self;
        write!(f, "sysctl {path} = {value}")
    }
}
