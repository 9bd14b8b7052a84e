//! Warnings about what others wrote: once for each problem, and not more often than is useful.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use tokio::time::Instant;

use super::limits;

/// The same writer is reported at most this often, however often it changes what it writes.
const AGAIN: Duration = Duration::from_secs(60);
/// All writers together: this many reports at once, and one more each time so much has passed.
const BURST: (u32, Duration) = (50, Duration::from_secs(2));

/// Which problems of which writers were reported.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// By writer: its last problem that was reported, as a hash because it may be long, and when.
    last: BTreeMap<u64, (u64, Instant)>,
    /// Reports that may follow at once, and since when that is so.
    budget: Option<(u32, Instant)>,
}

impl Reports {
    /// Should this problem of this writer be reported now?
    pub(super) fn is_due(&mut self, writer: impl Hash, problem: impl Hash) -> bool {
        let (writer, problem, now) = (hash(writer), hash(problem), Instant::now());
        if self.last.get(&writer).is_some_and(|(said, at)| *said == problem || now.duration_since(*at) < AGAIN) {
            return false;
        }
        let (left, since) = self.budget.unwrap_or((BURST.0, now));
        let earned = u32::try_from(now.duration_since(since).as_millis() / BURST.1.as_millis()).unwrap_or(u32::MAX);
        let (left, since) = match left.saturating_add(earned) {
            left if left >= BURST.0 => (BURST.0, now),
            left => (left, since + BURST.1 * earned),
        };
        self.budget = Some((left.saturating_sub(1), since));
        if left == 0 {
            return false;
        }
        if self.last.len() >= limits::REPORTED {
            self.last.clear();
        }
        self.last.insert(writer, (problem, now));
        true
    }
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_writer_is_reported_once_a_minute_and_all_together_within_a_budget() {
        let mut reports = Reports::default();
        assert!(reports.is_due("a", 1));
        assert!(!reports.is_due("a", 1) && !reports.is_due("a", 2));
        tokio::time::sleep(AGAIN).await;
        assert!(!reports.is_due("a", 1), "it was reported");
        assert!(reports.is_due("a", 2));
        let due = (0..10_000).filter(|n| reports.is_due(n, 1)).count();
        assert!((40..=50).contains(&due), "{due}");
        assert!(reports.last.len() <= limits::REPORTED);
        tokio::time::sleep(BURST.1 * 2).await;
        assert_eq!((20_000..30_000).filter(|n| reports.is_due(n, 1)).count(), 2);
    }
}
