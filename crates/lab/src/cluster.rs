//! A running cluster: its wire, store, hosts and daemons.

mod host;
pub mod kubernetes;
pub(crate) mod members;
pub(crate) mod outside;
mod pods;
mod store;
mod wire;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kernel::netns::{self, Netns};
use serde_json::Value;

pub use host::Host;
pub use pods::Pod;

use crate::plan::{Families, Plan, StoreKind, Topology};
use crate::process::{spawn, tail};

/// Where the store listens, in every lab.
pub const STORE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 254)), 2379);
/// Where each daemon serves its health, on its own loopback address: the port of the units and manifests.
pub(crate) const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);
/// Hosts have the addresses 10.0.0.1 and up; 251 to 254 belong to the store.
const MAX_HOSTS: usize = 200;
/// How long any part of a lab may take to come up.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running cluster.
#[derive(Debug)]
pub struct Lab {
    pub(crate) plan: Plan,
    root: PathBuf,
    /// The namespace of the switch or router; the store runs there too.
    pub middle: Netns,
    store: Vec<Child>,
    /// The namespaces of the store's members, if it has several.
    pub(crate) members: Vec<Netns>,
    /// The hosts; the first is `h1`.
    pub hosts: Vec<Host>,
    pods: usize,
}

/// Refuses a number of hosts that no lab can have.
pub(crate) fn check_hosts(hosts: usize) -> anyhow::Result<()> {
    ensure!((1..=MAX_HOSTS).contains(&hosts), "--hosts: {hosts} is out of range: a lab has 1 to {MAX_HOSTS} hosts");
    Ok(())
}

impl Lab {
    /// Makes the wire, the store and the hosts, and starts the daemons. `root` is a directory for this lab alone, below the
    /// one that [`crate::isolate`] returned.
    ///
    /// # Errors
    /// When a part does not come up; the text has the last lines of its log.
    pub fn start(plan: Plan, root: &Path) -> anyhow::Result<Lab> {
        let mut lab = Lab::wire(plan, root)?;
        lab.start_store()?;
        lab.put_config()?;
        for host in 0..lab.hosts.len() {
            lab.start_daemon(host, &[])?;
        }
        Ok(lab)
    }

    /// Makes the wire and the hosts without store and daemons.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wire(plan: Plan, root: &Path) -> anyhow::Result<Lab> {
        check_hosts(plan.hosts)?;
        for directory in ["netns", "bin", "store"] {
            std::fs::create_dir_all(root.join(directory))?;
        }
        for name in cni::NAMES {
            std::os::unix::fs::symlink(&plan.plugin, root.join("bin").join(name))?;
        }
        let middle = Netns::create().context("cannot create a network namespace")?;
        middle.bind(&root.join("netns/middle"))?;
        let networks = match plan.topology {
            Topology::Switch => 1,
            Topology::Router => 2,
        };
        let families = Families::of(&plan.config);
        middle.run(|| wire::prepare_middle(networks, families))??;
        let mut hosts = Vec::new();
        for i in 1..=plan.hosts {
            let network = (i - 1) % networks;
            hosts.push(host::create(root, &middle, i, network, families).with_context(|| format!("cannot create host h{i}"))?);
        }
        let mut members = Vec::new();
        if matches!(plan.store, StoreKind::Members(_)) {
            members = (0..members::MEMBERS).map(|member| members::create(root, &middle, member)).collect::<anyhow::Result<_>>()?;
        }
        Ok(Lab { plan, root: root.to_owned(), middle, store: Vec::new(), members, hosts, pods: 0 })
    }

    /// The file of the network namespace of a host or pod.
    pub(crate) fn netns_file(&self, name: &str) -> PathBuf {
        self.root.join("netns").join(name)
    }

    /// Sets the program that daemons and the store are started from, from now on.
    pub fn set_program(&mut self, program: &Path) {
        program.clone_into(&mut self.plan.program);
    }

    /// Adds environment variables to daemons that are started from now on.
    pub fn set_env(&mut self, env: &[(&str, &str)]) {
        self.plan.env.extend(env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    }

    /// Starts a host's daemon, with additional flags.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_daemon(&mut self, host: usize, more: &[&str]) -> anyhow::Result<()> {
        let access = self.access();
        let mut command = Command::new(&self.plan.program);
        // Variables of the operator's own environment are not meant for the lab.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FLANNELD_")) {
            command.env_remove(name);
        }
        if matches!(self.plan.store, StoreKind::Kubernetes(_)) {
            self.kubernetes_flags(host, &mut command);
        } else {
            command.arg(format!("--etcd-prefix={}", access.prefix)).arg(format!("--etcd-endpoints={}", access.endpoints));
        }
        for (flag, file) in [("--etcd-cafile", &access.ca), ("--etcd-certfile", &access.cert), ("--etcd-keyfile", &access.key)] {
            file.iter().for_each(|file| {
                command.arg(flag).arg(file);
            });
        }
        command.arg("--ip-masq").arg(format!("--healthz-port={}", HEALTH.port())).args(more);
        if let Some((name, password)) = &access.login {
            command.env("FLANNELD_ETCD_USERNAME", name).env("FLANNELD_ETCD_PASSWORD", &password.0);
        }
        command.envs(self.plan.env.iter().cloned());
        let host = &mut self.hosts[host];
        host.mounts.enter(&mut command)?;
        let log = host.log();
        let child = host.netns.run(|| spawn(&mut command, &log))?;
        host.daemon = Some(child.with_context(|| format!("cannot start {}", self.plan.program.display()))?);
        Ok(())
    }

    /// Ends a host's daemon: by SIGTERM, or by SIGKILL.
    ///
    /// # Errors
    /// When its end cannot be awaited.
    pub fn stop_daemon(&mut self, host: usize, kill: bool) -> anyhow::Result<std::process::ExitStatus> {
        let mut daemon = self.hosts[host].daemon.take().context("the daemon is not running")?;
        if kill {
            daemon.kill()?;
        } else {
            let pid = rustix::process::Pid::from_child(&daemon);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        Ok(daemon.wait()?)
    }

    /// Waits until every daemon knows all hosts and has programmed or refused each.
    ///
    /// # Errors
    /// When one does not within its time; the text has its state.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let others = self.hosts.len() - 1;
        for host in 0..self.hosts.len() {
            self.wait_state(host, &format!("{others} peers"), |state| {
                let refused = state["peers"]["refused"].as_array().map_or(0, Vec::len);
                let seen = state["peers"]["programmed"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
                seen + refused >= others && state["objects"]["failed"].as_array().is_some_and(Vec::is_empty)
            })?;
        }
        Ok(())
    }

    /// Waits until a host's daemon is ready and its state is as wanted, and returns that state.
    ///
    /// # Errors
    /// When it is not within its time; the text has the state and the last lines of the log.
    pub fn wait_state(&mut self, host: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let end = Instant::now() + START_TIMEOUT;
        let host = &mut self.hosts[host];
        loop {
            let state = host.state();
            if let Ok(state) = &state
                && wanted(state)
                && host.get("/readyz").is_ok_and(|(status, _)| status == 200)
            {
                return Ok(state.clone());
            }
            if let Some(status) = host.daemon.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!("the daemon of {} ended with {status}:\n{}", host.name, tail(&host.log()));
            }
            ensure!(
                Instant::now() < end,
                "{} waited {} s for {what}; its state is {state:?}; its log ends with:\n{}",
                host.name,
                START_TIMEOUT.as_secs(),
                tail(&host.log())
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The kernel would kill them at the end of the process; a test process has several labs.
        for child in self.hosts.iter_mut().filter_map(|host| host.daemon.as_mut()).chain(self.store.iter_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in std::fs::read_dir(self.root.join("netns")).into_iter().flatten().flatten() {
            let _ = netns::unbind(&name.path());
        }
    }
}
