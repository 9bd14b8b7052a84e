//! The container's end of the veth pair.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ::flannel::{Family, IfName, Mac};
use kernel::addr;
use kernel::link::{self, LinkInfo};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::route::Added;
use serde_json::{Map, Value};

use super::config::Config;
use super::{failed, prefer_sysctl, write_sysctl};
use crate::protocol::{CniError, number};
use crate::result::{CniResult, Route};

/// How long duplicate address detection may take.
const UNIQUE: Duration = Duration::from_secs(5);

/// Sets addresses, state and routes of the container's end. Enters the namespace once. A route to a destination that another
/// interface already has a route to is not added, and removed from the result.
pub(super) fn configure(
    netns: &Netns,
    ifname: IfName,
    result: &mut CniResult,
    gateways: &[(IpAddr, u8)],
    config: &Config,
) -> Result<LinkInfo, CniError> {
    let configure = || {
        let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink in the container"))?;
        let look = |socket: &mut Socket| {
            let found = link::get(socket, ifname).map_err(failed(format!("read {ifname} in the container")))?;
            found.ok_or_else(|| CniError::failed(format!("{ifname} was deleted in the container")))
        };
        let index = look(&mut socket)?.index;
        if config.ipam.is_none() {
            if !config.leave_down {
                link::set_up(&mut socket, index, true).map_err(failed(format!("set {ifname} up in the container")))?;
            }
            return look(&mut socket);
        }
        let has_v6 = result.ips.iter().any(|ip| Family::of(ip.address.addr) == Family::V6);
        // The address was allocated to this container alone, so duplicates are detected only if that is configured.
        let dad = if config.dad { "1" } else { "0" };
        let set_dad = |name: &str, value: &str| prefer_sysctl(&format!("net/ipv6/conf/{ifname}/{name}"), value);
        set_dad("accept_dad", dad);
        if config.dad {
            set_dad("enhanced_dad", "1");
        }
        link::set_ipv4_conf(&mut socket, index, link::ARP_NOTIFY, 1)
            .map_err(failed(format!("enable arp_notify on {ifname} in the container")))?;
        if has_v6 {
            write_sysctl(&format!("net/ipv6/conf/{ifname}/disable_ipv6"), "0")?;
            prefer_sysctl("net/ipv6/conf/lo/disable_ipv6", "0");
            prefer_sysctl(&format!("net/ipv6/conf/{ifname}/keep_addr_on_down"), "1");
        }
        for ip in &result.ips {
            let added =
                if config.dad { addr::add_with_dad(&mut socket, index, ip.address) } else { addr::add(&mut socket, index, ip.address) };
            added.map_err(failed(format!("add {} to {ifname} in the container", ip.address)))?;
        }
        link::set_up(&mut socket, index, true).map_err(failed(format!("set {ifname} up in the container")))?;
        if config.dad && gateways.iter().any(|(gateway, _)| gateway.is_ipv6()) {
            await_unique(&mut socket, index)?;
        }
        let mut added = Vec::with_capacity(result.routes.len());
        for route in result.routes.drain(..) {
            match add_route(&mut socket, index, &route, gateways)? {
                Added::Existed if added.contains(&route) => {}
                Added::New | Added::Existed => added.push(route),
                Added::Taken => eprintln!("bridge: another route to {} exists in the container and is kept", route.dst),
            }
        }
        result.routes = added;
        look(&mut socket)
    };
    netns.run(configure).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?
}

fn add_route(socket: &mut Socket, index: u32, route: &Route, gateways: &[(IpAddr, u8)]) -> Result<Added, CniError> {
    let Route { dst, gw, more } = route;
    let options = route_options(more)?;
    // A route with link scope has no gateway.
    let on_link = options.scope == Some(253);
    let default = || gateways.iter().map(|(gateway, _)| *gateway).find(|gateway| Family::of(*gateway) == dst.family());
    let gateway = gw.or_else(|| default().filter(|_| !on_link));
    let added = kernel::route::add_with(socket, *dst, gateway, index, options);
    added.map_err(failed(format!("add the route to {dst} in the container")))
}

/// Reads the optional fields of a route. Unknown fields are ignored, as in Go.
fn route_options(more: &Map<String, Value>) -> Result<kernel::route::Options, CniError> {
    let positive = |name: &str| number(more, name).map(|value| value.filter(|value| *value > 0));
    let scope = number(more, "scope")?.map(|scope| u8::try_from(scope).map_err(|_| CniError::config("routes.scope must be at most 255")));
    Ok(kernel::route::Options {
        mtu: positive("mtu")?,
        advmss: positive("advmss")?,
        priority: positive("priority")?,
        table: number(more, "table")?,
        scope: scope.transpose()?,
    })
}

/// Waits until the kernel has finished duplicate address detection of the interface's IPv6 addresses. Fails on a duplicate.
fn await_unique(socket: &mut Socket, index: u32) -> Result<(), CniError> {
    let end = Instant::now() + UNIQUE;
    loop {
        let addrs = addr::list(socket, index).map_err(failed("read the container's addresses"))?;
        let own = || addrs.iter().filter(|a| a.index == index && a.addr.cidr.addr.is_ipv6());
        if let Some(twice) = own().find(|a| a.duplicate) {
            return Err(CniError::failed(format!("{} is already in use (duplicate address detection)", twice.addr.cidr.addr)));
        }
        if !own().any(|a| a.tentative) {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(CniError::failed(format!("duplicate address detection did not end within {} s", UNIQUE.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The MAC of the container's end.
pub(super) fn mac(netns: &Netns, ifname: IfName) -> Result<Mac, CniError> {
    let look = || Socket::open(Protocol::Route).and_then(|mut socket| link::get(&mut socket, ifname));
    let found = netns.run(look).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?;
    let found = found.map_err(failed(format!("read {ifname} in the container")))?;
    found.and_then(|link| link.mac).ok_or_else(|| CniError::failed(format!("{ifname} has no MAC")))
}
