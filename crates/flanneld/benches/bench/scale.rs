//! What a number of leases costs: the start, one more, a restart, memory, and time that passes.

use std::path::Path;
use std::time::{Duration, Instant};

use flannel::object::{Link, LinkKind, Object};
use flannel::scope::Scope;
use flannel::{Family, Lease, Op};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{Kernel, link};
use lab::{Lab, shell};
use serde_json::{Value, json};

use crate::{NETWORK, NETWORK6, host, latencies, lease, many_neighbours, millis, name, objects, percentile, routes, rss, used, with_kv};

/// How long another flanneld may take to start.
const PEER_PATIENCE: Duration = Duration::from_secs(60);
/// Leases that are put one by one.
const SINGLES: usize = 300;

pub(crate) const HEADER: &str =
    "| backend | leases | start ms | raw ms | list ms | start / (raw + list) | put p50 ms | p99 ms | raw p50 ms | restart ms | written | read all ms | RSS MB | idle CPU s/min |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|";

/// What was measured of one backend and size. Times in ms.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) backend: String,
    pub(crate) leases: usize,
    pub(crate) start: f64,
    pub(crate) raw_start: f64,
    /// One list of all leases by a client that does nothing with it: the store's transfer.
    list: f64,
    put: (f64, f64),
    raw_put: f64,
    restart: f64,
    /// Notifications of objects that a restart wrote although all was right.
    written: usize,
    /// All of ours read from the kernel once, which is the larger part of an audit.
    read_all: f64,
    rss: f64,
    /// Processor seconds a minute, audits included.
    idle: Option<f64>,
}

impl Row {
    pub(crate) fn line(&self) -> String {
        let idle = self.idle.map_or("-".to_owned(), |idle| format!("{idle:.3}"));
        format!(
            "| {} | {} | {:.1} | {:.1} | {:.1} | {:.2} | {:.3} | {:.3} | {:.3} | {:.1} | {} | {:.1} | {:.1} | {idle} |",
            self.backend,
            self.leases,
            self.start,
            self.raw_start,
            self.list,
            self.start / (self.raw_start + self.list),
            self.put.0,
            self.put.1,
            self.raw_put,
            self.restart,
            self.written,
            self.read_all,
            self.rss
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "backend": self.backend, "leases": self.leases, "start_ms": self.start, "raw_start_ms": self.raw_start, "list_ms": self.list, "read_all_ms": self.read_all,
            "put_p50_ms": self.put.0, "put_p99_ms": self.put.1, "raw_put_p50_ms": self.raw_put, "restart_ms": self.restart,
            "restart_writes": self.written, "rss_mb": self.rss, "idle_cpu_s_per_min": self.idle,
        })
    }
}

/// Measures one backend at one size.
pub(crate) fn measure(root: &Path, backend: &str, dual: bool, size: usize, with_idle: bool) -> Row {
    // The kernel takes down the namespaces of the lab before in its own time, and holds the rtnl lock for it.
    std::thread::sleep(Duration::from_secs(3));
    let leases: Vec<Lease> = (1..=size).map(|i| lease(i, backend, dual)).collect();
    let mut lab = host(root, backend, dual, &leases);
    let start = ready(&mut lab);
    assert_eq!(routes(&lab), size);
    let singles = size + 1..size + 1 + SINGLES;
    let mut put = latencies(&lab, singles.clone().map(|i| lease(i, backend, dual)).collect());
    let (raw_start, raw_put) = raw(backend, dual, size, singles);
    let idle = with_idle.then(|| {
        let (before, time) = (used(&lab), Duration::from_secs(121));
        std::thread::sleep(time);
        (used(&lab) - before) * 60.0 / time.as_secs_f64()
    });
    // What a long list left half used is given back after a moment.
    std::thread::sleep(Duration::from_secs(1));
    let memory = rss(&lab);
    let (list, read_all) = (median(|| list(&lab)), median(|| read_all(&lab, backend, dual)));
    // Everything is right already.
    lab.stop_daemon(0, true).unwrap();
    let mut news = lab.hosts[0].netns.run(|| Socket::open(Protocol::Route)).unwrap().unwrap();
    // RTNLGRP_NEIGH, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE
    [3, 5, 7, 9, 11].into_iter().for_each(|group| news.join(group).unwrap());
    let restart = ready(&mut lab);
    let mut written = 0;
    // What the traffic of the store makes of the table of neighbours is the kernel's own, and comes from no port.
    while news.notifications(false, |message| written += usize::from(message.port != 0)).is_ok() {}
    let family = if dual { ", dual stack" } else { "" };
    Row {
        backend: format!("{backend}{family}"),
        leases: size,
        start,
        raw_start,
        list,
        put: (percentile(&mut put, 0.5), percentile(&mut put, 0.99)),
        raw_put,
        restart,
        written,
        read_all,
        rss: memory,
        idle,
    }
}

/// Another flanneld at the sizes that it is known to reach within minutes: printed, and as JSON.
pub(crate) fn peers(root: &Path, program: &Path, sizes: &[usize]) -> Vec<Value> {
    println!("\n| {} | leases | start ms | put p50 ms | RSS MB |\n|---|--:|--:|--:|--:|", program.display());
    let mut rows = Vec::new();
    for (backend, size) in ["host-gw", "vxlan"].iter().flat_map(|backend| sizes.iter().map(move |size| (*backend, *size))) {
        std::thread::sleep(Duration::from_secs(3));
        let leases: Vec<Lease> = (1..=size).map(|i| lease(i, backend, false)).collect();
        let mut lab = host(&root.join(format!("peer-{backend}-{size}")), backend, false, &leases);
        lab.set_program(program);
        let began = Instant::now();
        lab.start_daemon(0, &[]).unwrap();
        let count = || {
            let there = shell(&lab.hosts[0].netns, "ip route | grep -c '^100.*via' || true").unwrap();
            there.trim().parse::<usize>().unwrap()
        };
        while count() < size && began.elapsed() < PEER_PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        let start = millis(began.elapsed());
        if count() < size {
            println!("| {backend} | {size} | not after {:.0}: {} routes | | |", millis(PEER_PATIENCE), count());
            rows.push(json!({ "backend": backend, "leases": size, "start_ms": null, "waited_ms": millis(PEER_PATIENCE) }));
            continue;
        }
        let mut put = latencies(&lab, (size + 1..size + 51).map(|i| lease(i, backend, false)).collect());
        let (put, rss) = (percentile(&mut put, 0.5), rss(&lab));
        println!("| {backend} | {size} | {start:.0} | {put:.2} | {rss:.1} |");
        rows.push(json!({ "backend": backend, "leases": size, "start_ms": start, "put_p50_ms": put, "rss_mb": rss }));
    }
    rows
}

fn median(mut measure: impl FnMut() -> Duration) -> f64 {
    let mut times: Vec<Duration> = (0..5).map(|_| measure()).collect();
    percentile(&mut times, 0.5)
}

/// One list of all leases.
fn list(lab: &Lab) -> Duration {
    let prefix = b"/coreos.com/network/subnets/".to_vec();
    let range_end = b"/coreos.com/network/subnets0".to_vec();
    with_kv(lab, async |kv| {
        let mut kv = kv.max_decoding_message_size(usize::MAX);
        let request = daemon::etcd::RangeRequest { key: prefix, range_end, ..Default::default() };
        let began = Instant::now();
        kv.range(request).await.unwrap();
        began.elapsed()
    })
}

/// Reads all of the daemon's.
fn read_all(lab: &Lab, backend: &str, dual: bool) -> Duration {
    let networks = [NETWORK].into_iter().chain(dual.then_some(NETWORK6)).map(|network| network.parse().unwrap()).collect();
    let devices = ["flannel.1"].into_iter().chain(dual.then_some("flannel-v6.1")).filter(|_| backend != "host-gw");
    let rulesets = if dual { Family::ALL.into() } else { vec![Family::V4] };
    let scope = Scope { networks, links: devices.map(name).collect(), rulesets, ..Scope::default() };
    let work = || {
        let mut kernel = Kernel::open().unwrap();
        let began = Instant::now();
        let observed = kernel.observe(&scope).unwrap();
        let took = began.elapsed();
        assert!(!observed.is_empty());
        took
    };
    lab.hosts[0].netns.run(work).unwrap()
}

/// From the start of the process until it is ready, which is when all leases of the list are in the kernel.
fn ready(lab: &mut Lab) -> f64 {
    let began = Instant::now();
    lab.start_daemon(0, &[]).unwrap();
    while !lab.hosts[0].get("/readyz").is_ok_and(|(status, _)| status == 200) {
        std::thread::sleep(Duration::from_millis(1));
    }
    millis(began.elapsed())
}

/// Writes objects of `size` leases to a fresh namespace by one call, and each of `singles` by one; returns the time of the
/// whole and the median of the single ones.
fn raw(backend: &str, dual: bool, size: usize, singles: std::ops::Range<usize>) -> (f64, f64) {
    let work = || {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let end = |text| link::VethEnd { name: name(text), mac: None, netns: None };
        link::create_veth(&mut socket, 0, end("eth0"), end("wire")).unwrap();
        for text in ["eth0", "wire"] {
            let index = link::get(&mut socket, name(text)).unwrap().unwrap().index;
            link::set_up(&mut socket, index, true).unwrap();
        }
        many_neighbours();
        let mut kernel = Kernel::open().unwrap();
        let families: &[Family] = if dual { &Family::ALL } else { &[Family::V4] };
        for family in families.iter().filter(|_| backend == "vxlan") {
            let (device, local) = match family {
                Family::V4 => ("flannel.1", "172.20.0.1"),
                Family::V6 => ("flannel-v6.1", "fd00:10::1"),
            };
            let kind = LinkKind::Vxlan {
                vni: flannel::Vni::new(1).unwrap(),
                port: 8472,
                local: local.parse().unwrap(),
                lower: name("eth0"),
                gbp: false,
                learning: false,
            };
            let device = Link { name: name(device), kind, mac: flannel::Mac([2, 9, 9, 9, 9, 9]), mtu: 1430, up: true };
            kernel.apply(&[Op::Set(Object::Link(Box::new(device)))]).remove(0).unwrap();
        }
        // In the daemon's order: by kind, then by address.
        let mut ops: Vec<Op> = (1..=size).flat_map(|i| objects(i, backend, dual)).map(Op::Set).collect();
        ops.sort_by_key(|op| op.object().key());
        let began = Instant::now();
        let outcomes = kernel.apply(&ops);
        let whole = began.elapsed();
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
        let mut each: Vec<Duration> = singles
            .map(|i| {
                let ops: Vec<Op> = objects(i, backend, dual).into_iter().map(Op::Set).collect();
                let began = Instant::now();
                assert!(kernel.apply(&ops).iter().all(Result::is_ok));
                began.elapsed()
            })
            .collect();
        (millis(whole), percentile(&mut each, 0.5))
    };
    Netns::create().unwrap().run(work).unwrap()
}
