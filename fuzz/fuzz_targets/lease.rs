//! A store entry, key and value, and what the backends make of it: never a route outside the pod network, nor one over
//! this host's own subnet. What is read back from our own text is the same.
#![no_main]
use flannel::traffic::TrafficConfig;
use flannel::backend::Identity;
use flannel::{Age, Config, Lease, LeaseKey, Mac, Node, Object, PerFamily, Picture, StoreEvent, Subnet, wire};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, String, Vec<u8>)| {
    let (vxlan, key, value) = input;
    let key = wire::parse_key(&key).ok();
    if let Some(key) = key {
        assert_eq!(wire::parse_key(&wire::key(&key)).expect("our own text"), key);
    }
    let Ok(peer) = wire::parse_value(&value) else { return };
    assert_eq!(wire::parse_value(wire::value(&peer).as_bytes()).expect("our own text"), peer);

    let kind = if vxlan { "vxlan" } else { "host-gw" };
    let config = Config::parse(&format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{kind}"}}}}"#)).expect("a config");
    let addrs = PerFamily { v4: "192.0.2.1".parse().ok(), v6: None };
    let node = Node { ext: "eth0".parse().expect("a name"), mtu: 1500, addrs, public: addrs, routes: vec![("0.0.0.0/1".parse().expect("a prefix"), true)] };
    let identity = Identity { macs: PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, 1])), v6: None }, data: None };
    let own: Subnet = "10.244.1.0/24".parse().expect("a prefix");
    let traffic = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: flannel::traffic::Flavour::Nftables };
    let own_key = LeaseKey::new(PerFamily { v4: Some(own), v6: None }).expect("a subnet");
    let mut picture = Picture::new(config, node, identity, traffic, own_key);
    let key = key.unwrap_or_else(|| LeaseKey::new(PerFamily { v4: "10.244.7.0/24".parse().ok(), v6: None }).expect("a subnet"));
    picture.fold(StoreEvent::Apply(Lease { key, peer }, Age::UNKNOWN));
    let network: Subnet = "10.244.0.0/16".parse().expect("a prefix");
    for (_, object) in picture.desired().iter() {
        if let Object::Route(route) = object {
            assert!(network.covers(route.dst) && !own.overlaps(route.dst), "{object}");
        }
    }
});
