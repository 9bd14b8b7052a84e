//! The daemon, the embedded store and the lab, as a library with a thin program: tests and benchmarks start the same
//! parts.

pub mod app;
pub mod cli;
pub mod docker_opts;
pub mod embedded;
pub mod etcd;
pub mod facts;
pub mod host;
pub mod http;
pub mod install_cni;
pub mod kernel_thread;
pub mod lab;
pub mod notice;
pub mod ready;
pub mod reconcile;
pub mod state;
pub mod store;
