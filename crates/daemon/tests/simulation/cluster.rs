//! One run of a cluster: a sequence of faults determined by a seed, and the checks at its end.

use std::cell::RefCell;
use std::collections::BTreeMap;
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
use flannel::backend::Identity;
use flannel::diff::{Prune, diff};
use flannel::net::Cidr;
use flannel::node::Wanted;
use flannel::object::{EnvFile, Key, Lane, Link, LinkKind, Object, Route, Sysctl, route_metric};
use flannel::traffic::{Flavour, TrafficConfig};
use flannel::{Config, Lease, LeaseKey, LeaseSet, Mac, Node, Peer, PerFamily, Picture, StoreEvent, Subnet};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::Instant;

use crate::model::ModelHost;
use crate::wire::{Cable, Mode, wire};

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
        Cluster::new().await.run().await
    })
}

/// The number of requests that a daemon sends until it watches a store with this many leases.
pub(crate) fn requests_at_start(leases: usize) -> usize {
    fastrand::seed(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let mut cluster = Cluster::new().await;
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
    async fn new() -> Cluster {
        let backend = pick(&[r#"{"Type":"host-gw"}"#, r#"{"Type":"vxlan"}"#, r#"{"Type":"vxlan","DirectRouting":true}"#]);
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
        };
        cluster.record_leases();
        cluster
    }

    /// Watches the store by a separate connection, and records each change of a lease with its time.
    fn record_leases(&self) {
        let (tell, mut events) = mpsc::channel(16);
        let link = store::Link::new(watch::channel(false).0, Ready::default(), Notices::new().0);
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

    async fn inject_fault(&mut self) {
        let at = fastrand::usize(..self.machines.len());
        let fault = fastrand::u32(..23);
        tracing::info!(at, fault, "injecting fault");
        match fault {
            0 | 1 => self.put_foreign_lease().await,
            2 => self.delete_lease(false).await,
            3 => {
                self.machines.iter_mut().for_each(|machine| machine.may_lose_lease = true);
                self.delete_lease(true).await;
            }
            4 => self.put_raw(format!("10.244.{}.0-24", fastrand::u8(200..204)), b"{\"PublicIP\":".to_vec()).await,
            5..=7 => self.remove_object(at),
            8..=10 => self.change_object(at),
            11 => {
                self.machines[at].routes_changed = true;
                match fastrand::u32(..5) {
                    0 => self.machines[at].host.change(|model| model.set_external(false)),
                    1 => self.machines[at].host.change(|model| model.remove_external()),
                    2 => {
                        let other = cidr(100 + self.machines[at].octet);
                        self.machines[at].host.change(|model| model.set_address(Some(other)));
                    }
                    3 => self.machines[at].host.change(|model| model.set_address(None)),
                    _ => {
                        let mtu = fastrand::u32(1_280..=9_000);
                        self.machines[at].host.change(|model| model.set_mtu(mtu));
                    }
                }
            }
            12 => self.restore_interface(at),
            13 => self.machines[at].host.change(|model| model.flood()),
            14 => {
                if let Some(daemon) = self.machines[at].daemon.take() {
                    daemon.abort();
                }
            }
            15 => *self.machines[at].crash_after.borrow_mut() = Some(fastrand::u32(..40)),
            16 => self.start(at),
            17 | 18 => {
                let mode =
                    pick(&[Mode::Open, Mode::Open, Mode::Refused, Mode::Silent, Mode::Slow(700), Mode::Slow(6_000), Mode::NoAnswers]);
                tracing::info!(?mode, "changing connection mode");
                self.machines[at].cable.set(mode);
            }
            19 => match fastrand::u32(..4) {
                0 => self.store.compact(),
                1 => self.backup = Some(self.store.backup()),
                2 => self.restart_store(None).await,
                _ => {
                    let backup = self.backup.take().unwrap_or_else(|| self.empty.clone());
                    self.restart_store(Some(backup)).await;
                }
            },
            20 => self.machines[at].host.lock().refuses = pick(&[0, 2, 5, 20]),
            21 => {
                self.machines[at].may_lose_lease = true;
                self.overwrite_lease(at).await;
            }
            _ => self.add_foreign_route(at),
        }
    }

    /// Breaks all connections, as when the server restarts, possibly with an older backup.
    async fn restart_store(&mut self, backup: Option<Backup>) {
        // A restored store may assign a lost lease to another host.
        self.machines.iter_mut().for_each(|machine| machine.may_lose_lease |= backup.is_some());
        let before: Vec<Mode> = self.machines.iter().map(|machine| machine.cable.set(Mode::Refused)).collect();
        if let Some(backup) = backup {
            self.store.restore(&backup);
            // The recorder lists the leases before any daemon can reconnect, so that it misses nothing.
            self.operator.set(Mode::Refused);
            self.operator.set(Mode::Open);
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1_000..3_000))).await;
        self.machines.iter().zip(before).for_each(|(machine, mode)| {
            machine.cable.set(mode);
        });
    }

    fn peer(&self, octet: u8) -> Peer {
        let vxlan = self.config.backend.name() == "vxlan";
        let data = vxlan.then(|| format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:{octet:02x}\"}}").into());
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

    async fn put_foreign_lease(&self) {
        let peer = self.peer(fastrand::u8(210..214));
        self.put_raw(format!("10.244.{}.0-24", fastrand::u8(200..204)), flannel::wire::value(&peer).into_bytes()).await;
    }

    /// An operator deletes a lease: of a simulated machine, or a foreign one.
    async fn delete_lease(&self, ours: bool) {
        let keys: Vec<LeaseKey> = self.truth.lock().unwrap().0.iter().map(|(key, _)| *key).collect();
        let is_foreign = |key: &&LeaseKey| key.subnets().v4.is_some_and(|subnet| foreign_keys().any(|foreign| foreign == subnet));
        let keys: Vec<LeaseKey> = keys.iter().filter(|key| is_foreign(key) != ours).copied().collect();
        if !keys.is_empty() {
            self.delete_raw(flannel::wire::key(&pick(&keys))).await;
        }
    }

    /// Overwrites a machine's lease with one of another host: the machine must choose another subnet.
    async fn overwrite_lease(&self, at: usize) {
        let own = cidr(self.machines[at].octet).addr;
        let key = self.truth.lock().unwrap().0.iter().find(|(_, peer)| peer.public.v4 == Some(own)).map(|(key, _)| *key);
        if let Some(key) = key {
            self.put_raw(flannel::wire::key(&key), flannel::wire::value(&self.peer(220)).into_bytes()).await;
        }
    }

    fn remove_object(&mut self, at: usize) {
        let removed = self.machines[at].host.change(|model| {
            let keys: Vec<Key> = model.objects.iter().filter(|(_, object)| !is_foreign(object)).map(|(key, _)| key.clone()).collect();
            let key = (!keys.is_empty()).then(|| keys[fastrand::usize(..keys.len())].clone());
            key.iter().for_each(|key| model.remove(key));
            key
        });
        // A host that loses its file and gets another address while no daemon runs cannot find its lease.
        self.machines[at].may_lose_lease |= removed == Some(Key::EnvFile);
    }

    fn change_object(&mut self, at: usize) {
        let objects: Vec<Object> = {
            let model = self.machines[at].host.lock();
            model.objects.iter().map(|(_, object)| object.clone()).filter(|object| !is_foreign(object)).collect()
        };
        if objects.is_empty() {
            return;
        }
        let changed = match objects[fastrand::usize(..objects.len())].clone() {
            Object::Link(link) => Object::Link(Box::new(match fastrand::u32(..4) {
                0 => Link { mtu: 1_300, ..*link },
                1 => Link { up: false, ..*link },
                2 => Link { kind: LinkKind::Other("dummy".to_owned()), ..*link },
                _ => {
                    self.machines[at].routes_changed = true;
                    Link { mac: Mac::local([fastrand::u8(..), 1, 2, 3, 4, 5]), ..*link }
                }
            })),
            Object::Route(route) => match fastrand::bool() {
                true => Object::Route(Route { via: Some(cidr(99).addr), ..route }),
                false => Object::Route(Route { metric: route.metric + 1_000, ..route }),
            },
            Object::Neigh(neigh) => Object::Neigh(flannel::object::Neigh { mac: Mac([2, 9, 9, 9, 9, 9]), ..neigh }),
            Object::Fdb(fdb) => Object::Fdb(flannel::object::Fdb { dst: cidr(99).addr, ..fdb }),
            Object::Sysctl(Sysctl { path, .. }) => Object::Sysctl(Sysctl { path, value: "1".to_owned() }),
            Object::EnvFile(file) => Object::EnvFile(Box::new(EnvFile { text: "FLANNEL_MTU=1\n".to_owned(), ours: false, ..*file })),
            Object::Ruleset(mut rules) => {
                rules.chains.truncate(1);
                Object::Ruleset(rules)
            }
            other => other,
        };
        self.machines[at].may_lose_lease |= matches!(changed, Object::EnvFile(_));
        self.machines[at].host.change(|model| model.put(changed));
    }

    fn add_foreign_route(&mut self, at: usize) {
        let dst = format!("10.244.{}.0/24", fastrand::u8(..)).parse().unwrap();
        let route = Route { dst, metric: 7_777, via: Some(cidr(254).addr), dev: crate::model::eth0(), onlink: false, protocol: 4 };
        // The route goes with the interface, so it is expected only if the interface is never changed.
        self.machines[at].host.change(|model| model.put(Object::Route(route)));
        self.foreign.push((at, Object::Route(route)));
    }

    fn restore_interface(&mut self, at: usize) {
        let own = cidr(self.machines[at].octet);
        self.machines[at].host.change(|model| {
            if model.external.is_none() {
                model.add_external(own);
            }
            model.set_external(true);
            model.set_address(Some(own));
        });
    }

    async fn end_faults(&mut self) {
        tracing::info!("ending faults");
        for at in 0..self.machines.len() {
            self.machines[at].cable.set(Mode::Open);
            self.machines[at].host.lock().refuses = 0;
            *self.machines[at].crash_after.borrow_mut() = None;
            self.restore_interface(at);
            self.start(at);
        }
        for octet in 200..204 {
            self.delete_raw(format!("10.244.{octet}.0-24")).await;
        }
        for _ in 0..2 {
            self.put_foreign_lease().await;
        }
    }

    async fn check(&self) -> Result<Record, String> {
        let snapshot = self.client().snapshot().await.map_err(|error| error.to_string())?;
        let entries: BTreeMap<LeaseKey, Peer> =
            snapshot.entries.iter().filter_map(|entry| Some((entry.key, entry.peer.clone()?))).collect();
        let mut problems = Vec::new();
        let mut held: Vec<LeaseKey> = Vec::new();
        for (at, machine) in self.machines.iter().enumerate() {
            let address = cidr(machine.octet).addr;
            let own: Vec<LeaseKey> = entries.iter().filter(|(_, peer)| peer.public.v4 == Some(address)).map(|(key, _)| *key).collect();
            let in_file = machine.lease_in_file();
            if let (Some(first), Some(now), false) = (machine.first, in_file, machine.may_lose_lease)
                && first != now
            {
                problems.push(format!("machine {at} had {first} and has {now}, although no fault took its lease"));
            }
            let Some(own) = in_file.filter(|key| own.contains(key)) else {
                problems.push(format!("machine {at} has {in_file:?} in its subnet file and {own:?} in the store"));
                continue;
            };
            if let Some(other) = held.iter().find(|other| other.overlaps(&own)) {
                problems.push(format!("machine {at} has {own}, which overlaps {other} of another machine"));
            }
            held.push(own);
            // In a restored store the lease may be attached to another etcd lease until it is renewed.
            let etcd_leases = machine.host.env_file(std::path::Path::new("/")).map(|file| file.etcd_leases).unwrap_or_default();
            problems.extend(self.compare(at, machine, own, etcd_leases, &entries).await);
            problems.extend(self.check_deleted_routes(at, machine));
        }
        for (at, object) in &self.foreign {
            let machine = &self.machines[*at];
            let model = machine.host.lock();
            if !machine.routes_changed && model.objects.get(&object.key()) != Some(object) {
                problems.push(format!("machine {at} lost a foreign route: {object}"));
            }
        }
        if !problems.is_empty() {
            return Err(format!("{}: {}", self.backend, problems.join("; ")));
        }
        let operations = self.machines.iter().map(|machine| machine.host.lock().operations).collect();
        let ended = BEGAN.with_borrow(|began| began.map(|began| began.elapsed()).unwrap_or_default());
        Ok(Record { operations, revision: snapshot.revision, ended })
    }

    /// Checks that a machine holds exactly the objects that a newly started daemon would set.
    async fn compare(
        &self,
        at: usize,
        machine: &Machine,
        own: LeaseKey,
        etcd_leases: Vec<i64>,
        entries: &BTreeMap<LeaseKey, Peer>,
    ) -> Vec<String> {
        let network = machine.host.network(None).await.unwrap();
        let node = Node::choose(&network.interfaces, &network.routes, &Wanted::default(), &self.config).unwrap();
        let mac = entries.get(&own).and_then(|peer| flannel::backend::published_mac(peer, flannel::Family::V4));
        let identity = Identity { macs: PerFamily { v4: mac, v6: None }, data: None };
        let traffic = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: Flavour::Nftables };
        let args = args();
        let mut picture = Picture::new(self.config.clone(), node, identity, traffic, own).with_file(args.subnet_file, true, etcd_leases);
        picture.set_usable(vec![flannel::Family::V4]);
        picture.fold(StoreEvent::Init);
        for (key, peer) in entries {
            picture.fold(StoreEvent::Apply(Lease { key: *key, peer: peer.clone() }));
        }
        picture.fold(StoreEvent::InitDone);
        let mut observed = machine.host.observe(picture.scope(), Lane::Fast).await.unwrap();
        observed.extend(machine.host.observe(picture.scope(), Lane::Slow).await.unwrap().into_objects());
        let ops = diff(picture.desired(), &observed, Prune::Yes);
        let mut problems: Vec<String> = ops.iter().map(|op| format!("machine {at} needs: {op}")).collect();
        problems.append(&mut machine.host.lock().violations);
        problems
    }

    /// Checks that the daemon deleted the route to a peer no more often than its lease was changed or deleted.
    fn check_deleted_routes(&self, at: usize, machine: &Machine) -> Vec<String> {
        // A change of the host itself is a reason to change routes.
        if machine.routes_changed {
            return Vec::new();
        }
        let truth = self.truth.lock().unwrap();
        let network: Subnet = NETWORK.parse().unwrap();
        let mut deleted: BTreeMap<Subnet, usize> = BTreeMap::new();
        for key in &machine.host.lock().deleted {
            // Only routes with the metric of a peer's route count; a fault added the others.
            if let Key::Route(dst, metric) = key
                && *metric == route_metric(network, *dst)
            {
                *deleted.entry(*dst).or_default() += 1;
            }
        }
        let allowed = |dst: Subnet| truth.1.iter().filter(|(_, key)| key.subnets().v4 == Some(dst)).count();
        let problem = |(dst, times): (&Subnet, &usize)| {
            let allowed = allowed(*dst);
            (*times > allowed)
                .then(|| format!("machine {at} deleted the route to {dst} {times} times, but its lease changed {allowed} times"))
        };
        deleted.iter().filter_map(problem).collect()
    }
}

fn foreign_keys() -> impl Iterator<Item = Subnet> {
    (200..204).map(|octet| format!("10.244.{octet}.0/24").parse().unwrap())
}

fn is_foreign(object: &Object) -> bool {
    matches!(object, Object::Route(route) if route.protocol == 4)
}
