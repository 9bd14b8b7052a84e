//! Who undoes what: counts what was put right lately, and slows down where somebody keeps undoing it. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use flannel::desired::Key;
use kernel::Author;
use tokio::time::Instant;

/// What was put right more often than this, with no pause of [`CALM`] in between, is fought over.
const TIMES: u32 = 20;
/// After so long without a repair a fight is over.
const CALM: Duration = Duration::from_secs(10);
/// The wait before the next repair in a fight: it doubles from the first to the second. At once a second the data path is as
/// good as it can be without a race.
const WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What was put right lately.
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

/// A fight over an object.
#[derive(Debug, PartialEq)]
pub(super) struct Fight {
    /// Did it begin just now?
    pub(super) is_new: bool,
    /// How often the object was put right since there was peace.
    pub(super) times: u32,
    /// Who was seen to undo it last.
    pub(super) by: Option<Author>,
    /// How long to wait with the next repair.
    pub(super) wait: Duration,
}

impl Repairs {
    /// Forgets what was left in peace, and returns those that had been fought over.
    pub(super) fn settled(&mut self, now: Instant) -> Vec<(Key, u32)> {
        let over: Vec<Key> =
            self.recent.iter().filter(|(_, recent)| now.duration_since(recent.last) >= CALM).map(|(key, _)| key.clone()).collect();
        let gone = over.into_iter().filter_map(|key| self.recent.remove_entry(&key));
        gone.filter(|(_, recent)| recent.times > TIMES).map(|(key, recent)| (key, recent.times)).collect()
    }

    /// Counts a repair; tells if it is one of too many.
    pub(super) fn count(&mut self, key: &Key, by: Option<&Author>, now: Instant) -> Option<Fight> {
        self.total += 1;
        let recent = self.recent.entry(key.clone()).or_insert(Recent { last: now, times: 0, by: None });
        recent.last = now;
        recent.times += 1;
        if by.is_some() {
            recent.by = by.cloned();
        }
        let beyond = recent.times.checked_sub(TIMES + 1)?;
        let wait = WAIT.0.saturating_mul(1 << beyond.min(10)).min(WAIT.1);
        Some(Fight { is_new: beyond == 0, times: recent.times, by: recent.by.clone(), wait })
    }

    /// How many repairs there ever were.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The fights that go on: object, times, and who.
    pub(super) fn fights(&self) -> impl Iterator<Item = (&Key, u32, Option<String>)> {
        let fought = self.recent.iter().filter(|(_, recent)| recent.times > TIMES && recent.last.elapsed() < CALM);
        fought.map(|(key, recent)| (key, recent.times, recent.by.as_ref().map(ToString::to_string)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fight_begins_slows_down_and_ends() {
        let mut repairs = Repairs::default();
        let key = Key::Ruleset(flannel::Family::V4);
        let who = Author { pid: 7, program: "nft".to_owned() };
        for _ in 0..TIMES {
            assert_eq!(repairs.count(&key, None, Instant::now()), None);
        }
        let fight = repairs.count(&key, Some(&who), Instant::now()).unwrap();
        assert_eq!(fight, Fight { is_new: true, times: 21, by: Some(who.clone()), wait: WAIT.0 });
        let waits: Vec<u128> = (0..6).map(|_| repairs.count(&key, None, Instant::now()).unwrap().wait.as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(repairs.fights().collect::<Vec<_>>(), [(&key, 27, Some("nft, process 7".to_owned()))]);
        assert_eq!(repairs.settled(Instant::now()), []);
        tokio::time::advance(CALM).await;
        assert_eq!(repairs.fights().count(), 0);
        assert_eq!(repairs.settled(Instant::now()), [(key, 27)]);
        assert_eq!((repairs.total(), repairs.recent.len()), (27, 0));
    }
}
