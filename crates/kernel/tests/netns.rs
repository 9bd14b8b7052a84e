//! Tests this crate with the real kernel, in network namespaces that the tests create. They have their own `main` instead of the usual
//! harness, because a user namespace can be entered only while the process has one thread.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use flannel::desired::Owner;
use flannel::diff::{Prune, diff};
use flannel::object::{Addr, Blackhole, Key, Link, LinkKind, Object, PodRules, ROUTE_PROTOCOL, Route, Sysctl};
use flannel::pod::masquerade::{self, Masquerade};
use flannel::pod::note::Rules;
use flannel::pod::ports::{self, Holder, Mapping, Ports, Snat};
use flannel::pod::{Attachment, Table};
use flannel::scope::Scope;
use flannel::traffic::iptables::Variant;
use flannel::traffic::{self, Flavour, TrafficConfig};
use flannel::{Cidr, Desired, Family, IfName, Mac, Observed, Op, PerFamily, Vni};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::pod_rules::Notes;
use kernel::pod_table::PORTS;
use kernel::{Changed, Kernel, KernelEvent, Monitor, addr, link, netns, pod_table, route};
use libtest_mimic::{Arguments, Failed, Trial};

fn pod_rules(missing: usize) -> Object {
    Object::PodRules(PodRules { missing })
}

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(std::path::Path::new("/mnt")).expect("create the namespaces of the tests");
    }
    let tests: [(&str, fn()); 19] = [
        ("every_object_is_written_read_back_and_deleted", every_object_is_written_read_back_and_deleted),
        ("second_diff_is_empty", second_diff_is_empty),
        ("link_with_another_vni_is_recreated_with_its_dependents", link_with_another_vni_is_recreated),
        ("mtu_mac_and_state_are_changed_in_place", mtu_mac_and_state_are_changed_in_place),
        ("refused_operation_does_not_affect_others", refused_operation_does_not_affect_others),
        ("deleting_a_missing_object_succeeds", deleting_a_missing_object_succeeds),
        ("foreign_routes_are_ignored", foreign_routes_are_ignored),
        ("routes_of_a_go_flanneld_are_adopted", routes_of_a_go_flanneld_are_adopted),
        ("changed_ruleset_is_detected_and_repaired", changed_ruleset_is_detected_and_repaired),
        ("iptables_rules_are_written_in_one_step_and_repaired", iptables_rules_are_written_and_repaired),
        ("only_pod_network_addresses_on_the_device_are_in_scope", only_pod_network_addresses),
        ("table_that_iptables_cannot_read_is_not_rewritten", table_that_iptables_cannot_read),
        ("ten_thousand_operations_in_one_batch", ten_thousand_operations_in_one_batch),
        ("missing_pod_rules_are_restored", missing_pod_rules_are_restored),
        ("disabled_forwarding_is_reported", disabled_forwarding_is_reported),
        ("monitor_reports_changes_of_others_only", monitor_reports_changes_of_others_only),
        ("a_file_is_watched_also_when_its_folder_goes", a_file_is_watched_also_when_its_folder_goes),
        ("instance_lock_refuses_second_holder", instance_lock_refuses_second_holder),
        ("only_network_namespaces_can_be_opened", only_network_namespaces_can_be_opened),
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
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit();
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
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let rename = |from: &str, to: &str| {
        let renamed = std::process::Command::new("ip").args(["link", "set", from, "name", to]).status().unwrap();
        assert!(renamed.success());
    };
    link::set_up(&mut socket, link::get(&mut Socket::open(Protocol::Route).unwrap(), name("eth0")).unwrap().unwrap().index, false).unwrap();
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

fn changed_ruleset_is_detected_and_repaired() {
    let mut kernel = Kernel::open().unwrap();
    let mut desired = Desired::default();
    desired.set_part(Owner::Node, rules());
    apply(&mut kernel, &diff(&desired, &Observed::default(), Prune::Yes));
    let less = |mut ruleset: flannel::traffic::Ruleset| {
        ruleset.chains[1].rules.remove(2);
        Op::Set(Object::Ruleset(ruleset))
    };
    let Object::Ruleset(v4) = rules().remove(0) else { unreachable!() };
    apply(&mut kernel, &[less(v4)]);
    let observed = kernel.observe(&scope()).unwrap();
    let ops = diff(&desired, &observed, Prune::Yes);
    assert_eq!(ops.iter().map(|op| op.object().key()).collect::<Vec<_>>(), [Key::Ruleset(Family::V4)]);
    apply(&mut kernel, &ops);
    assert_eq!(diff(&desired, &kernel.observe(&scope()).unwrap(), Prune::Yes), []);
}

fn table_that_iptables_cannot_read() {
    let nft = |script: &str| {
        let status = std::process::Command::new("nft").arg(script).status().expect("nft is installed by `cargo xtask test`");
        assert!(status.success(), "{script}");
    };
    // iptables cannot express a route lookup; its programs print an error, but exit with 0.
    nft("add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; }");
    nft("add rule ip filter FORWARD fib daddr type local accept");
    let mut desired = Desired::default();
    desired.set_part(Owner::Node, rules_in(Flavour::Iptables(Variant::Nft)));
    let mut kernel = Kernel::open().unwrap();
    let mut errors = Vec::new();
    for _ in 0..5 {
        let observed = kernel.observe(&scope()).unwrap();
        errors.extend(kernel.take_read_error());
        kernel.apply(&diff(&desired, &observed, Prune::Yes));
    }
    assert!(errors.iter().any(|text| text.contains("cannot read")), "{errors:?}");
    let output = std::process::Command::new("nft").args(["list", "chain", "ip", "filter", "FORWARD"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.matches("jump FLANNEL-FWD").count() <= 1, "{text}");
    assert!(text.contains("fib daddr"), "{text}");
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

/// Runs an iptables program in the test's namespace.
#[track_caller]
fn run(program: &str, args: &str) -> String {
    let output = std::process::Command::new(program).args(args.split(' ')).output().expect("iptables is installed by `cargo xtask test`");
    assert!(output.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn iptables_rules_are_written_and_repaired() {
    for (variant, program) in [(Variant::Nft, "iptables-nft"), (Variant::Legacy, "iptables-legacy")] {
        let mut kernel = Kernel::open().unwrap();
        let mut desired = Desired::default();
        desired.set_part(Owner::Node, rules_in(Flavour::Iptables(variant)));
        let ops = |kernel: &mut Kernel, desired: &Desired| diff(desired, &kernel.observe(&scope()).unwrap(), Prune::Yes);
        run(program, "-P FORWARD DROP");
        run(program, "-A FORWARD -s 198.51.100.0/24 -j ACCEPT");
        let first = ops(&mut kernel, &desired);
        assert_eq!(first.len(), 2, "{variant}: one for each family");
        apply(&mut kernel, &first);
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}");
        // As upstream lists it (specification, section 6.1).
        let jump = "-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG";
        assert!(run(program, "-t nat -S").contains(jump));
        assert_eq!(run(program, "-t nat -S FLANNEL-POSTRTG").lines().count(), 7);
        // Rules of others elsewhere in the tables are ignored.
        run(program, "-A FORWARD -s 203.0.113.0/24 -j ACCEPT");
        run(program, "-t nat -A POSTROUTING -s 203.0.113.0/24 -j MASQUERADE");
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}: a foreign rule");
        for damage in [
            "-t nat -F",
            "-F FLANNEL-FWD",
            "-D FLANNEL-FWD 1",
            "-t nat -R FLANNEL-POSTRTG 5 -s 10.244.0.0/16 -j RETURN",
            "-t nat -D POSTROUTING -m comment --comment x -j FLANNEL-POSTRTG",
            "-I FORWARD -j FLANNEL-FWD",
            "-t nat -A FLANNEL-POSTRTG -s 10.244.0.0/16 -j ACCEPT",
        ] {
            let words: Vec<&str> = damage.split(' ').map(|word| if word == "x" { "flanneld masq" } else { word }).collect();
            assert!(std::process::Command::new(program).args(words).status().unwrap().success(), "{damage}");
            let repair = ops(&mut kernel, &desired);
            assert_eq!(repair.len(), 1, "{variant}: {damage}");
            apply(&mut kernel, &repair);
            assert_eq!(ops(&mut kernel, &desired), [], "{variant}: after {damage}");
            assert!(run(program, "-t nat -S").contains(jump), "{variant}: after {damage}");
        }
        // Another flanneld on this host shares the chains; its rules are kept.
        let theirs = "-A FLANNEL-FWD -s 172.16.0.0/16 -j ACCEPT";
        run(program, theirs);
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}: {theirs}");
        run(program, "-D FLANNEL-FWD 1");
        let repair = ops(&mut kernel, &desired);
        apply(&mut kernel, &repair);
        assert!(run(program, "-S FLANNEL-FWD").contains(theirs));
        run(program, "-D FLANNEL-FWD -s 172.16.0.0/16 -j ACCEPT");
        // A switch to the other flavour removes all rules of this one, and no foreign rule.
        let mut nftables = Desired::default();
        nftables.set_part(Owner::Node, rules());
        let change = ops(&mut kernel, &nftables);
        apply(&mut kernel, &change);
        let left = run(program, "-S") + &run(program, "-t nat -S");
        assert!(!left.contains("FLANNEL"), "{variant}: {left}");
        for foreign in ["-P FORWARD DROP", "-A FORWARD -s 198.51.100.0/24 -j ACCEPT", "-A FORWARD -s 203.0.113.0/24 -j ACCEPT"] {
            assert!(left.contains(foreign), "{variant}: {foreign} in {left}");
        }
        let back = ops(&mut kernel, &desired);
        apply(&mut kernel, &back);
        assert_eq!(ops(&mut kernel, &desired), [], "{variant}: after switching back");
        let none = ops(&mut kernel, &Desired::default());
        apply(&mut kernel, &none);
    }
}

fn ten_thousand_operations_in_one_batch() {
    external();
    let mut kernel = Kernel::open().unwrap();
    let mut monitor = Monitor::open(scope(), name("eth0"), kernel.port()).unwrap();
    let sets: Vec<Op> = (0..10_000).map(|i| Op::Set(peer_route(i, "192.0.2.2"))).collect();
    apply(&mut kernel, &sets);
    let observed = kernel.observe(&routes()).unwrap();
    assert_eq!(observed.len(), 10_000);
    let deletes: Vec<Op> = observed.iter().map(|(_, object)| Op::Delete(object.clone())).collect();
    apply(&mut kernel, &deletes);
    assert!(kernel.observe(&routes()).unwrap().is_empty());
    // Twenty thousand notifications would not fit into the queue. The one that eth0 is up may come late.
    let events = monitor.drain().unwrap();
    assert!(events.iter().all(|event| event.change == Changed::Link(name("eth0"))), "own changes are filtered out: {events:?}");
}

fn disabled_forwarding_is_reported() {
    let sysctls: Vec<(String, String)> = Family::ALL.map(|family| (family.forwarding().to_owned(), "1".to_owned())).into();
    let wanted: Vec<Object> =
        sysctls.iter().map(|(path, value)| Object::Sysctl(Sysctl { path: path.clone(), value: value.clone() })).collect();
    let scope = Scope { sysctls: sysctls.clone(), ..scope() };
    let mut kernel = Kernel::open().unwrap();
    let set: Vec<Op> = wanted.iter().cloned().map(Op::Set).collect();
    assert!(kernel.apply(&set).iter().all(Result::is_ok));
    let observed = kernel.observe(&scope).unwrap();
    assert!(wanted.iter().all(|object| observed.get(&object.key()) == Some(object)));

    let mut monitor = Monitor::open(scope.clone(), name("eth0"), kernel.port()).unwrap();
    for (path, _) in &sysctls {
        std::fs::write(std::path::Path::new("/proc/sys").join(path), "0").unwrap();
        let off = Object::Sysctl(Sysctl { path: path.clone(), value: "0".to_owned() });
        let changes: Vec<Changed> = monitor.drain().unwrap().into_iter().map(|event| event.change).collect();
        assert_eq!(changes, [Changed::Set(off.clone())]);
        assert_eq!(kernel.observe(&scope).unwrap().get(&off.key()), Some(&off));
    }
}

fn missing_pod_rules_are_restored() {
    let end = link::get(&mut external(), name("wire")).unwrap().unwrap().index;
    let mut kernel = Kernel::open().unwrap();
    let mut monitor = Monitor::open(scope(), name("eth0"), kernel.port()).unwrap();
    let scope = Scope { pod_rules: true, ..Scope::default() };
    let wrong = |kernel: &mut Kernel| kernel.observe(&scope).unwrap().get(&Key::PodRules).cloned();
    assert_eq!(wrong(&mut kernel), Some(pod_rules(0)), "no plugin has written any");

    let addresses: [Cidr; 2] = ["10.244.1.5/24".parse().unwrap(), "fd00::5/64".parse().unwrap()];
    let mapping = |host_port| Mapping { protocol: 6, host_port, container_port: 80, host_ip: None };
    let pod = |container: &str| Attachment { network: "cbr0".to_owned(), container: container.to_owned(), ifname: "eth0".to_owned() };
    let attachment = pod("abc");
    let masquerade = Masquerade { attachment: attachment.clone(), addresses: addresses.to_vec() };
    let mappings = vec![mapping(80), mapping(81)];
    let all_ports =
        addresses.map(|address| Ports { holder: Holder::Attachment(pod("abc")), address, mappings: mappings.clone(), snat: Snat::Local });
    let add = |end| {
        let notes = Notes::hold().unwrap();
        pod_table::add(Table::Masquerade, &masquerade.rules()).unwrap();
        notes.keep(end, "eth0", Rules::Masquerade(masquerade.clone())).unwrap();
        for ports in &all_ports {
            pod_table::add(Table::Ports(ports.family()), &ports.rules()).unwrap();
            notes.keep(end, "eth0", Rules::Ports(ports.clone())).unwrap();
        }
    };
    let flush = || {
        let ports = pod_table::remove(&PORTS, |rule| ports::is_of(rule, &attachment, &[])).unwrap();
        (pod_table::remove(&[Table::Masquerade], |rule| masquerade::is_of(rule, &attachment)).unwrap(), ports)
    };
    let count = |attachment: &Attachment, family: Family| {
        let rules = pod_table::list(Table::Ports(family)).unwrap();
        rules.iter().filter(|rule| rule.chain == "hostports" && ports::is_of(rule, attachment, &[])).count()
    };
    let ports = || Family::ALL.map(|family| count(&attachment, family));
    let mut is_reported = || monitor.drain().unwrap().iter().any(|event| event.change == Changed::PodRules);
    add(end);
    assert!(!is_reported() && wrong(&mut kernel) == Some(pod_rules(0)));

    drop(flush());
    assert!(is_reported() && wrong(&mut kernel) == Some(pod_rules(3)));
    // What is no note is none of ours.
    let namespace = Netns::current().unwrap().id().unwrap().1;
    let junk = format!("/run/flannel/pods/{namespace}-junk");
    std::fs::write(&junk, "end 1\nports no").unwrap();
    apply(&mut kernel, &[Op::Set(pod_rules(0))]);
    assert_eq!((wrong(&mut kernel), ports()), (Some(pod_rules(0)), [2, 2]));
    // One rule of several.
    let mut nft = std::process::Command::new("nft");
    let listed = nft.args(["-a", "list", "chain", "ip", "cni_hostport", "hostports"]).output().unwrap();
    let handle = String::from_utf8(listed.stdout)
        .unwrap()
        .lines()
        .find_map(|line| line.split("dnat").nth(1)?.split("# handle ").nth(1).map(str::to_owned))
        .unwrap();
    let deleted =
        std::process::Command::new("nft").args(["delete", "rule", "ip", "cni_hostport", "hostports", "handle", &handle]).status().unwrap();
    assert!(deleted.success() && is_reported() && wrong(&mut kernel) == Some(pod_rules(1)));
    apply(&mut kernel, &[Op::Set(pod_rules(0))]);
    assert_eq!((wrong(&mut kernel), ports()), (Some(pod_rules(0)), [2, 2]));

    // Chains that lead to them, and those beside them; nothing is there twice after that.
    let nft = |arguments: &str| {
        let output = std::process::Command::new("nft").args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{arguments}");
        String::from_utf8(output.stdout).unwrap()
    };
    let before = nft("list table ip cni_hostport");
    for chain in ["prerouting", "output", "hostports_all", "masquerading", "hostports"] {
        nft(&format!("flush chain ip cni_hostport {chain}"));
        assert!(is_reported() && wrong(&mut kernel) == Some(pod_rules(1)), "{chain}");
        apply(&mut kernel, &[Op::Set(pod_rules(0))]);
        assert_eq!((nft("list table ip cni_hostport"), wrong(&mut kernel)), (before.clone(), Some(pod_rules(0))), "{chain}");
    }
    // Many pods at once.
    let notes = Notes::hold().unwrap();
    let id = |n: u32| format!("many-{n:064x}");
    for n in 0..200 {
        let address = format!("10.244.{}.{}/16", 2 + n / 200, 1 + n % 200).parse().unwrap();
        let mappings = vec![Mapping { host_port: u16::try_from(1_000 + n).unwrap(), ..mapping(1) }];
        let ports = Ports { holder: Holder::Attachment(pod(&id(n))), address, mappings, snat: Snat::Local };
        notes.keep(end, "eth0", Rules::Ports(ports)).unwrap();
    }
    drop(notes);
    assert_eq!(wrong(&mut kernel), Some(pod_rules(200)));
    apply(&mut kernel, &[Op::Set(pod_rules(0))]);
    assert_eq!(wrong(&mut kernel), Some(pod_rules(0)));
    assert_eq!((0..200).map(|n| count(&pod(&id(n)), Family::V4)).sum::<usize>(), 200);
    let notes = Notes::hold().unwrap();
    (0..200).for_each(|n| notes.forget_ports(&pod(&id(n))));
    drop((notes, nft("delete table ip cni_hostport")));
    apply(&mut kernel, &[Op::Set(pod_rules(0))]);
    assert_eq!(nft("list table ip cni_hostport"), before);

    // A note of an earlier version names the container only: its rules are restored as they were, and found by a DEL.
    let notes = Notes::hold().unwrap();
    let old = Ports { holder: Holder::Container("old".to_owned()), address: addresses[0], mappings: mappings.clone(), snat: Snat::No };
    notes.keep(end, "eth0", Rules::Ports(old.clone())).unwrap();
    drop(notes);
    assert_eq!(wrong(&mut kernel), Some(pod_rules(1)));
    apply(&mut kernel, &[Op::Set(pod_rules(0))]);
    assert_eq!((wrong(&mut kernel), count(&pod("old"), Family::V4)), (Some(pod_rules(0)), 2));
    let notes = Notes::hold().unwrap();
    notes.forget_ports(&pod("old"));
    let of_old = |address: &str| pod_table::remove(&PORTS, |rule| ports::is_of(rule, &pod("old"), &[address.parse().unwrap()])).unwrap();
    drop(of_old("10.244.1.6"));
    assert_eq!(count(&pod("old"), Family::V4), 2, "of another attachment of the container");
    drop(of_old("10.244.1.5"));
    assert_eq!(count(&pod("old"), Family::V4), 0);
    drop(notes);
    assert_eq!((wrong(&mut kernel), ports()), (Some(pod_rules(0)), [2, 2]));

    // While a plugin holds the notes the daemon does not wait.
    drop(flush());
    let held = Notes::hold().unwrap();
    let outcome = kernel.apply(&[Op::Set(pod_rules(0))]).remove(0);
    assert!(outcome.unwrap_err().text.contains("a plugin holds /run/flannel/pods"));
    // It forgets what it deletes.
    held.forget_masquerade(&attachment);
    held.forget_ports(&attachment);
    drop(held);
    assert_eq!(wrong(&mut kernel), Some(pod_rules(0)));

    // The link of a pod that is gone has ended: so do its rules.
    add(end + 1000);
    assert_eq!(wrong(&mut kernel), Some(pod_rules(3)));
    apply(&mut kernel, &[Op::Set(pod_rules(0))]);
    assert_eq!((wrong(&mut kernel), ports()), (Some(pod_rules(0)), [0, 0]));
    assert!(
        std::fs::read_dir("/run/flannel/pods")
            .unwrap()
            .flatten()
            .filter(|file| file.file_name().to_string_lossy().starts_with(&namespace.to_string()))
            .count()
            == 1
    );
    std::fs::remove_file(junk).unwrap();
}

fn monitor_reports_changes_of_others_only() {
    let mut socket = external();
    let eth0 = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
    let mut kernel = Kernel::open().unwrap();
    let mut monitor = Monitor::open(scope(), name("eth0"), kernel.port()).unwrap();
    apply(&mut kernel, &[Op::Set(peer_route(1, "192.0.2.2")), Op::Set(peer_route(2, "192.0.2.2"))]);
    // The notification that eth0 is up may come at any time.
    let late = |event: &KernelEvent| event.change == Changed::Link(name("eth0"));
    let mut drain = || monitor.drain().unwrap().into_iter().filter(|event| !late(event)).collect::<Vec<_>>();
    let changes = |events: Vec<KernelEvent>| events.into_iter().map(|event| event.change).collect::<Vec<_>>();
    assert_eq!(drain(), [], "own changes are not reported");

    // Another program deletes one route of the daemon and replaces the other.
    let mut other = Kernel::open().unwrap();
    apply(&mut other, &[Op::Delete(peer_route(1, "192.0.2.2")), Op::Set(peer_route(2, "192.0.2.3"))]);
    let events = drain();
    let this = std::fs::read_to_string("/proc/self/comm").unwrap();
    // The port of the first socket of a process is its process ID; that of a second socket does not identify it.
    let named = |event: &KernelEvent| event.by.as_ref().is_none_or(|author| author.program == this.trim());
    assert!(events.iter().all(named), "{events:?}");
    assert_eq!(changes(events), [Changed::Gone(peer_route(1, "192.0.2.2").key()), Changed::Set(peer_route(2, "192.0.2.3"))]);

    // Foreign neighbours on the external interface are ignored.
    route::add(&mut socket, "203.0.113.0/24".parse().unwrap(), Some("192.0.2.9".parse().unwrap()), eth0).unwrap();
    let neigh = flannel::object::Neigh { link: name("eth0"), ip: "192.0.2.77".parse().unwrap(), mac: Mac([2, 0, 0, 0, 0, 7]) };
    apply(&mut other, &[Op::Set(Object::Neigh(neigh))]);
    let events = changes(drain());
    assert_eq!(events, [Changed::Gone(Key::Route("203.0.113.0/24".parse().unwrap(), 0))]);

    // A route through an unwatched device, or of another type, replaces a route of the daemon.
    let ip = |arguments: &str| {
        assert!(std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "{arguments}");
    };
    ip("link add other type veth peer name another");
    ip("link set other up");
    ip("link set another up");
    drain();
    let gone = Changed::Gone(peer_route(2, "192.0.2.3").key());
    for route in ["10.128.2.0/24 dev other", "unreachable 10.128.2.0/24"] {
        apply(&mut kernel, &[Op::Set(peer_route(2, "192.0.2.3"))]);
        drain();
        ip(&format!("route replace {route} metric 2"));
        assert_eq!(changes(drain()), std::slice::from_ref(&gone), "{route}");
    }
    ip("route add 198.51.100.0/24 dev other");
    assert_eq!(drain(), [], "foreign routes there are not reported");
    apply(&mut kernel, &[Op::Set(peer_route(2, "192.0.2.3"))]);
    ip("link del other");
    drain();

    // Another program deletes a device with entries.
    let desired = picture();
    let on_v4: Vec<Op> = desired
        .iter()
        .filter(|(_, o)| o.depends_on(name("flannel.1")) || o.key() == Key::Link(name("flannel.1")))
        .map(|(_, o)| Op::Set(o.clone()))
        .collect();
    apply(&mut kernel, &on_v4);
    drain();
    // A neighbour in state failed has no MAC address.
    let neigh = on_v4.iter().find_map(|op| if let Object::Neigh(neigh) = op.object() { Some(*neigh) } else { None }).unwrap();
    ip(&format!("neigh replace {} dev flannel.1 nud failed", neigh.ip));
    assert_eq!(changes(drain()), [Changed::Gone(Key::Neigh(neigh.link, neigh.ip))]);
    link::delete(&mut socket, name("flannel.1")).unwrap();
    assert!(changes(drain()).contains(&Changed::Link(name("flannel.1"))));

    // The external interface and the rules change.
    link::set_up(&mut socket, eth0, false).unwrap();
    assert!(changes(monitor.drain().unwrap()).contains(&Changed::Link(name("eth0"))));
    apply(&mut other, &rules().into_iter().map(Op::Set).collect::<Vec<_>>());
    let events: Vec<KernelEvent> = monitor.drain().unwrap().into_iter().filter(|event| !late(event)).collect();
    // The kernel names the thread that made the change.
    assert!(events.iter().all(|event| event.by.as_ref().is_some_and(|author| this.trim().starts_with(&author.program))), "{events:?}");
    let events = changes(events);
    assert!(events.contains(&Changed::Rules(Family::V4)) && events.contains(&Changed::Rules(Family::V6)), "{events:?}");
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

fn a_file_is_watched_also_when_its_folder_goes() {
    let path = std::path::PathBuf::from("/mnt/watched/subnet.env");
    kernel::file::write(&path, "one").unwrap();
    let scope = Scope { file: Some(path.clone()), ..Scope::default() };
    let mut monitor = Monitor::open(scope.clone(), name("eth0"), 0).unwrap();
    let mut changed = |what: &str| {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !monitor.drain().unwrap().iter().any(|event| event.change == Changed::File) {
            assert!(std::time::Instant::now() < end, "{what}");
            monitor.wait().unwrap();
        }
    };
    std::fs::write(&path, "two").unwrap();
    changed("written to");
    kernel::file::write(&path, "three").unwrap();
    changed("replaced");
    std::fs::remove_file(&path).unwrap();
    changed("removed");
    std::fs::remove_dir_all("/mnt/watched").unwrap();
    changed("its folder removed");
    kernel::file::write(&path, "four").unwrap();
    changed("its folder is there again");
    std::fs::remove_file(&path).unwrap();
    changed("and is watched");

    let mut kernel = Kernel::open().unwrap();
    let file = flannel::object::EnvFile { path: path.clone(), text: "five".to_owned(), etcd_leases: vec![7, 9], ours: true };
    apply(&mut kernel, &[Op::Set(Object::EnvFile(Box::new(file.clone())))]);
    let seen = |kernel: &mut Kernel| kernel.observe(&scope).unwrap().get(&Key::EnvFile).cloned();
    assert_eq!(seen(&mut kernel), Some(Object::EnvFile(Box::new(file.clone()))));
    std::fs::write(&path, "five").unwrap();
    assert_eq!(
        seen(&mut kernel),
        Some(Object::EnvFile(Box::new(flannel::object::EnvFile { ours: false, ..file }))),
        "the same, by another"
    );
}

fn instance_lock_refuses_second_holder() {
    let path = std::path::Path::new("/mnt/alone/.lock");
    let patience = std::time::Duration::from_millis(50);
    let held = kernel::lock::alone(path, patience).unwrap();
    let refused = kernel::lock::alone(path, patience).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
    assert!(refused.to_string().starts_with(&format!("pid {} on ", std::process::id())), "{refused}");
    drop(held);
    kernel::lock::alone(path, patience).unwrap();
}
