//! The switch or router between the hosts.

use anyhow::Context;
use flannel::object::bridge::Port;
use flannel::{IfName, Mac};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, link, sysctl};

use crate::plan::Families;

pub(crate) fn name(text: &str) -> IfName {
    text.parse().expect("the lab's own names are valid")
}

pub(crate) fn index(socket: &mut Socket, text: &str) -> anyhow::Result<u32> {
    Ok(link::get(socket, name(text))?.with_context(|| format!("there is no interface {text}"))?.index)
}

/// Makes a bridge for each network in the namespace of the switch, with the address 10.0.n.254. With two networks it routes
/// between them.
pub(super) fn prepare_middle(networks: usize, families: Families) -> anyhow::Result<()> {
    let mut socket = Socket::open(Protocol::Route)?;
    link::set_up(&mut socket, 1, true)?;
    for network in 0..networks {
        let bridge = format!("lan{network}");
        link::create_bridge(&mut socket, name(&bridge), 0, None)?;
        let at = index(&mut socket, &bridge)?;
        // A MAC of its own: otherwise it takes a port's, and hosts lose the store when that host's interface is created again.
        link::set_mac(&mut socket, at, Mac([2, 0, 0, 0, u8::try_from(network)?, 254]))?;
        // All addresses are the lab's own, so no time is spent on duplicate address detection.
        sysctl::write(&format!("net/ipv6/conf/{bridge}/accept_dad"), "0")?;
        link::set_up(&mut socket, at, true)?;
        addr::add(&mut socket, at, format!("10.0.{network}.254/24").parse()?)?;
        if families.v6 {
            addr::add(&mut socket, at, format!("fd00:10:0:{network}::fe/64").parse()?)?;
        }
    }
    if networks > 1 {
        flannel::Family::ALL.iter().try_for_each(|family| sysctl::write(family.forwarding(), "1"))?;
    }
    Ok(())
}

/// Joins a namespace to a network: its `eth0` and a port of the bridge, named after the host.
pub(super) fn connect(middle: &Netns, netns: &Netns, host: &str, network: usize) -> anyhow::Result<()> {
    use std::os::fd::AsFd;
    middle.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        let this = link::VethEnd { name: name(host), mac: None, netns: None };
        let peer = link::VethEnd { name: name("eth0"), mac: None, netns: Some(netns.as_fd()) };
        link::create_veth(&mut socket, 1500, this, peer)?;
        let (port, bridge) = (index(&mut socket, host)?, index(&mut socket, &format!("lan{network}"))?);
        anyhow::Ok(link::enslave(&mut socket, port, bridge, Port::default())?)
    })?
}
