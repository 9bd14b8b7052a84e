//! The external interface changes under a running daemon: the lease, the devices and the peers follow, without a restart.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use flanneld::lab::ping::ping_all;
use flanneld::lab::{Lab, Pod, StoreKind};
use kernel::netns::Netns;

use crate::cluster::{eventually, ping_all_from};
use crate::start;

#[track_caller]
fn shell(netns: &Netns, script: &str) -> String {
    let output = netns.run(|| Command::new("sh").args(["-ec", script]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

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

pub(crate) fn the_interface_changes(root: &Path) {
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
            std::fs::read_to_string(lab.hosts[0].log()).unwrap().contains("the interface is not as it was; devices and routes stay")
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
        let moved = format!(
            "mkdir -p /run/netns; touch /run/netns/flannel-h1; mount --bind {0} /run/netns/flannel-h1; ip link set h1x netns flannel-h1; umount /run/netns/flannel-h1; rm /run/netns/flannel-h1",
            namespace.display()
        );
        shell(&lab.middle, &moved);
        shell(
            &h1,
            "ip link set h1x name eth0; ip link set eth0 up; ip addr add 10.0.0.1/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0",
        );
        eventually("the lease says so again", || published(&lab, 0) == "10.0.0.1");
        back("pods after the interface was made anew", &pods);
        assert_eq!(mac(&h1), mac_before, "the VTEP is the one that peers know");
        assert_eq!(lab.hosts[0].pid(), pid);
        lab.wait_state(0, "all well", |state| state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)).unwrap();
    }
}
