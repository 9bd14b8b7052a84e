//! Readiness as a set of named guards: each part that is not ready yet holds one, and nobody can forget a flag.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// What is still pending. Clones share the set.
#[derive(Debug, Clone, Default)]
pub struct Ready(Arc<Mutex<BTreeSet<&'static str>>>);

/// Holds a name in the set until it is dropped.
#[derive(Debug)]
pub struct Guard {
    ready: Ready,
    name: &'static str,
}

impl Ready {
    /// Adds a name to what is pending.
    pub fn guard(&self, name: &'static str) -> Guard {
        self.set(|pending| pending.insert(name));
        Guard { ready: self.clone(), name }
    }

    /// What is pending; nothing means ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.set(|pending| pending.iter().copied().collect())
    }

    fn set<T>(&self, f: impl FnOnce(&mut BTreeSet<&'static str>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.ready.set(|pending| pending.remove(self.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_guard_is_dropped() {
        let ready = Ready::default();
        let (a, b) = (ready.guard("lease"), ready.guard("first sync"));
        drop(a);
        assert_eq!(ready.pending(), ["first sync"]);
        drop(b);
        assert!(ready.pending().is_empty());
    }
}
