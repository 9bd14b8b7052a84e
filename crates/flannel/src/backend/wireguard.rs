//! The wireguard backend: one device for each family, or one for both, with a WireGuard peer for each host and a single route to the whole
//! pod network; WireGuard itself finds the host of a subnet (specification, section 5.5).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::outer_mtu::OuterMtu;
use super::{Admitted, Context, Driver, Local, Part, Problem, Refusal, check_public, each_family};
use crate::config::{Config, ConfigError, invalid, typed};
use crate::json::Fields;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Cidr, Family, IfName, Mac, PerFamily, Subnet, Vni};
use crate::node::Node;
use crate::object::{Addr, AllowedIp, Link, LinkKind, Object, ROUTE_PROTOCOL, Route, WgPeer, route_metric};
use crate::probe::Point;
use crate::wireguard::{PublicKey, Secret};

/// The default UDP port, and that of the IPv6 device.
const PORTS: (u16, u16) = (51_820, 51_821);
/// The bytes that WireGuard adds to a packet: an outer IPv6 header (40), UDP (8), and its own header and tag (32). With IPv4 outside it is
/// 60; upstream subtracts 80 in each mode.
const OVERHEAD: u32 = 80;

/// The wireguard backend with its settings (specification, section 2.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireGuard {
    mode: Mode,
    /// UDP port of the device, and of the IPv6 device if there are two.
    ports: (u16, u16),
    mtu: OuterMtu,
    /// The preshared key that all hosts mix into their sessions.
    psk: Option<Secret>,
    /// Seconds between keepalive packets; 0: none are sent.
    keepalive: u16,
}

/// How the families share devices, and by which of its addresses a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// A device for each family, whose outer packets have the same family.
    Separate,
    /// One device; the address is chosen for each peer.
    Auto,
    /// One device; outer packets are IPv4.
    Ipv4,
    /// One device; outer packets are IPv6.
    Ipv6,
}

/// The device of IPv4, or of both families.
fn device() -> IfName {
    "flannel-wg".parse().expect("the name has 10 bytes and no special characters")
}

/// The device of IPv6, if there are two.
fn device_v6() -> IfName {
    "flannel-wg-v6".parse().expect("the name has 13 bytes and no special characters")
}

/// The devices that this backend may have on a host.
pub fn devices() -> [IfName; 2] {
    [device(), device_v6()]
}

/// The family that needs a WireGuard device; if one device carries both, the objects on it tell that the other fails as well.
pub(crate) fn device_family(name: IfName) -> Family {
    if name == device_v6() { Family::V6 } else { Family::V4 }
}

/// What a host publishes for a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) key: PublicKey,
    /// Old versions do not publish it.
    port: Option<u16>,
}

fn port(section: &Fields<'_>, field: &'static str, key: &str, default: u16) -> Result<u16, ConfigError> {
    let port = typed::<i64>(section, field, key)?.unwrap_or(0);
    let port = u16::try_from(port)
        .map_err(|_| invalid(field, format!("{port} is out of range: it must be 0 (the default, {default}) to 65535")))?;
    Ok(if port == 0 { default } else { port })
}

impl WireGuard {
    pub(super) fn parse(section: &Fields<'_>) -> Result<WireGuard, ConfigError> {
        let mtu = OuterMtu::parse(section, OVERHEAD)?;
        let keepalive = typed::<i64>(section, "Backend.PersistentKeepaliveInterval", "persistentkeepaliveinterval")?.unwrap_or(0);
        let keepalive = u16::try_from(keepalive).map_err(|_| {
            let problem = format!("{keepalive} is out of range: it must be 0 (off) to 65535 seconds");
            invalid("Backend.PersistentKeepaliveInterval", problem)
        })?;
        let mode = typed::<String>(section, "Backend.Mode", "mode")?.unwrap_or_default();
        let mode = match mode.as_str() {
            "" | "separate" => Mode::Separate,
            "auto" => Mode::Auto,
            "ipv4" => Mode::Ipv4,
            "ipv6" => Mode::Ipv6,
            _ => return Err(invalid("Backend.Mode", format!("{mode:?} is unknown: set \"separate\", \"auto\", \"ipv4\" or \"ipv6\""))),
        };
        let psk = typed::<String>(section, "Backend.PSK", "psk")?.filter(|text| !text.is_empty());
        let psk = psk.map(|text| Secret::parse(&text)).transpose().map_err(|error| {
            // The text itself is a secret.
            invalid("Backend.PSK", format!("{error}: set the output of `wg genpsk`, or remove the field"))
        })?;
        let ports =
            (port(section, "Backend.ListenPort", "listenport", PORTS.0)?, port(section, "Backend.ListenPortV6", "listenportv6", PORTS.1)?);
        Ok(WireGuard { mode, ports, mtu, psk, keepalive })
    }

    /// The device that carries a family, and its port.
    fn link(&self, family: Family) -> (IfName, u16) {
        match (self.mode, family) {
            (Mode::Separate, Family::V6) => (device_v6(), self.ports.1),
            _ => (device(), self.ports.0),
        }
    }

    fn device_mtu(&self, node: &Node) -> u32 {
        self.mtu.inner(node, OVERHEAD)
    }

    /// The WireGuard peer of one family, and its subnet.
    fn peer_objects(&self, context: Context<'_>, admitted: Admitted, peer: &Peer) -> Result<Vec<Object>, Refusal> {
        let family = admitted.subnet.family();
        let (link, port) = self.link(family);
        let (published, endpoint) = match self.mode {
            Mode::Separate => {
                let published = published(peer, family).map_err(Refusal::BadData)?;
                (published, SocketAddr::new(admitted.public, published.port.unwrap_or(port)))
            }
            _ => self.shared_endpoint(context, peer)?,
        };
        if context.local.identity.public_key == Some(published.key) {
            return Err(Refusal::OwnKey(published.key));
        }
        let wg = WgPeer {
            link,
            public_key: published.key,
            endpoint: Some(endpoint),
            keepalive: self.keepalive,
            psk: self.psk.clone(),
            handshake: None,
        };
        Ok(vec![
            Object::WgPeer(Box::new(wg)),
            Object::AllowedIp(Box::new(AllowedIp { link, subnet: admitted.subnet, peer: published.key })),
        ])
    }

    /// With one device for both families: what a peer publishes, and the address by which it is reached.
    fn shared_endpoint(&self, context: Context<'_>, peer: &Peer) -> Result<(Published, SocketAddr), Refusal> {
        let config = context.local.config;
        let has = |family: &Family| config.network(*family).is_some();
        let mut data = PerFamily::default();
        for family in Family::ALL.into_iter().filter(has).filter(|family| peer.backend_data.get(*family).is_some()) {
            data.set(family, Some(published(peer, family).map_err(Refusal::BadData)?));
        }
        // As upstream: that of IPv6, if there is one.
        let both = data.v6.or(data.v4).ok_or_else(|| Refusal::BadData("it is missing".to_owned()))?;
        let family = self.outer_family(context.local, peer);
        let network = config.network(family).ok_or(Refusal::NoPublicIp(family))?;
        let public = check_public(context, network, peer)?;
        // A Go host states ListenPortV6 for IPv6, but its one device has ListenPort, as it states for IPv4.
        let port = data.v4.or(data.v6).and_then(|data| data.port).filter(|port| data.v4.is_some() || *port != self.ports.1);
        Ok((both, SocketAddr::new(public, port.unwrap_or(self.ports.0))))
    }

    /// The family of outer packets to a peer, with one device for both families.
    fn outer_family(&self, local: Local<'_>, peer: &Peer) -> Family {
        let (theirs, ours) = (peer.public, local.node.public);
        match self.mode {
            Mode::Ipv6 => Family::V6,
            Mode::Separate | Mode::Ipv4 => Family::V4,
            Mode::Auto if local.config.networks.v4.is_none() => Family::V6,
            Mode::Auto if local.config.networks.v6.is_none() || theirs.v6.is_none() => Family::V4,
            Mode::Auto => {
                let is_global = |ip: Option<IpAddr>| matches!(ip, Some(IpAddr::V4(ip)) if !ip.is_private());
                let is_global_v6 = |ip: Option<IpAddr>| matches!(ip, Some(IpAddr::V6(ip)) if !is_unique_local(ip));
                let by_v6 = !(is_global(theirs.v4) && ours.v4.is_some()) && is_global_v6(theirs.v6) && is_global_v6(ours.v6);
                // Without an IPv4 address there is no choice.
                if by_v6 || theirs.v4.is_none() { Family::V6 } else { Family::V4 }
            }
        }
    }
}

/// Whether this is a unique local address (RFC 4193).
fn is_unique_local(ip: Ipv6Addr) -> bool {
    ip.octets()[0] & 0xfe == 0xfc
}

/// Reads what a peer published for a family.
///
/// # Errors
/// The reason why the peer's data cannot be used.
pub(super) fn published(peer: &Peer, family: Family) -> Result<Published, String> {
    let data = peer.backend_data.get(family).ok_or("it is missing")?;
    let fields = Fields::parse(data).map_err(|error| error.to_string())?;
    let text = fields.text("publickey").map_err(|error| format!("PublicKey: {error}"))?.ok_or("PublicKey is missing")?;
    let key = text.parse().map_err(|error| format!("PublicKey: {error}"))?;
    let port = fields.get::<u16>("port").map_err(|error| format!("Port: {error}"))?;
    Ok(Published { key, port: port.filter(|port| *port != 0) })
}

impl Driver for WireGuard {
    fn name(&self) -> &'static str {
        "wireguard"
    }

    /// `{"PublicKey":"…","Port":51820}` for each family, with the port of the device that carries it.
    fn published_data(&self, local: Local<'_>) -> PerFamily<Box<str>> {
        let mut data = PerFamily::default();
        for (family, _) in local.config.networks.iter() {
            let text = local.identity.public_key.map(|key| format!("{{\"PublicKey\":\"{key}\",\"Port\":{}}}", self.link(family).1));
            data.set(family, text.map(Into::into));
        }
        data
    }

    fn annotates(&self, family: Family, peer: &Peer) -> bool {
        // Go peers read the IPv4 annotations of every node; without IPv4 the address is 0.0.0.0.
        family == Family::V4 || peer.public.v6.is_some() && peer.backend_data.v6.is_some()
    }

    fn mtu(&self, local: Local<'_>) -> u32 {
        self.device_mtu(local.node)
    }

    fn check_config(&self, config: &Config) -> Result<(), ConfigError> {
        let has = |family| config.network(family).is_some();
        let lacks = |family, name| {
            let problem =
                format!("{name:?} sends packets by {family}, which the network config does not enable: set \"separate\" or \"auto\"");
            Err(invalid("Backend.Mode", problem))
        };
        match self.mode {
            Mode::Ipv4 if !has(Family::V4) => lacks(Family::V4, "ipv4"),
            Mode::Ipv6 if !has(Family::V6) => lacks(Family::V6, "ipv6"),
            Mode::Separate if has(Family::V4) && has(Family::V6) && self.ports.0 == self.ports.1 => {
                let problem = format!("{} is ListenPort as well, but each of the two devices needs a port: set another one", self.ports.1);
                Err(invalid("Backend.ListenPortV6", problem))
            }
            _ => Ok(()),
        }
    }

    fn problem(&self, local: Local<'_>, family: Family) -> Option<Problem> {
        self.mtu.problem(local.node, family, OVERHEAD)
    }

    fn notes(&self, node: &Node) -> Vec<String> {
        self.mtu.notes(node)
    }

    fn has_unique_data(&self) -> bool {
        true
    }

    fn probe_point(&self) -> Option<Point> {
        Some(Point::Device)
    }

    fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        let Local { config, node, identity } = context.local;
        let Some(public_key) = identity.public_key else { return Vec::new() };
        let mut objects: Vec<Object> = Vec::new();
        for (family, network) in config.networks.iter().filter(|(family, _)| node.addrs.get(*family).is_some()) {
            let Some(own) = context.own.subnets().get(family) else { continue };
            let (link, port) = self.link(family);
            let kind = LinkKind::WireGuard { port, public_key };
            let device = Object::Link(Box::new(Link { name: link, kind, mac: Mac([0; 6]), mtu: self.device_mtu(node), up: true }));
            if !objects.contains(&device) {
                objects.push(device);
            }
            objects.push(Object::Addr(Addr { link, cidr: Cidr { addr: own.network(), len: family.bits() } }));
            objects.push(Object::Route(route(network.network, link)));
        }
        objects
    }

    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        let mut part = each_family(context, key, peer, |admitted| self.peer_objects(context, admitted, peer));
        // One device has one peer for both families.
        let is_second = |at: usize, object: &Object| matches!(object, Object::WgPeer(_)) && part.objects[..at].contains(object);
        let kept: Vec<Object> =
            part.objects.iter().enumerate().filter(|(at, object)| !is_second(*at, object)).map(|(_, object)| object.clone()).collect();
        part.objects = kept;
        part
    }

    fn device(&self, family: Family) -> Option<IfName> {
        Some(self.link(family).0)
    }

    fn tunnel(&self) -> (Option<Vni>, Option<u16>) {
        (None, Some(self.ports.0))
    }

    fn needs_key(&self) -> bool {
        true
    }
}

/// The route to the whole pod network: WireGuard knows the peer of each subnet, and drops packets for those that no peer has.
fn route(network: Subnet, dev: IfName) -> Route {
    Route { dst: network, metric: route_metric(network, network), via: None, dev, onlink: false, protocol: ROUTE_PROTOCOL }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::check;
    use expect_test::{Expect, expect};

    const KEY2: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
    const KEY3: &str = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=";
    const OWN: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    fn peer(host: u8, data: &str) -> String {
        format!(r#"{{"PublicIP":"192.0.2.{host}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{data}}}"#)
    }

    fn dual(v4: &str, v6: &str, data: (&str, &str)) -> String {
        let (data, data_v6) = data;
        format!(r#"{{"PublicIP":"{v4}","PublicIPv6":"{v6}","BackendType":"wireguard","BackendData":{data},"BackendV6Data":{data_v6}}}"#)
    }

    fn data(key: &str, port: u16) -> String {
        format!(r#"{{"PublicKey":"{key}","Port":{port}}}"#)
    }

    #[test]
    fn config_of_k3s_gives_a_peer_its_key_endpoint_and_subnet() {
        check(
            r#"{"Type":"wireguard","PersistentKeepaliveInterval":25}"#,
            &[("10.244.2.0-24", &peer(2, &data(KEY2, 51999))), ("10.244.3.0-24", &peer(3, &format!(r#"{{"publickey":"{KEY3}"}}"#)))],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820}}
                mtu 1420
                link flannel-wg 00:00:00:00:00:00 mtu 1420 up wireguard port 51820 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                addr 10.244.1.0/32 dev flannel-wg
                route 10.244.0.0/16 dev flannel-wg metric 0
                10.244.2.0-24:
                  peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg endpoint 192.0.2.2:51999 keepalive 25
                  allowed-ip 10.244.2.0/24 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
                10.244.3.0-24:
                  peer AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM= dev flannel-wg endpoint 192.0.2.3:51820 keepalive 25
                  allowed-ip 10.244.3.0/24 peer AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM= dev flannel-wg
            "#]],
        );
    }

    #[test]
    fn each_family_has_its_own_device_in_mode_separate() {
        check(
            r#"{"Type":"wireguard","ListenPort":7,"ListenPortV6":8,"MTU":1400,"Mode":"separate"}"#,
            &[("10.244.2.0-24&fc00:0:0:2::-64", &dual("192.0.2.2", "2001:db8::2", (&data(KEY2, 51820), &data(KEY2, 51821))))],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":7},"BackendV6Data":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":8}}
                mtu 1320
                link flannel-wg 00:00:00:00:00:00 mtu 1320 up wireguard port 7 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                addr 10.244.1.0/32 dev flannel-wg
                route 10.244.0.0/16 dev flannel-wg metric 0
                link flannel-wg-v6 00:00:00:00:00:00 mtu 1320 up wireguard port 8 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                addr fc00:0:0:1::/128 dev flannel-wg-v6
                route fc00::/48 dev flannel-wg-v6 metric 1024
                10.244.2.0-24&fc00:0:0:2::-64:
                  peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg endpoint 192.0.2.2:51820
                  allowed-ip 10.244.2.0/24 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
                  peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg-v6 endpoint [2001:db8::2]:51821
                  allowed-ip fc00:0:0:2::/64 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg-v6
            "#]],
        );
    }

    #[test]
    fn one_device_has_one_peer_for_both_families() {
        let go = dual("192.0.2.2", "2001:db8::2", (&data(KEY2, 51820), &data(KEY2, 51821)));
        for mode in ["ipv4", "ipv6"] {
            check(
                &format!(r#"{{"Type":"wireguard","Mode":"{mode}"}}"#),
                &[("10.244.2.0-24&fc00:0:0:2::-64", &go)],
                if mode == "ipv4" {
                    expect![[r#"
                    publishes {"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820},"BackendV6Data":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820}}
                    mtu 1420
                    link flannel-wg 00:00:00:00:00:00 mtu 1420 up wireguard port 51820 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                    addr 10.244.1.0/32 dev flannel-wg
                    route 10.244.0.0/16 dev flannel-wg metric 0
                    addr fc00:0:0:1::/128 dev flannel-wg
                    route fc00::/48 dev flannel-wg metric 1024
                    10.244.2.0-24&fc00:0:0:2::-64:
                      peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg endpoint 192.0.2.2:51820
                      allowed-ip 10.244.2.0/24 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
                      allowed-ip fc00:0:0:2::/64 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
                "#]]
                } else {
                    expect![[r#"
                    publishes {"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820},"BackendV6Data":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820}}
                    mtu 1420
                    link flannel-wg 00:00:00:00:00:00 mtu 1420 up wireguard port 51820 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                    addr 10.244.1.0/32 dev flannel-wg
                    route 10.244.0.0/16 dev flannel-wg metric 0
                    addr fc00:0:0:1::/128 dev flannel-wg
                    route fc00::/48 dev flannel-wg metric 1024
                    10.244.2.0-24&fc00:0:0:2::-64:
                      peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg endpoint [2001:db8::2]:51820
                      allowed-ip 10.244.2.0/24 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
                      allowed-ip fc00:0:0:2::/64 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
                "#]]
                },
            );
        }
    }

    #[test]
    fn preshared_key_is_set_but_not_shown() {
        check(
            &format!(r#"{{"Type":"wireguard","PSK":"{KEY3}"}}"#),
            &[("10.244.2.0-24", &peer(2, &data(KEY2, 51820)))],
            expect![[r#"
            publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820}}
            mtu 1420
            link flannel-wg 00:00:00:00:00:00 mtu 1420 up wireguard port 51820 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
            addr 10.244.1.0/32 dev flannel-wg
            route 10.244.0.0/16 dev flannel-wg metric 0
            10.244.2.0-24:
              peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg endpoint 192.0.2.2:51820 psk (secret)
              allowed-ip 10.244.2.0/24 peer AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI= dev flannel-wg
        "#]],
        );
    }

    #[test]
    fn unusable_peers_are_refused_with_reason() {
        let whole = |data: &str| peer(2, data);
        check(
            r#"{"Type":"wireguard"}"#,
            &[
                ("10.244.2.0-24", &whole("null")),
                ("10.244.2.0-24", &whole("{}")),
                ("10.244.2.0-24", &whole(r#"{"PublicKey":7}"#)),
                ("10.244.2.0-24", &whole(r#"{"PublicKey":"AAAA"}"#)),
                ("10.244.2.0-24", &whole(r#"{"PublicKey":"no base64"}"#)),
                ("10.244.2.0-24", &whole(&format!(r#"{{"PublicKey":"{KEY2}","Port":70000}}"#))),
                ("10.244.2.0-24", &whole(&data(OWN, 51820))),
                ("10.244.2.0-24", &peer(1, &data(KEY2, 51820))),
            ],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820}}
                mtu 1420
                link flannel-wg 00:00:00:00:00:00 mtu 1420 up wireguard port 51820 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                addr 10.244.1.0/32 dev flannel-wg
                route 10.244.0.0/16 dev flannel-wg metric 0
                10.244.2.0-24:
                  refused: its BackendData cannot be used: it is missing
                10.244.2.0-24:
                  refused: its BackendData cannot be used: PublicKey is missing
                10.244.2.0-24:
                  refused: its BackendData cannot be used: PublicKey: invalid type: integer `7`, expected a string at line 1 column 1
                10.244.2.0-24:
                  refused: its BackendData cannot be used: PublicKey: it is base64 of 3 bytes, not of 32
                10.244.2.0-24:
                  refused: its BackendData cannot be used: PublicKey: it is not base64 (the standard alphabet, with padding)
                10.244.2.0-24:
                  refused: its BackendData cannot be used: Port: invalid value: integer `70000`, expected u16 at line 1 column 5
                10.244.2.0-24:
                  refused: its WireGuard key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE= is this host's own: a cloned machine?
                10.244.2.0-24:
                  refused: its public address 192.0.2.1 is this host's own: a stale lease of this host, or a second daemon
            "#]],
        );
        check(
            r#"{"Type":"wireguard","Mode":"ipv6"}"#,
            &[("10.244.2.0-24&fc00:0:0:2::-64", &peer(2, &data(KEY2, 51820)))],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard","BackendData":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820},"BackendV6Data":{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":51820}}
                mtu 1420
                link flannel-wg 00:00:00:00:00:00 mtu 1420 up wireguard port 51820 key AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
                addr 10.244.1.0/32 dev flannel-wg
                route 10.244.0.0/16 dev flannel-wg metric 0
                addr fc00:0:0:1::/128 dev flannel-wg
                route fc00::/48 dev flannel-wg metric 1024
                10.244.2.0-24&fc00:0:0:2::-64:
                  refused: it publishes no IPv6 address
                  refused: it publishes no IPv6 address
            "#]],
        );
    }

    #[test]
    fn port_of_a_go_host_with_one_device_is_its_listen_port() {
        let parse = |text: &str| Config::parse(text).unwrap();
        let config =
            parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"wireguard","Mode":"ipv6"}}"#);
        let addrs = PerFamily { v4: None, v6: "2001:db8::1".parse().ok() };
        let node = Node { ext: "eth0".parse().unwrap(), mtu: 1500, addrs, public: addrs, routes: Vec::new() };
        let identity = super::super::Identity { public_key: Some(PublicKey([1; 32])), ..Default::default() };
        let own = LeaseKey::new(PerFamily { v4: None, v6: "fc00:0:0:1::/64".parse().ok() }).unwrap();
        let context = Context { local: Local { config: &config, node: &node, identity: &identity }, own };
        let key = LeaseKey::new(PerFamily { v4: None, v6: "fc00:0:0:2::/64".parse().ok() }).unwrap();
        let endpoint = |port: u16| {
            let peer = Peer {
                public: PerFamily { v4: None, v6: "2001:db8::2".parse().ok() },
                backend_type: "wireguard".into(),
                backend_data: PerFamily { v4: None, v6: Some(data(KEY2, port).into()) },
            };
            let part = config.backend.peer_part(context, &key, &peer);
            let [Object::WgPeer(peer), Object::AllowedIp(_)] = part.objects.as_slice() else { panic!("{part:?}") };
            peer.endpoint.unwrap().to_string()
        };
        assert_eq!(endpoint(51_821), "[2001:db8::2]:51820", "Go states ListenPortV6");
        assert_eq!(endpoint(4711), "[2001:db8::2]:4711");
        assert_eq!(config.backend.own_peer(context.local).backend_data.v6, Some(data(OWN, 51_820).into()));
    }

    #[test]
    fn mode_auto_prefers_global_addresses() {
        let config =
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"wireguard","Mode":"auto"}}"#;
        let config = Config::parse(config).unwrap();
        let Config { backend: super::super::Backend::WireGuard(wireguard), .. } = &config else { panic!("{config:?}") };
        let outer = |own: (&str, &str), peer: (&str, &str)| {
            let addresses = |pair: (&str, &str)| PerFamily { v4: pair.0.parse().ok(), v6: pair.1.parse().ok() };
            let node = Node { ext: "eth0".parse().unwrap(), mtu: 1500, addrs: addresses(own), public: addresses(own), routes: Vec::new() };
            let peer = Peer { public: addresses(peer), ..Peer::default() };
            wireguard.outer_family(Local { config: &config, node: &node, identity: &super::super::Identity::default() }, &peer)
        };
        let (global, private, local) = (("192.0.2.1", "2001:db8::1"), ("10.0.0.1", "2001:db8::1"), ("10.0.0.1", "fd00::1"));
        assert_eq!(outer(global, global), Family::V4);
        assert_eq!(outer(global, private), Family::V6);
        assert_eq!(outer(local, private), Family::V4, "this host has no global IPv6 address");
        assert_eq!(outer(private, local), Family::V4);
        assert_eq!(outer(global, ("10.0.0.1", "")), Family::V4);
        assert_eq!(outer(global, ("", "fd00::1")), Family::V6, "there is no choice");
    }

    #[track_caller]
    fn refused(backend: &str, v6: bool, want: Expect) {
        let v6 = if v6 { r#","EnableIPv6":true,"IPv6Network":"fc00::/48""# } else { "" };
        let error = Config::parse(&format!(r#"{{"Network":"10.244.0.0/16"{v6},"Backend":{backend}}}"#)).unwrap_err();
        want.assert_eq(&error.to_string());
    }

    #[test]
    fn config_errors_name_field_and_fix() {
        refused(
            r#"{"Type":"wireguard","ListenPort":70000}"#,
            false,
            expect!["network config: Backend.ListenPort: 70000 is out of range: it must be 0 (the default, 51820) to 65535"],
        );
        refused(
            r#"{"Type":"wireguard","ListenPortV6":-1}"#,
            false,
            expect!["network config: Backend.ListenPortV6: -1 is out of range: it must be 0 (the default, 51821) to 65535"],
        );
        refused(
            r#"{"Type":"wireguard","MTU":100}"#,
            false,
            expect!["network config: Backend.MTU: 100 is out of range: it must be 148 to 65535, or absent"],
        );
        refused(
            r#"{"Type":"wireguard","PersistentKeepaliveInterval":70000}"#,
            false,
            expect!["network config: Backend.PersistentKeepaliveInterval: 70000 is out of range: it must be 0 (off) to 65535 seconds"],
        );
        refused(
            r#"{"Type":"wireguard","PersistentKeepaliveInterval":"25"}"#,
            false,
            expect![[r#"network config: Backend.PersistentKeepaliveInterval: invalid type: string "25", expected i64 at line 1 column 4"#]],
        );
        refused(
            r#"{"Type":"wireguard","Mode":"both"}"#,
            false,
            expect![[r#"network config: Backend.Mode: "both" is unknown: set "separate", "auto", "ipv4" or "ipv6""#]],
        );
        refused(
            r#"{"Type":"wireguard","Mode":"ipv6"}"#,
            false,
            expect![[
                r#"network config: Backend.Mode: "ipv6" sends packets by IPv6, which the network config does not enable: set "separate" or "auto""#
            ]],
        );
        refused(
            r#"{"Type":"wireguard","PSK":"hunter2"}"#,
            false,
            expect![
                "network config: Backend.PSK: it is not base64 (the standard alphabet, with padding): set the output of `wg genpsk`, or remove the field"
            ],
        );
        refused(
            r#"{"Type":"wireguard","ListenPortV6":51820}"#,
            true,
            expect![
                "network config: Backend.ListenPortV6: 51820 is ListenPort as well, but each of the two devices needs a port: set another one"
            ],
        );
    }
}
