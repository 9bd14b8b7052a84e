//! What a running daemon knows beyond the checks: its own findings, broken paths, objects that the kernel refuses.

use flannel::check::Severity;
use serde::Deserialize;
use serde_json::Value;

use super::Shown;
use crate::terminal::{clean, cleaned};

/// Paths, and objects, that are named one by one.
const NAMED: usize = 20;

/// Codes of findings that only a daemon has, with the reason why each matters.
pub(super) const CODES: [(&str, &str); 8] = [
    ("path-underlay-down", "Packets for the pods of a host that does not answer are lost."),
    ("path-overlay-broken", "The host answers, but encapsulated packets do not arrive there, so no pod there is reached."),
    ("path-mtu-too-large", "Connections are made, and hang as soon as they carry much."),
    ("path-checksum-broken", "Pings pass, but TCP and UDP do not."),
    ("path-one-way", "Packets arrive and the answers are lost, or the other way round."),
    ("object-failed", "What the kernel refuses is tried again; until then its peer or this node lacks it."),
    ("conflict", "Two programs that change one object serve neither: repairs are slowed down to one a second."),
    ("daemon-waits", "Until the daemon has what it waits for, new pods get no network or new peers no route."),
];

#[derive(Deserialize)]
struct State {
    #[serde(default)]
    findings: Vec<Found>,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    pending: Vec<String>,
    peers: Peers,
    objects: Objects,
}

#[derive(Deserialize)]
struct Found {
    severity: String,
    code: String,
    text: String,
    #[serde(default)]
    fix: String,
}

#[derive(Deserialize)]
struct Peers {
    list: Vec<Peer>,
}

#[derive(Deserialize)]
struct Peer {
    subnet: String,
    public_ip: Option<String>,
    #[serde(default)]
    paths: Vec<Path>,
}

#[derive(Deserialize)]
struct Path {
    family: String,
    verdict: String,
    #[serde(default)]
    reason: String,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Objects {
    failed: Vec<Failed>,
    conflicts: Vec<Conflict>,
}

#[derive(Deserialize)]
struct Failed {
    object: String,
    error: String,
}

#[derive(Deserialize)]
struct Conflict {
    object: String,
    by: Option<String>,
}

/// The finding about a daemon that has not finished its start.
pub(super) fn waits(text: &str) -> Shown {
    Shown::new(Severity::Error, "daemon-waits", clean(text), "")
}

/// The findings in a daemon's state.
pub(super) fn findings(state: Value) -> Result<Vec<Shown>, serde_json::Error> {
    let state: State = serde_json::from_value(cleaned(state))?;
    let mut shown: Vec<Shown> = state.findings.into_iter().map(of_daemon).collect();
    shown.extend(state.pending.iter().map(|what| waits(&format!("flanneld waits for {what}"))));
    let conflicts = state.objects.conflicts;
    for conflict in conflicts.iter().take(NAMED) {
        let by = conflict.by.as_deref().unwrap_or("another program");
        let fix = "stop that program, or let it leave this object alone";
        shown.push(Shown::new(Severity::Warning, "conflict", format!("{by} keeps changing {}", conflict.object), fix));
    }
    let failed = state.objects.failed.into_iter().filter(|failed| !conflicts.iter().any(|conflict| conflict.object == failed.object));
    shown.extend(
        failed.take(NAMED).map(|Failed { object, error }| {
            Shown::new(Severity::Warning, "object-failed", format!("{object} is not applied: {error}"), "")
        }),
    );
    let is_broken = |path: &Path| !matches!(path.verdict.as_str(), "reachable" | "unmeasured");
    let broken = state.peers.list.iter().flat_map(|peer| peer.paths.iter().filter(|path| is_broken(path)).map(move |path| (peer, path)));
    let broken: Vec<(&Peer, &Path)> = broken.collect();
    shown.extend(broken.iter().take(NAMED).map(|(peer, path)| of_path(peer, path, state.port)));
    if broken.len() > NAMED {
        let text = format!("{} more paths to peers are broken", broken.len() - NAMED);
        shown.push(Shown::new(Severity::Warning, "path-overlay-broken", text, "flanneld status --all"));
    }
    Ok(shown)
}

fn of_daemon(found: Found) -> Shown {
    let severity = match found.severity.as_str() {
        "error" => Severity::Error,
        "info" => Severity::Info,
        _ => Severity::Warning,
    };
    Shown { severity, code: found.code, text: found.text, fix: found.fix }
}

fn of_path(peer: &Peer, path: &Path, port: Option<u16>) -> Shown {
    let address = peer.public_ip.as_ref().map(|ip| format!(" ({ip})")).unwrap_or_default();
    let error = path.error.as_ref().map(|error| format!(" (cannot send: {error})")).unwrap_or_default();
    let text = format!("peer {}{address} by {}: {}{error}", peer.subnet, path.family, path.reason);
    let tunnel = port.map_or_else(|| "the packets between the hosts".to_owned(), |port| format!("UDP {port}"));
    let fix = match path.verdict.as_str() {
        "underlay-down" => "start that host, or correct the address that it publishes (--public-ip)".to_owned(),
        "overlay-broken" => format!("let {tunnel} pass between the hosts, in both firewalls; look whether flanneld runs there"),
        "mtu-too-large" => "set Backend.MTU, or the MTU of the external interface, lower by that much, and restart pods".to_owned(),
        "checksum-broken" => "ethtool -K flannel.1 tx-checksum-ip-generic off, on both hosts".to_owned(),
        "one-way" => "look at firewall and routes of the host that the text names".to_owned(),
        _ => "see docs/paths.md".to_owned(),
    };
    Shown::new(Severity::Warning, &format!("path-{}", path.verdict), text, fix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use serde_json::json;

    #[test]
    fn paths_conflicts_and_refused_objects_are_findings() {
        let path =
            |verdict: &str| json!({ "family": "ipv4", "verdict": verdict, "reason": "it is so", "since_s": 1, "probes": 1, "lost": 1 });
        let peer = |verdict: &str| json!({ "subnet": "10.244.2.0/24", "public_ip": "10.0.0.2", "paths": [path(verdict)] });
        let verdicts = ["reachable", "unmeasured", "underlay-down", "overlay-broken", "mtu-too-large", "checksum-broken", "one-way"];
        let state = json!({
            "port": 8472, "pending": ["the store"],
            "findings": [{ "severity": "error", "code": "forward-drop", "text": "a chain\u{1b}[31m drops", "fix": "do it" }],
            "peers": { "list": verdicts.map(peer) },
            "objects": { "failed": [{ "object": "link a", "error": "no" }, { "object": "link b", "error": "conflict" }], "conflicts": [{ "object": "link b", "by": "nm" }] },
        });
        let findings = findings(state).unwrap();
        let text: String =
            findings.iter().map(|found| format!("{} {}: {}; fix: {}\n", found.severity, found.code, found.text, found.fix)).collect();
        expect![[r#"
            error forward-drop: a chain\u{1b}[31m drops; fix: do it
            error daemon-waits: flanneld waits for the store; fix: 
            warning conflict: nm keeps changing link b; fix: stop that program, or let it leave this object alone
            warning object-failed: link a is not applied: no; fix: 
            warning path-underlay-down: peer 10.244.2.0/24 (10.0.0.2) by ipv4: it is so; fix: start that host, or correct the address that it publishes (--public-ip)
            warning path-overlay-broken: peer 10.244.2.0/24 (10.0.0.2) by ipv4: it is so; fix: let UDP 8472 pass between the hosts, in both firewalls; look whether flanneld runs there
            warning path-mtu-too-large: peer 10.244.2.0/24 (10.0.0.2) by ipv4: it is so; fix: set Backend.MTU, or the MTU of the external interface, lower by that much, and restart pods
            warning path-checksum-broken: peer 10.244.2.0/24 (10.0.0.2) by ipv4: it is so; fix: ethtool -K flannel.1 tx-checksum-ip-generic off, on both hosts
            warning path-one-way: peer 10.244.2.0/24 (10.0.0.2) by ipv4: it is so; fix: look at firewall and routes of the host that the text names
        "#]].assert_eq(&text);
        let is_known = |found: &&Shown| found.code == "forward-drop" || CODES.iter().any(|(code, _)| *code == found.code);
        assert_eq!(findings.iter().find(|found| !is_known(found)), None);
    }

    #[test]
    fn codes_are_explained_and_documented() {
        for (code, reason) in CODES {
            assert!(include_str!("../../../../docs/operations.md").contains(&format!("| `{code}` |")), "{code} is not documented");
            assert!(reason.ends_with('.'));
        }
    }
}
