//! The log of a change of leases.

use flannel::LeaseKey;
use flannel::desired::Owner;
use tokio::time::Instant;

use super::Reconciler;
use super::execute::LOGGED;

impl<H> Reconciler<H> {
    /// Did the kernel refuse an object of this peer?
    fn has_failed(&self, peer: &LeaseKey) -> bool {
        let objects = self.picture.desired().part(&Owner::Lease(*peer));
        self.failures.len() > 0 && objects.iter().any(|object| self.failures.get(&object.key()).is_some())
    }

    pub(super) fn log_leases(&self, leases: &[LeaseKey], operations: usize, began: Instant) {
        let millis = began.elapsed().as_millis();
        if leases.len() > LOGGED {
            let refused = leases.iter().filter(|key| self.picture.refusals().contains_key(key)).count();
            tracing::info!(leases = leases.len(), refused, operations, millis, "leases changed");
        }
        let (mut refused, mut example) = (0, None);
        for key in leases.iter().filter(|key| **key != self.picture.own()) {
            let refusals = self.picture.refusals().get(key).map_or(&[][..], Vec::as_slice);
            for reason in refusals {
                refused += 1;
                example.get_or_insert_with(|| format!("{key}: {reason}"));
                if refused <= LOGGED {
                    tracing::warn!(peer = %key, %reason, "peer refused");
                }
            }
            if leases.len() > LOGGED {
                continue;
            }
            match self.picture.leases().get(key) {
                None => tracing::info!(peer = %key, "peer removed"),
                // A failed object was logged.
                Some(_) if self.has_failed(key) => {}
                Some(peer) if refusals.is_empty() => {
                    let via = peer.public.iter().next().map(|(_, ip)| ip.to_string()).unwrap_or_default();
                    tracing::info!(peer = %key, via, "peer added");
                }
                Some(_) => {}
            }
        }
        // One notice for all of a change: a wrong configuration has as many as there are peers.
        if let Some(example) = example {
            let more = if refused == 1 { String::new() } else { format!(", and {} more", refused - 1) };
            self.notices.warn("PeerUnreachable", format!("no route to the pods of {example}{more}"));
        }
    }
}
