//! The udp backend: the daemon itself carries packets, each as the payload of one UDP datagram (specification, section 5.3). This
//! file decides what happens to a packet; the kernel crate owns the device and the socket.

use std::net::{IpAddr, Ipv4Addr};

use super::{Admitted, Context, Driver, Local, Part, Refusal, each_family, needs_ipv4};
use crate::config::{Config, ConfigError, port};
use crate::json::Fields;
use crate::lease::{LeaseKey, Peer};
use crate::net::{Cidr, Family, IfName, Mac, PerFamily, PrefixMap, Subnet, Vni};
use crate::node::Node;
use crate::object::{Addr, Forward, Link, LinkKind, Object, ROUTE_PROTOCOL, Route};
use crate::probe::Point;

/// The bytes that the outer IPv4 (20) and UDP (8) headers add to a packet.
const OVERHEAD: u32 = 28;
/// The default UDP port.
const PORT: u16 = 8285;

/// The udp backend with its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Udp {
    /// The UDP port of every host.
    port: u16,
}

impl Default for Udp {
    fn default() -> Udp {
        Udp { port: PORT }
    }
}

/// The device name: the first that upstream's template `flannel%d` yields.
fn device_name() -> IfName {
    "flannel0".parse().expect("the name has 8 bytes and no special characters")
}

impl Udp {
    pub(super) fn parse(section: &Fields<'_>) -> Result<Udp, ConfigError> {
        Ok(Udp { port: port(section, PORT)? })
    }
}

impl Driver for Udp {
    fn name(&self) -> &'static str {
        "udp"
    }

    fn published_type(&self) -> &'static str {
        ""
    }

    fn published_addresses(&self, node: &Node) -> PerFamily<IpAddr> {
        PerFamily { v6: None, ..node.public }
    }

    fn published_data(&self, _: Local<'_>) -> PerFamily<Box<str>> {
        PerFamily::default()
    }

    fn annotates(&self, family: Family, _: &Peer) -> bool {
        family == Family::V4
    }

    /// Leases of this backend state no type, and upstream does not check it.
    fn accepts_type(&self, _: &str) -> bool {
        true
    }

    fn mtu(&self, local: Local<'_>) -> u32 {
        local.node.mtu.saturating_sub(OVERHEAD)
    }

    fn check_config(&self, config: &Config) -> Result<(), ConfigError> {
        needs_ipv4(config, "udp, also the default without Backend, carries IPv4 only: use vxlan or host-gw")
    }

    fn tunnel(&self) -> (Option<Vni>, Option<u16>) {
        (None, Some(self.port))
    }

    fn probe_point(&self) -> Option<Point> {
        Some(Point::Device)
    }

    fn node_objects(&self, context: Context<'_>) -> Vec<Object> {
        let Local { config, node, .. } = context.local;
        let (Some(local), Some(own), Some(network)) = (node.addrs.v4, context.own.subnets().v4, config.network(Family::V4)) else {
            return Vec::new();
        };
        let (link, port) = (device_name(), self.port);
        let device = Link { name: link, kind: LinkKind::Udp { local, port }, mac: Mac([0; 6]), mtu: self.mtu(context.local), up: true };
        vec![
            Object::Link(Box::new(device)),
            Object::Addr(Addr { link, cidr: Cidr { addr: own.network(), len: 32 } }),
            // Which packets of peers are for this host.
            Object::Forward(Forward { dst: own, host: local }),
            Object::Route(Route { dst: network, metric: 0, via: None, dev: link, onlink: false, protocol: ROUTE_PROTOCOL }),
        ]
    }

    fn device(&self, _: Family) -> Option<IfName> {
        Some(device_name())
    }

    fn peer_part(&self, context: Context<'_>, key: &LeaseKey, peer: &Peer) -> Part {
        each_family(context, key, peer, |Admitted { subnet, public, .. }| match public {
            IpAddr::V4(_) => Ok(vec![Object::Forward(Forward { dst: subnet, host: public })]),
            IpAddr::V6(_) => Err(Refusal::OnlyIpv4(self.name())),
        })
    }
}

/// The forwarding table. The longest prefix wins: a hostile lease may lie within another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table(PrefixMap<Ipv4Addr>);

impl Table {
    /// Forwards packets for `subnet` to `host`.
    pub fn insert(&mut self, subnet: Subnet, host: Ipv4Addr) {
        self.0.insert(subnet, host);
    }

    /// Stops forwarding packets for `subnet`.
    pub fn remove(&mut self, subnet: Subnet) {
        self.0.remove(subnet);
    }

    /// The host that packets for an address are forwarded to.
    pub fn host(&self, ip: Ipv4Addr) -> Option<Ipv4Addr> {
        self.0.find(IpAddr::V4(ip)).copied()
    }

    /// Whether packets for any subnet are forwarded to this host. Only asked for packets that are dropped.
    fn is_host(&self, host: Ipv4Addr) -> bool {
        self.0.iter().any(|(_, known)| *known == host)
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = (Subnet, Ipv4Addr)> {
        self.0.iter().map(|(subnet, host)| (subnet, *host))
    }
}

/// The decision on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Send the modified packet to this host.
    Send(Ipv4Addr),
    /// Pass the modified packet to this host's kernel.
    Deliver,
    /// Send this ICMP error back instead.
    Answer(Vec<u8>),
    /// Drop it.
    Drop(DropReason),
}

/// Why a packet is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// It is not one complete IPv4 packet.
    Malformed,
    /// Its time to live has expired.
    Expired,
    /// No peer has its destination, and it is of a kind that is not answered.
    NoRoute,
    /// It was not sent from the published address of a peer.
    UnknownSender,
    /// Its source is not in the subnet of the peer that sent it.
    ForeignSource,
    /// Its destination is not in this host's subnet.
    ForeignDestination,
}

impl DropReason {
    /// All reasons.
    pub const ALL: [DropReason; 6] = [
        DropReason::Malformed,
        DropReason::Expired,
        DropReason::NoRoute,
        DropReason::UnknownSender,
        DropReason::ForeignSource,
        DropReason::ForeignDestination,
    ];

    /// Its name, for machines.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::Malformed => "malformed",
            DropReason::Expired => "expired",
            DropReason::NoRoute => "no-route",
            DropReason::UnknownSender => "unknown-sender",
            DropReason::ForeignSource => "foreign-source",
            DropReason::ForeignDestination => "foreign-destination",
        }
    }
}

/// Handles a packet that a pod of this host sent. Decrements its TTL in place. `local` is this host's address, to which the table
/// assigns its own subnet, `own` its address on the device.
pub fn outbound(packet: &mut [u8], table: &Table, local: Ipv4Addr, own: Ipv4Addr) -> Verdict {
    let Some(destination) = header(packet).map(|packet| address(packet, 16)) else { return Verdict::Drop(DropReason::Malformed) };
    // A packet for a pod of this host comes here only while the pods' bridge is missing.
    match table.host(destination).filter(|host| *host != local) {
        None => unreachable(packet, own).map_or(Verdict::Drop(DropReason::NoRoute), Verdict::Answer),
        Some(host) if lower_ttl(packet) => Verdict::Send(host),
        Some(_) => Verdict::Drop(DropReason::Expired),
    }
}

/// Handles a packet that another host sent from the address `sender`. Decrements its TTL in place. Every host that reaches the port can send
/// packets: only those pass that a peer sends for its pods to pods of this host.
pub fn inbound(packet: &mut [u8], sender: Ipv4Addr, table: &Table, local: Ipv4Addr) -> Verdict {
    let addresses = header(packet).map(|packet| (address(packet, 12), address(packet, 16)));
    let Some((source, destination)) = addresses else { return Verdict::Drop(DropReason::Malformed) };
    match table.host(source).filter(|host| *host != local) {
        Some(host) if host == sender => {}
        _ if sender != local && table.is_host(sender) => return Verdict::Drop(DropReason::ForeignSource),
        _ => return Verdict::Drop(DropReason::UnknownSender),
    }
    match table.host(destination) == Some(local) {
        true if lower_ttl(packet) => Verdict::Deliver,
        true => Verdict::Drop(DropReason::Expired),
        false => Verdict::Drop(DropReason::ForeignDestination),
    }
}

/// The packet, if it is a complete IPv4 packet (RFC 791).
fn header(packet: &[u8]) -> Option<&[u8]> {
    let length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    let version = *packet.first()?;
    let whole = version >> 4 == 4 && header_len(version) >= 20 && header_len(version) <= length && length == packet.len();
    whole.then_some(packet)
}

fn header_len(first: u8) -> usize {
    usize::from(first & 0xf) * 4
}

fn address(packet: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3])
}

/// Decrements the TTL and updates the checksum (RFC 1624); returns false if the TTL expires.
fn lower_ttl(packet: &mut [u8]) -> bool {
    if packet[8] <= 1 {
        return false;
    }
    let before = u16::from_be_bytes([packet[8], packet[9]]);
    packet[8] -= 1;
    let after = u16::from_be_bytes([packet[8], packet[9]]);
    let sum = u32::from(!u16::from_be_bytes([packet[10], packet[11]])) + u32::from(!before) + u32::from(after);
    packet[10..12].copy_from_slice(&(!fold(sum)).to_be_bytes());
    true
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    (!fold(words.fold(0, |sum, word| u32::from(fold(sum + word))))).to_be_bytes()
}

/// Makes a "network unreachable" message about a packet (RFC 792); `None` for an ICMP message or a non-first fragment.
fn unreachable(packet: &[u8], own: Ipv4Addr) -> Option<Vec<u8>> {
    let first_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff == 0;
    if packet[9] == 1 || !first_fragment {
        return None;
    }
    let quoted = &packet[..(header_len(packet[0]) + 8).min(packet.len())];
    let length = u16::try_from(20 + 8 + quoted.len()).ok()?;
    let mut answer = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 8, 1, 0, 0];
    answer[2..4].copy_from_slice(&length.to_be_bytes());
    answer.extend(own.octets());
    answer.extend(&packet[12..16]);
    let sum = checksum(&answer);
    answer[10..12].copy_from_slice(&sum);
    let mut icmp = vec![3, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(quoted);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    answer.extend(icmp);
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tests::check;
    use expect_test::expect;

    #[test]
    fn one_device_and_one_entry_per_peer() {
        check(
            r#"{"Type":"udp"}"#,
            &[
                ("10.244.2.0-24", r#"{"PublicIP":"192.0.2.2","PublicIPv6":null}"#),
                ("10.244.3.0-24&fc00:0:0:3::-64", r#"{"PublicIP":"192.0.2.3","PublicIPv6":"2001:db8::3"}"#),
            ],
            expect![[r#"
                publishes {"PublicIP":"192.0.2.1","PublicIPv6":null}
                mtu 1472
                link flannel0 00:00:00:00:00:00 mtu 1472 up udp 192.0.2.1:8285
                addr 10.244.1.0/32 dev flannel0
                forward 10.244.1.0/24 to 192.0.2.1
                route 10.244.0.0/16 dev flannel0 metric 0
                10.244.2.0-24:
                  forward 10.244.2.0/24 to 192.0.2.2
                10.244.3.0-24&fc00:0:0:3::-64:
                  forward 10.244.3.0/24 to 192.0.2.3
                  refused: udp carries IPv4 only
            "#]],
        );
    }

    fn packet(destination: [u8; 4], ttl: u8, protocol: u8) -> Vec<u8> {
        packet_from([10, 244, 1, 2], destination, ttl, protocol)
    }

    fn packet_from(source: [u8; 4], destination: [u8; 4], ttl: u8, protocol: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 30, 0, 1, 0, 0, ttl, protocol, 0, 0];
        packet.extend(source);
        packet.extend(destination);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum);
        packet.extend([7; 10]);
        packet
    }

    fn table() -> Table {
        let mut table = Table::default();
        table.insert("10.244.1.0/24".parse().unwrap(), LOCAL);
        table.insert("10.244.2.0/24".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 2));
        table.insert("10.244.3.0/24".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 3));
        table
    }

    const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const OWN: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 0);

    fn send(packet: &mut [u8]) -> Verdict {
        outbound(packet, &table(), LOCAL, OWN)
    }

    /// What happens to a packet that host 192.0.2.`sender` sends.
    fn receive(packet: &mut [u8], sender: u8) -> Verdict {
        inbound(packet, Ipv4Addr::new(192, 0, 2, sender), &table(), LOCAL)
    }

    #[test]
    fn packets_go_to_the_host_of_their_subnet_with_valid_checksum() {
        let mut one = packet([10, 244, 3, 9], 64, 17);
        assert_eq!(send(&mut one), Verdict::Send(Ipv4Addr::new(192, 0, 2, 3)));
        assert_eq!((one[8], checksum(&one[..20])), (63, [0, 0]));
        for ttl in 2..=255 {
            let mut one = packet_from([10, 244, 2, 9], [10, 244, 1, 1], ttl, 6);
            assert_eq!(receive(&mut one, 2), Verdict::Deliver);
            assert_eq!((one[8], checksum(&one[..20])), (ttl - 1, [0, 0]), "{ttl}");
        }
        assert_eq!(receive(&mut packet_from([10, 244, 2, 9], [10, 244, 1, 1], 1, 6), 2), Verdict::Drop(DropReason::Expired));
        assert_eq!(send(&mut packet([10, 244, 2, 1], 0, 6)), Verdict::Drop(DropReason::Expired));
    }

    #[test]
    fn only_peers_pods_reach_own_pods() {
        let receive = |source, destination, sender| match receive(&mut packet_from(source, destination, 64, 17), sender) {
            Verdict::Deliver => "delivered",
            Verdict::Drop(reason) => reason.name(),
            other => panic!("{other:?}"),
        };
        let (theirs, other, ours, node) = ([10, 244, 2, 9], [10, 244, 3, 9], [10, 244, 1, 9], [192, 0, 2, 1]);
        assert_eq!(receive(theirs, ours, 2), "delivered");
        assert_eq!(receive([10, 244, 2, 0], ours, 2), "delivered", "the peer itself");
        for sender in [1, 9, 66] {
            assert_eq!(receive(theirs, ours, sender), "unknown-sender", "{sender}");
        }
        for source in [other, ours, [8, 8, 8, 8], [10, 244, 9, 9], node, [127, 0, 0, 1], [0; 4]] {
            assert_eq!(receive(source, ours, 2), "foreign-source", "{source:?}");
        }
        assert_eq!(receive(ours, ours, 1), "unknown-sender", "this host is no peer of itself");
        for destination in [other, [10, 244, 9, 9], [8, 8, 8, 8], node, [127, 0, 0, 1], [224, 0, 0, 1], [255; 4]] {
            assert_eq!(receive(theirs, destination, 2), "foreign-destination", "{destination:?}");
        }
        assert_eq!(
            inbound(&mut packet_from(theirs, ours, 64, 17), LOCAL, &Table::default(), LOCAL),
            Verdict::Drop(DropReason::UnknownSender)
        );
    }

    #[test]
    fn packet_for_own_subnet_is_not_sent_to_own_host() {
        assert!(matches!(send(&mut packet([10, 244, 1, 9], 64, 17)), Verdict::Answer(_)));
    }

    #[test]
    fn longest_prefix_wins() {
        let mut table = table();
        table.insert("10.244.2.128/28".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 9));
        table.insert("10.244.2.0/25".parse().unwrap(), Ipv4Addr::new(192, 0, 2, 8));
        let host = |table: &Table, last| table.host(Ipv4Addr::new(10, 244, 2, last)).map(|ip| ip.octets()[3]);
        assert_eq!([1, 130, 200].map(|last| host(&table, last)), [Some(8), Some(9), Some(2)]);
        table.remove("10.244.2.0/25".parse().unwrap());
        assert_eq!([1, 130, 200].map(|last| host(&table, last)), [Some(2), Some(9), Some(2)]);
        assert_eq!(table.iter().count(), 4);
    }

    #[test]
    fn unroutable_packet_is_answered_unless_icmp_or_fragment() {
        let Verdict::Answer(answer) = send(&mut packet([10, 244, 9, 9], 64, 17)) else { panic!("expected an ICMP answer") };
        assert_eq!((checksum(&answer[..20]), checksum(&answer[20..])), ([0, 0], [0, 0]));
        assert_eq!((address(&answer, 12), address(&answer, 16), answer[20], answer.len()), (OWN, Ipv4Addr::new(10, 244, 1, 2), 3, 56));
        assert_eq!(send(&mut packet([10, 244, 9, 9], 64, 1)), Verdict::Drop(DropReason::NoRoute));
        let mut fragment = packet([10, 244, 9, 9], 64, 17);
        fragment[7] = 9;
        assert_eq!(send(&mut fragment), Verdict::Drop(DropReason::NoRoute));
    }

    #[test]
    fn malformed_packets_are_dropped() {
        let good = packet_from([10, 244, 2, 9], [10, 244, 1, 1], 64, 17);
        assert_eq!(receive(&mut good.clone(), 2), Verdict::Deliver);
        for cut in 0..good.len() {
            assert_eq!(receive(&mut good[..cut].to_vec(), 2), Verdict::Drop(DropReason::Malformed), "{cut}");
        }
        for (at, value) in [(0, 0x65), (0, 0x44), (0, 0x4f), (3, 31)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(receive(&mut bad, 2), Verdict::Drop(DropReason::Malformed));
        }
        assert_eq!(send(&mut []), Verdict::Drop(DropReason::Malformed));
    }
}
