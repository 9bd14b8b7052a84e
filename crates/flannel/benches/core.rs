//! Measures the decisions without a kernel: parses a number of leases in their etcd form, folds them into a picture, and compares it
//! with an empty kernel and with one that holds all objects. `cargo xtask bench` prints the times; `cargo xtask test` counts the
//! instructions (with valgrind), which do not depend on the load of the machine, and fails if they exceed a limit.

#![expect(clippy::unwrap_used, reason = "a benchmark has no caller to return an error to")]

use std::time::Instant;

use flannel::backend::Identity;
use flannel::diff::{Prune, diff};
use flannel::traffic::{Flavour, TrafficConfig};
use flannel::{Age, Config, Lease, LeaseKey, Mac, Node, Observed, PerFamily, Picture, StoreEvent, wire};

fn main() {
    let sizes: Vec<u32> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    for size in sizes {
        run(size);
    }
}

/// The key and value of a lease in etcd.
fn stored(number: u32) -> (String, String) {
    let [_, a, b, c] = number.to_be_bytes();
    let [_, x, y, z] = (number << 5).to_be_bytes();
    let key = format!("100.{}.{y}.{z}-27", 64 + x);
    let value = format!(
        "{{\"PublicIP\":\"172.2{a}.{b}.{c}\",\"PublicIPv6\":null,\"BackendType\":\"vxlan\",\"BackendData\":{{\"VNI\":1,\"VtepMAC\":\"02:00:00:{a:02x}:{b:02x}:{c:02x}\"}}}}"
    );
    (key, value)
}

fn run(size: u32) {
    let config = Config::parse(r#"{"Network": "100.64.0.0/10", "SubnetLen": 27, "Backend": {"Type": "vxlan"}}"#).unwrap();
    let v4 = |text: &str| PerFamily { v4: text.parse().ok(), v6: None };
    let (ext, addrs, public) = ("eth0".parse().unwrap(), v4("172.31.0.1"), v4("172.31.0.1"));
    let node = Node { ext, mtu: 1500, addrs, public, routes: vec![("172.0.0.0/8".parse().unwrap(), true)] };
    let own = LeaseKey::new(PerFamily { v4: "100.127.255.0/27".parse().ok(), v6: None }).unwrap();
    let stored: Vec<(String, String)> = (1..=size).map(stored).collect();
    let identity = Identity { macs: PerFamily { v4: Some(Mac([2, 9, 9, 9, 9, 9])), v6: None }, ..Identity::default() };
    let traffic = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: Flavour::Nftables };

    let before = rss();
    let began = Instant::now();
    let read =
        |(key, value): &(String, String)| Lease { key: wire::parse_key(key).unwrap(), peer: wire::parse_value(value.as_bytes()).unwrap() };
    let leases: Vec<Lease> = stored.iter().map(read).collect();
    let reading = millis(began);
    let mut picture = Picture::new(config, node, identity, traffic, own);
    let began = Instant::now();
    let list = leases.into_iter().zip(1..).map(|(lease, at)| StoreEvent::Apply(lease, Age::created(at)));
    picture.fold_all(std::iter::once(StoreEvent::Init).chain(list).chain([StoreEvent::InitDone]));
    let folding = millis(began);
    let began = Instant::now();
    let all = diff(picture.desired(), &Observed::default(), Prune::Yes);
    let to_empty = millis(began);
    assert_eq!(all.len(), usize::try_from(size).unwrap() * 3 + 4);
    let observed: Observed = all.iter().map(|op| op.object().clone()).collect();
    let memory = rss() - before;
    let began = Instant::now();
    assert_eq!(diff(picture.desired(), &observed, Prune::Yes), []);
    let to_same = millis(began);
    println!("\n| the pure core, {size} leases, vxlan: {} objects | |\n|---|--:|", all.len());
    println!("| read keys and values | {reading:.1} ms |\n| fold all leases | {folding:.1} ms |");
    println!("| compare with an empty kernel | {to_empty:.1} ms |\n| compare with a kernel that has all | {to_same:.1} ms |");
    println!("| memory of leases, picture, kernel and operations | {memory:.0} MB |");
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Resident memory of this process, in MB.
fn rss() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}
