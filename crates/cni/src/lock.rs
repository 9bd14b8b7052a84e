//! Locks between plugins that read and then change what others read and change as well: tables of iptables and nftables, the
//! link of a VLAN.

use kernel::lock::{self, Lock};
use kernel::pod_rules::Notes;

use crate::protocol::CniError;

/// Waits for the notes of pods' rules. A process must not ask for them twice.
pub(crate) fn notes() -> Result<Notes, CniError> {
    Notes::hold().map_err(busy)
}

/// Waits for the lock of the host's namespace, in which the calling thread is. A process must not ask for it twice.
pub(crate) fn host() -> Result<Lock, CniError> {
    lock::lock().map_err(busy)
}

/// Code 11: the runtime tries again later.
pub(crate) fn busy(error: std::io::Error) -> CniError {
    CniError::new(11, format!("{error}; try again later"))
}
