//! `Backend.MTU` of the backends that encapsulate: the MTU of the *outer* packets, from which the overhead is subtracted.

use super::Problem;
use crate::config::{ConfigError, invalid, typed};
use crate::json::Fields;
use crate::net::Family;
use crate::node::Node;

/// The minimum link MTU of IPv4 (RFC 791) in bytes.
const IPV4_MIN: u32 = 68;
/// The minimum link MTU of IPv6 (RFC 8200, section 5) in bytes.
const IPV6_MIN: u32 = 1280;

/// The configured outer MTU in bytes; `None` means the MTU of the external interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OuterMtu(pub(super) Option<u32>);

impl OuterMtu {
    /// Reads the field. `overhead` is the least that the backend adds to a packet.
    pub(super) fn parse(section: &Fields<'_>, overhead: u32) -> Result<OuterMtu, ConfigError> {
        let mtu = typed::<i64>(section, "Backend.MTU", "mtu")?.unwrap_or(0);
        let least = IPV4_MIN + overhead;
        match u32::try_from(mtu) {
            Ok(0) => Ok(OuterMtu(None)),
            Ok(mtu) if (least..=65_535).contains(&mtu) => Ok(OuterMtu(Some(mtu))),
            _ => Err(invalid("Backend.MTU", format!("{mtu} is out of range: it must be {least} to 65535, or absent"))),
        }
    }

    /// The MTU inside, in bytes: the overlay cannot carry more than the external interface does.
    pub(super) fn inner(self, node: &Node, overhead: u32) -> u32 {
        self.0.unwrap_or(node.mtu).min(node.mtu).saturating_sub(overhead)
    }

    /// The reason why a family cannot work with this MTU.
    pub(super) fn problem(self, node: &Node, family: Family, overhead: u32) -> Option<Problem> {
        let (inner, needed) = (self.inner(node, overhead), IPV6_MIN + overhead);
        let (what, has) = match self.0 {
            Some(outer) if outer < node.mtu => ("Backend.MTU of the network config".to_owned(), outer),
            _ => (format!("the MTU of {}", node.ext), node.mtu),
        };
        (family == Family::V6 && inner < IPV6_MIN).then(|| Problem {
            text: format!("{what} is {has}, which leaves {inner} bytes for IPv6; IPv6 needs {IPV6_MIN}: set it to {needed} or more"),
            is_published_address: false,
        })
    }

    /// The note about a configured MTU that exceeds that of the interface.
    pub(super) fn notes(self, node: &Node) -> Vec<String> {
        let mtu = self.0.filter(|mtu| *mtu > node.mtu);
        let note = |mtu| format!("network config: Backend.MTU: {mtu} exceeds the MTU {} of {}: using {0}", node.mtu, node.ext);
        mtu.map(note).into_iter().collect()
    }
}
