//! Applies and reads permanent FDB entries of VXLAN devices. `neigh` decodes their notifications.

use flannel::IfName;
use flannel::object::{Fdb, Object};

use super::{Change, Reading};
use crate::neigh::NeighInfo;
use crate::netlink::{Batch, NetlinkError};
use crate::{Kernel, neigh};

pub(super) fn enqueue(kernel: &mut Kernel, change: Change, wanted: &Fdb, batch: &mut Batch) -> Result<(), NetlinkError> {
    let index = kernel.index(wanted.link)?;
    match change {
        Change::Set => neigh::set_fdb(batch, index, wanted.mac, wanted.dst),
        Change::Delete => neigh::delete_fdb(batch, index, wanted.mac, wanted.dst),
    }
    Ok(())
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    for info in reading.ours().filter(|info| info.vxlan.is_some()) {
        let entries = neigh::list_fdb(&mut kernel.route, info.index)?;
        found.extend(entries.iter().map(|entry| object(info.name, entry)));
    }
    Ok(())
}

pub(super) fn object(link: IfName, entry: &NeighInfo) -> Object {
    Object::Fdb(Fdb { link, mac: entry.mac, dst: entry.ip })
}
