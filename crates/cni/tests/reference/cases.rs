//! What is compared, by plugin.

use serde_json::{Value, json};

use super::{Call, Case};

/// All cases.
pub(crate) fn all() -> Vec<Case> {
    let by_plugin = [bridge_and_loopback(), host_local(), addresses_in_turn(), portmap(), bandwidth(), tuning(), firewall(), protocol()];
    by_plugin.into_iter().flatten().collect()
}

fn call(verb: &'static str, list: &[Value]) -> Call {
    Call { verb, id: "c1", list: list.to_vec(), env: Vec::new() }
}

/// ADD, CHECK, DEL and a second DEL of one container.
fn life(name: &str, list: &[Value]) -> Case {
    let verbs = if list[0]["cniVersion"].as_str().is_some_and(|version| version >= "0.4.0") {
        vec!["ADD", "CHECK", "DEL", "DEL"]
    } else {
        vec!["ADD", "DEL", "DEL"]
    };
    Case { name: name.to_owned(), calls: verbs.into_iter().map(|verb| call(verb, list)).collect() }
}

/// An ADD that fails. Its DEL is not compared: ours gives back what it finds, whatever is wrong with the configuration.
fn refused(name: &str, list: &[Value]) -> Case {
    Case { name: name.to_owned(), calls: vec![call("ADD", list)] }
}

fn with(base: &Value, more: &Value) -> Value {
    let mut conf = base.clone();
    for (key, value) in more.as_object().unwrap() {
        conf[key] = value.clone();
    }
    conf
}

fn bridge(more: &Value) -> Value {
    let ipam = json!({ "type": "host-local", "dataDir": "ROOT/networks", "ranges": [[{ "subnet": "10.1.17.0/24" }]], "routes": [{ "dst": "10.1.0.0/16" }] });
    with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": "bridge", "isDefaultGateway": true, "mtu": 1450, "ipam": ipam }), more)
}

fn local(more: &Value) -> Value {
    let mut conf = bridge(&json!({ "type": "host-local" }));
    for (key, value) in more.as_object().unwrap() {
        conf["ipam"][key] = value.clone();
    }
    conf
}

/// An `ipam` with a range of each family.
fn both_families() -> Value {
    json!({ "type": "host-local", "dataDir": "ROOT/networks", "ranges": [[{ "subnet": "10.1.17.0/24" }], [{ "subnet": "fd00:17::/64" }]],
        "routes": [{ "dst": "10.1.0.0/16" }, { "dst": "fd00::/16" }] })
}

/// The bridge by version and by field, and the loopback interface.
fn bridge_and_loopback() -> Vec<Case> {
    let dual = both_families();
    let mut cases = Vec::new();
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        cases.push(life(&format!("bridge {version}"), &[bridge(&json!({ "cniVersion": version }))]));
        // Before 1.0.0 the reference plugin prints a result of another version's form.
        if version >= "1.0.0" {
            cases.push(life(&format!("loopback {version}"), &[json!({ "cniVersion": version, "name": "lo", "type": "loopback" })]));
        }
    }
    let mut v6_first = dual.clone();
    v6_first["ranges"].as_array_mut().unwrap().reverse();
    for (name, more) in [
        ("dual", json!({ "ipam": dual })),
        ("dual, IPv6 first", json!({ "ipam": v6_first })),
        ("without a gateway", json!({ "isDefaultGateway": false })),
        ("hairpin", json!({ "hairpinMode": true })),
        ("promiscuous", json!({ "promiscMode": true })),
        ("isolated port", json!({ "portIsolation": true })),
        ("duplicate address detection", json!({ "ipam": dual, "enabledad": true })),
        (
            "mac of the runtime",
            json!({ "runtimeConfig": { "mac": "02:00:00:00:00:11" }, "args": { "cni": { "mac": "02:00:00:00:00:12" } } }),
        ),
        ("mac of args", json!({ "args": { "cni": { "mac": "02:00:00:00:00:12" } } })),
        ("masquerading by iptables", json!({ "ipMasq": true, "ipMasqBackend": "iptables" })),
        ("masquerading by iptables, dual", json!({ "ipMasq": true, "ipMasqBackend": "iptables", "ipam": dual })),
        ("masquerading by nftables, dual", json!({ "ipMasq": true, "ipMasqBackend": "nftables", "ipam": dual })),
        ("mac spoof check", json!({ "macspoofchk": true })),
        ("dns", json!({ "dns": { "nameservers": ["10.1.0.1"], "search": ["a.b"] } })),
        ("no mtu", json!({ "mtu": 0 })),
    ] {
        cases.push(life(&format!("bridge: {name}"), &[bridge(&more)]));
    }
    for (name, more) in [("layer 2 alone", json!({})), ("an interface that stays down", json!({ "disableContainerInterface": true }))] {
        let conf = with(&bridge(&json!({ "ipam": {}, "isDefaultGateway": false })), &more);
        // To CHECK what has no address is an error to the reference plugin.
        let calls = ["ADD", "DEL", "DEL"].map(|verb| call(verb, std::slice::from_ref(&conf))).into();
        cases.push(Case { name: format!("bridge: {name}"), calls });
    }
    let mut by_args = life("bridge: mac of CNI_ARGS", &[bridge(&json!({}))]);
    by_args.calls.iter_mut().for_each(|call| call.env.push(("CNI_ARGS", "IgnoreUnknown=1;MAC=02:00:00:00:00:13;X=y")));
    cases.push(by_args);
    cases
}

/// Ranges, and what the runtime asks for by each way that there is.
fn host_local() -> Vec<Case> {
    let dual = both_families();
    let mut cases = Vec::new();
    for (name, ipam) in [
        ("a subnet at the top", json!({ "ranges": null, "subnet": "10.1.18.0/24", "rangeStart": "10.1.18.9", "gateway": "10.1.18.254" })),
        (
            "several ranges of a set",
            json!({ "ranges": [[{ "subnet": "10.1.17.0/24", "rangeStart": "10.1.17.7", "rangeEnd": "10.1.17.7" }, { "subnet": "10.1.19.0/24" }]] }),
        ),
        ("both families", json!({ "ranges": dual["ranges"] })),
        (
            "routes with options",
            json!({ "routes": [{ "dst": "10.9.0.0/16", "gw": "10.1.17.9", "mtu": 1400, "advmss": 1300, "priority": 7, "table": 99, "scope": 0 }] }),
        ),
    ] {
        cases.push(life(&format!("host-local: {name}"), &[local(&ipam)]));
    }
    for (name, ipam) in [
        ("no ranges", json!({ "ranges": null })),
        ("host bits", json!({ "ranges": [[{ "subnet": "10.1.17.3/24" }]] })),
        ("too small", json!({ "ranges": [[{ "subnet": "10.1.17.0/31" }]] })),
        ("mixed families", json!({ "ranges": [[{ "subnet": "10.1.17.0/24" }, { "subnet": "fd00::/64" }]] })),
        ("overlap in a set", json!({ "ranges": [[{ "subnet": "10.1.17.0/24" }, { "subnet": "10.1.17.0/25" }]] })),
        ("overlap of sets", json!({ "ranges": [[{ "subnet": "10.1.17.0/24" }], [{ "subnet": "10.1.17.0/25" }]] })),
        ("start outside", json!({ "ranges": [[{ "subnet": "10.1.17.0/24", "rangeStart": "10.2.0.1" }]] })),
    ] {
        cases.push(refused(&format!("host-local: {name}"), &[local(&ipam)]));
    }
    // What the runtime asks for, by each way that there is; and a resolv.conf.
    for (name, ipam, more) in [
        (
            "ipRanges of the runtime",
            json!({ "ranges": null }),
            json!({ "runtimeConfig": { "ipRanges": [[{ "subnet": "10.1.40.0/24" }]] } }),
        ),
        ("ips of the runtime", json!({}), json!({ "runtimeConfig": { "ips": ["10.1.17.77/24"] } })),
        ("ips of args", json!({}), json!({ "args": { "cni": { "ips": ["10.1.17.78"] } } })),
        (
            "ips of both families",
            json!({ "ranges": dual["ranges"] }),
            json!({ "args": { "cni": { "ips": ["10.1.17.78", "fd00:17::78"] } } }),
        ),
        ("a resolv.conf", json!({ "resolvConf": "ROOT/resolv.conf" }), json!({})),
    ] {
        cases.push(life(&format!("host-local: {name}"), &[with(&local(&ipam), &more)]));
    }
    cases.push(refused(
        "host-local: an address of no range",
        &[with(&local(&json!({})), &json!({ "runtimeConfig": { "ips": ["10.9.9.9/24"] } }))],
    ));
    cases.push(refused("host-local: a resolv.conf that is not there", &[local(&json!({ "resolvConf": "ROOT/nowhere" }))]));
    cases
}

/// Addresses of several containers in turn, and requested ones.
fn addresses_in_turn() -> Vec<Case> {
    let plain = local(&json!({ "ranges": [[{ "subnet": "10.1.17.0/29" }]] }));
    let add = |id: &'static str, args: &'static str| Call { verb: "ADD", id, list: vec![plain.clone()], env: vec![("CNI_ARGS", args)] };
    let del = |id: &'static str| Call { verb: "DEL", id, list: vec![plain.clone()], env: Vec::new() };
    vec![Case {
        name: "host-local: in turn".to_owned(),
        calls: vec![
            add("a", ""),
            add("b", ""),
            del("a"),
            add("c", ""),
            add("c", ""),
            add("d", "IP=10.1.17.6"),
            add("e", "IP=10.1.17.6"),
            add("e", "IP=10.1.17.1"),
            add("e", "IP=10.9.9.9"),
            add("e", ""),
            add("f", ""),
            add("g", ""),
            add("h", ""),
            add("i", ""),
            del("absent"),
            del("b"),
            add("i", "IP=10.1.17.3/29"),
        ],
    }]
}

/// Mapped ports.
fn portmap() -> Vec<Case> {
    let dual = both_families();
    let mut cases = Vec::new();
    let mappings = json!({ "portMappings": [
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
        { "hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.2" },
        { "hostPort": 5353, "containerPort": 53, "protocol": "udp" },
        { "hostPort": 9999, "containerPort": 99, "protocol": "sctp" },
    ] });
    for (name, more) in [
        ("iptables", json!({ "backend": "iptables" })),
        ("iptables without snat", json!({ "backend": "iptables", "snat": false })),
        ("iptables, all masqueraded", json!({ "backend": "iptables", "masqAll": true })),
        (
            "iptables with another mark and a condition",
            json!({ "backend": "iptables", "markMasqBit": 7, "conditionsV4": ["!", "-d", "10.0.0.0/8"] }),
        ),
        (
            "iptables with conditions of both families",
            json!({ "backend": "iptables", "conditionsV4": ["-s", "192.0.2.0/24"], "conditionsV6": ["-s", "2001:db8::/32"] }),
        ),
        ("no mappings", json!({ "backend": "iptables", "runtimeConfig": {} })),
    ] {
        let portmap = with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": "portmap", "runtimeConfig": mappings }), &more);
        for (family, ipam) in [("v4", bridge(&json!({}))["ipam"].clone()), ("dual", dual.clone())] {
            let mut portmap = portmap.clone();
            if family == "dual" && portmap["runtimeConfig"]["portMappings"].is_array() {
                // With both families the reference plugin leads a port of an IPv4 address to an IPv6 chain that has no
                // rule for it.
                portmap["runtimeConfig"]["portMappings"].as_array_mut().unwrap().remove(1);
            }
            cases.push(life(&format!("portmap: {name}, {family}"), &[bridge(&json!({ "ipam": ipam })), portmap]));
        }
    }
    for (name, more) in [
        ("a port of 0", json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 0, "containerPort": 80, "protocol": "tcp" }] } })),
        ("two marks", json!({ "backend": "iptables", "markMasqBit": 7, "externalSetMarkChain": "X" })),
        ("an unknown backend", json!({ "backend": "pigeons" })),
    ] {
        let portmap = with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": "portmap", "runtimeConfig": mappings }), &more);
        cases.push(refused(&format!("portmap: {name}"), &[bridge(&json!({})), portmap]));
    }
    cases
}

/// Rates.
fn bandwidth() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, more) in [
        (
            "ingress and egress",
            json!({ "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 16_000_000, "egressBurst": 1_600_000 }),
        ),
        ("bursts below a frame", json!({ "ingressRate": 8, "ingressBurst": 8, "egressRate": 16, "egressBurst": 80 })),
        ("of the runtime", json!({ "runtimeConfig": { "bandwidth": { "ingressRate": 8_000_000, "ingressBurst": 800_000 } } })),
        ("nothing", json!({})),
    ] {
        let bandwidth = with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": "bandwidth" }), &more);
        cases.push(life(&format!("bandwidth: {name}"), &[bridge(&json!({})), bandwidth]));
    }
    let half = json!({ "cniVersion": "1.0.0", "name": "net", "type": "bandwidth", "ingressRate": 8_000_000 });
    cases.push(refused("bandwidth: a rate without a burst", &[bridge(&json!({})), half]));
    cases
}

/// Sysctls and settings of the interface.
fn tuning() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, more) in [
        ("sysctls", json!({ "sysctl": { "net.ipv4.conf.IFNAME.arp_filter": "1", "net/ipv4/conf/all/log_martians": "1" } })),
        ("mac, mtu and queue", json!({ "mac": "02:00:00:00:00:77", "mtu": 1400, "txQLen": 77 })),
        ("modes", json!({ "promisc": true, "allmulti": true })),
        ("a sysctl outside", json!({ "sysctl": { "kernel.pid_max": "7" } })),
    ] {
        let tuning = with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": "tuning", "dataDir": "ROOT/tuning" }), &more);
        cases.push(life(&format!("tuning: {name}"), &[bridge(&json!({})), tuning]));
    }
    cases
}

/// Chains and policies of the firewall.
fn firewall() -> Vec<Case> {
    let dual = both_families();
    let mut cases = Vec::new();
    for (name, more) in [
        ("iptables", json!({})),
        ("another admin chain", json!({ "iptablesAdminChainName": "MY-ADMIN" })),
        ("same bridge", json!({ "ingressPolicy": "same-bridge" })),
        ("isolated", json!({ "ingressPolicy": "isolated" })),
    ] {
        let firewall = with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": "firewall", "backend": "iptables" }), &more);
        cases.push(life(&format!("firewall: {name}"), &[bridge(&json!({ "ipam": dual })), firewall]));
    }
    let pigeons = json!({ "cniVersion": "1.0.0", "name": "net", "type": "firewall", "backend": "iptables", "ingressPolicy": "pigeons" });
    cases.push(refused("firewall: an unknown policy", &[bridge(&json!({})), pigeons]));
    cases
}

/// The protocol itself, of each plugin.
fn protocol() -> Vec<Case> {
    let mut cases = Vec::new();
    for plugin in cni::NAMES.into_iter().filter(|name| *name != "flannel") {
        let conf = |more: &Value| with(&json!({ "cniVersion": "1.0.0", "name": "net", "type": plugin }), more);
        let one = |verb, conf: Value| Call { verb, id: "c1", list: vec![conf], env: Vec::new() };
        let mut calls = vec![
            one("VERSION", conf(&json!({}))),
            one("ADD", conf(&json!({ "cniVersion": "9.9.9" }))),
            one("ADD", conf(&json!({ "name": "../x" }))),
            one("ADD", Value::from("no object")),
            one("CHECK", conf(&json!({ "cniVersion": "0.3.1" }))),
            one("GC", conf(&json!({}))),
            one("FROB", conf(&json!({}))),
        ];
        for (variable, value) in [
            ("CNI_CONTAINERID", ""),
            ("CNI_CONTAINERID", "../x"),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "sixteen-bytes-xx"),
            ("CNI_NETNS", ""),
            ("CNI_PATH", ""),
        ] {
            calls.push(Call { env: vec![(variable, value)], ..one("ADD", conf(&json!({}))) });
        }
        cases.push(Case { name: format!("protocol of {plugin}"), calls });
        // The host's own namespace, where that is meant. (Where not, ours refuse before the work, the reference after it.)
        let here = |more: &'static str| Call {
            verb: "ADD",
            id: "c1",
            list: vec![json!({ "cniVersion": "1.0.0", "name": "net", "type": "loopback" })],
            env: vec![("CNI_NETNS", "/proc/self/ns/net"), ("CNI_NETNS_OVERRIDE", more)],
        };
        let calls = vec![here("TRUE"), here("1")];
        if plugin == "loopback" {
            cases.push(Case { name: "protocol: the host's own namespace".to_owned(), calls });
        }
    }
    cases
}
