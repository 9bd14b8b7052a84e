//! A VXLAN device of the daemon was renamed, or moved to another network namespace: the kernel refuses a second one with its VNI and port.

use super::{Facts, Finding, Place};
use crate::object::LinkKind;

pub(super) const CODE: &str = "device-moved";
pub(super) const REASON: &str = "The kernel allows one VXLAN device for each VNI and port; while the old one exists elsewhere, it takes the packets and no new one can be created.";

pub(super) fn run(facts: Facts<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for link in &facts.expected.links {
        let LinkKind::Vxlan { vni, port, .. } = link.kind else { continue };
        if facts.host.links.is_empty() || facts.host.links.iter().any(|seen| seen.name == link.name) {
            continue;
        }
        let is_it = |vxlan: (u32, u16)| vxlan == (vni.get(), port);
        let name = link.name;
        if let Some(renamed) = facts.host.links.iter().find(|seen| seen.vxlan.is_some_and(is_it)) {
            findings.push(Finding::error(
                CODE,
                format!(
                    "device {name} is missing; {} has its VNI {vni} and UDP port {port}: it was renamed, or belongs to another program",
                    renamed.name
                ),
                format!("ip link del {} (if it is flanneld's own), or set Backend.VNI or Backend.Port of the network config", renamed.name),
            ));
        } else if let Some(moved) = facts.host.elsewhere.iter().find(|moved| is_it(moved.vxlan)) {
            let enter = match &moved.place {
                Place::Named(name) => format!("ip -n {name}"),
                Place::Process(pid, _) => format!("nsenter -t {pid} -n ip"),
            };
            findings.push(Finding::error(
                CODE,
                format!("device {name} was moved to {}, where its name is {}", moved.place, moved.name),
                format!("{enter} link del {} (flanneld creates {name} again)", moved.name),
            ));
        } else if facts.expected.refused.contains(&name) {
            // The daemon gives up the right to enter other namespaces.
            findings.push(Finding::error(
                CODE,
                format!("device {name} is missing, and the kernel refuses a new one: its VNI {vni} and UDP port {port} are used in another network namespace"),
                "run flanneld doctor as root, which names the namespace, and delete the device there",
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Elsewhere, Expected, Facts, HostFacts, SeenLink, fixture};
    use super::*;
    use crate::net::{Mac, Vni};
    use crate::object::Link;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(links: &[(&str, Option<(u32, u16)>)], elsewhere: Vec<Elsewhere>, want: Expect) {
        let local = "192.0.2.1".parse().unwrap();
        let kind =
            LinkKind::Vxlan { vni: Vni::new(1).unwrap(), port: 8472, local, lower: "eth0".parse().unwrap(), gbp: false, learning: false };
        let link = Link { name: "flannel.1".parse().unwrap(), kind, mac: Mac([2; 6]), mtu: 1450, up: true };
        let expected = Expected { links: vec![link], ..fixture::expected() };
        let seen = |(name, vxlan): &(&str, Option<(u32, u16)>)| SeenLink {
            name: name.parse().unwrap(),
            kind: String::new(),
            vxlan: *vxlan,
            has_pods: false,
        };
        let host = HostFacts { links: links.iter().map(seen).collect(), elsewhere, ..HostFacts::default() };
        let lines = Check::Device.run(Facts { expected: &expected, host: &host });
        want.assert_eq(&lines.iter().map(|finding| format!("{finding}\n")).collect::<String>());
    }

    #[test]
    fn renamed_device_is_named() {
        check(
            &[("eth0", None), ("vx9", Some((1, 8472)))],
            vec![],
            expect![[r#"
                device flannel.1 is missing; vx9 has its VNI 1 and UDP port 8472: it was renamed, or belongs to another program; fix: ip link del vx9 (if it is flanneld's own), or set Backend.VNI or Backend.Port of the network config
            "#]],
        );
    }

    #[test]
    fn place_of_a_moved_device_is_named() {
        let moved = |place| vec![Elsewhere { name: "flannel.1".parse().unwrap(), vxlan: (1, 8472), place }];
        check(
            &[("eth0", None)],
            moved(Place::Named("blue".to_owned())),
            expect![[r#"
                device flannel.1 was moved to network namespace blue, where its name is flannel.1; fix: ip -n blue link del flannel.1 (flanneld creates flannel.1 again)
            "#]],
        );
        check(
            &[("eth0", None)],
            moved(Place::Process(7, "sleep".to_owned())),
            expect![[r#"
                device flannel.1 was moved to the network namespace of process 7 (sleep), where its name is flannel.1; fix: nsenter -t 7 -n ip link del flannel.1 (flanneld creates flannel.1 again)
            "#]],
        );
    }

    #[test]
    fn device_in_an_unseen_namespace_is_known_by_the_refusal() {
        let kind = LinkKind::Vxlan {
            vni: Vni::new(1).unwrap(),
            port: 8472,
            local: "192.0.2.1".parse().unwrap(),
            lower: "eth0".parse().unwrap(),
            gbp: false,
            learning: false,
        };
        let name = "flannel.1".parse().unwrap();
        let links = vec![Link { name, kind, mac: Mac([2; 6]), mtu: 1450, up: true }];
        let seen = SeenLink { name: "eth0".parse().unwrap(), kind: String::new(), vxlan: None, has_pods: false };
        let host = HostFacts { links: vec![seen], ..HostFacts::default() };
        let mut expected = Expected { links, ..fixture::expected() };
        assert_eq!(run(Facts { expected: &expected, host: &host }), [], "it may be about to be created");
        expected.refused.push(name);
        let found = run(Facts { expected: &expected, host: &host });
        assert!(found[0].text.contains("are used in another network namespace"), "{found:?}");
    }

    #[test]
    fn present_device_is_no_finding() {
        check(&[("flannel.1", Some((1, 8472)))], vec![], expect![""]);
        check(&[("eth0", None), ("vx9", Some((2, 8472)))], vec![], expect![""]);
        check(&[], vec![], expect![""]);
    }
}
