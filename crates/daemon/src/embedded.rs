//! `flanneld store`: the embedded default, a single-node server of the part of the etcd v3 API that flannel uses. It
//! serves one machine, a trial or the lab; who outgrows it points `--etcd-endpoints` at an etcd cluster, and nothing
//! else changes.
//!
//! One thread, the engine, owns the `state` and the file (`disk`). Requests reach it as closures; those that wait
//! together are executed together, written in one transaction, and answered after that is on disk. Nobody hears of a
//! change that is not.

mod disk;
mod engine;
pub mod memory;
mod server;
mod state;

pub use server::{Bound, StoreArgs, bind};
