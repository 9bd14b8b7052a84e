//! Events of the store: leases that change, this node's own lease, and a store that lost data.

use std::collections::BTreeSet;
use std::time::Duration;

use flannel::alloc::is_mine;
use flannel::diff::{Prune, diff, diff_keys};
use flannel::object::{Key, Lane, Object};
use flannel::picture::Touched;
use flannel::store_trust::{Doubt, doubt_deletes};
use flannel::{LeaseKey, Op, StoreEvent};
use tokio::time::Instant;

use super::{Inputs, Reconciler};
use crate::host::Host;
use crate::store::LeaseHandle;

/// How long after a lease was acquired the store must have sent its event.
pub(super) const OWN: Duration = Duration::from_secs(5);
/// A lease that another host writes as well is corrected no more rarely than this.
const CORRECT: Duration = Duration::from_secs(60);
/// How long after a list it is looked at again whether the store is followed.
const LISTED: Duration = Duration::from_millis(100);
/// A long list is put into an empty kernel in parts, so many…
const PARTS: usize = 16;
/// …and of no fewer leases than this.
const PART: usize = 256;
/// A list that changes more leases than this has left more memory behind than is needed again…
pub(super) const MANY: usize = 256;
/// …which is given back so much later.
const TIDY: Duration = Duration::from_millis(500);
/// The notice about a store that lost data.
const LOST: &str = "the store lost data (restored from a backup, perhaps): routes of leases that it does not know stay for five minutes, in which their hosts write them again";

/// What is watched about this node's own lease.
#[derive(Debug, Default)]
pub(super) struct OwnLease {
    /// When it is checked next whether the lease is still this node's.
    pub(super) check_at: Option<Instant>,
    /// The foreign writes that were seen, and whether one has not been answered by a write of this node.
    foreign: (u64, bool),
    /// When a lease with another node's or with old data was last written again.
    corrected: Option<Correction>,
}

/// The last time that this node wrote its lease because the store had other data under its address.
#[derive(Debug)]
struct Correction {
    at: Instant,
    /// How long it must have been enough: doubling with each that follows soon.
    wait: Duration,
    /// Corrections that followed each other soon.
    times: u32,
}

impl OwnLease {
    /// Does another host write to this node's lease? It is known by the second correction that did not last.
    pub(super) fn is_contested(&self) -> bool {
        self.corrected.as_ref().is_some_and(|correction| correction.times > 1)
    }

    /// May this node's lease be corrected, after the last correction?
    fn may_correct(&self) -> bool {
        self.corrected.as_ref().is_none_or(|last| last.at.elapsed() >= last.wait)
    }

    fn correct(&mut self) {
        self.foreign.1 = false;
        let (wait, times) = self.corrected.as_ref().map_or((OWN, 0), |last| ((last.wait * 2).min(CORRECT), last.times));
        self.corrected = Some(Correction { at: Instant::now(), wait, times: times + 1 });
    }

    /// The lease is as this node wrote it. Only if that has lasted is a conflict over: the event may be the echo of the last correction,
    /// and the other host waits as long as this one does before it writes again.
    fn is_right(&mut self) {
        self.corrected.take_if(|last| last.at.elapsed() >= last.wait * 3);
    }
}

impl<H: Host + 'static> Reconciler<H> {
    pub(super) async fn on_leases(&mut self, events: Vec<StoreEvent>, inputs: &mut Inputs) {
        let began = Instant::now();
        let was_complete = self.picture.leases().is_complete();
        let mut events = events;
        // Events that are queued already are part of this change.
        while let Ok(more) = inputs.events.try_recv() {
            events.extend(more);
        }
        let listed = events.contains(&StoreEvent::InitDone);
        let doubtful = self.picture.leases().doubtful().clone();
        doubt_deletes(self.picture.own(), &mut events);
        let early = self.write_in_parts(&mut events).await;
        let Touched { mut leases, keys } = self.picture.fold_all(events);
        let in_parts = !early.is_empty();
        leases.extend(early);
        leases.sort_unstable();
        leases.dedup();
        self.note_doubt(&doubtful, listed);
        // What failed with the former values may succeed with the new ones.
        self.failures.hurry(began, |key| keys.binary_search(key).is_ok());
        let (own, complete) = (self.picture.own(), self.picture.leases().is_complete());
        if listed || leases.binary_search(&own).is_ok() {
            self.check_own(inputs, LISTED);
        }
        if complete && !was_complete {
            self.picture.keep_unreadable(&self.observed);
            self.picture.accept_roaming(&mut self.observed);
        }
        let ops = match complete && !was_complete || in_parts {
            // Only now is it known which objects of the past are superfluous.
            true => diff(self.picture.desired(), &self.observed, self.prune_all()),
            false => diff_keys(self.picture.desired(), &self.observed, &keys, self.prune()),
        };
        let count = ops.len();
        self.adopting &= !complete;
        self.execute(ops).await;
        self.log_leases(&leases, count, began);
        if complete && let Some(guard) = self.syncing.take() {
            let (leases, refused, failed) = (self.picture.leases().len(), self.picture.refusals().len(), self.failures.len());
            tracing::info!(leases, refused, failed, "first list of leases applied");
            drop(guard);
        }
        if listed && leases.len() > MANY {
            // Not while a change waits.
            self.tidy = Some(Instant::now() + TIDY);
        }
    }

    /// Puts a long list of leases, none of which is in the kernel yet, there in parts: the kernel thread writes one while the next is
    /// folded. Takes them from `events` and returns them. Claims of one part on a key that another has are settled when all are there.
    async fn write_in_parts(&mut self, events: &mut Vec<StoreEvent>) -> Vec<LeaseKey> {
        let end = events.iter().position(|event| *event == StoreEvent::InitDone).unwrap_or(0);
        if end < 2 * PART || self.observed.len() > PART {
            return Vec::new();
        }
        let rest = events.split_off(end);
        let mut list = std::mem::replace(events, rest).into_iter();
        let (mut touched, mut writing) = (Vec::new(), Vec::new());
        while list.len() > 0 {
            let Touched { leases, keys } = self.picture.fold_all(list.by_ref().take((end / PARTS).max(PART)));
            touched.extend(leases);
            let mut ops = diff_keys(self.picture.desired(), &self.observed, &keys, Prune::No);
            // Those of the slow lane come with the comparison at the end.
            ops.retain(|op: &Op| op.object().kind().lane() == Lane::Fast);
            writing.push(self.host.apply(ops, Lane::Fast));
        }
        for written in writing {
            let outcomes = written.await;
            self.conclude(outcomes);
        }
        touched
    }

    /// Notes leases that the store has lost, beside those that were in doubt before.
    fn note_doubt(&mut self, before: &BTreeSet<LeaseKey>, listed: bool) {
        let now = self.epoch.elapsed();
        match self.trust.note(now, self.picture.leases(), self.picture.own(), before, listed) {
            Doubt::Same => {}
            Doubt::Raised(leases) => self.report_lost_leases(Some(leases)),
            Doubt::Settled => tracing::info!("no doubtful leases any more"),
        }
    }

    /// Reports that the store lost data; `leases` are in doubt, `None` at the start, when none is known yet.
    pub(super) fn report_lost_leases(&self, leases: Option<usize>) {
        tracing::warn!(leases, "store lost data; routes of leases that it does not know stay for five minutes");
        self.notices.warn("StoreLostLeases", leases.map_or(LOST.to_owned(), |leases| format!("{LOST} ({leases} leases)")));
    }

    /// Removes leases that the store had lost, and that no host wrote again.
    pub(super) async fn give_up_doubtful(&mut self) {
        let began = Instant::now();
        let Touched { leases, keys } = self.picture.give_up_doubtful();
        tracing::warn!(leases = leases.len(), "removing routes of leases that no host wrote again");
        let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
        let count = ops.len();
        self.execute(ops).await;
        self.log_leases(&leases, count, began);
    }

    /// Tells the keeper if the lease that it holds is another node's by now, or gone, or has data that this node published long ago: a store
    /// may be restored from an older backup.
    pub(super) fn check_own(&mut self, inputs: &Inputs, again: Duration) {
        self.own.check_at = None;
        let (leases, held) = (self.picture.leases(), *inputs.held.borrow());
        let stored = leases.get(&held.key).filter(|_| !leases.doubtful().contains(&held.key));
        let (stored, now) = (stored.filter(|peer| is_mine(&peer.public, &held.published)), self.picture.own_peer());
        match stored {
            _ if !leases.is_complete() => {}
            // A store that is not followed says nothing new; a list comes a moment before the store counts as followed.
            _ if !inputs.following.borrow().connected => self.own.check_at = Some(Instant::now() + again),
            // A full channel means that the keeper knows already.
            None => drop(inputs.lost.try_send(())),
            Some(stored)
                if !self.own.foreign.1 && (&stored.backend_type, &stored.backend_data) == (&now.backend_type, &now.backend_data) =>
            {
                self.own.is_right();
                if self.own.is_contested() {
                    self.own.check_at = Some(Instant::now() + OWN);
                }
            }
            // The event may be older than our write, or another host may have the same address and write as well: so not at once again,
            // and ever more rarely.
            Some(_) if !self.own.may_correct() => self.own.check_at = Some(Instant::now() + OWN),
            Some(_) => {
                let was_contested = self.own.is_contested();
                self.own.correct();
                if self.own.is_contested() && !was_contested {
                    tracing::warn!(subnet = %held.key, "another host publishes this node's address");
                    self.notices.warn("AddressConflict", self.contested_text());
                } else {
                    tracing::info!(subnet = %held.key, "own lease has other data; writing it again");
                }
                inputs.claim.send_modify(|claim| claim.peer = now);
            }
        }
    }

    /// The notice about another host that has this node's address.
    pub(super) fn contested_text(&self) -> String {
        let (own, published) = (self.picture.own(), crate::facts::list(&self.picture.node().public));
        format!(
            "another host publishes {published} as its address too, and writes to lease {own}: packets for these pods go to one of the two; give each host its own address (--iface or --public-ip)"
        )
    }

    /// Two hosts with one address may publish the same data: the etcd lease on the key shows which of them wrote it last.
    pub(super) fn on_following(&mut self, inputs: &mut Inputs) {
        let seen = inputs.following.borrow_and_update().foreign_writes;
        if seen != self.own.foreign.0 {
            self.own.foreign = (seen, true);
            self.check_own(inputs, LISTED);
        }
    }

    pub(super) async fn on_own(&mut self, held: LeaseHandle) {
        // Events of this lease that came before it was held were not about us. Once its own event must have come, it is checked.
        self.own.check_at = Some(Instant::now() + OWN);
        let mut keys: BTreeSet<Key> = self.picture.add_etcd_lease(held.etcd_lease).into_iter().collect();
        if held.key != self.picture.own() {
            keys.extend(self.picture.set_own(held.key));
        }
        let ops = self.compare(&keys);
        debug_assert!(ops.iter().all(|op| !matches!(op, Op::Delete(Object::EnvFile(_)))), "the subnet file is never deleted");
        self.execute(ops).await;
    }
}
