//! Conflicts: counts recent repairs of each object, and slows down where another program keeps changing it. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use flannel::object::Key;
use kernel::Author;
use tokio::time::Instant;

/// An object that was repaired more often than this, with no pause of [`CALM`] in between, is in conflict.
const TIMES: u32 = 20;
/// After so long without a repair a conflict is resolved.
const CALM: Duration = Duration::from_secs(10);
/// The wait before the next repair in a conflict: it doubles from the first to the second. At once a second the data path is as
/// good as it can be without a race.
const WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Recent repairs.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    recent: BTreeMap<Key, Recent>,
    total: u64,
}

#[derive(Debug)]
struct Recent {
    last: Instant,
    times: u32,
    by: Option<Author>,
}

/// A conflict over an object.
#[derive(Debug, PartialEq)]
pub(super) struct Conflict {
    /// Did it begin with this repair?
    pub(super) is_new: bool,
    /// Repairs since the object was last left alone.
    pub(super) times: u32,
    /// The program that was last seen to change it.
    pub(super) by: Option<Author>,
    /// How long to wait with the next repair.
    pub(super) wait: Duration,
}

impl Repairs {
    /// Forgets objects that were left alone, and returns those that had been in conflict.
    pub(super) fn settled(&mut self, now: Instant) -> Vec<(Key, u32)> {
        let over: Vec<Key> =
            self.recent.iter().filter(|(_, recent)| now.duration_since(recent.last) >= CALM).map(|(key, _)| key.clone()).collect();
        let gone = over.into_iter().filter_map(|key| self.recent.remove_entry(&key));
        gone.filter(|(_, recent)| recent.times > TIMES).map(|(key, recent)| (key, recent.times)).collect()
    }

    /// When the first conflict is resolved, if it is left alone until then.
    pub(super) fn settles_at(&self) -> Option<Instant> {
        self.recent.values().filter(|recent| recent.times > TIMES).map(|recent| recent.last + CALM).min()
    }

    /// Counts a repair; tells if it is one of too many.
    pub(super) fn count(&mut self, key: &Key, by: Option<&Author>, now: Instant) -> Option<Conflict> {
        self.total += 1;
        let recent = self.recent.entry(key.clone()).or_insert(Recent { last: now, times: 0, by: None });
        recent.last = now;
        recent.times += 1;
        if by.is_some() {
            recent.by = by.cloned();
        }
        let beyond = recent.times.checked_sub(TIMES + 1)?;
        let wait = WAIT.0.saturating_mul(1 << beyond.min(10)).min(WAIT.1);
        Some(Conflict { is_new: beyond == 0, times: recent.times, by: recent.by.clone(), wait })
    }

    /// Repairs since the start.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Present conflicts: object, repairs, and program.
    pub(super) fn conflicts(&self) -> impl Iterator<Item = (&Key, u32, Option<String>)> {
        let present = self.recent.iter().filter(|(_, recent)| recent.times > TIMES && recent.last.elapsed() < CALM);
        present.map(|(key, recent)| (key, recent.times, recent.by.as_ref().map(ToString::to_string)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_conflict_begins_slows_repairs_and_is_resolved() {
        let mut repairs = Repairs::default();
        let key = Key::Ruleset(flannel::Family::V4);
        let who = Author { pid: 7, program: "nft".to_owned() };
        for _ in 0..TIMES {
            assert_eq!(repairs.count(&key, None, Instant::now()), None);
        }
        let conflict = repairs.count(&key, Some(&who), Instant::now()).unwrap();
        assert_eq!(conflict, Conflict { is_new: true, times: 21, by: Some(who.clone()), wait: WAIT.0 });
        let waits: Vec<u128> = (0..6).map(|_| repairs.count(&key, None, Instant::now()).unwrap().wait.as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(repairs.conflicts().collect::<Vec<_>>(), [(&key, 27, Some("nft, process 7".to_owned()))]);
        assert_eq!(repairs.settled(Instant::now()), []);
        tokio::time::advance(CALM).await;
        assert_eq!(repairs.conflicts().count(), 0);
        assert_eq!(repairs.settled(Instant::now()), [(key, 27)]);
        assert_eq!((repairs.total(), repairs.recent.len()), (27, 0));
    }
}
