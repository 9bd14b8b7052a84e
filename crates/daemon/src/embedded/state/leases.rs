//! Leases: granted, renewed, ended, and their keys with them.

use std::collections::BTreeSet;
use std::time::Instant;

use tonic::Status;

use super::{Change, LeaseState, State, after};
use crate::embedded::limits;

/// The longest life that etcd grants a lease, in seconds.
const MAX_TTL: i64 = 9_000_000_000;

/// The shortest, to which a shorter one is raised, in seconds.
const MIN_TTL: i64 = 2;

impl State {
    /// Grants a lease and returns its identifier and its life in seconds. `random` is the identifier where the request
    /// leaves the choice.
    pub(in crate::embedded) fn grant(&mut self, id: i64, ttl: i64, random: i64, now: Instant) -> Result<(i64, i64), Status> {
        let ttl = ttl.max(MIN_TTL);
        let id = if id == 0 { random } else { id };
        if ttl > MAX_TTL {
            return Err(Status::out_of_range("etcdserver: too large lease TTL"));
        }
        if self.leases.contains_key(&id) {
            return Err(Status::failed_precondition("etcdserver: lease already exists"));
        }
        if self.leases.len() >= limits::LEASES {
            return Err(Status::resource_exhausted(format!("there are {} leases already", limits::LEASES)));
        }
        let expires = after(now, ttl);
        self.leases.insert(id, LeaseState { ttl, expires, keys: BTreeSet::new() });
        self.ends.insert((expires, id));
        self.changes.push(Change::Lease(id, Some(ttl)));
        Ok((id, ttl))
    }

    /// Ends a lease and deletes its keys, in one revision.
    pub(in crate::embedded) fn revoke(&mut self, id: i64) -> Result<(), Status> {
        let lease = self.leases.remove(&id).ok_or_else(|| Status::not_found("etcdserver: requested lease not found"))?;
        self.ends.remove(&(lease.expires, id));
        self.changes.push(Change::Lease(id, None));
        let next = self.revision + 1;
        let removed = lease.keys.iter().filter_map(|key| self.remove(key, next)).count();
        if removed > 0 {
            self.revision = next;
        }
        self.trim();
        Ok(())
    }

    /// Renews a lease and returns its life in seconds; 0 for a lease that does not exist.
    pub(in crate::embedded) fn keep_alive(&mut self, id: i64, now: Instant) -> i64 {
        let Some(lease) = self.leases.get_mut(&id) else { return 0 };
        self.ends.remove(&(lease.expires, id));
        lease.expires = after(now, lease.ttl);
        self.ends.insert((lease.expires, id));
        lease.ttl
    }

    /// Seconds left, seconds granted and keys of a lease; `None` for a lease that does not exist.
    pub(in crate::embedded) fn time_to_live(&self, id: i64, now: Instant) -> Option<(i64, i64, Vec<Vec<u8>>)> {
        let lease = self.leases.get(&id)?;
        let left = lease.expires.saturating_duration_since(now).as_secs();
        Some((i64::try_from(left).unwrap_or(i64::MAX), lease.ttl, lease.keys.iter().cloned().collect()))
    }

    pub(in crate::embedded) fn lease_ids(&self) -> Vec<i64> {
        self.leases.keys().copied().collect()
    }

    /// Gives all leases their whole life again.
    pub(in crate::embedded) fn renew_leases(&mut self, now: Instant) {
        self.leases.values_mut().for_each(|lease| lease.expires = after(now, lease.ttl));
        self.ends = self.leases.iter().map(|(id, lease)| (lease.expires, *id)).collect();
    }

    /// When the next lease ends.
    pub(in crate::embedded) fn next_expiry(&self) -> Option<Instant> {
        self.ends.first().map(|(at, _)| *at)
    }

    /// Ends the leases that have expired, in the order of their identifiers.
    pub(in crate::embedded) fn expire(&mut self, now: Instant) {
        let mut due: Vec<i64> = self.ends.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect();
        due.sort_unstable();
        for id in due {
            // It existed a line ago.
            let _ = self.revoke(id);
        }
    }
}
