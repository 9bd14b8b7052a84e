//! The alloc backend: leases a subnet and programs nothing (specification, section 5.8).

use super::{Context, Driver, Local, Part};
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, PerFamily};
use crate::object::Object;
use crate::probe::Point;

/// The alloc backend; it has no settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alloc;

impl Driver for Alloc {
    fn name(&self) -> &'static str {
        "alloc"
    }

    fn published_type(&self) -> &'static str {
        ""
    }

    fn published_data(&self, _: Local<'_>) -> PerFamily<Box<str>> {
        PerFamily::default()
    }

    fn annotates(&self, family: Family, _: &Peer) -> bool {
        family == Family::V4
    }

    fn accepts_type(&self, _: &str) -> bool {
        true
    }

    fn mtu(&self, local: Local<'_>) -> u32 {
        local.node.mtu
    }

    fn probe_point(&self) -> Option<Point> {
        None
    }

    fn node_objects(&self, _: Context<'_>) -> Vec<Object> {
        Vec::new()
    }

    fn peer_part(&self, _: Context<'_>, _: &LeaseKey, _: &Peer) -> Part {
        Part::default()
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::tests::check;
    use expect_test::expect;

    #[test]
    fn alloc_programs_nothing() {
        check(
            r#"{"Type":"alloc"}"#,
            &[("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#)],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null}
                mtu 1500
                10.244.2.0-24:
            "#]],
        );
    }
}
