//! The wireguard backend with WireGuard of the kernel: packets in every mode, peers repaired and followed, a device of a Go flanneld
//! adopted. These tests run in the VM, but for the one of user space.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use flannel::object::{AllowedIp, Key, Object, WgPeer};
use flannel::scope::Scope;
use flannel::wireguard::PublicKey;
use flannel::{IfName, Observed, Op};
use kernel::Kernel;
use lab::ping::ping_all;
use lab::{Host, Lab, Plan, Pod, PodFamily, Topology};
use serde_json::{Value, json};

use crate::cleanup::cleanup;
use crate::cluster::{PROGRAM, eventually, ping_during};
use crate::matrix::ping_unfragmented;

const PSK: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
/// In the VM everything takes several times as long.
const SOON: Duration = Duration::from_secs(30);

fn plan(hosts: usize, settings: &Value, family: PodFamily, topology: Topology) -> Plan {
    let mut backend = json!({ "Type": "wireguard" });
    backend.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    Plan { topology, ..Plan::new(hosts, &backend, Path::new(PROGRAM)) }.family(family)
}

fn device(name: &str) -> IfName {
    name.parse().unwrap()
}

fn observe(host: &Host) -> Observed {
    let links = vec![device("flannel-wg"), device("flannel-wg-v6")];
    let scope = Scope { links, networks: vec!["10.244.0.0/16".parse().unwrap()], ..Scope::default() };
    host.netns.run(|| Kernel::open().unwrap().observe(&scope).unwrap()).unwrap()
}

fn apply(host: &Host, ops: &[Op]) {
    let outcomes = host.netns.run(|| Kernel::open().unwrap().apply(ops)).unwrap();
    outcomes.into_iter().collect::<Result<(), _>>().unwrap();
}

/// WireGuard's peers and their subnets on a host, as text.
fn peers(host: &Host) -> Vec<String> {
    let is_peer = |object: &Object| matches!(object, Object::WgPeer(_) | Object::AllowedIp(_));
    observe(host).into_objects().filter(is_peer).map(|object| object.to_string()).collect()
}

#[track_caller]
fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Every pod reaches every other one, by each family and with packets of the full size.
#[track_caller]
fn all_reach_all(pods: &[Pod]) {
    for pod in pods {
        let others = pods.iter().filter(|other| other.name != pod.name);
        let targets: Vec<IpAddr> = others.flat_map(|other| other.addresses.clone()).collect();
        let answered = pod.netns.run(|| ping_all(&targets, Duration::from_secs(10))).unwrap().unwrap();
        assert_eq!(answered.len(), targets.len(), "{}: {answered:?} of {targets:?}", pod.name);
    }
    for target in &pods[1].addresses {
        assert!(ping_unfragmented(&pods[0].netns, target, 1420), "1420 bytes to {target}");
        assert!(!ping_unfragmented(&pods[0].netns, target, 1421), "1421 bytes to {target}");
    }
}

fn started(plan: Plan, root: &Path) -> (Lab, Vec<Pod>) {
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    let pods = (0..lab.hosts.len()).map(|host| lab.add_pod(host).unwrap()).collect();
    (lab, pods)
}

pub(crate) fn two_devices_carry_both_families(root: &Path) {
    let settings = json!({ "PSK": PSK, "PersistentKeepaliveInterval": 25 });
    let (lab, pods) = started(plan(2, &settings, PodFamily::Dual, Topology::Switch), root);
    all_reach_all(&pods);
    for host in &lab.hosts {
        let state = host.state().unwrap();
        assert_eq!(
            (&state["mtu"], &state["backend"], &state["findings"]),
            (&json!(1420), &json!("wireguard"), &json!([])),
            "{}",
            host.name
        );
        let peers = peers(host);
        assert_eq!(peers.len(), 4, "{peers:#?}");
        assert_eq!(peers.iter().filter(|peer| peer.contains("keepalive 25 psk (secret)")).count(), 2, "{peers:#?}");
        let key = std::fs::read_to_string(host.directory.join("run-flannel/wgkey")).unwrap();
        let log = std::fs::read_to_string(host.log()).unwrap();
        for text in [log, state.to_string(), host.get("/metrics").unwrap().1, host.get("/readyz").unwrap().1] {
            assert!(!text.contains(PSK) && !text.contains(&key), "a secret is in {text}");
        }
    }
}

pub(crate) fn one_device_carries_both_families(root: &Path) {
    let (lab, pods) = started(plan(2, &json!({ "Mode": "auto" }), PodFamily::Dual, Topology::Router), root);
    all_reach_all(&pods);
    let peers = peers(&lab.hosts[0]);
    assert_eq!(peers.iter().filter(|peer| peer.starts_with("peer ")).count(), 1, "{peers:#?}");
    assert_eq!(peers.iter().filter(|peer| peer.starts_with("allowed-ip ")).count(), 2, "{peers:#?}");
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    for entry in &snapshot.entries {
        let data = &entry.peer.as_ref().unwrap().backend_data;
        assert!(data.v4.is_some() && data.v4 == data.v6, "the port that is listened on: {data:?}");
    }
}

/// On a kernel without WireGuard. The kernel of the VM has it, so this test runs outside.
pub(crate) fn user_space_carries_packets(root: &Path) {
    let settings = json!({ "PSK": PSK, "PersistentKeepaliveInterval": 25 });
    let (mut lab, pods) = started(plan(3, &settings, PodFamily::Dual, Topology::Router), root);
    all_reach_all(&pods);
    for host in &lab.hosts {
        let state = host.state().unwrap();
        let codes: Vec<&str> = state["findings"].as_array().unwrap().iter().filter_map(|finding| finding["code"].as_str()).collect();
        assert_eq!((codes, &state["mtu"]), (vec!["wireguard-user-space"], &json!(1420)), "{}", host.name);
    }
    // Another program deletes a device: it comes back with its peers.
    lab.hosts[0].shell("ip link delete flannel-wg").unwrap();
    all_reach_all(&pods);
    // A host whose key file is damaged waits until it is gone, and has a new key then.
    lab.stop_daemon(1, false).unwrap();
    let file = lab.hosts[1].directory.join("run-flannel/wgkey");
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, "hunter2").unwrap();
    let (sent, lost) = ping_during(&pods[0].netns, pods[2].address, || {
        lab.start_daemon(1, &[]).unwrap();
        let text = "WireGuard key file /run/flannel/wgkey: it is not base64 (the standard alphabet, with padding): delete it";
        eventually("/readyz names the key file", || lab.hosts[1].get("/readyz").is_ok_and(|(_, body)| body.contains(text)));
        assert!(!std::fs::read_to_string(lab.hosts[1].log()).unwrap().contains("hunter2"));
        std::fs::remove_file(&file).unwrap();
        lab.settle().unwrap();
    });
    assert_eq!(lost, 0, "of {sent}");
    all_reach_all(&pods);
}

pub(crate) fn peers_are_repaired_and_followed(root: &Path) {
    let (mut lab, pods) = started(plan(3, &json!({}), PodFamily::V4, Topology::Switch), root);
    all_reach_all(&pods);
    let link = device("flannel-wg");
    let want = peers(&lab.hosts[0]);
    let found = observe(&lab.hosts[0]);
    let all: Vec<WgPeer> =
        found.iter().filter_map(|(_, object)| if let Object::WgPeer(peer) = object { Some((**peer).clone()) } else { None }).collect();
    let [first, second] = all.as_slice() else { panic!("{all:?}") };
    // Another program deletes a peer, takes away the endpoint of another, and adds one with a subnet of ours.
    let stranger = WgPeer { public_key: PublicKey([77; 32]), endpoint: "10.0.0.77:1".parse().ok(), ..first.clone() };
    let subnet = "10.244.3.0/24".parse().unwrap();
    apply(
        &lab.hosts[0],
        &[
            Op::Delete(Object::WgPeer(Box::new(first.clone()))),
            Op::Set(Object::WgPeer(Box::new(WgPeer { keepalive: 9, ..second.clone() }))),
            Op::Set(Object::WgPeer(Box::new(stranger.clone()))),
            Op::Set(Object::AllowedIp(Box::new(AllowedIp { link, subnet, peer: stranger.public_key }))),
        ],
    );
    // The kernel announces no change of a peer. The audit finds it; a change of the link brings it forward.
    lab.hosts[0].shell("ip link set flannel-wg alias changed").unwrap();
    within(SOON, "peers are repaired", || peers(&lab.hosts[0]) == want);
    all_reach_all(&pods);
    lab.hosts[0].shell("ip link set flannel-wg alias again").unwrap();
    within(SOON, "the age of each handshake is shown", || {
        let state = lab.hosts[0].state().unwrap();
        let list = state["peers"]["list"].as_array().unwrap();
        list.len() == 2 && list.iter().all(|peer| peer["handshake_s"].as_u64().is_some_and(|age| age < 180))
    });

    // A host with a new key, as after a reboot: its old peers are gone everywhere, and no other host is affected.
    lab.stop_daemon(1, false).unwrap();
    let keys = |lab: &Lab| -> Vec<PublicKey> {
        let observed = observe(&lab.hosts[0]);
        observed.iter().filter_map(|(key, _)| if let Key::WgPeer(_, key) = key { Some(*key) } else { None }).collect()
    };
    let before = keys(&lab);
    std::fs::remove_file(lab.hosts[1].directory.join("run-flannel/wgkey")).unwrap();
    let (sent, lost) = ping_during(&pods[0].netns, pods[2].address, || {
        lab.start_daemon(1, &[]).unwrap();
        within(SOON, "the new key is followed", || {
            let now = keys(&lab);
            now.len() == 2 && now != before
        });
    });
    assert_eq!(lost, 0, "of {sent}");
    all_reach_all(&pods);

    // A lease that ends takes its peer with it.
    lab.stop_daemon(2, false).unwrap();
    let key = flannel::wire::parse_key("10.244.3.0-24").unwrap();
    lab.with_store(async |store| {
        let snapshot = store.snapshot().await?;
        let entry = snapshot.entries.iter().find(|entry| entry.key == key).unwrap();
        store.delete_lease(&key, entry.mod_revision).await
    })
    .unwrap();
    within(SOON, "the peer of the ended lease is removed", || peers(&lab.hosts[0]).len() == 2);
}

pub(crate) fn go_device_is_adopted(root: &Path) {
    let (mut lab, pods) = started(plan(2, &json!({ "PersistentKeepaliveInterval": 25 }), PodFamily::V4, Topology::Switch), root);
    all_reach_all(&pods);
    let index = "ip -o link show flannel-wg | cut -d: -f1";
    let before = (lab.hosts[0].shell(index).unwrap(), peers(&lab.hosts[0]));
    let (sent, lost) = ping_during(&pods[0].netns, pods[1].address, || {
        // As a Go flanneld that is killed leaves it: its route has the protocol boot, hosts that left are peers still, and no note says
        // that this program wrote subnet.env.
        lab.stop_daemon(0, true).unwrap();
        lab.hosts[0].shell("ip route replace 10.244.0.0/16 dev flannel-wg scope link && rm -f /run/flannel/.subnet.env.writer").unwrap();
        let left: Vec<Op> = (0..40u8)
            .flat_map(|n| {
                let (link, public_key) = (device("flannel-wg"), PublicKey([100 + n; 32]));
                let peer = WgPeer { link, public_key, endpoint: "10.0.0.99:51820".parse().ok(), keepalive: 25, psk: None, handshake: None };
                let subnet = format!("10.244.{}.0/24", 100 + n).parse().unwrap();
                [Object::WgPeer(Box::new(peer)), Object::AllowedIp(Box::new(AllowedIp { link, subnet, peer: public_key }))]
            })
            .map(Op::Set)
            .collect();
        apply(&lab.hosts[0], &left);
        assert_eq!(peers(&lab.hosts[0]).len(), 82);
        lab.start_daemon(0, &[]).unwrap();
        lab.settle().unwrap();
        within(SOON, "what Go left is swept", || peers(&lab.hosts[0]).len() == 2);
    });
    assert_eq!(lost, 0, "of {sent}");
    assert_eq!((lab.hosts[0].shell(index).unwrap(), peers(&lab.hosts[0])), before, "the device and its peers are the same");
    let routes = lab.hosts[0].shell("ip route show dev flannel-wg").unwrap();
    assert_eq!(routes.trim(), "10.244.0.0/16 proto 241 scope link");
    // The daemon ends, the device stays.
    let (sent, lost) = ping_during(&pods[0].netns, pods[1].address, || {
        lab.stop_daemon(0, false).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        lab.start_daemon(0, &[]).unwrap();
        lab.settle().unwrap();
    });
    assert_eq!(lost, 0, "of {sent}");
    // `flanneld cleanup` removes the device and the key.
    lab.stop_daemon(0, false).unwrap();
    let (ok, text) = cleanup(&lab.hosts[0], &[]);
    assert!(ok && text.contains("removed link flannel-wg ") && text.contains("removed file /run/flannel/wgkey\n"), "{text}");
    let left = lab.hosts[0].shell("ip link; ip route; ls -A /run/flannel").unwrap();
    assert!(!left.contains("flannel-wg") && !left.contains("wgkey"), "{left}");
}
