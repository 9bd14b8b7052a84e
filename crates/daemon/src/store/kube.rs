//! Kubernetes as the store (`--kube-subnet-mgr`): a lease is a Node, its subnets are the Node's pod CIDRs, and what a
//! host publishes are annotations (specification, section 4). kube-controller-manager assigns subnets; there is no
//! expiry.

mod api;
mod events;
mod follow;
mod keeper;
mod table;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use flannel::annotations::{self, Annotations, Keys, NodeError};
use flannel::{Config, Peer, PerFamily, StoreEvent};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};

pub use self::api::ApiError;
use self::api::{Api, NodeObject};
use self::follow::Place;
use self::keeper::NodeKeeper;
use self::table::Table;
use super::endpoint::without_credentials;
use super::{Claim, ConfigSource, LeaseHandle, Link, Store, StoreAbout, StoreError, client_key, foreign_text};
use crate::notice::{Notice, Notices};
use crate::ready::Ready;
use crate::settings::RunArgs;

/// How long the API server may take to accept a connection; see `connect.rs`.
const CONNECT: Duration = Duration::from_secs(2);

/// How the API server is reached, and which Node is this node's.
#[derive(Debug, Clone)]
pub struct Access {
    api_url: Option<String>,
    kubeconfig: Option<PathBuf>,
    keys: Keys,
    config_path: PathBuf,
    set_condition: bool,
    whoami: WhoAmI,
}

/// How this node learns its name.
#[derive(Debug, Clone)]
enum WhoAmI {
    Node(String),
    Pod { namespace: String, name: String },
}

impl Access {
    /// Reads the flags and the environment.
    ///
    /// # Errors
    /// The flag or variable that cannot be used, and the fix.
    pub fn new(args: &RunArgs, env: impl Fn(&str) -> Option<String>) -> anyhow::Result<Access> {
        let get = |name: &str| env(name).filter(|value| !value.is_empty());
        // They become parts of a URL.
        let plain = |variable: &str, name: String| {
            let is_plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
            ensure!(is_plain, "{variable}: {name:?} is not a name in Kubernetes: names have lower-case letters, digits, dashes and dots");
            Ok(name)
        };
        let whoami = match (get("NODE_NAME"), get("POD_NAMESPACE"), get("POD_NAME")) {
            (Some(node), _, _) => WhoAmI::Node(plain("NODE_NAME", node)?),
            (None, Some(namespace), Some(name)) => {
                WhoAmI::Pod { namespace: plain("POD_NAMESPACE", namespace)?, name: plain("POD_NAME", name)? }
            }
            _ => anyhow::bail!(
                "--kube-subnet-mgr: NODE_NAME is not set: give the container the variable NODE_NAME from the field spec.nodeName, or POD_NAME and POD_NAMESPACE"
            ),
        };
        Ok(Access {
            api_url: args.kube_api_url.clone().filter(|url| !url.is_empty()),
            kubeconfig: args.kubeconfig_file.clone().filter(|path| !path.as_os_str().is_empty()),
            keys: Keys::new(&args.kube_annotation_prefix)?,
            config_path: args.net_config_path.clone(),
            set_condition: args.set_node_network_unavailable,
            whoami,
        })
    }

    /// A kubeconfig file, else the files of a pod's service account, which are read again when they change.
    async fn client_config(&self) -> Result<kube::Config, StoreError> {
        let mut config = match (&self.kubeconfig, &self.api_url) {
            // The file may be written later, or mended.
            (Some(path), _) => kubeconfig(path).await.map_err(|error| {
                let text = format!("cannot use --kubeconfig-file {}: {}", path.display(), foreign_text(&format!("{error:#}")));
                StoreError::Passing(Notice::new("BadKubeconfig", text))
            })?,
            (None, None) => kube::Config::incluster()
                .context("this is not a pod with a service account: give --kubeconfig-file, or set automountServiceAccountToken")
                .map_err(StoreError::Lasting)?,
            // The address of the environment is replaced below.
            (None, Some(url)) => match kube::Config::incluster_dns() {
                Ok(config) => config,
                Err(_) => kube::Config::new(api_url(url)?),
            },
        };
        if let Some(url) = &self.api_url {
            config.cluster_url = api_url(url)?;
        }
        config.connect_timeout = Some(CONNECT);
        Ok(config)
    }
}

async fn kubeconfig(path: &Path) -> anyhow::Result<kube::Config> {
    let file = Kubeconfig::read_from(path)?;
    Ok(kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)
}

fn api_url(url: &str) -> Result<http::Uri, StoreError> {
    let named = || format!("--kube-api-url {:?} is not a URL such as https://192.0.2.1:6443", foreign_text(&without_credentials(url).0));
    url.parse().with_context(named).map_err(StoreError::Lasting)
}

/// A client of the API server that knows the name of this node's Node. Clones are handles to the same client.
#[derive(Clone)]
pub struct Kube(Arc<Inner>);

struct Inner {
    /// The API server's address.
    endpoint: Arc<str>,
    api: Api,
    node: String,
    access: Access,
    ready: Ready,
    notices: Notices,
    /// This node's Node was changed.
    own_changed: Notify,
    /// Counts how often this host got another address.
    moves: watch::Sender<u32>,
}

/// Why this node has no lease.
#[derive(Debug, Clone, Error)]
enum NodeProblem {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("Node {0}: {1}")]
    Node(String, NodeError),
    #[error("there is no Node {0}: kubelet makes it when it starts; routes stay until it is there (again)")]
    NoNode(String),
}

impl NodeProblem {
    fn reason(&self) -> &'static str {
        match self {
            NodeProblem::Api(ApiError::Refused { code: 403, .. }) => "Forbidden",
            NodeProblem::Api(ApiError::Refused { code: 401, .. }) => "Unauthorized",
            NodeProblem::Api(_) => "StoreUnreachable",
            NodeProblem::Node(_, NodeError::NoPodCidr | NodeError::NoFamily(..)) => "NoPodCIDR",
            NodeProblem::Node(_, NodeError::Outside(..) | NodeError::BadPodCidr(_)) => "BadPodCIDR",
            NodeProblem::Node(..) => "BadAnnotation",
            NodeProblem::NoNode(_) => "NoNode",
        }
    }
}

impl From<NodeProblem> for StoreError {
    fn from(problem: NodeProblem) -> StoreError {
        StoreError::Passing(Notice::new(problem.reason(), problem.to_string()))
    }
}

impl From<ApiError> for StoreError {
    fn from(error: ApiError) -> StoreError {
        NodeProblem::Api(error).into()
    }
}

impl Kube {
    /// A client that knows its Node's name. The API server is asked for the name only if the environment does not have it.
    ///
    /// # Errors
    /// Flags that cannot be used are lasting; files, and a server that does not answer, are not.
    pub async fn connect(access: &Access, ready: Ready, notices: Notices) -> Result<Kube, StoreError> {
        let config = access.client_config().await?;
        client_key::accept_version_1();
        let endpoint = without_credentials(&config.cluster_url.to_string()).0.trim_end_matches('/').into();
        let api = Api::new(config).map_err(|error| {
            let file = access.kubeconfig.as_ref().map(|path| format!(" of --kubeconfig-file {}", path.display())).unwrap_or_default();
            let text = format!("cannot use the certificates{file} for the API server: {}", foreign_text(&error.to_string()));
            StoreError::Passing(Notice::new("BadKubeconfig", text))
        })?;
        let node = match &access.whoami {
            WhoAmI::Node(name) => name.clone(),
            WhoAmI::Pod { namespace, name } => api.node_of_pod(namespace, name).await?,
        };
        let access = access.clone();
        let moves = watch::channel(0).0;
        Ok(Kube(Arc::new(Inner { endpoint, api, node, access, ready, notices, own_changed: Notify::new(), moves })))
    }

    fn api(&self) -> &Api {
        &self.0.api
    }

    fn node(&self) -> &str {
        &self.0.node
    }

    fn own_changed(&self) -> &Notify {
        &self.0.own_changed
    }

    fn keys(&self) -> &Keys {
        &self.0.access.keys
    }

    async fn own_node(&self) -> Result<NodeObject, NodeProblem> {
        self.api().node(self.node()).await?.ok_or_else(|| NodeProblem::NoNode(self.node().to_owned()))
    }

    fn problem(&self, error: NodeError) -> NodeProblem {
        NodeProblem::Node(self.node().to_owned(), error)
    }

    /// Writes what this node publishes to its Node. Returns the lease, the Node's uid, and how many annotations had to be written.
    /// What no peer could use (a pod CIDR outside the pod network) is not published.
    async fn publish(&self, claim: &Claim) -> Result<(LeaseHandle, String, usize), NodeProblem> {
        let node = self.own_node().await?;
        let key = annotations::pod_cidrs(&node.spec.pod_cidr, &node.spec.pod_cidrs)
            .and_then(|subnets| annotations::own_lease_key(&claim.config, &subnets))
            .map_err(|error| self.problem(error))?;
        let current = &node.metadata.annotations;
        let wanted = self.keys().wanted(current, &claim.config.backend, &claim.peer).map_err(|error| self.problem(error))?;
        // Annotations that this program wrote can be read.
        let (peer, _) = self.keys().peer(&wanted, &claim.config, &Peer::default()).unwrap_or_default();
        let missing: Annotations = wanted.into_iter().filter(|(key, value)| current.get(key) != Some(value)).collect();
        if !missing.is_empty() {
            let patch = json!({ "metadata": { "annotations": missing } });
            self.api().patch_node("write this node's annotations", self.node(), &patch).await?;
        }
        Ok((LeaseHandle { key, published: peer.public, etcd_lease: 0, is_new: false }, node.metadata.uid, missing.len()))
    }

    /// Reads the file of `--net-config-path`; the error names the file and the fix.
    fn read_config(&self) -> Result<Config, String> {
        let path = &self.0.access.config_path;
        let fix = "key net-conf.json of ConfigMap kube-flannel-cfg";
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse_assigned(&text)
                .map_err(|error| format!("--net-config-path {} ({fix}): {}", path.display(), foreign_text(&error.to_string()))),
            Err(error) => Err(format!("cannot read --net-config-path {} ({fix}): {error}", path.display())),
        }
    }

    /// Tells the scheduler that pods can run here (specification, section 4.7).
    async fn set_condition(&self) -> Result<(), NodeProblem> {
        let now = events::now();
        let condition = json!({
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "FlannelIsUp",
            "message": "Flannel is running on this node",
            "lastTransitionTime": now,
            "lastHeartbeatTime": now,
        });
        let patch = json!({ "status": { "conditions": [condition] } });
        self.api().patch_node("set this node's condition NetworkUnavailable", self.node(), &patch).await?;
        Ok(())
    }
}

impl Store for Kube {
    fn about(&self) -> StoreAbout {
        StoreAbout { endpoint: self.0.endpoint.clone(), renewal: None }
    }

    fn config_source(&self) -> ConfigSource {
        ConfigSource::LocalFile
    }

    /// The file of `--net-config-path`. It comes from a ConfigMap, which an operator may correct meanwhile.
    async fn config(&self) -> Result<Config, StoreError> {
        self.read_config().map_err(|text| StoreError::Passing(Notice::new("BadNetworkConfig", text)))
    }

    async fn node_public(&self) -> Result<PerFamily<IpAddr>, StoreError> {
        let node = self.own_node().await?;
        Ok(self.keys().node_public(&node.metadata.annotations).map_err(|error| self.problem(error))?)
    }

    async fn published(&self, config: &Config, _: PerFamily<IpAddr>) -> Result<Option<Peer>, StoreError> {
        let node = self.own_node().await?;
        // Annotations that cannot be read are written again.
        Ok(self.keys().peer(&node.metadata.annotations, config, &Peer::default()).map(|(peer, _)| peer))
    }

    async fn acquire(&self, claim: &Claim) -> Result<LeaseHandle, StoreError> {
        let (held, _, _) = self.publish(claim).await?;
        Ok(held)
    }

    async fn keep(self, claims: watch::Receiver<Claim>, held: watch::Sender<LeaseHandle>, lost: mpsc::Receiver<()>) {
        NodeKeeper::new(self, &claims).run(claims, held, lost).await;
    }

    async fn follow(self, config: Config, events: mpsc::Sender<Vec<StoreEvent>>, mut link: Link) {
        let table = Table::new(self.keys().clone(), config.clone(), self.node().to_owned());
        let mut place = Place::new(table, config, self.0.moves.subscribe());
        loop {
            let outage = self.turn(&mut place, &events, &mut link).await;
            if events.is_closed() {
                return;
            }
            link.down(outage).await;
        }
    }
}
