//! Deadlines: retries, the audit, and the resync of rules of which the kernel sends no notifications.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flannel::diff::diff;
use flannel::object::{Key, Lane};
use flannel::scope::Scope;
use flannel::traffic::iptables::Variant;
use flannel::{Family, Picture};
use tokio::time::Instant;

use super::execute::Drift;
use super::{Inputs, Reconciler, leases, slow_keys};
use crate::host::Host;

/// How often the whole kernel is read as the audit of our memory of it: nearly every change is notified sooner, this catches what the kernel
/// does not announce. Each minute; where it takes long, rarer, up to the second.
pub(super) const AUDIT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(300));
/// An audit is followed by a pause of so many times its length: it may take a two-thousandth of a processor.
const AUDIT_PAUSE: u32 = 2_000;
/// After a failed read the next one.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// When the kernel is read without a notification.
#[derive(Debug)]
pub(super) struct Schedule {
    /// When it is read whole.
    pub(super) at: Instant,
    /// When rules of iptables-legacy are read next, and how often.
    resync: Option<(Instant, Duration)>,
}

impl Schedule {
    /// At the start, after a whole read.
    pub(super) fn new(picture: &Picture, resync: Duration) -> Schedule {
        let now = Instant::now();
        let has_legacy = picture.desired().iter().any(|(key, _)| matches!(key, Key::Iptables(_, Variant::Legacy)));
        Schedule { at: now + AUDIT.0, resync: has_legacy.then_some((now + resync, resync)) }
    }

    /// The kernel is read whole within `wait`.
    pub(super) fn soon(&mut self, wait: Duration) {
        self.at = self.at.min(Instant::now() + wait);
    }

    /// When rules of iptables-legacy are read next.
    pub(super) fn resync_at(&self) -> Option<Instant> {
        self.resync.map(|(at, _)| at)
    }
}

impl<H: Host + 'static> Reconciler<H> {
    pub(super) async fn on_timer(&mut self, inputs: &Inputs) {
        let now = Instant::now();
        self.settle_conflicts(now);
        if self.own.check_at.is_some_and(|at| at <= now) {
            self.check_own(inputs, leases::OWN);
        }
        if self.tidy.take_if(|at| *at <= now).is_some() {
            self.picture.pack();
            self.observed.pack();
            kernel::process::release_memory();
        }
        let due = self.trust.due(now - self.epoch, inputs.following.borrow().connected, self.picture.leases(), self.picture.own());
        if due.give_up {
            self.give_up_doubtful().await;
        }
        if due.audit {
            // Objects of leases that no host wrote again are deleted.
            self.audit.at = now;
        }
        if self.checks.due().is_some_and(|at| at <= now) {
            self.inspect();
        }
        if self.interface.due().is_some_and(|at| at <= now) {
            self.look_at_interface(&inputs.claim).await;
        }
        if let Some((at, every)) = &mut self.audit.resync
            && now >= *at
        {
            *at = now + *every;
            let keys = Family::ALL.map(|family| Key::Iptables(family, Variant::Legacy)).to_vec();
            self.observe_slow(Scope { iptables: Family::ALL.into(), ..Scope::default() }, keys);
        }
        if now < self.audit.at {
            self.retry(now).await;
        } else {
            self.audit(now, inputs).await;
        }
    }

    /// Tries failed objects again whose time has come.
    async fn retry(&mut self, now: Instant) {
        let due = self.failures.due(now, &self.busy);
        if due.is_empty() {
            return;
        }
        let ops = self.compare(&due.iter().cloned().collect());
        // An object that no owner wants any more, or that matches the desired state, is no failure any more.
        let wanted: BTreeSet<Key> = ops.iter().map(|op| op.object().key()).collect();
        self.failures.forget(&due, |key| wanted.contains(key));
        self.execute(ops).await;
    }

    /// Reads the whole kernel and repairs what differs. The slow lane's part comes later.
    async fn audit(&mut self, now: Instant, inputs: &Inputs) {
        let scope = if self.adopting { self.picture.scope_with_adoption() } else { self.picture.scope() };
        self.observe_slow(scope.clone(), slow_keys(&self.observed));
        let mut observed = match self.host.observe(scope, Lane::Fast).await {
            Ok(observed) => observed,
            Err(error) => {
                tracing::warn!(%error, retry_s = READ_AGAIN.as_secs(), "cannot read the kernel's state; retrying");
                self.audit.at = now + READ_AGAIN;
                return;
            }
        };
        observed.extend(slow_keys(&self.observed).iter().filter_map(|key| self.observed.get(key).cloned()));
        self.picture.accept_roaming(&mut observed);
        self.note_handshakes(&observed, now);
        // The old one is kept if it is the same: memory that is not moved is not torn.
        if self.observed != observed {
            self.observed = observed;
        }
        self.follow_macs(&inputs.claim);
        self.picture.keep_bridge(&self.observed);
        let ops = diff(self.picture.desired(), &self.observed, self.prune_all());
        // A refused peer may be on the link by now: no notification comes of the routes that say so.
        if !self.picture.refusals().is_empty() {
            self.interface.look_soon(now);
        }
        self.checks.soon(now);
        self.audit.at = now + (now.elapsed() * AUDIT_PAUSE).clamp(AUDIT.0, AUDIT.1);
        self.repair(ops, Drift::Audited, &BTreeMap::new()).await;
        if self.observed.len() > leases::MANY {
            kernel::process::release_memory();
        }
    }
}
