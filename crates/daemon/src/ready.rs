//! Readiness as a set of named guards: each part that is not ready yet holds one, so that no flag can be forgotten.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// The pending guards. Clones share the set.
#[derive(Debug, Clone, Default)]
pub struct Ready(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Names, and what each waits for, as far as it is known.
    pending: Mutex<BTreeMap<&'static str, String>>,
    changed: Notify,
}

/// Holds a name in the set until it is dropped.
#[derive(Debug)]
pub struct Guard {
    ready: Ready,
    name: &'static str,
}

impl Ready {
    /// Adds a guard with this name.
    pub fn guard(&self, name: &'static str) -> Guard {
        self.set(|pending| pending.insert(name, String::new()));
        Guard { ready: self.clone(), name }
    }

    /// Pending names with their reasons; none means ready.
    pub fn pending(&self) -> Vec<String> {
        let text = |(name, why): (&&str, &String)| if why.is_empty() { (*name).to_owned() } else { format!("{name} ({why})") };
        self.set(|pending| pending.iter().map(text).collect())
    }

    /// Waits until a guard of this name is dropped.
    pub async fn passed(&self, name: &'static str) {
        loop {
            let changed = self.0.changed.notified();
            if !self.set(|pending| pending.contains_key(name)) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until nothing is pending.
    pub async fn reached(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.pending().is_empty() {
                return;
            }
            changed.await;
        }
    }

    fn set<T>(&self, f: impl FnOnce(&mut BTreeMap<&'static str, String>) -> T) -> T {
        f(&mut self.0.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Guard {
    /// Says what this part waits for.
    pub fn say(&self, why: &str) {
        self.ready.set(|pending| pending.insert(self.name, why.to_owned()));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.ready.set(|pending| pending.remove(self.name));
        self.ready.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_guard_is_dropped() {
        let ready = Ready::default();
        let (a, b) = (ready.guard("lease"), ready.guard("first sync"));
        a.say("the store does not answer");
        assert_eq!(ready.pending(), ["first sync", "lease (the store does not answer)"]);
        drop(a);
        assert_eq!(ready.pending(), ["first sync"]);
        drop(b);
        assert!(ready.pending().is_empty());
    }

    #[tokio::test]
    async fn reached_wakes_waiters() {
        let ready = Ready::default();
        let guard = ready.guard("lease");
        let waiting = tokio::spawn({
            let ready = ready.clone();
            async move { ready.reached().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(guard);
        waiting.await.unwrap();
    }
}
