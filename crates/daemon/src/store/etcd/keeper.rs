//! Keeps this node's lease in etcd: acquires it, renews it before its end, and acquires it again when it was lost. The data
//! path stays as it is meanwhile.

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

/// How often a lost race for a subnet is tried again before it is an error.
const TRIES: u32 = 20;

/// Why there is no lease.
#[derive(Debug, Clone, Error)]
pub enum AcquireError {
    /// The store cannot be asked or refuses.
    #[error(transparent)]
    Store(#[from] EtcdError),
    /// No subnet is free.
    #[error(transparent)]
    Full(#[from] OutOfSubnets),
    /// Others were always faster.
    #[error("lost the race for a subnet {TRIES} times in a row")]
    Races,
}

/// What a keeper did before.
#[derive(Debug)]
struct Past {
    /// The etcd leases that this node ever had. 0, which is anybody's, is not among them.
    ever: BTreeSet<i64>,
    /// One that was granted and is on no key yet.
    spare: Option<i64>,
}

/// What it takes to acquire a lease.
#[derive(Debug, Clone)]
pub struct Keeper {
    /// The store.
    pub store: Etcd,
    /// What the lease is for.
    pub claim: Claim,
}

impl Keeper {
    /// Acquires a lease: this node's own from before, else its previous subnet, else a random free one. The first one leaves the
    /// list that it was chosen by to who follows the store next.
    ///
    /// # Errors
    /// [`AcquireError`].
    pub async fn acquire(&self, previous: &PerFamily<Subnet>, is_first: bool) -> Result<LeaseHandle, AcquireError> {
        for attempt in 0..TRIES {
            if attempt > 0 {
                // Others who lost the same race draw another time and another subnet.
                tokio::time::sleep(Duration::from_millis(fastrand::u64(1..=20 * u64::from(attempt)))).await;
            }
            if let Some(held) = self.try_acquire(previous, is_first).await? {
                return Ok(held);
            }
        }
        Err(AcquireError::Races)
    }

    /// One try; `None` if somebody else changed what this decision stood on.
    async fn try_acquire(&self, previous: &PerFamily<Subnet>, is_first: bool) -> Result<Option<LeaseHandle>, AcquireError> {
        let seed = self.store.take_cached().filter(|_| is_first);
        let mut snapshot = match seed {
            Some(snapshot) => snapshot,
            None => self.store.snapshot().await?,
        };
        let mut stale = None;
        let Claim { config, peer, .. } = &self.claim;
        let leases = lease_set(&snapshot);
        // This host's address may have changed while no daemon ran; then the etcd lease tells that the lease is its own.
        let known = snapshot.entries.iter().find(|entry| is_first && entry.key.subnets() == previous);
        let known = known
            .filter(|entry| alloc::is_admitted(config, entry.key.subnets()) && self.claim.previous_leases.contains(&entry.lease))
            .map(|entry| Choice::Reuse(entry.key));
        let choice = match known {
            Some(choice) => choice,
            None => alloc::choose(config, &leases, &peer.public, previous, &mut stale, |n| fastrand::usize(..n))?,
        };
        let is_new = matches!(choice, Choice::Create(_));
        let held = |key, etcd_lease| LeaseHandle { key, published: peer.public, etcd_lease, is_new };
        let entry = |key: &LeaseKey| snapshot.entries.iter().find(|entry| entry.key == *key);
        if let Some(stale) = stale.as_ref().and_then(entry) {
            tracing::info!(subnet = %stale.key, "giving back a lease of this host that the network config no longer admits");
            if !self.store.delete_lease(&stale.key, stale.mod_revision).await? {
                return Ok(None);
            }
        }
        let (key, expected, reserved) = match choice {
            Choice::Reuse(key) => (key, entry(&key).map_or(0, |e| e.mod_revision), entry(&key).is_some_and(|e| e.lease == 0)),
            Choice::Create(key) => (key, 0, false),
        };
        let etcd_lease = if reserved { 0 } else { self.store.grant(LEASE_TTL).await? };
        let lease = Lease { key, peer: peer.clone() };
        let put = self.store.put_lease(&lease, etcd_lease, expected).await;
        let mut done = matches!(put, Ok(true));
        if !done {
            // It may have been done all the same: an answer that was lost is asked for again, and then the key has another
            // revision already. To revoke the etcd lease then would delete the key.
            let now = self.store.snapshot().await?;
            done = etcd_lease != 0 && now.entries.iter().any(|entry| entry.key == key && entry.lease == etcd_lease);
        }
        if done {
            // Keys that differ may overlap all the same: in one family of two, or in size. The older lease has the subnet.
            if is_new && self.is_younger(&key, snapshot.revision).await? {
                tracing::info!(subnet = %key, "another host was faster with a part of this subnet; giving it back");
                self.store.revoke(etcd_lease).await;
                return Ok(None);
            }
            if is_first {
                snapshot.entries.retain(|entry| entry.key != key);
                // Its revisions are told by the watch, which begins before it was written.
                snapshot.entries.push(Entry { key, peer: Some(lease.peer), create_revision: 0, mod_revision: 0, lease: etcd_lease });
                self.store.cache_snapshot(snapshot);
            }
            return Ok(Some(held(key, etcd_lease)));
        }
        self.store.revoke(etcd_lease).await;
        put.map(|_| None).map_err(AcquireError::from)
    }

    /// Does a lease that was just created overlap an older one, which was not there at the revision by which it was chosen?
    async fn is_younger(&self, key: &LeaseKey, chosen: i64) -> Result<bool, AcquireError> {
        let now = self.store.created_since(chosen).await?;
        let Some(mine) = now.entries.iter().find(|entry| entry.key == *key) else { return Ok(true) };
        let older = |entry: &&Entry| entry.key != *key && entry.create_revision < mine.create_revision;
        Ok(now.entries.iter().filter(older).any(|entry| entry.key.overlaps(key)))
    }

    /// Writes the lease again with what this node publishes now. False if it is not this node's any more. It is known by what
    /// this node published last, and by any etcd lease that it ever had: a store that was restored from a backup may say what
    /// this node said long ago.
    async fn publish(&self, current: &mut LeaseHandle, past: &mut Past) -> Result<bool, EtcdError> {
        let snapshot = self.store.snapshot().await?;
        let is_own = |entry: &&Entry| {
            let says_so = entry.peer.as_ref().is_some_and(|peer| alloc::is_mine(&peer.public, &current.published));
            entry.key == current.key && (says_so || past.ever.contains(&entry.lease))
        };
        let Some(own) = snapshot.entries.iter().find(is_own) else { return Ok(false) };
        let etcd_lease = match (own.lease, past.spare) {
            // A reservation stays one.
            (0, _) => 0,
            (id, _) if id == current.etcd_lease => id,
            (_, Some(spare)) => spare,
            (_, None) => self.store.grant(LEASE_TTL).await?,
        };
        // Until it is on the key it is for the next try.
        past.spare = Some(etcd_lease).filter(|id| *id != 0 && *id != own.lease);
        let lease = Lease { key: current.key, peer: self.claim.peer.clone() };
        if !self.store.put_lease(&lease, etcd_lease, own.mod_revision).await? {
            return Ok(false);
        }
        past.spare = None;
        past.ever.extend(Some(etcd_lease).filter(|id| *id != 0));
        (current.etcd_lease, current.published) = (etcd_lease, self.claim.peer.public);
        tracing::info!(subnet = %current.key, "wrote the lease anew, with what this host publishes now");
        Ok(true)
    }

    /// Renews the lease for ever, writes it anew when the claim changes, and acquires it again whenever `lost` says that
    /// it is gone. What is held is published in `held`.
    pub async fn run(mut self, mut claims: watch::Receiver<Claim>, held: watch::Sender<LeaseHandle>, mut lost: mpsc::Receiver<()>) {
        let mut current = *held.borrow();
        let ids = self.claim.previous_leases.iter().copied().chain([current.etcd_lease]);
        let mut past = Past { ever: ids.filter(|id| *id != 0).collect(), spare: None };
        // When what this node publishes is written again, if it is not what it should be.
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
                        match self.publish(&mut current, &mut past).await {
                            Ok(true) => {
                                unpublished = None;
                                held.send_replace(current);
                                false
                            }
                            Ok(false) => {
                                unpublished = None;
                                true
                            }
                            Err(error) => {
                                tracing::warn!(subnet = %current.key, %error, "cannot write the lease anew; trying again in a second");
                                unpublished = Some(Instant::now() + Duration::from_secs(1));
                                false
                            }
                        }
                    }
                    word = lost.recv() => match word {
                        Some(()) => true,
                        None => return,
                    },
                },
                None => match self.store.keep_alive(current.etcd_lease).await {
                    Ok(Some(ttl)) => {
                        tracing::info!(subnet = %current.key, hours = ttl.as_secs() / 3600, "renewed the lease");
                        renewal.renewed(now(), ttl);
                        false
                    }
                    Ok(None) => true,
                    Err(error) => {
                        tracing::warn!(subnet = %current.key, %error, "cannot renew the lease; trying again in a minute");
                        renewal.failed(now());
                        false
                    }
                },
            };
            if is_lost {
                let before = current.etcd_lease;
                if !self.is_kept(&mut current, &mut past).await {
                    tracing::warn!(subnet = %current.key, "the lease is lost (expired, deleted or taken); acquiring it again, routes stay");
                    current = self.reacquire(&current).await;
                    past.ever.extend(Some(current.etcd_lease).filter(|id| *id != 0));
                }
                // A key that is written under the etcd lease that it had gives that no longer life.
                if current.etcd_lease != before {
                    renewal = Renewal::granted(now(), LEASE_TTL, self.claim.margin);
                }
                held.send_replace(current);
            }
        }
    }

    /// A lease that seems lost may be this node's all the same: then it is written anew. A store that cannot be asked says
    /// neither.
    async fn is_kept(&self, current: &mut LeaseHandle, past: &mut Past) -> bool {
        let mut wait = Duration::from_millis(100);
        loop {
            match self.publish(current, past).await {
                Ok(kept) => return kept,
                Err(error) => tracing::warn!(subnet = %current.key, %error, "cannot ask whose the lease is; trying again"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(30));
        }
    }

    async fn reacquire(&self, before: &LeaseHandle) -> LeaseHandle {
        let mut wait = Duration::from_millis(100);
        loop {
            match self.acquire(before.key.subnets(), false).await {
                Ok(held) if held.key == before.key => {
                    tracing::info!(subnet = %held.key, "acquired the same lease again");
                    return held;
                }
                Ok(held) => {
                    tracing::error!(was = %before.key, is = %held.key, "another host has this node's subnet now: pods that are running keep addresses of the old one and must be restarted");
                    return held;
                }
                Err(error) => tracing::warn!(%error, "cannot acquire a lease; trying again"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(30));
        }
    }
}

/// By tokio's clock, which a test may hold.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// The leases for the choice of a subnet, which is made by keys and addresses. One whose value cannot be read is somebody's all the same.
fn lease_set(snapshot: &Snapshot) -> LeaseSet {
    let public = |entry: &Entry| entry.peer.as_ref().map(|peer| peer.public).unwrap_or_default();
    let leases = snapshot.entries.iter().map(|entry| Lease { key: entry.key, peer: Peer { public: public(entry), ..Peer::default() } });
    leases.collect()
}
