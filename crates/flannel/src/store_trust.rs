//! The policy for a store that lost data: restored from an older backup, emptied, or replaced by another one.
//!
//! A list contradicts earlier events if its revision is lower, if it has a lease with attributes that the lease never had, or if it
//! lacks this node's own lease. The leases missing from such a list are in doubt: the daemon keeps their routes for [`DOUBT`], so that
//! each host can write its lease again. [`LeaseSet`] records the doubtful leases; this file decides when to give them up. Time is
//! measured from the daemon's start.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::alloc::is_admitted;
use crate::config::Config;
use crate::lease::{LeaseKey, LeaseSet, StoreEvent};
use crate::net::{PerFamily, Subnet};
use crate::object::EnvFile;

/// How long the daemon keeps the routes of a doubtful lease. Its host writes the lease again within seconds, or within minutes if its
/// daemon is being replaced. A route to a host that is gone does no harm to others.
pub const DOUBT: Duration = Duration::from_secs(300);

/// Whether the daemon trusts the lists of the store, and the deadlines of that decision.
#[derive(Debug, Default)]
pub struct StoreTrust {
    /// When the doubtful leases are given up.
    doubt: Option<Duration>,
    /// Until when lists count as incomplete, because the store does not know the previous lease of this node.
    distrust: Option<Duration>,
}

/// How a change of leases affected the set of doubtful leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// No change that needs a report.
    Same,
    /// More leases are in doubt; this is their total number.
    Raised(usize),
    /// No lease is in doubt any longer.
    Settled,
}

/// The actions that are due.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Due {
    /// Give up the doubtful leases.
    pub give_up: bool,
    /// Compare the whole kernel state with the leases, because lists are trusted again.
    pub audit: bool,
}

impl StoreTrust {
    /// Makes the state at the daemon's start. `has_forgotten`: see [`has_forgotten`].
    pub fn new(now: Duration, has_forgotten: bool) -> StoreTrust {
        StoreTrust { doubt: None, distrust: has_forgotten.then(|| now + DOUBT) }
    }

    /// The time of the next call of [`StoreTrust::due`].
    pub fn deadline(&self) -> Option<Duration> {
        self.doubt.into_iter().chain(self.distrust).min()
    }

    /// Whether objects may be deleted because a complete list has no lease for them.
    pub fn believes_lists(&self) -> bool {
        self.distrust.is_none()
    }

    /// Updates the deadline after events were folded in. `before` were in doubt before them; `listed`: they completed a list.
    pub fn note(&mut self, now: Duration, leases: &LeaseSet, own: LeaseKey, before: &BTreeSet<LeaseKey>, listed: bool) -> Doubt {
        let doubtful = leases.doubtful();
        if doubtful.is_empty() {
            return if self.doubt.take().is_some() { Doubt::Settled } else { Doubt::Same };
        }
        // The lease keeper reports the loss of this node's own lease.
        let is_raised = doubtful.difference(before).any(|key| *key != own);
        // Before a list the store was unreachable, so that no host could write to it.
        if listed || is_raised {
            self.doubt = Some(now + DOUBT);
        }
        if is_raised { Doubt::Raised(doubtful.len()) } else { Doubt::Same }
    }

    /// Returns the actions that are due, and sets the next deadlines. While the store is unreachable, or this node cannot write to it,
    /// the same may be true of other hosts: then the waiting time starts over.
    pub fn due(&mut self, now: Duration, connected: bool, leases: &LeaseSet, own: LeaseKey) -> Due {
        let mut due = Due::default();
        if self.doubt.is_some_and(|at| at <= now) {
            due.give_up = connected && !leases.doubtful().contains(&own);
            self.doubt = (!due.give_up).then_some(now + DOUBT);
        }
        if self.distrust.is_some_and(|at| at <= now) {
            due.audit = connected;
            self.distrust = (!connected).then_some(now + DOUBT);
        }
        due
    }
}

/// Turns deletions into doubt if this node's own lease is among them. Then all leases were deleted at once (for example by
/// `etcdctl del --prefix`), and the other hosts are probably alive, as this one is.
pub fn doubt_deletes(own: LeaseKey, events: &mut [StoreEvent]) {
    if !events.contains(&StoreEvent::Delete(own)) {
        return;
    }
    for event in events {
        match event {
            StoreEvent::Delete(key) if *key != own => *event = StoreEvent::Vanished(*key),
            _ => {}
        }
    }
}

/// Whether the list that is about to complete comes from a store that lost data: it does not name this node's own lease.
pub fn is_list_older(leases: &LeaseSet, own: &LeaseKey) -> bool {
    leases.is_missed(own)
}

/// Whether the store lost the lease that this node had earlier in this boot. `before` is the subnet file of an earlier daemon of this
/// boot, `previous` its subnets, `is_new` whether the node's present lease was newly created.
pub fn has_forgotten(is_new: bool, before: Option<&EnvFile>, config: &Config, previous: &PerFamily<Subnet>) -> bool {
    let was_leased = before.is_some_and(|file| file.ours && !file.etcd_leases.is_empty());
    is_new && was_leased && is_admitted(config, previous)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Age, Lease, Peer};

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Two leases that are missing from an older list.
    fn doubtful() -> LeaseSet {
        let mut leases = LeaseSet::default();
        let two =
            ["10.1.1.0/24", "10.1.2.0/24"].map(|text| StoreEvent::Apply(Lease { key: key(text), peer: Peer::default() }, Age::UNKNOWN));
        let lists = [StoreEvent::Init].into_iter().chain(two);
        for event in lists.chain([StoreEvent::InitDone, StoreEvent::Init, StoreEvent::Older, StoreEvent::InitDone]) {
            leases.fold(event);
        }
        leases
    }

    #[test]
    fn each_list_restarts_the_waiting_time() {
        let (leases, own) = (doubtful(), key("10.1.9.0/24"));
        let mut trust = StoreTrust::new(seconds(0), false);
        assert_eq!(trust.note(seconds(10), &leases, own, &BTreeSet::new(), true), Doubt::Raised(2));
        let before = leases.doubtful().clone();
        assert_eq!(trust.note(seconds(20), &leases, own, &before, true), Doubt::Same);
        assert_eq!(trust.deadline(), Some(seconds(320)), "a list restarts the waiting time");
        assert_eq!(trust.note(seconds(30), &leases, own, &before, false), Doubt::Same);
        assert_eq!(trust.deadline(), Some(seconds(320)), "an event does not");
        assert_eq!(trust.due(seconds(319), true, &leases, own), Due::default());
        assert!(trust.due(seconds(320), true, &leases, own).give_up);
        assert_eq!(trust.deadline(), None);
    }

    #[test]
    fn doubt_lasts_while_the_store_is_unreachable_or_lacks_own_lease() {
        let leases = doubtful();
        for (connected, own) in [(false, key("10.1.9.0/24")), (true, key("10.1.1.0/24"))] {
            let mut trust = StoreTrust::new(seconds(0), false);
            trust.note(seconds(0), &leases, key("10.1.9.0/24"), &BTreeSet::new(), true);
            assert_eq!(trust.due(seconds(300), connected, &leases, own), Due::default());
            assert_eq!(trust.deadline(), Some(seconds(600)));
        }
    }

    #[test]
    fn doubt_is_settled_when_leases_are_written_again() {
        let own = key("10.1.9.0/24");
        let mut trust = StoreTrust::new(seconds(0), false);
        trust.note(seconds(0), &doubtful(), own, &BTreeSet::new(), true);
        assert_eq!(trust.note(seconds(1), &LeaseSet::default(), own, &BTreeSet::new(), false), Doubt::Settled);
        assert_eq!(trust.note(seconds(1), &LeaseSet::default(), own, &BTreeSet::new(), false), Doubt::Same);
    }

    #[test]
    fn store_that_lost_own_lease_is_not_trusted_at_first() {
        let (leases, own) = (LeaseSet::default(), key("10.1.9.0/24"));
        let mut trust = StoreTrust::new(seconds(5), true);
        assert!(!trust.believes_lists());
        assert_eq!(trust.due(seconds(305), false, &leases, own), Due::default());
        assert_eq!(trust.due(seconds(605), true, &leases, own), Due { give_up: false, audit: true });
        assert!(trust.believes_lists());
    }
}
