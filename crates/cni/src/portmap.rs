//! `portmap`: forwards ports of the host to ports of the container (specification, section 7.5), in nftables unless the
//! configuration selects iptables. DEL removes rules of both.

mod conditions;
mod config;
mod iptables;

use ::flannel::pod::note::Rules;
use ::flannel::pod::ports::{self, HOSTPORTS, Holder, Mapping, Ports, Snat};
use ::flannel::pod::{Attachment, Table};
use ::flannel::{Cidr, Family};
use kernel::netlink::{Protocol, Socket};
use kernel::pod_table::{self, PORTS};
use kernel::{conntrack, link, route};

use crate::chained::{container_address, container_addresses, failed, host_end, note, previous, previous_leniently};
use crate::lock;
use crate::protocol::{CniError, Command, Request};
use crate::result::CniResult;
use config::{Backend, Config, known_mappings};

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => {
            let config = Config::new(request)?;
            let result = previous(request)?;
            if config.mappings.is_empty() {
                return Ok(Some(result));
            }
            let added = Family::ALL.into_iter().try_for_each(|family| add(request, &config, &result, family));
            if added.is_err() {
                // The error of the ADD is reported.
                let _ = remove(request, &[]);
            }
            added.map(|()| Some(result))
        }
        Command::Del => {
            let mappings = known_mappings(request);
            if mappings.is_none() {
                return Ok(None);
            }
            remove(request, &mappings.unwrap_or_default()).map(|()| None)
        }
        Command::Check => check(request, &Config::new(request)?, &previous(request)?).map(|()| None),
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

/// The mappings that apply to a family.
fn of_family(mappings: &[Mapping], family: Family) -> Vec<Mapping> {
    mappings.iter().filter(|mapping| mapping.host_ip.is_none_or(|ip| Family::of(ip) == family)).copied().collect()
}

fn add(request: &Request<'_>, config: &Config, result: &CniResult, family: Family) -> Result<(), CniError> {
    let (Some(container), mappings) = (container_address(result, request, family), of_family(&config.mappings, family)) else {
        return Ok(());
    };
    if mappings.is_empty() {
        return Ok(());
    }
    match config.backend {
        Backend::Nftables => add_nftables(request, config, result, container, &mappings)?,
        Backend::Iptables => iptables::add(request, config, container, &mappings)?,
    }
    if family == Family::V4 && config.snat != Snat::No {
        route_localnet(container)?;
    }
    forget_udp(family, &mappings);
    Ok(())
}

fn add_nftables(request: &Request<'_>, config: &Config, result: &CniResult, container: Cidr, mappings: &[Mapping]) -> Result<(), CniError> {
    let family = Family::of(container.addr);
    // The first ADD creates the chains and the shared rules.
    let _lock = lock::host()?;
    let notes = lock::notes()?;
    let ports =
        Ports { holder: Holder::Attachment(request.attachment()), address: container, mappings: mappings.to_vec(), snat: config.snat };
    let words = config.conditions_of(family);
    if !words.is_empty() {
        return conditions::add(&ports, request.container_id, words);
    }
    pod_table::add(Table::Ports(family), &ports.rules()).map_err(failed("map the container's ports"))?;
    if let Some(end) = host_end(result) {
        note(&notes, end, request, Rules::Ports(ports));
    }
    Ok(())
}

/// Allows packets from 127.0.0.1 on the interface that leads to the container; by default the kernel drops them. Without a
/// route to the container there is nothing to allow.
fn route_localnet(container: Cidr) -> Result<(), CniError> {
    let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let Ok(reach) = route::reach(&mut socket, container.addr) else { return Ok(()) };
    match link::set_ipv4_conf(&mut socket, reach.oif, link::ROUTE_LOCALNET, 1) {
        Err(error) if !error.is_not_found() => {
            Err(failed(format!("enable route_localnet on the interface that leads to {}", container.addr))(error))
        }
        _ => Ok(()),
    }
}

/// Removes tracked UDP connections to the host's ports, which would otherwise keep their old destination.
fn forget_udp(family: Family, mappings: &[Mapping]) {
    let udp = ports::udp_ports(mappings);
    if let Err(error) = conntrack::forget_udp(family, &udp) {
        eprintln!("portmap: cannot remove tracked UDP connections to ports {udp:?}: {error}");
    }
}

/// Removes the attachment's rules in nftables and iptables, because the backend may have changed since ADD.
fn remove(request: &Request<'_>, mappings: &[Mapping]) -> Result<(), CniError> {
    let attachment = request.attachment();
    let addresses = container_addresses(&previous_leniently(request), request);
    // nftables rules are removed last: after that, closing a netlink socket waits until the kernel has freed them.
    let chains = iptables::remove(request, &addresses);
    let notes = lock::notes()?;
    notes.forget_ports(&attachment);
    let removal = pod_table::remove(&PORTS, |rule| ports::is_of(rule, &attachment, &addresses));
    let _removal = removal.map_err(failed("remove the container's port mappings"))?;
    // Released early: other plugins need not wait until the kernel has freed the rules.
    drop(notes);
    // Done after the rules are removed: until then, a packet would create a tracked connection again.
    Family::ALL.iter().for_each(|family| forget_udp(*family, &of_family(mappings, *family)));
    chains
}

fn check(request: &Request<'_>, config: &Config, result: &CniResult) -> Result<(), CniError> {
    let attachment: Attachment = request.attachment();
    for family in Family::ALL {
        let mappings = of_family(&config.mappings, family);
        let Some(container) = container_address(result, request, family).filter(|_| !mappings.is_empty()) else { continue };
        let complete = match config.backend {
            Backend::Nftables => {
                let rules = pod_table::list(Table::Ports(family)).map_err(failed("read the port mappings"))?;
                let is_ours = |rule: &&_| ports::is_of(rule, &attachment, &[container.addr]);
                rules.iter().filter(|rule| rule.chain == HOSTPORTS).filter(is_ours).count() == mappings.len()
            }
            Backend::Iptables => iptables::is_complete(request, family, mappings.len())?,
        };
        if !complete {
            return Err(CniError::failed(format!("{family} port mappings of container {} are missing", request.container_id)));
        }
    }
    Ok(())
}
