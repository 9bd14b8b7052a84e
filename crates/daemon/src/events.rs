//! Events: what changed from one view to the next. Pure; the stream at `/events` and `flanneld monitor` are made of it.

use std::collections::{BTreeMap, BTreeSet};

use flannel::LeaseKey;
use flannel::check::Finding;
use serde::Serialize;

use crate::probe::Paths;
use crate::view::{PeerState, PeerView, View};

/// Events of one comparison; more are counted.
pub const MOST: usize = 1_000;

/// The types of events.
pub const TYPES: [&str; 7] = ["store", "lease", "object", "repair", "conflict", "path", "finding"];

/// Something that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// One of [`TYPES`], or `more`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What happened: `added`, `removed`, `changed`, `began`, `ended`, `made`.
    pub action: &'static str,
    /// The lease, object, path or finding.
    pub subject: String,
    /// What is known about it, in one line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// The program that caused it, where the kernel names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

impl Event {
    fn new(kind: &'static str, action: &'static str, subject: impl ToString, text: impl Into<String>) -> Event {
        Event { kind, action, subject: subject.to_string(), text: text.into(), by: None }
    }
}

/// What an observer has seen.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The view.
    pub view: &'a View,
    /// The measured paths.
    pub paths: &'a Paths,
}

/// What changed: at most [`MOST`] events, and one that counts the rest.
pub fn between(before: Seen<'_>, after: Seen<'_>) -> Vec<Event> {
    let mut events = Vec::new();
    store(before.view, after.view, &mut events);
    leases(before.view, after.view, &mut events);
    objects(before.view, after.view, &mut events);
    paths(before.paths, after.paths, &mut events);
    findings(&before.view.findings, &after.view.findings, &mut events);
    if let Some(more @ 1..) = events.len().checked_sub(MOST) {
        events.truncate(MOST);
        events.push(Event::new("more", "made", more, format!("{more} more events")));
    }
    events
}

fn store(before: &View, after: &View, events: &mut Vec<Event>) {
    match (before.store.connected, after.store.connected) {
        (false, true) => events.push(Event::new("store", "began", &after.store.endpoint, "the store is being followed")),
        (true, false) => events.push(Event::new("store", "ended", &after.store.endpoint, "the store watch is lost; routes stay")),
        _ => {}
    }
}

fn describe(peer: &PeerView) -> String {
    let via = peer.public.iter().next().map(|(_, ip)| format!("via {ip}"));
    let state = match &peer.state {
        PeerState::Programmed => None,
        PeerState::Refused(reasons) => Some(format!("refused: {}", reasons.join("; "))),
        PeerState::Failed(key) => Some(format!("failed: {key}")),
        PeerState::Doubtful => Some("doubtful: a store that lost data does not know it".to_owned()),
    };
    via.into_iter().chain(state).collect::<Vec<_>>().join(", ")
}

fn by_key(view: &View) -> BTreeMap<LeaseKey, &PeerView> {
    view.peers.iter().map(|peer| (peer.subnet, peer)).collect()
}

fn leases(before: &View, after: &View, events: &mut Vec<Event>) {
    // A list that did not change is as good as the same one.
    if before.peers == after.peers {
        return;
    }
    let (old, new) = (by_key(before), by_key(after));
    for (key, peer) in &new {
        match old.get(key) {
            None => events.push(Event::new("lease", "added", key, describe(peer))),
            Some(then) if then != peer => events.push(Event::new("lease", "changed", key, describe(peer))),
            Some(_) => {}
        }
    }
    let gone = old.iter().filter(|(key, _)| !new.contains_key(key));
    events.extend(gone.map(|(key, peer)| Event::new("lease", "removed", key, describe(peer))));
}

fn objects(before: &View, after: &View, events: &mut Vec<Event>) {
    let seen = before.objects.repairs.noted();
    for repair in after.objects.repairs.iter().filter(|repair| repair.number > seen) {
        events.push(Event { by: repair.by.clone(), ..Event::new("repair", "made", repair.kind, repair.action.clone()) });
    }
    let unseen = after.objects.repairs.iter().next().map_or(0, |first| first.number.saturating_sub(seen + 1));
    if unseen > 0 {
        events.push(Event::new("more", "made", unseen, format!("{unseen} more repairs")));
    }
    let conflicts = |view: &View| -> BTreeMap<String, Option<String>> {
        view.objects.conflicts.iter().map(|c| (c.object.clone(), c.by.clone())).collect()
    };
    let (old, new) = (conflicts(before), conflicts(after));
    for (object, by) in new.iter().filter(|(object, _)| !old.contains_key(*object)) {
        let event = Event::new("conflict", "began", object, "another program keeps changing it; repairs are limited to one a second");
        events.push(Event { by: by.clone(), ..event });
    }
    events.extend(old.keys().filter(|object| !new.contains_key(*object)).map(|object| Event::new("conflict", "ended", object, "")));
    let failed =
        |view: &View| -> BTreeMap<String, String> { view.objects.failed.iter().map(|f| (f.object.clone(), f.error.clone())).collect() };
    let (old, new) = (failed(before), failed(after));
    // The error of a conflict has changing numbers.
    for (object, error) in new.iter().filter(|(object, _)| !old.contains_key(*object)) {
        events.push(Event::new("object", "began", object, format!("not applied: {error}")));
    }
    events.extend(old.keys().filter(|object| !new.contains_key(*object)).map(|object| Event::new("object", "ended", object, "applied")));
}

fn paths(before: &Paths, after: &Paths, events: &mut Vec<Event>) {
    for ((peer, family), report) in &after.reports {
        let then = before.reports.get(&(*peer, *family)).map(|report| report.verdict.name());
        let now = report.verdict.name();
        if then == Some(now) || then.is_none() && now == "unmeasured" {
            continue;
        }
        let text = if report.verdict.is_broken() { format!("{now}: {}", report.verdict) } else { now.to_owned() };
        let action = if report.verdict.is_broken() { "began" } else { "ended" };
        events.push(Event::new("path", action, format!("{peer} by {family}"), text));
    }
}

fn findings(before: &[Finding], after: &[Finding], events: &mut Vec<Event>) {
    let (old, new): (BTreeSet<&Finding>, BTreeSet<&Finding>) = (before.iter().collect(), after.iter().collect());
    events.extend(new.difference(&old).map(|finding| Event::new("finding", "began", finding.code, finding.to_string())));
    events.extend(old.difference(&new).map(|finding| Event::new("finding", "ended", finding.code, finding.text.clone())));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    use expect_test::{Expect, expect};
    use flannel::object::Kind;
    use flannel::probe::{Report, Verdict};
    use flannel::{Family, PerFamily};
    use tokio::time::Instant;

    use crate::view::{Conflicted, Failed};

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: Some(text.parse().unwrap()), v6: None }).unwrap()
    }

    fn peer(subnet: &str, state: PeerState) -> PeerView {
        PeerView { subnet: key(subnet), public: PerFamily { v4: "192.0.2.2".parse().ok(), v6: None }, state, handshake: None }
    }

    fn report(verdict: Verdict) -> Report {
        Report { verdict, since: Duration::ZERO, rtt: None, sent: 1, lost: 1, error: None, summary: None }
    }

    fn paths(verdict: Verdict) -> Paths {
        Paths { reports: [((key("10.244.2.0/24"), Family::V4), report(verdict))].into(), ..Paths::default() }
    }

    #[track_caller]
    fn check(before: (&View, &Paths), after: (&View, &Paths), want: Expect) {
        let seen = |(view, paths)| Seen { view, paths };
        let events = between(seen(before), seen(after));
        want.assert_eq(&events.iter().map(|event| serde_json::to_string(event).unwrap() + "\n").collect::<String>());
    }

    #[tokio::test]
    async fn each_difference_is_an_event() {
        let (mut before, none) = (View::default(), Paths::default());
        before.peers = vec![peer("10.244.2.0/24", PeerState::Programmed), peer("10.244.3.0/24", PeerState::Programmed)];
        before.findings = vec![Finding::warning("old", "it was wrong".to_owned(), "")];
        let mut after = View::default();
        after.store.connected = true;
        after.store.endpoint = "https://10.0.0.5:2379".into();
        after.peers =
            vec![peer("10.244.3.0/24", PeerState::Refused(vec!["other VNI".to_owned()])), peer("10.244.4.0/24", PeerState::Programmed)];
        after.findings = vec![Finding::error("new", "it is wrong".to_owned(), "mend it")];
        let mut repairs = crate::view::Repairs::default();
        repairs.note(Kind::Route, "set route 10.244.2.0/24".to_owned(), Some("ip, process 7".to_owned()), Instant::now());
        after.objects.repairs = Arc::new(repairs);
        after.objects.conflicts = vec![Conflicted { object: "link flannel.1".to_owned(), by: Some("nm, process 9".to_owned()), times: 30 }];
        after.objects.failed = vec![Failed { object: "link flannel.1".to_owned(), error: "no".to_owned(), attempts: 1 }];
        check(
            (&before, &none),
            (&after, &paths(Verdict::OverlayBroken)),
            expect![[r#"
                {"type":"store","action":"began","subject":"https://10.0.0.5:2379","text":"the store is being followed"}
                {"type":"lease","action":"changed","subject":"10.244.3.0/24","text":"via 192.0.2.2, refused: other VNI"}
                {"type":"lease","action":"added","subject":"10.244.4.0/24","text":"via 192.0.2.2"}
                {"type":"lease","action":"removed","subject":"10.244.2.0/24","text":"via 192.0.2.2"}
                {"type":"repair","action":"made","subject":"route","text":"set route 10.244.2.0/24","by":"ip, process 7"}
                {"type":"conflict","action":"began","subject":"link flannel.1","text":"another program keeps changing it; repairs are limited to one a second","by":"nm, process 9"}
                {"type":"object","action":"began","subject":"link flannel.1","text":"not applied: no"}
                {"type":"path","action":"began","subject":"10.244.2.0/24 by IPv4","text":"overlay-broken: the host answers, but its end of the pod network does not: its flanneld never ran, or the encapsulated packets are dropped"}
                {"type":"finding","action":"began","subject":"new","text":"it is wrong; fix: mend it"}
                {"type":"finding","action":"ended","subject":"old","text":"it was wrong"}
            "#]],
        );
        check((&after, &none), (&after, &none), expect![[""]]);
        check(
            (&after, &paths(Verdict::OverlayBroken)),
            (&after, &paths(Verdict::Reachable)),
            expect![[r#"
                {"type":"path","action":"ended","subject":"10.244.2.0/24 by IPv4","text":"reachable"}
            "#]],
        );
    }

    #[tokio::test]
    async fn events_are_bounded_and_the_rest_is_counted() {
        let (before, none) = (View::default(), Paths::default());
        let peers = (0..=255).flat_map(|a| (0..=255).map(move |b| format!("10.{a}.{b}.0/24"))).take(MOST + 7);
        let mut after = View { peers: peers.map(|subnet| peer(&subnet, PeerState::Programmed)).collect(), ..View::default() };
        let events = between(Seen { view: &before, paths: &none }, Seen { view: &after, paths: &none });
        assert_eq!((events.len(), events[MOST].kind, events[MOST].text.as_str()), (MOST + 1, "more", "7 more events"));
        // Of more repairs than are remembered, the others are counted.
        let mut repairs = crate::view::Repairs::default();
        (0..150).for_each(|_| repairs.note(Kind::Route, "set route".to_owned(), None, Instant::now()));
        after.objects.repairs = Arc::new(repairs);
        let events = between(
            Seen { view: &View { peers: after.peers.clone(), ..View::default() }, paths: &none },
            Seen { view: &after, paths: &none },
        );
        assert_eq!((events.len(), events[100].text.as_str()), (101, "50 more repairs"));
    }
}
