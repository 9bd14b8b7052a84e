//! Settings of processes: the life of child processes, and rights and memory allocator of this process.

use std::io;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySets, capabilities, capability_is_in_bounding_set, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use crate::sys;

/// The processor time that the calling thread has used.
pub fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Makes the kernel kill the command's process when the thread that spawned it ends, even by a crash.
pub fn die_with_parent(command: &mut Command) {
    sys::die_with_parent(command);
}

/// Limits the allocator to one arena for all threads: with more, two threads that pass large lists to each other keep the memory of
/// each list twice. Must be called before a second thread is started.
pub fn one_arena() {
    sys::one_arena();
}

/// Returns freed memory to the kernel. The allocator would keep it for reuse, but the memory of a list of all leases is needed only
/// once.
pub fn release_memory() {
    sys::release_memory();
}

pub use rustix::thread::CapabilitySet as Capabilities;

/// Gives up all capabilities but these, for this process and the programs that it runs, which cannot gain others either. A process
/// that is not root keeps those of them that it was given. Must be called before a second thread is started.
///
/// # Errors
/// When the kernel refuses; then the process has what it had.
pub fn keep_capabilities(kept: Capabilities) -> io::Result<()> {
    let have = capabilities(None)?;
    if have.effective.contains(Capabilities::SETPCAP) {
        for number in 0..u64::BITS {
            let one = Capabilities::from_bits_retain(1 << number);
            match capability_is_in_bounding_set(one) {
                // The kernel knows no more.
                Err(Errno::INVAL) => break,
                Ok(true) if !kept.contains(one) => remove_capability_from_bounding_set(one)?,
                _ => {}
            }
        }
    }
    let keep = |set: Capabilities| set & kept;
    // A service manager may have reduced them already, and may forbid this call.
    if have.permitted != keep(have.permitted) || have.inheritable != keep(have.inheritable) {
        let sets = CapabilitySets { effective: keep(have.effective), permitted: keep(have.permitted), inheritable: keep(have.inheritable) };
        set_capabilities(None, sets)?;
    }
    Ok(set_no_new_privs(true)?)
}
