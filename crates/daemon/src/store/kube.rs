//! Kubernetes as the store (`--kube-subnet-mgr`): a lease is a Node, its subnets are the Node's pod CIDRs, and what a
//! host publishes are annotations (specification, section 4). kube-controller-manager assigns subnets; there is no
//! expiry.

mod api;
mod events;
mod follow;
mod table;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
use self::table::Table;
use super::{Claim, LeaseHandle, Link, Store, StoreError};
use crate::notice::{Notice, Notices};
use crate::ready::{Guard, Ready};
use crate::settings::RunArgs;

/// The wait before the Node is put right again after a failure doubles from the first to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Annotations that were written more often than the first within the second are fought over, and then left alone for
/// half of it.
const FIGHT: (u32, Duration) = (10, Duration::from_secs(60));

/// How the API server is reached, and what for.
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
    /// What the flags and the environment say.
    ///
    /// # Errors
    /// What of it cannot be used; the text names the flag or variable and the fix.
    pub fn new(args: &RunArgs, env: impl Fn(&str) -> Option<String>) -> anyhow::Result<Access> {
        let get = |name: &str| env(name).filter(|value| !value.is_empty());
        // They become parts of an address.
        let plain = |variable: &str, name: String| {
            let is_plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
            ensure!(is_plain, "{variable}: {name:?} is no name of Kubernetes: it has lower-case letters, digits, dashes and dots");
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
    async fn client_config(&self) -> anyhow::Result<kube::Config> {
        let mut config = match (&self.kubeconfig, &self.api_url) {
            (Some(path), _) => {
                let named = || format!("--kubeconfig-file {}", path.display());
                let file = Kubeconfig::read_from(path).with_context(named)?;
                kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(named)?
            }
            (None, None) => kube::Config::incluster()
                .context("this is no pod with a service account: give --kubeconfig-file, or set automountServiceAccountToken")?,
            // The address of the environment is replaced below.
            (None, Some(url)) => match kube::Config::incluster_dns() {
                Ok(config) => config,
                Err(_) => kube::Config::new(url.parse().with_context(|| format!("--kube-api-url {url}"))?),
            },
        };
        if let Some(url) = &self.api_url {
            config.cluster_url = url.parse().with_context(|| format!("--kube-api-url {url}"))?;
        }
        Ok(config)
    }
}

/// A client of the API server that knows this node's Node. Clones are handles to the same.
#[derive(Clone)]
pub struct Kube(Arc<Inner>);

struct Inner {
    api: Api,
    node: String,
    access: Access,
    ready: Ready,
    notices: Notices,
    /// Somebody changed this node's Node.
    own_changed: Notify,
    /// Counts how often this host got another address.
    moves: watch::Sender<u32>,
}

/// Why this node has no lease.
#[derive(Debug, Clone, Error)]
enum Trouble {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("Node {0}: {1}")]
    Node(String, NodeError),
    #[error("there is no Node {0}: kubelet makes it when it starts; routes stay until it is there (again)")]
    NoNode(String),
}

impl Trouble {
    fn reason(&self) -> &'static str {
        match self {
            Trouble::Api(ApiError::Refused { code: 403, .. }) => "Forbidden",
            Trouble::Api(ApiError::Refused { code: 401, .. }) => "Unauthorized",
            Trouble::Api(_) => "StoreUnreachable",
            Trouble::Node(_, NodeError::NoPodCidr | NodeError::NoFamily(..)) => "NoPodCIDR",
            Trouble::Node(_, NodeError::Outside(..) | NodeError::BadPodCidr(_)) => "BadPodCIDR",
            Trouble::Node(..) => "BadAnnotation",
            Trouble::NoNode(_) => "NoNode",
        }
    }
}

impl From<Trouble> for StoreError {
    fn from(trouble: Trouble) -> StoreError {
        StoreError::Passing(Notice::new(trouble.reason(), trouble.to_string()))
    }
}

impl From<ApiError> for StoreError {
    fn from(error: ApiError) -> StoreError {
        Trouble::Api(error).into()
    }
}

impl Kube {
    /// A client that knows its Node's name: the API server is asked for that only if the environment does not tell.
    ///
    /// # Errors
    /// Flags and files that cannot be used are lasting, a server that does not answer is not.
    pub async fn connect(access: &Access, ready: Ready, notices: Notices) -> Result<Kube, StoreError> {
        let config = access.client_config().await.map_err(StoreError::Lasting)?;
        let api = Api::new(config).context("cannot make a client of the API server").map_err(StoreError::Lasting)?;
        let node = match &access.whoami {
            WhoAmI::Node(name) => name.clone(),
            WhoAmI::Pod { namespace, name } => api.node_of_pod(namespace, name).await?,
        };
        let access = access.clone();
        let moves = watch::channel(0).0;
        Ok(Kube(Arc::new(Inner { api, node, access, ready, notices, own_changed: Notify::new(), moves })))
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

    async fn own_node(&self) -> Result<NodeObject, Trouble> {
        self.api().node(self.node()).await?.ok_or_else(|| Trouble::NoNode(self.node().to_owned()))
    }

    fn trouble(&self, error: NodeError) -> Trouble {
        Trouble::Node(self.node().to_owned(), error)
    }

    /// Makes this node's Node say what this node publishes. Returns the lease, the Node's uid, and how many annotations
    /// had to be written. What no peer could use (a pod CIDR outside the pod network) is not published.
    async fn publish(&self, claim: &Claim) -> Result<(LeaseHandle, String, usize), Trouble> {
        let node = self.own_node().await?;
        let key = annotations::pod_cidrs(&node.spec.pod_cidr, &node.spec.pod_cidrs)
            .and_then(|subnets| annotations::own_lease_key(&claim.config, &subnets))
            .map_err(|error| self.trouble(error))?;
        let current = &node.metadata.annotations;
        let wanted = self.keys().wanted(current, &claim.config.backend, &claim.peer).map_err(|error| self.trouble(error))?;
        // Our own text can be read.
        let (peer, _) = self.keys().peer(&wanted, &claim.config, &Peer::default()).unwrap_or_default();
        let missing: Annotations = wanted.into_iter().filter(|(key, value)| current.get(key) != Some(value)).collect();
        if !missing.is_empty() {
            let patch = json!({ "metadata": { "annotations": missing } });
            self.api().patch_node("write this node's annotations", self.node(), &patch).await?;
        }
        Ok((LeaseHandle { key, published: peer.public, etcd_lease: 0, is_new: false }, node.metadata.uid, missing.len()))
    }

    /// Tells the scheduler that pods can be put here (specification, section 4.7).
    async fn set_condition(&self) -> Result<(), Trouble> {
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
    /// The file of `--net-config-path`. It comes from a ConfigMap, which an operator may put right meanwhile: so what
    /// cannot be used is waited out.
    async fn config(&self) -> Result<Config, StoreError> {
        let path = &self.0.access.config_path;
        let fix = "key net-conf.json of ConfigMap kube-flannel-cfg";
        let config = match std::fs::read_to_string(path) {
            Ok(text) => Config::parse_assigned(&text).map_err(|error| format!("--net-config-path {} ({fix}): {error}", path.display())),
            Err(error) => Err(format!("cannot read --net-config-path {} ({fix}): {error}", path.display())),
        };
        config.map_err(|text| StoreError::Passing(Notice::new("BadNetworkConfig", text)))
    }

    async fn node_public(&self) -> Result<PerFamily<IpAddr>, StoreError> {
        let node = self.own_node().await?;
        Ok(self.keys().node_public(&node.metadata.annotations).map_err(|error| self.trouble(error))?)
    }

    async fn published(&self, config: &Config, _: PerFamily<IpAddr>) -> Result<Option<Peer>, StoreError> {
        let node = self.own_node().await?;
        // What cannot be read is written anew.
        Ok(self.keys().peer(&node.metadata.annotations, config, &Peer::default()).map(|(peer, _)| peer))
    }

    async fn acquire(&self, claim: &Claim) -> Result<LeaseHandle, StoreError> {
        let (held, _, _) = self.publish(claim).await?;
        Ok(held)
    }

    async fn keep(self, mut claims: watch::Receiver<Claim>, held: watch::Sender<LeaseHandle>, mut lost: mpsc::Receiver<()>) {
        // The Node whose condition was set: one that is made anew has none.
        let mut conditioned = if self.0.access.set_condition { None } else { Some(String::new()) };
        let mut failed: Option<(Duration, String, Guard)> = None;
        let mut addrs = claims.borrow().addrs;
        let mut written = (Instant::now(), 0);
        loop {
            tokio::select! {
                () = self.0.ready.reached(), if conditioned.is_none() && failed.is_none() => {}
                () = self.own_changed().notified() => {}
                word = lost.recv() => if word.is_none() { return },
                changed = claims.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(failed.as_ref().map_or(RETRY.1, |(wait, ..)| *wait)), if failed.is_some() => {}
            }
            let claim = claims.borrow_and_update().clone();
            if std::mem::replace(&mut addrs, claim.addrs) != claim.addrs {
                // What was connected from the old address is dead, though nobody says so.
                self.api().reconnect();
                self.0.moves.send_modify(|count| *count += 1);
            }
            let (wait, said, mut guard) = match failed.take() {
                Some((wait, said, guard)) => (wait, said, Some(guard)),
                None => (RETRY.0 / 2, String::new(), None),
            };
            let outcome = async {
                let (now, uid, count) = self.publish(&claim).await?;
                guard = None;
                let is_due = conditioned.as_ref().is_none_or(|before| self.0.access.set_condition && *before != uid);
                if is_due && self.0.ready.pending().is_empty() {
                    self.set_condition().await?;
                    tracing::info!(node = self.node(), "told the scheduler that this node's network is up");
                    conditioned = Some(uid);
                }
                Ok::<_, Trouble>((now, count))
            };
            let (now, count) = match outcome.await {
                Ok(done) => done,
                Err(trouble) => {
                    let text = trouble.to_string();
                    if said != text {
                        tracing::warn!(reason = %text, "cannot keep this node's Node as it should be; trying again, routes stay");
                        self.0.notices.warn(trouble.reason(), text.clone());
                    }
                    let guard = guard.unwrap_or_else(|| self.0.ready.guard("this node's Node"));
                    guard.say(&text);
                    failed = Some(((wait * 2).min(RETRY.1), text, guard));
                    continue;
                }
            };
            let before = held.send_replace(now);
            if now.key != before.key {
                tracing::error!(was = %before.key, is = %now.key, "this node has another pod CIDR now: pods that are running keep addresses of the old one and must be restarted");
            }
            if count == 0 {
                continue;
            }
            tracing::info!(node = self.node(), annotations = count, "wrote this node's annotations, which were not as they should be");
            if written.0.elapsed() > FIGHT.1 {
                written = (Instant::now(), 0);
            }
            written.1 += 1;
            if written.1 > FIGHT.0 {
                let wait = FIGHT.1 / 2;
                tracing::warn!(
                    times = written.1,
                    "somebody changes this node's annotations again and again: is a second flanneld running on it? Leaving them for {} s",
                    wait.as_secs()
                );
                tokio::time::sleep(wait).await;
            }
        }
    }

    async fn follow(self, config: Config, events: mpsc::Sender<Vec<StoreEvent>>, mut link: Link) {
        let mut place = Place::new(Table::new(self.keys().clone(), config, self.node().to_owned()), self.0.moves.subscribe());
        loop {
            let outcome = self.turn(&mut place, &events, &mut link).await;
            if events.is_closed() {
                return;
            }
            link.down(outcome).await;
        }
    }
}
