//! The desired state of the kernel, in parts: one for this node, one for its pods and one for each lease, so that a change of a lease
//! affects only its few objects. When two parts claim one key (two peers that publish the same VTEP MAC), the older lease has it,
//! whatever the order of arrival, and the younger one is refused (see `contest`).

mod contest;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

pub use self::contest::Lost;
use self::contest::Subnets;
use crate::lease::{Age, LeaseKey};
use crate::net::{Family, PerFamily};
use crate::object::{Key, Object};
use crate::observed::put;

/// The owner of a part of the desired state. The node comes before every lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// This node: its devices, addresses and rules.
    Node,
    /// The pods of this host: their bridge.
    Pods,
    /// A peer: the route to it and the entries that the route needs.
    Lease(LeaseKey),
}

/// The set of objects that the kernel has to hold.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// The objects of each owner. `claims` refers to an owner by its index here, which is shorter than the owner and does not change.
    parts: Vec<Part>,
    /// Unused indexes of `parts`.
    free: Vec<u32>,
    places: BTreeMap<Owner, u32>,
    /// The first claim on each key: that of the oldest owner.
    claims: BTreeMap<Key, Claim>,
    /// Claims on keys that an older owner holds.
    rivals: BTreeSet<(Key, Owner)>,
    /// The subnets of leases, to find those that overlap.
    subnets: Subnets,
    /// The families of leases that are left out, because an older lease of another host holds what they claim.
    refused: BTreeMap<(Owner, Family), Lost>,
}

/// What an owner claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The owner.
    pub owner: Owner,
    /// The age of its lease.
    pub age: Age,
    /// The host to which its packets are sent, for each family. Claims of one host do not contradict each other.
    pub hosts: PerFamily<IpAddr>,
    /// Its objects.
    pub objects: Vec<Object>,
}

/// What a change of parts affects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The keys of objects that may have to change, in order.
    pub keys: Vec<Key>,
    /// The leases whose refusals are other ones now, and those among the changed ones that are refused.
    pub contested: Vec<LeaseKey>,
}

#[derive(Debug, Clone)]
struct Part {
    owner: Owner,
    age: Age,
    hosts: PerFamily<IpAddr>,
    objects: Box<[Object]>,
}

impl Part {
    /// The oldest comes first.
    fn rank(&self) -> (Age, Owner) {
        (self.age, self.owner)
    }
}

/// The position of an object: the index of its part, and its index within the part.
#[derive(Debug, Clone, Copy)]
struct Claim {
    part: u32,
    at: u32,
}

impl Desired {
    /// Replaces the part of this node or of its pods, which comes before all leases, and returns its old and new keys.
    pub fn set_part(&mut self, owner: Owner, objects: Vec<Object>) -> Vec<Key> {
        self.set_parts(vec![Claims { owner, age: Age::created(0), hosts: PerFamily::default(), objects }]).keys
    }

    /// Replaces the parts of several owners, each named once. Returns their old and new keys, and those of leases that are refused, or
    /// no longer refused, because of that.
    pub fn set_parts(&mut self, parts: Vec<Claims>) -> Changes {
        let owners: Vec<Owner> = parts.iter().map(|part| part.owner).collect();
        let mut contested = self.contested_by(&owners);
        let mut touched = self.replace(parts);
        contested.append(&mut self.contested_by(&owners));
        let contested = self.review(contested, &mut touched);
        touched.sort();
        touched.dedup();
        Changes { keys: touched, contested }
    }

    fn replace(&mut self, parts: Vec<Claims>) -> Vec<Key> {
        let count = parts.len();
        let mut touched = Vec::new();
        let mut placed = Vec::new();
        // Owners come in order, and so, usually, do the first objects of all owners, the second ones, and so on. Each of these columns
        // is nearly sorted, even if long; sorting all in one list would cost more than everything else here.
        let mut columns: Vec<Vec<(Key, Claim)>> = Vec::new();
        for Claims { owner, age, hosts, objects } in parts {
            let known = self.places.get(&owner).copied();
            known.into_iter().for_each(|place| self.clear(place, &mut touched));
            if objects.is_empty() {
                if let Some(place) = known {
                    self.free.push(place);
                    self.places.remove(&owner);
                    self.subnets.remove(owner);
                }
                continue;
            }
            columns.resize_with(columns.len().max(objects.len()), || Vec::with_capacity(count));
            let place = known.unwrap_or_else(|| {
                let place = self.new_place(owner);
                self.subnets.insert(owner);
                placed.push((owner, place));
                place
            });
            for ((column, object), at) in columns.iter_mut().zip(&objects).zip(0..) {
                column.push((object.key(), Claim { part: place, at }));
            }
            self.parts[index(place)] = Part { owner, age, hosts, objects: objects.into() };
        }
        put(&mut self.places, placed);
        columns.iter_mut().for_each(|column| column.sort_by(|(a, _), (b, _)| a.cmp(b)));
        let claims = columns.into_iter().flatten().collect::<Vec<_>>();
        touched.extend(claims.iter().map(|(key, _)| key.clone()));
        self.claim(claims);
        touched
    }

    fn new_place(&mut self, owner: Owner) -> u32 {
        let part = Part { owner, age: Age::UNKNOWN, hosts: PerFamily::default(), objects: Box::default() };
        if let Some(place) = self.free.pop() {
            self.parts[index(place)] = part;
            return place;
        }
        self.parts.push(part);
        u32::try_from(self.parts.len() - 1).expect("a cluster has fewer than 2^32 leases")
    }

    /// Removes the claims of a part. A key that other owners claim passes to the oldest of them.
    fn clear(&mut self, place: u32, touched: &mut Vec<Key>) {
        let Part { owner, objects, .. } = &mut self.parts[index(place)];
        let owner = *owner;
        let keys: Vec<Key> = std::mem::take(objects).iter().map(Object::key).collect();
        for key in &keys {
            if self.claims.get(key).is_some_and(|claim| claim.part == place) {
                self.claims.remove(key);
                if let Some(heir) = self.rivals_for(key).min_by_key(|rival| self.parts[index(self.places[rival])].rank()) {
                    self.rivals.remove(&(key.clone(), heir));
                    let claim = self.claim_of(heir, key);
                    self.claims.insert(key.clone(), claim);
                }
            } else if !self.rivals.is_empty() {
                self.rivals.remove(&(key.clone(), owner));
            }
        }
        touched.extend(keys);
    }

    fn claim(&mut self, mut claims: Vec<(Key, Claim)>) {
        let is_bulk = claims.len() > self.claims.len();
        let few = if is_bulk { std::mem::take(&mut self.claims) } else { BTreeMap::new() };
        if is_bulk {
            // Building the map at once takes half the time of single insertions, and fills its nodes twice as densely.
            claims.sort_by(|(a, _), (b, _)| a.cmp(b));
            let mut more = Vec::new();
            claims.dedup_by(|(key, claim), (kept, _)| {
                let is_same = key == kept;
                if is_same {
                    more.push((key.clone(), *claim));
                }
                is_same
            });
            self.claims = claims.into_iter().collect();
            claims = more;
            claims.extend(few);
        }
        for (key, claim) in claims {
            let part = |claim: &Claim| &self.parts[index(claim.part)];
            match self.claims.get_mut(&key) {
                None => drop(self.claims.insert(key, claim)),
                // The last of two objects with one key counts.
                Some(has) if has.part == claim.part => has.at = has.at.max(claim.at),
                Some(has) if part(&claim).rank() < part(has).rank() => {
                    let loser = part(has).owner;
                    *has = claim;
                    self.rivals.insert((key, loser));
                }
                Some(_) => drop(self.rivals.insert((key, part(&claim).owner))),
            }
        }
    }

    /// The owners that claim a key besides the one that holds it.
    fn rivals_for(&self, key: &Key) -> impl Iterator<Item = Owner> {
        self.rivals.range((key.clone(), Owner::Node)..).take_while(move |(claimed, _)| claimed == key).map(|(_, owner)| *owner)
    }

    /// The claim of an owner on a key that it claims.
    fn claim_of(&self, owner: Owner, key: &Key) -> Claim {
        let part = self.places[&owner];
        // Of two objects with one key in one part, the last counts.
        let at = self.parts[index(part)].objects.iter().rposition(|object| object.key() == *key);
        let at = at.and_then(|at| u32::try_from(at).ok()).expect("an owner that claims a key has an object with this key");
        Claim { part, at }
    }

    /// Packs the maps: maps that were filled one entry at a time are half empty.
    pub(crate) fn pack(&mut self) {
        self.claims = std::mem::take(&mut self.claims).into_iter().collect();
        self.places = std::mem::take(&mut self.places).into_iter().collect();
        self.parts.shrink_to_fit();
    }

    fn object(&self, claim: Claim) -> &Object {
        &self.parts[index(claim.part)].objects[index(claim.at)]
    }

    /// The desired object with this key.
    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.claims.get(key).and_then(|claim| self.in_force(key, *claim))
    }

    /// All desired objects, in apply order.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.claims.iter().filter_map(|(key, claim)| Some((key, self.in_force(key, *claim)?)))
    }

    /// The number of desired objects.
    pub fn len(&self) -> usize {
        if self.refused.is_empty() { self.claims.len() } else { self.iter().count() }
    }

    /// Whether no object is desired.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The objects that one owner claims.
    pub fn part(&self, owner: &Owner) -> &[Object] {
        self.places.get(owner).map_or(&[], |place| &self.parts[index(*place)].objects)
    }

    /// The families of a lease that are left out, and why.
    pub fn refused(&self, lease: LeaseKey) -> impl Iterator<Item = (Family, &Lost)> {
        let owner = Owner::Lease(lease);
        Family::ALL.into_iter().filter_map(move |family| Some((family, self.refused.get(&(owner, family))?)))
    }
}

impl PartialEq for Desired {
    /// Equal if each owner claims the same objects, whatever the order of arrival.
    fn eq(&self, other: &Desired) -> bool {
        self.places.len() == other.places.len() && self.places.keys().all(|owner| self.part(owner) == other.part(owner))
    }
}

impl Eq for Desired {}

fn index(place: u32) -> usize {
    usize::try_from(place).expect("usize has at least 32 bits")
}
