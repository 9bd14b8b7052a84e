//! One call at a time where several of them read and then change what they share: tables of iptables and nftables, the
//! link of a VLAN. The lock is on the host's network namespace itself (`flock(2)` on its file): it is where those things
//! are, it needs no folder, and it ends with the process, however that ends.

use std::fs::File;

use rustix::fs::FlockOperation;

use crate::protocol::CniError;

/// Held until it is dropped. A process must not ask for it twice.
pub(crate) struct Lock(#[expect(dead_code, reason = "its descriptor is the lock")] File);

/// Waits for the lock of the host's namespace, in which the calling thread is.
pub(crate) fn host() -> Result<Lock, CniError> {
    let locked = File::open("/proc/thread-self/ns/net").and_then(|file| {
        rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
        Ok(Lock(file))
    });
    locked.map_err(|error| CniError::new(5, format!("cannot lock the host's network namespace: {error}")))
}
