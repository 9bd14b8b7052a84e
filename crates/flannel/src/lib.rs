//! The decisions of flannel, without I/O. Input: leases, configuration and facts about this node. Output: the desired state of the
//! kernel ([`Desired`]) and the operations that bring it about ([`Op`]).
//!
//! Nothing here performs I/O, reads a clock or draws a random number: time and randomness are arguments, and functions fail only to
//! reject input. The crate is used by `kernel` (which executes [`Op`]s), `daemon` (which feeds it) and `cni` (which reads
//! `subnet.env`).

pub mod alloc;
pub mod annotations;
pub mod backend;
pub mod check;
pub mod config;
pub mod desired;
pub mod diff;
mod json;
pub mod lease;
pub mod net;
pub mod node;
pub mod object;
pub mod observed;
pub mod op;
pub mod picture;
pub mod pod;
pub mod probe;
pub mod renewal;
pub mod scope;
pub mod store_trust;
pub mod subnet_env;
pub mod traffic;
pub mod wire;
pub mod wireguard;

pub use backend::Backend;
pub use config::Config;
pub use desired::Desired;
pub use lease::{Age, Lease, LeaseKey, LeaseSet, Peer, StoreEvent};
pub use net::{Cidr, Family, IfName, Mac, PerFamily, Subnet, Vni};
pub use node::Node;
pub use object::Object;
pub use observed::Observed;
pub use op::{Op, OpError, Outcome};
pub use picture::Picture;
