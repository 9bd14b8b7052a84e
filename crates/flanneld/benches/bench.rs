//! `cargo xtask bench`: what things cost, each beside the kernel's own cost of the same objects in the same run, because
//! machines differ and are noisy. `-- quick` leaves out the large sizes, `-- etcd` Kubernetes, and `-- kubernetes` and `-- pods` all else;
//! `-- 10000` measures the daemon with so many leases alone; `-- idle` adds the idle minutes. `PEER_FLANNELD` names another flanneld
//! to measure beside ours, `PEER_CNI_DIR` a folder with other plugins `bridge` and `host-local`, and `flannel` where it can be had.

#![expect(clippy::unwrap_used, reason = "a benchmark ends with its first error")]

#[path = "bench/kube.rs"]
mod kubernetes;
#[path = "bench/plot.rs"]
mod plot;
#[path = "bench/pods.rs"]
mod pods;
#[path = "bench/scale.rs"]
mod scale;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use daemon::etcd::request_op::Request;
use daemon::etcd::{PutRequest, RequestOp, TxnRequest, kv_client::KvClient};
use flannel::object::{Fdb, Key, Neigh, Object, ROUTE_PROTOCOL, Route, route_metric};
use flannel::scope::Scope;
use flannel::{Family, Lease, LeaseKey, Mac, Peer, PerFamily, Subnet};
use kernel::netlink::{Protocol, Socket};
use kernel::{Kernel, addr, link, route};
use lab::{Lab, Plan, STORE, isolate};
use serde_json::json;

const PROGRAM: &str = env!("CARGO_BIN_EXE_flanneld");
/// 32,768 subnets of [`SUBNET_LEN`].
const NETWORK: &str = "100.64.0.0/10";
const SUBNET_LEN: u8 = 25;
const NETWORK6: &str = "fd00:244::/48";

fn main() {
    let quick = std::env::args().any(|arg| arg == "quick");
    if std::env::args().any(|arg| arg == "kubernetes") {
        let scratch = isolate(Path::new(PROGRAM)).unwrap();
        return kubernetes(&scratch, quick);
    }
    let only: Option<usize> = std::env::args().find_map(|arg| arg.parse().ok());
    let plugin = only.is_none().then(plugin);
    let scratch = isolate(Path::new(PROGRAM)).unwrap();
    println!(
        "kernel {}, {} processors, release build",
        std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim(),
        std::thread::available_parallelism().unwrap()
    );
    println!(
        "store: embedded, its file on a tmpfs. Times in ms unless said otherwise; raw: the same objects by netlink from this process.\n"
    );
    if let Some(plugin) = plugin {
        pods::run(&scratch.join("cni"), &plugin);
        if std::env::args().any(|arg| arg == "pods") {
            return;
        }
        small(&scratch.join("small"));
    }
    let all: &[usize] = if quick { &[100, 1_000] } else { &[100, 1_000, 5_000, 10_000, 20_000] };
    let sizes = only.as_ref().map_or(all, std::slice::from_ref);
    println!("\n{}", scale::HEADER);
    let mut rows = Vec::new();
    for (backend, dual) in [("host-gw", false), ("vxlan", false), ("vxlan+DirectRouting", false), ("host-gw", true), ("vxlan", true)] {
        for size in sizes {
            // Two minutes each, so only where the target is.
            let with_idle = std::env::args().any(|arg| arg == "idle") && !dual && *size == 10_000 && backend != "vxlan+DirectRouting";
            let row = scale::measure(&scratch.join(format!("{backend}-{dual}-{size}")), backend, dual, *size, with_idle);
            println!("{}", row.line());
            rows.push(row);
        }
    }
    let peers = std::env::var_os("PEER_FLANNELD").map_or_else(Vec::new, |program| scale::peers(&scratch, Path::new(&program), sizes));
    if only.is_some() {
        return;
    }
    bursts(&scratch, if quick { 200 } else { 1_000 });
    if let Some(folder) = std::env::var_os("FLANNEL_BENCH_OUT") {
        plot::write(Path::new(&folder), &rows, &peers);
    }
    if !std::env::args().any(|arg| arg == "etcd") {
        kubernetes(&scratch, quick);
    }
}

/// Many changes at once: how long until the kernel has them all.
fn bursts(scratch: &Path, size: usize) {
    println!("\n| {size} leases at once, vxlan | until all routes are there, or gone, ms |\n|---|--:|");
    let leases: Vec<Lease> = (1..=size).map(|i| lease(i, "vxlan", false)).collect();
    let mut lab = host(&scratch.join("bursts"), "vxlan", false, &[]);
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
    let until = |lab: &Lab, wanted: usize, began: Instant| {
        while routes(lab) != wanted {
            assert!(began.elapsed() < Duration::from_secs(60), "{wanted} routes are not reached");
            std::thread::sleep(Duration::from_millis(1));
        }
        millis(began.elapsed())
    };
    let began = Instant::now();
    put(&lab, &leases);
    println!("| put in one transaction | {:.1} |", until(&lab, size, began));
    let remove = |lab: &Lab| {
        let began = Instant::now();
        let key = b"/coreos.com/network/subnets/100.64.".to_vec();
        let range_end = b"/coreos.com/network/subnets/100.66.".to_vec();
        let request = daemon::etcd::DeleteRangeRequest { key, range_end, ..Default::default() };
        with_kv(lab, async |mut kv| drop(kv.delete_range(request.clone()).await.unwrap()));
        began
    };
    let began = remove(&lab);
    println!("| deleted in one request | {:.1} |", until(&lab, 0, began));
    // One etcd lease on all of them ends, as those of a rack that lost its power would.
    let began = lab
        .with_store(async |store| {
            let id = store.grant(Duration::from_secs(3600)).await?;
            for lease in &leases {
                store.put_lease(lease, id, 0).await?;
            }
            Ok::<_, daemon::store::EtcdError>(id)
        })
        .map(|id| {
            until(&lab, size, Instant::now());
            let began = Instant::now();
            let end = async |store: &daemon::store::Etcd| {
                store.revoke(id).await;
                Ok::<_, daemon::store::EtcdError>(())
            };
            lab.with_store(end).unwrap();
            began
        })
        .unwrap();
    println!("| expired at once | {:.1} |", until(&lab, 0, began));
    let began = Instant::now();
    lab.with_store(async |store| {
        let mut all = tokio::task::JoinSet::new();
        for lease in leases.clone() {
            let store = store.clone();
            all.spawn(async move { store.put_lease(&lease, 0, 0).await.unwrap() });
        }
        all.join_all().await;
        Ok::<_, daemon::store::EtcdError>(())
    })
    .unwrap();
    println!("| put one by one, all at the same time | {:.1} |", until(&lab, size, began));
}

/// Routes of ours in the first host.
fn routes(lab: &Lab) -> usize {
    let scope = Scope { networks: vec![NETWORK.parse().unwrap()], ..Scope::default() };
    let observe = || Kernel::open().unwrap().observe(&scope).unwrap();
    lab.hosts[0].netns.run(observe).unwrap().iter().filter(|(key, _)| matches!(key, Key::Route(..))).count()
}

/// Runs a function with a connection to the store.
fn with_kv<T>(lab: &Lab, f: impl AsyncFnOnce(KvClient<tonic::transport::Channel>) -> T) -> T {
    let run = || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{STORE}")).unwrap().connect().await.unwrap();
            f(KvClient::new(channel)).await
        })
    };
    lab.middle.run(run).unwrap()
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

fn lab(root: &Path, hosts: usize, backend: &str, dual: bool, subnet_len: u8) -> Lab {
    let program = Path::new(PROGRAM);
    let direct = backend.ends_with("DirectRouting");
    let backend = json!({ "Type": backend.trim_end_matches("+DirectRouting"), "DirectRouting": direct });
    let config = json!({ "Network": NETWORK, "SubnetLen": subnet_len, "EnableNFTables": true, "Backend": backend });
    let mut plan = Plan { config, plugin: plugin(), ..Plan::new(hosts, &backend, program) };
    if dual {
        plan = plan.family(lab::PodFamily::Dual);
    }
    Lab::wire(plan, root).unwrap()
}

/// A host without its daemon, and as many on-link gateways to be.
fn host(root: &Path, backend: &str, dual: bool, leases: &[Lease]) -> Lab {
    let mut lab = lab(root, 1, backend, dual, SUBNET_LEN);
    lab.hosts[0].netns.run(many_neighbours).unwrap();
    // Behind all leases that are to be put.
    let own6 = if dual { "FLANNEL_IPV6_SUBNET=fd00:244:0:ffff::1/64\n" } else { "" };
    std::fs::write(lab.hosts[0].subnet_file(), format!("FLANNEL_SUBNET=100.127.0.1/25\n{own6}")).unwrap();
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
    // There may be no IPv6 in this namespace, or the address already.
    let _ = addr::add(&mut socket, eth0, "fd00:10::1/48".parse().unwrap());
}

fn lease(i: usize, backend: &str, dual: bool) -> Lease {
    let number = u32::try_from(i).unwrap();
    let v4 = Subnet::new(IpAddr::V4(Ipv4Addr::from_bits(0x6440_0000 + (number << (32 - SUBNET_LEN)))), SUBNET_LEN).ok();
    let v6 = dual.then(|| format!("fd00:244:0:{number:x}::/64").parse().unwrap());
    let public6 = dual.then(|| format!("fd00:10:0:1::{number:x}").parse().unwrap());
    let public = PerFamily { v4: Some(IpAddr::V4(Ipv4Addr::from_bits(0xac14_0000 + 10 + number))), v6: public6 };
    let data = |mac: Mac| (backend != "host-gw").then(|| format!("{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}").into());
    let backend_data = PerFamily { v4: data(mac(number)), v6: data(mac(number)).filter(|_| dual) };
    let key = LeaseKey::new(PerFamily { v4, v6 }).unwrap();
    Lease { key, peer: Peer { public, backend_type: backend.trim_end_matches("+DirectRouting").into(), backend_data } }
}

fn mac(number: u32) -> Mac {
    let [_, a, b, c] = number.to_be_bytes();
    Mac([2, 0, 0, a, b, c])
}

/// The objects of a lease, as the daemon makes them: what `raw` writes.
fn objects(i: usize, backend: &str, dual: bool) -> Vec<Object> {
    let lease = lease(i, backend, dual);
    let mut objects = Vec::new();
    for (family, dst) in lease.key.subnets().iter() {
        let (dst, host) = (*dst, *lease.peer.public.get(family).unwrap());
        let network = if family == Family::V4 { NETWORK } else { NETWORK6 };
        let metric = route_metric(network.parse().unwrap(), dst);
        if backend != "vxlan" {
            objects.push(Object::Route(Route { dst, metric, via: Some(host), dev: name("eth0"), onlink: false, protocol: ROUTE_PROTOCOL }));
            continue;
        }
        let link = name(if family == Family::V4 { "flannel.1" } else { "flannel-v6.1" });
        let mac = mac(u32::try_from(i).unwrap());
        objects.push(Object::Neigh(Neigh { link, ip: dst.network(), mac }));
        objects.push(Object::Fdb(Fdb { link, mac, dst: host }));
        objects.push(Object::Route(Route { dst, metric, via: Some(dst.network()), dev: link, onlink: true, protocol: ROUTE_PROTOCOL }));
    }
    objects
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
    // As many operations as a transaction may have.
    with_kv(lab, async |mut kv| {
        for part in leases.chunks(128) {
            kv.txn(TxnRequest { success: part.iter().map(op).collect(), ..TxnRequest::default() }).await.unwrap();
        }
    });
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
            let store = runtime.block_on(async { daemon::store::Etcd::plain(&format!("http://{STORE}"), "/coreos.com/network").unwrap() });
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
    let mut lab = lab(root, 2, "vxlan", false, SUBNET_LEN);
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
    println!("\n| two hosts, vxlan, empty store | |\n|---|--:|");
    println!("| start of the process to subnet.env | {file:.1} ms |");
    println!("| RSS | {:.1} MB |", rss(&lab));
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
