//! Which cluster a lab builds.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

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
    /// Three members of an etcd program, each in a namespace of its own, started by the lab. Users are those that
    /// [`crate::Lab::enable_auth`] creates.
    Members(PathBuf),
    /// A store outside, reached through a forwarder: its host and port.
    Outside(String),
    /// Kubernetes, by the program that contains all its parts (`tests/kubernetes`).
    Kubernetes(PathBuf),
}

/// Files, in PEM form, for a store with TLS and client certificates.
#[derive(Debug, Clone)]
pub struct Secure {
    /// The authority that signed the two certificates.
    pub ca: PathBuf,
    /// The server's certificate and key; none if an embedded store issues them.
    pub server: Option<(PathBuf, PathBuf)>,
    /// Certificate and key of the daemons and of the lab.
    pub client: (PathBuf, PathBuf),
    /// User and password of the daemons, if etcd asks for one.
    pub login: Option<(String, String)>,
}

/// Which cluster a lab builds.
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
    /// TLS, and at an etcd a password, of a store that the lab starts. Without it the store serves all clients: it is in namespaces.
    pub secure: Option<Secure>,
    /// User and password of the lab itself at the store, and of daemons unless `env` names others.
    pub login: Option<(String, String)>,
    /// Environment variables of the daemons and plugins.
    pub env: Vec<(String, String)>,
    /// Additional flags for programs of the Kubernetes control plane: the program and a flag.
    pub kubernetes_flags: Vec<(&'static str, String)>,
}

impl Secure {
    /// The files that an embedded store issues in its folder.
    pub fn embedded(folder: &Path) -> Secure {
        let file = |name: &str| folder.join(name);
        Secure { ca: file("ca.pem"), server: None, client: (file("client.pem"), file("client-key.pem")), login: None }
    }
}

impl Plan {
    /// Hosts on a switch with the embedded store and the given `Backend` object; `program` is daemon, store and plugin.
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

    /// VXLAN over an etcd of three members that asks for a password.
    pub fn members(etcd: &Path, hosts: usize, program: &Path) -> Plan {
        let mut plan = Plan { store: StoreKind::Members(etcd.to_owned()), ..Plan::new(hosts, &json!({ "Type": "vxlan" }), program) };
        plan.login = Some(("root".to_owned(), "root".to_owned()));
        plan.env.extend(["USERNAME", "PASSWORD"].map(|name| (format!("FLANNELD_ETCD_{name}"), "flannel".to_owned())));
        plan
    }

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

    /// `Backend.Type`.
    pub(crate) fn backend(&self) -> &str {
        self.config["Backend"]["Type"].as_str().unwrap_or_default()
    }
}

/// Which families the pods of a lab have. The hosts always have IPv4, for the store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Families {
    pub(crate) v4: bool,
    pub(crate) v6: bool,
}

impl Families {
    pub(crate) fn of(config: &Value) -> Families {
        Families { v4: config["EnableIPv4"] != false, v6: config["EnableIPv6"] == true }
    }
}
