//! Reads and writes iptables rules with the iptables programs. They run only if there is something to read or write: a fingerprint,
//! which is read from the kernel without a child process, shows whether the chains have changed.

pub(crate) mod legacy;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use flannel::traffic::iptables::{Iptables, Place, Saved, Variant, parse_save, restore};
use flannel::{Family, Subnet};

use crate::child::{self, Limits};
use crate::netlink::{NetlinkError, Protocol, Socket, str_in};
use crate::nft;

/// The limits of an iptables program: it may wait seconds for the xtables lock, and the tables of a large cluster have some megabytes.
const LIMITS: Limits = Limits { time: Duration::from_secs(30), output: 64 << 20 };

/// The packet filter that the host's `iptables` writes to, and whether it supports `--random-fully` (since 1.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// nf_tables or ip_tables.
    pub variant: Variant,
    /// Whether it supports `--random-fully`.
    pub random_fully: bool,
}

/// Detects the installed iptables of a family; `None` if it is not installed.
pub fn installed(family: Family) -> Option<Installed> {
    let program = find(stem(family))?;
    version(&run(Command::new(program).arg("--version"), "").ok()?)
}

/// Parses `iptables v1.8.9 (nf_tables)`; releases before 1.8 name no variant and are legacy.
fn version(text: &str) -> Option<Installed> {
    let numbers = text.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
    let numbers: Vec<u32> = numbers.split('.').map_while(|part| part.parse().ok()).collect();
    let variant = if text.contains("nf_tables") { Variant::Nft } else { Variant::Legacy };
    Some(Installed { variant, random_fully: numbers.as_slice() >= [1, 6, 2].as_slice() })
}

fn stem(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// Finds a program in PATH or in the system directories.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The chains that were read last, which are valid as long as the fingerprint does not change.
#[derive(Debug, Default)]
pub(crate) struct Cache(BTreeMap<(Family, Variant), (Fingerprint, Chains)>);

/// The daemon's chains with all their rules, including those of others.
type Chains = Vec<(Place, Saved)>;

/// The kernel's binary form of the daemon's chains and of the jumps to them, without counters; empty if there are none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Fingerprint(Vec<u8>);

/// Reads the daemon's chains in one packet filter.
pub(crate) fn observe(
    netfilter: Option<&mut Socket>,
    cache: &mut Cache,
    family: Family,
    variant: Variant,
    networks: &[Subnet],
) -> Result<Option<Iptables>, NetlinkError> {
    let saved = saved(netfilter, cache, family, variant)?;
    Ok(Iptables::read(family, variant, &saved, networks))
}

fn saved(netfilter: Option<&mut Socket>, cache: &mut Cache, family: Family, variant: Variant) -> Result<Chains, NetlinkError> {
    let now = match (variant, netfilter) {
        (Variant::Nft, None) => Fingerprint::default(),
        (Variant::Nft, Some(netfilter)) => match fingerprint(netfilter, family) {
            // A kernel without nf_tables holds no rules.
            Err(error) if matches!(error.errno(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)) => Fingerprint::default(),
            other => other?,
        },
        (Variant::Legacy, _) => Fingerprint(legacy::fingerprint(family)?),
    };
    if let Some((before, saved)) = cache.0.get(&(family, variant))
        && *before == now
    {
        return Ok(saved.clone());
    }
    let mut saved: Chains = Place::ALL.map(|place| (place, Saved::default())).into();
    if now != Fingerprint::default() {
        saved = save_all(family, variant)?;
    }
    cache.0.insert((family, variant), (now, saved.clone()));
    Ok(saved)
}

fn save_all(family: Family, variant: Variant) -> Result<Chains, NetlinkError> {
    Ok(["nat", "filter"].iter().map(|table| save(family, variant, table)).collect::<Result<Vec<_>, _>>()?.concat())
}

/// Sets the daemon's chains; without chains, deletes them.
pub(crate) fn set(netfilter: Option<&mut Socket>, cache: &mut Cache, wanted: &Iptables, networks: &[Subnet]) -> Result<(), NetlinkError> {
    let (family, variant) = (wanted.family, wanted.variant);
    // Another flanneld on this host, or a plugin, may change the same chains.
    let _lock = crate::lock::lock().map_err(|error| NetlinkError::Socket("lock the namespace", error))?;
    let mut saved = saved(netfilter, cache, family, variant)?;
    if !wanted.chains.is_empty() && saved.iter().all(|(_, saved)| *saved == Saved::default()) {
        // Nothing of the daemon's: the tables were not read, but the place of the jump depends on the other rules. Where they cannot be
        // read, the jump is appended.
        saved = save_all(family, variant).unwrap_or(saved);
    }
    let text = restore(wanted, &saved, networks);
    if text.is_empty() {
        return Ok(());
    }
    cache.0.remove(&(family, variant));
    let mut command = program(family, variant, "restore")?;
    command.arg("--noflush");
    if variant == Variant::Legacy && installed(family).is_some_and(|found| found.random_fully) {
        // --wait came with release 1.6.2, as --random-fully did. Another program may hold the lock, and other objects must not wait long.
        command.arg("--wait=2");
    }
    run(&mut command, &text).map(drop)
}

/// Reads a table with the host's `iptables-save`.
///
/// # Errors
/// When the program is not installed, or its error text.
pub fn save_text(family: Family, table: &str) -> Result<String, NetlinkError> {
    run(plain(family, "save")?.args(["-t", table]), "")
}

/// Changes tables with the host's `iptables-restore --noflush`, each in one step.
///
/// # Errors
/// When the program is not installed, or its error text.
pub fn restore_text(family: Family, text: &str) -> Result<(), NetlinkError> {
    run(plain(family, "restore")?.args(["--noflush", "--wait=5"]), text).map(drop)
}

/// Whether an iptables table may have this chain. This asks the kernel, without a child process. False is certain; true may only mean
/// that the ip_tables table is in use, whose chains only `iptables-legacy` can list.
pub fn may_have_chain(family: Family, table: &str, chain: &str) -> bool {
    let in_nf_tables = Socket::open(Protocol::Netfilter).and_then(|mut socket| nft::has_chain(&mut socket, family, table, chain));
    in_nf_tables.unwrap_or(true) || legacy::tables(family).iter().any(|name| name == table)
}

/// The same for several chains, in either family, with an open socket.
pub(crate) fn may_have_chains(socket: &mut Socket, table: &str, chains: &[String]) -> bool {
    let in_nf_tables =
        |socket: &mut Socket, family| chains.iter().any(|chain| nft::has_chain(socket, family, table, chain).unwrap_or(true));
    Family::ALL.into_iter().any(|family| in_nf_tables(socket, family) || legacy::tables(family).iter().any(|name| name == table))
}

/// Whether the iptables programs of a family are installed.
pub fn has_programs(family: Family) -> bool {
    plain(family, "save").is_ok() && plain(family, "restore").is_ok()
}

fn plain(family: Family, verb: &str) -> Result<Command, NetlinkError> {
    let name = format!("{}-{verb}", stem(family));
    let missing =
        || NetlinkError::Refused { errno: libc::ENOENT, message: format!("{name} is not installed on this host: install iptables") };
    find(&name).map(Command::new).ok_or_else(missing)
}

fn save(family: Family, variant: Variant, table: &str) -> Result<Chains, NetlinkError> {
    let text = run(program(family, variant, "save")?.args(["-t", table]), "")?;
    // The program exits with 0 even if it cannot read the table, because another program added rules that only nft understands.
    if text.contains("is incompatible, use 'nft' tool") {
        let message = format!("table {table} has rules that {} cannot read; set EnableNFTables to true", stem(family));
        return Err(NetlinkError::Refused { errno: libc::EOPNOTSUPP, message });
    }
    Ok(parse_save(table, &text))
}

/// Finds a program such as `iptables-nft-save`, or else `iptables-save` if that has the wanted variant.
fn program(family: Family, variant: Variant, verb: &str) -> Result<Command, NetlinkError> {
    let stem = stem(family);
    let named = find(&format!("{stem}-{variant}-{verb}"));
    let plain = || find(&format!("{stem}-{verb}")).filter(|_| installed(family).is_some_and(|found| found.variant == variant));
    let program = named.or_else(plain).ok_or_else(|| NetlinkError::Refused {
        errno: libc::ENOENT,
        message: format!("{stem}-{verb} for {variant} rules is not installed on this host: install iptables"),
    })?;
    Ok(Command::new(program))
}

fn run(command: &mut Command, input: &str) -> Result<String, NetlinkError> {
    let name = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("iptables")).to_string_lossy().into_owned();
    let failed = |errno: i32, text: &str| NetlinkError::Refused { errno, message: format!("{name}: {}", text.trim()) };
    let ended =
        child::run(command, input, LIMITS).map_err(|error| failed(error.raw_os_error().unwrap_or(libc::EIO), &error.to_string()))?;
    match ended.status {
        Some(_) if ended.is_cut => Err(failed(libc::EFBIG, &format!("it printed more than {} bytes", LIMITS.output))),
        Some(status) if status.success() => Ok(String::from_utf8_lossy(&ended.stdout).into_owned()),
        Some(_) => Err(failed(libc::EIO, &String::from_utf8_lossy(&ended.stderr))),
        None => Err(failed(libc::ETIMEDOUT, &format!("it did not end within {} s", LIMITS.time.as_secs()))),
    }
}

/// Reads the nf_tables form of the daemon's chains: all their rules, and those rules of the base chains that jump to them. If the daemon has
/// a chain for FORWARD, all rules of FORWARD count: one that stops every packet makes a jump behind it void.
fn fingerprint(socket: &mut Socket, family: Family) -> Result<Fingerprint, NetlinkError> {
    let mut bytes = Vec::new();
    for place in Place::ALL {
        let before = bytes.len();
        for (chain, whole) in [(place.chain(), true), (place.base(), false)] {
            if whole && nft::has_chain(socket, family, place.table(), chain)? {
                bytes.extend(chain.as_bytes());
            }
            let is_all = whole || (place == Place::Forward && bytes.len() > before);
            for expressions in nft::raw_rules(socket, family, place.table(), chain)? {
                if is_all || contains_name(&expressions, place.chain()) {
                    nft::without_counters(&expressions, &mut bytes);
                }
            }
        }
    }
    Ok(Fingerprint(bytes))
}

/// Whether these bytes contain the chain's name.
fn contains_name(bytes: &[u8], chain: &str) -> bool {
    let mut name = chain.as_bytes().to_vec();
    name.push(0);
    bytes.windows(name.len()).any(|window| str_in(window) == Some(chain) && window == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_names_variant_and_random_fully() {
        let read = |text| version(text).map(|found| (found.variant, found.random_fully));
        assert_eq!(read("iptables v1.8.9 (nf_tables)\n"), Some((Variant::Nft, true)));
        assert_eq!(read("ip6tables v1.8.7 (legacy)"), Some((Variant::Legacy, true)));
        assert_eq!(read("iptables v1.6.1"), Some((Variant::Legacy, false)));
        assert_eq!(read("iptables v1.6.2"), Some((Variant::Legacy, true)));
        assert_eq!(read("what?"), None);
    }
}
