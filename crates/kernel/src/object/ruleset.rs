//! Applies and reads the daemon's nftables tables, one per family.

use flannel::Family;
use flannel::object::Object;
use flannel::traffic::{Ruleset, table_name};

use super::{Change, Reading};
use crate::monitor::Changed;
use crate::netlink::NetlinkError;
use crate::{Kernel, nft};

pub(super) fn apply(kernel: &mut Kernel, change: Change, wanted: &Ruleset) -> Result<(), NetlinkError> {
    let socket = kernel.netfilter()?;
    match change {
        Change::Set => nft::replace(socket, wanted),
        Change::Delete => nft::delete(socket, wanted.family),
    }
}

pub(super) fn observe(kernel: &mut Kernel, reading: &Reading<'_>, found: &mut Vec<Object>) -> Result<(), NetlinkError> {
    for family in &reading.scope.rulesets {
        match kernel.netfilter().and_then(|socket| nft::list(socket, *family)) {
            Ok(ruleset) => found.extend(ruleset.map(Object::Ruleset)),
            // A kernel without nf_tables holds no rules.
            Err(error) if matches!(error.errno(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Decodes a change of a table with this name.
pub(crate) fn decode_change(table: &str) -> Option<Changed> {
    Family::ALL.into_iter().find(|family| table_name(*family) == table).map(Changed::Rules)
}
