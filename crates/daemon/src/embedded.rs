//! `flanneld store`: an embedded store, a single-node server of the part of the etcd v3 API that flannel uses. It serves one
//! machine, a trial or the lab; a larger cluster points `--etcd-endpoints` at an etcd cluster, and nothing else changes.
//!
//! One thread, the engine, owns the `state` and the file (`disk`). Requests reach it as closures; those that wait together are
//! executed together, written in one transaction, and answered after that is on disk. Everything that a client can make the
//! store hold is bounded: by `limits`, in `state`, `connection`, `guard` and `watch`. On an address that is not loopback only clients
//! with a certificate are served (`tls`); the store is the authority that issues it (`certificates`).

mod certificates;
mod connection;
mod disk;
mod engine;
mod guard;
mod limits;
pub mod memory;
mod server;
mod state;
mod tls;
mod watch;

pub use server::{Bound, StoreArgs, bind};
pub use tls::TlsArgs;
