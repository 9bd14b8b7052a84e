//! A cluster on one machine: each host is a network namespace with a real `flanneld`, joined to the others by a switch or a
//! router, with a store that all hosts reach and pods created by the CNI plugin. Also the base of the integration tests.
//!
//! Everything lives in namespaces of the calling process and on a tmpfs that only it sees, and every process that it starts
//! is killed when it ends, however it ends. So nothing is left behind, and there is no clean-up code.

pub mod chaos;
mod check;
pub mod cli;
mod cluster;
pub mod events;
mod exec;
pub mod faults;
mod interrupt;
mod keep;
mod measure;
pub mod packet;
pub mod ping;
mod plan;
mod process;
mod progress;
mod show;
pub mod stage;
pub mod verdicts;

pub use cluster::{Host, Lab, Pod, STORE, kubernetes};
pub use plan::{Plan, PodFamily, Secure, StoreKind, Topology};
pub use process::shell;

use std::path::{Path, PathBuf};

use anyhow::Context;
use kernel::{mounts, netns};

/// Moves the process into namespaces of its own and returns a directory that only it sees. Must be called while the process
/// has one thread. The directory is a tmpfs, mounted over one that does not contain `program`.
///
/// # Errors
/// When the system forbids it; the text names the setting to change.
pub fn isolate(program: &Path) -> anyhow::Result<PathBuf> {
    let mut candidates = ["/mnt", "/media", "/srv", "/opt"].iter().map(Path::new);
    let scratch = candidates.find(|path| path.is_dir() && !program.starts_with(path));
    let scratch = scratch.context("cannot mount a private tmpfs: none of /mnt, /media, /srv and /opt exists")?;
    netns::isolate(scratch)?;
    // The namespaces of pods are mounted below it later, and every host must see them.
    mounts::share(scratch).context("cannot share the private tmpfs between the hosts")?;
    Ok(scratch.to_owned())
}
