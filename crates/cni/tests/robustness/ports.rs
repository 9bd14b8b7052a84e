//! Mapped ports: several attachments of a container, and rules of the reference plugin and of earlier versions.

use flannel::pod::Table;
use flannel::pod::ports::{Holder, Mapping, Ports, Snat};
use kernel::pod_table;
use serde_json::{Value, json};

use super::host::Host;
use super::{call, network, parse, portmap, shell, translations};

/// A container in two networks with ports mapped in both; returns the results.
fn two_networks(host: &Host, id: &str) -> [Value; 2] {
    [(5, "eth0"), (6, "net1")].map(|(number, ifname)| {
        let result = parse(&call(host, "bridge", "ADD", id, ifname, &network(host, number)).unwrap());
        call(host, "portmap", "ADD", id, ifname, &portmap(number, &result, &json!({}))).unwrap();
        result
    })
}

pub(super) fn del_of_an_attachment_keeps_the_ports_of_another(host: &Host) {
    let _pod = host.pod("c1");
    let [first, second] = two_networks(host, "c1");
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.6.0.2")), (1, 1));
    // The reference plugin recognises rules by this comment.
    assert!(host.nft().contains("comment \"c1\""));
    call(host, "portmap", "DEL", "c1", "net1", &portmap(6, &second, &json!({}))).unwrap();
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.6.0.2")), (1, 0));
    call(host, "portmap", "CHECK", "c1", "eth0", &portmap(5, &first, &json!({}))).unwrap();
    // Without a result it removes its own, and its own only.
    call(host, "portmap", "ADD", "c1", "net1", &portmap(6, &second, &json!({}))).unwrap();
    call(host, "portmap", "DEL", "c1", "eth0", &portmap(5, &Value::Null, &json!({}))).unwrap();
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.6.0.2")), (0, 1));
    // Two interfaces in one network.
    let third = parse(&call(host, "bridge", "ADD", "c1", "net2", &network(host, 6)).unwrap());
    let of_third = portmap(6, &third, &json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 9000, "containerPort": 80 }] } }));
    call(host, "portmap", "ADD", "c1", "net2", &of_third).unwrap();
    call(host, "portmap", "DEL", "c1", "net1", &portmap(6, &second, &json!({}))).unwrap();
    assert_eq!((translations(host, "10.6.0.2"), translations(host, "10.6.0.3")), (0, 1));
    call(host, "portmap", "DEL", "c1", "net2", &of_third).unwrap();
    assert!(!host.nft().contains("c1"), "{}", host.nft());
}

pub(super) fn iptables_chains_of_two_interfaces_are_separate(host: &Host) {
    let pod = host.pod("c1");
    let mut conf = network(host, 5);
    conf["ipMasq"] = true.into();
    conf["ipMasqBackend"] = "iptables".into();
    conf["isDefaultGateway"] = false.into();
    let more =
        |port: u16| json!({ "backend": "iptables", "runtimeConfig": { "portMappings": [{ "hostPort": port, "containerPort": 80 }] } });
    let places = [("eth0", 8001), ("net1", 8002)];
    let results = places.map(|(ifname, port)| {
        let result = parse(&call(host, "bridge", "ADD", "c1", ifname, &conf).unwrap());
        call(host, "portmap", "ADD", "c1", ifname, &portmap(5, &result, &more(port))).unwrap();
        result
    });
    let rules = || shell(&host.netns, "iptables-save -t nat");
    let has = |address: &str| rules().contains(&format!("--to-destination {address}:80")) && rules().contains(&format!("-s {address}/32"));
    assert!(has("10.5.0.2") && has("10.5.0.3"), "{}", rules());
    for ((ifname, port), result) in places.iter().zip(&results) {
        call(host, "portmap", "CHECK", "c1", ifname, &portmap(5, result, &more(*port))).unwrap();
    }
    let del = |at: usize| {
        let (ifname, port) = places[at];
        call(host, "portmap", "DEL", "c1", ifname, &portmap(5, &results[at], &more(port))).unwrap();
        call(host, "bridge", "DEL", "c1", ifname, &conf).unwrap();
    };
    del(0);
    assert!(!rules().contains("10.5.0.2") && has("10.5.0.3"), "{}", rules());
    del(1);
    assert!(!rules().contains("10.5.0.") && !rules().contains("c1"), "{}", rules());
    drop(pod);
}

pub(super) fn del_removes_a_chain_that_was_flushed(host: &Host) {
    let _pod = host.pod("c1");
    let mut conf = network(host, 5);
    conf["ipMasq"] = true.into();
    conf["ipMasqBackend"] = "iptables".into();
    let chains = || shell(&host.netns, "iptables-save -t nat").lines().filter(|line| line.starts_with(":CNI-")).count();
    conf["prevResult"] = parse(&call(host, "bridge", "ADD", "c1", "net1", &conf).unwrap());
    assert_eq!(chains(), 1);
    shell(&host.netns, "iptables -t nat -F");
    call(host, "bridge", "DEL", "c1", "net1", &conf).unwrap();
    assert_eq!(chains(), 0, "no rule says whose the chain was");
}

pub(super) fn failed_add_keeps_the_ports_of_another_attachment(host: &Host) {
    let _pod = host.pod("c1");
    let [_, second] = two_networks(host, "c1");
    call(host, "portmap", "DEL", "c1", "net1", &portmap(6, &second, &json!({}))).unwrap();
    let broken = portmap(6, &second, &json!({ "conditionsV4": ["no such word"] }));
    let error = call(host, "portmap", "ADD", "c1", "net1", &broken).unwrap_err();
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.6.0.2")), (1, 0));
    assert!(error["msg"].as_str().unwrap().starts_with("conditionsV4, conditionsV6: cannot add the rules with nft"), "{error}");
}

pub(super) fn untagged_port_rules_are_removed_by_address(host: &Host) {
    let _pod = host.pod("c1");
    let [first, second] = [(5, "eth0"), (6, "net1")]
        .map(|(number, ifname)| parse(&call(host, "bridge", "ADD", "c1", ifname, &network(host, number)).unwrap()));
    // As the reference plugin and earlier versions write them.
    let untagged = |address: &str, host_port: u16| {
        let mapping = Mapping { protocol: 6, host_port, container_port: 80, host_ip: None };
        let holder = Holder::Container("c1".to_owned());
        let ports = Ports { holder, address: address.parse().unwrap(), mappings: vec![mapping], snat: Snat::Local };
        host.netns.run(|| pod_table::add(Table::Ports(ports.family()), &ports.rules())).unwrap().unwrap();
    };
    untagged("10.5.0.2/24", 8005);
    untagged("10.6.0.2/24", 8006);
    call(host, "portmap", "CHECK", "c1", "eth0", &portmap(5, &first, &json!({ "backend": "nftables" }))).unwrap();
    call(host, "portmap", "DEL", "c1", "net1", &portmap(6, &second, &json!({}))).unwrap();
    assert_eq!((translations(host, "10.5.0.2"), translations(host, "10.6.0.2")), (1, 0));
    call(host, "portmap", "DEL", "c1", "eth0", &portmap(5, &Value::Null, &json!({}))).unwrap();
    assert!(!host.nft().contains("c1"), "{}", host.nft());
}

pub(super) fn portmap_needs_no_route_to_the_container(host: &Host) {
    let _pod = host.pod("c1");
    let previous = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": host.path("c1") }],
                           "ips": [{ "address": "203.0.113.5/24", "interface": 0 }] });
    for more in [json!({}), json!({ "snat": false }), json!({ "masqAll": true }), json!({ "backend": "iptables" })] {
        let conf = portmap(5, &previous, &more);
        host.call("portmap", "ADD", "c1", &conf).unwrap();
        host.call("portmap", "CHECK", "c1", &conf).unwrap();
        host.call("portmap", "DEL", "c1", &conf).unwrap();
    }
}

pub(super) fn conditions_for_nftables_are_applied(host: &Host) {
    let _pod = host.pod("c1");
    let result = parse(&host.call("bridge", "ADD", "c1", &network(host, 5)).unwrap());
    for backend in ["nftables", ""] {
        let conf = portmap(5, &result, &json!({ "backend": backend, "conditionsV4": ["ip", "saddr", "198.51.100.0/24"] }));
        host.call("portmap", "ADD", "c1", &conf).unwrap();
        let rules = host.nft();
        assert!(rules.contains("ip saddr 198.51.100.0/24 tcp dport 8005 dnat to 10.5.0.2:80 comment \"c1\""), "{rules}");
        assert!(rules.contains("masquerade comment \"c1\"") && rules.contains("fib daddr type local jump hostports_all"), "{rules}");
        host.call("portmap", "CHECK", "c1", &conf).unwrap();
        host.call("portmap", "DEL", "c1", &conf).unwrap();
        assert!(!host.nft().contains("c1"), "{}", host.nft());
    }
}
