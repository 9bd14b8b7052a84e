//! The addresses of all network namespaces that this process can enter, and whether a namespace is missing: each link of this namespace
//! whose other end is elsewhere has the kernel's number of that namespace, so the list is known to be complete or not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use flannel::{Cidr, IfName};

use crate::netlink::{NetlinkError, Protocol, Socket, attrs, u32_at};
use crate::netns::Netns;
use crate::{addr, link};

const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;

/// At most so many processes are looked at, and so many namespaces are entered.
const PROCESSES: usize = 32_768;
const NAMESPACES: usize = 4_096;

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it was found: a file or a process.
    pub path: PathBuf,
    /// Whether it is the caller's.
    pub is_own: bool,
    /// Whether a link of the caller's namespace leads to it. Another one may belong to another node on this machine.
    pub is_linked: bool,
    /// Its interfaces with their addresses, without those of scope link.
    pub interfaces: Vec<(IfName, Vec<Cidr>)>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// The namespaces.
    pub list: Vec<Endpoint>,
    /// Links of the caller's namespace whose other end is in a namespace that was not found.
    pub missing: Vec<IfName>,
}

impl Endpoints {
    /// Reads all namespaces.
    ///
    /// # Errors
    /// When this process may not enter namespaces, or the kernel does not answer.
    pub fn read() -> io::Result<Endpoints> {
        let own = Netns::current()?;
        let mut socket = Socket::open(Protocol::Route).map_err(io::Error::other)?;
        let links = link::list(&mut socket).map_err(io::Error::other)?;
        let mut elsewhere: BTreeMap<i32, Vec<IfName>> = BTreeMap::new();
        for link in links.iter().filter(|link| link.reaches_elsewhere) {
            elsewhere.entry(link.netns.unwrap_or(-1)).or_default().push(link.name);
        }
        let (mut seen, mut found) = (BTreeSet::from([own.id()?]), Endpoints::default());
        found.list.push(Endpoint {
            path: PathBuf::from("/proc/self/ns/net"),
            is_own: true,
            is_linked: true,
            interfaces: interfaces(&mut socket)?,
        });
        for path in paths() {
            if seen.len() > NAMESPACES {
                break;
            }
            // It may have ended meanwhile.
            let Ok(netns) = Netns::open(&path) else { continue };
            if !netns.id().is_ok_and(|id| seen.insert(id)) {
                continue;
            }
            let read = netns.run(|| interfaces(&mut Socket::open(Protocol::Route).map_err(io::Error::other)?));
            let Ok(Ok(interfaces)) = read else { continue };
            let is_linked = number(&mut socket, &netns).is_ok_and(|number| elsewhere.remove(&number).is_some());
            found.list.push(Endpoint { path, is_own: false, is_linked, interfaces });
        }
        found.missing = elsewhere.into_values().flatten().collect();
        Ok(found)
    }
}

/// The number that the caller's namespace has for another one; -1 for none.
fn number(socket: &mut Socket, netns: &Netns) -> Result<i32, NetlinkError> {
    let file = u32::try_from(netns.as_fd().as_raw_fd()).unwrap_or(u32::MAX);
    socket.get(
        RTM_GETNSID,
        |body| {
            body.bytes(&[0; 4]).attr_u32(NETNSA_FD, file);
        },
        |body| attrs(body.get(4..)?).find(|(kind, _)| *kind == NETNSA_NSID).and_then(|(_, value)| Some(u32_at(value, 0)?.cast_signed())),
    )
}

fn interfaces(socket: &mut Socket) -> io::Result<Vec<(IfName, Vec<Cidr>)>> {
    let links = link::list(socket).map_err(io::Error::other)?;
    let addresses = addr::list(socket, 0).map_err(io::Error::other)?;
    let of = |index| addresses.iter().filter(move |info| info.index == index && !info.link_scope).map(|info| info.addr.cidr).collect();
    Ok(links.iter().map(|link| (link.name, of(link.index))).collect())
}

/// Where namespaces may be: files of `ip netns` and of container runtimes, every mount of one, and every process.
fn paths() -> Vec<PathBuf> {
    let list = |folder: &str| fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        ["/run/netns", "/var/run/netns", "/run/docker/netns"].into_iter().flat_map(list).map(|e| e.path()).collect();
    for (table, root) in [("/proc/self/mountinfo", "/"), ("/proc/1/mountinfo", "/proc/1/root")] {
        let table = fs::read_to_string(table).unwrap_or_default();
        paths.extend(mounts(&table).into_iter().map(|path| Path::new(root).join(path.trim_start_matches('/'))));
    }
    let pids = list("/proc").filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    paths.extend(pids.take(PROCESSES).map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net"))));
    paths
}

/// The mounts of network namespaces in a table of mounts (proc_pid_mountinfo(5)).
fn mounts(table: &str) -> Vec<String> {
    let lines = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        fields.get(3)?.starts_with("net:[").then(|| fields.get(4).map(|path| unescape(path)))?
    });
    lines.collect()
}

/// A path in which some bytes are written as `\040`.
fn unescape(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(byte) => text.push_str(&format!("{}{}", char::from(byte), &part[3..])),
            None => text.push_str(&format!("\\{part}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_namespaces_are_found() {
        let table = "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     99 24 0:4 net:[4026532299] /run/netns/a\\040b rw shared:5 - nsfs nsfs rw\n\
                     98 24 0:4 mnt:[4026532300] /run/mnt/a rw - nsfs nsfs rw\n";
        assert_eq!(mounts(table), ["/run/netns/a b"]);
    }
}
