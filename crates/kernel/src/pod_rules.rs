//! What the plugins wrote to nf_tables for a pod (portmap, `ipMasq` of the bridge plugin), noted on file, so that it is written
//! again when somebody flushes the tables, as each restart of nftables.service does: no runtime calls a plugin for that, and the
//! pod would be without its ports until it is made anew.
//!
//! A plugin notes what it has written, and takes the note away before it deletes; so a note without its rules says that somebody
//! else deleted them. The folder is one that the daemon's pod sees as well, and ends with the boot, as rules do. The host's end of the
//! pod's link tells whether the pod is alive.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flannel::{Cidr, Family};
use rustix::fs::FlockOperation;

use crate::hostport::{self, Mapping, Snat};
use crate::masquerade::digest;
use crate::netlink::{Batch, NetlinkError, Socket};
use crate::netns::Netns;
use crate::nft::{self, Handle};
use crate::{Kernel, conntrack, link, masquerade};

/// Where the notes are, a file for each call of [`hostport::add`] and [`masquerade::add`].
const FOLDER: &str = "/run/flannel/pods";
/// Groups of rules that are written in one transaction: a request has to fit the socket's buffer.
const PART: usize = 64;
/// How long a plugin waits for another, or for the daemon.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the daemon does, which has other work.
const PATIENCE_OF_DAEMON: Duration = Duration::from_millis(50);

/// Rules of one attachment, as they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rules {
    /// What [`hostport::add`] was called with.
    Ports {
        /// The container.
        id: String,
        /// Its address.
        container: Cidr,
        /// The ports.
        mappings: Vec<Mapping>,
        /// Whose source address changes.
        snat: Snat,
    },
    /// What [`masquerade::add`] was called with.
    Masquerade {
        /// The network's name.
        network: String,
        /// Interface and container, with a colon between.
        attachment: String,
        /// The container's addresses.
        addresses: Vec<Cidr>,
    },
}

/// A note: the rules, and the index of the host's end of the container's link.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Note {
    end: u32,
    rules: Rules,
}

/// The folder of notes, held: whoever writes or deletes rules and notes holds it meanwhile. Where there can be none (a read-only
/// `/run`, no root) all is done without notes.
#[derive(Debug)]
pub struct Notes(Option<(File, u64)>);

impl Notes {
    /// Waits for the folder, and makes it if it is not there.
    ///
    /// # Errors
    /// `TimedOut` when somebody holds it for ten seconds: a note that is left behind would put back what is deleted now.
    pub fn hold() -> io::Result<Notes> {
        let _ = DirBuilder::new().recursive(true).mode(0o755).create(Path::new(FOLDER).parent().expect("it has one"));
        // Only root can enter: else anybody could stop all work by holding it.
        let _ = DirBuilder::new().mode(0o700).create(FOLDER);
        match hold(PATIENCE) {
            None if is_private() => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{FOLDER} is held by another process"))),
            held => Ok(Notes(held)),
        }
    }

    /// Notes rules that are in the kernel now. `end` is the index of the host's end of the container's link.
    ///
    /// # Errors
    /// When it cannot be written: then nobody will put them back.
    pub fn keep(&self, end: u32, ifname: &str, rules: Rules) -> io::Result<()> {
        let Some((_, namespace)) = &self.0 else { return Ok(()) };
        let path = path(*namespace, &rules.name(ifname));
        crate::file::write(&path, &Note { end, rules }.render()?)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display())))
    }

    /// Forgets the ports of an attachment, which are about to be deleted.
    pub fn forget_ports(&self, id: &str, ifname: &str) {
        Family::ALL.iter().for_each(|family| self.forget(&ports_name(id, ifname, *family)));
    }

    /// Forgets the masquerading of an attachment, which is about to be deleted.
    pub fn forget_masquerade(&self, network: &str, attachment: &str) {
        self.forget(&masquerade_name(network, attachment));
    }

    /// Forgets the masquerading of a network but for these attachments.
    pub fn retain_masquerade(&self, network: &str, attachments: &[String]) {
        let Some((_, namespace)) = &self.0 else { return };
        for (path, note) in read(*namespace).unwrap_or_default() {
            match note.rules {
                Rules::Masquerade { network: of, attachment, .. } if of == network && !attachments.contains(&attachment) => {
                    let _ = std::fs::remove_file(path);
                }
                _ => {}
            }
        }
    }

    fn forget(&self, name: &str) {
        if let Some((_, namespace)) = &self.0 {
            // As a rule there is none.
            let _ = std::fs::remove_file(path(*namespace, name));
        }
    }
}

/// Forgets all of the calling thread's network namespace, which is about to end: a test's.
pub fn clear() {
    for (path, _) in namespace().and_then(|namespace| read(namespace).ok()).unwrap_or_default() {
        let _ = std::fs::remove_file(path);
    }
}

fn hold(patience: Duration) -> Option<(File, u64)> {
    let namespace = namespace()?;
    let folder = File::open(FOLDER).ok().filter(|_| is_private())?;
    let end = Instant::now() + patience;
    while rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Some((folder, namespace))
}

/// Is the folder there, and this user's?
fn is_ours() -> bool {
    let own = rustix::process::geteuid().as_raw();
    std::fs::symlink_metadata(FOLDER).is_ok_and(|meta| meta.is_dir() && meta.uid() == own)
}

/// And can nobody else write there? What somebody else has written is no note.
fn is_private() -> bool {
    is_ours() && std::fs::symlink_metadata(FOLDER).is_ok_and(|meta| meta.mode() & 0o022 == 0)
}

/// The inode of the calling thread's network namespace. Several may share the folder.
fn namespace() -> Option<u64> {
    Netns::current().and_then(|netns| netns.id()).ok().map(|(_, inode)| inode)
}

fn path(namespace: u64, name: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{namespace}-{name}"))
}

fn ports_name(id: &str, ifname: &str, family: Family) -> String {
    // Names of containers are too long for the name of a file.
    format!("ports-{}", digest(&format!("{id} {ifname} {family}")))
}

fn masquerade_name(network: &str, attachment: &str) -> String {
    format!("masquerade-{}", masquerade::name(network, attachment))
}

impl Rules {
    fn name(&self, ifname: &str) -> String {
        match self {
            Rules::Ports { id, container, .. } => ports_name(id, ifname, Family::of(container.addr)),
            Rules::Masquerade { network, attachment, .. } => masquerade_name(network, attachment),
        }
    }

    /// In which table they are, how their comments begin, up to a comma, and how many they are.
    fn place(&self) -> (Table, String, usize) {
        match self {
            Rules::Ports { id, container, mappings, snat } => {
                let size = hostport::size(*container, mappings, *snat);
                (Table::Ports(Family::of(container.addr)), hostport::comment(id).to_owned(), size)
            }
            Rules::Masquerade { network, attachment, addresses } => {
                (Table::Masquerade, masquerade::name(network, attachment), addresses.len())
            }
        }
    }

    fn encode(&self, batch: &mut Batch) {
        match self {
            Rules::Ports { id, container, mappings, snat } => hostport::encode(batch, id, *container, mappings, *snat),
            Rules::Masquerade { network, attachment, addresses } => masquerade::encode(batch, network, attachment, addresses),
        }
    }

    /// Ports whose UDP "connections" may have been made while the rules were away.
    fn udp(&self) -> impl Iterator<Item = u16> {
        let mappings = match self {
            Rules::Ports { mappings, .. } => mappings.as_slice(),
            Rules::Masquerade { .. } => &[],
        };
        mappings.iter().filter(|mapping| mapping.protocol == 17).map(|mapping| mapping.host_port)
    }
}

/// One of the tables that plugins share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Table {
    Ports(Family),
    Masquerade,
}

impl Table {
    fn place(self) -> nft::Shared {
        match self {
            Table::Ports(family) => hostport::place(family),
            Table::Masquerade => masquerade::place(),
        }
    }
}

/// All notes of a namespace. What is no note (somebody else's file, half of one) is passed over.
fn read(namespace: u64) -> io::Result<Vec<(PathBuf, Note)>> {
    let prefix = format!("{namespace}-");
    // None is there, or it is another user's, whose notes are none of ours: a lab without root.
    if !is_ours() {
        return Ok(Vec::new());
    }
    if !is_private() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others can write there"));
    }
    let files = std::fs::read_dir(FOLDER)?;
    let mut notes = Vec::new();
    for file in files {
        let file = file?;
        if !file.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            continue;
        }
        match std::fs::read_to_string(file.path()) {
            Ok(text) => notes.extend(Note::parse(&text).map(|note| (file.path(), note))),
            // A plugin has just taken it away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    // The order of a folder is left to chance.
    notes.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(notes)
}

/// What one name has in a table, and what it should have.
#[derive(Debug, Default)]
struct Group<'a> {
    /// Notes of pods that are there.
    living: Vec<&'a (PathBuf, Note)>,
    /// Of those that are not.
    dead: Vec<&'a Path>,
    /// The rules that are there.
    rules: Vec<Handle>,
}

impl Group<'_> {
    fn is_right(&self) -> bool {
        let wanted: usize = self.living.iter().map(|(_, note)| note.rules.place().2).sum();
        self.dead.is_empty() && self.rules.len() >= wanted
    }
}

/// Of each table, the groups that are not as they should be: rules are missing, or their pod is.
fn wrong<'a>(
    socket: &mut Socket,
    alive: &BTreeSet<u32>,
    notes: &'a [(PathBuf, Note)],
) -> Result<Vec<(Table, Vec<Group<'a>>)>, NetlinkError> {
    let mut tables: BTreeMap<Table, BTreeMap<String, Group<'a>>> = BTreeMap::new();
    for entry in notes {
        let (table, name, _) = entry.1.rules.place();
        let group = tables.entry(table).or_default().entry(name).or_default();
        if alive.contains(&entry.1.end) { group.living.push(entry) } else { group.dead.push(&entry.0) }
    }
    let mut found = Vec::new();
    for (table, mut groups) in tables {
        let place = table.place();
        let rules = place.handles(socket)?;
        // Rules to which nothing leads are none.
        let is_whole = place.is_whole(&rules);
        for rule in rules.into_iter().filter(|rule| place.own.contains(&rule.chain.as_str())) {
            let name = rule.comment.split(',').next().unwrap_or_default();
            if let Some(group) = groups.get_mut(name) {
                group.rules.push(rule);
            }
        }
        let groups: Vec<Group<'_>> = groups.into_values().filter(|group| !is_whole || !group.is_right()).collect();
        if !groups.is_empty() {
            found.push((table, groups));
        }
    }
    Ok(found)
}

/// Writes some groups as they should be, in one step.
fn write(socket: &mut Socket, table: Table, groups: &[Group<'_>]) -> Result<(), NetlinkError> {
    let place = table.place();
    let is_empty = groups.iter().all(|group| group.living.is_empty() && group.rules.is_empty());
    if !is_empty {
        nft::add_rules(socket, &place, |batch| {
            for group in groups {
                group.rules.iter().for_each(|rule| nft::encode_delete(batch, place.proto, place.table, rule));
                group.living.iter().for_each(|(_, note)| note.rules.encode(batch));
            }
        })?;
    }
    let dead = groups.iter().flat_map(|group| &group.dead);
    dead.for_each(|path| drop(std::fs::remove_file(path)));
    Ok(())
}

impl Kernel {
    /// How many pods' rules are not as their plugins left them.
    pub(crate) fn observe_pod_rules(&mut self) -> Result<usize, NetlinkError> {
        let Some(namespace) = namespace() else { return Ok(0) };
        let notes = read(namespace).map_err(unreadable)?;
        if notes.is_empty() {
            return Ok(0);
        }
        let alive = link::list(&mut self.route)?.iter().map(|link| link.index).collect();
        let wrong = wrong(self.netfilter()?, &alive, &notes)?;
        // A plugin takes its note away before it deletes: what is still noted was not deleted by one.
        let is_noted =
            |group: &&Group<'_>| group.living.iter().map(|entry| entry.0.as_path()).chain(group.dead.iter().copied()).all(Path::exists);
        Ok(wrong.iter().flat_map(|(_, groups)| groups).filter(is_noted).count())
    }

    /// Writes again what is missing, and deletes what is left of pods that are gone.
    pub(crate) fn restore_pod_rules(&mut self) -> Result<(), NetlinkError> {
        let Some((_held, namespace)) = hold(PATIENCE_OF_DAEMON) else {
            let busy = || NetlinkError::Refused { errno: libc::EBUSY, message: format!("a plugin holds {FOLDER}") };
            return if is_ours() { Err(busy()) } else { Ok(()) };
        };
        let notes = read(namespace).map_err(unreadable)?;
        let alive = link::list(&mut self.route)?.iter().map(|link| link.index).collect();
        let socket = self.netfilter()?;
        let mut failed = Ok(());
        for (table, groups) in wrong(socket, &alive, &notes)? {
            for part in groups.chunks(PART) {
                if write(socket, table, part).is_err() {
                    // One that the kernel refuses does not keep the others.
                    for group in part {
                        failed = failed.and(write(socket, table, std::slice::from_ref(group)));
                    }
                }
            }
            if let Table::Ports(family) = table {
                let udp: Vec<u16> = groups.iter().flat_map(|group| &group.living).flat_map(|(_, note)| note.rules.udp()).collect();
                failed = failed.and(conntrack::forget_udp(family, &udp));
            }
        }
        failed
    }
}

fn unreadable(error: io::Error) -> NetlinkError {
    NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EIO), message: format!("cannot read {FOLDER}: {error}") }
}

impl Note {
    /// A line for each thing that is said.
    fn render(&self) -> io::Result<String> {
        let mut text = format!("end {}\n", self.end);
        let written = match &self.rules {
            Rules::Ports { id, container, mappings, snat } => {
                let snat = match snat {
                    Snat::No => "no",
                    Snat::Local => "local",
                    Snat::All => "all",
                };
                let head = writeln!(text, "ports {snat} {container} {id}");
                mappings.iter().fold(head, |done, mapping| {
                    let Mapping { protocol, host_port, container_port, host_ip } = mapping;
                    let host_ip = host_ip.map_or("-".to_owned(), |ip| ip.to_string());
                    done.and_then(|()| writeln!(text, "map {protocol} {host_port} {container_port} {host_ip}"))
                })
            }
            Rules::Masquerade { network, attachment, addresses } => {
                let head = writeln!(text, "masquerade {attachment} {network}");
                addresses.iter().fold(head, |done, address| done.and_then(|()| writeln!(text, "address {address}")))
            }
        };
        written.map_err(io::Error::other)?;
        // A name with a line's end in it would be read as another note.
        match Note::parse(&text) {
            Some(note) if note == *self => Ok(text),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "a name in it has no plain form")),
        }
    }

    fn parse(text: &str) -> Option<Note> {
        let mut lines = text.lines();
        let end = lines.next()?.strip_prefix("end ")?.parse().ok()?;
        let (kind, rest) = lines.next()?.split_once(' ')?;
        let mut words = rest.splitn(if kind == "ports" { 3 } else { 2 }, ' ');
        let rules = match kind {
            "ports" => {
                let snat = match words.next()? {
                    "no" => Snat::No,
                    "local" => Snat::Local,
                    "all" => Snat::All,
                    _ => return None,
                };
                let (container, id) = (words.next()?.parse().ok()?, words.next()?.to_owned());
                Rules::Ports { id, container, mappings: lines.map(parse_mapping).collect::<Option<_>>()?, snat }
            }
            "masquerade" => {
                let (attachment, network) = (words.next()?.to_owned(), words.next()?.to_owned());
                let address = |line: &str| line.strip_prefix("address ")?.parse().ok();
                Rules::Masquerade { network, attachment, addresses: lines.map(address).collect::<Option<_>>()? }
            }
            _ => return None,
        };
        Some(Note { end, rules })
    }
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.strip_prefix("map ")?.split(' ');
    let (protocol, host_port, container_port) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let host_ip = match words.next()? {
        "-" => None,
        text => Some(text.parse::<IpAddr>().ok()?),
    };
    words.next().is_none().then_some(Mapping { protocol, host_port, container_port, host_ip })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rules: Rules, want: Option<&str>) {
        let note = Note { end: 7, rules };
        let text = note.render().ok();
        assert_eq!(text.as_deref(), want);
        assert!(text.is_none_or(|text| Note::parse(&text) == Some(note)));
    }

    fn ports(id: &str) -> Rules {
        let mapping = |protocol, host_ip: Option<&str>| Mapping {
            protocol,
            host_port: 8080,
            container_port: 80,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        let mappings = vec![mapping(6, None), mapping(17, Some("127.0.0.2"))];
        Rules::Ports { id: id.to_owned(), container: "10.1.2.3/24".parse().unwrap(), mappings, snat: Snat::Local }
    }

    #[test]
    fn a_note_says_what_was_asked_for() {
        check(ports("abc"), Some("end 7\nports local 10.1.2.3/24 abc\nmap 6 8080 80 -\nmap 17 8080 80 127.0.0.2\n"));
        let addresses = vec!["10.1.2.3/24".parse().unwrap(), "fd00::3/64".parse().unwrap()];
        let masquerade = Rules::Masquerade { network: "cbr0".to_owned(), attachment: "eth0:abc".to_owned(), addresses };
        check(masquerade, Some("end 7\nmasquerade eth0:abc cbr0\naddress 10.1.2.3/24\naddress fd00::3/64\n"));
    }

    #[test]
    fn what_would_be_read_as_something_else_is_not_written_and_not_read() {
        check(ports("abc\nmap 6 22 22 -"), None);
        check(ports(""), Some("end 7\nports local 10.1.2.3/24 \nmap 6 8080 80 -\nmap 17 8080 80 127.0.0.2\n"));
        for text in [
            "",
            "end 7\n",
            "end x\nports no 10.1.2.3/24 a\n",
            "end 7\nports no 10.1.2.3/24 a\nmap 6 70000 80 -\n",
            "end 7\nports no 10.1.2.3/24 a\nmap 6 1 2 - x\n",
        ] {
            assert_eq!(Note::parse(text), None, "{text:?}");
        }
    }
}
