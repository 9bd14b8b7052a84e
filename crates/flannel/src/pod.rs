//! Rules that the CNI plugins keep in nf_tables for pods, as values.
//!
//! [`ports`], [`masquerade`] and [`spoofcheck`] say which rules an attachment has and which of the rules in the kernel
//! belong to it; [`note`] says how they are recorded on file and which of them have to be repaired. The `kernel` crate
//! encodes, reads and deletes; it decides nothing.

pub mod masquerade;
pub mod note;
pub mod ports;
pub mod spoofcheck;

use std::net::IpAddr;

use sha2::{Digest, Sha512};

use crate::net::{Family, IfName, Mac};
use crate::traffic::Match;

/// Bytes of a comment that the kernel and `nft` keep.
const COMMENT: usize = 127;

/// One interface of a container in one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// The container's id.
    pub container: String,
    /// The interface's name in the container.
    pub ifname: String,
}

/// A digest of an [`Attachment`], stored in the user data of its rules beside the comment. `nft` and the reference plugins
/// ignore it, so the comment stays theirs: the container's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(pub [u8; 16]);

impl Attachment {
    /// The tag of its rules. Names are compared whole, however long they are.
    pub fn tag(&self) -> Tag {
        let digest = Sha512::digest(format!("{}\0{}\0{}", self.network, self.container, self.ifname));
        Tag(*digest.first_chunk().expect("a digest has 64 bytes"))
    }
}

/// The first 8 bytes of a text's SHA-512, in hexadecimal.
pub fn digest(text: &str) -> String {
    Sha512::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// A comment as the kernel keeps it.
pub fn comment(text: &str) -> &str {
    match text.char_indices().map(|(at, char)| at + char.len_utf8()).take_while(|end| *end <= COMMENT).last() {
        Some(end) => &text[..end],
        None => "",
    }
}

/// A table that plugins share, ours and the reference plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Host ports of a family.
    Ports(Family),
    /// Masquerading of single containers.
    Masquerade,
    /// Spoof protection of bridge ports.
    Spoofcheck,
}

/// The kernel's family of a table (`NFPROTO_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableFamily {
    /// One family of IP.
    Ip(Family),
    /// Both.
    Inet,
    /// Frames on a bridge.
    Bridge,
}

impl Table {
    /// Its name in the kernel.
    pub fn name(self) -> &'static str {
        match self {
            Table::Ports(_) => ports::TABLE,
            Table::Masquerade => masquerade::TABLE,
            Table::Spoofcheck => spoofcheck::TABLE,
        }
    }

    /// Its family in the kernel.
    pub fn family(self) -> TableFamily {
        match self {
            Table::Ports(family) => TableFamily::Ip(family),
            Table::Masquerade => TableFamily::Inet,
            Table::Spoofcheck => TableFamily::Bridge,
        }
    }

    /// What it consists of besides the rules of single attachments.
    pub fn layout(self) -> Layout {
        match self {
            Table::Ports(_) => ports::layout(),
            Table::Masquerade => masquerade::layout(),
            Table::Spoofcheck => spoofcheck::layout(),
        }
    }

    /// Is this a table whose rules are noted and repaired?
    pub fn is_noted(name: &str) -> bool {
        matches!(name, ports::TABLE | masquerade::TABLE)
    }
}

/// A table's frame: its chains, and the rules that lead to the chains of attachments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The table's comment; may be empty.
    pub comment: &'static str,
    /// Its chains.
    pub chains: Vec<Chain>,
    /// The rules that all attachments share.
    pub shared: Vec<Rule>,
    /// The chains that hold rules of attachments.
    pub own: &'static [&'static str],
}

impl Layout {
    /// Are the shared rules in place? None of their chains is empty, then.
    pub fn is_whole(&self, has_rules: impl Fn(&str) -> bool) -> bool {
        self.shared.iter().all(|rule| has_rules(&rule.chain))
    }
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Hook number, priority and type of a base chain.
    pub hook: Option<(u32, i32, &'static str)>,
    /// Its comment; may be empty.
    pub comment: &'static str,
}

impl Chain {
    fn new(name: &str, hook: Option<(u32, i32, &'static str)>) -> Chain {
        Chain { name: name.to_owned(), hook, comment: "" }
    }
}

/// A rule: when all conditions hold, the verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The chain that it is appended to.
    pub chain: String,
    /// All must hold, in this order.
    pub conditions: Vec<Condition>,
    /// What then happens.
    pub verdict: Verdict,
    /// Whose it is; `None` for a rule that all share.
    pub owner: Option<Owner>,
}

/// Whose a rule is, as its user data says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owner {
    /// Its comment.
    pub comment: String,
    /// Its tag; rules of the reference plugins and of earlier versions have none.
    pub tag: Option<Tag>,
}

/// A condition on a packet or frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// It is of this family: needed before addresses in a table of both.
    Family(Family),
    /// Its source, destination or mark.
    Match(Match),
    /// Its transport protocol and destination port.
    Port {
        /// Number of the protocol.
        protocol: u8,
        /// Destination port.
        port: u16,
    },
    /// Its connection's destination was translated from this port.
    Translated {
        /// Number of the protocol.
        protocol: u8,
        /// Destination port before the translation.
        port: u16,
    },
    /// Its destination is an address of this host.
    LocalDestination,
    /// It came in by this interface.
    Input(IfName),
    /// Its source MAC.
    SourceMac(Mac),
}

/// What happens to a packet or frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passes another chain and returns.
    Jump(String),
    /// It passes another chain and does not return.
    Goto(String),
    /// It goes to another address and port.
    Dnat(IpAddr, u16),
    /// It takes the address of the interface by which it leaves.
    Masquerade,
    /// It leaves this chain.
    Return,
    /// It is dropped.
    Drop,
}

/// A rule in the kernel, as far as it must be recognised.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Its chain.
    pub chain: String,
    /// Whose it is.
    pub owner: Owner,
    /// Values in it that have the length of an address: among them those that it translates to or matches.
    pub addresses: Vec<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_depends_on_every_part_of_the_attachment() {
        let attachment = |network: &str, container: &str, ifname: &str| Attachment {
            network: network.to_owned(),
            container: container.to_owned(),
            ifname: ifname.to_owned(),
        };
        let base = attachment("net", "c1", "eth0").tag();
        for other in [attachment("net2", "c1", "eth0"), attachment("net", "c2", "eth0"), attachment("net", "c1", "net1")] {
            assert_ne!(base, other.tag());
        }
        // Parts do not run into each other, and long ids are not cut.
        assert_ne!(attachment("a", "bc", "d").tag(), attachment("ab", "c", "d").tag());
        let long = "x".repeat(600);
        assert_ne!(attachment("n", &format!("{long}1"), "e").tag(), attachment("n", &format!("{long}2"), "e").tag());
    }

    #[test]
    fn comment_is_cut_at_a_character() {
        assert_eq!(comment("abc"), "abc");
        assert_eq!(comment(""), "");
        assert_eq!(comment(&"x".repeat(200)).len(), 127);
        assert_eq!(comment(&"é".repeat(100)).len(), 126);
    }
}
