//! A Node: the prefix of its annotations, their values, its pod CIDRs. What a flanneld writes is read back the same.
#![no_main]
use flannel::annotations::{Keys, lease_key, own_lease_key, pod_cidrs};
use flannel::{Config, Peer, annotations::Annotations};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 8] =
    ["kube-subnet-manager", "backend-type", "backend-data", "public-ip", "backend-v6-data", "public-ipv6", "public-ip-overwrite", "node-public-ip"];

fuzz_target!(|input: (String, Vec<(u8, String)>, String, Vec<String>)| {
    let (prefix, values, cidr, cidrs) = input;
    let _ = Keys::new(&prefix);
    let keys = Keys::new("flannel.alpha.coreos.com").expect("upstream's own");
    let config = Config::parse_assigned(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw"}}"#).expect("a config");
    let annotations: Annotations = values
        .into_iter()
        .map(|(at, value)| (format!("flannel.alpha.coreos.com/{}", NAMES[usize::from(at) % NAMES.len()]), value))
        .collect();
    let _ = keys.node_public(&annotations);
    if let Some((peer, _)) = keys.peer(&annotations, &config, &Peer::default())
        && let Ok(wanted) = keys.wanted(&Annotations::new(), &config.backend, &peer)
    {
        let (read, problems) = keys.peer(&wanted, &config, &Peer::default()).expect("it is managed");
        assert!(problems.is_empty());
        assert_eq!((read.public.v4, read.backend_type), (peer.public.v4, peer.backend_type));
    }
    let Ok(subnets) = pod_cidrs(&cidr, &cidrs) else { return };
    let _ = lease_key(&config, &subnets);
    if let Ok(key) = own_lease_key(&config, &subnets) {
        assert!(key.subnets().iter().all(|(family, subnet)| config.network(family).expect("enabled").covers(*subnet)));
    }
});
