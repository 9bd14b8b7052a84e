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

impl Peer {
    /// Do the two publish an address in common? Then they are one host.
    pub fn shares_address(&self, other: &Peer) -> bool {
        self.public.iter().any(|(family, ip)| other.public.get(family) == Some(ip))
    }
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
/// only then is a lease that was not mentioned known to be gone; or, after `Older`, in doubt.
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
    /// This lease is gone, and this node's own went with it: somebody deleted them all. Its host will write it again.
    Vanished(LeaseKey),
    /// The list that `Init` began is older than what was told before: the store lost data, or was restored from a backup. What it
    /// does not name may be there all the same, and its host will write it again.
    Older,
    /// The list that `Init` began is complete.
    InitDone,
}

/// The leases that are there, as far as the store has told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseSet {
    leases: BTreeMap<LeaseKey, Peer>,
    /// Leases that are there, of which nothing readable was ever told.
    unreadable: BTreeSet<LeaseKey>,
    /// Leases of which a store that lost data knows nothing; until they are told of again, or given up.
    doubtful: BTreeSet<LeaseKey>,
    /// Keys named since `Init`, while a list is under way, in the order of their coming.
    listing: Option<Vec<LeaseKey>>,
    /// Is that list older than what was told before?
    is_older: bool,
    complete: bool,
}

impl LeaseSet {
    /// Folds one event in and returns the keys whose lease was added, changed or removed by it. While a list is
    /// under way leases are only added and changed; what the list did not name goes when it is complete.
    pub fn fold(&mut self, event: StoreEvent) -> Vec<LeaseKey> {
        match event {
            StoreEvent::Init => {
                self.listing = Some(Vec::new());
                self.is_older = false;
                Vec::new()
            }
            StoreEvent::Older => {
                self.is_older = true;
                Vec::new()
            }
            StoreEvent::Apply(Lease { key, peer }) => {
                if let Some(named) = &mut self.listing {
                    named.push(key);
                }
                self.unreadable.remove(&key);
                self.doubtful.remove(&key);
                // What an older list says ends no doubt about what was told since; neither does who can have no route.
                let is_old = self.is_older || peer.public.is_empty();
                let is_known = self.doubtful.is_empty() || is_old || self.leases.contains_key(&key);
                let mut touched = if is_known { Vec::new() } else { self.replaced_by(&key, &peer) };
                match self.leases.entry(key) {
                    Entry::Occupied(known) if *known.get() == peer => return touched,
                    Entry::Occupied(mut known) => drop(known.insert(peer)),
                    Entry::Vacant(place) => drop(place.insert(peer)),
                }
                touched.push(key);
                touched
            }
            StoreEvent::Keep(key) => {
                if let Some(named) = &mut self.listing {
                    named.push(key);
                }
                self.doubtful.remove(&key);
                if !self.leases.contains_key(&key) {
                    self.unreadable.insert(key);
                }
                Vec::new()
            }
            StoreEvent::Delete(key) => {
                if let Some(named) = &mut self.listing {
                    named.retain(|named| *named != key);
                }
                self.remove(&key).then_some(key).into_iter().collect()
            }
            StoreEvent::Vanished(key) => {
                if self.leases.contains_key(&key) || self.unreadable.contains(&key) {
                    self.doubtful.insert(key);
                }
                Vec::new()
            }
            StoreEvent::InitDone => {
                self.complete = true;
                let Some(mut named) = self.listing.take() else { return Vec::new() };
                named.sort_unstable();
                // All are in order, so one walk compares them.
                let missed = |known: &mut dyn Iterator<Item = &LeaseKey>| {
                    let mut named = named.iter().peekable();
                    let mut is_missed = |key: &LeaseKey| {
                        while named.next_if(|named| *named < key).is_some() {}
                        named.peek() != Some(&key)
                    };
                    known.filter(|key| is_missed(key)).copied().collect::<Vec<_>>()
                };
                let mut gone = missed(&mut self.leases.keys());
                gone.extend(missed(&mut self.unreadable.iter()));
                if std::mem::take(&mut self.is_older) {
                    self.doubtful.extend(gone);
                    return Vec::new();
                }
                // A list that is no older than the one that raised the doubt does not settle it.
                gone.retain(|key| !self.doubtful.contains(key));
                self.remove_all(&gone);
                gone
            }
        }
    }

    /// Removes a lease, and returns whether it was there.
    fn remove(&mut self, key: &LeaseKey) -> bool {
        self.doubtful.remove(key);
        self.leases.remove(key).is_some() | self.unreadable.remove(key)
    }

    fn remove_all(&mut self, keys: &[LeaseKey]) {
        for key in keys {
            self.remove(key);
        }
    }

    /// Removes the doubtful leases that this new one shows to be gone: their host has it instead, or it has their subnet.
    fn replaced_by(&mut self, key: &LeaseKey, peer: &Peer) -> Vec<LeaseKey> {
        let same_host = |other: &LeaseKey| self.leases.get(other).is_some_and(|other| peer.shares_address(other));
        let gone: Vec<LeaseKey> = self.doubtful.iter().filter(|other| other.overlaps(key) || same_host(other)).copied().collect();
        self.remove_all(&gone);
        gone
    }

    /// Leases of which a store that lost data knows nothing, and that were not told of again.
    pub fn doubtful(&self) -> &BTreeSet<LeaseKey> {
        &self.doubtful
    }

    /// Removes the leases that are still in doubt, and returns them.
    pub(crate) fn give_up(&mut self) -> Vec<LeaseKey> {
        let gone: Vec<LeaseKey> = self.doubtful.iter().copied().collect();
        self.remove_all(&gone);
        gone
    }

    /// Does the list that is under way not name a lease that is there?
    pub(crate) fn is_missed(&self, key: &LeaseKey) -> bool {
        self.leases.contains_key(key) && self.listing.as_ref().is_some_and(|named| !named.contains(key))
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

impl FromIterator<Lease> for LeaseSet {
    /// A set as a list would make it, but for its completeness.
    fn from_iter<I: IntoIterator<Item = Lease>>(leases: I) -> LeaseSet {
        LeaseSet { leases: leases.into_iter().map(|lease| (lease.key, lease.peer)).collect(), ..LeaseSet::default() }
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

    /// After a list of three leases, an older list that names none of them.
    fn robbed() -> LeaseSet {
        let mut set = LeaseSet::default();
        let three = [apply("10.1.1.0/24", "192.0.2.1"), apply("10.1.2.0/24", "192.0.2.2"), apply("10.1.3.0/24", "192.0.2.3")];
        let lists = [StoreEvent::Init].into_iter().chain(three).chain([StoreEvent::InitDone, StoreEvent::Init, StoreEvent::Older]);
        lists.for_each(|event| drop(set.fold(event)));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        set
    }

    #[test]
    fn what_an_older_list_does_not_name_is_in_doubt_until_it_is_told_of_or_given_up() {
        let mut set = robbed();
        assert_eq!((set.len(), set.doubtful().len()), (3, 3));
        assert!(set.fold(apply("10.1.1.0/24", "192.0.2.1")).is_empty(), "written again as it was, it is no change");
        // The next list is of the same store, and knows no more of the others.
        set.fold(StoreEvent::Init);
        set.fold(apply("10.1.1.0/24", "192.0.2.1"));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.fold(StoreEvent::Delete(key("10.1.2.0/24"))), [key("10.1.2.0/24")]);
        assert_eq!(set.give_up(), [key("10.1.3.0/24")]);
        assert_eq!((set.len(), set.doubtful().len()), (1, 0));
    }

    #[test]
    fn a_host_that_has_another_lease_by_now_ends_the_doubt_about_its_old_one() {
        let mut set = robbed();
        assert_eq!(set.fold(apply("10.1.9.0/24", "192.0.2.1")), [key("10.1.1.0/24"), key("10.1.9.0/24")]);
        assert_eq!(set.fold(apply("10.1.2.0/25", "192.0.2.9")), [key("10.1.2.0/24"), key("10.1.2.0/25")]);
        assert_eq!(set.doubtful().iter().collect::<Vec<_>>(), [&key("10.1.3.0/24")]);
    }

    #[test]
    fn what_an_older_list_says_ends_no_doubt_about_newer_leases() {
        let mut set = robbed();
        for event in [StoreEvent::Init, StoreEvent::Older] {
            set.fold(event);
        }
        assert_eq!(set.fold(apply("10.1.9.0/24", "192.0.2.1")), [key("10.1.9.0/24")]);
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.doubtful().len(), 3);
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
