//! Runs the operator's commands for a peer, and remembers the peers for which they were run: the kernel does not show that.

use flannel::backend::extension::ExtensionPeer;
use flannel::object::Object;

use super::{Change, Reading};
use crate::netlink::NetlinkError;
use crate::{Kernel, command};

pub(super) fn apply(kernel: &mut Kernel, change: Change, peer: &ExtensionPeer) -> Result<(), NetlinkError> {
    let command = match change {
        Change::Set => &peer.add,
        Change::Delete => &peer.remove,
    };
    command::run(command).map_err(|error| NetlinkError::Refused { errno: libc::EIO, message: error.to_string() })?;
    match change {
        Change::Set => kernel.extension.insert(peer.key, peer.clone()),
        Change::Delete => kernel.extension.remove(&peer.key),
    };
    Ok(())
}

pub(super) fn observe(kernel: &Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    if !reading.scope.networks.is_empty() {
        found.extend(kernel.extension.values().map(|peer| Object::Extension(Box::new(peer.clone()))));
    }
}
