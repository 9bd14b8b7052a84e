//! Builds and publishes the view.

use std::sync::Arc;
use std::time::Duration;

use flannel::backend::Refusal;
use flannel::check::Finding;
use flannel::desired::Owner;
use flannel::object::{Key, Object};
use flannel::{LeaseKey, Observed};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Reconciler;
use crate::host::Host;
use crate::store::StoreAbout;
pub(super) use crate::view::Repairs;
use crate::view::{Conflicted, Failed, Node, Objects, PeerState, PeerView, Store, View};

/// A view is built no more often than this: its cost follows the cluster, that of a change must not.
const EVERY: Duration = Duration::from_millis(50);

/// Publishes views.
#[derive(Debug)]
pub(super) struct Publisher {
    view: watch::Sender<Arc<View>>,
    last: Option<Instant>,
    /// Has anything happened since?
    is_stale: bool,
}

impl Publisher {
    /// Publishes by this channel.
    pub(super) fn new(view: watch::Sender<Arc<View>>) -> Publisher {
        Publisher { view, last: None, is_stale: true }
    }

    /// When a view is due that was held back.
    pub(super) fn due(&self) -> Option<Instant> {
        self.last.filter(|_| self.is_stale).map(|last| last + EVERY)
    }
}

impl<H: Host + 'static> Reconciler<H> {
    /// Publishes what is known now, unless a view was published a moment ago: then it follows soon.
    pub(super) fn publish_view(&mut self, connected: bool) {
        let now = Instant::now();
        self.publisher.is_stale = self.publisher.last.is_some_and(|last| now < last + EVERY);
        if self.publisher.is_stale {
            return;
        }
        self.publisher.last = Some(now);
        let view = self.view(connected);
        self.publisher.view.send_if_modified(|published| {
            let is_new = **published != view;
            if is_new {
                *published = Arc::new(view);
            }
            is_new
        });
    }

    fn view(&self, connected: bool) -> View {
        let picture = &self.picture;
        let leases = picture.leases();
        let (vni, port) = picture.config().backend.tunnel();
        let StoreAbout { endpoint, renewal } = (self.about)();
        let forwarding = self.own_objects().iter().filter(|object| matches!(object, Object::Sysctl(sysctl) if sysctl.is_forwarding()));
        let is_as_wanted = |object: &Object| self.observed.get(&object.key()) == Some(object);
        let is_forwarding = forwarding.into_iter().all(is_as_wanted);
        View {
            node: Some(Node {
                backend: picture.config().backend.name(),
                subnet: picture.own(),
                vni,
                port,
                rules: picture.rules(),
                is_forwarding,
                interface: picture.node().ext,
                addresses: picture.node().addrs,
                published: picture.node().public,
                mtu: picture.mtu(),
                path_mtus: picture.path_mtus(),
                probe: picture.config().backend.probe_point(),
            }),
            store: Store {
                connected,
                leases: leases.len(),
                doubtful: leases.doubtful().len(),
                complete: leases.is_complete(),
                endpoint,
                last_event: self.last_event,
                renewal,
            },
            peers: self.peers(),
            objects: Objects {
                desired: picture.desired().len(),
                failed: self.failures.iter().map(|(key, failure)| failed(key, failure)).collect(),
                repaired: self.repairs.total(),
                repairs: Arc::clone(&self.repaired),
                overruns: self.overruns,
                conflicts: self.repairs.conflicts().map(|(key, times, by)| Conflicted { object: key.to_string(), by, times }).collect(),
            },
            drops: matches!(picture.config().backend, flannel::Backend::Udp(_)).then(|| self.host.drops()),
            findings: self.findings(),
        }
    }

    fn peers(&self) -> Vec<PeerView> {
        let (picture, leases) = (&self.picture, self.picture.leases());
        let has_failures = self.failures.len() > 0;
        let peers = leases.iter().filter(|(key, _)| **key != picture.own());
        let state = |key| {
            let owner = Owner::Lease(key);
            let failed = || picture.desired().part(&owner).iter().map(flannel::Object::key).find(|key| self.failures.get(key).is_some());
            if let Some(refusals) = picture.refusals().get(&key) {
                PeerState::Refused(refusals.iter().map(ToString::to_string).collect())
            } else if let Some(object) = has_failures.then(failed).flatten() {
                PeerState::Failed(object)
            } else if leases.doubtful().contains(&key) {
                PeerState::Doubtful
            } else {
                PeerState::Programmed
            }
        };
        peers
            .map(|(key, peer)| PeerView { subnet: *key, public: peer.public, state: state(*key), handshake: self.handshake(*key) })
            .collect()
    }

    /// Notes when WireGuard's peers had their last handshakes, of what was read now.
    pub(super) fn note_handshakes(&mut self, observed: &Observed, now: Instant) {
        let ages = observed.iter().filter_map(|(_, object)| match object {
            Object::WgPeer(peer) => Some((peer.public_key, now.checked_sub(Duration::from_secs(peer.handshake?))?)),
            _ => None,
        });
        self.handshakes = ages.collect();
    }

    /// The last handshake with a peer: with two devices the later one.
    fn handshake(&self, key: LeaseKey) -> Option<Instant> {
        let peers = self.picture.desired().part(&Owner::Lease(key)).iter().filter_map(|object| match object {
            Object::WgPeer(peer) => self.handshakes.get(&peer.public_key).copied(),
            _ => None,
        });
        peers.max()
    }

    /// The problems that the loop knows itself, and those that the checks found.
    fn findings(&self) -> Vec<Finding> {
        let note = |code, text| Finding::warning(code, text, "");
        // With one family that works the node works.
        let all_down = self.families_down().count() == self.picture.config().networks.iter().count();
        let family = if all_down { Finding::error } else { Finding::warning };
        let down =
            self.families_down().map(|(name, reason)| family("family-down", format!("{name} does not work on this node: {reason}"), ""));
        let problem = Some(self.interface.problem()).filter(|problem| !problem.is_empty());
        let interface = problem.map(|problem| note("interface", format!("{}: {problem}", self.picture.node().ext)));
        let contested = self.own.is_contested().then(|| Finding::error("address-conflict", self.contested_text(), ""));
        // It may be a lease that this host had before, which ends by itself: so the node is ready all the same.
        let is_double = |refusal: &Refusal| matches!(refusal, Refusal::OwnPublicIp(_));
        let double =
            self.picture.refusals().iter().find_map(|(peer, refusals)| Some((peer, refusals.iter().find(|refusal| is_double(refusal))?)));
        let double = double.map(|(peer, refusal)| note("address-twice", format!("lease {peer}: {refusal}")));
        let found = self.checks.findings().iter().cloned();
        let mut all: Vec<Finding> = down.chain(interface).chain(contested).chain(double).chain(found).collect();
        all.sort();
        all
    }
}

fn failed(key: &Key, failure: &super::failures::Failure) -> Failed {
    Failed { object: key.to_string(), error: failure.error.to_string(), attempts: failure.attempts }
}
