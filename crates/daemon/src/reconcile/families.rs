//! Families apart: one that cannot be set up on this node is left out of the file for the CNI plugins, with advice, and the other goes on.

use std::time::Duration;

use flannel::Family;
use flannel::object::Object;
use tokio::time::Instant;

use super::Reconciler;
use crate::host::Host;

/// How long a family that worked must fail before pods are not given its addresses any more: a moment's failure would cost each pod
/// that is added in it that family for its whole life.
const PATIENCE: Duration = Duration::from_secs(30);

/// A family that does not work on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Down {
    family: Family,
    /// Why, and what would help.
    reason: String,
    since: Instant,
}

impl<H: Host + 'static> Reconciler<H> {
    /// Why a family does not work on this node, if it does not: its backend cannot carry it, or the kernel refuses one of the objects that
    /// it needs.
    fn family_problem(&self, family: Family) -> Option<String> {
        if let Some(problem) = self.picture.problem(family) {
            return Some(problem);
        }
        let needs = |object: &&Object| {
            let policy = object.policy();
            policy.family.is_none_or(|needing| needing == family) && !policy.optional && !matches!(object, Object::EnvFile(_))
        };
        let refused = self.own_objects().iter().filter(needs).filter_map(|object| self.failures.get(&object.key()));
        // The others fail because the first one does: links come before the objects on them.
        refused.filter(|failure| failure.is_refused()).map(|failure| failure.error.text.clone()).next()
    }

    /// Offers pods the families that work. The file for the CNI plugins comes with the first one, and with it this node counts as set up.
    pub(super) async fn offer_families(&mut self) {
        let now = Instant::now();
        let mut down = Vec::new();
        for (family, _) in self.picture.config().networks.iter() {
            let Some(reason) = self.family_problem(family) else { continue };
            let before = self.down.iter().find(|before| before.family == family);
            let since = before.map_or(now, |before| before.since);
            if before.is_none_or(|before| before.reason != reason) {
                tracing::warn!(%family, reason, "address family is down on this node");
                self.notices.warn("FamilyDown", format!("{family} does not work on this node: {reason}"));
            }
            down.push(Down { family, reason, since });
        }
        for before in self.down.iter().filter(|before| down.iter().all(|now| now.family != before.family)) {
            tracing::info!(family = %before.family, "address family works again");
        }
        let is_offered = |family: &Family| {
            let Some(down) = down.iter().find(|down| down.family == *family) else { return true };
            self.picture.usable().contains(family) && now.duration_since(down.since) < PATIENCE
        };
        let usable: Vec<Family> = self.picture.config().networks.iter().map(|(family, _)| family).filter(is_offered).collect();
        self.recheck = down.iter().map(|down| down.since + PATIENCE).filter(|at| *at > now).min();
        self.down = down;
        let was_usable = !self.picture.usable().is_empty();
        if !usable.is_empty() || was_usable {
            // With no family left the last file stays: pods of before go on by it.
            let usable = if usable.is_empty() { self.picture.usable().to_vec() } else { usable };
            let keys = self.picture.set_usable(usable).into_iter().collect();
            let ops = self.compare(&keys);
            self.execute(ops).await;
        }
        self.finish_start();
    }

    /// Says on `/readyz` what the node waits for; once the file is written it is set up.
    fn finish_start(&mut self) {
        let Some(guard) = self.starting.take() else { return };
        let file = self.failures.get(&flannel::object::Key::EnvFile).map(|failure| failure.error.text.clone());
        if !self.picture.usable().is_empty() && file.is_none() {
            tracing::info!("devices and rules of this node are in place");
            return drop(guard);
        }
        let reasons: Vec<String> = self.down.iter().map(|down| format!("{}: {}", down.family, down.reason)).chain(file).collect();
        guard.say(&reasons.join("; "));
        self.starting = Some(guard);
    }

    /// Families that do not work, with the reason.
    pub(super) fn families_down(&self) -> impl Iterator<Item = (Family, &str)> {
        self.down.iter().map(|down| (down.family, down.reason.as_str()))
    }
}
