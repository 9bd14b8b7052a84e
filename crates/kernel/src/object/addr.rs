//! Addresses on links of ours.

use flannel::Family;
use flannel::object::{Addr, Object};
use flannel::scope::Scope;

use super::{Change, Reading};
use crate::netlink::NetlinkError;
use crate::{Kernel, addr};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Addr) -> Result<(), NetlinkError> {
    let index = kernel.index(wanted.link)?;
    match change {
        Change::Set => {
            kernel.tunnel.iter().filter(|tunnel| tunnel.name == wanted.link).for_each(|tunnel| tunnel.set_address(wanted.cidr));
            addr::set(&mut kernel.route, index, wanted.cidr)
        }
        Change::Delete => addr::delete(&mut kernel.route, index, wanted.cidr),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    for info in reading.ours() {
        let addrs = addr::list(&mut kernel.route, info.index)?;
        let ours = addrs.iter().filter(|addr| addr.index == info.index && is_ours(addr, reading.scope));
        found.extend(ours.map(|addr| Object::Addr(Addr { link: info.name, cidr: addr.addr.cidr })));
    }
    Ok(())
}

/// Does an address on a link of ours count as ours? Of IPv4 those in a pod network: what another program put there stays. Of
/// IPv6 all but the link-local one that the kernel itself gives (specification, section 5.1).
fn is_ours(info: &addr::AddrInfo, scope: &Scope) -> bool {
    let ip = info.addr.cidr.addr;
    match Family::of(ip) {
        Family::V4 => scope.networks.iter().chain(&scope.retired).any(|network| network.contains(ip)),
        Family::V6 => !info.link_scope,
    }
}
