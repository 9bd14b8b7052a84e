//! `cargo xtask bench`: what things cost, each beside the kernel's own cost of the same objects in the same run, because
//! machines differ and are noisy. `-- quick` leaves out the large sizes.

#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report an error to")]

#[path = "bench/kube.rs"]
mod kubernetes;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flannel::desired::{Fdb, Key, Neigh, Object, ROUTE_PROTOCOL, Route, Scope, route_metric};
use flannel::{Lease, LeaseKey, Mac, Op, Peer, PerFamily, Subnet};
use flanneld::etcd::request_op::Request;
use flanneld::etcd::{PutRequest, RequestOp, TxnRequest, kv_client::KvClient};
use flanneld::lab::{Lab, Plan, STORE, isolate};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use kernel::{Kernel, addr, link, route};
use serde_json::json;

const PROGRAM: &str = env!("CARGO_BIN_EXE_flanneld");
const NETWORK: &str = "100.64.0.0/10";

fn main() {
    let quick = std::env::args().any(|arg| arg == "quick");
    if std::env::args().any(|arg| arg == "kubernetes") {
        let scratch = isolate(Path::new(PROGRAM)).unwrap();
        return kubernetes(&scratch, quick);
    }
    let plugin = plugin();
    let scratch = isolate(Path::new(PROGRAM)).unwrap();
    println!(
        "kernel {}, {} processors, release build",
        std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim(),
        std::thread::available_parallelism().unwrap()
    );
    println!(
        "store: embedded, its file on a tmpfs. Times in ms unless said otherwise; raw: the same objects by netlink from this process.\n"
    );
    cni(&scratch.join("cni"), &plugin);
    let sizes: &[usize] = if quick { &[1_000] } else { &[1_000, 5_000, 10_000] };
    println!(
        "\n{:<9}{:>7} | {:>9}{:>9}{:>7} | {:>9}{:>9}{:>9} | {:>8}{:>14}",
        "backend", "leases", "start", "raw", "ratio", "put p50", "put p99", "raw p50", "RSS MB", "idle CPU s/min"
    );
    small(&scratch.join("small"));
    for backend in ["host-gw", "vxlan"] {
        for size in sizes {
            scale(&scratch.join(format!("{backend}-{size}")), backend, *size, quick);
        }
    }
    kubernetes(&scratch, quick);
}

fn kubernetes(scratch: &Path, quick: bool) {
    let (size, minutes) = if quick { (500, 0.2) } else { (5_000, 1.0) };
    kubernetes::run(&scratch.join("kubernetes"), size, minutes);
}

/// The plugin as it is installed, statically linked.
fn plugin() -> PathBuf {
    std::env::var_os("FLANNEL_CNI").map(PathBuf::from).expect("FLANNEL_CNI names no program: run this by `cargo xtask bench`")
}

fn name(text: &str) -> flannel::IfName {
    text.parse().unwrap()
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The value below which this share of the samples lies.
fn percentile(samples: &mut [Duration], share: f64) -> f64 {
    samples.sort();
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a short list")]
    let at = ((samples.len() - 1) as f64 * share).round() as usize;
    millis(samples[at])
}

fn lab(root: &Path, hosts: usize, backend: &str) -> Lab {
    let program = Path::new(PROGRAM);
    let config = json!({ "Network": NETWORK, "SubnetLen": 24, "EnableNFTables": true, "Backend": { "Type": backend } });
    let plan = Plan { config, plugin: plugin(), ..Plan::new(hosts, &json!({ "Type": backend }), program) };
    Lab::wire(plan, root).unwrap()
}

/// A host with its daemon, and 10,000 on-link gateways to be.
fn host(root: &Path, backend: &str, leases: &[Lease]) -> Lab {
    let mut lab = lab(root, 1, backend);
    lab.hosts[0].netns.run(many_neighbours).unwrap();
    // Behind all leases that are to be put.
    std::fs::write(lab.hosts[0].subnet_file(), "FLANNEL_SUBNET=100.127.0.1/24\n").unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    for part in leases.chunks(1_000) {
        put(&lab, part);
    }
    lab
}

fn many_neighbours() {
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let eth0 = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
    addr::add(&mut socket, eth0, "172.20.0.1/16".parse().unwrap()).unwrap();
}

fn lease(i: usize, backend: &str) -> Lease {
    let number = u32::try_from(i).unwrap();
    let subnet = Subnet::new(IpAddr::V4(Ipv4Addr::from_bits(0x6440_0000 + (number << 8))), 24).unwrap();
    let public = PerFamily { v4: Some(IpAddr::V4(Ipv4Addr::from_bits(0xac14_0000 + 10 + number))), v6: None };
    let mac = mac(number);
    let data = (backend == "vxlan").then(|| format!("{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}").into());
    let key = LeaseKey::new(PerFamily { v4: Some(subnet), v6: None }).unwrap();
    Lease { key, peer: Peer { public, backend_type: backend.into(), backend_data: PerFamily { v4: data, v6: None } } }
}

fn mac(number: u32) -> Mac {
    let [_, a, b, c] = number.to_be_bytes();
    Mac([2, 0, 0, a, b, c])
}

/// The objects of a lease, as the daemon makes them: what `raw` writes.
fn objects(i: usize, backend: &str) -> Vec<Object> {
    let lease = lease(i, backend);
    let (dst, host) = (lease.key.subnets().v4.unwrap(), lease.peer.public.v4.unwrap());
    let metric = route_metric(NETWORK.parse().unwrap(), dst);
    if backend == "host-gw" {
        return vec![Object::Route(Route { dst, metric, via: Some(host), dev: name("eth0"), onlink: false, protocol: ROUTE_PROTOCOL })];
    }
    let (link, mac) = (name("flannel.1"), mac(u32::try_from(i).unwrap()));
    vec![
        Object::Neigh(Neigh { link, ip: dst.network(), mac }),
        Object::Fdb(Fdb { link, mac, dst: host }),
        Object::Route(Route { dst, metric, via: Some(dst.network()), dev: link, onlink: true, protocol: ROUTE_PROTOCOL }),
    ]
}

fn put(lab: &Lab, leases: &[Lease]) {
    let op = |lease: &Lease| {
        let key = format!("/coreos.com/network/subnets/{}", flannel::wire::key(&lease.key)).into_bytes();
        RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key,
                value: flannel::wire::value(&lease.peer).into_bytes(),
                ..PutRequest::default()
            })),
        }
    };
    let request = TxnRequest { success: leases.iter().map(op).collect(), ..TxnRequest::default() };
    lab.middle
        .run(|| {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let channel = tonic::transport::Endpoint::from_shared(format!("http://{STORE}")).unwrap().connect().await.unwrap();
                KvClient::new(channel).txn(request).await.unwrap();
            });
        })
        .unwrap();
}

/// Writes objects of `leases` to a fresh namespace by one call, and each of `singles` by one; returns the time of the
/// whole and the median of the single ones.
fn raw(backend: &str, size: usize, singles: std::ops::Range<usize>) -> (f64, f64) {
    let netns = Netns::create().unwrap();
    netns
        .run(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let end = |text| link::VethEnd { name: name(text), mac: None, netns: None };
            link::create_veth(&mut socket, 0, end("eth0"), end("wire")).unwrap();
            for text in ["eth0", "wire"] {
                let index = link::get(&mut socket, name(text)).unwrap().unwrap().index;
                link::set_up(&mut socket, index, true).unwrap();
            }
            many_neighbours();
            let mut kernel = Kernel::open().unwrap();
            if backend == "vxlan" {
                let kind = flannel::desired::LinkKind::Vxlan {
                    vni: flannel::Vni::new(1).unwrap(),
                    port: 8472,
                    local: "172.20.0.1".parse().unwrap(),
                    lower: name("eth0"),
                    gbp: false,
                    learning: false,
                };
                let device = flannel::desired::Link { name: name("flannel.1"), kind, mac: mac(9), mtu: 1450, up: true };
                kernel.apply(&[Op::Set(Object::Link(Box::new(device)))]).remove(0).unwrap();
            }
            // In the daemon's order: by kind, then by address.
            let mut ops: Vec<Op> = (1..=size).flat_map(|i| objects(i, backend)).map(Op::Set).collect();
            ops.sort_by_key(|op| op.object().key());
            let began = Instant::now();
            let outcomes = kernel.apply(&ops);
            let whole = began.elapsed();
            assert!(outcomes.iter().all(Result::is_ok));
            let mut each: Vec<Duration> = singles
                .map(|i| {
                    let ops: Vec<Op> = objects(i, backend).into_iter().map(Op::Set).collect();
                    let began = Instant::now();
                    assert!(kernel.apply(&ops).iter().all(Result::is_ok));
                    began.elapsed()
                })
                .collect();
            (millis(whole), percentile(&mut each, 0.5))
        })
        .unwrap()
}

fn scale(root: &Path, backend: &str, size: usize, quick: bool) {
    // The kernel takes down the namespaces of the lab before in its own time, and holds the rtnl lock for it.
    std::thread::sleep(Duration::from_secs(2));
    let leases: Vec<Lease> = (1..=size).map(|i| lease(i, backend)).collect();
    let mut lab = host(root, backend, &leases);
    // From the start of the process until it is ready, which is when all leases of the list are in the kernel.
    let began = Instant::now();
    lab.start_daemon(0, &[]).unwrap();
    while !lab.hosts[0].get("/readyz").is_ok_and(|(status, _)| status == 200) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = millis(began.elapsed());
    let scope = Scope { networks: vec![NETWORK.parse().unwrap()], ..Scope::default() };
    let programmed = lab.hosts[0]
        .netns
        .run(|| Kernel::open().unwrap().observe(&scope).unwrap().iter().filter(|(key, _)| matches!(key, Key::Route(..))).count())
        .unwrap();
    assert_eq!(programmed, size);

    let singles = size + 1..size + 301;
    let mut latencies = latencies(&lab, singles.clone().map(|i| lease(i, backend)).collect());
    let (raw_start, raw_put) = raw(backend, size, singles);
    let idle = if quick { None } else { Some(idle(&lab, Duration::from_secs(61))) };
    let idle = idle.map_or("-".to_owned(), |seconds| format!("{seconds:.3}"));
    println!(
        "{backend:<9}{size:>7} | {start:>9.1}{raw_start:>9.1}{:>7.2} | {:>9.3}{:>9.3}{raw_put:>9.3} | {:>8.1}{idle:>14}",
        start / raw_start,
        percentile(&mut latencies, 0.5),
        percentile(&mut latencies, 0.99),
        rss(&lab),
    );
}

/// For each lease the time from before its put until the kernel announces its route.
fn latencies(lab: &Lab, leases: Vec<Lease>) -> Vec<Duration> {
    const RTNLGRP_IPV4_ROUTE: u32 = 7;
    const RTM_NEWROUTE: u16 = 24;
    let mut news = lab.hosts[0].netns.run(|| Socket::open(Protocol::Route)).unwrap().unwrap();
    news.join(RTNLGRP_IPV4_ROUTE).unwrap();
    lab.middle
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let store =
                runtime.block_on(async { flanneld::store::Etcd::plain(&format!("http://{STORE}"), "/coreos.com/network").unwrap() });
            let mut all = Vec::new();
            for lease in leases {
                let dst = lease.key.subnets().v4.unwrap();
                let began = Instant::now();
                assert!(runtime.block_on(store.put_lease(&lease, 0, 0)).unwrap());
                let mut seen = false;
                while !seen {
                    news.notifications(true, |message| {
                        seen |= message.kind == RTM_NEWROUTE && route::decode(message.body).is_some_and(|route| route.dst == dst)
                    })
                    .unwrap();
                }
                all.push(began.elapsed());
            }
            all
        })
        .unwrap()
}

/// Two hosts: the smallest cluster.
fn small(root: &Path) {
    let mut lab = lab(root, 2, "vxlan");
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let began = Instant::now();
    lab.start_daemon(0, &[]).unwrap();
    while !std::fs::read_to_string(lab.hosts[0].subnet_file()).is_ok_and(|text| text.contains("FLANNEL_MTU")) {
        std::thread::sleep(Duration::from_micros(200));
    }
    let file = millis(began.elapsed());
    lab.start_daemon(1, &[]).unwrap();
    lab.settle().unwrap();
    println!(
        "{:<9}{:>7} | {file:>9.1}{:>9}{:>7} | {:>9}{:>9}{:>9} | {:>8.1}{:>14}   (start: to subnet.env, empty store)",
        "vxlan",
        2,
        "-",
        "-",
        "-",
        "-",
        "-",
        rss(&lab),
        "-"
    );
}

/// Resident memory of the first host's daemon, in MB.
fn rss(lab: &Lab) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", lab.hosts[0].pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Processor time of the first host's daemon over this time, in seconds a minute.
fn idle(lab: &Lab, time: Duration) -> f64 {
    let before = used(lab);
    std::thread::sleep(time);
    (used(lab) - before) * 60.0 / time.as_secs_f64()
}

/// Processor time of the first host's daemon so far, in seconds.
fn used(lab: &Lab) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", lab.hosts[0].pid().unwrap())).unwrap();
    let of = |path: PathBuf| std::fs::read_to_string(path.join("schedstat")).unwrap().split(' ').next().unwrap().parse::<f64>().unwrap();
    threads.map(|thread| of(thread.unwrap().path())).sum::<f64>() / 1e9
}

fn cni(root: &Path, plugin: &Path) {
    let mut lab = lab(root, 1, "host-gw");
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.settle().unwrap();
    let pods: Vec<(String, PathBuf, Netns)> = (0..200)
        .map(|i| {
            let (id, netns) = (format!("p{i}"), Netns::create().unwrap());
            let path = root.join("netns").join(&id);
            netns.bind(&path).unwrap();
            (id, path, netns)
        })
        .collect();
    let call = |verb: &str, (id, path, _): &(String, PathBuf, Netns)| {
        let began = Instant::now();
        lab.cni(0, "flannel", verb, id, path, "eth0").unwrap();
        began.elapsed()
    };
    // The bridge exists after the first.
    call("ADD", &pods[0]);
    call("DEL", &pods[0]);
    let mut add: Vec<Duration> = pods[..100].iter().map(|pod| call("ADD", pod)).collect();
    let mut del: Vec<Duration> = pods[..100].iter().map(|pod| call("DEL", pod)).collect();
    let parallel = |verb: &str| {
        let (next, began) = (AtomicUsize::new(0), Instant::now());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                        call(verb, pod);
                    }
                });
            }
        });
        200.0 / began.elapsed().as_secs_f64()
    };
    let (adds, dels) = (parallel("ADD"), parallel("DEL"));

    // The kernel's own cost: the same links, addresses and routes, in this process.
    let host = &lab.hosts[0].netns;
    let mut raw_add = Vec::new();
    let mut raw_del = Vec::new();
    for (i, (_, _, pod)) in pods[..100].iter().enumerate() {
        let began = Instant::now();
        host.run(|| raw_pod(i, pod)).unwrap();
        raw_add.push(began.elapsed());
    }
    for (_, _, pod) in &pods[..100] {
        let began = Instant::now();
        pod.run(|| link::delete(&mut Socket::open(Protocol::Route).unwrap(), name("eth0")).unwrap()).unwrap();
        raw_del.push(began.elapsed());
    }
    // What it costs to start a program that does nothing: this one, asked for its version.
    let mut exec: Vec<Duration> = (0..100)
        .map(|_| {
            let began = Instant::now();
            Command::new(plugin).arg("bridge").env("CNI_COMMAND", "VERSION").output().unwrap();
            began.elapsed()
        })
        .collect();

    println!("{:<24}{:>9}{:>9}{:>10}{:>10}{:>8}", "CNI, 100 one by one", "p50", "p95", "raw p50", "raw p95", "ratio");
    for (verb, ours, raw) in [("ADD", &mut add, &mut raw_add), ("DEL", &mut del, &mut raw_del)] {
        let (p50, raw50) = (percentile(ours, 0.5), percentile(raw, 0.5));
        println!("{verb:<24}{p50:>9.2}{:>9.2}{raw50:>10.2}{:>10.2}{:>8.2}", percentile(ours, 0.95), percentile(raw, 0.95), p50 / raw50);
    }
    println!("{:<24}{:>9.2}{:>9.2}", "start of the program", percentile(&mut exec, 0.5), percentile(&mut exec, 0.95));
    println!("{:<24}{adds:>9.0} ADD/s {dels:>9.0} DEL/s", "CNI, 200, 8 in parallel");
    for (_, path, _) in &pods {
        netns::unbind(path).unwrap();
    }
}

fn raw_pod(i: usize, pod: &Netns) {
    use std::os::fd::AsFd;
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let veth = name(&format!("raw{i}"));
    let (this, peer) =
        (link::VethEnd { name: veth, mac: None, netns: None }, link::VethEnd { name: name("eth0"), mac: None, netns: Some(pod.as_fd()) });
    link::create_veth(&mut socket, 1500, this, peer).unwrap();
    let bridge = link::get(&mut socket, name("cni0")).unwrap().unwrap().index;
    let index = link::get(&mut socket, veth).unwrap().unwrap().index;
    link::enslave(&mut socket, index, bridge, link::PortConfig::default()).unwrap();
    pod.run(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let eth0 = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
        addr::add(&mut socket, eth0, format!("198.18.0.{}/24", i + 2).parse().unwrap()).unwrap();
        link::set_up(&mut socket, eth0, true).unwrap();
        for dst in ["0.0.0.0/0", NETWORK] {
            route::add(&mut socket, dst.parse().unwrap(), Some("198.18.0.1".parse().unwrap()), eth0).unwrap();
        }
    })
    .unwrap();
}
