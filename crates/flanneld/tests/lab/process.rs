//! The daemon as a process: exit codes, signals, its environment, its store's endpoints, and its lease over time.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Lab, STORE, StoreKind};

use crate::cluster::{eventually, observe, routes};
use crate::{many_leases, plan};

fn wire(root: &Path, backend: &str) -> Lab {
    Lab::wire(plan(1, backend, StoreKind::Embedded), root).unwrap()
}

pub(crate) fn daemon_without_store_reports_and_exits_cleanly(root: &Path) {
    let mut lab = wire(root, "host-gw");
    for kill in ["-TERM", "-INT"] {
        lab.start_daemon(0, &[]).unwrap();
        eventually("/healthz answers", || {
            lab.hosts[0].get("/healthz").is_ok_and(|(status, body)| status == 200 && body == "flanneld is running")
        });
        eventually("/readyz names what it waits for", || {
            lab.hosts[0]
                .get("/readyz")
                .is_ok_and(|(status, body)| status == 503 && body.contains("no etcd endpoint answers (http://10.0.0.254:2379)"))
        });
        let pid = lab.hosts[0].pid().unwrap().to_string();
        assert!(Command::new("kill").args([kill, &pid]).status().unwrap().success());
        eventually("it ends", || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")));
        // It has ended; this returns its exit status.
        assert_eq!(lab.stop_daemon(0, true).unwrap().code(), Some(0), "{kill}");
    }
    // A port in use ends it at once, with the flag's name.
    let taken = lab.hosts[0].netns.run(|| std::net::TcpListener::bind("127.0.0.1:8081")).unwrap().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    let log = lab.hosts[0].log();
    eventually("it says which", || std::fs::read_to_string(&log).unwrap().contains("cannot listen on --healthz-port 8081"));
    eventually("it ends", || {
        std::fs::read_to_string(format!("/proc/{}/stat", lab.hosts[0].pid().unwrap())).is_ok_and(|stat| stat.contains(") Z "))
    });
    assert_eq!(lab.stop_daemon(0, true).unwrap().code(), Some(1));
    drop(taken);
}

pub(crate) fn flags_are_read_from_the_environment(root: &Path) {
    let mut lab = wire(root, "vxlan");
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let file = root.join("by-env/subnet.env");
    let env = [
        ("ETCD_ENDPOINTS", format!("http://{STORE}")),
        ("ETCD_PREFIX", "/coreos.com/network".to_owned()),
        ("SUBNET_FILE", file.display().to_string()),
        ("IFACE", "eth0".to_owned()),
        ("IP_MASQ", "true".to_owned()),
        ("PUBLIC_IP", "203.0.113.7".to_owned()),
    ];
    let mut command = Command::new(crate::cluster::PROGRAM);
    command.envs(env.iter().map(|(name, value)| (format!("FLANNELD_{name}"), value))).stderr(std::process::Stdio::null());
    // A variable that cannot be used is left out.
    command.env("FLANNELD_HEALTHZ_PORT", "x");
    kernel::process::die_with_parent(&mut command);
    let mut daemon = lab.hosts[0].netns.run(|| command.spawn()).unwrap().unwrap();
    eventually("the file is there", || std::fs::read_to_string(&file).is_ok_and(|text| text.contains("FLANNEL_IPMASQ=true")));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    assert_eq!(snapshot.entries[0].peer.as_ref().unwrap().public.v4, "203.0.113.7".parse().ok());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

pub(crate) fn daemon_fails_over_to_another_endpoint(root: &Path) {
    let mut lab = wire(root, "vxlan");
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let nft = |lab: &Lab, script: &str| {
        let output = lab.middle.run(|| Command::new("nft").arg(script).output()).unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    // The store has a second address, which goes away without a word.
    nft(
        &lab,
        "add table ip second; add chain ip second nat { type nat hook prerouting priority -100; }; add rule ip second nat tcp dport 2390 redirect to :2379",
    );
    lab.start_daemon(0, &["--etcd-endpoints=http://10.0.0.254:2390,http://10.0.0.254:2379"]).unwrap();
    lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
    let [one, two] = [many_leases("vxlan").remove(0), many_leases("vxlan").remove(1)];
    lab.with_store(async |store| store.put_lease(&one, 0, 0).await).unwrap();
    lab.wait_state(0, "a peer", |state| state["peers"]["programmed"] == 1).unwrap();
    nft(
        &lab,
        "add chain ip second raw { type filter hook prerouting priority -300; }; add rule ip second raw tcp dport 2390 drop; add chain ip second out { type filter hook output priority 0; }; add rule ip second out meta l4proto tcp ct original proto-dst 2390 drop",
    );
    lab.with_store(async |store| store.put_lease(&two, 0, 0).await).unwrap();
    let began = Instant::now();
    lab.wait_state(0, "the next peer", |state| state["peers"]["programmed"] == 2).unwrap();
    // It took a while to notice that the first does not answer: so that was the one in use.
    assert!((2..28).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(routes(&observe(&lab.hosts[0].netns)).len(), 2);
}

pub(crate) fn lease_is_renewed_and_reservation_stays(root: &Path) {
    for reserved in [false, true] {
        let mut lab = wire(&root.join(reserved.to_string()), "vxlan");
        lab.start_store().unwrap();
        lab.put_config().unwrap();
        if reserved {
            let mut lease = many_leases("vxlan").remove(0);
            lease.key = flannel::wire::parse_key("10.244.9.0-24").unwrap();
            lease.peer.public.v4 = "10.0.0.1".parse().ok();
            lab.with_store(async |store| store.put_lease(&lease, 0, 0).await).unwrap();
        }
        // The margin is as long as it may be: so it is renewed after a minute of its day.
        lab.start_daemon(0, &["--subnet-lease-renew-margin=1439"]).unwrap();
        lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
        let own = || {
            let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
            let entry = snapshot.entries.into_iter().next().unwrap();
            (entry.key.to_string(), entry.mod_revision, entry.lease)
        };
        let before = own();
        assert_eq!((before.0 == "10.244.9.0/24", before.2 == 0), (reserved, reserved));
        if reserved {
            continue;
        }
        let log = lab.hosts[0].log();
        let end = Instant::now() + Duration::from_secs(70);
        while !std::fs::read_to_string(&log).unwrap().contains("lease renewed") {
            assert!(Instant::now() < end, "it is not renewed");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(own(), before, "no key was written, so no watcher is notified");
    }
}

pub(crate) fn nftables_need_no_program(root: &Path) {
    let mut plan = plan(1, "vxlan", StoreKind::Embedded);
    plan.env.push(("PATH".to_owned(), "/nonexistent".to_owned()));
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its rules", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    let output = lab.hosts[0].netns.run(|| Command::new("nft").args(["list", "tables"]).output()).unwrap().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("table ip flannel-ipv4"));
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
    assert!(!log.contains("WARN"), "{log}");
}

pub(crate) fn alloc_leases_and_programs_nothing(root: &Path) {
    let mut lab = wire(root, "alloc");
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.with_store(async |store| store.put_lease(&many_leases("alloc").remove(0), 0, 0).await).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "both leases", |state| state["store"]["leases"] == 2).unwrap();
    let env = std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap();
    assert!(env.contains("FLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1500\n"), "{env}");
    assert!(observe(&lab.hosts[0].netns).iter().all(|(_, object)| matches!(object, flannel::Object::Ruleset(_))));
    let own = lab.with_store(async |store| store.snapshot().await).unwrap();
    let own = own.entries.iter().find(|entry| entry.key.to_string() == "10.244.1.0/24").unwrap().peer.clone().unwrap();
    assert_eq!(flannel::wire::value(&own), r#"{"PublicIP":"10.0.0.1","PublicIPv6":null}"#);
}

pub(crate) fn udp_on_another_port(root: &Path) {
    let mut plan = plan(2, "udp", StoreKind::Embedded);
    plan.config["Backend"]["Port"] = 7777.into();
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    crate::cluster::ping_all_from(&pods[0].netns, &[pods[1].address]);
    let sockets = lab.hosts[0].netns.run(|| Command::new("cat").arg("/proc/self/net/udp").output()).unwrap().unwrap();
    assert!(String::from_utf8_lossy(&sockets.stdout).contains(":1E61 "), "a socket at 7777");
}

pub(crate) fn foreign_device_with_our_name_is_replaced(root: &Path) {
    let mut lab = wire(root, "vxlan");
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let ip = |lab: &Lab, args: &[&str]| {
        let output = lab.hosts[0].netns.run(|| Command::new("ip").args(args).output()).unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    ip(&lab, &["link", "add", "flannel.1", "type", "bridge"]);
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its device", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    let device = ip(&lab, &["-d", "link", "show", "flannel.1"]);
    assert!(device.contains("vxlan id 1 local 10.0.0.1") && !device.contains("qlen"), "ours, without a queue: {device}");
}
