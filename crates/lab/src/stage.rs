//! A cluster prepared for trouble: a pod and a mapped port on each host, and ways to see what its kernels hold.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use flannel::object::Key;
use flannel::scope::Scope;
use flannel::{Family, Lease, LeaseKey, Observed, Peer, PerFamily};
use kernel::Kernel;

use crate::cluster::{Lab, Pod};
use crate::ping::ping_all;
use crate::plan::{Plan, StoreKind};
use crate::process::tail;

/// The port of each host that leads to its first pod.
pub const PORT: u16 = 30_080;
/// How long hosts may take to follow an event. A connection that breaks without a reset is noticed after 15 seconds.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(40);

/// A cluster prepared for trouble.
#[derive(Debug)]
pub struct Stage {
    /// The cluster.
    pub lab: Lab,
    /// A pod on each host.
    pub pods: Vec<Pod>,
    /// Its directory.
    pub root: PathBuf,
    /// Makes the names of new leases and MACs unique.
    pub(crate) count: u32,
}

impl Stage {
    /// Starts the cluster and adds the pods.
    ///
    /// # Errors
    /// When a part does not come up.
    pub fn new(plan: Plan, root: &Path) -> anyhow::Result<Stage> {
        let hosts = plan.hosts;
        let has_members = matches!(plan.store, StoreKind::Members(_));
        let mut lab = Lab::wire(plan, root)?;
        lab.start_store()?;
        lab.put_config()?;
        if has_members {
            lab.enable_auth()?;
        }
        (0..hosts).try_for_each(|host| lab.start_daemon(host, &[]))?;
        lab.settle()?;
        let pods: Vec<Pod> = (0..hosts).map(|host| lab.add_pod(host)).collect::<anyhow::Result<_>>()?;
        pods.iter().try_for_each(|pod| lab.map_port(pod, "ADD", PORT))?;
        Ok(Stage { lab, pods, root: root.to_owned(), count: 0 })
    }

    /// Waits until a condition holds, and returns the time since `began`.
    ///
    /// # Errors
    /// When it does not hold in time; the text has the logs.
    pub(crate) fn until(
        &self,
        began: Instant,
        what: &str,
        mut holds: impl FnMut(&Stage) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Duration> {
        while !holds(self)? {
            if began.elapsed() > FOLLOW_TIMEOUT {
                let logs: Vec<String> = self.lab.hosts.iter().map(|host| tail(&host.log())).collect();
                bail!("not within {} s: {what}\n{}", FOLLOW_TIMEOUT.as_secs(), logs.join("\n--\n"));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(began.elapsed())
    }

    /// Does the condition hold for the kernel of each host but this one?
    pub(crate) fn others(&self, host: usize, holds: impl Fn(&Observed) -> bool) -> anyhow::Result<bool> {
        for other in (0..self.lab.hosts.len()).filter(|other| *other != host) {
            if !holds(&observe(&self.lab, other)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Does the condition hold for the kernel of each host?
    pub(crate) fn all(&self, holds: impl Fn(&Observed) -> bool) -> anyhow::Result<bool> {
        self.others(usize::MAX, holds)
    }

    pub(crate) fn is_vxlan(&self) -> bool {
        self.lab.plan.backend() == "vxlan"
    }

    /// Is every daemon connected to the store?
    pub(crate) fn connected(&self) -> bool {
        self.lab.hosts.iter().all(|host| host.state().is_ok_and(|state| state["store"]["connected"] == true))
    }

    /// Writes a new lease and waits until all hosts have its route; then deletes it and waits until no host has it. Returns the
    /// time from `began` to the last route.
    ///
    /// # Errors
    /// When a host does not follow.
    pub(crate) fn new_lease_arrives(&mut self, began: Instant) -> anyhow::Result<Duration> {
        let (key, lease) = self.new_lease()?;
        self.lab.with_store(async |store| store.put_lease(&lease, 0, 0).await)?;
        let took = self.until(began, "all hosts have the route of a new lease", |stage| stage.all(|seen| has_route(seen, key)))?;
        self.lab.with_store(async |store| {
            let snapshot = store.snapshot().await?;
            let entry = snapshot.entries.iter().find(|entry| entry.key == key);
            match entry {
                Some(entry) => store.delete_lease(&key, entry.mod_revision).await,
                None => Ok(true),
            }
        })?;
        self.until(Instant::now(), "no host has the route of the deleted lease", |stage| stage.all(|seen| !has_route(seen, key)))?;
        Ok(took)
    }

    /// A lease of a host that does not exist.
    pub(crate) fn new_lease(&mut self) -> anyhow::Result<(LeaseKey, Lease)> {
        self.count += 1;
        let number = 100 + self.count % 100;
        let key = flannel::wire::parse_key(&format!("10.244.{number}.0-24"))?;
        // No host of a lab has this address, wherever it moves.
        let public = PerFamily { v4: format!("10.0.0.{}", 200 + self.count % 40).parse().ok(), v6: None };
        let data = self.is_vxlan().then(|| format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:77:{number:02x}\"}}").into());
        let peer = Peer { public, backend_type: self.lab.plan.backend().into(), backend_data: PerFamily { v4: data, v6: None } };
        Ok((key, Lease { key, peer }))
    }

    /// Do the pods of this host and of the next reach each other?
    pub(crate) fn pods_reach(&self, host: usize) -> anyhow::Result<bool> {
        let other = (host + 1) % self.pods.len();
        for (from, to) in [(host, other), (other, host)] {
            if self.pods[from].netns.run(|| ping_all(&[self.pods[to].address], Duration::from_millis(20)))??.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Is a route to this lease's IPv4 subnet there?
pub(crate) fn has_route(seen: &Observed, key: LeaseKey) -> bool {
    seen.iter().any(|(object, _)| matches!(object, Key::Route(dst, _) if key.subnets().v4 == Some(*dst)))
}

/// Reads all of flannel's objects on a host.
///
/// # Errors
/// When the kernel cannot be read.
pub fn observe(lab: &Lab, host: usize) -> anyhow::Result<Observed> {
    let nftables = lab.plan.config["EnableNFTables"] == true;
    let accept_ra = ("net/ipv6/conf/flannel.1/accept_ra".to_owned(), "0".to_owned());
    let forwarding = (Family::V4.forwarding().to_owned(), "1".to_owned());
    let vxlan = lab.plan.backend() == "vxlan";
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
    Ok(lab.hosts[host].run(|| Kernel::open()?.observe(&scope))??)
}

/// Names the pairs of pods that do not reach each other, of those for which `expected` says that they should.
///
/// # Errors
/// When no socket can be opened.
pub(crate) fn silent_pairs(pods: &[Pod], timeout: Duration, expected: impl Fn(usize, usize) -> bool) -> anyhow::Result<Vec<String>> {
    let mut silent = Vec::new();
    for (from, pod) in pods.iter().enumerate() {
        let targets: Vec<_> = (0..pods.len()).filter(|to| *to != from && expected(from, *to)).collect();
        let addresses: Vec<_> = targets.iter().map(|to| pods[*to].address).collect();
        let answered = pod.netns.run(|| ping_all(&addresses, timeout))??;
        let quiet = targets.iter().filter(|to| !answered.contains_key(&pods[**to].address));
        silent.extend(quiet.map(|to| format!("{} > {}", pod.name, pods[*to].name)));
    }
    Ok(silent)
}
