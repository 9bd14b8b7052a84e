//! Applies and reads permanent neighbour entries on links of the daemon.

use flannel::IfName;
use flannel::object::{Key, Neigh, Object};

use super::{Change, Reading, fdb};
use crate::monitor::Changed;
use crate::netlink::{Batch, NetlinkError, Received};
use crate::{Kernel, neigh};

pub(super) fn enqueue(kernel: &mut Kernel, change: Change, wanted: &Neigh, batch: &mut Batch) -> Result<(), NetlinkError> {
    let index = kernel.index(wanted.link)?;
    match change {
        Change::Set => neigh::set(batch, index, wanted.ip, wanted.mac),
        Change::Delete => neigh::delete(batch, index, wanted.ip),
    }
    Ok(())
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    for info in reading.ours() {
        let entries = neigh::list(&mut kernel.route, info.index)?;
        found.extend(entries.into_iter().map(|entry| Object::Neigh(Neigh { link: info.name, ip: entry.ip, mac: entry.mac })));
    }
    Ok(())
}

/// Decodes a change of a neighbour or FDB entry on `link`: the kernel announces both by the same message.
pub(crate) fn decode_change(message: &Received<'_>, link: impl Fn(u32) -> Option<IfName>) -> Option<Changed> {
    let (index, is_fdb, ip, mac) = neigh::decode_key(message.body)?;
    let link = link(index)?;
    let key = || Some(if is_fdb { Key::Fdb(link, mac?) } else { Key::Neigh(link, ip?) });
    if message.kind == neigh::RTM_DELNEIGH {
        return key().map(Changed::Gone);
    }
    let Some(entry) = neigh::decode(message.body) else {
        // The entry lost its other address: resolution failed, or a program set the state to failed.
        return key().map(Changed::Gone);
    };
    let object = if entry.fdb { fdb::object(link, &entry) } else { Object::Neigh(Neigh { link, ip: entry.ip, mac: entry.mac }) };
    Some(if entry.permanent { Changed::Set(object) } else { Changed::Gone(object.key()) })
}
