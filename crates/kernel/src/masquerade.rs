//! Masquerading of single containers, as the bridge plugin's `ipMasq` wants it: table `inet cni_plugins_masquerade`,
//! shared with the reference plugins, one rule an address (specification, section 7.3). A rule is found again by the
//! beginning of its comment.

use flannel::traffic::{Match, Rule, Verdict};
use flannel::{Cidr, Family, Subnet};
use sha2::{Digest, Sha512};

use crate::netlink::{APPEND, Batch, Body, CREATE, NetlinkError, Protocol, Socket};
use crate::nft::{self, Jump, Part, RULE_CHAIN, RULE_EXPRESSIONS, RULE_USERDATA, Removal, TABLE};

pub(crate) const NAME: &str = "cni_plugins_masquerade";
const CHECKS: &str = "masq_checks";
const POSTROUTING: &str = "postrouting";
/// `NFPROTO_INET`
const INET: [u8; 4] = [1, 0, 0, 0];

/// Masquerades what these addresses send out of their own subnet. `network` and `attachment` (interface and container,
/// with a colon between) name the rules for [`remove`].
///
/// # Errors
/// What the kernel answers; then no rule was added.
pub fn add(network: &str, attachment: &str, addresses: &[Cidr]) -> Result<(), NetlinkError> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    nft::add_rules(&mut socket, &place(), |batch| encode(batch, network, attachment, addresses))
}

/// The table: chains, and the rules that all containers share.
pub(crate) fn place() -> nft::Shared {
    let frame = |batch: &mut Batch, part: Part| match part {
        Part::Chains => {
            batch.message(nft::kind(nft::NEWTABLE), CREATE, |body| {
                body.bytes(&INET).attr_str(TABLE, NAME);
                body.attr(nft::TABLE_USERDATA, &nft::comment("Masquerading for plugins from github.com/containernetworking/plugins"));
            });
            let text = "Masquerade traffic from certain IPs to any (non-multicast) IP outside their subnet";
            nft::encode_chain_with(batch, INET, NAME, CHECKS, None, text);
            nft::encode_chain(batch, INET, NAME, POSTROUTING, Some((4, 100, "nat")));
        }
        Part::Rules => {
            for family in Family::ALL {
                rule(batch, POSTROUTING, "", |list| {
                    nft::encode_family(list, family);
                    nft::encode_rule(
                        list,
                        &Rule { matches: vec![Match::Destination { net: family.multicast(), not: false }], verdict: Verdict::Return },
                    );
                });
            }
            rule(batch, POSTROUTING, "", |list| nft::encode_jump(list, Jump::Goto, CHECKS));
        }
    };
    nft::Shared { proto: INET, table: NAME, shared: &[POSTROUTING], own: &[CHECKS], frame: Box::new(frame) }
}

/// Appends the rules of an attachment, one an address.
pub(crate) fn encode(batch: &mut Batch, network: &str, attachment: &str, addresses: &[Cidr]) {
    let (ifname, id) = attachment.split_once(':').unwrap_or((attachment, ""));
    let comment = format!("{}, net: {network}, if: {ifname}, id: {id}", name(network, attachment));
    for address in addresses {
        let single = Subnet::new(address.addr, Family::of(address.addr).bits()).expect("a whole address is a prefix");
        let matches = vec![Match::Source { net: single, not: false }, Match::Destination { net: address.subnet(), not: true }];
        rule(batch, CHECKS, &comment, |list| {
            nft::encode_family(list, Family::of(address.addr));
            nft::encode_rule(list, &Rule { matches, verdict: Verdict::Masquerade { fully_random: false } });
        });
    }
}

/// Removes the rules that [`add`] made. That there are none is success.
///
/// # Errors
/// What the kernel answers.
pub fn remove(network: &str, attachment: &str) -> Result<Removal, NetlinkError> {
    let wanted = name(network, attachment);
    delete(|comment| comment.starts_with(&wanted))
}

/// Removes the rules of a network that belong to none of these attachments.
///
/// # Errors
/// What the kernel answers.
pub fn retain(network: &str, attachments: &[String]) -> Result<(), NetlinkError> {
    let ours = format!("{}-", digest(network));
    let valid: Vec<String> = attachments.iter().map(|attachment| name(network, attachment)).collect();
    delete(|comment| comment.starts_with(&ours) && !valid.iter().any(|valid| comment.starts_with(valid))).map(drop)
}

fn delete(wanted: impl Fn(&str) -> bool) -> Result<Removal, NetlinkError> {
    let Some(mut socket) = nft::open()? else { return Ok(Removal::default()) };
    let mut rules = nft::handles(&mut socket, INET, NAME)?;
    rules.retain(|rule| rule.chain == CHECKS && wanted(&rule.comment));
    nft::delete_handles(&mut socket, INET, NAME, &rules)?;
    Ok(Removal::of(socket))
}

fn rule(batch: &mut Batch, chain: &str, comment: &str, expressions: impl FnOnce(&mut Body<'_>)) {
    batch.message(nft::kind(nft::NEWRULE), CREATE | APPEND, |body| {
        body.bytes(&INET).attr_str(TABLE, NAME).attr_str(RULE_CHAIN, chain).nest(RULE_EXPRESSIONS, expressions);
        if !comment.is_empty() {
            body.attr(RULE_USERDATA, &nft::comment(comment));
        }
    });
}

/// How the comments of an attachment's rules begin, the reference plugins' too: by this they are found.
pub(crate) fn name(network: &str, attachment: &str) -> String {
    format!("{}-{}", digest(network), digest(attachment))
}

/// The first 8 bytes of a text's SHA-512, in hexadecimal.
pub(crate) fn digest(text: &str) -> String {
    Sha512::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
