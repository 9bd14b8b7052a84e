//! CHECK: verifies that the attachment is as ADD left it.

use ::flannel::{Family, IfName};
use kernel::netlink::{Protocol, Socket};
use kernel::{addr, link, route};
use serde_json::Value;

use super::config::Config;
use super::{failed, ipam};
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, field};
use crate::result::{CniResult, Route};

pub(super) fn check(request: &Request<'_>, config: &Config) -> Result<(), CniError> {
    let previous = field(request.conf, "prevResult").ok_or_else(|| CniError::config("prevResult: missing: CHECK compares with it"))?;
    ipam(request, Command::Check)?;
    let want = CniResult::parse(previous)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let bridge = link::get(&mut host, config.bridge).map_err(failed("read the bridge"))?;
    if bridge.as_ref().is_none_or(|bridge| bridge.kind != "bridge") {
        return Err(CniError::failed(format!("the bridge {} does not exist", config.bridge)));
    }
    if config.promiscuous && bridge.as_ref().is_some_and(|bridge| !bridge.promiscuous) {
        return Err(CniError::failed(format!("the bridge {} is not promiscuous", config.bridge)));
    }
    let netns = open_netns(request)?;
    let ifname: IfName = request.ifname.parse().map_err(|error| CniError::environment(format!("CNI_IFNAME: {error}")))?;
    let look = || {
        let mut socket = Socket::open(Protocol::Route)?;
        let Some(found) = link::get(&mut socket, ifname)? else { return Ok(None) };
        let mut routes = Vec::new();
        for family in Family::ALL {
            routes.extend(route::list(&mut socket, family, route::Filter::Oif(found.index))?);
        }
        let addrs = addr::list(&mut socket, found.index)?;
        Ok(Some((found, addrs, routes)))
    };
    let found = netns.run(look).map_err(|error| CniError::failed(format!("cannot enter CNI_NETNS: {error}")))?;
    let Some((container, addrs, routes)) = found.map_err(failed(format!("read {ifname} in the container")))? else {
        return Err(CniError::failed(format!("{ifname} is missing in the container")));
    };
    // The host's end in the result of ADD must still be a port of the bridge.
    if let Some(named) = want.interfaces.get(1).filter(|named| named.sandbox.is_empty()) {
        let port =
            named.name.parse().ok().map(|name| link::get(&mut host, name)).transpose().map_err(failed("read the host's end"))?.flatten();
        if port.is_none_or(|port| bridge.as_ref().is_none_or(|bridge| port.master != bridge.index)) {
            return Err(CniError::failed(format!("{} is not a port of {}", named.name, config.bridge)));
        }
    }
    let named = want.interfaces.iter().find(|i| i.name == ifname.as_str() && !i.sandbox.is_empty());
    if let Some(named) = named.filter(|named| container.mac.map(|mac| mac.to_string()).as_deref() != Some(&named.mac)) {
        return Err(CniError::failed(format!("MAC address mismatch: {ifname} does not have {}", named.mac)));
    }
    if !container.up && !config.leave_down {
        return Err(CniError::failed(format!("{ifname} is down in the container")));
    }
    for ip in &want.ips {
        if !addrs.iter().any(|a| a.index == container.index && a.addr.cidr == ip.address) {
            return Err(CniError::failed(format!("{} is missing on {ifname} in the container", ip.address)));
        }
        // Without the route to its subnet the gateway is unreachable. An address with a full prefix has no such route.
        let subnet = ip.address.subnet();
        let is_single = ip.address.len == subnet.family().bits();
        if ip.gateway.is_some() && !is_single && !routes.iter().any(|have| have.dst == subnet) {
            return Err(CniError::failed(format!("the route to {subnet} is missing in the container")));
        }
    }
    // Only routes of the main table were read.
    let in_main = |route: &&Route| route.more.get("table").and_then(Value::as_u64).is_none_or(|table| table == 0 || table == 254);
    for wanted in want.routes.iter().filter(in_main) {
        if !routes.iter().any(|have| have.dst == wanted.dst && wanted.gw.is_none_or(|gw| have.via == Some(gw))) {
            return Err(CniError::failed(format!("the route to {} is missing in the container", wanted.dst)));
        }
    }
    Ok(())
}
