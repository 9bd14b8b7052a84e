//! Spoof protection of bridge ports, as the bridge plugin's `macspoofchk` wants it: a port may send with its own MAC only.
//! Chains of table `nat` of the bridge family, with the reference plugin's names (specification, section 7.3).

use super::{Attachment, Chain, Condition, Found, Layout, Owner, Rule, Verdict, comment, digest};
use crate::net::{IfName, Mac};

pub(super) const TABLE: &str = "nat";
const BASE: &str = "PREROUTING";
/// The longest name of a chain, in bytes.
const CHAIN_NAME: usize = 127;

/// The table has no shared rules: each attachment adds its own jump.
pub(super) fn layout() -> Layout {
    Layout { comment: "", chains: vec![Chain::new(BASE, Some((0, -300, "filter")))], shared: Vec::new(), own: &[] }
}

/// What identifies an attachment in names and comments: the names themselves where they fit, a digest of them otherwise.
fn identity(attachment: &Attachment, before: &str, after: &str) -> String {
    let Attachment { container, ifname, .. } = attachment;
    let whole = format!("{before}{container}-{ifname}{after}");
    match whole.len() <= CHAIN_NAME {
        true => whole,
        false => format!("{before}{}-{ifname}{after}", digest(container)),
    }
}

fn text(attachment: &Attachment) -> String {
    comment(&identity(attachment, "macspoofchk-", "")).to_owned()
}

/// An attachment's chains and rules, for the port that may send with this MAC only. The base chain is among the chains.
pub fn rules(attachment: &Attachment, port: IfName, mac: Mac) -> (Vec<Chain>, Vec<Rule>) {
    let [chain, mac_chain] = chains(attachment);
    let owner = Owner { comment: text(attachment), tag: None };
    let rule = |chain: &str, conditions, verdict| Rule { chain: chain.to_owned(), conditions, verdict, owner: Some(owner.clone()) };
    let mut all = layout().chains;
    all.extend([&chain, &mac_chain].map(|name| Chain::new(name, None)));
    let rules = vec![
        rule(BASE, vec![Condition::Input(port)], Verdict::Jump(chain.clone())),
        rule(&chain, Vec::new(), Verdict::Jump(mac_chain.clone())),
        rule(&mac_chain, vec![Condition::SourceMac(mac)], Verdict::Return),
        rule(&mac_chain, Vec::new(), Verdict::Drop),
    ];
    (all, rules)
}

/// The chains of an attachment, in the order in which they are deleted.
pub fn chains(attachment: &Attachment) -> [String; 2] {
    [identity(attachment, "cni-br-iface-", ""), identity(attachment, "cni-br-iface-", "-mac")]
}

/// Does a rule belong to this attachment?
pub fn is_of(found: &Found, attachment: &Attachment) -> bool {
    found.owner.comment == text(attachment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(container: &str) -> Attachment {
        Attachment { network: "net".to_owned(), container: container.to_owned(), ifname: "eth0".to_owned() }
    }

    #[test]
    fn short_names_are_the_reference_plugins() {
        assert_eq!(chains(&attachment("c1")), ["cni-br-iface-c1-eth0", "cni-br-iface-c1-eth0-mac"]);
        let (chains, rules) = rules(&attachment("c1"), "veth1".parse().unwrap(), Mac([2, 0, 0, 0, 0, 1]));
        assert_eq!((chains.len(), rules.len()), (3, 4));
        assert_eq!(rules[0].owner.as_ref().unwrap().comment, "macspoofchk-c1-eth0");
    }

    #[test]
    fn long_names_fit_the_kernel_and_stay_distinct() {
        let (one, other) = (attachment(&format!("{}1", "x".repeat(600))), attachment(&format!("{}2", "x".repeat(600))));
        assert!(chains(&one).iter().all(|name| name.len() <= CHAIN_NAME));
        assert_ne!(chains(&one), chains(&other));
        let found = Found { owner: rules(&one, "v".parse().unwrap(), Mac([2; 6])).1[0].owner.clone().unwrap(), ..Found::default() };
        assert!(is_of(&found, &one) && !is_of(&found, &other));
    }
}
