//! What would keep flannel from working on a host where it is not installed yet: facts in, findings out.

use super::{Finding, Severity};
use crate::net::{Cidr, IfName, Subnet};

/// Bytes that vxlan takes from the MTU, with IPv4 and with IPv6 between the hosts.
const OVERHEAD: (u32, u32) = (50, 70);
/// The smallest MTU of a link with IPv6 (RFC 8200).
const IPV6: u32 = 1280;
/// An MTU for pods below this costs more than a third of the throughput.
const SMALL: u32 = 1000;

/// Codes of the findings, with the reason why each matters.
pub const CODES: [(&str, &str); 10] = [
    ("no-vxlan", "The backend vxlan needs the kernel's VXLAN devices."),
    ("no-tun", "Only the backend udp needs TUN devices."),
    ("no-nf-tables", "The traffic rules are written to nftables; without it, iptables-legacy must be installed."),
    ("port-taken", "Another program that has the port gets flannel's packets, or keeps flanneld from starting."),
    ("no-default-route", "flanneld takes the interface of the default route, unless a flag names another."),
    ("mtu-small", "Each packet between pods of different hosts is carried within one between the hosts."),
    ("network-in-use", "Packets for pods would go elsewhere, or packets for that other network to pods."),
    (
        "forward-dropped",
        "Packets between pods of different hosts are forwarded; a chain that drops them does so whatever other tables accept.",
    ),
    ("cni-folder", "The container runtime looks for plugins and their configuration in these folders."),
    ("cni-order", "The container runtime uses the first configuration in the order of names."),
];

/// What a host has, as far as an installation depends on it.
#[derive(Debug, Clone, Default)]
pub struct PreflightFacts {
    /// Why a VXLAN device cannot be made.
    pub vxlan: Option<String>,
    /// Why there is no TUN.
    pub tun: Option<String>,
    /// Why a table of nftables cannot be made.
    pub nf_tables: Option<String>,
    /// Ports that another program has.
    pub ports: Vec<TakenPort>,
    /// The interface of the default route, with its MTU.
    pub external: Option<(IfName, u32)>,
    /// The pod networks to be.
    pub networks: Vec<Subnet>,
    /// Addresses of this host, without flannel's own.
    pub addresses: Vec<(IfName, Cidr)>,
    /// Routes of this host, without default routes and flannel's own.
    pub routes: Vec<(Subnet, Option<IfName>)>,
    /// Findings of the check of the packet filter, for these networks.
    pub forward: Vec<Finding>,
    /// Folders of the container runtime that do not exist.
    pub missing_folders: Vec<String>,
    /// A configuration of another network that the container runtime would use before flannel's.
    pub first_conf: Option<String>,
}

/// A port that another program has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenPort {
    /// `UDP` or `TCP`.
    pub protocol: &'static str,
    /// The port.
    pub port: u16,
    /// What flannel needs it for.
    pub purpose: &'static str,
    /// The setting that chooses another one.
    pub setting: &'static str,
    /// Who has it, where that is known.
    pub by: Option<String>,
}

/// Runs all checks. The severe findings come first.
pub fn run(facts: &PreflightFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    features(facts, &mut findings);
    for TakenPort { protocol, port, purpose, setting, by } in &facts.ports {
        let by = by.as_deref().unwrap_or("another program");
        let text = format!("{protocol} port {port} ({purpose}) is taken by {by}");
        findings.push(Finding::error("port-taken", text, format!("stop it, or set {setting}")));
    }
    mtu(facts, &mut findings);
    overlaps(facts, &mut findings);
    let forward = facts.forward.iter().map(|found| match found.fix.starts_with("ip") {
        // The daemon's own rule goes before one that drops.
        true => Finding::warning(
            "forward-dropped",
            format!("{} (no problem unless EnableNFTables is true)", found.text),
            format!("leave EnableNFTables false, or {}", found.fix),
        ),
        false => Finding::error("forward-dropped", found.text.clone(), found.fix.clone()),
    });
    findings.extend(forward);
    let missing = |folder: &String| {
        let fix = format!("install the container runtime, or name its folders (--cni-conf-dir, --cni-bin-dir); mkdir -p {folder}");
        Finding::warning("cni-folder", format!("there is no folder {folder}"), fix)
    };
    findings.extend(facts.missing_folders.iter().map(missing));
    if let Some(conf) = &facts.first_conf {
        let text = format!("{conf} is another network's configuration and comes before 10-flannel.conflist");
        findings.push(Finding::error("cni-order", text, format!("remove the other network, and then {conf}")));
    }
    findings.sort();
    findings
}

fn features(facts: &PreflightFacts, findings: &mut Vec<Finding>) {
    if let Some(error) = &facts.vxlan {
        let text = format!("the kernel makes no VXLAN device: {error}");
        findings.push(Finding::error(
            "no-vxlan",
            text,
            "modprobe vxlan (on some systems in the package of extra kernel modules), or the backend host-gw",
        ));
    }
    if let Some(error) = &facts.nf_tables {
        let text = format!("the kernel makes no table of nftables: {error}");
        findings.push(Finding::warning("no-nf-tables", text, "modprobe nf_tables, or install iptables and leave EnableNFTables false"));
    }
    if let Some(error) = &facts.tun {
        let text = format!("TUN devices cannot be used: {error}");
        findings
            .push(Finding { severity: Severity::Info, ..Finding::warning("no-tun", text, "modprobe tun, if you want the backend udp") });
    }
}

fn mtu(facts: &PreflightFacts, findings: &mut Vec<Finding>) {
    let Some((name, mtu)) = facts.external else {
        let text = "there is no default route".to_owned();
        return findings.push(Finding::warning("no-default-route", text, "start flanneld with --iface or --iface-can-reach"));
    };
    let has_v6 = facts.networks.iter().any(|network| network.family() == crate::Family::V6);
    let pods = mtu.saturating_sub(if has_v6 { OVERHEAD.1 } else { OVERHEAD.0 });
    let fix = format!("ip link set {name} mtu 1500, if the network carries it; or the backend host-gw, which has no overhead");
    if has_v6 && pods < IPV6 {
        let text = format!("{name} has MTU {mtu}, which leaves {pods} for pods with vxlan; IPv6 needs {IPV6}");
        findings.push(Finding::error("mtu-small", text, fix));
    } else if pods < SMALL {
        let text = format!("{name} has MTU {mtu}, which leaves {pods} for pods with vxlan");
        findings.push(Finding::warning("mtu-small", text, fix));
    }
}

fn overlaps(facts: &PreflightFacts, findings: &mut Vec<Finding>) {
    for network in &facts.networks {
        let fix = "choose another pod network, or remove what uses this one";
        for (name, cidr) in &facts.addresses {
            if network.contains(cidr.addr) {
                let text = format!("pod network {network} has address {cidr} of {name} in it");
                findings.push(Finding::error("network-in-use", text, fix));
            }
        }
        for (dst, dev) in facts.routes.iter().filter(|(dst, _)| network.overlaps(*dst)).take(super::SHOWN) {
            let dev = dev.map(|dev| format!(" dev {dev}")).unwrap_or_default();
            findings.push(Finding::error("network-in-use", format!("pod network {network} overlaps the route {dst}{dev}"), fix));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn each_fact_that_matters_is_a_finding() {
        let facts = PreflightFacts {
            vxlan: Some("Operation not supported".to_owned()),
            tun: Some("No such file or directory".to_owned()),
            nf_tables: Some("Operation not supported".to_owned()),
            ports: vec![TakenPort {
                protocol: "UDP",
                port: 8472,
                purpose: "vxlan",
                setting: "Backend.Port",
                by: Some("link cilium_vxlan".to_owned()),
            }],
            external: Some(("eth0".parse().unwrap(), 1300)),
            networks: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/48".parse().unwrap()],
            addresses: vec![
                ("eth1".parse().unwrap(), "10.244.7.1/24".parse().unwrap()),
                ("eth0".parse().unwrap(), "192.0.2.1/24".parse().unwrap()),
            ],
            routes: vec![("10.0.0.0/8".parse().unwrap(), "tun0".parse().ok()), ("192.0.2.0/24".parse().unwrap(), "eth0".parse().ok())],
            forward: vec![
                Finding::error("forward-drop", "chain FORWARD drops".to_owned(), "iptables -I FORWARD"),
                Finding::error("forward-drop", "table inet fw drops".to_owned(), "nft insert rule"),
            ],
            missing_folders: vec!["/opt/cni/bin".to_owned()],
            first_conf: Some("/etc/cni/net.d/05-cilium.conflist".to_owned()),
        };
        let findings = run(&facts);
        let text: String = findings.iter().map(|finding| format!("{} {} {finding}\n", finding.severity, finding.code)).collect();
        expect![[r#"
            error cni-order /etc/cni/net.d/05-cilium.conflist is another network's configuration and comes before 10-flannel.conflist; fix: remove the other network, and then /etc/cni/net.d/05-cilium.conflist
            error forward-dropped table inet fw drops; fix: nft insert rule
            error mtu-small eth0 has MTU 1300, which leaves 1230 for pods with vxlan; IPv6 needs 1280; fix: ip link set eth0 mtu 1500, if the network carries it; or the backend host-gw, which has no overhead
            error network-in-use pod network 10.244.0.0/16 has address 10.244.7.1/24 of eth1 in it; fix: choose another pod network, or remove what uses this one
            error network-in-use pod network 10.244.0.0/16 overlaps the route 10.0.0.0/8 dev tun0; fix: choose another pod network, or remove what uses this one
            error no-vxlan the kernel makes no VXLAN device: Operation not supported; fix: modprobe vxlan (on some systems in the package of extra kernel modules), or the backend host-gw
            error port-taken UDP port 8472 (vxlan) is taken by link cilium_vxlan; fix: stop it, or set Backend.Port
            warning cni-folder there is no folder /opt/cni/bin; fix: install the container runtime, or name its folders (--cni-conf-dir, --cni-bin-dir); mkdir -p /opt/cni/bin
            warning forward-dropped chain FORWARD drops (no problem unless EnableNFTables is true); fix: leave EnableNFTables false, or iptables -I FORWARD
            warning no-nf-tables the kernel makes no table of nftables: Operation not supported; fix: modprobe nf_tables, or install iptables and leave EnableNFTables false
            info no-tun TUN devices cannot be used: No such file or directory; fix: modprobe tun, if you want the backend udp
        "#]].assert_eq(&text);
        assert!(findings.iter().all(|finding| CODES.iter().any(|(code, _)| *code == finding.code)));
    }

    #[test]
    fn ordinary_host_has_no_finding() {
        let external = Some(("eth0".parse().unwrap(), 1500));
        let networks = vec!["10.244.0.0/16".parse().unwrap()];
        let addresses = vec![("eth0".parse().unwrap(), "192.0.2.1/24".parse().unwrap())];
        assert_eq!(run(&PreflightFacts { external, networks, addresses, ..PreflightFacts::default() }), []);
        assert_eq!(run(&PreflightFacts::default()).iter().map(|finding| finding.code).collect::<Vec<_>>(), ["no-default-route"]);
    }

    #[test]
    fn codes_are_explained_and_documented() {
        for (code, reason) in CODES {
            assert!(include_str!("../../../../docs/operations.md").contains(&format!("| `{code}` |")), "{code} is not documented");
            assert!(reason.ends_with('.'));
        }
    }
}
