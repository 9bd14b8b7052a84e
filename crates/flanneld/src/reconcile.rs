//! The loop: everything that can wake it is in `Wake`, everything it does to the kernel goes through one thread, and
//! what it costs follows what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context;
use flannel::alloc::is_mine;
use flannel::desired::{Key, Owner, Scope};
use flannel::diff::{Prune, diff, diff_keys};
use flannel::traffic::iptables::Variant;
use flannel::{Family, LeaseKey, Object, Observed, Op, OpError, Picture, StoreEvent};
use kernel::{Changed, Monitor};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::facts::{Facts, list};
use crate::kernel_thread::{KernelThread, News, listen};
use crate::notice::Notices;
use crate::ready::Guard;
use crate::state;
use crate::store::{Claim, Held};
use crate::subnet_file::SubnetFile;

/// How often the whole kernel is read as the audit of our memory of it. Notifications tell sooner of nearly everything;
/// this catches what the kernel does not announce.
const AUDIT: Duration = Duration::from_secs(60);
/// How long after a link's change the kernel is read: what follows from it comes in a burst.
const SETTLE: Duration = Duration::from_millis(20);
/// A failed object is tried again after the first, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// An object that was put right more often than the first within the second is fought over.
const FIGHT: (u32, Duration) = (20, Duration::from_secs(10));
/// Leases that change together up to this number are logged one by one.
const LOGGED: usize = 8;
/// A list that changes more leases than this has left more memory behind than is needed again.
const MANY: usize = 256;

/// What wakes the loop.
enum Wake {
    /// The store told something.
    Leases(Vec<StoreEvent>),
    /// This node's lease is another one now, or the same again.
    Own(Held),
    /// The kernel told of changes.
    Kernel(Vec<Changed>),
    /// A failed object is due, or a full read is.
    Timer,
    /// Somebody wants to know the state.
    Ask(oneshot::Sender<state::State>),
    /// The other side is gone: the daemon stops.
    Stop,
}

/// An object that the kernel refused.
#[derive(Debug, Clone)]
struct Failure {
    error: OpError,
    attempts: u32,
    due: Instant,
}

/// Where the loop's input comes from.
#[derive(Debug)]
pub struct Inputs {
    /// Events of the store.
    pub events: mpsc::Receiver<Vec<StoreEvent>>,
    /// The lease that the keeper holds.
    pub held: watch::Receiver<Held>,
    /// To tell the keeper that it is lost.
    pub lost: mpsc::Sender<()>,
    /// To tell the keeper what this node publishes now.
    pub claim: watch::Sender<Claim>,
    /// Whether the store is being followed.
    pub connected: watch::Receiver<bool>,
    /// Questions after the state.
    pub asks: mpsc::Receiver<oneshot::Sender<state::State>>,
}

/// What the loop begins with.
#[derive(Debug)]
pub struct Start {
    /// What this node wants, without peers.
    pub picture: Picture,
    /// The way to the kernel.
    pub kernel: KernelThread,
    /// How this host is looked at again when its interface changes.
    pub facts: Facts,
    /// The file for the plugins.
    pub subnet_file: SubnetFile,
    /// How often rules are looked at that the kernel does not announce.
    pub resync: Duration,
    /// May a Go flanneld have run on this host?
    pub adopt: bool,
    /// Held until the first complete list of leases is in the kernel.
    pub syncing: Guard,
    /// Where an operator is told.
    pub notices: Notices,
}

/// Keeps the kernel as the picture wants it.
#[derive(Debug)]
pub struct Reconciler {
    picture: Picture,
    facts: Facts,
    /// When the external interface is looked at next, what was said of it last, and the wait before the next look.
    interface: (Option<Instant>, String, Duration),
    observed: Observed,
    kernel: KernelThread,
    news: News,
    failures: BTreeMap<Key, Failure>,
    /// When the kernel is to be read whole.
    read_at: Instant,
    subnet_file: SubnetFile,
    /// Are a Go flanneld's plain routes taken over? Until it is known which of them are superfluous.
    adopting: bool,
    /// When the rules that the kernel does not announce are looked at next, and how often: those of iptables-legacy.
    resync: Option<(Instant, Duration)>,
    /// Does the file name a subnet that is not this node's any more?
    file_is_stale: bool,
    /// What was put right lately, since when, and how often: somebody may be undoing it.
    repaired: BTreeMap<Key, (Instant, u32)>,
    /// Until the first complete list of leases is in the kernel.
    syncing: Option<Guard>,
    notices: Notices,
}

impl Reconciler {
    /// Reads the kernel and puts this node's own objects there: devices, addresses, rules. Notifications are
    /// subscribed to first, so that no change falls in between.
    ///
    /// # Errors
    /// When the kernel cannot be read, or refuses one of the node's own objects.
    pub async fn start(start: Start) -> anyhow::Result<Reconciler> {
        let Start { picture, kernel, facts, subnet_file, resync, adopt, syncing, notices } = start;
        let scope = picture.scope();
        let monitor = Monitor::open(scope.clone(), picture.node().ext, kernel.port());
        let news = monitor.and_then(listen).context("cannot subscribe to the kernel's changes")?;
        let reading = if adopt { picture.scope_with_adoption() } else { scope };
        let observed = kernel.observe(reading).await.context("cannot read the kernel's state")?;
        let mut reconciler = Reconciler {
            picture,
            facts,
            // It may have changed while the lease was waited for.
            interface: (Some(Instant::now()), String::new(), RETRY.0),
            observed,
            kernel,
            news,
            failures: BTreeMap::new(),
            read_at: Instant::now() + AUDIT,
            subnet_file,
            adopting: adopt,
            resync: None,
            file_is_stale: false,
            repaired: BTreeMap::new(),
            syncing: Some(syncing),
            notices,
        };
        reconciler.execute(diff(reconciler.picture.desired(), &reconciler.observed, Prune::No)).await;
        let legacy = reconciler.picture.desired().iter().any(|(key, _)| matches!(key, Key::Iptables(_, Variant::Legacy)));
        reconciler.resync = legacy.then(|| (Instant::now() + resync, resync));
        // A sysctl that cannot be written (a read-only /proc/sys), and rules that iptables does not take now (another holds
        // its lock), are shown and tried again, but stop nothing.
        let can_wait = |key: &&Key| matches!(key, Key::Sysctl(_) | Key::Iptables(..));
        let own = reconciler.picture.desired().part(&Owner::Node).iter().filter(|key| !can_wait(key));
        let refused: Vec<String> = own.filter_map(|key| reconciler.failures.get(key)).map(|failure| failure.error.to_string()).collect();
        anyhow::ensure!(refused.is_empty(), "the kernel refuses what this node needs: {}", refused.join("; "));
        reconciler.subnet_file.write(&reconciler.picture)?;
        Ok(reconciler)
    }

    /// Runs until a sender of `inputs` is gone.
    ///
    /// # Errors
    /// When notifications cannot be read any more: to go on blind would be worse than to be restarted.
    pub async fn run(mut self, mut inputs: Inputs) -> anyhow::Result<()> {
        loop {
            match self.wake(&mut inputs).await? {
                Wake::Leases(events) => self.on_leases(events, &mut inputs).await,
                Wake::Own(held) => self.on_own(held).await,
                Wake::Kernel(changes) => self.on_kernel(changes).await,
                Wake::Timer => self.on_timer(&inputs.claim).await,
                Wake::Ask(reply) => {
                    let state = self.state(*inputs.connected.borrow());
                    // Who asked may have gone away.
                    let _ = reply.send(state);
                }
                Wake::Stop => return Ok(()),
            }
        }
    }

    async fn wake(&mut self, inputs: &mut Inputs) -> anyhow::Result<Wake> {
        let retry = self.failures.values().map(|failure| failure.due).min();
        let file = self.file_is_stale.then(|| Instant::now() + RETRY.0);
        let resync = self.resync.map(|(at, _)| at);
        let timer = retry.into_iter().chain(file).chain(resync).chain(self.interface.0).fold(self.read_at, Instant::min);
        let wake = tokio::select! {
            events = inputs.events.recv() => events.map_or(Wake::Stop, Wake::Leases),
            changed = inputs.held.changed() => match changed {
                Ok(()) => Wake::Own(*inputs.held.borrow_and_update()),
                Err(_) => Wake::Stop,
            },
            news = self.news.recv() => {
                let heard = news.context("the thread that listens to the kernel ended")?;
                Wake::Kernel(heard.context("cannot hear of the kernel's changes any more")?)
            }
            () = tokio::time::sleep_until(timer) => Wake::Timer,
            ask = inputs.asks.recv() => ask.map_or(Wake::Stop, Wake::Ask),
        };
        Ok(wake)
    }

    async fn on_leases(&mut self, events: Vec<StoreEvent>, inputs: &mut Inputs) {
        let began = Instant::now();
        let mut keys = BTreeSet::new();
        let mut leases = BTreeSet::new();
        let was_complete = self.picture.leases().is_complete();
        let mut listed = false;
        let mut batch = events;
        // What waits already is part of this change.
        loop {
            for event in batch {
                listed |= event == StoreEvent::InitDone;
                let touched = self.picture.fold(event);
                keys.extend(touched.keys);
                leases.extend(touched.leases);
            }
            match inputs.events.try_recv() {
                Ok(more) => batch = more,
                Err(_) => break,
            }
        }
        // What failed with what a lease said before may succeed with what it says now.
        for key in &keys {
            if let Some(failure) = self.failures.get_mut(key) {
                failure.due = began;
            }
        }
        let (own, complete) = (self.picture.own(), self.picture.leases().is_complete());
        let published = inputs.held.borrow().published;
        let is_held = self.picture.leases().get(&own).is_some_and(|peer| is_mine(&peer.public, &published));
        if (leases.contains(&own) || listed) && complete && !is_held {
            // A full channel means that it has been told.
            let _ = inputs.lost.try_send(());
        }
        let ops = match complete && !was_complete {
            // Only now is it known what of the past is superfluous.
            true => diff(self.picture.desired(), &self.observed, Prune::Yes),
            false => diff_keys(self.picture.desired(), &self.observed, &keys, self.prune()),
        };
        let count = ops.len();
        self.adopting &= !complete;
        self.execute(ops).await;
        self.log(&leases, count, began);
        if listed && leases.len() > MANY {
            kernel::process::release_memory();
        }
        if complete && let Some(guard) = self.syncing.take() {
            let (leases, refused, failed) = (self.picture.leases().len(), self.picture.refusals().len(), self.failures.len());
            tracing::info!(leases, refused, failed, "the store's list of leases is complete and was put into the kernel");
            drop(guard);
        }
    }

    async fn on_own(&mut self, held: Held) {
        if held.key == self.picture.own() {
            return;
        }
        let keys = self.picture.set_own(held.key).into_iter().collect();
        let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
        self.execute(ops).await;
        self.write_file();
    }

    fn write_file(&mut self) {
        let written = self.subnet_file.write(&self.picture);
        if let Err(error) = &written
            && !self.file_is_stale
        {
            tracing::error!(%error, "cannot tell the CNI plugins of the new subnet; trying again each second");
        }
        self.file_is_stale = written.is_err();
    }

    async fn on_kernel(&mut self, changes: Vec<Changed>) {
        let mut keys = BTreeSet::new();
        for change in changes {
            match change {
                Changed::Set(object) => {
                    keys.insert(object.key());
                    self.observed.insert(object);
                }
                Changed::Gone(key) => {
                    self.observed.remove(&key);
                    keys.insert(key);
                }
                Changed::Rules(family) => {
                    let scope = Scope { rulesets: vec![family], ..Scope::default() };
                    self.look(scope, &[Key::Ruleset(family)], &mut keys).await;
                }
                Changed::Iptables(family) => {
                    let scope = Scope { iptables: vec![family], ..Scope::default() };
                    self.look(scope, &Variant::ALL.map(|variant| Key::Iptables(family, variant)), &mut keys).await;
                }
                Changed::Link(_) | Changed::Everything => {
                    if change == Changed::Everything || change == Changed::Link(self.picture.node().ext) {
                        self.interface.0 = Some(Instant::now() + SETTLE);
                    }
                    self.read_at = self.read_at.min(Instant::now() + SETTLE);
                    // What failed for want of the link need not fail any more.
                    self.failures.values_mut().for_each(|failure| failure.due = Instant::now());
                }
            }
        }
        let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
        self.repair(ops, "somebody changed").await;
    }

    /// Reads a part of the traffic rules anew and adds its keys to those to compare.
    async fn look(&mut self, scope: Scope, at: &[Key], keys: &mut BTreeSet<Key>) {
        match self.kernel.observe(scope).await {
            Ok(now) => {
                at.iter().for_each(|key| self.observed.remove(key));
                now.iter().for_each(|(_, object)| self.observed.insert(object.clone()));
                keys.extend(at.iter().cloned());
            }
            Err(error) => tracing::warn!(%error, "cannot read the traffic rules; the next audit will"),
        }
    }

    /// Looks at the external interface again. Its new address or MTU is followed; that it has none for a moment, or that
    /// another one would be chosen now, changes nothing.
    async fn look_at_interface(&mut self, claim: &watch::Sender<Claim>) {
        let current = self.picture.node().clone();
        let problem = match self.facts.node(&self.kernel, self.picture.config()).await {
            Ok(node) if node == current => String::new(),
            Ok(node) if node.ext == current.ext => {
                tracing::info!(interface = %node.ext, was = %list(&current.addrs), is = %list(&node.addrs), published = %list(&node.public), mtu = node.mtu, "the interface has changed; this node's lease and devices follow");
                let keys = self.picture.set_node(node).into_iter().collect();
                let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
                self.execute(ops).await;
                self.write_file();
                let (peer, addrs) = (self.picture.own_peer(), self.picture.node().addrs);
                claim.send_if_modified(|claim| {
                    let is_new = (&claim.peer, &claim.addrs) != (&peer, &addrs);
                    (claim.peer, claim.addrs) = (peer, addrs);
                    is_new
                });
                String::new()
            }
            Ok(node) => format!("now {} would be chosen: restart flanneld to move there", node.ext),
            Err(error) => format!("{error:#}"),
        };
        if problem != self.interface.1 && !problem.is_empty() {
            tracing::warn!(interface = %current.ext, %problem, "the interface is not as it was; devices and routes stay");
            self.notices.tell("InterfaceChanged", format!("{}: {problem}; devices and routes stay", current.ext));
        }
        // It may get its address back, or a default route, of which nothing is heard.
        let wait = if problem == self.interface.1 { (self.interface.2 * 2).min(RETRY.1) } else { RETRY.0 };
        self.interface = (if problem.is_empty() { None } else { Some(Instant::now() + wait) }, problem, wait);
    }

    async fn on_timer(&mut self, claim: &watch::Sender<Claim>) {
        let now = Instant::now();
        if self.interface.0.is_some_and(|at| at <= now) {
            self.look_at_interface(claim).await;
        }
        if self.file_is_stale {
            self.write_file();
        }
        if let Some((at, every)) = &mut self.resync
            && now >= *at
        {
            *at = now + *every;
            let mut keys = BTreeSet::new();
            let scope = Scope { iptables: Family::ALL.into(), ..Scope::default() };
            let at = Family::ALL.map(|family| Key::Iptables(family, Variant::Legacy));
            self.look(scope, &at, &mut keys).await;
            let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
            self.repair(ops, "somebody changed").await;
        }
        if now < self.read_at {
            let due = self.failures.iter().filter(|(_, failure)| failure.due <= now).map(|(key, _)| key.clone()).collect();
            let ops = diff_keys(self.picture.desired(), &self.observed, &due, self.prune());
            // What is not wanted any more is no failure any more.
            let wanted: BTreeSet<Key> = ops.iter().map(|op| op.object().key()).collect();
            self.failures.retain(|key, failure| failure.due > now || wanted.contains(key));
            self.execute(ops).await;
            return;
        }
        self.read_at = now + AUDIT;
        let scope = if self.adopting { self.picture.scope_with_adoption() } else { self.picture.scope() };
        match self.kernel.observe(scope).await {
            Ok(observed) => {
                self.observed = observed;
                let ops = diff(self.picture.desired(), &self.observed, self.prune());
                self.repair(ops, "the kernel did not hold").await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the kernel's state; trying again in a second");
                self.read_at = now + Duration::from_secs(1);
            }
        }
    }

    fn prune(&self) -> Prune {
        if self.picture.leases().is_complete() { Prune::Yes } else { Prune::No }
    }

    /// Puts right what the kernel does not hold. What somebody undoes again and again is left to them for a while: two
    /// who replace each other's work without pause would help nobody.
    async fn repair(&mut self, mut ops: Vec<Op>, what: &str) {
        let now = Instant::now();
        self.repaired.retain(|_, (since, _)| now.duration_since(*since) < FIGHT.1);
        ops.retain(|op| self.failures.get(&op.object().key()).is_none_or(|failure| failure.due <= now));
        for op in &ops {
            let (_, times) = self.repaired.entry(op.object().key()).or_insert((now, 0));
            *times += 1;
            if *times > FIGHT.0 {
                let text = format!("somebody undoes it again and again: {}", one_line(op));
                tracing::warn!(object = %op.object().key(), times, "somebody undoes what this daemon sets; leaving it for a while");
                self.notices.tell("Fight", format!("{text}; it is left for {} s", FIGHT.1.as_secs() / 2));
                self.failures
                    .insert(op.object().key(), Failure { error: OpError { errno: 0, text }, attempts: *times, due: now + FIGHT.1 / 2 });
            }
        }
        ops.retain(|op| self.failures.get(&op.object().key()).is_none_or(|failure| failure.due <= now));
        for op in ops.iter().take(LOGGED) {
            tracing::info!(op = %one_line(op), "putting right what {what}");
        }
        if ops.len() > LOGGED {
            tracing::info!(more = ops.len() - LOGGED, "putting right what {what}");
        }
        self.execute(ops).await;
    }

    /// Executes operations, but for those that failed lately; keeps the memory of the kernel and of failures current.
    async fn execute(&mut self, mut ops: Vec<Op>) {
        let now = Instant::now();
        ops.retain(|op| self.failures.get(&op.object().key()).is_none_or(|failure| failure.due <= now));
        if ops.is_empty() {
            return;
        }
        for (op, outcome) in self.kernel.apply(ops).await {
            let key = op.object().key();
            match outcome {
                Ok(()) => {
                    self.observed.apply(&op);
                    if self.failures.remove(&key).is_some() {
                        tracing::info!(object = %key, "the kernel takes it now");
                    }
                }
                Err(mut error) => {
                    error.text.push_str(advice(&key, error.errno));
                    let attempts = self.failures.get(&key).map_or(1, |failure| failure.attempts + 1);
                    if self.failures.get(&key).is_none_or(|failure| failure.error.errno != error.errno) {
                        tracing::warn!(object = %key, %error, "the kernel refuses; it is tried again, others are not affected");
                        // A container's /proc/sys is read-only as a rule, and nothing depends on ours.
                        if !matches!(key, Key::Sysctl(_)) {
                            self.notices.tell("KernelRefused", format!("{key}: {error}"));
                        }
                    }
                    let wait = RETRY.0.saturating_mul(1 << attempts.min(10).saturating_sub(1)).min(RETRY.1);
                    self.failures.insert(key, Failure { error, attempts, due: Instant::now() + wait });
                }
            }
        }
    }

    fn log(&self, leases: &BTreeSet<LeaseKey>, operations: usize, began: Instant) {
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

    fn state(&self, connected: bool) -> state::State {
        let picture = &self.picture;
        let reasons = |(key, refusals): (&LeaseKey, &Vec<flannel::backend::Refusal>)| state::Refused {
            subnet: key.to_string(),
            public_ip: picture.leases().get(key).and_then(|peer| peer.public.iter().next().map(|(_, ip)| ip.to_string())),
            reasons: refusals.iter().map(ToString::to_string).collect(),
        };
        let conflict = |(key, owner): (&Key, &Owner)| state::Refused {
            subnet: match owner {
                Owner::Node => picture.own().to_string(),
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
            store: state::Store { connected, leases: picture.leases().len(), complete: picture.leases().is_complete() },
            peers: state::Peers {
                programmed: picture.leases().iter().filter(|(key, _)| !picture.desired().part(&Owner::Lease(**key)).is_empty()).count(),
                refused: picture.refusals().iter().map(reasons).chain(picture.desired().conflicts().map(conflict)).collect(),
            },
            objects: state::Objects {
                desired: picture.desired().iter().count(),
                failed: self
                    .failures
                    .iter()
                    .map(|(key, failure)| state::Failed {
                        object: key.to_string(),
                        error: failure.error.to_string(),
                        attempts: failure.attempts,
                    })
                    .collect(),
            },
        }
    }
}

/// What would help when the kernel lacks something. A container cannot load modules.
fn advice(key: &Key, errno: i32) -> &'static str {
    const EOPNOTSUPP: i32 = 95;
    const EPROTONOSUPPORT: i32 = 93;
    const ENOENT: i32 = 2;
    match (key, errno) {
        (Key::Link(_), EOPNOTSUPP) => {
            "; this kernel has no such device, or has not loaded it: run `modprobe vxlan` on the host, or use host-gw"
        }
        (Key::Ruleset(_), EOPNOTSUPP | EPROTONOSUPPORT | ENOENT) => {
            "; this kernel lacks a part of nf_tables, or has not loaded it: run `modprobe -a nf_tables nft_masq nft_ct` on the host"
        }
        _ => "",
    }
}

fn one_line(op: &Op) -> String {
    match op.object() {
        Object::Ruleset(_) | Object::Iptables(_) => {
            format!("{} {}", if matches!(op, Op::Set(_)) { "set" } else { "delete" }, op.object().key())
        }
        _ => op.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_a_module_is_advised_of() {
        let device = Key::Link("flannel.1".parse().unwrap());
        assert!(advice(&device, 95).contains("modprobe vxlan") && advice(&device, 1).is_empty());
        assert!(advice(&Key::Ruleset(Family::V4), 93).contains("modprobe -a nf_tables"));
    }
}
