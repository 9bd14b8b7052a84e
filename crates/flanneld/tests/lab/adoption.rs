//! A node that a Go flanneld v0.28.9 left is taken over without a lost packet, and left so that it can be taken back. The
//! state is written from the specification, sections 3.1, 5.1, 5.2 and 6, by `ip`, `bridge` and `iptables`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use flannel::renewal::LEASE_TTL;
use flannel::{Lease, wire};
use kernel::netns::Netns;
use lab::{Lab, Plan, Pod, PodFamily, StoreKind};
use serde_json::json;

use crate::{eventually, ping_all_from, ping_during, shell};

const MAC: &str = "0e:00:00:00:00:0a";
const MAC6: &str = "0e:00:00:00:06:0a";

/// How a Go flanneld was configured.
#[derive(Debug, Clone, Copy)]
struct Go {
    backend: &'static str,
    direct_routing: bool,
    nftables: bool,
}

/// What a Go flanneld with `--ip-masq` leaves in the kernel of host 1. `peer` are the VTEPs of host 2, v4 and v6.
fn go_state(go: Go, peer: Option<(&str, &str)>) -> String {
    let mut script = String::new();
    if let Some((mac, mac6)) = peer {
        writeln!(
            script,
            "ip link add flannel.1 address {MAC} mtu 1450 txqueuelen 0 type vxlan id 1 dev eth0 local 10.0.0.1 nolearning dstport 8472
             ip address add 10.244.1.0/32 dev flannel.1
             ip link set flannel.1 up
             ip link add flannel-v6.1 address {MAC6} mtu 1430 txqueuelen 0 type vxlan id 1 dev eth0 local fd00:10::1 nolearning dstport 8472
             ip address add fd00:244:0:1::/128 dev flannel-v6.1
             ip link set flannel-v6.1 up"
        )
        .unwrap();
        // The peer, and one that left while no daemon ran.
        let peers = [(2, mac, mac6, "2"), (77, "0e:00:00:00:00:4d", "0e:00:00:00:06:4d", "77")];
        for (n, mac, mac6, host) in peers.into_iter().filter(|_| !go.direct_routing) {
            writeln!(
                script,
                "ip neighbour replace 10.244.{n}.0 lladdr {mac} dev flannel.1 nud permanent
                 bridge fdb replace {mac} dev flannel.1 dst 10.0.0.{host} self permanent
                 ip route replace 10.244.{n}.0/24 via 10.244.{n}.0 dev flannel.1 onlink
                 ip neighbour replace fd00:244:0:{n:x}:: lladdr {mac6} dev flannel-v6.1 nud permanent
                 bridge fdb replace {mac6} dev flannel-v6.1 dst fd00:10::{host} self permanent
                 ip route replace fd00:244:0:{n:x}::/64 via fd00:244:0:{n:x}:: dev flannel-v6.1 onlink"
            )
            .unwrap();
        }
    }
    if go.backend == "host-gw" || go.direct_routing {
        for (n, host) in [(2, "2"), (77, "77")] {
            writeln!(
                script,
                "ip route add 10.244.{n}.0/24 via 10.0.0.{host} dev eth0
                 ip route add fd00:244:0:{n:x}::/64 via fd00:10::{host} dev eth0"
            )
            .unwrap();
        }
    }
    match go.nftables {
        true => go_nftables(&mut script),
        false => go_iptables(&mut script),
    }
    script
}

fn go_nftables(script: &mut String) {
    for (ip, version, cluster, pod, multicast) in
        [("ip", 4, "10.244.0.0/16", "10.244.1.0/24", "224.0.0.0/4"), ("ip6", 6, "fd00:244::/48", "fd00:244:0:1::/64", "ff00::/8")]
    {
        writeln!(
            script,
            "nft -f - <<'E'
table {ip} flannel-ipv{version} {{
  comment \"rules for flannel-ipv{version}\"
  chain forward {{
    comment \"chain to accept flannel traffic\"
    type filter hook forward priority filter; policy accept;
    {ip} saddr {cluster} accept
    {ip} daddr {cluster} accept
  }}
  chain postrtg {{
    comment \"chain to manage traffic masquerading by flannel\"
    type nat hook postrouting priority srcnat; policy accept;
    meta mark 0x4000 return
    {ip} saddr {pod} {ip} daddr {cluster} return
    {ip} saddr {cluster} {ip} daddr {pod} return
    {ip} saddr != {pod} {ip} daddr {cluster} return
    {ip} saddr {cluster} {ip} daddr != {multicast} masquerade fully-random
    {ip} saddr != {cluster} {ip} daddr {cluster} masquerade fully-random
  }}
}}
E"
        )
        .unwrap();
    }
}

fn go_iptables(script: &mut String) {
    for (stem, cluster, pod, multicast) in
        [("iptables", "10.244.0.0/16", "10.244.1.0/24", "224.0.0.0/4"), ("ip6tables", "fd00:244::/48", "fd00:244:0:1::/64", "ff00::/8")]
    {
        let masq = "-m comment --comment \"flanneld masq\"";
        let forward = "-m comment --comment \"flanneld forward\"";
        writeln!(
            script,
            "{stem}-restore --noflush <<'E'
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING {masq} -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN
-A FLANNEL-POSTRTG -s {pod} -d {cluster} {masq} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} -d {pod} {masq} -j RETURN
-A FLANNEL-POSTRTG ! -s {cluster} -d {pod} {masq} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} ! -d {multicast} {masq} -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} {masq} -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD {forward} -j FLANNEL-FWD
-A FLANNEL-FWD -s {cluster} {forward} -j ACCEPT
-A FLANNEL-FWD -d {cluster} {forward} -j ACCEPT
COMMIT
E"
        )
        .unwrap();
    }
}

/// Foreign objects: routes of the operator inside and outside the pod network, a rule, a neighbour.
const FOREIGN: &str = "ip route add 10.244.88.0/28 via 10.0.0.254 dev eth0
    ip route add 10.244.99.0/24 via 10.0.0.254 dev eth0 proto static
    ip route add 172.30.0.0/16 via 10.0.0.254 dev eth0
    iptables -A FORWARD -s 198.51.100.0/24 -j DROP
    ip neighbour replace 10.0.0.200 lladdr 02:00:00:00:00:01 dev eth0 nud permanent";

fn foreign_is_there(netns: &Netns) {
    let routes = shell(netns, "ip route");
    for route in ["10.244.88.0/28 via 10.0.0.254", "10.244.99.0/24 via 10.0.0.254", "172.30.0.0/16 via 10.0.0.254"] {
        assert!(routes.contains(route), "{route} is gone:\n{routes}");
    }
    assert!(shell(netns, "iptables -S FORWARD").contains("-s 198.51.100.0/24 -j DROP"));
    assert!(shell(netns, "ip neighbour show dev eth0").contains("10.0.0.200"));
}

/// All that is in a host's kernel, without counters and lifetimes.
fn snapshot(netns: &Netns) -> BTreeSet<String> {
    let text = shell(
        netns,
        "ip -d link show type vxlan; ip address show type vxlan; ip -4 route; ip -6 route; bridge fdb show | grep flannel || true; ip neighbour show nud permanent
         iptables -S; iptables -t nat -S; ip6tables -S; ip6tables -t nat -S; nft list tables",
    );
    text.lines().map(|line| line.trim().trim_end_matches(" tentative").to_owned()).collect()
}

/// What the dead peer left is gone, and nothing is new but the routes of the other peer.
fn only_what_is_stale_is_gone(backend: &str, before: &BTreeSet<String>, after: &BTreeSet<String>) {
    let gone: Vec<&String> = before.difference(after).collect();
    let stale = |line: &str| {
        let of_the_dead =
            ["10.244.77.0", "fd00:244:0:4d:", "0e:00:00:00:00:4d", "0e:00:00:00:06:4d"].iter().any(|text| line.contains(text));
        let of_the_peer = line.starts_with("10.244.2.0/24 via") || line.starts_with("fd00:244:0:2::/64 via");
        of_the_dead || of_the_peer
    };
    assert!(gone.iter().all(|line| stale(line)), "{backend}: {gone:#?}");
    let of_the_dead = ["10.244.77.0", "fd00:244:0:4d", "0e:00:00:00:00:4d", "0e:00:00:00:06:4d"];
    assert!(!after.iter().any(|line| of_the_dead.iter().any(|text| line.contains(text))), "{backend}: {after:#?}");
    let new: Vec<&String> = after.difference(before).collect();
    assert!(new.iter().all(|line| line.contains("proto 241")), "{backend}: nothing new but the peer's routes: {new:#?}");
    assert_eq!(new.len(), 2, "{backend}: {new:#?}");
}

pub(crate) fn a_go_node_is_taken_over(root: &Path) {
    let host_gw = Go { backend: "host-gw", direct_routing: false, nftables: false };
    let vxlan = Go { backend: "vxlan", ..host_gw };
    for go in [host_gw, vxlan, Go { direct_routing: true, ..vxlan }, Go { nftables: true, ..vxlan }] {
        let backend = go.backend;
        let root = root.join(format!("{go:?}").replace(|c: char| !c.is_alphanumeric(), "-"));
        let config = json!({ "Type": backend, "DirectRouting": go.direct_routing });
        let mut plan = Plan::new(2, &config, Path::new(super::PROGRAM)).family(PodFamily::Dual);
        plan.config["EnableNFTables"] = go.nftables.into();
        let mut lab = Lab::wire(plan, &root).unwrap();
        lab.start_store().unwrap();
        lab.put_config().unwrap();
        // The lease of host 1, to the byte as a Go flanneld writes it.
        let key = wire::parse_key("10.244.1.0-24&fd00:244:0:1::-64").unwrap();
        let value = match backend {
            "vxlan" => format!(
                "{{\"PublicIP\":\"10.0.0.1\",\"PublicIPv6\":\"fd00:10::1\",\"BackendType\":\"vxlan\",\"BackendData\":{{\"VNI\":1,\"VtepMAC\":\"{MAC}\"}},\"BackendV6Data\":{{\"VNI\":1,\"VtepMAC\":\"{MAC6}\"}}}}"
            ),
            _ => "{\"PublicIP\":\"10.0.0.1\",\"PublicIPv6\":\"fd00:10::1\",\"BackendType\":\"host-gw\"}".to_owned(),
        };
        let lease = Lease { key, peer: wire::parse_value(value.as_bytes()).unwrap() };
        lab.with_store(async |store| {
            let id = store.grant(LEASE_TTL).await?;
            store.put_lease(&lease, id, 0).await
        })
        .unwrap();
        lab.start_daemon(1, &[]).unwrap();
        lab.wait_state(1, "host 1's lease", |state| state["peers"]["programmed"] == 1).unwrap();
        let leases = lab.with_store(async |store| store.snapshot().await).unwrap();
        let data = leases.entries.iter().find(|entry| entry.key != key).unwrap().peer.clone().unwrap().backend_data;
        let mac = |data: &Option<Box<str>>| data.as_ref().map(|text| text.split('"').nth_back(1).unwrap().to_owned());
        let vteps = mac(&data.v4).zip(mac(&data.v6));
        let netns = &lab.hosts[0].netns;
        shell(netns, &go_state(go, vteps.as_ref().map(|(v4, v6)| (v4.as_str(), v6.as_str()))));
        shell(netns, FOREIGN);
        let mtu = if backend == "vxlan" { 1450 } else { 1500 };
        let env = format!(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"
        );
        std::fs::write(lab.hosts[0].subnet_file(), &env).unwrap();
        let pods: Vec<Pod> = [0, 1].map(|host| lab.add_pod(host).unwrap()).into();
        ping_all_from(&pods[0].netns, &pods[1].addresses);

        let before = snapshot(&lab.hosts[0].netns);
        let from = Netns::open(&pods[0].path).unwrap();
        // Both families at once, while it is taken over.
        let mut lost6 = (0, 0);
        let lost4 = ping_during(&from, pods[1].addresses[0], || {
            lost6 = ping_during(&from, pods[1].addresses[1], || {
                lab.start_daemon(0, &[]).unwrap();
                lab.wait_state(0, "one peer", |state| state["peers"]["programmed"] == 1).unwrap();
            });
        });
        assert_eq!((lost4.1, lost6.1), (0, 0), "{backend}: of {} and {} pings, while the node was taken over", lost4.0, lost6.0);
        // The lease, the file and the devices are the same; the rules were right and were not touched; what the dead peer
        // left is gone; what is foreign is there.
        let after = snapshot(&lab.hosts[0].netns);
        only_what_is_stale_is_gone(backend, &before, &after);
        foreign_is_there(&lab.hosts[0].netns);
        if go.nftables {
            // Go's rules miss a bit of what they mean: ours are in their place, in one step.
            let rules = shell(&lab.hosts[0].netns, "nft list table ip flannel-ipv4");
            assert!(rules.contains("mark and 0x00004000 == 0x00004000") || rules.contains("mark & 0x00004000 == 0x00004000"), "{rules}");
        } else {
            let counters = shell(&lab.hosts[0].netns, "iptables -L FLANNEL-FWD -v -x -n");
            let packets: u64 = counters.lines().nth(2).and_then(|line| line.split_whitespace().next()).unwrap().parse().unwrap();
            assert!(packets > 0, "{backend}: the rules were rewritten:\n{counters}");
        }
        assert_eq!(std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap(), env);
        let now = lab.with_store(async |store| store.snapshot().await).unwrap();
        let own = now.entries.iter().find(|entry| entry.key == key).unwrap();
        assert_eq!(wire::value(own.peer.as_ref().unwrap()), value, "{backend}");

        // And back: at its end the daemon leaves all that it has, for a Go flanneld to find.
        let running = snapshot(&lab.hosts[0].netns);
        let (sent, lost) = ping_during(&from, pods[1].addresses[0], || assert!(lab.stop_daemon(0, false).unwrap().success()));
        assert_eq!(lost, 0, "{backend}: of {sent}, while it ended");
        assert_eq!(snapshot(&lab.hosts[0].netns), running, "{backend}");
        ping_all_from(&pods[0].netns, &pods[1].addresses);
    }
}

pub(crate) fn operator_route_is_not_adopted(root: &Path) {
    let mut lab = Lab::start(super::plan(2, "host-gw", StoreKind::Embedded), root).unwrap();
    lab.settle().unwrap();
    // It looks as one of Go's would; but ours has run here last, and leaves no such routes.
    let route = "10.244.99.0/24 via 10.0.0.254 dev eth0";
    shell(&lab.hosts[0].netns, &format!("ip route add {route}"));
    lab.stop_daemon(0, false).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.settle().unwrap();
    assert!(shell(&lab.hosts[0].netns, "ip route").contains(route));
}

pub(crate) fn change_of_pod_network_leaves_no_old_objects(root: &Path) {
    let mut plan = super::plan(2, "vxlan", StoreKind::Embedded);
    plan.config["EnableNFTables"] = false.into();
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    for host in 0..2 {
        lab.stop_daemon(host, false).unwrap();
    }
    let config = json!({ "Network": "10.99.0.0/16", "Backend": { "Type": "vxlan" } }).to_string();
    lab.with_store(async |store| store.put_config(&config).await).unwrap();
    for host in 0..2 {
        lab.start_daemon(host, &[]).unwrap();
    }
    lab.settle().unwrap();
    for host in &lab.hosts {
        eventually("the old network is gone", || {
            let all: Vec<String> = snapshot(&host.netns).into_iter().filter(|line| line.contains("10.244.")).collect();
            all.is_empty()
        });
    }
}

pub(crate) fn blackhole_route_covers_unused_addresses(root: &Path) {
    let plan = super::plan(1, "host-gw", StoreKind::Embedded).family(PodFamily::Dual);
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.start_daemon(0, &["--ip-blackhole-route"]).unwrap();
    lab.settle().unwrap();
    let routes = |lab: &Lab| shell(&lab.hosts[0].netns, "ip route; ip -6 route");
    let is_there = |text: &str| text.contains("blackhole 10.244.1.0/24") && text.contains("blackhole fd00:244:0:1::/64");
    assert!(is_there(&routes(&lab)), "{}", routes(&lab));
    // It does not keep pods of this host from being reached, and comes back.
    let pod = lab.add_pod(0).unwrap();
    shell(&lab.hosts[0].netns, &format!("ping -c1 -W2 {}; ping -c1 -W2 {}", pod.addresses[0], pod.addresses[1]));
    shell(&lab.hosts[0].netns, "ip route del blackhole 10.244.1.0/24; ip -6 route del blackhole fd00:244:0:1::/64");
    eventually("the blackhole route is back", || is_there(&routes(&lab)));
    // Without the flag it goes.
    lab.stop_daemon(0, false).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.settle().unwrap();
    eventually("the blackhole route is gone", || !routes(&lab).contains("blackhole"));
}
