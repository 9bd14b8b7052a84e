//! Applies and reads unicast routes of the main table: the daemon's, and those of a Go flanneld that it adopts.

use flannel::object::{Key, Object, Route};
use flannel::scope::Scope;
use flannel::{Family, IfName};

use super::{Change, Reading, blackhole};
use crate::monitor::Changed;
use crate::netlink::{Batch, NetlinkError, Received};
use crate::route::{Filter, RouteInfo};
use crate::{Kernel, route};

pub(super) fn enqueue(kernel: &mut Kernel, change: Change, wanted: &Route, batch: &mut Batch) -> Result<(), NetlinkError> {
    let index = kernel.index(wanted.dev)?;
    match change {
        Change::Set => route::set(batch, wanted, index),
        Change::Delete => route::delete(batch, wanted, index),
    }
    Ok(())
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    let scope = reading.scope;
    if scope.networks.is_empty() {
        return Ok(());
    }
    let adopt = scope.adopt.iter().filter_map(|adopt| reading.links.iter().find(|link| link.name == adopt.dev));
    // The daemon's routes are selected by protocol; those that a Go flanneld left, by device.
    let filters = reading.ours().chain(adopt).map(|link| Filter::BootOif(link.index)).chain([Filter::Ours]);
    for filter in filters {
        for family in Family::ALL {
            let routes = route::list(&mut kernel.route, family, filter)?;
            // A route whose interface was deleted meanwhile is gone, too.
            let named = routes.iter().filter_map(|info| reading.name(info.oif).map(|dev| to_route(info, dev)));
            found.extend(named.filter(|route| scope.has_route(route)).map(Object::Route));
        }
    }
    Ok(())
}

fn to_route(info: &RouteInfo, dev: IfName) -> Route {
    Route { dst: info.dst, metric: info.metric, via: info.via, dev, onlink: info.onlink, protocol: info.protocol }
}

/// Decodes a change of a route.
pub(crate) fn decode_change(message: &Received<'_>, scope: &Scope, name: impl Fn(u32) -> Option<IfName>) -> Option<Changed> {
    let is_set = message.kind == route::RTM_NEWROUTE;
    if let Some(change) = blackhole::decode_change(message.body, is_set) {
        return Some(change);
    }
    // A foreign route with the same destination and metric has replaced the daemon's route.
    let (dst, metric) = route::decode_key(message.body)?;
    match route::decode(message.body).and_then(|info| Some(to_route(&info, name(info.oif)?))) {
        Some(route) if is_set && scope.has_route(&route) => Some(Changed::Set(Object::Route(route))),
        None if !is_set || !scope.networks.iter().any(|network| network.covers(dst)) => None,
        _ => Some(Changed::Gone(Key::Route(dst, metric))),
    }
}
