//! The rules that the CNI plugins wrote for pods (portmap, `ipMasq`), all of them as one object.

use std::fmt;

use super::{Item, Key, Policy};
use crate::net::IfName;

/// The number of rule sets of pods that differ from the plugins' records; the desired number is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodRules {
    /// Rule sets that are missing or changed.
    pub missing: usize,
}

impl Item for PodRules {
    fn key(&self) -> Key {
        Key::PodRules
    }

    fn depends_on(&self, _: IfName) -> bool {
        false
    }

    fn policy(&self) -> Policy {
        Policy { family: None, never_deleted: true, optional: true }
    }
}

impl fmt::Display for PodRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.missing {
            0 => f.write_str("pod rules of the CNI plugins"),
            missing => write!(f, "pod rules of the CNI plugins: {missing} rule sets differ"),
        }
    }
}
