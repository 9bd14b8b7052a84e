//! Processes: children of the lab, and the memory of our own.

use std::process::Command;

use crate::sys;

/// Makes the command's process be killed when the thread that spawns it ends, also when that is by a crash.
pub fn die_with_parent(command: &mut Command) {
    sys::die_with_parent(command);
}

/// Lets the allocator have one arena for all threads: two threads that hand large lists to each other would keep the memory of
/// each list twice. Must come before there is a second thread.
pub fn one_arena() {
    sys::one_arena();
}

/// Gives memory that was freed back to the kernel. The allocator keeps it, in case it is needed again; after a list of all
/// leases, which comes once, it is not.
pub fn release_memory() {
    sys::release_memory();
}
