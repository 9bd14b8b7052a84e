//! The document at `/state` and the numbers at `/metrics`: wire forms of the view. Names are stable.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel::check::{Finding, Severity};
use flannel::probe::{Report, Verdict};
use flannel::{Family, PerFamily};
use serde::Serialize;

use crate::probe::Paths;
use crate::view::{Conflicted, Failed, Node, PeerState, View};

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
    /// Problems of this node, the severe ones first.
    findings: &'a [Finding],
    /// What the store said.
    store: Store,
    /// The other hosts.
    peers: Peers<'a>,
    /// Objects in the kernel.
    objects: Objects<'a>,
    /// Packets that the udp backend dropped, by reason; absent with other backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    udp_dropped: Option<BTreeMap<&'static str, u64>>,
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
    /// How many of their paths, one for each family, are measured and work.
    reachable: usize,
    /// How many of their paths are measured and broken.
    broken: usize,
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
    /// The measured paths, by family.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    paths: Vec<PathState<'a>>,
}

/// A measured path.
#[derive(Debug, Serialize)]
struct PathState<'a> {
    family: &'static str,
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Why this host could not even send.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    /// For how long, in seconds.
    since_s: u64,
    /// Mean round-trip time over the last minute, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_ms: Option<f64>,
    /// Probes of the last minute, and how many of them were lost.
    probes: u32,
    lost: u32,
    /// What the peer's daemon says about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon: Option<Daemon<'a>>,
}

/// A peer's daemon, in its own words.
#[derive(Debug, Serialize)]
struct Daemon<'a> {
    version: &'a str,
    ready: bool,
    failures: u32,
    mtu: u32,
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

fn path<'a>(family: Family, report: &'a Report, at: std::time::Duration) -> PathState<'a> {
    let family = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    PathState {
        family,
        verdict: report.verdict.name(),
        reason: (report.verdict != Verdict::Reachable).then(|| report.verdict.to_string()),
        error: report.error.as_deref(),
        since_s: at.saturating_sub(report.since).as_secs(),
        // To the microsecond.
        rtt_ms: report.rtt.map(|rtt| (rtt.as_secs_f64() * 1e6).round() / 1e3),
        probes: report.sent,
        lost: report.lost,
        daemon: report.summary.as_ref().map(|said| Daemon {
            version: &said.version,
            ready: said.ready,
            failures: said.failures,
            mtu: said.mtu,
        }),
    }
}

fn peer<'a>(peer: &'a crate::view::PeerView, paths: &'a Paths) -> Peer<'a> {
    let (reasons, object) = match &peer.state {
        PeerState::Refused(reasons) => (reasons.as_slice(), None),
        PeerState::Failed(key) => (&[][..], Some(key.to_string())),
        PeerState::Programmed | PeerState::Doubtful => (&[][..], None),
    };
    let reports = Family::ALL.into_iter().filter_map(|family| Some((family, paths.reports.get(&(peer.subnet, family))?)));
    let paths = reports.map(|(family, report)| path(family, report, paths.at)).collect();
    Peer { subnet: peer.subnet.to_string(), public_ip: first(&peer.public), state: peer.state.name(), reasons, object, paths }
}

impl State<'_> {
    /// The document; `None` while this node has no lease.
    pub fn new<'a>(view: &'a View, paths: &'a Paths) -> Option<State<'a>> {
        let Node { backend, subnet, interface, published, mtu, .. } = view.node?;
        let refused = view.peers.iter().filter(|peer| matches!(peer.state, PeerState::Refused(_)));
        Some(State {
            version: env!("CARGO_PKG_VERSION"),
            backend,
            subnet: subnet.to_string(),
            interface: interface.to_string(),
            public_ip: first(&published),
            mtu,
            findings: &view.findings,
            store: Store {
                connected: view.store.connected,
                leases: view.store.leases,
                doubtful: view.store.doubtful,
                complete: view.store.complete,
            },
            peers: Peers {
                programmed: view.peers.iter().filter(|peer| is_programmed(&peer.state)).count(),
                reachable: paths.count(Verdict::Reachable.name()),
                broken: paths.broken().count(),
                refused: refused.map(|refused| peer(refused, paths)).collect(),
                list: view.peers.iter().map(|listed| peer(listed, paths)).collect(),
            },
            objects: Objects {
                desired: view.objects.desired,
                failed: &view.objects.failed,
                repaired: view.objects.repaired,
                overruns: view.objects.overruns,
                conflicts: &view.objects.conflicts,
            },
            udp_dropped: view.drops.as_ref().map(|drops| drops.read().into_iter().map(|(reason, count)| (reason.name(), count)).collect()),
        })
    }
}

/// The numbers, in Prometheus' text format 0.0.4; `None` while this node has no lease.
pub fn metrics(view: &View, paths: &Paths, ready: bool) -> Option<String> {
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
    let severe = |severity: Severity| number(view.findings.iter().filter(|finding| finding.severity == severity).count());
    let severities =
        [Severity::Error, Severity::Warning, Severity::Info].map(|severity| (format!("{{severity=\"{severity}\"}}"), severe(severity)));
    let findings: Vec<(&str, String)> = severities.iter().map(|(label, count)| (label.as_str(), count.clone())).collect();
    put("findings", "gauge", "Problems of this node, listed in /state.", &findings);
    put("store_connected", "gauge", "1 if the store is being followed.", &[("", u8::from(view.store.connected).to_string())]);
    put("leases", "gauge", "Leases in the store, this node's included.", &[("", number(view.store.leases))]);
    put("leases_doubtful", "gauge", "Leases that a store which lost data does not know.", &[("", number(view.store.doubtful))]);
    let count = |state: &str| number(view.peers.iter().filter(|peer| peer.state.name() == state).count());
    let states = ["programmed", "refused", "failed", "doubtful"].map(|state| (format!("{{state=\"{state}\"}}"), count(state)));
    let peers: Vec<(&str, String)> = states.iter().map(|(label, count)| (label.as_str(), count.clone())).collect();
    put("peers", "gauge", "Other hosts, by what was done for them.", &peers);
    let verdicts = Verdict::NAMES.map(|name| (format!("{{verdict=\"{name}\"}}"), number(paths.count(name))));
    let verdicts: Vec<(&str, String)> = verdicts.iter().map(|(label, count)| (label.as_str(), count.clone())).collect();
    put("paths", "gauge", "Paths to peers, one for each family, by what was measured.", &verdicts);
    put("probes_total", "counter", "Probes that were sent to measure paths.", &[("", paths.sent.to_string())]);
    put("objects", "gauge", "Objects that should be in the kernel.", &[("", number(view.objects.desired))]);
    put("objects_failed", "gauge", "Objects that the kernel refuses, or that are in conflict.", &[("", number(view.objects.failed.len()))]);
    put("repairs_total", "counter", "Repairs of objects.", &[("", view.objects.repaired.to_string())]);
    put("overruns_total", "counter", "Times that notifications of the kernel were lost.", &[("", view.objects.overruns.to_string())]);
    put("conflicts", "gauge", "Objects that another program keeps changing.", &[("", number(view.objects.conflicts.len()))]);
    if let Some(drops) = &view.drops {
        let drops: Vec<(String, String)> =
            drops.read().iter().map(|(reason, count)| (format!("{{reason=\"{}\"}}", reason.name()), count.to_string())).collect();
        let drops: Vec<(&str, String)> = drops.iter().map(|(label, count)| (label.as_str(), count.clone())).collect();
        put("udp_dropped_total", "counter", "Packets that the udp backend dropped.", &drops);
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Objects, PeerView, Store};
    use expect_test::{Expect, expect};
    use flannel::LeaseKey;
    use flannel::probe::Summary;
    use std::time::Duration;

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn view() -> View {
        let public = |text: &str| PerFamily { v4: text.parse().ok(), v6: None };
        let (interface, addresses) = ("eth0".parse().unwrap(), public("192.0.2.1"));
        let peer = |subnet: &str, ip: &str, state| PeerView { subnet: key(subnet), public: public(ip), state };
        View {
            node: Some(Node {
                backend: "vxlan",
                subnet: key("10.244.1.0/24"),
                interface,
                addresses,
                published: addresses,
                mtu: 1450,
                path_mtus: PerFamily::default(),
                probe: None,
            }),
            store: Store { connected: true, leases: 5, doubtful: 1, complete: true },
            peers: vec![
                peer("10.244.2.0/24", "192.0.2.2", PeerState::Programmed),
                peer("10.244.3.0/24", "192.0.2.3", PeerState::Refused(vec!["it publishes no IPv4 address".to_owned()])),
                peer("10.244.4.0/24", "192.0.2.4", PeerState::Failed(flannel::object::Key::Route("10.244.4.0/24".parse().unwrap(), 4))),
                peer("10.244.5.0/24", "192.0.2.5", PeerState::Doubtful),
            ],
            objects: Objects { desired: 9, failed: Vec::new(), repaired: 4, overruns: 2, conflicts: Vec::new() },
            drops: None,
            findings: vec![Finding::warning("family-down", "IPv6 does not work on this node: x".to_owned(), "")],
        }
    }

    fn paths() -> Paths {
        let report = Report {
            verdict: Verdict::MtuTooLarge { mtu: 1450, passes: Some(1400) },
            since: Duration::from_secs(30),
            rtt: Some(Duration::from_micros(1234)),
            sent: 20,
            lost: 20,
            error: None,
            summary: Some(Summary { version: "0.1.0".to_owned(), ready: true, failures: 2, mtu: 1450 }),
        };
        Paths { reports: [((key("10.244.2.0/24"), Family::V4), report)].into(), sent: 99, at: Duration::from_secs(90) }
    }

    #[track_caller]
    fn check(text: &str, want: Expect) {
        want.assert_eq(text);
    }

    #[test]
    fn the_document_lists_every_peer_with_its_state() {
        let view = view();
        let state = serde_json::to_value(State::new(&view, &paths()).unwrap()).unwrap();
        check(
            &serde_json::to_string(&state["peers"]["list"]).unwrap(),
            expect![[
                r#"[{"paths":[{"daemon":{"failures":2,"mtu":1450,"ready":true,"version":"0.1.0"},"family":"ipv4","lost":20,"probes":20,"reason":"the path carries packets of 1400 bytes, pods send up to 1450: lower the MTU by 50 bytes","rtt_ms":1.234,"since_s":60,"verdict":"mtu-too-large"}],"public_ip":"192.0.2.2","state":"programmed","subnet":"10.244.2.0/24"},{"public_ip":"192.0.2.3","reasons":["it publishes no IPv4 address"],"state":"refused","subnet":"10.244.3.0/24"},{"object":"route 10.244.4.0/24 metric 4","public_ip":"192.0.2.4","state":"failed","subnet":"10.244.4.0/24"},{"public_ip":"192.0.2.5","state":"doubtful","subnet":"10.244.5.0/24"}]"#
            ]],
        );
        assert_eq!((&state["peers"]["programmed"], &state["findings"][0]["code"]), (&2.into(), &"family-down".into()));
        assert_eq!((&state["peers"]["reachable"], &state["peers"]["broken"]), (&0.into(), &1.into()));
        assert!(State::new(&View::default(), &paths()).is_none());
    }

    #[test]
    fn drops_of_the_udp_backend_are_shown_by_reason() {
        let view = View { drops: Some(kernel::Drops::default()), ..view() };
        let state = serde_json::to_value(State::new(&view, &paths()).unwrap()).unwrap();
        check(
            &state["udp_dropped"].to_string(),
            expect![[r#"{"expired":0,"foreign-destination":0,"foreign-source":0,"malformed":0,"no-route":0,"unknown-sender":0}"#]],
        );
        assert!(metrics(&view, &paths(), true).unwrap().contains("flannel_udp_dropped_total{reason=\"unknown-sender\"} 0\n"));
    }

    #[test]
    fn metrics_are_prometheus_text() {
        let text = metrics(&view(), &paths(), false).unwrap();
        check(
            &text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect::<String>(),
            expect![[r#"
                flannel_info{version="0.1.0",backend="vxlan",subnet="10.244.1.0/24"} 1
                flannel_ready 0
                flannel_findings{severity="error"} 0
                flannel_findings{severity="warning"} 1
                flannel_findings{severity="info"} 0
                flannel_store_connected 1
                flannel_leases 5
                flannel_leases_doubtful 1
                flannel_peers{state="programmed"} 1
                flannel_peers{state="refused"} 1
                flannel_peers{state="failed"} 1
                flannel_peers{state="doubtful"} 1
                flannel_paths{verdict="unmeasured"} 0
                flannel_paths{verdict="reachable"} 0
                flannel_paths{verdict="underlay-down"} 0
                flannel_paths{verdict="overlay-broken"} 0
                flannel_paths{verdict="mtu-too-large"} 1
                flannel_paths{verdict="checksum-broken"} 0
                flannel_paths{verdict="one-way"} 0
                flannel_probes_total 99
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
