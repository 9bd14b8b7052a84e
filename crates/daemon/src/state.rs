//! The document at `/state` and the numbers at `/metrics`: wire forms of the view. Names are stable, and listed in docs/state.md.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use flannel::check::{Finding, Severity};
use flannel::probe::{Report, Verdict};
use flannel::{Family, PerFamily};
use serde::Serialize;
use tokio::time::Instant;

use crate::probe::Paths;
use crate::view::{Conflicted, Failed, Node, PeerState, View};

/// The version of the documents' shape. It changes when a field goes or changes its meaning; fields may be added.
pub const SCHEMA: u32 = 1;

/// What does not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct Process {
    /// When it was started.
    pub started: Instant,
    /// The node's name: that of its Node in Kubernetes, else the host's.
    pub node: String,
    /// Whether paths to peers are measured (`--probe`).
    pub probes: bool,
}

impl Process {
    /// This process, started now.
    pub fn now(probes: bool) -> Process {
        let name = std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty());
        let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        Process { started: Instant::now(), node: name.unwrap_or_else(host), probes }
    }
}

/// The whole document.
#[derive(Debug, Serialize)]
pub struct State<'a> {
    /// [`SCHEMA`]
    schema: u32,
    /// The node's name.
    node: &'a str,
    /// How long the daemon has been running, in seconds.
    uptime_s: u64,
    /// Whether `/readyz` reports ready.
    ready: bool,
    /// What is waited for until it does.
    pending: Vec<String>,
    /// The daemon's version.
    version: &'static str,
    /// `Backend.Type`
    backend: &'static str,
    /// The VNI, with vxlan.
    #[serde(skip_serializing_if = "Option::is_none")]
    vni: Option<u32>,
    /// The UDP port of the tunnel, with vxlan and udp.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// The form of the traffic rules.
    rules: &'static str,
    /// Whether the kernel forwards packets.
    forwarding: bool,
    /// Whether paths to peers are measured.
    probing: bool,
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
    store: Store<'a>,
    /// The other hosts.
    peers: Peers<'a>,
    /// Objects in the kernel.
    objects: Objects<'a>,
    /// Packets that the udp backend dropped, by reason; absent with other backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    udp_dropped: Option<BTreeMap<&'static str, u64>>,
}

#[derive(Debug, Serialize)]
struct Store<'a> {
    connected: bool,
    leases: usize,
    doubtful: usize,
    complete: bool,
    endpoint: &'a str,
    /// The age of its last event, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_event_s: Option<u64>,
    /// The time until this node's lease is renewed, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    renewal_s: Option<u64>,
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
    /// With the wireguard backend, the age of the last handshake in seconds, as of the last audit of the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    handshake_s: Option<u64>,
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
    /// The last repairs, oldest first.
    repairs: Vec<Repaired<'a>>,
}

/// A repair of an object that another program changed.
#[derive(Debug, Serialize)]
struct Repaired<'a> {
    number: u64,
    /// Its age in seconds.
    ago_s: u64,
    kind: String,
    action: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'a str>,
}

/// What a client on another host may read: numbers, no addresses, names or texts.
#[derive(Debug, Serialize)]
pub struct Counts {
    schema: u32,
    version: &'static str,
    ready: bool,
    findings: BTreeMap<String, usize>,
    store: StoreCounts,
    peers: BTreeMap<&'static str, usize>,
    paths: BTreeMap<&'static str, usize>,
    objects: ObjectCounts,
}

#[derive(Debug, Serialize)]
struct StoreCounts {
    connected: bool,
    leases: usize,
    doubtful: usize,
}

#[derive(Debug, Serialize)]
struct ObjectCounts {
    desired: usize,
    failed: usize,
    repaired: u64,
    conflicts: usize,
}

impl Counts {
    /// The document; `None` while this node has no lease.
    pub fn new(view: &View, paths: &Paths, pending: &[String]) -> Option<Counts> {
        view.node?;
        let findings = [Severity::Error, Severity::Warning, Severity::Info].map(|severity| (severity.to_string(), severe(view, severity)));
        Some(Counts {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            ready: is_ready(view, pending),
            findings: findings.into(),
            store: StoreCounts { connected: view.store.connected, leases: view.store.leases, doubtful: view.store.doubtful },
            peers: PEER_STATES.map(|state| (state, in_state(view, state))).into(),
            paths: Verdict::NAMES.map(|name| (name, paths.count(name))).into(),
            objects: ObjectCounts {
                desired: view.objects.desired,
                failed: view.objects.failed.len(),
                repaired: view.objects.repaired,
                conflicts: view.objects.conflicts.len(),
            },
        })
    }
}

const PEER_STATES: [&str; 4] = ["programmed", "refused", "failed", "doubtful"];

/// Peers in this state.
fn in_state(view: &View, state: &str) -> usize {
    view.peers.iter().filter(|peer| peer.state.name() == state).count()
}

/// Findings of this severity.
pub(crate) fn severe(view: &View, severity: Severity) -> usize {
    view.findings.iter().filter(|finding| finding.severity == severity).count()
}

/// Whether `/readyz` reports ready.
pub(crate) fn is_ready(view: &View, pending: &[String]) -> bool {
    pending.is_empty() && severe(view, Severity::Error) == 0
}

fn first(addresses: &PerFamily<IpAddr>) -> Option<String> {
    addresses.iter().next().map(|(_, ip)| ip.to_string())
}

fn is_programmed(state: &PeerState) -> bool {
    matches!(state, PeerState::Programmed | PeerState::Doubtful)
}

fn path<'a>(family: Family, report: &'a Report, at: Duration) -> PathState<'a> {
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
    let handshake_s = peer.handshake.map(|at| at.elapsed().as_secs());
    Peer { subnet: peer.subnet.to_string(), public_ip: first(&peer.public), state: peer.state.name(), reasons, object, handshake_s, paths }
}

impl State<'_> {
    /// The document; `None` while this node has no lease.
    pub fn new<'a>(view: &'a View, paths: &'a Paths, process: &'a Process, pending: Vec<String>) -> Option<State<'a>> {
        let Node { backend, vni, port, rules, is_forwarding, subnet, interface, published, mtu, probe, .. } = view.node?;
        let now = Instant::now();
        let repairs = view.objects.repairs.iter().map(|repair| Repaired {
            number: repair.number,
            ago_s: now.saturating_duration_since(repair.at).as_secs(),
            kind: repair.kind.to_string(),
            action: &repair.action,
            by: repair.by.as_deref(),
        });
        let refused = view.peers.iter().filter(|peer| matches!(peer.state, PeerState::Refused(_)));
        Some(State {
            schema: SCHEMA,
            node: &process.node,
            uptime_s: process.started.elapsed().as_secs(),
            ready: is_ready(view, &pending),
            pending,
            version: env!("CARGO_PKG_VERSION"),
            backend,
            vni: vni.map(flannel::Vni::get),
            port,
            rules,
            forwarding: is_forwarding,
            probing: process.probes && probe.is_some(),
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
                endpoint: &view.store.endpoint,
                last_event_s: view.store.last_event.map(|at| now.saturating_duration_since(at).as_secs()),
                renewal_s: view.store.renewal.map(|at| at.saturating_duration_since(now).as_secs()),
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
                repairs: repairs.collect(),
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
    let severities = [Severity::Error, Severity::Warning, Severity::Info]
        .map(|severity| (format!("{{severity=\"{severity}\"}}"), number(severe(view, severity))));
    let findings: Vec<(&str, String)> = severities.iter().map(|(label, count)| (label.as_str(), count.clone())).collect();
    put("findings", "gauge", "Problems of this node, listed in /state.", &findings);
    put("store_connected", "gauge", "1 if the store is being followed.", &[("", u8::from(view.store.connected).to_string())]);
    put("leases", "gauge", "Leases in the store, this node's included.", &[("", number(view.store.leases))]);
    put("leases_doubtful", "gauge", "Leases that a store which lost data does not know.", &[("", number(view.store.doubtful))]);
    let states = PEER_STATES.map(|state| (format!("{{state=\"{state}\"}}"), number(in_state(view, state))));
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

/// The fields of a document, with `[]` for the elements of a list.
#[cfg(test)]
pub(crate) fn fields(value: &serde_json::Value) -> std::collections::BTreeSet<String> {
    use serde_json::Value;
    let mut found = std::collections::BTreeSet::new();
    let mut rest = vec![(String::new(), value)];
    while let Some((at, value)) = rest.pop() {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    let name = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                    found.insert(name.clone());
                    rest.push((name, value));
                }
            }
            Value::Array(list) => rest.extend(list.iter().map(|value| (format!("{at}[]"), value))),
            _ => {}
        }
    }
    found
}

/// The first cells of the table below a heading of docs/state.md.
#[cfg(test)]
pub(crate) fn documented(heading: &str) -> std::collections::BTreeSet<String> {
    let page = include_str!("../../../docs/state.md");
    let section = page.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("{heading} is missing")).1;
    let section = section.split("\n## ").next().unwrap_or_default();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    cells.map(|(name, _)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Objects, PeerView, Store};
    use expect_test::{Expect, expect};
    use flannel::LeaseKey;
    use flannel::probe::Summary;
    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn process() -> Process {
        Process { started: Instant::now(), node: "h1".to_owned(), probes: true }
    }

    fn view() -> View {
        let public = |text: &str| PerFamily { v4: text.parse().ok(), v6: None };
        let (interface, addresses) = ("eth0".parse().unwrap(), public("192.0.2.1"));
        let peer = |subnet: &str, ip: &str, state| PeerView { subnet: key(subnet), public: public(ip), state, handshake: None };
        View {
            node: Some(Node {
                backend: "vxlan",
                vni: flannel::Vni::new(1),
                port: Some(8472),
                rules: "nftables",
                is_forwarding: true,
                subnet: key("10.244.1.0/24"),
                interface,
                addresses,
                published: addresses,
                mtu: 1450,
                path_mtus: PerFamily::default(),
                probe: None,
            }),
            store: Store {
                connected: true,
                leases: 5,
                doubtful: 1,
                complete: true,
                endpoint: "https://10.0.0.5:2379".into(),
                last_event: None,
                renewal: None,
            },
            peers: vec![
                peer("10.244.2.0/24", "192.0.2.2", PeerState::Programmed),
                peer("10.244.3.0/24", "192.0.2.3", PeerState::Refused(vec!["it publishes no IPv4 address".to_owned()])),
                peer("10.244.4.0/24", "192.0.2.4", PeerState::Failed(flannel::object::Key::Route("10.244.4.0/24".parse().unwrap(), 4))),
                peer("10.244.5.0/24", "192.0.2.5", PeerState::Doubtful),
            ],
            objects: Objects {
                desired: 9,
                failed: Vec::new(),
                repaired: 4,
                repairs: std::sync::Arc::default(),
                overruns: 2,
                conflicts: Vec::new(),
            },
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
        let state = serde_json::to_value(State::new(&view, &paths(), &process(), Vec::new()).unwrap()).unwrap();
        check(
            &serde_json::to_string(&state["peers"]["list"]).unwrap(),
            expect![[
                r#"[{"paths":[{"daemon":{"failures":2,"mtu":1450,"ready":true,"version":"0.1.0"},"family":"ipv4","lost":20,"probes":20,"reason":"the path carries packets of 1400 bytes, pods send up to 1450: lower the MTU by 50 bytes","rtt_ms":1.234,"since_s":60,"verdict":"mtu-too-large"}],"public_ip":"192.0.2.2","state":"programmed","subnet":"10.244.2.0/24"},{"public_ip":"192.0.2.3","reasons":["it publishes no IPv4 address"],"state":"refused","subnet":"10.244.3.0/24"},{"object":"route 10.244.4.0/24 metric 4","public_ip":"192.0.2.4","state":"failed","subnet":"10.244.4.0/24"},{"public_ip":"192.0.2.5","state":"doubtful","subnet":"10.244.5.0/24"}]"#
            ]],
        );
        assert_eq!((&state["peers"]["programmed"], &state["findings"][0]["code"]), (&2.into(), &"family-down".into()));
        assert_eq!((&state["peers"]["reachable"], &state["peers"]["broken"]), (&0.into(), &1.into()));
        assert!(State::new(&View::default(), &paths(), &process(), Vec::new()).is_none());
    }

    #[test]
    fn drops_of_the_udp_backend_are_shown_by_reason() {
        let view = View { drops: Some(kernel::Drops::default()), ..view() };
        let state = serde_json::to_value(State::new(&view, &paths(), &process(), Vec::new()).unwrap()).unwrap();
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

    /// A view in which every optional part is present.
    fn full_view() -> View {
        let mut view = view();
        view.findings.push(Finding::error("x", "a route hides all pods".to_owned(), "delete it"));
        (view.store.last_event, view.store.renewal) = (Some(Instant::now()), Some(Instant::now()));
        view.drops = Some(kernel::Drops::default());
        view.objects.failed.push(Failed { object: "link x".to_owned(), error: "no".to_owned(), attempts: 1 });
        view.objects.conflicts.push(Conflicted { object: "link x".to_owned(), by: None, times: 30 });
        let mut repairs = crate::view::Repairs::default();
        repairs.note(flannel::object::Kind::Route, "set route x".to_owned(), Some("ip, process 7".to_owned()), Instant::now());
        view.objects.repairs = repairs.into();
        view
    }

    #[test]
    fn documented_fields_are_those_that_are_written() {
        let (view, mut paths) = (full_view(), paths());
        paths.reports.values_mut().for_each(|report| report.error = Some("no route".to_owned()));
        let mut state = serde_json::to_value(State::new(&view, &paths, &process(), vec!["x".to_owned()]).unwrap()).unwrap();
        // Counters by name, and the same objects as in the list.
        state["udp_dropped"] = serde_json::Value::Null;
        state["peers"]["refused"] = serde_json::Value::Null;
        assert_eq!(fields(&state), documented("/state"));
        let counts = serde_json::to_value(Counts::new(&view, &paths, &[]).unwrap()).unwrap();
        assert_eq!(fields(&counts), documented("/state for other hosts"));
    }

    #[test]
    fn another_host_reads_no_address_name_or_text() {
        let text = serde_json::to_string(&Counts::new(&full_view(), &paths(), &[]).unwrap()).unwrap();
        for hidden in ["192.0.2", "10.0.0.5", "10.244", "eth0", "route", "h1", "process"] {
            assert!(!text.contains(hidden), "{hidden} in {text}");
        }
    }
}
