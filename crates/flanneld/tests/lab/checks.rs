//! A host whose packets cannot arrive reports the reason and the fix.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Lab, Plan, PodFamily, StoreKind};
use serde_json::{Value, json};

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
    // Without its file and its device's address it does not ask for its former lease.
    std::fs::remove_file(lab.hosts[1].subnet_file()).unwrap();
    shell(&lab, 1, "ip address flush dev flannel.1");
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

/// A second host takes the first one's address and, having no device yet, the VTEP MAC of its lease: both publish the same, and both
/// say so.
pub(crate) fn hosts_with_one_address_and_one_mac_say_so(root: &Path) {
    let mut lab = wire(root, 2);
    lab.start_daemon(0, &[]).unwrap();
    eventually("the first host is set up", || is_ready(&lab, 0));
    lab.start_daemon(1, &["--public-ip=10.0.0.1", "--iface=eth0"]).unwrap();
    for host in 0..2 {
        eventually("both hosts name the conflict", || {
            let (status, text) = readyz(&lab, host);
            status == 503 && text.contains("another host publishes 10.0.0.1 as its address too")
        });
    }
    let leases = lab.with_store(async |store| store.snapshot().await).unwrap().entries;
    assert_eq!(leases.len(), 1, "{leases:?}");
    // A restart alone is no conflict, however soon.
    lab.stop_daemon(1, true).unwrap();
    lab.stop_daemon(0, true).unwrap();
    for _ in 0..3 {
        lab.start_daemon(0, &[]).unwrap();
        eventually("the first host is ready", || is_ready(&lab, 0));
        std::thread::sleep(Duration::from_millis(500));
        assert!(is_ready(&lab, 0), "{:?}", readyz(&lab, 0));
        lab.stop_daemon(0, false).unwrap();
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
        assert!(reason.contains("its VNI is") && reason.contains("differs from Backend.VNI in the store"), "{reason}");
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

/// The findings of a host with this code.
fn found(lab: &Lab, host: usize, code: &str) -> Vec<Value> {
    let state = lab.hosts[host].state().unwrap_or_default();
    state["findings"].as_array().into_iter().flatten().filter(|finding| finding["code"] == code).cloned().collect()
}

/// Waits until a finding has this code and text, and returns its fix. A change that the kernel announces is named within five seconds.
#[track_caller]
fn named(lab: &Lab, code: &str, text: &str) -> String {
    let (began, mut fix) = (Instant::now(), String::new());
    eventually(&format!("{code}: {text}"), || {
        let findings = found(lab, 0, code);
        let finding = findings.iter().find(|finding| finding["text"].as_str().is_some_and(|found| found.contains(text)));
        fix = finding.and_then(|finding| finding["fix"].as_str()).unwrap_or_default().to_owned();
        finding.is_some()
    });
    assert!(began.elapsed() < Duration::from_secs(5), "{code} after {:?}", began.elapsed());
    fix
}

#[track_caller]
fn gone(lab: &Lab, code: &str) {
    let began = Instant::now();
    eventually(&format!("no {code} any more"), || found(lab, 0, code).is_empty() && lab.hosts[0].state().is_ok());
    assert!(began.elapsed() < Duration::from_secs(5), "{code} goes after {:?}", began.elapsed());
}

/// Two hosts with a pod each, in a network with this configuration.
fn two_pods(root: &Path, config: &str) -> (Lab, [lab::Pod; 2]) {
    let mut lab = Lab::wire(plan(2, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.with_store(async |store| store.put_config(config).await).unwrap();
    (0..2).for_each(|host| lab.start_daemon(host, &[]).unwrap());
    (0..2).for_each(|host| eventually("the host is ready", || is_ready(&lab, host)));
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    (lab, pods)
}

/// Routes and policy rules of other programs that take pods' packets are named, each with the command that mends it.
pub(crate) fn foreign_routes_and_rules_are_named(root: &Path) {
    let (lab, pods) = two_pods(root, VXLAN);
    let table = "ip route add default via 10.0.0.254 table 77; ip rule add pref 77 to 10.244.0.0/16 lookup 77";
    for (break_it, code, text, ready) in [
        ("ip route add blackhole 10.244.2.0/24 proto bird", "route-hides-peer", "hides peer 10.244.2.0/24", true),
        ("ip route add 10.244.2.0/25 via 10.0.0.99 proto static", "route-hides-peer", "hides a part of peer 10.244.2.0/24", true),
        ("ip route add unreachable 10.244.1.128/25", "route-hides-pods", "hides a part of this node's own pods 10.244.1.0/24", true),
        (table, "rule-diverts-pods", "to table 77", false),
    ] {
        shell(&lab, 0, break_it);
        let fix = named(&lab, code, text);
        let (status, answer) = readyz(&lab, 0);
        assert_eq!(status == 200, ready, "{answer}");
        assert!(answer.contains(text), "{answer}");
        let (status, answer) = doctor(&lab, 0);
        assert!(status == Some(1) && answer.contains(text) && answer.contains("\n  fix: "), "{answer}");
        shell(&lab, 0, fix.split(", or ").next().unwrap());
        gone(&lab, code);
        ping_all_from(&pods[0].netns, &[pods[1].address]);
    }
    assert!(is_ready(&lab, 0));
    // The path to the peer is measured again a moment later.
    eventually("doctor finds nothing", || {
        let (status, answer) = doctor(&lab, 0);
        status == Some(0) && answer.starts_with("no problem found")
    });
}

/// `flanneld doctor` on a host: its exit code, and what it prints.
fn doctor(lab: &Lab, host: usize) -> (Option<i32>, String) {
    let output = lab.hosts[host].run(|| Command::new(PROGRAM).arg("doctor").output()).unwrap().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

/// Beside rules of nftables, a chain of another table that drops pods' packets is named, each with the command that mends it.
pub(crate) fn forward_chains_that_drop_are_named(root: &Path) {
    let (lab, pods) = two_pods(root, VXLAN);
    for (break_it, text) in [
        ("iptables-nft -A FORWARD -j REJECT", "chain FORWARD of iptables-nft table filter rejects"),
        (
            "nft 'add table inet fw; add chain inet fw forward { type filter hook forward priority 5; policy drop; }'",
            "nftables table inet fw drops",
        ),
    ] {
        shell(&lab, 0, break_it);
        let fix = named(&lab, "forward-drop", text);
        assert_eq!(readyz(&lab, 0).0, 503);
        shell(&lab, 0, &fix);
        gone(&lab, "forward-drop");
        ping_all_from(&pods[0].netns, &[pods[1].address]);
    }
}

/// In iptables the daemon's jump goes before a rule that rejects every packet, also when that comes later; a policy of another program that
/// lets pods' packets pass stays before it.
pub(crate) fn iptables_jump_goes_before_a_rejecting_rule(root: &Path) {
    for variant in ["nft", "legacy"] {
        let root = root.join(variant);
        let tools = root.join("tools");
        std::fs::create_dir_all(&tools).unwrap();
        for (name, target) in [("", ""), ("-save", "-save"), ("-restore", "-restore")] {
            std::os::unix::fs::symlink(format!("/usr/sbin/iptables-{variant}{target}"), tools.join(format!("iptables{name}"))).unwrap();
        }
        let mut plan = plan(2, "vxlan", StoreKind::Embedded);
        plan.env.push(("PATH".to_owned(), format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display())));
        let mut lab = Lab::wire(plan, &root).unwrap();
        lab.start_store().unwrap();
        lab.with_store(async |store| store.put_config(&VXLAN.replace("true", "false")).await).unwrap();
        let iptables = format!("iptables-{variant}");
        for host in 0..2 {
            shell(
                &lab,
                host,
                &format!(
                    "{iptables} -N policy; {iptables} -A FORWARD -j policy; {iptables} -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; {iptables} -A FORWARD -j REJECT --reject-with icmp-host-prohibited"
                ),
            );
            lab.start_daemon(host, &[]).unwrap();
        }
        (0..2).for_each(|host| eventually("the host is ready", || is_ready(&lab, host)));
        let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        let places = |lab: &Lab| {
            let rules = shell(lab, 0, &format!("{iptables} -S FORWARD"));
            let place = |target: &str| rules.lines().position(|line| line.contains(&format!("-j {target}")));
            (place("policy"), place("FLANNEL-FWD"), place("REJECT"))
        };
        let (policy, jump, reject) = places(&lab);
        assert!(policy < jump && jump < reject, "{policy:?} {jump:?} {reject:?}");
        (0..2).for_each(|host| drop(shell(&lab, host, &format!("{iptables} -I FORWARD 1 -j REJECT"))));
        eventually("the jump is before it", || places(&lab).1 < places(&lab).2);
        (0..2).for_each(|host| eventually("the host is ready", || is_ready(&lab, host)));
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        assert_eq!(found(&lab, 0, "forward-drop"), [] as [Value; 0]);
    }
}

/// After a change of the pod network the bridge of before is named when the daemon starts; with the advised command pods can be added.
pub(crate) fn bridge_of_a_former_network_is_named(root: &Path) {
    let (mut lab, pods) = two_pods(root, VXLAN);
    lab.stop_daemon(0, true).unwrap();
    lab.with_store(async |store| store.put_config(&VXLAN.replace("10.244.", "10.99.")).await).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    let fix = named(&lab, "bridge-address", "bridge cni0 has address 10.244.1.1/24");
    assert_eq!(readyz(&lab, 0).0, 503);
    assert!(lab.add_pod(0).is_err(), "the plugin refuses");
    shell(&lab, 0, fix.split(", then").next().unwrap());
    gone(&lab, "bridge-address");
    lab.add_pod(0).unwrap();
    drop(pods);
}

/// A device that was renamed, or moved to another network namespace, is found.
pub(crate) fn renamed_and_moved_devices_are_named(root: &Path) {
    let (lab, pods) = two_pods(root, VXLAN);
    shell(&lab, 0, "ip link set flannel.1 down; ip link set flannel.1 name old9");
    let fix = named(&lab, "device-moved", "old9 has its VNI 1 and UDP port 8472");
    assert_eq!(readyz(&lab, 0).0, 503);
    shell(&lab, 0, fix.split(" (").next().unwrap());
    gone(&lab, "device-moved");
    eventually("the node is ready", || is_ready(&lab, 0));
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    // To the namespace of a pod, which is a process of its own.
    let mut sleeper = pods[0].netns.run(|| Command::new("sleep").arg("60").spawn()).unwrap().unwrap();
    shell(&lab, 0, &format!("ip link set flannel.1 netns {}", sleeper.id()));
    // With the place, if the daemon may enter that namespace.
    named(&lab, "device-moved", "device flannel.1 ");
    let (_, answer) = doctor(&lab, 0);
    assert!(answer.contains("was moved to the network namespace of process"), "{answer}");
    let delete = pods[0].netns.run(|| Command::new("ip").args(["link", "del", "flannel.1"]).status()).unwrap().unwrap();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(delete.success());
    eventually("the device is back", || is_ready(&lab, 0));
    ping_all_from(&pods[0].netns, &[pods[1].address]);
}

/// Settings of the host that the kernel does not announce are seen at the next look.
pub(crate) fn settings_that_lose_packets_are_named(root: &Path) {
    let dual =
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
    let mut lab = Lab::wire(plan(2, "vxlan", StoreKind::Embedded).family(PodFamily::Dual), root).unwrap();
    lab.start_store().unwrap();
    lab.with_store(async |store| store.put_config(dual).await).unwrap();
    (0..2).for_each(|host| lab.start_daemon(host, &[]).unwrap());
    eventually("the host is ready", || is_ready(&lab, 0));
    lab.add_pod(0).unwrap();
    // A policy rule that changes nothing makes the daemon look before the next audit.
    let look = |lab: &Lab| drop(shell(lab, 0, "ip rule add pref 32000 lookup main; ip rule del pref 32000"));
    let index = |lab: &Lab, name: &str| {
        shell(lab, 0, &format!("cat /sys/class/net/{name}/ifindex 2>/dev/null || ip -o link show {name} | cut -d: -f1"))
    };
    let file = |lab: &Lab, path: &str, text: &str| {
        let path = Path::new(path);
        lab.hosts[0]
            .run(|| {
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            })
            .unwrap();
    };
    let managed = format!("/run/NetworkManager/devices/{}", index(&lab, "flannel.1").trim());
    file(&lab, &managed, "[device]\nmanaged=true\n");
    look(&lab);
    named(&lab, "managed-device", "NetworkManager manages flannel.1");
    file(&lab, &managed, "[device]\nmanaged=false\n");
    look(&lab);
    gone(&lab, "managed-device");
    for (break_it, mend, code, text) in [
        (
            "iptables-nft -t nat -N KUBE-SERVICES; echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true",
            "iptables-nft -t nat -X KUBE-SERVICES",
            "br-netfilter",
            "kube-proxy's rules do not apply to IPv4 packets",
        ),
        (
            "ip link add eth1 type bridge; ip addr add 198.51.100.1/24 dev eth1; ip link set eth1 up; ip route append default via 198.51.100.254",
            "ip link del eth1",
            "default-routes",
            "lead through eth0 and eth1",
        ),
        (
            "ip -6 addr add 2001:db8::99/64 dev eth0; echo 1 > /proc/sys/net/ipv6/conf/flannel-v6.1/disable_ipv6",
            "echo 0 > /proc/sys/net/ipv6/conf/flannel-v6.1/disable_ipv6",
            "ipv6-disabled",
            "IPv6 is disabled on flannel-v6.1",
        ),
        // The kernel reaches that source by another interface than the packets come by.
        (
            "echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter; ip route add 203.0.113.0/24 dev cni0",
            "echo 0 > /proc/sys/net/ipv4/conf/eth0/rp_filter; ip route del 203.0.113.0/24",
            "rp-filter",
            "strict rp_filter is on for eth0",
        ),
    ] {
        shell(&lab, 0, break_it);
        shell(&lab, 1, "ip addr replace 203.0.113.5/32 dev lo; ping -c 3 -i 0.1 -W 1 -I 203.0.113.5 10.0.0.1 >/dev/null || true");
        look(&lab);
        named(&lab, code, text);
        shell(&lab, 0, mend);
        look(&lab);
        gone(&lab, code);
    }
    conntrack_table_that_fills_is_named(&lab, look);
    address_of_another_host_is_named(&lab, look);
}

/// The number of connections is read from a file, which the host sees replaced.
fn conntrack_table_that_fills_is_named(lab: &Lab, look: impl Fn(&Lab)) {
    let sysctl = "/proc/sys/net/netfilter/nf_conntrack_count";
    let script = format!(
        "iptables-nft -A INPUT -m conntrack --ctstate NEW; n=$(cat /proc/sys/net/netfilter/nf_conntrack_max); echo $((n * 19 / 20)) > /run/count; mount --bind /run/count {sysctl}"
    );
    lab.hosts[0].shell(&script).unwrap();
    look(lab);
    named(lab, "conntrack-full", "connections are tracked");
    lab.hosts[0].shell(&format!("umount {sysctl}")).unwrap();
    look(lab);
    gone(lab, "conntrack-full");
}

/// Duplicate address detection finds that another host has this host's IPv6 address.
fn address_of_another_host_is_named(lab: &Lab, look: impl Fn(&Lab)) {
    let address = lab.hosts[0].address6.unwrap();
    shell(lab, 1, &format!("ip addr add {address}/64 dev eth0 nodad"));
    let again = format!("ip addr del {address}/64 dev eth0; ip addr add {address}/64 dev eth0");
    shell(lab, 0, &format!("echo 1 > /proc/sys/net/ipv6/conf/eth0/accept_dad; {again}; sleep 3"));
    look(lab);
    named(lab, "address-duplicate", "is in use by another host on the link");
    shell(lab, 1, &format!("ip addr del {address}/64 dev eth0"));
    shell(lab, 0, &format!("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; {again}"));
    look(lab);
    gone(lab, "address-duplicate");
}

/// Where IPv6 is switched off, a dual-stack network goes on with IPv4, and the finding names the setting; when it is on again, IPv6 follows.
pub(crate) fn ipv4_goes_on_where_ipv6_is_disabled(root: &Path) {
    let dual =
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
    let mut lab = Lab::wire(plan(2, "vxlan", StoreKind::Embedded).family(PodFamily::Dual), root).unwrap();
    lab.start_store().unwrap();
    lab.with_store(async |store| store.put_config(dual).await).unwrap();
    let switch = |lab: &Lab, value: u8| drop(shell(lab, 0, &format!("echo {value} > /proc/sys/net/ipv6/conf/all/disable_ipv6")));
    switch(&lab, 1);
    (0..2).for_each(|host| lab.start_daemon(host, &[]).unwrap());
    (0..2).for_each(|host| eventually("the host is ready", || is_ready(&lab, host)));
    named(&lab, "ipv6-disabled", "IPv6 is disabled on eth0");
    named(&lab, "family-down", "IPv6 does not work on this node: eth0 has no usable IPv6 address");
    let file = |lab: &Lab| std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap();
    assert!(!file(&lab).contains("IPV6"), "{}", file(&lab));
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    let v4 = |pod: &lab::Pod| pod.addresses.iter().copied().find(std::net::IpAddr::is_ipv4).unwrap();
    ping_all_from(&pods[0].netns, &[v4(&pods[1])]);
    let address = lab.hosts[0].address6.unwrap();
    let netns = kernel::netns::Netns::open(&pods[0].path).unwrap();
    let (_, lost) = crate::ping_during(&netns, v4(&pods[1]), || {
        switch(&lab, 0);
        shell(&lab, 0, &format!("ip addr add {address}/64 dev eth0 nodad; ip -6 route add default via fd00:10::fe"));
        eventually("IPv6 is offered", || file(&lab).contains("FLANNEL_IPV6_SUBNET="));
    });
    assert_eq!(lost, 0);
    let late = lab.add_pod(0).unwrap();
    eventually("a new pod reaches the other by IPv6", || {
        late.netns
            .run(|| lab::ping::ping_all(&pods[1].addresses, Duration::from_millis(300)))
            .unwrap()
            .is_ok_and(|answered| answered.len() == 2)
    });
    // Switched off again, IPv4 goes on.
    switch(&lab, 1);
    named(&lab, "ipv6-disabled", "IPv6 is disabled on");
    ping_all_from(&pods[0].netns, &[v4(&pods[1])]);
}
