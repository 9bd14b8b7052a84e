//! VLANs of a bridge, on a kernel that filters them.

use std::process::Command;

use kernel::netns::Netns;
use serde_json::{Value, json};

use crate::host::Host;

/// What a test adds to the configuration of the bridge plugin.
fn conf(host: &Host, more: &Value) -> Value {
    let mut conf = host.bridge_conf(&json!({ "subnet": "10.9.0.0/24" }));
    conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    conf
}

/// The pod's address, and the names of the result's interfaces.
fn add(host: &Host, id: &str, conf: &Value) -> (String, Vec<String>) {
    let mut conf = conf.clone();
    let result: Value = serde_json::from_str(&host.call("bridge", "ADD", id, &conf).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let interfaces = result["interfaces"].as_array().unwrap().iter().map(|interface| text(&interface["name"])).collect();
    let address = text(&result["ips"][0]["address"]).replace("/24", "");
    conf["prevResult"] = result;
    host.call("bridge", "CHECK", id, &conf).unwrap();
    (address, interfaces)
}

/// The VLANs of a port: identifiers, and whether untagged frames belong to them.
fn vlans(host: &Host, port: &str) -> Vec<(u64, bool)> {
    let output = host.netns.run(|| Command::new("bridge").args(["-json", "vlan", "show", "dev", port]).output()).unwrap().unwrap();
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    let has = |entry: &Value, flag: &str| entry["flags"].as_array().is_some_and(|flags| flags.iter().any(|found| found == flag));
    let list = shown[0]["vlans"].as_array().unwrap().iter().flat_map(|entry| {
        let first = entry["vlan"].as_u64().unwrap();
        let untagged = has(entry, "PVID");
        assert!(!untagged || has(entry, "Egress Untagged"), "{port}: {entry}");
        (first..=entry["vlanEnd"].as_u64().unwrap_or(first)).map(move |id| (id, untagged))
    });
    list.collect()
}

fn pings(from: &Netns, to: &str) -> bool {
    let mut ping = Command::new("ping");
    ping.args(["-c", "1", "-W", "3", to]).stdout(std::process::Stdio::null());
    from.run(|| ping.status()).unwrap().unwrap().success()
}

fn ip(netns: &Netns, arguments: &[&str]) {
    assert!(netns.run(|| Command::new("ip").args(arguments).status()).unwrap().unwrap().success(), "ip {arguments:?}");
}

pub(crate) fn pods_reach_only_their_vlan(host: &Host) {
    let before = host.links();
    let pods = ["a", "b", "c", "trunk"].map(|id| host.pod(id));
    let (own, other) = (json!({ "vlan": 100, "preserveDefaultVlan": false }), json!({ "vlan": 200, "isDefaultGateway": false }));
    let (a, interfaces) = add(host, "a", &conf(host, &own));
    let veth = interfaces[1].clone();
    assert_eq!(interfaces, ["cni0", &veth, "eth0", "cni0.100"], "the gateway's link, as the reference reports it");
    assert_eq!(vlans(host, &veth), [(100, true)]);
    let (b, _) = add(host, "b", &conf(host, &own));
    let (c, interfaces) = add(host, "c", &conf(host, &other));
    assert_eq!(vlans(host, &interfaces[1]), [(1, false), (200, true)], "the default VLAN is kept, and no longer of untagged frames");
    assert!(pings(&pods[0], &b) && pings(&pods[0], "10.9.0.1"));
    assert!(!pings(&pods[0], &c) && !pings(&pods[2], &a));

    // The pod with a trunk is in both VLANs by tagged frames.
    let trunk = json!({ "vlanTrunk": [{ "id": 100 }, { "minID": 200, "maxID": 202 }], "isDefaultGateway": false });
    let (_, interfaces) = add(host, "trunk", &conf(host, &trunk));
    assert_eq!(vlans(host, &interfaces[1]), [(1, true), (100, false), (200, false), (201, false), (202, false)]);
    for (vlan, address, reached) in [("100", "10.9.0.100/24", &a), ("200", "10.9.0.200/24", &c)] {
        let link = format!("eth0.{vlan}");
        ip(&pods[3], &["link", "add", "link", "eth0", "name", &link, "type", "vlan", "id", vlan]);
        ip(&pods[3], &["addr", "flush", "dev", "eth0"]);
        ip(&pods[3], &["addr", "add", address, "dev", &link]);
        ip(&pods[3], &["link", "set", &link, "up"]);
        assert!(pings(&pods[3], reached), "VLAN {vlan}");
        ip(&pods[3], &["link", "delete", &link]);
    }

    for (id, more) in [("a", &own), ("b", &own), ("c", &other), ("trunk", &trunk)] {
        host.call("bridge", "DEL", id, &conf(host, more)).unwrap();
    }
    let links = host.links();
    let new: Vec<&str> = links.difference(&before).map(String::as_str).collect();
    assert!(
        matches!(new[..], ["cni0", "cni0.100", port] if port.starts_with("vlan")),
        "the gateway's link stays, as the bridge does: {new:?}"
    );
}
