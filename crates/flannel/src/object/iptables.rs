//! The daemon's iptables chains of one family. `traffic::iptables` renders their text.

use super::{Item, Key, Policy};
use crate::net::IfName;
use crate::traffic::iptables::Iptables;

impl Item for Iptables {
    fn key(&self) -> Key {
        Key::Iptables(self.family, self.variant)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(self.family), never_deleted: false, optional: true }
    }

    /// The full text has many lines.
    fn summary(&self) -> String {
        self.key().to_string()
    }
}
