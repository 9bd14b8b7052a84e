//! `host-local`: addresses of a range, kept as files of this host (specification, section 7.4). A reservation appears
//! with its content in one step, so whatever kills this process, each file says whose it is.

mod index;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ::flannel::net::bits_of;
use ::flannel::{Cidr, Family, Subnet};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use serde_json::{Map, Value};

use self::index::Index;
use crate::flannel::remove_file;
use crate::protocol::{CniError, Command, Request, array, object, string};
use crate::result::{CniResult, Ip, Route};

pub(crate) fn run(request: &Request) -> Result<Option<CniResult>, CniError> {
    let ipam = object(&request.conf, "ipam")?.ok_or_else(|| CniError::config("ipam: it is missing"))?;
    let directory = Path::new(string(ipam, "dataDir")?.unwrap_or("/var/lib/cni/networks")).join(&request.name);
    match request.command {
        Command::Add => add(request, ipam, &directory).map(Some),
        Command::Del => match Store::open_existing(&directory)? {
            Some(store) => store.release(&request.container_id, &request.ifname).map(|()| None),
            None => Ok(None),
        },
        Command::Check => {
            let held = Store::open_existing(&directory)?.map(|store| store.entries()).transpose()?.unwrap_or_default();
            let owner = Owner::of(request);
            match held.iter().any(|entry| owner.holds(&entry.content) || entry.content == request.container_id) {
                true => Ok(None),
                false => Err(CniError::failed(format!(
                    "no address is reserved for container {} interface {}",
                    request.container_id, request.ifname
                ))),
            }
        }
        Command::Gc => {
            let valid = request.valid_attachments()?;
            match Store::open_existing(&directory)? {
                Some(store) => store.collect(&valid).map(|()| None),
                None => Ok(None),
            }
        }
        Command::Status => ranges(request, ipam).map(|_| None),
        Command::Version => Ok(None),
    }
}

fn add(request: &Request, ipam: &Map<String, Value>, directory: &Path) -> Result<CniResult, CniError> {
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
        let gateway = range.gateway.filter(|gateway| *gateway != address);
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

/// Addresses that are given back unless the ADD succeeds.
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

/// Addresses that may be handed out: `start..=end` of a subnet, without the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    subnet: Subnet,
    start: IpAddr,
    end: IpAddr,
    gateway: Option<IpAddr>,
}

impl Range {
    fn admits(&self, ip: IpAddr) -> bool {
        Family::of(ip) == self.subnet.family() && (self.start..=self.end).contains(&ip)
    }
}

/// The range sets of a configuration: one address is handed out of each.
fn ranges(request: &Request, ipam: &Map<String, Value>) -> Result<Vec<Vec<Range>>, CniError> {
    let mut sets = Vec::new();
    if let Some(runtime) = object(&request.conf, "runtimeConfig")?
        && let Some(list) = array(runtime, "ipRanges")?
    {
        sets.extend(list.iter().map(range_set).collect::<Result<Vec<_>, _>>()?);
    }
    // The old form, one range at the top, goes first.
    if string(ipam, "subnet")?.is_some() {
        sets.push(vec![range(ipam)?]);
    }
    if let Some(list) = array(ipam, "ranges")? {
        sets.extend(list.iter().map(range_set).collect::<Result<Vec<_>, _>>()?);
    }
    if sets.is_empty() {
        return Err(CniError::config("ipam.ranges: no IP ranges specified"));
    }
    let all: Vec<&Range> = sets.iter().flatten().collect();
    for (i, a) in all.iter().enumerate() {
        if let Some(b) = all[..i].iter().find(|b| a.subnet.overlaps(b.subnet) && a.start <= b.end && b.start <= a.end) {
            return Err(CniError::config(format!("ipam.ranges: {}-{} overlaps {}-{}", a.start, a.end, b.start, b.end)));
        }
    }
    Ok(sets)
}

fn range_set(value: &Value) -> Result<Vec<Range>, CniError> {
    let list = value
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or_else(|| CniError::config("ipam.ranges: each set must be a list of ranges"))?;
    let set = list
        .iter()
        .map(|value| range(value.as_object().ok_or_else(|| CniError::config("ipam.ranges: a range must be an object"))?))
        .collect::<Result<Vec<_>, _>>()?;
    if set.iter().any(|range| range.subnet.family() != set[0].subnet.family()) {
        return Err(CniError::config("ipam.ranges: the families of one set must be the same"));
    }
    Ok(set)
}

fn range(object: &Map<String, Value>) -> Result<Range, CniError> {
    let text = string(object, "subnet")?.ok_or_else(|| CniError::config("ipam.ranges: a range needs a subnet"))?;
    let cidr: Cidr = text.parse().map_err(|error| CniError::config(format!("ipam.ranges: subnet: {error}")))?;
    let (subnet, family) = (cidr.subnet(), Family::of(cidr.addr));
    if subnet.network() != cidr.addr {
        return Err(CniError::config(format!("ipam.ranges: subnet: {cidr} has host bits set: did you mean {subnet}?")));
    }
    if subnet.prefix_len() > family.bits() - 2 {
        return Err(CniError::config(format!("ipam.ranges: subnet: {subnet} is too small to hand out addresses")));
    }
    let address = |name: &str| -> Result<Option<IpAddr>, CniError> {
        let Some(text) = string(object, name)?.filter(|text| !text.is_empty()) else { return Ok(None) };
        let ip: IpAddr = text.parse().map_err(|_| CniError::config(format!("ipam.ranges: {name}: {text:?} is no address")))?;
        if name != "gateway" && !subnet.contains(ip) {
            return Err(CniError::config(format!("ipam.ranges: {name}: {ip} is not in {subnet}")));
        }
        Ok(Some(ip))
    };
    let last = match family {
        Family::V4 => family.address(bits_of(subnet.last()) - 1),
        Family::V6 => subnet.last(),
    };
    let gateway = address("gateway")?.unwrap_or(subnet.first_host());
    let (start, end) = (address("rangeStart")?.unwrap_or(subnet.first_host()), address("rangeEnd")?.unwrap_or(last));
    if start > end {
        return Err(CniError::config(format!("ipam.ranges: rangeStart {start} is above rangeEnd {end}")));
    }
    Ok(Range { subnet, start, end, gateway: Some(gateway) })
}

/// Addresses that the runtime asked for by name, in any of the places that it may.
fn requested(request: &Request) -> Result<Vec<IpAddr>, CniError> {
    let mut texts: Vec<String> = request.arg("IP")?.map(|list| list.split(',').map(ToOwned::to_owned).collect()).unwrap_or_default();
    let strings =
        |list: Option<&Vec<Value>>| list.into_iter().flatten().filter_map(Value::as_str).map(ToOwned::to_owned).collect::<Vec<_>>();
    let cni = object(&request.conf, "args")?.map(|args| object(args, "cni")).transpose()?.flatten();
    texts.extend(strings(cni.map(|cni| array(cni, "ips")).transpose()?.flatten()));
    let runtime = object(&request.conf, "runtimeConfig")?;
    texts.extend(strings(runtime.map(|runtime| array(runtime, "ips")).transpose()?.flatten()));
    let read = |text: &String| {
        text.split('/')
            .next()
            .unwrap_or_default()
            .trim()
            .parse()
            .map_err(|_| CniError::config(format!("requested IP {text:?} is no address")))
    };
    texts.iter().map(read).collect()
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

/// Who holds an address: a container's interface.
struct Owner(String);

impl Owner {
    fn of(request: &Request) -> Owner {
        Owner(format!("{}\r\n{}", request.container_id, request.ifname))
    }

    fn holds(&self, content: &str) -> bool {
        content == self.0
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
    /// Has nobody else changed the folder since the index was right?
    current: Cell<bool>,
}

impl Store {
    fn open(directory: &Path) -> Result<Store, CniError> {
        let opened = (|| {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
            let lock = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o750).open(directory.join("lock"))?;
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
            std::io::Result::Ok(lock)
        })();
        let lock = opened.map_err(|error| CniError::new(5, format!("ipam.dataDir: cannot open {}: {error}", directory.display())))?;
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
            // A file that goes away while we look, without our lock, was none of ours.
            let Some(content) = read_owner(&directory, file.file_name().as_os_str()) else { continue };
            entries.push(Entry { address, content });
        }
        Ok(entries)
    }

    /// Frees what was reserved before this host was booted: no container of then is alive, and many a runtime never says
    /// so. Each reservation of ours carries its boot's name, so that those of other implementations, whose boot nobody
    /// knows, are left alone. Looked at once a boot.
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

    /// The index is right for the folder as it is now, if it was before and took all that was said since.
    fn note(&self) {
        if self.current.get() {
            Index::note(&self.directory, &self.lock);
        }
    }

    /// The addresses of an owner. The folder is read only if somebody else changed it.
    fn held_by(&self, owner: &Owner) -> Result<Vec<IpAddr>, CniError> {
        if !self.current.get() {
            let entries = self.entries()?;
            if self.index.rebuild(entries.iter().map(|entry| (entry.content.as_str(), entry.address))) {
                Index::note(&self.directory, &self.lock);
                self.current.set(true);
            }
            return Ok(entries.into_iter().filter(|entry| owner.holds(&entry.content)).map(|entry| entry.address).collect());
        }
        let said = self.index.get(&owner.0);
        Ok(said.into_iter().filter(|address| self.owner_of(*address).is_some_and(|content| owner.holds(&content))).collect())
    }

    fn owner_of(&self, address: IpAddr) -> Option<String> {
        read_owner(&File::open(&self.directory).ok()?, address.to_string().as_ref())
    }

    /// Reserves an address of a set: the wanted one, else the next after the last one that was handed out.
    fn allocate(&self, set: &[Range], index: usize, wanted: Option<IpAddr>, owner: &Owner) -> Result<(IpAddr, Range), CniError> {
        let of = |ip: IpAddr| set.iter().find(|range| range.admits(ip)).copied();
        if let Some((ip, range)) = wanted.and_then(|ip| Some((ip, of(ip)?))) {
            if range.gateway == Some(ip) {
                return Err(CniError::failed(format!("requested IP {ip} is the subnet's gateway")));
            }
            if !self.reserve(ip, owner)? {
                return Err(CniError::failed(format!("requested IP address {ip} is not available in range set {}", describe(set))));
            }
            self.remember_last(index, ip);
            return Ok((ip, range));
        }
        if let Some(address) = self.held_by(owner)?.into_iter().find(|address| of(*address).is_some()) {
            let (id, ifname) = owner.0.split_once("\r\n").unwrap_or_default();
            return Err(CniError::failed(format!("{address} has been allocated to {id} {ifname}, duplicate allocation is not allowed")));
        }
        let last: Option<IpAddr> = fs::read_to_string(self.last(index)).ok().and_then(|text| text.trim().parse().ok());
        for (ip, range) in candidates(set, last) {
            if range.gateway != Some(ip) && self.reserve(ip, owner)? {
                self.remember_last(index, ip);
                return Ok((ip, range));
            }
        }
        Err(CniError::failed(format!("no IP addresses available in range set: {}", describe(set))))
    }

    /// The file that has the last address of a set that was handed out.
    fn last(&self, index: usize) -> PathBuf {
        self.directory.join(format!("last_reserved_ip.{index}"))
    }

    /// Only a hint where to go on: half of it is as good as none, so it is written in place and leaves no temporary file
    /// when we are killed; and without it the address is reserved all the same.
    fn remember_last(&self, index: usize, ip: IpAddr) {
        let _ = fs::write(self.last(index), ip.to_string());
    }

    /// Creates the address's file with its owner in it, in one step; false if it is taken.
    fn reserve(&self, ip: IpAddr, owner: &Owner) -> Result<bool, CniError> {
        let name = self.directory.join(ip.to_string());
        let failed = |error: std::io::Error| CniError::new(5, format!("ipam.dataDir: cannot write {}: {error}", name.display()));
        match fs::read(&name) {
            // We write no empty file, and nobody else is at it under our lock: its writer died before it said whose
            // the address is.
            Ok(content) if content.is_empty() => fs::remove_file(&name).map_err(failed)?,
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        // What is said already of another set's address, or of one that is not held any more, does no harm.
        let mut said = self.index.get(&owner.0);
        said.retain(|other| *other != ip);
        said.push(ip);
        if !self.index.set(&owner.0, &said) {
            self.current.set(false);
        }
        match publish(&self.directory, &name, owner.0.as_bytes(), false) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    fn release(&self, id: &str, ifname: &str) -> Result<(), CniError> {
        let owner = Owner(format!("{id}\r\n{ifname}"));
        let held = if self.current.get() { self.held_by(&owner)? } else { Vec::new() };
        if !held.is_empty() {
            held.iter().try_for_each(|address| remove_file(&self.directory.join(address.to_string())))?;
            self.index.set(&owner.0, &[]);
            self.note();
            return Ok(());
        }
        // Unknown to the index: so it holds nothing, or somebody else wrote what it holds.
        self.index.set(&owner.0, &[]);
        let entries = self.entries()?;
        let exact: Vec<&Entry> = entries.iter().filter(|entry| owner.holds(&entry.content)).collect();
        // Old files name the container only.
        let found = if exact.is_empty() { entries.iter().filter(|entry| entry.content == id).collect() } else { exact };
        found.iter().try_for_each(|entry| remove_file(&self.directory.join(entry.address.to_string())))
    }

    /// Removes what belongs to no valid attachment.
    fn collect(&self, valid: &[(String, String)]) -> Result<(), CniError> {
        let is_live = |entry: &Entry| valid.iter().any(|(id, ifname)| entry.content == *id || entry.content == format!("{id}\r\n{ifname}"));
        let (live, dead): (Vec<Entry>, Vec<Entry>) = self.entries()?.into_iter().partition(is_live);
        for entry in dead {
            remove_file(&self.directory.join(entry.address.to_string()))?;
        }
        self.current.set(self.index.rebuild(live.iter().map(|entry| (entry.content.as_str(), entry.address))));
        self.note();
        Ok(())
    }
}

/// The extended attribute of an address file that names its boot; of the lock's file, that in which the reservations of
/// earlier ones were freed.
const BOOT_ATTRIBUTE: &str = "user.flannel.boot_id";

/// The name of this boot (`random(4)`).
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

/// Who an address file names. Each ADD reads all files, so this makes three system calls and no more.
fn read_owner(directory: &File, name: &std::ffi::OsStr) -> Option<String> {
    let file = rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    // A container's and an interface's name are far below this.
    let mut buffer = [0; 512];
    let length = rustix::io::read(&file, &mut buffer).ok()?;
    Some(std::str::from_utf8(&buffer[..length]).ok()?.trim().to_owned())
}

/// Every address of a set once, from the one after `last` on, and round again.
fn candidates(set: &[Range], last: Option<IpAddr>) -> impl Iterator<Item = (IpAddr, Range)> + '_ {
    let at = last.and_then(|last| Some((set.iter().position(|range| range.admits(last))?, bits_of(last))));
    let (first, from) = at.unwrap_or((0, bits_of(set[0].start).wrapping_sub(1)));
    let part = move |range: Range, from: u128, to: u128| {
        let family = range.subnet.family();
        (from..=to).map(move |bits| (family.address(bits), range))
    };
    let head = part(set[first], from.wrapping_add(1), bits_of(set[first].end));
    let others = (1..set.len())
        .map(move |i| set[(first + i) % set.len()])
        .flat_map(move |range| part(range, bits_of(range.start), bits_of(range.end)));
    let tail = part(set[first], bits_of(set[first].start), from);
    head.chain(others).chain(tail)
}

fn describe(set: &[Range]) -> String {
    set.iter().map(|range| format!("{}-{}", range.start, range.end)).collect::<Vec<_>>().join(",")
}

/// Writes this boot's name to a file. A file system without extended attributes keeps reservations until the
/// runtime returns them, as all did before.
fn name_boot(file: &File) {
    if let Some(boot) = boot_id() {
        let _ = rustix::fs::fsetxattr(file, BOOT_ATTRIBUTE, boot.as_bytes(), rustix::fs::XattrFlags::empty());
    }
}

/// Makes a file appear under its name with its content, exclusively: it is written without a name, synced if wanted, and
/// then linked.
pub(crate) fn publish(directory: &Path, name: &Path, content: &[u8], sync: bool) -> std::io::Result<()> {
    match rustix::fs::openat(CWD, directory, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => {
            let mut file = File::from(fd);
            file.write_all(content)?;
            name_boot(&file);
            if sync {
                file.sync_all()?;
            }
            Ok(rustix::fs::linkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), CWD, name, AtFlags::SYMLINK_FOLLOW)?)
        }
        // A file system without nameless files: a name that no address has. We hold the lock, so it is one name.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::NOENT) => {
            let temporary = directory.join(format!(".{}", name.file_name().unwrap_or_default().to_string_lossy()));
            // One that a killed plugin left may be linked to an address by now: writing into it would change that.
            let _ = fs::remove_file(&temporary);
            fs::write(&temporary, content)?;
            let file = File::open(&temporary)?;
            name_boot(&file);
            if sync {
                file.sync_all()?;
            }
            let linked = fs::hard_link(&temporary, name);
            fs::remove_file(&temporary)?;
            linked
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[&str]) -> Vec<Range> {
        ranges.iter().map(|text| range(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap()).unwrap()).collect()
    }

    fn order(ranges: &[&str], last: &str) -> Vec<String> {
        candidates(&set(ranges), last.parse().ok()).map(|(ip, _)| ip.to_string()).collect()
    }

    #[test]
    fn candidates_go_round_once() {
        let small = r#"{"subnet":"10.1.0.0/29"}"#;
        assert_eq!(order(&[small], ""), ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"]);
        assert_eq!(order(&[small], "10.1.0.4"), ["10.1.0.5", "10.1.0.6", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4"]);
        assert_eq!(order(&[small], "10.9.9.9"), order(&[small], ""));
        let two = [
            r#"{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.5","rangeEnd":"10.1.0.6"}"#,
            r#"{"subnet":"10.2.0.0/24","rangeStart":"10.2.0.5","rangeEnd":"10.2.0.6"}"#,
        ];
        assert_eq!(order(&two, "10.2.0.5"), ["10.2.0.6", "10.1.0.5", "10.1.0.6", "10.2.0.5"]);
    }

    #[test]
    fn ranges_that_cannot_be() {
        let error = |text: &str| range(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap()).unwrap_err().msg;
        assert_eq!(error("{}"), "ipam.ranges: a range needs a subnet");
        assert_eq!(error(r#"{"subnet":"10.1.0.7/24"}"#), "ipam.ranges: subnet: 10.1.0.7/24 has host bits set: did you mean 10.1.0.0/24?");
        assert_eq!(error(r#"{"subnet":"10.1.0.0/31"}"#), "ipam.ranges: subnet: 10.1.0.0/31 is too small to hand out addresses");
        assert_eq!(error(r#"{"subnet":"10.1.0.0/24","rangeEnd":"10.2.0.1"}"#), "ipam.ranges: rangeEnd: 10.2.0.1 is not in 10.1.0.0/24");
        assert_eq!(
            error(r#"{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.9","rangeEnd":"10.1.0.5"}"#),
            "ipam.ranges: rangeStart 10.1.0.9 is above rangeEnd 10.1.0.5"
        );
    }
}
