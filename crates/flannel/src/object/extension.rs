//! The operator's commands for one peer (extension backend).

use std::fmt;

use super::{Item, Key, Policy};
use crate::backend::extension::ExtensionPeer;
use crate::net::IfName;

impl Item for ExtensionPeer {
    fn key(&self) -> Key {
        Key::Extension(self.key)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: None, never_deleted: false, optional: false }
    }
}

impl fmt::Display for ExtensionPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "extension {}: {}", self.key, self.add)
    }
}
