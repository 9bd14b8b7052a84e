//! Events after which the cluster is not as it was: something happens to a host or to the store, and what is measured is the
//! time until every host has followed.

pub mod etcd;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use flannel::Observed;
use flannel::object::{Key, Object};
use kernel::netns::Netns;

use crate::cluster::{Lab, STORE};
use crate::ping::ping_during;
use crate::process::shell;
use crate::stage::{Stage, has_route, observe};

/// The daemon accepts a new MAC of its VTEP once in five seconds.
const MAC_PAUSE: Duration = Duration::from_millis(5_500);

/// Something that happens to a host or to the store.
#[derive(Debug, Clone, Copy)]
pub struct ClusterEvent {
    /// What happens, and what is waited for.
    pub name: &'static str,
    /// Possible with VXLAN only?
    pub vxlan: bool,
    /// Does it interrupt traffic between pods for a moment?
    pub interrupts: bool,
    /// Causes it on a host and returns the time until all hosts have followed.
    run: Run,
}

type Run = fn(&mut Stage, usize) -> anyhow::Result<Duration>;

/// An event that pods do not notice.
const fn unnoticed(name: &'static str, run: Run) -> ClusterEvent {
    ClusterEvent { name, vxlan: false, interrupts: false, run }
}

/// An event that interrupts traffic between pods for a moment.
const fn interrupting(name: &'static str, run: Run) -> ClusterEvent {
    ClusterEvent { name, vxlan: false, interrupts: true, run }
}

/// Events of a host.
pub const HOSTS: [ClusterEvent; 7] = [
    unnoticed("the interface gets another MTU: the pods' MTU follows", mtu),
    interrupting("the interface gets another address: all peers follow", address),
    interrupting("the interface is deleted and created again: pods reach each other", interface),
    ClusterEvent { vxlan: true, ..interrupting("the VTEP gets another MAC: all peers follow", vtep_mac) },
    unnoticed("the daemon is killed and started again: it is ready", daemon),
    unnoticed("a second daemon is started: it is refused", second_daemon),
    interrupting("an operator deletes the lease: all peers have its route again", lease_deleted),
];

/// Events of the store.
pub const STORES: [ClusterEvent; 8] = [
    interrupting("the store is down, all routes are flushed: they are back", flush_without_store),
    unnoticed("the store is killed and started after 2 s: a new lease reaches all hosts", store_killed),
    unnoticed("the store hangs for 4 s: a new lease reaches all hosts", store_hangs),
    unnoticed("the store is restored from an older backup: a new lease reaches all hosts", store_restored),
    unnoticed("the store comes back empty: all leases are in it again", store_emptied),
    unnoticed("the store comes back empty while the daemon restarts: all leases are in it again", store_emptied_at_start),
    unnoticed("an operator deletes all leases: all are in it again", leases_deleted),
    unnoticed("half of the hosts are cut off from the store for 3 s: a new lease reaches all hosts", partition),
];

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
    stage.until(began, "all peers use the new address", |stage| stage.others(host, |seen| seen.iter().any(|(_, object)| follows(object))))
}

/// Deletes the interface of a host and creates it again, with its first address.
///
/// # Errors
/// When the system refuses.
pub(super) fn new_interface(lab: &Lab, root: &std::path::Path, host: usize) -> anyhow::Result<()> {
    let (name, number, netns) = (&lab.hosts[host].name, host + 1, &lab.hosts[host].netns);
    shell(netns, "ip link del eth0")?;
    shell(&lab.middle, &format!("ip link add {name} type veth peer name {name}x; ip link set {name} master lan0; ip link set {name} up"))?;
    shell(&lab.middle, &format!("ip link set {name}x netns {}", root.join("netns").join(name).display()))?;
    // It sends to its neighbours, as a host that boots does: otherwise they use its old MAC for some seconds.
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
    // Measured from when it has its address again.
    let took = stage.until(Instant::now(), "pods reach each other again", |stage| stage.pods_reach(host))?;
    let first = format!("10.0.0.{}", host + 1);
    stage.until(Instant::now(), "the lease has the address", |stage| {
        Ok(stage.connected() && stage.lab.hosts[host].state()?["public_ip"] == first.as_str())
    })?;
    Ok(took)
}

fn vtep_mac(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    stage.count += 1;
    let mac: flannel::Mac = format!("02:00:00:01:{host:02x}:{:02x}", stage.count % 256).parse()?;
    let began = Instant::now();
    stage.lab.hosts[host].shell(&format!("ip link set flannel.1 address {mac}"))?;
    let follows = |seen: &Observed| {
        let mut macs = seen.iter().filter(|(_, object)| match object {
            Object::Fdb(fdb) => fdb.mac == mac,
            Object::Neigh(neigh) => neigh.mac == mac,
            _ => false,
        });
        macs.by_ref().count() == 2
    };
    let took = stage.until(began, "all peers use the new MAC", |stage| stage.others(host, follows))?;
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
    command.arg(format!("--etcd-endpoints=http://{STORE}"));
    lab.hosts[host].mounts.enter(&mut command)?;
    let output = lab.hosts[host].netns.run(|| command.output())??;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && stderr.contains("another flanneld (pid "), "a second daemon was not refused: {stderr}");
    Ok(())
}

fn second_daemon(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    refuse_second(&stage.lab, host)?;
    Ok(began.elapsed())
}

/// Deletes a host's lease. False if it did not exist, or changed at that moment.
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
    ensure!(delete_lease(&stage.lab, host)?, "the host has no lease");
    stage.until(began, "the lease exists again", |stage| Ok(revision(stage)? > before))?;
    let routed = |seen: &Observed| seen.iter().any(|(key, _)| matches!(key, Key::Route(dst, _) if *dst == subnet));
    stage.until(began, "all peers have its route again", |stage| stage.others(host, routed))
}

fn flush_without_store(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    let whole = observe(&stage.lab, host)?;
    stage.lab.kill_store()?;
    let began = Instant::now();
    stage.lab.hosts[host].shell("ip route flush proto 241")?;
    let took = stage.until(began, "the routes are back", |stage| Ok(observe(&stage.lab, host)? == whole))?;
    stage.lab.start_store()?;
    stage.new_lease_arrives(Instant::now())?;
    Ok(took)
}

fn store_killed(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    stage.lab.kill_store()?;
    std::thread::sleep(Duration::from_secs(2));
    stage.lab.start_store()?;
    stage.new_lease_arrives(Instant::now())
}

fn store_hangs(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    stage.lab.pause_store(Duration::from_secs(4))?;
    stage.new_lease_arrives(Instant::now())
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
    stage.until(Instant::now(), "all hosts have the route of a new lease", |stage| stage.all(|seen| has_route(seen, key)))?;
    copy_store(&mut stage.lab, &root, "backup", "store")?;
    let took = stage.new_lease_arrives(Instant::now())?;
    // A route whose lease the backup lacks is kept for a while: its host may write the lease again.
    ensure!(stage.all(|seen| has_route(seen, key))?, "a route was removed because the backup lacks its lease");
    stage.lab.with_store(async |store| {
        ensure!(store.put_lease(&lease, 0, 0).await?, "the restored store has the lease that its backup lacks");
        let snapshot = store.snapshot().await?;
        let entry = snapshot.entries.iter().find(|entry| entry.key == key).context("the lease that was just written is missing")?;
        Ok(store.delete_lease(&key, entry.mod_revision).await?)
    })?;
    stage.until(Instant::now(), "no host has the route of the deleted lease", |stage| stage.all(|seen| !has_route(seen, key)))?;
    Ok(took)
}

fn store_emptied(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    empty_store(&mut stage.lab, &stage.root)?;
    all_leases_again(stage, Instant::now())
}

fn store_emptied_at_start(stage: &mut Stage, host: usize) -> anyhow::Result<Duration> {
    stage.lab.stop_daemon(host, true)?;
    empty_store(&mut stage.lab, &stage.root)?;
    stage.lab.start_daemon(host, &[])?;
    all_leases_again(stage, Instant::now())
}

fn leases_deleted(stage: &mut Stage, _: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    stage.lab.with_store(async |store| store.delete_everything().await)?;
    stage.lab.put_config()?;
    all_leases_again(stage, began)
}

fn all_leases_again(stage: &Stage, began: Instant) -> anyhow::Result<Duration> {
    let hosts = stage.lab.hosts.len();
    stage.until(began, "all leases are in the store again", |stage| {
        Ok(stage.lab.with_store(async |store| store.snapshot().await)?.entries.len() == hosts)
    })
}

/// Empties the store; an operator writes the network configuration again.
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
    stage.new_lease_arrives(Instant::now())
}

/// Drops what hosts send to the store, for a while.
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

/// Causes an event on a host. Returns the time until all hosts had followed, and how many of the pings, one each millisecond
/// between its pod and the next host's, were lost meanwhile.
///
/// # Errors
/// When a host does not follow in time; the text says what is missing.
pub fn once(stage: &mut Stage, event: &ClusterEvent, host: usize) -> anyhow::Result<(Duration, usize)> {
    let from = Netns::open(&stage.pods[host].path)?;
    let to = stage.pods[(host + 1) % stage.pods.len()].address;
    let mut took = Ok(Duration::ZERO);
    let (_, lost) = ping_during(&from, to, || took = (event.run)(stage, host))?;
    let took = took.with_context(|| format!("{}: {}", stage.lab.hosts[host].name, event.name))?;
    Ok((took, lost))
}
