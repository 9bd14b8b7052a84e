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

static V4: Layout = Layout { target_offset: 88, next_offset: 90, size: 112 };
static V6: Layout = Layout { target_offset: 140, next_offset: 142, size: 168 };

fn layout(family: Family) -> &'static Layout {
    match family {
        Family::V4 => &V4,
        Family::V6 => &V6,
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
        let (info, entries) = read(family, table).map_err(|error| NetlinkError::Socket("read a table of ip_tables", error))?;
        let before = bytes.len();
        for place in Place::ALL.into_iter().filter(|place| place.table() == table) {
            print(&entries, layout(family), place.chain(), &mut bytes);
        }
        if table == "filter" && bytes.len() > before {
            print_forward(&FilterTable { family, info, entries }, &mut bytes);
        }
    }
    Ok(bytes)
}

fn entries(family: Family, table: &str) -> std::io::Result<Vec<u8>> {
    read(family, table).map(|(_, entries)| entries)
}

/// Reads the description of a table, and its entries.
fn read(family: Family, table: &str) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
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
            Ok(()) => return Ok((info, blob.split_off(ENTRIES))),
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

/// Appends the rules of FORWARD, with the names of the chains that they lead to: one that stops every packet makes a jump behind it void.
fn print_forward(table: &FilterTable, bytes: &mut Vec<u8>) {
    for rule in table.chains().forward {
        bytes.extend(rule.header);
        for (name, revision, info) in rule.matches {
            bytes.extend(name.as_bytes());
            bytes.push(revision);
            bytes.extend(info);
        }
        bytes.extend(rule.target.as_bytes());
        match rule.jump {
            Some(chain) => bytes.extend(chain.as_bytes()),
            None => bytes.extend(rule.standard.filter(|verdict| *verdict < 0).unwrap_or(0).to_ne_bytes()),
        }
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

    /// Its parts; `chain_at` names the chain at an offset.
    fn rule(&self, layout: &Layout, chain_at: impl Fn(i32) -> Option<String>) -> Rule<'a> {
        let bytes: &'a [u8] = self.bytes;
        let (mut matches, mut rest) = (Vec::new(), bytes.get(layout.size..self.target).unwrap_or_default());
        // struct xt_entry_match: size, name and revision; its data follows.
        while let Some(size) = u16_at(rest, 0).map(usize::from).filter(|size| *size >= TARGET)
            && let Some(one) = rest.get(..size)
        {
            matches.push((str_in(&one[2..31]).unwrap_or_default(), one[31], &one[TARGET..]));
            rest = &rest[size..];
        }
        let standard = self.verdict();
        Rule {
            header: &bytes[..layout.target_offset - 4],
            matches,
            target: self.target_name().unwrap_or_default(),
            standard,
            jump: standard.and_then(chain_at),
        }
    }

    fn print(&self, layout: &Layout, bytes: &mut Vec<u8>) {
        bytes.extend(&self.bytes[..layout.target_offset - 4]);
        bytes.extend(&self.bytes[layout.size..]);
    }
}

/// Whether a table has this chain. A table that does not exist is not created.
pub(crate) fn has_chain(family: Family, table: &str, chain: &str) -> bool {
    let is_there = tables(family).iter().any(|name| name == table);
    let entries = if is_there { entries(family, table).unwrap_or_default() } else { Vec::new() };
    walk(&entries, layout(family)).any(|(_, entry)| entry.error() == Some(chain))
}

/// Table filter, as the kernel returns it.
#[derive(Debug)]
pub(crate) struct FilterTable {
    family: Family,
    info: Vec<u8>,
    entries: Vec<u8>,
}

/// The chains of table filter that forwarded packets may pass.
#[derive(Debug, Default)]
pub(crate) struct Chains<'a> {
    /// The rules of FORWARD.
    pub(crate) forward: Vec<Rule<'a>>,
    pub(crate) drops_by_policy: bool,
    /// The rules of the other chains, by name.
    pub(crate) called: Vec<(String, Vec<Rule<'a>>)>,
}

/// A rule of ip_tables.
#[derive(Debug)]
pub(crate) struct Rule<'a> {
    /// `struct ipt_ip` or `struct ip6t_ip6`
    pub(crate) header: &'a [u8],
    /// Name, revision and data of each match extension.
    pub(crate) matches: Vec<(&'a str, u8, &'a [u8])>,
    /// The name of the target extension; empty for a standard target.
    pub(crate) target: &'a str,
    /// The verdict of a standard target.
    pub(crate) standard: Option<i32>,
    /// The chain that a standard target leads to.
    pub(crate) jump: Option<String>,
}

impl Rule<'_> {
    /// Whether evaluation does not come back from the chain.
    pub(crate) fn is_goto(&self, family: Family) -> bool {
        let (at, flag) = match family {
            Family::V4 => (82, 2),
            Family::V6 => (131, 4),
        };
        self.header.get(at).is_some_and(|flags| flags & flag != 0)
    }
}

/// Reads table filter; `None` if ip_tables does not have it.
pub(crate) fn filter_table(family: Family) -> Result<Option<FilterTable>, NetlinkError> {
    if !tables(family).iter().any(|name| name == "filter") {
        return Ok(None);
    }
    let (info, entries) = read(family, "filter").map_err(|error| NetlinkError::Socket("read a table of ip_tables", error))?;
    Ok(Some(FilterTable { family, info, entries }))
}

impl FilterTable {
    /// Its chains.
    pub(crate) fn chains(&self) -> Chains<'_> {
        const DROP: i32 = -1;
        let layout = layout(self.family);
        let all: Vec<(usize, Entry<'_>)> = walk(&self.entries, layout).collect();
        // struct ipt_getinfo: name, valid_hooks, hook_entry[5], underflow[5]; FORWARD is hook 2.
        let offset = |at| u32_at(&self.info, at).and_then(|offset| usize::try_from(offset).ok());
        let (Some(first), Some(policy)) = (offset(32 + 4 + 8), offset(32 + 4 + 20 + 8)) else { return Chains::default() };
        let heads: Vec<(usize, &str)> = all.iter().enumerate().filter_map(|(place, (_, entry))| Some((place, entry.error()?))).collect();
        // A jump leads to the entry behind the head of a chain.
        let chain_at = |to: i32| {
            let to = usize::try_from(to).ok()?;
            heads.iter().find(|(place, _)| all.get(place + 1).is_some_and(|(at, _)| *at == to)).map(|(_, name)| (*name).to_owned())
        };
        let rule = |place: usize| all[place].1.rule(layout, chain_at);
        let forward = (0..all.len()).filter(|place| (first..policy).contains(&all[*place].0)).map(rule).collect();
        let mut called = Vec::new();
        for (nth, (place, name)) in heads.iter().enumerate() {
            let end = heads.get(nth + 1).map_or(all.len(), |(next, _)| *next);
            // The last entry of a chain returns to the caller.
            called.push(((*name).to_owned(), (place + 1..end).map(rule).collect()));
        }
        let drops_by_policy = all.iter().find(|(at, _)| *at == policy).is_some_and(|(_, entry)| entry.verdict() == Some(DROP));
        Chains { forward, drops_by_policy, called }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_entries_end_the_walk() {
        let layout = layout(Family::V4);
        assert_eq!(walk(&[0; 300], layout).count(), 0);
        assert_eq!(walk(&[0xff; 300], layout).count(), 0);
        assert_eq!(walk(&[0; 8], layout).count(), 0);
    }
}
