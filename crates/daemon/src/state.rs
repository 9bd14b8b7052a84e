//! The document at `/state` and the numbers at `/metrics`: wire forms of the view. Names are stable.

use std::net::IpAddr;

use flannel::PerFamily;
use serde::Serialize;

use crate::view::{Condition, Conflicted, Failed, Node, PeerState, View};

/// The whole document.
#[derive(Debug, Serialize)]
pub struct State<'a> {
    /// The daemon's version.
    version: &'static str,
    /// `Backend.Type`
    backend: &'static str,
    /// This node's lease.
    subnet: String,
    /// The external interface.
    interface: String,
    /// The published address.
    public_ip: Option<String>,
    /// MTU for pods, in bytes.
    mtu: u32,
    /// What is wrong with this node.
    conditions: &'a [Condition],
    /// What the store said.
    store: Store,
    /// The other hosts.
    peers: Peers<'a>,
    /// Objects in the kernel.
    objects: Objects<'a>,
}

#[derive(Debug, Serialize)]
struct Store {
    connected: bool,
    leases: usize,
    doubtful: usize,
    complete: bool,
}

#[derive(Debug, Serialize)]
struct Peers<'a> {
    /// How many have all their objects in the kernel.
    programmed: usize,
    /// Those that are refused, or one family of them.
    refused: Vec<Peer<'a>>,
    /// Every peer, in the order of subnets.
    list: Vec<Peer<'a>>,
}

#[derive(Debug, Serialize)]
struct Peer<'a> {
    subnet: String,
    public_ip: Option<String>,
    state: &'static str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    reasons: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<String>,
}

#[derive(Debug, Serialize)]
struct Objects<'a> {
    desired: usize,
    failed: &'a [Failed],
    repaired: u64,
    overruns: u64,
    conflicts: &'a [Conflicted],
}

fn first(addresses: &PerFamily<IpAddr>) -> Option<String> {
    addresses.iter().next().map(|(_, ip)| ip.to_string())
}

fn is_programmed(state: &PeerState) -> bool {
    matches!(state, PeerState::Programmed | PeerState::Doubtful)
}

fn peer(peer: &crate::view::PeerView) -> Peer<'_> {
    let (reasons, object) = match &peer.state {
        PeerState::Refused(reasons) => (reasons.as_slice(), None),
        PeerState::Failed(key) => (&[][..], Some(key.to_string())),
        PeerState::Programmed | PeerState::Doubtful => (&[][..], None),
    };
    Peer { subnet: peer.subnet.to_string(), public_ip: first(&peer.public), state: peer.state.name(), reasons, object }
}

impl State<'_> {
    /// The document; `None` while this node has no lease.
    pub fn new(view: &View) -> Option<State<'_>> {
        let Node { backend, subnet, interface, published, mtu, .. } = view.node?;
        let refused = view.peers.iter().filter(|peer| matches!(peer.state, PeerState::Refused(_)));
        Some(State {
            version: env!("CARGO_PKG_VERSION"),
            backend,
            subnet: subnet.to_string(),
            interface: interface.to_string(),
            public_ip: first(&published),
            mtu,
            conditions: &view.conditions,
            store: Store {
                connected: view.store.connected,
                leases: view.store.leases,
                doubtful: view.store.doubtful,
                complete: view.store.complete,
            },
            peers: Peers {
                programmed: view.peers.iter().filter(|peer| is_programmed(&peer.state)).count(),
                refused: refused.map(peer).collect(),
                list: view.peers.iter().map(peer).collect(),
            },
            objects: Objects {
                desired: view.objects.desired,
                failed: &view.objects.failed,
                repaired: view.objects.repaired,
                overruns: view.objects.overruns,
                conflicts: &view.objects.conflicts,
            },
        })
    }
}

/// The numbers, in Prometheus' text format 0.0.4; `None` while this node has no lease.
pub fn metrics(view: &View, ready: bool) -> Option<String> {
    let node = view.node?;
    let mut text = String::new();
    let mut put = |name: &str, kind: &str, help: &str, values: &[(&str, String)]| {
        text.push_str(&format!("# HELP flannel_{name} {help}\n# TYPE flannel_{name} {kind}\n"));
        values.iter().for_each(|(labels, value)| text.push_str(&format!("flannel_{name}{labels} {value}\n")));
    };
    let number = |n: usize| n.to_string();
    let (version, backend, subnet) = (env!("CARGO_PKG_VERSION"), node.backend, node.subnet);
    let info = format!("{{version=\"{version}\",backend=\"{backend}\",subnet=\"{subnet}\"}}");
    put("info", "gauge", "This node.", &[(&info, "1".to_owned())]);
    put("ready", "gauge", "1 if /readyz reports ready.", &[("", u8::from(ready).to_string())]);
    put("conditions", "gauge", "Problems of this node, listed in /state.", &[("", number(view.conditions.len()))]);
    put("store_connected", "gauge", "1 if the store is being followed.", &[("", u8::from(view.store.connected).to_string())]);
    put("leases", "gauge", "Leases in the store, this node's included.", &[("", number(view.store.leases))]);
    put("leases_doubtful", "gauge", "Leases that a store which lost data does not know.", &[("", number(view.store.doubtful))]);
    let count = |state: &str| number(view.peers.iter().filter(|peer| peer.state.name() == state).count());
    let states = ["programmed", "refused", "failed", "doubtful"].map(|state| (format!("{{state=\"{state}\"}}"), count(state)));
    let peers: Vec<(&str, String)> = states.iter().map(|(label, count)| (label.as_str(), count.clone())).collect();
    put("peers", "gauge", "Other hosts, by what was done for them.", &peers);
    put("objects", "gauge", "Objects that should be in the kernel.", &[("", number(view.objects.desired))]);
    put("objects_failed", "gauge", "Objects that the kernel refuses, or that are in conflict.", &[("", number(view.objects.failed.len()))]);
    put("repairs_total", "counter", "Repairs of objects.", &[("", view.objects.repaired.to_string())]);
    put("overruns_total", "counter", "Times that notifications of the kernel were lost.", &[("", view.objects.overruns.to_string())]);
    put("conflicts", "gauge", "Objects that another program keeps changing.", &[("", number(view.objects.conflicts.len()))]);
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Objects, PeerView, Store};
    use expect_test::{Expect, expect};
    use flannel::LeaseKey;

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn view() -> View {
        let public = |text: &str| PerFamily { v4: text.parse().ok(), v6: None };
        let (interface, addresses) = ("eth0".parse().unwrap(), public("192.0.2.1"));
        let peer = |subnet: &str, ip: &str, state| PeerView { subnet: key(subnet), public: public(ip), state };
        View {
            node: Some(Node { backend: "vxlan", subnet: key("10.244.1.0/24"), interface, addresses, published: addresses, mtu: 1450 }),
            store: Store { connected: true, leases: 5, doubtful: 1, complete: true },
            peers: vec![
                peer("10.244.2.0/24", "192.0.2.2", PeerState::Programmed),
                peer("10.244.3.0/24", "192.0.2.3", PeerState::Refused(vec!["it publishes no IPv4 address".to_owned()])),
                peer("10.244.4.0/24", "192.0.2.4", PeerState::Failed(flannel::object::Key::Route("10.244.4.0/24".parse().unwrap(), 4))),
                peer("10.244.5.0/24", "192.0.2.5", PeerState::Doubtful),
            ],
            objects: Objects { desired: 9, failed: Vec::new(), repaired: 4, overruns: 2, conflicts: Vec::new() },
            conditions: vec![Condition { code: "family-down", text: "IPv6 does not work on this node: x".to_owned(), blocks_ready: false }],
        }
    }

    #[track_caller]
    fn check(text: &str, want: Expect) {
        want.assert_eq(text);
    }

    #[test]
    fn the_document_lists_every_peer_with_its_state() {
        let view = view();
        let state = serde_json::to_value(State::new(&view).unwrap()).unwrap();
        check(
            &serde_json::to_string(&state["peers"]["list"]).unwrap(),
            expect![[
                r#"[{"public_ip":"192.0.2.2","state":"programmed","subnet":"10.244.2.0/24"},{"public_ip":"192.0.2.3","reasons":["it publishes no IPv4 address"],"state":"refused","subnet":"10.244.3.0/24"},{"object":"route 10.244.4.0/24 metric 4","public_ip":"192.0.2.4","state":"failed","subnet":"10.244.4.0/24"},{"public_ip":"192.0.2.5","state":"doubtful","subnet":"10.244.5.0/24"}]"#
            ]],
        );
        assert_eq!((&state["peers"]["programmed"], &state["conditions"][0]["code"]), (&2.into(), &"family-down".into()));
        assert!(State::new(&View::default()).is_none());
    }

    #[test]
    fn metrics_are_prometheus_text() {
        let text = metrics(&view(), false).unwrap();
        check(
            &text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect::<String>(),
            expect![[r#"
            flannel_info{version="0.1.0",backend="vxlan",subnet="10.244.1.0/24"} 1
            flannel_ready 0
            flannel_conditions 1
            flannel_store_connected 1
            flannel_leases 5
            flannel_leases_doubtful 1
            flannel_peers{state="programmed"} 1
            flannel_peers{state="refused"} 1
            flannel_peers{state="failed"} 1
            flannel_peers{state="doubtful"} 1
            flannel_objects 9
            flannel_objects_failed 0
            flannel_repairs_total 4
            flannel_overruns_total 2
            flannel_conflicts 0
        "#]],
        );
        assert!(text.starts_with("# HELP flannel_info This node.\n# TYPE flannel_info gauge\n"));
    }
}
