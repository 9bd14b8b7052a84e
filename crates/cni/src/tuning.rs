//! `tuning`: sets sysctls and attributes of the attachment's interface in the container (specification, section 7.6). The
//! previous values of the attributes are kept in a file, and DEL restores them.

mod duplicates;

use std::fs;
use std::path::{Path, PathBuf};

use ::flannel::{IfName, Mac};
use kernel::file::{self, Existing, How};
use kernel::link::{self, LinkInfo};
use kernel::netlink::Socket;
use kernel::netns::Netns;
use kernel::sysctl;
use regex_lite::Regex;
use serde_json::{Map, Value, json};

use crate::chained::{failed, ifname, in_container, previous};
use crate::flannel::remove_file;
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, boolean, number, object, string, unicast_mac};
use crate::result::CniResult;

/// Patterns of sysctls that may be set, one per line. Without the file, all may be set.
const ALLOW_LIST: &str = "/etc/cni/tuning/allowlist.conf";

/// The validated configuration.
#[derive(Debug, Default)]
struct Config {
    sysctls: Vec<(String, String)>,
    mac: Option<Mac>,
    mtu: Option<u32>,
    promiscuous: bool,
    all_multicast: Option<bool>,
    tx_queue_len: Option<u32>,
    directory: PathBuf,
}

impl Config {
    /// Reads the configuration. `args.cni` takes precedence, as in the reference plugin. For the MAC, `runtimeConfig` comes
    /// second, `CNI_ARGS` third and the configuration last.
    fn new(request: &Request<'_>) -> Result<Config, CniError> {
        let conf = request.conf;
        let none = Map::new();
        let args = request.cni_args()?.unwrap_or(&none);
        let runtime = request.runtime_config()?.map(|runtime| string(runtime, "mac")).transpose()?.flatten();
        let mac = match string(args, "mac")?.or(runtime) {
            Some(text) => Some(text),
            None => request.arg("MAC")?.or(string(conf, "mac")?),
        };
        Ok(Config {
            sysctls: sysctls(request, args)?,
            mac: mac.map(|text| unicast_mac("mac", text)).transpose()?,
            mtu: number(args, "mtu")?.or(number(conf, "mtu")?).filter(|mtu| *mtu > 0),
            promiscuous: boolean(args, "promisc")?.or(boolean(conf, "promisc")?).unwrap_or(false),
            all_multicast: boolean(args, "allmulti")?.or(boolean(conf, "allmulti")?),
            tx_queue_len: number(args, "txQLen")?.or(number(conf, "txQLen")?),
            directory: directory(string(conf, "dataDir")?),
        })
    }

    fn changes_the_link(&self) -> bool {
        self.mac.is_some() || self.mtu.is_some() || self.promiscuous || self.all_multicast.is_some() || self.tx_queue_len.is_some()
    }
}

fn directory(configured: Option<&str>) -> PathBuf {
    PathBuf::from(configured.unwrap_or("/run/cni/tuning"))
}

/// The sysctls, as paths below `/proc/sys`. Those of `args.cni` replace those of the configuration.
fn sysctls(request: &Request<'_>, args: &Map<String, Value>) -> Result<Vec<(String, String)>, CniError> {
    if let Some(name) = duplicates::first(request.text, "sysctl") {
        return Err(CniError::config(format!("sysctl: duplicated key {name:?}: give it one value")));
    }
    let mut found: Vec<(String, String)> = Vec::new();
    let allowed = allow_list(Path::new(ALLOW_LIST))?;
    let both = [object(request.conf, "sysctl")?, object(args, "sysctl")?];
    for (name, value) in both.into_iter().flatten().flatten() {
        let value = value.as_str().ok_or_else(|| CniError::decode(format!("sysctl: {name}: its value must be a string")))?;
        let path = sysctl_path(name).replace("IFNAME", request.ifname);
        let plain = path.starts_with("net/") && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !plain {
            return Err(CniError::config(format!("sysctl: {name}: only sysctls below net can be set for a container")));
        }
        if let Some(allowed) = &allowed
            && !allowed.iter().any(|regex| regex.is_match(name) || regex.is_match(&path))
        {
            return Err(CniError::config(format!("sysctl: {name}: {ALLOW_LIST} does not allow it")));
        }
        found.retain(|(known, _)| *known != path);
        found.push((path, value.to_owned()));
    }
    Ok(found)
}

/// The path of a sysctl. As in sysctl(8), the first separator decides. In a name with dots, a slash stands for a dot of an
/// interface's name; a name with slashes is the path itself.
fn sysctl_path(name: &str) -> String {
    let swapped = |char| match char {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    match name.find(['.', '/']).map(|at| name.as_bytes()[at]) {
        Some(b'.') => name.chars().map(swapped).collect(),
        _ => name.to_owned(),
    }
}

fn allow_list(file: &Path) -> Result<Option<Vec<Regex>>, CniError> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CniError::new(5, format!("cannot read {}: {error}", file.display()))),
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let regexes = lines.map(|line| Regex::new(line).map_err(|error| CniError::config(format!("{}: {line}: {error}", file.display()))));
    regexes.collect::<Result<Vec<_>, _>>().map(Some)
}

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => add(request, &Config::new(request)?).map(Some),
        Command::Del => {
            // An error is only printed: the interface is usually deleted with the container.
            if let Err(error) = restore(request) {
                eprintln!("tuning: {error}");
            }
            Ok(None)
        }
        Command::Check => check(request, &Config::new(request)?).map(|()| None),
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

fn backup(config_directory: &Path, request: &Request<'_>) -> PathBuf {
    config_directory.join(format!("{}_{}.json", request.container_id, request.ifname))
}

fn read(socket: &mut Socket, name: IfName) -> Result<LinkInfo, CniError> {
    let found = link::get(socket, name).map_err(failed(format!("read {name} in the container")))?;
    found.ok_or_else(|| CniError::failed(format!("{name} does not exist in the container")))
}

fn add(request: &Request<'_>, config: &Config) -> Result<CniResult, CniError> {
    let mut result = previous(request)?;
    let (netns, name) = (open_netns(request)?, ifname(request)?);
    if config.changes_the_link() {
        let before = in_container(&netns, |socket| read(socket, name))?;
        keep(&backup(&config.directory, request), &before, config)?;
    }
    let changed = change(&netns, name, config);
    if changed.is_err() {
        // The error of the ADD is reported.
        let _ = restore(request);
    }
    let Some(now) = changed? else { return Ok(result) };
    if let Some(interface) = result.interfaces.iter_mut().find(|i| i.name == request.ifname && !i.sandbox.is_empty()) {
        if config.mac.is_some() {
            interface.mac = now.mac.map(|mac| mac.to_string()).unwrap_or_default();
        }
        if config.mtu.is_some() {
            interface.mtu = now.mtu;
        }
    }
    Ok(result)
}

/// Saves the values that are about to be changed. A file of an earlier ADD is kept, because it has the original values.
fn keep(file: &Path, before: &LinkInfo, config: &Config) -> Result<(), CniError> {
    let mut object = Map::new();
    if config.mac.is_some() {
        object.insert("mac".to_owned(), before.mac.map(|mac| mac.to_string()).into());
    }
    if config.promiscuous {
        object.insert("promisc".to_owned(), before.promiscuous.into());
    }
    if config.all_multicast.is_some() {
        object.insert("allmulti".to_owned(), before.all_multicast.into());
    }
    if config.mtu.is_some() {
        object.insert("mtu".to_owned(), before.mtu.into());
    }
    if config.tx_queue_len.is_some() {
        object.insert("txQLen".to_owned(), before.tx_queue_len.into());
    }
    let how = How { mode: 0o600, durable: false, existing: Existing::Keep };
    match file::put(file, json!(object).to_string().as_bytes(), how, |_| Ok(())) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(CniError::new(5, format!("dataDir: cannot write {}: {error}", file.display())))
        }
        _ => Ok(()),
    }
}

/// Sets the sysctls, and the configured attributes of the interface. Sysctls alone do not need the interface.
fn change(netns: &Netns, name: IfName, config: &Config) -> Result<Option<LinkInfo>, CniError> {
    in_container(netns, |socket| {
        for (path, value) in &config.sysctls {
            // Some sysctls are write-only.
            if matches!(sysctl::read(path), Ok(None)) {
                return Err(CniError::failed(format!("sysctl: the kernel has no {path}")));
            }
            sysctl::write(path, value).map_err(|error| CniError::failed(error.to_string()))?;
        }
        if !config.changes_the_link() {
            return Ok(None);
        }
        let before = read(socket, name)?;
        if let Some(mac) = config.mac {
            // Some drivers can change the MAC only while the link is down.
            let changed = link::set_mac(socket, before.index, mac).or_else(|_| {
                link::set_up(socket, before.index, false)?;
                link::set_mac(socket, before.index, mac)?;
                link::set_up(socket, before.index, before.up)
            });
            changed.map_err(failed(format!("set the MAC of {name}")))?;
        }
        if config.promiscuous {
            link::set_promiscuous(socket, before.index, true).map_err(failed(format!("make {name} promiscuous")))?;
        }
        if let Some(on) = config.all_multicast {
            link::set_all_multicast(socket, before.index, on).map_err(failed(format!("set all-multicast of {name}")))?;
        }
        if let Some(mtu) = config.mtu {
            link::set_mtu(socket, before.index, mtu).map_err(failed(format!("set the MTU of {name} to {mtu} (field mtu)")))?;
        }
        if let Some(length) = config.tx_queue_len {
            link::set_tx_queue_len(socket, before.index, length)
                .map_err(failed(format!("set the queue length of {name} to {length} (field txQLen)")))?;
        }
        read(socket, name).map(Some)
    })
}

fn restore(request: &Request<'_>) -> Result<(), CniError> {
    let file = backup(&directory(string(request.conf, "dataDir").ok().flatten()), request);
    let Ok(text) = fs::read_to_string(&file) else { return Ok(()) };
    // Removed first: if the interface is gone, there is nothing to restore.
    remove_file(&file)?;
    if let (Some(path), Ok(Value::Object(before))) = (request.netns, serde_json::from_str(&text))
        && let Ok(netns) = Netns::open(path)
    {
        let config = Config {
            mac: string(&before, "mac")?.and_then(|mac| mac.parse().ok()),
            mtu: number(&before, "mtu")?,
            all_multicast: boolean(&before, "allmulti")?,
            tx_queue_len: number(&before, "txQLen")?,
            ..Config::default()
        };
        let name = ifname(request)?;
        change(&netns, name, &config)?;
        if boolean(&before, "promisc")? == Some(false) {
            in_container(&netns, |socket| {
                let index = read(socket, name)?.index;
                link::set_promiscuous(socket, index, false).map_err(failed(format!("make {name} not promiscuous")))
            })?;
        }
    }
    Ok(())
}

fn check(request: &Request<'_>, config: &Config) -> Result<(), CniError> {
    previous(request)?;
    let (netns, name) = (open_netns(request)?, ifname(request)?);
    let wrong = |what: &str| CniError::failed(format!("{name}: {what} differs from the configuration"));
    in_container(&netns, |socket| {
        for (path, value) in &config.sysctls {
            let have = match sysctl::read(path) {
                // A write-only sysctl cannot be compared.
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => continue,
                have => have.ok().flatten().unwrap_or_default(),
            };
            if !have.split_whitespace().eq(value.split_whitespace()) {
                return Err(CniError::failed(format!("sysctl: {path} is {have:?} instead of {value:?}")));
            }
        }
        if !config.changes_the_link() {
            return Ok(());
        }
        let now = read(socket, name)?;
        for (is_right, what) in [
            (config.mac.is_none_or(|mac| now.mac == Some(mac)), "the MAC"),
            (config.mtu.is_none_or(|mtu| now.mtu == mtu), "the MTU"),
            (!config.promiscuous || now.promiscuous, "promiscuous mode"),
            (config.all_multicast.is_none_or(|on| now.all_multicast == on), "all-multicast mode"),
            (config.tx_queue_len.is_none_or(|length| now.tx_queue_len == length), "the queue length"),
        ] {
            if !is_right {
                return Err(wrong(what));
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_follow_their_first_separator() {
        for (name, path) in [
            ("net.ipv4.conf.eth0.log_martians", "net/ipv4/conf/eth0/log_martians"),
            ("net.ipv4.conf.eth0/798.log_martians", "net/ipv4/conf/eth0.798/log_martians"),
            ("net/ipv4/conf/eth0.798/log_martians", "net/ipv4/conf/eth0.798/log_martians"),
        ] {
            assert_eq!(sysctl_path(name), path);
        }
    }
}
