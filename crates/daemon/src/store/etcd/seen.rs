//! What is remembered of a store from one watch to the next: enough to recognize a store that lost data, or was restored from a
//! backup.

use std::collections::BTreeMap;

use flannel::LeaseKey;

use super::{Entry, Unreadable};
use crate::store::reports::Reports;

/// The last state that the store reported.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The unreadable entries that were reported.
    reports: Reports,
    /// All changes up to this revision were received.
    revision: i64,
    /// The revision of each lease.
    leases: BTreeMap<LeaseKey, i64>,
    /// Did a list contradict what was received before, and was that not passed on yet?
    is_older: bool,
}

impl Seen {
    /// Warns once of each unreadable entry.
    pub(super) fn report(&mut self, unreadable: &[Unreadable]) {
        for Unreadable { key, revision, reason } in unreadable {
            if self.reports.is_due(key, revision) {
                tracing::warn!(key, reason, "skipping unreadable lease");
            }
        }
    }

    /// How many leases there are.
    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    /// Takes note of a list. True if it contradicts what was received before: revisions only grow, and every change up to a known
    /// revision is known. Otherwise the store lost data, even if it has written as much again since.
    pub(super) fn list(&mut self, revision: i64, entries: &[Entry]) -> bool {
        let is_known = |entry: &Entry| entry.mod_revision > self.revision || self.leases.get(&entry.key) == Some(&entry.mod_revision);
        self.is_older |= revision < self.revision || self.revision > 0 && !entries.iter().all(is_known);
        self.revision = revision;
        self.leases = entries.iter().map(|entry| (entry.key, entry.mod_revision)).collect();
        self.is_older
    }

    /// The list was passed on.
    pub(super) fn list_sent(&mut self) {
        self.is_older = false;
    }

    /// Takes note of a lease that was put, or deleted, at this revision.
    pub(super) fn change(&mut self, key: LeaseKey, revision: i64, is_there: bool) {
        self.revision = self.revision.max(revision);
        if is_there {
            self.leases.insert(key, revision);
        } else {
            self.leases.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel::PerFamily;

    fn entry((octet, mod_revision): (u8, i64)) -> Entry {
        Entry { key: key(octet), peer: None, create_revision: 0, mod_revision, lease: 0 }
    }

    fn key(octet: u8) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(format!("10.1.{octet}.0/24").parse().unwrap()), v6: None }).unwrap()
    }

    /// A list at revision 10 has leases 1 and 2 (of revisions 5 and 8); then 1 and 3 change at 12 and 13, and 2 is deleted at 14.
    #[track_caller]
    fn check(revision: i64, leases: &[(u8, i64)], is_older: bool) {
        let mut seen = Seen::default();
        assert!(!seen.list(10, &[(1, 5), (2, 8)].map(entry)), "the first list contradicts nothing");
        [(1, 12, true), (3, 13, true), (2, 14, false)].into_iter().for_each(|(octet, at, there)| seen.change(key(octet), at, there));
        let list: Vec<Entry> = leases.iter().copied().map(entry).collect();
        assert_eq!(seen.list(revision, &list), is_older);
        assert_eq!(seen.list(revision, &list), is_older, "it was not passed on yet");
        seen.list_sent();
        assert!(!seen.list(revision, &list), "a list does not contradict itself");
    }

    #[test]
    fn store_that_lost_data_is_recognized() {
        check(14, &[(1, 12), (3, 13)], false);
        check(20, &[(1, 12), (4, 15)], false);
        check(20, &[], false);
        check(9, &[(1, 5), (2, 8)], true);
        check(3, &[], true);
        // It has written as much as it lost.
        check(14, &[(1, 5), (2, 8), (4, 13)], true);
        check(20, &[(1, 12), (3, 13), (2, 8)], true);
        check(20, &[(3, 12)], true);
    }
}
