//! Keeps this node's lease in etcd: acquires it, renews it before its end, and acquires it again when it was lost. Routes stay
//! as they are meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use flannel::alloc::{self, Choice, OutOfSubnets};
use flannel::renewal::{LEASE_TTL, Renewal, Step};
use flannel::{Lease, LeaseKey, LeaseSet, Peer, PerFamily, Subnet};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Entry, Etcd, EtcdError, Snapshot};
use crate::store::{Claim, LeaseHandle};

/// How often a lost race for a subnet is run again before it is an error.
const TRIES: u32 = 20;
/// The pause between attempts to get a lost lease back doubles from the first to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why no lease was acquired.
#[derive(Debug, Clone, Error)]
pub enum AcquireError {
    /// The store cannot be asked or refuses.
    #[error(transparent)]
    Store(#[from] EtcdError),
    /// No subnet is free.
    #[error(transparent)]
    Full(#[from] OutOfSubnets),
    /// Other hosts were always faster.
    #[error("lost the race for a subnet {TRIES} times in a row; trying again")]
    Races,
}

/// The etcd leases that a keeper obtained.
#[derive(Debug)]
struct Past {
    /// All that this node ever had. 0 is not among them: it stands for none.
    ever: BTreeSet<i64>,
    /// One that was granted and is not on a key yet.
    spare: Option<i64>,
    /// The last failure that was logged: each is logged once.
    logged: String,
}

impl Past {
    /// Is this another failure than the last one?
    fn is_news(&mut self, error: &EtcdError) -> bool {
        let text = error.to_string();
        let is_news = text != self.logged;
        self.logged = text;
        is_news
    }
}

/// Acquires and keeps one lease.
#[derive(Debug, Clone)]
pub struct Keeper {
    /// The store.
    pub store: Etcd,
    /// What the lease is for.
    pub claim: Claim,
}

impl Keeper {
    /// Acquires a lease: the one that this node has in the store, else its previous subnet, else a random free one. The first time,
    /// the list that it was chosen by is kept for the follower.
    ///
    /// # Errors
    /// [`AcquireError`].
    pub async fn acquire(&self, previous: &PerFamily<Subnet>, is_first: bool) -> Result<LeaseHandle, AcquireError> {
        for attempt in 0..TRIES {
            if attempt > 0 {
                // Other hosts that lost the same race draw another time and another subnet.
                tokio::time::sleep(Duration::from_millis(fastrand::u64(1..=20 * u64::from(attempt)))).await;
            }
            if let Some(held) = self.try_acquire(previous, is_first).await? {
                return Ok(held);
            }
        }
        Err(AcquireError::Races)
    }

    /// One attempt; `None` if another host changed what the choice was based on.
    async fn try_acquire(&self, previous: &PerFamily<Subnet>, is_first: bool) -> Result<Option<LeaseHandle>, AcquireError> {
        let cached = self.store.take_cached().filter(|_| is_first);
        let mut snapshot = match cached {
            Some(snapshot) => snapshot,
            None => self.store.snapshot().await?,
        };
        let mut stale = None;
        let Claim { config, peer, .. } = &self.claim;
        let leases = lease_set(&snapshot);
        // This host's address may have changed while no daemon ran; then the etcd lease identifies its lease.
        let known = snapshot.entries.iter().find(|entry| is_first && entry.key.subnets() == previous);
        let known = known
            .filter(|entry| alloc::is_admitted(config, entry.key.subnets()))
            .filter(|entry| self.claim.previous_leases.contains(&entry.lease) || self.has_own_data(entry))
            .map(|entry| Choice::Reuse(entry.key));
        let choice = match known {
            Some(choice) => choice,
            None => alloc::choose(config, &leases, &peer.public, previous, &mut stale, |n| fastrand::usize(..n))?,
        };
        let is_new = matches!(choice, Choice::Create(_));
        let held = |key, etcd_lease| LeaseHandle { key, published: peer.public, etcd_lease, is_new };
        let entry = |key: &LeaseKey| snapshot.entries.iter().find(|entry| entry.key == *key);
        if let Some(stale) = stale.as_ref().and_then(entry) {
            tracing::info!(subnet = %stale.key, "deleting own lease that the network config no longer admits");
            if !self.store.delete_lease(&stale.key, stale.mod_revision).await? {
                return Ok(None);
            }
        }
        let (key, expected, reserved) = match choice {
            Choice::Reuse(key) => (key, entry(&key).map_or(0, |e| e.mod_revision), entry(&key).is_some_and(|e| e.lease == 0)),
            Choice::Create(key) => (key, 0, false),
        };
        // The etcd lease of the daemon's previous run is in the subnet file: as long as it lives, no other is needed, and a crash before
        // the file is written again loses nothing.
        let kept = entry(&key).map(|entry| entry.lease).filter(|id| *id != 0 && self.claim.previous_leases.contains(id));
        let kept = match kept {
            Some(id) => self.store.keep_alive(id).await?.map(|_| id),
            None => None,
        };
        let etcd_lease = match kept {
            _ if reserved => 0,
            Some(id) => id,
            None => self.store.grant(LEASE_TTL).await?,
        };
        let lease = Lease { key, peer: peer.clone() };
        self.store.note_own(key, etcd_lease);
        let put = self.store.put_lease(&lease, etcd_lease, expected).await;
        let mut done = matches!(put, Ok(true));
        if !done {
            // It may have been written all the same: a request whose answer was lost is made again, and then the key already has
            // another revision. Revoking the etcd lease would delete the key.
            let now = self.store.snapshot().await?;
            done = etcd_lease != 0 && now.entries.iter().any(|entry| entry.key == key && entry.lease == etcd_lease);
        }
        if done {
            // Different keys may overlap: in one of two families, or in size. The older lease has the subnet.
            if is_new && self.is_younger(&key, snapshot.revision).await? {
                tracing::info!(subnet = %key, "lease overlaps an older one; deleting it and choosing again");
                self.store.revoke(etcd_lease).await;
                return Ok(None);
            }
            if is_first {
                snapshot.entries.retain(|entry| entry.key != key);
                // The watch, which starts before it was written, gives its revisions.
                snapshot.entries.push(Entry { key, peer: Some(lease.peer), create_revision: 0, mod_revision: 0, lease: etcd_lease });
                self.store.cache_snapshot(snapshot);
            }
            return Ok(Some(held(key, etcd_lease)));
        }
        // What is on a key stays: the key would be deleted with it.
        if kept.is_none() {
            self.store.revoke(etcd_lease).await;
        }
        put.map(|_| None).map_err(AcquireError::from)
    }

    /// Does a lease that was just created overlap an older one that was created after the list by which it was chosen?
    async fn is_younger(&self, key: &LeaseKey, chosen: i64) -> Result<bool, AcquireError> {
        let now = self.store.created_since(chosen).await?;
        let Some(mine) = now.entries.iter().find(|entry| entry.key == *key) else { return Ok(true) };
        let older = |entry: &&Entry| entry.key != *key && entry.create_revision < mine.create_revision;
        Ok(now.entries.iter().filter(older).any(|entry| entry.key.overlaps(key)))
    }

    /// Whether a lease has the data of this node's own device, as no other host's lease has.
    fn has_own_data(&self, entry: &Entry) -> bool {
        let own = &self.claim.peer;
        let is_same = |peer: &Peer| (&peer.backend_type, &peer.backend_data) == (&own.backend_type, &own.backend_data);
        self.claim.config.backend.has_unique_data() && entry.peer.as_ref().is_some_and(is_same)
    }

    /// Writes the lease with what this node publishes now. False if the lease is no longer this node's. It is recognized by what this
    /// node published last, by the data of its device, and by any etcd lease that it ever had: a store that was restored from a backup
    /// may have an old value.
    async fn publish(&self, current: &mut LeaseHandle, past: &mut Past) -> Result<bool, EtcdError> {
        let snapshot = self.store.snapshot().await?;
        let is_own = |entry: &&Entry| {
            let has_address = entry.peer.as_ref().is_some_and(|peer| alloc::is_mine(&peer.public, &current.published));
            entry.key == current.key && (has_address || past.ever.contains(&entry.lease) || self.has_own_data(entry))
        };
        let Some(own) = snapshot.entries.iter().find(is_own) else { return Ok(false) };
        let etcd_lease = match (own.lease, past.spare) {
            // A reservation stays one.
            (0, _) => 0,
            (id, _) if id == current.etcd_lease => id,
            (_, Some(spare)) => spare,
            // Another host wrote the key: this node's etcd lease lives on.
            _ if current.etcd_lease != 0 && self.store.keep_alive(current.etcd_lease).await?.is_some() => current.etcd_lease,
            (_, None) => self.store.grant(LEASE_TTL).await?,
        };
        // Until it is on the key, it is kept for the next attempt.
        past.spare = Some(etcd_lease).filter(|id| *id != 0 && *id != own.lease);
        let lease = Lease { key: current.key, peer: self.claim.peer.clone() };
        self.store.note_own(current.key, etcd_lease);
        if !self.store.put_lease(&lease, etcd_lease, own.mod_revision).await? {
            return Ok(false);
        }
        past.spare = None;
        past.logged.clear();
        past.ever.extend(Some(etcd_lease).filter(|id| *id != 0));
        (current.etcd_lease, current.published) = (etcd_lease, self.claim.peer.public);
        tracing::info!(subnet = %current.key, "lease updated");
        Ok(true)
    }

    /// Renews the lease for ever, writes it again when the claim changes, and acquires it again when `lost` says that it is gone.
    /// The current lease is published in `held`.
    pub async fn run(mut self, mut claims: watch::Receiver<Claim>, held: watch::Sender<LeaseHandle>, mut lost: mpsc::Receiver<()>) {
        let mut current = *held.borrow();
        let ids = self.claim.previous_leases.iter().copied().chain([current.etcd_lease]);
        let mut past = Past { ever: ids.filter(|id| *id != 0).collect(), spare: None, logged: String::new() };
        // When the lease is written again, if what this node publishes has changed.
        let mut unpublished: Option<Instant> = None;
        let mut renewal = Renewal::granted(now(), LEASE_TTL, self.claim.margin);
        loop {
            let due = match renewal.poll(now()) {
                Step::Wait(at) => Some(at),
                Step::Renew if current.etcd_lease == 0 => {
                    renewal.renewed(now(), LEASE_TTL);
                    continue;
                }
                Step::Renew => None,
            };
            self.store.note_renewal(due.filter(|_| current.etcd_lease != 0).map(Instant::from));
            let is_lost = match due {
                Some(at) => tokio::select! {
                    biased;
                    // A reservation has no end.
                    () = tokio::time::sleep_until(at.into()), if current.etcd_lease != 0 => continue,
                    changed = claims.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let before = std::mem::replace(&mut self.claim, claims.borrow_and_update().clone());
                        if self.claim.addrs != before.addrs {
                            self.store.reconnect();
                        }
                        unpublished = Some(Instant::now());
                        continue;
                    }
                    () = tokio::time::sleep_until(unpublished.unwrap_or_else(Instant::now)), if unpublished.is_some() => {
                        let (is_lost, again) = self.publish_change(&mut current, &mut past).await;
                        unpublished = again;
                        if !is_lost && again.is_none() {
                            held.send_replace(current);
                        }
                        is_lost
                    }
                    message = lost.recv() => match message {
                        Some(()) => true,
                        None => return,
                    },
                },
                None => self.renew(&current, &mut renewal).await,
            };
            if is_lost {
                let before = current.etcd_lease;
                if !self.is_kept(&mut current, &mut past).await {
                    tracing::warn!(subnet = %current.key, "lease lost (expired, deleted or taken); acquiring it again, keeping routes");
                    current = self.reacquire(&current).await;
                    past.ever.extend(Some(current.etcd_lease).filter(|id| *id != 0));
                }
                // A key that is written under the same etcd lease does not prolong that.
                if current.etcd_lease != before {
                    renewal = Renewal::granted(now(), LEASE_TTL, self.claim.margin);
                }
                held.send_replace(current);
            }
        }
    }

    /// Writes a changed claim. Returns whether the lease is lost, and when to try again.
    async fn publish_change(&self, current: &mut LeaseHandle, past: &mut Past) -> (bool, Option<Instant>) {
        match self.publish(current, past).await {
            Ok(is_kept) => (!is_kept, None),
            Err(error) => {
                if past.is_news(&error) {
                    tracing::warn!(subnet = %current.key, %error, "failed to update lease; retrying every second");
                }
                (false, Some(Instant::now() + Duration::from_secs(1)))
            }
        }
    }

    /// Renews the lease. True if it is lost.
    async fn renew(&self, current: &LeaseHandle, renewal: &mut Renewal) -> bool {
        match self.store.keep_alive(current.etcd_lease).await {
            Ok(Some(ttl)) => {
                tracing::info!(subnet = %current.key, hours = ttl.as_secs() / 3600, "lease renewed");
                renewal.renewed(now(), ttl);
                false
            }
            Ok(None) => true,
            Err(error) => {
                tracing::warn!(subnet = %current.key, %error, "failed to renew lease; retrying");
                renewal.failed(now());
                false
            }
        }
    }

    /// A lease that seems lost may still be this node's; then it is written again. A store that does not answer says neither.
    async fn is_kept(&self, current: &mut LeaseHandle, past: &mut Past) -> bool {
        let mut pause = PAUSE.0;
        loop {
            match self.publish(current, past).await {
                Ok(kept) => return kept,
                Err(error) if past.is_news(&error) => tracing::warn!(subnet = %current.key, %error, "failed to read lease; retrying"),
                Err(_) => {}
            }
            pause = wait(pause).await;
        }
    }

    async fn reacquire(&self, before: &LeaseHandle) -> LeaseHandle {
        let (mut pause, mut logged) = (PAUSE.0, String::new());
        loop {
            match self.acquire(before.key.subnets(), false).await {
                Ok(held) if held.key == before.key => {
                    tracing::info!(subnet = %held.key, "lease acquired again");
                    return held;
                }
                Ok(held) => {
                    tracing::error!(was = %before.key, is = %held.key, "subnet changed: another host took the old one; restart the pods of this host, their addresses are no longer routed");
                    return held;
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != logged {
                        tracing::warn!(error = text, "failed to acquire lease; retrying");
                    }
                    logged = text;
                }
            }
            pause = wait(pause).await;
        }
    }
}

/// Pauses, with jitter, and returns the next pause.
async fn wait(pause: Duration) -> Duration {
    tokio::time::sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
    (pause * 2).min(PAUSE.1)
}

/// By tokio's clock, which tests control.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// The leases, for the choice of a subnet by keys and addresses. A lease whose value cannot be read takes its subnet as well.
fn lease_set(snapshot: &Snapshot) -> LeaseSet {
    let public = |entry: &Entry| entry.peer.as_ref().map(|peer| peer.public).unwrap_or_default();
    let lease = |entry: &Entry| (Lease { key: entry.key, peer: Peer { public: public(entry), ..Peer::default() } }, entry.age());
    snapshot.entries.iter().map(lease).collect()
}
