//! `host-local`: addresses of a range, recorded as files of this host (specification, section 7.4). A reservation appears
//! with its content in one step, so each file names its owner, whatever kills this process.

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
            // Whatever else is wrong with the configuration: ADD would have refused it.
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

    let mut taken = Taken { store: &store, addresses: Vec::new() };
    let mut ips = Vec::new();
    for (index, set) in sets.iter().enumerate() {
        let wanted = requested.iter().position(|ip| set.iter().any(|range| range.admits(*ip))).map(|at| requested.remove(at));
        let (address, range) = store.allocate(set, index, wanted, &owner)?;
        taken.addresses.push(address);
        let gateway = Some(range.gateway).filter(|gateway| *gateway != address);
        ips.push(Ip { interface: None, address: Cidr { addr: address, len: range.subnet.prefix_len() }, gateway });
    }
    if !requested.is_empty() {
        let list: Vec<String> = requested.iter().map(ToString::to_string).collect();
        return Err(CniError::failed(format!("failed to allocate all requested IPs: {}", list.join(" "))));
    }
    taken.addresses.clear();
    store.note();
    Ok(CniResult { interfaces: Vec::new(), ips, routes, dns })
}

/// Addresses that are returned unless the ADD succeeds.
struct Taken<'a> {
    store: &'a Store,
    addresses: Vec<IpAddr>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for address in &self.addresses {
            // What cannot be removed now is returned by the container's DEL.
            let _ = fs::remove_file(self.store.directory.join(address.to_string()));
        }
    }
}

/// Addresses that the runtime asked for, in any of the places that it may; one that is in several counts once.
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

/// Who holds an address.
struct Owner {
    /// What its address files contain: container and interface.
    content: String,
    /// What files of old versions contain: the container alone.
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
    /// Is the index complete: has no other program changed the folder since it was?
    current: Cell<bool>,
}

impl Store {
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
        let current = Cell::new(index.is_current(directory, &lock));
        Ok(Store { directory: directory.to_owned(), lock, index, current })
    }

    /// The store, if anything was ever reserved in it.
    fn open_existing(directory: &Path) -> Result<Option<Store>, CniError> {
        if directory.is_dir() { Store::open(directory).map(Some) } else { Ok(None) }
    }

    fn entries(&self) -> Result<Vec<Entry>, CniError> {
        let failed = |error: std::io::Error| CniError::new(5, format!("ipam.dataDir: cannot read {}: {error}", self.directory.display()));
        let directory = File::open(&self.directory).map_err(failed)?;
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.directory).map_err(failed)? {
            let file = file.map_err(failed)?;
            let Some(address) = file.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A file that is removed meanwhile, without our lock, is another program's.
            let Some(content) = read_owner(&directory, file.file_name().as_os_str()) else { continue };
            entries.push(Entry { address, content });
        }
        Ok(entries)
    }

    /// Frees addresses that were reserved before this host was booted: no container of then is alive, and many a runtime
    /// never calls DEL for it. Each reservation of ours names its boot; those of other implementations do not, and stay. Done
    /// once a boot.
    fn forget_earlier_boots(&self) -> Result<(), CniError> {
        let Some(boot) = boot_id() else { return Ok(()) };
        if boot_of(&self.lock).is_some_and(|seen| seen == boot) {
            return Ok(());
        }
        for entry in self.entries()? {
            let file = self.directory.join(entry.address.to_string());
            if File::open(&file).ok().and_then(|file| boot_of(&file)).is_some_and(|of| of != boot) {
                remove_file(&file)?;
            }
        }
        name_boot(&self.lock);
        Ok(())
    }

    /// Notes that the index is complete for the folder as it is now, if it was before.
    fn note(&self) {
        if self.current.get() {
            Index::note(&self.directory, &self.lock);
        }
    }

    /// The addresses of an owner. The folder is read only if another program changed it.
    fn held_by(&self, owner: &Owner) -> Result<Vec<IpAddr>, CniError> {
        if !self.current.get() {
            let entries = self.entries()?;
            if self.index.rebuild(entries.iter().map(|entry| (entry.content.as_str(), entry.address))) {
                Index::note(&self.directory, &self.lock);
                self.current.set(true);
            }
            return Ok(entries.into_iter().filter(|entry| owner.holds(&entry.content)).map(|entry| entry.address).collect());
        }
        let mut named = self.index.get(&owner.content);
        named.extend(self.index.get(&owner.container));
        Ok(named.into_iter().filter(|address| self.owner_of(*address).is_some_and(|content| owner.holds(&content))).collect())
    }

    fn owner_of(&self, address: IpAddr) -> Option<String> {
        read_owner(&File::open(&self.directory).ok()?, address.to_string().as_ref())
    }

    /// Reserves an address of a set: the wanted one, else the next after the last one that was allocated.
    fn allocate(&self, set: &[Range], index: usize, wanted: Option<IpAddr>, owner: &Owner) -> Result<(IpAddr, Range), CniError> {
        let of = |ip: IpAddr| set.iter().find(|range| range.admits(ip)).copied();
        if let Some((ip, range)) = wanted.and_then(|ip| Some((ip, of(ip)?))) {
            if range.gateway == ip {
                return Err(CniError::failed(format!("requested IP {ip} is the subnet's gateway")));
            }
            if !self.reserve(ip, owner)? {
                return Err(CniError::failed(format!("requested IP address {ip} is not available in range set {}", describe(set))));
            }
            self.remember_last(index, ip);
            return Ok((ip, range));
        }
        if let Some(address) = self.held_by(owner)?.into_iter().find(|address| of(*address).is_some()) {
            let holder = owner.content.replace("\r\n", " ");
            return Err(CniError::failed(format!("{address} has been allocated to {holder}, duplicate allocation is not allowed")));
        }
        let last: Option<IpAddr> = fs::read_to_string(self.last(index)).ok().and_then(|text| text.trim().parse().ok());
        for (ip, range) in candidates(set, last) {
            if range.gateway != ip && self.reserve(ip, owner)? {
                self.remember_last(index, ip);
                return Ok((ip, range));
            }
        }
        Err(CniError::failed(format!("no IP addresses available in range set: {}", describe(set))))
    }

    /// The file that has the address of a set that was allocated last.
    fn last(&self, index: usize) -> PathBuf {
        self.directory.join(format!("last_reserved_ip.{index}"))
    }

    /// Only a hint where to continue: half of it is as good as none, so it is written in place and leaves no temporary file
    /// when the process is killed; and without it the address is reserved all the same.
    fn remember_last(&self, index: usize, ip: IpAddr) {
        let _ = fs::write(self.last(index), ip.to_string());
    }

    /// Creates the address's file with its owner in it, in one step; false if it is taken.
    fn reserve(&self, ip: IpAddr, owner: &Owner) -> Result<bool, CniError> {
        let name = self.directory.join(ip.to_string());
        let failed = |error: std::io::Error| CniError::new(5, format!("ipam.dataDir: cannot write {}: {error}", name.display()));
        match fs::read(&name) {
            // No plugin of ours writes an empty file, and others hold the lock while they write: its writer died before it
            // wrote whose the address is.
            Ok(content) if content.is_empty() => fs::remove_file(&name).map_err(failed)?,
            // A folder of that name reserves the address as well.
            Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => return Ok(false),
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        // Addresses of another set stay in the index; one that is not held any more does no harm there.
        let mut named = self.index.get(&owner.content);
        named.retain(|other| *other != ip);
        named.push(ip);
        if !self.index.set(&owner.content, &named) {
            self.current.set(false);
        }
        let how = How { mode: 0o600, durable: false, existing: Existing::Keep };
        let written = file::put(&name, owner.content.as_bytes(), how, |file| {
            name_boot(file);
            Ok(())
        });
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    fn release(&self, id: &str, ifname: &str) -> Result<(), CniError> {
        let owner = Owner::new(id, ifname);
        let exact = |content: &str| content == owner.content;
        let held = if self.current.get() { self.held_by(&owner)? } else { Vec::new() };
        if held.iter().any(|address| self.owner_of(*address).as_deref().is_some_and(exact)) {
            let own = held.iter().filter(|address| self.owner_of(**address).as_deref().is_some_and(exact));
            remove_all(own.map(|address| self.directory.join(address.to_string())))?;
            self.index.set(&owner.content, &[]);
            self.note();
            return Ok(());
        }
        // Not in the index: it holds nothing, or another program wrote what it holds.
        self.index.set(&owner.content, &[]);
        let entries = self.entries()?;
        let own: Vec<&Entry> = entries.iter().filter(|entry| exact(&entry.content)).collect();
        // Old files name the container only.
        let found = if own.is_empty() { entries.iter().filter(|entry| entry.content == id).collect() } else { own };
        remove_all(found.iter().map(|entry| self.directory.join(entry.address.to_string())))
    }

    /// Removes what belongs to no valid attachment.
    fn collect(&self, valid: &[Attachment]) -> Result<(), CniError> {
        let owners: Vec<Owner> = valid.iter().map(|attachment| Owner::new(&attachment.container, &attachment.ifname)).collect();
        let is_live = |entry: &Entry| owners.iter().any(|owner| owner.holds(&entry.content));
        let (live, dead): (Vec<Entry>, Vec<Entry>) = self.entries()?.into_iter().partition(is_live);
        let removed = remove_all(dead.iter().map(|entry| self.directory.join(entry.address.to_string())));
        self.current.set(self.index.rebuild(live.iter().map(|entry| (entry.content.as_str(), entry.address))));
        self.note();
        removed
    }
}

/// Removes files. One that cannot be removed does not keep the others; its error is reported at the end.
fn remove_all(files: impl Iterator<Item = PathBuf>) -> Result<(), CniError> {
    let mut done = Ok(());
    for file in files {
        let removed = remove_file(&file);
        done = done.and(removed);
    }
    done
}

/// The extended attribute of an address file that names its boot; on the lock's file, the boot in which the reservations of
/// earlier ones were freed.
const BOOT_ATTRIBUTE: &str = "user.flannel.boot_id";

/// The id of this boot (`random(4)`).
fn boot_id() -> Option<&'static str> {
    static READ: OnceLock<Option<String>> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|text| text.trim().to_owned());
    READ.get_or_init(read).as_deref()
}

/// The boot that a file names, if it does.
fn boot_of(file: &File) -> Option<String> {
    let mut buffer = [0; 64];
    let length = rustix::fs::fgetxattr(file, BOOT_ATTRIBUTE, &mut buffer[..]).ok()?;
    String::from_utf8(buffer.get(..length)?.to_vec()).ok()
}

/// Who an address file names. An ADD may read all files, so this makes three system calls where the names are not long.
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

/// Writes this boot's id to a file. On a file system without extended attributes reservations stay until the runtime
/// returns them.
fn name_boot(file: &File) {
    if let Some(boot) = boot_id() {
        let _ = rustix::fs::fsetxattr(file, BOOT_ATTRIBUTE, boot.as_bytes(), rustix::fs::XattrFlags::empty());
    }
}
