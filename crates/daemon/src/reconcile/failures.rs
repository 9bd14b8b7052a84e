//! Objects that the kernel refused, each with a backoff of its own that no wake-up undercuts. Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flannel::OpError;
use flannel::object::Key;
use tokio::time::Instant;

/// A failed object is tried again after the first, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// An event that may have removed the reason brings the next attempt forward, at once the first time. With each further event the
/// attempts keep a distance, from the first doubling up to the second, so that a flood of events is no flood of attempts.
const EARLY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// After so long without an attempt an event brings the next one forward at once again.
const RESTED: Duration = Duration::from_secs(10);

/// An object that the kernel refused, or one in conflict, whose repairs are delayed.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    /// What the kernel said; with `errno` 0 it is a conflict.
    pub(super) error: OpError,
    /// Attempts since it last succeeded.
    pub(super) attempts: u32,
    last: Instant,
    due: Instant,
    /// Attempts that were brought forward, one soon after the other.
    early: u32,
}

impl Failure {
    /// Did the kernel refuse it?
    pub(super) fn is_refused(&self) -> bool {
        self.error.errno != 0
    }

    /// When it is tried again.
    pub(super) fn due(&self) -> Instant {
        self.due
    }
}

/// All failed objects.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<Key, Failure>);

impl Failures {
    /// The failure at a key.
    pub(super) fn get(&self, key: &Key) -> Option<&Failure> {
        self.0.get(key)
    }

    /// All, in the order of keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Failure)> {
        self.0.iter()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// When the next attempt is due, of objects that no attempt is under way for.
    pub(super) fn next(&self, busy: &BTreeSet<Key>) -> Option<Instant> {
        self.0.iter().filter(|(key, _)| !busy.contains(key)).map(|(_, failure)| failure.due).min()
    }

    /// Objects whose attempt is due, of those that no attempt is under way for.
    pub(super) fn due(&self, now: Instant, busy: &BTreeSet<Key>) -> Vec<Key> {
        self.0.iter().filter(|(key, failure)| failure.due <= now && !busy.contains(key)).map(|(key, _)| key.clone()).collect()
    }

    /// Must an attempt wait?
    pub(super) fn is_waiting(&self, key: &Key, now: Instant) -> bool {
        self.0.get(key).is_some_and(|failure| failure.due > now)
    }

    /// The kernel refused an object. Returns whether that is news: it did not fail before, or for another reason.
    pub(super) fn refused(&mut self, key: Key, error: OpError, now: Instant) -> bool {
        let before = self.0.get(&key);
        let is_new = before.is_none_or(|failure| failure.error.errno != error.errno);
        let attempts = before.map_or(1, |failure| failure.attempts + 1);
        let early = before.map_or(0, |failure| failure.early);
        let wait = RETRY.0.saturating_mul(1 << attempts.min(10).saturating_sub(1)).min(RETRY.1);
        self.0.insert(key, Failure { error, attempts, last: now, due: now + wait, early });
        is_new
    }

    /// Delays the next repair of an object in conflict.
    pub(super) fn delay(&mut self, key: Key, text: String, attempts: u32, due: Instant, now: Instant) {
        self.0.insert(key, Failure { error: OpError { errno: 0, text }, attempts, last: now, due, early: 0 });
    }

    /// An attempt succeeded. Returns whether the kernel had refused the object before.
    pub(super) fn succeeded(&mut self, key: &Key) -> bool {
        self.0.remove(key).is_some_and(|failure| failure.is_refused())
    }

    /// Forgets those of `keys` that `is_wanted` no more.
    pub(super) fn forget(&mut self, keys: &[Key], is_wanted: impl Fn(&Key) -> bool) {
        keys.iter().filter(|key| !is_wanted(key)).for_each(|key| drop(self.0.remove(key)));
    }

    /// Something happened that may have removed the reason: those among the refused that `may_succeed` are tried again soon.
    pub(super) fn hurry(&mut self, now: Instant, may_succeed: impl Fn(&Key) -> bool) {
        for (_, failure) in self.0.iter_mut().filter(|(key, failure)| failure.is_refused() && may_succeed(key)) {
            if now.duration_since(failure.last) >= RESTED {
                failure.early = 0;
            }
            let distance = match failure.early {
                0 => Duration::ZERO,
                early => EARLY.0.saturating_mul(1 << (early - 1).min(10)).min(EARLY.1),
            };
            let due = (failure.last + distance).max(now);
            if due < failure.due {
                failure.due = due;
                failure.early += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: i32) -> OpError {
        OpError { errno, text: String::new() }
    }

    /// Attempts in a minute in which `events` a second say that each object may succeed now.
    fn attempts(key: &Key, events: u32) -> u32 {
        let (start, mut failures) = (Instant::now(), Failures::default());
        let mut count = 0;
        for tick in 0..60_000 {
            let now = start + Duration::from_millis(tick);
            if events > 0 && tick % u64::from(1000 / events) == 0 {
                failures.hurry(now, |_| true);
            }
            if !failures.is_waiting(key, now) {
                failures.refused(key.clone(), error(30), now);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn attempts_per_minute_are_bounded_for_each_kind_of_object() {
        let name = "flannel.1".parse().unwrap();
        let ip = "10.1.1.0".parse().unwrap();
        let subnet = "10.1.1.0/24".parse().unwrap();
        let keys = [
            Key::Link(name),
            Key::Addr(name, "10.1.1.0/32".parse().unwrap()),
            Key::Bridge("cni0".parse().unwrap()),
            Key::Sysctl("net/ipv4/ip_forward".to_owned()),
            Key::Fdb(name, "02:00:00:00:00:01".parse().unwrap()),
            Key::Neigh(name, ip),
            Key::Forward(subnet),
            Key::WgPeer(name, flannel::wireguard::PublicKey([1; 32])),
            Key::AllowedIp(name, subnet),
            Key::Route(subnet, 1),
            Key::Blackhole(subnet),
            Key::Ruleset(flannel::Family::V4),
            Key::Iptables(flannel::Family::V4, flannel::traffic::iptables::Variant::Nft),
            Key::PodRules,
            Key::EnvFile,
        ];
        for key in &keys {
            assert_eq!(attempts(key, 0), 6, "after 0, 1, 3, 7, 15 and 31 seconds: {key}");
            for events in [1, 10, 200, 1000] {
                assert!((6..=20).contains(&attempts(key, events)), "{key}, {events} events a second: {}", attempts(key, events));
            }
        }
    }

    #[test]
    fn the_first_event_brings_an_attempt_forward_at_once() {
        let (now, key, mut failures) = (Instant::now(), Key::PodRules, Failures::default());
        assert!(failures.refused(key.clone(), error(1), now));
        assert!(!failures.refused(key.clone(), error(1), now) && failures.refused(key.clone(), error(2), now));
        failures.hurry(now, |_| false);
        assert!(failures.is_waiting(&key, now));
        failures.hurry(now, |_| true);
        assert_eq!((failures.due(now, &BTreeSet::new()), failures.next(&BTreeSet::new())), (vec![key.clone()], Some(now)));
        let busy = BTreeSet::from([key.clone()]);
        assert_eq!((failures.due(now, &busy), failures.next(&busy)), (Vec::new(), None), "an attempt is under way");
        assert!(failures.succeeded(&key) && failures.len() == 0);
    }

    #[test]
    fn a_conflict_keeps_its_own_pace() {
        let (now, key, mut failures) = (Instant::now(), Key::PodRules, Failures::default());
        failures.delay(key.clone(), "conflict".to_owned(), 21, now + Duration::from_secs(1), now);
        failures.hurry(now, |_| true);
        assert!(failures.is_waiting(&key, now));
        assert!(!failures.succeeded(&key), "the kernel never refused it");
    }
}
