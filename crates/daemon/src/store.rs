//! Where leases are kept: what the daemon needs of such a place, and the two that there are, [`Etcd`] (which the embedded
//! server speaks as well) and [`Kube`].

mod connect;
pub mod etcd;
pub mod kube;

use std::net::IpAddr;
use std::time::Duration;

use flannel::{Config, LeaseKey, Peer, PerFamily, StoreEvent, Subnet};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

pub use self::connect::{Access, Transport};
pub use self::etcd::{Entry, Etcd, EtcdError, Snapshot};
pub use self::kube::Kube;
use crate::notice::{Notice, Notices};
use crate::ready::{Guard, Ready};

/// The wait before a store is followed anew doubles from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A store that was followed for less than this before it was lost again is waited for longer each time.
const STEADY: Duration = Duration::from_secs(5);
/// After this long without the store a node is not called ready any more: it does not hear of new peers.
const STALE: Duration = Duration::from_secs(60);

/// Why a store does not give what it was asked for.
#[derive(Debug)]
pub enum StoreError {
    /// It may pass: it is worth asking again.
    Passing(Notice),
    /// Nothing will change by waiting.
    Lasting(anyhow::Error),
}

/// What this node wants a lease for.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The network configuration.
    pub config: Config,
    /// What this node publishes.
    pub peer: Peer,
    /// The addresses of its interface, which need not be those that it publishes.
    pub addrs: PerFamily<IpAddr>,
    /// The subnets that it had last time.
    pub previous: PerFamily<Subnet>,
    /// The etcd leases by which the store knew it earlier.
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
    /// Did the store not know it before?
    pub is_new: bool,
}

/// A place where leases are kept. Clones are handles to the same.
pub trait Store: Clone + Send + Sync + 'static {
    /// The network configuration.
    fn config(&self) -> impl Future<Output = Result<Config, StoreError>> + Send;

    /// The addresses that shall be published instead of those of the command line.
    fn node_public(&self) -> impl Future<Output = Result<PerFamily<IpAddr>, StoreError>> + Send;

    /// What this node, which publishes `public`, published before.
    fn published(&self, config: &Config, public: PerFamily<IpAddr>) -> impl Future<Output = Result<Option<Peer>, StoreError>> + Send;

    /// Acquires a lease.
    fn acquire(&self, claim: &Claim) -> impl Future<Output = Result<LeaseHandle, StoreError>> + Send;

    /// Keeps the lease for ever, writes it anew when the claim changes, and acquires it again whenever it is gone, which
    /// `lost` may tell as well. What is held is published in `held`.
    fn keep(
        self,
        claims: watch::Receiver<Claim>,
        held: watch::Sender<LeaseHandle>,
        lost: mpsc::Receiver<()>,
    ) -> impl Future<Output = ()> + Send;

    /// Follows the leases and sends every list and every event, in order, until the receiver is gone.
    fn follow(self, config: Config, events: mpsc::Sender<Vec<StoreEvent>>, link: Link) -> impl Future<Output = ()> + Send;
}

/// Whether a store is being followed, and the waits between two tries.
#[derive(Debug)]
pub struct Link {
    connected: watch::Sender<bool>,
    ready: Ready,
    notices: Notices,
    wait: Duration,
    /// Since when it is not followed, and what was said of that last.
    away: (Instant, String),
    /// Since when it was followed last, if it ever was.
    up_at: Option<Instant>,
    stale: Option<Guard>,
}

impl Link {
    /// A link that is not there yet.
    pub fn new(connected: watch::Sender<bool>, ready: Ready, notices: Notices) -> Link {
        Link { connected, ready, notices, wait: BACKOFF.0, away: (Instant::now(), String::new()), up_at: None, stale: None }
    }

    /// The store is being followed. True if it was not before.
    pub fn up(&mut self) -> bool {
        self.stale = None;
        let is_new = !self.connected.send_replace(true);
        if is_new {
            self.up_at = Some(Instant::now());
        }
        is_new
    }

    /// The store is not followed any more: says so, and waits before it is tried again.
    pub async fn down(&mut self, reason: String) {
        let was_connected = self.connected.send_replace(false);
        // One that breaks as soon as it is there was as good as away.
        if was_connected && self.up_at.is_some_and(|at| at.elapsed() > STEADY) {
            self.away.0 = Instant::now();
            self.wait = BACKOFF.0;
        }
        if was_connected || reason != self.away.1 {
            tracing::warn!(%reason, "the store is not followed; routes stay as they are until it is again");
            self.away.1.clone_from(&reason);
        }
        if self.up_at.is_none() || self.away.0.elapsed() > STALE {
            let guard = self.stale.get_or_insert_with(|| self.ready.guard("the store"));
            guard.say(&reason);
            self.notices.warn("StoreNotFollowed", format!("leases are not followed, routes stay as they are: {reason}"));
        }
        // Jitter, so that a cluster does not come back to a restarted store as one.
        let jitter = Duration::from_millis(fastrand::u64(0..=u64::try_from(self.wait.as_millis()).unwrap_or(0) / 2));
        tokio::time::sleep(self.wait + jitter).await;
        self.wait = (self.wait * 2).min(BACKOFF.1);
    }
}
