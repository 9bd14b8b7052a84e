//! Masquerading of single containers, as the bridge plugin's `ipMasq` wants it: table `inet cni_plugins_masquerade`,
//! shared with the reference plugins, one rule an address (specification, section 7.3). A rule is found again by the
//! beginning of its comment.

use flannel::traffic::{Match, Rule, Verdict};
use flannel::{Cidr, Family, Subnet};
use sha2::{Digest, Sha512};

use crate::netlink::{APPEND, Batch, Body, CREATE, NetlinkError, Protocol, Socket};
use crate::nft::{self, CHAIN_NAME, CHAIN_POLICY, CHAIN_TYPE, RULE_CHAIN, RULE_EXPRESSIONS, TABLE};

const NAME: &str = "cni_plugins_masquerade";
const CHECKS: &str = "masq_checks";
const POSTROUTING: &str = "postrouting";
/// `NFPROTO_INET`
const INET: [u8; 4] = [1, 0, 0, 0];
const RULE_HANDLE: u16 = 3;
const RULE_USERDATA: u16 = 7;

/// Masquerades what these addresses send out of their own subnet. `network` and `attachment` name the rules for
/// [`remove`].
///
/// # Errors
/// What the kernel answers; then no rule was added.
pub fn add(network: &str, attachment: &str, addresses: &[Cidr]) -> Result<(), NetlinkError> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut batch = Batch::new();
    batch.message(nft::kind(nft::NEWTABLE), CREATE, |body| {
        body.bytes(&INET).attr_str(TABLE, NAME);
    });
    chain(&mut batch, CHECKS, false);
    chain(&mut batch, POSTROUTING, true);
    // Whether the chain was there already is seen by its rules: only a new one gets them.
    if !has_rules(&mut socket)? {
        for family in Family::ALL {
            rule(&mut batch, POSTROUTING, b"", |list| {
                nft::encode_family(list, family);
                nft::encode_rule(
                    list,
                    &Rule { matches: vec![Match::Destination { net: family.multicast(), not: false }], verdict: Verdict::Return },
                );
            });
        }
        rule(&mut batch, POSTROUTING, b"", |list| nft::encode_goto(list, CHECKS));
    }
    for address in addresses {
        let single = Subnet::new(address.addr, Family::of(address.addr).bits()).expect("a whole address is a prefix");
        let matches = vec![Match::Source { net: single, not: false }, Match::Destination { net: address.subnet(), not: true }];
        rule(&mut batch, CHECKS, &comment(network, attachment), |list| {
            nft::encode_family(list, Family::of(address.addr));
            nft::encode_rule(list, &Rule { matches, verdict: Verdict::Masquerade { fully_random: false } });
        });
    }
    socket.transaction(nft::SUBSYSTEM, batch)
}

/// Removes the rules that [`add`] made. That there are none is success.
///
/// # Errors
/// What the kernel answers.
pub fn remove(network: &str, attachment: &str) -> Result<(), NetlinkError> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let wanted = begin(network, attachment).into_bytes();
    let handles = rules(&mut socket, |chain, bytes| {
        // Type and length come before the text.
        let userdata = nft::find(bytes, RULE_USERDATA)?.get(2..)?;
        (chain == CHECKS && userdata.starts_with(&wanted)).then(|| nft::find(bytes, RULE_HANDLE).map(<[u8]>::to_vec))?
    });
    delete(&mut socket, handles)
}

/// Removes the rules of a network that belong to none of these attachments.
///
/// # Errors
/// What the kernel answers.
pub fn retain(network: &str, attachments: &[String]) -> Result<(), NetlinkError> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let ours = format!("{}-", digest(network));
    let valid: Vec<String> = attachments.iter().map(|attachment| begin(network, attachment)).collect();
    let handles = rules(&mut socket, |chain, bytes| {
        let comment = nft::find(bytes, RULE_USERDATA)?.get(2..)?;
        let stale =
            chain == CHECKS && comment.starts_with(ours.as_bytes()) && !valid.iter().any(|valid| comment.starts_with(valid.as_bytes()));
        stale.then(|| nft::find(bytes, RULE_HANDLE).map(<[u8]>::to_vec))?
    });
    delete(&mut socket, handles)
}

fn delete(socket: &mut Socket, handles: Result<Vec<Vec<u8>>, NetlinkError>) -> Result<(), NetlinkError> {
    let handles = match handles {
        Err(error) if error.is_not_found() => return Ok(()),
        other => other?,
    };
    if handles.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    for handle in handles {
        batch.message(nft::kind(nft::DELRULE), 0, |body| {
            body.bytes(&INET).attr_str(TABLE, NAME).attr_str(RULE_CHAIN, CHECKS).attr(RULE_HANDLE, &handle);
        });
    }
    match socket.transaction(nft::SUBSYSTEM, batch) {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

fn chain(batch: &mut Batch, name: &str, base: bool) {
    batch.message(nft::kind(nft::NEWCHAIN), CREATE, |body| {
        body.bytes(&INET).attr_str(TABLE, NAME).attr_str(CHAIN_NAME, name);
        if base {
            nft::encode_hook(body, 4, 100);
            body.attr(CHAIN_POLICY, &nft::NF_ACCEPT.to_be_bytes()).attr_str(CHAIN_TYPE, "nat");
        }
    });
}

fn rule(batch: &mut Batch, chain: &str, userdata: &[u8], expressions: impl FnOnce(&mut Body<'_>)) {
    batch.message(nft::kind(nft::NEWRULE), CREATE | APPEND, |body| {
        body.bytes(&INET).attr_str(TABLE, NAME).attr_str(RULE_CHAIN, chain).nest(RULE_EXPRESSIONS, expressions);
        if !userdata.is_empty() {
            body.attr(RULE_USERDATA, userdata);
        }
    });
}

fn has_rules(socket: &mut Socket) -> Result<bool, NetlinkError> {
    match rules(socket, |chain, _| (chain == POSTROUTING).then_some(())) {
        Ok(found) => Ok(!found.is_empty()),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

fn rules<T>(socket: &mut Socket, mut read: impl FnMut(&str, &[u8]) -> Option<T>) -> Result<Vec<T>, NetlinkError> {
    let only = |body: &mut Body<'_>| {
        body.bytes(&INET).attr_str(TABLE, NAME);
    };
    socket.dump(nft::kind(nft::GETRULE), only, |body| {
        let bytes = body.get(4..)?;
        let text = |kind| nft::find(bytes, kind).and_then(crate::netlink::str_in);
        if text(TABLE)? != NAME {
            return None;
        }
        read(text(RULE_CHAIN)?, bytes)
    })
}

/// How the comments of an attachment's rules begin, the reference plugins' too: by this they are found.
fn begin(network: &str, attachment: &str) -> String {
    format!("{}-{}", digest(network), digest(attachment))
}

fn digest(text: &str) -> String {
    Sha512::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The comment as user data: type 0, length, text with its terminating zero.
fn comment(network: &str, attachment: &str) -> Vec<u8> {
    let text = format!("{} net: {network}, if:id: {attachment}", begin(network, attachment));
    let mut bytes = text.into_bytes();
    bytes.truncate(127);
    bytes.push(0);
    let mut userdata = vec![0, u8::try_from(bytes.len()).expect("it was cut to 128 bytes")];
    userdata.extend(bytes);
    userdata
}
