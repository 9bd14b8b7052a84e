//! What belongs to a host, and what another one sends or publishes to get it: VTEP MACs, subnets, packets, locks.

use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use flannel::Lease;
use flannel::backend::published_mac;
use lab::{Lab, StoreKind};
use rustix::fs::FlockOperation;

use crate::cluster::{eventually, observe, ping_all_from, ping_during, routes};
use crate::{plan, start};

/// The reasons why a peer of the first host is refused.
fn refused(lab: &Lab, subnet: &str) -> String {
    let state = lab.hosts[0].state().unwrap_or_default();
    let list = state["peers"]["list"].as_array().cloned().unwrap_or_default();
    let peer = list.iter().find(|peer| peer["subnet"] == subnet && peer["state"] == "refused");
    peer.map(|peer| peer["reasons"].to_string()).unwrap_or_default()
}

/// Leases that claim another host's VTEP MAC, or a part of its subnet, take no packet from it, whichever comes first in order, and
/// whether they come as events or as a list.
pub(crate) fn newcomer_takes_nothing_from_a_peer(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let victim = lab.with_store(async |store| store.snapshot().await).unwrap();
    let victim = victim.entries.into_iter().find(|entry| entry.key.to_string() == "10.244.2.0/24").unwrap().peer.unwrap();
    let mac = published_mac(&victim, flannel::Family::V4).unwrap();
    let thief = |subnet: &str, mac: &str| {
        let value = format!(r#"{{"PublicIP":"10.0.0.66","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#);
        let key = flannel::wire::parse_key(&subnet.replace('/', "-")).unwrap();
        Lease { key, peer: flannel::wire::parse_value(value.as_bytes()).unwrap() }
    };
    let thieves = [thief("10.244.0.0/24", &mac.to_string()), thief("10.244.2.0/25", "02:00:00:00:00:66")];
    let before = observe(&lab.hosts[0].netns);
    let (sent, lost) = ping_during(&pods[0].netns, pods[1].address, || {
        for thief in &thieves {
            assert!(lab.with_store(async |store| store.put_lease(thief, 0, 0).await).unwrap());
        }
        for round in 0..2 {
            eventually("the newcomers are refused", || {
                let (mac, subnet) = (refused(&lab, "10.244.0.0/24"), refused(&lab, "10.244.2.0/25"));
                mac.contains("is that of lease 10.244.2.0/24, which is older") && subnet.contains("overlaps lease 10.244.2.0/24")
            });
            assert_eq!(observe(&lab.hosts[0].netns), before, "round {round}");
            if round == 0 {
                let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
                assert!(log.lines().any(|line| line.contains("peer refused") && line.contains("10.244.0.0/24")), "{log}");
                lab.stop_daemon(0, false).unwrap();
                lab.start_daemon(0, &[]).unwrap();
                lab.wait_state(0, "the victim", |state| state["peers"]["programmed"] == 1).unwrap();
            }
        }
    });
    assert_eq!(lost, 0, "of {sent}");
    // What the victim gives up, the newcomer may have.
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    let entry = snapshot.entries.iter().find(|entry| entry.key.to_string() == "10.244.2.0/24").unwrap();
    lab.stop_daemon(1, true).unwrap();
    assert!(lab.with_store(async |store| store.delete_lease(&entry.key, entry.mod_revision).await).unwrap());
    let both = ["10.244.0.0/24", "10.244.2.0/25"].map(ToOwned::to_owned).into();
    eventually("the newcomers are admitted", || routes(&observe(&lab.hosts[0].netns)) == both);
}

/// A UDP packet in IPv4, without checksums of UDP.
fn packet(source: Ipv4Addr, destination: Ipv4Addr, text: &str) -> Vec<u8> {
    let length = u16::try_from(28 + text.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()).to_be_bytes());
    packet.extend([0x15, 0xb3, 0x15, 0xb3]);
    packet.extend(u16::try_from(8 + text.len()).unwrap().to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(text.bytes());
    packet
}

/// Only packets of a peer's pods for this host's pods pass the port of the udp backend; the others are counted by reason.
pub(crate) fn udp_passes_only_packets_between_pods_of_peers(root: &Path) {
    let mut lab = Lab::wire(plan(3, "udp", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    for host in 0..2 {
        lab.start_daemon(host, &[]).unwrap();
    }
    lab.wait_state(0, "its peer", |state| state["peers"]["programmed"] == 1).unwrap();
    let ip = |text: &str| text.parse::<Ipv4Addr>().unwrap();
    let (pod, gateway, elsewhere) = (ip("10.244.2.9"), ip("10.244.1.0"), ip("8.8.8.8"));
    // The first host listens on all of its addresses.
    let listener = lab.hosts[0].netns.run(|| UdpSocket::bind("0.0.0.0:5555").unwrap()).unwrap();
    listener.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let send = |host: usize, source, destination, text| {
        let socket = lab.hosts[host].netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
        socket.send_to(&packet(source, destination, text), "10.0.0.1:8285").unwrap();
    };
    for (host, source, destination) in
        [(2, pod, gateway), (2, elsewhere, gateway), (1, elsewhere, gateway), (1, ip("10.0.0.2"), gateway), (1, pod, ip("10.0.0.1"))]
    {
        send(host, source, destination, "forged");
    }
    send(1, pod, gateway, "genuine");
    let mut buffer = [0; 64];
    let end = Instant::now() + Duration::from_secs(20);
    let length = loop {
        match listener.recv(&mut buffer) {
            Ok(length) => break length,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    assert_eq!(&buffer[..length], b"genuine", "the first that arrives");
    assert!(listener.recv(&mut buffer).is_err(), "no other one arrives");
    let state = lab.hosts[0].state().unwrap();
    let dropped = &state["udp_dropped"];
    assert_eq!(
        (&dropped["unknown-sender"], &dropped["foreign-source"], &dropped["foreign-destination"]),
        (&2.into(), &2.into(), &1.into())
    );
    let metrics = lab.hosts[0].get("/metrics").unwrap().1;
    assert!(metrics.contains("flannel_udp_dropped_total{reason=\"unknown-sender\"} 2\n"), "{metrics}");
}

/// A lock that other users could open, that of an earlier version, keeps no daemon from starting; a second daemon is refused by name.
pub(crate) fn lock_is_in_a_folder_of_its_own(root: &Path) {
    let mut lab = Lab::wire(plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let folder = lab.hosts[0].subnet_file().parent().unwrap().to_owned();
    let old = std::fs::File::create(folder.join(".subnet.env.lock")).unwrap();
    rustix::fs::flock(&old, FlockOperation::NonBlockingLockExclusive).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its lease", |state| state["subnet"] == "10.244.1.0/24").unwrap();
    let mode = |path: &Path| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap()) & 0o777;
    assert_eq!(mode(&folder.join(".locks")), 0o700);
    let holder = std::fs::read_to_string(folder.join(".locks/subnet.env")).unwrap();
    let second =
        lab.hosts[0].run(|| std::process::Command::new(crate::cluster::PROGRAM).arg("--etcd-endpoints=http://192.0.2.1:1").output());
    let text = String::from_utf8(second.unwrap().unwrap().stderr).unwrap();
    assert!(text.contains(&format!("another flanneld ({holder}) uses --subnet-file /run/flannel/subnet.env")), "{text}");
}
