//! Restores and reads the rules that the CNI plugins wrote for pods, as one object.

use flannel::object::{Object, PodRules};
use flannel::pod::Table;

use super::{Change, Reading};
use crate::monitor::Changed;
use crate::netlink::{NetlinkError, Received};
use crate::{Kernel, nft};

pub(super) fn apply(kernel: &mut Kernel, change: Change) -> Result<(), NetlinkError> {
    match change {
        Change::Set => kernel.restore_pod_rules(),
        // The plugins delete them.
        Change::Delete => Ok(()),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    if !reading.scope.pod_rules {
        return;
    }
    match kernel.observe_pod_rules() {
        Ok(missing) => found.push(Object::PodRules(PodRules { missing })),
        Err(error) => kernel.read_error = Some(format!("pod rules of the CNI plugins: {error}")),
    }
}

/// Decodes a change of a table that the plugins use: only deletions matter.
pub(crate) fn decode_change(table: &str, message: &Received<'_>) -> Option<Changed> {
    let is_deletion = [nft::DELTABLE, nft::DELCHAIN, nft::DELRULE].iter().any(|kind| message.kind == nft::kind(*kind));
    (Table::is_noted(table) && is_deletion).then_some(Changed::PodRules)
}
