//! The file for the CNI plugins: `subnet.env`.

use std::fmt;
use std::path::PathBuf;

use super::{Item, Key, Policy};
use crate::net::IfName;

/// The file that tells the CNI plugins of this node: `subnet.env` (specification, section 1.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// The etcd leases by which the store knew this node's lease, the present one last. They are noted beside the file: a host
    /// whose address changed while no daemon ran knows its lease again by them, also in a store that was restored from a backup.
    pub etcd_leases: Vec<i64>,
    /// Was it written by this program? A Go flanneld that ran since has put another in its place.
    pub ours: bool,
}

impl Item for EnvFile {
    fn key(&self) -> Key {
        Key::EnvFile
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: None, never_deleted: true, optional: false }
    }

    fn summary(&self) -> String {
        format!("file {}", self.path.display())
    }
}

impl fmt::Display for EnvFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text.trim_end().replace('\n', " ");
        write!(f, "file {}: {text}", self.path.display())
    }
}
