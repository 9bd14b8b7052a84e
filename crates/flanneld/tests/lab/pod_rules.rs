//! Rules that the plugins wrote for pods are restored after a flush.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use kernel::netns::Netns;
use lab::{Lab, Pod, StoreKind};

use crate::cluster::eventually;
use crate::start;

/// Answers with a word on port 80 of a pod.
fn serve(pod: &Pod) {
    let listener = pod.netns.run(|| TcpListener::bind("0.0.0.0:80").unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"here");
        }
    });
}

/// Does another host reach the pod by the port of its own host?
fn answers(from: &Netns, host: &str, port: u16) -> bool {
    from.run(|| {
        let to = SocketAddr::new(host.parse().unwrap(), port);
        let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_millis(300)) else { return false };
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).is_ok() && text == "here"
    })
    .unwrap()
}

pub(crate) fn nft_flush_keeps_host_ports(root: &Path) {
    let mut lab: Lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let [first, _, second] = [0, 1, 0].map(|host| lab.add_pod(host).unwrap());
    let pods = [first, second];
    let h2 = Netns::open(&root.join("netns/h2")).unwrap();
    pods.iter().for_each(serve);
    for (pod, port) in pods.iter().zip([8080, 8081]) {
        lab.map_port(pod, "ADD", port).unwrap();
        assert!(answers(&h2, "10.0.0.1", port), "{port}");
    }
    // A restart of nftables.service begins with this.
    for script in ["nft flush ruleset", "nft delete table ip cni_hostport", "nft flush table ip cni_hostport"] {
        lab.hosts[0].shell(script).unwrap();
        eventually(script, || [8080, 8081].iter().all(|port| answers(&h2, "10.0.0.1", *port)));
    }
    let rules = |lab: &Lab| lab.hosts[0].shell("nft list table ip cni_hostport").unwrap();
    assert_eq!(rules(&lab).matches("dnat to").count(), 2, "each is there once: {}", rules(&lab));

    // While no daemon runs they stay missing; the next daemon restores them.
    lab.stop_daemon(0, true).unwrap();
    lab.hosts[0].shell("nft flush ruleset").unwrap();
    assert!(!answers(&h2, "10.0.0.1", 8080));
    lab.start_daemon(0, &[]).unwrap();
    eventually("a new daemon puts them back", || answers(&h2, "10.0.0.1", 8080) && answers(&h2, "10.0.0.1", 8081));

    // Rules that a plugin deleted stay deleted, also after a flush.
    lab.map_port(&pods[1], "DEL", 8081).unwrap();
    lab.hosts[0].shell("nft flush ruleset").unwrap();
    eventually("the other one is back", || answers(&h2, "10.0.0.1", 8080));
    assert_eq!(rules(&lab).matches("dnat to").count(), 1, "{}", rules(&lab));

    // A pod that ends without a DEL leaves none behind, and its port is free for another.
    let end = &pods[0].result["interfaces"][1]["name"].as_str().unwrap();
    lab.hosts[0].shell(&format!("ip link del {end}; nft flush ruleset")).unwrap();
    lab.wait_state(0, "all well", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    lab.map_port(&pods[1], "ADD", 8080).unwrap();
    eventually("the port leads to the other pod", || answers(&h2, "10.0.0.1", 8080));
    eventually("nothing is left of the one that is gone", || rules(&lab).matches("dnat to").count() == 1);
}
