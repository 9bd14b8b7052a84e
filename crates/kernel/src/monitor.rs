//! Hears what changes in the kernel, limited to what may be ours. Lost notifications become
//! [`Changed::Everything`]; our own echoes are left out where the kernel names the cause.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use flannel::desired::{Fdb, Key, Neigh, Object, Scope};
use flannel::{Family, IfName};
use rustix::event::{PollFd, PollFlags};

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
    /// Something in iptables' tables of this family changed, in those that nf_tables holds.
    Iptables(Family),
    /// Notifications were lost: anything may have changed.
    Everything,
}

/// The notification sockets.
#[derive(Debug)]
pub struct Monitor {
    route: Socket,
    netfilter: Option<Socket>,
    scope: Scope,
    external: IfName,
    /// Indexes of the watched links, as far as they are there.
    names: BTreeMap<u32, IfName>,
    /// The port whose changes are our own.
    own_port: u32,
}

impl Monitor {
    /// Subscribes, in the calling thread's network namespace, to changes of what is in `scope` and of the external
    /// interface. Changes that carry `own_port` are left out.
    ///
    /// # Errors
    /// When the kernel refuses the sockets.
    pub fn open(scope: Scope, external: IfName, own_port: u32) -> Result<Monitor, NetlinkError> {
        let route = Socket::open(Protocol::Route)?;
        for group in [RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE] {
            route.join(group)?;
        }
        // A kernel without nf_tables has nothing to tell of it.
        let netfilter = Socket::open(Protocol::Netfilter).ok().filter(|socket| socket.join(NFNLGRP_NFTABLES).is_ok());
        let mut monitor = Monitor { route, netfilter, scope, external, names: BTreeMap::new(), own_port };
        monitor.learn_names()?;
        Ok(monitor)
    }

    /// Reads the indexes of the watched links, on a socket of its own so that no answer mixes with notifications.
    fn learn_names(&mut self) -> Result<(), NetlinkError> {
        let links = link::list(&mut Socket::open(Protocol::Route)?)?;
        let watched = links.iter().filter(|l| self.scope.links.contains(&l.name) || l.name == self.external);
        self.names = watched.map(|l| (l.index, l.name)).collect();
        Ok(())
    }

    /// Waits until there is something to [`Monitor::drain`].
    ///
    /// # Errors
    /// When waiting fails.
    pub fn wait(&self) -> Result<(), NetlinkError> {
        let fds = [Some(self.route.as_fd()), self.netfilter.as_ref().map(AsFd::as_fd)];
        let mut polled: Vec<PollFd<'_>> = fds.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(NetlinkError::Socket("wait", error.into())),
        }
    }

    /// Reads all notifications that are there, without waiting.
    ///
    /// # Errors
    /// When a socket fails for another reason than lost notifications.
    pub fn drain(&mut self) -> Result<Vec<Changed>, NetlinkError> {
        let mut changes = Vec::new();
        loop {
            let Monitor { route, names, scope, external, own_port, .. } = self;
            let watched = Watched { scope, external: *external };
            let more = route.notifications(false, |message| {
                if message.port != *own_port || message.port == 0 {
                    changes.extend(decode(&message, &watched, names));
                } else if is_link(&message) {
                    // Our own change of a link still teaches its index.
                    decode(&message, &watched, names);
                }
            });
            if !go_on(more, &mut changes)? {
                break;
            }
            if changes.last() == Some(&Changed::Everything) {
                // Which links there are may be among what was lost.
                self.learn_names()?;
            }
        }
        let mut rules = Vec::new();
        while let Some(socket) = &mut self.netfilter {
            // A transaction is a message for each of its rules; once is enough.
            let more = socket.notifications(false, |message| {
                let change = decode_rules(&message).filter(|change| !rules.contains(change));
                rules.extend(change);
            });
            if !go_on(more, &mut rules)? {
                break;
            }
        }
        changes.extend(rules);
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

/// Which links concern us.
struct Watched<'a> {
    scope: &'a Scope,
    external: IfName,
}

fn decode(message: &Received<'_>, watched: &Watched<'_>, names: &mut BTreeMap<u32, IfName>) -> Option<Changed> {
    match message.kind {
        link::RTM_NEWLINK | link::RTM_DELLINK => {
            // A bridge port is announced once more in the bridge family: that says nothing about the link.
            if message.body.first() != Some(&0) {
                return None;
            }
            let info = link::decode(message.body)?;
            if message.kind == link::RTM_DELLINK || !(watched.scope.links.contains(&info.name) || info.name == watched.external) {
                return names.remove(&info.index).map(Changed::Link);
            }
            names.insert(info.index, info.name);
            Some(Changed::Link(info.name))
        }
        addr::RTM_NEWADDR | addr::RTM_DELADDR => {
            addr::decode(message.body).and_then(|info| names.get(&info.index)).copied().map(Changed::Link)
        }
        route::RTM_NEWROUTE | route::RTM_DELROUTE => {
            if let Some(dst) = route::decode_blackhole(message.body) {
                let object = Object::Blackhole(dst);
                let there = message.kind == route::RTM_NEWROUTE;
                return Some(if there { Changed::Set(object) } else { Changed::Gone(object.key()) });
            }
            let info = route::decode(message.body)?;
            let dev = *names.get(&info.oif)?;
            let route = observe::to_route(&info, dev);
            // A foreign route that was put in the place of one of ours takes that away.
            let there = message.kind == route::RTM_NEWROUTE && watched.scope.has_route(&route);
            let object = Object::Route(route);
            Some(if there { Changed::Set(object) } else { Changed::Gone(object.key()) })
        }
        neigh::RTM_NEWNEIGH => {
            let entry = neigh::decode(message.body)?;
            let link = *names.get(&entry.index).filter(|name| watched.scope.links.contains(name))?;
            let object = match entry.fdb {
                true => Object::Fdb(Fdb { link, mac: entry.mac, dst: entry.ip }),
                false => Object::Neigh(Neigh { link, ip: entry.ip, mac: entry.mac }),
            };
            Some(if entry.permanent { Changed::Set(object) } else { Changed::Gone(object.key()) })
        }
        neigh::RTM_DELNEIGH => {
            let (index, fdb, ip, mac) = neigh::decode_key(message.body)?;
            let link = *names.get(&index).filter(|name| watched.scope.links.contains(name))?;
            Some(Changed::Gone(if fdb { Key::Fdb(link, mac?) } else { Key::Neigh(link, ip?) }))
        }
        _ => None,
    }
}

fn decode_rules(message: &Received<'_>) -> Option<Changed> {
    let table = attrs(message.body.get(4..)?).find(|(kind, _)| *kind == nft::TABLE).and_then(|(_, name)| str_in(name))?;
    if matches!(table, "nat" | "filter") {
        let family = *message.body.first()?;
        return Family::ALL.into_iter().find(|f| addr::family_number(*f) == family).map(Changed::Iptables);
    }
    Family::ALL.into_iter().find(|family| flannel::traffic::table_name(*family) == table).map(Changed::Rules)
}
