//! Masquerading of one container (`ipMasq`), in both forms. A DEL looks in both: the container may be older than the
//! configuration.

use ::flannel::{Cidr, Family};
use kernel::masquerade;
use kernel::nft::Removal;
use kernel::pod_rules::Rules;

use super::config::MasqBackend;
use super::{attachment, failed};
use crate::chained::note;
use crate::chains::{Table, comment, name};
use crate::lock;
use crate::protocol::{CniError, Request};

fn chain(request: &Request) -> String {
    name("CNI-", &request.name, &request.container_id)
}

/// `end` is the index of the host's end of the container's link.
pub(super) fn add(request: &Request, backend: MasqBackend, addresses: &[Cidr], end: u32) -> Result<(), CniError> {
    if backend == MasqBackend::Nftables {
        // The first one makes the chain, and the rules that all share.
        let _lock = lock::host()?;
        let (notes, network, attachment) = (lock::notes()?, request.name.clone(), attachment(request));
        masquerade::add(&network, &attachment, addresses).map_err(failed("masquerade the container's addresses"))?;
        let rules = Rules::Masquerade { network, attachment, addresses: addresses.to_vec() };
        note(&notes, end, request, rules);
        return Ok(());
    }
    let (chain, text) = (chain(request), comment(&format!("name: \"{}\" id: \"{}\"", request.name, request.container_id)));
    for family in Family::ALL {
        let own: Vec<&Cidr> = addresses.iter().filter(|address| Family::of(address.addr) == family).collect();
        if own.is_empty() {
            continue;
        }
        let mut table = Table::read(family, "nat")?;
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
pub(super) fn remove(request: &Request) -> Result<Removal, CniError> {
    let chains = remove_chains(request);
    let notes = lock::notes()?;
    notes.forget_masquerade(&request.name, &attachment(request));
    let removal = masquerade::remove(&request.name, &attachment(request)).map_err(failed("remove the container's masquerading"));
    chains.and(removal)
}

fn remove_chains(request: &Request) -> Result<(), CniError> {
    let chain = chain(request);
    for family in Family::ALL {
        if let Some(mut table) = Table::read_if_chain(family, "nat", &chain)? {
            table.remove_chain(&chain, &["POSTROUTING"]);
            table.write()?;
        }
    }
    Ok(())
}
