//! The checks: when the host is looked at, and what was found. A look never delays a repair, and all looks together take at most a
//! fiftieth of a processor.

use std::time::Duration;

use flannel::check::{self, Expected, Facts, Finding, HostFacts};
use flannel::object::Key;
use tokio::time::Instant;

use super::{Reconciler, SlowDone};
use crate::host::Host;

/// After a change the host is looked at so much later: what follows comes in a burst, and the loop may be repairing it.
const SETTLE: Duration = Duration::from_millis(500);
/// Looks have this distance at least, and so many times the processor time that the last one took.
const DISTANCE: Duration = Duration::from_secs(1);
const PAUSE: u32 = 50;

const EEXIST: i32 = 17;

/// The state of the checks.
#[derive(Debug)]
pub(super) struct Checks {
    chosen_by_default_route: bool,
    findings: Vec<Finding>,
    /// When the host is looked at next, if a look was asked for.
    due: Option<Instant>,
    not_before: Instant,
    is_running: bool,
}

/// The outcome of a look.
pub(super) struct Inspected {
    took: Duration,
    expected: Expected,
    host: HostFacts,
}

impl Checks {
    /// At the start the host is looked at at once.
    pub(super) fn new(chosen_by_default_route: bool) -> Checks {
        let now = Instant::now();
        Checks { chosen_by_default_route, findings: Vec::new(), due: Some(now), not_before: now, is_running: false }
    }

    /// When the host is looked at next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| !self.is_running)
    }

    /// Asks for a look.
    pub(super) fn soon(&mut self, now: Instant) {
        let at = (now + SETTLE).max(self.not_before);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// What the last look found.
    pub(super) fn findings(&self) -> &[Finding] {
        &self.findings
    }
}

impl<H: Host + 'static> Reconciler<H> {
    /// Begins to look at the host; the facts come as [`super::Wake::Slow`].
    pub(super) fn inspect(&mut self) {
        self.checks.due = None;
        self.checks.is_running = true;
        let mut expected = Expected { chosen_by_default_route: self.checks.chosen_by_default_route, ..self.picture.expected() };
        let exists = |name| self.failures.get(&Key::Link(name)).is_some_and(|failure| failure.error.errno == EEXIST);
        expected.refused = expected.links.iter().map(|link| link.name).filter(|name| exists(*name)).collect();
        let read = self.host.inspect(expected.clone());
        self.slow.push(Box::pin(async move {
            let (host, took) = read.await;
            SlowDone::Inspected(Box::new(Inspected { took, expected, host }))
        }));
    }

    /// Runs the checks, and reports what is new and what has gone.
    pub(super) fn on_inspected(&mut self, inspected: Inspected) {
        let Inspected { took, expected, host } = inspected;
        let now = Instant::now();
        self.checks.is_running = false;
        self.checks.not_before = now + (took * PAUSE).max(DISTANCE);
        if let Some(due) = &mut self.checks.due {
            *due = (*due).max(self.checks.not_before);
        }
        for part in &host.unreadable {
            tracing::debug!(part, "cannot read facts for the checks");
        }
        let findings = check::run_all(Facts { expected: &expected, host: &host });
        let before = std::mem::replace(&mut self.checks.findings, findings);
        for new in self.checks.findings.iter().filter(|finding| !before.contains(finding)) {
            tracing::warn!(code = new.code, severity = %new.severity, problem = new.text, fix = new.fix, "check found a problem");
            self.notices.warn("CheckFailed", new.to_string());
        }
        // A problem of the same kind may hide the former one, such as another rule before the one that dropped.
        let is_gone = |finding: &&Finding| !self.checks.findings.iter().any(|now| now.code == finding.code);
        for gone in before.iter().filter(is_gone) {
            tracing::info!(code = gone.code, problem = gone.text, "problem is gone");
        }
    }
}
