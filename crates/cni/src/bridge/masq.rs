//! Masquerading of one container (`ipMasq`), in nftables or iptables. DEL removes rules of both, because the configuration may
//! have changed since ADD.

use ::flannel::pod;
use ::flannel::pod::masquerade::Masquerade;
use ::flannel::pod::note::Rules;
use ::flannel::{Cidr, Family};
use kernel::pod_rules::{Notes, RemovalRequest};
use kernel::pod_table::{self, Removal};

use super::config::MasqBackend;
use super::failed;
use crate::chained::{container_addresses, note, previous_leniently};
use crate::chains::{Own, Table};
use crate::lock;
use crate::protocol::{CniError, Request};

/// The prefix of the names of containers' chains.
const CHAIN: &str = "CNI-";

fn own(request: &Request<'_>) -> Own {
    Own::of(CHAIN, request)
}

/// Masquerades the container's addresses. `end` is the index of the host's end of the container's link.
pub(super) fn add(request: &Request<'_>, backend: MasqBackend, addresses: &[Cidr], end: u32) -> Result<(), CniError> {
    if backend == MasqBackend::Nftables {
        // The first ADD creates the chains and the shared rules.
        let _lock = lock::host()?;
        let notes = lock::notes()?;
        notes.withdraw(&request.attachment());
        let masquerade = Masquerade { attachment: request.attachment(), addresses: addresses.to_vec() };
        pod_table::add(pod::Table::Masquerade, &masquerade.rules()).map_err(failed("masquerade the container's addresses"))?;
        note(&notes, end, request, Rules::Masquerade(masquerade));
        return Ok(());
    }
    let names = own(request);
    let text = names.comment("");
    for family in Family::ALL {
        let of_family: Vec<&Cidr> = addresses.iter().filter(|address| Family::of(address.addr) == family).collect();
        if of_family.is_empty() {
            continue;
        }
        let mut table = Table::read(family, "nat")?;
        let chain = names.to_write(&table, "POSTROUTING").to_owned();
        table.remove_rules("POSTROUTING", |rule| rule.ends_with(&format!("-j {chain}")));
        let mut rules: Vec<String> = of_family.iter().map(|address| format!("-d {} {text} -j ACCEPT", address.subnet())).collect();
        rules.push(format!("! -d {} {text} -j MASQUERADE", family.multicast()));
        table.replace_chain(&chain, &rules);
        of_family
            .iter()
            .for_each(|address| table.append("POSTROUTING", &format!("-s {}/{} {text} -j {chain}", address.addr, family.bits())));
        table.write()?;
    }
    Ok(())
}

/// Removes the rules. Those in nftables come first: another DEL that runs at the same time may remove them too.
pub(super) fn remove(request: &Request<'_>) -> Result<Removal, CniError> {
    let attachment = request.attachment();
    let wanted = RemovalRequest::new(&attachment);
    let Some(notes) = Notes::hold_unless(|| wanted.is_done()).map_err(lock::busy)? else { return Ok(Removal::default()) };
    let removed = notes.remove_masquerades(&attachment, |attachment| Own::names_of(CHAIN, attachment));
    // The removal of chains locks the namespace. ADD locks the namespace before the notes, so the notes must be released.
    drop(notes);
    let chains = if removed.as_ref().is_ok_and(|(_, has_chains)| !has_chains) { Ok(()) } else { remove_chains(request) };
    let removal = removed.map(|(removal, _)| removal).map_err(failed("remove the container's masquerading"));
    chains.and(removal)
}

fn remove_chains(request: &Request<'_>) -> Result<(), CniError> {
    let addresses = container_addresses(&previous_leniently(request), request);
    Family::ALL.into_iter().try_for_each(|family| own(request).remove(family, "nat", "POSTROUTING", &addresses))
}
