//! The picture of the kernel: [`Object`]s by [`Key`], as they shall be ([`Desired`]) and as they are ([`Observed`]).
//!
//! `Desired` is the sum of parts, one for this node and one for each lease, so that a lease's change touches that
//! lease's few objects. When two parts claim one key (two peers that publish the same VTEP MAC), the lower owner has
//! it, whatever the order of arrival.

mod sum;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::backend::extension::ExtensionPeer;
use crate::bridge::{Bridge, Port};
use crate::lease::LeaseKey;
use crate::net::{Cidr, Family, IfName, Mac, Subnet, Vni};
use crate::traffic::Ruleset;
use crate::traffic::iptables::{Iptables, Variant};

pub use self::sum::Desired;

/// A link of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface name.
    pub name: IfName,
    /// Attributes that can be changed only by creating the link anew.
    pub kind: LinkKind,
    /// Link-layer address.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up?
    pub up: bool,
}

/// The kind of a link, with what identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A VXLAN device (RFC 7348; attributes of `linux/if_link.h`).
    Vxlan {
        /// Network identifier.
        vni: Vni,
        /// UDP destination port.
        port: u16,
        /// Source address of the outer packets.
        local: IpAddr,
        /// The interface that the outer packets leave by.
        lower: IfName,
        /// Group-based policy extension.
        gbp: bool,
        /// Source-address learning.
        learning: bool,
    },
    /// A TUN device whose packets this process carries in UDP.
    Udp {
        /// The address that the socket is bound to.
        local: IpAddr,
        /// UDP port of this and every other host.
        port: u16,
    },
    /// A link of a kind that we never create, found under a name of ours: its `IFLA_INFO_KIND`, or empty.
    Other(String),
}

/// A permanent neighbour entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neigh {
    /// The link it is on.
    pub link: IfName,
    /// The address it resolves.
    pub ip: IpAddr,
    /// To this.
    pub mac: Mac,
}

/// A permanent forwarding entry of a VXLAN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fdb {
    /// The VXLAN device.
    pub link: IfName,
    /// Frames to this address…
    pub mac: Mac,
    /// …are sent to this host.
    pub dst: IpAddr,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: Subnet,
    /// Metric (`RTA_PRIORITY`), see [`route_metric`].
    pub metric: u32,
    /// Gateway.
    pub via: Option<IpAddr>,
    /// Output interface.
    pub dev: IfName,
    /// `RTNH_F_ONLINK`: take the gateway as reachable on the interface.
    pub onlink: bool,
    /// `rtm_protocol`: [`ROUTE_PROTOCOL`], but for routes that another flanneld left.
    pub protocol: u8,
}

/// Our number in `rtm_protocol` (`linux/rtnetlink.h` leaves those above 4 to routing daemons; 241 is in no
/// `rt_protos`). It is the proof that a route is ours.
pub const ROUTE_PROTOCOL: u8 = 241;

/// The metric of a peer's route: for IPv4 the number of its subnet within the pod network.
///
/// The kernel hashes the nexthops of IPv4 routes by device, protocol and metric, not by gateway; ten thousand peers
/// with one metric share one bucket that each insertion walks (`fib_find_info`, `net/ipv4/fib_semantics.c`). Distinct
/// metrics give distinct buckets. IPv6 has no such table and keeps the kernel's default, 1024 (`IP6_RT_PRIO_USER`).
pub fn route_metric(network: Subnet, subnet: Subnet) -> u32 {
    match network.family() {
        Family::V4 => subnet.index_in(network),
        Family::V6 => 1024,
    }
}

/// The file that tells the CNI plugins of this node: `subnet.env` (specification, section 1.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// The etcd leases by which the store knew this node's lease, the present one last. They are noted beside the file: a host
    /// whose address changed while no daemon ran knows its lease again by them, also in a store that was restored from a backup.
    pub etcd_leases: Vec<i64>,
    /// Was it written by this program? A Go flanneld that ran since has put another in its place.
    pub ours: bool,
}

/// One thing in the kernel. There are three a peer, so what is rare and large is boxed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A link.
    Link(Box<Link>),
    /// An address on a link of ours.
    Addr(IfName, Cidr),
    /// A sysctl: path below `/proc/sys` with slashes, and value.
    Sysctl(String, String),
    /// A neighbour entry.
    Neigh(Neigh),
    /// A forwarding entry.
    Fdb(Fdb),
    /// An entry of the udp backend's own table: packets for the subnet go to the host.
    Forward(Subnet, IpAddr),
    /// A route.
    Route(Route),
    /// A blackhole route of the main table: what no other route takes ends here.
    Blackhole(Subnet),
    /// Our nftables table of one family.
    Ruleset(Ruleset),
    /// Our chains of iptables of one family.
    Iptables(Iptables),
    /// How many of the sets of rules that the plugins wrote for pods (portmap, `ipMasq`) are not as they were; none, that is wanted.
    PodRules(usize),
    /// What the operator's own commands make of a peer.
    Extension(Box<ExtensionPeer>),
    /// The bridge of this host's pods.
    Bridge(Box<Bridge>),
    /// The file for the CNI plugins.
    EnvFile(Box<EnvFile>),
}

/// The identity of an object. Its order is the order of doing: what others stand on comes first, and a route comes
/// after the entries that it needs, so that no packet takes it before it can arrive.
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
    /// A host has one kind.
    PodRules,
    /// By lease.
    Extension(LeaseKey),
    /// A node has one. It is last: what it promises to the plugins is there by then.
    EnvFile,
}

impl Object {
    /// The object's identity.
    pub fn key(&self) -> Key {
        match self {
            Object::Link(link) => Key::Link(link.name),
            Object::Addr(link, cidr) => Key::Addr(*link, *cidr),
            Object::Sysctl(path, _) => Key::Sysctl(path.clone()),
            Object::Neigh(neigh) => Key::Neigh(neigh.link, neigh.ip),
            Object::Fdb(fdb) => Key::Fdb(fdb.link, fdb.mac),
            Object::Route(route) => Key::Route(route.dst, route.metric),
            Object::Forward(subnet, _) => Key::Forward(*subnet),
            Object::Extension(peer) => Key::Extension(peer.key),
            Object::Blackhole(dst) => Key::Blackhole(*dst),
            Object::Ruleset(ruleset) => Key::Ruleset(ruleset.family),
            Object::Iptables(rules) => Key::Iptables(rules.family, rules.variant),
            Object::Bridge(bridge) => Key::Bridge(bridge.name),
            Object::PodRules(_) => Key::PodRules,
            Object::EnvFile(_) => Key::EnvFile,
        }
    }

    /// Does the object vanish with this link?
    pub fn stands_on(&self, name: IfName) -> bool {
        match self {
            Object::Link(_) | Object::Bridge(_) | Object::Forward(..) | Object::Blackhole(_) => false,
            Object::Ruleset(_) | Object::Iptables(_) | Object::PodRules(_) | Object::Extension(_) | Object::EnvFile(_) => false,
            Object::Addr(link, _) => *link == name,
            Object::Sysctl(path, _) => path.split('/').any(|part| part == name.as_str()),
            Object::Neigh(neigh) => neigh.link == name,
            Object::Fdb(fdb) => fdb.link == name,
            Object::Route(route) => route.dev == name,
        }
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
            Key::Forward(dst) => write!(f, "forwarding of {dst}"),
            Key::Extension(lease) => write!(f, "extension {lease}"),
            Key::Blackhole(dst) => write!(f, "blackhole route {dst}"),
            Key::Ruleset(family) => write!(f, "{family} traffic rules of nftables"),
            Key::Iptables(family, variant) => write!(f, "{family} traffic rules of iptables-{variant}"),
            Key::PodRules => f.write_str("rules that the plugins wrote for pods"),
            Key::EnvFile => f.write_str("subnet file"),
        }
    }
}

impl fmt::Display for Object {
    /// One line, in the manner of iproute2.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Link(link) => {
                let Link { name, kind, mac, mtu, up } = &**link;
                write!(f, "link {name} {mac} mtu {mtu} {}", if *up { "up" } else { "down" })?;
                match kind {
                    LinkKind::Other(kind) => write!(f, " {kind}"),
                    LinkKind::Udp { local, port } => write!(f, " udp {local}:{port}"),
                    LinkKind::Vxlan { vni, port, local, lower, gbp, learning } => {
                        let (gbp, learning) = (if *gbp { " gbp" } else { "" }, if *learning { "learning" } else { "nolearning" });
                        write!(f, " vxlan id {vni} dstport {port} local {local} dev {lower} {learning}{gbp}")
                    }
                }
            }
            Object::Addr(link, cidr) => write!(f, "addr {cidr} dev {link}"),
            Object::Bridge(bridge) => write!(f, "{bridge}"),
            Object::Sysctl(path, value) => write!(f, "sysctl {path} = {value}"),
            Object::Neigh(Neigh { link, ip, mac }) => write!(f, "neigh {ip} lladdr {mac} dev {link}"),
            Object::Fdb(Fdb { link, mac, dst }) => write!(f, "fdb {mac} dst {dst} dev {link}"),
            Object::Route(Route { dst, metric, via, dev, onlink, protocol }) => {
                write!(f, "route {dst}")?;
                if let Some(via) = via {
                    write!(f, " via {via}")?;
                }
                write!(f, " dev {dev} metric {metric}{}", if *onlink { " onlink" } else { "" })?;
                if *protocol == ROUTE_PROTOCOL { Ok(()) } else { write!(f, " proto {protocol}") }
            }
            Object::Forward(dst, host) => write!(f, "forward {dst} to {host}"),
            Object::Extension(peer) => write!(f, "extension {}: {}", peer.key, peer.add),
            Object::Blackhole(dst) => write!(f, "route blackhole {dst}"),
            Object::PodRules(0) => f.write_str("rules that the plugins wrote for pods (portmap, ipMasq)"),
            Object::PodRules(missing) => write!(f, "rules that the plugins wrote for pods: {missing} are not as they were"),
            Object::Ruleset(ruleset) => f.write_str(ruleset.to_string().trim_end()),
            Object::Iptables(rules) => f.write_str(rules.to_string().trim_end()),
            Object::EnvFile(file) => write!(f, "file {}: {}", file.path.display(), file.text.trim_end().replace('\n', " ")),
        }
    }
}

/// Who wants an object. The node comes before every lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// This node itself: its devices, addresses and rules.
    Node,
    /// This host's pods: their bridge.
    Pods,
    /// The route to a peer, and what that needs.
    Lease(LeaseKey),
}

/// Puts entries into a map, in the place of those that it has. If they are more than it has, it is built anew: in one go that costs
/// half, and the map is packed twice as tightly as by one insertion after the other.
fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, entries: Vec<(K, V)>) {
    if entries.len() <= map.len() {
        return map.extend(entries);
    }
    let few = std::mem::replace(map, entries.into_iter().collect());
    for (key, value) in few {
        map.entry(key).or_insert(value);
    }
}

/// What in the kernel counts as ours: these links with all that stands on them, these sysctls, these tables, and the
/// routes into these networks that a flanneld made ([`Scope::has_route`]). Another flanneld on the same host has
/// another network, and its routes are none of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Links by name.
    pub links: Vec<IfName>,
    /// Sysctls by path, with the value that they shall have.
    pub sysctls: Vec<(String, String)>,
    /// nftables tables by family.
    pub rulesets: Vec<Family>,
    /// Chains of iptables by family.
    pub iptables: Vec<Family>,
    /// The pod networks.
    pub networks: Vec<Subnet>,
    /// Pod networks of an earlier run on this host: rules that name them are leftovers of ours.
    pub retired: Vec<Subnet>,
    /// The file for the CNI plugins.
    pub file: Option<PathBuf>,
    /// Addresses of this host's pods' gateways: the bridge that has one of them is the pods'.
    pub gateways: Vec<Cidr>,
    /// That bridge, once it is known: it may have lost them.
    pub bridge: Option<IfName>,
    /// Rules that the plugins wrote for this host's pods.
    pub pod_rules: bool,
    /// Plain routes that a Go flanneld left, while they are looked for.
    pub adopt: Option<Adopt>,
}

/// What a Go flanneld's plain routes look like (host-gw, and vxlan with `DirectRouting`): through the external
/// interface, of protocol boot and without a metric, to one whole subnet of the pod network. An operator's route may look
/// the same, so they are looked for only once, on a host where a Go flanneld has run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopt {
    /// The external interface.
    pub dev: IfName,
    /// The pod networks, and the length of each host's subnet.
    pub subnets: Vec<(Subnet, u8)>,
}

impl Adopt {
    /// May a Go flanneld have left this route?
    pub fn has_route(&self, route: &Route) -> bool {
        let whole = self.subnets.iter().any(|(network, len)| network.covers(route.dst) && route.dst.prefix_len() == *len);
        let default_metric = matches!((route.dst.family(), route.metric), (Family::V4, 0) | (Family::V6, 1024));
        route.dev == self.dev && route.protocol == BOOT_PROTOCOL && route.via.is_some() && default_metric && whole
    }
}

/// `RTPROT_BOOT`: what Go flanneld's routes have, and those that an operator adds by hand.
const BOOT_PROTOCOL: u8 = 3;

impl Scope {
    /// Is this route ours, or a predecessor's of ours? By its destination, and by its protocol; on a link of ours the
    /// protocol of Go flanneld counts as well.
    pub fn has_route(&self, route: &Route) -> bool {
        let into = self.networks.iter().chain(&self.retired).any(|network| network.covers(route.dst));
        let adopted = route.protocol == BOOT_PROTOCOL && route.via.is_some() && self.links.contains(&route.dev);
        into && (route.protocol == ROUTE_PROTOCOL || adopted) || self.adopt.as_ref().is_some_and(|adopt| adopt.has_route(route))
    }
}

/// What is in the kernel, limited to what is ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    objects: BTreeMap<Key, Object>,
}

impl Observed {
    /// Takes note of an object.
    pub fn insert(&mut self, object: Object) {
        self.objects.insert(object.key(), object);
    }

    /// Forgets an object, and with a link all that stood on it.
    pub fn remove(&mut self, key: &Key) {
        self.objects.remove(key);
        if let Key::Link(name) = key {
            self.objects.retain(|_, object| !object.stands_on(*name));
        }
    }

    /// The object at this key.
    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.objects.get(key)
    }

    /// The bridge of this host's pods.
    pub fn bridge(&self) -> Option<&Bridge> {
        // Few objects come before it.
        let first = self.objects.values().find(|object| !matches!(object, Object::Link(_) | Object::Addr(..)));
        match first {
            Some(Object::Bridge(bridge)) => Some(bridge),
            _ => None,
        }
    }

    /// A link became a port of a bridge. Returns whether that is news, and about the pods' bridge.
    pub fn add_port(&mut self, bridge: IfName, name: IfName, port: Port) -> bool {
        let Some(Object::Bridge(known)) = self.objects.get_mut(&Key::Bridge(bridge)) else { return false };
        known.loose.remove(&name);
        known.ports.insert(name, port) != Some(port)
    }

    /// A link that was a port is gone. Returns whether that is news, and about the pods' bridge.
    pub fn remove_port(&mut self, name: IfName) -> bool {
        let Some(key) = self.bridge().map(|bridge| Key::Bridge(bridge.name)) else { return false };
        let Some(Object::Bridge(known)) = self.objects.get_mut(&key) else { return false };
        known.loose.remove(&name) | known.ports.remove(&name).is_some()
    }

    /// All objects, in the order of doing.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.objects.iter()
    }

    /// Packs the map: one that was filled in parts is half empty.
    pub fn pack(&mut self) {
        self.objects = std::mem::take(&mut self.objects).into_iter().collect();
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

impl Extend<Object> for Observed {
    /// Takes note of many objects.
    fn extend<I: IntoIterator<Item = Object>>(&mut self, objects: I) {
        let new: Vec<(Key, Object)> = objects.into_iter().map(|object| (object.key(), object)).collect();
        put(&mut self.objects, new);
    }
}

impl FromIterator<Object> for Observed {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> Observed {
        Observed { objects: objects.into_iter().map(|object| (object.key(), object)).collect() }
    }
}
