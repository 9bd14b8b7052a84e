//! The file for the CNI plugins, `subnet.env`.

use std::fmt;
use std::path::PathBuf;

use super::{Item, Key, Policy};
use crate::net::IfName;

/// `subnet.env`, from which the CNI plugins learn the settings of this node (specification, section 1.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvFile {
    /// Its path.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// The etcd leases that this node's lease was attached to, the current one last. They are stored beside the file: a host whose
    /// address changed while no daemon ran finds its lease by them, even in a store that was restored from a backup.
    pub etcd_leases: Vec<i64>,
    /// Whether this program wrote the file. A Go flanneld that ran since then has replaced it.
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
