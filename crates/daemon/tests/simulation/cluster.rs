//! One run of a cluster: a sequence of faults determined by a seed, and the checks at its end.

#[path = "cluster/checks.rs"]
mod checks;
#[path = "cluster/faults.rs"]
mod faults;

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use daemon::app::{Parts, node_daemon};
use daemon::embedded::memory::{Backup, Memory};
use daemon::etcd::kv_client::KvClient;
use daemon::etcd::{DeleteRangeRequest, PutRequest};
use daemon::host::Host;
use daemon::notice::Notices;
use daemon::ready::Ready;
use daemon::settings::RunArgs;
use daemon::store::{self, Etcd, Store};
use flannel::net::Cidr;
use flannel::object::Object;
use flannel::{Config, LeaseKey, LeaseSet, Peer, PerFamily};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::Instant;

use crate::model::{ModelHost, key_of};
use crate::wire::{Cable, wire};

const PREFIX: &str = "/coreos.com/network";
const NETWORK: &str = "10.244.0.0/16";
/// How long the cluster may take to converge: longer than any retry delay and than the audit interval.
const REST: Duration = Duration::from_secs(240);
/// The additional time after a store lost data or a machine's own lease: daemons keep the routes of doubtful leases for this long.
const DOUBT: Duration = Duration::from_secs(300);
/// A time longer than the TTL of a lease.
const DAY: Duration = Duration::from_secs(25 * 3600);

/// Prints the virtual time in the log.
pub(crate) struct VirtualTime;

thread_local! {
    static BEGAN: RefCell<Option<Instant>> = const { RefCell::new(None) };
}

impl tracing_subscriber::fmt::time::FormatTime for VirtualTime {
    fn format_time(&self, w: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        let now = BEGAN.with_borrow(|began| began.map_or(0.0, |began| began.elapsed().as_secs_f64()));
        write!(w, "{now:10.4}")
    }
}

/// The outcome of a run, to compare two runs of one seed.
#[derive(Debug, PartialEq)]
pub(crate) struct Record {
    operations: Vec<u64>,
    revision: i64,
    ended: Duration,
}

/// Runs a seed, and returns the problems that the checks found.
pub(crate) fn run(seed: u64) -> Result<Record, String> {
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        BEGAN.set(Some(Instant::now()));
        Cluster::new(seed).await.run().await
    })
}

/// The number of requests that a daemon sends until it watches a store with this many leases.
pub(crate) fn requests_at_start(leases: usize) -> usize {
    fastrand::seed(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let mut cluster = Cluster::new(0).await;
        for n in 0..leases {
            let value = flannel::wire::value(&cluster.peer(9)).into_bytes();
            cluster.put_raw(format!("10.244.{n}.0-24"), value).await;
        }
        cluster.start(0);
        cluster.wait(Duration::from_secs(30)).await;
        cluster.machines[0].cable.requests()
    })
}

/// The actual leases, and the times at which they were changed or deleted.
type Truth = Arc<Mutex<(LeaseSet, Vec<(Instant, LeaseKey)>)>>;

struct Machine {
    host: ModelHost,
    cable: Cable,
    daemon: Option<JoinHandle<()>>,
    /// Its first lease, which it must keep unless `may_lose_lease`.
    first: Option<LeaseKey>,
    /// Whether a fault took or deleted one of its leases, or its record of it.
    may_lose_lease: bool,
    /// Whether a fault changed this host in a way that changes its routes.
    routes_changed: bool,
    octet: u8,
    /// Crashes the daemon after this many polls.
    crash_after: Rc<RefCell<Option<u32>>>,
}

impl Machine {
    /// The lease in its `subnet.env`.
    fn lease_in_file(&self) -> Option<LeaseKey> {
        let file = self.host.env_file(std::path::Path::new("/"));
        file.map(|file| flannel::subnet_env::previous_subnets(&file.text)).and_then(LeaseKey::new)
    }
}

struct Cluster {
    store: Memory,
    backend: &'static str,
    config: Config,
    machines: Vec<Machine>,
    operator: Cable,
    truth: Truth,
    backup: Option<Backup>,
    /// A backup of the store without leases.
    empty: Backup,
    foreign: Vec<(usize, Object)>,
    /// How often a lease was put that claims another host's VTEP MAC.
    thefts: usize,
}

fn pick<T: Copy>(of: &[T]) -> T {
    of[fastrand::usize(..of.len())]
}

fn cidr(octet: u8) -> Cidr {
    Cidr { addr: IpAddr::V4(Ipv4Addr::new(10, 0, 0, octet)), len: 24 }
}

fn args() -> RunArgs {
    let args = ["--etcd-endpoints=http://store:2379", "--subnet-file=/run/flannel/subnet.env", "--ip-masq"];
    RunArgs::read(args.map(ToOwned::to_owned), |_| None).unwrap()
}

impl Cluster {
    async fn new(seed: u64) -> Cluster {
        let backend = pick(&[r#"{"Type":"host-gw"}"#, r#"{"Type":"vxlan"}"#, r#"{"Type":"vxlan","DirectRouting":true}"#]);
        // The faults of the other seeds stay what they were.
        let backend = if seed % 4 == 1 { r#"{"Type":"wireguard"}"# } else { backend };
        let text = format!(r#"{{"Network":"{NETWORK}","EnableNFTables":true,"Backend":{backend}}}"#);
        let config = Config::parse(&text).unwrap();
        let store = Memory::default();
        let operator = Cable::new();
        Etcd::over(
            "operator",
            {
                let (store, mode) = (store.clone(), operator.clone());
                move || wire(&store, &mode)
            },
            PREFIX,
        )
        .put_config(&text)
        .await
        .unwrap();
        let machines = (1..=fastrand::u8(2..=4)).map(|octet| Machine {
            host: ModelHost::new(cidr(octet)),
            cable: Cable::new(),
            daemon: None,
            first: None,
            may_lose_lease: false,
            routes_changed: false,
            octet,
            crash_after: Rc::default(),
        });
        let empty = store.backup();
        let cluster = Cluster {
            store,
            backend,
            config,
            machines: machines.collect(),
            operator,
            truth: Truth::default(),
            backup: None,
            empty,
            foreign: Vec::new(),
            thefts: 0,
        };
        cluster.record_leases();
        cluster
    }

    /// Watches the store by a separate connection, and records each change of a lease with its time.
    fn record_leases(&self) {
        let (tell, mut events) = mpsc::channel(16);
        let link = store::Link::new(watch::channel(store::Following::default()).0, Ready::default(), Notices::new().0);
        tokio::spawn(self.client().follow(self.config.clone(), tell, link));
        let truth = self.truth.clone();
        tokio::spawn(async move {
            while let Some(batch) = events.recv().await {
                let mut truth = truth.lock().unwrap();
                let (leases, history) = &mut *truth;
                for event in batch {
                    let before = leases.clone();
                    let touched = leases.fold(event).into_iter().filter(|key| before.get(key).is_some());
                    history.extend(touched.map(|key| (Instant::now(), key)));
                    // Daemons may give up doubtful leases.
                    let lost = leases.doubtful().difference(before.doubtful());
                    history.extend(lost.map(|key| (Instant::now(), *key)));
                }
            }
        });
    }

    fn client(&self) -> Etcd {
        let (store, mode) = (self.store.clone(), self.operator.clone());
        Etcd::over("store", move || wire(&store, &mode), PREFIX)
    }

    async fn run(mut self) -> Result<Record, String> {
        for at in 0..self.machines.len() {
            self.start(at);
        }
        for _ in 0..fastrand::u32(8..40) {
            let pause = match fastrand::u32(..10) {
                0..4 => Duration::ZERO,
                4..7 => Duration::from_micros(fastrand::u64(..20_000)),
                7..9 => Duration::from_millis(fastrand::u64(..3_000)),
                _ => Duration::from_secs(fastrand::u64(..90)),
            };
            tokio::time::sleep(pause).await;
            for machine in &mut self.machines {
                machine.first = machine.first.or_else(|| machine.lease_in_file());
            }
            self.inject_fault().await;
        }
        // In some runs a day passes: leases are renewed if the store can be reached, and expire otherwise.
        if fastrand::u32(..500) == 0 {
            tracing::info!("waiting for a day");
            self.wait(DAY).await;
        }
        self.end_faults().await;
        self.wait(REST).await;
        // Daemons give up leases that the store lost, or that a newly started daemon did not trust to be gone.
        self.wait(DOUBT).await;
        self.check().await
    }

    async fn wait(&self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_secs(10)).await;
            self.store.tick();
        }
    }

    fn start(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        if machine.daemon.is_some() {
            return;
        }
        let (store, mode) = (self.store.clone(), machine.cable.clone());
        let (host, crash_after) = (machine.host.clone(), machine.crash_after.clone());
        machine.daemon = Some(tokio::task::spawn_local(async move {
            loop {
                let etcd = Etcd::over(
                    "store",
                    {
                        let (store, mode) = (store.clone(), mode.clone());
                        move || wire(&store, &mode)
                    },
                    PREFIX,
                );
                let ready = Ready::default();
                let (starting, syncing) = (ready.guard("start"), ready.guard("sync"));
                let (view, _) = watch::channel(Arc::default());
                let parts = Parts { ready, starting, syncing, notices: Notices::new().0, view };
                let args = args();
                let mut daemon = Box::pin(node_daemon(&args, etcd, host.clone(), parts));
                // A crash can happen between any two polls.
                let run = std::future::poll_fn(|context| {
                    if let Some(left) = crash_after.borrow_mut().as_mut() {
                        match left.checked_sub(1) {
                            Some(less) => *left = less,
                            None => return Poll::Ready(None),
                        }
                    }
                    daemon.as_mut().poll(context).map(Some)
                });
                let end = run.await;
                // Dropping it ends its tasks and frees its memory.
                drop(daemon);
                match end {
                    Some(Ok(())) => {}
                    Some(Err(error)) => tracing::error!(error = %format!("{error:#}"), "daemon failed"),
                    None => {
                        tracing::error!("daemon crashed");
                        *crash_after.borrow_mut() = None;
                    }
                }
                // Restart it, as systemd would.
                tokio::time::sleep(Duration::from_millis(fastrand::u64(100..2_000))).await;
            }
        }));
    }

    fn peer(&self, octet: u8) -> Peer {
        let data = match self.config.backend.name() {
            "vxlan" => Some(format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:{octet:02x}\"}}").into()),
            "wireguard" => Some(format!("{{\"PublicKey\":\"{}\",\"Port\":51820}}", key_of(cidr(octet).addr)).into()),
            _ => None,
        };
        let public = PerFamily { v4: Some(cidr(octet).addr), v6: None };
        Peer { public, backend_type: self.config.backend.name().into(), backend_data: PerFamily { v4: data, v6: None } }
    }

    async fn put_raw(&self, key: String, value: Vec<u8>) {
        let key = format!("{PREFIX}/subnets/{key}").into_bytes();
        let _ = KvClient::new(wire(&self.store, &self.operator)).put(PutRequest { key, value, ..PutRequest::default() }).await;
    }

    async fn delete_raw(&self, key: String) {
        let key = format!("{PREFIX}/subnets/{key}").into_bytes();
        let _ = KvClient::new(wire(&self.store, &self.operator))
            .delete_range(DeleteRangeRequest { key, ..DeleteRangeRequest::default() })
            .await;
    }
}
