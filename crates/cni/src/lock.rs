//! One call at a time where several of them read and then change what they share: tables of iptables and nftables, the
//! link of a VLAN.

use kernel::lock::{self, Lock};
use kernel::pod_rules::Notes;

use crate::protocol::CniError;

/// Waits for the notes of what plugins wrote. A process must not ask for them twice.
pub(crate) fn notes() -> Result<Notes, CniError> {
    Notes::hold().map_err(|error| CniError::new(11, format!("try again later: {error}")))
}

/// Waits for the lock of the host's namespace, in which the calling thread is. A process must not ask for it twice.
pub(crate) fn host() -> Result<Lock, CniError> {
    lock::lock().map_err(|error| CniError::new(11, format!("try again later: {error}")))
}
