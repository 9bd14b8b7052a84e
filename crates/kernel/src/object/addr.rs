//! Applies and reads addresses on links of the daemon.

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

/// Whether an address on a link of the daemon is in scope. For IPv4 only addresses in a pod network are: the daemon keeps those that
/// another program added. For IPv6 all are, except the link-local one that the kernel assigns (specification, section 5.1).
fn is_ours(info: &addr::AddrInfo, scope: &Scope) -> bool {
    let ip = info.addr.cidr.addr;
    match Family::of(ip) {
        Family::V4 => scope.networks.iter().chain(&scope.retired).any(|network| network.contains(ip)),
        Family::V6 => !info.link_scope,
    }
}
