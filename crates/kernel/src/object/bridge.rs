//! The bridge of this host's pods as an object: read with its gateways and ports, and made anew with them.

use std::collections::{BTreeMap, BTreeSet};

use flannel::object::Object;
use flannel::object::bridge::Bridge;
use flannel::scope::Scope;
use flannel::{Cidr, IfName};

use super::{Change, Reading};
use crate::link::{self, LinkInfo};
use crate::netlink::{NetlinkError, Socket};
use crate::{Kernel, addr, sysctl};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Bridge) -> Result<(), NetlinkError> {
    match change {
        Change::Set => set(&mut kernel.route, wanted),
        // The plugin made it.
        Change::Delete => Ok(()),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    found.extend(find(&mut kernel.route, &reading.links, reading.scope)?.map(|bridge| Object::Bridge(Box::new(bridge))));
    Ok(())
}

/// Finds it among all links: by its name, or, where there is none of that name, by a gateway's address.
fn find(socket: &mut Socket, links: &[LinkInfo], scope: &Scope) -> Result<Option<Bridge>, NetlinkError> {
    let bridges = || links.iter().filter(|link| link.kind == "bridge" && !scope.gateways.is_empty());
    let known = bridges().find(|link| Some(link.name) == scope.bridge);
    for info in known.map_or_else(|| bridges().collect(), |known| vec![known]) {
        let found = addr::list(socket, info.index)?;
        let on_it = found.iter().filter(|found| found.index == info.index).map(|found| found.addr.cidr);
        let in_subnet = |cidr: &Cidr| scope.gateways.iter().any(|gateway| gateway.subnet().contains(cidr.addr));
        let addrs: BTreeSet<Cidr> = on_it.filter(in_subnet).collect();
        if known.is_none() && !scope.gateways.iter().any(|gateway| addrs.contains(gateway)) {
            continue;
        }
        let Some(mac) = info.mac else { continue };
        let ports = links.iter().filter(|link| link.master == info.index).map(|link| (link.name, link.port));
        let loose = links.iter().filter(|link| link.master == 0 && link.kind == "veth" && link.reaches_elsewhere);
        return Ok(Some(Bridge {
            name: info.name,
            mac,
            mtu: info.mtu,
            up: info.up,
            promiscuous: info.promiscuous,
            vlans: info.vlan_filtering,
            route_localnet: sysctl::read(&route_localnet(info.name)).is_ok_and(|value| value.as_deref() == Some("1")),
            addrs,
            ports: ports.collect(),
            loose: loose.map(|link| link.name).collect(),
        }));
    }
    Ok(None)
}

fn route_localnet(name: IfName) -> String {
    format!("net/ipv4/conf/{name}/route_localnet")
}

/// Makes it as wanted. Ports that are not there any more are passed over, and those of another bridge are left to that one.
fn set(socket: &mut Socket, want: &Bridge) -> Result<(), NetlinkError> {
    let name = want.name;
    let gone = || NetlinkError::Refused { errno: libc::ENODEV, message: format!("{name} was deleted at once") };
    let have = match link::get(socket, name)? {
        Some(have) => have,
        None => {
            match link::create_bridge(socket, name, want.mtu, Some(want.mac)) {
                // The plugin was faster.
                Err(error) if !error.is_exists() => return Err(error),
                _ => {}
            }
            for ask in ["accept_ra", "accept_dad"] {
                // As the plugin makes it; a read-only /proc/sys is no reason to have no bridge.
                let _ = sysctl::write(&format!("net/ipv6/conf/{name}/{ask}"), "0");
            }
            link::get(socket, name)?.ok_or_else(gone)?
        }
    };
    if have.kind != "bridge" || have.vlan_filtering {
        let what = if have.vlan_filtering { "tells VLANs apart by now" } else { "is no bridge" };
        return Err(NetlinkError::Refused { errno: libc::EEXIST, message: format!("{name} {what}") });
    }
    if have.mac != Some(want.mac) {
        link::set_mac(socket, have.index, want.mac)?;
    }
    if have.promiscuous != want.promiscuous {
        link::set_promiscuous(socket, have.index, want.promiscuous)?;
    }
    if want.route_localnet {
        link::set_ipv4_conf(socket, have.index, link::ROUTE_LOCALNET, 1)?;
    }
    if have.up != want.up {
        link::set_up(socket, have.index, want.up)?;
    }
    let links = link::list(socket)?;
    let free: BTreeMap<IfName, u32> = links.iter().filter(|link| link.master == 0).map(|link| (link.name, link.index)).collect();
    let mut outcome = Ok(());
    for (port, config) in &want.ports {
        let Some(index) = free.get(port) else { continue };
        match link::enslave(socket, *index, have.index, *config) {
            // It ended this instant; the others do not wait for it.
            Err(error) if !error.is_not_found() => outcome = Err(error),
            _ => {}
        }
    }
    for addr in &want.addrs {
        match addr::add(socket, have.index, *addr) {
            Err(error) if !error.is_exists() => outcome = Err(error),
            _ => {}
        }
    }
    outcome
}
