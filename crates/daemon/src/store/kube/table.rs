//! Nodes in, [`StoreEvent`]s out: which Node has which lease. Pure; `follow` feeds it.

use std::collections::{BTreeMap, BTreeSet};

use flannel::annotations::{self, Annotations, Keys, NodeError};
use flannel::{Age, Config, Lease, LeaseKey, Peer, PerFamily, StoreEvent, Subnet};

use super::api::NodeObject;
use crate::store::reports::Reports;
use crate::store::{check_peer, foreign_text};

/// The Nodes, as far as they are known.
#[derive(Debug)]
pub(super) struct Table {
    keys: Keys,
    config: Config,
    own: String,
    nodes: BTreeMap<String, Known>,
    /// The subnets that were read from whole Nodes, by uid, until the Node is taken in.
    learned: BTreeMap<String, Result<PerFamily<Subnet>, NodeError>>,
    /// Which Node has a lease.
    owners: BTreeMap<LeaseKey, String>,
    /// Leases that more than one Node claims.
    contested: BTreeSet<LeaseKey>,
    /// The last state of this node's own Node: its uid and our annotations.
    own_seen: Option<(String, Annotations)>,
    own_changed: bool,
    reports: Reports,
}

/// A Node. Its pod CIDRs never change: the API server admits them once.
#[derive(Debug, Clone)]
struct Known {
    uid: String,
    subnets: Option<PerFamily<Subnet>>,
    lease: Option<LeaseKey>,
    /// What it published last.
    peer: Peer,
    /// Which of two Nodes with one pod CIDR was there first.
    age: Age,
}

impl Default for Known {
    fn default() -> Known {
        Known { uid: String::new(), subnets: None, lease: None, peer: Peer::default(), age: Age::UNKNOWN }
    }
}

impl Table {
    pub(super) fn new(keys: Keys, config: Config, own: String) -> Table {
        Table {
            keys,
            config,
            own,
            nodes: BTreeMap::new(),
            learned: BTreeMap::new(),
            owners: BTreeMap::new(),
            contested: BTreeSet::new(),
            own_seen: None,
            own_changed: false,
            reports: Reports::default(),
        }
    }

    /// How many Nodes have a lease.
    pub(super) fn len(&self) -> usize {
        self.owners.len()
    }

    /// Must the whole of this Node be read? Only when flannel manages it, and once.
    pub(super) fn wants(&self, node: &NodeObject) -> bool {
        let known = self.nodes.get(&node.metadata.name).filter(|known| known.uid == node.metadata.uid);
        let has_subnets = known.is_some_and(|known| known.subnets.is_some()) || self.learned.contains_key(&node.metadata.uid);
        !has_subnets && self.keys.is_managed(&node.metadata.annotations)
    }

    /// Notes the subnets of a whole Node, before it is taken in.
    pub(super) fn learn(&mut self, node: &NodeObject) {
        let subnets = annotations::pod_cidrs(&node.spec.pod_cidr, &node.spec.pod_cidrs);
        self.learned.insert(node.metadata.uid.clone(), subnets);
    }

    /// Takes in a complete list, as one: `Init` to `InitDone`.
    pub(super) fn list(&mut self, nodes: &[NodeObject]) -> Vec<StoreEvent> {
        let there: BTreeMap<&str, &str> = nodes.iter().map(|node| (node.metadata.name.as_str(), node.metadata.uid.as_str())).collect();
        // One that was made again is another Node, and has nothing of the former.
        self.nodes.retain(|name, known| there.get(name.as_str()) == Some(&known.uid.as_str()));
        self.owners.retain(|_, name| self.nodes.contains_key(name));
        self.contested.clear();
        if !there.contains_key(self.own.as_str()) {
            self.own_seen = None;
            self.own_changed = true;
        }
        let mut events = vec![StoreEvent::Init];
        let mut nodes: Vec<&NodeObject> = nodes.iter().collect();
        // Where several have one pod CIDR, the oldest is taken in first.
        nodes.sort_by_cached_key(|node| (node.metadata.age(), &node.metadata.name));
        for node in nodes {
            self.take(node, &mut events, true);
        }
        events.push(StoreEvent::InitDone);
        self.learned.clear();
        events
    }

    /// Takes in a Node that exists. A change that does not concern its lease, such as a heartbeat, makes no event. True if all Nodes
    /// must be listed again.
    pub(super) fn apply(&mut self, node: &NodeObject, events: &mut Vec<StoreEvent>) -> bool {
        let former = self.nodes.get(&node.metadata.name).is_some_and(|known| known.uid != node.metadata.uid);
        // Deleted and made again, and only the latter was seen.
        let again = former && self.delete(&node.metadata.name, events);
        self.take(node, events, false);
        again
    }

    fn take(&mut self, node: &NodeObject, events: &mut Vec<StoreEvent>, listing: bool) {
        let name = &node.metadata.name;
        self.look_at_own(node);
        let known = self.nodes.entry(name.clone()).or_default();
        known.uid.clone_from(&node.metadata.uid);
        let age = node.metadata.age();
        let Some((peer, problems)) = self.keys.peer(&node.metadata.annotations, &self.config, &known.peer) else {
            // Its annotations were removed: its own flanneld writes them again, and its routes stay until then.
            return events.extend(known.lease.map(|key| StoreEvent::Keep(key, age)));
        };
        if let Err(problem) = check_peer(&peer) {
            report(&mut self.reports, name, &problem);
            return events.extend(known.lease.map(|key| StoreEvent::Keep(key, age)));
        }
        let learned = self.learned.remove(&node.metadata.uid);
        if let Some(Ok(subnets)) = learned {
            known.subnets = Some(subnets);
        }
        let Some(subnets) = known.subnets else {
            let problem = learned.and_then(Result::err).unwrap_or(NodeError::NoPodCidr);
            return report(&mut self.reports, name, &problem.to_string());
        };
        let key = match annotations::lease_key(&self.config, &subnets) {
            Ok(key) => key,
            Err(error) => return report(&mut self.reports, name, &error.to_string()),
        };
        known.age = age;
        if let Some(older) = self.contest(key, name) {
            return report(&mut self.reports, name, &contested(key, &older));
        }
        let Some(known) = self.nodes.get_mut(name) else { return };
        let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
        report(&mut self.reports, name, &texts.join("; "));
        let is_new = known.lease.replace(key) != Some(key);
        let says_nothing = !problems.is_empty() && (peer == known.peer || peer.public.is_empty());
        if says_nothing {
            events.push(StoreEvent::Keep(key, age));
        } else if listing || is_new || peer != known.peer {
            known.peer.clone_from(&peer);
            events.push(StoreEvent::Apply(Lease { key, peer }, age));
        }
    }

    /// Makes a Node the owner of a lease, unless an older one claims it too: then that one's name is returned. By age, so that each
    /// flanneld decides alike and does so again after a restart.
    fn contest(&mut self, key: LeaseKey, name: &str) -> Option<String> {
        let age = |name: &str| self.nodes.get(name).map_or(Age::UNKNOWN, |known| known.age);
        let other = self.owners.get(&key).filter(|owner| *owner != name).cloned();
        let Some(other) = other else {
            self.owners.entry(key).or_insert_with(|| name.to_owned());
            return None;
        };
        self.contested.insert(key);
        if (age(&other), other.as_str()) < (age(name), name) {
            return Some(other);
        }
        report(&mut self.reports, &other, &contested(key, name));
        if let Some(other) = self.nodes.get_mut(&other) {
            other.lease = None;
        }
        self.owners.insert(key, name.to_owned());
        None
    }

    /// Takes in a Node's deletion. True if another Node claims its lease: then all Nodes must be listed again.
    pub(super) fn delete(&mut self, name: &str, events: &mut Vec<StoreEvent>) -> bool {
        if name == self.own {
            self.own_seen = None;
            self.own_changed = true;
        }
        let Some(key) = self.nodes.remove(name).and_then(|known| known.lease) else { return false };
        self.owners.remove(&key);
        events.push(StoreEvent::Delete(key));
        self.contested.remove(&key)
    }

    /// Did this node's own Node change in what we write there, since this was asked last?
    pub(super) fn take_own_changed(&mut self) -> bool {
        std::mem::take(&mut self.own_changed)
    }

    fn look_at_own(&mut self, node: &NodeObject) {
        if node.metadata.name != self.own {
            return;
        }
        let ours = node.metadata.annotations.iter().filter(|(key, _)| self.keys.is_ours(key));
        let now = (node.metadata.uid.clone(), ours.map(|(key, value)| (key.clone(), value.clone())).collect());
        if self.own_seen.as_ref() != Some(&now) {
            self.own_seen = Some(now);
            self.own_changed = true;
        }
    }
}

fn contested(key: LeaseKey, older: &str) -> String {
    format!("its pod CIDR {key} is Node {older}'s too, which is older: delete one of the two Nodes")
}

/// Warns once of a problem with what a Node publishes; an empty text is none.
fn report(reports: &mut Reports, node: &str, problem: &str) {
    if !problem.is_empty() && reports.is_due(node, problem) {
        tracing::warn!(node, reason = foreign_text(problem), "skipping unreadable Node");
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::{Metadata, Spec};
    use super::*;
    use expect_test::{Expect, expect};

    fn table() -> Table {
        let config = Config::parse_assigned(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#).unwrap();
        Table::new(Keys::new("flannel.alpha.coreos.com").unwrap(), config, "own".to_owned())
    }

    /// A Node as "name uid podCIDR public-ip" and, if it has one, the second of its creation; `-` for the public IP means that flannel
    /// does not manage it.
    fn node(text: &str) -> NodeObject {
        let words: Vec<&str> = text.split(' ').collect();
        let (&[name, uid, cidr, ip], created) = words.split_first_chunk().unwrap();
        let creation_timestamp = created.first().map(|second| format!("2026-11-28T12:00:{second}Z"));
        let pairs = [("kube-subnet-manager", "true"), ("public-ip", ip), ("backend-type", "host-gw"), ("backend-data", "null")];
        let annotations = pairs.iter().map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), (*value).to_owned()));
        let annotations = if ip == "-" { BTreeMap::new() } else { annotations.collect() };
        let metadata = Metadata { name: name.to_owned(), uid: uid.to_owned(), annotations, creation_timestamp, ..Metadata::default() };
        NodeObject { metadata, spec: Spec { pod_cidr: cidr.to_owned(), pod_cidrs: Vec::new() } }
    }

    fn text(events: &[StoreEvent]) -> String {
        let one = |event: &StoreEvent| match event {
            StoreEvent::Apply(lease, _) => format!("apply {} {}", lease.key, lease.peer.public.v4.unwrap()),
            StoreEvent::Keep(key, _) => format!("keep {key}"),
            StoreEvent::Delete(key) => format!("delete {key}"),
            StoreEvent::Init => "init".to_owned(),
            StoreEvent::Older => "older".to_owned(),
            StoreEvent::Vanished(key) => format!("vanished {key}"),
            StoreEvent::InitDone => "done".to_owned(),
        };
        events.iter().map(one).collect::<Vec<_>>().join("; ")
    }

    fn list(table: &mut Table, nodes: &[&str]) -> String {
        let nodes: Vec<NodeObject> = nodes.iter().map(|text| node(text)).collect();
        for node in nodes.iter().filter(|node| table.wants(node)).cloned().collect::<Vec<_>>() {
            table.learn(&node);
        }
        text(&table.list(&nodes))
    }

    /// Lines: `+` a Node that exists, `-` one that was deleted.
    #[track_caller]
    fn check(table: &mut Table, lines: &[&str], want: Expect) {
        let mut events = Vec::new();
        let mut again = false;
        for line in lines {
            match line.split_at(1) {
                ("+", text) => {
                    let node = node(text);
                    if table.wants(&node) {
                        table.learn(&node);
                    }
                    again |= table.apply(&node, &mut events);
                }
                (_, name) => again |= table.delete(name, &mut events),
            }
        }
        want.assert_eq(&format!("{}{}", text(&events), if again { " (list again)" } else { "" }));
    }

    #[test]
    fn list_and_changes_become_events() {
        let mut table = table();
        assert_eq!(
            list(&mut table, &["own 1 10.244.0.0/24 192.0.2.1", "b 2 10.244.1.0/24 192.0.2.2", "new 3  -"]),
            "init; apply 10.244.1.0/24 192.0.2.2; apply 10.244.0.0/24 192.0.2.1; done"
        );
        check(&mut table, &["+new 3 10.244.2.0/24 192.0.2.3"], expect!["apply 10.244.2.0/24 192.0.2.3"]);
        check(&mut table, &["+b 2 10.244.1.0/24 192.0.2.22"], expect!["apply 10.244.1.0/24 192.0.2.22"]);
        check(&mut table, &["-b", "-never"], expect!["delete 10.244.1.0/24"]);
        check(&mut table, &["+c 9 10.244.1.0/24 192.0.2.9"], expect!["apply 10.244.1.0/24 192.0.2.9"]);
        // Made again under its name, with another pod CIDR; its end was not seen.
        check(&mut table, &["+new 4 10.244.7.0/24 192.0.2.3"], expect!["delete 10.244.2.0/24; apply 10.244.7.0/24 192.0.2.3"]);
    }

    #[test]
    fn whole_node_is_read_once() {
        let mut table = table();
        assert!(!table.wants(&node("b 2 10.244.1.0/24 -")), "flannel does not manage it");
        assert!(table.wants(&node("b 2 10.244.1.0/24 192.0.2.2")));
        list(&mut table, &["b 2 10.244.1.0/24 192.0.2.2"]);
        assert!(!table.wants(&node("b 2  192.0.2.3")));
        assert!(table.wants(&node("b 3  192.0.2.3")), "another Node of that name");
        // A list of metadata alone is enough then.
        assert_eq!(list(&mut table, &["b 2  192.0.2.2"]), "init; apply 10.244.1.0/24 192.0.2.2; done");
    }

    #[test]
    fn unreadable_annotations_keep_the_last_known_lease() {
        let mut table = table();
        list(&mut table, &["b 2 10.244.1.0/24 192.0.2.2", "c 3 10.244.3.0/24 192.0.2.3"]);
        check(&mut table, &["+b 2  nonsense"], expect!["keep 10.244.1.0/24"]);
        check(&mut table, &["+c 3  -"], expect!["keep 10.244.3.0/24"]);
        // An address alone is gone.
        check(&mut table, &["+b 2  "], expect![""]);
        assert_eq!(list(&mut table, &["b 2  ", "c 3  -"]), "init; apply 10.244.1.0/24 192.0.2.2; keep 10.244.3.0/24; done");
        assert_eq!(list(&mut table, &["b 2  nonsense", "c 3  -"]), "init; keep 10.244.1.0/24; keep 10.244.3.0/24; done");
        check(&mut table, &["+d 4 fd00::/64 192.0.2.4", "+e 5 x 192.0.2.5"], expect![""]);
    }

    #[test]
    fn first_of_two_nodes_keeps_their_subnet() {
        let mut table = table();
        list(&mut table, &["b 2 10.244.1.0/24 192.0.2.2"]);
        check(&mut table, &["+thief 3 10.244.1.0/24 192.0.2.66"], expect![""]);
        check(&mut table, &["-thief"], expect![""]);
        check(&mut table, &["+thief 3 10.244.1.0/24 192.0.2.66", "-b"], expect!["delete 10.244.1.0/24 (list again)"]);
        assert_eq!(list(&mut table, &["thief 3 10.244.1.0/24 192.0.2.66"]), "init; apply 10.244.1.0/24 192.0.2.66; done");
        // Without a watch, one was created again with another subnet, and another Node has its old one.
        assert_eq!(
            list(&mut table, &["a 5 10.244.1.0/24 192.0.2.5", "thief 9 10.244.4.0/24 192.0.2.66 09"]),
            "init; apply 10.244.4.0/24 192.0.2.66; apply 10.244.1.0/24 192.0.2.5; done"
        );
        // The same, by events of the watch.
        check(
            &mut table,
            &["+b 8 10.244.4.0/24 192.0.2.8 10", "+thief 10 10.244.5.0/24 192.0.2.66 11"],
            expect!["delete 10.244.4.0/24; apply 10.244.5.0/24 192.0.2.66 (list again)"],
        );
    }

    #[test]
    fn older_of_two_nodes_with_one_pod_cidr_has_the_lease() {
        let (old, young) = ("old 2 10.244.1.0/24 192.0.2.2 05", "a-young 3 10.244.1.0/24 192.0.2.66 06");
        for nodes in [[old, young], [young, old]] {
            assert_eq!(list(&mut table(), &nodes), "init; apply 10.244.1.0/24 192.0.2.2; done", "in any order");
        }
        // The Node that got its pod CIDR last is the older one.
        let mut table = table();
        list(&mut table, &[young]);
        check(&mut table, &["+old 2 10.244.1.0/24 192.0.2.2 05"], expect!["apply 10.244.1.0/24 192.0.2.2"]);
        check(&mut table, &["+a-young 3 10.244.1.0/24 192.0.2.67 06"], expect![""]);
        check(&mut table, &["-old"], expect!["delete 10.244.1.0/24 (list again)"]);
        assert_eq!(list(&mut table, &[young]), "init; apply 10.244.1.0/24 192.0.2.66; done");
    }

    #[test]
    fn age_of_a_node_is_the_second_of_its_creation() {
        let age = |text: Option<&str>| Metadata { creation_timestamp: text.map(ToOwned::to_owned), ..Metadata::default() }.age();
        assert_eq!(age(Some("2026-11-28T12:00:05Z")), Age::created(1_795_867_205));
        assert!(age(Some("2026-11-28T12:00:05Z")) < age(Some("2026-11-28T12:00:06Z")));
        assert_eq!([age(None), age(Some("1969-01-01T00:00:00Z")), age(Some("yesterday"))], [Age::UNKNOWN; 3]);
    }

    #[test]
    fn changes_of_own_node_are_noticed_and_heartbeats_are_not() {
        let mut table = table();
        list(&mut table, &["own 1 10.244.0.0/24 192.0.2.1", "b 2 10.244.1.0/24 192.0.2.2"]);
        assert!(table.take_own_changed());
        check(&mut table, &["+own 1  192.0.2.1", "+b 2  192.0.2.9"], expect!["apply 10.244.1.0/24 192.0.2.9"]);
        assert!(!table.take_own_changed());
        for line in ["+own 1  192.0.2.7", "+own 1  -", "-own", "+own 5  -"] {
            apply_line(&mut table, line);
            assert!(table.take_own_changed(), "{line}");
        }
    }

    fn apply_line(table: &mut Table, line: &str) {
        let mut events = Vec::new();
        let _ = match line.split_at(1) {
            ("+", text) => table.apply(&node(text), &mut events),
            (_, name) => table.delete(name, &mut events),
        };
    }
}
