//! The folder of notes of what plugins wrote for pods ([`flannel::pod::note`]), and the repair of rules by them.
//!
//! It is a folder that the daemon's pod sees as well, and ends with the boot, as rules do.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flannel::pod::note::{self, Note, Repair, Rules};
use flannel::pod::{Attachment, Table, masquerade};

use crate::file::{self, Existing, How};
use crate::lock::{self, PATIENCE};
use crate::netlink::{NetlinkError, Socket};
use crate::netns::Netns;
use crate::pod_table::{self, Handle, Removal};
use crate::{Kernel, conntrack, iptables, link, nft};

/// Where the notes are, a file for each group of rules.
pub const FOLDER: &str = "/run/flannel/pods";
/// Groups of rules that are written in one transaction: a request has to fit the socket's buffer.
const PART: usize = 64;
/// How the name of a [`RemovalRequest`] begins.
const REQUEST: &str = "remove-";
/// How long the daemon waits for a plugin: it has other work.
const PATIENCE_OF_DAEMON: Duration = Duration::from_millis(50);

/// The folder of notes, locked: a program that writes or deletes rules and notes holds it meanwhile. Where it cannot exist (a
/// read-only `/run`, no root) the work is done without notes.
#[derive(Debug)]
pub struct Notes(Option<Folder>);

/// The locked folder, and the inode of the network namespace: several may share the folder.
#[derive(Debug)]
struct Folder {
    _lock: File,
    namespace: u64,
}

impl Notes {
    /// Waits for the folder, and creates it if it does not exist.
    ///
    /// # Errors
    /// `TimedOut` when another process holds it for ten seconds: a note that is left behind would restore what is deleted now.
    pub fn hold() -> io::Result<Notes> {
        Notes::hold_unless(|| false).map(|held| held.unwrap_or(Notes(None)))
    }

    /// The same, or `None` as soon as what the folder is wanted for is done.
    ///
    /// # Errors
    /// As [`Notes::hold`].
    pub fn hold_unless(is_done: impl Fn() -> bool) -> io::Result<Option<Notes>> {
        let _ = DirBuilder::new().recursive(true).mode(0o755).create(Path::new(FOLDER).parent().expect("it has one"));
        // Only root can enter: otherwise any user could stop all work by holding it.
        let _ = DirBuilder::new().mode(0o700).create(FOLDER);
        match hold(PATIENCE, is_done) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut && is_private() => {
                Err(io::Error::new(error.kind(), format!("cannot lock {FOLDER}: {error}")))
            }
            Ok(None) => Ok(None),
            held => Ok(Some(Notes(held.ok().flatten()))),
        }
    }

    /// Notes rules that are in the kernel now. `end` is the index of the host's end of the container's link.
    ///
    /// # Errors
    /// When it cannot be written: then the daemon will not restore them.
    pub fn keep(&self, end: u32, ifname: &str, rules: Rules) -> io::Result<()> {
        let Some(Folder { namespace, .. }) = &self.0 else { return Ok(()) };
        let path = path(*namespace, &rules.file_name(ifname));
        let text = Note { end, rules }.render();
        let text = text.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a name in the note contains white space"))?;
        // It ends with the boot: there is nothing to sync.
        file::put(&path, text.as_bytes(), How { mode: 0o644, durable: false, existing: Existing::ReplaceAlone }, |_| Ok(()))
            .map_err(|error| io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display())))
    }

    /// Removes the notes of an attachment's ports, which are about to be deleted.
    pub fn forget_ports(&self, attachment: &Attachment) {
        note::ports_files(attachment).iter().for_each(|name| self.forget(name));
    }

    /// Removes the note of an attachment's masquerading, which is about to be deleted.
    pub fn forget_masquerade(&self, attachment: &Attachment) {
        self.forget(&note::masquerade_file(attachment));
    }

    /// Removes the notes of a network's masquerading but for these attachments.
    pub fn retain_masquerade(&self, network: &str, valid: &[Attachment]) {
        let Some(Folder { namespace, .. }) = &self.0 else { return };
        for (name, note) in read(*namespace).unwrap_or_default() {
            match note.rules {
                Rules::Masquerade(found) if found.attachment.network == network && !valid.contains(&found.attachment) => self.forget(&name),
                _ => {}
            }
        }
    }

    /// Removes the masquerading in nftables of an attachment and of all others whose processes wait for that
    /// ([`RemovalRequest`]): one transaction and one socket for all of them. `chains` names the chains that an attachment may
    /// have in table nat of iptables; one that may have any is left to its own process, which learns that from the result.
    ///
    /// # Errors
    /// What the kernel answers; then each process tries again.
    pub fn remove_masquerades(
        &self,
        own: &Attachment,
        chains: impl Fn(&Attachment) -> Vec<String>,
    ) -> Result<(Removal, bool), NetlinkError> {
        let mut ending = self.0.as_ref().map_or_else(Vec::new, |folder| requested(folder.namespace));
        if !ending.contains(own) {
            ending.push(own.clone());
        }
        let Some(mut socket) = nft::open()? else { return Ok((Removal::default(), true)) };
        let mut with_chains = Vec::new();
        for attachment in &ending {
            // Before the rules: a note without its rules means that another program deleted them.
            self.forget_masquerade(attachment);
            if iptables::may_have_chains(&mut socket, "nat", &chains(attachment)) {
                with_chains.push(attachment);
            }
        }
        let is_ending = |rule: &flannel::pod::Found| ending.iter().any(|attachment| masquerade::is_of(rule, attachment));
        pod_table::remove_with(&mut socket, &[Table::Masquerade], is_ending)?;
        for attachment in ending.iter().filter(|attachment| *attachment == own || !with_chains.contains(attachment)) {
            self.withdraw(attachment);
        }
        let own_has_chains = with_chains.contains(&own);
        // The others go on now. While this process waits for the kernel with the folder in hand, the next requests gather, and
        // none of their processes waits for the tables. A process that is alone does other work first.
        let removal = if ending.len() > 1 { Removal::default() } else { Removal::of(socket) };
        Ok((removal, own_has_chains))
    }

    /// Removes the request to remove an attachment's masquerading: it was done, or the attachment is added again.
    pub fn withdraw(&self, attachment: &Attachment) {
        self.forget(&request_file(attachment));
    }

    fn forget(&self, name: &str) {
        if let Some(Folder { namespace, .. }) = &self.0 {
            // As a rule there is none.
            let _ = std::fs::remove_file(path(*namespace, name));
        }
    }
}

/// A request to remove an attachment's masquerading, made before the folder is waited for. The process that gets the folder
/// next does it for all that wait: closing a netfilter socket waits for an RCU grace period (10 ms) while the namespace has
/// anything to free, and keeps the others from the tables meanwhile, so that processes which each do their own work take turns.
#[derive(Debug)]
pub struct RemovalRequest(Option<PathBuf>);

impl RemovalRequest {
    /// Makes the request. Where there is no folder, the process does the work itself.
    pub fn new(attachment: &Attachment) -> RemovalRequest {
        let Some(namespace) = namespace().filter(|_| is_private()) else { return RemovalRequest(None) };
        let Attachment { network, container, ifname } = attachment;
        let path = path(namespace, &request_file(attachment));
        // A symbolic link appears with its content in one step. None of the names has a slash.
        match symlink(format!("{network}/{container}/{ifname}"), &path) {
            // Another DEL of the attachment asks for the same.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => RemovalRequest(None),
            _ => RemovalRequest(Some(path)),
        }
    }

    /// Has another process done it?
    pub fn is_done(&self) -> bool {
        self.0.as_ref().is_some_and(|path| std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound))
    }
}

/// The name of the request to remove an attachment's masquerading.
fn request_file(attachment: &Attachment) -> String {
    format!("{REQUEST}{}", note::masquerade_file(attachment))
}

/// The attachments whose masquerading is to be removed. A request that a killed process left is one of them: its DEL began.
fn requested(namespace: u64) -> Vec<Attachment> {
    let prefix = format!("{namespace}-{REQUEST}");
    let names = std::fs::read_dir(FOLDER).into_iter().flatten().flatten();
    let requests = names.filter(|file| file.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)));
    let read = |file: std::fs::DirEntry| {
        let target = std::fs::read_link(file.path()).ok()?;
        let names: Vec<&str> = target.to_str()?.split('/').collect();
        let [network, container, ifname] = names.as_slice() else { return None };
        Some(Attachment { network: (*network).to_owned(), container: (*container).to_owned(), ifname: (*ifname).to_owned() })
    };
    requests.filter_map(read).collect()
}

/// Reads all notes of the calling thread's network namespace, with their files.
///
/// # Errors
/// When the folder cannot be read.
pub fn notes() -> io::Result<Vec<(PathBuf, Rules)>> {
    let Some(namespace) = namespace() else { return Ok(Vec::new()) };
    Ok(read(namespace)?.into_iter().map(|(name, note)| (path(namespace, &name), note.rules)).collect())
}

/// Removes all notes of the calling thread's network namespace, which is about to end: a test's.
pub fn clear() {
    let Some(namespace) = namespace() else { return };
    for (name, _) in read(namespace).unwrap_or_default() {
        let _ = std::fs::remove_file(path(namespace, &name));
    }
    forget_requests();
}

/// Removes the requests that killed processes left in the calling thread's network namespace.
pub fn forget_requests() {
    let Some(namespace) = namespace() else { return };
    for attachment in requested(namespace) {
        let _ = std::fs::remove_file(path(namespace, &request_file(&attachment)));
    }
}

/// Locks the folder, unless something is done before.
fn hold(patience: Duration, is_done: impl Fn() -> bool) -> io::Result<Option<Folder>> {
    let unusable = || io::Error::from(io::ErrorKind::Unsupported);
    let namespace = namespace().ok_or_else(unusable)?;
    if !is_private() {
        return Err(unusable());
    }
    // Other users could lock what they can open.
    lock::private_folder(Path::new(FOLDER))?;
    let folder = File::open(FOLDER)?;
    let is_held = lock::acquire_unless(&folder, patience, is_done)?;
    Ok(is_held.then_some(Folder { _lock: folder, namespace }))
}

/// Does the folder exist, and is it this user's?
fn is_ours() -> bool {
    let own = rustix::process::geteuid().as_raw();
    std::fs::symlink_metadata(FOLDER).is_ok_and(|meta| meta.is_dir() && meta.uid() == own)
}

/// Is this user the only one who can write there? Files of another user are not notes.
fn is_private() -> bool {
    is_ours() && std::fs::symlink_metadata(FOLDER).is_ok_and(|meta| meta.mode() & 0o022 == 0)
}

/// The inode of the calling thread's network namespace.
fn namespace() -> Option<u64> {
    Netns::current().and_then(|netns| netns.id()).ok().map(|(_, inode)| inode)
}

fn path(namespace: u64, name: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{namespace}-{name}"))
}

/// All notes of a namespace with their names, in the order of the names. Files that are not notes (another program's, half
/// of one) are passed over.
fn read(namespace: u64) -> io::Result<Vec<(String, Note)>> {
    let prefix = format!("{namespace}-");
    // It does not exist, or it is another user's: a lab without root.
    if !is_ours() {
        return Ok(Vec::new());
    }
    if !is_private() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "other users can write there"));
    }
    let mut notes = Vec::new();
    for file in std::fs::read_dir(FOLDER)? {
        let file = file?;
        let Some(name) = file.file_name().to_str().and_then(|name| name.strip_prefix(&prefix)).map(ToOwned::to_owned) else { continue };
        match std::fs::read_to_string(file.path()) {
            Ok(text) => notes.extend(Note::parse(&text).map(|note| (name, note))),
            // A plugin has just removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    notes.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(notes)
}

/// A table that has to be repaired.
struct Damage {
    table: Table,
    /// Its rules, which the repairs refer to.
    rules: Vec<Handle>,
    repairs: Vec<Repair>,
}

/// The tables that have to be repaired.
fn damages(kernel: &mut Kernel, notes: &[(String, Note)]) -> Result<Vec<Damage>, NetlinkError> {
    let alive = link::list(&mut kernel.route)?.iter().map(|link| link.index).collect();
    let mut tables: Vec<Table> = notes.iter().map(|(_, note)| note.rules.table()).collect();
    tables.sort();
    tables.dedup();
    let mut found = Vec::new();
    for table in tables {
        let rules = pod_table::read(kernel.netfilter()?, table)?;
        let repairs = note::review(table, &table.layout(), notes, &alive, &pod_table::founds(&rules));
        if !repairs.is_empty() {
            found.push(Damage { table, rules, repairs });
        }
    }
    Ok(found)
}

/// Does some repairs of a table in one step.
fn write(socket: &mut Socket, namespace: u64, table: Table, rules: &[Handle], repairs: &[Repair]) -> Result<(), NetlinkError> {
    if !repairs.iter().all(Repair::is_empty) {
        pod_table::add_with(socket, table, |batch| {
            for repair in repairs {
                repair.delete.iter().for_each(|place| pod_table::encode_delete(batch, table, &rules[*place]));
                repair.add.iter().for_each(|rule| pod_table::encode_rule(batch, table, rule));
            }
        })?;
    }
    let dead = repairs.iter().flat_map(|repair| &repair.dead);
    dead.for_each(|name| drop(std::fs::remove_file(path(namespace, name))));
    Ok(())
}

impl Kernel {
    /// How many groups of rules are not as their plugins left them.
    pub(crate) fn observe_pod_rules(&mut self) -> Result<usize, NetlinkError> {
        let Some(namespace) = namespace() else { return Ok(0) };
        let notes = read(namespace).map_err(unreadable)?;
        if notes.is_empty() {
            return Ok(0);
        }
        let found = damages(self, &notes)?;
        // A plugin removes its note before it deletes: what is still noted was deleted by another program.
        let is_noted = |repair: &&Repair| repair.living.iter().chain(&repair.dead).all(|name| path(namespace, name).exists());
        Ok(found.iter().flat_map(|damage| &damage.repairs).filter(is_noted).count())
    }

    /// Writes missing rules, and deletes those of pods that are gone.
    pub(crate) fn restore_pod_rules(&mut self) -> Result<(), NetlinkError> {
        let Ok(Some(Folder { _lock, namespace })) = hold(PATIENCE_OF_DAEMON, || false) else {
            let busy = || NetlinkError::Refused { errno: libc::EBUSY, message: format!("a plugin holds {FOLDER}") };
            return if is_ours() { Err(busy()) } else { Ok(()) };
        };
        let notes = read(namespace).map_err(unreadable)?;
        let mut failed = Ok(());
        for Damage { table, rules, repairs } in damages(self, &notes)? {
            let socket = self.netfilter()?;
            for part in repairs.chunks(PART) {
                if write(socket, namespace, table, &rules, part).is_err() {
                    // One that the kernel refuses must not keep the others back.
                    for repair in part {
                        failed = failed.and(write(socket, namespace, table, &rules, std::slice::from_ref(repair)));
                    }
                }
            }
            if let Table::Ports(family) = table {
                let udp: Vec<u16> = repairs.iter().flat_map(|repair| repair.udp.iter().copied()).collect();
                failed = failed.and(conntrack::forget_udp(family, &udp));
            }
        }
        failed
    }
}

fn unreadable(error: io::Error) -> NetlinkError {
    NetlinkError::Refused { errno: error.raw_os_error().unwrap_or(libc::EIO), message: format!("cannot read {FOLDER}: {error}") }
}
