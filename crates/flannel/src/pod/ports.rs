//! Host ports, as the portmap plugin wants them: table `cni_hostport` of each family, shared with the reference plugin,
//! whose rules carry the container's id as comment (specification, section 7.5).

use std::net::IpAddr;

use super::{Attachment, Chain, Condition, Found, Layout, Owner, Rule, Verdict, comment};
use crate::net::{Cidr, Family, Subnet};
use crate::traffic::Match;

pub(super) const TABLE: &str = "cni_hostport";
/// The chain that translates destinations.
pub const HOSTPORTS: &str = "hostports";
/// Empty: holds what older releases of the reference plugin wrote.
const HOSTIP_HOSTPORTS: &str = "hostip_hostports";
const ALL: &str = "hostports_all";
const MASQUERADING: &str = "masquerading";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";

/// A port of the host that leads to a port of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Number of the transport protocol: 6 for TCP, 17 for UDP, 132 for SCTP.
    pub protocol: u8,
    /// The host's port.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// The address of the host that it is limited to; an unspecified one limits it to its family.
    pub host_ip: Option<IpAddr>,
}

/// Which connections to a container take the host's address as their source, so that answers come back this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snat {
    /// None.
    No,
    /// Those from the container's own subnet and from the host's loopback.
    Local,
    /// All.
    All,
}

/// Who holds mapped ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// One interface of a container.
    Attachment(Attachment),
    /// A container as a whole: rules and notes of earlier versions do not name the interface.
    Container(String),
}

/// The mapped ports of one address of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// Whose they are.
    pub holder: Holder,
    /// The container's address.
    pub address: Cidr,
    /// The ports.
    pub mappings: Vec<Mapping>,
    /// Whose source address changes.
    pub snat: Snat,
}

/// The frame of the table.
pub(super) fn layout() -> Layout {
    let rule = |chain: &str, conditions, target: &str| Rule {
        chain: chain.to_owned(),
        conditions,
        verdict: Verdict::Jump(target.to_owned()),
        owner: None,
    };
    let mut shared: Vec<Rule> = [PREROUTING, OUTPUT].map(|chain| rule(chain, vec![Condition::LocalDestination], ALL)).into();
    shared.extend([HOSTIP_HOSTPORTS, HOSTPORTS].map(|chain| rule(ALL, Vec::new(), chain)));
    let chains = [
        (HOSTIP_HOSTPORTS, None),
        (HOSTPORTS, None),
        (ALL, None),
        (PREROUTING, Some((0, -100, "nat"))),
        (OUTPUT, Some((3, -100, "nat"))),
        (MASQUERADING, Some((4, 100, "nat"))),
    ];
    Layout { comment: "", chains: chains.map(|(name, hook)| Chain::new(name, hook)).into(), shared, own: &[HOSTPORTS, MASQUERADING] }
}

impl Ports {
    /// The family of the address.
    pub fn family(&self) -> Family {
        Family::of(self.address.addr)
    }

    /// What the user data of its rules says.
    pub(super) fn owner(&self) -> Owner {
        match &self.holder {
            Holder::Attachment(attachment) => Owner { comment: comment(&attachment.container).to_owned(), tag: Some(attachment.tag()) },
            Holder::Container(id) => Owner { comment: comment(id).to_owned(), tag: None },
        }
    }

    /// Its rules.
    pub fn rules(&self) -> Vec<Rule> {
        let owner = self.owner();
        let rule = |chain: &str, conditions, verdict| Rule { chain: chain.to_owned(), conditions, verdict, owner: Some(owner.clone()) };
        let mut rules = Vec::new();
        for mapping in &self.mappings {
            let to = mapping.host_ip.filter(|ip| !ip.is_unspecified());
            let mut conditions: Vec<Condition> =
                to.map(|ip| Condition::Match(Match::Destination { net: single(ip), not: false })).into_iter().collect();
            conditions.push(Condition::Port { protocol: mapping.protocol, port: mapping.host_port });
            rules.push(rule(HOSTPORTS, conditions, Verdict::Dnat(self.address.addr, mapping.container_port)));
        }
        let to = Match::Destination { net: single(self.address.addr), not: false };
        for source in sources(self.address, self.snat) {
            for mapping in &self.mappings {
                // Only connections that came by this mapping: pods that connect to each other keep their addresses, and
                // so do clients of a service, whose destination another program translated.
                let translated = Condition::Translated { protocol: mapping.protocol, port: mapping.host_port };
                let from = Condition::Match(Match::Source { net: source, not: false });
                rules.push(rule(MASQUERADING, vec![translated, from, Condition::Match(to)], Verdict::Masquerade));
            }
        }
        rules
    }

    /// The host's UDP ports among its mappings.
    pub fn udp_ports(&self) -> Vec<u16> {
        udp_ports(&self.mappings)
    }
}

/// The host's UDP ports among mappings.
pub fn udp_ports(mappings: &[Mapping]) -> Vec<u16> {
    mappings.iter().filter(|mapping| mapping.protocol == 17).map(|mapping| mapping.host_port).collect()
}

/// Does a rule belong to this attachment? One without a tag, of the reference plugin or of an earlier version, names the
/// container only: it belongs to the attachment whose address is in it, or to any if the addresses are not known.
pub fn is_of(found: &Found, attachment: &Attachment, addresses: &[IpAddr]) -> bool {
    match found.owner.tag {
        Some(tag) => tag == attachment.tag(),
        None if found.owner.comment != comment(&attachment.container) => false,
        // Cut, the ids of two containers may be one.
        None if addresses.is_empty() => found.owner.comment == attachment.container,
        None => addresses.iter().any(|address| found.addresses.contains(address)),
    }
}

/// Whose source address changes on the way to a container.
fn sources(container: Cidr, snat: Snat) -> Vec<Subnet> {
    let family = Family::of(container.addr);
    match (snat, family) {
        (Snat::No, _) => Vec::new(),
        (Snat::All, _) => vec![Subnet::new(family.unspecified(), 0).expect("length 0 is in range")],
        (Snat::Local, Family::V4) => vec![container.subnet(), "127.0.0.1/32".parse().expect("it is a prefix")],
        (Snat::Local, Family::V6) => vec![container.subnet()],
    }
}

fn single(ip: IpAddr) -> Subnet {
    Subnet::new(ip, Family::of(ip).bits()).expect("a whole address is a prefix")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(network: &str, ifname: &str) -> Attachment {
        Attachment { network: network.to_owned(), container: "c1".to_owned(), ifname: ifname.to_owned() }
    }

    fn ports(holder: Holder, snat: Snat) -> Ports {
        let mapping = Mapping { protocol: 17, host_port: 53, container_port: 5353, host_ip: Some("192.0.2.1".parse().unwrap()) };
        Ports { holder, address: "10.1.2.3/24".parse().unwrap(), mappings: vec![mapping], snat }
    }

    #[test]
    fn each_mapping_has_a_translation_and_a_rule_for_each_source() {
        let count = |snat| ports(Holder::Attachment(attachment("net", "eth0")), snat).rules().len();
        assert_eq!([Snat::No, Snat::Local, Snat::All].map(count), [1, 3, 2]);
        let rules = ports(Holder::Attachment(attachment("net", "eth0")), Snat::No).rules();
        assert_eq!(rules[0].verdict, Verdict::Dnat("10.1.2.3".parse().unwrap(), 5353));
        assert_eq!(rules[0].conditions.len(), 2);
        assert_eq!(rules[0].owner.as_ref().unwrap().comment, "c1");
    }

    fn found(rule: &Rule) -> Found {
        Found { chain: rule.chain.clone(), owner: rule.owner.clone().unwrap(), addresses: vec!["10.1.2.3".parse().unwrap()] }
    }

    #[test]
    fn rules_of_another_attachment_of_the_container_are_not_ours() {
        let rule = &ports(Holder::Attachment(attachment("net", "eth0")), Snat::No).rules()[0];
        assert!(is_of(&found(rule), &attachment("net", "eth0"), &[]));
        assert!(!is_of(&found(rule), &attachment("other", "eth0"), &[]));
        assert!(!is_of(&found(rule), &attachment("net", "net1"), &["10.1.2.3".parse().unwrap()]));
    }

    #[test]
    fn untagged_rules_belong_to_the_attachment_with_their_address() {
        let rule = &ports(Holder::Container("c1".to_owned()), Snat::No).rules()[0];
        assert!(is_of(&found(rule), &attachment("net", "eth0"), &["10.1.2.3".parse().unwrap()]));
        assert!(!is_of(&found(rule), &attachment("net", "eth0"), &["10.1.2.4".parse().unwrap()]));
        assert!(is_of(&found(rule), &attachment("net", "eth0"), &[]), "without addresses the container decides");
    }

    #[test]
    fn ids_that_differ_after_127_bytes_share_no_rules() {
        let long = |last: &str| Attachment {
            network: "net".to_owned(),
            container: format!("{}{last}", "x".repeat(200)),
            ifname: "eth0".to_owned(),
        };
        let rule = &ports(Holder::Attachment(long("1")), Snat::No).rules()[0];
        assert!(is_of(&found(rule), &long("1"), &[]));
        assert!(!is_of(&found(rule), &long("2"), &[]));
        let untagged = &ports(Holder::Container(long("1").container), Snat::No).rules()[0];
        assert!(!is_of(&found(untagged), &long("2"), &[]));
    }
}
