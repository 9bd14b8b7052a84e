//! What can go wrong with a host, by somebody's hand or by itself: a catalogue. `lab faults` measures how soon each is put right,
//! `lab chaos` draws from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use flannel::object::{Key, Object, ROUTE_PROTOCOL, Route};
use flannel::scope::Scope;
use flannel::{Family, Observed, Op};
use kernel::Kernel;
use kernel::netns::Netns;
use serde_json::{Value, json};

use crate::ping::{ping_all, ping_during};
use crate::world::{self, Stage, World};
use crate::{Lab, Plan, Pod, StoreKind};

/// The labs in which faults are measured: backend, nftables or iptables.
const LABS: [(&str, bool); 3] = [("host-gw", true), ("vxlan", true), ("vxlan", false)];
/// The port of each host that leads to its first pod.
pub const PORT: u16 = 30_080;
/// Until something is put right that is heard of.
const PATIENCE: Duration = Duration::from_secs(20);
/// Until something is put right that nobody tells: an audit and a bit.
const AUDIT: Duration = Duration::from_secs(70);

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// What it is.
    pub name: &'static str,
    /// Where it can happen.
    pub place: Place,
    /// How it is done.
    pub act: Act,
    /// How it is noticed.
    pub noticed: Noticed,
}

/// Where a fault can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// With any backend, and rules in nftables.
    Any,
    /// With VXLAN, and rules in nftables.
    Vxlan,
    /// Where rules are in iptables.
    Iptables,
}

/// How a fault is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noticed {
    /// The kernel tells.
    Told,
    /// The audit finds it.
    Audit,
}

/// How a fault is made.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// An object of a peer, or of the node, is deleted; which, is asked for by its key.
    Delete(fn(&Key) -> bool),
    /// An object is put in the place of another.
    Change(fn(&Object) -> Option<Object>),
    /// A shell script in the host's namespace. `$FILE` is its `subnet.env`.
    Script(&'static str),
    /// So much changes while the daemon has no processor that the kernel loses notifications, and one of our routes goes among it.
    Overrun,
}

const fn told(name: &'static str, place: Place, act: Act) -> Fault {
    Fault { name, place, act, noticed: Noticed::Told }
}

fn is_link(key: &Key) -> bool {
    matches!(key, Key::Link(_))
}

/// All faults of a host, but for its VTEP's MAC and its interface, after which it is not as it was.
pub const FAULTS: [Fault; 34] = [
    told("a route is deleted", Place::Any, Act::Delete(|key| matches!(key, Key::Route(..)))),
    told(
        "a route is replaced by another gateway's",
        Place::Any,
        Act::Change(|object| match object {
            Object::Route(route) if !route.onlink => Some(Object::Route(Route { via: "10.0.0.254".parse().ok(), ..*route })),
            Object::Route(route) => Some(Object::Route(Route { via: "10.244.255.0".parse().ok(), ..*route })),
            _ => None,
        }),
    ),
    told("all routes are flushed", Place::Any, Act::Script("ip route flush proto 241")),
    told(
        "a stale route of ours appears",
        Place::Any,
        Act::Change(|object| match object {
            Object::Route(route) => Some(Object::Route(Route { dst: "10.244.250.0/24".parse().ok()?, metric: 250, ..*route })),
            _ => None,
        }),
    ),
    told("notifications are lost, a route among them", Place::Any, Act::Overrun),
    told("a neighbour entry is deleted", Place::Vxlan, Act::Delete(|key| matches!(key, Key::Neigh(..)))),
    told(
        "a neighbour entry has another MAC",
        Place::Vxlan,
        Act::Change(|object| match object {
            Object::Neigh(neigh) => Some(Object::Neigh(flannel::object::Neigh { mac: flannel::Mac([2, 9, 9, 9, 9, 9]), ..*neigh })),
            _ => None,
        }),
    ),
    told("an FDB entry is deleted", Place::Vxlan, Act::Delete(|key| matches!(key, Key::Fdb(..)))),
    told(
        "an FDB entry leads to another host",
        Place::Vxlan,
        Act::Change(|object| match object {
            Object::Fdb(fdb) => Some(Object::Fdb(flannel::object::Fdb { dst: "10.0.0.253".parse().ok()?, ..*fdb })),
            _ => None,
        }),
    ),
    told(
        "all neighbour and FDB entries are flushed",
        Place::Vxlan,
        Act::Script(
            "ip neigh flush dev flannel.1 nud permanent; bridge fdb show dev flannel.1 | while read mac d ip rest; do bridge fdb del $mac dev flannel.1 dst $ip; done",
        ),
    ),
    told("the device's address is deleted", Place::Vxlan, Act::Delete(|key| matches!(key, Key::Addr(..)))),
    told(
        "the device's MTU is changed",
        Place::Vxlan,
        Act::Change(|object| match object {
            Object::Link(link) => Some(Object::Link(Box::new(flannel::object::Link { mtu: 1300, ..(**link).clone() }))),
            _ => None,
        }),
    ),
    told("the device is set down", Place::Vxlan, Act::Script("ip link set flannel.1 down")),
    told("the device is set down and up", Place::Vxlan, Act::Script("ip link set flannel.1 down; ip link set flannel.1 up")),
    told("the device is deleted", Place::Vxlan, Act::Delete(is_link)),
    told(
        "the device is replaced by one of another VNI",
        Place::Vxlan,
        Act::Script(
            "ip link add fx type vxlan id 7 dstport 8472 local 10.0.0.77 nolearning; ip link del flannel.1; ip link set fx name flannel.1 || ip link del fx",
        ),
    ),
    told(
        "the device is replaced by a bridge",
        Place::Vxlan,
        Act::Script("ip link add fx type bridge; ip link del flannel.1; ip link set fx name flannel.1 || ip link del fx"),
    ),
    told("the pods' bridge is deleted", Place::Any, Act::Script("ip link del cni0")),
    told("the pods' bridge is set down", Place::Any, Act::Script("ip link set cni0 down")),
    told("the pods' bridge has another address", Place::Any, Act::Script("ip -4 addr flush dev cni0; ip addr add 192.0.2.1/24 dev cni0")),
    told(
        "a pod is taken from the bridge",
        Place::Any,
        Act::Script("ip link set $(ip -o link show master cni0 | head -1 | cut -d: -f2 | cut -d@ -f1) nomaster"),
    ),
    told("forwarding is switched off", Place::Any, Act::Script("echo 0 > /proc/sys/net/ipv4/ip_forward")),
    told("nft flush ruleset", Place::Any, Act::Script("nft flush ruleset")),
    told("our nftables table is deleted", Place::Any, Act::Script("nft delete table ip flannel-ipv4")),
    told(
        "a chain of it is flushed",
        Place::Any,
        Act::Script("nft flush chain ip flannel-ipv4 $(nft list table ip flannel-ipv4 | awk '$1 == \"chain\" { print $2; exit }')"),
    ),
    told("portmap's table is deleted", Place::Any, Act::Script("nft delete table ip cni_hostport")),
    told("portmap's rules are flushed", Place::Any, Act::Script("nft flush table ip cni_hostport")),
    told("iptables' chains are flushed", Place::Iptables, Act::Script("iptables -t nat -F FLANNEL-POSTRTG; iptables -F FLANNEL-FWD")),
    told("the jumps to them are deleted", Place::Iptables, Act::Script("iptables -t nat -F POSTROUTING; iptables -F FORWARD")),
    told("subnet.env is deleted", Place::Any, Act::Script("rm $FILE")),
    told("subnet.env is written over", Place::Any, Act::Script("echo FLANNEL_MTU=9000 > $FILE")),
    told(
        "the interface goes down and up",
        Place::Any,
        Act::Script("ip link set eth0 down; ip link set eth0 up; ip route replace default via 10.0.0.254 dev eth0"),
    ),
    told(
        "the interface loses its address and gets it back",
        Place::Any,
        Act::Script(
            "a=$(ip -o -4 addr show dev eth0 | awk '{ print $4 }'); ip addr del $a dev eth0; ip addr add $a dev eth0; ip route replace default via 10.0.0.254 dev eth0",
        ),
    ),
    Fault {
        name: "a sysctl of the device is changed",
        place: Place::Vxlan,
        act: Act::Script("echo 1 > /proc/sys/net/ipv6/conf/flannel.1/accept_ra"),
        noticed: Noticed::Audit,
    },
];

impl Fault {
    /// Can it happen with this backend and flavour of rules?
    pub fn fits(&self, backend: &str, nftables: bool) -> bool {
        match self.place {
            Place::Any => nftables,
            Place::Vxlan => nftables && backend == "vxlan",
            Place::Iptables => !nftables,
        }
    }

    /// Makes it happen on a host. Returns from when on it could be put right; nothing if there is nothing there that it could
    /// happen to.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn strike(&self, lab: &Lab, host: usize) -> anyhow::Result<Option<Instant>> {
        let netns = &lab.hosts[host].netns;
        let began = Instant::now();
        match self.act {
            Act::Script(script) => {
                let file = lab.hosts[host].subnet_file();
                shell(netns, &format!("FILE={}; {script}", file.display()))
                    .with_context(|| format!("{}: {}", lab.hosts[host].name, self.name))?;
            }
            Act::Delete(which) => {
                let whole = observe(lab, host)?;
                let found: Vec<&Object> = whole.iter().filter(|(key, _)| which(key)).map(|(_, object)| object).collect();
                if found.is_empty() {
                    return Ok(None);
                }
                apply(netns, &[Op::Delete(found[fastrand::usize(..found.len())].clone())])?;
            }
            Act::Change(to) => {
                let whole = observe(lab, host)?;
                let found: Vec<Object> = whole.iter().filter_map(|(_, object)| to(object)).collect();
                if found.is_empty() {
                    return Ok(None);
                }
                apply(netns, &[Op::Set(found[fastrand::usize(..found.len())].clone())])?;
            }
            Act::Overrun => {
                let whole = observe(lab, host)?;
                let Some(route) = whole.iter().find(|(key, _)| matches!(key, Key::Route(..))).map(|(_, object)| object.clone()) else {
                    return Ok(None);
                };
                let foreign = |n: u32| {
                    let dst = flannel::Subnet::new(std::net::Ipv4Addr::from_bits(0xc612_0000 + n).into(), 32).ok()?;
                    let dev = "eth0".parse().ok()?;
                    Some(Object::Route(Route { dst, metric: 9, via: "10.0.0.254".parse().ok(), dev, onlink: false, protocol: 4 }))
                };
                let routes: Vec<Object> = (0..30_000).filter_map(foreign).collect();
                let there: Vec<Op> = routes.iter().cloned().map(Op::Set).collect();
                let mut gone: Vec<Op> = routes.into_iter().map(Op::Delete).collect();
                gone.push(Op::Delete(route));
                let pid = lab.hosts[host].pid().context("its daemon does not run")?;
                let pid = rustix::process::Pid::from_raw(pid.cast_signed()).context("a process has a number")?;
                rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
                let done = apply(netns, &there).and_then(|()| apply(netns, &gone));
                let began = Instant::now();
                rustix::process::kill_process(pid, rustix::process::Signal::CONT)?;
                done?;
                return Ok(Some(began));
            }
        }
        Ok(Some(began))
    }

    /// How long it may take to be put right.
    pub fn patience(&self) -> Duration {
        match self.noticed {
            Noticed::Told => PATIENCE,
            Noticed::Audit => AUDIT,
        }
    }
}

fn apply(netns: &Netns, ops: &[Op]) -> anyhow::Result<()> {
    let outcomes = netns.run(|| anyhow::Ok(Kernel::open()?.apply(ops)))??;
    outcomes.into_iter().try_for_each(|outcome| outcome.map_err(anyhow::Error::new))
}

/// Runs a shell script in a namespace.
///
/// # Errors
/// When it fails; with what it said.
pub fn shell(netns: &Netns, script: &str) -> anyhow::Result<String> {
    let output = netns.run(|| Command::new("sh").args(["-ec", script]).output())??;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// All of ours that is in a host's kernel.
///
/// # Errors
/// When the kernel cannot be read.
pub fn observe(lab: &Lab, host: usize) -> anyhow::Result<Observed> {
    let nftables = lab.plan.config["EnableNFTables"] == true;
    let accept_ra = ("net/ipv6/conf/flannel.1/accept_ra".to_owned(), "0".to_owned());
    let forwarding = (Family::V4.forwarding().to_owned(), "1".to_owned());
    let vxlan = lab.plan.config["Backend"]["Type"] == "vxlan";
    let scope = Scope {
        links: vec!["flannel.1".parse()?],
        sysctls: [forwarding].into_iter().chain(vxlan.then_some(accept_ra)).collect(),
        rulesets: if nftables { vec![Family::V4] } else { Vec::new() },
        iptables: if nftables { Vec::new() } else { vec![Family::V4] },
        networks: vec!["10.244.0.0/16".parse()?],
        file: Some(lab.hosts[host].subnet_file()),
        gateways: vec![lab.hosts[host].subnet.replace(".0/", ".1/").parse()?],
        bridge: Some("cni0".parse()?),
        pod_rules: true,
        ..Scope::default()
    };
    Ok(lab.hosts[host].netns.run(|| Kernel::open()?.observe(&scope))??)
}

/// What is measured of one fault, in one lab.
#[derive(Debug, Clone)]
struct Row {
    name: String,
    place: String,
    /// How it is noticed, and whether it shall be within 100 ms.
    noticed: Option<Noticed>,
    /// Until all was as before, or as it should be now, each time, ordered.
    healed: Vec<Duration>,
    /// Echo requests, one a millisecond, that were lost each time, ordered.
    lost: Vec<usize>,
}

impl Row {
    fn new(name: &str, place: &str, noticed: Option<Noticed>) -> Row {
        Row { name: name.to_owned(), place: place.to_owned(), noticed, healed: Vec::new(), lost: Vec::new() }
    }

    fn push(&mut self, (healed, lost): (Duration, usize)) {
        self.healed.push(healed);
        self.lost.push(lost);
        self.healed.sort();
        self.lost.sort_unstable();
    }

    fn percentile<T: Copy>(values: &[T], percent: usize) -> Option<T> {
        values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied()
    }

    fn millis(&self, percent: usize) -> f64 {
        Row::percentile(&self.healed, percent).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }

    /// As a line of the table.
    fn text(&self) -> String {
        let noticed = match self.noticed {
            Some(Noticed::Told) => "told",
            Some(Noticed::Audit) => "audit",
            None => "",
        };
        let lost = |percent| Row::percentile(&self.lost, percent).map_or("-".to_owned(), |lost| lost.to_string());
        let short = if self.noticed.is_some() && self.millis(99) > 100.0 { " (over 100)" } else { "" };
        format!(
            "| {} | {} | {noticed} | {} | {:.1} | {:.1}{short} | {} | {} |",
            self.name,
            self.place,
            self.healed.len(),
            self.millis(50),
            self.millis(99),
            lost(50),
            lost(99)
        )
    }

    fn json(&self) -> Value {
        json!({
            "fault": self.name, "lab": self.place, "rounds": self.healed.len(), "told": self.noticed.map(|noticed| noticed == Noticed::Told),
            "p50_ms": self.millis(50), "p99_ms": self.millis(99),
            "lost_p50": Row::percentile(&self.lost, 50), "lost_p99": Row::percentile(&self.lost, 99),
        })
    }
}

/// What `lab faults` is told.
#[derive(Debug, Clone, Args)]
pub struct FaultsArgs {
    /// Number of hosts
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub hosts: usize,
    /// How often each; a tenth as often what happens to a whole host, or to the store
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub rounds: usize,
    /// An etcd program, of which three members are started for what can happen to those (needs etcdctl)
    #[arg(long, value_name = "PROGRAM")]
    pub etcd_program: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Measures all faults, each so often, and prints a table.
///
/// # Errors
/// When something is not put right in time: the text says what.
pub fn measure(program: &Path, scratch: &Path, args: &FaultsArgs) -> anyhow::Result<()> {
    ensure!((2..=20).contains(&args.hosts), "--hosts: {} is out of range: faults want 2 to 20", args.hosts);
    let mut rows: Vec<Row> = Vec::new();
    for (backend, nftables) in LABS {
        let mut plan = Plan::new(args.hosts, &json!({ "Type": backend }), program);
        plan.config["EnableNFTables"] = nftables.into();
        let place = format!("{backend}, {}", if nftables { "nftables" } else { "iptables" });
        eprintln!("· {place}: {} rounds of each", args.rounds);
        let mut stage = stage(plan, &scratch.join(place.replace(", ", "-")))?;
        // Rounds outside: so no object is taken so often that it looks like a fight.
        let mut found: BTreeMap<usize, Row> = BTreeMap::new();
        for round in 0..args.rounds {
            for (at, fault) in FAULTS.iter().enumerate().filter(|(_, fault)| fault.fits(backend, nftables)) {
                // What only the audit finds takes a minute.
                if fault.noticed == Noticed::Audit && round >= 2 {
                    continue;
                }
                let measured = once(&stage.lab, &stage.pods, round % args.hosts, fault)?;
                found.entry(at).or_insert_with(|| Row::new(fault.name, &place, Some(fault.noticed))).push(measured);
            }
        }
        rows.extend(found.into_values());
        if nftables {
            let worlds: Vec<World> = world::HOSTS.iter().chain(&world::STORES).copied().collect();
            rows.extend(worlds_of(&mut stage, &worlds, backend, args.rounds.div_ceil(10))?);
        }
    }
    if let Some(etcd) = &args.etcd_program {
        eprintln!("· three members of etcd: {} rounds of each", args.rounds.div_ceil(10));
        let mut stage = stage(members(etcd, args.hosts, program), &scratch.join("etcd"))?;
        rows.extend(worlds_of(&mut stage, &world::etcd::ETCD, "vxlan", args.rounds.div_ceil(10))?);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows.iter().map(Row::json).collect::<Vec<_>>())?);
        return Ok(());
    }
    println!("| fault | lab | noticed | rounds | right again, p50 ms | p99 ms | lost pings of 1 a ms, p50 | p99 |");
    println!("|---|---|---|--:|--:|--:|--:|--:|");
    rows.iter().for_each(|row| println!("{}", row.text()));
    Ok(())
}

/// A cluster over an etcd of three members that asks for a password.
pub fn members(etcd: &Path, hosts: usize, program: &Path) -> Plan {
    let mut plan = Plan { store: StoreKind::Members(etcd.to_owned()), ..Plan::new(hosts, &json!({ "Type": "vxlan" }), program) };
    plan.login = Some(("root".to_owned(), "root".to_owned()));
    plan.env.extend(["USERNAME", "PASSWORD"].map(|name| (format!("FLANNELD_ETCD_{name}"), "flannel".to_owned())));
    plan
}

/// A cluster to which things are about to happen: its hosts have a pod each.
///
/// # Errors
/// When a part does not come up.
pub fn stage(plan: Plan, root: &Path) -> anyhow::Result<Stage> {
    let hosts = plan.hosts;
    let mut lab = Lab::wire(plan, root)?;
    lab.start_store()?;
    lab.put_config()?;
    if matches!(lab.plan.store, StoreKind::Members(_)) {
        world::etcd::enable_auth(&lab)?;
    }
    (0..hosts).try_for_each(|host| lab.start_daemon(host, &[]))?;
    lab.settle()?;
    let pods: Vec<Pod> = (0..hosts).map(|host| lab.add_pod(host)).collect::<anyhow::Result<_>>()?;
    pods.iter().try_for_each(|pod| lab.map_port(pod, "ADD", PORT))?;
    Ok(Stage { lab, pods, root: root.to_owned(), count: 0 })
}

/// Measures what happens to hosts and stores.
fn worlds_of(stage: &mut Stage, worlds: &[World], backend: &str, rounds: usize) -> anyhow::Result<Vec<Row>> {
    let place = match stage.lab.plan.store {
        StoreKind::Members(_) => format!("{backend}, etcd"),
        _ => backend.to_owned(),
    };
    let mut rows = Vec::new();
    for world in worlds.iter().filter(|world| backend == "vxlan" || !world.vxlan) {
        let mut row = Row::new(world.name, &place, None);
        for round in 0..rounds {
            row.push(world::once(stage, world, round % stage.pods.len())?);
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Makes a fault happen, and waits until all is as it was before. Returns how long that took, and how many of the pings of one a
/// millisecond to the next host were lost meanwhile.
///
/// # Errors
/// When it is not put right in its time; the text says what differs.
pub fn once(lab: &Lab, pods: &[Pod], host: usize, fault: &Fault) -> anyhow::Result<(Duration, usize)> {
    let whole = observe(lab, host)?;
    // What must have grown by the end, so that it came back by the daemon's hand and for that reason, and was not merely never gone.
    // (An interface that goes down takes nothing of VXLAN's.)
    let proof = match fault.act {
        Act::Overrun => "overruns",
        _ => "repaired",
    };
    let count = |lab: &Lab| Ok::<_, anyhow::Error>(lab.hosts[host].state()?["objects"][proof].as_u64().unwrap_or(0));
    let before = count(lab)?;
    let other = (host + 1) % pods.len();
    let mut outcome = Ok(Duration::ZERO);
    let (_, lost) = ping_during(&pods[host].netns, pods[other].address, || {
        outcome = (|| {
            let began = fault.strike(lab, host)?;
            let began = began.with_context(|| format!("{}: there is nothing that it could happen to", fault.name))?;
            loop {
                let now = observe(lab, host)?;
                if now == whole {
                    return Ok(began.elapsed());
                }
                ensure!(
                    began.elapsed() < fault.patience(),
                    "{}: {} is not put right; what differs:\n{}its log ends with:\n{}",
                    lab.hosts[host].name,
                    fault.name,
                    difference(&whole, &now),
                    crate::tail(&lab.hosts[host].log())
                );
                std::thread::sleep(Duration::from_micros(500));
            }
        })();
    })?;
    let healed = outcome?;
    let end = Instant::now() + Duration::from_secs(2);
    while !matches!(fault.act, Act::Script(_)) && count(lab)? == before {
        ensure!(Instant::now() < end, "{}: the daemon counts no {proof}", fault.name);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((healed, lost))
}

fn difference(whole: &Observed, now: &Observed) -> String {
    let lacks = whole.iter().filter(|(key, object)| now.get(key) != Some(object)).map(|(_, object)| format!("  lacks {object}\n"));
    let more = now.iter().filter(|(key, object)| whole.get(key) != Some(object)).map(|(_, object)| format!("  has {object}\n"));
    lacks.chain(more).collect()
}

/// Which pods do not reach which others, of all pairs for which `carries` says that they should.
///
/// # Errors
/// When there can be no sockets.
pub fn silent_pairs(pods: &[Pod], patience: Duration, carries: impl Fn(usize, usize) -> bool) -> anyhow::Result<Vec<String>> {
    let mut silent = Vec::new();
    for (from, pod) in pods.iter().enumerate() {
        let targets: Vec<_> = (0..pods.len()).filter(|to| *to != from && carries(from, *to)).collect();
        let addresses: Vec<_> = targets.iter().map(|to| pods[*to].address).collect();
        let answered = pod.netns.run(|| ping_all(&addresses, patience))??;
        let quiet = targets.iter().filter(|to| !answered.contains_key(&pods[**to].address));
        silent.extend(quiet.map(|to| format!("{} > {}", pod.name, pods[*to].name)));
    }
    Ok(silent)
}

/// Is this number ours? So that the script of the flush and the code name the same protocol.
const _: () = assert!(ROUTE_PROTOCOL == 241);
