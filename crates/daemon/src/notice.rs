//! What an operator must know beyond the log: where there is a place for it (Kubernetes' Events) it is put there.

use tokio::sync::mpsc;

/// Notices that may wait. A store that does not take them in time costs notices, never the daemon.
const WAITING: usize = 64;

/// One thing that wants an operator's attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// What kind of thing, in CamelCase, for machines.
    pub reason: &'static str,
    /// What is wrong and what would help, in one line.
    pub text: String,
}

impl Notice {
    /// A notice.
    pub fn new(reason: &'static str, text: impl Into<String>) -> Notice {
        Notice { reason, text: text.into() }
    }
}

/// Where notices are put. Clones lead to the same place.
#[derive(Debug, Clone)]
pub struct Notices(mpsc::Sender<Notice>);

impl Notices {
    /// A place, and what comes out of it.
    pub fn new() -> (Notices, mpsc::Receiver<Notice>) {
        let (put, taken) = mpsc::channel(WAITING);
        (Notices(put), taken)
    }

    /// Warns.
    pub fn warn(&self, reason: &'static str, text: String) {
        self.put(Notice::new(reason, text));
    }

    /// Puts a notice in the queue. Where no store takes it, the log has it.
    pub fn put(&self, notice: Notice) {
        let _ = self.0.try_send(notice);
    }
}
