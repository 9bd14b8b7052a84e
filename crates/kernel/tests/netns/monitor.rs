//! Notifications: changes of others are reported, and changes of the daemon's own are not.

use flannel::object::{Key, Object, Sysctl};
use flannel::scope::Scope;
use flannel::{Family, Mac, Op};
use kernel::{Changed, Kernel, KernelEvent, Monitor, link, route};

use crate::{apply, external, name, peer_route, picture, routes, rules, scope};

pub(crate) fn monitor_reports_changes_of_others_only() {
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
        assert_eq!(changes(drain()), [gone.clone(), Changed::Foreign], "{route}");
    }
    ip("route add 198.51.100.0/24 dev other");
    assert_eq!(drain(), [], "foreign routes there are not reported");
    for change in
        ["route add blackhole 10.128.7.0/24 proto bird", "route del blackhole 10.128.7.0/24", "rule add pref 7 to 10.128.0.0/16 lookup 7"]
    {
        ip(change);
        assert!(changes(drain()).contains(&Changed::Foreign), "{change}");
    }
    let nft = |script: &str| assert!(std::process::Command::new("nft").arg(script).status().unwrap().success(), "{script}");
    nft("add table inet fw; add chain inet fw forward { type filter hook forward priority 0; }");
    assert_eq!(changes(drain()), [Changed::Foreign]);
    nft("add table ip nat; add chain ip nat KUBE-SVC");
    assert_eq!(changes(drain()), [Changed::Iptables(Family::V4)], "kube-proxy's tables change all the time");
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

pub(crate) fn a_file_is_watched_also_when_its_folder_goes() {
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

pub(crate) fn disabled_forwarding_is_reported() {
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

pub(crate) fn ten_thousand_operations_in_one_batch() {
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
