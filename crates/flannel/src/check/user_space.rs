//! The kernel has no WireGuard, so the daemon carries the device itself.

use super::{Facts, Finding};
use crate::object::LinkKind;

pub(super) const CODE: &str = "wireguard-user-space";
pub(super) const REASON: &str = "A device in user space is slower than the kernel's, and its packets stop while flanneld is not running.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let wanted = facts.expected.links.iter().filter(|link| matches!(link.kind, LinkKind::WireGuard { .. }));
    let is_carried = |name| facts.host.links.iter().any(|seen| seen.name == name && seen.kind == "tun");
    let carried: Vec<String> = wanted.filter(|link| is_carried(link.name)).map(|link| link.name.to_string()).collect();
    if carried.is_empty() {
        return Vec::new();
    }
    vec![Finding::warning(
        CODE,
        format!(
            "the kernel has no WireGuard: flanneld carries the packets of {} itself, and they stop while it is not running",
            carried.join(", ")
        ),
        "modprobe wireguard on the host, then restart flanneld",
    )]
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Facts, HostFacts, SeenLink, fixture};
    use super::*;
    use crate::net::Mac;
    use crate::object::Link;
    use crate::wireguard::PublicKey;
    use expect_test::expect;

    #[test]
    fn device_of_kind_tun_is_reported() {
        let name = "flannel-wg".parse().unwrap();
        let kind = LinkKind::WireGuard { port: 51_820, public_key: PublicKey([1; 32]) };
        let mut expected = fixture::expected();
        expected.links = vec![Link { name, kind, mac: Mac([0; 6]), mtu: 1420, up: true }];
        let seen = |kind: &str| HostFacts {
            links: vec![SeenLink { name, kind: kind.to_owned(), vxlan: None, has_pods: false }],
            ..HostFacts::default()
        };
        let find = |host: &HostFacts| Check::UserSpace.run(Facts { expected: &expected, host });
        assert_eq!(find(&seen("wireguard")), []);
        let found: Vec<String> = find(&seen("tun")).iter().map(ToString::to_string).collect();
        expect![[r#"
            [
                "the kernel has no WireGuard: flanneld carries the packets of flannel-wg itself, and they stop while it is not running; fix: modprobe wireguard on the host, then restart flanneld",
            ]
        "#]]
        .assert_debug_eq(&found);
    }
}
