//! Settings of processes: the life of child processes, and the memory allocator of this process.

use std::process::Command;

use crate::sys;

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
