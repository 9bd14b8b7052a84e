//! When a lease must be renewed: a state machine that is told the time.

use std::time::{Duration, Instant};

/// The life of every lease in etcd, which upstream fixes (specification, section 3.1).
pub const LEASE_TTL: Duration = Duration::from_secs(86_400);

/// How long a failed renewal waits for the next try at most; the nearer the end, the sooner it is.
pub const RETRY: Duration = Duration::from_secs(60);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing before this instant.
    Wait(Instant),
    /// Renew now.
    Renew,
}

/// The renewal of one lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewal {
    margin: Duration,
    due: Instant,
    ends: Instant,
}

impl Renewal {
    /// A lease that was granted at `now` for `ttl`, to be renewed `margin` before its end; a margin of at least the
    /// whole ttl means half of it, so that a short lease is not renewed without pause.
    pub fn granted(now: Instant, ttl: Duration, margin: Duration) -> Renewal {
        let wait = if margin < ttl { ttl - margin } else { ttl / 2 };
        Renewal { margin, due: now + wait, ends: now + ttl }
    }

    /// What is due at `now`.
    pub fn poll(&self, now: Instant) -> Step {
        if now >= self.due { Step::Renew } else { Step::Wait(self.due) }
    }

    /// The lease was renewed at `now`.
    pub fn renewed(&mut self, now: Instant, ttl: Duration) {
        *self = Renewal::granted(now, ttl, self.margin);
    }

    /// The renewal failed at `now`: try again, soon and forever.
    pub fn failed(&mut self, now: Instant) {
        let left = self.ends.saturating_duration_since(now);
        self.due = now + (left / 4).clamp(Duration::from_secs(1), RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewed_a_margin_before_the_end_and_retried_each_minute() {
        let start = Instant::now();
        let hour = Duration::from_secs(3600);
        let mut renewal = Renewal::granted(start, LEASE_TTL, hour);
        assert_eq!(renewal.poll(start), Step::Wait(start + 23 * hour));
        assert_eq!(renewal.poll(start + 23 * hour), Step::Renew);
        renewal.failed(start + 23 * hour);
        assert_eq!(renewal.poll(start + 23 * hour), Step::Wait(start + 23 * hour + RETRY));
        // A minute before the end there is not a minute to wait.
        let late = start + 24 * hour - RETRY;
        renewal.failed(late);
        assert_eq!(renewal.poll(late), Step::Wait(late + RETRY / 4));
        renewal.renewed(start + 24 * hour, LEASE_TTL);
        assert_eq!(renewal.poll(start + 24 * hour), Step::Wait(start + 47 * hour));
    }

    #[test]
    fn a_margin_beyond_the_ttl_is_half_of_it() {
        let start = Instant::now();
        let renewal = Renewal::granted(start, Duration::from_secs(10), Duration::from_secs(60));
        assert_eq!(renewal.poll(start), Step::Wait(start + Duration::from_secs(5)));
    }
}
