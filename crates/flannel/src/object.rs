//! Kernel objects as values, one file a kind: its fields, its key, its text, what it depends on and how it is treated. What the
//! kernel crate does with each kind is in its folder of the same name.
//!
//! A new kind is a file here, a line in `kinds!`, a variant of [`Key`] and a file in the kernel crate; the compiler names each place.

pub mod addr;
pub mod blackhole;
pub mod bridge;
pub mod env_file;
mod extension;
pub mod fdb;
pub mod forward;
mod iptables;
pub mod link;
pub mod neigh;
pub mod pod_rules;
pub mod route;
mod ruleset;
pub mod sysctl;

use std::fmt;
use std::net::IpAddr;

use crate::backend::extension::ExtensionPeer;
use crate::lease::LeaseKey;
use crate::net::{Cidr, Family, IfName, Mac, Subnet};
use crate::traffic::Ruleset;
use crate::traffic::iptables::{Iptables, Variant};

pub use self::addr::Addr;
pub use self::blackhole::Blackhole;
pub use self::bridge::Bridge;
pub use self::env_file::EnvFile;
pub use self::fdb::Fdb;
pub use self::forward::Forward;
pub use self::link::{Link, LinkKind};
pub use self::neigh::Neigh;
pub use self::pod_rules::PodRules;
pub use self::route::{BOOT_PROTOCOL, ROUTE_PROTOCOL, Route, route_metric};
pub use self::sysctl::Sysctl;

/// What each kind of object says about itself. `Display` is one line in the manner of iproute2, a page for rules.
pub trait Item: fmt::Display {
    /// The object's identity: what the kernel replaces by.
    fn key(&self) -> Key;

    /// Does the object vanish with this link?
    fn depends_on(&self, link: IfName) -> bool;

    /// How the object is treated.
    fn policy(&self) -> Policy;

    /// What would help when the kernel refuses it with this error number; a container cannot load modules.
    fn advice(&self, errno: i32) -> Option<&'static str> {
        let _ = errno;
        None
    }

    /// The object in one line, for logs.
    fn summary(&self) -> String {
        self.to_string()
    }
}

/// How objects of a kind are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The address family that needs the object; `None` if all do.
    pub family: Option<Family>,
    /// Is it left in place when no owner wants it any more? The CNI plugins made the bridge and the pods' rules, and a sysctl has no
    /// absence.
    pub never_deleted: bool,
    /// May the CNI plugins be given `subnet.env` before this object of the node is in place? So it is where pods reach each other
    /// without it, or where another program may hold it up.
    pub optional: bool,
}

/// Where objects of a kind are read and applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// By the kernel thread, which never waits for a lock, a child process or a peer.
    Fast,
    /// Beside it: what waits for a child process or for a lock.
    Slow,
}

impl<T: Item> Item for Box<T> {
    fn key(&self) -> Key {
        (**self).key()
    }

    fn depends_on(&self, link: IfName) -> bool {
        (**self).depends_on(link)
    }

    fn policy(&self) -> Policy {
        (**self).policy()
    }

    fn advice(&self, errno: i32) -> Option<&'static str> {
        (**self).advice(errno)
    }

    fn summary(&self) -> String {
        (**self).summary()
    }
}

/// Defines [`Object`] and [`Kind`] from one list, so that neither can lack a kind.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident($value:ty),)*) => {
        /// One thing in the kernel, or one that stands for the kernel. A peer has three, so large and rare ones are boxed.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Object {
            $($(#[$doc])* $kind($value),)*
        }

        /// The kinds of objects.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// All kinds.
            pub const ALL: &[Kind] = &[$(Kind::$kind),*];
        }

        impl Object {
            /// Its kind.
            pub fn kind(&self) -> Kind {
                match self {
                    $(Object::$kind(_) => Kind::$kind,)*
                }
            }

            fn item(&self) -> &dyn Item {
                match self {
                    $(Object::$kind(item) => item,)*
                }
            }

            /// The object's identity.
            pub fn key(&self) -> Key {
                match self {
                    $(Object::$kind(item) => item.key(),)*
                }
            }
        }
    };
}

kinds! {
    /// A link.
    Link(Box<Link>),
    /// An address on a link of ours.
    Addr(Addr),
    /// The bridge of this host's pods.
    Bridge(Box<Bridge>),
    /// A sysctl.
    Sysctl(Sysctl),
    /// A forwarding entry of a VXLAN device.
    Fdb(Fdb),
    /// A neighbour entry.
    Neigh(Neigh),
    /// An entry of the udp backend's own table.
    Forward(Forward),
    /// A route.
    Route(Route),
    /// A blackhole route.
    Blackhole(Blackhole),
    /// Our nftables table of one family.
    Ruleset(Ruleset),
    /// Our chains of iptables of one family.
    Iptables(Iptables),
    /// Rules that the plugins wrote for pods.
    PodRules(PodRules),
    /// The operator's own commands for a peer.
    Extension(Box<ExtensionPeer>),
    /// The file for the CNI plugins.
    EnvFile(Box<EnvFile>),
}

impl Kind {
    /// Where objects of this kind are read and applied.
    pub fn lane(self) -> Lane {
        match self {
            Kind::Link | Kind::Addr | Kind::Bridge | Kind::Sysctl | Kind::Fdb | Kind::Neigh | Kind::Forward => Lane::Fast,
            Kind::Route | Kind::Blackhole | Kind::Ruleset | Kind::EnvFile => Lane::Fast,
            // Programs of iptables and the operator's commands are child processes, and pods' rules have a lock.
            Kind::Iptables | Kind::PodRules | Kind::Extension => Lane::Slow,
        }
    }
}

impl Object {
    /// Does the object vanish with this link?
    pub fn depends_on(&self, link: IfName) -> bool {
        self.item().depends_on(link)
    }

    /// How the object is treated.
    pub fn policy(&self) -> Policy {
        self.item().policy()
    }

    /// What would help when the kernel refuses it with this error number.
    pub fn advice(&self, errno: i32) -> Option<&'static str> {
        self.item().advice(errno)
    }

    /// The object in one line, for logs.
    pub fn summary(&self) -> String {
        self.item().summary()
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Rules end with a line break.
        f.write_str(self.item().to_string().trim_end())
    }
}

/// The identity of an object. Its order is the apply order: links come first, and a route comes after the entries that it needs, so
/// that no packet takes it before it can arrive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// By name.
    Link(IfName),
    /// By link and address with its length.
    Addr(IfName, Cidr),
    /// By name.
    Bridge(IfName),
    /// By path.
    Sysctl(String),
    /// By link and link-layer address.
    Fdb(IfName, Mac),
    /// By link and address.
    Neigh(IfName, IpAddr),
    /// By destination.
    Forward(Subnet),
    /// By destination and metric: that is what the kernel replaces by.
    Route(Subnet, u32),
    /// By destination.
    Blackhole(Subnet),
    /// By family.
    Ruleset(Family),
    /// By family and packet filter.
    Iptables(Family, Variant),
    /// A host has one.
    PodRules,
    /// By lease.
    Extension(LeaseKey),
    /// A node has one. It is last: all that it promises to the plugins is in place by then.
    EnvFile,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Link(name) => write!(f, "link {name}"),
            Key::Bridge(name) => write!(f, "bridge {name}"),
            Key::Addr(link, cidr) => write!(f, "address {cidr} on {link}"),
            Key::Sysctl(path) => write!(f, "sysctl {path}"),
            Key::Neigh(link, ip) => write!(f, "neighbour {ip} on {link}"),
            Key::Fdb(link, mac) => write!(f, "FDB entry {mac} on {link}"),
            Key::Route(dst, metric) => write!(f, "route {dst} metric {metric}"),
            Key::Forward(dst) => write!(f, "forwarding of {dst}"),
            Key::Extension(lease) => write!(f, "extension {lease}"),
            Key::Blackhole(dst) => write!(f, "blackhole route {dst}"),
            Key::Ruleset(family) => write!(f, "nftables rules for {family}"),
            Key::Iptables(family, variant) => write!(f, "iptables-{variant} rules for {family}"),
            Key::PodRules => f.write_str("pod rules of the CNI plugins"),
            Key::EnvFile => f.write_str("subnet file"),
        }
    }
}
