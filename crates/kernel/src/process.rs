//! Child processes of the lab.

use std::process::Command;

use crate::sys;

/// Makes the command's process be killed when the thread that spawns it ends, also when that is by a crash.
pub fn die_with_parent(command: &mut Command) {
    sys::die_with_parent(command);
}
