//! Compares reservations with what exists. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use cni::reservations::Reservation;
use flannel::{Family, PerFamily, Subnet};
use kernel::endpoints::Endpoints;
use serde::Serialize;

/// A reservation may be so much older than the interface that gets the address: a plugin is at work.
const YOUNG: Duration = Duration::from_secs(60);

/// What is compared.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// The pod networks.
    pub(super) networks: Vec<Subnet>,
    /// This host's subnets.
    pub(super) own: PerFamily<Subnet>,
    /// Reservations by network.
    pub(super) reservations: BTreeMap<String, Vec<Reservation>>,
    /// Namespaces with their addresses; or why they cannot be read.
    pub(super) endpoints: Result<Endpoints, String>,
    /// Containers that have a process.
    pub(super) running: BTreeSet<String>,
    /// Containers whose sandbox the runtime's cache names and that still exists.
    pub(super) sandboxes: BTreeSet<String>,
    /// Seconds since 1970.
    pub(super) now: u64,
}

/// What is wrong with an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// Two interfaces have it.
    Duplicate,
    /// An interface has it, and no file reserves it.
    Unreserved,
    /// It is reserved, and no interface has it.
    Leaked,
    /// The same, and it was reserved before this host was booted.
    OtherBoot,
    /// It is reserved for a container that still exists, whose interface does not have it.
    NoInterface,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Duplicate => "duplicate",
            Kind::Unreserved => "unreserved",
            Kind::Leaked => "leaked",
            Kind::OtherBoot => "other-boot",
            Kind::NoInterface => "no-interface",
        }
    }

    /// Whether the reservation takes an address from other pods.
    pub(super) fn is_leak(self) -> bool {
        matches!(self, Kind::Leaked | Kind::OtherBoot)
    }
}

/// A problem with an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    pub(super) address: IpAddr,
    pub(super) kind: Kind,
    /// The network whose file reserves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) network: Option<String>,
    pub(super) text: String,
    /// Whether it is proved that nothing uses the address.
    pub(super) dead: bool,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// Reservations of pods of this host.
    pub(super) used: usize,
    /// Addresses that pods can have; `None` for more than anyone counts.
    pub(super) capacity: Option<u64>,
    pub(super) problems: Vec<Problem>,
    pub(super) not_checked: Vec<String>,
}

impl Report {
    /// Reservations that take an address from other pods.
    pub(super) fn leaked(&self) -> usize {
        self.problems.iter().filter(|problem| problem.kind.is_leak()).count()
    }
}

/// Compares.
pub(super) fn judge(facts: &Facts) -> Report {
    let mut report = Report { capacity: capacity(facts), ..Report::default() };
    // Files of another network have addresses of their own: nothing is known about its pods.
    let is_ours = |address: IpAddr| facts.networks.iter().any(|network| network.contains(address));
    let reserved = facts.reservations.iter().flat_map(|(network, list)| list.iter().map(move |one| (network, one)));
    let reserved: Vec<(&String, &Reservation)> = reserved.filter(|(_, one)| is_ours(one.address)).collect();
    let family = if facts.own.v4.is_some() { Family::V4 } else { Family::V6 };
    report.used = reserved.iter().filter(|(_, one)| Family::of(one.address) == family).count();
    let endpoints = match &facts.endpoints {
        Ok(endpoints) => endpoints,
        Err(error) => {
            report.not_checked.push(format!("interfaces: {error} (run as root on the host)"));
            return report;
        }
    };
    if let Some(first) = endpoints.missing.first() {
        let count = endpoints.missing.len();
        let text = format!(
            "{count} links of this host lead to namespaces that cannot be seen from here, {first} among them: addresses that no interface seems to have may be theirs"
        );
        report.not_checked.push(text);
    }
    // Namespaces that no link of this host leads to may be another node's, whose pods have addresses of their own. An address that one of
    // them has is not freed all the same.
    let (mut holders, mut anywhere): (BTreeMap<IpAddr, Vec<String>>, BTreeSet<IpAddr>) = Default::default();
    for endpoint in &endpoints.list {
        for (name, addresses) in &endpoint.interfaces {
            for cidr in addresses.iter().filter(|cidr| is_ours(cidr.addr)) {
                anywhere.insert(cidr.addr);
                if endpoint.is_linked {
                    holders.entry(cidr.addr).or_default().push(format!("{name} in {}", endpoint.path.display()));
                }
            }
        }
    }
    let is_of_host = |address: &IpAddr| {
        let own = endpoints.list.iter().filter(|endpoint| endpoint.is_own);
        own.flat_map(|endpoint| &endpoint.interfaces).any(|(_, addresses)| addresses.iter().any(|cidr| cidr.addr == *address))
    };
    for (address, places) in holders.iter().filter(|(_, places)| places.len() > 1) {
        let text = format!("{} interfaces have it: {}", places.len(), places.join(", "));
        report.problems.push(Problem { address: *address, kind: Kind::Duplicate, network: None, text, dead: false });
    }
    let is_local = |address: &IpAddr| facts.own.get(Family::of(*address)).is_some_and(|own| own.contains(*address));
    for (address, places) in holders.iter().filter(|(address, _)| is_local(address) && !is_of_host(address)) {
        if !reserved.iter().any(|(_, one)| one.address == *address) {
            let text = format!("{} has it, but no file reserves it: another pod may get it", places.join(", "));
            report.problems.push(Problem { address: *address, kind: Kind::Unreserved, network: None, text, dead: false });
        }
    }
    let is_complete = endpoints.missing.is_empty();
    let orphans = reserved.iter().filter(|(_, one)| !holders.contains_key(&one.address));
    let orphans = orphans.filter_map(|(network, one)| orphan(facts, network, one, is_complete));
    report.problems.extend(orphans.map(|problem| Problem { dead: problem.dead && !anywhere.contains(&problem.address), ..problem }));
    report.problems.sort_by_key(|problem| (problem.kind, problem.address));
    report
}

/// A reservation that no interface has.
fn orphan(facts: &Facts, network: &str, one: &Reservation, is_complete: bool) -> Option<Problem> {
    let age = one.age(facts.now);
    let interface = one.ifname().map(|name| format!(" interface {name}")).unwrap_or_default();
    let owner = format!("container {}{interface}", one.container());
    let (kind, text) = if facts.sandboxes.contains(one.container()) || facts.running.contains(one.container()) {
        (Kind::NoInterface, format!("{owner} still exists, but no interface has it"))
    } else if one.is_of_another_boot == Some(true) {
        (Kind::OtherBoot, format!("reserved for {owner} before this host was booted"))
    } else if age < YOUNG || !is_complete {
        // A plugin is at work, or has just died: the next check will tell. Or a namespace that is missing has it.
        return None;
    } else {
        (Kind::Leaked, format!("reserved for {owner}, of which nothing is left"))
    };
    let dead = is_complete && kind.is_leak();
    Some(Problem { address: one.address, kind, network: Some(network.to_owned()), text, dead })
}

/// Addresses for pods in this host's subnet: without the subnet's own, the gateway's and the broadcast address.
fn capacity(facts: &Facts) -> Option<u64> {
    let own = facts.own.v4?;
    Some((1_u64 << (32 - u32::from(own.prefix_len()))).saturating_sub(3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use kernel::endpoints::Endpoint;

    fn facts() -> Facts {
        let endpoint = |path: &str, is_own, interfaces: &[(&str, &str)]| Endpoint {
            path: path.into(),
            is_own,
            is_linked: true,
            interfaces: interfaces.iter().map(|(name, cidr)| (name.parse().unwrap(), vec![cidr.parse().unwrap()])).collect(),
        };
        let list = vec![
            endpoint("/proc/self/ns/net", true, &[("cni0", "10.244.1.1/24"), ("flannel.1", "10.244.1.0/32")]),
            endpoint("/run/netns/a", false, &[("eth0", "10.244.1.2/24")]),
            endpoint("/run/netns/b", false, &[("eth0", "10.244.1.3/24")]),
            endpoint("/run/netns/c", false, &[("eth0", "10.244.1.3/24"), ("lo", "127.0.0.1/8")]),
        ];
        let reserved =
            |last: u8, container: &str, since, boot| Reservation::new(IpAddr::from([10, 244, 1, last]), container, "eth0", since, boot);
        let list_of = vec![
            reserved(2, "a", 0, Some(false)),
            reserved(4, "gone", 100, Some(false)),
            reserved(5, "young", 990, Some(false)),
            reserved(6, "boot", 990, Some(true)),
            reserved(7, "alive", 100, None),
            reserved(8, "sandbox", 100, None),
        ];
        let other = vec![Reservation::new("192.168.9.9".parse().unwrap(), "macvlan", "net1", 0, None)];
        Facts {
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            own: PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: None },
            reservations: [("cbr0".to_owned(), list_of), ("other".to_owned(), other)].into(),
            endpoints: Ok(Endpoints { list, missing: Vec::new() }),
            running: ["alive".to_owned()].into(),
            sandboxes: ["sandbox".to_owned()].into(),
            now: 1_000,
        }
    }

    fn lines(report: &Report) -> String {
        let line = |p: &Problem| format!("{} {} dead={} {}\n", p.address, p.kind.name(), p.dead, p.text);
        report.problems.iter().map(line).collect()
    }

    #[test]
    fn each_difference_is_named_and_only_what_is_proved_is_dead() {
        let report = judge(&facts());
        expect![[r#"
            10.244.1.3 duplicate dead=false 2 interfaces have it: eth0 in /run/netns/b, eth0 in /run/netns/c
            10.244.1.3 unreserved dead=false eth0 in /run/netns/b, eth0 in /run/netns/c has it, but no file reserves it: another pod may get it
            10.244.1.4 leaked dead=true reserved for container gone interface eth0, of which nothing is left
            10.244.1.6 other-boot dead=true reserved for container boot interface eth0 before this host was booted
            10.244.1.7 no-interface dead=false container alive interface eth0 still exists, but no interface has it
            10.244.1.8 no-interface dead=false container sandbox interface eth0 still exists, but no interface has it
        "#]].assert_eq(&lines(&report));
        assert_eq!((report.used, report.capacity, report.leaked()), (6, Some(253), 2));
    }

    #[test]
    fn nothing_is_dead_while_a_namespace_is_missing() {
        let mut facts = facts();
        facts.endpoints.as_mut().unwrap().missing.push("veth7".parse().unwrap());
        let report = judge(&facts);
        assert!(report.problems.iter().all(|problem| !problem.dead), "{report:?}");
        assert!(report.not_checked[0].contains("veth7"), "{report:?}");
        // Containers of an earlier boot have ended, whatever cannot be seen.
        assert_eq!((report.leaked(), report.problems.iter().any(|problem| problem.kind == Kind::OtherBoot)), (1, true));
        facts.endpoints = Err("Operation not permitted".to_owned());
        assert_eq!((judge(&facts).problems, judge(&facts).used), (Vec::new(), 6));
    }

    #[test]
    fn pods_of_another_node_on_this_machine_are_no_duplicates() {
        let mut facts = facts();
        let list = &mut facts.endpoints.as_mut().unwrap().list;
        list.retain(|endpoint| !endpoint.path.ends_with("c"));
        let before = judge(&facts);
        let list = &mut facts.endpoints.as_mut().unwrap().list;
        for (path, address) in
            [("/proc/7/ns/net", "10.244.1.2/24"), ("/proc/8/ns/net", "10.244.1.0/32"), ("/proc/9/ns/net", "10.244.1.9/24")]
        {
            let interfaces = vec![("eth0".parse().unwrap(), vec![address.parse().unwrap()])];
            list.push(Endpoint { path: path.into(), is_own: false, is_linked: false, interfaces });
        }
        assert_eq!(judge(&facts), before);
        // What one of them has is leaked here, and yet not freed.
        let interfaces = vec![("eth0".parse().unwrap(), vec!["10.244.1.4/24".parse().unwrap()])];
        let endpoint = Endpoint { path: "/proc/6/ns/net".into(), is_own: false, is_linked: false, interfaces };
        facts.endpoints.as_mut().unwrap().list.push(endpoint);
        let four = judge(&facts).problems.into_iter().find(|problem| problem.address == IpAddr::from([10, 244, 1, 4])).unwrap();
        assert_eq!((four.kind, four.dead), (Kind::Leaked, false));
    }

    #[test]
    fn address_of_an_interface_is_never_a_leak() {
        let mut facts = facts();
        let one = Reservation::new("10.244.1.2".parse().unwrap(), "a", "eth0", 0, Some(true));
        facts.reservations = [("cbr0".to_owned(), vec![one])].into();
        assert_eq!(judge(&facts).leaked(), 0);
    }
}
