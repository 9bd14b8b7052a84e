//! The external interface: its new address or MTU is followed without a restart, and so is a VTEP's new link-layer address.

use std::collections::BTreeSet;
use std::time::Duration;

use flannel::object::Key;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Reconciler;
use crate::facts::{Facts, list};
use crate::host::Host;
use crate::store::Claim;

/// How long after a link's change the kernel is read: what follows from it comes in a burst.
pub(super) const SETTLE: Duration = Duration::from_millis(5);
/// An interface with a problem is looked at again after the first, doubling up to the second: it may get its address back,
/// or a default route, of which no notification comes.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// A VTEP that was given another link-layer address is followed no more often than this: each time all peers get an event.
const FOLLOW_MAC: Duration = Duration::from_secs(5);

/// What is known of the external interface.
#[derive(Debug)]
pub(super) struct ExternalInterface {
    facts: Facts,
    /// When it is looked at next.
    at: Option<Instant>,
    /// What was wrong at the last look; empty if nothing was.
    problem: String,
    wait: Duration,
    /// When a VTEP's new link-layer address was last followed.
    followed: Option<Instant>,
}

impl ExternalInterface {
    /// At the start: it may have changed while the lease was waited for.
    pub(super) fn new(facts: Facts) -> ExternalInterface {
        ExternalInterface { facts, at: Some(Instant::now()), problem: String::new(), wait: LOOK_AGAIN.0, followed: None }
    }

    /// When it is looked at next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.at
    }

    /// It changed: it is looked at once the kernel has settled.
    pub(super) fn changed(&mut self) {
        (self.at, self.wait) = (Some(Instant::now() + SETTLE), LOOK_AGAIN.0);
    }

    /// It is looked at now, if no look is planned.
    pub(super) fn look_soon(&mut self, now: Instant) {
        self.at.get_or_insert(now);
    }

    /// What is wrong with it; empty if nothing is.
    pub(super) fn problem(&self) -> &str {
        &self.problem
    }
}

impl<H: Host + 'static> Reconciler<H> {
    /// Looks at the external interface again. Its new address or MTU is followed; that it has none for a moment, or that another one
    /// would be chosen now, changes nothing.
    pub(super) async fn look_at_interface(&mut self, claim: &watch::Sender<Claim>) {
        let current = self.picture.node().clone();
        // A family that this node began without is added when it has an address; one that it has is not given up for a moment's loss.
        let partial = self.picture.config().networks.iter().any(|(family, _)| current.addrs.get(family).is_none());
        let problem = match self.interface.facts.node(&self.host, self.picture.config(), current.addrs, partial).await {
            Ok(node) if node == current => String::new(),
            Ok(node) if node.ext == current.ext => {
                tracing::info!(
                    interface = %node.ext, before = %list(&current.addrs), addresses = %list(&node.addrs), published = %list(&node.public),
                    mtu = node.mtu, "interface changed; lease and devices follow"
                );
                let keys: BTreeSet<Key> = self.picture.set_node(node).into_iter().collect();
                let ops = self.compare(&keys);
                self.execute(ops).await;
                self.publish_claim(claim);
                String::new()
            }
            Ok(node) => format!("{} would be chosen now: restart flanneld to move there", node.ext),
            Err(error) => error.to_string(),
        };
        let is_same = problem == self.interface.problem;
        if !is_same && !problem.is_empty() {
            tracing::warn!(interface = %current.ext, problem, "interface problem; devices and routes stay");
            self.notices.warn("InterfaceChanged", format!("{}: {problem}; devices and routes stay", current.ext));
        }
        let wait = if is_same { (self.interface.wait * 2).min(LOOK_AGAIN.1) } else { LOOK_AGAIN.0 };
        self.interface.at = (!problem.is_empty()).then(|| Instant::now() + wait);
        (self.interface.problem, self.interface.wait) = (problem, wait);
    }

    /// Tells the keeper what this node publishes now.
    fn publish_claim(&self, claim: &watch::Sender<Claim>) {
        let (peer, addrs) = (self.picture.own_peer(), self.picture.node().addrs);
        claim.send_if_modified(|claim| {
            let is_new = (&claim.peer, &claim.addrs) != (&peer, &addrs);
            (claim.peer, claim.addrs) = (peer, addrs);
            is_new
        });
    }

    /// A VTEP that systemd or an operator gave another link-layer address keeps it, and the lease says so. One that is given another all
    /// the time gets back the one that peers know.
    pub(super) fn follow_macs(&mut self, claim: &watch::Sender<Claim>) {
        let Some(macs) = self.picture.foreign_macs(&self.observed) else { return };
        if self.interface.followed.is_some_and(|at| at.elapsed() < FOLLOW_MAC) {
            return;
        }
        self.interface.followed = Some(Instant::now());
        let now: Vec<String> = macs.iter().map(|(_, mac)| mac.to_string()).collect();
        tracing::info!(mac = now.join(","), "VTEP MAC changed by another program; publishing it");
        self.picture.set_macs(macs);
        self.publish_claim(claim);
    }
}
