//! A catalogue of things that go wrong on a host, by an operator, another program or by themselves. `lab faults` measures how
//! soon each is repaired, `lab chaos` draws from it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use flannel::object::{Key, Object, ROUTE_PROTOCOL, Route};
use flannel::{Observed, Op};
use kernel::Kernel;
use kernel::netns::Netns;

use crate::cluster::{Lab, Pod};
use crate::ping::ping_during;
use crate::process::tail;
use crate::stage::observe;

/// `subnet.env` of every host, each in a mount namespace of its own.
const FILE: &str = "/run/flannel/subnet.env";
/// Time limit of a repair that a notification triggers.
const EVENT_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit of a repair that waits for the audit, which runs once a minute.
const AUDIT_TIMEOUT: Duration = Duration::from_secs(70);

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// What happens.
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
    /// By a notification of the kernel.
    Event,
    /// By the audit.
    Audit,
}

/// How a fault is injected.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// Deletes one of the objects whose key matches.
    Delete(fn(&Key) -> bool),
    /// Replaces one of the objects for which this returns another.
    Change(fn(&Object) -> Option<Object>),
    /// A shell script on the host. `$FILE` is its `subnet.env`.
    Script(&'static str),
    /// Stops the daemon while so much changes that the kernel drops notifications, the deletion of one of our routes among them.
    Overrun,
}

const fn announced(name: &'static str, place: Place, act: Act) -> Fault {
    Fault { name, place, act, noticed: Noticed::Event }
}

fn is_link(key: &Key) -> bool {
    matches!(key, Key::Link(_))
}

/// All faults after whose repair the host is exactly as it was.
pub const FAULTS: [Fault; 34] = [
    announced("a route is deleted", Place::Any, Act::Delete(|key| matches!(key, Key::Route(..)))),
    announced(
        "a route gets another gateway",
        Place::Any,
        Act::Change(|object| match object {
            Object::Route(route) if !route.onlink => Some(Object::Route(Route { via: "10.0.0.254".parse().ok(), ..*route })),
            Object::Route(route) => Some(Object::Route(Route { via: "10.244.255.0".parse().ok(), ..*route })),
            _ => None,
        }),
    ),
    announced("all routes are flushed", Place::Any, Act::Script("ip route flush proto 241")),
    announced(
        "a stale route of ours appears",
        Place::Any,
        Act::Change(|object| match object {
            Object::Route(route) => Some(Object::Route(Route { dst: "10.244.250.0/24".parse().ok()?, metric: 250, ..*route })),
            _ => None,
        }),
    ),
    announced("notifications are lost, a route among them", Place::Any, Act::Overrun),
    announced("a neighbour entry is deleted", Place::Vxlan, Act::Delete(|key| matches!(key, Key::Neigh(..)))),
    announced(
        "a neighbour entry gets another MAC",
        Place::Vxlan,
        Act::Change(|object| match object {
            Object::Neigh(neigh) => Some(Object::Neigh(flannel::object::Neigh { mac: flannel::Mac([2, 9, 9, 9, 9, 9]), ..*neigh })),
            _ => None,
        }),
    ),
    announced("an FDB entry is deleted", Place::Vxlan, Act::Delete(|key| matches!(key, Key::Fdb(..)))),
    announced(
        "an FDB entry points to another host",
        Place::Vxlan,
        Act::Change(|object| match object {
            Object::Fdb(fdb) => Some(Object::Fdb(flannel::object::Fdb { dst: "10.0.0.253".parse().ok()?, ..*fdb })),
            _ => None,
        }),
    ),
    announced(
        "all neighbour and FDB entries are flushed",
        Place::Vxlan,
        Act::Script(
            "ip neigh flush dev flannel.1 nud permanent; bridge fdb show dev flannel.1 | while read mac d ip rest; do bridge fdb del $mac dev flannel.1 dst $ip; done",
        ),
    ),
    announced("the device's address is deleted", Place::Vxlan, Act::Delete(|key| matches!(key, Key::Addr(..)))),
    announced(
        "the device's MTU is changed",
        Place::Vxlan,
        Act::Change(|object| match object {
            Object::Link(link) => Some(Object::Link(Box::new(flannel::object::Link { mtu: 1300, ..(**link).clone() }))),
            _ => None,
        }),
    ),
    announced("the device is set down", Place::Vxlan, Act::Script("ip link set flannel.1 down")),
    announced("the device is set down and up", Place::Vxlan, Act::Script("ip link set flannel.1 down; ip link set flannel.1 up")),
    announced("the device is deleted", Place::Vxlan, Act::Delete(is_link)),
    announced(
        "the device is replaced by one of another VNI",
        Place::Vxlan,
        Act::Script(
            "ip link add fx type vxlan id 7 dstport 8472 local 10.0.0.77 nolearning; ip link del flannel.1; ip link set fx name flannel.1 || ip link del fx",
        ),
    ),
    announced(
        "the device is replaced by a bridge",
        Place::Vxlan,
        Act::Script("ip link add fx type bridge; ip link del flannel.1; ip link set fx name flannel.1 || ip link del fx"),
    ),
    announced("the pods' bridge is deleted", Place::Any, Act::Script("ip link del cni0")),
    announced("the pods' bridge is set down", Place::Any, Act::Script("ip link set cni0 down")),
    announced(
        "the pods' bridge gets another address",
        Place::Any,
        Act::Script("ip -4 addr flush dev cni0; ip addr add 192.0.2.1/24 dev cni0"),
    ),
    announced(
        "a pod is taken from the bridge",
        Place::Any,
        Act::Script("ip link set $(ip -o link show master cni0 | head -1 | cut -d: -f2 | cut -d@ -f1) nomaster"),
    ),
    announced("forwarding is switched off", Place::Any, Act::Script("echo 0 > /proc/sys/net/ipv4/ip_forward")),
    announced("nft flush ruleset", Place::Any, Act::Script("nft flush ruleset")),
    announced("our nftables table is deleted", Place::Any, Act::Script("nft delete table ip flannel-ipv4")),
    announced(
        "a chain of our table is flushed",
        Place::Any,
        Act::Script("nft flush chain ip flannel-ipv4 $(nft list table ip flannel-ipv4 | awk '$1 == \"chain\" { print $2; exit }')"),
    ),
    announced("portmap's table is deleted", Place::Any, Act::Script("nft delete table ip cni_hostport")),
    announced("portmap's rules are flushed", Place::Any, Act::Script("nft flush table ip cni_hostport")),
    announced(
        "our iptables chains are flushed",
        Place::Iptables,
        Act::Script("iptables -t nat -F FLANNEL-POSTRTG; iptables -F FLANNEL-FWD"),
    ),
    announced(
        "the jumps to our iptables chains are deleted",
        Place::Iptables,
        Act::Script("iptables -t nat -F POSTROUTING; iptables -F FORWARD"),
    ),
    announced("subnet.env is deleted", Place::Any, Act::Script("rm $FILE")),
    announced("subnet.env is overwritten", Place::Any, Act::Script("echo FLANNEL_MTU=9000 > $FILE")),
    announced(
        "the interface goes down and up",
        Place::Any,
        Act::Script("ip link set eth0 down; ip link set eth0 up; ip route replace default via 10.0.0.254 dev eth0"),
    ),
    announced(
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
    /// Is it possible with this backend and kind of rules?
    pub fn fits(&self, backend: &str, nftables: bool) -> bool {
        match self.place {
            Place::Any => nftables,
            Place::Vxlan => nftables && backend == "vxlan",
            Place::Iptables => !nftables,
        }
    }

    /// Injects it on a host. Returns the earliest time at which it could be repaired; `None` if the host has no object of
    /// that kind.
    ///
    /// # Errors
    /// When it cannot be injected.
    pub fn inject(&self, lab: &Lab, host: usize) -> anyhow::Result<Option<Instant>> {
        let target = &lab.hosts[host];
        let began = Instant::now();
        let op = match self.act {
            Act::Script(script) => {
                target.shell(&format!("FILE={FILE}; {script}")).with_context(|| format!("{}: {}", target.name, self.name))?;
                return Ok(Some(began));
            }
            Act::Overrun => return overrun(lab, host),
            Act::Delete(which) => {
                let whole = observe(lab, host)?;
                draw(whole.iter().filter(|(key, _)| which(key)).map(|(_, object)| object.clone())).map(Op::Delete)
            }
            Act::Change(to) => draw(observe(lab, host)?.iter().filter_map(|(_, object)| to(object))).map(Op::Set),
        };
        let Some(op) = op else { return Ok(None) };
        apply(&target.netns, &[op])?;
        Ok(Some(began))
    }

    /// How long the repair may take.
    pub fn timeout(&self) -> Duration {
        match self.noticed {
            Noticed::Event => EVENT_TIMEOUT,
            Noticed::Audit => AUDIT_TIMEOUT,
        }
    }
}

fn draw(objects: impl Iterator<Item = Object>) -> Option<Object> {
    let found: Vec<Object> = objects.collect();
    if found.is_empty() { None } else { Some(found[fastrand::usize(..found.len())].clone()) }
}

/// Stops the daemon while 30,000 foreign routes come and go and one of ours is deleted.
fn overrun(lab: &Lab, host: usize) -> anyhow::Result<Option<Instant>> {
    use rustix::process::{Pid, Signal, kill_process};
    let netns = &lab.hosts[host].netns;
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
    let added: Vec<Op> = routes.iter().cloned().map(Op::Set).collect();
    let mut deleted: Vec<Op> = routes.into_iter().map(Op::Delete).collect();
    deleted.push(Op::Delete(route));
    let pid = lab.hosts[host].pid().context("the daemon is not running")?;
    let pid = Pid::from_raw(pid.cast_signed()).context("process 0 is not a daemon")?;
    kill_process(pid, Signal::STOP)?;
    let done = apply(netns, &added).and_then(|()| apply(netns, &deleted));
    let began = Instant::now();
    kill_process(pid, Signal::CONT)?;
    done?;
    Ok(Some(began))
}

fn apply(netns: &Netns, ops: &[Op]) -> anyhow::Result<()> {
    let outcomes = netns.run(|| anyhow::Ok(Kernel::open()?.apply(ops)))??;
    outcomes.into_iter().try_for_each(|outcome| outcome.map_err(anyhow::Error::new))
}

/// What was measured of a fault.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Until the host was as before.
    pub repaired: Duration,
    /// Pings, one each millisecond to the next host, that were lost meanwhile.
    pub lost: usize,
    /// The first line that the daemon logged about it, without the part that varies, and when it was seen.
    pub said: Option<(String, Duration)>,
}

/// Injects a fault and waits until the host is as before.
///
/// # Errors
/// When it is not repaired in time; the text says what differs.
pub fn once(lab: &Lab, pods: &[Pod], host: usize, fault: &Fault) -> anyhow::Result<Measured> {
    let whole = observe(lab, host)?;
    // The daemon's counter must grow: that proves that the daemon repaired it, and that there was something to repair. (An
    // interface that goes down, for one, takes nothing of VXLAN's along.)
    let counter = match fault.act {
        Act::Overrun => "overruns",
        _ => "repaired",
    };
    let target = &lab.hosts[host];
    let count = || Ok::<_, anyhow::Error>(target.state()?["objects"][counter].as_u64().unwrap_or(0));
    let before = count()?;
    let other = (host + 1) % pods.len();
    let mut outcome = Ok((Duration::ZERO, None));
    let (_, lost) = ping_during(&pods[host].netns, pods[other].address, || outcome = inject_and_wait(lab, host, fault, &whole))?;
    let (repaired, said) = outcome?;
    let end = Instant::now() + Duration::from_secs(2);
    while !matches!(fault.act, Act::Script(_)) && count()? == before {
        ensure!(Instant::now() < end, "{}: the daemon's counter {counter:?} did not grow", fault.name);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Measured { repaired, lost, said })
}

fn inject_and_wait(lab: &Lab, host: usize, fault: &Fault, whole: &Observed) -> anyhow::Result<(Duration, Option<(String, Duration)>)> {
    let target = &lab.hosts[host];
    let mut log = File::open(target.log())?;
    let offset = log.seek(SeekFrom::End(0))?;
    let mut said = None;
    let began = fault.inject(lab, host)?.with_context(|| format!("{}: the host has no object of that kind", fault.name))?;
    loop {
        let now = observe(lab, host)?;
        let elapsed = began.elapsed();
        if said.is_none() {
            said = first_event(&mut log, offset)?.map(|event| (event, elapsed));
        }
        if now == *whole {
            if said.is_none() {
                // The line may follow the repair.
                std::thread::sleep(Duration::from_millis(2));
                said = first_event(&mut log, offset)?.map(|event| (event, began.elapsed()));
            }
            return Ok((elapsed, said));
        }
        ensure!(
            began.elapsed() < fault.timeout(),
            "{}: {}: not repaired within {} s; what differs:\n{}its log ends with:\n{}",
            target.name,
            fault.name,
            fault.timeout().as_secs(),
            difference(whole, &now),
            tail(&target.log())
        );
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// The message of the first line of a log behind an offset, without its time, its level and its fields.
fn first_event(log: &mut File, offset: u64) -> std::io::Result<Option<String>> {
    let mut text = String::new();
    log.seek(SeekFrom::Start(offset))?;
    log.read_to_string(&mut text)?;
    let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let words = |line: &str| line.split_whitespace().skip(2).take_while(|word| !word.contains('=')).collect::<Vec<_>>().join(" ");
    Ok(lines.next().map(words))
}

fn difference(whole: &Observed, now: &Observed) -> String {
    let lacks = whole.iter().filter(|(key, object)| now.get(key) != Some(object)).map(|(_, object)| format!("  lacks {object}\n"));
    let more = now.iter().filter(|(key, object)| whole.get(key) != Some(object)).map(|(_, object)| format!("  has {object}\n"));
    lacks.chain(more).collect()
}

// The script that flushes routes names the protocol by its number.
const _: () = assert!(ROUTE_PROTOCOL == 241);
