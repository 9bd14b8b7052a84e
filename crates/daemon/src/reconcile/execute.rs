//! Operations and their outcomes; repairs of drift, with conflicts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flannel::desired::Owner;
use flannel::diff::diff_keys;
use flannel::object::{Key, Lane, Object};
use flannel::{Op, Outcome};
use kernel::Author;
use tokio::time::Instant;

use super::{Reconciler, SlowDone};
use crate::host::Host;
use crate::view::REPAIRS;

/// Objects that change together up to this number are logged one by one.
pub(super) const LOGGED: usize = 8;
const EBUSY: i32 = 16;

/// How a difference between the kernel and the desired state was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drift {
    /// The kernel sent a notification.
    Notified,
    /// An audit found it.
    Audited,
}

impl<H: Host + 'static> Reconciler<H> {
    /// The operations that make the kernel as desired at these keys.
    pub(super) fn compare(&self, keys: &BTreeSet<Key>) -> Vec<Op> {
        diff_keys(self.picture.desired(), &self.observed, keys, self.prune())
    }

    /// Repairs drift. What another program changes again and again is repaired ever more slowly, down to once a second: two programs that
    /// replace each other's work without pause serve neither.
    pub(super) async fn repair(&mut self, mut ops: Vec<Op>, drift: Drift, authors: &BTreeMap<Key, Author>) {
        let now = Instant::now();
        self.settle_conflicts(now);
        ops.retain(|op| self.may_attempt(&op.object().key(), now));
        for op in &ops {
            let key = op.object().key();
            // No program changed what the kernel refused.
            if self.failures.get(&key).is_some_and(|failure| failure.is_refused()) {
                continue;
            }
            let Some(conflict) = self.repairs.count(&key, authors.get(&key), now) else { continue };
            let by = conflict.by.map_or("another program".to_owned(), |author| author.to_string());
            let text = format!("conflicting changes by {by}: {}", op.summary());
            if conflict.is_new {
                tracing::warn!(object = %key, by, times = conflict.times, "conflicting changes; repairs limited to 1/s");
                self.notices.warn(
                    "ConflictingChanges",
                    format!("{text}; repairs are limited to one a second: stop that program, or let it leave this object alone"),
                );
            }
            self.failures.delay(key, text, conflict.times, now + conflict.wait, now);
        }
        ops.retain(|op| self.may_attempt(&op.object().key(), now));
        if !ops.is_empty() {
            let forgotten = ops.len().saturating_sub(REPAIRS);
            let repaired = Arc::make_mut(&mut self.repaired);
            repaired.skip(forgotten);
            for op in ops.iter().skip(forgotten) {
                let by = authors.get(&op.object().key()).map(ToString::to_string);
                repaired.note(op.object().kind(), op.summary(), by, now);
            }
        }
        for op in ops.iter().take(LOGGED) {
            let by = authors.get(&op.object().key()).map(ToString::to_string);
            tracing::info!(op = op.summary(), by, found = ?drift, "repairing drift");
        }
        if ops.len() > LOGGED {
            tracing::info!(objects = ops.len() - LOGGED, found = ?drift, "repairing more drift");
        }
        self.execute(ops).await;
    }

    /// Logs conflicts that are resolved, and forgets them.
    pub(super) fn settle_conflicts(&mut self, now: Instant) {
        for (key, times) in self.repairs.settled(now) {
            tracing::info!(object = %key, times, "conflict resolved");
        }
    }

    fn may_attempt(&self, key: &Key, now: Instant) -> bool {
        !self.failures.is_waiting(key, now) && !self.busy.contains(key)
    }

    /// Executes operations, except those that failed lately and those that the slow lane is working on. Outcomes of the fast lane are known
    /// at the end, those of the slow lane come as [`super::Wake::Slow`].
    pub(super) async fn execute(&mut self, mut ops: Vec<Op>) {
        let now = Instant::now();
        ops.retain(|op| self.may_attempt(&op.object().key(), now));
        let (fast, slow): (Vec<Op>, Vec<Op>) = ops.into_iter().partition(|op| op.object().kind().lane() == Lane::Fast);
        if !slow.is_empty() {
            self.busy.extend(slow.iter().map(|op| op.object().key()));
            let applied = self.host.apply(slow, Lane::Slow);
            self.slow.push(Box::pin(async move { SlowDone::Applied(applied.await) }));
        }
        if !fast.is_empty() {
            let outcomes = self.host.apply(fast, Lane::Fast).await;
            self.conclude(outcomes);
        }
    }

    /// Records outcomes: in the memory of the kernel, and in that of failures.
    pub(super) fn conclude(&mut self, outcomes: Vec<(Op, Outcome)>) {
        let now = Instant::now();
        let mut done = Vec::with_capacity(outcomes.len());
        let mut logged = 0;
        for (op, outcome) in outcomes {
            let key = op.object().key();
            match outcome {
                Ok(()) => {
                    if matches!(op, Op::Set(Object::Link(_))) {
                        // What failed because there was no link may succeed now.
                        self.failures.hurry(now, |_| true);
                        self.checks.soon(now);
                    }
                    done.push(op);
                    if self.failures.succeeded(&key) {
                        tracing::info!(object = %key, "object applied after earlier failures");
                    }
                }
                Err(mut error) => {
                    if let Some(advice) = op.object().advice(error.errno) {
                        error.text.push_str("; ");
                        error.text.push_str(advice);
                    }
                    if self.failures.refused(key.clone(), error.clone(), now) {
                        logged += 1;
                        let retry = self.failures.get(&key).map(|failure| failure.due().duration_since(now).as_secs());
                        if logged <= LOGGED {
                            tracing::warn!(object = %key, %error, retry_s = retry, "failed to apply object; retrying");
                        }
                        self.notify_refused(&op, &error);
                    }
                }
            }
        }
        if logged > LOGGED {
            tracing::warn!(objects = logged - LOGGED, "failed to apply more objects; retrying");
        }
        self.observed.apply_all(done);
    }

    /// Notifies operators of a refused object, unless nothing depends on it.
    fn notify_refused(&self, op: &Op, error: &flannel::OpError) {
        let key = op.object().key();
        match op.object() {
            Object::EnvFile(_) => self.notices.warn("SubnetFile", format!("the CNI plugins cannot be given this node's subnet: {error}")),
            // A container's /proc/sys is read-only as a rule, and nothing depends on ours except forwarding.
            Object::Sysctl(sysctl) if !sysctl.is_forwarding() => {}
            // A plugin is at work.
            Object::PodRules(_) if error.errno == EBUSY => {}
            _ => self.notices.warn("KernelRefused", format!("{key}: {error}")),
        }
    }

    /// Keys of this node's own objects, with their policy.
    pub(super) fn own_objects(&self) -> &[Object] {
        self.picture.desired().part(&Owner::Node)
    }
}
