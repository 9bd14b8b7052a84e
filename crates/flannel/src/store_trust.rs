//! The policy for a store that lost data: restored from an older backup, emptied, or swapped for another.
//!
//! A list contradicts what the store said before if its revision is lower, if it has a lease as it never was, or if it does not know
//! this node's own lease. Leases that such a list does not name are in doubt, not gone: their routes stay for [`DOUBT`], in which each
//! host writes its lease again. Which leases are in doubt is part of [`LeaseSet`]; when that ends is decided here. Time is measured from
//! the daemon's start.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::alloc::is_admitted;
use crate::config::Config;
use crate::lease::{LeaseKey, LeaseSet, StoreEvent};
use crate::net::{PerFamily, Subnet};
use crate::object::EnvFile;

/// How long the routes of a lease stay that a store which lost data does not know: its host writes it again within seconds, and one
/// whose daemon is being replaced within minutes. A route to a host that is gone harms no other.
pub const DOUBT: Duration = Duration::from_secs(300);

/// How far the store's lists are believed.
#[derive(Debug, Default)]
pub struct StoreTrust {
    /// When doubtful leases are given up.
    doubt: Option<Duration>,
    /// Until when lists are not taken to be complete, because the store does not know the lease that this node had before.
    distrust: Option<Duration>,
}

/// What became of the doubt by a change of leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// Nothing that an operator must know.
    Same,
    /// Leases came into doubt; so many are in doubt now.
    Raised(usize),
    /// No lease is in doubt any more.
    Settled,
}

/// What is due by time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Due {
    /// Doubtful leases are to be given up.
    pub give_up: bool,
    /// Lists are complete again: the whole kernel is to be compared with them.
    pub audit: bool,
}

impl StoreTrust {
    /// At the daemon's start.
    pub fn new(now: Duration, has_forgotten: bool) -> StoreTrust {
        StoreTrust { doubt: None, distrust: has_forgotten.then(|| now + DOUBT) }
    }

    /// When [`StoreTrust::due`] is to be asked next.
    pub fn deadline(&self) -> Option<Duration> {
        self.doubt.into_iter().chain(self.distrust).min()
    }

    /// May objects be deleted because no lease of a complete list asks for them?
    pub fn believes_lists(&self) -> bool {
        self.distrust.is_none()
    }

    /// After events were folded: `before` were in doubt then; `listed` says that a list was complete among them.
    pub fn note(&mut self, now: Duration, leases: &LeaseSet, own: LeaseKey, before: &BTreeSet<LeaseKey>, listed: bool) -> Doubt {
        let doubtful = leases.doubtful();
        if doubtful.is_empty() {
            return if self.doubt.take().is_some() { Doubt::Settled } else { Doubt::Same };
        }
        // The keeper reports the loss of this node's own lease.
        let is_raised = doubtful.difference(before).any(|key| *key != own);
        // Before a list the store was away, and no host could write to it.
        if listed || is_raised {
            self.doubt = Some(now + DOUBT);
        }
        if is_raised { Doubt::Raised(doubtful.len()) } else { Doubt::Same }
    }

    /// What is due now. While the store is away, or this node cannot write to it, other hosts may be unable to as well: then the time
    /// begins again.
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

/// Where this node's own lease is deleted together with others, all were deleted at once (`etcdctl del --prefix`, perhaps): the others'
/// hosts are alive as this one is, so their leases are in doubt.
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

/// Is the list that is about to be complete one of a store that lost data? It is if it does not name this node's own lease.
pub fn is_list_older(leases: &LeaseSet, own: &LeaseKey) -> bool {
    leases.is_missed(own)
}

/// Has the store forgotten the lease of this boot? `before` is the subnet file that an earlier daemon of this boot left, `previous` its
/// subnets, `is_new` whether the lease that this node has now was created.
pub fn has_forgotten(is_new: bool, before: Option<&EnvFile>, config: &Config, previous: &PerFamily<Subnet>) -> bool {
    let was_leased = before.is_some_and(|file| file.ours && !file.etcd_leases.is_empty());
    is_new && was_leased && is_admitted(config, previous)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Lease, Peer};

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Two leases, of which an older list names neither.
    fn doubtful() -> LeaseSet {
        let mut leases = LeaseSet::default();
        let two = ["10.1.1.0/24", "10.1.2.0/24"].map(|text| StoreEvent::Apply(Lease { key: key(text), peer: Peer::default() }));
        let lists = [StoreEvent::Init].into_iter().chain(two);
        for event in lists.chain([StoreEvent::InitDone, StoreEvent::Init, StoreEvent::Older, StoreEvent::InitDone]) {
            leases.fold(event);
        }
        leases
    }

    #[test]
    fn doubt_is_raised_renewed_by_each_list_and_ends_after_its_time() {
        let (leases, own) = (doubtful(), key("10.1.9.0/24"));
        let mut trust = StoreTrust::new(seconds(0), false);
        assert_eq!(trust.note(seconds(10), &leases, own, &BTreeSet::new(), true), Doubt::Raised(2));
        let before = leases.doubtful().clone();
        assert_eq!(trust.note(seconds(20), &leases, own, &before, true), Doubt::Same);
        assert_eq!(trust.deadline(), Some(seconds(320)), "a list begins the time again");
        assert_eq!(trust.note(seconds(30), &leases, own, &before, false), Doubt::Same);
        assert_eq!(trust.deadline(), Some(seconds(320)), "an event does not");
        assert_eq!(trust.due(seconds(319), true, &leases, own), Due::default());
        assert!(trust.due(seconds(320), true, &leases, own).give_up);
        assert_eq!(trust.deadline(), None);
    }

    #[test]
    fn doubt_lasts_while_the_store_is_away_or_this_nodes_lease_is_in_doubt() {
        let leases = doubtful();
        for (connected, own) in [(false, key("10.1.9.0/24")), (true, key("10.1.1.0/24"))] {
            let mut trust = StoreTrust::new(seconds(0), false);
            trust.note(seconds(0), &leases, key("10.1.9.0/24"), &BTreeSet::new(), true);
            assert_eq!(trust.due(seconds(300), connected, &leases, own), Due::default());
            assert_eq!(trust.deadline(), Some(seconds(600)));
        }
    }

    #[test]
    fn doubt_is_settled_when_the_leases_are_written_again() {
        let own = key("10.1.9.0/24");
        let mut trust = StoreTrust::new(seconds(0), false);
        trust.note(seconds(0), &doubtful(), own, &BTreeSet::new(), true);
        assert_eq!(trust.note(seconds(1), &LeaseSet::default(), own, &BTreeSet::new(), false), Doubt::Settled);
        assert_eq!(trust.note(seconds(1), &LeaseSet::default(), own, &BTreeSet::new(), false), Doubt::Same);
    }

    #[test]
    fn a_store_that_forgot_this_node_is_not_believed_for_the_same_time() {
        let (leases, own) = (LeaseSet::default(), key("10.1.9.0/24"));
        let mut trust = StoreTrust::new(seconds(5), true);
        assert!(!trust.believes_lists());
        assert_eq!(trust.due(seconds(305), false, &leases, own), Due::default());
        assert_eq!(trust.due(seconds(605), true, &leases, own), Due { give_up: false, audit: true });
        assert!(trust.believes_lists());
    }
}
