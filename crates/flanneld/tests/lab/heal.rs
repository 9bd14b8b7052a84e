//! Changes under a running daemon are repaired or followed without a restart.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kernel::netns::Netns;
use lab::events::{self, ClusterEvent};
use lab::faults::{self, FAULTS, Noticed};
use lab::ping::ping_all;
use lab::stage::{PORT, Stage};
use lab::{Lab, Plan, Pod, StoreKind};

use crate::cluster::{eventually, ping_all_from};
use crate::{shell, start};

/// Waits until the pods reach each other again.
#[track_caller]
fn back(what: &str, pods: &[Pod]) {
    for (from, to) in [(0, 1), (1, 0)] {
        eventually(what, || pods[from].netns.run(|| ping_all(&[pods[to].address], Duration::from_millis(50))).unwrap().unwrap().len() == 1);
    }
}

fn published(lab: &Lab, host: usize) -> String {
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    let own = snapshot.entries.iter().find(|entry| entry.key.to_string() == lab.hosts[host].subnet).unwrap();
    own.peer.as_ref().unwrap().public.v4.unwrap().to_string()
}

pub(crate) fn interface_changes_are_followed(root: &Path) {
    for backend in ["host-gw", "vxlan"] {
        let mut lab = start(&root.join(backend), 2, backend, StoreKind::Embedded);
        let pods: Vec<Pod> = (0..2).map(|host| lab.add_pod(host).unwrap()).collect();
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        let pid = lab.hosts[0].pid();
        let h1 = Netns::open(&root.join(backend).join("netns/h1")).unwrap();
        let env = lab.hosts[0].subnet_file();
        let mac = |h1: &Netns| {
            shell(
                h1,
                "cat /sys/class/net/flannel.1/address 2> /dev/null || ip link show flannel.1 2> /dev/null | grep -o 'ether [^ ]*' || true",
            )
        };
        let mac_before = mac(&h1);

        // Another address: as DHCP may give one.
        shell(
            &h1,
            "ip addr del 10.0.0.1/24 dev eth0; ip addr add 10.0.0.101/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0",
        );
        let began = Instant::now();
        eventually("the lease says so", || published(&lab, 0) == "10.0.0.101");
        back("pods after the address changed", &pods);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "{backend}: {took:?}");
        if backend == "vxlan" {
            assert!(shell(&h1, "ip -d link show flannel.1").contains("local 10.0.0.101"));
        }

        // No address at all for a moment: nothing is torn down, and all is well when it has one again.
        shell(&h1, "ip addr del 10.0.0.101/24 dev eth0");
        eventually("it says so", || {
            std::fs::read_to_string(lab.hosts[0].log()).unwrap().contains("interface problem; devices and routes stay")
        });
        assert_eq!(published(&lab, 0), "10.0.0.101");
        shell(&h1, "ip addr add 10.0.0.101/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0");
        back("pods after the address came back", &pods);

        // Down and up.
        shell(&h1, "ip link set eth0 down; ip link set eth0 up; ip route replace default via 10.0.0.254 dev eth0");
        back("pods after the link was down", &pods);

        // A smaller MTU: ours follows, and so does what new pods get.
        shell(&h1, "ip link set eth0 mtu 1400");
        let mtu = if backend == "vxlan" { 1350 } else { 1400 };
        eventually("subnet.env follows", || std::fs::read_to_string(&env).unwrap().contains(&format!("FLANNEL_MTU={mtu}\n")));
        if backend == "vxlan" {
            eventually("the device follows", || shell(&h1, "ip link show flannel.1").contains("mtu 1350"));
        }
        back("pods after the MTU changed", &pods);

        // Gone, and there again with another index.
        shell(&h1, "ip link del eth0");
        shell(&lab.middle, "ip link add h1 type veth peer name h1x; ip link set h1 master lan0; ip link set h1 up");
        let namespace = root.join(backend).join("netns/h1");
        shell(&lab.middle, &format!("ip link set h1x netns {}", namespace.display()));
        shell(
            &h1,
            "ip link set h1x name eth0; ip link set eth0 up; ip addr add 10.0.0.1/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0",
        );
        eventually("the lease says so again", || published(&lab, 0) == "10.0.0.1");
        back("pods after the interface was created again", &pods);
        assert_eq!(mac(&h1), mac_before, "the VTEP is the one that peers know");
        assert_eq!(lab.hosts[0].pid(), pid);
        lab.wait_state(0, "all well", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    }
}

pub(crate) fn second_address_and_other_name_change_nothing(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let pods: Vec<Pod> = (0..2).map(|host| lab.add_pod(host).unwrap()).collect();
    let h1 = Netns::open(&root.join("netns/h1")).unwrap();
    // The first address is DHCP's, the second a virtual one, which looks more lasting and will move on to another host.
    shell(&h1, "ip addr change 10.0.0.1/24 dev eth0 valid_lft 3600 preferred_lft 3600; ip addr add 10.0.0.200/24 dev eth0");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(published(&lab, 0), "10.0.0.1");
    shell(&h1, "ip addr del 10.0.0.200/24 dev eth0");
    // The device works on under an interface of another name, and the state names the missing one.
    let (_, lost) = lab::ping::ping_during(&pods[0].netns, pods[1].address, || {
        shell(&h1, "ip link set eth0 name ens3");
        // The node is not ready: what it must have cannot be created again. Packets pass meanwhile.
        let failed = || lab.hosts[0].state().unwrap()["objects"]["failed"].to_string();
        eventually("the name is missed", || failed().contains("there is no interface eth0"));
        eventually("the node is not ready", || lab.hosts[0].get("/readyz").unwrap().0 == 503);
        std::thread::sleep(Duration::from_millis(300));
        shell(&h1, "ip link set ens3 name eth0");
    })
    .unwrap();
    assert_eq!(lost, 0);
    lab.wait_state(0, "all well", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    back("pods", &pods);
}

pub(crate) fn every_fault_is_repaired(root: &Path) {
    for (backend, nftables) in [("host-gw", true), ("vxlan", true), ("vxlan", false)] {
        let mut plan = crate::plan(2, backend, StoreKind::Embedded);
        plan.config["EnableNFTables"] = nftables.into();
        let mut lab = Lab::start(plan, &root.join(format!("{backend}-{nftables}"))).unwrap();
        lab.settle().unwrap();
        let pods: Vec<Pod> = (0..2).map(|host| lab.add_pod(host).unwrap()).collect();
        pods.iter().for_each(|pod| lab.map_port(pod, "ADD", PORT).unwrap());
        // That the audit finds a sysctl takes a minute: `lab faults` measures it.
        for fault in FAULTS.iter().filter(|fault| fault.fits(backend, nftables) && fault.noticed == Noticed::Event) {
            faults::once(&lab, &pods, 0, fault).unwrap_or_else(|error| panic!("{backend}: {}: {error:#}", fault.name));
        }
        ping_all_from(&pods[0].netns, &[pods[1].address]);
    }
}

pub(crate) fn new_vtep_mac_is_kept_and_published(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let pods: Vec<Pod> = (0..2).map(|host| lab.add_pod(host).unwrap()).collect();
    let h1 = Netns::open(&root.join("netns/h1")).unwrap();
    let published = |mac: &str| {
        let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
        let own = snapshot.entries.iter().find(|entry| entry.key.to_string() == "10.244.1.0/24").unwrap();
        own.peer.as_ref().unwrap().backend_data.v4.as_ref().unwrap().contains(mac)
    };
    shell(&h1, "ip link set flannel.1 address 02:00:00:00:be:ef");
    eventually("the lease says so", || published("02:00:00:00:be:ef"));
    back("pods with the new MAC", &pods);
    // Again within five seconds: the one that peers know comes back.
    shell(&h1, "ip link set flannel.1 address 02:00:00:00:be:ee");
    eventually("it is undone", || shell(&h1, "ip link show flannel.1").contains("02:00:00:00:be:ef"));
    assert!(published("02:00:00:00:be:ef"));
    back("pods after it was undone", &pods);
}

pub(crate) fn full_disk_under_subnet_env_is_reported_and_retried(root: &Path) {
    let mut lab = Lab::wire(crate::plan(1, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let (small, h1) = (root.join("small"), Netns::open(&root.join("netns/h1")).unwrap());
    std::fs::create_dir(&small).unwrap();
    shell(&h1, &format!("mount -t tmpfs -o size=16k small {}", small.display()));
    let file = small.join("subnet.env");
    lab.start_daemon(0, &[&format!("--subnet-file={}", file.display())]).unwrap();
    lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let _ = std::process::Command::new("dd").args(["if=/dev/zero", "bs=4k"]).arg(format!("of={}", small.join("full").display())).output();
    std::fs::write(&file, "FLANNEL_MTU=9\n").unwrap_or_default();
    std::fs::remove_file(&file).unwrap();
    let _ = std::process::Command::new("dd").args(["if=/dev/zero", "bs=4k"]).arg(format!("of={}", small.join("fuller").display())).output();
    eventually("the state names the failed file", || {
        let state = lab.hosts[0].state().unwrap()["objects"]["failed"].to_string();
        state.contains("No space left on device") && state.contains("cannot write --subnet-file")
    });
    assert!(!file.exists(), "and no half of it is there");
    std::fs::remove_file(small.join("full")).unwrap();
    std::fs::remove_file(small.join("fuller")).unwrap();
    eventually("it is written once there is room", || std::fs::read_to_string(&file).is_ok_and(|now| now == text));
    lab.wait_state(0, "all well", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    lab.stop_daemon(0, true).unwrap();
    shell(&h1, &format!("umount {}", small.display()));
}

pub(crate) fn full_disk_under_the_store_is_reported_and_loses_nothing(root: &Path) {
    let mut lab = Lab::wire(crate::plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    let h1 = Netns::open(&root.join("netns/h1")).unwrap();
    let folder = root.join("store");
    shell(&h1, &format!("mount -t tmpfs -o size=4m small {}", folder.display()));
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
    let fill = |count: u32| -> u32 {
        lab.middle
            .run(|| {
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                    let address = format!("http://{}", lab::STORE);
                    let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
                    let mut kv = daemon::etcd::kv_client::KvClient::new(channel);
                    for n in 0..count {
                        let key = format!("fill/{n:06}").into_bytes();
                        let put = daemon::etcd::PutRequest { key, value: vec![7; 4_000], ..Default::default() };
                        if let Err(status) = kv.put(put).await {
                            assert!(status.message().contains("the store cannot write its file"), "{status}");
                            return n;
                        }
                    }
                    count
                })
            })
            .unwrap()
    };
    let acknowledged = fill(5_000);
    assert!((10..5_000).contains(&acknowledged), "{acknowledged}");
    let log = || std::fs::read_to_string(root.join("store.log")).unwrap();
    eventually("it says why it ended", || log().contains("failed to write the store's file"));
    // The daemon keeps what it has.
    assert_eq!(lab.hosts[0].state().unwrap()["subnet"], "10.244.1.0/24");
    lab.kill_store().unwrap();
    shell(&h1, &format!("mount -o remount,size=64m {}", folder.display()));
    lab.start_store().unwrap();
    let count = lab.middle.run(|| {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let address = format!("http://{}", lab::STORE);
            let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
            let key = b"fill/".to_vec();
            let range_end = daemon::etcd::prefix_end(&key);
            let all = daemon::etcd::RangeRequest { key, range_end, count_only: true, ..Default::default() };
            daemon::etcd::kv_client::KvClient::new(channel).range(all).await.unwrap().into_inner().count
        })
    });
    assert!(count.unwrap() >= i64::from(acknowledged), "what was acknowledged is there");
    lab.wait_state(0, "the store again", |state| state["store"]["connected"] == true).unwrap();
    lab.stop_daemon(0, true).unwrap();
    lab.kill_store().unwrap();
    shell(&h1, &format!("umount {}", folder.display()));
}

pub(crate) fn host_and_store_events_are_followed(root: &Path) {
    let stage = Stage::new(crate::plan(3, "vxlan", StoreKind::Embedded), root).unwrap();
    all_follow(stage, events::HOSTS.iter().chain(&events::STORES));
}

fn all_follow<'a>(mut stage: Stage, events: impl Iterator<Item = &'a ClusterEvent>) {
    for (at, event) in events.enumerate() {
        let (_, lost) = events::once(&mut stage, event, at % 3).unwrap_or_else(|error| panic!("{error:#}"));
        assert!(event.interrupts || lost == 0, "{}: {lost} pings lost", event.name);
    }
}

pub(crate) fn etcd_members_fail_in_turn(root: &Path) {
    let plan = Plan::members(&crate::stores::tool("FLANNEL_ETCD_3_6"), 3, Path::new(crate::cluster::PROGRAM));
    all_follow(Stage::new(plan, root).unwrap(), events::etcd::ETCD.iter());
}

/// Kills of the embedded store in the middle of writing; a run that is to prove more sets this variable.
fn kills() -> usize {
    std::env::var("FLANNEL_KILLS").map_or(150, |text| text.parse().unwrap())
}

pub(crate) fn killed_store_keeps_acknowledged_writes(root: &Path) {
    let mut lab = Lab::wire(crate::plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    let mut acknowledged = 0u32;
    for _ in 0..kills() {
        lab.start_store().unwrap();
        let done = std::sync::atomic::AtomicU32::new(acknowledged);
        let middle = Netns::open(&root.join("netns/middle")).unwrap();
        std::thread::scope(|scope| {
            let done = &done;
            let put = move || {
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                    let address = format!("http://{}", lab::STORE);
                    // It may be killed before it is reached.
                    let Ok(channel) = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await else { return };
                    let mut kv = daemon::etcd::kv_client::KvClient::new(channel);
                    // What was acknowledged before is there.
                    let key = b"n/".to_vec();
                    let range_end = daemon::etcd::prefix_end(&key);
                    let all = daemon::etcd::RangeRequest { key, range_end, count_only: true, ..Default::default() };
                    let Ok(answer) = kv.range(all).await else { return };
                    let count = answer.into_inner().count;
                    assert!(count >= i64::from(acknowledged), "{count} of {acknowledged}");
                    for n in acknowledged.. {
                        let put =
                            daemon::etcd::PutRequest { key: format!("n/{n:08}").into_bytes(), value: vec![7; 300], ..Default::default() };
                        if kv.put(put).await.is_err() {
                            return;
                        }
                        done.store(n + 1, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            };
            let putting = scope.spawn(move || middle.run(put).unwrap());
            std::thread::sleep(Duration::from_micros(fastrand::u64(5_000..25_000)));
            lab.kill_store().unwrap();
            putting.join().unwrap();
        });
        acknowledged = done.into_inner();
    }
    assert!(acknowledged > 100, "it was killed in the middle of work: {acknowledged} puts");
}

pub(crate) fn chaos_run_holds(_: &Path) {
    let output =
        Command::new(crate::cluster::PROGRAM).args(["lab", "chaos", "--seed", "7", "--minutes", "0.25", "--hosts", "5"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("held: "), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// A bridge that filters VLANs is not repaired, until it filters no more and has its address.
pub(crate) fn bridge_with_vlan_filtering_is_left_alone(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    lab.add_pod(0).unwrap();
    let netns = &lab.hosts[0].netns;
    let has_address = || shell(netns, "ip -4 addr show dev cni0").contains("10.244.1.1/24");
    let comes_back = || {
        eventually("the daemon knows the bridge, and its address comes back", || {
            shell(netns, "ip addr replace 10.244.1.1/24 dev cni0; sleep 0.5; ip addr del 10.244.1.1/24 dev cni0; sleep 1");
            has_address()
        });
    };
    comes_back();
    shell(netns, "ip link set cni0 type bridge vlan_filtering 1; sleep 1; ip addr del 10.244.1.1/24 dev cni0; sleep 3");
    assert!(!has_address());
    shell(netns, "ip link set cni0 type bridge vlan_filtering 0");
    comes_back();
}
