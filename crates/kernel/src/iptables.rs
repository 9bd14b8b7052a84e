//! iptables by its programs. They are started only when something is to be read or written: whether our chains are as
//! they were is told by a fingerprint, which the kernel gives without any process.

mod legacy;

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

/// A program may wait five seconds for the lock of iptables, and a table of a large cluster's services has some megabytes.
const LIMITS: Limits = Limits { time: Duration::from_secs(30), output: 64 << 20 };

/// The packet filter that the host's `iptables` writes to, and whether it can choose source ports at random
/// (`--random-fully`, since 1.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// nf_tables or ip_tables.
    pub variant: Variant,
    /// Is there `--random-fully`?
    pub random_fully: bool,
}

/// Asks the installed iptables of a family what it is; `None` if there is none.
pub fn installed(family: Family) -> Option<Installed> {
    let program = find(stem(family))?;
    version(&run(Command::new(program).arg("--version"), "").ok()?)
}

/// Reads `iptables v1.8.9 (nf_tables)`; releases before 1.8 name no variant and are legacy.
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

/// A program in PATH, or where administrators' programs are.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// What was read lately, so that it is not read again while nothing changes.
#[derive(Debug, Default)]
pub(crate) struct Cache(BTreeMap<(Family, Variant), (Fingerprint, Chains)>);

/// Our chains, with what others have in them.
type Chains = Vec<(Place, Saved)>;

/// The kernel's form of our chains and of the jumps to them, without counters. Empty: there are none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Fingerprint(Vec<u8>);

/// Our chains in one packet filter.
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
        saved = ["nat", "filter"].iter().map(|table| save(family, variant, table)).collect::<Result<Vec<_>, _>>()?.concat();
    }
    cache.0.insert((family, variant), (now, saved.clone()));
    Ok(saved)
}

/// Makes our chains be as wanted; with no chains, gone.
pub(crate) fn set(netfilter: Option<&mut Socket>, cache: &mut Cache, wanted: &Iptables, networks: &[Subnet]) -> Result<(), NetlinkError> {
    let (family, variant) = (wanted.family, wanted.variant);
    // Another flanneld on this host, or a plugin, may be at the same chains.
    let _lock = crate::lock::lock().map_err(|error| NetlinkError::Socket("lock the namespace", error))?;
    let saved = saved(netfilter, cache, family, variant)?;
    let text = restore(wanted, &saved, networks);
    if text.is_empty() {
        return Ok(());
    }
    cache.0.remove(&(family, variant));
    let mut command = program(family, variant, "restore")?;
    command.arg("--noflush");
    if variant == Variant::Legacy && installed(family).is_some_and(|found| found.random_fully) {
        // Both came with release 1.6.2. Another program may hold the lock; the other objects are not to wait long for it.
        command.arg("--wait=2");
    }
    run(&mut command, &text).map(drop)
}

/// A table as the host's `iptables-save` prints it.
///
/// # Errors
/// When there is no such program, or what it says.
pub fn save_text(family: Family, table: &str) -> Result<String, NetlinkError> {
    run(plain(family, "save")?.args(["-t", table]), "")
}

/// Gives text to the host's `iptables-restore --noflush`: a table is changed in one step.
///
/// # Errors
/// When there is no such program, or what it says.
pub fn restore_text(family: Family, text: &str) -> Result<(), NetlinkError> {
    run(plain(family, "restore")?.args(["--noflush", "--wait=5"]), text).map(drop)
}

/// May a table of iptables have this chain? Asked of the kernel, without a process: no means no; yes means that somebody
/// uses that table of ip_tables, whose chains only its program lists.
pub fn may_have_chain(family: Family, table: &str, chain: &str) -> bool {
    let in_nf_tables = Socket::open(Protocol::Netfilter).and_then(|mut socket| nft::has_chain(&mut socket, family, table, chain));
    in_nf_tables.unwrap_or(true) || legacy::tables(family).iter().any(|name| name == table)
}

/// Are there programs of iptables for a family?
pub fn has_programs(family: Family) -> bool {
    plain(family, "save").is_ok() && plain(family, "restore").is_ok()
}

fn plain(family: Family, verb: &str) -> Result<Command, NetlinkError> {
    let name = format!("{}-{verb}", stem(family));
    let missing = || NetlinkError::Refused { errno: libc::ENOENT, message: format!("there is no {name} on this host: install iptables") };
    find(&name).map(Command::new).ok_or_else(missing)
}

fn save(family: Family, variant: Variant, table: &str) -> Result<Chains, NetlinkError> {
    let text = run(program(family, variant, "save")?.args(["-t", table]), "")?;
    // It ends well when it could not read the table: somebody has put there what only nft understands.
    if text.contains("is incompatible, use 'nft' tool") {
        let message = format!("table {table} has rules that {} cannot read; set EnableNFTables to true", stem(family));
        return Err(NetlinkError::Refused { errno: libc::EOPNOTSUPP, message });
    }
    Ok(parse_save(table, &text))
}

/// `iptables-nft-save` and the like; where there is no such name, `iptables-save` if that is of the wanted variant.
fn program(family: Family, variant: Variant, verb: &str) -> Result<Command, NetlinkError> {
    let stem = stem(family);
    let named = find(&format!("{stem}-{variant}-{verb}"));
    let plain = || find(&format!("{stem}-{verb}")).filter(|_| installed(family).is_some_and(|found| found.variant == variant));
    let program = named.or_else(plain).ok_or_else(|| NetlinkError::Refused {
        errno: libc::ENOENT,
        message: format!("there is no {stem}-{verb} for {variant} rules on this host: install iptables"),
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

/// What nf_tables holds of our chains: their rules whole, and of the base chains the rules that name ours.
fn fingerprint(socket: &mut Socket, family: Family) -> Result<Fingerprint, NetlinkError> {
    let mut bytes = Vec::new();
    for place in Place::ALL {
        for (chain, whole) in [(place.chain(), true), (place.base(), false)] {
            if whole && nft::has_chain(socket, family, place.table(), chain)? {
                bytes.extend(chain.as_bytes());
            }
            for expressions in nft::raw_rules(socket, family, place.table(), chain)? {
                if whole || names(&expressions, place.chain()) {
                    nft::without_counters(&expressions, &mut bytes);
                }
            }
        }
    }
    Ok(Fingerprint(bytes))
}

/// Is the chain's name somewhere in these bytes?
fn names(bytes: &[u8], chain: &str) -> bool {
    let mut name = chain.as_bytes().to_vec();
    name.push(0);
    bytes.windows(name.len()).any(|window| str_in(window) == Some(chain) && window == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let read = |text| version(text).map(|found| (found.variant, found.random_fully));
        assert_eq!(read("iptables v1.8.9 (nf_tables)\n"), Some((Variant::Nft, true)));
        assert_eq!(read("ip6tables v1.8.7 (legacy)"), Some((Variant::Legacy, true)));
        assert_eq!(read("iptables v1.6.1"), Some((Variant::Legacy, false)));
        assert_eq!(read("iptables v1.6.2"), Some((Variant::Legacy, true)));
        assert_eq!(read("what?"), None);
    }
}
