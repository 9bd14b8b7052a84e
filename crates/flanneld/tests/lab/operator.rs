//! The operator's commands on a host on which something is broken: each names it, and says so by its exit code.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use lab::{Lab, StoreKind};
use serde_json::Value;

use crate::cluster::{PROGRAM, eventually};
use crate::start;

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

    lab.hosts[0].shell("ip route del 10.244.2.0/24").unwrap();
    says(&lab, 0, &["status"], 0, &["1 in the last hour (1 route)", "10.244.2.0/24", "changed by ip, process"]);
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
