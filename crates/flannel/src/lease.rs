//! Leases, which assign subnets of the pod network to hosts, and the set of leases that store events are folded into.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::net::{PerFamily, Subnet};

/// The identity of a lease in the store: its subnets, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey(PerFamily<Subnet>);

impl LeaseKey {
    /// Makes a key. Returns `None` if there is no subnet, or if one is in the other family's place.
    pub fn new(subnets: PerFamily<Subnet>) -> Option<LeaseKey> {
        let placed = subnets.iter().all(|(family, subnet)| subnet.family() == family);
        (placed && !subnets.is_empty()).then_some(LeaseKey(subnets))
    }

    /// The leased subnets.
    pub fn subnets(&self) -> &PerFamily<Subnet> {
        &self.0
    }

    /// Whether the two leases share an address of any family.
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

/// The attributes that a host publishes with its lease: its public addresses and the data of its backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peer {
    /// `PublicIP`, `PublicIPv6`: the host's addresses on the physical network. Never the unspecified address.
    pub public: PerFamily<IpAddr>,
    /// `BackendType`; empty for backends that program nothing on their peers.
    pub backend_type: Box<str>,
    /// `BackendData`, `BackendV6Data`: compact JSON text, which only a backend of the same type reads.
    pub backend_data: PerFamily<Box<str>>,
}

impl Peer {
    /// Whether the two publish a common address, and so are one host.
    pub fn shares_address(&self, other: &Peer) -> bool {
        self.public.iter().any(|(family, ip)| other.public.get(family) == Some(ip))
    }
}

/// When a lease was created, by the order that its store gives: what is smaller is older. Of two hosts that claim one thing the older
/// lease has it, on every node and after every restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age(u64);

impl Age {
    /// Not known; younger than every known one.
    pub const UNKNOWN: Age = Age(u64::MAX);

    /// The age of a lease that was created at this revision of the store, or at this second of its clock. A lease that is written again
    /// keeps it, one that is deleted and created again does not.
    pub fn created(at: u64) -> Age {
        Age(at)
    }
}

/// A lease: its key and its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The leased subnets.
    pub key: LeaseKey,
    /// Their owner.
    pub peer: Peer,
}

/// An event of the store about leases. A (re)list is `Init`, then an `Apply` for each lease, then `InitDone`: then the leases that the
/// list did not name are gone, or, after `Older`, in doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// A list of all leases begins.
    Init,
    /// This lease exists, with these attributes.
    Apply(Lease, Age),
    /// This lease exists, but its value cannot be read: its last known attributes still hold.
    Keep(LeaseKey, Age),
    /// This lease was deleted.
    Delete(LeaseKey),
    /// This lease was deleted together with this node's own: all leases were deleted. Its host will write it again.
    Vanished(LeaseKey),
    /// The list that `Init` began is older than earlier events: the store lost data, or was restored from a backup. A lease that it
    /// does not name may be in use nevertheless; then its host will write it again.
    Older,
    /// The list that `Init` began is complete.
    InitDone,
}

/// The known leases, folded from the events of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseSet {
    leases: BTreeMap<LeaseKey, Known>,
    /// Leases that exist, but whose value could never be read.
    unreadable: BTreeMap<LeaseKey, Age>,
    /// Leases that a store which lost data does not know, until they are written again or given up.
    doubtful: BTreeSet<LeaseKey>,
    /// While a list is in progress, the keys named since `Init`, in order of arrival.
    listing: Option<Vec<LeaseKey>>,
    /// Whether that list is older than earlier events.
    is_older: bool,
    complete: bool,
}

/// What is known of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    peer: Peer,
    age: Age,
}

impl LeaseSet {
    /// Folds in one event and returns the keys of the leases that it added, changed or removed. While a list is in progress, leases
    /// are only added and changed; leases that the list does not name are removed when it is complete.
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
            StoreEvent::Apply(Lease { key, peer }, age) => {
                if let Some(named) = &mut self.listing {
                    named.push(key);
                }
                self.unreadable.remove(&key);
                self.doubtful.remove(&key);
                // An entry of an older list does not settle a doubt about newer leases; neither does a lease that gets no route.
                let is_old = self.is_older || peer.public.is_empty();
                let is_known = self.doubtful.is_empty() || is_old || self.leases.contains_key(&key);
                let mut touched = if is_known { Vec::new() } else { self.replaced_by(&key, &peer) };
                let now = Known { peer, age };
                match self.leases.entry(key) {
                    Entry::Occupied(known) if *known.get() == now => return touched,
                    Entry::Occupied(mut known) => drop(known.insert(now)),
                    Entry::Vacant(place) => drop(place.insert(now)),
                }
                touched.push(key);
                touched
            }
            StoreEvent::Keep(key, age) => {
                if let Some(named) = &mut self.listing {
                    named.push(key);
                }
                self.doubtful.remove(&key);
                match self.leases.get_mut(&key) {
                    Some(known) if known.age == age => Vec::new(),
                    Some(known) => {
                        known.age = age;
                        vec![key]
                    }
                    None => {
                        self.unreadable.insert(key, age);
                        Vec::new()
                    }
                }
            }
            StoreEvent::Delete(key) => {
                if let Some(named) = &mut self.listing {
                    named.retain(|named| *named != key);
                }
                self.remove(&key).then_some(key).into_iter().collect()
            }
            StoreEvent::Vanished(key) => {
                if self.leases.contains_key(&key) || self.unreadable.contains_key(&key) {
                    self.doubtful.insert(key);
                }
                Vec::new()
            }
            StoreEvent::InitDone => {
                self.complete = true;
                let Some(mut named) = self.listing.take() else { return Vec::new() };
                named.sort_unstable();
                // All keys are in order, so one pass compares them.
                let missed = |known: &mut dyn Iterator<Item = &LeaseKey>| {
                    let mut named = named.iter().peekable();
                    let mut is_missed = |key: &LeaseKey| {
                        while named.next_if(|named| *named < key).is_some() {}
                        named.peek() != Some(&key)
                    };
                    known.filter(|key| is_missed(key)).copied().collect::<Vec<_>>()
                };
                let mut gone = missed(&mut self.leases.keys());
                gone.extend(missed(&mut self.unreadable.keys()));
                if std::mem::take(&mut self.is_older) {
                    self.doubtful.extend(gone);
                    return Vec::new();
                }
                // A relist of the same store as the one that raised the doubt does not settle it.
                gone.retain(|key| !self.doubtful.contains(key));
                self.remove_all(&gone);
                gone
            }
        }
    }

    /// Removes a lease, and returns whether it was known.
    fn remove(&mut self, key: &LeaseKey) -> bool {
        self.doubtful.remove(key);
        self.leases.remove(key).is_some() | self.unreadable.remove(key).is_some()
    }

    fn remove_all(&mut self, keys: &[LeaseKey]) {
        for key in keys {
            self.remove(key);
        }
    }

    /// Removes the doubtful leases that this new one replaces: it belongs to the same host, or overlaps their subnet.
    fn replaced_by(&mut self, key: &LeaseKey, peer: &Peer) -> Vec<LeaseKey> {
        let same_host = |other: &LeaseKey| self.leases.get(other).is_some_and(|other| peer.shares_address(&other.peer));
        let gone: Vec<LeaseKey> = self.doubtful.iter().filter(|other| other.overlaps(key) || same_host(other)).copied().collect();
        self.remove_all(&gone);
        gone
    }

    /// Leases that a store which lost data does not know, and that were not written again.
    pub fn doubtful(&self) -> &BTreeSet<LeaseKey> {
        &self.doubtful
    }

    /// Removes the leases that are still in doubt, and returns them.
    pub(crate) fn give_up(&mut self) -> Vec<LeaseKey> {
        let gone: Vec<LeaseKey> = self.doubtful.iter().copied().collect();
        self.remove_all(&gone);
        gone
    }

    /// Whether this lease is known and the list in progress does not name it.
    pub(crate) fn is_missed(&self, key: &LeaseKey) -> bool {
        self.leases.contains_key(key) && self.listing.as_ref().is_some_and(|named| !named.contains(key))
    }

    /// Packs the map: a map that was filled in order is half empty.
    pub(crate) fn pack(&mut self) {
        self.leases = std::mem::take(&mut self.leases).into_iter().collect();
    }

    /// Whether the store has ever completed a list. Until then nothing may be pruned: an empty cluster and a store that has not
    /// answered look alike.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The owner of a lease.
    pub fn get(&self, key: &LeaseKey) -> Option<&Peer> {
        self.leases.get(key).map(|known| &known.peer)
    }

    /// The owner of a lease, and its age.
    pub fn get_with_age(&self, key: &LeaseKey) -> Option<(&Peer, Age)> {
        self.leases.get(key).map(|known| (&known.peer, known.age))
    }

    /// All leases, ordered by subnet.
    pub fn iter(&self) -> impl Iterator<Item = (&LeaseKey, &Peer)> {
        self.leases.iter().map(|(key, known)| (key, &known.peer))
    }

    /// Leases that exist, but whose value could never be read, with their ages.
    pub fn unreadable(&self) -> impl Iterator<Item = (&LeaseKey, Age)> {
        self.unreadable.iter().map(|(key, age)| (key, *age))
    }

    /// The number of known leases.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether no lease is known.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }
}

impl FromIterator<(Lease, Age)> for LeaseSet {
    /// Makes a set with these leases, not marked as complete.
    fn from_iter<I: IntoIterator<Item = (Lease, Age)>>(leases: I) -> LeaseSet {
        let known = |(Lease { key, peer }, age)| (key, Known { peer, age });
        LeaseSet { leases: leases.into_iter().map(known).collect(), ..LeaseSet::default() }
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
        StoreEvent::Apply(Lease { key: key(text), peer: Peer { public, ..Peer::default() } }, Age::UNKNOWN)
    }

    #[test]
    fn relist_removes_unnamed_leases_at_its_end() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, apply("10.1.1.0/24", "192.0.2.1"), apply("10.1.2.0/24", "192.0.2.2")] {
            set.fold(event);
        }
        assert!(!set.is_complete());
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert!(set.is_complete());

        assert!(set.fold(StoreEvent::Init).is_empty());
        assert!(set.fold(apply("10.1.2.0/24", "192.0.2.2")).is_empty(), "an unchanged lease is not reported");
        assert_eq!(set.len(), 2, "nothing is removed before the list is complete");
        assert_eq!(set.fold(StoreEvent::InitDone), [key("10.1.1.0/24")]);
    }

    #[test]
    fn lease_that_is_created_again_is_a_change() {
        let lease = Lease { key: key("10.1.1.0/24"), peer: Peer::default() };
        let mut set = LeaseSet::default();
        assert_eq!(set.fold(StoreEvent::Apply(lease.clone(), Age::created(5))), [lease.key]);
        assert_eq!(set.fold(StoreEvent::Apply(lease.clone(), Age::created(5))), []);
        assert_eq!(set.fold(StoreEvent::Apply(lease.clone(), Age::created(9))), [lease.key]);
        assert_eq!(set.fold(StoreEvent::Keep(lease.key, Age::created(9))), []);
        assert_eq!(set.fold(StoreEvent::Keep(lease.key, Age::created(11))), [lease.key]);
        let age = |key: &LeaseKey| set.get_with_age(key).map(|(_, age)| age);
        assert_eq!((age(&lease.key), age(&key("10.1.2.0/24"))), (Some(Age::created(11)), None));
        assert!(Age::created(11) < Age::UNKNOWN);
    }

    #[test]
    fn lease_that_became_unreadable_keeps_its_attributes() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, apply("10.1.1.0/24", "192.0.2.1"), StoreEvent::InitDone, StoreEvent::Init] {
            set.fold(event);
        }
        set.fold(StoreEvent::Keep(key("10.1.1.0/24"), Age::UNKNOWN));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn unreadable_lease_is_kept_until_deleted() {
        let mut set = LeaseSet::default();
        for event in [
            StoreEvent::Init,
            StoreEvent::Keep(key("10.1.1.0/24"), Age::UNKNOWN),
            StoreEvent::Keep(key("10.1.2.0/24"), Age::UNKNOWN),
            StoreEvent::InitDone,
        ] {
            assert!(set.fold(event).is_empty());
        }
        assert_eq!(set.unreadable().map(|(key, _)| *key).collect::<Vec<_>>(), [key("10.1.1.0/24"), key("10.1.2.0/24")]);
        assert_eq!(set.fold(StoreEvent::Delete(key("10.1.1.0/24"))), [key("10.1.1.0/24")]);
        set.fold(StoreEvent::Init);
        assert_eq!(set.fold(StoreEvent::InitDone), [key("10.1.2.0/24")]);
        assert_eq!(set.unreadable().count(), 0);
    }

    /// After a list of three leases, an older list that names none of them.
    fn set_after_data_loss() -> LeaseSet {
        let mut set = LeaseSet::default();
        let three = [apply("10.1.1.0/24", "192.0.2.1"), apply("10.1.2.0/24", "192.0.2.2"), apply("10.1.3.0/24", "192.0.2.3")];
        let lists = [StoreEvent::Init].into_iter().chain(three).chain([StoreEvent::InitDone, StoreEvent::Init, StoreEvent::Older]);
        lists.for_each(|event| drop(set.fold(event)));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        set
    }

    #[test]
    fn lease_missing_from_older_list_is_in_doubt_until_written_or_given_up() {
        let mut set = set_after_data_loss();
        assert_eq!((set.len(), set.doubtful().len()), (3, 3));
        assert!(set.fold(apply("10.1.1.0/24", "192.0.2.1")).is_empty(), "an unchanged rewrite is not reported");
        // The next list comes from the same store, which still does not know the other leases.
        set.fold(StoreEvent::Init);
        set.fold(apply("10.1.1.0/24", "192.0.2.1"));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.fold(StoreEvent::Delete(key("10.1.2.0/24"))), [key("10.1.2.0/24")]);
        assert_eq!(set.give_up(), [key("10.1.3.0/24")]);
        assert_eq!((set.len(), set.doubtful().len()), (1, 0));
    }

    #[test]
    fn new_lease_of_the_same_host_removes_its_doubtful_lease() {
        let mut set = set_after_data_loss();
        assert_eq!(set.fold(apply("10.1.9.0/24", "192.0.2.1")), [key("10.1.1.0/24"), key("10.1.9.0/24")]);
        assert_eq!(set.fold(apply("10.1.2.0/25", "192.0.2.9")), [key("10.1.2.0/24"), key("10.1.2.0/25")]);
        assert_eq!(set.doubtful().iter().collect::<Vec<_>>(), [&key("10.1.3.0/24")]);
    }

    #[test]
    fn older_list_does_not_settle_doubt_about_newer_leases() {
        let mut set = set_after_data_loss();
        for event in [StoreEvent::Init, StoreEvent::Older] {
            set.fold(event);
        }
        assert_eq!(set.fold(apply("10.1.9.0/24", "192.0.2.1")), [key("10.1.9.0/24")]);
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.doubtful().len(), 3);
    }

    #[test]
    fn interrupted_relist_restarts() {
        let mut set = LeaseSet::default();
        for event in [StoreEvent::Init, apply("10.1.1.0/24", "192.0.2.1"), StoreEvent::InitDone, StoreEvent::Init, StoreEvent::Init] {
            set.fold(event);
        }
        set.fold(apply("10.1.1.0/24", "192.0.2.9"));
        assert!(set.fold(StoreEvent::InitDone).is_empty());
        assert_eq!(set.get(&key("10.1.1.0/24")).unwrap().public.v4, Some("192.0.2.9".parse().unwrap()));
    }

    #[test]
    fn key_rejects_subnet_of_the_other_family() {
        assert!(LeaseKey::new(PerFamily::default()).is_none());
        assert!(LeaseKey::new(PerFamily { v4: Some("fc00::/64".parse().unwrap()), v6: None }).is_none());
    }
}
