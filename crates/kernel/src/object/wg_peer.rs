//! Applies and reads the peers of WireGuard devices, and their subnets. The kernel sends no notifications of them.

use flannel::object::{AllowedIp, Object, WgPeer};
use flannel::{IfName, Op};

use super::Reading;
use crate::Kernel;
use crate::netlink::NetlinkError;
use crate::wireguard::PeerChange;

/// The change that an operation means, with the device; `None` for operations on objects of other kinds.
fn change(op: &Op) -> Option<(IfName, PeerChange<'_>)> {
    match op {
        Op::Set(Object::WgPeer(peer)) => Some((peer.link, PeerChange::Set(peer))),
        Op::Delete(Object::WgPeer(peer)) => Some((peer.link, PeerChange::Remove(&peer.public_key))),
        Op::Set(Object::AllowedIp(allowed)) => Some((allowed.link, PeerChange::Allow(allowed))),
        Op::Delete(Object::AllowedIp(allowed)) => Some((allowed.link, PeerChange::Forbid(allowed.subnet))),
        _ => None,
    }
}

/// Executes operations in order, those of one device together, and returns an outcome for each.
pub(super) fn apply(kernel: &mut Kernel, ops: &[&Op]) -> Vec<Result<(), NetlinkError>> {
    let changes: Vec<(IfName, PeerChange<'_>)> = ops.iter().filter_map(|op| change(op)).collect();
    let mut outcomes = Vec::with_capacity(ops.len());
    for of_one in changes.chunk_by(|(one, _), (other, _)| one == other) {
        let link = of_one[0].0;
        let list: Vec<PeerChange<'_>> = of_one.iter().map(|(_, change)| *change).collect();
        match kernel.index(link) {
            Ok(_) => outcomes.extend(kernel.wireguard.change(link, &list)),
            // It says so even where the kernel has no WireGuard.
            Err(error) => {
                let (errno, message) = (error.errno().unwrap_or(libc::ENODEV), format!("there is no interface {link}"));
                outcomes.extend(list.iter().map(|_| Err(NetlinkError::Refused { errno, message: message.clone() })));
            }
        }
    }
    outcomes
}

pub(super) fn observe_peers(reading: &Reading<'_>, found: &mut Vec<Object>) {
    for (link, device) in &reading.wireguard {
        found.extend(device.peers.iter().map(|status| {
            let config = &status.config;
            Object::WgPeer(Box::new(WgPeer {
                link: *link,
                public_key: config.public_key,
                endpoint: config.endpoint,
                keepalive: config.keepalive,
                psk: config.psk.clone(),
                handshake: status.handshake.map(|age| age.as_secs()),
            }))
        }));
    }
}

pub(super) fn observe_allowed(reading: &Reading<'_>, found: &mut Vec<Object>) {
    for (link, device) in &reading.wireguard {
        let peers = device.peers.iter().map(|peer| &peer.config);
        let subnets = peers.flat_map(|peer| peer.allowed.iter().map(|subnet| (peer.public_key, *subnet)));
        found.extend(subnets.map(|(peer, subnet)| Object::AllowedIp(Box::new(AllowedIp { link: *link, subnet, peer }))));
    }
}
