mod hostile;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;

use boringtun::x25519;
use flannel::wireguard::Secret;

use super::super::peer::{BETWEEN_INITIATIONS, OVERHEAD};
use super::*;

/// A host without devices: what it sends is kept until [`Host::send_to`], what it receives in `delivered`.
struct Host {
    number: u8,
    engine: Engine,
    address: SocketAddr,
    sent: RefCell<VecDeque<(Vec<u8>, SocketAddr)>>,
    delivered: RefCell<Vec<Vec<u8>>>,
    now: Instant,
}

fn key(number: u8) -> PrivateKey {
    PrivateKey::from_random([number; 32])
}

impl Host {
    fn new(number: u8) -> Host {
        Host {
            number,
            engine: Engine::new(&key(number), 1420),
            address: format!("192.0.2.{number}:51820").parse().unwrap(),
            sent: RefCell::default(),
            delivered: RefCell::default(),
            now: Instant::now(),
        }
    }

    /// The settings that other hosts have for this one: its pods are in 10.1.NUMBER.0/24 and fd00:NUMBER::/64.
    fn config(&self) -> PeerConfig {
        let number = self.number;
        PeerConfig {
            public_key: self.engine.public_key(),
            psk: None,
            endpoint: Some(self.address),
            allowed: vec![format!("10.1.{number}.0/24").parse().unwrap(), format!("fd00:{number}::/64").parse().unwrap()],
            keepalive: 0,
        }
    }

    fn pod(&self) -> IpAddr {
        IpAddr::from([10, 1, self.number, 2])
    }

    fn seal(&self, packet: &[u8]) {
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len() + 16, 0xff);
        let mut sealed = vec![vec![0; packet.len() + OVERHEAD]];
        let packets = &mut [Packet { buffer: &mut buffer, length: packet.len() }];
        for (at, length, to) in self.engine.seal(packets, &mut sealed, self.now) {
            self.sent.borrow_mut().push_back((sealed[at][..length].to_vec(), to.remote));
        }
    }

    fn open(&self, datagram: &[u8], from: SocketAddr) {
        let mut scratch = vec![0; LARGEST + OVERHEAD];
        let send = |datagram: &[u8], to: Endpoint| self.sent.borrow_mut().push_back((datagram.to_vec(), to.remote));
        if let Some(packet) = self.engine.open(datagram, Endpoint::new(from, None), self.now, &mut scratch, &send) {
            self.delivered.borrow_mut().push(packet.to_vec());
        }
    }

    fn tick(&self) {
        let mut scratch = vec![0; LARGEST + OVERHEAD];
        let send = |datagram: &[u8], to: Endpoint| self.sent.borrow_mut().push_back((datagram.to_vec(), to.remote));
        self.engine.tick(self.now, &mut scratch, &send);
    }

    fn take(&self) -> Vec<Vec<u8>> {
        self.delivered.take()
    }

    fn status(&self, of: &Host) -> PeerStatus {
        self.engine.peers().into_iter().find(|peer| peer.config.public_key == of.engine.public_key()).unwrap()
    }

    /// The kinds of the datagrams that wait to be sent (their first byte), which are thrown away.
    fn discard(&self) -> Vec<u8> {
        self.sent.take().iter().map(|(datagram, _)| datagram[0]).collect()
    }
}

/// Carries datagrams between two hosts until both are silent, and returns their kinds.
fn exchange(a: &Host, b: &Host) -> Vec<u8> {
    let mut kinds = Vec::new();
    loop {
        let (from_a, from_b) = (a.sent.take(), b.sent.take());
        if from_a.is_empty() && from_b.is_empty() {
            return kinds;
        }
        for (from, to, datagrams) in [(a, b, from_a), (b, a, from_b)] {
            for (datagram, address) in datagrams {
                kinds.push(datagram[0]);
                assert_eq!(address, to.address, "the only other host");
                to.open(&datagram, from.address);
            }
        }
    }
}

fn pair() -> (Host, Host) {
    let (a, b) = (Host::new(1), Host::new(2));
    a.engine.set_peer(&b.config(), true).unwrap();
    b.engine.set_peer(&a.config(), true).unwrap();
    (a, b)
}

fn packet(source: IpAddr, destination: IpAddr, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).unwrap();
    let mut packet = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
            header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
            header[4..6].copy_from_slice(&length.to_be_bytes());
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        _ => panic!("both addresses are of one family"),
    };
    packet.extend(data);
    packet
}

fn between(a: &Host, b: &Host, data: &[u8]) -> Vec<u8> {
    packet(a.pod(), b.pod(), data)
}

#[test]
fn packets_wait_for_the_handshake_and_arrive_in_order() {
    let (a, b) = pair();
    let packets: Vec<Vec<u8>> = (0..10).map(|i| between(&a, &b, &[i; 100])).collect();
    for packet in &packets {
        a.seal(packet);
    }
    let v6 = packet("fd00:1::9".parse().unwrap(), "fd00:2::9".parse().unwrap(), b"six");
    a.seal(&v6);
    assert_eq!(exchange(&a, &b)[..3], [1, 2, 4], "one handshake, for all packets");
    assert_eq!(b.take(), [packets, vec![v6]].concat());
    b.seal(&between(&b, &a, b"back"));
    assert_eq!(exchange(&a, &b), [4], "in the same session");
    assert_eq!(a.take(), [between(&b, &a, b"back")]);
    let (at_a, at_b) = (a.status(&b), b.status(&a));
    assert!(at_a.handshake.is_some() && at_b.handshake.is_some());
    assert_eq!((at_a.sent, at_a.received), (at_b.received, at_b.sent));
}

#[test]
fn handshakes_that_cross_still_deliver_all_packets() {
    let (a, b) = pair();
    for i in 0..5 {
        a.seal(&between(&a, &b, &[i; 10]));
        b.seal(&between(&b, &a, &[i; 10]));
    }
    exchange(&a, &b);
    assert_eq!(b.take(), (0..5).map(|i| between(&a, &b, &[i; 10])).collect::<Vec<_>>());
    assert_eq!(a.take(), (0..5).map(|i| between(&b, &a, &[i; 10])).collect::<Vec<_>>());
}

#[test]
fn lost_handshake_is_repeated_after_five_seconds() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"patient"));
    assert_eq!(a.discard(), [1], "lost");
    let start = Instant::now();
    while a.sent.borrow().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "nothing is repeated");
        std::thread::sleep(Duration::from_millis(50));
        a.tick();
        a.seal(&between(&a, &b, b"more"));
        a.sent.borrow_mut().retain(|(datagram, _)| datagram[0] == 1);
    }
    assert!(start.elapsed() > Duration::from_millis(4900), "{:?}", start.elapsed());
    exchange(&a, &b);
    assert_eq!(b.take()[..2], [between(&a, &b, b"patient"), between(&a, &b, b"more")]);
}

#[test]
fn queue_keeps_the_newest_packets() {
    let (a, b) = pair();
    for i in 0..300_u16 {
        a.seal(&between(&a, &b, &i.to_be_bytes()));
    }
    exchange(&a, &b);
    assert_eq!(b.take(), (44..300_u16).map(|i| between(&a, &b, &i.to_be_bytes())).collect::<Vec<_>>());
}

#[test]
fn packet_whose_source_is_not_the_peers_is_dropped() {
    let (a, b) = pair();
    b.engine.set_peer(&Host::new(3).config(), true).unwrap();
    a.seal(&between(&a, &b, b"good"));
    for source in ["10.1.2.9", "10.1.3.2", "192.0.2.1", "0.0.0.0"] {
        a.seal(&packet(source.parse().unwrap(), b.pod(), b"bad"));
    }
    a.seal(&packet("fd00:3::1".parse().unwrap(), "fd00:2::1".parse().unwrap(), b"bad"));
    exchange(&a, &b);
    assert_eq!(b.take(), [between(&a, &b, b"good")]);
}

#[test]
fn packet_without_peer_or_endpoint_is_dropped() {
    let (a, b) = pair();
    a.seal(&packet(a.pod(), "10.9.9.9".parse().unwrap(), b"no peer"));
    a.seal(&[]);
    a.seal(&[0x45, 0]);
    a.seal(&[0x60; 39]);
    let c = Host::new(3);
    a.engine.set_peer(&PeerConfig { endpoint: None, ..c.config() }, true).unwrap();
    a.seal(&between(&a, &c, b"where?"));
    a.tick();
    assert_eq!(a.discard(), [1], "the greeting of the peer with an endpoint");
    assert_eq!(exchange(&a, &b), [0; 0]);
}

#[test]
fn longest_prefix_wins_and_a_subnet_moves_to_the_peer_set_last() {
    let (a, b) = pair();
    let c = Host::new(3);
    let mut config = c.config();
    config.allowed = vec!["10.1.2.128/25".parse().unwrap(), "fd00:2::/64".parse().unwrap()];
    a.engine.set_peer(&config, true).unwrap();
    let target = |address: &str| {
        let family = if address.contains(':') { "fd00:1::1" } else { "10.1.1.1" };
        a.seal(&packet(family.parse().unwrap(), address.parse().unwrap(), b"x"));
        a.sent.borrow_mut().pop_back().map(|(_, to)| to)
    };
    let first = [target("10.1.2.127"), target("10.1.2.128")];
    assert_eq!(first, [Some(b.address), Some(c.address)]);
    let allowed = |host| a.status(host).config.allowed.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(allowed(&b), ["10.1.2.0/24"]);
    assert_eq!(allowed(&c), ["10.1.2.128/25", "fd00:2::/64"]);
    // What moved away is not removed with its former owner.
    assert!(a.engine.remove_peer(&b.engine.public_key()));
    a.engine.set_peer(&b.config(), true).unwrap();
    assert_eq!(allowed(&c), ["10.1.2.128/25"]);
    a.engine.remove_peer(&b.engine.public_key());
    assert_eq!(target("10.1.2.127"), None);
    assert!(!a.engine.remove_peer(&b.engine.public_key()));
    // A subnet that is left out is routed no more.
    a.engine.set_peer(&PeerConfig { allowed: Vec::new(), ..config }, true).unwrap();
    assert_eq!((target("10.1.2.128"), allowed(&c)), (None, vec![]));
}

#[test]
fn single_subnets_are_given_and_taken() {
    let (a, b) = pair();
    let c = Host::new(3);
    a.engine.set_peer(&PeerConfig { allowed: Vec::new(), ..c.config() }, true).unwrap();
    let allowed = |host| a.status(host).config.allowed.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (subnet, v6) = ("10.1.2.0/24".parse().unwrap(), "fd00:2::/64".parse().unwrap());
    assert!(a.engine.allow(&c.engine.public_key(), subnet));
    assert_eq!((allowed(&b), allowed(&c)), (vec!["fd00:2::/64".to_owned()], vec!["10.1.2.0/24".to_owned()]));
    a.engine.set_peer(&PeerConfig { allowed: Vec::new(), keepalive: 9, ..c.config() }, false).unwrap();
    assert_eq!((allowed(&c), a.status(&c).config.keepalive), (vec!["10.1.2.0/24".to_owned()], 9));
    a.engine.forbid(subnet);
    a.engine.forbid(subnet);
    a.engine.forbid(v6);
    assert_eq!((allowed(&b), allowed(&c)), (vec![], vec![]));
    assert!(!a.engine.allow(&key(4).public(), subnet), "there is no such peer");
    a.seal(&between(&a, &b, b"x"));
    assert_eq!(a.discard(), [0; 0]);
}

#[test]
fn session_outlives_several_changes_of_keys() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    for byte in 1..10 {
        a.engine.set_peer(&PeerConfig { psk: Some(Secret::new([byte; 32])), ..b.config() }, true).unwrap();
        // The timer makes the session in which a handshake is begun.
        a.tick();
        a.discard();
        a.seal(&between(&a, &b, b"two"));
        b.seal(&between(&b, &a, b"three"));
        assert_eq!(exchange(&a, &b), [4, 4]);
    }
    assert_eq!((a.take().len(), b.take().len()), (9, 10));
    let table = a.engine.table.read().unwrap();
    assert_eq!((table.by_index.len(), table.peers.values().map(|entry| entry.indexes.len()).sum()), (2, 2), "numbers are not used up");
    drop(table);
    a.engine.remove_peer(&b.engine.public_key());
    assert!(a.engine.table.read().unwrap().by_index.is_empty());
}

#[test]
fn session_that_only_the_peer_uses_outlives_a_change_of_keys() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"one"));
    let (initiation, _) = a.sent.borrow_mut().pop_back().unwrap();
    b.open(&initiation, a.address);
    b.engine.set_peer(&PeerConfig { psk: Some(Secret::new([1; 32])), ..a.config() }, true).unwrap();
    assert_eq!(exchange(&a, &b)[..2], [2, 4]);
    assert_eq!(b.take(), [between(&a, &b, b"one")]);
}

#[test]
fn changed_private_key_is_used_without_a_lost_packet() {
    let (a, mut b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    let new = Host::new(9);
    a.engine.set_peer(&new.config(), true).unwrap();
    a.engine.set_key(&key(9), a.now);
    assert_eq!(a.engine.public_key(), key(9).public());
    assert_eq!(a.engine.peers().len(), 1, "it is no peer of itself");
    // Until the other host knows the key, the session goes on.
    a.tick();
    a.seal(&between(&a, &b, b"two"));
    b.seal(&between(&b, &a, b"three"));
    exchange(&a, &b);
    assert_eq!((a.take().len(), b.take().len()), (1, 2));
    b.engine.set_peer(&a.config(), true).unwrap();
    b.engine.remove_peer(&key(1).public());
    b.now += BETWEEN_INITIATIONS;
    b.seal(&between(&b, &a, b"four"));
    exchange(&a, &b);
    a.seal(&between(&a, &b, b"five"));
    exchange(&a, &b);
    assert_eq!((a.take(), b.take()), (vec![between(&b, &a, b"four")], vec![between(&a, &b, b"five")]));
}

#[test]
fn removed_peer_neither_sends_nor_receives() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    b.take();
    b.engine.remove_peer(&a.engine.public_key());
    a.seal(&between(&a, &b, b"two"));
    b.seal(&between(&b, &a, b"three"));
    assert_eq!(exchange(&a, &b), [4]);
    assert_eq!((a.take(), b.take(), b.engine.peers()), (vec![], vec![], vec![]));
    // Nor can it begin a handshake.
    let again = Host::new(1);
    again.engine.set_peer(&b.config(), true).unwrap();
    again.seal(&between(&again, &b, b"four"));
    assert_eq!(exchange(&again, &b), [1]);
}

#[test]
fn endpoint_follows_authenticated_datagrams_only() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    let elsewhere = "[2001:db8::66]:4000".parse().unwrap();
    a.seal(&between(&a, &b, b"two"));
    let (genuine, _) = a.sent.borrow_mut().pop_back().unwrap();
    for at in 0..genuine.len() {
        let mut forged = genuine.clone();
        forged[at] ^= 1;
        b.open(&forged, elsewhere);
    }
    assert_eq!(b.status(&a).config.endpoint, Some(a.address));
    b.open(&genuine, elsewhere);
    assert_eq!(b.status(&a).config.endpoint, Some(elsewhere));
    b.open(&genuine, "192.0.2.99:1".parse().unwrap());
    assert_eq!(b.status(&a).config.endpoint, Some(elsewhere), "a replay is no proof");
    b.seal(&between(&b, &a, b"three"));
    assert_eq!(b.sent.take()[0].1, elsewhere);
    assert_eq!(b.take().len(), 2);
    // The settings win again when they are set, and mapped addresses are IPv4.
    b.engine.set_peer(&PeerConfig { endpoint: Some("[::ffff:192.0.2.1]:51820".parse().unwrap()), ..a.config() }, true).unwrap();
    assert_eq!(b.status(&a).config.endpoint, Some(a.address));
    b.engine.set_peer(&PeerConfig { endpoint: None, ..a.config() }, true).unwrap();
    assert_eq!(b.status(&a).config.endpoint, Some(a.address));
}

#[test]
fn changed_settings_keep_the_session() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    let mut config = b.config();
    config.allowed.push("10.2.0.0/16".parse().unwrap());
    config.keepalive = 25;
    a.engine.set_peer(&config, true).unwrap();
    assert_eq!(a.status(&b).config, PeerConfig { allowed: a.status(&b).config.allowed, ..config });
    b.take();
    a.seal(&between(&a, &b, b"two"));
    assert_eq!(exchange(&a, &b), [4]);
    assert_eq!(b.take(), [between(&a, &b, b"two")]);
}

#[test]
fn changed_psk_is_used_without_a_lost_packet() {
    let (a, mut b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    let psk = Some(Secret::new([9; 32]));
    a.engine.set_peer(&PeerConfig { psk: psk.clone(), ..b.config() }, true).unwrap();
    // Until the other host has it, the session goes on, although handshakes fail.
    a.tick();
    a.seal(&between(&a, &b, b"two"));
    b.seal(&between(&b, &a, b"three"));
    exchange(&a, &b);
    assert_eq!((a.take().len(), b.take().len()), (1, 2));
    b.engine.set_peer(&PeerConfig { psk, ..a.config() }, true).unwrap();
    b.seal(&between(&b, &a, b"four"));
    b.tick();
    assert_eq!(b.sent.borrow()[1].0[0], 1, "the next handshake begins at once");
    exchange(&a, &b);
    a.seal(&between(&a, &b, b"five"));
    exchange(&a, &b);
    assert_eq!((a.take(), b.take()), (vec![between(&b, &a, b"four")], vec![between(&a, &b, b"five")]));
    // Both use the new one: a host that knows only the former cannot.
    b.now += BETWEEN_INITIATIONS;
    let former = Host::new(1);
    former.engine.set_peer(&b.config(), true).unwrap();
    former.seal(&between(&former, &b, b"six"));
    assert_eq!(exchange(&former, &b), [1, 2]);
    assert_eq!(b.take(), Vec::<Vec<u8>>::new());
}

#[test]
fn restarted_host_is_reached_again_without_traffic_of_its_own() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"one"));
    exchange(&a, &b);
    b.take();
    let b = Host::new(2);
    b.engine.set_peer(&a.config(), true).unwrap();
    a.seal(&between(&a, &b, b"lost"));
    b.tick();
    exchange(&a, &b);
    a.seal(&between(&a, &b, b"two"));
    exchange(&a, &b);
    assert_eq!(b.take(), [between(&a, &b, b"two")]);
}

#[test]
fn keepalive_is_sent_in_silence() {
    let (mut a, b) = pair();
    a.engine.set_peer(&PeerConfig { keepalive: 25, ..b.config() }, true).unwrap();
    a.tick();
    assert_eq!(exchange(&a, &b), [1, 2, 4], "the first handshake needs no packet");
    let start = a.now;
    let sent_after = |a: &mut Host, seconds| {
        a.now = start + Duration::from_secs(seconds);
        a.tick();
        exchange(a, &b)
    };
    assert_eq!(sent_after(&mut a, 24), [0; 0]);
    assert_eq!(sent_after(&mut a, 25), [4]);
    assert_eq!(sent_after(&mut a, 49), [0; 0]);
    assert_eq!(sent_after(&mut a, 50), [4]);
    assert_eq!(b.take(), Vec::<Vec<u8>>::new());
}

#[test]
fn timer_starts_a_limited_number_of_handshakes() {
    let a = Host::new(1);
    for number in 10..=250 {
        a.engine.set_peer(&Host::new(number).config(), true).unwrap();
    }
    a.tick();
    assert_eq!(a.discard().len(), usize::try_from(STARTS).unwrap());
    a.tick();
    assert_eq!(a.discard().len(), usize::try_from(STARTS).unwrap(), "others");
}

#[test]
fn own_key_is_refused() {
    let a = Host::new(1);
    let error = a.engine.set_peer(&a.config(), true).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot add WireGuard peer {}: this is the device's own key", key(1).public()));
}

#[test]
fn length_is_padded_within_the_mtu() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b""));
    exchange(&a, &b);
    let length = |data: usize| {
        a.seal(&between(&a, &b, &vec![0xee; data]));
        a.sent.borrow_mut().pop_back().unwrap().0.len() - 32
    };
    assert_eq!([length(0), length(12), length(13), length(1390), length(1400)], [32, 32, 48, 1420, 1420]);
    a.engine.set_mtu(0);
    assert_eq!(length(13), 33);
    a.engine.set_mtu(u32::MAX);
    assert_eq!(length(65_515), 65_535);
}
