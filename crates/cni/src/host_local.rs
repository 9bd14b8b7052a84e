//! `host-local`: allocates addresses of a range and records them in files of this host (specification, section 7.4). A
//! reservation appears with its content in one step, so each file names its owner even if this process is killed.

pub mod audit;
mod index;
mod ranges;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ::flannel::Cidr;
use ::flannel::pod::Attachment;
use kernel::file::{self, Existing, How};
use kernel::lock::{self, PATIENCE};
use rustix::fs::{Mode, OFlags};
use serde_json::{Map, Value};

use self::index::Index;
use self::ranges::{Range, candidates, describe, ranges};
use crate::flannel::remove_file;
use crate::lock::busy;
use crate::protocol::{CniError, Command, Request, array, object, string};
use crate::result::{CniResult, Ip, Route};

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => {
            let ipam = ipam(request)?;
            add(request, ipam, &directory(request, string(ipam, "dataDir")?)).map(Some)
        }
        Command::Del => {
            // DEL ignores other errors in the configuration; ADD rejects them.
            let ipam = object(request.conf, "ipam").ok().flatten();
            let configured = ipam.and_then(|ipam| string(ipam, "dataDir").ok().flatten());
            match Store::open_existing(&directory(request, configured))? {
                Some(store) => store.release(request.container_id, request.ifname).map(|()| None),
                None => Ok(None),
            }
        }
        Command::Check => {
            let directory = directory(request, string(ipam(request)?, "dataDir")?);
            let held = Store::open_existing(&directory)?.map(|store| store.entries()).transpose()?.unwrap_or_default();
            let owner = Owner::of(request);
            match held.iter().any(|entry| owner.holds(&entry.content)) {
                true => Ok(None),
                false => Err(CniError::failed(format!(
                    "no address is reserved for container {} interface {}",
                    request.container_id, request.ifname
                ))),
            }
        }
        Command::Gc => {
            let valid = request.valid_attachments()?;
            match Store::open_existing(&directory(request, string(ipam(request)?, "dataDir")?))? {
                Some(store) => store.collect(&valid).map(|()| None),
                None => Ok(None),
            }
        }
        Command::Status => ranges(request, ipam(request)?).map(|_| None),
        Command::Version => Ok(None),
    }
}

fn ipam<'a>(request: &Request<'a>) -> Result<&'a Map<String, Value>, CniError> {
    object(request.conf, "ipam")?.ok_or_else(|| CniError::config("ipam: missing"))
}

fn directory(request: &Request<'_>, configured: Option<&str>) -> PathBuf {
    Path::new(configured.unwrap_or("/var/lib/cni/networks")).join(request.name)
}

fn add(request: &Request<'_>, ipam: &Map<String, Value>, directory: &Path) -> Result<CniResult, CniError> {
    let sets = ranges(request, ipam)?;
    let mut requested = requested(request)?;
    let routes = array(ipam, "routes")?.map(Vec::as_slice).unwrap_or_default().iter().map(Route::parse).collect::<Result<_, _>>()?;
    let dns = string(ipam, "resolvConf")?.map(resolv_conf).transpose()?.unwrap_or_default();
    let owner = Owner::of(request);
    let store = Store::open(directory)?;
    store.forget_earlier_boots()?;

    let mut rollback = RollbackGuard { store: &store, addresses: Vec::new() };
    let mut ips = Vec::new();
    for (index, set) in sets.iter().enumerate() {
        let wanted = requested.iter().position(|ip| set.iter().any(|range| range.admits(*ip))).map(|at| requested.remove(at));
        let (address, range) = store.allocate(set, index, wanted, &owner)?;
        rollback.addresses.push(address);
        let gateway = Some(range.gateway).filter(|gateway| *gateway != address);
        ips.push(Ip { interface: None, address: Cidr { addr: address, len: range.subnet.prefix_len() }, gateway });
    }
    if !requested.is_empty() {
        let list: Vec<String> = requested.iter().map(ToString::to_string).collect();
        return Err(CniError::failed(format!("failed to allocate all requested IPs: {}", list.join(" "))));
    }
    rollback.addresses.clear();
    store.mark_index_current();
    Ok(CniResult { interfaces: Vec::new(), ips, routes, dns })
}

/// Releases the addresses that an ADD reserved, unless the ADD succeeds.
struct RollbackGuard<'a> {
    store: &'a Store,
    addresses: Vec<IpAddr>,
}

impl Drop for RollbackGuard<'_> {
    fn drop(&mut self) {
        for address in &self.addresses {
            // If a file cannot be removed now, the container's DEL removes it.
            let _ = fs::remove_file(self.store.directory.join(address.to_string()));
        }
    }
}

/// The addresses that the runtime requests in `CNI_ARGS`, `args.cni` and `runtimeConfig`, without duplicates.
fn requested(request: &Request<'_>) -> Result<Vec<IpAddr>, CniError> {
    let list = |object: Option<&Map<String, Value>>| -> Result<Vec<String>, CniError> {
        let list = object.map(|object| array(object, "ips")).transpose()?.flatten();
        Ok(list.into_iter().flatten().filter_map(Value::as_str).map(ToOwned::to_owned).collect())
    };
    let mut texts: Vec<String> = request.arg("IP")?.map(|list| list.split(',').map(ToOwned::to_owned).collect()).unwrap_or_default();
    texts.extend(list(request.cni_args()?)?);
    texts.extend(list(request.runtime_config()?)?);
    let mut requested = Vec::new();
    for text in texts.iter().filter(|text| !text.trim().is_empty()) {
        let address = text.split('/').next().unwrap_or_default().trim().parse();
        let address = address.map_err(|_| CniError::config(format!("requested IP {text:?} is not an address")))?;
        if !requested.contains(&address) {
            requested.push(address);
        }
    }
    Ok(requested)
}

/// Reads a file in the format of resolv.conf(5) as the `dns` of a result.
fn resolv_conf(path: &str) -> Result<Map<String, Value>, CniError> {
    let text = fs::read_to_string(path).map_err(|error| CniError::failed(format!("resolvConf: cannot read {path}: {error}")))?;
    let mut dns = Map::new();
    let mut append = |key: &str, words: &[&str]| {
        let list = dns.entry(key).or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(list) = list {
            list.extend(words.iter().map(|word| Value::from(*word)));
        }
    };
    let mut domain = None;
    for line in text.lines().filter(|line| !line.starts_with(['#', ';'])) {
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["nameserver", server] => append("nameservers", &[server]),
            ["domain", name] => domain = Some((*name).to_owned()),
            ["search", words @ ..] => append("search", words),
            ["options", words @ ..] => append("options", words),
            _ => {}
        }
    }
    if let Some(domain) = domain {
        dns.insert("domain".to_owned(), domain.into());
    }
    Ok(dns)
}

/// The attachment that holds an address.
struct Owner {
    /// The content of its address files: container and interface.
    content: String,
    /// The content of files that old versions wrote: the container alone.
    container: String,
}

impl Owner {
    fn of(request: &Request<'_>) -> Owner {
        Owner::new(request.container_id, request.ifname)
    }

    fn new(container: &str, ifname: &str) -> Owner {
        Owner { content: format!("{container}\r\n{ifname}"), container: container.to_owned() }
    }

    fn holds(&self, content: &str) -> bool {
        content == self.content || content == self.container
    }
}

/// A reserved address.
struct Entry {
    address: IpAddr,
    content: String,
}

/// A network's directory, locked.
struct Store {
    directory: PathBuf,
    lock: File,
    index: Index,
    /// Is the index complete? It is until another program changes the directory.
    index_is_current: Cell<bool>,
}

impl Store {
    /// Opens and locks the store, and creates its directory if it does not exist.
    fn open(directory: &Path) -> Result<Store, CniError> {
        let opened = (|| {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
            lock::open(&directory.join("lock"), 0o750, PATIENCE)
        })();
        let lock = opened.map_err(|error| match error.kind() {
            std::io::ErrorKind::TimedOut => {
                let text = format!("ipam.dataDir: cannot lock {}: {error}", directory.join("lock").display());
                busy(std::io::Error::new(error.kind(), text))
            }
            _ => CniError::new(5, format!("ipam.dataDir: cannot open {}: {error}", directory.display())),
        })?;
        let index = Index::of(directory);
        let index_is_current = Cell::new(index.is_current(directory, &lock));
        Ok(Store { directory: directory.to_owned(), lock, index, index_is_current })
    }

    /// Opens the store if its directory exists.
    fn open_existing(directory: &Path) -> Result<Option<Store>, CniError> {
        if directory.is_dir() { Store::open(directory).map(Some) } else { Ok(None) }
    }

    /// Scans the directory for reserved addresses.
    fn entries(&self) -> Result<Vec<Entry>, CniError> {
        let failed = |error: std::io::Error| CniError::new(5, format!("ipam.dataDir: cannot read {}: {error}", self.directory.display()));
        let directory = File::open(&self.directory).map_err(failed)?;
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.directory).map_err(failed)? {
            let file = file.map_err(failed)?;
            let Some(address) = file.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A program that does not take the lock can remove a file during the scan.
            let Some(content) = read_owner(&directory, file.file_name().as_os_str()) else { continue };
            entries.push(Entry { address, content });
        }
        Ok(entries)
    }

    /// Frees addresses that were reserved before this host was booted. Containers do not survive a reboot, and many runtimes
    /// never call DEL for them. Reservations of this program name their boot; those of other implementations do not, and
    /// stay. Runs once per boot.
    fn forget_earlier_boots(&self) -> Result<(), CniError> {
        let Some(boot) = boot_id() else { return Ok(()) };
        if read_boot_id(&self.lock).is_some_and(|seen| seen == boot) {
            return Ok(());
        }
        for entry in self.entries()? {
            let file = self.directory.join(entry.address.to_string());
            if File::open(&file).ok().and_then(|file| read_boot_id(&file)).is_some_and(|reserved_in| reserved_in != boot) {
                remove_file(&file)?;
            }
        }
        write_boot_id(&self.lock);
        Ok(())
    }

    /// Records that the index matches the directory after this program's own changes, if it matched before them.
    fn mark_index_current(&self) {
        if self.index_is_current.get() {
            Index::mark_current(&self.directory, &self.lock);
        }
    }

    /// The addresses that an owner holds. Scans the directory only after another program has changed it.
    fn held_by(&self, owner: &Owner) -> Result<Vec<IpAddr>, CniError> {
        if !self.index_is_current.get() {
            let entries = self.entries()?;
            if self.index.rebuild(entries.iter().map(|entry| (entry.content.as_str(), entry.address))) {
                Index::mark_current(&self.directory, &self.lock);
                self.index_is_current.set(true);
            }
            return Ok(entries.into_iter().filter(|entry| owner.holds(&entry.content)).map(|entry| entry.address).collect());
        }
        let mut indexed = self.index.get(&owner.content);
        indexed.extend(self.index.get(&owner.container));
        Ok(indexed.into_iter().filter(|address| self.owner_of(*address).is_some_and(|content| owner.holds(&content))).collect())
    }

    /// The content of an address's file.
    fn owner_of(&self, address: IpAddr) -> Option<String> {
        read_owner(&File::open(&self.directory).ok()?, address.to_string().as_ref())
    }

    /// Reserves an address of a range set: the requested one, else the next free one after the address allocated last.
    fn allocate(&self, set: &[Range], index: usize, requested: Option<IpAddr>, owner: &Owner) -> Result<(IpAddr, Range), CniError> {
        let range_of = |ip: IpAddr| set.iter().find(|range| range.admits(ip)).copied();
        if let Some((ip, range)) = requested.and_then(|ip| Some((ip, range_of(ip)?))) {
            if range.gateway == ip {
                return Err(CniError::failed(format!("requested IP {ip} is the subnet's gateway")));
            }
            if !self.reserve(ip, owner)? {
                return Err(CniError::failed(format!("requested IP address {ip} is not available in range set {}", describe(set))));
            }
            self.remember_last(index, ip);
            return Ok((ip, range));
        }
        if let Some(address) = self.held_by(owner)?.into_iter().find(|address| range_of(*address).is_some()) {
            let holder = owner.content.replace("\r\n", " ");
            return Err(CniError::failed(format!("{address} has been allocated to {holder}, duplicate allocation is not allowed")));
        }
        let last: Option<IpAddr> = fs::read_to_string(self.last_reserved_file(index)).ok().and_then(|text| text.trim().parse().ok());
        for (ip, range) in candidates(set, last) {
            if range.gateway != ip && self.reserve(ip, owner)? {
                self.remember_last(index, ip);
                return Ok((ip, range));
            }
        }
        Err(CniError::failed(format!("no IP addresses available in range set: {}", describe(set))))
    }

    /// The file with the address that was allocated last from a range set.
    fn last_reserved_file(&self, index: usize) -> PathBuf {
        self.directory.join(format!("last_reserved_ip.{index}"))
    }

    /// Records the address that was allocated last. A hint only; a torn write is harmless, so the file is written in place and
    /// leaves no temporary file if the process is killed.
    fn remember_last(&self, index: usize, ip: IpAddr) {
        let _ = fs::write(self.last_reserved_file(index), ip.to_string());
    }

    /// Creates the address's file with its owner in it, in one step. Returns false if the address is taken.
    fn reserve(&self, ip: IpAddr, owner: &Owner) -> Result<bool, CniError> {
        let name = self.directory.join(ip.to_string());
        let failed = |error: std::io::Error| CniError::new(5, format!("ipam.dataDir: cannot write {}: {error}", name.display()));
        match fs::read(&name) {
            // This program never writes an empty file, and other implementations hold the lock while they write. So the writer
            // died before it wrote the owner.
            Ok(content) if content.is_empty() => fs::remove_file(&name).map_err(failed)?,
            // A directory with that name blocks the address too.
            Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => return Ok(false),
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        // Addresses of other range sets stay in the index. An address that the owner no longer holds is harmless there.
        let mut indexed = self.index.get(&owner.content);
        indexed.retain(|other| *other != ip);
        indexed.push(ip);
        if !self.index.set(&owner.content, &indexed) {
            self.index_is_current.set(false);
        }
        let how = How { mode: 0o600, durable: false, existing: Existing::Keep };
        let written = file::put(&name, owner.content.as_bytes(), how, |file| {
            write_boot_id(file);
            Ok(())
        });
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Releases the addresses of an attachment.
    fn release(&self, id: &str, ifname: &str) -> Result<(), CniError> {
        let owner = Owner::new(id, ifname);
        let exact = |content: &str| content == owner.content;
        let held = if self.index_is_current.get() { self.held_by(&owner)? } else { Vec::new() };
        if held.iter().any(|address| self.owner_of(*address).as_deref().is_some_and(exact)) {
            let own = held.iter().filter(|address| self.owner_of(**address).as_deref().is_some_and(exact));
            remove_all(own.map(|address| self.directory.join(address.to_string())))?;
            self.index.set(&owner.content, &[]);
            self.mark_index_current();
            return Ok(());
        }
        // The index has no address: the owner holds none, or another program reserved it.
        self.index.set(&owner.content, &[]);
        let entries = self.entries()?;
        let own: Vec<&Entry> = entries.iter().filter(|entry| exact(&entry.content)).collect();
        // Files of old versions name the container only.
        let found = if own.is_empty() { entries.iter().filter(|entry| entry.content == id).collect() } else { own };
        remove_all(found.iter().map(|entry| self.directory.join(entry.address.to_string())))
    }

    /// Removes what belongs to no valid attachment.
    fn collect(&self, valid: &[Attachment]) -> Result<(), CniError> {
        let owners: Vec<Owner> = valid.iter().map(|attachment| Owner::new(&attachment.container, &attachment.ifname)).collect();
        let is_live = |entry: &Entry| owners.iter().any(|owner| owner.holds(&entry.content));
        let (live, dead): (Vec<Entry>, Vec<Entry>) = self.entries()?.into_iter().partition(is_live);
        let removed = remove_all(dead.iter().map(|entry| self.directory.join(entry.address.to_string())));
        self.index_is_current.set(self.index.rebuild(live.iter().map(|entry| (entry.content.as_str(), entry.address))));
        self.mark_index_current();
        removed
    }
}

/// Removes files. Continues after an error and returns the first.
fn remove_all(files: impl Iterator<Item = PathBuf>) -> Result<(), CniError> {
    let mut done = Ok(());
    for file in files {
        let removed = remove_file(&file);
        done = done.and(removed);
    }
    done
}

/// The extended attribute with a boot ID. An address file has that of the boot in which the address was reserved, the lock
/// file that of the last boot in which the reservations of earlier boots were freed.
const BOOT_ATTRIBUTE: &str = "user.flannel.boot_id";

/// The ID of this boot (`random(4)`).
fn boot_id() -> Option<&'static str> {
    static READ: OnceLock<Option<String>> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|text| text.trim().to_owned());
    READ.get_or_init(read).as_deref()
}

/// Reads the boot ID of a file, if it has one.
fn read_boot_id(file: &File) -> Option<String> {
    let mut buffer = [0; 64];
    let length = rustix::fs::fgetxattr(file, BOOT_ATTRIBUTE, &mut buffer[..]).ok()?;
    String::from_utf8(buffer.get(..length)?.to_vec()).ok()
}

/// Reads the owner that an address file names. An ADD may read all files, so this makes only three system calls unless the
/// content is long.
fn read_owner(directory: &File, name: &std::ffi::OsStr) -> Option<String> {
    let mut file: File = rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?.into();
    let mut buffer = [0; 512];
    let length = rustix::io::read(&file, &mut buffer).ok()?;
    let mut content = buffer[..length].to_vec();
    if length == buffer.len() {
        file.read_to_end(&mut content).ok()?;
    }
    Some(String::from_utf8(content).ok()?.trim().to_owned())
}

/// Writes this boot's ID to a file. On a file system without extended attributes, reservations stay until the runtime calls
/// DEL.
fn write_boot_id(file: &File) {
    if let Some(boot) = boot_id() {
        let _ = rustix::fs::fsetxattr(file, BOOT_ATTRIBUTE, boot.as_bytes(), rustix::fs::XattrFlags::empty());
    }
}
