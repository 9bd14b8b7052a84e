//! What the loop tells: the log of a change of leases, and `/state`.

use flannel::LeaseKey;
use flannel::desired::{Key, Owner};
use tokio::time::Instant;

use super::{LOGGED, Reconciler};
use crate::state;

impl<H> Reconciler<H> {
    pub(super) fn log(&self, leases: &[LeaseKey], operations: usize, began: Instant) {
        let millis = began.elapsed().as_millis();
        if leases.len() > LOGGED {
            let refused = leases.iter().filter(|key| self.picture.refusals().contains_key(key)).count();
            tracing::info!(leases = leases.len(), refused, operations, millis, "leases changed");
        }
        let mut unreachable = Vec::new();
        for key in leases.iter().filter(|key| **key != self.picture.own()) {
            let refusals = self.picture.refusals().get(key).map_or(&[][..], Vec::as_slice);
            for reason in refusals {
                tracing::warn!(peer = %key, %reason, "no route to this peer");
                unreachable.push(format!("{key}: {reason}"));
            }
            if leases.len() > LOGGED {
                continue;
            }
            match self.picture.leases().get(key) {
                None => tracing::info!(peer = %key, "the peer is gone"),
                Some(peer) if refusals.is_empty() => {
                    let host = peer.public.iter().next().map(|(_, ip)| ip.to_string()).unwrap_or_default();
                    tracing::info!(peer = %key, host, "the peer is there");
                }
                Some(_) => {}
            }
        }
        // One notice for all of a change: a wrong configuration has as many as there are peers.
        if let [first, rest @ ..] = unreachable.as_slice() {
            let more = if rest.is_empty() { String::new() } else { format!(", and {} more", rest.len()) };
            self.notices.tell("PeerUnreachable", format!("no route to the pods of {first}{more}"));
        }
    }

    pub(super) fn state(&self, connected: bool) -> state::State {
        let picture = &self.picture;
        let reasons = |(key, refusals): (&LeaseKey, &Vec<flannel::backend::Refusal>)| state::Refused {
            subnet: key.to_string(),
            public_ip: picture.leases().get(key).and_then(|peer| peer.public.iter().next().map(|(_, ip)| ip.to_string())),
            reasons: refusals.iter().map(ToString::to_string).collect(),
        };
        let conflict = |(key, owner): (&Key, &Owner)| state::Refused {
            subnet: match owner {
                Owner::Node | Owner::Pods => picture.own().to_string(),
                Owner::Lease(lease) => lease.to_string(),
            },
            public_ip: None,
            reasons: vec![format!("another peer claims the same {key}")],
        };
        state::State {
            version: env!("CARGO_PKG_VERSION"),
            backend: picture.config().backend.name(),
            subnet: picture.own().to_string(),
            interface: picture.node().ext.to_string(),
            public_ip: picture.node().public.iter().next().map(|(_, ip)| ip.to_string()),
            mtu: picture.backend().mtu(picture.node()),
            store: state::Store {
                connected,
                leases: picture.leases().len(),
                doubtful: picture.leases().doubtful().len(),
                complete: picture.leases().is_complete(),
            },
            peers: state::Peers {
                programmed: picture.leases().iter().filter(|(key, _)| !picture.desired().part(&Owner::Lease(**key)).is_empty()).count(),
                refused: picture.refusals().iter().map(reasons).chain(picture.desired().conflicts().map(conflict)).collect(),
            },
            objects: state::Objects {
                desired: picture.desired().len(),
                failed: self
                    .failures
                    .iter()
                    .map(|(key, failure)| state::Failed {
                        object: key.to_string(),
                        error: failure.error.to_string(),
                        attempts: failure.attempts,
                    })
                    .collect(),
                repaired: self.repairs.total(),
                overruns: self.overruns,
                fights: self.repairs.fights().map(|(key, times, by)| state::Fight { object: key.to_string(), by, times }).collect(),
            },
        }
    }
}
