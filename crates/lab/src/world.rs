//! What happens to a host or to the store as a whole, after which not all is as it was: what is measured is until everybody has
//! followed.

pub mod etcd;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use flannel::object::{Key, Object};
use flannel::{Lease, LeaseKey, Observed, Peer, PerFamily};
use kernel::netns::Netns;

use crate::faults::{observe, shell};
use crate::ping::{ping_all, ping_during};
use crate::{Lab, Pod, STORE};

/// Until everybody has followed. A connection that is dead without a word is noticed after 15 seconds.
const PATIENCE: Duration = Duration::from_secs(40);
/// A VTEP's new MAC is followed once in five seconds.
const MAC_PAUSE: Duration = Duration::from_millis(5_500);

/// A cluster to which things happen.
#[derive(Debug)]
pub struct Stage {
    /// The cluster.
    pub lab: Lab,
    /// A pod on each host.
    pub pods: Vec<Pod>,
    /// Its directory.
    pub root: PathBuf,
    /// How often something was done: names what is made.
    pub count: u32,
}

/// Something that happens, and how long until everybody has followed.
#[derive(Debug, Clone, Copy)]
pub struct World {
    /// What it is.
    pub name: &'static str,
    /// With VXLAN only.
    pub vxlan: bool,
    /// Does it take something away by which pods reach each other, for a moment?
    pub cuts: bool,
    /// Does it to a host and waits.
    pub run: Run,
}

type Run = fn(&mut Stage, usize) -> anyhow::Result<Duration>;

/// Something of which pods notice nothing.
const fn unnoticed(name: &'static str, run: Run) -> World {
    World { name, vxlan: false, cuts: false, run }
}

/// Something that cuts pods off for a moment.
const fn cutting(name: &'static str, run: Run) -> World {
    World { name, vxlan: false, cuts: true, run }
}

/// What happens to a host.
pub const HOSTS: [World; 7] = [
    unnoticed("the interface has another MTU: pods' MTU follows", mtu),
    cutting("the interface has another address: all peers follow", address),
    cutting("the interface is deleted, comes back with another index: pods carry", interface),
    World { vxlan: true, ..cutting("the VTEP has another MAC: all peers follow", vtep_mac) },
    unnoticed("the daemon is killed and started again: it is ready", daemon),
    unnoticed("a second daemon is started: it is refused", second_daemon),
    cutting("an operator deletes the lease: all peers have it again", lease_deleted),
];

/// What happens to the store.
pub const STORES: [World; 8] = [
    cutting("the store is away, all routes are flushed: they are back", flush_without_store),
    unnoticed("the store is killed and started after 2 s: all hear of a new lease", store_killed),
    unnoticed("the store hangs for 4 s: all hear of a new lease", store_hangs),
    unnoticed("the store is restored from an older backup: all hear of a new lease", store_restored),
    unnoticed("the store comes back empty: all leases are in it again", store_emptied),
    unnoticed("the same, and the daemon is started again just then", store_emptied_at_start),
    unnoticed("an operator deletes all leases: all are in it again", leases_deleted),
    unnoticed("half of the hosts lose the store for 3 s: all hear of a new lease", partition),
];

impl Stage {
    /// Waits until something is so, and returns since when it was waited for.
    ///
    /// # Errors
    /// When it does not come to be.
    pub fn until(&self, began: Instant, what: &str, mut so: impl FnMut(&Stage) -> anyhow::Result<bool>) -> anyhow::Result<Duration> {
        while !so(self)? {
            if began.elapsed() > PATIENCE {
                let logs: Vec<String> = self.lab.hosts.iter().map(|host| crate::tail(&host.log())).collect();
                bail!("not within {} s: {what}\n{}", PATIENCE.as_secs(), logs.join("\n--\n"));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(began.elapsed())
    }

    /// Does this hold of what each host's kernel has, but for one host's?
    fn others(&self, host: usize, so: impl Fn(&Observed) -> bool) -> anyhow::Result<bool> {
        for other in (0..self.lab.hosts.len()).filter(|other| *other != host) {
            if !so(&observe(&self.lab, other)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_vxlan(&self) -> bool {
        self.lab.plan.config["Backend"]["Type"] == "vxlan"
    }

    fn connected(&self) -> anyhow::Result<bool> {
        Ok((0..self.lab.hosts.len()).all(|host| self.lab.hosts[host].state().is_ok_and(|state| state["store"]["connected"] == true)))
    }

    /// Puts a lease that nobody had, and waits until all hosts have its route; then deletes it, and waits until nobody has.
    ///
    /// # Errors
    /// When somebody does not hear of it.
    pub fn heard(&mut self, began: Instant) -> anyhow::Result<Duration> {
        let (key, lease) = self.new_lease()?;
        self.lab.with_store(async |store| store.put_lease(&lease, 0, 0).await)?;
        let route = |key: LeaseKey| move |seen: &Observed| has_route(seen, key);
        let took = self.until(began, "all hosts hear of a new lease", |stage| stage.others(usize::MAX, route(key)))?;
        self.lab.with_store(async |store| {
            let snapshot = store.snapshot().await?;
            let entry = snapshot.entries.iter().find(|entry| entry.key == key);
            match entry {
                Some(entry) => store.delete_lease(&key, entry.mod_revision).await,
                None => Ok(true),
            }
        })?;
        self.until(Instant::now(), "all hosts hear of its end", |stage| stage.others(usize::MAX, |seen| !has_route(seen, key)))?;
        Ok(took)
    }

    /// A lease of a host that there is not.
    fn new_lease(&mut self) -> anyhow::Result<(LeaseKey, Lease)> {
        self.count += 1;
        let number = 100 + self.count % 100;
        let key = flannel::wire::parse_key(&format!("10.244.{number}.0-24"))?;
        // No host of a lab has it, wherever it moves.
        let public = PerFamily { v4: format!("10.0.0.{}", 200 + self.count % 40).parse().ok(), v6: None };
        let data = self.is_vxlan().then(|| format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:77:{number:02x}\"}}").into());
        let backend_type = if self.is_vxlan() { "vxlan" } else { "host-gw" };
        let peer = Peer { public, backend_type: backend_type.into(), backend_data: PerFamily { v4: data, v6: None } };
        Ok((key, Lease { key, peer }))
    }

    /// Do the pods of this host and of the next reach each other?
    fn carries(&self, host: usize) -> anyhow::Result<bool> {
        let other = (host + 1) % self.pods.len();
        for (from, to) in [(host, other), (other, host)] {
            if self.pods[from].netns.run(|| ping_all(&[self.pods[to].address], Duration::from_millis(20)))??.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn has_route(seen: &Observed, key: LeaseKey) -> bool {
    seen.iter().any(|(object, _)| matches!(object, Key::Route(dst, _) if key.subnets().v4 == Some(*dst)))
}

fn mtu(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let (netns, file) = (&stage.lab.hosts[host].netns, stage.lab.hosts[host].subnet_file());
    let change = |mtu: u32| -> anyhow::Result<Duration> {
        let pods = if stage.is_vxlan() { mtu - 50 } else { mtu };
        let began = Instant::now();
        shell(netns, &format!("ip link set eth0 mtu {mtu}"))?;
        stage.until(began, "subnet.env has the new MTU", |stage| {
            let links_follow =
                observe(&stage.lab, host)?.iter().all(|(_, object)| !matches!(object, Object::Link(link) if link.mtu != pods));
            Ok(links_follow && std::fs::read_to_string(&file).is_ok_and(|text| text.contains(&format!("FLANNEL_MTU={pods}\n"))))
        })
    };
    let took = change(1_400)?;
    change(1_500)?;
    Ok(took)
}

/// Gives the interface of a host its other address: 10.0.0.1 or 10.0.0.101, and so on.
///
/// # Errors
/// When the system refuses.
pub(super) fn move_host(lab: &Lab, host: usize) -> anyhow::Result<String> {
    let (netns, number) = (&lab.hosts[host].netns, host + 1);
    let has_first = shell(netns, "ip -o -4 addr show dev eth0")?.contains(&format!("10.0.0.{number}/"));
    let other = format!("10.0.0.{}", if has_first { 100 + number } else { number });
    shell(netns, &format!("ip addr flush dev eth0; ip addr add {other}/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0"))?;
    Ok(other)
}

fn address(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let other = move_host(&stage.lab, host)?.parse()?;
    let follows = |object: &Object| match object {
        Object::Fdb(fdb) => fdb.dst == other,
        Object::Route(route) => route.via == Some(other),
        _ => false,
    };
    stage.until(began, "all peers know the new address", |stage| stage.others(host, |seen| seen.iter().any(|(_, object)| follows(object))))
}

/// Deletes the interface of a host and makes it anew, as its first address.
///
/// # Errors
/// When the system refuses.
pub(super) fn new_interface(lab: &Lab, root: &std::path::Path, host: usize) -> anyhow::Result<()> {
    let (name, number, netns) = (&lab.hosts[host].name, host + 1, &lab.hosts[host].netns);
    shell(netns, "ip link del eth0")?;
    shell(&lab.middle, &format!("ip link add {name} type veth peer name {name}x; ip link set {name} master lan0; ip link set {name} up"))?;
    // iproute2 knows namespaces by names in a folder of its own.
    let file = format!("/run/netns/faults-{}-{name}", std::process::id());
    let alias = file.trim_start_matches("/run/netns/");
    shell(
        &lab.middle,
        &format!(
            "mkdir -p /run/netns; touch {file}; mount --bind {} {file}; ip link set {name}x netns {alias}; umount {file}; rm {file}",
            root.join("netns").join(name).display()
        ),
    )?;
    // It speaks to its neighbours, as a host does that comes up: else they send to its old MAC for some seconds.
    shell(
        netns,
        &format!(
            "ip link set {name}x name eth0; ip link set eth0 up; ip addr add 10.0.0.{number}/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0; \
             for i in $(seq 1 {}); do ping -c 1 -W 1 10.0.0.$i > /dev/null & done; wait",
            lab.hosts.len()
        ),
    )?;
    Ok(())
}

fn interface(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    new_interface(&stage.lab, &stage.root, host)?;
    // From when it has its address again.
    let took = stage.until(Instant::now(), "pods carry again", |stage| stage.carries(host))?;
    let first = format!("10.0.0.{}", host + 1);
    stage.until(Instant::now(), "the lease says so", |stage| {
        Ok(stage.connected()? && stage.lab.hosts[host].state()?["public_ip"] == first.as_str())
    })?;
    Ok(took)
}

fn vtep_mac(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    stage.count += 1;
    let mac: flannel::Mac = format!("02:00:00:01:{host:02x}:{:02x}", stage.count % 256).parse()?;
    let began = Instant::now();
    shell(&stage.lab.hosts[host].netns, &format!("ip link set flannel.1 address {mac}"))?;
    let knows = |seen: &Observed| {
        let mut macs = seen.iter().filter(|(_, object)| match object {
            Object::Fdb(fdb) => fdb.mac == mac,
            Object::Neigh(neigh) => neigh.mac == mac,
            _ => false,
        });
        macs.by_ref().count() == 2
    };
    let took = stage.until(began, "all peers know the new MAC", |stage| stage.others(host, knows))?;
    std::thread::sleep(MAC_PAUSE);
    Ok(took)
}

fn daemon(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    stage.lab.stop_daemon(host, true)?;
    let began = Instant::now();
    stage.lab.start_daemon(host, &[])?;
    stage.until(began, "it is ready", |stage| Ok(stage.lab.hosts[host].get("/readyz").is_ok_and(|(status, _)| status == 200)))
}

/// Starts a second daemon, which must be refused.
///
/// # Errors
/// When it is not.
pub(super) fn refuse_second(lab: &Lab, host: usize) -> anyhow::Result<()> {
    let mut command = Command::new(&lab.plan.program);
    command.arg(format!("--subnet-file={}", lab.hosts[host].subnet_file().display()));
    command.arg(format!("--etcd-endpoints=http://{STORE}"));
    let output = lab.hosts[host].netns.run(|| command.output())??;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("another flanneld (pid "), "a second daemon was not refused: {said}");
    Ok(())
}

fn second_daemon(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    refuse_second(&stage.lab, host)?;
    Ok(began.elapsed())
}

/// Deletes a host's lease. False if it was not there, or changed that moment.
///
/// # Errors
/// When the store refuses.
pub(super) fn delete_lease(lab: &Lab, host: usize) -> anyhow::Result<bool> {
    let subnet = lab.hosts[host].subnet.clone();
    lab.with_store(async |store| {
        let snapshot = store.snapshot().await?;
        let Some(entry) = snapshot.entries.iter().find(|entry| entry.key.to_string() == subnet) else { return Ok(false) };
        store.delete_lease(&entry.key, entry.mod_revision).await
    })
}

fn lease_deleted(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let subnet = stage.lab.hosts[host].subnet.parse()?;
    let revision = |stage: &Stage| -> anyhow::Result<i64> {
        let snapshot = stage.lab.with_store(async |store| store.snapshot().await)?;
        Ok(snapshot.entries.iter().find(|entry| entry.key.subnets().v4 == Some(subnet)).map_or(0, |entry| entry.create_revision))
    };
    let before = revision(stage)?;
    let began = Instant::now();
    ensure!(delete_lease(&stage.lab, host)?, "the lease is not there");
    stage.until(began, "the lease is there again", |stage| Ok(revision(stage)? > before))?;
    let there = |seen: &Observed| seen.iter().any(|(key, _)| matches!(key, Key::Route(dst, _) if *dst == subnet));
    stage.until(began, "all peers have it again", |stage| stage.others(host, there))
}

fn flush_without_store(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let whole = observe(&stage.lab, host)?;
    stage.lab.kill_store()?;
    let began = Instant::now();
    shell(&stage.lab.hosts[host].netns, "ip route flush proto 241")?;
    let took = stage.until(began, "the routes are back", |stage| Ok(observe(&stage.lab, host)? == whole))?;
    stage.lab.start_store()?;
    stage.heard(Instant::now())?;
    Ok(took)
}

fn store_killed(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    stage.lab.kill_store()?;
    std::thread::sleep(Duration::from_secs(2));
    stage.lab.start_store()?;
    stage.heard(Instant::now())
}

fn store_hangs(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    stage.lab.pause_store(Duration::from_secs(4))?;
    stage.heard(Instant::now())
}

/// Copies the store's files while it does not run, as a careful operator would.
///
/// # Errors
/// When the system refuses.
pub(super) fn copy_store(lab: &mut Lab, root: &std::path::Path, from: &str, to: &str) -> anyhow::Result<()> {
    lab.kill_store()?;
    let (from, to) = (root.join(from), root.join(to));
    let _ = std::fs::remove_dir_all(&to);
    std::fs::create_dir_all(&to)?;
    for file in std::fs::read_dir(&from)? {
        let file = file?;
        std::fs::copy(file.path(), to.join(file.file_name()))?;
    }
    lab.start_store()
}

fn store_restored(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    let root = stage.root.clone();
    copy_store(&mut stage.lab, &root, "store", "backup")?;
    let (key, lease) = stage.new_lease()?;
    stage.lab.with_store(async |store| store.put_lease(&lease, 0, 0).await)?;
    stage.until(Instant::now(), "all hosts hear of a new lease", |stage| stage.others(usize::MAX, |seen| has_route(seen, key)))?;
    copy_store(&mut stage.lab, &root, "backup", "store")?;
    let took = stage.heard(Instant::now())?;
    // What the backup does not know is in doubt, and stays until it is told of.
    ensure!(stage.others(usize::MAX, |seen| has_route(seen, key))?, "a route was taken because a backup does not know its lease");
    stage.lab.with_store(async |store| {
        ensure!(store.put_lease(&lease, 0, 0).await?, "the store has the lease all the same");
        let snapshot = store.snapshot().await?;
        let entry = snapshot.entries.iter().find(|entry| entry.key == key).context("the lease was just written")?;
        Ok(store.delete_lease(&key, entry.mod_revision).await?)
    })?;
    stage.until(Instant::now(), "the doubt is over", |stage| stage.others(usize::MAX, |seen| !has_route(seen, key)))?;
    Ok(took)
}

fn store_emptied(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    empty_store(&mut stage.lab, &stage.root)?;
    all_again(stage, Instant::now())
}

fn store_emptied_at_start(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    stage.lab.stop_daemon(host, true)?;
    empty_store(&mut stage.lab, &stage.root)?;
    stage.lab.start_daemon(host, &[])?;
    all_again(stage, Instant::now())
}

fn leases_deleted(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    stage.lab.with_store(async |store| store.delete_everything().await)?;
    stage.lab.put_config()?;
    all_again(stage, began)
}

fn all_again(stage: &Stage, began: Instant) -> anyhow::Result<Duration> {
    let hosts = stage.lab.hosts.len();
    stage.until(began, "all leases are in the store again", |stage| {
        Ok(stage.lab.with_store(async |store| store.snapshot().await)?.entries.len() == hosts)
    })
}

/// The store loses all that it had; an operator gives it the network configuration again.
///
/// # Errors
/// When the system refuses.
pub(super) fn empty_store(lab: &mut Lab, root: &std::path::Path) -> anyhow::Result<()> {
    lab.kill_store()?;
    std::fs::remove_dir_all(root.join("store"))?;
    lab.start_store()?;
    lab.put_config()
}

fn partition(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    let half: Vec<usize> = (0..stage.lab.hosts.len()).step_by(2).collect();
    cut_from_store(&stage.lab, &half, Duration::from_secs(3))?;
    stage.heard(Instant::now())
}

/// Lets hosts lose the store for a while: what they send to it is dropped.
///
/// # Errors
/// When the system refuses.
pub(super) fn cut_from_store(lab: &Lab, hosts: &[usize], time: Duration) -> anyhow::Result<()> {
    let drops: String = hosts
        .iter()
        .map(|host| {
            format!("nft add rule inet faults in ip saddr {{ 10.0.0.{0}, 10.0.0.{1} }} tcp dport 2379 drop; ", host + 1, host + 101)
        })
        .collect();
    let hook = "nft add table inet faults; nft add chain inet faults in '{ type filter hook input priority 0; }'";
    shell(&lab.middle, &format!("{hook}; {drops}"))?;
    std::thread::sleep(time);
    shell(&lab.middle, "nft delete table inet faults").map(drop)
}

/// Lets something happen to a host. Returns how long it took until everybody had followed, and how many of the pings of one a
/// millisecond between its pod and the next host's were lost meanwhile.
///
/// # Errors
/// When somebody does not follow; the text says what.
pub fn once(stage: &mut Stage, world: &World, host: usize) -> anyhow::Result<(Duration, usize)> {
    let from = Netns::open(&stage.pods[host].path)?;
    let to = stage.pods[(host + 1) % stage.pods.len()].address;
    let mut took = Ok(Duration::ZERO);
    let (_, lost) = ping_during(&from, to, || took = (world.run)(stage, host))?;
    let took = took.with_context(|| format!("{}: {}", stage.lab.hosts[host].name, world.name))?;
    Ok((took, lost))
}
