//! 64 hostile clients on every port of a host and of the store, while a pod's ping goes on: none is lost, probes are answered,
//! deleted routes come back, and memory and descriptors are given back.
//!
//! `FLANNEL_ATTACK_MINUTES=60` makes it a soak.

#[path = "attack/clients.rs"]
mod clients;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use daemon::etcd::kv_client::KvClient;
use daemon::etcd::{CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest};
use lab::ping::ping_each;
use lab::{Lab, Secure, StoreKind};

use self::clients::{KINDS, Target};
use crate::cluster::routes;
use crate::{eventually, observe, ping_all_from, plan};

/// How long it lasts in a run of all tests.
const SHORT: Duration = Duration::from_secs(20);
/// The soak, in minutes.
pub(crate) const MINUTES: &str = "FLANNEL_ATTACK_MINUTES";
/// A peer that has no host: its route can be deleted without losing a ping.
const PEER: (&str, &str, &str) = (
    "10.244.9.0/24",
    "/coreos.com/network/subnets/10.244.9.0-24",
    r#"{"PublicIP":"10.0.0.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#,
);

/// Memory and descriptors of a process.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    kilobytes: u64,
    descriptors: u64,
}

impl Usage {
    fn of(pid: u32) -> Usage {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kilobytes = line.trim().trim_end_matches(" kB").parse().unwrap();
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        Usage { kilobytes, descriptors: u64::try_from(descriptors).unwrap() }
    }

    fn max(self, other: Usage) -> Usage {
        Usage { kilobytes: self.kilobytes.max(other.kilobytes), descriptors: self.descriptors.max(other.descriptors) }
    }
}

/// What was measured, what it may be at most, and how many times.
#[derive(Debug, Default)]
struct Verdicts(Mutex<Vec<(String, u64, u64)>>);

impl Verdicts {
    fn add(&self, what: &str, measured: u64, most: u64) {
        self.0.lock().unwrap().push((what.to_owned(), measured, most));
    }

    fn finish(self) {
        let all = self.0.into_inner().unwrap();
        for (what, measured, most) in &all {
            println!("attack: {} {what}: {measured}, at most {most}", if measured <= most { "held  " } else { "BROKEN" });
        }
        let broken: Vec<&String> = all.iter().filter(|(_, measured, most)| measured > most).map(|(what, ..)| what).collect();
        assert!(broken.is_empty(), "{broken:?}");
    }
}

pub(crate) fn hostile_clients_lose_no_ping(root: &Path) {
    let minutes = std::env::var(MINUTES).ok().map(|text| text.parse::<u64>().expect("FLANNEL_ATTACK_MINUTES is a number"));
    let time = minutes.map_or(SHORT, Duration::from_mins);
    let mut plan = plan(3, "vxlan", StoreKind::Embedded);
    let secure = Secure::embedded(&root.join("store"));
    plan.secure = Some(secure.clone());
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    // The third host belongs to the attackers. The health server is as open as it can be.
    lab.start_daemon(0, &["--healthz-ip=0.0.0.0"]).unwrap();
    lab.start_daemon(1, &[]).unwrap();
    for host in 0..2 {
        lab.wait_state(host, "the other", |state| state["peers"]["programmed"] == 1).unwrap();
    }
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let mac = lab.hosts[1].shell("ip -o link show flannel.1 | sed 's/.*ether //; s/ .*//'").unwrap().trim().to_owned();
    let target = Target { health: "10.0.0.1:8081".parse().unwrap(), secure, mac, stop: AtomicBool::new(false) };
    with_store(&lab, &target, async |kv| {
        drop(kv.put(PutRequest { key: PEER.1.into(), value: PEER.2.into(), ..PutRequest::default() }).await.unwrap())
    });
    eventually("the peer's route", || routes(&observe(&lab.hosts[0].netns)).contains(PEER.0));

    let pids = [("daemon", lab.hosts[0].pid().unwrap()), ("store", lab.store_pid().unwrap())];
    let before = pids.map(|(_, pid)| Usage::of(pid));
    let log = || std::fs::metadata(lab.hosts[0].log()).unwrap().len();
    let (verdicts, logged) = (Verdicts::default(), log());
    let every = (time / 50_000).max(Duration::from_millis(5));
    let (sent, lost) = ping_each(every, &pods[0].netns, pods[1].address, || attack(&lab, &target, time, pids, &before, &verdicts)).unwrap();
    println!("attack: {} s, {sent} pings", time.as_secs());
    verdicts.add("pings lost", u64::try_from(lost).unwrap(), 0);
    verdicts.add("bytes logged by the daemon in a minute", (log() - logged) * 60 / time.as_secs(), 200_000);
    let text = std::fs::read(lab.hosts[0].log()).unwrap();
    verdicts.add(
        "control characters in its log",
        u64::try_from(text.iter().filter(|byte| **byte < b' ' && **byte != b'\n').count()).unwrap(),
        0,
    );
    verdicts.add("bytes of /state", u64::try_from(lab.hosts[0].get("/state").unwrap().1.len()).unwrap(), 100_000);
    clean_up(&lab, &target);
    given_back(pids, before, &verdicts);
    verdicts.finish();
}

/// Runs the hostile clients, and what they must not disturb.
fn attack(lab: &Lab, target: &Target, time: Duration, pids: [(&str, u32); 2], before: &[Usage; 2], verdicts: &Verdicts) {
    std::thread::scope(|scope| {
        for kind in &KINDS {
            for _ in 0..kind.count {
                scope.spawn(|| lab.hosts[2].netns.run(|| (kind.run)(target)).unwrap());
            }
        }
        scope.spawn(|| probes_are_answered(lab, target, verdicts));
        scope.spawn(|| routes_come_back(lab, target, verdicts));
        scope.spawn(|| store_answers(lab, target, verdicts));
        let end = Instant::now() + time;
        let mut most = [Usage::default(); 2];
        while Instant::now() < end {
            most = [0, 1].map(|i| most[i].max(Usage::of(pids[i].1)));
            std::thread::sleep(Duration::from_millis(100));
        }
        target.stop.store(true, Ordering::Relaxed);
        for (i, kilobytes, descriptors) in [(0, 64 << 10, 80), (1, 500 << 10, 500)] {
            let name = pids[i].0;
            verdicts.add(
                &format!("kilobytes more of the {name} meanwhile"),
                most[i].kilobytes.saturating_sub(before[i].kilobytes),
                kilobytes,
            );
            verdicts.add(
                &format!("descriptors more of the {name} meanwhile"),
                most[i].descriptors.saturating_sub(before[i].descriptors),
                descriptors,
            );
        }
    });
}

/// Does something again and again, and returns how often, how often it failed, and how long it took at most.
fn repeat(target: &Target, pause: Duration, mut act: impl FnMut() -> bool) -> (u64, u64, u64) {
    let (mut times, mut failed, mut slowest) = (0, 0, Duration::ZERO);
    while !target.stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        failed += u64::from(!act());
        slowest = slowest.max(began.elapsed());
        times += 1;
        std::thread::sleep(pause);
    }
    (times, failed, u64::try_from(slowest.as_millis()).unwrap())
}

/// How long a probe may take, and how long the store for a new connection. A kubelet gives a probe a second; here all 64 clients share
/// the processors with what they attack, and none of it is optimized.
const PROBE: Duration = Duration::from_secs(10);
const STORE_ANSWER: Duration = Duration::from_secs(60);

fn probes_are_answered(lab: &Lab, target: &Target, verdicts: &Verdicts) {
    let probe = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&"127.0.0.1:8081".parse().unwrap(), PROBE)?;
        stream.set_read_timeout(Some(PROBE))?;
        write!(stream, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.ends_with("flanneld is running"))
    };
    let probes = || repeat(target, Duration::from_millis(200), || probe().unwrap_or(false));
    let (times, failed, slowest) = lab.hosts[0].netns.run(probes).unwrap();
    println!("attack: {times} probes, the slowest took {slowest} ms");
    verdicts.add("probes that failed", failed, times / 50);
}

fn routes_come_back(lab: &Lab, target: &Target, verdicts: &Verdicts) {
    let delete = format!("ip route del {}", PEER.0);
    let (times, failed, slowest) = repeat(target, Duration::from_secs(1), || {
        let deleted = lab.hosts[0].shell(&delete).is_ok();
        let end = Instant::now() + Duration::from_secs(20);
        while !routes(&observe(&lab.hosts[0].netns)).contains(PEER.0) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        deleted && Instant::now() < end
    });
    println!("attack: {times} routes deleted");
    verdicts.add("routes that did not come back", failed, 0);
    verdicts.add("milliseconds until a route is back", slowest, 5_000);
}

/// A host other than the attackers'.
fn store_answers(lab: &Lab, target: &Target, verdicts: &Verdicts) {
    let answers = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        repeat(target, Duration::from_millis(200), || {
            runtime.block_on(async {
                let ask = async {
                    let channel = target.connect(true).await?;
                    let config = RangeRequest { key: b"/coreos.com/network/config".to_vec(), ..RangeRequest::default() };
                    KvClient::new(channel).range(config).await.ok()
                };
                tokio::time::timeout(STORE_ANSWER, ask).await.ok().flatten().is_some_and(|answer| answer.into_inner().count == 1)
            })
        })
    };
    let (times, failed, slowest) = lab.hosts[1].netns.run(answers).unwrap();
    println!("attack: {times} new connections to the store, the slowest was served after {slowest} ms");
    verdicts.add("connections that the store did not serve", failed, 0);
}

/// Deletes what the attackers wrote, as an operator would.
fn clean_up(lab: &Lab, target: &Target) {
    with_store(lab, target, async |kv| {
        let delete = DeleteRangeRequest { key: b"/attack/".to_vec(), range_end: b"/attack0".to_vec(), ..DeleteRangeRequest::default() };
        let revision = kv.delete_range(delete).await.unwrap().into_inner().header.unwrap().revision;
        match kv.compact(CompactionRequest { revision, ..CompactionRequest::default() }).await {
            Ok(_) => {}
            // An attacker's last compaction came first.
            Err(status) => assert_eq!(status.code(), tonic::Code::OutOfRange, "{status}"),
        }
    });
}

/// Descriptors are given back at once, memory when the process is idle.
fn given_back(pids: [(&str, u32); 2], before: [Usage; 2], verdicts: &Verdicts) {
    let limits = [(24 << 10, 4), (64 << 10, 4)];
    let more = |i: usize| {
        let now = Usage::of(pids[i].1);
        (now.kilobytes.saturating_sub(before[i].kilobytes), now.descriptors.saturating_sub(before[i].descriptors))
    };
    let end = Instant::now() + Duration::from_secs(20);
    while (0..2).any(|i| more(i).0 > limits[i].0 || more(i).1 > limits[i].1) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
    }
    for (i, (kilobytes, descriptors)) in limits.into_iter().enumerate() {
        verdicts.add(&format!("kilobytes that the {} keeps", pids[i].0), more(i).0, kilobytes);
        verdicts.add(&format!("descriptors that the {} keeps", pids[i].0), more(i).1, descriptors);
    }
}

fn with_store(lab: &Lab, target: &Target, act: impl AsyncFn(&mut KvClient<tonic::transport::Channel>) + Sync) {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let channel = target.connect(true).await.expect("the store listens");
            act(&mut KvClient::new(channel)).await;
        });
    };
    lab.middle.run(work).unwrap();
}
