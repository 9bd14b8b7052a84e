//! The document at `/state`: what this node knows, wants and could not do. A wire form of its own; field names are
//! stable.

use serde::Serialize;

/// The whole document.
#[derive(Debug, Clone, Serialize)]
pub struct State {
    /// The daemon's version.
    pub version: &'static str,
    /// `Backend.Type`
    pub backend: &'static str,
    /// This node's lease.
    pub subnet: String,
    /// The external interface.
    pub interface: String,
    /// The published address.
    pub public_ip: Option<String>,
    /// MTU for pods, in bytes.
    pub mtu: u32,
    /// What the store said.
    pub store: Store,
    /// The other hosts.
    pub peers: Peers,
    /// What is in the kernel.
    pub objects: Objects,
}

/// What the store said.
#[derive(Debug, Clone, Serialize)]
pub struct Store {
    /// Is it being followed right now?
    pub connected: bool,
    /// Leases that are there, this node's included.
    pub leases: usize,
    /// Did it ever say that a list was complete?
    pub complete: bool,
}

/// The other hosts.
#[derive(Debug, Clone, Serialize)]
pub struct Peers {
    /// How many have objects in the kernel or on their way there.
    pub programmed: usize,
    /// Those that have none, or not all, and why.
    pub refused: Vec<Refused>,
}

/// A peer without a route.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    /// Its lease.
    pub subnet: String,
    /// Its published address.
    pub public_ip: Option<String>,
    /// Why.
    pub reasons: Vec<String>,
}

/// What is in the kernel.
#[derive(Debug, Clone, Serialize)]
pub struct Objects {
    /// How many objects there shall be.
    pub desired: usize,
    /// Those that the kernel refuses.
    pub failed: Vec<Failed>,
}

/// An object that the kernel refuses.
#[derive(Debug, Clone, Serialize)]
pub struct Failed {
    /// What it is.
    pub object: String,
    /// What the kernel said.
    pub error: String,
    /// How often it was tried.
    pub attempts: u32,
}
