//! The rows of the screen: what is well, what is not, and why. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::document::{Document, Peer};
use crate::clock::short;

/// Repairs that are counted on the screen.
const RECENT: u64 = 3_600;
/// As many repairs as the daemon remembers.
const REMEMBERED: usize = 100;

/// How well a part is. The order is that of severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Ok,
    Warn,
    Fail,
}

/// A row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) level: Level,
    pub(super) text: String,
}

/// The rows in order.
pub(super) fn rows(document: &Document, pods: Row) -> Vec<Row> {
    vec![store(document), node(document), peers(document), pods, repairs(document)]
}

fn seconds(seconds: u64) -> String {
    short(Duration::from_secs(seconds))
}

fn store(document: &Document) -> Row {
    let store = &document.store;
    let (mut level, mut parts) = (Level::Ok, vec![store.endpoint.clone()]);
    if !store.complete {
        level = Level::Fail;
        parts.push("no complete list of leases yet".to_owned());
    } else if !store.connected {
        level = Level::Warn;
        parts.push("does not answer; routes stay as they are".to_owned());
    }
    if store.doubtful > 0 {
        level = level.max(Level::Warn);
        parts.push(format!("lost data: {} of its former leases are in doubt", store.doubtful));
    }
    parts.extend(store.last_event_s.map(|age| format!("last event {} ago", seconds(age))));
    parts.extend(store.renewal_s.map(|left| format!("lease renews in {}", seconds(left))));
    parts.retain(|part| !part.is_empty());
    Row { name: "Store", level, text: parts.join(", ") }
}

fn node(document: &Document) -> Row {
    let count = |severity: &str| document.findings.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings, failed) = (count("error"), count("warning"), document.objects.failed.len());
    let mut parts = Vec::new();
    let mut level = Level::Ok;
    let mut note = |severity: Level, text: String| {
        level = level.max(severity);
        parts.push(text);
    };
    if !document.pending.is_empty() {
        note(Level::Fail, format!("waiting for {}", document.pending.join(", ")));
    }
    if errors > 0 {
        note(Level::Fail, counted(errors, "error"));
    }
    if warnings > 0 {
        note(Level::Warn, counted(warnings, "warning"));
    }
    if let Some(first) = document.objects.failed.first() {
        let more = if failed > 1 { format!(", and {} more", failed - 1) } else { String::new() };
        note(Level::Warn, format!("not applied: {}: {}{more}", first.object, first.error));
    }
    if !document.forwarding {
        note(Level::Warn, "forwarding is off".to_owned());
    }
    let address = document.public_ip.as_ref().map(|ip| format!(" {ip}")).unwrap_or_default();
    parts.push(format!("{}{address}", document.interface));
    parts.push(format!("MTU {} for pods", document.mtu));
    parts.push(format!("rules {}", document.rules));
    if document.forwarding {
        parts.push("forwarding on".to_owned());
    }
    Row { name: "Node", level, text: parts.join(", ") }
}

/// `1 error`, `2 errors`, `2 FDB entries`.
pub(super) fn counted(count: usize, noun: &str) -> String {
    match noun.strip_suffix('y') {
        _ if count == 1 || noun.ends_with("rules") => format!("{count} {noun}"),
        Some(stem) => format!("{count} {stem}ies"),
        None if noun.ends_with(['s', 'x']) => format!("{count} {noun}es"),
        None => format!("{count} {noun}s"),
    }
}

/// Whether a path to a peer is still to be measured for the first time.
pub(super) fn is_measuring(document: &Document) -> bool {
    let is_new = |peer: &Peer| {
        let is_pending = |reason: &Option<String>| reason.as_ref().is_some_and(|reason| reason.ends_with("no answer yet"));
        peer.state == "programmed" && (peer.paths.is_empty() || peer.paths.iter().any(|path| is_pending(&path.reason)))
    };
    document.probing && document.peers.list.iter().any(is_new)
}

/// How a peer is: what was done for it, and what was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    Well,
    Unmeasured,
    Broken,
    Refused,
    Failed,
    Doubtful,
}

impl Health {
    pub(super) fn of(peer: &Peer) -> Health {
        let is_broken = |verdict: &str| !matches!(verdict, "reachable" | "unmeasured");
        match peer.state.as_str() {
            "refused" => Health::Refused,
            "failed" => Health::Failed,
            _ if peer.paths.iter().any(|path| is_broken(&path.verdict)) => Health::Broken,
            "doubtful" => Health::Doubtful,
            _ if !peer.paths.is_empty() && peer.paths.iter().all(|path| path.verdict == "reachable") => Health::Well,
            _ => Health::Unmeasured,
        }
    }

    /// Whether it is on the screen without `--all`.
    pub(super) fn is_shown(self) -> bool {
        !matches!(self, Health::Well | Health::Unmeasured)
    }
}

fn peers(document: &Document) -> Row {
    let list = &document.peers.list;
    if list.is_empty() {
        return Row { name: "Peers", level: Level::Ok, text: "no other host has a lease".to_owned() };
    }
    let count = |health: Health| list.iter().filter(|peer| Health::of(peer) == health).count();
    let mut text = format!("{} of {} reachable", count(Health::Well), list.len());
    let mut level = Level::Ok;
    for (health, name) in [
        (Health::Broken, "broken"),
        (Health::Refused, "refused"),
        (Health::Failed, "not applied"),
        (Health::Doubtful, "in doubt"),
        (Health::Unmeasured, "not measured"),
    ] {
        let count = count(health);
        if count > 0 {
            text.push_str(&format!(", {count} {name}"));
            if health.is_shown() {
                level = Level::Warn;
            }
        }
    }
    Row { name: "Peers", level, text }
}

fn repairs(document: &Document) -> Row {
    let all = &document.objects.repairs;
    let recent: Vec<_> = all.iter().filter(|repair| repair.ago_s < RECENT).collect();
    let mut text = "none in the last hour".to_owned();
    if let Some(last) = recent.last() {
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        recent.iter().for_each(|repair| *kinds.entry(&repair.kind).or_default() += 1);
        let kinds: Vec<String> = kinds.into_iter().map(|(kind, count)| counted(count, kind)).collect();
        let least = if recent.len() >= REMEMBERED { "at least " } else { "" };
        let by = last.by.as_ref().map(|by| format!(", changed by {by}")).unwrap_or_default();
        let (count, ago) = (recent.len(), seconds(last.ago_s));
        text = format!("{least}{count} in the last hour ({}); last {ago} ago: {}{by}", kinds.join(", "), last.action);
    }
    let mut level = Level::Ok;
    if let Some(first) = document.objects.conflicts.first() {
        level = Level::Warn;
        let by = first.by.as_deref().unwrap_or("another program");
        let more = document.objects.conflicts.len() - 1;
        let more = if more > 0 { format!(", and {more} more objects are in conflict") } else { String::new() };
        text = format!("{by} keeps changing {}{more}; {text}", first.object);
    }
    Row { name: "Repairs", level, text }
}
