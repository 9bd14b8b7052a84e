//! What tests of whole clusters share.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use flannel::scope::Scope;
use flannel::{Family, Object, Observed};
use kernel::Kernel;
use kernel::netns::Netns;
use lab::ping::{self, ping_all};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_flanneld");

/// Waits for a condition; a failure names it.
#[track_caller]
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Pings a target each millisecond while `f` runs; returns how many requests were sent and how many lost.
pub(crate) fn ping_during(from: &Netns, to: IpAddr, f: impl FnOnce()) -> (usize, usize) {
    ping::ping_during(from, to, f).unwrap()
}

/// Flannel's objects in a host's kernel.
pub(crate) fn observe(netns: &Netns) -> Observed {
    let scope = Scope {
        links: vec!["flannel.1".parse().unwrap()],
        rulesets: vec![Family::V4],
        networks: vec!["10.244.0.0/16".parse().unwrap(), "10.0.0.0/8".parse().unwrap()],
        ..Scope::default()
    };
    netns.run(|| Kernel::open().unwrap().observe(&scope).unwrap()).unwrap()
}

pub(crate) fn routes(observed: &Observed) -> BTreeSet<String> {
    observed.iter().filter_map(|(_, object)| if let Object::Route(route) = object { Some(route.dst.to_string()) } else { None }).collect()
}

#[track_caller]
pub(crate) fn ping_all_from(netns: &Netns, targets: &[IpAddr]) {
    let answered = netns.run(|| ping_all(targets, Duration::from_secs(5))).unwrap().unwrap();
    assert_eq!(answered.len(), targets.len(), "{answered:?}");
}
