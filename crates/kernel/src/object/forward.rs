//! Applies and reads the forwarding table of the udp backend's data path.

use flannel::object::{Forward, Object};

use super::{Change, Reading};
use crate::Kernel;
use crate::netlink::NetlinkError;

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Forward) -> Result<(), NetlinkError> {
    let missing = || NetlinkError::Refused { errno: libc::ENODEV, message: "the udp tunnel is not running".to_owned() };
    let tunnel = kernel.tunnel.as_ref().ok_or_else(missing)?;
    tunnel.set(wanted.dst, (change == Change::Set).then_some(wanted.host));
    Ok(())
}

pub(super) fn observe(kernel: &Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    let tunnels = reading.ours().filter_map(|info| kernel.running_tunnel(info));
    found.extend(tunnels.flat_map(|tunnel| tunnel.entries()).map(|(dst, host)| Object::Forward(Forward { dst, host })));
}
