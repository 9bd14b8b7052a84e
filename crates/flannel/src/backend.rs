//! Backends carry packets to the pods of peers. Each has one file with its section of the network configuration, the data that it
//! publishes, its MTU, the objects of this host and of a peer, and the peers that it refuses with the reasons. A backend is a
//! function from (configuration, node, leases) to [`Object`]s: it has no loop and no socket of its own.
//!
//! A new backend is a file here and a variant of [`Backend`]; the compiler names the places in this file that need it.

mod alloc;
pub mod extension;
mod host_gw;
mod ipip;
mod outer_mtu;
pub mod udp;
mod vxlan;
pub mod wireguard;

use std::net::IpAddr;

use thiserror::Error;

use self::alloc::Alloc;
use self::extension::{Command, Extension};
use self::host_gw::HostGw;
use self::ipip::Ipip;
use self::udp::Udp;
use self::vxlan::Vxlan;
use self::wireguard::WireGuard;
use crate::alloc::is_mine;
use crate::config::{Config, ConfigError, invalid, typed};
use crate::json::Fields;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Family, IfName, Mac, PerFamily, Subnet, Vni};
use crate::node::Node;
use crate::object::Object;
use crate::probe::Point;
use crate::wireguard::PublicKey;

/// The backend of the cluster, with its settings: `Backend` of the network configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Leases a subnet, programs nothing.
    Alloc(Alloc),
    /// A route per peer.
    HostGw(HostGw),
    /// A route, a neighbour entry and an FDB entry per peer.
    Vxlan(Vxlan),
    /// An IPIP device, and a route through it per peer.
    Ipip(Ipip),
    /// A TUN device, and an entry per peer in the forwarding table of this process.
    Udp(Udp),
    /// Commands of the operator per peer.
    Extension(Extension),
    /// A WireGuard peer per peer.
    WireGuard(WireGuard),
}

/// The interface that every backend implements.
trait Driver {
    /// Its name in `Backend.Type`.
    fn name(&self) -> &'static str;

    /// `BackendType` of this host's lease.
    fn published_type(&self) -> &'static str {
        self.name()
    }

    /// The addresses of this host's lease.
    fn published_addresses(&self, node: &Node) -> PerFamily<IpAddr> {
        node.public
    }

    /// `BackendData` of this host's lease: a JSON text for each family.
    fn published_data(&self, local: Local<'_>) -> PerFamily<Box<str>>;

    /// Whether a Node publishes this family of `peer` in annotations (specification, section 4.3).
    fn annotates(&self, family: Family, peer: &Peer) -> bool;

    /// Whether this host can use the lease of a peer with this `BackendType`.
    fn accepts_type(&self, backend_type: &str) -> bool {
        backend_type == self.name()
    }

    /// The MTU for pods, in bytes.
    fn mtu(&self, local: Local<'_>) -> u32;

    /// The MTU of the data path of one family, in bytes: this host itself tells pods of a smaller one (RFC 1191, RFC 8201).
    fn path_mtu(&self, local: Local<'_>, family: Family) -> u32 {
        let _ = family;
        self.mtu(local)
    }

    /// Checks that it can carry the configured networks.
    fn check_config(&self, config: &Config) -> Result<(), ConfigError> {
        let _ = config;
        Ok(())
    }

    /// The reason why a family cannot work on this host at present, with the fix.
    fn problem(&self, local: Local<'_>, family: Family) -> Option<Problem> {
        let _ = (local, family);
        None
    }

    /// Settings that this host cannot apply as configured, with the values that it uses instead.
    fn notes(&self, node: &Node) -> Vec<String> {
        let _ = node;
        Vec::new()
    }

    /// This host's own objects: devices and their addresses.
    fn node_objects(&self, context: Context<'_>) -> Vec<Object>;

    /// The objects of a peer, and the reasons for those that it is refused.
    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part;

    /// The device by which packets of a family reach peers, if the backend has one.
    fn device(&self, family: Family) -> Option<IfName> {
        let _ = family;
        None
    }

    /// The device whose MAC address this host publishes for a family, if any.
    fn vtep(&self, family: Family) -> Option<IfName> {
        let _ = family;
        None
    }

    /// Where the data path to a peer's pods can be measured; `None`: it programs no path.
    fn probe_point(&self) -> Option<Point>;

    /// The VNI and the UDP port of its tunnel, if it has them.
    fn tunnel(&self) -> (Option<Vni>, Option<u16>) {
        (None, None)
    }

    /// Whether it uses plain routes through the external interface, which a Go flanneld may have left behind.
    fn has_plain_routes(&self) -> bool {
        false
    }

    /// Whether this host needs a WireGuard key ([`Identity::public_key`]).
    fn needs_key(&self) -> bool {
        false
    }

    /// Whether the data that a host publishes is its own alone: the MAC address or the key of its device.
    fn has_unique_data(&self) -> bool {
        false
    }

    /// Whether it has commands to run on this host.
    fn has_commands(&self) -> bool {
        false
    }

    /// The operator's command to run before the lease is acquired, with its config field; its output becomes [`Identity::data`].
    fn before_lease(&self) -> Option<(&'static str, Command)> {
        None
    }

    /// The operator's command to run once this host has its lease, with its config field.
    fn after_lease(&self, context: Context<'_>) -> Option<(&'static str, Command)> {
        let _ = context;
        None
    }
}

/// The reason why a family cannot work on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The problem and the fix.
    pub text: String,
    /// Whether the problem is a wrong address to publish, from a flag or an annotation. A flag does not change while the daemon waits.
    pub is_published_address: bool,
}

/// Data that this host publishes beside the addresses of its interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// MAC addresses of its VTEPs.
    pub macs: PerFamily<Mac>,
    /// The output of the operator's command ([`Backend::before_lease`]), as a JSON string.
    pub data: Option<Box<str>>,
    /// The public key of its WireGuard devices ([`Backend::needs_key`]).
    pub public_key: Option<PublicKey>,
}

impl Identity {
    /// Sets the output of the operator's command.
    #[must_use]
    pub fn with_output(self, output: &str) -> Identity {
        let text = output.trim();
        Identity { data: (!text.is_empty()).then(|| serde_json::Value::from(text).to_string().into()), ..self }
    }
}

/// This host without its lease.
#[derive(Debug, Clone, Copy)]
pub struct Local<'a> {
    /// The network configuration.
    pub config: &'a Config,
    /// Its interface and addresses.
    pub node: &'a Node,
    /// The other data that it publishes.
    pub identity: &'a Identity,
}

/// This host with its lease: the input from which a backend makes objects.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// This host.
    pub local: Local<'a>,
    /// Its lease.
    pub own: LeaseKey,
}

/// The part of the desired state that belongs to one lease.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part {
    /// The desired objects.
    pub objects: Vec<Object>,
    /// The host to which they send packets, for each family that has objects.
    pub hosts: PerFamily<IpAddr>,
    /// The reasons why objects are refused. The other family and all other peers are not affected.
    pub refusals: Vec<Refusal>,
}

/// The reason why a peer, or one family of it, gets no route.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Its subnet is not part of the pod network.
    #[error("its subnet {0} lies outside the pod network {1}")]
    Outside(Subnet, Subnet),
    /// Its subnet contains addresses of this host's pods.
    #[error("its subnet {0} overlaps this host's own {1}")]
    OverlapsOwn(Subnet, Subnet),
    /// It uses another backend.
    #[error("its backend type is {0:?}, this host's is {1:?}")]
    OtherBackend(Box<str>, &'static str),
    /// It publishes no address of this family.
    #[error("it publishes no {0} address")]
    NoPublicIp(Family),
    /// Its address is not a unicast address.
    #[error("its public address {0} is not a unicast host address")]
    BadPublicIp(IpAddr),
    /// Its address belongs to this host.
    #[error("its public address {0} is this host's own: a stale lease of this host, or a second daemon")]
    OwnPublicIp(IpAddr),
    /// Packets to it would loop: its address is routed to itself.
    #[error("its public address {0} lies inside the pod network {1}")]
    PublicIpInside(IpAddr, Subnet),
    /// host-gw needs all hosts on one L2 network.
    #[error("its address {0} is not on the link of {1} (it is behind a router): host-gw cannot reach it; use vxlan")]
    NotOnLink(IpAddr, IfName),
    /// This backend does not support IPv6.
    #[error("{0} carries IPv4 only")]
    OnlyIpv4(&'static str),
    /// Its backend data cannot be used.
    #[error("its BackendData cannot be used: {0}")]
    BadData(String),
    /// It uses another VNI, so that both hosts drop each other's VXLAN packets.
    #[error("its VNI is {0}, this host's is {1}: restart flanneld on the host whose VNI differs from Backend.VNI in the store")]
    OtherVni(u32, Vni),
    /// Its VTEP has the MAC address of this host's VTEP.
    #[error("its VTEP MAC {0} is this host's own: a cloned machine?")]
    OwnMac(Mac),
    /// Its VTEP has the MAC address of an older lease's VTEP.
    #[error("its VTEP MAC {0} is that of lease {1}, which is older: a cloned machine, or a host that takes another one's packets?")]
    OlderMac(Mac, LeaseKey),
    /// It publishes this host's WireGuard key.
    #[error("its WireGuard key {0} is this host's own: a cloned machine?")]
    OwnKey(PublicKey),
    /// It publishes the WireGuard key of an older lease's host.
    #[error("its WireGuard key {0} is that of lease {1}, which is older: a cloned machine, or a host that takes another one's packets?")]
    OlderKey(PublicKey, LeaseKey),
    /// Its subnet contains addresses of an older lease of another host.
    #[error("its {0} subnet overlaps lease {1}, which is older and of another host")]
    OverlapsOlder(Family, LeaseKey),
}

impl Backend {
    /// Parses `Backend` of the network configuration. Without it the backend is udp, as in upstream's code (its documentation differs).
    ///
    /// # Errors
    /// [`ConfigError`], which names the field and the fix.
    pub(crate) fn parse(section: Option<&Fields<'_>>) -> Result<Backend, ConfigError> {
        const SUPPORTED: &str = "set Backend.Type to \"vxlan\", \"host-gw\", \"ipip\", \"wireguard\", \"udp\", \"extension\" or \"alloc\"";
        let Some(section) = section else { return Ok(Backend::Udp(Udp::default())) };
        let kind: String = typed(section, "Backend.Type", "type")?.unwrap_or_default();
        match kind.to_lowercase().as_str() {
            "alloc" => Ok(Backend::Alloc(Alloc)),
            "host-gw" => Ok(Backend::HostGw(HostGw)),
            "vxlan" => Vxlan::parse(section).map(Backend::Vxlan),
            "ipip" => Ipip::parse(section).map(Backend::Ipip),
            "udp" => Udp::parse(section).map(Backend::Udp),
            "extension" => Extension::parse(section).map(Backend::Extension),
            "wireguard" => WireGuard::parse(section).map(Backend::WireGuard),
            "" => Err(ConfigError::Missing { field: "Backend.Type", fix: SUPPORTED }),
            known @ ("ipsec" | "tencent-vpc") => Err(invalid("Backend.Type", format!("{known:?} is not supported yet: {SUPPORTED}"))),
            _ => Err(invalid("Backend.Type", format!("{kind:?} is an unknown backend: {SUPPORTED}"))),
        }
    }

    fn driver(&self) -> &dyn Driver {
        match self {
            Backend::Alloc(driver) => driver,
            Backend::HostGw(driver) => driver,
            Backend::Vxlan(driver) => driver,
            Backend::Ipip(driver) => driver,
            Backend::Udp(driver) => driver,
            Backend::Extension(driver) => driver,
            Backend::WireGuard(driver) => driver,
        }
    }

    /// The name in `Backend.Type`.
    pub fn name(&self) -> &'static str {
        self.driver().name()
    }

    /// Checks that it can carry the configured networks.
    pub(crate) fn check_config(&self, config: &Config) -> Result<(), ConfigError> {
        self.driver().check_config(config)
    }

    /// The attributes that this host publishes with its lease.
    pub fn own_peer(&self, local: Local<'_>) -> Peer {
        Peer {
            public: self.driver().published_addresses(local.node),
            backend_type: self.driver().published_type().into(),
            backend_data: self.driver().published_data(local),
        }
    }

    /// Whether a Node publishes this family of `peer` in annotations.
    pub(crate) fn annotates(&self, family: Family, peer: &Peer) -> bool {
        self.driver().annotates(family, peer)
    }

    /// The MTU for pods, in bytes.
    pub fn mtu(&self, local: Local<'_>) -> u32 {
        self.driver().mtu(local)
    }

    /// The MTU of the data path of one family, in bytes: at most that for pods.
    pub fn path_mtu(&self, local: Local<'_>, family: Family) -> u32 {
        self.driver().path_mtu(local, family)
    }

    /// The reason why a family cannot work on this host at present, with the fix.
    pub fn problem(&self, local: Local<'_>, family: Family) -> Option<Problem> {
        if local.node.addrs.get(family).is_none() {
            let text = format!("{} has no usable {family} address", local.node.ext);
            return Some(Problem { text, is_published_address: false });
        }
        self.driver().problem(local, family)
    }

    /// Settings that this host cannot apply as configured, with the values that it uses instead.
    pub fn notes(&self, node: &Node) -> Vec<String> {
        self.driver().notes(node)
    }

    /// This host's own objects: its devices and their addresses.
    pub fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        self.driver().node_objects(context)
    }

    /// The objects of a peer. The lease of this host itself has none.
    pub fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        let driver = self.driver();
        if *key == context.own {
            return Part::default();
        }
        if !driver.accepts_type(&peer.backend_type) {
            let refusal = Refusal::OtherBackend(peer.backend_type.clone(), driver.name());
            return Part { refusals: vec![refusal], ..Part::default() };
        }
        driver.peer_part(context, key, peer)
    }

    /// Whether this host forwards packets between pods by this backend. `alloc` leases subnets and leaves the rest to others.
    pub fn carries_packets(&self) -> bool {
        !matches!(self, Backend::Alloc(_))
    }

    /// The device by which packets of a family reach peers, if the backend has one.
    pub fn device(&self, family: Family) -> Option<IfName> {
        self.driver().device(family)
    }

    /// The device whose MAC address this host publishes for a family, if any.
    pub fn vtep(&self, family: Family) -> Option<IfName> {
        self.driver().vtep(family)
    }

    /// Where the data path to a peer's pods can be measured; `None`: it programs no path.
    pub fn probe_point(&self) -> Option<Point> {
        self.driver().probe_point()
    }

    /// The VNI and the UDP port of its tunnel, if it has them.
    pub fn tunnel(&self) -> (Option<Vni>, Option<u16>) {
        self.driver().tunnel()
    }

    /// Whether it uses plain routes through the external interface, which a Go flanneld may have left behind.
    pub fn has_plain_routes(&self) -> bool {
        self.driver().has_plain_routes()
    }

    /// Whether this host needs a WireGuard key ([`Identity::public_key`]) before it publishes its lease.
    pub fn needs_key(&self) -> bool {
        self.driver().needs_key()
    }

    /// Whether the data that a host publishes is its own alone: the MAC address or the key of its device.
    pub fn has_unique_data(&self) -> bool {
        self.driver().has_unique_data()
    }

    /// Whether its configuration has commands to run on this host.
    pub fn has_commands(&self) -> bool {
        self.driver().has_commands()
    }

    /// The operator's command to run before the lease is acquired, with its config field; its output becomes [`Identity::data`].
    pub fn before_lease(&self) -> Option<(&'static str, Command)> {
        self.driver().before_lease()
    }

    /// The operator's command to run once this host has its lease, with its config field.
    pub fn after_lease(&self, context: Context<'_>) -> Option<(&'static str, Command)> {
        self.driver().after_lease(context)
    }
}

/// The VTEP MAC that a vxlan peer publishes for a family, if it can be read.
pub fn published_mac(peer: &Peer, family: Family) -> Option<Mac> {
    (&*peer.backend_type == "vxlan").then(|| vxlan::vtep(peer, family).ok().map(|(mac, _)| mac)).flatten()
}

/// One family of a peer that passed the checks of [`admit`].
#[derive(Debug, Clone, Copy)]
struct Admitted {
    /// This family's pod network.
    network: Subnet,
    /// The peer's subnet.
    subnet: Subnet,
    /// The host that holds it.
    public: IpAddr,
}

/// Makes the part of a peer family by family: calls `objects` for each admitted family, and records refusals.
fn each_family(context: Context<'_>, key: &LeaseKey, peer: &Peer, objects: impl Fn(Admitted) -> Result<Vec<Object>, Refusal>) -> Part {
    let mut part = Part::default();
    for (family, subnet) in key.subnets().iter() {
        // A family that this host does not use is no reason to refuse the peer.
        let Some(network) = context.local.config.network(family).filter(|_| context.local.node.addrs.get(family).is_some()) else {
            continue;
        };
        let admitted = admit(context, network, *subnet, peer);
        match admitted.and_then(|admitted| Ok((admitted.public, objects(admitted)?))) {
            Ok((public, objects)) => {
                part.hosts.set(family, Some(public));
                part.objects.extend(objects);
            }
            Err(refusal) => part.refusals.push(refusal),
        }
    }
    part
}

/// Refuses a configuration without an IPv4 network, for a backend that carries nothing else.
fn needs_ipv4(config: &Config, problem: &str) -> Result<(), ConfigError> {
    if config.networks.v4.is_some() { Ok(()) } else { Err(invalid("Backend.Type", problem.to_owned())) }
}

/// Applies the checks that every backend needs: the subnet may be routed, and the peer's address can receive packets.
fn admit(context: Context<'_>, network: Subnet, subnet: Subnet, peer: &Peer) -> Result<Admitted, Refusal> {
    if !network.covers(subnet) {
        return Err(Refusal::Outside(subnet, network));
    }
    if let Some(own) = context.own.subnets().get(subnet.family()).filter(|own| own.overlaps(subnet)) {
        return Err(Refusal::OverlapsOwn(subnet, *own));
    }
    Ok(Admitted { network, subnet, public: check_public(context, network, peer)? })
}

/// Checks the address that a peer publishes for the family of this pod network: it can receive packets.
fn check_public(context: Context<'_>, network: Subnet, peer: &Peer) -> Result<IpAddr, Refusal> {
    let (family, node) = (network.family(), context.local.node);
    let public = *peer.public.get(family).ok_or(Refusal::NoPublicIp(family))?;
    let broadcast = matches!(public, IpAddr::V4(ip) if ip.is_broadcast());
    if public.is_loopback() || public.is_multicast() || broadcast {
        return Err(Refusal::BadPublicIp(public));
    }
    if is_mine(&peer.public, &node.public) || node.addrs.get(family) == Some(&public) {
        return Err(Refusal::OwnPublicIp(public));
    }
    if network.contains(public) {
        return Err(Refusal::PublicIpInside(public, network));
    }
    Ok(public)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use expect_test::{Expect, expect};

    /// Renders the objects of a node at 192.0.2.1/24 with lease 10.244.1.0/24 and VTEP MAC 0e:00:00:00:00:01. Each peer is (key, value).
    #[track_caller]
    pub(super) fn check(backend: &str, peers: &[(&str, &str)], want: Expect) {
        let dual = peers.iter().any(|(key, _)| key.contains('&'));
        let v6 = if dual { r#","EnableIPv6":true,"IPv6Network":"fc00::/48""# } else { "" };
        let config = Config::parse(&format!(r#"{{"Network":"10.244.0.0/16"{v6},"Backend":{backend}}}"#)).unwrap();
        let addrs = PerFamily { v4: "192.0.2.1".parse().ok(), v6: dual.then(|| "2001:db8::1".parse().unwrap()) };
        let routes = vec![("192.0.2.0/24".parse().unwrap(), true), ("2001:db8::/64".parse().unwrap(), true)];
        let node = Node { ext: "eth0".parse().unwrap(), mtu: 1500, addrs, public: addrs, routes };
        let macs = PerFamily { v4: Some(Mac([0x0e, 0, 0, 0, 0, 1])), v6: Some(Mac([0x0e, 0, 0, 0, 6, 1])) };
        let identity = Identity { macs, data: None, public_key: Some(PublicKey([1; 32])) };
        let local = Local { config: &config, node: &node, identity: &identity };
        let backend = &config.backend;
        let own = PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: dual.then(|| "fc00:0:0:1::/64".parse().unwrap()) };
        let context = Context { local, own: LeaseKey::new(own).unwrap() };

        let mut text = format!("publishes {}\nmtu {}\n", wire::value(&backend.own_peer(local)), backend.mtu(local));
        for object in backend.node_objects(context) {
            text.push_str(&format!("{object}\n"));
        }
        for (key, value) in peers {
            let part = backend.peer_part(context, &wire::parse_key(key).unwrap(), &wire::parse_value(value.as_bytes()).unwrap());
            text.push_str(&format!("{key}:\n"));
            for object in part.objects {
                text.push_str(&format!("  {object}\n"));
            }
            for refusal in part.refusals {
                text.push_str(&format!("  refused: {refusal}\n"));
            }
        }
        want.assert_eq(&text);
    }

    #[test]
    fn unroutable_peers_are_refused_with_reasons() {
        check(
            r#"{"Type":"host-gw"}"#,
            &[
                ("10.245.2.0-24", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.0.0.0-8", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.244.0.0-16", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.244.1.0-25", r#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#),
                ("10.244.2.0-24", r#"{"BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"224.0.0.1","BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#),
                ("10.244.2.0-24", r#"{"PublicIP":"10.244.2.9","BackendType":"host-gw"}"#),
                ("10.244.1.0-24", r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#),
            ],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}
                mtu 1500
                10.245.2.0-24:
                  refused: its subnet 10.245.2.0/24 lies outside the pod network 10.244.0.0/16
                10.0.0.0-8:
                  refused: its subnet 10.0.0.0/8 lies outside the pod network 10.244.0.0/16
                10.244.0.0-16:
                  refused: its subnet 10.244.0.0/16 overlaps this host's own 10.244.1.0/24
                10.244.1.0-25:
                  refused: its subnet 10.244.1.0/25 overlaps this host's own 10.244.1.0/24
                10.244.2.0-24:
                  refused: its backend type is "vxlan", this host's is "host-gw"
                10.244.2.0-24:
                  refused: its backend type is "", this host's is "host-gw"
                10.244.2.0-24:
                  refused: it publishes no IPv4 address
                10.244.2.0-24:
                  refused: its public address 224.0.0.1 is not a unicast host address
                10.244.2.0-24:
                  refused: its public address 192.0.2.1 is this host's own: a stale lease of this host, or a second daemon
                10.244.2.0-24:
                  refused: its public address 10.244.2.9 lies inside the pod network 10.244.0.0/16
                10.244.1.0-24:
            "#]],
        );
    }
}
