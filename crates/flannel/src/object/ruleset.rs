//! The daemon's nftables table of one family. `traffic` renders its text.

use super::{Item, Key, Policy};
use crate::net::IfName;
use crate::traffic::Ruleset;

impl Item for Ruleset {
    fn key(&self) -> Key {
        Key::Ruleset(self.family)
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: Some(self.family), never_deleted: false, optional: false }
    }

    fn advice(&self, errno: i32) -> Option<&'static str> {
        const EOPNOTSUPP: i32 = 95;
        const EPROTONOSUPPORT: i32 = 93;
        const ENOENT: i32 = 2;
        matches!(errno, EOPNOTSUPP | EPROTONOSUPPORT | ENOENT).then_some(
            "the kernel lacks a part of nf_tables, or has not loaded its module: run `modprobe -a nf_tables nft_masq nft_ct` on the host",
        )
    }

    /// The full text has many lines.
    fn summary(&self) -> String {
        self.key().to_string()
    }
}
