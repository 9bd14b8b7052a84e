//! Sysctls that are kept at a value.

use flannel::object::{Object, Sysctl};

use super::{Change, Reading};
use crate::monitor::Changed;
use crate::netlink::{NetlinkError, Received};
use crate::{Kernel, sysctl};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Sysctl) -> Result<(), NetlinkError> {
    match change {
        Change::Set => sysctl::set(&mut kernel.route, &wanted.path, &wanted.value),
        // A sysctl has no absence.
        Change::Delete => Ok(()),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    for (path, wanted) in &reading.scope.sysctls {
        // One that the kernel does not have for a link that is there (IPv6 switched off) cannot differ from what is wanted.
        let on_a_link = || reading.links.iter().any(|link| path.split('/').any(|part| part == link.name.as_str()));
        let value = sysctl::value(&mut kernel.route, path).or_else(|| on_a_link().then(|| wanted.clone()));
        found.extend(value.map(|value| Object::Sysctl(Sysctl { path: path.clone(), value })));
    }
}

/// The kernel announces forwarding of a whole family (netconf).
pub(crate) fn decode_change(message: &Received<'_>) -> Option<Changed> {
    let (family, on) = sysctl::decode_forwarding(message.body)?;
    Some(Changed::Set(Object::Sysctl(Sysctl { path: family.forwarding().to_owned(), value: sysctl::on_off(on) })))
}
