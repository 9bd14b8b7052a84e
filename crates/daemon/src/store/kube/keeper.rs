//! Keeps this node's Node up to date: annotations, and the condition that lets the scheduler use it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use flannel::PerFamily;
use tokio::sync::{mpsc, watch};

use super::{Kube, NodeProblem};
use crate::ready::Guard;
use crate::store::{Claim, LeaseHandle};

/// The pause after a failure to update the Node doubles from the first to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Annotations that were written more often than the first within the second are in conflict with another program, and are
/// left alone for half of that time.
const CONFLICT: (u32, Duration) = (10, Duration::from_secs(60));

/// A failure that lasts: the next pause, its text, and the guard that shows it.
type Failure = (Duration, String, Guard);

/// Updates this node's Node when it, or what this node publishes, changes.
pub(super) struct NodeKeeper {
    kube: Kube,
    /// The uid of the Node whose condition was set: one that is created again has none. `None`: not yet.
    conditioned: Option<String>,
    failure: Option<Failure>,
    addrs: PerFamily<IpAddr>,
    /// Since when annotations were written, and how often.
    written: (Instant, u32),
}

impl NodeKeeper {
    pub(super) fn new(kube: Kube, claims: &watch::Receiver<Claim>) -> NodeKeeper {
        let conditioned = if kube.0.access.set_condition { None } else { Some(String::new()) };
        NodeKeeper { kube, conditioned, failure: None, addrs: claims.borrow().addrs, written: (Instant::now(), 0) }
    }

    pub(super) async fn run(mut self, mut claims: watch::Receiver<Claim>, held: watch::Sender<LeaseHandle>, mut lost: mpsc::Receiver<()>) {
        loop {
            let ready = &self.kube.0.ready;
            tokio::select! {
                () = ready.reached(), if self.conditioned.is_none() && self.failure.is_none() => {}
                () = self.kube.own_changed().notified() => {}
                message = lost.recv() => if message.is_none() { return },
                changed = claims.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(self.failure.as_ref().map_or(RETRY.1, |(pause, ..)| *pause)), if self.failure.is_some() => {}
            }
            let claim = claims.borrow_and_update().clone();
            if std::mem::replace(&mut self.addrs, claim.addrs) != claim.addrs {
                // Connections from the old address are dead, though no error says so.
                self.kube.api().reconnect();
                self.kube.0.moves.send_modify(|count| *count += 1);
            }
            if let Some((now, count)) = self.update(&claim).await {
                let before = held.send_replace(now);
                if now.key != before.key {
                    tracing::error!(was = %before.key, is = %now.key, "pod CIDR changed; restart the pods of this node, their addresses are no longer routed");
                }
                self.pause_conflict(count).await;
            }
        }
    }

    /// Updates the Node. Returns the lease and how many annotations were written; `None` after a failure, which is reported.
    async fn update(&mut self, claim: &Claim) -> Option<(LeaseHandle, usize)> {
        let (pause, logged, mut guard) = match self.failure.take() {
            Some((pause, logged, guard)) => (pause, logged, Some(guard)),
            None => (RETRY.0 / 2, String::new(), None),
        };
        match self.try_update(claim, &mut guard).await {
            Ok(done) => Some(done),
            Err(problem) => {
                let text = problem.to_string();
                if logged != text {
                    tracing::warn!(reason = %text, "failed to update Node; retrying, keeping routes");
                    self.kube.0.notices.warn(problem.reason(), text.clone());
                }
                let guard = guard.unwrap_or_else(|| self.kube.0.ready.guard("this node's Node"));
                guard.say(&text);
                self.failure = Some(((pause * 2).min(RETRY.1), text, guard));
                None
            }
        }
    }

    async fn try_update(&mut self, claim: &Claim, guard: &mut Option<Guard>) -> Result<(LeaseHandle, usize), NodeProblem> {
        let (now, uid, count) = self.kube.publish(claim).await?;
        *guard = None;
        let is_due = self.conditioned.as_ref().is_none_or(|before| self.kube.0.access.set_condition && *before != uid);
        if is_due && self.kube.0.ready.pending().is_empty() {
            self.kube.set_condition().await?;
            tracing::info!(node = self.kube.node(), "Node condition NetworkUnavailable set to False");
            self.conditioned = Some(uid);
        }
        Ok((now, count))
    }

    /// Slows down where another program writes the same annotations.
    async fn pause_conflict(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        tracing::info!(node = self.kube.node(), annotations = count, "Node annotations updated");
        if self.written.0.elapsed() > CONFLICT.1 {
            self.written = (Instant::now(), 0);
        }
        self.written.1 += 1;
        if self.written.1 > CONFLICT.0 {
            let pause = CONFLICT.1 / 2;
            tracing::warn!(
                times = self.written.1,
                pause_s = pause.as_secs(),
                "conflicting changes to Node annotations; is a second flanneld running on this node?"
            );
            tokio::time::sleep(pause).await;
        }
    }
}
