//! The loop: everything that can wake it is in `Wake`, everything it does to the kernel goes through one thread, and
//! what it costs follows what changed.

mod fight;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::task::Poll;
use std::time::Duration;

use anyhow::Context;
use flannel::alloc::is_mine;
use flannel::desired::{Key, Owner, Scope};
use flannel::diff::{Prune, diff, diff_keys};
use flannel::picture::Touched;
use flannel::traffic::iptables::Variant;
use flannel::{Family, LeaseKey, Object, Observed, Op, OpError, Outcome, Picture, StoreEvent};
use kernel::netlink::NetlinkError;
use kernel::{Author, Changed, Heard};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use self::fight::Repairs;
use crate::facts::{Facts, list};
use crate::host::{Host, News};
use crate::notice::Notices;
use crate::ready::Guard;
use crate::state;
use crate::store::{Claim, Held};

/// How often the whole kernel is read as the audit of our memory of it: notifications tell sooner of nearly everything, this
/// catches what the kernel does not announce. Each minute; where it takes long, rarer, but within the second.
const AUDIT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(300));
/// An audit is followed by a pause of so many times its length: it may take a two-thousandth of a processor.
const AUDIT_PAUSE: u32 = 2_000;
/// How long after a link's change the kernel is read: what follows from it comes in a burst.
const SETTLE: Duration = Duration::from_millis(5);
/// How long after a lease was acquired the store must have told of it.
const OWN: Duration = Duration::from_secs(5);
/// How long after a list it is looked at again whether the store is followed.
const LISTED: Duration = Duration::from_millis(100);
/// How long a lease's routes stay that a store which lost data knows nothing of: its host writes it again within seconds, and one whose
/// daemon is being replaced within minutes. A route that leads to nobody harms nobody.
const DOUBT: Duration = Duration::from_secs(300);
/// Programs that delete rules of pods because the pods end: those of the plugins, ours and others'.
const PLUGINS: [&str; 4] = ["portmap", "bridge", "flannel", "flannel-cni"];
/// What is said of it.
const LOST: &str = "the store seems to have lost data (restored from a backup, perhaps); routes of leases that it does not know any more stay for five minutes, in which their hosts write them again";
/// A failed object is tried again after the first, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// An interface that is not as it should be is looked at again after the first, doubling up to the second: it may get its address
/// back, or a default route, of which nothing is heard.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// A VTEP that was given another link-layer address is followed no more often than this: each time all peers hear of it.
const FOLLOW_MAC: Duration = Duration::from_secs(5);
/// Leases that change together up to this number are logged one by one.
const LOGGED: usize = 8;
/// A long list is put into an empty kernel in parts, so many…
const PARTS: usize = 16;
/// …and of no fewer leases than this.
const PART: usize = 256;
/// A list that changes more leases than this has left more memory behind than is needed again…
const MANY: usize = 256;
/// …which is given back so much later.
const TIDY: Duration = Duration::from_millis(500);

/// What wakes the loop.
enum Wake {
    /// The store told something.
    Leases(Vec<StoreEvent>),
    /// This node's lease is another one now, or the same again.
    Own(Held),
    /// The kernel told of changes.
    Kernel(Vec<Heard>),
    /// A failed object is due, or a full read is.
    Timer,
    /// Somebody wants to know the state.
    Ask(oneshot::Sender<state::State>),
    /// The other side is gone: the daemon stops.
    Stop,
}

impl Wake {
    fn heard(news: Option<Result<Vec<Heard>, NetlinkError>>) -> anyhow::Result<Wake> {
        let heard = news.context("the thread that listens to the kernel ended")?;
        Ok(Wake::Kernel(heard.context("cannot hear of the kernel's changes any more")?))
    }
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
pub struct Start<H> {
    /// What this node wants, without peers.
    pub picture: Picture,
    /// The way to the kernel.
    pub host: H,
    /// How this host is looked at again when its interface changes.
    pub facts: Facts,
    /// How often rules are looked at that the kernel does not announce.
    pub resync: Duration,
    /// May a Go flanneld have run on this host?
    pub adopt: bool,
    /// Has the store forgotten the lease that this node had before?
    pub has_forgotten: bool,
    /// Held until the first complete list of leases is in the kernel.
    pub syncing: Guard,
    /// Where an operator is told.
    pub notices: Notices,
}

/// Keeps the kernel as the picture wants it.
#[derive(Debug)]
pub struct Reconciler<H> {
    picture: Picture,
    facts: Facts,
    /// When the external interface is looked at next, what was said of it last, and the wait before the next look.
    interface: (Option<Instant>, String, Duration),
    observed: Observed,
    host: H,
    news: News,
    /// Whose turn is it, the kernel's or the store's?
    kernel_first: bool,
    failures: BTreeMap<Key, Failure>,
    /// When the kernel is to be read whole.
    read_at: Instant,
    /// Are a Go flanneld's plain routes taken over? Until it is known which of them are superfluous.
    adopting: bool,
    /// When the rules that the kernel does not announce are looked at next, and how often: those of iptables-legacy.
    resync: Option<(Instant, Duration)>,
    /// What was put right lately: somebody may be undoing it.
    repairs: Repairs,
    /// How often notifications of the kernel were lost.
    overruns: u64,
    /// When it is looked at next whether the lease is still this node's.
    own_check: Option<Instant>,
    /// When leases are given up that the store has lost.
    doubt: Option<Instant>,
    /// Until when the store's lists are not believed to be whole, because it has forgotten this node's own lease.
    distrust: Option<Instant>,
    /// When memory is given back that a long list left half used.
    tidy: Option<Instant>,
    /// When a lease with another's or old data was written anew, and how long that was enough.
    corrected: Option<(Instant, Duration)>,
    /// When a VTEP's new link-layer address was followed last.
    followed: Option<Instant>,
    /// Until the first complete list of leases is in the kernel.
    syncing: Option<Guard>,
    notices: Notices,
}

impl<H: Host> Reconciler<H> {
    /// Reads the kernel and puts this node's own objects there: devices, addresses, rules. Notifications are
    /// subscribed to first, so that no change falls in between.
    ///
    /// # Errors
    /// When the kernel cannot be read, or refuses one of the node's own objects.
    pub async fn start(start: Start<H>) -> anyhow::Result<Reconciler<H>> {
        let Start { picture, host, facts, resync, adopt, has_forgotten, syncing, notices } = start;
        let scope = picture.scope();
        let news = host.watch(scope.clone(), picture.node().ext).context("cannot subscribe to the kernel's changes")?;
        let reading = if adopt { picture.scope_with_adoption() } else { scope };
        let observed = host.observe(reading).await.context("cannot read the kernel's state")?;
        let mut reconciler = Reconciler {
            picture,
            facts,
            // It may have changed while the lease was waited for.
            interface: (Some(Instant::now()), String::new(), LOOK_AGAIN.0),
            observed,
            host,
            news,
            kernel_first: false,
            failures: BTreeMap::new(),
            read_at: Instant::now() + AUDIT.0,
            adopting: adopt,
            resync: None,
            repairs: Repairs::default(),
            overruns: 0,
            own_check: None,
            doubt: None,
            distrust: has_forgotten.then(|| Instant::now() + DOUBT),
            tidy: None,
            corrected: None,
            followed: None,
            syncing: Some(syncing),
            notices,
        };
        if has_forgotten {
            tracing::warn!("the store does not know the lease that this node had before: {LOST}");
            reconciler.notices.tell("StoreLostLeases", LOST.to_owned());
        }
        reconciler.picture.keep_bridge(&reconciler.observed);
        let ops = diff(reconciler.picture.desired(), &reconciler.observed, Prune::No);
        // The plugins are told last, when all that they are promised is there.
        let (file, ops) = ops.into_iter().partition(|op| matches!(op, Op::Set(Object::EnvFile(_))));
        reconciler.execute(ops).await;
        let legacy = reconciler.picture.desired().iter().any(|(key, _)| matches!(key, Key::Iptables(_, Variant::Legacy)));
        reconciler.resync = legacy.then(|| (Instant::now() + resync, resync));
        // A sysctl that cannot be written (a read-only /proc/sys), rules that iptables does not take now (another holds its lock),
        // and those of pods, are shown and tried again, but stop nothing.
        let can_wait = |key: &Key| matches!(key, Key::Sysctl(_) | Key::Iptables(..) | Key::PodRules);
        let own = reconciler.picture.desired().part(&Owner::Node).iter().map(Object::key).filter(|key| !can_wait(key));
        let refused: Vec<String> = own.filter_map(|key| reconciler.failures.get(&key)).map(|failure| failure.error.to_string()).collect();
        anyhow::ensure!(refused.is_empty(), "the kernel refuses what this node needs: {}", refused.join("; "));
        reconciler.execute(file).await;
        if let Some(failure) = reconciler.failures.get(&Key::EnvFile) {
            anyhow::bail!("{}", failure.error);
        }
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
                Wake::Kernel(heard) => self.on_kernel(heard).await,
                Wake::Timer => self.on_timer(&inputs).await,
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
        let others = [retry, self.resync.map(|(at, _)| at), self.interface.0, self.own_check, self.doubt, self.distrust, self.tidy];
        let timer = others.into_iter().flatten().fold(self.read_at, Instant::min);
        // Store and kernel are served in turn, so that a flood of the one does not keep the other waiting.
        self.kernel_first = !self.kernel_first;
        let (kernel_first, news, events) = (self.kernel_first, &mut self.news, &mut inputs.events);
        let heard = std::future::poll_fn(|context| {
            let kernel = |news: &mut News, context: &mut _| news.poll_recv(context).map(Wake::heard);
            if kernel_first && let Poll::Ready(wake) = kernel(news, context) {
                return Poll::Ready(wake);
            }
            if let Poll::Ready(events) = events.poll_recv(context) {
                return Poll::Ready(Ok(events.map_or(Wake::Stop, Wake::Leases)));
            }
            kernel(news, context)
        });
        let wake = tokio::select! {
            // None of the first three can come in a flood.
            biased;
            changed = inputs.held.changed() => match changed {
                Ok(()) => Wake::Own(*inputs.held.borrow_and_update()),
                Err(_) => Wake::Stop,
            },
            ask = inputs.asks.recv() => ask.map_or(Wake::Stop, Wake::Ask),
            () = tokio::time::sleep_until(timer) => Wake::Timer,
            wake = heard => wake?,
        };
        Ok(wake)
    }

    async fn on_leases(&mut self, events: Vec<StoreEvent>, inputs: &mut Inputs) {
        let began = Instant::now();
        let was_complete = self.picture.leases().is_complete();
        let mut events = events;
        // What waits already is part of this change.
        while let Ok(more) = inputs.events.try_recv() {
            events.extend(more);
        }
        let listed = events.contains(&StoreEvent::InitDone);
        let doubtful = self.picture.leases().doubtful().clone();
        self.picture.doubt_deletes(&mut events);
        let early = self.write_in_parts(&mut events).await;
        let Touched { mut leases, keys } = self.picture.fold_all(events);
        let in_parts = !early.is_empty();
        leases.extend(early);
        leases.sort_unstable();
        leases.dedup();
        self.note_doubt(&doubtful, listed);
        // What failed with what a lease said before may succeed with what it says now.
        self.failures.iter_mut().filter(|(key, _)| keys.binary_search(key).is_ok()).for_each(|(_, failure)| failure.due = began);
        let (own, complete) = (self.picture.own(), self.picture.leases().is_complete());
        if listed || leases.binary_search(&own).is_ok() {
            self.check_own(inputs, LISTED);
        }
        if complete && !was_complete {
            self.picture.keep_unreadable(&self.observed);
        }
        let ops = match complete && !was_complete || in_parts {
            // Only now is it known what of the past is superfluous.
            true => diff(self.picture.desired(), &self.observed, self.prune_all()),
            false => diff_keys(self.picture.desired(), &self.observed, &keys, self.prune()),
        };
        let count = ops.len();
        self.adopting &= !complete;
        self.execute(ops).await;
        self.log(&leases, count, began);
        if complete && let Some(guard) = self.syncing.take() {
            let (leases, refused, failed) = (self.picture.leases().len(), self.picture.refusals().len(), self.failures.len());
            tracing::info!(leases, refused, failed, "the store's list of leases is complete and was put into the kernel");
            drop(guard);
        }
        if listed && leases.len() > MANY {
            // Not while anybody waits.
            self.tidy = Some(Instant::now() + TIDY);
        }
    }

    /// Puts a long list of leases, none of which is in the kernel yet, there in parts: it writes one while the next is folded. Takes
    /// them from `events` and returns them. Claims of one part on what another has are settled when all are there.
    async fn write_in_parts(&mut self, events: &mut Vec<StoreEvent>) -> Vec<LeaseKey> {
        let end = events.iter().position(|event| *event == StoreEvent::InitDone).unwrap_or(0);
        if end < 2 * PART || self.observed.len() > PART {
            return Vec::new();
        }
        let rest = events.split_off(end);
        let mut list = std::mem::replace(events, rest).into_iter();
        let (mut touched, mut writing) = (Vec::new(), Vec::new());
        while list.len() > 0 {
            let Touched { leases, keys } = self.picture.fold_all(list.by_ref().take((end / PARTS).max(PART)));
            touched.extend(leases);
            let ops = diff_keys(self.picture.desired(), &self.observed, &keys, Prune::No);
            writing.push(self.host.apply(ops));
        }
        for written in writing {
            let outcomes = written.await;
            self.conclude(outcomes);
        }
        touched
    }

    /// Takes note of leases that the store has lost, beside those that were in doubt before.
    fn note_doubt(&mut self, before: &BTreeSet<LeaseKey>, listed: bool) {
        let own = self.picture.own();
        let doubtful = self.picture.leases().doubtful();
        if doubtful.is_empty() {
            if self.doubt.take().is_some() {
                tracing::info!("no lease that the store had lost is in doubt any more");
            }
            return;
        }
        let leases = doubtful.len();
        // That its own is gone is the keeper's to say.
        let is_news = doubtful.difference(before).any(|key| *key != own);
        // A list means that the store was away, and nobody could write to it.
        if listed || is_news {
            self.doubt = Some(Instant::now() + DOUBT);
        }
        if is_news {
            tracing::warn!(leases, "{LOST}");
            self.notices.tell("StoreLostLeases", format!("{LOST} ({leases} leases)"));
        }
    }

    /// Leases that the store had lost, and that nobody wrote again, are no leases any more.
    async fn give_up_doubtful(&mut self, connected: bool) {
        if !connected || self.picture.leases().doubtful().contains(&self.picture.own()) {
            // Nobody can write to it, or this node cannot, and so perhaps nobody.
            self.doubt = Some(Instant::now() + DOUBT);
            return;
        }
        let began = Instant::now();
        self.doubt = None;
        let Touched { leases, keys } = self.picture.give_up_doubtful();
        tracing::warn!(leases = leases.len(), "leases that the store had lost were not written again; their routes go");
        let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
        let count = ops.len();
        self.execute(ops).await;
        self.log(&leases, count, began);
    }

    /// Tells the keeper if the lease that it holds is another's by now, or gone, or says what this node said long ago: a store
    /// may be restored from an older backup.
    fn check_own(&mut self, inputs: &Inputs, again: Duration) {
        self.own_check = None;
        let (leases, held) = (self.picture.leases(), *inputs.held.borrow());
        let said = leases.get(&held.key).filter(|_| !leases.doubtful().contains(&held.key));
        let (said, now) = (said.filter(|peer| is_mine(&peer.public, &held.published)), self.picture.own_peer());
        match said {
            _ if !leases.is_complete() => {}
            // Of a store that is not followed nothing new is known; a list comes a moment before the store counts as followed.
            _ if !*inputs.connected.borrow() => self.own_check = Some(Instant::now() + again),
            // A full channel means that it has been told.
            None => drop(inputs.lost.try_send(())),
            Some(said) if (&said.backend_type, &said.backend_data) == (&now.backend_type, &now.backend_data) => self.corrected = None,
            // What was told may be older than what was written, or another host may have the same address and write as well: so
            // not at once again, and ever more rarely.
            Some(_) if self.corrected.is_some_and(|(at, wait)| at.elapsed() < wait) => self.own_check = Some(Instant::now() + OWN),
            Some(_) => {
                tracing::info!(subnet = %held.key, "the lease does not say what this node's backend is; writing it anew");
                let wait = self.corrected.map_or(OWN, |(_, wait)| (wait * 2).min(AUDIT.1));
                self.corrected = Some((Instant::now(), wait));
                inputs.claim.send_modify(|claim| claim.peer = now);
            }
        }
    }

    async fn on_own(&mut self, held: Held) {
        // What was told of this lease before it was held was not about us. Once its own event must have come, it is looked at.
        self.own_check = Some(Instant::now() + OWN);

        let mut keys: BTreeSet<Key> = self.picture.add_etcd_lease(held.etcd_lease).into_iter().collect();
        if held.key != self.picture.own() {
            keys.extend(self.picture.set_own(held.key));
        }
        let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
        self.execute(ops).await;
    }

    async fn on_kernel(&mut self, heard: Vec<Heard>) {
        let mut keys = BTreeSet::new();
        let mut authors = BTreeMap::new();
        // Whether the pods' bridge changed, and by whom.
        let mut bridge: Option<Option<Author>> = None;
        for Heard { change, by } in heard {
            let mut touched = BTreeSet::new();
            match change {
                Changed::Set(object) => {
                    if matches!(object, Object::Sysctl(..)) {
                        self.try_sysctls();
                    }
                    touched.insert(object.key());
                    self.observed.insert(object);
                }
                Changed::Gone(key) => {
                    self.observed.remove(&key);
                    touched.insert(key);
                }
                Changed::Rules(family) => {
                    let scope = Scope { rulesets: vec![family], ..Scope::default() };
                    self.look(scope, &[Key::Ruleset(family)], &mut touched).await;
                }
                Changed::Iptables(family) => {
                    let scope = Scope { iptables: vec![family], ..Scope::default() };
                    self.look(scope, &Variant::ALL.map(|variant| Key::Iptables(family, variant)), &mut touched).await;
                }
                // A plugin deletes what it wrote itself.
                Changed::PodRules if by.as_ref().is_some_and(|author| PLUGINS.contains(&author.program.as_str())) => {}
                Changed::PodRules => {
                    let scope = Scope { pod_rules: true, ..Scope::default() };
                    self.look(scope, &[Key::PodRules], &mut touched).await;
                }
                Changed::File => {
                    let scope = Scope { file: self.picture.scope().file, ..Scope::default() };
                    self.look(scope, &[Key::EnvFile], &mut touched).await;
                }
                Changed::Bridge => {
                    let Scope { gateways, bridge: name, .. } = self.picture.scope();
                    let seen: Vec<Key> = self.observed.bridge().map(|seen| Key::Bridge(seen.name)).into_iter().collect();
                    self.look(Scope { gateways, bridge: name, ..Scope::default() }, &seen, &mut touched).await;
                    self.try_sysctls();
                    bridge = Some(by.clone());
                }
                Changed::Port(of, name, port) if self.observed.add_port(of, name, port) => drop(bridge.get_or_insert(None)),
                Changed::PortGone(name) if self.observed.remove_port(name) => drop(bridge.get_or_insert(None)),
                Changed::Port(..) | Changed::PortGone(_) => {}
                Changed::Link(_) | Changed::Everything => {
                    self.overruns += u64::from(change == Changed::Everything);
                    if change == Changed::Everything || change == Changed::Link(self.picture.node().ext) {
                        (self.interface.0, self.interface.2) = (Some(Instant::now() + SETTLE), LOOK_AGAIN.0);
                    }
                    self.read_at = self.read_at.min(Instant::now() + SETTLE);
                    self.try_failed();
                }
            }
            if let Some(author) = by {
                authors.extend(touched.iter().map(|key| (key.clone(), author.clone())));
            }
            // Not `append`, which costs what is there already.
            keys.extend(touched);
        }
        if let Some(by) = bridge {
            let is_first = self.picture.desired().part(&Owner::Pods).is_empty();
            let kept = self.picture.keep_bridge(&self.observed);
            if is_first {
                // The plugin is about to do the same: nobody has changed anything.
                let ops = diff_keys(self.picture.desired(), &self.observed, &kept, self.prune());
                self.execute(ops).await;
            }
            authors.extend(by.into_iter().flat_map(|by| kept.iter().map(move |key| (key.clone(), by.clone()))));
            keys.extend(kept);
        }
        let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
        self.repair(ops, "somebody changed", &authors).await;
    }

    /// A link is there or has changed: what failed for want of it need not fail any more. What is fought over has its own pace.
    fn try_failed(&mut self) {
        self.failures.values_mut().filter(|failure| failure.error.errno != 0).for_each(|failure| failure.due = Instant::now());
    }

    /// A sysctl that could not be written is tried again at once, not when its turn comes: where `/proc/sys` is read-only, what was done
    /// instead for each interface is undone by whoever changes it, and is not done for a new one.
    fn try_sysctls(&mut self) {
        let refused = |(key, failure): &(&Key, &mut Failure)| matches!(key, Key::Sysctl(_)) && failure.error.errno != 0;
        self.failures.iter_mut().filter(refused).for_each(|(_, failure)| failure.due = Instant::now());
    }

    /// Reads traffic rules or the file anew and adds its keys to those to compare.
    async fn look(&mut self, scope: Scope, at: &[Key], keys: &mut BTreeSet<Key>) {
        match self.host.observe(scope).await {
            Ok(now) => {
                at.iter().for_each(|key| self.observed.remove(key));
                now.iter().for_each(|(_, object)| self.observed.insert(object.clone()));
                keys.extend(at.iter().cloned());
            }
            Err(error) => tracing::warn!(%error, "cannot read what changed; the next audit will"),
        }
    }

    /// Looks at the external interface again. Its new address or MTU is followed; that it has none for a moment, or that
    /// another one would be chosen now, changes nothing.
    async fn look_at_interface(&mut self, claim: &watch::Sender<Claim>) {
        let current = self.picture.node().clone();
        let problem = match self.facts.node(&self.host, self.picture.config(), current.addrs).await {
            Ok(node) if node == current => String::new(),
            Ok(node) if node.ext == current.ext => {
                tracing::info!(interface = %node.ext, was = %list(&current.addrs), is = %list(&node.addrs), published = %list(&node.public), mtu = node.mtu, "the interface has changed; this node's lease and devices follow");
                let keys: BTreeSet<Key> = self.picture.set_node(node).into_iter().collect();
                let ops = diff_keys(self.picture.desired(), &self.observed, &keys, self.prune());
                self.execute(ops).await;
                self.publish(claim);
                String::new()
            }
            Ok(node) => format!("now {} would be chosen: restart flanneld to move there", node.ext),
            Err(error) => format!("{error:#}"),
        };
        if problem != self.interface.1 && !problem.is_empty() {
            tracing::warn!(interface = %current.ext, %problem, "the interface is not as it was; devices and routes stay");
            self.notices.tell("InterfaceChanged", format!("{}: {problem}; devices and routes stay", current.ext));
        }
        let wait = if problem == self.interface.1 { (self.interface.2 * 2).min(LOOK_AGAIN.1) } else { LOOK_AGAIN.0 };
        self.interface = (if problem.is_empty() { None } else { Some(Instant::now() + wait) }, problem, wait);
    }

    /// Tells the keeper what this node publishes now.
    fn publish(&self, claim: &watch::Sender<Claim>) {
        let (peer, addrs) = (self.picture.own_peer(), self.picture.node().addrs);
        claim.send_if_modified(|claim| {
            let is_new = (&claim.peer, &claim.addrs) != (&peer, &addrs);
            (claim.peer, claim.addrs) = (peer, addrs);
            is_new
        });
    }

    /// A VTEP that systemd or an operator gave another link-layer address keeps it, and peers are told. One that is given
    /// another all the time gets back the one that they know.
    fn follow_macs(&mut self, claim: &watch::Sender<Claim>) {
        let Some(macs) = self.picture.foreign_macs(&self.observed) else { return };
        if self.followed.is_some_and(|at| at.elapsed() < FOLLOW_MAC) {
            return;
        }
        self.followed = Some(Instant::now());
        let now: Vec<String> = macs.iter().map(|(_, mac)| mac.to_string()).collect();
        tracing::info!(mac = now.join(","), "somebody gave this node's VTEP another MAC; it is kept, and peers are told");
        self.picture.set_macs(macs);
        self.publish(claim);
    }

    async fn on_timer(&mut self, inputs: &Inputs) {
        let now = Instant::now();
        if self.own_check.is_some_and(|at| at <= now) {
            self.check_own(inputs, OWN);
        }
        if self.tidy.take_if(|at| *at <= now).is_some() {
            self.picture.pack();
            self.observed.pack();
            kernel::process::release_memory();
        }
        if self.doubt.is_some_and(|at| at <= now) {
            self.give_up_doubtful(*inputs.connected.borrow()).await;
        }
        if self.distrust.is_some_and(|at| at <= now) {
            let connected = *inputs.connected.borrow();
            self.distrust = (!connected).then(|| now + DOUBT);
            if connected {
                // What nobody has written again goes.
                self.read_at = now;
            }
        }
        if self.interface.0.is_some_and(|at| at <= now) {
            self.look_at_interface(&inputs.claim).await;
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
            self.repair(ops, "somebody changed", &BTreeMap::new()).await;
        }
        if now < self.read_at {
            let due: Vec<Key> = self.failures.iter().filter(|(_, failure)| failure.due <= now).map(|(key, _)| key.clone()).collect();
            let ops = diff_keys(self.picture.desired(), &self.observed, &due, self.prune());
            // What is not wanted any more is no failure any more.
            let wanted: BTreeSet<Key> = ops.iter().map(|op| op.object().key()).collect();
            self.failures.retain(|key, failure| failure.due > now || wanted.contains(key));
            self.execute(ops).await;
            return;
        }
        let scope = if self.adopting { self.picture.scope_with_adoption() } else { self.picture.scope() };
        match self.host.observe(scope).await {
            Ok(observed) => {
                // The old one is kept if it is the same: memory that is not moved is not torn.
                if self.observed != observed {
                    self.observed = observed;
                }
                self.follow_macs(&inputs.claim);
                self.picture.keep_bridge(&self.observed);
                let ops = diff(self.picture.desired(), &self.observed, self.prune_all());
                // A peer that is not on the link may be there by now: of the routes that say so nothing is heard.
                if !self.picture.refusals().is_empty() {
                    self.interface.0.get_or_insert(now);
                }
                self.read_at = now + (now.elapsed() * AUDIT_PAUSE).clamp(AUDIT.0, AUDIT.1);
                self.repair(ops, "the kernel did not hold", &BTreeMap::new()).await;
                if self.observed.len() > MANY {
                    kernel::process::release_memory();
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the kernel's state; trying again in a second");
                self.read_at = now + Duration::from_secs(1);
            }
        }
    }

    /// May what changed be deleted, if nobody wants it?
    fn prune(&self) -> Prune {
        if self.picture.leases().is_complete() { Prune::Yes } else { Prune::No }
    }

    /// May all be deleted that nobody wants?
    fn prune_all(&self) -> Prune {
        if self.distrust.is_none() { self.prune() } else { Prune::No }
    }

    /// Puts right what the kernel does not hold. What somebody undoes again and again is put right ever more slowly, down to
    /// once a second: two who replace each other's work without pause help nobody.
    async fn repair(&mut self, mut ops: Vec<Op>, what: &str, authors: &BTreeMap<Key, Author>) {
        let now = Instant::now();
        for (key, times) in self.repairs.settled(now) {
            tracing::info!(object = %key, times, "nobody undoes it any more");
        }
        ops.retain(|op| self.failures.get(&op.object().key()).is_none_or(|failure| failure.due <= now));
        for op in &ops {
            let key = op.object().key();
            // What the kernel refused was not undone by anybody.
            if self.failures.get(&key).is_some_and(|failure| failure.error.errno != 0) {
                continue;
            }
            let Some(fight) = self.repairs.count(&key, authors.get(&key), now) else { continue };
            let by = fight.by.map_or(String::new(), |author| format!(" by {author}"));
            let text = format!("somebody undoes it again and again{by}: {}", one_line(op));
            if fight.is_new {
                tracing::warn!(object = %key, times = fight.times, "somebody undoes what this daemon sets{by}; it is set once a second now");
                self.notices.tell("Fight", format!("{text}; it is set once a second now"));
            }
            let failure = Failure { error: OpError { errno: 0, text }, attempts: fight.times, due: now + fight.wait };
            self.failures.insert(key, failure);
        }
        ops.retain(|op| self.failures.get(&op.object().key()).is_none_or(|failure| failure.due <= now));
        for op in ops.iter().take(LOGGED) {
            let by = authors.get(&op.object().key()).map_or(String::new(), |author| format!(" ({author})"));
            tracing::info!(op = %one_line(op), "putting right what {what}{by}");
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
        let outcomes = self.host.apply(ops).await;
        self.conclude(outcomes);
    }

    fn conclude(&mut self, outcomes: Vec<(Op, Outcome)>) {
        let mut done = Vec::with_capacity(outcomes.len());
        for (op, outcome) in outcomes {
            let key = op.object().key();
            if matches!((&op, &outcome), (Op::Set(Object::Link(_)), Ok(()))) {
                self.try_failed();
            }
            match outcome {
                Ok(()) => {
                    done.push(op);
                    if self.failures.remove(&key).is_some_and(|failure| failure.error.errno != 0) {
                        tracing::info!(object = %key, "the kernel takes it now");
                    }
                }
                Err(mut error) => {
                    error.text.push_str(advice(&key, error.errno));
                    let attempts = self.failures.get(&key).map_or(1, |failure| failure.attempts + 1);
                    if self.failures.get(&key).is_none_or(|failure| failure.error.errno != error.errno) {
                        tracing::warn!(object = %key, %error, "this cannot be set; it is tried again, others are not affected");
                        match &key {
                            Key::EnvFile => {
                                self.notices.tell("SubnetFile", format!("the CNI plugins cannot be told of this node: {error}"));
                            }
                            // A container's /proc/sys is read-only as a rule, and nothing depends on ours but forwarding.
                            Key::Sysctl(path) if Family::ALL.iter().all(|family| family.forwarding() != path) => {}
                            // A plugin is at work.
                            Key::PodRules if error.errno == EBUSY => {}
                            _ => self.notices.tell("KernelRefused", format!("{key}: {error}")),
                        }
                    }
                    let wait = RETRY.0.saturating_mul(1 << attempts.min(10).saturating_sub(1)).min(RETRY.1);
                    self.failures.insert(key, Failure { error, attempts, due: Instant::now() + wait });
                }
            }
        }
        self.observed.apply_all(done);
    }
}

const EBUSY: i32 = 16;

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
