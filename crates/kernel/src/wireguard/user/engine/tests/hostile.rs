//! Peers and strangers that send what no honest host does.

use proptest::prelude::*;

use super::*;

#[test]
fn host_under_load_asks_for_cookies_and_limits_each_address() {
    let (a, b) = pair();
    a.seal(&between(&a, &b, b"wanted"));
    let (initiation, _) = a.sent.borrow_mut().pop_back().unwrap();
    let flood: SocketAddr = "198.51.100.1:1".parse().unwrap();
    // A message without proof that its sender knows the key costs little and does not count.
    let mut forged = initiation.clone();
    forged[20] ^= 1;
    for _ in 0..2 * HANDSHAKES {
        b.open(&forged, flood);
    }
    assert_eq!(b.discard(), [0; 0]);
    for _ in 0..HANDSHAKES {
        b.open(&initiation, flood);
    }
    assert_eq!(b.discard(), [2], "replays are not answered");
    b.open(&initiation, flood);
    assert_eq!(b.discard(), [3], "a cookie");
    // The peer proves its address.
    b.open(&initiation, a.address);
    let (cookie, _) = b.sent.borrow_mut().pop_back().unwrap();
    a.open(&cookie, b.address);
    let source = "198.51.100.2".parse().unwrap();
    for _ in 0..HANDSHAKES {
        b.engine.admits("198.51.100.3".parse().unwrap(), b.now);
    }
    let admitted = (0..50).filter(|_| b.engine.admits(source, b.now)).count();
    assert_eq!(admitted, usize::try_from(HANDSHAKES_OF_SOURCE).unwrap());
    assert!(b.engine.admits(source, b.now + Duration::from_secs(1)), "a second later");
}

/// A peer of host 2 that is not bound by the rules of the engine.
fn hostile(b: &Host) -> Tunn {
    let private = x25519::StaticSecret::from(*key(1).bytes());
    let public = x25519::PublicKey::from(b.engine.public_key().0);
    Tunn::new(private, public, None, None, 1, None)
}

/// Lets a hostile peer establish a session.
fn establish(tunn: &mut Tunn, b: &Host, from: SocketAddr) {
    let mut buffer = vec![0; LARGEST + OVERHEAD];
    let TunnResult::WriteToNetwork(initiation) = tunn.format_handshake_initiation(&mut buffer, false) else { panic!() };
    b.open(initiation, from);
    let (response, _) = b.sent.borrow_mut().pop_back().unwrap();
    let TunnResult::WriteToNetwork(keepalive) = tunn.decapsulate(None, &response, &mut buffer) else { panic!() };
    b.open(keepalive, from);
}

#[test]
fn malformed_packet_of_a_peer_is_dropped() {
    let (a, b) = pair();
    let mut tunn = hostile(&b);
    establish(&mut tunn, &b, a.address);
    let good = between(&a, &b, b"good");
    let too_long = {
        let mut packet = good.clone();
        packet[2..4].copy_from_slice(&200_u16.to_be_bytes());
        packet
    };
    let mut buffer = vec![0; LARGEST + OVERHEAD];
    let cases: [&[u8]; 9] = [&[], &[0], &[0x45], &[0x45; 19], &[0x60; 39], &[0x50; 60], &good[..20], &too_long, &[0xff; 1500]];
    for case in cases {
        let TunnResult::WriteToNetwork(datagram) = tunn.encapsulate(case, &mut buffer) else { panic!() };
        b.open(datagram, a.address);
    }
    assert_eq!(b.take(), Vec::<Vec<u8>>::new());
    // The largest counters would overflow the library's arithmetic.
    let TunnResult::WriteToNetwork(datagram) = tunn.encapsulate(&good, &mut buffer) else { panic!() };
    for counter in [u64::MAX, LAST_COUNTER] {
        let mut datagram = datagram.to_vec();
        datagram[8..16].copy_from_slice(&counter.to_le_bytes());
        b.open(&datagram, a.address);
    }
    b.open(datagram, a.address);
    assert_eq!(b.take(), [good]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn foreign_bytes_neither_panic_nor_arrive(
        kind in 0_u8..6,
        random in proptest::collection::vec(any::<u8>(), 0..300),
        sized in proptest::sample::select(vec![32_usize, 64, 92, 148]),
        flip in (any::<proptest::sample::Index>(), 1_u8..),
        inner in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let (a, b) = pair();
        let mut tunn = hostile(&b);
        establish(&mut tunn, &b, a.address);
        b.open(&random, a.address);
        // A message of a valid size and kind, also with the number of a session that exists.
        let mut message = random.clone();
        message.resize(sized, 7);
        message[..4].copy_from_slice(&[kind, 0, 0, 0]);
        b.open(&message, a.address);
        let mut buffer = vec![0; LARGEST + OVERHEAD];
        let TunnResult::WriteToNetwork(genuine) = tunn.encapsulate(&inner, &mut buffer) else { panic!() };
        message.resize(message.len().max(12), 0);
        message[4..8].copy_from_slice(&genuine[4..8]);
        b.open(&message, a.address);
        message.copy_within(4..8, 8);
        b.open(&message, a.address);
        let mut changed = genuine.to_vec();
        let at = flip.0.index(changed.len());
        changed[at] ^= flip.1;
        b.open(&changed, a.address);
        let truncated = flip.0.index(genuine.len());
        b.open(&genuine[..truncated], a.address);
        prop_assert_eq!(b.take(), Vec::<Vec<u8>>::new());
        // Random bytes of a peer, as the content of a genuine message, arrive only from its own addresses.
        b.open(genuine, a.address);
        for packet in b.take() {
            prop_assert!(packet[12..15] == [10, 1, 1] || packet[8..16] == [0xfd, 0, 0, 1, 0, 0, 0, 0]);
        }
        // The session still works.
        let good = between(&a, &b, b"good");
        let TunnResult::WriteToNetwork(datagram) = tunn.encapsulate(&good, &mut buffer) else { panic!() };
        b.open(datagram, a.address);
        prop_assert_eq!(b.take(), vec![good]);
    }
}
