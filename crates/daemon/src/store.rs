//! The store of leases: the trait that the daemon works with, and its two implementations, [`Etcd`] (also for the embedded
//! server) and [`Kube`].

mod client_key;
mod connect;
mod endpoint;
pub mod etcd;
mod failure;
pub mod foreign;
pub mod kube;
mod limits;
mod link;
mod reports;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel::{Config, LeaseKey, Peer, PerFamily, StoreEvent, Subnet};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

pub use self::connect::{Access, Transport};
pub use self::etcd::{Entry, Etcd, EtcdError, Snapshot};
pub use self::foreign::foreign_text;
pub use self::kube::Kube;
pub use self::link::{Following, Link, Outage};
use crate::notice::Notice;

/// Why a store does not give what it was asked for.
#[derive(Debug)]
pub enum StoreError {
    /// It may pass: the same request is made again. One problem has one text, which does not change from attempt to attempt.
    Passing(Notice),
    /// Only a restart with other flags ends it.
    Lasting(anyhow::Error),
}

/// Where a network config comes from, as far as it matters for what it may order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigSource {
    /// A file of this host, or of this pod.
    LocalFile,
    /// A store that the operator named.
    NamedStore,
    /// The default endpoints, where any local user may listen.
    DefaultStore,
}

/// Refuses commands that come from elsewhere: the commands of an extension backend run as root on this host. `allow` is
/// `--allow-commands`.
///
/// # Errors
/// [`StoreError::Passing`]: the operator may take the commands out of the config.
pub fn check_commands(config: &Config, source: ConfigSource, allow: bool) -> Result<(), StoreError> {
    if !config.backend.has_commands() {
        return Ok(());
    }
    let fix = match (source, allow) {
        (ConfigSource::LocalFile, _) | (ConfigSource::NamedStore, true) => return Ok(()),
        (ConfigSource::NamedStore, false) => "start flanneld with --allow-commands if everyone who can write to the store may do that",
        (ConfigSource::DefaultStore, _) => {
            "name the store by --etcd-endpoints and start flanneld with --allow-commands: on the default endpoints any local user may listen"
        }
    };
    let text = format!("the network config in the store has commands (Backend.Type extension) to run on this host as root: {fix}");
    Err(StoreError::Passing(Notice::new("CommandsRefused", text)))
}

/// What a lease is requested for.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The network configuration.
    pub config: Config,
    /// What this node publishes.
    pub peer: Peer,
    /// The addresses of its interface, which need not be those that it publishes.
    pub addrs: PerFamily<IpAddr>,
    /// The subnets that this node had last time.
    pub previous: PerFamily<Subnet>,
    /// The etcd leases that were on this node's key earlier.
    pub previous_leases: Vec<i64>,
    /// How long before its end the lease is renewed, where leases end.
    pub margin: Duration,
}

/// A lease that this node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseHandle {
    /// The leased subnets.
    pub key: LeaseKey,
    /// The addresses that are published with it: an operator may have overwritten this node's own.
    pub published: PerFamily<IpAddr>,
    /// The etcd lease on the key; 0 for one that needs no renewal.
    pub etcd_lease: i64,
    /// Was it created? Else the store had it already, and it is reused.
    pub is_new: bool,
}

/// What is known about a store without asking it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreAbout {
    /// Its address, without credentials; of several, the one in use.
    pub endpoint: Arc<str>,
    /// When this node's lease is renewed next, where leases end.
    pub renewal: Option<Instant>,
}

/// A store of leases. Clones are handles to the same one.
pub trait Store: Clone + Send + Sync + 'static {
    /// What is known about the store without asking it.
    fn about(&self) -> StoreAbout;

    /// Where the network configuration comes from.
    fn config_source(&self) -> ConfigSource;

    /// The network configuration.
    fn config(&self) -> impl Future<Output = Result<Config, StoreError>> + Send;

    /// The addresses to publish instead of those of the command line.
    fn node_public(&self) -> impl Future<Output = Result<PerFamily<IpAddr>, StoreError>> + Send;

    /// What this node published before, found by `public`, which it publishes now.
    fn published(&self, config: &Config, public: PerFamily<IpAddr>) -> impl Future<Output = Result<Option<Peer>, StoreError>> + Send;

    /// Acquires a lease.
    fn acquire(&self, claim: &Claim) -> impl Future<Output = Result<LeaseHandle, StoreError>> + Send;

    /// Renews the lease for ever, writes it again when the claim changes, and acquires it again when it is gone or `lost` says so.
    /// The current lease is published in `held`.
    fn keep(
        self,
        claims: watch::Receiver<Claim>,
        held: watch::Sender<LeaseHandle>,
        lost: mpsc::Receiver<()>,
    ) -> impl Future<Output = ()> + Send;

    /// Follows the leases: sends every list and every event, in order, until the receiver is dropped.
    fn follow(self, config: Config, events: mpsc::Sender<Vec<StoreEvent>>, link: Link) -> impl Future<Output = ()> + Send;
}

/// Refuses what a peer may not publish: it is kept, logged and shown.
fn check_peer(peer: &Peer) -> Result<(), String> {
    let name = &peer.backend_type;
    if name.len() > limits::BACKEND_TYPE || !name.chars().all(|c| c.is_ascii_graphic()) {
        return Err(format!("field BackendType: {:?} is not the name of a backend", foreign_text(name)));
    }
    match peer.backend_data.iter().find(|(_, data)| data.len() > limits::LEASE_VALUE) {
        Some((_, data)) => Err(format!("field BackendData has {} bytes, at most {} are read", data.len(), limits::LEASE_VALUE)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backend_type_and_data_are_bounded() {
        let peer = |name: &str, data: usize| Peer {
            backend_type: name.into(),
            backend_data: PerFamily { v4: Some("1".repeat(data).into()), v6: None },
            ..Peer::default()
        };
        assert_eq!(check_peer(&peer("tencent-vpc", 150)), Ok(()));
        assert!(check_peer(&peer(&"x".repeat(200_000), 1)).unwrap_err().len() < 512);
        assert!(check_peer(&peer("vxlan\n2026-01-01 ERROR forged", 1)).unwrap_err().contains("vxlan\\\\n2026"));
        assert!(check_peer(&peer("vxlan", 20_000)).unwrap_err().contains("at most 16384"));
    }

    #[test]
    fn commands_run_only_where_this_host_permits_them() {
        let config = |backend: &str| Config::parse(&format!(r#"{{"Network":"10.244.0.0/16","Backend":{backend}}}"#)).unwrap();
        let commands = config(r#"{"Type":"extension","SubnetAddCommand":"touch /tmp/x"}"#);
        let check = |config: &Config, source, allow| match check_commands(config, source, allow) {
            Ok(()) => String::new(),
            Err(StoreError::Passing(notice)) => notice.text,
            Err(StoreError::Lasting(error)) => panic!("{error}"),
        };
        assert!(check(&commands, ConfigSource::NamedStore, false).contains("--allow-commands"));
        assert!(check(&commands, ConfigSource::DefaultStore, true).contains("--etcd-endpoints"));
        assert_eq!(check(&commands, ConfigSource::NamedStore, true), "");
        assert_eq!(check(&commands, ConfigSource::LocalFile, false), "");
        for harmless in [r#"{"Type":"extension"}"#, r#"{"Type":"vxlan"}"#] {
            assert_eq!(check(&config(harmless), ConfigSource::DefaultStore, false), "", "{harmless}");
        }
    }
}
