//! `tuning`: sysctls and attributes of the attachment's interface in the container (specification, section 7.6). What an
//! interface was before is kept in a file, and put back by DEL.

use std::fs;
use std::path::{Path, PathBuf};

use ::flannel::{IfName, Mac};
use kernel::link::{self, LinkInfo};
use kernel::netlink::Socket;
use kernel::netns::Netns;
use kernel::sysctl;
use regex_lite::Regex;
use serde_json::{Map, Value, json};

use crate::chained::{failed, ifname, in_container, previous, previous_if_any};
use crate::flannel::remove_file;
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, boolean, number, object, string};
use crate::result::CniResult;

/// Patterns of sysctls that may be set, one a line; without the file all may.
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
    fn new(request: &Request) -> Result<Config, CniError> {
        let conf = &request.conf;
        let runtime = object(conf, "runtimeConfig")?.map(|runtime| string(runtime, "mac")).transpose()?.flatten();
        let cni = object(conf, "args")?.map(|args| object(args, "cni")).transpose()?.flatten();
        let args = cni.map(|cni| string(cni, "mac")).transpose()?.flatten();
        let text = match runtime.or(args) {
            Some(text) => Some(text),
            None => request.arg("MAC")?,
        };
        let text = text.or(string(conf, "mac")?).filter(|text| !text.is_empty());
        let mac = text.map(|text| text.parse().map_err(|error| CniError::config(format!("mac: {error}")))).transpose()?;
        Ok(Config {
            sysctls: sysctls(request)?,
            mac,
            mtu: number(conf, "mtu")?.filter(|mtu| *mtu > 0),
            promiscuous: boolean(conf, "promisc")?.unwrap_or(false),
            all_multicast: boolean(conf, "allmulti")?,
            tx_queue_len: number(conf, "txQLen")?,
            directory: PathBuf::from(string(conf, "dataDir")?.unwrap_or("/run/cni/tuning")),
        })
    }

    fn changes_the_link(&self) -> bool {
        self.mac.is_some() || self.mtu.is_some() || self.promiscuous || self.all_multicast.is_some() || self.tx_queue_len.is_some()
    }
}

/// The sysctls, as paths below `/proc/sys`.
fn sysctls(request: &Request) -> Result<Vec<(String, String)>, CniError> {
    let mut found: Vec<(String, String)> = Vec::new();
    let allowed = allow_list(Path::new(ALLOW_LIST))?;
    for (name, value) in object(&request.conf, "sysctl")?.into_iter().flatten() {
        let value = value.as_str().ok_or_else(|| CniError::decode(format!("sysctl: {name}: its value must be a string")))?;
        // Dots separate, unless there are slashes: an interface's name may contain dots.
        let path = if name.contains('/') { name.clone() } else { name.replace('.', "/") };
        let path = path.replace("IFNAME", &request.ifname);
        let plain = path.starts_with("net/") && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !plain {
            return Err(CniError::config(format!("sysctl: {name}: only what is below net can be set for a container")));
        }
        if found.iter().any(|(known, _)| *known == path) {
            return Err(CniError::config(format!("sysctl: {name}: it is given twice")));
        }
        if let Some(allowed) = &allowed
            && !allowed.iter().any(|regex| regex.is_match(name) || regex.is_match(&path))
        {
            return Err(CniError::config(format!("sysctl: {name}: {ALLOW_LIST} does not allow it")));
        }
        found.push((path, value.to_owned()));
    }
    Ok(found)
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

pub(crate) fn run(request: &Request) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => add(request, &Config::new(request)?).map(Some),
        Command::Del => {
            // A container that goes takes its interface along: there is nothing that must not fail here.
            if let Err(error) = restore(request) {
                eprintln!("tuning: {error}");
            }
            Ok(None)
        }
        Command::Check => check(request, &Config::new(request)?).map(|()| None),
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

fn backup(config_directory: &Path, request: &Request) -> PathBuf {
    config_directory.join(format!("{}_{}.json", request.container_id, request.ifname))
}

fn read(socket: &mut Socket, name: IfName) -> Result<LinkInfo, CniError> {
    let found = link::get(socket, name).map_err(failed(format!("read {name} in the container")))?;
    found.ok_or_else(|| CniError::failed(format!("there is no {name} in the container")))
}

fn add(request: &Request, config: &Config) -> Result<CniResult, CniError> {
    let mut result = previous(request)?;
    let (netns, name) = (open_netns(request)?, ifname(request)?);
    if config.changes_the_link() {
        let before = in_container(&netns, |socket| read(socket, name))?;
        keep(&backup(&config.directory, request), &before, config)?;
    }
    let changed = change(&netns, name, config);
    if changed.is_err() {
        // The error that led here is the one to report.
        let _ = restore(request);
    }
    let now = changed?;
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

/// Keeps what an interface was, as far as it is going to be changed. An earlier file says more truly what it was.
fn keep(file: &Path, before: &LinkInfo, config: &Config) -> Result<(), CniError> {
    if file.exists() {
        return Ok(());
    }
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
    let write = || {
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
        // It is in the way of nobody else: a container's calls come one after another.
        let temporary = file.with_extension("new");
        fs::write(&temporary, json!(object).to_string())?;
        fs::rename(&temporary, file)
    };
    write().map_err(|error| CniError::new(5, format!("dataDir: cannot write {}: {error}", file.display())))
}

fn change(netns: &Netns, name: IfName, config: &Config) -> Result<LinkInfo, CniError> {
    in_container(netns, |socket| {
        for (path, value) in &config.sysctls {
            if sysctl::read(path).ok().flatten().is_none() {
                return Err(CniError::failed(format!("sysctl: the kernel has no {path}")));
            }
            sysctl::write(path, value).map_err(|error| CniError::failed(error.to_string()))?;
        }
        let before = read(socket, name)?;
        if let Some(mac) = config.mac {
            // Some drivers change it only while the link is down.
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
            link::set_mtu(socket, before.index, mtu).map_err(failed(format!("set the MTU of {name} to {mtu}")))?;
        }
        if let Some(length) = config.tx_queue_len {
            link::set_tx_queue_len(socket, before.index, length).map_err(failed(format!("set the queue length of {name}")))?;
        }
        read(socket, name)
    })
}

fn restore(request: &Request) -> Result<(), CniError> {
    let file = backup(Path::new(string(&request.conf, "dataDir")?.unwrap_or("/run/cni/tuning")), request);
    let Ok(text) = fs::read_to_string(&file) else { return Ok(()) };
    // Whatever comes of it: an interface that is gone needs nothing.
    remove_file(&file)?;
    if let (Some(path), Ok(Value::Object(before))) = (request.netns.as_deref(), serde_json::from_str(&text))
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

fn check(request: &Request, config: &Config) -> Result<(), CniError> {
    previous_if_any(request)?;
    let (netns, name) = (open_netns(request)?, ifname(request)?);
    let wrong = |what: &str| CniError::failed(format!("{name}: {what} is not as it was set"));
    in_container(&netns, |socket| {
        for (path, value) in &config.sysctls {
            let have = sysctl::read(path).ok().flatten().unwrap_or_default();
            if !have.split_whitespace().eq(value.split_whitespace()) {
                return Err(CniError::failed(format!("sysctl: {path} is not {value}")));
            }
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
