//! Schedules the renewal of a lease: a state machine that takes the time as argument.

use std::time::{Duration, Instant};

/// The TTL of every lease in etcd, which upstream fixes (specification, section 3.1).
pub const LEASE_TTL: Duration = Duration::from_secs(86_400);

/// The longest delay between retries of a renewal; it is shorter when the lease is about to expire.
pub const RETRY: Duration = Duration::from_secs(60);

/// The longest life that is believed of a lease: a year.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Wait until this instant.
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
    /// Schedules a lease that was granted at `now` for `ttl`, to be renewed `margin` before it expires. If the margin is not less than
    /// the TTL, it is renewed after half of it, so that a short lease is not renewed without pause.
    pub fn granted(now: Instant, ttl: Duration, margin: Duration) -> Renewal {
        // A server may name any number; what is added to a clock must not overflow it.
        let ttl = ttl.min(LONGEST);
        let wait = if margin < ttl { ttl - margin } else { ttl / 2 };
        Renewal { margin, due: now + wait, ends: now + ttl }
    }

    /// The next step at `now`.
    pub fn poll(&self, now: Instant) -> Step {
        if now >= self.due { Step::Renew } else { Step::Wait(self.due) }
    }

    /// Records that the lease was renewed at `now`.
    pub fn renewed(&mut self, now: Instant, ttl: Duration) {
        *self = Renewal::granted(now, ttl, self.margin);
    }

    /// Records that the renewal failed at `now`; retries have no limit.
    pub fn failed(&mut self, now: Instant) {
        let left = self.ends.saturating_duration_since(now);
        self.due = now + (left / 4).clamp(Duration::from_secs(1), RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_is_renewed_before_expiry_and_retried_each_minute() {
        let start = Instant::now();
        let hour = Duration::from_secs(3600);
        let mut renewal = Renewal::granted(start, LEASE_TTL, hour);
        assert_eq!(renewal.poll(start), Step::Wait(start + 23 * hour));
        assert_eq!(renewal.poll(start + 23 * hour), Step::Renew);
        renewal.failed(start + 23 * hour);
        assert_eq!(renewal.poll(start + 23 * hour), Step::Wait(start + 23 * hour + RETRY));
        // A minute before expiry the delay is shorter.
        let late = start + 24 * hour - RETRY;
        renewal.failed(late);
        assert_eq!(renewal.poll(late), Step::Wait(late + RETRY / 4));
        renewal.renewed(start + 24 * hour, LEASE_TTL);
        assert_eq!(renewal.poll(start + 24 * hour), Step::Wait(start + 47 * hour));
    }

    #[test]
    fn endless_lease_is_renewed_within_a_year() {
        let (start, hour) = (Instant::now(), Duration::from_secs(3600));
        for ttl in [Duration::MAX, Duration::from_secs(u64::MAX), Duration::from_secs(i64::MAX.unsigned_abs())] {
            assert_eq!(Renewal::granted(start, ttl, hour).poll(start), Step::Wait(start + LONGEST - hour));
        }
    }

    #[test]
    fn margin_beyond_ttl_renews_after_half_of_it() {
        let start = Instant::now();
        let renewal = Renewal::granted(start, Duration::from_secs(10), Duration::from_secs(60));
        assert_eq!(renewal.poll(start), Step::Wait(start + Duration::from_secs(5)));
    }
}
