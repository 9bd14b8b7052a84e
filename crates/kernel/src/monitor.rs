//! Hears what changes in the kernel, limited to what may be ours. Lost notifications become
//! [`Changed::Everything`]; our own echoes are left out where the kernel names the cause.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use flannel::desired::{Fdb, Key, Neigh, Object, ROUTE_PROTOCOL};
use flannel::{Family, IfName};

use crate::netlink::{NetlinkError, Protocol, Received, Socket, attrs, str_in};
use crate::{addr, link, neigh, nft, observe, route};

const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const NFNLGRP_NFTABLES: u32 = 7;

/// A change that somebody made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// This object is there, exactly so.
    Set(Object),
    /// What was at this key is gone.
    Gone(Key),
    /// A watched link, or an address of it, changed; the kernel drops routes with it without a word, so more than the
    /// link must be looked at.
    Link(IfName),
    /// Something in our nftables table of this family changed.
    Rules(Family),
    /// Notifications were lost: anything may have changed.
    Everything,
}

/// The notification sockets.
#[derive(Debug)]
pub struct Monitor {
    route: Socket,
    netfilter: Option<Socket>,
    watched: Vec<IfName>,
    /// Indexes of the watched links, as far as they are there.
    names: BTreeMap<u32, IfName>,
    /// The port whose changes are our own.
    own_port: u32,
}

impl Monitor {
    /// Subscribes, in the calling thread's network namespace, to changes of the watched links with what stands on
    /// them, of our routes, and (if `rules`) of our nftables tables. Changes that carry `own_port` are left out.
    ///
    /// # Errors
    /// When the kernel refuses the sockets.
    pub fn open(watched: Vec<IfName>, rules: bool, own_port: u32) -> Result<Monitor, NetlinkError> {
        let mut route = Socket::open(Protocol::Route)?;
        // The names are read before the subscription, on the same socket, so that no answer mixes with notifications;
        // a link that changes in between is caught by the full read with which every watch begins.
        let links = link::list(&mut route)?;
        let names = links.iter().filter(|l| watched.contains(&l.name)).map(|l| (l.index, l.name)).collect();
        for group in [RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE] {
            route.join(group)?;
        }
        let netfilter = match rules {
            true => {
                let socket = Socket::open(Protocol::Netfilter)?;
                socket.join(NFNLGRP_NFTABLES)?;
                Some(socket)
            }
            false => None,
        };
        Ok(Monitor { route, netfilter, watched, names, own_port })
    }

    /// The sockets to wait on for reading: that for routes, and that for rules where there is one.
    pub fn sockets(&self) -> (BorrowedFd<'_>, Option<BorrowedFd<'_>>) {
        (self.route.as_fd(), self.netfilter.as_ref().map(AsFd::as_fd))
    }

    /// Reads all notifications that are there, without waiting.
    ///
    /// # Errors
    /// When a socket fails for another reason than lost notifications.
    pub fn drain(&mut self) -> Result<Vec<Changed>, NetlinkError> {
        let mut changes = Vec::new();
        loop {
            let Monitor { route, names, watched, own_port, .. } = self;
            let more = route.notifications(false, |message| {
                if message.port != *own_port || message.port == 0 {
                    changes.extend(decode(&message, watched, names));
                } else if is_link(&message) {
                    // Our own change of a link still teaches its index.
                    decode(&message, watched, names);
                }
            });
            if !go_on(more, &mut changes)? {
                break;
            }
        }
        while let Some(socket) = &mut self.netfilter {
            let more = socket.notifications(false, |message| changes.extend(decode_rules(&message)));
            if !go_on(more, &mut changes)? {
                break;
            }
        }
        Ok(changes)
    }
}

fn go_on(outcome: Result<(), NetlinkError>, changes: &mut Vec<Changed>) -> Result<bool, NetlinkError> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::EAGAIN) => Ok(false),
        Err(error) if error.errno() == Some(libc::ENOBUFS) => {
            changes.push(Changed::Everything);
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

fn is_link(message: &Received<'_>) -> bool {
    matches!(message.kind, link::RTM_NEWLINK | link::RTM_DELLINK)
}

fn decode(message: &Received<'_>, watched: &[IfName], names: &mut BTreeMap<u32, IfName>) -> Option<Changed> {
    match message.kind {
        link::RTM_NEWLINK | link::RTM_DELLINK => {
            // A bridge port is announced once more in the bridge family: that says nothing about the link.
            if message.body.first() != Some(&0) {
                return None;
            }
            let info = link::decode(message.body)?;
            if message.kind == link::RTM_DELLINK || !watched.contains(&info.name) {
                return names.remove(&info.index).map(Changed::Link);
            }
            names.insert(info.index, info.name);
            Some(Changed::Link(info.name))
        }
        addr::RTM_NEWADDR | addr::RTM_DELADDR => {
            addr::decode(message.body).and_then(|info| names.get(&info.index)).copied().map(Changed::Link)
        }
        route::RTM_NEWROUTE | route::RTM_DELROUTE => {
            let info = route::decode(message.body)?;
            let dev = *names.get(&info.oif)?;
            let object = observe::object(&info, dev);
            let gone = message.kind == route::RTM_DELROUTE;
            // What is put in the place of a route of ours takes it away.
            let ours = info.protocol == ROUTE_PROTOCOL;
            Some(if gone || !ours { Changed::Gone(object.key()) } else { Changed::Set(object) })
        }
        neigh::RTM_NEWNEIGH => {
            let entry = neigh::decode(message.body)?;
            let link = *names.get(&entry.index)?;
            let object = match entry.fdb {
                true => Object::Fdb(Fdb { link, mac: entry.mac, dst: entry.ip }),
                false => Object::Neigh(Neigh { link, ip: entry.ip, mac: entry.mac }),
            };
            Some(if entry.permanent { Changed::Set(object) } else { Changed::Gone(object.key()) })
        }
        neigh::RTM_DELNEIGH => {
            let (index, fdb, ip, mac) = neigh::decode_key(message.body)?;
            let link = *names.get(&index)?;
            Some(Changed::Gone(if fdb { Key::Fdb(link, mac?) } else { Key::Neigh(link, ip?) }))
        }
        _ => None,
    }
}

fn decode_rules(message: &Received<'_>) -> Option<Changed> {
    let table = attrs(message.body.get(4..)?).find(|(kind, _)| *kind == nft::TABLE).and_then(|(_, name)| str_in(name))?;
    Family::ALL.into_iter().find(|family| flannel::traffic::table_name(*family) == table).map(Changed::Rules)
}
