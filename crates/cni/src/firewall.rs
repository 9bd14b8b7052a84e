//! `firewall`: accepts a container's traffic even if the host's policy drops it, in firewalld if it runs, else in iptables. On
//! request it isolates bridges or containers from each other (specification, section 7.6).

mod dbus;
mod firewalld;

use std::net::IpAddr;

use ::flannel::{Family, IfName};
use kernel::link;
use kernel::netlink::{Protocol, Socket};

use self::firewalld::Firewalld;
use crate::chained::{addresses, failed, previous, previous_leniently};
use crate::chains::{Table, comment, validated_name};
use crate::protocol::{CniError, Command, Request, string};
use crate::result::CniResult;

const FORWARD: &str = "CNI-FORWARD";
const STAGE_1: &str = "CNI-ISOLATION-STAGE-1";
const STAGE_2: &str = "CNI-ISOLATION-STAGE-2";

/// The packets that are accepted to a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// All packets.
    Open,
    /// No packets from other bridges that have a policy.
    SameBridge,
    /// As `SameBridge`, and no packets from other containers on the same bridge.
    Isolated,
}

/// The firewall that accepts the container's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    /// firewalld if it runs, iptables otherwise.
    Any,
    Iptables,
    Firewalld,
}

impl Backend {
    /// Connects to firewalld; `None` if iptables is to be used.
    fn firewalld(self) -> Result<Option<Firewalld>, CniError> {
        match (self, (self != Backend::Iptables).then(Firewalld::connect)) {
            (_, Some(Ok(firewalld))) => Ok(Some(firewalld)),
            (Backend::Firewalld, Some(Err(error))) => {
                Err(CniError::failed(format!("backend: cannot reach firewalld: {error}: is it running?")))
            }
            _ => Ok(None),
        }
    }
}

struct Config {
    backend: Backend,
    admin_chain: String,
    policy: Policy,
}

impl Config {
    fn new(request: &Request<'_>) -> Result<Config, CniError> {
        let conf = request.conf;
        let backend = match string(conf, "backend")?.unwrap_or_default() {
            "" => Backend::Any,
            "iptables" => Backend::Iptables,
            "firewalld" => Backend::Firewalld,
            other => return Err(CniError::config(format!("backend: {other:?} is neither \"iptables\" nor \"firewalld\""))),
        };
        string(conf, "firewalldZone")?;
        let admin_chain = string(conf, "iptablesAdminChainName")?.unwrap_or("CNI-ADMIN");
        let admin_chain = validated_name("iptablesAdminChainName", admin_chain)?;
        if [FORWARD, STAGE_1, STAGE_2].contains(&admin_chain) {
            return Err(CniError::config(format!("iptablesAdminChainName: {admin_chain:?} is the name of another chain of this plugin")));
        }
        let policy = match string(conf, "ingressPolicy")?.unwrap_or_default() {
            "" | "open" => Policy::Open,
            "same-bridge" => Policy::SameBridge,
            "isolated" => Policy::Isolated,
            other => {
                return Err(CniError::config(format!("ingressPolicy: {other:?} is none of \"open\", \"same-bridge\" and \"isolated\"")));
            }
        };
        Ok(Config { backend, admin_chain: admin_chain.to_owned(), policy })
    }
}

/// The firewalld zone of the container's addresses. Ignores an invalid value, because DEL must accept it; ADD rejects it.
fn zone<'a>(request: &Request<'a>) -> &'a str {
    string(request.conf, "firewalldZone").ok().flatten().unwrap_or("trusted")
}

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => {
            let config = Config::new(request)?;
            let result = previous(request)?;
            let mut firewalld = config.backend.firewalld()?;
            let added = addresses(&result).iter().try_for_each(|ip| match &mut firewalld {
                Some(firewalld) => firewalld.add(zone(request), *ip).and_then(|()| add_policy(&config, &result, *ip)),
                None => add(&config, &result, *ip),
            });
            if added.is_err() {
                // The error that led here is the one to report.
                let _ = remove(request, &result);
            }
            added.map(|()| Some(result))
        }
        Command::Del => {
            // DEL does not validate the configuration, which may have changed since ADD. Without a previous result the
            // container's addresses are unknown, and no rule is removed.
            remove(request, &previous_leniently(request)).map(|()| None)
        }
        Command::Check => {
            let config = Config::new(request)?;
            let result = previous(request)?;
            let mut firewalld = config.backend.firewalld()?;
            for ip in addresses(&result) {
                if let Some(firewalld) = &mut firewalld {
                    if !firewalld.has(zone(request), ip)? {
                        return Err(CniError::failed(format!("{ip} is not a source of firewalld's zone {:?}", zone(request))));
                    }
                    continue;
                }
                let table = Table::read_if_chain(Family::of(ip), "filter", &[FORWARD])?;
                let exists = |rule: &String| table.as_ref().is_some_and(|table| table.rules(FORWARD).contains(rule));
                if !rules(ip).iter().all(exists) {
                    return Err(CniError::failed(format!("the rules that accept traffic of {ip} are missing")));
                }
            }
            Ok(None)
        }
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

/// The two rules of an address, in the format of `iptables-save`.
fn rules(ip: IpAddr) -> [String; 2] {
    let net = format!("{ip}/{}", Family::of(ip).bits());
    [format!("-d {net} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"), format!("-s {net} -j ACCEPT")]
}

/// Removes the addresses from firewalld and their rules from iptables: the backend may have changed since ADD.
fn remove(request: &Request<'_>, result: &CniResult) -> Result<(), CniError> {
    let addresses = addresses(result);
    if !addresses.is_empty()
        && !matches!(string(request.conf, "backend"), Ok(Some("iptables")))
        && let Ok(mut firewalld) = Firewalld::connect()
    {
        addresses.iter().for_each(|ip| firewalld.remove(zone(request), *ip));
    }
    for ip in addresses {
        if let Some(mut table) = Table::read_if_chain(Family::of(ip), "filter", &[FORWARD])? {
            let rules = rules(ip);
            table.remove_rules(FORWARD, |rule| rules.iter().any(|ours| ours == rule));
            table.write()?;
        }
    }
    Ok(())
}

fn add(config: &Config, result: &CniResult, ip: IpAddr) -> Result<(), CniError> {
    let mut table = Table::read(Family::of(ip), "filter")?;
    table.ensure_chain(&config.admin_chain, &[]);
    table.ensure_chain(FORWARD, &[]);
    table.ensure_jump("FORWARD", &format!("{} -j {FORWARD}", comment("CNI firewall plugin rules")), true);
    table.ensure_jump(FORWARD, &format!("{} -j {}", comment("CNI firewall plugin admin overrides"), config.admin_chain), true);
    if config.policy != Policy::Open {
        isolate(&mut table, config.policy, result)?;
    }
    for rule in rules(ip) {
        if !table.rules(FORWARD).contains(&rule) {
            table.append(FORWARD, &rule);
        }
    }
    table.write()
}

/// Isolates the container's bridge by the policy, if firewalld accepts its traffic.
fn add_policy(config: &Config, result: &CniResult, ip: IpAddr) -> Result<(), CniError> {
    if config.policy == Policy::Open {
        return Ok(());
    }
    let mut table = Table::read(Family::of(ip), "filter")?;
    isolate(&mut table, config.policy, result)?;
    table.write()
}

/// Adds the rules of a policy, in two stages as in Docker: the first sends packets that leave a bridge to the second, which
/// drops those that enter another bridge.
fn isolate(table: &mut Table, policy: Policy, result: &CniResult) -> Result<(), CniError> {
    let missing = || CniError::config("ingressPolicy: needs a prevResult whose first interface is the bridge");
    let bridge: IfName =
        result.interfaces.first().filter(|first| first.sandbox.is_empty()).and_then(|first| first.name.parse().ok()).ok_or_else(missing)?;
    let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let found = link::get(&mut socket, bridge).map_err(failed("read the bridge"))?;
    found.filter(|link| link.kind == "bridge").ok_or_else(missing)?;
    let text = |policies: &str| comment(&format!("CNI firewall plugin rules (ingressPolicy: {policies})"));
    let (both, own) = (text("same-bridge|isolated"), text(if policy == Policy::Isolated { "isolated" } else { "same-bridge" }));
    for chain in [STAGE_1, STAGE_2] {
        table.ensure_chain(chain, &[format!("{both} -j RETURN")]);
    }
    table.ensure_jump("FORWARD", &format!("{both} -j {STAGE_1}"), true);
    let mut wanted =
        vec![(STAGE_2, format!("-o {bridge} {both} -j DROP")), (STAGE_1, format!("-i {bridge} ! -o {bridge} {own} -j {STAGE_2}"))];
    if policy == Policy::Isolated {
        wanted.push((STAGE_1, format!("-i {bridge} -o {bridge} {own} -j DROP")));
    }
    for (chain, rule) in wanted {
        // Inserted before the RETURN at the end.
        if !table.rules(chain).contains(&rule) {
            table.insert(chain, &rule);
        }
    }
    Ok(())
}
