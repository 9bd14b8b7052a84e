//! Two hosts that claim one thing: a subnet, or a key such as a VTEP MAC or a WireGuard key. The older lease keeps it. The younger one is
//! refused, with all objects of that family: a route without its FDB entry would send packets to the other host.
//!
//! The decision follows from the leases alone, so it is the same on every node and after every restart. A lease that is refused still
//! counts as the one that claimed before those that are younger. Claims of leases with one public address do not contradict each other:
//! they are leases of one host, such as a former one that has not expired, and its packets arrive all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::{Claim, Desired, Owner, Part, index};
use crate::lease::LeaseKey;
use crate::net::{Family, PerFamily, Subnet};
use crate::object::{Key, Object};

/// Why a family of a lease is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The owner of what it claims.
    pub holder: Owner,
    /// The key that both claim; `None` if their subnets overlap.
    pub key: Option<Key>,
}

/// The subnets of leases with objects, as far as their order in `places` does not have them already.
#[derive(Debug, Clone, Default)]
pub(super) struct Subnets {
    /// The prefix lengths that occur, with their numbers.
    lengths: PerFamily<BTreeMap<u8, usize>>,
    /// The IPv6 subnets of leases that have an IPv4 one as well: leases are ordered by the latter.
    second: BTreeSet<(Subnet, LeaseKey)>,
}

impl Subnets {
    pub(super) fn insert(&mut self, owner: Owner) {
        let Owner::Lease(lease) = owner else { return };
        for (family, subnet) in lease.subnets().iter() {
            *self.lengths_of(family).entry(subnet.prefix_len()).or_default() += 1;
        }
        if let PerFamily { v4: Some(_), v6: Some(second) } = lease.subnets() {
            self.second.insert((*second, lease));
        }
    }

    pub(super) fn remove(&mut self, owner: Owner) {
        let Owner::Lease(lease) = owner else { return };
        for (family, subnet) in lease.subnets().iter() {
            let lengths = self.lengths_of(family);
            let left = lengths.get(&subnet.prefix_len()).map_or(0, |count| count - 1);
            if left == 0 {
                lengths.remove(&subnet.prefix_len());
            } else {
                lengths.insert(subnet.prefix_len(), left);
            }
        }
        if let Some(second) = lease.subnets().v6 {
            self.second.remove(&(second, lease));
        }
    }

    fn lengths_of(&mut self, family: Family) -> &mut BTreeMap<u8, usize> {
        match family {
            Family::V4 => self.lengths.v4.get_or_insert_default(),
            Family::V6 => self.lengths.v6.get_or_insert_default(),
        }
    }

    /// Whether subnets of this family can overlap at all. Leases of one family with subnets of one size differ in these.
    fn can_overlap(&self, family: Family) -> bool {
        !self.second.is_empty() || self.lengths.get(family).is_some_and(|lengths| lengths.len() > 1)
    }
}

impl Desired {
    /// The claim that counts on a key: that of the oldest owner that is not refused.
    pub(super) fn in_force(&self, key: &Key, claim: Claim) -> Option<&Object> {
        let object = self.object(claim);
        if !self.is_refused(&self.parts[index(claim.part)], object) {
            return Some(object);
        }
        let rivals = self.rivals_for(key).map(|rival| self.claim_of(rival, key));
        let others = rivals.filter(|claim| !self.is_refused(&self.parts[index(claim.part)], self.object(*claim)));
        others.min_by_key(|claim| self.parts[index(claim.part)].rank()).map(|claim| self.object(claim))
    }

    /// Whether an object is left out. One that serves both families is, if one of them is refused; a WireGuard peer, if all families that it
    /// serves are.
    fn is_refused(&self, part: &Part, object: &Object) -> bool {
        let is_refused = |family| self.refused.contains_key(&(part.owner, family));
        if self.refused.is_empty() {
            return false;
        }
        match object {
            Object::WgPeer(_) => {
                let mut served = Family::ALL.into_iter().filter(|family| serves(&part.objects, object, *family)).peekable();
                served.peek().is_some() && served.all(is_refused)
            }
            _ => family(object).map_or_else(|| Family::ALL.into_iter().any(is_refused), is_refused),
        }
    }

    /// The owners that claim what one of these claims, and these if there are any.
    pub(super) fn contested_by(&self, owners: &[Owner]) -> BTreeSet<Owner> {
        let mut contested = BTreeSet::new();
        let overlap = Family::ALL.into_iter().any(|family| self.subnets.can_overlap(family));
        if self.rivals.is_empty() && !overlap {
            return contested;
        }
        for owner in owners {
            let mut rivals: BTreeSet<Owner> = self.overlapping(*owner).map(|(_, rival)| rival).collect();
            for key in self.part(owner).iter().map(Object::key) {
                let before = rivals.len();
                rivals.extend(self.rivals_for(&key));
                if rivals.len() > before {
                    rivals.extend(self.claims.get(&key).map(|claim| self.parts[index(claim.part)].owner));
                }
            }
            if !rivals.is_empty() {
                contested.append(&mut rivals);
                contested.insert(*owner);
            }
        }
        contested
    }

    /// Decides about these owners. Returns the leases whose refusals changed or that are refused, and adds the keys of the former.
    pub(super) fn review(&mut self, owners: BTreeSet<Owner>, touched: &mut Vec<Key>) -> Vec<LeaseKey> {
        let mut reviewed = Vec::new();
        for owner in owners {
            let Owner::Lease(lease) = owner else { continue };
            let mut is_news = false;
            for family in Family::ALL {
                let place = self.places.get(&owner).copied();
                let lost = place.and_then(|place| self.lost(&self.parts[index(place)], place, family));
                let before = match lost.clone() {
                    Some(lost) => self.refused.insert((owner, family), lost),
                    None => self.refused.remove(&(owner, family)),
                };
                if before.is_some() != lost.is_some() {
                    touched.extend(self.part(&owner).iter().map(Object::key));
                }
                is_news |= before.is_some() || lost.is_some();
            }
            if is_news {
                reviewed.push(lease);
            }
        }
        reviewed
    }

    /// What a part may not have in one family, and who has it.
    fn lost(&self, part: &Part, place: u32, of: Family) -> Option<Lost> {
        let is_other_host = |other: &Part| {
            let (own, other) = (part.hosts.get(of), other.hosts.get(of));
            own.is_none() || own != other
        };
        let is_older = |owner: &Owner| {
            let other = &self.parts[index(self.places[owner])];
            other.rank() < part.rank() && is_other_host(other)
        };
        let overlapping = self.overlapping(part.owner).filter(|(family, _)| *family == of).map(|(_, owner)| owner).find(is_older);
        if let Some(holder) = overlapping {
            return Some(Lost { holder, key: None });
        }
        let mut keys = part.objects.iter().filter(|object| serves(&part.objects, object, of)).map(Object::key);
        keys.find_map(|key| {
            let claim = self.claims.get(&key).filter(|claim| claim.part != place)?;
            let holder = &self.parts[index(claim.part)];
            is_other_host(holder).then_some(Lost { holder: holder.owner, key: Some(key) })
        })
    }

    /// The other leases with objects whose subnets overlap those of this owner, by family, then in order.
    fn overlapping(&self, owner: Owner) -> impl Iterator<Item = (Family, Owner)> {
        let subnets = match owner {
            Owner::Lease(lease) => *lease.subnets(),
            Owner::Node | Owner::Pods => PerFamily::default(),
        };
        let families = Family::ALL.into_iter().filter(|family| self.subnets.can_overlap(*family));
        families.flat_map(move |family| {
            let subnet = subnets.get(family).copied();
            let shorter = move |subnet: Subnet| {
                let lengths = self.subnets.lengths.get(family).into_iter().flat_map(|lengths| lengths.keys());
                let lengths = lengths.copied().take_while(move |length| *length < subnet.prefix_len());
                lengths.filter_map(move |length| Subnet::new(subnet.network(), length).ok())
            };
            let around = subnet.into_iter().flat_map(shorter);
            let around = around.flat_map(move |around| self.leases_from(around).take_while(move |(subnet, _)| *subnet == around));
            let inside = subnet.into_iter();
            let inside = inside.flat_map(move |outer| self.leases_from(outer).take_while(move |(subnet, _)| outer.covers(*subnet)));
            around.chain(inside).map(move |(_, lease)| (family, Owner::Lease(lease))).filter(move |(_, other)| *other != owner)
        })
    }

    /// The leases from this subnet on, in the order of their subnets of its family.
    fn leases_from(&self, from: Subnet) -> impl Iterator<Item = (Subnet, LeaseKey)> {
        let family = from.family();
        let mut first = PerFamily::default();
        first.set(family, Some(from));
        // Of all leases with this subnet, the one without a subnet of the other family comes first.
        let first = LeaseKey::new(first);
        let of = move |owner: &Owner| match owner {
            Owner::Lease(lease) if family == Family::V4 || lease.subnets().v4.is_none() => Some((*lease.subnets().get(family)?, *lease)),
            _ => None,
        };
        let primary = first.into_iter().flat_map(|first| self.places.range(Owner::Lease(first)..)).map_while(move |(owner, _)| of(owner));
        let second = first.filter(|_| family == Family::V6).into_iter().flat_map(move |first| self.subnets.second.range((from, first)..));
        Merged { one: primary.peekable(), other: second.copied().peekable() }
    }
}

/// Two ordered iterators as one.
struct Merged<A: Iterator, B: Iterator> {
    one: std::iter::Peekable<A>,
    other: std::iter::Peekable<B>,
}

impl<T: Ord, A: Iterator<Item = T>, B: Iterator<Item = T>> Iterator for Merged<A, B> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match (self.one.peek(), self.other.peek()) {
            (Some(one), Some(other)) if other < one => self.other.next(),
            (None, _) => self.other.next(),
            _ => self.one.next(),
        }
    }
}

/// Whether an object of a part serves this family. A WireGuard peer serves the families of its subnets in the part.
fn serves(part: &[Object], object: &Object, of: Family) -> bool {
    match object {
        Object::WgPeer(peer) => part.iter().any(
            |other| matches!(other, Object::AllowedIp(ip) if (ip.link, ip.peer, ip.subnet.family()) == (peer.link, peer.public_key, of)),
        ),
        _ => family(object) == Some(of),
    }
}

/// The family that an object serves; `None` if it serves both, or neither.
fn family(object: &Object) -> Option<Family> {
    match object {
        Object::Fdb(fdb) => Some(Family::of(fdb.dst)),
        Object::Neigh(neigh) => Some(Family::of(neigh.ip)),
        Object::Forward(forward) => Some(forward.dst.family()),
        Object::AllowedIp(ip) => Some(ip.subnet.family()),
        Object::Route(route) => Some(route.dst.family()),
        _ => None,
    }
}
