//! Receives the kernel's notifications about changes in scope. Lost notifications (an overrun) become [`Changed::Everything`]; changes
//! of the daemon itself are filtered out where the kernel names the cause.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use flannel::object::bridge::Port;
use flannel::object::{Key, Object, ROUTE_PROTOCOL};
use flannel::pod::Table;
use flannel::scope::Scope;
use flannel::traffic::table_name;
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
const RTNLGRP_IPV4_RULE: u32 = 8;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const RTNLGRP_IPV6_RULE: u32 = 19;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTNLGRP_IPV4_NETCONF: u32 = 24;
const RTNLGRP_IPV6_NETCONF: u32 = 25;
/// The multicast groups to join.
const GROUPS: [u32; 10] = [
    RTNLGRP_LINK,
    RTNLGRP_NEIGH,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV6_RULE,
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
];
const NFNLGRP_NFTABLES: u32 = 7;

/// A change in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// This object was created, or changed to this form.
    Set(Object),
    /// The object with this key is gone.
    Gone(Key),
    /// A watched link, or an address of it, changed. The kernel removes routes with it without a notification, so more than the link
    /// must be read.
    Link(IfName),
    /// A bridge or its addresses changed, or it lost a port: it may be the pods' bridge.
    Bridge,
    /// A link (the second name) became a port of this bridge (the first name), or the settings of the port changed.
    Port(IfName, IfName, Port),
    /// A link that was a bridge port was deleted.
    PortGone(IfName),
    /// The daemon's nftables table of this family changed.
    Rules(Family),
    /// An iptables table of this family changed, of those in nf_tables.
    Iptables(Family),
    /// Rules that the CNI plugins wrote for pods were deleted, perhaps by a plugin.
    PodRules,
    /// The file for the CNI plugins changed.
    File,
    /// Another program changed a route, a policy rule or a packet filter that may concern pods' packets: the checks look at it.
    Foreign,
    /// Notifications were lost: anything may have changed.
    Everything,
}

/// A change and, if the kernel names it, the program that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelEvent {
    /// The change.
    pub change: Changed,
    /// The program that made it.
    pub by: Option<Author>,
}

/// The program that made a change. Netlink names the port of its socket, which for the first socket of a process is the process ID;
/// nf_tables names the process ID and the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    /// The process ID.
    pub pid: u32,
    /// Its program; empty if the process ended before the name could be read.
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

/// The largest process ID on Linux (`PID_MAX_LIMIT`, `linux/threads.h`); ports above it do not identify a process.
const PID_MAX: u32 = 4 << 20;

impl Author {
    /// The owner of the socket with this port. In a container's own PID namespace the number would mean another process, or none.
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
    /// The watched links that exist, by index.
    names: BTreeMap<u32, IfName>,
    bridges: Bridges,
    /// The port of the daemon's own changes.
    own_port: u32,
}

impl Monitor {
    /// Subscribes, in the calling thread's network namespace, to changes of objects in `scope` and of the external interface. Changes
    /// that carry `own_port` are filtered out.
    ///
    /// # Errors
    /// When the kernel refuses the sockets.
    pub fn open(scope: Scope, external: IfName, own_port: u32) -> Result<Monitor, NetlinkError> {
        let route = Socket::open(Protocol::Route)?;
        if own_port != 0 {
            // Ten thousand routes of the daemon must not fill the queue. If the filter cannot be set, `drain` skips them.
            let _ = route.filter_echoes(&[route::RTM_NEWROUTE, route::RTM_DELROUTE, neigh::RTM_NEWNEIGH, neigh::RTM_DELNEIGH], own_port);
        }
        GROUPS.iter().try_for_each(|group| route.join(*group))?;
        // A kernel without nf_tables sends no notifications about it.
        let netfilter = Socket::open(Protocol::Netfilter).ok().filter(|socket| socket.join(NFNLGRP_NFTABLES).is_ok());
        let file = scope.file.clone().and_then(WatchedFile::new);
        let (names, bridges) = (BTreeMap::new(), Bridges::default());
        let mut monitor = Monitor { route, netfilter, file, scope, external, names, bridges, own_port };
        monitor.learn_names()?;
        Ok(monitor)
    }

    /// Reads the indexes of the watched links, on a separate socket so that answers do not mix with notifications.
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

    /// Waits for notifications to [`Monitor::drain`].
    ///
    /// # Errors
    /// When waiting fails.
    pub fn wait(&self) -> Result<(), NetlinkError> {
        let file = self.file.as_ref();
        let fds = [Some(self.route.as_fd()), self.netfilter.as_ref().map(AsFd::as_fd), file.map(|file| file.fd.as_fd())];
        let mut polled: Vec<PollFd<'_>> = fds.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // A deleted folder cannot be watched: poll until it exists again.
        let timeout = file.is_some_and(|file| !file.watching).then_some(Timespec { tv_sec: 0, tv_nsec: 100_000_000 });
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(NetlinkError::Socket("wait", error.into())),
        }
    }

    /// Reads all pending notifications, without waiting.
    ///
    /// # Errors
    /// When a socket fails for another reason than lost notifications.
    pub fn drain(&mut self) -> Result<Vec<KernelEvent>, NetlinkError> {
        let mut events: Vec<KernelEvent> = Vec::new();
        // Successive changes usually have one author.
        let mut author: (u32, Option<Author>) = (0, None);
        let mut lost = false;
        let mut foreign = false;
        // One bridge event, after all others, is enough.
        let mut bridge: Option<KernelEvent> = None;
        loop {
            let Monitor { route, names, bridges, scope, external, own_port, .. } = self;
            let watched = Watched { scope, external: *external };
            let more = route.notifications(false, |message| {
                if lost {
                    // Everything will be read again: only empty the queue.
                } else if message.port != *own_port || message.port == 0 {
                    foreign |= is_foreign(&message, scope);
                    if let Some(change) = decode(&message, &watched, names, bridges) {
                        if author.0 != message.port {
                            author = (message.port, Author::of(message.port));
                        }
                        let is_bridge = change == Changed::Bridge;
                        let event = KernelEvent { change, by: author.1.clone() };
                        if is_bridge {
                            bridge = Some(event);
                        } else {
                            events.push(event);
                        }
                    }
                } else if is_link(&message) {
                    // A change by the daemon also shows the index of a link.
                    decode(&message, &watched, names, bridges);
                }
            });
            if !go_on(more, &mut lost)? {
                break;
            }
        }
        events.extend(bridge);
        // After an overrun, the socket receives nothing more until its queue was found empty, as it is now.
        if lost {
            events = vec![KernelEvent { change: Changed::Everything, by: None }];
            // The lost notifications may concern links.
            self.learn_names()?;
        }
        lost = false;
        let mut rules: Vec<KernelEvent> = Vec::new();
        while let Some(socket) = &mut self.netfilter {
            // A transaction has a message for each of its rules, of which one is enough; its last message names the author.
            // A transaction has a message for each of its rules, of which one is enough; its last message names the author.
            let more = socket.notifications(false, |message| {
                foreign |= is_foreign_filter(&message);
                let is_known = |known: &KernelEvent, change: &Changed| {
                    // For pods' rules the author matters: report each transaction.
                    known.change == *change && (known.by.is_none() || *change != Changed::PodRules)
                };
                match decode_rules(&message) {
                    Some(change) if rules.iter().any(|known| is_known(known, &change)) => {}
                    Some(change) => rules.push(KernelEvent { change, by: None }),
                    None => {
                        let author = decode_generation(&message);
                        rules.iter_mut().filter(|known| known.by.is_none()).for_each(|known| known.by.clone_from(&author));
                    }
                }
            });
            if !go_on(more, &mut lost)? {
                break;
            }
        }
        events.extend(rules);
        events.extend(foreign.then_some(KernelEvent { change: Changed::Foreign, by: None }));
        events.extend(lost.then_some(KernelEvent { change: Changed::Everything, by: None }));
        if self.file.as_mut().is_some_and(WatchedFile::has_changed) {
            events.push(KernelEvent { change: Changed::File, by: None });
        }
        Ok(events)
    }
}

/// Watches a file through its folder (inotify(7)), because the file is replaced rather than written to.
#[derive(Debug)]
struct WatchedFile {
    fd: OwnedFd,
    folder: PathBuf,
    name: OsString,
    /// Whether the folder exists and is watched.
    watching: bool,
}

impl WatchedFile {
    /// Starts watching. Returns `None` if the system grants no inotify instance: then only the audit detects changes.
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

/// All bridges of the host, by index, and their ports: one of them may be the pods' bridge.
#[derive(Debug, Default)]
struct Bridges {
    names: BTreeMap<u32, IfName>,
    /// Links that were a bridge port at their last notification.
    ports: BTreeSet<u32>,
}

impl Bridges {
    fn update(&mut self, link: &LinkInfo, gone: bool) -> Option<Changed> {
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
        // A link that is being deleted leaves its bridge as well, but is down at that time.
        (link.up && self.ports.remove(&link.index)).then_some(Changed::Bridge)
    }
}

/// The links whose changes are reported.
struct Watched<'a> {
    scope: &'a Scope,
    external: IfName,
}

fn decode(message: &Received<'_>, watched: &Watched<'_>, names: &mut BTreeMap<u32, IfName>, bridges: &mut Bridges) -> Option<Changed> {
    match message.kind {
        link::RTM_NEWLINK | link::RTM_DELLINK => {
            // A bridge port is announced once more in the bridge family, without data about the link.
            if message.body.first() != Some(&0) {
                return None;
            }
            let info = link::decode(message.body)?;
            let gone = message.kind == link::RTM_DELLINK;
            let bridge = bridges.update(&info, gone);
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

/// Whether a message is about a route or a rule of another program that packets between pods may meet. Default routes count: there may be
/// two.
fn is_foreign(message: &Received<'_>, scope: &Scope) -> bool {
    const LOCAL: u32 = 255;
    match message.kind {
        RTM_NEWRULE | RTM_DELRULE => true,
        route::RTM_NEWROUTE | route::RTM_DELROUTE => route::decode_any(message.body).is_some_and(|found| {
            let is_ours = found.protocol == ROUTE_PROTOCOL || found.table == LOCAL;
            !is_ours && scope.networks.iter().any(|network| network.overlaps(found.dst))
        }),
        _ => false,
    }
}

/// Whether a message is about a chain or a rule of another program that may see forwarded packets. Tables for address translation do
/// not drop, and kube-proxy changes them all the time.
fn is_foreign_filter(message: &Received<'_>) -> bool {
    let kinds = [nft::DELTABLE, nft::NEWCHAIN, nft::DELCHAIN, nft::NEWRULE, nft::DELRULE];
    let table = || attrs(message.body.get(4..)?).find(|(kind, _)| *kind == nft::TABLE).and_then(|(_, name)| str_in(name));
    let is_ours = |table: &str| Family::ALL.iter().any(|family| table_name(*family) == table) || Table::is_noted(table);
    kinds.iter().any(|kind| message.kind == nft::kind(*kind)) && table().is_some_and(|table| table != "nat" && !is_ours(table))
}

fn decode_rules(message: &Received<'_>) -> Option<Changed> {
    let table = attrs(message.body.get(4..)?).find(|(kind, _)| *kind == nft::TABLE).and_then(|(_, name)| str_in(name))?;
    let iptables = object::iptables::decode_change(table, *message.body.first()?);
    iptables.or_else(|| object::pod_rules::decode_change(table, message)).or_else(|| object::ruleset::decode_change(table))
}

/// The program that committed the transaction which this message ends (`NFT_MSG_NEWGEN`, `linux/netfilter/nf_tables.h`).
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
