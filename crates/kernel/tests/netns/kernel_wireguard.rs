//! WireGuard devices as objects: of the kernel, where it has WireGuard, as in the VM, else of this process. Both behave alike.

use std::net::UdpSocket;
use std::time::Instant;

use flannel::object::{Addr, AllowedIp, Key, Link, LinkKind, Object, WgPeer};
use flannel::scope::Scope;
use flannel::wireguard::{PrivateKey, PublicKey, Secret};
use flannel::{IfName, Mac, Observed, Op};
use kernel::Kernel;
use kernel::link::{self, LinkInfo};
use kernel::netlink::{Protocol, Socket};

use super::name;

const PORT: u16 = 51_820;

fn private(n: u8) -> PrivateKey {
    PrivateKey::from_random([n; 32])
}

fn device(port: u16, key: &PrivateKey, mtu: u32) -> Object {
    let kind = LinkKind::WireGuard { port, public_key: key.public() };
    Object::Link(Box::new(Link { name: name("flannel-wg"), kind, mac: Mac([0; 6]), mtu, up: true }))
}

fn peer(n: u32, endpoint: &str, psk: bool) -> Object {
    Object::WgPeer(Box::new(WgPeer {
        link: name("flannel-wg"),
        public_key: public(n),
        endpoint: endpoint.parse().ok(),
        keepalive: u16::from(psk) * 25,
        psk: psk.then(|| Secret::new([7; 32])),
        handshake: None,
    }))
}

fn public(n: u32) -> PublicKey {
    let mut bytes = [1; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    PublicKey(bytes)
}

fn allowed(subnet: &str, n: u32) -> Object {
    Object::AllowedIp(Box::new(AllowedIp { link: name("flannel-wg"), subnet: subnet.parse().unwrap(), peer: public(n) }))
}

fn scope() -> Scope {
    Scope { links: vec![name("flannel-wg")], networks: vec!["10.244.0.0/16".parse().unwrap()], ..Scope::default() }
}

/// A kernel that knows this host's key.
fn kernel() -> Kernel {
    let mut kernel = Kernel::open().unwrap();
    kernel.set_wireguard_key(private(3));
    kernel
}

fn set(kernel: &mut Kernel, objects: &[Object]) {
    let ops: Vec<Op> = objects.iter().cloned().map(Op::Set).collect();
    kernel.apply(&ops).into_iter().collect::<Result<(), _>>().unwrap();
}

fn delete(kernel: &mut Kernel, objects: &[Object]) {
    let ops: Vec<Op> = objects.iter().cloned().map(Op::Delete).collect();
    kernel.apply(&ops).into_iter().collect::<Result<(), _>>().unwrap();
}

/// The peers and subnets that the kernel has.
fn peers(kernel: &mut Kernel) -> Vec<Object> {
    let observed = kernel.observe(&scope()).unwrap();
    observed.into_objects().filter(|object| matches!(object, Object::WgPeer(_) | Object::AllowedIp(_))).collect()
}

pub(crate) fn device_and_peers_are_written_and_read_back() {
    let mut kernel = kernel();
    let wanted = [
        device(PORT, &private(3), 1420),
        Object::Addr(Addr { link: name("flannel-wg"), cidr: "10.244.1.0/32".parse().unwrap() }),
        peer(1, "192.0.2.2:51820", false),
        peer(2, "[2001:db8::3]:7", true),
        allowed("10.244.2.0/24", 1),
        allowed("10.244.3.0/24", 2),
        allowed("fc00:0:0:2::/64", 1),
    ];
    set(&mut kernel, &wanted);
    let is_ours = |observed: Observed| observed.into_objects().collect::<Vec<Object>>();
    assert_eq!(is_ours(kernel.observe(&scope()).unwrap()), wanted);
    let before = info();
    if before.kind == "wireguard" {
        // A daemon that finds them needs no change.
        assert_eq!(is_ours(Kernel::open().unwrap().observe(&scope()).unwrap()), wanted);
    }
    // Another key, port or MTU is set in place; in user space, by a new device with the same peers.
    let changed = device(7, &private(9), 1300);
    kernel.set_wireguard_key(private(9));
    set(&mut kernel, std::slice::from_ref(&changed));
    let found = kernel.observe(&scope()).unwrap();
    assert_eq!(found.get(&changed.key()), Some(&changed));
    if before.kind == "wireguard" {
        assert_eq!((found.len(), info().index), (wanted.len(), before.index));
    }
    assert_eq!(peers(&mut kernel), wanted[2..]);
    // Without the preshared key, and with another endpoint.
    let plain = peer(2, "192.0.2.9:8", false);
    set(&mut kernel, std::slice::from_ref(&plain));
    assert!(peers(&mut kernel).contains(&plain));
    delete(&mut kernel, &wanted[..1]);
    assert!(kernel.observe(&scope()).unwrap().is_empty());
}

fn info() -> LinkInfo {
    link::get(&mut Socket::open(Protocol::Route).unwrap(), name("flannel-wg")).unwrap().unwrap()
}

pub(crate) fn subnet_moves_and_leaves_without_its_peer() {
    let mut kernel = kernel();
    set(&mut kernel, &[device(PORT, &private(3), 1420), peer(1, "192.0.2.2:1", false), peer(2, "192.0.2.3:1", false)]);
    set(&mut kernel, &[allowed("10.244.2.0/24", 1), allowed("10.244.4.0/24", 1), allowed("10.244.3.0/24", 2)]);
    // The host of 10.244.2.0/24 has another key now.
    set(&mut kernel, &[allowed("10.244.2.0/24", 2)]);
    let both = [peer(1, "192.0.2.2:1", false), peer(2, "192.0.2.3:1", false)];
    let subnets = [allowed("10.244.2.0/24", 2), allowed("10.244.3.0/24", 2), allowed("10.244.4.0/24", 1)];
    assert_eq!(peers(&mut kernel), [&both[..], &subnets[..]].concat());
    delete(&mut kernel, &subnets[..1]);
    assert_eq!(peers(&mut kernel), [&both[..], &subnets[1..]].concat(), "the peer keeps its other subnet");
    // Again, and what never was: no error.
    delete(&mut kernel, &[subnets[0].clone(), allowed("10.244.9.0/24", 1), peer(9, "", false)]);
    delete(&mut kernel, &[both[0].clone(), subnets[2].clone()]);
    assert_eq!(peers(&mut kernel), [both[1].clone(), subnets[1].clone()]);
    // A subnet that comes first creates its peer.
    set(&mut kernel, &[allowed("10.244.7.0/24", 7)]);
    assert!(peers(&mut kernel).contains(&peer(7, "", false)));
}

pub(crate) fn refused_peer_affects_no_other() {
    let mut kernel = kernel();
    set(&mut kernel, &[device(PORT, &private(3), 1420)]);
    let lost = Object::AllowedIp(Box::new(AllowedIp { link: name("gone"), subnet: "10.244.2.0/24".parse().unwrap(), peer: public(1) }));
    let ops: Vec<Op> = [peer(1, "192.0.2.2:1", false), lost.clone(), allowed("10.244.2.0/24", 1)].into_iter().map(Op::Set).collect();
    let outcomes = kernel.apply(&ops);
    assert_eq!(outcomes.iter().map(Result::is_ok).collect::<Vec<bool>>(), [true, false, true]);
    assert_eq!(outcomes[1].as_ref().unwrap_err().errno, libc_enodev());
    assert_eq!(kernel.apply(&[Op::Delete(lost)]), [Ok(())]);
    assert_eq!(peers(&mut kernel).len(), 2);
}

fn libc_enodev() -> i32 {
    19
}

pub(crate) fn used_port_is_named() {
    let taken = UdpSocket::bind("0.0.0.0:51820").unwrap();
    let mut kernel = kernel();
    let wanted = device(PORT, &private(3), 1420);
    let error = kernel.apply(&[Op::Set(wanted.clone())]).remove(0).unwrap_err();
    assert!(error.text.contains("another program has UDP port 51820 (`ss -ulnp sport = :51820` names it"), "{error}");
    drop(taken);
    set(&mut kernel, &[wanted]);
    // A key that this process does not have.
    let error = kernel.apply(&[Op::Set(device(PORT, &private(5), 1420))]).remove(0).unwrap_err();
    assert!(error.text.contains("is not known"), "{error}");
}

pub(crate) fn a_thousand_peers_in_few_messages() {
    let mut kernel = kernel();
    set(&mut kernel, &[device(PORT, &private(3), 1420)]);
    let subnet = |n: u32| format!("10.{}.{}.0/24", 64 + n / 256, n % 256);
    let wanted: Vec<Object> = (0..1_000)
        .map(|n| peer(n, "192.0.2.2:51820", n % 2 == 0))
        .chain((0..1_000).map(|n| allowed(&subnet(n), n)))
        // This peer's subnets continue in the next messages of a dump.
        .chain((0..3_000).map(|n| allowed(&format!("172.{}.{}.0/24", 16 + n / 256, n % 256), 5)))
        .collect();
    let began = Instant::now();
    set(&mut kernel, &wanted);
    let written = began.elapsed();
    let found = peers(&mut kernel);
    let read = began.elapsed() - written;
    assert_eq!(found.len(), wanted.len());
    let all: Observed = found.iter().cloned().collect();
    assert!(wanted.iter().all(|object| all.get(&object.key()) == Some(object)));
    let began = Instant::now();
    let ops: Vec<Op> = found.iter().rev().cloned().map(Op::Delete).collect();
    assert!(kernel.apply(&ops).iter().all(Result::is_ok));
    println!("1,000 peers and 4,000 subnets: written in {written:?}, read in {read:?}, deleted in {:?}", began.elapsed());
    assert_eq!(peers(&mut kernel), []);
    assert!(matches!(all.get(&Key::WgPeer(IfName::clone(&name("flannel-wg")), public(5))), Some(Object::WgPeer(_))));
}
