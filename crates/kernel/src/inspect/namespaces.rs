//! Searches for VXLAN devices of the daemon in other network namespaces.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use flannel::check::{Elsewhere, Expected, Place};
use flannel::object::LinkKind;

use crate::link;
use crate::netlink::{Protocol, Socket};
use crate::netns::Netns;

/// Where `ip netns` and container runtimes name namespaces.
const NAMED: &str = "/run/netns";
/// At most so many processes are looked at.
const PROCESSES: usize = 8_192;
/// At most so many namespaces are entered.
const NAMESPACES: usize = 1_024;

/// The daemon's VXLAN devices that exist in other namespaces than the caller's.
pub(super) fn search(expected: &Expected) -> Vec<Elsewhere> {
    let wanted: BTreeSet<(u32, u16)> = expected
        .links
        .iter()
        .filter_map(|link| match link.kind {
            LinkKind::Vxlan { vni, port, .. } => Some((vni.get(), port)),
            LinkKind::Ipip { .. } | LinkKind::Udp { .. } | LinkKind::WireGuard { .. } | LinkKind::Other(_) => None,
        })
        .collect();
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    if let Ok(id) = Netns::current().and_then(|netns| netns.id()) {
        seen.insert(id);
    }
    for (path, place) in named().chain(of_processes()) {
        if seen.len() > NAMESPACES || found.len() == wanted.len() {
            break;
        }
        // A process may have ended meanwhile.
        let Ok(netns) = Netns::open(Path::new(&path)) else { continue };
        if netns.id().is_ok_and(|id| seen.insert(id)) {
            found.extend(devices(&netns, &wanted, &place));
        }
    }
    found
}

fn named() -> impl Iterator<Item = (String, Place)> {
    let entries = fs::read_dir(NAMED).into_iter().flatten().flatten();
    entries.map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        (format!("{NAMED}/{name}"), Place::Named(name))
    })
}

fn of_processes() -> impl Iterator<Item = (String, Place)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.take(PROCESSES).map(|pid| {
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (format!("/proc/{pid}/ns/net"), Place::Process(pid, program.trim_end().to_owned()))
    })
}

/// VXLAN devices of a namespace with a wanted VNI and port whose sockets are in another one: such a device was moved there. A device
/// that was created there, such as another cluster's in a nested host, has its lower interface beside it.
fn devices(netns: &Netns, wanted: &BTreeSet<(u32, u16)>, place: &Place) -> Vec<Elsewhere> {
    let links = netns.run(|| link::list(&mut Socket::open(Protocol::Route)?));
    let Ok(Ok(links)) = links else { return Vec::new() };
    let moved = links.iter().filter(|link| link.reaches_elsewhere);
    let moved = moved.filter_map(|link| Some((link.name, link.vxlan.map(|vxlan| (vxlan.vni, vxlan.port))?)));
    let ours = moved.filter(|(_, vxlan)| wanted.contains(vxlan));
    ours.map(|(name, vxlan)| Elsewhere { name, vxlan, place: place.clone() }).collect()
}
