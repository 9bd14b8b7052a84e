//! Drops what a bridge port sends with another source MAC than its own, as the bridge plugin's `macspoofchk` wants it:
//! chains of table `nat` of the bridge family, with the reference plugin's names (specification, section 7.3).

use flannel::{IfName, Mac};

use crate::netlink::{APPEND, Batch, Body, CREATE, NetlinkError, Protocol, Socket};
use crate::nft::{self, Jump};

const TABLE: &str = "nat";
const BASE: &str = "PREROUTING";
/// `NFPROTO_BRIDGE`
const BRIDGE: [u8; 4] = [7, 0, 0, 0];

/// The names of an attachment's chains: that of the interface, and that of its MAC.
fn chains(id: &str, ifname: &str) -> (String, String) {
    let name = format!("cni-br-iface-{id}-{ifname}");
    (name.clone(), format!("{name}-mac"))
}

fn comment(id: &str, ifname: &str) -> String {
    format!("macspoofchk-{id}-{ifname}")
}

/// Lets a port send with this MAC only.
///
/// # Errors
/// What the kernel answers; then nothing was added.
pub fn add(id: &str, ifname: &str, port: IfName, mac: Mac) -> Result<(), NetlinkError> {
    let (chain, mac_chain) = chains(id, ifname);
    let mut batch = Batch::new();
    batch.message(nft::kind(nft::NEWTABLE), CREATE, |body| {
        body.bytes(&BRIDGE).attr_str(nft::TABLE, TABLE);
    });
    nft::encode_chain(&mut batch, BRIDGE, TABLE, BASE, Some((0, -300, "filter")));
    nft::encode_chain(&mut batch, BRIDGE, TABLE, &chain, None);
    nft::encode_chain(&mut batch, BRIDGE, TABLE, &mac_chain, None);
    let rule = |batch: &mut Batch, chain: &str, expressions: &dyn Fn(&mut Body<'_>)| {
        batch.message(nft::kind(nft::NEWRULE), CREATE | APPEND, |body| {
            body.bytes(&BRIDGE).attr_str(nft::TABLE, TABLE).attr_str(nft::RULE_CHAIN, chain).nest(nft::RULE_EXPRESSIONS, expressions);
            body.attr(nft::RULE_USERDATA, &nft::comment(&comment(id, ifname)));
        });
    };
    rule(&mut batch, BASE, &|list| {
        nft::encode_input_interface(list, port.as_str());
        nft::encode_jump(list, Jump::Call, &chain);
    });
    rule(&mut batch, &chain, &|list| nft::encode_jump(list, Jump::Call, &mac_chain));
    rule(&mut batch, &mac_chain, &|list| {
        nft::encode_source_mac(list, mac);
        nft::encode_verdict(list, nft::NFT_RETURN);
    });
    rule(&mut batch, &mac_chain, &|list| nft::encode_verdict(list, nft::NF_DROP));
    Socket::open(Protocol::Netfilter)?.transaction(nft::SUBSYSTEM, batch)
}

/// Removes an attachment's rules and chains. That there are none is success.
///
/// # Errors
/// What the kernel answers.
pub fn remove(id: &str, ifname: &str) -> Result<(), NetlinkError> {
    let Some(mut socket) = nft::open()? else { return Ok(()) };
    let mut rules = nft::handles(&mut socket, BRIDGE, TABLE)?;
    let wanted = comment(id, ifname);
    rules.retain(|rule| rule.comment == wanted);
    // Jumps go before the chains that they lead to.
    nft::delete_handles(&mut socket, BRIDGE, TABLE, &rules)?;
    let (chain, mac_chain) = chains(id, ifname);
    for name in [chain, mac_chain] {
        let mut batch = Batch::new();
        batch.message(nft::kind(nft::DELCHAIN), 0, |body| {
            body.bytes(&BRIDGE).attr_str(nft::TABLE, TABLE).attr_str(nft::CHAIN_NAME, &name);
        });
        match socket.transaction(nft::SUBSYSTEM, batch) {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
