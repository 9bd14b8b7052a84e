//! Notes of the rules that plugins wrote for a pod, and which of them have to be repaired.
//!
//! No runtime calls a plugin because another program flushed nf_tables. So a plugin notes what it wrote, and removes the
//! note before it deletes: a note without its rules says that another program deleted them. A note names the host's end
//! of the pod's link, by which a pod that is gone is recognised.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use super::masquerade::{self, Masquerade};
use super::ports::{Holder, Mapping, Ports, Snat};
use super::{Attachment, Found, Layout, Rule, Table, Tag, digest};
use crate::net::Family;

/// A note: the rules, and the index of the host's end of the container's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Index of the link.
    pub end: u32,
    /// The rules.
    pub rules: Rules,
}

/// Rules of one attachment, as they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rules {
    /// Host ports of one of its addresses.
    Ports(Ports),
    /// Its masquerading.
    Masquerade(Masquerade),
}

/// What a group of rules is recognised by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Tag(Tag),
    /// The comment up to a comma.
    Comment(String),
}

impl Rules {
    /// The table that they are in.
    pub fn table(&self) -> Table {
        match self {
            Rules::Ports(ports) => Table::Ports(ports.family()),
            Rules::Masquerade(_) => Table::Masquerade,
        }
    }

    /// The name of their note.
    pub fn file_name(&self, ifname: &str) -> String {
        match self {
            Rules::Ports(ports) => match &ports.holder {
                Holder::Attachment(attachment) => ports_file(attachment, ports.family()),
                Holder::Container(id) => untagged_ports_file(id, ifname, ports.family()),
            },
            Rules::Masquerade(masquerade) => masquerade_file(&masquerade.attachment),
        }
    }

    fn encode(&self) -> Vec<Rule> {
        match self {
            Rules::Ports(ports) => ports.rules(),
            Rules::Masquerade(masquerade) => masquerade.rules(),
        }
    }

    fn group(&self) -> Group {
        match self {
            Rules::Ports(ports) => {
                let owner = ports.owner();
                owner.tag.map_or(Group::Comment(owner.comment), Group::Tag)
            }
            Rules::Masquerade(masquerade) => Group::Comment(masquerade::name(&masquerade.attachment)),
        }
    }

    fn udp_ports(&self) -> Vec<u16> {
        match self {
            Rules::Ports(ports) => ports.udp_ports(),
            Rules::Masquerade(_) => Vec::new(),
        }
    }
}

/// Names of containers are too long for the name of a file.
fn ports_file(attachment: &Attachment, family: Family) -> String {
    let Attachment { network, container, ifname } = attachment;
    format!("hostports-{}", digest(&format!("{network} {container} {ifname} {family}")))
}

/// The name that earlier versions gave to notes of ports.
fn untagged_ports_file(id: &str, ifname: &str, family: Family) -> String {
    format!("ports-{}", digest(&format!("{id} {ifname} {family}")))
}

/// The name of an attachment's note of masquerading.
pub fn masquerade_file(attachment: &Attachment) -> String {
    format!("masquerade-{}", masquerade::name(attachment))
}

/// The names of an attachment's notes of ports, also those that earlier versions wrote.
pub fn ports_files(attachment: &Attachment) -> Vec<String> {
    let untagged = |family| untagged_ports_file(&attachment.container, &attachment.ifname, family);
    Family::ALL.into_iter().flat_map(|family| [ports_file(attachment, family), untagged(family)]).collect()
}

/// What has to be done for one group of rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Repair {
    /// The notes that it follows from.
    pub living: Vec<String>,
    /// Notes of pods that are gone: they are removed with their rules.
    pub dead: Vec<String>,
    /// Rules to delete, as places in the list of what was found.
    pub delete: Vec<usize>,
    /// Rules to add.
    pub add: Vec<Rule>,
    /// UDP ports whose connections may have been tracked while the rules were missing.
    pub udp: Vec<u16>,
}

impl Repair {
    /// Does it change no rule?
    pub fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.add.is_empty()
    }
}

/// The groups of a table that are not as their notes say: rules are missing, or their pod is. `alive` are the indexes of
/// the links that there are.
pub fn review(table: Table, layout: &Layout, notes: &[(String, Note)], alive: &BTreeSet<u32>, found: &[Found]) -> Vec<Repair> {
    #[derive(Default)]
    struct State<'a> {
        living: Vec<&'a (String, Note)>,
        dead: Vec<String>,
        rules: Vec<usize>,
    }
    let mut groups: BTreeMap<Group, State<'_>> = BTreeMap::new();
    for entry in notes.iter().filter(|(_, note)| note.rules.table() == table) {
        let state = groups.entry(entry.1.rules.group()).or_default();
        if alive.contains(&entry.1.end) { state.living.push(entry) } else { state.dead.push(entry.0.clone()) }
    }
    for (place, rule) in found.iter().enumerate().filter(|(_, rule)| layout.own.contains(&rule.chain.as_str())) {
        let comment = || Group::Comment(rule.owner.comment.split(',').next().unwrap_or_default().to_owned());
        if let Some(state) = groups.get_mut(&rule.owner.tag.map_or_else(comment, Group::Tag)) {
            state.rules.push(place);
        }
    }
    // Rules that no shared rule leads to have no effect.
    let is_whole = layout.is_whole(|chain| found.iter().any(|rule| rule.chain == chain));
    let repair = |state: State<'_>| {
        let add: Vec<Rule> = state.living.iter().flat_map(|(_, note)| note.rules.encode()).collect();
        let is_right = is_whole && state.dead.is_empty() && state.rules.len() >= add.len();
        (!is_right).then(|| Repair {
            living: state.living.iter().map(|(name, _)| name.clone()).collect(),
            dead: state.dead,
            delete: state.rules,
            add,
            udp: state.living.iter().flat_map(|(_, note)| note.rules.udp_ports()).collect(),
        })
    };
    groups.into_values().filter_map(repair).collect()
}

impl Note {
    /// Its text: one statement a line. `None` if a name in it has a form that would be read as something else.
    pub fn render(&self) -> Option<String> {
        let mut text = format!("end {}\n", self.end);
        match &self.rules {
            Rules::Ports(Ports { holder, address, mappings, snat }) => {
                let snat = match snat {
                    Snat::No => "no",
                    Snat::Local => "local",
                    Snat::All => "all",
                };
                match holder {
                    // Another word than in the form without the attachment: a daemon that knows only that passes it over.
                    Holder::Attachment(Attachment { network, container, ifname }) => {
                        writeln!(text, "hostports {snat} {address} {container} {ifname} {network}")
                    }
                    Holder::Container(id) => writeln!(text, "ports {snat} {address} {id}"),
                }
                .ok()?;
                for Mapping { protocol, host_port, container_port, host_ip } in mappings {
                    let host_ip = host_ip.map_or("-".to_owned(), |ip| ip.to_string());
                    writeln!(text, "map {protocol} {host_port} {container_port} {host_ip}").ok()?;
                }
            }
            Rules::Masquerade(Masquerade { attachment: Attachment { network, container, ifname }, addresses }) => {
                writeln!(text, "masquerade {ifname}:{container} {network}").ok()?;
                addresses.iter().try_for_each(|address| writeln!(text, "address {address}")).ok()?;
            }
        }
        Note::parse(&text).filter(|note| note == self).map(|_| text)
    }

    /// Reads its text.
    pub fn parse(text: &str) -> Option<Note> {
        let mut lines = text.lines();
        let end = lines.next()?.strip_prefix("end ")?.parse().ok()?;
        let (kind, rest) = lines.next()?.split_once(' ')?;
        let words = |count| rest.splitn(count, ' ').collect::<Vec<&str>>();
        let rules = match (kind, words(if kind == "hostports" { 5 } else { 3 }).as_slice()) {
            ("hostports", [snat, address, container, ifname, network]) => {
                let attachment = attachment(network, container, ifname);
                let mappings = lines.map(parse_mapping).collect::<Option<_>>()?;
                Rules::Ports(Ports {
                    holder: Holder::Attachment(attachment),
                    address: address.parse().ok()?,
                    mappings,
                    snat: parse_snat(snat)?,
                })
            }
            ("ports", [snat, address, id]) => {
                let mappings = lines.map(parse_mapping).collect::<Option<_>>()?;
                Rules::Ports(Ports {
                    holder: Holder::Container((*id).to_owned()),
                    address: address.parse().ok()?,
                    mappings,
                    snat: parse_snat(snat)?,
                })
            }
            ("masquerade", [place, network]) => {
                let (ifname, container) = place.split_once(':')?;
                let addresses = lines.map(|line| line.strip_prefix("address ")?.parse().ok()).collect::<Option<_>>()?;
                Rules::Masquerade(Masquerade { attachment: attachment(network, container, ifname), addresses })
            }
            _ => return None,
        };
        Some(Note { end, rules })
    }
}

fn attachment(network: &str, container: &str, ifname: &str) -> Attachment {
    Attachment { network: network.to_owned(), container: container.to_owned(), ifname: ifname.to_owned() }
}

fn parse_snat(word: &str) -> Option<Snat> {
    match word {
        "no" => Some(Snat::No),
        "local" => Some(Snat::Local),
        "all" => Some(Snat::All),
        _ => None,
    }
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.strip_prefix("map ")?.split(' ');
    let (protocol, host_port, container_port) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let host_ip = match words.next()? {
        "-" => None,
        text => Some(text.parse::<IpAddr>().ok()?),
    };
    words.next().is_none().then_some(Mapping { protocol, host_port, container_port, host_ip })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Owner;

    #[track_caller]
    fn check(rules: Rules, want: Option<&str>) {
        let note = Note { end: 7, rules };
        let text = note.render();
        assert_eq!(text.as_deref(), want);
        assert!(text.is_none_or(|text| Note::parse(&text) == Some(note)));
    }

    fn ports(holder: Holder) -> Rules {
        let mapping = |protocol, host_ip: Option<&str>| Mapping {
            protocol,
            host_port: 8080,
            container_port: 80,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        let mappings = vec![mapping(6, None), mapping(17, Some("127.0.0.2"))];
        Rules::Ports(Ports { holder, address: "10.1.2.3/24".parse().unwrap(), mappings, snat: Snat::Local })
    }

    #[test]
    fn notes_have_one_statement_a_line() {
        let maps = "map 6 8080 80 -\nmap 17 8080 80 127.0.0.2\n";
        check(
            ports(Holder::Attachment(attachment("cbr0", "abc", "eth0"))),
            Some(&format!("end 7\nhostports local 10.1.2.3/24 abc eth0 cbr0\n{maps}")),
        );
        check(ports(Holder::Container("abc".to_owned())), Some(&format!("end 7\nports local 10.1.2.3/24 abc\n{maps}")));
        let addresses = vec!["10.1.2.3/24".parse().unwrap(), "fd00::3/64".parse().unwrap()];
        let masquerade = Rules::Masquerade(Masquerade { attachment: attachment("cbr0", "abc", "eth0"), addresses });
        check(masquerade, Some("end 7\nmasquerade eth0:abc cbr0\naddress 10.1.2.3/24\naddress fd00::3/64\n"));
    }

    #[test]
    fn ambiguous_notes_are_neither_written_nor_read() {
        check(ports(Holder::Container("abc\nmap 6 22 22 -".to_owned())), None);
        check(ports(Holder::Attachment(attachment("net", "a b", "eth0"))), None);
        for text in [
            "",
            "end 7\n",
            "end x\nports no 10.1.2.3/24 a\n",
            "end 7\nhostports no 10.1.2.3/24 a eth0\n",
            "end 7\nports no 10.1.2.3/24 a\nmap 6 70000 80 -\n",
            "end 7\nports no 10.1.2.3/24 a\nmap 6 1 2 - x\n",
        ] {
            assert_eq!(Note::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn notes_of_earlier_versions_are_found_by_their_names() {
        let names = ports_files(&attachment("cbr0", "abc", "eth0"));
        assert!(names.contains(&ports(Holder::Attachment(attachment("cbr0", "abc", "eth0"))).file_name("eth0")));
        assert!(names.contains(&ports(Holder::Container("abc".to_owned())).file_name("eth0")));
        assert_eq!(names.len(), 4);
    }

    /// The table as it is when all is well, with these rules of attachments.
    fn found(rules: &[Rule]) -> Vec<Found> {
        let layout = Table::Ports(Family::V4).layout();
        let all = layout.shared.iter().chain(rules);
        all.map(|rule| Found { chain: rule.chain.clone(), owner: rule.owner.clone().unwrap_or_default(), addresses: Vec::new() }).collect()
    }

    fn repairs(notes: &[(String, Note)], found: &[Found]) -> Vec<Repair> {
        let table = Table::Ports(Family::V4);
        review(table, &table.layout(), notes, &BTreeSet::from([7]), found)
    }

    #[test]
    fn missing_rules_are_added_and_those_of_dead_pods_deleted() {
        let eth0 = ports(Holder::Attachment(attachment("cbr0", "abc", "eth0")));
        let net1 = ports(Holder::Attachment(attachment("other", "abc", "net1")));
        let notes = |end| vec![("a".to_owned(), Note { end: 7, rules: eth0.clone() }), ("b".to_owned(), Note { end, rules: net1.clone() })];
        let all: Vec<Rule> = [eth0.encode(), net1.encode()].concat();
        assert_eq!(repairs(&notes(7), &found(&all)), []);

        // One of the first attachment's is missing: the second's stay untouched.
        let repair = repairs(&notes(7), &found(&all[1..])).remove(0);
        assert_eq!((repair.living, repair.add, repair.udp), (vec!["a".to_owned()], eth0.encode(), vec![8080]));
        assert_eq!(repair.delete.len(), eth0.encode().len() - 1);

        let repair = repairs(&notes(8), &found(&all)).remove(0);
        assert_eq!((repair.dead, repair.add), (vec!["b".to_owned()], Vec::new()));
        assert_eq!(repair.delete.len(), net1.encode().len());

        // Without the rules that lead to them, none has an effect.
        assert_eq!(repairs(&notes(7), &found(&all)[1..]).len(), 2);
    }

    #[test]
    fn untagged_notes_cover_untagged_rules_only() {
        let old = ports(Holder::Container("abc".to_owned()));
        let new = ports(Holder::Attachment(attachment("other", "abc", "net1")));
        let notes = vec![("a".to_owned(), Note { end: 7, rules: old.clone() })];
        assert_eq!(repairs(&notes, &found(&[old.encode(), new.encode()].concat())), []);
        let repair = repairs(&notes, &found(&new.encode())).remove(0);
        assert!(repair.delete.is_empty() && repair.add.len() == old.encode().len());
        assert_eq!(repair.add[0].owner, Some(Owner { comment: "abc".to_owned(), tag: None }));
    }
}
