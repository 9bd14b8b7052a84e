//! Masquerading of single containers, as the bridge plugin's `ipMasq` wants it: table `inet cni_plugins_masquerade`,
//! shared with the reference plugins, one rule an address (specification, section 7.3). A rule is recognised by the
//! beginning of its comment, which holds digests of the whole names.

use super::{Attachment, Chain, Condition, Found, Layout, Owner, Rule, Verdict, comment, digest};
use crate::net::{Cidr, Family, Subnet};
use crate::traffic::Match;

pub(super) const TABLE: &str = "cni_plugins_masquerade";
const CHECKS: &str = "masq_checks";
const POSTROUTING: &str = "postrouting";

/// The masquerading of an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// Whose it is.
    pub attachment: Attachment,
    /// Its addresses: what they send out of their own subnet is masqueraded.
    pub addresses: Vec<Cidr>,
}

/// The frame of the table.
pub(super) fn layout() -> Layout {
    let mut shared: Vec<Rule> = Family::ALL
        .map(|family| {
            let multicast = Condition::Match(Match::Destination { net: family.multicast(), not: false });
            Rule {
                chain: POSTROUTING.to_owned(),
                conditions: vec![Condition::Family(family), multicast],
                verdict: Verdict::Return,
                owner: None,
            }
        })
        .into();
    shared.push(Rule { chain: POSTROUTING.to_owned(), conditions: Vec::new(), verdict: Verdict::Goto(CHECKS.to_owned()), owner: None });
    // Comments as the reference plugins write them.
    let mut checks = Chain::new(CHECKS, None);
    checks.comment = "Masquerade traffic from certain IPs to any (non-multicast) IP outside their subnet";
    let chains = vec![checks, Chain::new(POSTROUTING, Some((4, 100, "nat")))];
    Layout { comment: "Masquerading for plugins from github.com/containernetworking/plugins", chains, shared, own: &[CHECKS] }
}

impl Masquerade {
    /// Its rules, one an address.
    pub fn rules(&self) -> Vec<Rule> {
        let Attachment { network, container, ifname } = &self.attachment;
        let text = format!("{}, net: {network}, if: {ifname}, id: {container}", name(&self.attachment));
        let owner = Owner { comment: comment(&text).to_owned(), tag: None };
        let rule = |address: &Cidr| {
            let family = Family::of(address.addr);
            let single = Subnet::new(address.addr, family.bits()).expect("a whole address is a prefix");
            let conditions = vec![
                Condition::Family(family),
                Condition::Match(Match::Source { net: single, not: false }),
                Condition::Match(Match::Destination { net: address.subnet(), not: true }),
            ];
            Rule { chain: CHECKS.to_owned(), conditions, verdict: Verdict::Masquerade, owner: Some(owner.clone()) }
        };
        self.addresses.iter().map(rule).collect()
    }
}

/// How the comments of an attachment's rules begin, those of the reference plugins too.
pub(super) fn name(attachment: &Attachment) -> String {
    format!("{}-{}", digest(&attachment.network), digest(&format!("{}:{}", attachment.ifname, attachment.container)))
}

/// Does a rule belong to this attachment?
pub fn is_of(found: &Found, attachment: &Attachment) -> bool {
    found.chain == CHECKS && found.owner.comment.starts_with(&name(attachment))
}

/// Does a rule belong to this network, and to none of these attachments of it?
pub fn is_stale(found: &Found, network: &str, valid: &[Attachment]) -> bool {
    let ours = found.chain == CHECKS && found.owner.comment.starts_with(&format!("{}-", digest(network)));
    ours && !valid.iter().any(|attachment| is_of(found, attachment))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masquerade(ifname: &str) -> Masquerade {
        let attachment = Attachment { network: "net".to_owned(), container: "c1".to_owned(), ifname: ifname.to_owned() };
        Masquerade { attachment, addresses: vec!["10.1.2.3/24".parse().unwrap(), "fd00::3/64".parse().unwrap()] }
    }

    #[test]
    fn rules_are_recognised_by_attachment_and_network() {
        let eth0 = masquerade("eth0");
        let rules = eth0.rules();
        assert_eq!(rules.len(), 2);
        let owner = rules[0].owner.clone().unwrap();
        assert!(owner.comment.ends_with(", net: net, if: eth0, id: c1"), "{}", owner.comment);
        let found = Found { chain: CHECKS.to_owned(), owner, addresses: Vec::new() };
        assert!(is_of(&found, &eth0.attachment) && !is_of(&found, &masquerade("net1").attachment));
        assert!(!is_stale(&found, "net", std::slice::from_ref(&eth0.attachment)));
        assert!(is_stale(&found, "net", &[masquerade("net1").attachment]) && !is_stale(&found, "other", &[]));
    }
}
