//! Masquerading of one container (`ipMasq`), in nftables and iptables. A DEL looks in both: the container may be older than
//! the configuration.

use ::flannel::pod::Table;
use ::flannel::pod::masquerade::{self, Masquerade};
use ::flannel::pod::note::Rules;
use ::flannel::{Cidr, Family};
use kernel::pod_table::{self, Removal};

use super::config::MasqBackend;
use super::failed;
use crate::chained::note;
use crate::chains::{Table as Chains, comment, name};
use crate::lock;
use crate::protocol::{CniError, Request};

fn chain(request: &Request<'_>) -> String {
    name("CNI-", request.name, request.container_id)
}

/// `end` is the index of the host's end of the container's link.
pub(super) fn add(request: &Request<'_>, backend: MasqBackend, addresses: &[Cidr], end: u32) -> Result<(), CniError> {
    if backend == MasqBackend::Nftables {
        // The first one creates the chains, and the rules that all share.
        let _lock = lock::host()?;
        let notes = lock::notes()?;
        let masquerade = Masquerade { attachment: request.attachment(), addresses: addresses.to_vec() };
        pod_table::add(Table::Masquerade, &masquerade.rules()).map_err(failed("masquerade the container's addresses"))?;
        note(&notes, end, request, Rules::Masquerade(masquerade));
        return Ok(());
    }
    let (chain, text) = (chain(request), comment(&format!("name: \"{}\" id: \"{}\"", request.name, request.container_id)));
    for family in Family::ALL {
        let own: Vec<&Cidr> = addresses.iter().filter(|address| Family::of(address.addr) == family).collect();
        if own.is_empty() {
            continue;
        }
        let mut table = Chains::read(family, "nat")?;
        table.remove_rules("POSTROUTING", |rule| rule.ends_with(&format!("-j {chain}")));
        let mut rules: Vec<String> = own.iter().map(|address| format!("-d {} {text} -j ACCEPT", address.subnet())).collect();
        rules.push(format!("! -d {} {text} -j MASQUERADE", family.multicast()));
        table.replace_chain(&chain, &rules);
        own.iter().for_each(|address| table.append("POSTROUTING", &format!("-s {}/{} {text} -j {chain}", address.addr, family.bits())));
        table.write()?;
    }
    Ok(())
}

/// The nftables rules last: each socket that is closed after they were deleted waits for the kernel.
pub(super) fn remove(request: &Request<'_>) -> Result<Removal, CniError> {
    let chains = remove_chains(request);
    let notes = lock::notes()?;
    let attachment = request.attachment();
    notes.forget_masquerade(&attachment);
    let removal = pod_table::remove(&[Table::Masquerade], |rule| masquerade::is_of(rule, &attachment));
    let removal = removal.map_err(failed("remove the container's masquerading"));
    chains.and(removal)
}

fn remove_chains(request: &Request<'_>) -> Result<(), CniError> {
    let chain = chain(request);
    for family in Family::ALL {
        if let Some(mut table) = Chains::read_if_chain(family, "nat", &chain)? {
            table.remove_chain(&chain, &["POSTROUTING"]);
            table.write()?;
        }
    }
    Ok(())
}
