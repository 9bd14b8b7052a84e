//! The operator's commands on a host on which something is broken: each names it, and says so by its exit code.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lab::{Lab, StoreKind};
use serde_json::Value;

use crate::cluster::{PROGRAM, eventually};
use crate::{ping_all_from, plan, start};

/// Runs `flanneld` with these arguments on a host: its exit code, and what it prints.
fn flanneld(lab: &Lab, host: usize, args: &[&str]) -> (Option<i32>, String) {
    let output = lab.hosts[host].run(|| Command::new(PROGRAM).args(args).output()).unwrap().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

/// Waits until a command has this exit code and prints this.
#[track_caller]
fn says(lab: &Lab, host: usize, args: &[&str], code: i32, wanted: &[&str]) -> String {
    let mut said = String::new();
    eventually(&format!("flanneld {} exits with {code} and prints {wanted:?}", args.join(" ")), || {
        let (status, text) = flanneld(lab, host, args);
        let is_so = status == Some(code) && wanted.iter().all(|wanted| text.contains(wanted));
        said = text;
        is_so
    });
    said
}

/// The status is well on a healthy host, names what is broken, and without a daemon shows what the kernel has.
pub(crate) fn status_names_what_is_broken(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let (code, text) = flanneld(&lab, 0, &["status", "--wait=20s"]);
    assert!(code == Some(0) && text.contains("vxlan (VNI 1, UDP 8472)  subnet 10.244.1.0/24"), "{text}");
    assert!(text.contains("Peers    OK    1 of 1 reachable") && text.contains("lease renews in 2"), "{text}");
    let mode = std::fs::metadata(lab.hosts[0].directory.join("run-flannel/flanneld.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Its name is known unless it ended before it was looked up.
    lab.hosts[0].shell("ip route del 10.244.2.0/24").unwrap();
    says(&lab, 0, &["status"], 0, &["1 in the last hour (1 route)", "10.244.2.0/24", ", changed by ", "process "]);
    lab.hosts[0].shell("ip route add blackhole 10.244.2.0/24 proto bird").unwrap();
    let wanted =
        ["warning route-hides-peer", "fix: ip route del blackhole", "10.244.2.0/24  10.0.0.2  ipv4", "(cannot send: Invalid argument"];
    let text = says(&lab, 0, &["status"], 1, &wanted);
    assert!(text.contains("Peers    WARN  0 of 1 reachable, 1 broken"), "{text}");
    let (_, json) = flanneld(&lab, 0, &["status", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["schema"], &json["status"], &json["state"]["peers"]["broken"]), (&1.into(), &"degraded".into(), &1.into()));
    lab.hosts[0].shell("ip route del blackhole 10.244.2.0/24 proto bird").unwrap();

    lab.stop_daemon(0, true).unwrap();
    let (code, text) = flanneld(&lab, 0, &["status"]);
    assert!(code == Some(2) && text.contains("Daemon   FAIL  no flanneld answers at /run/flannel/flanneld.sock"), "{text}");
    assert!(text.contains("subnet 10.244.1.0/24 of network 10.244.0.0/16") && text.contains("1 peer route, flannel.1"), "{text}");
    // The socket of the killed daemon is replaced.
    lab.start_daemon(0, &[]).unwrap();
    assert_eq!(flanneld(&lab, 0, &["status", "--wait=20s"]).0, Some(0));
    lab.stop_daemon(0, true).unwrap();
    lab.start_daemon(0, &["--socket=off"]).unwrap();
    lab.settle().unwrap();
    assert_eq!(flanneld(&lab, 0, &["status"]).0, Some(2), "there is none");
}

/// `doctor` names a broken path with the daemon's help, and what it waits for.
pub(crate) fn doctor_asks_the_daemon(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    assert_eq!(flanneld(&lab, 0, &["status", "--wait=20s"]).0, Some(0));
    says(&lab, 0, &["doctor"], 0, &["no problem found ("]);
    // The other host drops VXLAN: no check of this host can see that.
    lab.hosts[1]
        .shell(
            "nft 'add table inet fw; add chain inet fw in { type filter hook input priority 0; }; add chain inet fw out { type filter hook output priority 0; }; add rule inet fw in udp dport 8472 drop; add rule inet fw out udp dport 8472 drop'",
        )
        .unwrap();
    let wanted = [
        "warning path-overlay-broken: peer 10.244.2.0/24 (10.0.0.2) by ipv4: the host answers",
        "fix: let UDP 8472 pass between the hosts",
    ];
    says(&lab, 0, &["doctor"], 1, &wanted);
    let (_, json) = flanneld(&lab, 0, &["doctor", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["schema"], &json["findings"][0]["code"]), (&1.into(), &"path-overlay-broken".into()));
    lab.stop_daemon(0, true).unwrap();
    let (code, text) = flanneld(&lab, 0, &["doctor"]);
    assert!(
        code == Some(0) && text.starts_with("not checked: paths to peers: no flanneld answers at /run/flannel/flanneld.sock"),
        "{text}"
    );
}

/// Before an installation each obstacle is named with its fix, and nothing of the host is changed.
pub(crate) fn preflight_names_obstacles(root: &Path) {
    let lab = Lab::wire(plan(1, "vxlan", StoreKind::Embedded), root).unwrap();
    let (conf, bin) = (root.join("etc-net.d"), root.join("opt-bin"));
    let folders = [format!("--cni-conf-dir={}", conf.display()), format!("--cni-bin-dir={}", bin.display())];
    let args = ["doctor", "--preflight", "--network=10.244.0.0/16", &folders[0], &folders[1]];
    std::fs::create_dir_all(&conf).unwrap();
    std::fs::create_dir_all(&bin).unwrap();
    let (code, text) = flanneld(&lab, 0, &args);
    assert!(code == Some(0) && text.contains("no problem found (before an installation)"), "{text}");
    let shell = "ip link add other_vxlan type vxlan id 9 dstport 8472 dev eth0 local 10.0.0.1; ip link set other_vxlan up
        ip route add 10.244.7.0/24 via 10.0.0.254; ip addr add 10.244.9.1/32 dev eth0; ip link set eth0 mtu 900
        nft 'add table inet fw; add chain inet fw forward { type filter hook forward priority 5; policy drop; }'";
    lab.hosts[0].shell(shell).unwrap();
    std::fs::write(conf.join("05-cilium.conflist"), r#"{ "plugins": [{ "type": "cilium-cni" }] }"#).unwrap();
    std::fs::remove_dir(&bin).unwrap();
    let taken = lab.hosts[0].netns.run(|| std::net::TcpListener::bind("0.0.0.0:8081")).unwrap().unwrap();
    let before = lab.hosts[0].shell("ip -d link; ip addr; nft list ruleset").unwrap();
    let (code, text) = flanneld(&lab, 0, &args);
    for wanted in [
        "error port-taken: UDP port 8472 (vxlan) is taken by VXLAN device other_vxlan",
        "error port-taken: TCP port 8081 (health) is taken by lab-",
        "error network-in-use: pod network 10.244.0.0/16 overlaps the route 10.244.7.0/24 dev eth0",
        "error network-in-use: pod network 10.244.0.0/16 has address 10.244.9.1/32 of eth0 in it",
        "warning mtu-small: eth0 has MTU 900, which leaves 850 for pods",
        "error forward-dropped: chain forward of nftables table inet fw drops",
        "error cni-order: ",
        "warning cni-folder: there is no folder ",
        "  fix: ",
    ] {
        assert!(code == Some(1) && text.contains(wanted), "{wanted}: {text}");
    }
    drop(taken);
    assert_eq!(lab.hosts[0].shell("ip -d link; ip addr; nft list ruleset").unwrap(), before, "nothing is changed");
}

/// Addresses that leaked are named; only those of which nothing is left are freed, and pods keep theirs.
pub(crate) fn ipam_check_frees_only_what_is_dead(root: &Path) {
    let mut lab = start(root, 1, "vxlan", StoreKind::Embedded);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(0).unwrap()];
    let host = &lab.hosts[0];
    let files = host.directory.join("cni/networks/lab");
    let subnet_file = host.subnet_file().display().to_string();
    let dirs = [format!("--ipam-dir={}", files.parent().unwrap().display()), format!("--subnet-file={subnet_file}")];
    let outside = |args: &[&str]| {
        let output = host.netns.run(|| Command::new(PROGRAM).args(args).args(&dirs).output()).unwrap().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    let (code, text) = outside(&["ipam", "check"]);
    assert!(code == Some(0) && text.starts_with("2 addresses in use of 253, 0 leaked"), "{text}");

    let reserve = |last: u8, container: &str, is_old: bool| {
        let file = files.join(format!("10.244.1.{last}"));
        std::fs::write(&file, format!("{container}\r\neth0")).unwrap();
        if is_old {
            let time = std::fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
            std::fs::File::options().write(true).open(&file).unwrap().set_times(time).unwrap();
        }
        file
    };
    let (leaked, young) = (reserve(50, "lost-container", true), reserve(51, "new-container", false));
    let boot = reserve(52, "former-container", false);
    rustix::fs::setxattr(&boot, "user.flannel.boot_id", b"another", rustix::fs::XattrFlags::empty()).unwrap();
    std::fs::remove_file(files.join(pods[1].address.to_string())).unwrap();
    let (code, text) = outside(&["ipam", "check"]);
    for wanted in [
        "4 addresses in use of 253, 2 leaked".to_owned(),
        format!("unreserved {}: eth0 in ", pods[1].address),
        "leaked 10.244.1.50: reserved for container lost-container interface eth0, of which nothing is left: --release frees it".to_owned(),
        "other-boot 10.244.1.52: reserved for container former-container interface eth0 before this host was booted: --release frees it"
            .to_owned(),
    ] {
        assert!(code == Some(1) && text.contains(&wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("10.244.1.51"), "a plugin may be at work: {text}");
    let (code, text) = outside(&["status"]);
    assert!(code == Some(1) && text.contains("Pods     WARN  4 addresses in use of 253, 2 leaked, 1 without reservation"), "{text}");

    // Where the pods' namespaces cannot be seen, nothing is proved.
    let [a, b] = &pods;
    let line = format!("umount {} {}; exec {PROGRAM} ipam check --release {}", a.path.display(), b.path.display(), dirs.join(" "));
    let output = host.netns.run(|| Command::new("unshare").args(["-m", "sh", "-c", &line]).output()).unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("not checked: 2 links of this host lead to namespaces that cannot be seen from here") && leaked.exists(),
        "{text}"
    );
    let (code, text) = outside(&["ipam", "check", "--release"]);
    assert!(code == Some(1) && text.contains("2 released"), "the unreserved address is left: {text}");
    assert_eq!([&leaked, &boot, &young, &files.join(pods[0].address.to_string())].map(|file| file.exists()), [false, false, true, true]);
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    // The plugins' index still fits.
    lab.cni(0, "flannel", "DEL", &pods[0].name, &pods[0].path, "eth0").unwrap();
    assert!(!files.join(pods[0].address.to_string()).exists());
    lab.add_pod(0).unwrap();
}

/// What is broken, and its end, is seen as it happens.
pub(crate) fn monitor_shows_what_happens(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    assert_eq!(flanneld(&lab, 0, &["status", "--wait=20s"]).0, Some(0));
    let watch = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        kernel::process::die_with_parent(command.arg("monitor").args(args).stdout(std::process::Stdio::piped()));
        lab.hosts[0].mounts.enter(&mut command).unwrap();
        lab.hosts[0].netns.run(|| command.spawn()).unwrap().unwrap()
    };
    let (mut all, mut leases) = (watch(&["--json"]), watch(&["--type=lease"]));
    let lines = BufReader::new(all.stdout.take().unwrap()).lines();
    let mut seen = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut next = |kind: &str, action: &str| {
        let wanted = |event: &Value| event["type"] == kind && event["action"] == action;
        seen.find(wanted).unwrap_or_else(|| panic!("no {kind} {action}"))
    };
    // A monitor sees what happens after its stream has begun.
    std::thread::sleep(Duration::from_secs(1));
    lab.hosts[0].shell("ip route del 10.244.2.0/24").unwrap();
    let repair = next("repair", "made");
    assert!(repair["subject"] == "route" && repair["by"].as_str().is_some_and(|by| by.contains("process ")), "{repair}");
    lab.hosts[0].shell("ip route add blackhole 10.244.2.0/24 proto bird").unwrap();
    assert_eq!(next("finding", "began")["subject"], "route-hides-peer");
    assert_eq!(next("path", "began")["subject"], "10.244.2.0/24 by IPv4");
    lab.hosts[0].shell("ip route del blackhole 10.244.2.0/24 proto bird").unwrap();
    assert_eq!(next("path", "ended")["text"], "reachable");
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    let peer = snapshot.entries.iter().find(|entry| entry.key.to_string() == "10.244.2.0/24").unwrap();
    lab.stop_daemon(1, true).unwrap();
    lab.with_store(async |store| store.delete_lease(&peer.key, peer.mod_revision).await).unwrap();
    assert_eq!(next("lease", "removed")["subject"], "10.244.2.0/24");
    let mut text = BufReader::new(leases.stdout.take().unwrap()).lines();
    let line = text.next().unwrap().unwrap();
    assert!(line.contains("  lease    removed  10.244.2.0/24  via 10.0.0.2"), "{line}");
    // It ends with the daemon.
    lab.stop_daemon(0, true).unwrap();
    assert!(all.wait().unwrap().success() && leases.wait().unwrap().success());
    assert!(text.next().is_none(), "one event of this type");
}

/// The archive says what is broken, and has no secret in it.
pub(crate) fn bugreport_has_no_secret(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    lab.stop_daemon(0, false).unwrap();
    // A password without a user is not used, but it is on the command line.
    lab.start_daemon(0, &["--etcd-password=planted-password"]).unwrap();
    lab.settle().unwrap();
    lab.hosts[0].shell("ip route add blackhole 10.244.2.0/24 proto bird").unwrap();
    says(&lab, 0, &["status"], 1, &["route-hides-peer"]);
    let confs = root.join("confs");
    std::fs::create_dir_all(&confs).unwrap();
    let conf = r#"{ "plugins": [{ "type": "flannel", "token": "planted-token", "kubeconfig": "https://admin:planted-url@10.0.0.1:6443" }],
        "note": "planted-password", "key": "-----BEGIN EC PRIVATE KEY-----\\nplanted-key\\n-----END EC PRIVATE KEY-----" }"#;
    std::fs::write(confs.join("10-flannel.conflist"), conf).unwrap();
    let file = root.join("report.tar.gz");
    let (path, conf_dir) = (file.display().to_string(), format!("--cni-conf-dir={}", confs.display()));
    let (code, text) = flanneld(&lab, 0, &["bugreport", &path, &conf_dir]);
    assert!(code == Some(0) && text.starts_with(&format!("wrote {path} (")), "{text}");
    let meta = std::fs::metadata(&file).unwrap();
    assert!(meta.permissions().mode() & 0o777 == 0o600 && meta.len() < 10_000_000, "{meta:?}");
    let (code, text) = flanneld(&lab, 0, &["bugreport", &path, &conf_dir]);
    assert!(code == Some(1) && text.contains("File exists"), "a file is not replaced: {text}");

    let out = root.join("out");
    std::fs::create_dir_all(&out).unwrap();
    let tar = Command::new("tar").args(["xzf", &path, "--strip-components=1", "-C"]).arg(&out).status().unwrap();
    assert!(tar.success());
    let grep = Command::new("grep").args(["-r", "planted"]).arg(&out).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&grep.stdout), "");
    let part = |name: &str| std::fs::read_to_string(out.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    for (name, wanted) in [
        ("version.txt", "kernel Linux"),
        ("status.txt", "10.244.2.0/24  10.0.0.2"),
        ("doctor.txt", "warning route-hides-peer"),
        ("ipam.txt", "cannot read"),
        ("state.json", "\"schema\": 1"),
        ("metrics.txt", "flannel_ready 1"),
        ("process.txt", "--etcd-password=(removed)"),
        ("kernel/objects.txt", "route 10.244.2.0/24"),
        ("kernel/links.txt", "flannel.1"),
        ("kernel/routes.txt", "10.244.2.0"),
        ("kernel/facts.txt", "Blackhole"),
        ("files/run_flannel_subnet.env", "FLANNEL_SUBNET=10.244.1.1/24"),
        ("host/ip-route.txt", "blackhole 10.244.2.0/24"),
    ] {
        assert!(part(name).contains(wanted), "{name}: {}", part(name));
    }
    let conf = std::fs::read_dir(out.join("files")).unwrap().flatten().find(|file| file.file_name().to_string_lossy().contains("confs"));
    assert!(std::fs::read_to_string(conf.unwrap().path()).unwrap().contains(r#""token": "(removed)""#));
}
