//! Kernel objects as values. Each kind has one file with its fields, key, text, dependencies and policy; the kernel crate has a file of
//! the same name that reads and applies it.
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
pub mod wg_peer;

use std::fmt;
use std::net::IpAddr;

use crate::backend::extension::ExtensionPeer;
use crate::lease::LeaseKey;
use crate::net::{Cidr, Family, IfName, Mac, Subnet};
use crate::traffic::Ruleset;
use crate::traffic::iptables::{Iptables, Variant};
use crate::wireguard::PublicKey;

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
pub use self::wg_peer::{AllowedIp, WgPeer};

/// The interface of every kind of object. `Display` is one line in the style of iproute2; for rules it is several lines.
pub trait Item: fmt::Display {
    /// The object's identity, by which the kernel replaces one object with another.
    fn key(&self) -> Key;

    /// Whether the object is deleted with this link.
    fn depends_on(&self, link: IfName) -> bool;

    /// The rules for applying and deleting the object.
    fn policy(&self) -> Policy;

    /// The fix when the kernel refuses the object with this error number. (The daemon cannot load modules from a container.)
    fn advice(&self, errno: i32) -> Option<&'static str> {
        let _ = errno;
        None
    }

    /// The object in one line, for logs.
    fn summary(&self) -> String {
        self.to_string()
    }
}

/// The rules for applying and deleting objects of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The address family that needs the object; `None` if all do.
    pub family: Option<Family>,
    /// Whether the object is kept when it has no owner any more: the CNI plugins created the bridge and the pods' rules, and a sysctl
    /// cannot be deleted.
    pub never_deleted: bool,
    /// Whether `subnet.env` may be written before this object of the node is applied: pods reach each other without it, or another
    /// program can delay it.
    pub optional: bool,
}

/// The thread that reads and applies objects of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The kernel thread, which never waits for a lock, a child process or a peer.
    Fast,
    /// A second thread, for objects that need a child process or a lock.
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

/// Defines [`Object`] and [`Kind`] from one list, so that both have every kind.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident($value:ty),)*) => {
        /// An object in the kernel, or one that is managed like it. Each peer has up to three; the large and rare kinds are boxed.
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
    /// An address on a link of the daemon.
    Addr(Addr),
    /// The bridge of this host's pods.
    Bridge(Box<Bridge>),
    /// A sysctl.
    Sysctl(Sysctl),
    /// An FDB entry of a VXLAN device.
    Fdb(Fdb),
    /// A neighbour entry.
    Neigh(Neigh),
    /// An entry of the udp backend's forwarding table.
    Forward(Forward),
    /// A peer of a WireGuard device.
    WgPeer(Box<WgPeer>),
    /// A subnet of a WireGuard peer.
    AllowedIp(Box<AllowedIp>),
    /// A route.
    Route(Route),
    /// A blackhole route.
    Blackhole(Blackhole),
    /// The daemon's nftables table of one family.
    Ruleset(Ruleset),
    /// The daemon's iptables chains of one family.
    Iptables(Iptables),
    /// Rules that the CNI plugins wrote for pods.
    PodRules(PodRules),
    /// The operator's commands for a peer.
    Extension(Box<ExtensionPeer>),
    /// The file for the CNI plugins.
    EnvFile(Box<EnvFile>),
}

impl Kind {
    /// The thread that reads and applies objects of this kind.
    pub fn lane(self) -> Lane {
        match self {
            Kind::Link | Kind::Addr | Kind::Bridge | Kind::Sysctl | Kind::Fdb | Kind::Neigh | Kind::Forward => Lane::Fast,
            Kind::WgPeer | Kind::AllowedIp | Kind::Route | Kind::Blackhole | Kind::Ruleset | Kind::EnvFile => Lane::Fast,
            // iptables and the operator's commands are child processes, and the pods' rules need a lock.
            Kind::Iptables | Kind::PodRules | Kind::Extension => Lane::Slow,
        }
    }
}

impl Object {
    /// Whether the object is deleted with this link.
    pub fn depends_on(&self, link: IfName) -> bool {
        self.item().depends_on(link)
    }

    /// The rules for applying and deleting the object.
    pub fn policy(&self) -> Policy {
        self.item().policy()
    }

    /// The fix when the kernel refuses the object with this error number.
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
        // The text of rules ends with a line break.
        f.write_str(self.item().to_string().trim_end())
    }
}

/// The identity of an object. Keys are in apply order: links come first, and a route comes after the entries that it needs, so that no
/// packet takes the route before it can arrive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// By name.
    Link(IfName),
    /// By link, address and prefix length.
    Addr(IfName, Cidr),
    /// By name.
    Bridge(IfName),
    /// By path.
    Sysctl(String),
    /// By link and MAC address.
    Fdb(IfName, Mac),
    /// By link and address.
    Neigh(IfName, IpAddr),
    /// By destination.
    Forward(Subnet),
    /// By link and public key.
    WgPeer(IfName, PublicKey),
    /// By link and subnet.
    AllowedIp(IfName, Subnet),
    /// By destination and metric, as the kernel identifies it.
    Route(Subnet, u32),
    /// By destination.
    Blackhole(Subnet),
    /// By family.
    Ruleset(Family),
    /// By family and packet filter.
    Iptables(Family, Variant),
    /// One per host.
    PodRules,
    /// By lease.
    Extension(LeaseKey),
    /// One per node. It is last, so that everything that it announces to the plugins is applied before.
    EnvFile,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Link => "link",
            Kind::Bridge => "bridge",
            Kind::Addr => "address",
            Kind::Sysctl => "sysctl",
            Kind::Neigh => "neighbour",
            Kind::Fdb => "FDB entry",
            Kind::Route => "route",
            Kind::Forward => "forwarding entry",
            Kind::WgPeer => "WireGuard peer",
            Kind::AllowedIp => "allowed IP",
            Kind::Extension => "extension",
            Kind::Blackhole => "blackhole route",
            Kind::Ruleset => "nftables rules",
            Kind::Iptables => "iptables rules",
            Kind::PodRules => "pod rules",
            Kind::EnvFile => "subnet file",
        })
    }
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
            Key::Forward(dst) => write!(f, "forwarding entry {dst}"),
            Key::WgPeer(link, key) => write!(f, "WireGuard peer {key} on {link}"),
            Key::AllowedIp(link, subnet) => write!(f, "allowed IP {subnet} on {link}"),
            Key::Extension(lease) => write!(f, "extension {lease}"),
            Key::Blackhole(dst) => write!(f, "blackhole route {dst}"),
            Key::Ruleset(family) => write!(f, "nftables rules for {family}"),
            Key::Iptables(family, variant) => write!(f, "iptables-{variant} rules for {family}"),
            Key::PodRules => f.write_str("pod rules of the CNI plugins"),
            Key::EnvFile => f.write_str("subnet file"),
        }
    }
}
