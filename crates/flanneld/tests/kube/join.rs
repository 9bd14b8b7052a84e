//! Hosts join: pod CIDRs come from the controller manager, annotations are upstream's to the byte, pods reach each other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use kernel::link;
use kernel::netlink::{Protocol, Socket};
use lab::{Pod, PodFamily};

use crate::cluster::{eventually, ping_all_from, ping_during};
use crate::{Version, annotate, annotations, events, field, start};

fn mac(netns: &kernel::netns::Netns, name: &str) -> String {
    let found = netns.run(|| link::get(&mut Socket::open(Protocol::Route).unwrap(), name.parse().unwrap()).unwrap()).unwrap();
    found.and_then(|link| link.mac).unwrap().to_string()
}

pub(crate) fn three_hosts_join(root: &Path, backend: &str, family: PodFamily, version: Version) {
    let mut lab = start(root, 3, backend, family, version);
    let pods: Vec<Pod> = (0..3).map(|host| lab.add_pod(host).unwrap()).collect();
    for pod in &pods {
        let others: Vec<IpAddr> = pods.iter().filter(|other| other.name != pod.name).flat_map(|other| other.addresses.clone()).collect();
        assert_eq!(others.len(), if family == PodFamily::Dual { 4 } else { 2 });
        ping_all_from(&pod.netns, &others);
    }
    let (v4, v6) = (family != PodFamily::V6, family != PodFamily::V4);
    for (i, host) in lab.hosts.iter().enumerate() {
        let state = host.state().unwrap();
        assert_eq!(state["subnet"], lab.pod_cidrs(i).unwrap(), "as the controller manager assigned it");
        // As the specification has it, to the byte.
        let mut want = BTreeMap::from([("kube-subnet-manager", "true".to_owned()), ("backend-type", backend.to_owned())]);
        let data = |device: &str| match backend {
            "vxlan" => format!("{{\"VNI\":1,\"VtepMAC\":\"{}\"}}", mac(&host.netns, device)),
            _ => "null".to_owned(),
        };
        if v4 {
            want.extend([("public-ip", host.address.to_string()), ("backend-data", data("flannel.1"))]);
        } else if backend == "host-gw" {
            want.extend([("public-ip", "0.0.0.0".to_owned()), ("backend-data", "null".to_owned())]);
        }
        if v6 {
            want.extend([("public-ipv6", host.address6.unwrap().to_string()), ("backend-v6-data", data("flannel-v6.1"))]);
        }
        let want: BTreeMap<String, String> = want.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        assert_eq!(annotations(&lab, &host.name), want, "{}", host.name);
        let condition = |part: &str| {
            field(&lab, &format!("node/{}", host.name), &format!(".status.conditions[?(@.type==\"NetworkUnavailable\")].{part}"))
        };
        eventually("the condition is set", || condition("status") == "False");
        assert_eq!((condition("reason"), condition("message")), ("FlannelIsUp".to_owned(), "Flannel is running on this node".to_owned()));
        assert_eq!(events(&lab, &host.name), [], "no Events");
    }
}

pub(crate) fn changed_annotations_are_restored(root: &Path) {
    let mut lab = start(root, 2, "vxlan", PodFamily::Dual, Version::Current);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &pods[1].addresses);
    let before = annotations(&lab, "h2");
    let netns = kernel::netns::Netns::open(&pods[0].path).unwrap();
    let to = pods[1].address;
    let (sent, lost) = ping_during(&netns, to, || {
        // One is taken away, one changed, all taken away: they come back, and no peer loses its way meanwhile.
        annotate(&lab, "h2", &["public-ip-"]);
        eventually("the address comes back", || annotations(&lab, "h2") == before);
        annotate(&lab, "h2", &["backend-v6-data=null", "kube-subnet-manager=false"]);
        eventually("the data come back", || annotations(&lab, "h2") == before);
        let all: Vec<String> = before.keys().map(|key| format!("{key}-")).collect();
        annotate(&lab, "h2", &all.iter().map(String::as_str).collect::<Vec<_>>());
        eventually("all come back", || annotations(&lab, "h2") == before);
    });
    assert_eq!(lost, 0, "of {sent}");

    // An operator's address is published instead of the host's own, at once, and peers send there.
    annotate(&lab, "h2", &["public-ip-overwrite=10.0.0.77"]);
    eventually("it is published", || annotations(&lab, "h2")["public-ip"] == "10.0.0.77");
    let fdb = |dst: &str| {
        let observed = crate::cluster::observe(&lab.hosts[0].netns);
        observed.iter().any(|(_, object)| object.to_string().contains(dst) && matches!(object, flannel::Object::Fdb(_)))
    };
    eventually("peers send there", || fdb("10.0.0.77") && !fdb("10.0.0.2"));
    annotate(&lab, "h2", &["public-ip-overwrite-"]);
    eventually("and back", || fdb("10.0.0.2") && annotations(&lab, "h2") == before);

    // The device is gone while the daemon is down: its MAC is the one that peers know.
    lab.stop_daemon(1, false).unwrap();
    lab.hosts[1]
        .netns
        .run(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            for device in ["flannel.1", "flannel-v6.1"] {
                link::delete(&mut socket, device.parse().unwrap()).unwrap();
            }
        })
        .unwrap();
    let file = lab.hosts[1].subnet_file();
    std::fs::remove_file(&file).unwrap();
    annotate(&lab, "h2", &["node-public-ip=10.0.0.2"]);
    lab.start_daemon(1, &["--public-ip=10.0.0.200"]).unwrap();
    lab.settle().unwrap();
    let mut want = before;
    want.insert("node-public-ip".to_owned(), "10.0.0.2".to_owned());
    assert_eq!(annotations(&lab, "h2"), want, "the same MACs; and the annotation goes before the flag");
    ping_all_from(&pods[0].netns, &pods[1].addresses);
    let subnets: BTreeSet<String> = lab.pod_cidrs(1).unwrap().split(',').map(ToOwned::to_owned).collect();
    let env = std::fs::read_to_string(&file).unwrap();
    assert!(subnets.iter().all(|subnet| env.contains(&subnet.replace(".0/", ".1/").replace("::/", "::1/"))), "{env}");
}

pub(crate) fn recreated_node_gets_its_new_subnet(root: &Path) {
    let mut lab = start(root, 2, "vxlan", PodFamily::V4, Version::Current);
    let before = lab.pod_cidrs(0).unwrap();
    lab.kubectl(&["delete", "node", "h1"], "").unwrap();
    lab.wait_state(1, "no peer", |state| state["peers"]["programmed"] == 0).unwrap();
    let log = lab.hosts[0].log();
    eventually("it says what is wrong", || std::fs::read_to_string(&log).unwrap().contains("there is no Node h1: kubelet makes it"));
    // Another Node has the subnet by now.
    crate::create(
        &lab,
        &[crate::go_node(
            "other",
            &[&before],
            &[("backend-type", "vxlan"), ("public-ip", "10.0.0.99"), ("backend-data", r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}"#)],
        )],
    );
    lab.wait_state(1, "the other", |state| state["peers"]["programmed"] == 1).unwrap();
    crate::create(&lab, &[lab::kubernetes::node("h1")]);
    let now = lab.pod_cidrs(0).unwrap();
    assert_ne!(now, before);
    lab.wait_state(0, "the new subnet", |state| state["subnet"] == now.as_str()).unwrap();
    let file = lab.hosts[0].subnet_file();
    eventually("subnet.env follows", || std::fs::read_to_string(&file).unwrap().contains(&now.replace(".0/", ".1/")));
    lab.wait_state(1, "both", |state| state["peers"]["programmed"] == 2).unwrap();
    eventually("the condition of the new Node is set", || {
        field(&lab, "node/h1", ".status.conditions[?(@.type==\"NetworkUnavailable\")].status") == "False"
    });
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    ping_all_from(&pods[1].netns, &[pods[0].address]);
}

pub(crate) fn address_change_is_followed(root: &Path) {
    let mut lab = start(root, 2, "vxlan", PodFamily::V4, Version::Current);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let script = "ip addr del 10.0.0.1/24 dev eth0; ip addr add 10.0.0.101/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0";
    let changed = lab.hosts[0].netns.run(|| std::process::Command::new("sh").args(["-ec", script]).status()).unwrap().unwrap();
    assert!(changed.success());
    let began = std::time::Instant::now();
    eventually("the annotation follows", || annotations(&lab, "h1")["public-ip"] == "10.0.0.101");
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    ping_all_from(&pods[1].netns, &[pods[0].address]);
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    // And it still follows all changes.
    crate::create(
        &lab,
        &[crate::go_node(
            "n",
            &["10.244.100.0/24"],
            &[("backend-type", "vxlan"), ("public-ip", "10.0.0.99"), ("backend-data", r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}"#)],
        )],
    );
    lab.wait_state(0, "the next peer", |state| state["peers"]["programmed"] == 2).unwrap();
}
