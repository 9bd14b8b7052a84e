//! The document at `/state`: what this node knows, wants and could not do; and its numbers for `/metrics`. Wire forms of
//! their own; names are stable.

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
    /// Those of them that a store which lost data knows nothing of, until their hosts have written them again.
    pub doubtful: usize,
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
    /// How many were put right so far, because somebody or something had changed them.
    pub repaired: u64,
    /// How often the kernel's notifications were lost, after which all was read anew.
    pub overruns: u64,
    /// Those that somebody undoes again and again.
    pub fights: Vec<Fight>,
}

/// An object that somebody undoes again and again.
#[derive(Debug, Clone, Serialize)]
pub struct Fight {
    /// What it is.
    pub object: String,
    /// Who does it, where the kernel tells.
    pub by: Option<String>,
    /// How often it was put right.
    pub times: u32,
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

impl State {
    /// The numbers, in Prometheus' text format 0.0.4.
    pub fn metrics(&self, ready: bool) -> String {
        let mut text = String::new();
        let mut put = |name: &str, kind: &str, help: &str, values: &[(&str, String)]| {
            text.push_str(&format!("# HELP flannel_{name} {help}\n# TYPE flannel_{name} {kind}\n"));
            values.iter().for_each(|(labels, value)| text.push_str(&format!("flannel_{name}{labels} {value}\n")));
        };
        let number = |n: usize| n.to_string();
        let info = format!("{{version=\"{}\",backend=\"{}\",subnet=\"{}\"}}", self.version, self.backend, self.subnet);
        put("info", "gauge", "This node.", &[(&info, "1".to_owned())]);
        put("ready", "gauge", "1 if nothing is waited for.", &[("", u8::from(ready).to_string())]);
        put("store_connected", "gauge", "1 if the store is being followed.", &[("", u8::from(self.store.connected).to_string())]);
        put("leases", "gauge", "Leases in the store, this node's included.", &[("", number(self.store.leases))]);
        put("leases_doubtful", "gauge", "Leases that the store has lost.", &[("", number(self.store.doubtful))]);
        let peers = [("{state=\"programmed\"}", number(self.peers.programmed)), ("{state=\"refused\"}", number(self.peers.refused.len()))];
        put("peers", "gauge", "Other hosts, by what could be done for them.", &peers);
        put("objects", "gauge", "Objects that shall be in the kernel.", &[("", number(self.objects.desired))]);
        put("objects_failed", "gauge", "Objects that cannot be set.", &[("", number(self.objects.failed.len()))]);
        put("repairs_total", "counter", "Objects that were put right.", &[("", self.objects.repaired.to_string())]);
        put("overruns_total", "counter", "Times that the kernel's notifications were lost.", &[("", self.objects.overruns.to_string())]);
        put("fights", "gauge", "Objects that somebody undoes again and again.", &[("", number(self.objects.fights.len()))]);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_prometheus_text() {
        let state = State {
            version: "1",
            backend: "vxlan",
            subnet: "10.244.1.0/24".to_owned(),
            interface: "eth0".to_owned(),
            public_ip: None,
            mtu: 1450,
            store: Store { connected: true, leases: 3, doubtful: 1, complete: true },
            peers: Peers { programmed: 2, refused: Vec::new() },
            objects: Objects { desired: 9, failed: Vec::new(), repaired: 4, overruns: 2, fights: Vec::new() },
        };
        let text = state.metrics(false);
        let values: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            values,
            [
                r#"flannel_info{version="1",backend="vxlan",subnet="10.244.1.0/24"} 1"#,
                "flannel_ready 0",
                "flannel_store_connected 1",
                "flannel_leases 3",
                "flannel_leases_doubtful 1",
                r#"flannel_peers{state="programmed"} 2"#,
                r#"flannel_peers{state="refused"} 0"#,
                "flannel_objects 9",
                "flannel_objects_failed 0",
                "flannel_repairs_total 4",
                "flannel_overruns_total 2",
                "flannel_fights 0",
            ]
        );
        assert!(text.starts_with("# HELP flannel_info This node.\n# TYPE flannel_info gauge\n"));
    }
}
