//! The facts for the checks, read from a real kernel.

use std::process::Command;

use flannel::check::{Check, Expected, Facts, Finding, HostFacts};
use flannel::object::{Link, LinkKind};
use flannel::{Mac, PerFamily, Vni};
use kernel::Kernel;
use kernel::netns::Netns;

use crate::name;

/// Runs a script in the test's namespace, one command a line.
#[track_caller]
fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

fn expected() -> Expected {
    let kind = LinkKind::Vxlan {
        vni: Vni::new(1).unwrap(),
        port: 8472,
        local: "192.0.2.1".parse().unwrap(),
        lower: name("eth0"),
        gbp: false,
        learning: false,
    };
    Expected {
        networks: PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: "fd00:244::/48".parse().ok() },
        own: PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: "fd00:244:0:1::/64".parse().ok() },
        external: Some(name("eth0")),
        addresses: PerFamily { v4: "192.0.2.1".parse().ok(), v6: "2001:db8::1".parse().ok() },
        devices: PerFamily { v4: Some(name("flannel.1")), v6: None },
        bridge: Some(name("cni0")),
        links: vec![Link { name: name("flannel.1"), kind, mac: Mac([2; 6]), mtu: 1450, up: true }],
        ..Expected::default()
    }
}

fn facts() -> HostFacts {
    let facts = Kernel::open().unwrap().inspect(&expected());
    assert_eq!(facts.unreadable, [""; 0]);
    facts
}

fn findings(check: Check) -> Vec<Finding> {
    check.run(Facts { expected: &expected(), host: &facts() })
}

fn texts(check: Check) -> Vec<String> {
    findings(check).into_iter().map(|finding| finding.text).collect()
}

/// A host with the daemon's device, the pods' bridge with a pod, and an external interface.
fn host() {
    sh("ip link set lo up
        ip link add eth0 type veth peer name eth0x; ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up; ip link set eth0x up
        ip link add flannel.1 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0 nolearning; ip link set flannel.1 up
        ip link add cni0 type bridge; ip addr add 10.244.1.1/24 dev cni0; ip link set cni0 up
        ip route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto 241 metric 2
        ip route add 10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink proto 241 metric 3");
}

pub(crate) fn chains_that_drop() {
    host();
    // The setting, how it is undone, and a part of the text. Each in its own packet filter.
    let cases = [
        (
            "iptables-nft -P FORWARD DROP",
            "iptables-nft -P FORWARD ACCEPT",
            "iptables-nft table filter drops forwarded packets of IPv4 pods: its policy is drop",
        ),
        (
            "iptables-nft -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables-nft -A FORWARD -j REJECT --reject-with icmp-host-prohibited",
            "iptables-nft -F FORWARD",
            "by rule 2",
        ),
        (
            "iptables-legacy -A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT; iptables-legacy -A FORWARD -m comment --comment x -j REJECT",
            "iptables-legacy -F FORWARD",
            "iptables-legacy table filter rejects forwarded packets of IPv4 pods: by rule 2",
        ),
        ("iptables-legacy -P FORWARD DROP", "iptables-legacy -P FORWARD ACCEPT", "its policy is drop"),
        (
            "iptables-legacy -N ours; iptables-legacy -A ours -i eth9 -j RETURN; iptables-legacy -A ours -i cni+ -j DROP; iptables-legacy -A FORWARD -g ours",
            "iptables-legacy -F; iptables-legacy -X",
            "by rule 2 of chain ours",
        ),
        ("ip6tables-legacy -A FORWARD -s fd00:244::/48 -j DROP", "ip6tables-legacy -F", "packets of IPv6 pods: by rule 1"),
        (
            "nft 'add table inet fw; add chain inet fw forward { type filter hook forward priority 10; policy accept; }; add rule inet fw forward ct state { established, related } accept; add rule inet fw forward iifname lo accept; add rule inet fw forward meta nfproto ipv4 counter log reject'",
            "nft delete table inet fw",
            "nftables table inet fw rejects forwarded packets of IPv4 pods",
        ),
        (
            "nft 'add table ip fw; add chain ip fw zone; add rule ip fw zone ip saddr 10.0.0.0/8 ip daddr 10.244.0.0/16 drop; add chain ip fw forward { type filter hook forward priority 0; }; add rule ip fw forward iifname \"cni*\" oifname { flannel.1, eth0 } goto zone'",
            "nft delete table ip fw",
            "of chain zone",
        ),
        (
            "nft 'add table ip6 fw; add chain ip6 fw forward { type filter hook forward priority 0; policy drop; }; add rule ip6 fw forward ip6 saddr 2001:db8::/32 accept'",
            "nft delete table ip6 fw",
            "table ip6 fw drops forwarded packets of IPv6 pods: its policy is drop",
        ),
    ];
    for (break_it, mend, part) in cases {
        sh(break_it);
        let found = texts(Check::Forward);
        assert!(matches!(found.as_slice(), [text] if text.contains(part)), "{break_it}: {found:?} in {:?}", facts().filter);
        sh(mend);
        assert_eq!(texts(Check::Forward), [""; 0], "{mend}");
    }
    // The command that a finding advises is valid, and helps.
    sh("nft 'add table inet fw; add chain inet fw forward { type filter hook forward priority 0; policy drop; }'");
    sh("iptables-nft -P FORWARD DROP; iptables-legacy -A FORWARD -j REJECT");
    let found = findings(Check::Forward);
    assert_eq!(found.len(), 4, "{found:?}");
    found.iter().for_each(|finding| sh(&finding.fix));
    assert_eq!(texts(Check::Forward), [""; 0]);
}

pub(crate) fn chains_that_accept() {
    host();
    sh("iptables-nft -P FORWARD DROP
        iptables-nft -N KUBE-FORWARD; iptables-nft -A FORWARD -j KUBE-FORWARD
        iptables-nft -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
        iptables-nft -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
        iptables-nft -N FLANNEL-FWD; iptables-nft -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD
        iptables-nft -A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT; iptables-nft -A FLANNEL-FWD -d 10.244.0.0/16 -j ACCEPT
        iptables-nft -A FORWARD -j REJECT");
    sh("iptables-legacy -A FORWARD -p tcp --dport 22 -j DROP; iptables-legacy -A FORWARD -m limit --limit 1/s -j DROP
        iptables-legacy -A FORWARD -i virbr0 -j REJECT; iptables-legacy -A FORWARD ! -s 10.244.0.0/16 -d 192.0.2.0/24 -j DROP");
    sh("nft 'add table inet fw; add set inet fw bad { type ipv4_addr; flags interval; }; add element inet fw bad { 10.244.7.0/24 }'");
    sh("nft 'add chain inet fw forward { type filter hook forward priority -5; policy accept; }
        add rule inet fw forward ip saddr @bad drop; add rule inet fw forward tcp dport 23 drop; add rule inet fw forward ct state invalid drop
        add rule inet fw forward iifname vmap { docker0 : drop }; add rule inet fw forward iif lo drop'");
    assert_eq!(texts(Check::Forward), [""; 0]);
    assert!(!facts().has_kube_proxy);
    sh("iptables-legacy -t nat -N KUBE-SERVICES");
    assert!(facts().has_kube_proxy);
}

pub(crate) fn foreign_routes_and_rules() {
    host();
    assert_eq!(facts().routes.len(), 1, "only the route of the bridge: no other program's concerns the daemon's");
    let cases = [
        "ip route add blackhole 10.244.2.0/24 proto bird",
        "ip route add unreachable 10.244.2.0/24 metric 1",
        "ip route add prohibit 10.244.3.128/25",
        "ip route add 10.244.2.0/24 via 192.0.2.99 proto static",
        "ip route add 10.244.2.0/25 dev eth0 scope link",
    ];
    for break_it in cases {
        sh(break_it);
        let found = findings(Check::HiddenPeer);
        assert_eq!(found.len(), 1, "{break_it}: {found:?}");
        // The command that it advises removes this route.
        sh(&found[0].fix);
        assert_eq!(findings(Check::HiddenPeer), [], "{}", found[0].fix);
    }
    sh(
        "ip link del cni0; ip route add blackhole 10.244.1.0/24 proto bird; ip link add cni0 type bridge; ip addr add 10.244.1.1/24 dev cni0; ip link set cni0 up",
    );
    let found = findings(Check::HiddenPods);
    assert_eq!(found.len(), 1, "{found:?}");
    sh(&found[0].fix);
    assert_eq!(findings(Check::HiddenPods), []);
    sh(
        "ip route add default via 192.0.2.254 table 52; ip rule add pref 100 to 10.244.0.0/16 lookup 52; ip rule add pref 90 fwmark 7 lookup 52",
    );
    let found = findings(Check::PolicyRule);
    assert!(matches!(found.as_slice(), [finding] if finding.text.contains("sends packets between pods to table 52")), "{found:?}");
    sh("ip rule del pref 100; ip rule add pref 80 to 10.244.0.0/16 blackhole");
    let found = findings(Check::PolicyRule);
    assert!(matches!(found.as_slice(), [finding] if finding.text.contains("discards packets between pods")), "{found:?}");
    sh(&found[0].fix);
    // As wg-quick does.
    sh("ip rule add pref 70 not fwmark 51820 lookup 52; ip rule add pref 60 lookup main suppress_prefixlength 0");
    assert_eq!(findings(Check::PolicyRule), []);
    sh(
        "ip link add eth1 type bridge; ip addr add 198.51.100.1/24 dev eth1; ip link set eth1 up; ip route add default via 192.0.2.254; ip route append default via 198.51.100.254",
    );
    let expected = Expected { chosen_by_default_route: true, ..expected() };
    let found = Check::DefaultRoutes.run(Facts { expected: &expected, host: &facts() });
    assert!(matches!(found.as_slice(), [finding] if finding.text.contains("eth0 and eth1")), "{found:?}");
}

pub(crate) fn moved_and_renamed_devices() {
    host();
    assert_eq!(texts(Check::Device), [""; 0]);
    sh("ip link set flannel.1 down; ip link set flannel.1 name old9");
    let found = texts(Check::Device);
    assert!(matches!(found.as_slice(), [text] if text.contains("old9 has its VNI 1 and UDP port 8472")), "{found:?}");
    sh("ip link set old9 name flannel.1");
    assert_eq!(texts(Check::Device), [""; 0]);
    // It is in the namespace of a process.
    let other = Netns::create().unwrap();
    let mut sleeper = other.run(|| Command::new("sleep").arg("60").spawn()).unwrap().unwrap();
    sh(&format!("ip link set flannel.1 netns {}", sleeper.id()));
    let found = findings(Check::Device);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(matches!(found.as_slice(), [finding] if finding.text.contains("was moved to the network namespace of process")), "{found:?}");
    assert!(found[0].text.contains("(sleep), where its name is flannel.1"), "{found:?}");
}

pub(crate) fn links_and_addresses() {
    host();
    assert_eq!(texts(Check::BridgeAddress), [""; 0]);
    sh("ip addr del 10.244.1.1/24 dev cni0; ip addr add 10.99.1.1/24 dev cni0");
    let found = findings(Check::BridgeAddress);
    assert!(matches!(found.as_slice(), [finding] if finding.fix.starts_with("ip addr del 10.99.1.1/24 dev cni0")), "{found:?}");
    sh("echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter");
    let facts = facts();
    assert_eq!(facts.ipv6_disabled, [name("eth0")]);
    assert!(facts.rp_filter.contains(&(name("eth0"), 1)), "{:?}", facts.rp_filter);
    assert_eq!(facts.rp_dropped, 0);
}
