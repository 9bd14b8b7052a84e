//! Applies and reads the daemon's iptables chains, in both packet filters.

use flannel::Family;
use flannel::object::Object;
use flannel::traffic::iptables::{Iptables, Variant};

use super::{Change, Reading};
use crate::Kernel;
use crate::addr::family_number;
use crate::monitor::Changed;
use crate::netlink::NetlinkError;

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Iptables) -> Result<(), NetlinkError> {
    if wanted.variant == Variant::Nft {
        kernel.netfilter()?;
    }
    let Kernel { netfilter, iptables, networks, .. } = kernel;
    let none = || Iptables { chains: Vec::new(), ..wanted.clone() };
    match change {
        Change::Set => crate::iptables::set(netfilter.as_mut(), iptables, wanted, networks),
        Change::Delete => crate::iptables::set(netfilter.as_mut(), iptables, &none(), networks),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) {
    let scope = reading.scope;
    if !scope.networks.is_empty() {
        kernel.networks = [scope.networks.as_slice(), scope.retired.as_slice()].concat();
    }
    for (family, variant) in scope.iptables.iter().flat_map(|family| Variant::ALL.map(|variant| (*family, variant))) {
        if variant == Variant::Nft && kernel.netfilter().is_err() {
            continue;
        }
        let Kernel { netfilter, iptables, networks, .. } = kernel;
        match crate::iptables::observe(netfilter.as_mut(), iptables, family, variant, networks) {
            Ok(rules) => found.extend(rules.map(Object::Iptables)),
            // Rules that cannot be read count as unchanged; the other objects are read nevertheless.
            Err(error) => kernel.read_error = Some(format!("iptables-{variant} rules for {family}: {error}")),
        }
    }
}

/// Decodes a change of an nf_tables table that iptables uses. `family` is the `nfgen_family` of the message.
pub(crate) fn decode_change(table: &str, family: u8) -> Option<Changed> {
    matches!(table, "nat" | "filter").then_some(())?;
    Family::ALL.into_iter().find(|known| family_number(*known) == family).map(Changed::Iptables)
}
