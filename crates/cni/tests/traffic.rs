//! Rules and limits of the plugins, tested with packets.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "support/host.rs"]
mod host;
#[path = "traffic/vlan.rs"]
mod vlan;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use flannel::IfName;
use host::Host;
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use kernel::{addr, link, route};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

type Test = fn(&Host);

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
    }
    let tests: [(&str, Test); 6] = [
        ("parallel_calls_keep_each_others_rules_nftables", |host| parallel_calls_keep_each_others_rules(host, "nftables")),
        ("parallel_calls_keep_each_others_rules_iptables", |host| parallel_calls_keep_each_others_rules(host, "iptables")),
        ("host_ports_reach_the_container_nftables", |host| host_ports_reach_the_container(host, "nftables")),
        ("host_ports_reach_the_container_iptables", |host| host_ports_reach_the_container(host, "iptables")),
        ("firewall_accepts_containers_under_drop_policy", firewall_accepts_containers_under_drop_policy),
        ("spoofed_mac_is_dropped", spoofed_mac_is_dropped),
    ];
    let trial = |(name, test): (&'static str, Test)| {
        Trial::test(name, move || {
            let host = Host::new(name);
            test(&host);
            host.tear_down();
            Ok(())
        })
    };
    let mut trials: Vec<Trial> = tests.into_iter().map(trial).collect();
    let vm_tests: [(&str, Test); 1] = [("pods_reach_only_their_vlan", vlan::pods_reach_only_their_vlan)];
    trials.extend(vm_tests.into_iter().map(|test| trial(test).with_kind("vm").with_ignored_flag(true)));
    libtest_mimic::run(&arguments, trials).exit();
}

fn name(text: &str) -> IfName {
    text.parse().unwrap()
}

/// Gives the host an `eth0` with 192.0.2.1 and 2001:db8::1, and returns the namespace of a neighbour on that link.
fn outside(host: &Host) -> Netns {
    use std::os::fd::AsFd;
    let outside = Netns::create().unwrap();
    let configure = |ifname: &str, addresses: [&str; 2], via: [&str; 2]| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        link::set_up(&mut socket, 1, true).unwrap();
        let index = link::get(&mut socket, name(ifname)).unwrap().unwrap().index;
        kernel::sysctl::write(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0").unwrap();
        link::set_up(&mut socket, index, true).unwrap();
        for (address, via) in addresses.iter().zip(via) {
            addr::add(&mut socket, index, address.parse().unwrap()).unwrap();
            let default = if via.contains(':') { "::/0" } else { "0.0.0.0/0" };
            route::add(&mut socket, default.parse().unwrap(), Some(via.parse().unwrap()), index).unwrap();
        }
    };
    host.netns
        .run(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let this = link::VethEnd { name: name("eth0"), mac: None, netns: None };
            let peer = link::VethEnd { name: name("wire"), mac: None, netns: Some(outside.as_fd()) };
            link::create_veth(&mut socket, 1500, this, peer).unwrap();
            configure("eth0", ["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2", "2001:db8::2"]);
        })
        .unwrap();
    outside.run(|| configure("wire", ["192.0.2.2/24", "2001:db8::2/64"], ["192.0.2.1", "2001:db8::1"])).unwrap();
    outside
}

/// The configurations of a list: bridge with both families, then another.
fn list(host: &Host, second: &Value) -> Vec<Value> {
    let ipam = json!({ "ranges": [[{ "subnet": "10.1.17.0/24" }], [{ "subnet": "fd00:17::/64" }]] });
    let mut bridge = host.bridge_conf(&ipam);
    bridge["hairpinMode"] = true.into();
    let mut second = second.clone();
    second["cniVersion"] = "1.0.0".into();
    second["name"] = "net".into();
    vec![bridge, second]
}

fn add(host: &Host, id: &str, list: &[Value]) -> Vec<IpAddr> {
    let mut result = Value::Null;
    for conf in list {
        let mut conf = conf.clone();
        if !result.is_null() {
            conf["prevResult"] = result.clone();
        }
        result = serde_json::from_str(&host.call(conf["type"].as_str().unwrap(), "ADD", id, &conf).unwrap()).unwrap();
    }
    result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()).collect()
}

fn del(host: &Host, id: &str, list: &[Value]) {
    for conf in list.iter().rev() {
        host.call(conf["type"].as_str().unwrap(), "DEL", id, conf).unwrap();
    }
}

/// Listens on a port in a namespace; each connection receives the client's address.
fn serve(netns: &Netns, to: SocketAddr) {
    let listener = netns.run(|| TcpListener::bind(to).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(peer.to_string().as_bytes());
        }
    });
}

/// The client's address as the server sees it; `None` if the server cannot be reached.
fn ask(netns: &Netns, to: &str) -> Option<String> {
    netns
        .run(|| {
            let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(2)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok().map(|_| text)
        })
        .unwrap()
}

fn host_ports_reach_the_container(host: &Host, backend: &str) {
    let outside = outside(host);
    let (pod, other) = (host.pod("c1"), host.pod("c2"));
    let mappings = json!([
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
        { "hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.2" },
        { "hostPort": 5353, "containerPort": 53, "protocol": "udp" },
    ]);
    let conf = list(host, &json!({ "type": "portmap", "backend": backend, "runtimeConfig": { "portMappings": mappings } }));
    let own = add(host, "c1", &conf);
    let plain = list(host, &json!({ "type": "portmap", "backend": backend }));
    add(host, "c2", &plain);
    for ip in &own {
        serve(&pod, SocketAddr::new(*ip, 80));
    }
    // From outside the client keeps its address, in both families.
    assert_eq!(ask(&outside, "192.0.2.1:8080").as_deref(), Some("192.0.2.2"));
    assert_eq!(ask(&outside, "[2001:db8::1]:8080").as_deref(), Some("2001:db8::2"));
    // From the host itself, by its own address and by its loopback's.
    assert!(ask(&host.netns, "192.0.2.1:8080").is_some());
    assert!(ask(&host.netns, "127.0.0.1:8080").is_some());
    assert!(ask(&host.netns, "127.0.0.2:8081").is_some(), "the port of one address");
    assert!(ask(&host.netns, "127.0.0.1:8081").is_none(), "and of no other");
    // From another container of the same bridge, and from the container itself: the answer must come back the same way.
    assert!(ask(&other, "192.0.2.1:8080").is_some());
    assert!(ask(&pod, "192.0.2.1:8080").is_some());
    // Containers that connect to each other directly keep their addresses.
    assert_eq!(ask(&other, &format!("{}:80", own[0])).as_deref(), Some("10.1.17.3"));
    // UDP.
    let server = pod.run(|| UdpSocket::bind(SocketAddr::new(own[0], 53)).unwrap()).unwrap();
    let client = outside.run(|| UdpSocket::bind("192.0.2.2:0").unwrap()).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.send_to(b"x", "192.0.2.1:5353").unwrap();
    let mut buffer = [0; 8];
    assert_eq!(server.recv_from(&mut buffer).unwrap().0, 1);
    // A container that is added again has its old mappings replaced, and after DEL nothing leads to it.
    del(host, "c1", &conf);
    assert_eq!(ask(&outside, "192.0.2.1:8080"), None);
    let rules = host.nft();
    let left: Vec<&str> = rules.lines().filter(|line| line.contains("c1") || line.contains("10.1.17.2")).collect();
    assert!(left.is_empty(), "{left:?}");
    // A program of the host that takes the port gets what the client sends, though the kernel had tracked its flow.
    let on_host = host.netns.run(|| UdpSocket::bind("192.0.2.1:5353").unwrap()).unwrap();
    on_host.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.send_to(b"xy", "192.0.2.1:5353").unwrap();
    assert_eq!(on_host.recv_from(&mut buffer).unwrap().0, 2);
    drop(on_host);
    // The next container of that port gets what a client sends that never stopped, though the kernel remembers where its
    // flow went.
    client.send_to(b"x", "192.0.2.1:5353").unwrap();
    let next = host.pod("c3");
    let address = add(host, "c3", &conf)[0];
    assert_ne!(address, own[0]);
    let server = next.run(|| UdpSocket::bind(SocketAddr::new(address, 53)).unwrap()).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.send_to(b"xyz", "192.0.2.1:5353").unwrap();
    assert_eq!(server.recv_from(&mut buffer).unwrap().0, 3);
}

fn firewall_accepts_containers_under_drop_policy(host: &Host) {
    let outside = outside(host);
    let pod = host.pod("c1");
    for program in ["iptables", "ip6tables"] {
        let status = host.netns.run(|| Command::new(program).args(["-P", "FORWARD", "DROP"]).status()).unwrap();
        assert!(status.expect("iptables is installed by `cargo xtask test`").success());
    }
    let conf = list(host, &json!({ "type": "firewall", "backend": "iptables" }));
    // Without the plugin the policy holds.
    add(host, "c1", &conf[..1]);
    serve(&outside, "192.0.2.2:80".parse().unwrap());
    serve(&outside, "[2001:db8::2]:80".parse().unwrap());
    assert_eq!(ask(&pod, "192.0.2.2:80"), None);
    del(host, "c1", &conf[..1]);
    add(host, "c1", &conf);
    assert!(ask(&pod, "192.0.2.2:80").is_some());
    assert!(ask(&pod, "[2001:db8::2]:80").is_some());
    del(host, "c1", &conf);
}

fn spoofed_mac_is_dropped(host: &Host) {
    let pod = host.pod("c1");
    let mut conf = list(host, &json!({ "type": "tuning" }));
    conf.truncate(1);
    conf[0]["macspoofchk"] = true.into();
    add(host, "c1", &conf);
    serve(&host.netns, "10.1.17.1:80".parse().unwrap());
    assert!(ask(&pod, "10.1.17.1:80").is_some());
    pod.run(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let index = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
        link::set_mac(&mut socket, index, "02:00:00:00:00:66".parse().unwrap()).unwrap();
    })
    .unwrap();
    assert_eq!(ask(&pod, "10.1.17.1:80"), None);
    del(host, "c1", &conf);
    assert!(!host.nft().contains("c1"), "{}", host.nft());
}

fn parallel_calls_keep_each_others_rules(host: &Host, backend: &str) {
    let outside = outside(host);
    let pods: Vec<(String, Netns)> = (0..16).map(|i| (format!("c{i}"), host.pod(&format!("c{i}")))).collect();
    let conf = &|i: usize| {
        let mapping = json!([{ "hostPort": 8000 + i, "containerPort": 80, "protocol": "tcp" }]);
        let mut conf = list(host, &json!({ "type": "portmap", "backend": backend, "runtimeConfig": { "portMappings": mapping } }));
        conf[0]["ipMasq"] = true.into();
        conf[0]["ipMasqBackend"] = backend.into();
        conf
    };
    std::thread::scope(|scope| {
        for (i, (id, pod)) in pods.iter().enumerate() {
            scope.spawn(move || {
                let own = add(host, id, &conf(i));
                serve(pod, SocketAddr::new(own[0], 80));
            });
        }
    });
    for i in 0..pods.len() {
        assert!(ask(&outside, &format!("192.0.2.1:{}", 8000 + i)).is_some(), "container {i}");
    }
    std::thread::scope(|scope| {
        for (i, (id, _)) in pods.iter().enumerate() {
            scope.spawn(move || del(host, id, &conf(i)));
        }
    });
    let rules = host.nft();
    let left: Vec<&str> = rules.lines().filter(|line| line.contains("10.1.17.") && !line.contains("10.1.17.0/24")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!rules.contains("CNI-DN-"), "{rules}");
}
