//! A host whose packets cannot arrive reports the reason and the fix.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Lab, Plan, StoreKind};
use serde_json::json;

use crate::cluster::{PROGRAM, eventually};
use crate::{ping_all_from, plan};

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;

fn wire(root: &Path, hosts: usize) -> Lab {
    let mut lab = Lab::wire(plan(hosts, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.with_store(async |store| store.put_config(VXLAN).await).unwrap();
    lab
}

fn shell(lab: &Lab, host: usize, line: &str) -> String {
    let output = lab.hosts[host].netns.run(|| Command::new("sh").args(["-ec", line]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn readyz(lab: &Lab, host: usize) -> (u16, String) {
    lab.hosts[host].get("/readyz").unwrap_or_default()
}

fn is_ready(lab: &Lab, host: usize) -> bool {
    readyz(lab, host).0 == 200
}

/// Two hosts with one public address and a VTEP MAC each: both say so, and neither writes the lease without pause.
pub(crate) fn hosts_with_one_address_say_so(root: &Path) {
    let mut lab = wire(root, 2);
    // The second host gets a device of its own, with another MAC, before it publishes the first one's address.
    lab.start_daemon(1, &[]).unwrap();
    eventually("it is set up", || is_ready(&lab, 1));
    lab.stop_daemon(1, true).unwrap();
    // Without its file it does not ask for its former lease.
    std::fs::remove_file(lab.hosts[1].subnet_file()).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    eventually("the first host is set up", || is_ready(&lab, 0));
    lab.start_daemon(1, &["--public-ip=10.0.0.1", "--iface=eth0"]).unwrap();
    let began = Instant::now();
    let revision = |lab: &mut Lab| lab.with_store(async |store| store.snapshot().await).unwrap().revision;
    for host in 0..2 {
        eventually("both hosts name the conflict", || {
            let (status, text) = readyz(&lab, host);
            status == 503 && text.contains("another host publishes 10.0.0.1 as its address too") && text.contains("--public-ip")
        });
    }
    let before = revision(&mut lab);
    std::thread::sleep(Duration::from_secs(5));
    let writes = revision(&mut lab) - before;
    assert!(writes <= 4, "{writes} writes in 5 s, {:?} after the conflict began", began.elapsed());
    // The second host gets an address of its own: the conflict is over.
    lab.stop_daemon(1, true).unwrap();
    lab.start_daemon(1, &[]).unwrap();
    eventually("the second host is ready", || is_ready(&lab, 1));
    let end = Instant::now() + Duration::from_secs(90);
    while !is_ready(&lab, 0) {
        assert!(Instant::now() < end, "the first host is not ready again: {:?}", readyz(&lab, 0));
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Another VXLAN device has our VNI and port: the daemon names it, waits, and goes on when it is gone.
pub(crate) fn a_taken_vni_is_named_and_waited_for(root: &Path) {
    let mut lab = wire(root, 2);
    shell(&lab, 0, "ip link add other_vxlan type vxlan id 1 dstport 8472 dev eth0 local 10.0.0.1; ip link set other_vxlan up");
    (0..2).for_each(|host| lab.start_daemon(host, &[]).unwrap());
    eventually("the device and the keys are named", || {
        let (status, text) = readyz(&lab, 0);
        status == 503 && text.contains("VXLAN device other_vxlan has VNI 1 and UDP port 8472") && text.contains("Backend.VNI")
    });
    shell(&lab, 0, "ip link del other_vxlan");
    eventually("the daemon goes on when it is gone", || is_ready(&lab, 0));
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
}

/// Hardening guides switch forwarding off for new interfaces: pods' packets pass all the same, and when it is switched off later.
pub(crate) fn interfaces_that_do_not_forward_are_repaired(root: &Path) {
    let mut lab = wire(root, 2);
    for host in 0..2 {
        shell(&lab, host, "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/default/forwarding");
        lab.start_daemon(host, &[]).unwrap();
        eventually("the host is ready", || is_ready(&lab, host));
    }
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    let forwards = |lab: &Lab, name: &str| shell(lab, 1, &format!("cat /proc/sys/net/ipv4/conf/{name}/forwarding")).trim() == "1";
    for name in ["cni0", "flannel.1", "eth0"] {
        eventually(&format!("{name} forwards"), || forwards(&lab, name));
    }
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    shell(&lab, 1, "echo 0 > /proc/sys/net/ipv4/conf/flannel.1/forwarding; echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding");
    let began = Instant::now();
    for name in ["flannel.1", "eth0"] {
        eventually(&format!("{name} forwards again"), || forwards(&lab, name));
    }
    assert!(began.elapsed() < Duration::from_secs(2), "the kernel announces it: {:?}", began.elapsed());
    ping_all_from(&pods[0].netns, &[pods[1].address]);
}

/// A peer of another VNI is refused by name; a DHCP client's default route through our device does not make it the external interface.
pub(crate) fn foreign_settings_of_our_device_are_seen_through(root: &Path) {
    let mut lab = wire(root, 2);
    lab.start_daemon(0, &[]).unwrap();
    eventually("the first host is ready", || is_ready(&lab, 0));
    shell(
        &lab,
        0,
        "ip addr add 10.0.0.125/24 dev flannel.1 noprefixroute; ip route add default via 10.0.0.254 dev flannel.1 onlink metric 5",
    );
    lab.stop_daemon(0, true).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    eventually("it is ready again", || is_ready(&lab, 0));
    assert_eq!(lab.hosts[0].state().unwrap()["interface"], "eth0");
    lab.with_store(async |store| store.put_config(&VXLAN.replace("\"vxlan\"", "\"vxlan\",\"VNI\":7")).await).unwrap();
    lab.start_daemon(1, &[]).unwrap();
    for host in 0..2 {
        let state = lab.wait_state(host, "the refusal", |state| state["peers"]["list"][0]["state"] == "refused").unwrap();
        let reason = state["peers"]["list"][0]["reasons"][0].as_str().unwrap_or_default().to_owned();
        assert!(reason.contains("its VNI is") && reason.contains("restart that one"), "{reason}");
    }
}

/// A command of the operator that hangs delays no repair.
pub(crate) fn hanging_commands_delay_no_repair(root: &Path) {
    let backend = json!({ "Type": "extension", "Shell": true, "SubnetAddCommand": format!("touch {}/begun; sleep 30", root.display()) });
    let mut plan = Plan::new(2, &backend, Path::new(PROGRAM));
    plan.env.push(("FLANNELD_ALLOW_COMMANDS".to_owned(), "true".to_owned()));
    let lab = Lab::start(plan, root).unwrap();
    eventually("the command runs", || root.join("begun").exists());
    let file = lab.hosts[0].subnet_file();
    let began = Instant::now();
    for _ in 0..3 {
        std::fs::remove_file(&file).unwrap();
        eventually("the subnet file is back", || file.exists());
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    eventually("the repairs are counted", || lab.hosts[0].state().is_ok_and(|state| state["objects"]["repaired"].as_u64() >= Some(3)));
}
