//! Reads the daemon's chains from ip_tables by `getsockopt(2)`, as `iptables-legacy-save` does (`linux/netfilter_ipv4/ip_tables.h`,
//! `linux/netfilter/x_tables.h`).

use std::os::fd::AsFd;

use flannel::Family;
use flannel::traffic::iptables::Place;

use crate::netlink::{NetlinkError, str_in, u16_at, u32_at};
use crate::sys;

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`
const GET_INFO: libc::c_int = 64;
/// `IPT_SO_GET_ENTRIES` and `IP6T_SO_GET_ENTRIES`
const GET_ENTRIES: libc::c_int = 65;
/// `sizeof(struct ipt_getinfo)`: name, valid_hooks, five hook entries, five underflows, num_entries, size.
const INFO: usize = 32 + 4 + 20 + 20 + 4 + 4;
/// `offsetof(struct ipt_get_entries, entrytable)`: name and size, aligned to 8.
const ENTRIES: usize = 40;
/// `sizeof(struct xt_entry_target)`: size, name and revision; the data of the target follows.
const TARGET: usize = 32;

/// The offsets of fields in an entry (`struct ipt_entry`, `struct ip6t_entry`), which differ between the families.
struct Layout {
    /// Of `target_offset`; `next_offset`, `comefrom` and the counters follow. The four bytes before it are `nfcache`, in which the last
    /// writer of the table may leave any value; the bytes before that belong to the rule.
    target_offset: usize,
    /// Of `next_offset`.
    next_offset: usize,
    /// Of the matches.
    size: usize,
}

fn layout(family: Family) -> Layout {
    match family {
        Family::V4 => Layout { target_offset: 88, next_offset: 90, size: 112 },
        Family::V6 => Layout { target_offset: 140, next_offset: 142, size: 168 },
    }
}

/// Lists the tables that exist in this namespace. Reading a table that does not exist would create it.
pub(super) fn tables(family: Family) -> Vec<String> {
    let list = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    std::fs::read_to_string(list).unwrap_or_default().lines().map(ToOwned::to_owned).collect()
}

/// Reads the rules of the daemon's chains and the jumps to them, without counters and without offsets that other chains affect.
pub(super) fn fingerprint(family: Family) -> Result<Vec<u8>, NetlinkError> {
    let tables = tables(family);
    let mut bytes = Vec::new();
    for table in ["nat", "filter"].into_iter().filter(|table| tables.iter().any(|name| name == table)) {
        let entries = entries(family, table).map_err(|error| NetlinkError::Socket("read a table of ip_tables", error))?;
        for place in Place::ALL.into_iter().filter(|place| place.table() == table) {
            print(&entries, &layout(family), place.chain(), &mut bytes);
        }
    }
    Ok(bytes)
}

fn entries(family: Family, table: &str) -> std::io::Result<Vec<u8>> {
    let (domain, level) = match family {
        Family::V4 => (libc::AF_INET, libc::IPPROTO_IP),
        Family::V6 => (libc::AF_INET6, libc::IPPROTO_IPV6),
    };
    let socket = sys::socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    // The table may grow between the two requests.
    for _ in 0..10 {
        let mut info = vec![0; INFO];
        info[..table.len()].copy_from_slice(table.as_bytes());
        sys::get_option(socket.as_fd(), level, GET_INFO, &mut info)?;
        let size = u32_at(&info, INFO - 4).ok_or(std::io::ErrorKind::InvalidData)?;
        let mut blob = vec![0; ENTRIES + usize::try_from(size).map_err(|_| std::io::ErrorKind::InvalidData)?];
        blob[..table.len()].copy_from_slice(table.as_bytes());
        blob[32..36].copy_from_slice(&size.to_ne_bytes());
        match sys::get_option(socket.as_fd(), level, GET_ENTRIES, &mut blob) {
            Ok(()) => return Ok(blob.split_off(ENTRIES)),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::ErrorKind::ResourceBusy.into())
}

/// Appends the rules of one chain and the jumps to it.
fn print(entries: &[u8], layout: &Layout, chain: &str, bytes: &mut Vec<u8>) {
    let all: Vec<(usize, Entry<'_>)> = walk(entries, layout).collect();
    // A user chain starts with an entry whose target is ERROR with the chain's name; its rules follow, and jumps refer to the first of
    // them by its offset.
    let Some(head) = all.iter().position(|(_, entry)| entry.error() == Some(chain)) else { return };
    let first = all.get(head + 1).map_or(entries.len(), |(at, _)| *at);
    bytes.extend(chain.as_bytes());
    for (_, entry) in all[head + 1..].iter().take_while(|(_, entry)| entry.error().is_none()) {
        entry.print(layout, bytes);
    }
    for (_, entry) in all.iter().filter(|(_, entry)| entry.verdict().is_some_and(|to| usize::try_from(to) == Ok(first))) {
        bytes.extend(b"jump");
        bytes.extend(&entry.bytes[..layout.target_offset - 4]);
        bytes.extend(&entry.bytes[layout.size..entry.target]);
    }
}

fn walk<'a>(entries: &'a [u8], layout: &'a Layout) -> impl Iterator<Item = (usize, Entry<'a>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = entries.get(at..)?;
        let (target, next) = (usize::from(u16_at(rest, layout.target_offset)?), usize::from(u16_at(rest, layout.next_offset)?));
        let bytes = rest.get(..next).filter(|bytes| layout.size <= target && target + TARGET <= bytes.len())?;
        let entry = (at, Entry { bytes, target });
        at += next;
        Some(entry)
    })
}

/// A rule: header, matches, target.
struct Entry<'a> {
    bytes: &'a [u8],
    target: usize,
}

impl<'a> Entry<'a> {
    fn target_name(&self) -> Option<&'a str> {
        str_in(self.bytes.get(self.target + 2..self.target + 31)?)
    }

    /// The name in an ERROR target.
    fn error(&self) -> Option<&'a str> {
        if self.target_name()? == "ERROR" { str_in(self.bytes.get(self.target + TARGET..)?) } else { None }
    }

    /// The verdict of a standard target: negative, or the offset at which evaluation continues.
    fn verdict(&self) -> Option<i32> {
        if self.target_name()?.is_empty() { u32_at(self.bytes, self.target + TARGET).map(u32::cast_signed) } else { None }
    }

    fn print(&self, layout: &Layout, bytes: &mut Vec<u8>) {
        bytes.extend(&self.bytes[..layout.target_offset - 4]);
        bytes.extend(&self.bytes[layout.size..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_entries_end_the_walk() {
        let layout = layout(Family::V4);
        assert_eq!(walk(&[0; 300], &layout).count(), 0);
        assert_eq!(walk(&[0xff; 300], &layout).count(), 0);
        assert_eq!(walk(&[0; 8], &layout).count(), 0);
    }
}
