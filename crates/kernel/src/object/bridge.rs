//! Reads the bridge of this host's pods with its gateway addresses and ports, and restores it.

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
        // The plugin created it, so the daemon does not delete it.
        Change::Delete => Ok(()),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    found.extend(find(&mut kernel.route, &reading.links, reading.scope)?.map(|bridge| Object::Bridge(Box::new(bridge))));
    Ok(())
}

/// Finds the bridge among all links: by its name, or, if no bridge has that name, by a gateway address.
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

/// Restores the bridge. Ports that do not exist any more, or belong to another bridge now, are skipped.
fn set(socket: &mut Socket, want: &Bridge) -> Result<(), NetlinkError> {
    let name = want.name;
    let gone = || NetlinkError::Refused { errno: libc::ENODEV, message: format!("{name} was deleted while it was being set up") };
    let have = match link::get(socket, name)? {
        Some(have) => have,
        None => {
            match link::create_bridge(socket, name, want.mtu, Some(want.mac)) {
                // The plugin created it meanwhile.
                Err(error) if !error.is_exists() => return Err(error),
                _ => {}
            }
            for setting in ["accept_ra", "accept_dad"] {
                // As the plugin does. A read-only /proc/sys must not prevent the creation of the bridge.
                let _ = sysctl::write(&format!("net/ipv6/conf/{name}/{setting}"), "0");
            }
            link::get(socket, name)?.ok_or_else(gone)?
        }
    };
    if have.kind != "bridge" || have.vlan_filtering {
        let problem = if have.vlan_filtering { "filters VLANs now" } else { "is not a bridge" };
        return Err(NetlinkError::Refused { errno: libc::EEXIST, message: format!("{name} {problem}") });
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
            // A port may have been deleted meanwhile; an error does not keep the other ports from being added.
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
