//! A cluster on one machine: each host a network namespace with a real `flanneld` in it, joined by a switch or a
//! router, with a store that all reach and pods made by the CNI plugin. Also the bench of the integration tests.
//!
//! Everything lives in namespaces of the calling process and on a tmpfs that only it sees, and every process it
//! starts is killed when it ends, however it ends. So nothing is ever left behind, and there is no clean-up code.

pub mod chaos;
pub mod cli;
mod exec;
pub mod faults;
pub mod kubernetes;
mod members;
mod outside;
pub mod packet;
pub mod ping;
mod show;
pub mod world;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use flannel::object::bridge::Port;
use flannel::{Cidr, IfName, Mac};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use kernel::{addr, link, process, route, sysctl};
use serde_json::{Value, json};

use daemon::settings::Secret;
use daemon::store::{Access, Etcd};

/// Where the store listens, in every lab.
pub const STORE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 254)), 2379);
/// Where each daemon serves its health, on its own loopback address.
const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
/// Hosts of one lab: their addresses are 10.0.0.1 and up, and the store has 254.
pub const MAX_HOSTS: usize = 200;
/// How long any part of a lab may take to come up.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the hosts are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Topology {
    /// All on one L2 network.
    Switch,
    /// On two L2 networks, with a router between them.
    Router,
}

/// Which addresses pods have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PodFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// Both.
    Dual,
}

/// Which store the daemons use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreKind {
    /// `flanneld store`
    Embedded,
    /// An etcd program, started by the lab.
    Etcd(PathBuf),
    /// Three members of an etcd program, each in a namespace of its own, started by the lab. Users as [`world::etcd::enable_auth`]
    /// makes them.
    Members(PathBuf),
    /// A store outside, reached through a forwarder: its host and port.
    Outside(String),
    /// Kubernetes, by the program that has all its parts (`tests/kubernetes`).
    Kubernetes(PathBuf),
}

/// What an etcd that does not trust everybody needs, as files in PEM form.
#[derive(Debug, Clone)]
pub struct Secure {
    /// The authority that signed the two certificates.
    pub ca: PathBuf,
    /// The server's certificate and key.
    pub server: (PathBuf, PathBuf),
    /// Those of daemons, and of the lab.
    pub client: (PathBuf, PathBuf),
    /// A user and a password, if the daemons shall use one.
    pub login: Option<(String, String)>,
}

/// What kind of lab to make.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Number of hosts.
    pub hosts: usize,
    /// How they are joined.
    pub topology: Topology,
    /// The network configuration.
    pub config: Value,
    /// The store.
    pub store: StoreKind,
    /// The prefix of all keys in it.
    pub prefix: String,
    /// The `flanneld` program.
    pub program: PathBuf,
    /// The CNI plugin program.
    pub plugin: PathBuf,
    /// TLS and a password at an etcd that the lab starts.
    pub secure: Option<Secure>,
    /// User and password of the lab itself at the store, and of daemons unless `env` names others.
    pub login: Option<(String, String)>,
    /// Variables for the daemons and plugins.
    pub env: Vec<(String, String)>,
    /// More flags for programs of a lab's Kubernetes: the program and a flag.
    pub kubernetes_flags: Vec<(&'static str, String)>,
}

impl Plan {
    /// The same with pods of these families.
    #[must_use]
    pub fn family(mut self, family: PodFamily) -> Plan {
        if family != PodFamily::V4 {
            self.config["EnableIPv6"] = true.into();
            self.config["IPv6Network"] = "fd00:244::/48".into();
        }
        if family == PodFamily::V6 {
            self.config["EnableIPv4"] = false.into();
        }
        self
    }

    /// Hosts on a switch with the embedded store and the given `Backend` object, everything by `program`.
    pub fn new(hosts: usize, backend: &Value, program: &Path) -> Plan {
        let config = json!({ "Network": "10.244.0.0/16", "EnableNFTables": true, "Backend": backend });
        Plan {
            hosts,
            topology: Topology::Switch,
            config,
            store: StoreKind::Embedded,
            prefix: "/coreos.com/network".to_owned(),
            program: program.to_owned(),
            plugin: program.to_owned(),
            secure: None,
            login: None,
            env: Vec::new(),
            kubernetes_flags: Vec::new(),
        }
    }
}

/// Moves the process into namespaces of its own and returns a directory that only it sees. Must come before any
/// thread. The directory is mounted over one that does not lead to `program`.
///
/// # Errors
/// When the system forbids it; the text names the setting to change.
pub fn isolate(program: &Path) -> anyhow::Result<PathBuf> {
    let mut candidates = ["/mnt", "/media", "/srv", "/opt"].iter().map(Path::new);
    let scratch = candidates.find(|path| path.is_dir() && !program.starts_with(path));
    let scratch = scratch.context("none of /mnt, /media, /srv and /opt is there to mount a private tmpfs on")?;
    netns::isolate(scratch)?;
    Ok(scratch.to_owned())
}

/// A running cluster.
#[derive(Debug)]
pub struct Lab {
    plan: Plan,
    root: PathBuf,
    /// The namespace of the switch or router, in which the store is too.
    pub middle: Netns,
    store: Vec<Child>,
    /// The namespaces of the store's members, where it has some.
    members: Vec<Netns>,
    /// The hosts; the first is `h1`.
    pub hosts: Vec<Host>,
    pods: usize,
}

/// A host of a lab.
#[derive(Debug)]
pub struct Host {
    /// `h1`, `h2`, …
    pub name: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its address on the wire.
    pub address: Ipv4Addr,
    /// Its IPv6 address on the wire, in a lab with IPv6 pods.
    pub address6: Option<Ipv6Addr>,
    /// The subnet that it asks for by its previous `subnet.env`.
    pub subnet: String,
    /// Its files: `subnet.env`, the daemon's log, the CNI plugins' state.
    pub directory: PathBuf,
    daemon: Option<Child>,
}

/// A pod of a lab.
#[derive(Debug)]
pub struct Pod {
    /// `h1-pod`, or with a number.
    pub name: String,
    /// The place of its host in [`Lab::hosts`].
    pub host: usize,
    /// Its network namespace.
    pub netns: Netns,
    /// The path by which the plugin was told of it.
    pub path: PathBuf,
    /// Its first address.
    pub address: IpAddr,
    /// Its address of each family.
    pub addresses: Vec<IpAddr>,
    /// The result of its ADD.
    pub result: Value,
}

impl Lab {
    /// Makes the wire, the store and the hosts, and starts the daemons. `root` is a directory for this lab alone.
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
        ensure!((1..=MAX_HOSTS).contains(&plan.hosts), "--hosts: {} is out of range: a lab has 1 to {MAX_HOSTS} hosts", plan.hosts);
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
        middle.run(|| prepare_middle(networks, families))??;
        let mut hosts = Vec::new();
        for i in 1..=plan.hosts {
            let network = (i - 1) % networks;
            hosts.push(make_host(root, &middle, i, network, families).with_context(|| format!("cannot make host h{i}"))?);
        }
        let mut members = Vec::new();
        if matches!(plan.store, StoreKind::Members(_)) {
            members = (0..members::MEMBERS).map(|member| members::make(root, &middle, member)).collect::<anyhow::Result<_>>()?;
        }
        Ok(Lab { plan, root: root.to_owned(), middle, store: Vec::new(), members, hosts, pods: 0 })
    }

    /// Starts the store, or starts it again with the data that it had.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_store(&mut self) -> anyhow::Result<()> {
        let data = self.root.join("store");
        let log = self.root.join("store.log");
        let mut command = match &self.plan.store {
            StoreKind::Embedded => {
                let mut command = Command::new(&self.plan.program);
                command.arg("store").arg(format!("--listen={STORE}")).arg("--data-dir").arg(&data);
                command
            }
            StoreKind::Etcd(program) => {
                let url = self.store_url();
                let mut command = Command::new(program);
                if let Some(secure) = &self.plan.secure {
                    command.arg("--trusted-ca-file").arg(&secure.ca).arg("--client-cert-auth");
                    command.arg("--cert-file").arg(&secure.server.0).arg("--key-file").arg(&secure.server.1);
                }
                command.arg("--data-dir").arg(&data).args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
                command.args([
                    "--listen-peer-urls",
                    "http://127.0.0.1:2380",
                    "--max-txn-ops",
                    "10000",
                    "--max-request-bytes",
                    "10485760",
                    "--log-outputs",
                    "stderr",
                ]);
                command
            }
            StoreKind::Members(program) => {
                let program = program.clone();
                for member in 0..members::MEMBERS {
                    let child = self.start_member(&program, member)?;
                    self.store.push(child);
                }
                return self.await_members();
            }
            StoreKind::Outside(target) => {
                outside::forward(&self.middle, target)?;
                return Ok(());
            }
            StoreKind::Kubernetes(program) => return self.start_kubernetes(&program.clone()),
        };
        let child = self.middle.run(|| spawn(&mut command, &log))?.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        self.store.push(child);
        let end = Instant::now() + PATIENCE;
        while self.middle.run(|| TcpStream::connect(STORE))?.is_err() {
            if let Some(status) = self.store.last_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!("the store ended with {status}:\n{}", tail(&log));
            }
            ensure!(Instant::now() < end, "the store does not listen on {STORE}:\n{}", tail(&log));
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn store_url(&self) -> String {
        if matches!(self.plan.store, StoreKind::Members(_)) {
            return members::endpoints();
        }
        format!("{}://{STORE}", if self.plan.secure.is_some() { "https" } else { "http" })
    }

    /// How the lab itself, and a daemon, reach the store.
    pub fn access(&self) -> Access {
        let mut access = Access { endpoints: self.store_url(), prefix: self.plan.prefix.clone(), ..Access::default() };
        access.login = self.plan.login.clone().map(|(name, password)| (name, Secret(password)));
        if let Some(secure) = &self.plan.secure {
            access.ca = Some(secure.ca.clone());
            (access.cert, access.key) = (Some(secure.client.0.clone()), Some(secure.client.1.clone()));
            access.login = secure.login.clone().map(|(name, password)| (name, Secret(password)));
        }
        access
    }

    /// The user and password that daemons give from now on.
    pub fn set_login(&mut self, name: &str, password: &str) {
        if let Some(secure) = &mut self.plan.secure {
            secure.login = Some((name.to_owned(), password.to_owned()));
        }
    }

    /// Daemons that are started from now on are this program; the store is, too.
    pub fn set_program(&mut self, program: &Path) {
        program.clone_into(&mut self.plan.program);
    }

    /// Variables for daemons that are started from now on.
    pub fn set_env(&mut self, env: &[(&str, &str)]) {
        self.plan.env.extend(env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    }

    /// Kills the store, as a power cut would.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_store(&mut self) -> anyhow::Result<()> {
        for mut store in self.store.drain(..) {
            store.kill()?;
            store.wait()?;
        }
        Ok(())
    }

    /// Makes the store hang for a while, as a machine under load would.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn pause_store(&self, time: Duration) -> anyhow::Result<()> {
        use rustix::process::{Pid, Signal, kill_process};
        let tell = |signal| self.store.iter().try_for_each(|store| kill_process(Pid::from_child(store), signal));
        tell(Signal::STOP)?;
        std::thread::sleep(time);
        Ok(tell(Signal::CONT)?)
    }

    /// Writes the plan's network configuration to the store.
    ///
    /// # Errors
    /// When the store refuses.
    pub fn put_config(&self) -> anyhow::Result<()> {
        let text = self.plan.config.to_string();
        if matches!(self.plan.store, StoreKind::Kubernetes(_)) {
            return Ok(kernel::file::write(&self.net_conf(), &text)?);
        }
        self.with_store(async |store| store.put_config(&text).await)?;
        Ok(())
    }

    /// Runs a function with a client of the store, in the store's namespace.
    ///
    /// # Errors
    /// What the function returns, after the store had time to come up.
    pub fn with_store<T, E: Into<anyhow::Error>>(&self, f: impl AsyncFn(&Etcd) -> Result<T, E>) -> anyhow::Result<T> {
        let work = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let store = Etcd::new(&self.access())?;
                let end = Instant::now() + PATIENCE;
                loop {
                    match f(&store).await {
                        Ok(value) => return Ok(value),
                        Err(error) if Instant::now() > end => return Err(error.into()),
                        // A store that just began to listen may not serve yet.
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            })
        };
        self.middle.run(work)?
    }

    /// Starts a host's daemon, with more flags if wanted.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_daemon(&mut self, host: usize, more: &[&str]) -> anyhow::Result<()> {
        let access = self.access();
        let mut command = Command::new(&self.plan.program);
        // What the operator's own environment says is not meant for the lab.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FLANNELD_")) {
            command.env_remove(name);
        }
        if matches!(self.plan.store, StoreKind::Kubernetes(_)) {
            self.kubernetes_flags(host, &mut command);
        } else {
            command.arg(format!("--etcd-prefix={}", access.prefix)).arg(format!("--etcd-endpoints={}", access.endpoints));
        }
        let host = &mut self.hosts[host];
        command.arg(format!("--subnet-file={}", host.subnet_file().display()));
        for (flag, file) in [("--etcd-cafile", &access.ca), ("--etcd-certfile", &access.cert), ("--etcd-keyfile", &access.key)] {
            file.iter().for_each(|file| {
                command.arg(flag).arg(file);
            });
        }
        command.args(["--ip-masq", "--healthz-ip=127.0.0.1"]).arg(format!("--healthz-port={}", HEALTH.port())).args(more);
        if let Some((name, password)) = &access.login {
            command.env("FLANNELD_ETCD_USERNAME", name).env("FLANNELD_ETCD_PASSWORD", &password.0);
        }
        command.envs(self.plan.env.iter().cloned());
        let log = host.log();
        let child = host.netns.run(|| spawn(&mut command, &log))?;
        host.daemon = Some(child.with_context(|| format!("cannot start {}", self.plan.program.display()))?);
        Ok(())
    }

    /// Ends a host's daemon: by SIGTERM, or by SIGKILL.
    ///
    /// # Errors
    /// When it cannot be waited for.
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

    /// Waits until every daemon has seen all hosts and has done for each what it can.
    ///
    /// # Errors
    /// When one does not get there; the text says where it stands.
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

    /// Waits until a host's daemon is ready and its state is as wanted, and returns that.
    ///
    /// # Errors
    /// When it does not get there; the text has the state and the last lines of the log.
    pub fn wait_state(&mut self, host: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let end = Instant::now() + PATIENCE;
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
                "{} waits for {what} in vain; its state is {state:?}; its log ends with:\n{}",
                host.name,
                tail(&host.log())
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Makes a pod on a host with the CNI plugin.
    ///
    /// # Errors
    /// When the plugin refuses; the text is its own.
    pub fn add_pod(&mut self, host: usize) -> anyhow::Result<Pod> {
        self.pods += 1;
        let name = if self.pods <= self.hosts.len() {
            format!("{}-pod", self.hosts[host].name)
        } else {
            format!("{}-pod{}", self.hosts[host].name, self.pods)
        };
        let netns = Netns::create()?;
        let path = self.root.join("netns").join(&name);
        netns.bind(&path)?;
        self.cni(host, "loopback", "ADD", &name, &path, "lo")?;
        let output = self.cni(host, "flannel", "ADD", &name, &path, "eth0")?;
        let result: Value = serde_json::from_str(&output).with_context(|| format!("the plugin's result is no JSON: {output}"))?;
        let texts = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
        let addresses = texts.map(|text| Ok(text.parse::<Cidr>()?.addr)).collect::<anyhow::Result<Vec<IpAddr>>>()?;
        let address = *addresses.first().context("the plugin's result has no address")?;
        Ok(Pod { name, host, netns, path, address, addresses, result })
    }

    /// The CNI configuration of a host.
    pub fn cni_conf(&self, host: usize, plugin: &str) -> Value {
        let directory = &self.hosts[host].directory;
        if plugin == "loopback" {
            return json!({ "cniVersion": "1.0.0", "name": "lo", "type": "loopback" });
        }
        json!({
            "cniVersion": "1.0.0",
            "name": "lab",
            "type": "flannel",
            "subnetFile": self.hosts[host].subnet_file(),
            "dataDir": directory.join("cni/flannel"),
            "delegate": { "isDefaultGateway": true, "hairpinMode": true },
            "ipam": { "dataDir": directory.join("cni/networks") },
        })
    }

    /// A command that calls a plugin on a host, to be spawned in the host's namespace, with the configuration to feed
    /// it.
    pub fn cni_command(&self, host: usize, plugin: &str, verb: &str, container: &str, netns: &Path, ifname: &str) -> (Command, String) {
        let bin = self.root.join("bin");
        let mut command = Command::new(bin.join(plugin));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", ifname)
            .env("CNI_PATH", &bin)
            .envs(self.plan.env.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        (command, self.cni_conf(host, plugin).to_string())
    }

    /// Calls a plugin on a host and returns what it prints.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn cni(&self, host: usize, plugin: &str, verb: &str, container: &str, netns: &Path, ifname: &str) -> anyhow::Result<String> {
        self.call(host, self.cni_command(host, plugin, verb, container, netns, ifname))
    }

    /// Maps a port of a pod's host to the pod, or takes the mapping away, with the portmap plugin.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn map_port(&self, pod: &Pod, verb: &str, port: u16) -> anyhow::Result<()> {
        let mappings = json!([{ "hostPort": port, "containerPort": 80, "protocol": "tcp" }]);
        let conf = json!({
            "cniVersion": "1.0.0",
            "name": "lab",
            "type": "portmap",
            "runtimeConfig": { "portMappings": mappings },
            "prevResult": pod.result,
        });
        let (command, _) = self.cni_command(pod.host, "portmap", verb, &pod.name, &pod.path, "eth0");
        self.call(pod.host, (command, conf.to_string())).map(drop)
    }

    fn call(&self, host: usize, (mut command, conf): (Command, String)) -> anyhow::Result<String> {
        let mut child = self.hosts[host].netns.run(|| command.spawn())?.with_context(|| format!("cannot start {command:?}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(conf.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(text)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // They would be killed at the end of the process in any case; a test process has several labs.
        for child in self.hosts.iter_mut().filter_map(|host| host.daemon.as_mut()).chain(self.store.iter_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        for host in &self.hosts {
            let _ = host.netns.run(kernel::pod_rules::clear);
        }
        for name in std::fs::read_dir(self.root.join("netns")).into_iter().flatten().flatten() {
            let _ = netns::unbind(&name.path());
        }
    }
}

impl Host {
    /// Its `subnet.env`.
    pub fn subnet_file(&self) -> PathBuf {
        self.directory.join("subnet.env")
    }

    /// Its addresses on the wire, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        std::iter::once(IpAddr::V4(self.address)).chain(self.address6.map(IpAddr::V6)).collect()
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("flanneld.log")
    }

    /// The daemon's process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// The daemon's `/state`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn state(&self) -> anyhow::Result<Value> {
        let (status, body) = self.get("/state")?;
        ensure!(status == 200, "{}", body.trim());
        Ok(serde_json::from_str(&body)?)
    }

    /// Asks the daemon's health server, and returns status and body.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let mut stream = self.netns.run(|| TcpStream::connect_timeout(&HEALTH, Duration::from_secs(1)))??;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
        Ok((status, body.to_owned()))
    }

    /// The address of its interface on the wire.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn mac(&self) -> anyhow::Result<flannel::Mac> {
        let found = self.netns.run(|| link::get(&mut Socket::open(Protocol::Route)?, name("eth0")))??;
        found.and_then(|link| link.mac).context("the host has no eth0")
    }
}

/// The last lines of a log, for an error.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// Starts a process that ends with this one, its output appended to a log.
fn spawn(command: &mut Command, log: &Path) -> std::io::Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    process::die_with_parent(command);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

fn name(text: &str) -> IfName {
    text.parse().expect("the lab's own names are valid")
}

fn index(socket: &mut Socket, text: &str) -> anyhow::Result<u32> {
    Ok(link::get(socket, name(text))?.with_context(|| format!("there is no {text}"))?.index)
}

/// Which families the pods of a lab have. The hosts have IPv4 in any case, for the store.
#[derive(Debug, Clone, Copy)]
struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    fn of(config: &Value) -> Families {
        Families { v4: config["EnableIPv4"] != false, v6: config["EnableIPv6"] == true }
    }
}

/// In the namespace of the switch: a bridge a network, with the address 10.0.n.254. Between two networks it routes.
fn prepare_middle(networks: usize, families: Families) -> anyhow::Result<()> {
    let mut socket = Socket::open(Protocol::Route)?;
    link::set_up(&mut socket, 1, true)?;
    for network in 0..networks {
        let bridge = format!("lan{network}");
        link::create_bridge(&mut socket, name(&bridge), 0, None)?;
        let at = index(&mut socket, &bridge)?;
        // One of its own: else it has that of a port, and hosts lose the store when that host's interface is made anew.
        link::set_mac(&mut socket, at, Mac([2, 0, 0, 0, u8::try_from(network)?, 254]))?;
        // Nobody else is there, so no time is spent on looking for duplicates.
        sysctl::write(&format!("net/ipv6/conf/{bridge}/accept_dad"), "0")?;
        link::set_up(&mut socket, at, true)?;
        addr::add(&mut socket, at, format!("10.0.{network}.254/24").parse()?)?;
        if families.v6 {
            addr::add(&mut socket, at, format!("fd00:10:0:{network}::fe/64").parse()?)?;
        }
    }
    if networks > 1 {
        flannel::Family::ALL.iter().try_for_each(|family| sysctl::write(family.forwarding(), "1"))?;
    }
    Ok(())
}

fn make_host(root: &Path, middle: &Netns, i: usize, network: usize, families: Families) -> anyhow::Result<Host> {
    use std::os::fd::AsFd;
    let netns = Netns::create()?;
    // Those of a lab that was killed: the kernel gives the number of a namespace that has ended to another.
    netns.run(kernel::pod_rules::clear)?;
    let host_name = format!("h{i}");
    netns.bind(&root.join("netns").join(&host_name))?;
    let address = Ipv4Addr::new(10, 0, u8::try_from(network)?, u8::try_from(i)?);
    let address6 = if families.v6 { Some(format!("fd00:10:0:{network}::{i:x}").parse()?) } else { None };
    middle.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        let this = link::VethEnd { name: name(&host_name), mac: None, netns: None };
        let peer = link::VethEnd { name: name("eth0"), mac: None, netns: Some(netns.as_fd()) };
        link::create_veth(&mut socket, 1500, this, peer)?;
        let (port, bridge) = (index(&mut socket, &host_name)?, index(&mut socket, &format!("lan{network}"))?);
        anyhow::Ok(link::enslave(&mut socket, port, bridge, Port::default())?)
    })??;
    netns.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        link::set_up(&mut socket, 1, true)?;
        let eth0 = index(&mut socket, "eth0")?;
        sysctl::write("net/ipv6/conf/eth0/accept_dad", "0")?;
        link::set_up(&mut socket, eth0, true)?;
        addr::add(&mut socket, eth0, Cidr { addr: address.into(), len: 24 })?;
        route::add(&mut socket, "0.0.0.0/0".parse()?, Some(format!("10.0.{network}.254").parse()?), eth0)?;
        if let Some(address6) = address6 {
            addr::add(&mut socket, eth0, Cidr { addr: IpAddr::V6(address6), len: 64 })?;
            route::add(&mut socket, "::/0".parse()?, Some(format!("fd00:10:0:{network}::fe").parse()?), eth0)?;
        }
        anyhow::Ok(())
    })??;
    let directory = root.join(&host_name);
    std::fs::create_dir_all(&directory)?;
    // A host that comes back asks for the subnet that it had: so the lab's hosts have the numbers of their names.
    let mut subnets = Vec::new();
    let mut previous = String::new();
    if families.v4 {
        subnets.push(format!("10.244.{i}.0/24"));
        previous.push_str(&format!("FLANNEL_SUBNET=10.244.{i}.1/24\n"));
    }
    if families.v6 {
        subnets.push(format!("fd00:244:0:{i:x}::/64"));
        previous.push_str(&format!("FLANNEL_IPV6_SUBNET=fd00:244:0:{i:x}::1/64\n"));
    }
    std::fs::write(directory.join("subnet.env"), previous)?;
    Ok(Host { name: host_name, netns, address, address6, subnet: subnets.join(","), directory, daemon: None })
}
