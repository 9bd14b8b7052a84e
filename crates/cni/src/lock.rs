//! Locks between plugins that read and change shared state: tables of iptables and nftables, and the links of a VLAN.

use kernel::lock::{self, Lock};
use kernel::pod_rules::Notes;

use crate::protocol::CniError;

/// Waits for the lock of the notes of pods' rules. A process that holds it must not take it again.
pub(crate) fn notes() -> Result<Notes, CniError> {
    Notes::hold().map_err(busy)
}

/// Waits for the lock of the host's network namespace, in which the calling thread runs. A process that holds it must not take
/// it again.
pub(crate) fn host() -> Result<Lock, CniError> {
    lock::lock().map_err(busy)
}

/// An error with code 11: the runtime should try again later.
pub(crate) fn busy(error: std::io::Error) -> CniError {
    CniError::new(11, format!("{error}; try again later"))
}
