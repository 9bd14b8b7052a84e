//! Tests this crate with the real kernel, in network namespaces that the tests create. They have their own `main` instead of the usual
//! harness, because a user namespace can be entered only while the process has one thread.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "netns/inspect.rs"]
mod inspect;
#[path = "netns/kernel_wireguard.rs"]
mod kernel_wireguard;
#[path = "netns/monitor.rs"]
mod monitor;
#[path = "netns/pod_rules.rs"]
mod pod_rules;
#[path = "netns/rules.rs"]
mod rules;
#[path = "netns/wireguard.rs"]
mod wireguard;

use std::collections::BTreeSet;

use flannel::desired::Owner;
use flannel::diff::{Prune, diff};
use flannel::object::{Addr, Blackhole, Key, Link, LinkKind, Object, ROUTE_PROTOCOL, Route, Sysctl};
use flannel::scope::Scope;
use flannel::traffic::iptables::Variant;
use flannel::traffic::{self, Flavour, TrafficConfig};
use flannel::{Desired, Family, IfName, Mac, Observed, Op, PerFamily, Vni};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{Kernel, addr, link, netns, route};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(std::path::Path::new("/mnt")).expect("create the namespaces of the tests");
    }
    let tests: [(&str, fn()); 40] = [
        ("every_object_is_written_read_back_and_deleted", every_object_is_written_read_back_and_deleted),
        ("second_diff_is_empty", second_diff_is_empty),
        ("link_with_another_vni_is_recreated_with_its_dependents", link_with_another_vni_is_recreated),
        ("mtu_mac_and_state_are_changed_in_place", mtu_mac_and_state_are_changed_in_place),
        ("refused_operation_does_not_affect_others", refused_operation_does_not_affect_others),
        ("deleting_a_missing_object_succeeds", deleting_a_missing_object_succeeds),
        ("foreign_routes_are_ignored", foreign_routes_are_ignored),
        ("routes_of_a_go_flanneld_are_adopted", routes_of_a_go_flanneld_are_adopted),
        ("changed_ruleset_is_detected_and_repaired", rules::changed_ruleset_is_detected_and_repaired),
        ("iptables_rules_are_written_in_one_step_and_repaired", rules::iptables_rules_are_written_and_repaired),
        ("only_pod_network_addresses_on_the_device_are_in_scope", only_pod_network_addresses),
        ("table_that_iptables_cannot_read_is_not_rewritten", rules::table_that_iptables_cannot_read),
        ("ten_thousand_operations_in_one_batch", monitor::ten_thousand_operations_in_one_batch),
        ("missing_pod_rules_are_restored", pod_rules::missing_pod_rules_are_restored),
        ("disabled_forwarding_is_reported", monitor::disabled_forwarding_is_reported),
        ("monitor_reports_changes_of_others_only", monitor::monitor_reports_changes_of_others_only),
        ("a_file_is_watched_also_when_its_folder_goes", monitor::a_file_is_watched_also_when_its_folder_goes),
        ("chains_that_drop_forwarded_packets_are_read", inspect::chains_that_drop),
        ("chains_that_accept_pods_are_no_finding", inspect::chains_that_accept),
        ("foreign_routes_and_rules_are_read", inspect::foreign_routes_and_rules),
        ("moved_and_renamed_devices_are_found", inspect::moved_and_renamed_devices),
        ("links_and_addresses_are_read", inspect::links_and_addresses),
        ("instance_lock_refuses_second_holder", instance_lock_refuses_second_holder),
        ("answers_of_other_programs_are_ignored", answers_of_other_programs_are_ignored),
        ("only_network_namespaces_can_be_opened", only_network_namespaces_can_be_opened),
        ("wireguard_device_and_peers_are_written_and_read_back", kernel_wireguard::device_and_peers_are_written_and_read_back),
        ("wireguard_subnet_moves_and_leaves_without_its_peer", kernel_wireguard::subnet_moves_and_leaves_without_its_peer),
        ("refused_wireguard_peer_affects_no_other", kernel_wireguard::refused_peer_affects_no_other),
        ("used_wireguard_port_is_named", kernel_wireguard::used_port_is_named),
        ("userspace_wireguard_carries_both_families", wireguard::two_devices_carry_both_families),
        ("userspace_wireguard_passes_only_own_addresses_of_a_peer", wireguard::only_own_addresses_of_a_peer_pass),
        ("userspace_wireguard_follows_changed_address", wireguard::peer_that_changes_its_address_is_followed),
        ("userspace_wireguard_answers_from_the_address_that_was_asked", wireguard::answers_leave_from_the_address_that_the_peer_sends_to),
        ("userspace_wireguard_cuts_off_removed_peer", wireguard::removed_peer_is_cut_off),
        ("userspace_wireguard_needs_the_same_preshared_key", wireguard::peers_need_the_same_preshared_key),
        ("userspace_wireguard_loses_no_packet_by_changes", wireguard::changes_lose_no_packet),
        ("userspace_wireguard_recovers_from_restart_of_a_peer", wireguard::restarted_device_is_reached_again_within_seconds),
        ("userspace_wireguard_works_without_ipv6", wireguard::a_host_without_ipv6_is_served),
        ("userspace_wireguard_reports_failures", wireguard::port_in_use_and_deleted_device_are_reported),
        ("userspace_wireguard_interoperates_with_wireguard_go", wireguard::another_implementation_is_understood),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(name, move || -> Result<(), Failed> {
            let scratch = Netns::create().expect("create a network namespace");
            scratch
                .run(|| {
                    // Also when it fails: the kernel gives the number of a namespace that has ended to another.
                    kernel::pod_rules::clear();
                    let _clean = Clean;
                    test();
                })
                .expect("enter the namespace");
            Ok(())
        })
    };
    // These need what the kernel of the machine may lack: `cargo xtask vm` runs them.
    let vm_tests: [(&str, fn()); 1] = [("a_thousand_wireguard_peers_in_few_messages", kernel_wireguard::a_thousand_peers_in_few_messages)];
    let vm_tests = vm_tests.into_iter().map(|test| trial(test).with_kind("vm").with_ignored_flag(true));
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).chain(vm_tests).collect()).exit();
}

struct Clean;

impl Drop for Clean {
    fn drop(&mut self) {
        kernel::pod_rules::clear();
    }
}

fn name(text: &str) -> IfName {
    text.parse().unwrap()
}

/// Creates an external interface `eth0` with 192.0.2.1/24: one end of a veth pair, up. The notification that it is up may come a second
/// later.
fn external() -> Socket {
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let end = |text| link::VethEnd { name: name(text), mac: None, netns: None };
    link::create_veth(&mut socket, 1500, end("eth0"), end("wire")).unwrap();
    for text in ["eth0", "wire"] {
        let index = link::get(&mut socket, name(text)).unwrap().unwrap().index;
        link::set_up(&mut socket, index, true).unwrap();
    }
    let index = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
    addr::add(&mut socket, index, "192.0.2.1/24".parse().unwrap()).unwrap();
    addr::add(&mut socket, index, "2001:db8::1/64".parse().unwrap()).unwrap();
    socket
}

fn vxlan(family: Family, vni: u32, mtu: u32) -> Object {
    let (device, local) = match family {
        Family::V4 => ("flannel.1", "192.0.2.1"),
        Family::V6 => ("flannel-v6.1", "2001:db8::1"),
    };
    let kind = LinkKind::Vxlan {
        vni: Vni::new(vni).unwrap(),
        port: 8472,
        local: local.parse().unwrap(),
        lower: name("eth0"),
        gbp: false,
        learning: false,
    };
    Object::Link(Box::new(Link { name: name(device), kind, mac: Mac([0x0e, 0, 0, 0, 0, 1]), mtu, up: true }))
}

fn rules() -> Vec<Object> {
    rules_in(Flavour::Nftables)
}

fn rules_in(flavour: Flavour) -> Vec<Object> {
    let config = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour };
    let networks = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: "fc00::/48".parse().ok() };
    let mine = PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: "fc00:0:0:1::/64".parse().ok() };
    traffic::objects(config, &networks, &mine)
}

/// The devices of both families, and two peers of each family: one behind the device, one on the link.
fn picture() -> Desired {
    use flannel::object::{Fdb, Neigh};
    let mut desired = Desired::default();
    let mut node = rules();
    node.extend(rules_in(Flavour::Iptables(Variant::Nft)));
    node.extend(rules_in(Flavour::Iptables(Variant::Legacy)));
    node.extend(["10.244.1.0/24", "fc00:0:0:1::/64"].map(|net| Object::Blackhole(Blackhole { dst: net.parse().unwrap() })));
    let mut peers = Vec::new();
    for (family, device, net, vtep, host) in [
        (Family::V4, "flannel.1", "10.244", "10.244.2.0", "192.0.2.2"),
        (Family::V6, "flannel-v6.1", "fc00:0:0", "fc00:0:0:2::", "2001:db8::2"),
    ] {
        let device = name(device);
        let (own, len, pods) = match family {
            Family::V4 => (format!("{net}.1.0/32"), 24, format!("{net}.3.0")),
            Family::V6 => (format!("{net}:1::/128"), 64, format!("{net}:3::")),
        };
        node.push(vxlan(family, 1, 1430));
        node.push(Object::Addr(Addr { link: device, cidr: own.parse().unwrap() }));
        node.push(Object::Sysctl(Sysctl { path: format!("net/ipv6/conf/{device}/accept_ra"), value: "0".to_owned() }));
        let mac = Mac([0x0e, 0, 0, 0, 0, 2]);
        let (vtep, host) = (vtep.parse().unwrap(), host.parse().unwrap());
        peers.push(Object::Neigh(Neigh { link: device, ip: vtep, mac }));
        peers.push(Object::Fdb(Fdb { link: device, mac, dst: host }));
        let metric = if family == Family::V4 { 2 } else { 1024 };
        peers.push(Object::Route(Route {
            dst: format!("{vtep}/{len}").parse().unwrap(),
            metric,
            via: Some(vtep),
            dev: device,
            onlink: true,
            protocol: ROUTE_PROTOCOL,
        }));
        peers.push(Object::Route(Route {
            dst: format!("{pods}/{len}").parse().unwrap(),
            metric,
            via: Some(host),
            dev: name("eth0"),
            onlink: false,
            protocol: ROUTE_PROTOCOL,
        }));
    }
    node.extend(peers);
    desired.set_part(Owner::Node, node);
    desired
}

/// A scope with all routes of flanneld.
fn routes() -> Scope {
    Scope { networks: vec!["10.0.0.0/8".parse().unwrap()], ..Scope::default() }
}

/// A scope with all objects of [`picture`].
fn scope() -> Scope {
    let accept_ra = |device: &str| (format!("net/ipv6/conf/{device}/accept_ra"), "0".to_owned());
    Scope {
        links: vec![name("flannel.1"), name("flannel-v6.1")],
        sysctls: vec![accept_ra("flannel.1"), accept_ra("flannel-v6.1")],
        rulesets: Family::ALL.into(),
        iptables: Family::ALL.into(),
        networks: vec!["10.0.0.0/8".parse().unwrap(), "fc00::/48".parse().unwrap()],
        ..Scope::default()
    }
}

#[track_caller]
fn apply(kernel: &mut Kernel, ops: &[Op]) {
    for outcome in kernel.apply(ops) {
        outcome.unwrap_or_else(|error| panic!("{error}"));
    }
}

fn every_object_is_written_read_back_and_deleted() {
    external();
    let mut kernel = Kernel::open().unwrap();
    let desired = picture();
    apply(&mut kernel, &diff(&desired, &Observed::default(), Prune::Yes));
    let observed = kernel.observe(&scope()).unwrap();
    let want: Vec<_> = desired.iter().map(|(_, object)| object.to_string()).collect();
    let have: Vec<_> = observed.iter().map(|(_, object)| object.to_string()).collect();
    assert_eq!(have, want);

    let mut deletes: Vec<Op> =
        observed.iter().filter(|(key, _)| !matches!(key, Key::Sysctl(_))).map(|(_, o)| Op::Delete(o.clone())).collect();
    deletes.reverse();
    apply(&mut kernel, &deletes);
    assert!(kernel.observe(&scope()).unwrap().is_empty());
}

fn second_diff_is_empty() {
    external();
    let mut kernel = Kernel::open().unwrap();
    let desired = picture();
    apply(&mut kernel, &diff(&desired, &Observed::default(), Prune::Yes));
    let observed = kernel.observe(&scope()).unwrap();
    assert_eq!(diff(&desired, &observed, Prune::Yes), []);
    // Setting an object again is no error: every operation may be sent twice.
    let again: Vec<Op> = desired.iter().map(|(_, object)| Op::Set(object.clone())).collect();
    apply(&mut kernel, &again);
    assert_eq!(kernel.observe(&scope()).unwrap(), observed);
}

fn link_with_another_vni_is_recreated() {
    external();
    let mut kernel = Kernel::open().unwrap();
    let desired = picture();
    apply(&mut kernel, &diff(&desired, &Observed::default(), Prune::Yes));
    let mut other = desired.clone();
    let mut node: Vec<Object> =
        desired.iter().map(|(_, object)| object.clone()).filter(|o| o.key() != vxlan(Family::V4, 1, 0).key()).collect();
    node.push(vxlan(Family::V4, 7, 1430));
    other.set_part(Owner::Node, node);
    let observed = kernel.observe(&scope()).unwrap();
    apply(&mut kernel, &diff(&other, &observed, Prune::No));
    let observed = kernel.observe(&scope()).unwrap();
    assert_eq!(diff(&other, &observed, Prune::Yes), []);
}

fn mtu_mac_and_state_are_changed_in_place() {
    external();
    let mut kernel = Kernel::open().unwrap();
    apply(&mut kernel, &[Op::Set(vxlan(Family::V4, 1, 1430))]);
    let index = || link::get(&mut Socket::open(Protocol::Route).unwrap(), name("flannel.1")).unwrap().unwrap().index;
    let before = index();
    let Object::Link(mut changed) = vxlan(Family::V4, 1, 1300) else { unreachable!() };
    changed.mac = Mac([0x0e, 9, 9, 9, 9, 9]);
    changed.up = false;
    if let LinkKind::Vxlan { learning, .. } = &mut changed.kind {
        *learning = true;
    }
    apply(&mut kernel, &[Op::Set(Object::Link(changed.clone()))]);
    let scope = Scope { links: vec![name("flannel.1")], ..Scope::default() };
    assert_eq!(kernel.observe(&scope).unwrap().get(&Key::Link(name("flannel.1"))), Some(&Object::Link(changed)));
    assert_eq!(index(), before, "the device is not recreated");

    // The lower interface is renamed; then another interface becomes the lower one.
    let rename = |from: &str, to: &str| {
        // Kernels before 6.2 rename no interface that is up.
        for arguments in [["set", from, "down"].as_slice(), &["set", from, "name", to], &["set", to, "up"]] {
            assert!(std::process::Command::new("ip").arg("link").args(arguments).status().unwrap().success());
        }
    };
    rename("eth0", "ens3");
    let wanted = vxlan(Family::V4, 1, 1300);
    let outcome = kernel.apply(&[Op::Set(wanted.clone())]).remove(0);
    assert!(outcome.unwrap_err().text.contains("there is no interface eth0"));
    assert_eq!(index(), before, "the device is kept");
    rename("wire", "eth0");
    apply(&mut kernel, &[Op::Set(wanted.clone())]);
    assert_eq!((kernel.observe(&scope).unwrap().get(&wanted.key()), index()), (Some(&wanted), before));
}

fn peer_route(i: u32, via: &str) -> Object {
    let dst = format!("10.{}.{}.0/24", 128 + i / 256, i % 256).parse().unwrap();
    Object::Route(Route { dst, metric: i, via: Some(via.parse().unwrap()), dev: name("eth0"), onlink: false, protocol: ROUTE_PROTOCOL })
}

fn refused_operation_does_not_affect_others() {
    external();
    let mut kernel = Kernel::open().unwrap();
    let missing = Object::Route(Route {
        dst: "10.1.0.0/24".parse().unwrap(),
        metric: 0,
        via: None,
        dev: name("nope"),
        onlink: false,
        protocol: ROUTE_PROTOCOL,
    });
    // Only the last request of a batch is acknowledged: make that one fail, too.
    let ops: Vec<Op> = (0..1000)
        .map(|i| peer_route(i, if i % 10 == 9 { "198.51.100.1" } else { "192.0.2.2" }))
        .map(Op::Set)
        .chain([Op::Set(missing)])
        .collect();
    let outcomes = kernel.apply(&ops);
    assert_eq!(outcomes.len(), ops.len());
    for (i, outcome) in outcomes.iter().take(1000).enumerate() {
        assert_eq!(outcome.is_err(), i % 10 == 9, "{i}: {outcome:?}");
    }
    let error = outcomes[9].clone().unwrap_err();
    assert_eq!(
        error.text,
        "set route 10.128.9.0/24 via 198.51.100.1 dev eth0 metric 9: Network is unreachable (os error 101) (Nexthop has invalid gateway)"
    );
    assert!(outcomes[1000].clone().unwrap_err().text.contains("there is no interface nope"));
    assert_eq!(kernel.observe(&routes()).unwrap().len(), 900);
}

fn deleting_a_missing_object_succeeds() {
    external();
    let mut kernel = Kernel::open().unwrap();
    let ops: Vec<Op> = picture().iter().filter(|(key, _)| !matches!(key, Key::Sysctl(_))).map(|(_, o)| Op::Delete(o.clone())).collect();
    apply(&mut kernel, &ops);
    apply(&mut kernel, &[Op::Set(vxlan(Family::V4, 1, 1430)), Op::Set(vxlan(Family::V6, 1, 1430))]);
    let on_devices: Vec<Op> = ops.into_iter().filter(|op| !matches!(op.object(), Object::Link(_))).collect();
    apply(&mut kernel, &on_devices);
}

fn foreign_routes_are_ignored() {
    let mut socket = external();
    let index = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
    for dst in ["10.244.9.0/24", "203.0.113.0/24"] {
        route::add(&mut socket, dst.parse().unwrap(), Some("192.0.2.9".parse().unwrap()), index).unwrap();
    }
    let mut kernel = Kernel::open().unwrap();
    // Another flanneld on this host has another network.
    let mut other = peer_route(7, "192.0.2.2");
    if let Object::Route(route) = &mut other {
        route.dst = "172.30.7.0/24".parse().unwrap();
    }
    apply(&mut kernel, &[Op::Set(other)]);
    let mut desired = Desired::default();
    desired.set_part(Owner::Node, vec![peer_route(1, "192.0.2.2")]);
    let observed = kernel.observe(&routes()).unwrap();
    assert!(observed.is_empty(), "{observed:?}");
    apply(&mut kernel, &diff(&desired, &observed, Prune::Yes));
    let routes = route::list(&mut socket, Family::V4, route::Filter::Oif(index)).unwrap();
    let foreign: BTreeSet<String> = routes.iter().filter(|r| r.via.is_some()).map(|r| r.dst.to_string()).collect();
    assert_eq!(foreign, ["10.244.9.0/24", "203.0.113.0/24", "172.30.7.0/24", "10.128.1.0/24"].map(ToOwned::to_owned).into());
}

fn routes_of_a_go_flanneld_are_adopted() {
    let mut socket = external();
    let mut kernel = Kernel::open().unwrap();
    let desired = picture();
    let device = vxlan(Family::V4, 1, 1430);
    apply(&mut kernel, &[Op::Set(device)]);
    // A Go flanneld's route to an existing peer, and one to a peer that is gone.
    let old = |dst: &str, via: &str| {
        Object::Route(Route {
            dst: dst.parse().unwrap(),
            metric: 0,
            via: Some(via.parse().unwrap()),
            dev: name("flannel.1"),
            onlink: true,
            protocol: 3,
        })
    };
    apply(&mut kernel, &[Op::Set(old("10.244.2.0/24", "10.244.2.0")), Op::Set(old("10.244.77.0/24", "10.244.77.0"))]);
    let observed = kernel.observe(&scope()).unwrap();
    assert_eq!(observed.iter().filter(|(_, object)| matches!(object, Object::Route(route) if route.protocol == 3)).count(), 2);
    apply(&mut kernel, &diff(&desired, &observed, Prune::Yes));
    assert_eq!(diff(&desired, &kernel.observe(&scope()).unwrap(), Prune::Yes), []);
    // A second deletion does not delete the daemon's route, although the kernel takes metric 0 as any metric.
    apply(&mut kernel, &[Op::Delete(old("10.244.2.0/24", "10.244.2.0"))]);
    assert_eq!(diff(&desired, &kernel.observe(&scope()).unwrap(), Prune::Yes), []);
    let index = link::get(&mut socket, name("flannel.1")).unwrap().unwrap().index;
    assert_eq!(route::list(&mut socket, Family::V4, route::Filter::Oif(index)).unwrap().len(), 1);
}

/// Upstream's TestEnsureV4AddressOnLink and TestEnsureV6AddressOnLink.
fn only_pod_network_addresses() {
    let mut socket = external();
    let mut kernel = Kernel::open().unwrap();
    let desired = picture();
    apply(&mut kernel, &diff(&desired, &Observed::default(), Prune::Yes));
    for (device, texts) in
        [("flannel.1", ["198.51.100.1/24", "10.244.9.9/32"]), ("flannel-v6.1", ["fc00:0:0:9::9/128", "2001:db8:9::9/64"])]
    {
        let index = link::get(&mut socket, name(device)).unwrap().unwrap().index;
        texts.iter().for_each(|text| addr::add(&mut socket, index, text.parse().unwrap()).unwrap());
    }
    let ops = diff(&desired, &kernel.observe(&scope()).unwrap(), Prune::Yes);
    assert_eq!(ops.len(), 3, "{ops:?}");
    apply(&mut kernel, &ops);
    let left = |device: &str| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let index = link::get(&mut socket, name(device)).unwrap().unwrap().index;
        let all = addr::list(&mut socket, index).unwrap();
        let global = all.iter().filter(|a| a.index == index && !a.link_scope);
        global.map(|a| a.addr.cidr.to_string()).collect::<BTreeSet<_>>()
    };
    assert_eq!(left("flannel.1"), BTreeSet::from(["10.244.1.0/32".to_owned(), "198.51.100.1/24".to_owned()]));
    assert_eq!(left("flannel-v6.1"), BTreeSet::from(["fc00:0:0:1::/128".to_owned()]));
}

fn only_network_namespaces_can_be_opened() {
    assert!(Netns::current().is_ok());
    for path in ["/proc/self/ns/mnt", "/etc/passwd", "/nonexistent"] {
        assert!(Netns::open(std::path::Path::new(path)).is_err(), "{path}");
    }
    let (here, new) = (Netns::current().unwrap(), Netns::create().unwrap());
    assert_eq!(here.id().unwrap(), Netns::current().unwrap().id().unwrap(), "creating does not move");
    let inside = new.run(|| Netns::current().unwrap().id().unwrap()).unwrap();
    assert_eq!(inside, new.id().unwrap());
    let path = std::path::Path::new("/mnt/named");
    new.bind(path).unwrap();
    assert_eq!(Netns::open(path).unwrap().id().unwrap(), inside);
    netns::unbind(path).unwrap();
}

fn instance_lock_refuses_second_holder() {
    let folder = std::path::Path::new("/mnt/alone/.locks");
    let patience = std::time::Duration::from_millis(50);
    let held = kernel::lock::alone(folder, "subnet.env", patience).unwrap();
    let refused = kernel::lock::alone(folder, "subnet.env", patience).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
    assert!(refused.to_string().starts_with(&format!("pid {} on ", std::process::id())), "{refused}");
    drop(held);
    let mode = |path: &std::path::Path| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap()) & 0o777;
    assert_eq!((mode(folder), mode(&folder.join("subnet.env"))), (0o700, 0o600), "no other user can open, and so lock it");
    kernel::lock::alone(folder, "subnet.env", patience).unwrap();
}

fn answers_of_other_programs_are_ignored() {
    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, SendFlags, SocketType, sendto, socket};
    let mut ours = Socket::open(Protocol::Route).unwrap();
    // NETLINK_ROUTE has number 0.
    let theirs = socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap();
    // The end of a dump (NLMSG_DONE), as the answer to the first request.
    for sequence in 0u32..3 {
        let mut message = [20u32.to_ne_bytes(), [0; 4], sequence.to_ne_bytes(), [0; 4], [0; 4]].concat();
        message[4..6].copy_from_slice(&3u16.to_ne_bytes());
        sendto(&theirs, &message, SendFlags::empty(), &SocketAddrNetlink::new(ours.port(), 0)).unwrap();
    }
    let links = link::list(&mut ours).unwrap();
    // Modules of tunnels add a link of their own to each namespace.
    assert_eq!(links.first().map(|link| link.name), Some(name("lo")));
}
