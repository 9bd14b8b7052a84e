//! Paths to peers, measured: broken on purpose, in one way after the other.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kernel::netns::Netns;
use lab::verdicts::Stand;
use lab::{Lab, PodFamily, StoreKind};
use serde_json::Value;

use crate::cluster::{PROGRAM, eventually};
use crate::{plan, start};

/// The measured path of a host to the peer with this subnet.
fn path(lab: &Lab, host: usize, subnet: &str) -> Value {
    let state = lab.hosts[host].state().unwrap();
    let peers = state["peers"]["list"].as_array().unwrap();
    peers.iter().find(|peer| peer["subnet"].as_str().unwrap().starts_with(subnet)).map(|peer| peer["paths"][0].clone()).unwrap_or_default()
}

fn verdict(lab: &Lab, host: usize, subnet: &str) -> String {
    path(lab, host, subnet)["verdict"].as_str().unwrap_or_default().to_owned()
}

/// All paths of all hosts are measured and work.
fn wait_until_reachable(lab: &Lab) {
    eventually("every path is measured and works", || {
        let peers = lab.hosts.len() - 1;
        lab.hosts.iter().all(|host| {
            let state = host.state().unwrap();
            let paths: Vec<&Value> =
                state["peers"]["list"].as_array().unwrap().iter().flat_map(|peer| peer["paths"].as_array().into_iter().flatten()).collect();
            state["peers"]["list"].as_array().unwrap().len() == peers
                && paths.len() >= peers
                && paths.iter().all(|path| path["verdict"] == "reachable")
        })
    });
}

/// A table of nftables rules in a host, removed at the end.
struct Rules<'a>(&'a Netns);

impl<'a> Rules<'a> {
    fn new(netns: &'a Netns, hook: &str, rule: &str) -> Rules<'a> {
        nft(netns, &[&format!("table inet broken {{ chain broken {{ type filter hook {hook} priority -400; {rule}; }}; }}")]);
        Rules(netns)
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        nft(self.0, &["delete table inet broken"]);
    }
}

fn nft(netns: &Netns, arguments: &[&str]) {
    let mut command = Command::new("nft");
    let output = netns.run(|| command.args(arguments).output()).unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The causes of `lab verdicts`, with one backend.
pub(crate) fn each_broken_path_has_its_verdict(root: &Path, stand: Stand) {
    lab::verdicts::check(stand, Path::new(PROGRAM), root).unwrap();
}

pub(crate) fn broken_paths_are_logged_and_their_mtu_is_found(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    wait_until_reachable(&lab);
    eventually("the peer's daemon is known", || path(&lab, 0, "10.244.2.0")["daemon"]["mtu"] == 1450);
    let rules = Rules::new(&lab.hosts[1].netns, "input", "ip saddr 10.0.0.1 udp dport 8472 meta length > 1400 drop");
    // nftables counts the outer packet without its Ethernet header, but with the inner one: 50 bytes in all.
    let text = "the path carries packets of 1350 bytes, pods send up to 1450: lower the MTU by 100 bytes";
    eventually(text, || path(&lab, 0, "10.244.2.0")["reason"] == text);
    drop(rules);
    eventually("the path works again", || verdict(&lab, 0, "10.244.2.0") == "reachable");
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
    assert!(log.contains("path to peer broken") && log.contains("path to peer works again"), "{log}");
    assert!(log.contains(text), "{log}");
    // A peer whose daemon has ended still forwards.
    lab.stop_daemon(1, false).unwrap();
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(verdict(&lab, 0, "10.244.2.0"), "reachable");
    let (_, ready) = lab.hosts[0].get("/readyz").unwrap();
    assert!(!ready.contains("broken"), "{ready}");
}

pub(crate) fn a_blackhole_before_a_peers_route_is_seen(root: &Path) {
    let lab = start(root, 2, "vxlan", StoreKind::Embedded);
    wait_until_reachable(&lab);
    let ip = |arguments: &[&str]| {
        let mut command = Command::new("ip");
        assert!(lab.hosts[0].netns.run(|| command.args(arguments).status()).unwrap().unwrap().success());
    };
    ip(&["route", "add", "blackhole", "10.244.2.0/25"]);
    eventually("the path is broken, with the reason", || {
        let path = path(&lab, 0, "10.244.2.0");
        path["verdict"] == "overlay-broken" && path["error"].as_str().is_some_and(|error| error.contains("Invalid argument"))
    });
    let (status, ready) = lab.hosts[0].get("/readyz").unwrap();
    assert!(status == 200 && ready.contains("note: 1 of 1 paths to peers are broken"), "{ready}");
    let (_, metrics) = lab.hosts[0].get("/metrics").unwrap();
    assert!(metrics.contains("\nflannel_paths{verdict=\"overlay-broken\"} 1\n"), "{metrics}");
    ip(&["route", "del", "blackhole", "10.244.2.0/25"]);
    eventually("the path works again", || verdict(&lab, 0, "10.244.2.0") == "reachable");
}

/// Every backend that makes paths, in each family, is measured, and healthy paths are called so.
pub(crate) fn healthy_paths_are_reachable_with_each_backend(root: &Path) {
    for (backend, family) in [
        ("host-gw", PodFamily::Dual),
        ("vxlan", PodFamily::Dual),
        ("udp", PodFamily::V4),
        ("vxlan", PodFamily::V6),
        ("host-gw", PodFamily::V6),
    ] {
        let plan = plan(3, backend, StoreKind::Embedded).family(family);
        let mut lab = Lab::start(plan, &root.join(format!("{backend}-{family:?}"))).unwrap();
        lab.settle().unwrap();
        wait_until_reachable(&lab);
        let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
        crate::cluster::ping_all_from(&pods[0].netns, &[pods[1].address]);
        std::thread::sleep(Duration::from_secs(4));
        for host in &lab.hosts {
            let log = std::fs::read_to_string(host.log()).unwrap();
            assert!(!log.contains("path to peer broken"), "{backend} {family:?}: {log}");
        }
    }
}

/// A daemon that starts where the underlay is slow measures how slow, and does not take it for broken.
pub(crate) fn slow_path_is_reachable(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    lab.stop_daemon(0, false).unwrap();
    let mut tc = Command::new("tc");
    tc.args(["qdisc", "add", "dev", "eth0", "root", "netem", "delay", "300ms"]);
    assert!(lab.hosts[1].netns.run(|| tc.status()).unwrap().unwrap().success());
    lab.start_daemon(0, &[]).unwrap();
    lab.settle().unwrap();
    eventually("the delay is measured", || {
        std::thread::sleep(Duration::from_millis(200));
        let path = path(&lab, 0, "10.244.2.0");
        path["rtt_ms"].as_f64().is_some_and(|mean| mean >= 300.0) && path["verdict"] == "reachable"
    });
}

/// `--probe=off` measures and answers nothing, and a host that measures is not disturbed by that.
pub(crate) fn measurement_can_be_switched_off(root: &Path) {
    let mut plan = plan(2, "vxlan", StoreKind::Embedded);
    plan.env.push(("FLANNELD_PROBE".to_owned(), "off".to_owned()));
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    assert_eq!(path(&lab, 0, "10.244.2.0"), Value::Null);
    lab.stop_daemon(0, false).unwrap();
    lab.start_daemon(0, &["--probe=on"]).unwrap();
    lab.settle().unwrap();
    eventually("the path is measured and works", || verdict(&lab, 0, "10.244.2.0") == "reachable");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(path(&lab, 0, "10.244.2.0")["daemon"], Value::Null);
    assert_eq!(path(&lab, 1, "10.244.1.0"), Value::Null);
}
