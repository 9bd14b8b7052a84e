//! What a lab shows: addresses, routes, the packet on the wire, round trips, and a verdict on each.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use flannel::object::ROUTE_PROTOCOL;
use flannel::{Family, Mac};
use kernel::capture::Capture;
use kernel::netlink::{Protocol, Socket};
use kernel::{link, route};
use serde_json::{Value, json};

use crate::cluster::{Host, Lab, Pod};
use crate::packet::{Frame, Payload};
use crate::ping::ping_all;
use crate::plan::Topology;

/// Time limit for the pods to answer each other.
const PING: Duration = Duration::from_secs(5);

/// The result of one lab.
pub(super) struct Report {
    backend: String,
    topology: Topology,
    hosts: Vec<HostReport>,
    /// The echo request of the first pod to the second one, on the second host's wire.
    packet: Option<Frame>,
    /// Round trips between the first two pods, in both directions.
    trips: Vec<(String, String, Option<Duration>)>,
    /// Pairs that answered, and all pairs.
    pairs: (usize, usize),
    /// Deviations from what should be.
    problems: Vec<String>,
}

struct HostReport {
    name: String,
    addresses: Vec<IpAddr>,
    mac: Mac,
    subnet: String,
    pod: String,
    pod_addresses: Vec<IpAddr>,
    routes: Vec<String>,
    refused: Vec<String>,
}

/// Creates a pod on each host, lets all pods ping each other, and reports.
pub(super) fn show(lab: &mut Lab, backend: &str) -> anyhow::Result<(Report, Vec<Pod>)> {
    let pods = (0..lab.hosts.len()).map(|host| lab.add_pod(host)).collect::<anyhow::Result<Vec<Pod>>>()?;
    let mut problems = Vec::new();
    let hosts = lab.hosts.iter().zip(&pods).map(|(host, pod)| host_report(host, pod)).collect::<anyhow::Result<Vec<_>>>()?;
    for host in &hosts {
        problems.extend(host.refused.iter().map(|refused| format!("{} has no route to {refused}", host.name)));
    }

    let mut packet = None;
    let mut results: Vec<BTreeMap<IpAddr, Duration>> = Vec::new();
    // A peer whose route was refused will not answer.
    let timeout = if problems.is_empty() { PING } else { Duration::from_secs(1) };
    for (i, pod) in pods.iter().enumerate() {
        let others: Vec<IpAddr> = pods.iter().enumerate().filter(|(j, _)| *j != i).flat_map(|(_, other)| other.addresses.clone()).collect();
        let capture = if i == 0 && pods.len() > 1 { Some(open_capture(&lab.hosts[1])?) } else { None };
        results.push(pod.netns.run(|| ping_all(&others, timeout))??);
        if let Some(capture) = capture.filter(|_| problems.is_empty()) {
            let (from, to) = (pods[0].address, pods[1].address);
            packet = capture.find(Duration::from_secs(1), |bytes| {
                let frame = Frame::parse(bytes)?;
                let inner = frame.innermost();
                // Who sends to whom inside of WireGuard cannot be seen. A keepalive has 32 bytes, an echo request has more.
                let is_echo = match frame.payload {
                    Payload::WireGuard { bytes, .. } => bytes > 32 && lab.hosts[0].addresses().contains(&frame.src),
                    _ => (inner.src, inner.dst) == (from, to),
                };
                is_echo.then_some(frame)
            })?;
        }
    }
    let mut pairs = (0, 0);
    for (i, from) in pods.iter().enumerate() {
        for to in pods.iter().filter(|to| to.name != from.name) {
            pairs.1 += 1;
            let silent: Vec<String> = to.addresses.iter().filter(|ip| !results[i].contains_key(*ip)).map(ToString::to_string).collect();
            match silent.is_empty() {
                true => pairs.0 += 1,
                false if problems.len() < 20 => {
                    problems.push(format!("{} {} gets no answer from {} {}", from.name, from.address, to.name, silent.join(" ")))
                }
                false => {}
            }
        }
    }
    let mut trips = Vec::new();
    if pods.len() > 1 {
        for (i, j) in [(0, 1), (1, 0)] {
            trips.push((pods[i].name.clone(), pods[j].name.clone(), results[i].get(&pods[j].address).copied()));
        }
        match &packet {
            Some(frame) => problems.extend(wrong(frame, backend, &lab.hosts, lab.plan.topology)?),
            None if problems.is_empty() => problems.push("the packet was not seen on the wire".to_owned()),
            None => {}
        }
    }
    let report = Report { backend: backend.to_owned(), topology: lab.plan.topology, hosts, packet, trips, pairs, problems };
    Ok((report, pods))
}

fn open_capture(host: &Host) -> anyhow::Result<Capture> {
    host.netns.run(|| {
        let index = link::get(&mut Socket::open(Protocol::Route)?, "eth0".parse()?)?.context("the host has no eth0")?.index;
        anyhow::Ok(Capture::open(index)?)
    })?
}

fn host_report(host: &Host, pod: &Pod) -> anyhow::Result<HostReport> {
    let routes = host.netns.run(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        let names: BTreeMap<u32, String> = link::list(&mut socket)?.iter().map(|link| (link.index, link.name.to_string())).collect();
        let mut routes = route::list(&mut socket, Family::V4, route::Filter::Ours)?;
        routes.extend(route::list(&mut socket, Family::V6, route::Filter::Ours)?);
        anyhow::Ok(
            routes
                .iter()
                .filter(|r| r.protocol == ROUTE_PROTOCOL)
                .map(|r| {
                    let via = r.via.map(|via| format!(" via {via}")).unwrap_or_default();
                    let dev = names.get(&r.oif).map_or("?", String::as_str);
                    format!("{}{via} dev {dev}{}", r.dst, if r.onlink { " onlink" } else { "" })
                })
                .collect::<Vec<String>>(),
        )
    })??;
    let state = host.state()?;
    let refused = state["peers"]["refused"].as_array().cloned().unwrap_or_default();
    let refused = refused.iter().map(|peer| {
        let reasons: Vec<&str> = peer["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        format!("{}: {}", peer["subnet"].as_str().unwrap_or("?"), reasons.join("; "))
    });
    Ok(HostReport {
        name: host.name.clone(),
        addresses: host.addresses(),
        mac: host.mac()?,
        subnet: state["subnet"].as_str().unwrap_or_default().to_owned(),
        pod: pod.name.clone(),
        pod_addresses: pod.addresses.clone(),
        routes,
        refused: refused.collect(),
    })
}

/// Compares the packet on the second host's wire with what the backend should send.
fn wrong(frame: &Frame, backend: &str, hosts: &[Host], topology: Topology) -> anyhow::Result<Vec<String>> {
    let mut problems = Problems(Vec::new());
    problems.expect("destination MAC", frame.to, hosts[1].mac()?);
    if topology == Topology::Switch {
        problems.expect("source MAC", frame.from, hosts[0].mac()?);
    }
    match (&frame.payload, backend) {
        (Payload::Vxlan { port, vni, inner }, "vxlan") => {
            let of = |host: &Host| host.addresses().into_iter().find(|ip| ip.is_ipv4() == inner.src.is_ipv4());
            problems.expect("outer source", Some(frame.src), of(&hosts[0]));
            problems.expect("outer destination", Some(frame.dst), of(&hosts[1]));
            problems.expect("UDP port", *port, 8472);
            problems.expect("VNI", *vni, 1);
            problems.expect("inner payload", &inner.payload, &Payload::Icmp(if inner.src.is_ipv4() { 8 } else { 128 }));
        }
        (Payload::WireGuard { port, .. }, "wireguard") => {
            let is_v6 = frame.src.is_ipv6();
            let of = |host: &Host| host.addresses().into_iter().find(|ip| ip.is_ipv6() == is_v6);
            problems.expect("outer destination", Some(frame.dst), of(&hosts[1]));
            problems.expect("UDP port", *port, if is_v6 { 51_821 } else { 51_820 });
        }
        (Payload::Icmp(8 | 128), "host-gw") => problems.expect("time to live", frame.ttl, 63),
        (payload, _) => problems.0.push(format!("the packet on the wire carries {payload:?}, which {backend} does not send")),
    }
    Ok(problems.0)
}

struct Problems(Vec<String>);

impl Problems {
    fn expect<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, is: T, want: T) {
        if is != want {
            self.0.push(format!("the {what} on the wire is {is:?}, expected {want:?}"));
        }
    }
}

impl Report {
    pub(super) fn is_right(&self) -> bool {
        self.problems.is_empty()
    }

    fn verdict(&self) -> String {
        let (answered, all) = self.pairs;
        let pods = format!("{answered} of {all} pairs of pods answer");
        match (self.is_right(), self.backend.as_str()) {
            (true, "host-gw") => format!("{pods}; packets cross the wire unencapsulated, with the peer's MAC"),
            (true, "wireguard") => format!("{pods}; packets cross the wire encrypted by WireGuard, between the hosts' addresses"),
            (true, _) => format!("{pods}; packets cross the wire in UDP 8472, VNI 1, between the hosts' addresses"),
            (false, _) => format!("{pods}; see the problems above"),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("\n{} on a {}\n", self.backend, format!("{:?}", self.topology).to_lowercase());
        // Some hosts are enough to see the pattern.
        const SHOWN: usize = 4;
        for host in self.hosts.iter().take(SHOWN) {
            let (at, has) = (join(&host.addresses), join(&host.pod_addresses));
            text.push_str(&format!("  {}  {at} ({})  leases {}  {} has {has}\n", host.name, host.mac, host.subnet, host.pod));
            for route in host.routes.iter().take(SHOWN) {
                text.push_str(&format!("      route {route}\n"));
            }
            if host.routes.len() > SHOWN {
                text.push_str(&format!("      … and {} more\n", host.routes.len() - SHOWN));
            }
        }
        if self.hosts.len() > SHOWN {
            text.push_str(&format!("  … and {} more hosts\n", self.hosts.len() - SHOWN));
        }
        if let Some(packet) = &self.packet {
            text.push_str(&format!("  on the wire at {}:\n", self.hosts[1].name));
            for (layer, line) in packet.to_string().split(" | ").enumerate() {
                text.push_str(&format!("      {}{line}\n", "  ".repeat(layer)));
            }
        }
        for (from, to, trip) in &self.trips {
            let trip = trip.map_or("no answer".to_owned(), |trip| format!("{:.3} ms", trip.as_secs_f64() * 1e3));
            text.push_str(&format!("  {from} -> {to}: {trip}\n"));
        }
        for problem in &self.problems {
            text.push_str(&format!("  ! {problem}\n"));
        }
        text.push_str(&format!("{} {}: {}\n", if self.is_right() { "OK" } else { "FAILED" }, self.backend, self.verdict()));
        text
    }

    pub(super) fn json(&self) -> Value {
        let hosts: Vec<Value> = self.hosts.iter().map(|host| {
            json!({ "name": host.name, "addresses": host.addresses, "mac": host.mac.to_string(), "subnet": host.subnet, "routes": host.routes,
                    "pod": { "name": host.pod, "address": host.pod_addresses.first(), "addresses": host.pod_addresses }, "refused": host.refused })
        }).collect();
        let trips: Vec<Value> = self
            .trips
            .iter()
            .map(|(from, to, trip)| json!({ "from": from, "to": to, "ms": trip.map(|trip| trip.as_secs_f64() * 1e3) }))
            .collect();
        json!({
            "backend": self.backend,
            "topology": format!("{:?}", self.topology).to_lowercase(),
            "hosts": hosts,
            "packet": self.packet.as_ref().map(ToString::to_string),
            "round_trips": trips,
            "pairs": { "answered": self.pairs.0, "all": self.pairs.1 },
            "ok": self.is_right(),
            "problems": self.problems,
            "verdict": self.verdict(),
        })
    }
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
