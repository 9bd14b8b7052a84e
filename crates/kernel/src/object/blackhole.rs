//! Applies and reads blackhole routes of the main table. `route` receives their notifications.

use flannel::object::{Blackhole, Object};

use super::{Change, Reading};
use crate::monitor::Changed;
use crate::netlink::NetlinkError;
use crate::{Kernel, route};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Blackhole) -> Result<(), NetlinkError> {
    match change {
        Change::Set => route::set_blackhole(&mut kernel.route, wanted.dst),
        Change::Delete => route::delete_blackhole(&mut kernel.route, wanted.dst),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    for network in &reading.scope.networks {
        let blackholes = route::list_blackholes(&mut kernel.route, network.family())?;
        let ours = blackholes.into_iter().filter(|dst| network.covers(*dst));
        found.extend(ours.map(|dst| Object::Blackhole(Blackhole { dst })));
    }
    Ok(())
}

/// Decodes a change of a blackhole route; `None` if the route is of another type.
pub(super) fn decode_change(body: &[u8], is_set: bool) -> Option<Changed> {
    let object = Object::Blackhole(Blackhole { dst: route::decode_blackhole(body)? });
    Some(if is_set { Changed::Set(object) } else { Changed::Gone(object.key()) })
}
