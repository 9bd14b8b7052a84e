//! The loop: everything that can wake it is in `Wake`, everything it does to the kernel goes through the kernel threads, and its cost
//! follows what changed. Read this file first; each step has a file of its own.

mod audit;
mod checks;
mod conflict;
mod execute;
mod failures;
mod families;
mod interface;
mod leases;
mod notifications;
mod report;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::Context;
use flannel::diff::{Prune, diff};
use flannel::object::{Key, Kind, Lane};
use flannel::scope::Scope;
use flannel::store_trust::StoreTrust;
use flannel::wireguard::PublicKey;
use flannel::{Observed, Op, Outcome, Picture, StoreEvent};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use kernel::KernelEvent;
use kernel::netlink::NetlinkError;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use self::conflict::Repairs;
use self::failures::Failures;
use self::interface::ExternalInterface;
use crate::facts::Facts;
use crate::host::{Host, Notifications};
use crate::notice::Notices;
use crate::ready::Guard;
use crate::store::{Claim, Following, LeaseHandle, StoreAbout};
use crate::view::View;

/// How long the objects that wait for a child process or for a lock may delay a start.
const SLOW_START: Duration = Duration::from_secs(10);

/// What wakes the loop.
enum Wake {
    /// The store sent events.
    Leases(Vec<StoreEvent>),
    /// This node's lease is another one now, or the same again.
    Own(LeaseHandle),
    /// The store is followed now, or is not any more; or another host wrote this node's lease.
    Following,
    /// The kernel sent notifications.
    Kernel(Vec<KernelEvent>),
    /// Work of the slow lane is done.
    Slow(SlowDone),
    /// A failed object is due, an audit is, or another deadline.
    Timer,
    /// A task that the loop depends on has ended: the daemon stops.
    Stop,
}

/// Finished work of the slow lane.
enum SlowDone {
    /// Operations with their outcomes.
    Applied(Vec<(Op, Outcome)>),
    /// What was read at these keys.
    Observed(Vec<Key>, Result<Observed, NetlinkError>),
    /// The facts for the checks.
    Inspected(Box<checks::Inspected>),
}

type SlowWork = Pin<Box<dyn Future<Output = SlowDone>>>;

/// Where the loop's input comes from.
#[derive(Debug)]
pub struct Inputs {
    /// Events of the store.
    pub events: mpsc::Receiver<Vec<StoreEvent>>,
    /// The lease that the keeper holds.
    pub held: watch::Receiver<LeaseHandle>,
    /// Tells the keeper that it is lost.
    pub lost: mpsc::Sender<()>,
    /// Tells the keeper what this node publishes now.
    pub claim: watch::Sender<Claim>,
    /// Whether the store is being followed, and who writes this node's lease.
    pub following: watch::Receiver<Following>,
}

/// What the loop begins with.
pub struct Start<H> {
    /// The desired state of this node, without peers.
    pub picture: Picture,
    /// The way to the kernel.
    pub host: H,
    /// How this host is looked at again when its interface changes.
    pub facts: Facts,
    /// How often rules are read of which the kernel sends no notifications.
    pub resync: Duration,
    /// May a Go flanneld have run on this host?
    pub adopt: bool,
    /// Has the store forgotten the lease that this node had before?
    pub has_forgotten: bool,
    /// Held until this node's devices, rules and subnet file are in place.
    pub starting: Guard,
    /// Held until the first complete list of leases is in the kernel.
    pub syncing: Guard,
    /// Where operators are notified.
    pub notices: Notices,
    /// Where the view is published.
    pub view: watch::Sender<Arc<View>>,
    /// What is known about the store.
    pub about: Box<dyn Fn() -> StoreAbout>,
}

/// Keeps the kernel as the picture wants it.
pub struct Reconciler<H> {
    picture: Picture,
    observed: Observed,
    host: H,
    notifications: Notifications,
    /// Whose turn is it, the kernel's or the store's?
    kernel_first: bool,
    failures: Failures,
    repairs: Repairs,
    interface: ExternalInterface,
    /// Work of the slow lane that is under way, and the keys that it may change.
    slow: FuturesUnordered<SlowWork>,
    busy: BTreeSet<Key>,
    audit: audit::Schedule,
    checks: checks::Checks,
    /// The clock's zero for [`StoreTrust`].
    epoch: Instant,
    trust: StoreTrust,
    own: leases::OwnLease,
    /// Families that do not work on this node, and when that is looked at again without an event.
    down: Vec<families::Down>,
    recheck: Option<Instant>,
    /// Are a Go flanneld's plain routes taken over? Until it is known which of them are superfluous.
    adopting: bool,
    /// With WireGuard, the last handshake of each peer that had one, as of the last audit.
    handshakes: BTreeMap<PublicKey, Instant>,
    /// How often notifications of the kernel were lost.
    overruns: u64,
    /// When memory is given back that a long list left half used.
    tidy: Option<Instant>,
    starting: Option<Guard>,
    syncing: Option<Guard>,
    notices: Notices,
    publisher: view::Publisher,
    about: Box<dyn Fn() -> StoreAbout>,
    /// When the last event of the store came.
    last_event: Option<Instant>,
    /// The last repairs, for the view.
    repaired: Arc<view::Repairs>,
}

impl<H: Host + 'static> Reconciler<H> {
    /// Reads the kernel and applies this node's own objects: devices, addresses, rules. Notifications are subscribed to first, so that
    /// no change falls in between. An object that the kernel refuses is tried again by the loop.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub async fn start(start: Start<H>) -> anyhow::Result<Reconciler<H>> {
        let Start { picture, host, facts, resync, adopt, has_forgotten, starting, syncing, notices, view, about } = start;
        let scope = picture.scope();
        let notifications = host.watch(scope.clone(), picture.node().ext).context("cannot subscribe to the kernel's notifications")?;
        let reading = if adopt { picture.scope_with_adoption() } else { scope.clone() };
        let slow = host.observe(scope, Lane::Slow);
        let mut observed = host.observe(reading, Lane::Fast).await.context("cannot read the kernel's state")?;
        observed.extend(slow.await.context("cannot read the kernel's state")?.into_objects());
        let epoch = Instant::now();
        let mut reconciler = Reconciler {
            audit: audit::Schedule::new(&picture, resync),
            picture,
            observed,
            host,
            notifications,
            kernel_first: false,
            failures: Failures::default(),
            repairs: Repairs::default(),
            checks: checks::Checks::new(facts.follows_default_route()),
            interface: ExternalInterface::new(facts),
            slow: FuturesUnordered::new(),
            busy: BTreeSet::new(),
            epoch,
            trust: StoreTrust::new(Duration::ZERO, has_forgotten),
            own: leases::OwnLease::default(),
            down: Vec::new(),
            recheck: None,
            adopting: adopt,
            handshakes: BTreeMap::new(),
            overruns: 0,
            tidy: None,
            starting: Some(starting),
            syncing: Some(syncing),
            notices,
            publisher: view::Publisher::new(view),
            about,
            last_event: None,
            repaired: Arc::default(),
        };
        if has_forgotten {
            reconciler.report_lost_leases(None);
        }
        reconciler.picture.keep_bridge(&reconciler.observed);
        let ops = diff(reconciler.picture.desired(), &reconciler.observed, Prune::No);
        reconciler.execute(ops).await;
        // Rules of iptables are in place before pods are added, where its programs are quick.
        let deadline = Instant::now() + SLOW_START;
        while let Ok(Some(done)) = tokio::time::timeout_at(deadline, reconciler.slow.next()).await {
            reconciler.on_slow(done).await;
        }
        reconciler.offer_families().await;
        reconciler.publish_view(false);
        Ok(reconciler)
    }

    /// Runs until a sender of `inputs` is gone.
    ///
    /// # Errors
    /// When notifications cannot be read any more: to go on without them would be worse than to be restarted.
    pub async fn run(mut self, mut inputs: Inputs) -> anyhow::Result<()> {
        loop {
            match self.wake(&mut inputs).await? {
                Wake::Leases(events) => {
                    self.last_event = Some(Instant::now());
                    self.on_leases(events, &mut inputs).await;
                }
                Wake::Own(held) => self.on_own(held).await,
                Wake::Following => self.on_following(&mut inputs),
                Wake::Kernel(events) => self.on_kernel(events).await,
                Wake::Slow(done) => self.on_slow(done).await,
                Wake::Timer => self.on_timer(&inputs).await,
                Wake::Stop => return Ok(()),
            }
            self.offer_families().await;
            self.publish_view(inputs.following.borrow().connected);
        }
    }

    async fn wake(&mut self, inputs: &mut Inputs) -> anyhow::Result<Wake> {
        let trust = self.trust.deadline().map(|at| self.epoch + at);
        let others = [self.failures.next(&self.busy), self.audit.resync_at(), self.interface.due(), self.own.check_at, trust, self.tidy];
        let others = others.into_iter().chain([self.publisher.due(), self.recheck, self.repairs.settles_at(), self.checks.due()]);
        let timer = others.flatten().fold(self.audit.at, Instant::min);
        // Store and kernel are served in turn, so that a flood of the one does not keep the other waiting.
        self.kernel_first = !self.kernel_first;
        let (kernel_first, kernel, events) = (self.kernel_first, &mut self.notifications, &mut inputs.events);
        let input = std::future::poll_fn(|context| {
            if kernel_first && let Poll::Ready(news) = kernel.poll_recv(context) {
                return Poll::Ready(kernel_wake(news));
            }
            if let Poll::Ready(events) = events.poll_recv(context) {
                return Poll::Ready(Ok(events.map_or(Wake::Stop, Wake::Leases)));
            }
            kernel.poll_recv(context).map(kernel_wake)
        });
        let wake = tokio::select! {
            // None of the first four can come in a flood.
            biased;
            changed = inputs.held.changed() => match changed {
                Ok(()) => Wake::Own(*inputs.held.borrow_and_update()),
                Err(_) => Wake::Stop,
            },
            Ok(()) = inputs.following.changed() => Wake::Following,
            Some(done) = self.slow.next(), if !self.slow.is_empty() => Wake::Slow(done),
            () = tokio::time::sleep_until(timer) => Wake::Timer,
            wake = input => wake?,
        };
        Ok(wake)
    }

    async fn on_slow(&mut self, done: SlowDone) {
        let (keys, reason) = match done {
            SlowDone::Applied(outcomes) => {
                let keys: Vec<Key> = outcomes.iter().map(|(op, _)| op.object().key()).collect();
                self.busy.retain(|key| !keys.contains(key));
                self.conclude(outcomes);
                (keys, None)
            }
            SlowDone::Observed(keys, Ok(now)) => {
                keys.iter().for_each(|key| self.observed.remove(key));
                now.iter().for_each(|(_, object)| self.observed.insert(object.clone()));
                (keys.into_iter().chain(now.iter().map(|(key, _)| key.clone())).collect(), Some(execute::Drift::Notified))
            }
            SlowDone::Inspected(inspected) => return self.on_inspected(*inspected),
            SlowDone::Observed(_, Err(error)) => return tracing::warn!(%error, "cannot read object; the next audit reads it again"),
        };
        // It may be wanted otherwise by now.
        let keys: BTreeSet<Key> = keys.into_iter().collect();
        let ops = self.compare(&keys);
        match reason {
            Some(drift) => self.repair(ops, drift, &BTreeMap::new()).await,
            None => self.execute(ops).await,
        }
    }

    /// Reads what of `scope` is in the slow lane; the result comes as [`Wake::Slow`]. `keys` are those of which nothing may be found.
    fn observe_slow(&mut self, scope: Scope, keys: Vec<Key>) {
        let read = self.host.observe(scope, Lane::Slow);
        self.slow.push(Box::pin(async move { SlowDone::Observed(keys, read.await) }));
    }

    /// May an object that a change concerns be deleted, if no owner wants it?
    fn prune(&self) -> Prune {
        if self.picture.leases().is_complete() { Prune::Yes } else { Prune::No }
    }

    /// May every object be deleted that no owner wants?
    fn prune_all(&self) -> Prune {
        if self.trust.believes_lists() { self.prune() } else { Prune::No }
    }
}

fn kernel_wake(news: Option<Result<Vec<KernelEvent>, NetlinkError>>) -> anyhow::Result<Wake> {
    let events = news.context("the thread that listens to the kernel ended")?;
    Ok(Wake::Kernel(events.context("cannot read the kernel's notifications any more")?))
}

/// Keys of the slow lane among those of the desired or the observed state.
fn slow_keys(observed: &Observed) -> Vec<Key> {
    let is_slow = |kind: Kind| kind.lane() == Lane::Slow;
    observed.iter().filter(|(_, object)| is_slow(object.kind())).map(|(key, _)| key.clone()).collect()
}
