//! `portmap`: ports of the host that lead to ports of the container (specification, section 7.5). In nftables unless the
//! configuration says iptables; a DEL looks in both.

use std::net::IpAddr;

use ::flannel::{Cidr, Family};
use kernel::hostport::{self, Mapping, Snat};
use kernel::netlink::{Protocol, Socket};
use kernel::pod_rules::Rules;
use kernel::{conntrack, link, route, sysctl};
use serde_json::Value;

use crate::chained::{container_address, failed, host_end, note, previous};
use crate::chains::{Table, comment, given_name, name};
use crate::lock;
use crate::protocol::{CniError, Command, Request, array, boolean, number, object, string};
use crate::result::CniResult;

const SETMARK: &str = "CNI-HOSTPORT-SETMARK";
const MASQ: &str = "CNI-HOSTPORT-MASQ";
const DNAT: &str = "CNI-HOSTPORT-DNAT";
/// Ports that one `multiport` match takes.
const MULTIPORT: usize = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Nftables,
    Iptables,
}

/// The validated configuration.
#[derive(Debug)]
struct Config {
    backend: Backend,
    snat: Snat,
    /// The bit of the packet mark that says "masquerade".
    mark_bit: u32,
    /// The chain that sets somebody else's mark instead.
    set_mark_chain: Option<String>,
    conditions: [Vec<String>; 2],
    mappings: Vec<Mapping>,
}

impl Config {
    fn new(request: &Request) -> Result<Config, CniError> {
        let conf = &request.conf;
        let set_mark_chain = string(conf, "externalSetMarkChain")?
            .map(|name| given_name("externalSetMarkChain", name).map(ToOwned::to_owned))
            .transpose()?;
        let mark = number(conf, "markMasqBit")?;
        if set_mark_chain.is_some() && mark.is_some() {
            return Err(CniError::config("markMasqBit, externalSetMarkChain: give one of them"));
        }
        if mark.is_some_and(|bit| bit > 31) {
            return Err(CniError::config("markMasqBit: it must be 0 to 31"));
        }
        let conditions = [conditions(request, "conditionsV4")?, conditions(request, "conditionsV6")?];
        // Rules in the words of iptables need iptables.
        let for_iptables = set_mark_chain.is_some() || mark.is_some() || conditions.iter().any(|list| !list.is_empty());
        let backend = match string(conf, "backend")? {
            Some("iptables") => Backend::Iptables,
            Some("nftables") if for_iptables => {
                return Err(CniError::config("backend: markMasqBit, externalSetMarkChain and conditions are for iptables"));
            }
            Some("nftables") => Backend::Nftables,
            Some(other) => return Err(CniError::config(format!("backend: {other:?} is neither \"iptables\" nor \"nftables\""))),
            None if for_iptables => Backend::Iptables,
            None => Backend::Nftables,
        };
        let snat = match (boolean(conf, "snat")?.unwrap_or(true), boolean(conf, "masqAll")?.unwrap_or(false)) {
            (false, _) => Snat::No,
            (true, false) => Snat::Local,
            (true, true) => Snat::All,
        };
        Ok(Config { backend, snat, mark_bit: mark.unwrap_or(13), set_mark_chain, conditions, mappings: mappings(request)? })
    }
}

fn conditions(request: &Request, name: &str) -> Result<Vec<String>, CniError> {
    let list = array(&request.conf, name)?.map(Vec::as_slice).unwrap_or_default();
    let word = |value: &Value| {
        let word = value.as_str().filter(|word| !word.contains(['"', '\n', '\\']));
        word.map(ToOwned::to_owned).ok_or_else(|| CniError::config(format!("{name}: it must be a list of plain words")))
    };
    list.iter().map(word).collect()
}

fn mappings(request: &Request) -> Result<Vec<Mapping>, CniError> {
    let runtime = object(&request.conf, "runtimeConfig")?;
    let list = runtime.map(|runtime| array(runtime, "portMappings")).transpose()?.flatten().map(Vec::as_slice).unwrap_or_default();
    let bad = |what: String| CniError::config(format!("runtimeConfig.portMappings: {what}"));
    let read = |value: &Value| {
        let map = value.as_object().ok_or_else(|| bad("each must be an object".to_owned()))?;
        let port = |name: &str| {
            let port = number(map, name)?.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
            port.ok_or_else(|| bad(format!("{name}: it must be 1 to 65535")))
        };
        let protocol = match string(map, "protocol")?.unwrap_or("tcp").to_lowercase().as_str() {
            "tcp" => 6,
            "udp" => 17,
            "sctp" => 132,
            other => return Err(bad(format!("protocol: {other:?} is none of tcp, udp and sctp"))),
        };
        let host_ip = string(map, "hostIP")?.filter(|text| !text.is_empty());
        let host_ip = host_ip.map(|text| text.parse::<IpAddr>().map_err(|_| bad(format!("hostIP: {text:?} is no address")))).transpose()?;
        Ok(Mapping { protocol, host_port: port("hostPort")?, container_port: port("containerPort")?, host_ip })
    };
    list.iter().map(read).collect()
}

pub(crate) fn run(request: &Request) -> Result<Option<CniResult>, CniError> {
    let config = Config::new(request)?;
    match request.command {
        Command::Add => {
            let result = previous(request)?;
            if config.mappings.is_empty() {
                return Ok(Some(result));
            }
            let added = Family::ALL.into_iter().try_for_each(|family| add(request, &config, &result, family));
            if added.is_err() {
                // The error that led here is the one to report.
                let _ = remove(request);
            }
            added.map(|()| Some(result))
        }
        Command::Del => {
            if config.mappings.is_empty() {
                return Ok(None);
            }
            remove(request).map(|()| None)
        }
        Command::Check => check(request, &config, &previous(request)?).map(|()| None),
        // Rules name their container, but not the network, so what is stale cannot be told from what is another network's.
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

/// The mappings that concern a family.
fn of_family(mappings: &[Mapping], family: Family) -> Vec<Mapping> {
    mappings.iter().filter(|mapping| mapping.host_ip.is_none_or(|ip| Family::of(ip) == family)).copied().collect()
}

fn add(request: &Request, config: &Config, result: &CniResult, family: Family) -> Result<(), CniError> {
    let (Some(container), mappings) = (container_address(result, request, family), of_family(&config.mappings, family)) else {
        return Ok(());
    };
    if mappings.is_empty() {
        return Ok(());
    }
    match config.backend {
        Backend::Nftables => {
            // The first one makes the chains, and the rules that all share.
            let _lock = lock::host()?;
            let notes = lock::notes()?;
            let id = &request.container_id;
            hostport::add(id, container, &mappings, config.snat).map_err(failed("map the container's ports"))?;
            if let Some(end) = host_end(result) {
                let rules = Rules::Ports { id: id.clone(), container, mappings: mappings.clone(), snat: config.snat };
                note(&notes, end, request, rules);
            }
        }
        Backend::Iptables => add_iptables(request, config, container, &mappings)?,
    }
    if family == Family::V4 && config.snat != Snat::No {
        // Without it the kernel drops what goes from 127.0.0.1 to a container.
        let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
        let oif = route::reach(&mut socket, container.addr).map_err(failed(format!("find the way to {}", container.addr)))?.oif;
        let interface = link::get_index(&mut socket, oif).map_err(failed("read the interface to the container"))?;
        if let Some(interface) = interface {
            sysctl::write(&format!("net/ipv4/conf/{}/route_localnet", interface.name), "1")
                .map_err(|error| CniError::failed(error.to_string()))?;
        }
    }
    let udp: Vec<u16> = mappings.iter().filter(|mapping| mapping.protocol == 17).map(|mapping| mapping.host_port).collect();
    if let Err(error) = conntrack::forget_udp(family, &udp) {
        eprintln!("portmap: cannot forget old UDP connections to ports {udp:?}: {error}");
    }
    Ok(())
}

fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        6 => "tcp",
        17 => "udp",
        _ => "sctp",
    }
}

/// A container's own chain.
fn own_chain(request: &Request) -> String {
    name("CNI-DN-", &request.name, &request.container_id)
}

fn add_iptables(request: &Request, config: &Config, container: Cidr, mappings: &[Mapping]) -> Result<(), CniError> {
    let family = Family::of(container.addr);
    let mut table = Table::read(family, "nat")?;
    let mark = 1u64 << config.mark_bit;
    let set_mark = config.set_mark_chain.clone().unwrap_or_else(|| SETMARK.to_owned());
    if config.snat != Snat::No && config.set_mark_chain.is_none() {
        table.ensure_chain(SETMARK, &[format!("{} -j MARK --set-xmark {mark:#x}/{mark:#x}", comment("CNI portfwd masquerade mark"))]);
        table.ensure_chain(MASQ, &[format!("-m mark --mark {mark:#x}/{mark:#x} -j MASQUERADE")]);
        table.ensure_jump("POSTROUTING", &format!("{} -j {MASQ}", comment("CNI portfwd requiring masquerade")), true);
    }
    table.ensure_chain(DNAT, &[]);
    for base in ["PREROUTING", "OUTPUT"] {
        table.ensure_jump(base, &format!("-m addrtype --dst-type LOCAL -j {DNAT}"), false);
    }
    let chain = own_chain(request);
    let sources: Vec<String> = match (config.snat, family) {
        (Snat::No, _) => Vec::new(),
        (Snat::All, Family::V4) => vec!["0.0.0.0/0".to_owned()],
        (Snat::All, Family::V6) => vec!["::/0".to_owned()],
        (Snat::Local, Family::V4) => vec![container.subnet().to_string(), "127.0.0.1/32".to_owned()],
        (Snat::Local, Family::V6) => vec![container.subnet().to_string()],
    };
    let mut rules = Vec::new();
    for mapping in mappings {
        let protocol = protocol_name(mapping.protocol);
        let host = mapping.host_ip.filter(|ip| !ip.is_unspecified()).map_or(String::new(), |ip| format!("-d {ip} "));
        let port = format!("-p {protocol} -m {protocol} --dport {}", mapping.host_port);
        rules.extend(sources.iter().map(|source| format!("-s {source} {host}{port} -j {set_mark}")));
        let to = match container.addr {
            IpAddr::V4(ip) => format!("{ip}:{}", mapping.container_port),
            IpAddr::V6(ip) => format!("[{ip}]:{}", mapping.container_port),
        };
        rules.push(format!("{host}{port} -j DNAT --to-destination {to}"));
    }
    table.replace_chain(&chain, &rules);
    // The entries of an earlier ADD of this container go.
    let jump = format!("-j {chain}");
    table.remove_rules(DNAT, |rule| rule.ends_with(&jump));
    let text = comment(&format!("dnat name: \"{}\" id: \"{}\"", request.name, request.container_id));
    let extra = config.conditions[if family == Family::V4 { 0 } else { 1 }].join(" ");
    let extra = if extra.is_empty() { extra } else { format!(" {extra}") };
    for protocol in [6, 17, 132] {
        let mut ports: Vec<String> = mappings.iter().filter(|m| m.protocol == protocol).map(|m| m.host_port.to_string()).collect();
        ports.dedup();
        for ports in ports.chunks(MULTIPORT) {
            let list = ports.join(",");
            table.append(DNAT, &format!("-p {} {text} -m multiport --destination-ports {list}{extra} -j {chain}", protocol_name(protocol)));
        }
    }
    table.write()
}

fn remove(request: &Request) -> Result<(), CniError> {
    let notes = lock::notes()?;
    notes.forget_ports(&request.container_id, &request.ifname);
    let _removal = hostport::remove(&request.container_id).map_err(failed("remove the container's port mappings"))?;
    // Others need not wait for what the kernel does then.
    drop(notes);
    let chain = own_chain(request);
    for family in Family::ALL {
        if let Some(mut table) = Table::read_if_chain(family, "nat", &chain)? {
            table.remove_chain(&chain, &[DNAT]);
            table.write()?;
        }
    }
    Ok(())
}

fn check(request: &Request, config: &Config, result: &CniResult) -> Result<(), CniError> {
    for family in Family::ALL {
        let mappings = of_family(&config.mappings, family);
        if container_address(result, request, family).is_none() || mappings.is_empty() {
            continue;
        }
        let complete = match config.backend {
            Backend::Nftables => {
                hostport::count(&request.container_id, family).map_err(failed("read the port mappings"))? == mappings.len()
            }
            Backend::Iptables => {
                let chain = own_chain(request);
                let table = Table::read_if_chain(family, "nat", &chain)?;
                table.is_some_and(|table| {
                    table.rules(DNAT).iter().any(|rule| rule.ends_with(&format!("-j {chain}")))
                        && table.rules(&chain).iter().filter(|rule| rule.contains("-j DNAT")).count() == mappings.len()
                })
            }
        };
        if !complete {
            return Err(CniError::failed(format!("{family} port mappings of container {} are gone", request.container_id)));
        }
    }
    Ok(())
}
