//! Hears what changes in the kernel, limited to what may be ours. Lost notifications become
//! [`Changed::Everything`]; our own echoes are left out where the kernel names the cause.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use flannel::object::bridge::Port;
use flannel::object::{Key, Object};
use flannel::scope::Scope;
use flannel::{Family, IfName};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};

use crate::link::LinkInfo;
use crate::netlink::{NetlinkError, Protocol, Received, Socket, attrs, str_in, u32_at};
use crate::{addr, link, neigh, nft, object, route, sysctl};

const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const RTNLGRP_IPV4_NETCONF: u32 = 24;
const RTNLGRP_IPV6_NETCONF: u32 = 25;
/// What is listened to.
const GROUPS: [u32; 8] = [
    RTNLGRP_LINK,
    RTNLGRP_NEIGH,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
];
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
    /// A bridge changed, or its addresses, or a port left it: it may be the pods'.
    Bridge,
    /// A link became a port of this bridge, or behaves as one otherwise.
    Port(IfName, IfName, Port),
    /// A link that was a port of a bridge is gone.
    PortGone(IfName),
    /// Something in our nftables table of this family changed.
    Rules(Family),
    /// Something in iptables' tables of this family changed, in those that nf_tables holds.
    Iptables(Family),
    /// Rules that plugins wrote for pods were deleted, perhaps by a plugin.
    PodRules,
    /// The file for the CNI plugins.
    File,
    /// Notifications were lost: anything may have changed.
    Everything,
}

/// A change and, where the kernel tells, who made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelEvent {
    /// What changed.
    pub change: Changed,
    /// By whom.
    pub by: Option<Author>,
}

/// Who changed something. Netlink tells a socket's port, which for a program's first socket is its process's number;
/// nf_tables tells process and program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    /// The process.
    pub pid: u32,
    /// Its program; empty if it had ended before it was looked at.
    pub program: String,
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.program.as_str() {
            "" => write!(f, "process {}, which has ended", self.pid),
            program => write!(f, "{program}, process {}", self.pid),
        }
    }
}

/// The largest number that Linux gives to a process (`PID_MAX_LIMIT`, `linux/threads.h`); ports above it say nothing.
const PID_MAX: u32 = 4 << 20;

impl Author {
    /// Whose socket has this port. In a container's own PID namespace the number means another process, or none.
    fn of(port: u32) -> Option<Author> {
        // PROC_PID_INIT_INO of linux/proc_ns.h
        let initial = || std::fs::read_link("/proc/self/ns/pid").is_ok_and(|name| name.as_os_str() == "pid:[4026531836]");
        let named = || std::fs::read_to_string(format!("/proc/{port}/comm")).map(|name| name.trim_end().to_owned());
        (port != 0 && port <= PID_MAX && initial()).then(|| Author { pid: port, program: named().unwrap_or_default() })
    }
}

/// The notification sockets.
#[derive(Debug)]
pub struct Monitor {
    route: Socket,
    netfilter: Option<Socket>,
    file: Option<WatchedFile>,
    scope: Scope,
    external: IfName,
    /// Indexes of the watched links, as far as they are there.
    names: BTreeMap<u32, IfName>,
    bridges: Bridges,
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
        if own_port != 0 {
            // Ten thousand routes of our own are not to fill the queue. Without it they are left out by `drain`.
            let _ = route.leave_out(&[route::RTM_NEWROUTE, route::RTM_DELROUTE, neigh::RTM_NEWNEIGH, neigh::RTM_DELNEIGH], own_port);
        }
        GROUPS.iter().try_for_each(|group| route.join(*group))?;
        // A kernel without nf_tables has nothing to tell of it.
        let netfilter = Socket::open(Protocol::Netfilter).ok().filter(|socket| socket.join(NFNLGRP_NFTABLES).is_ok());
        let file = scope.file.clone().and_then(WatchedFile::new);
        let (names, bridges) = (BTreeMap::new(), Bridges::default());
        let mut monitor = Monitor { route, netfilter, file, scope, external, names, bridges, own_port };
        monitor.learn_names()?;
        Ok(monitor)
    }

    /// Reads the indexes of the watched links, on a socket of its own so that no answer mixes with notifications.
    fn learn_names(&mut self) -> Result<(), NetlinkError> {
        let links = link::list(&mut Socket::open(Protocol::Route)?)?;
        let watched = links.iter().filter(|l| self.scope.links.contains(&l.name) || l.name == self.external);
        self.names = watched.map(|l| (l.index, l.name)).collect();
        self.bridges = Bridges::default();
        self.bridges.names = links.iter().filter(|link| link.kind == "bridge").map(|link| (link.index, link.name)).collect();
        let ports = links.iter().filter(|link| self.bridges.names.contains_key(&link.master));
        self.bridges.ports = ports.map(|link| link.index).collect();
        Ok(())
    }

    /// Waits until there is something to [`Monitor::drain`].
    ///
    /// # Errors
    /// When waiting fails.
    pub fn wait(&self) -> Result<(), NetlinkError> {
        let file = self.file.as_ref();
        let fds = [Some(self.route.as_fd()), self.netfilter.as_ref().map(AsFd::as_fd), file.map(|file| file.fd.as_fd())];
        let mut polled: Vec<PollFd<'_>> = fds.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // A folder that is gone cannot be watched: whether it is there again is looked at now and then.
        let patience = file.is_some_and(|file| !file.watching).then_some(Timespec { tv_sec: 0, tv_nsec: 100_000_000 });
        match rustix::event::poll(&mut polled, patience.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(NetlinkError::Socket("wait", error.into())),
        }
    }

    /// Reads all notifications that are there, without waiting.
    ///
    /// # Errors
    /// When a socket fails for another reason than lost notifications.
    pub fn drain(&mut self) -> Result<Vec<KernelEvent>, NetlinkError> {
        let mut heard: Vec<KernelEvent> = Vec::new();
        // Many changes in a row are one author's, as a rule.
        let mut author: (u32, Option<Author>) = (0, None);
        let mut lost = false;
        // One look at the bridge is enough, after all else was heard.
        let mut bridge: Option<KernelEvent> = None;
        loop {
            let Monitor { route, names, bridges, scope, external, own_port, .. } = self;
            let watched = Watched { scope, external: *external };
            let more = route.notifications(false, |message| {
                if lost {
                    // All will be read anew; what matters is to be done with these soon.
                } else if message.port != *own_port || message.port == 0 {
                    if let Some(change) = decode(&message, &watched, names, bridges) {
                        if author.0 != message.port {
                            author = (message.port, Author::of(message.port));
                        }
                        let is_bridge = change == Changed::Bridge;
                        let news = KernelEvent { change, by: author.1.clone() };
                        if is_bridge {
                            bridge = Some(news);
                        } else {
                            heard.push(news);
                        }
                    }
                } else if is_link(&message) {
                    // Our own change of a link still teaches its index.
                    decode(&message, &watched, names, bridges);
                }
            });
            if !go_on(more, &mut lost)? {
                break;
            }
        }
        heard.extend(bridge);
        // A socket that overflowed gets nothing more until its queue was seen empty, which it is only now.
        if lost {
            heard = vec![KernelEvent { change: Changed::Everything, by: None }];
            // Which links there are may be among what was lost.
            self.learn_names()?;
        }
        lost = false;
        let mut rules: Vec<KernelEvent> = Vec::new();
        while let Some(socket) = &mut self.netfilter {
            // A transaction is a message for each of its rules, once is enough; its last message says whose it was.
            let more = socket.notifications(false, |message| match decode_rules(&message) {
                // Of pods' rules it matters who deleted them: each transaction counts.
                Some(change) if rules.iter().any(|known| known.change == change && (known.by.is_none() || change != Changed::PodRules)) => {
                }
                Some(change) => rules.push(KernelEvent { change, by: None }),
                None => {
                    let author = decode_generation(&message);
                    rules.iter_mut().filter(|known| known.by.is_none()).for_each(|known| known.by.clone_from(&author));
                }
            });
            if !go_on(more, &mut lost)? {
                break;
            }
        }
        heard.extend(rules);
        heard.extend(lost.then_some(KernelEvent { change: Changed::Everything, by: None }));
        if self.file.as_mut().is_some_and(WatchedFile::has_changed) {
            heard.push(KernelEvent { change: Changed::File, by: None });
        }
        Ok(heard)
    }
}

/// A file that is watched by its folder (inotify(7)), because it is replaced rather than written to.
#[derive(Debug)]
struct WatchedFile {
    fd: OwnedFd,
    folder: PathBuf,
    name: OsString,
    /// Is the folder there to be watched?
    watching: bool,
}

impl WatchedFile {
    /// `None` where the system grants no inotify: then the audit notices.
    fn new(path: PathBuf) -> Option<WatchedFile> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), ToOwned::to_owned);
        let mut file = WatchedFile { fd, folder, name: path.file_name()?.to_owned(), watching: false };
        file.watch();
        Some(file)
    }

    fn watch(&mut self) {
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        self.watching = inotify::add_watch(&self.fd, &self.folder, flags).is_ok();
    }

    fn has_changed(&mut self) -> bool {
        let mut changed = false;
        if !self.watching {
            self.watch();
            changed = self.watching;
        }
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        while let Ok(event) = reader.next() {
            let gone = ReadFlags::IGNORED | ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::QUEUE_OVERFLOW;
            if event.events().intersects(gone) {
                self.watching = false;
                changed = true;
            }
            changed |= event.file_name().is_some_and(|name| name.to_bytes() == self.name.as_encoded_bytes());
        }
        changed
    }
}

fn go_on(outcome: Result<(), NetlinkError>, lost: &mut bool) -> Result<bool, NetlinkError> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::EAGAIN) => Ok(false),
        Err(error) if error.errno() == Some(libc::ENOBUFS) => {
            *lost = true;
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

fn is_link(message: &Received<'_>) -> bool {
    matches!(message.kind, link::RTM_NEWLINK | link::RTM_DELLINK)
}

/// All bridges of the host, by index, and their ports: one of them may be the pods'.
#[derive(Debug, Default)]
struct Bridges {
    names: BTreeMap<u32, IfName>,
    /// Links that are a port, or were one when they were heard of last.
    ports: BTreeSet<u32>,
}

impl Bridges {
    fn hear(&mut self, link: &LinkInfo, gone: bool) -> Option<Changed> {
        if link.kind == "bridge" {
            if gone {
                self.names.remove(&link.index);
            } else {
                self.names.insert(link.index, link.name);
            }
            return Some(Changed::Bridge);
        }
        if gone {
            return self.ports.remove(&link.index).then_some(Changed::PortGone(link.name));
        }
        if let Some(bridge) = self.names.get(&link.master) {
            self.ports.insert(link.index);
            return Some(Changed::Port(*bridge, link.name, link.port));
        }
        // One that is being deleted leaves its bridge as well, but is down by then.
        (link.up && self.ports.remove(&link.index)).then_some(Changed::Bridge)
    }
}

/// Which links concern us.
struct Watched<'a> {
    scope: &'a Scope,
    external: IfName,
}

fn decode(message: &Received<'_>, watched: &Watched<'_>, names: &mut BTreeMap<u32, IfName>, bridges: &mut Bridges) -> Option<Changed> {
    match message.kind {
        link::RTM_NEWLINK | link::RTM_DELLINK => {
            // A bridge port is announced once more in the bridge family: that says nothing about the link.
            if message.body.first() != Some(&0) {
                return None;
            }
            let info = link::decode(message.body)?;
            let gone = message.kind == link::RTM_DELLINK;
            let bridge = bridges.hear(&info, gone);
            if gone || !(watched.scope.links.contains(&info.name) || info.name == watched.external) {
                return names.remove(&info.index).map(Changed::Link).or(bridge);
            }
            names.insert(info.index, info.name);
            Some(Changed::Link(info.name))
        }
        addr::RTM_NEWADDR | addr::RTM_DELADDR => {
            let index = addr::decode(message.body)?.index;
            let bridge = bridges.names.contains_key(&index).then_some(Changed::Bridge);
            names.get(&index).copied().map(Changed::Link).or(bridge)
        }
        route::RTM_NEWROUTE | route::RTM_DELROUTE => {
            object::route::decode_change(message, watched.scope, |index| names.get(&index).copied())
        }
        neigh::RTM_NEWNEIGH | neigh::RTM_DELNEIGH => {
            let ours = |index| names.get(&index).copied().filter(|name| watched.scope.links.contains(name));
            object::neigh::decode_change(message, ours)
        }
        sysctl::RTM_NEWNETCONF => {
            object::sysctl::decode_change(message, |index| names.get(&index).or_else(|| bridges.names.get(&index)).copied())
        }
        _ => None,
    }
}

fn decode_rules(message: &Received<'_>) -> Option<Changed> {
    let table = attrs(message.body.get(4..)?).find(|(kind, _)| *kind == nft::TABLE).and_then(|(_, name)| str_in(name))?;
    let iptables = object::iptables::decode_change(table, *message.body.first()?);
    iptables.or_else(|| object::pod_rules::decode_change(table, message)).or_else(|| object::ruleset::decode_change(table))
}

/// Who committed the transaction that this message ends (`NFT_MSG_NEWGEN`, `linux/netfilter/nf_tables.h`).
fn decode_generation(message: &Received<'_>) -> Option<Author> {
    const NFT_MSG_NEWGEN: u16 = (10 << 8) | 15;
    const NFTA_GEN_PROC_PID: u16 = 2;
    const NFTA_GEN_PROC_NAME: u16 = 3;
    let mut author = Author { pid: 0, program: String::new() };
    for (kind, value) in attrs(message.body.get(4..).filter(|_| message.kind == NFT_MSG_NEWGEN)?) {
        match kind {
            NFTA_GEN_PROC_PID => author.pid = u32::from_be(u32_at(value, 0)?),
            NFTA_GEN_PROC_NAME => author.program = str_in(value)?.to_owned(),
            _ => {}
        }
    }
    (author.pid != 0).then_some(author)
}
