//! Leases: who owns which slice of the pod network, and the set of them that the store's events fold into.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::net::{PerFamily, Subnet};

/// The identity of a lease in the store: its subnets. Not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey(PerFamily<Subnet>);

impl LeaseKey {
    /// `None` when there is no subnet, or one in the other family's place.
    pub fn new(subnets: PerFamily<Subnet>) -> Option<LeaseKey> {
        let placed = subnets.iter().all(|(family, subnet)| subnet.family() == family);
        (placed && !subnets.is_empty()).then_some(LeaseKey(subnets))
    }

    /// The leased subnets.
    pub fn subnets(&self) -> &PerFamily<Subnet> {
        &self.0
    }

    /// Do the two leases share an address of any family?
    pub fn overlaps(&self, other: &LeaseKey) -> bool {
        self.0.iter().any(|(family, subnet)| other.0.get(family).is_some_and(|theirs| theirs.overlaps(*subnet)))
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (_, subnet) in self.0.iter() {
            write!(f, "{separator}{subnet}")?;
            separator = ",";
        }
        Ok(())
    }
}

/// What a host publishes with its lease: where it is reached, and what its backend needs known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peer {
    /// `PublicIP`, `PublicIPv6`: the host's addresses on the physical network. Never the unspecified address.
    pub public: PerFamily<IpAddr>,
    /// `BackendType`; empty for backends that program nothing on their peers.
    pub backend_type: Box<str>,
    /// `BackendData`, `BackendV6Data`: compact JSON text, meant for the backend of that type alone.
    pub backend_data: PerFamily<Box<str>>,
}

/// A lease: its key and its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The leased subnets.
    pub key: LeaseKey,
    /// Whose they are.
    pub peer: Peer,
}

/// What a store tells about leases. A (re)list is `Init`, then an `Apply` for each lease there is, then `InitDone`:
/// only then is a lease that was not mentioned known to be gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// A list of all leases begins.
    Init,
    /// This lease is there, with these attributes.
    Apply(Lease),
    /// This lease is there, but what it says cannot be read: what was known of it still holds.
    Keep(LeaseKey),
    /// This lease is gone.
    Delete(LeaseKey),
    /// The list that `Init` began is complete.
    InitDone,
}

/// The leases that are there, as far as the store has told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseSet {
    leases: BTreeMap<LeaseKey, Peer>,
    /// Leases that are there, of which nothing readable was ever told.
    unreadable: BTreeSet<LeaseKey>,
    /// Keys named since `Init`, while a list is under way, in the order of their coming.
    listing: Option<Vec<LeaseKey>>,
    complete: bool,
}

impl LeaseSet {
    /// Folds one event in and returns the keys whose lease was added, changed or removed by it. While a list is
    /// under way leases are only added and changed; what the list did not name goes when it is complete.
    pub fn fold(&mut self, event: StoreEvent) -> Vec<LeaseKey> {
        match event {
            StoreEvent::Init => {
                self.listing = Some(Vec::new());
                Vec::new()
            }
            StoreEvent::Apply(Lease { key, peer }) => {
                if let Some(named) = &mut self.listing {
                    named.push(key);
                }
                self.unreadable.remove(&key);
                match self.leases.entry(key) {
                    Entry::Occupied(known) if *known.get() == peer => return Vec::new(),
                    Entry::Occupied(mut known) => drop(known.insert(peer)),
                    Entry::Vacant(place) => drop(place.insert(peer)),
                }
                vec![key]
            }
            StoreEvent::Keep(key) => {
                if let Some(named) = &mut self.listing {
                    named.push(key);
                }
                if !self.leases.contains_key(&key) {
                    self.unreadable.insert(key);
                }
                Vec::new()
            }
            StoreEvent::Delete(key) => {
                if let Some(named) = &mut self.listing {
                    named.retain(|named| *named != key);
                }
                let was_there = self.leases.remove(&key).is_some() | self.unreadable.remove(&key);
                was_there.then_some(key).into_iter().collect()
            }
            StoreEvent::InitDone => {
                self.complete = true;
                let Some(mut named) = self.listing.take() else { return Vec::new() };
                named.sort_unstable();
                let known = self.leases.keys().chain(&self.unreadable);
                let gone: Vec<LeaseKey> = known.filter(|key| named.binary_search(key).is_err()).copied().collect();
                for key in &gone {
                    self.leases.remove(key);
                    self.unreadable.remove(key);
                }
                gone
            }
        }
    }

    /// Packs the map: one that was filled in order is half empty.
    pub(crate) fn pack(&mut self) {
        self.leases = std::mem::take(&mut self.leases).into_iter().collect();
    }

    /// Has the store ever said that a list was complete? Until then nothing may be pruned: an empty cluster and a
    /// silent store look alike.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The owner of a lease.
    pub fn get(&self, key: &LeaseKey) -> Option<&Peer> {
        self.leases.get(key)
    }

    /// All leases, ordered by subnet.
    pub fn iter(&self) -> impl Iterator<Item = (&LeaseKey, &Peer)> {
        self.leases.iter()
    }

    /// Leases that are there, of which nothing readable was ever told.
    pub fn unreadable(&self) -> impl Iterator<Item = &LeaseKey> {
        self.unreadable.iter()
    }

    /// How many leases there are.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn apply(text: &str, ip: &str) -> StoreEvent {
        let public = PerFamily { v4: Some(ip.parse().unwrap()), v6: None };
        StoreEvent::Apply(Lease { key: key(text), peer: Peer { public, ..Peer::default() } })
    }

    #[test]
    fn a_relist_removes_only_what_it_did_not_name_and_only_at_its_end() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, apply("10.1.1.0/24", "192.0.2.1"), apply("10.1.2.0/24", "192.0.2.2")] {
            set.fold(event);
        }
        assert!(!set.is_complete());
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert!(set.is_complete());

        assert!(set.fold(StoreEvent::Init).is_empty());
        assert!(set.fold(apply("10.1.2.0/24", "192.0.2.2")).is_empty(), "an unchanged lease is no change");
        assert_eq!(set.len(), 2, "nothing goes before the list is complete");
        assert_eq!(set.fold(StoreEvent::InitDone), [key("10.1.1.0/24")]);
    }

    #[test]
    fn a_lease_that_became_unreadable_keeps_what_was_known() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, apply("10.1.1.0/24", "192.0.2.1"), StoreEvent::InitDone, StoreEvent::Init] {
            set.fold(event);
        }
        set.fold(StoreEvent::Keep(key("10.1.1.0/24")));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn a_lease_that_never_was_readable_is_there_until_it_is_gone() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, StoreEvent::Keep(key("10.1.1.0/24")), StoreEvent::Keep(key("10.1.2.0/24")), StoreEvent::InitDone] {
            assert!(set.fold(event).is_empty());
        }
        assert_eq!(set.unreadable().copied().collect::<Vec<_>>(), [key("10.1.1.0/24"), key("10.1.2.0/24")]);
        assert_eq!(set.fold(StoreEvent::Delete(key("10.1.1.0/24"))), [key("10.1.1.0/24")]);
        set.fold(StoreEvent::Init);
        assert_eq!(set.fold(StoreEvent::InitDone), [key("10.1.2.0/24")]);
        assert_eq!(set.unreadable().count(), 0);
    }

    #[test]
    fn an_interrupted_relist_is_begun_anew() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, apply("10.1.1.0/24", "192.0.2.1"), StoreEvent::InitDone, StoreEvent::Init, StoreEvent::Init] {
            set.fold(event);
        }
        set.fold(apply("10.1.1.0/24", "192.0.2.9"));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.get(&key("10.1.1.0/24")).unwrap().public.v4, Some("192.0.2.9".parse().unwrap()));
    }

    #[test]
    fn a_key_has_each_subnet_in_its_familys_place() {
        assert!(LeaseKey::new(PerFamily::default()).is_none());
        assert!(LeaseKey::new(PerFamily { v4: Some("fc00::/64".parse().unwrap()), v6: None }).is_none());
    }
}
