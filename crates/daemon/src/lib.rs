//! The daemon and the embedded store, as a library: `flanneld` is a thin program over it, and tests, the lab and benchmarks start the
//! same parts.

pub mod app;
pub mod bugreport;
pub mod cleanup;
pub mod clock;
pub mod docker_opts;
pub mod doctor;
pub mod embedded;
pub mod etcd;
pub mod events;
pub mod facts;
pub mod host;
pub mod http;
pub mod install_cni;
pub mod ipam;
pub mod kernel_thread;
pub mod monitor;
mod newcomers;
pub mod notice;
pub mod output;
pub mod probe;
pub mod ready;
pub mod reconcile;
pub mod settings;
pub mod socket;
pub mod state;
pub mod status;
pub mod store;
mod systemd;
pub mod terminal;
pub mod view;
