//! Port mappings in iptables chains with the reference plugin's names: some shared by all containers, and one per container.

use std::net::IpAddr;

use ::flannel::pod::ports::{Mapping, Snat};
use ::flannel::{Cidr, Family};

use super::config::Config;
use crate::chains::{Own, Table, comment};
use crate::protocol::{CniError, Request};

const SETMARK: &str = "CNI-HOSTPORT-SETMARK";
const MASQ: &str = "CNI-HOSTPORT-MASQ";
const DNAT: &str = "CNI-HOSTPORT-DNAT";
/// The maximum number of ports of a `multiport` match.
const MAX_MULTIPORT: usize = 15;

pub(super) fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        6 => "tcp",
        17 => "udp",
        _ => "sctp",
    }
}

fn own(request: &Request<'_>) -> Own {
    Own::of("CNI-DN-", request)
}

pub(super) fn add(request: &Request<'_>, config: &Config, container: Cidr, mappings: &[Mapping]) -> Result<(), CniError> {
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
    let own = own(request);
    let chain = own.to_write(&table, DNAT).to_owned();
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
    // Jumps of an earlier ADD of this container are replaced.
    let jump = format!("-j {chain}");
    table.remove_rules(DNAT, |rule| rule.ends_with(&jump));
    let text = own.comment("dnat ");
    let extra = config.conditions_of(family).join(" ");
    let extra = if extra.is_empty() { extra } else { format!(" {extra}") };
    // In the order of the protocols' names, as in the reference plugin.
    for protocol in [132, 6, 17] {
        let mut ports: Vec<String> = mappings.iter().filter(|m| m.protocol == protocol).map(|m| m.host_port.to_string()).collect();
        ports.dedup();
        for ports in ports.chunks(MAX_MULTIPORT) {
            let list = ports.join(",");
            table.append(DNAT, &format!("-p {} {text} -m multiport --destination-ports {list}{extra} -j {chain}", protocol_name(protocol)));
        }
    }
    table.write()
}

/// Removes the attachment's chains.
pub(super) fn remove(request: &Request<'_>, addresses: &[IpAddr]) -> Result<(), CniError> {
    Family::ALL.into_iter().try_for_each(|family| own(request).remove(family, "nat", DNAT, addresses))
}

/// Does the attachment's chain have a DNAT rule for each mapping, and does a rule jump to it?
pub(super) fn is_complete(request: &Request<'_>, family: Family, mappings: usize) -> Result<bool, CniError> {
    let own = own(request);
    let Some(table) = own.read(family, "nat")? else { return Ok(false) };
    let Some(chain) = own.find(&table, DNAT) else { return Ok(false) };
    Ok(table.rules(DNAT).iter().any(|rule| rule.ends_with(&format!("-j {chain}")))
        && table.rules(chain).iter().filter(|rule| rule.contains("-j DNAT")).count() == mappings)
}
