//! Applies and reads sysctls.

use flannel::IfName;
use flannel::object::{Object, Sysctl};

use super::{Change, Reading};
use crate::monitor::Changed;
use crate::netlink::{NetlinkError, Received};
use crate::{Kernel, sysctl};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Sysctl) -> Result<(), NetlinkError> {
    match change {
        Change::Set => sysctl::set(&mut kernel.route, &wanted.path, &wanted.value),
        // A sysctl cannot be deleted.
        Change::Delete => Ok(()),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    for (path, wanted) in &reading.scope.sysctls {
        // A sysctl that the kernel lacks although its link exists (IPv6 is disabled) counts as set: setting it would not help.
        let on_a_link = || reading.links.iter().any(|link| path.split('/').any(|part| part == link.name.as_str()));
        let value = sysctl::value(&mut kernel.route, path).or_else(|| on_a_link().then(|| wanted.clone()));
        found.extend(value.map(|value| Object::Sysctl(Sysctl { path: path.clone(), value })));
    }
}

/// The kernel announces forwarding of a whole family, and of each interface (netconf).
pub(crate) fn decode_change(message: &Received<'_>, name: impl Fn(u32) -> Option<IfName>) -> Option<Changed> {
    let (family, interface, is_on) = sysctl::decode_forwarding(message.body)?;
    let path = match interface {
        None => family.forwarding().to_owned(),
        Some(index) => family.forwarding_of(name(index)?),
    };
    Some(Changed::Set(Object::Sysctl(Sysctl { path, value: sysctl::on_off(is_on) })))
}
