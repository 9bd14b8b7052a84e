//! The `lab` command and the command line, as an operator uses them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use kernel::link;
use kernel::netlink::{Protocol, Socket};
use serde_json::{Value, json};

use crate::cluster::{PROGRAM, eventually};
use crate::stores;

pub(crate) fn bad_flags_are_refused(root: &Path) {
    std::fs::create_dir_all(root).unwrap();
    let subnet_file = format!("--subnet-file={}", root.join("subnet.env").display());
    // A word that is no flag or no value of its kind exits with 2, a value that turns out to be unusable with 1.
    for (args, code, wanted) in [
        (vec!["--etcd-endpoints=ftp://x:1"], 1, "--etcd-endpoints"),
        (vec!["--etcd-endpoints=ftp://127.0.0.1:2379"], 1, "an endpoint looks like"),
        (vec!["--etcd-certfile=/nowhere.pem"], 1, "--etcd-certfile needs --etcd-keyfile"),
        (vec!["--healthz-port=x"], 2, "--healthz-port"),
        (vec!["--nonsense"], 2, "--nonsense"),
        (vec!["--ip-masq", "true"], 2, "true"),
        (vec!["--subnet-lease-renew-margin=1440"], 2, "--subnet-lease-renew-margin"),
        (vec!["frobnicate"], 2, "frobnicate"),
        (vec!["lab", "--hosts=0"], 1, "--hosts"),
        (vec!["lab", "--backend=udp"], 1, "--backend"),
    ] {
        // The daemon's flags.
        let more = args[0].starts_with("--").then_some(&subnet_file);
        let output = Command::new(PROGRAM).args(&args).args(more).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(said.contains(wanted), "{args:?}: {said}");
    }
    // A file may still be written by another program: it is named and waited for.
    let mut waiting = Command::new(PROGRAM).args(["--etcd-cafile=/nowhere.pem", &subnet_file]).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(waiting.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let running = waiting.try_wait().unwrap().is_none();
    waiting.kill().unwrap();
    waiting.wait().unwrap();
    assert!(line.contains("cannot use --etcd-cafile /nowhere.pem: No such file"), "{line}");
    assert!(running, "{line}");
    assert!(Command::new(PROGRAM).arg("--help").output().unwrap().status.success());
    assert!(Command::new(PROGRAM).arg("--version").output().unwrap().status.success());
}

/// Runs the lab command and returns whether it succeeded, and its document.
fn lab_command(program: &Path, args: &[&str], uid: Option<u32>) -> (bool, Value) {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    command.arg("lab").arg("--json").args(args);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().unwrap();
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), document)
}

pub(crate) fn lab_shows_host_gw_and_vxlan(_: &Path) {
    let (ok, document) = lab_command(Path::new(PROGRAM), &[], None);
    assert!(ok, "{document:#}");
    let [host_gw, vxlan] = document["runs"].as_array().unwrap().as_slice() else { panic!("two runs") };
    let mac = |run: &Value, host: usize| run["hosts"][host]["mac"].as_str().unwrap().to_owned();
    for (run, backend) in [(host_gw, "host-gw"), (vxlan, "vxlan")] {
        assert_eq!(run["backend"], backend);
        assert_eq!(run["pairs"], json!({ "answered": 2, "all": 2 }));
        assert_eq!(run["hosts"][0]["subnet"], "10.244.1.0/24");
        assert_eq!(run["hosts"][1]["pod"]["address"], "10.244.2.2");
    }
    assert_eq!(host_gw["hosts"][0]["routes"], json!(["10.244.2.0/24 via 10.0.0.2 dev eth0"]));
    assert_eq!(vxlan["hosts"][0]["routes"], json!(["10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink"]));
    let plain = format!("{} > {} | 10.244.1.2 > 10.244.2.2 ttl 63 | ICMP echo request", mac(host_gw, 0), mac(host_gw, 1));
    assert_eq!(host_gw["packet"], plain.as_str());
    let outer = format!("{} > {} | 10.0.0.1 > 10.0.0.2 ttl 64 | UDP 8472 | VXLAN VNI 1 | ", mac(vxlan, 0), mac(vxlan, 1));
    let packet = vxlan["packet"].as_str().unwrap();
    assert!(packet.starts_with(&outer) && packet.ends_with(" | 10.244.1.2 > 10.244.2.2 ttl 63 | ICMP echo request"), "{packet}");
}

pub(crate) fn lab_names_peers_behind_a_router(_: &Path) {
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--topology", "router", "--backend", "vxlan"], None);
    assert!(ok, "{document:#}");
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--topology", "router", "--backend", "host-gw", "--hosts", "3"], None);
    assert!(!ok);
    let run = &document["runs"][0];
    // Hosts 1 and 3 share a link; host 2 is behind the router.
    assert_eq!(run["hosts"][0]["routes"], json!(["10.244.3.0/24 via 10.0.0.3 dev eth0"]));
    let refused = run["hosts"][0]["refused"][0].as_str().unwrap();
    assert!(refused.starts_with("10.244.2.0/24: its address 10.0.1.2 is not on the link of eth0"), "{refused}");
    assert_eq!(run["pairs"], json!({ "answered": 2, "all": 6 }));
}

pub(crate) fn lab_needs_no_root(root: &Path) {
    // A copy that every user may execute: the build directory may not be readable for others.
    let program = root.join("flanneld");
    std::fs::create_dir_all(root).unwrap();
    std::fs::copy(PROGRAM, &program).unwrap();
    // A run of the tests without root shows it in any case.
    let uid = rustix::process::geteuid().is_root().then_some(65_534);
    let (ok, document) = lab_command(&program, &[], uid);
    assert!(ok, "{document:#}");
}

pub(crate) fn lab_leaves_given_etcd_as_it_was(root: &Path) {
    std::fs::create_dir_all(root).unwrap();
    link::set_up(&mut Socket::open(Protocol::Route).unwrap(), 1, true).unwrap();
    let url = "http://127.0.0.1:23790";
    let mut etcd = Command::new(stores::tool("FLANNEL_ETCD_3_4"));
    etcd.args(["--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", "http://127.0.0.1:23800", "--data-dir"])
        .arg(root.join("data"));
    kernel::process::die_with_parent(&mut etcd);
    let mut etcd = etcd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let ctl = |args: &[&str]| {
        let output = Command::new(stores::tool("FLANNEL_ETCDCTL_3_4"))
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={url}"))
            .args(args)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    eventually("etcd serves", || ctl(&["put", "/coreos.com/network/config", "another user's"]).0);
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--etcd", url, "--backend", "vxlan"], None);
    assert!(ok, "{document:#}");
    assert_eq!(document["runs"][0]["pairs"], json!({ "answered": 2, "all": 2 }));
    assert_eq!(ctl(&["get", "--prefix", "/"]).1, "/coreos.com/network/config\nanother user's\n");
    etcd.kill().unwrap();
    etcd.wait().unwrap();
}

pub(crate) fn kept_lab_can_be_entered_and_killed_lab_leaves_nothing(_: &Path) {
    use std::io::{BufRead, Write};
    let mut lab = Command::new(PROGRAM)
        .args(["lab", "--keep", "--backend", "vxlan", "--hosts", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(lab.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("Paste these lines into another terminal")));
    let last = "# Places to enter: h1, h2, h3, h1-pod, h2-pod, h3-pod.";
    let tour: Vec<String> = lines.by_ref().take_while(|line| line.trim() != last).collect();
    let exec = |args: &[&str]| Command::new(PROGRAM).args(["lab", "exec"]).args(args).output().unwrap();
    let text =
        |output: std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    eventually("it can be entered", || exec(&["h1", "--", "true"]).status.success());
    let routes = text(exec(&["h1", "--", "ip", "route"]));
    assert!(routes.contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1"), "{routes}");
    assert!(exec(&["h3-pod", "--", "ping", "-c", "1", "-W", "5", "10.244.1.2"]).status.success());
    assert!(text(exec(&["h9", "--", "true"])).contains("there is no \"h9\" in the lab: it has h1, h2, h3, h1-pod, h2-pod, h3-pod"));
    let second = Command::new(PROGRAM).args(["lab", "--keep"]).output().unwrap();
    assert!(text(second).contains("a lab of yours is up already"));

    // The tour, as it would be pasted.
    let pasted: Vec<&str> = tour.iter().filter_map(|line| line.strip_prefix("    ")).filter(|line| !line.starts_with('#')).collect();
    for program in ["ping -c", "curl -s", "etcdctl --endpoints", "nft list", "ip route flush", "kill "] {
        assert!(pasted.iter().any(|line| line.contains(program)), "the tour has no {program:?}: {tour:#?}");
    }
    let mut shell = Command::new("sh").args(["-ex"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    shell.stdin.take().unwrap().write_all(pasted.join("\n").as_bytes()).unwrap();
    let output = shell.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(output));

    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", lab.id())).unwrap();
    let children: Vec<&str> = children.split_whitespace().collect();
    assert_eq!(children.len(), 4, "a store and three daemons, of which the tour has killed one");
    lab.kill().unwrap();
    lab.wait().unwrap();
    let runs = |pid: &&str| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    eventually("all its processes are gone", || !children.iter().any(runs));
    assert!(text(exec(&["h1", "--", "true"])).contains("no lab of yours is up"));
}

pub(crate) fn twenty_hosts_all_pairs(_: &Path) {
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--hosts", "20", "--backend", "vxlan"], None);
    assert!(ok, "{document:#}");
    assert_eq!(document["runs"][0]["pairs"], json!({ "answered": 380, "all": 380 }));
}

pub(crate) fn commands_survive_closed_output(_: &Path) {
    // `sh` closes them; a panic exits with 101, a signal with 128 and more.
    for command in
        ["--help", "lab --backend vxlan", "lab --json --backend host-gw", "version", "--version", "install-cni --help", "--nonsense"]
    {
        for closed in [">&-", "2>&-", ">&- 2>&-", "| true", "2>&1 | true", "> /dev/full 2> /dev/full"] {
            let script = format!("set -o pipefail; {PROGRAM} {command} {closed}");
            let output = Command::new("bash").args(["-c", &script]).output().unwrap();
            let wanted = if command == "--nonsense" { 2 } else { 0 };
            assert_eq!(output.status.code(), Some(wanted), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    // A lab that stays up ends when its reader is gone.
    let script = format!("{PROGRAM} lab --keep --backend vxlan | true");
    assert!(Command::new("timeout").args(["60", "bash", "-c", &script]).status().unwrap().success());
}

pub(crate) fn lab_never_touches_the_machines_run(root: &Path) {
    // The test process sees the machine's `/run`.
    let mut lab = crate::start(root, 2, "vxlan", lab::StoreKind::Embedded);
    let pod = lab.add_pod(0).unwrap();
    lab.map_port(&pod, "ADD", 8090).unwrap();
    let seen = lab.hosts[0].shell("ls -A /run/flannel; cat /run/flannel/subnet.env; ls /run/flannel/pods").unwrap();
    assert!(seen.contains("FLANNEL_SUBNET=10.244.1.1/24") && seen.contains("ports-"), "{seen}");
    assert!(lab.hosts[1].shell("cat /run/flannel/subnet.env").unwrap().contains("FLANNEL_SUBNET=10.244.2.1/24"));
    let here = std::fs::read_to_string("/run/flannel/subnet.env").unwrap_or_default();
    assert!(!here.contains("10.244.1.1/24"), "{here}");
    // Another entry of the machine's is still in reach.
    let entries = std::fs::read_dir("/run").unwrap().map(Result::unwrap).filter(|entry| entry.path().exists());
    let name = entries.map(|entry| entry.file_name().into_string().unwrap());
    let name = name.into_iter().find(|name| !name.starts_with("flannel") && !["netns", "xtables.lock", "machine"].contains(&name.as_str()));
    name.into_iter().for_each(|name| drop(lab.hosts[0].shell(&format!("test -e /run/{name}")).unwrap()));
}
