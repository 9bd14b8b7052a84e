//! Property tests: invariants that hold for every input, checked with random inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use flannel::alloc::{Choice, choose};
use flannel::backend::Identity;
use flannel::desired::{Claims, Owner};
use flannel::diff::{Prune, diff, diff_keys};
use flannel::object::{Addr, AllowedIp, Fdb, Key, Link, LinkKind, Neigh, ROUTE_PROTOCOL, Route, WgPeer};
use flannel::traffic::TrafficConfig;
use flannel::wireguard::PublicKey;
use flannel::{
    Age, Cidr, Config, Desired, Family, Lease, LeaseKey, LeaseSet, Mac, Node, Object, Observed, Peer, PerFamily, Picture, StoreEvent,
    Subnet, Vni, subnet_env, wire,
};
use proptest::prelude::*;

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits)))
    ]
}

fn subnet() -> impl Strategy<Value = Subnet> {
    (ip(), any::<u8>()).prop_map(|(ip, len)| Subnet::new(ip, len % (if ip.is_ipv4() { 33 } else { 129 })).expect("the length is in range"))
}

/// Objects of few links and addresses, so that their keys often collide.
fn object() -> impl Strategy<Value = Object> {
    let link = prop_oneof![Just("flannel.1"), Just("flannel.2")].prop_map(|name| name.parse().expect("a name"));
    let small = || (0u8..6).prop_map(|n| IpAddr::V4(Ipv4Addr::new(10, 1, n, 0)));
    let mac = (0u8..4).prop_map(|n| Mac([2, 0, 0, 0, 0, n]));
    (0u8..7, link, small(), small(), mac, 0u32..3).prop_map(|(kind, link, a, b, mac, n)| match kind {
        0 => Object::Link(Box::new(Link {
            name: link,
            kind: LinkKind::Vxlan {
                vni: Vni::new(n).expect("small"),
                port: 8472,
                local: b,
                lower: "eth0".parse().expect("a name"),
                gbp: false,
                learning: n == 1,
            },
            mac,
            mtu: 1400 + n,
            up: true,
        })),
        1 => Object::Addr(Addr { link, cidr: Cidr { addr: a, len: 32 } }),
        2 => Object::Neigh(Neigh { link, ip: a, mac }),
        3 => Object::Fdb(Fdb { link, mac, dst: a }),
        4 => {
            let endpoint = Some(SocketAddr::new(b, 51_820));
            Object::WgPeer(Box::new(WgPeer {
                link,
                public_key: PublicKey([mac.0[5]; 32]),
                endpoint,
                keepalive: 0,
                psk: None,
                handshake: None,
            }))
        }
        5 => {
            let a = if n == 2 { IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, mac.0[5].into(), 0, 0, 0, 0)) } else { a };
            let subnet = Subnet::new(a, if n == 2 { 64 } else { 24 }).expect("a prefix");
            Object::AllowedIp(Box::new(AllowedIp { link, subnet, peer: PublicKey([mac.0[5]; 32]) }))
        }
        _ => Object::Route(Route {
            dst: Subnet::new(a, 24).expect("a prefix"),
            metric: n,
            via: Some(b),
            dev: link,
            onlink: true,
            protocol: ROUTE_PROTOCOL,
        }),
    })
}

fn objects() -> impl Strategy<Value = Vec<Object>> {
    prop::collection::vec(object(), 0..12)
}

fn desired(objects: Vec<Object>) -> Desired {
    let mut desired = Desired::default();
    desired.set_part(Owner::Node, objects);
    desired
}

/// An observed state that can occur beside a desired one: no desired object depends on an undesired link.
fn observed(objects: Vec<Object>, want: &Desired) -> Observed {
    let is_possible = |object: &Object| match object {
        Object::Link(link) => want.get(&object.key()).is_some() || !want.iter().any(|(_, wanted)| wanted.depends_on(link.name)),
        _ => true,
    };
    objects.into_iter().filter(is_possible).collect()
}

fn peer() -> impl Strategy<Value = Peer> {
    let backend = prop_oneof![Just(""), Just("vxlan"), Just("wireguard"), Just("host-gw"), Just("we\"ird\u{1}")];
    let v4 = prop::option::of(
        any::<u32>().prop_filter("0.0.0.0 means none", |bits| *bits != 0).prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
    );
    let v6 = prop::option::of(
        any::<u128>().prop_filter(":: means none", |bits| *bits != 0).prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
    );
    // Each backend reads its own fields.
    let data = prop::option::of((0u8..9).prop_map(|n| {
        let key = PublicKey([n; 32]);
        format!("{{\"VNI\":{n},\"VtepMAC\":\"02:00:00:00:00:0{n}\",\"PublicKey\":\"{key}\",\"Port\":5182{n}}}").into()
    }));
    (v4, v6, backend, data).prop_map(|(v4, v6, backend, data)| Peer {
        public: PerFamily { v4, v6 },
        backend_type: backend.into(),
        backend_data: PerFamily { v4: data, v6: None },
    })
}

/// Leases of a few subnets, some of which overlap, and some of them outside the pod network.
fn lease() -> impl Strategy<Value = Lease> {
    (0u8..8, 23u8..26, 0u8..5, peer()).prop_map(|(subnet, len, host, mut peer)| {
        let second = if subnet == 7 { 245 } else { 244 };
        let v4 = Subnet::new(IpAddr::V4(Ipv4Addr::new(10, second, subnet, 0)), len.max(24)).ok();
        peer.public.v4 = Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, host)));
        Lease { key: LeaseKey::new(PerFamily { v4, v6: None }).expect("it has a subnet"), peer }
    })
}

fn event() -> impl Strategy<Value = StoreEvent> {
    prop_oneof![
        1 => Just(StoreEvent::Init),
        1 => Just(StoreEvent::InitDone),
        1 => Just(StoreEvent::Older),
        6 => (lease(), age()).prop_map(|(lease, age)| StoreEvent::Apply(lease, age)),
        3 => lease().prop_map(|lease| StoreEvent::Delete(lease.key)),
        1 => (lease(), age()).prop_map(|(lease, age)| StoreEvent::Keep(lease.key, age)),
    ]
}

fn age() -> impl Strategy<Value = Age> {
    prop_oneof![4 => (1u64..5).prop_map(Age::created), 1 => Just(Age::UNKNOWN)]
}

/// Parts of this node and of leases with overlapping subnets, some of them of one host.
fn claims() -> impl Strategy<Value = Claims> {
    let hosts = prop::option::of((1u8..4).prop_map(|n| IpAddr::V4(Ipv4Addr::new(192, 0, 2, n))));
    let v6_hosts = prop::option::of((1u16..3).prop_map(|n| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n))));
    (0u8..9, age(), hosts, v6_hosts, prop::collection::vec(object(), 0..4)).prop_map(|(n, age, v4, v6, objects)| {
        let key = |v4: &str, v6: &str| LeaseKey::new(PerFamily { v4: v4.parse().ok(), v6: v6.parse().ok() }).expect("it has a subnet");
        let owner = match n {
            0 => return Claims { owner: Owner::Node, age: Age::created(0), hosts: PerFamily::default(), objects },
            1 => key("10.244.0.0/22", ""),
            2 => key("10.244.0.0/24", ""),
            3 => key("10.244.1.0/24", "fc00:0:0:1::/64"),
            4 => key("10.244.1.0/24", "fc00:0:0:2::/64"),
            5 => key("10.244.1.128/25", "fc00::/60"),
            6 => key("", "fc00:0:0:1::/64"),
            7 => key("", "fc00:0:0:2:8000::/65"),
            _ => key("10.244.9.0/24", "fc00:0:0:99::/64"),
        };
        Claims { owner: Owner::Lease(owner), age, hosts: PerFamily { v4, v6 }, objects }
    })
}

/// The family of the objects that [`object`] makes, where they have one.
fn family_of(object: &Object) -> Option<Family> {
    match object {
        Object::Fdb(Fdb { dst: ip, .. }) | Object::Neigh(Neigh { ip, .. }) => Some(Family::of(*ip)),
        Object::Route(route) => Some(route.dst.family()),
        Object::AllowedIp(allowed) => Some(allowed.subnet.family()),
        _ => None,
    }
}

/// The families that an object of a part serves: a WireGuard peer, those of its subnets in the part.
fn served(part: &Claims, object: &Object) -> BTreeSet<Family> {
    match object {
        Object::WgPeer(peer) => {
            let of_it = |object: &&Object| matches!(object, Object::AllowedIp(ip) if (ip.link, ip.peer) == (peer.link, peer.public_key));
            part.objects.iter().filter(of_it).filter_map(family_of).collect()
        }
        _ => family_of(object).into_iter().collect(),
    }
}

/// Whether an object of a part is left out, if these families are.
fn is_left_out(part: &Claims, object: &Object, families: &[Family]) -> bool {
    let served = served(part, object);
    match object {
        Object::WgPeer(_) => !served.is_empty() && served.iter().all(|family| families.contains(family)),
        _ if served.is_empty() => !families.is_empty(),
        _ => served.iter().any(|family| families.contains(family)),
    }
}

/// The families of a part that are left out, by the definition: an older part of another host has an overlapping subnet, or is the
/// oldest of all that claim a key of this family.
fn refused(part: &Claims, all: &BTreeMap<Owner, Claims>) -> Vec<Family> {
    let Owner::Lease(lease) = part.owner else { return Vec::new() };
    let rank = |part: &Claims| (part.age, part.owner);
    let others = || all.values().filter(|other| other.owner != part.owner && !other.objects.is_empty());
    let is_refused = |family: &Family| {
        let is_other = |other: &Claims| {
            let (own, other) = (part.hosts.get(*family), other.hosts.get(*family));
            own.is_none() || own != other
        };
        let overlaps = |other: &Claims| match other.owner {
            Owner::Lease(theirs) => match (lease.subnets().get(*family), theirs.subnets().get(*family)) {
                (Some(own), Some(theirs)) => own.overlaps(*theirs),
                _ => false,
            },
            _ => false,
        };
        let is_lost = |key: Key| {
            let claimants = others().filter(|other| other.objects.iter().any(|object| object.key() == key));
            claimants.min_by_key(|other| rank(other)).is_some_and(|oldest| rank(oldest) < rank(part) && is_other(oldest))
        };
        let mut keys = part.objects.iter().filter(|object| served(part, object).contains(family)).map(Object::key);
        let is_overlapped = others().any(|other| overlaps(other) && rank(other) < rank(part) && is_other(other));
        !part.objects.is_empty() && (is_overlapped || keys.any(is_lost))
    };
    Family::ALL.into_iter().filter(is_refused).collect()
}

fn pictures() -> impl Strategy<Value = Picture> {
    prop_oneof![Just(r#"{"Type":"vxlan","DirectRouting":true}"#), Just(r#"{"Type":"wireguard"}"#)].prop_map(picture)
}

fn picture(backend: &str) -> Picture {
    let config = Config::parse(&format!(r#"{{"Network":"10.244.0.0/16","Backend":{backend}}}"#)).expect("a config");
    let addrs = PerFamily { v4: "192.0.2.1".parse().ok(), v6: None };
    let node = Node {
        ext: "eth0".parse().expect("a name"),
        mtu: 1500,
        addrs,
        public: addrs,
        routes: vec![("192.0.2.0/31".parse().expect("a prefix"), true)],
    };
    let identity = Identity {
        macs: PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, 9])), v6: None },
        public_key: Some(PublicKey([99; 32])),
        ..Identity::default()
    };
    let own = LeaseKey::new(PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: None }).expect("it has a subnet");
    Picture::new(
        config,
        node,
        identity,
        TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: flannel::traffic::Flavour::Nftables },
        own,
    )
}

proptest! {
    #[test]
    fn oldest_lease_keeps_what_it_claims(changes in prop::collection::vec(prop::collection::vec(claims(), 1..4), 1..12)) {
        let mut desired = Desired::default();
        let mut parts: BTreeMap<Owner, Claims> = BTreeMap::new();
        for change in changes {
            let change: BTreeMap<Owner, Claims> = change.into_iter().map(|claims| (claims.owner, claims)).collect();
            let before: BTreeMap<Key, Object> = desired.iter().map(|(key, object)| (key.clone(), object.clone())).collect();
            let changes = desired.set_parts(change.clone().into_values().collect());
            parts.extend(change);
            let left_out: BTreeMap<Owner, Vec<Family>> = parts.values().map(|part| (part.owner, refused(part, &parts))).collect();
            let mut in_order: Vec<&Claims> = parts.values().collect();
            in_order.sort_by_key(|part| (part.age, part.owner));
            let mut wanted: BTreeMap<Key, &Object> = BTreeMap::new();
            for part in in_order {
                // Within a part the last object with a key counts.
                let own: BTreeMap<Key, &Object> = part.objects.iter().map(|object| (object.key(), object)).collect();
                for (key, object) in own {
                    if !is_left_out(part, object, &left_out[&part.owner]) {
                        wanted.entry(key).or_insert(object);
                    }
                }
            }
            prop_assert_eq!(desired.iter().map(|(key, object)| (key.clone(), object)).collect::<BTreeMap<_, _>>(), wanted.clone());
            prop_assert!(wanted.iter().all(|(key, object)| desired.get(key) == Some(object)));
            prop_assert_eq!(desired.len(), wanted.len());
            for (owner, families) in left_out {
                if let Owner::Lease(lease) = owner {
                    prop_assert_eq!(desired.refused(lease).map(|(family, _)| family).collect::<Vec<_>>(), families.clone());
                }
            }
            for (key, object) in &before {
                prop_assert!(desired.get(key) == Some(object) || changes.keys.binary_search(key).is_ok(), "{} changed unseen", key);
            }
            for (key, object) in &wanted {
                prop_assert!(before.get(key) == Some(object) || changes.keys.binary_search(key).is_ok(), "{} changed unseen", key);
            }
            let mut rebuilt = Desired::default();
            rebuilt.set_parts(parts.clone().into_values().collect());
            prop_assert_eq!(&rebuilt, &desired);
            prop_assert!(rebuilt.iter().eq(desired.iter()), "the order of arrival does not matter");
        }
    }

    #[test]
    fn applying_the_diff_yields_the_desired_state(want in objects(), have in objects()) {
        let want = desired(want);
        let mut have = observed(have, &want);
        for op in diff(&want, &have, Prune::Yes) {
            have.apply(&op);
        }
        let wanted: Observed = want.iter().map(|(_, object)| object.clone()).collect();
        prop_assert_eq!(&have, &wanted);
        prop_assert!(diff(&want, &have, Prune::Yes).is_empty(), "a second diff is empty");
    }

    #[test]
    fn diff_without_pruning_deletes_only_replaced_links(want in objects(), have in objects()) {
        let want = desired(want);
        let mut have = observed(have, &want);
        let ops = diff(&want, &have, Prune::No);
        for op in &ops {
            let replaced = matches!(op.object().key(), Key::Link(_)) && want.get(&op.object().key()).is_some();
            prop_assert!(matches!(op, flannel::Op::Set(_)) || replaced);
            have.apply(op);
        }
        for (key, object) in want.iter() {
            prop_assert_eq!(have.get(key), Some(object));
        }
    }

    #[test]
    fn diff_of_all_keys_equals_the_whole_diff(want in objects(), have in objects()) {
        let want = desired(want);
        let have = observed(have, &want);
        let keys: BTreeSet<Key> = want.iter().map(|(key, _)| key.clone()).chain(have.iter().map(|(key, _)| key.clone())).collect();
        prop_assert_eq!(diff_keys(&want, &have, &keys, Prune::Yes), diff(&want, &have, Prune::Yes));
    }

    #[test]
    fn touched_keys_cover_every_change(mut picture in pictures(), events in prop::collection::vec(event(), 0..40)) {
        let mut kernel: Observed = Observed::default();
        for op in diff(picture.desired(), &kernel, Prune::No) {
            kernel.apply(&op);
        }
        for event in events {
            let touched = picture.fold(event);
            let keys: BTreeSet<Key> = touched.keys.into_iter().collect();
            for op in diff_keys(picture.desired(), &kernel, &keys, Prune::Yes) {
                kernel.apply(&op);
            }
        }
        let whole: Observed = picture.desired().iter().map(|(_, object)| object.clone()).collect();
        prop_assert_eq!(kernel, whole);
    }

    #[test]
    fn leases_outside_the_network_or_overlapping_own_get_no_route(
        mut picture in pictures(), events in prop::collection::vec(event(), 0..40)
    ) {
        for event in events {
            picture.fold(event);
        }
        let (network, own): (Subnet, Subnet) = ("10.244.0.0/16".parse().unwrap(), "10.244.1.0/24".parse().unwrap());
        for (_, object) in picture.desired().iter() {
            let dst = match object {
                // That of WireGuard's device is for the whole network.
                Object::Route(route) if route.dst == network && route.via.is_none() => continue,
                Object::Route(route) => route.dst,
                Object::AllowedIp(allowed) => {
                    prop_assert!(picture.desired().get(&Key::WgPeer(allowed.link, allowed.peer)).is_some(), "{} has no peer", object);
                    allowed.subnet
                }
                _ => continue,
            };
            prop_assert!(network.covers(dst) && !own.overlaps(dst), "{}", object);
        }
    }

    #[test]
    fn order_of_leases_in_a_list_does_not_matter(
        empty in pictures(), mut leases in prop::collection::vec((lease(), age()), 0..12), seed in any::<u64>()
    ) {
        leases.sort_by_key(|(lease, _)| lease.key);
        leases.dedup_by_key(|(lease, _)| lease.key);
        let fold = |leases: &[(Lease, Age)]| {
            let mut picture = empty.clone();
            picture.fold(StoreEvent::Init);
            leases.iter().for_each(|(lease, age)| drop(picture.fold(StoreEvent::Apply(lease.clone(), *age))));
            picture.fold(StoreEvent::InitDone);
            (picture.desired().clone(), picture.refusals().clone())
        };
        let in_order = fold(&leases);
        // A simple shuffle is enough: any other order will do.
        let mut state = seed;
        leases.sort_by_key(|_| { state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); state >> 33 });
        prop_assert_eq!(fold(&leases), in_order);
    }

    #[test]
    fn allocations_never_overlap(hosts in 1usize..30, draws in prop::collection::vec(any::<usize>(), 30)) {
        let config = Config::parse(r#"{"Network":"10.1.0.0/19","SubnetLen":24,"Backend":{"Type":"alloc"}}"#).expect("a config");
        let mut leases = LeaseSet::default();
        for (host, draw) in draws.iter().enumerate().take(hosts) {
            let mine = PerFamily { v4: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, u8::try_from(host).unwrap()))), v6: None };
            let mut stale = None;
            let choice = choose(&config, &leases, &mine, &PerFamily::default(), &mut stale, |n| draw % n).expect("31 subnets are free");
            let Choice::Create(key) = choice else { panic!("expected a new lease") };
            prop_assert!(leases.iter().all(|(other, _)| !other.overlaps(&key)));
            leases.fold(StoreEvent::Apply(Lease { key, peer: Peer { public: mine, ..Peer::default() } }, Age::UNKNOWN));
        }
    }

    #[test]
    fn subnet_text_round_trips(subnet in subnet()) {
        prop_assert_eq!(subnet.to_string().parse::<Subnet>().unwrap(), subnet);
        prop_assert!(subnet.contains(subnet.network()) && subnet.contains(subnet.last()));
        prop_assert!(subnet.covers(subnet) && subnet.overlaps(subnet));
    }

    #[test]
    fn subnets_are_ordered_by_address_and_length(a in subnet(), b in subnet()) {
        prop_assert_eq!(a.cmp(&b), (a.network(), a.prefix_len()).cmp(&(b.network(), b.prefix_len())));
    }

    #[test]
    fn json_escapes_are_equivalent_to_plain_text(peer in peer(), at in any::<prop::sample::Index>()) {
        let text = wire::value(&peer);
        // Any letter or digit may be written as an escape, in names and in strings.
        let at = at.index(text.len());
        let byte = text.as_bytes()[at];
        let in_text = text[..at].matches('"').count() % 2 == 1 && byte.is_ascii_alphanumeric() && !text[..at].ends_with('\\');
        // Backend data keeps its escapes, so they would differ.
        let before_data = text.find("\"Backend").is_none_or(|end| at < end);
        if in_text && before_data {
            let escaped = format!("{}\\u{:04x}{}", &text[..at], byte, &text[at + 1..]);
            prop_assert_eq!(wire::parse_value(escaped.as_bytes()).unwrap(), peer);
        }
    }

    #[test]
    fn lease_value_round_trips(peer in peer()) {
        let text = wire::value(&peer);
        prop_assert_eq!(wire::parse_value(text.as_bytes()).unwrap(), peer);
    }

    #[test]
    fn lease_key_round_trips(v4 in subnet(), v6 in subnet()) {
        let v4 = Some(v4).filter(|s| s.network().is_ipv4() && s.prefix_len() < 32 && s.prefix_len() > 0);
        let v6 = Some(v6).filter(|s| s.network().is_ipv6() && s.prefix_len() < 128);
        if let Some(key) = LeaseKey::new(PerFamily { v4, v6 }) {
            prop_assert_eq!(wire::parse_key(&wire::key(&key)).unwrap(), key);
        }
    }

    #[test]
    fn decoders_never_panic(text in ".{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Config::parse(&text);
        let _ = wire::parse_key(&text);
        let _ = wire::parse_value(&bytes);
        let _ = subnet_env::SubnetEnv::parse(&text);
        let _ = subnet_env::previous_subnets(&text);
    }
}
