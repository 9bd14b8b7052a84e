//! Whether the store is being followed, and the pause before the next attempt.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::notice::Notices;
use crate::ready::{Guard, Ready};

/// The first pause, which doubles with each attempt up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// A store that answers, but refuses or breaks off again and again, is asked ever more seldom, down to this: each attempt costs it
/// a list of all leases, which one that is down is not asked for.
const SLOWEST: Duration = Duration::from_secs(5);
/// An outage of this length is asked about more seldom: nothing is about to end that soon.
const LONG: (Duration, Duration) = (Duration::from_secs(900), Duration::from_secs(1));
/// No two attempts are closer than this.
const LEAST: Duration = Duration::from_millis(20);
/// The longest that attempts are spread over because there are many hosts.
const SPREAD: Duration = Duration::from_secs(30);
/// A store that was followed for less than this before it was lost counts as one that was never back.
const STEADY: Duration = Duration::from_secs(5);
/// After this long without the store a node is no longer ready: it does not see new peers.
const STALE: Duration = Duration::from_secs(60);

/// Why the watch of a store ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outage {
    /// It does not answer, or broke off.
    Lost(String),
    /// It answered, and refused.
    Refused(String),
}

/// What the follower of a store reports beside the leases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Following {
    /// Whether the store is being followed.
    pub connected: bool,
    /// How often another host wrote this node's lease.
    pub foreign_writes: u64,
}

/// Whether a store is being followed, and the pauses between attempts.
#[derive(Debug)]
pub struct Link {
    following: watch::Sender<Following>,
    ready: Ready,
    notices: Notices,
    /// How many leases there are, which is how many hosts follow the same store.
    leases: usize,
    /// Attempts, and how many of them got an answer, since it was last followed steadily.
    attempts: u32,
    answered: u32,
    /// Since when it is not followed, and the last reason.
    away: (Instant, String),
    /// Since when it was followed last, if it ever was.
    up_at: Option<Instant>,
    stale: Option<Guard>,
}

impl Link {
    /// A link that is down.
    pub fn new(following: watch::Sender<Following>, ready: Ready, notices: Notices) -> Link {
        let away = (Instant::now(), String::new());
        Link { following, ready, notices, leases: 0, attempts: 0, answered: 0, away, up_at: None, stale: None }
    }

    /// Takes note of how many leases the store has.
    pub(super) fn set_leases(&mut self, leases: usize) {
        self.leases = leases;
    }

    /// Another host wrote this node's lease.
    pub(super) fn foreign_write(&self) {
        self.following.send_modify(|following| following.foreign_writes += 1);
    }

    /// Returns what was said before.
    fn set_connected(&self, connected: bool) -> bool {
        let before = self.following.borrow().connected;
        self.following.send_modify(|following| following.connected = connected);
        before
    }

    /// The store is being followed. True if it was not before.
    pub fn up(&mut self) -> bool {
        self.stale = None;
        let is_new = !self.set_connected(true);
        if is_new {
            self.up_at = Some(Instant::now());
        }
        is_new
    }

    /// The store is no longer followed: reports it, and pauses before the next attempt.
    pub async fn down(&mut self, outage: Outage) {
        let was_connected = self.set_connected(false);
        // A store that breaks off as soon as it is back was as good as away.
        let was_steady = was_connected && self.up_at.is_some_and(|at| at.elapsed() > STEADY);
        if was_steady {
            self.away = (Instant::now(), String::new());
            (self.attempts, self.answered) = (0, 0);
        }
        let (reason, is_refused) = match outage {
            Outage::Lost(reason) => (reason, false),
            Outage::Refused(reason) => (reason, true),
        };
        self.answered += u32::from(is_refused || was_connected && !was_steady);
        if reason != self.away.1 {
            tracing::warn!(%reason, "store watch lost; keeping routes");
            self.away.1.clone_from(&reason);
        }
        if self.up_at.is_none() || self.away.0.elapsed() > STALE {
            let guard = self.stale.get_or_insert_with(|| self.ready.guard("the store"));
            guard.say(&reason);
            self.notices.warn("StoreNotFollowed", format!("leases are not followed, routes stay as they are: {reason}"));
        }
        let pause = pause(self.attempts, self.answered, self.away.0.elapsed(), self.leases);
        self.attempts += 1;
        tokio::time::sleep(pause).await;
    }

    /// Passes something on that an operator should know.
    pub(super) fn notice(&self, reason: &'static str, text: String) {
        self.notices.warn(reason, text);
    }
}

/// The pause before the next attempt: drawn from a window that grows with the attempts, and with the number of hosts that come back
/// to the store at the same time.
fn pause(attempts: u32, answered: u32, away: Duration, leases: usize) -> Duration {
    let slowest = match answered {
        0 if away > LONG.0 => LONG.1,
        0 => PAUSE.1,
        // The first time may be a restart of the server.
        answered => (PAUSE.1 * 2_u32.saturating_pow(answered - 1)).min(SLOWEST),
    };
    let window = (PAUSE.0 * 2_u32.saturating_pow(attempts.min(16))).min(slowest).max(spread(leases));
    LEAST + window.mul_f64(fastrand::f64())
}

/// The time over which the hosts of a cluster spread their attempts. Each host reads the list of all leases, 250 bytes a lease: this
/// is the time in which a line of 10 Gbit/s carries all these lists (1,000 hosts: 0.2 s; 10,000 hosts: 20 s).
fn spread(leases: usize) -> Duration {
    let leases = u64::try_from(leases).unwrap_or(u64::MAX);
    Duration::from_nanos(leases.saturating_mul(leases).saturating_mul(200)).min(SPREAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTAGE: Duration = Duration::from_secs(30);

    #[test]
    fn attempts_of_a_thousand_hosts_are_less_than_a_second_apart() {
        for leases in [0, 1, 100, 1_000] {
            for _ in 0..1_000 {
                assert!(pause(40, 0, OUTAGE, leases) < Duration::from_millis(600));
            }
        }
    }

    #[test]
    fn ten_thousand_hosts_come_back_one_after_the_other() {
        // All of them lose a store that restarts at once: how many of them ask in each second?
        for attempts in [0, 10] {
            let mut seconds = [0; 32];
            for _ in 0..10_000 {
                seconds[usize::try_from(pause(attempts, 0, OUTAGE, 10_000).as_secs()).unwrap()] += 1;
            }
            let busiest = seconds.iter().max().unwrap();
            assert!(*busiest < 650, "{seconds:?}");
        }
    }

    #[test]
    fn a_store_that_refuses_is_asked_ever_more_seldom() {
        let longest = |answered| (0..1_000).map(|_| pause(40, answered, OUTAGE, 10)).max().unwrap();
        assert!(longest(1) < Duration::from_millis(600));
        assert!(longest(10) > Duration::from_secs(4) && longest(10) < Duration::from_secs(6));
    }

    #[tokio::test(start_paused = true)]
    async fn one_reason_is_reported_once_and_on_readyz() {
        let (notices, mut put) = Notices::new();
        let ready = Ready::default();
        let mut link = Link::new(watch::channel(Following::default()).0, ready.clone(), notices);
        for _ in 0..3 {
            link.down(Outage::Refused("permission denied".to_owned())).await;
        }
        assert_eq!(ready.pending(), ["the store (permission denied)"]);
        assert!(put.try_recv().unwrap().text.ends_with("permission denied"));
        assert!(link.up());
        assert!(ready.pending().is_empty());
    }
}
