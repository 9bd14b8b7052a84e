//! Obstacles at the start: a bad configuration, a missing interface, a family that cannot be set up.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kernel::netns::Netns;
use lab::{Lab, PodFamily, StoreKind};
use serde_json::{Value, json};

use crate::cluster::{eventually, observe, ping_all_from, ping_during};
use crate::plan;

/// Runs a daemon that must end by itself, and returns its exit code and its log.
fn refused(lab: &mut Lab, config: Option<&Value>, raw: Option<&str>, args: &[&str]) -> (i32, String) {
    if let Some(text) = config.map(ToString::to_string).as_deref().or(raw) {
        lab.with_store(async |store| store.put_config(text).await).unwrap();
    }
    let _ = std::fs::remove_file(lab.hosts[0].log());
    lab.start_daemon(0, args).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let pid = lab.hosts[0].pid().unwrap();
    // A process that ended and was not waited for is a zombie.
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default().contains(") Z ") {
        assert!(Instant::now() < end, "it goes on:\n{}", std::fs::read_to_string(lab.hosts[0].log()).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = lab.stop_daemon(0, true).unwrap();
    (status.code().unwrap_or(-1), std::fs::read_to_string(lab.hosts[0].log()).unwrap_or_default())
}

/// A daemon waits for a usable configuration: each obstacle is logged once and is on /readyz, the kernel is not touched meanwhile, and the
/// first usable configuration is followed.
pub(crate) fn bad_configurations_are_reported_and_retried(root: &Path) {
    let mut lab = Lab::wire(plan(1, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    let cases = [
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan""#, "not a JSON object"),
        (r#"{"Network":"10.244.0.0/33","Backend":{"Type":"vxlan"}}"#, "Network: \"10.244.0.0/33\" is not a network in CIDR form"),
        (
            r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#,
            "Network: the pod network 10.0.0.0/8 contains this host's own address 10.0.0.1",
        ),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#, "SubnetLen: 31 is out of range"),
        (
            r#"{"Network":"10.244.0.0/16","SubnetMin":"10.245.0.0","Backend":{"Type":"vxlan"}}"#,
            "SubnetMin: 10.245.0.0 is outside the pod network",
        ),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}"#, "Backend.Type: \"carrier-pigeon\" is an unknown backend"),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}"#, "Backend.VNI: 99999999 is out of range"),
        (r#"{"Network":"10.244.0.0/16","Backend":{}}"#, "Backend.Type is missing"),
        (r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#, "carries IPv4 only"),
        (r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#, "IPv6Network is missing"),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"extension","PreStartupCommand":"false"}}"#,
            "start flanneld with --allow-commands if everyone who can write to the store may do that",
        ),
    ];
    let put = |lab: &mut Lab, text: &str| lab.with_store(async |store| store.put_config(text).await).unwrap();
    let log = |lab: &Lab| std::fs::read_to_string(lab.hosts[0].log()).unwrap_or_default();
    put(&mut lab, cases[0].0);
    lab.start_daemon(0, &[]).unwrap();
    for (config, wanted) in cases {
        put(&mut lab, config);
        // The log escapes quotation marks, /readyz does not.
        eventually(wanted, || lab.hosts[0].get("/readyz").is_ok_and(|(status, text)| status == 503 && text.contains(wanted)));
    }
    assert!(lab.hosts[0].pid().is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists()), "it goes on");
    let observed = observe(&lab.hosts[0].netns);
    assert!(observed.is_empty(), "the kernel is untouched: {observed:?}");
    put(&mut lab, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#);
    eventually("the usable configuration is followed", || lab.hosts[0].get("/readyz").is_ok_and(|(status, _)| status == 200));
    for wanted in cases.map(|(_, wanted)| wanted.replace('"', "\\\"")) {
        assert_eq!(log(&lab).matches(&wanted).count(), 1, "{wanted:?} is logged once");
    }
}

pub(crate) fn address_that_peers_cannot_use_is_refused(root: &Path) {
    let mut lab = Lab::wire(plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    let good = json!({ "Network": "10.244.0.0/16", "Backend": { "Type": "host-gw" } });
    let (code, log) = refused(&mut lab, Some(&good), None, &["--public-ip=192.0.2.1", "--iface=eth0"]);
    assert_eq!((code, log.contains("192.0.2.1 is not the address of eth0")), (1, true), "{log}");
    let observed = observe(&lab.hosts[0].netns);
    assert!(observed.is_empty(), "the kernel is untouched: {observed:?}");
}

/// An interface, an address or a default route that comes late is waited for.
pub(crate) fn late_interface_is_waited_for(root: &Path) {
    let mut lab = Lab::wire(plan(1, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    put_config(&mut lab, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let ip = |lab: &Lab, args: &[&str]| {
        let output = lab.hosts[0].netns.run(|| Command::new("ip").args(args).output()).unwrap().unwrap();
        assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    lab.start_daemon(0, &["--iface=late0"]).unwrap();
    let pending = |lab: &Lab| lab.hosts[0].get("/readyz").unwrap_or_default();
    eventually("the missing interface is named", || pending(&lab).1.contains("--iface late0: there is no such interface"));
    ip(&lab, &["link", "add", "late0", "type", "bridge"]);
    eventually("the missing address is named", || pending(&lab).1.contains("interface late0 has no usable IPv4 address"));
    ip(&lab, &["addr", "add", "192.0.2.7/24", "dev", "late0"]);
    ip(&lab, &["link", "set", "late0", "up"]);
    eventually("the daemon is ready once the interface is", || pending(&lab).0 == 200);
    assert_eq!(lab.hosts[0].state().unwrap()["public_ip"], "192.0.2.7");
}

fn put_config(lab: &mut Lab, text: &str) {
    lab.with_store(async |store| store.put_config(text).await).unwrap();
}

/// IPv4 goes on, at the start and later, while IPv6 cannot be set up; when it can, it is.
pub(crate) fn failing_family_leaves_the_other_alone(root: &Path) {
    let mut lab = Lab::wire(plan(2, "vxlan", StoreKind::Embedded).family(PodFamily::Dual), root).unwrap();
    lab.start_store().unwrap();
    put_config(&mut lab, r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#);
    // 1300 leaves 1230 bytes for IPv6 in VXLAN.
    set_mtu(&lab, 1300);
    (0..2).for_each(|host| lab.start_daemon(host, &[]).unwrap());
    for host in 0..2 {
        eventually("IPv4 is ready without IPv6", || lab.hosts[host].get("/readyz").is_ok_and(|(status, _)| status == 200));
        let (_, text) = lab.hosts[host].get("/readyz").unwrap();
        assert!(text.contains("note: IPv6 does not work on this node: the MTU of eth0 is 1300"), "{text}");
        let state = lab.wait_state(host, "the peer", |state| state["findings"][0]["code"] == "family-down").unwrap();
        assert!(state["findings"][0]["text"].as_str().unwrap().contains("set it to 1350 or more"), "{state}");
    }
    let file = |lab: &Lab| std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap();
    assert!(!file(&lab).contains("IPV6"), "pods are not offered IPv6: {}", file(&lab));
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    // IPv4 goes on while IPv6 comes back.
    let netns = Netns::open(&pods[0].path).unwrap();
    let (_, lost) = ping_during(&netns, pods[1].address, || {
        set_mtu(&lab, 1500);
        eventually("IPv6 is offered", || file(&lab).contains("FLANNEL_IPV6_SUBNET="));
    });
    assert_eq!(lost, 0);
    eventually("no finding is left", || lab.hosts[0].state().is_ok_and(|state| state["findings"] == json!([])));
}

fn set_mtu(lab: &Lab, mtu: u32) {
    for host in &lab.hosts {
        let mtu = mtu.to_string();
        let output = host.netns.run(|| Command::new("ip").args(["link", "set", "eth0", "mtu", &mtu]).output()).unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
