//! Sysctls with their desired values.

use std::fmt;

use super::{Item, Key, Policy};
use crate::net::{Family, IfName};

/// A sysctl with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// Path under `/proc/sys`, with slashes.
    pub path: String,
    /// The value.
    pub value: String,
}

impl Sysctl {
    /// Whether it enables forwarding of a whole family.
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
