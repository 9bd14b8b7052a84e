//! The ipip backend on a kernel that has IPIP: its objects are repaired, and a Go flanneld's node is adopted.

use std::net::IpAddr;
use std::path::Path;

use flannel::renewal::LEASE_TTL;
use flannel::{Lease, wire};
use kernel::netns::Netns;
use lab::{Lab, Pod, StoreKind};

use crate::{eventually, ping_all_from, ping_during, plan, shell, start};

/// The device with its settings, its addresses, and all routes into the pod network.
fn objects(netns: &Netns) -> String {
    shell(
        netns,
        "ip -d link show flannel.ipip 2>&1 | grep -o 'mtu [0-9]*\\|ipip.*pmtudisc\\|ipip remote.*' || true
         ip -4 -o address show dev flannel.ipip 2>&1 | grep -o 'inet [^ ]*' || true
         ip route show | grep 10.244 | grep -v cni0 | sort || true",
    )
}

/// Whatever another program does to the device, its address and its routes is repaired, and pods reach each other again.
pub(crate) fn objects_are_restored(root: &Path) {
    let mut lab = start(root, 2, "ipip", StoreKind::Embedded);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let whole = objects(&lab.hosts[0].netns);
    assert!(whole.contains("mtu 1480") && whole.contains("via 10.0.0.2 dev flannel.ipip proto 241"), "{whole}");
    assert!(whole.contains("ipip") && whole.contains("remote any local 10.0.0.1 ttl inherit nopmtudisc"), "{whole}");
    for change in [
        "ip link del flannel.ipip",
        "ip link set flannel.ipip down",
        "ip link set flannel.ipip mtu 1400",
        "ip link change flannel.ipip type ipip local 10.0.0.77 remote any",
        "ip address flush dev flannel.ipip",
        "ip route flush proto 241",
    ] {
        shell(&lab.hosts[0].netns, change);
        eventually(&format!("{change}: all comes back"), || objects(&lab.hosts[0].netns) == whole);
        ping_all_from(&pods[0].netns, &[pods[1].address]);
    }
    // Another program's device has the name when the daemon starts.
    for kind in ["dummy", "ipip local 10.0.0.1 remote 10.0.0.2"] {
        lab.stop_daemon(0, false).unwrap();
        shell(&lab.hosts[0].netns, &format!("ip link del flannel.ipip; ip link add flannel.ipip type {kind}"));
        lab.start_daemon(0, &[]).unwrap();
        eventually(&format!("{kind}: all comes back"), || objects(&lab.hosts[0].netns) == whole);
        ping_all_from(&pods[0].netns, &[pods[1].address]);
    }
    assert_eq!(lab.hosts[0].state().unwrap()["objects"]["failed"], serde_json::json!([]));
}

/// What a Go flanneld leaves is taken over as it is (specification, section 5.4): the device stays the same one, the dead peer's route
/// goes, and no ping is lost.
pub(crate) fn a_go_node_is_taken_over(root: &Path) {
    let mut lab = Lab::wire(plan(2, "ipip", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let key = wire::parse_key("10.244.1.0-24").unwrap();
    let lease = Lease { key, peer: wire::parse_value(br#"{"PublicIP":"10.0.0.1","PublicIPv6":null,"BackendType":"ipip"}"#).unwrap() };
    lab.with_store(async |store| {
        let id = store.grant(LEASE_TTL).await?;
        store.put_lease(&lease, id, 0).await
    })
    .unwrap();
    lab.start_daemon(1, &[]).unwrap();
    lab.wait_state(1, "host 1's lease", |state| state["peers"]["programmed"] == 1).unwrap();
    let peer = lab.hosts[1].state().unwrap()["subnet"].as_str().unwrap().to_owned();
    shell(
        &lab.hosts[0].netns,
        &format!(
            "ip link add flannel.ipip type ipip local 10.0.0.1 remote any ttl inherit nopmtudisc
             ip link set flannel.ipip mtu 1480 up
             ip address add 10.244.1.0/32 dev flannel.ipip
             ip route add {peer} via 10.0.0.2 dev flannel.ipip onlink
             ip route add 10.244.77.0/24 via 10.0.0.77 dev flannel.ipip onlink"
        ),
    );
    let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1480\nFLANNEL_IPMASQ=true\n";
    std::fs::write(lab.hosts[0].subnet_file(), env).unwrap();
    let pods: Vec<Pod> = [0, 1].map(|host| lab.add_pod(host).unwrap()).into();
    ping_all_from(&pods[0].netns, &pods[1].addresses);
    let index = |lab: &Lab| shell(&lab.hosts[0].netns, "ip -o link show flannel.ipip | cut -d: -f1");
    let before = index(&lab);
    let from = Netns::open(&pods[0].path).unwrap();
    let target: IpAddr = pods[1].addresses[0];
    let (sent, lost) = ping_during(&from, target, || {
        lab.start_daemon(0, &[]).unwrap();
        lab.wait_state(0, "one peer", |state| state["peers"]["programmed"] == 1).unwrap();
    });
    assert_eq!(lost, 0, "of {sent} pings, while the node was taken over");
    assert_eq!(index(&lab), before, "the device is the same one");
    eventually("the dead peer's route is gone", || !objects(&lab.hosts[0].netns).contains("10.244.77.0"));
    assert!(objects(&lab.hosts[0].netns).contains(&format!("{peer} via 10.0.0.2 dev flannel.ipip")));
    // And back: what a Go flanneld looks for is there when the daemon has ended.
    let there = objects(&lab.hosts[0].netns);
    let (sent, lost) = ping_during(&from, target, || assert!(lab.stop_daemon(0, false).is_ok()));
    assert_eq!((lost, objects(&lab.hosts[0].netns)), (0, there), "of {sent} pings, while the daemon ended");
}
