//! Notifications of the kernel: what changed at which keys, who did it, and what of it is drift.

use std::collections::{BTreeMap, BTreeSet};

use flannel::Object;
use flannel::desired::Owner;
use flannel::object::{Key, Lane};
use flannel::scope::Scope;
use flannel::traffic::iptables::Variant;
use kernel::{Author, Changed, KernelEvent};
use tokio::time::Instant;

use super::Reconciler;
use super::execute::Drift;
use super::interface::SETTLE;
use crate::host::Host;

/// Programs that delete rules of pods because the pods end: those of the plugins, ours and others'.
const PLUGINS: [&str; 4] = ["portmap", "bridge", "flannel", "flannel-cni"];

impl<H: Host + 'static> Reconciler<H> {
    pub(super) async fn on_kernel(&mut self, events: Vec<KernelEvent>) {
        let mut keys = BTreeSet::new();
        let mut authors = BTreeMap::new();
        // Whether the pods' bridge changed, and by which program.
        let mut bridge: Option<Option<Author>> = None;
        for KernelEvent { change, by } in events {
            let touched = match change {
                Changed::Bridge => {
                    bridge = Some(by.clone());
                    self.observe_bridge().await
                }
                Changed::Port(of, name, port) => {
                    if self.observed.add_port(of, name, port) {
                        bridge.get_or_insert(None);
                    }
                    BTreeSet::new()
                }
                Changed::PortGone(name) => {
                    if self.observed.remove_port(name) {
                        bridge.get_or_insert(None);
                    }
                    BTreeSet::new()
                }
                // A plugin deletes what it wrote itself.
                Changed::PodRules if by.as_ref().is_some_and(|author| PLUGINS.contains(&author.program.as_str())) => BTreeSet::new(),
                change => self.take_in(change).await,
            };
            if let Some(author) = by {
                authors.extend(touched.iter().map(|key| (key.clone(), author.clone())));
            }
            // Not `append`, whose cost follows the larger set.
            keys.extend(touched);
        }
        if let Some(by) = bridge {
            let is_first = self.picture.desired().part(&Owner::Pods).is_empty();
            let kept = self.picture.keep_bridge(&self.observed);
            if is_first {
                // The plugin is about to do the same: no program has changed anything.
                let ops = self.compare(&kept.iter().cloned().collect());
                self.execute(ops).await;
            }
            authors.extend(by.into_iter().flat_map(|by| kept.iter().map(move |key| (key.clone(), by.clone()))));
            keys.extend(kept);
        }
        let ops = self.compare(&keys);
        self.repair(ops, Drift::Notified, &authors).await;
    }

    /// Takes one change into the memory of the kernel, and returns the keys that it concerns.
    async fn take_in(&mut self, change: Changed) -> BTreeSet<Key> {
        match change {
            Changed::Set(object) => {
                if matches!(object, Object::Sysctl(_)) {
                    self.hurry_sysctls();
                }
                let key = object.key();
                self.observed.insert(object);
                BTreeSet::from([key])
            }
            Changed::Gone(key) => {
                self.observed.remove(&key);
                BTreeSet::from([key])
            }
            Changed::Rules(family) => {
                let scope = Scope { rulesets: vec![family], ..Scope::default() };
                self.observe_fast(scope, vec![Key::Ruleset(family)]).await
            }
            Changed::File => {
                let scope = Scope { file: self.picture.scope().file, ..Scope::default() };
                self.observe_fast(scope, vec![Key::EnvFile]).await
            }
            Changed::Iptables(family) => {
                let scope = Scope { iptables: vec![family], ..Scope::default() };
                self.observe_slow(scope, Variant::ALL.map(|variant| Key::Iptables(family, variant)).to_vec());
                BTreeSet::new()
            }
            Changed::PodRules => {
                self.observe_slow(Scope { pod_rules: true, ..Scope::default() }, vec![Key::PodRules]);
                BTreeSet::new()
            }
            Changed::Link(name) => {
                if name == self.picture.node().ext {
                    self.interface.changed();
                }
                self.links_changed();
                BTreeSet::new()
            }
            Changed::Foreign => {
                self.checks.soon(Instant::now());
                BTreeSet::new()
            }
            Changed::Everything => {
                self.overruns += 1;
                self.interface.changed();
                self.links_changed();
                BTreeSet::new()
            }
            // The caller counts these together.
            Changed::Bridge | Changed::Port(..) | Changed::PortGone(_) => BTreeSet::new(),
        }
    }

    /// A link was created or changed: the kernel deletes routes with it without a notification, and what failed for want of it may
    /// succeed now. Objects in conflict keep their pace.
    fn links_changed(&mut self) {
        self.audit.soon(SETTLE);
        self.failures.hurry(Instant::now(), |_| true);
    }

    /// Where `/proc/sys` is read-only, forwarding is switched on at each interface instead, which another program may undo and which a new
    /// interface lacks: a sysctl that could not be written is tried again soon.
    fn hurry_sysctls(&mut self) {
        self.failures.hurry(Instant::now(), |key| matches!(key, Key::Sysctl(_)));
    }

    async fn observe_bridge(&mut self) -> BTreeSet<Key> {
        let Scope { gateways, bridge, .. } = self.picture.scope();
        let seen = self.observed.bridge().map(|seen| Key::Bridge(seen.name)).into_iter().collect();
        let touched = self.observe_fast(Scope { gateways, bridge, ..Scope::default() }, seen).await;
        self.hurry_sysctls();
        touched
    }

    /// Reads what of `scope` is in the fast lane now. `keys` are those of which nothing may be found; they are returned.
    async fn observe_fast(&mut self, scope: Scope, keys: Vec<Key>) -> BTreeSet<Key> {
        match self.host.observe(scope, Lane::Fast).await {
            Ok(now) => {
                keys.iter().for_each(|key| self.observed.remove(key));
                now.iter().for_each(|(_, object)| self.observed.insert(object.clone()));
                keys.into_iter().collect()
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read object; the next audit reads it again");
                BTreeSet::new()
            }
        }
    }
}
