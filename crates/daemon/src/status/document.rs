//! The state document as `flanneld status` reads it. Every field has a default: the daemon may be older or newer than this program.

use serde::Deserialize;

/// The document.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Document {
    pub(super) schema: u32,
    pub(super) version: String,
    pub(super) node: String,
    pub(super) uptime_s: u64,
    pub(super) pending: Vec<String>,
    pub(super) backend: String,
    pub(super) vni: Option<u32>,
    pub(super) port: Option<u16>,
    pub(super) rules: String,
    pub(super) forwarding: bool,
    pub(super) probing: bool,
    pub(super) subnet: String,
    pub(super) interface: String,
    pub(super) public_ip: Option<String>,
    pub(super) mtu: u32,
    pub(super) findings: Vec<Finding>,
    pub(super) store: Store,
    pub(super) peers: Peers,
    pub(super) objects: Objects,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Finding {
    pub(super) severity: String,
    pub(super) code: String,
    pub(super) text: String,
    pub(super) fix: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Store {
    pub(super) connected: bool,
    pub(super) doubtful: usize,
    pub(super) complete: bool,
    pub(super) endpoint: String,
    pub(super) last_event_s: Option<u64>,
    pub(super) renewal_s: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Peers {
    pub(super) list: Vec<Peer>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Peer {
    pub(super) subnet: String,
    pub(super) public_ip: Option<String>,
    pub(super) state: String,
    pub(super) reasons: Vec<String>,
    pub(super) object: Option<String>,
    pub(super) paths: Vec<PathState>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PathState {
    pub(super) family: String,
    pub(super) verdict: String,
    pub(super) reason: Option<String>,
    pub(super) error: Option<String>,
    pub(super) since_s: u64,
    pub(super) rtt_ms: Option<f64>,
    pub(super) probes: u32,
    pub(super) lost: u32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Objects {
    pub(super) failed: Vec<Failed>,
    pub(super) conflicts: Vec<Conflict>,
    pub(super) repairs: Vec<Repair>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Failed {
    pub(super) object: String,
    pub(super) error: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conflict {
    pub(super) object: String,
    pub(super) by: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Repair {
    pub(super) ago_s: u64,
    pub(super) kind: String,
    pub(super) action: String,
    pub(super) by: Option<String>,
}
