//! WireGuard devices that this process carries, on two hosts that a link connects.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use flannel::wireguard::{PrivateKey, Secret};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::wireguard::user::Userspace;
use kernel::wireguard::{PeerConfig, PeerStatus};
use kernel::{addr, link};

use super::name;

const PORT: u16 = 51_820;
/// How long a packet may take, and how long silence must last to be a proof.
const TIMEOUT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_millis(300);

/// Host NUMBER has 192.0.2.NUMBER and 2001:db8::NUMBER on `eth0`, and 10.1.NUMBER.1 and fd00:NUMBER::1 on `wg0`.
pub(crate) struct Host {
    pub(crate) number: u8,
    pub(crate) netns: Netns,
}

/// Two hosts, numbers 1 and 2, that a link connects.
pub(crate) fn hosts() -> [Host; 2] {
    let hosts = [1, 2].map(|number| Host { number, netns: Netns::create().unwrap() });
    let mut socket = hosts[0].netns.run(|| Socket::open(Protocol::Route).unwrap()).unwrap();
    let end = |netns| link::VethEnd { name: name("eth0"), mac: None, netns };
    link::create_veth(&mut socket, 1500, end(None), end(Some(hosts[1].netns.as_fd()))).unwrap();
    for host in &hosts {
        let number = host.number;
        host.set_up("eth0", &[&format!("192.0.2.{number}/24"), &format!("2001:db8::{number}/64")]);
    }
    hosts
}

impl Host {
    fn set_up(&self, device: &str, addresses: &[&str]) {
        let set_up = || {
            // Without duplicate address detection an address can be used at once.
            for interface in ["all", "default", device] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/accept_dad"), "0").unwrap();
            }
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let index = link::get(&mut socket, name(device)).unwrap().unwrap().index;
            link::set_up(&mut socket, index, true).unwrap();
            for address in addresses {
                addr::add(&mut socket, index, address.parse().unwrap()).unwrap();
            }
        };
        self.netns.run(set_up).unwrap();
    }

    pub(crate) fn key(&self) -> PrivateKey {
        PrivateKey::from_random([self.number; 32])
    }

    /// Brings up `wg0`, with the pods of all hosts behind it.
    pub(crate) fn configure(&self) {
        let number = self.number;
        self.set_up("wg0", &[&format!("10.1.{number}.1/16"), &format!("fd00:{number}::1/16")]);
        self.ip("link set wg0 mtu 1420");
    }

    pub(crate) fn start(&self) -> Userspace {
        let mut device = None;
        // A process that another test is starting may have the descriptors of a former device for a moment.
        eventually("the device starts", || {
            device = self.netns.run(|| Userspace::start(name("wg0"), &self.key(), PORT, 1420)).unwrap().ok();
            device.is_some()
        });
        self.configure();
        device.unwrap()
    }

    /// Its settings as a peer.
    pub(crate) fn peer(&self) -> PeerConfig {
        let number = self.number;
        PeerConfig {
            public_key: self.key().public(),
            psk: None,
            endpoint: Some(SocketAddr::new([192, 0, 2, number].into(), PORT)),
            allowed: vec![format!("10.1.{number}.0/24").parse().unwrap(), format!("fd00:{number}::/32").parse().unwrap()],
            keepalive: 0,
        }
    }

    pub(crate) fn pod(&self) -> IpAddr {
        [10, 1, self.number, 1].into()
    }

    fn pod6(&self) -> IpAddr {
        format!("fd00:{}::1", self.number).parse().unwrap()
    }

    pub(crate) fn ip(&self, arguments: &str) {
        let status = self.netns.run(|| Command::new("ip").args(arguments.split(' ')).status()).unwrap().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    fn udp(&self, ip: IpAddr) -> UdpSocket {
        let socket = self.netns.run(|| UdpSocket::bind((ip, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        socket
    }
}

fn status(device: &Userspace) -> PeerStatus {
    device.peers().remove(0)
}

/// Starts both devices, each with the other host as its peer.
fn connected(hosts: &[Host; 2]) -> [Userspace; 2] {
    let devices = [hosts[0].start(), hosts[1].start()];
    devices[0].set_peer(&hosts[1].peer()).unwrap();
    devices[1].set_peer(&hosts[0].peer()).unwrap();
    devices
}

/// Whether a datagram from one pod reaches the other within the time that silence must last.
fn arrives(from: &Host, to: &Host) -> bool {
    let receiver = to.udp(to.pod());
    let sender = from.udp(from.pod());
    sender.send_to(b"datagram", receiver.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 100];
    receiver.recv_from(&mut buffer).is_ok_and(|(length, _)| &buffer[..length] == b"datagram")
}

#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < TIMEOUT, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends bytes by TCP from one address to another and compares them.
pub(crate) fn transfer(from: (&Host, IpAddr), to: (&Host, IpAddr), length: usize) {
    let data: Vec<u8> = (0_u8..=250).cycle().take(length).collect();
    let listener = to.0.netns.run(|| TcpListener::bind((to.1, 0))).unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let mut sender = from.0.netns.run(|| TcpStream::connect_timeout(&address, TIMEOUT)).unwrap().unwrap();
    assert_eq!(sender.local_addr().unwrap().ip(), from.1);
    let received = std::thread::spawn(move || {
        let mut data = Vec::new();
        let mut stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.read_to_end(&mut data).unwrap();
        data
    });
    sender.write_all(&data).unwrap();
    drop(sender);
    assert!(received.join().unwrap() == data, "{} to {}", from.1, to.1);
}

pub(crate) fn two_devices_carry_both_families() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let [first, second] = connected(&hosts);
    const LENGTH: usize = 1 << 20;
    for outer in ["192.0.2.2", "2001:db8::2"] {
        first.remove_peer(&b.key().public());
        let endpoint = Some(SocketAddr::new(outer.parse().unwrap(), PORT));
        first.set_peer(&PeerConfig { endpoint, ..b.peer() }).unwrap();
        transfer((a, a.pod()), (b, b.pod()), LENGTH);
        transfer((b, b.pod6()), (a, a.pod6()), LENGTH);
        let outer_of = |device: &Userspace| status(device).config.endpoint.unwrap().ip().to_string();
        assert_eq!(outer_of(&first), outer);
        assert_eq!(outer_of(&second), outer.replace(":2", ":1").replace("2.2", "2.1"), "it follows");
    }
    let shown = a.netns.run(|| Command::new("ip").args(["link", "show", "wg0"]).output()).unwrap().unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains(" qlen 1000"), "a burst waits for the thread");
    let (first, second) = (status(&first), status(&second));
    assert!(first.sent > 1 << 20 && first.received > 1 << 20, "{first:?}");
    assert_eq!(second.config.allowed, a.peer().allowed);
    assert!(second.handshake.is_some_and(|age| age < TIMEOUT), "{second:?}");
}

pub(crate) fn only_own_addresses_of_a_peer_pass() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let devices = connected(&hosts);
    eventually("a packet arrives", || arrives(a, b));
    // A pod with an address of another host.
    a.ip("addr add 10.1.3.1/32 dev wg0");
    let receiver = b.udp(b.pod());
    let sender = a.udp([10, 1, 3, 1].into());
    sender.send_to(b"foreign", receiver.local_addr().unwrap()).unwrap();
    assert!(receiver.recv_from(&mut [0; 100]).is_err());
    drop(receiver);
    assert!(arrives(a, b));
    // Another key and peer that is set later takes the subnet.
    let other = PeerConfig { public_key: PrivateKey::from_random([9; 32]).public(), endpoint: None, ..a.peer() };
    devices[1].set_peer(&other).unwrap();
    assert!(!arrives(a, b));
    devices[1].set_peer(&a.peer()).unwrap();
    assert!(arrives(a, b));
}

pub(crate) fn peer_that_changes_its_address_is_followed() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let [_first, second] = connected(&hosts);
    eventually("a packet arrives", || arrives(a, b));
    a.ip("addr del 192.0.2.1/24 dev eth0");
    a.ip("addr add 192.0.2.77/24 dev eth0");
    eventually("a packet arrives from the new address", || arrives(a, b));
    assert_eq!(status(&second).config.endpoint, Some("192.0.2.77:51820".parse().unwrap()));
    assert!(arrives(b, a), "answers go there");
}

pub(crate) fn answers_leave_from_the_address_that_the_peer_sends_to() {
    let hosts = hosts();
    let [a, b] = &hosts;
    b.ip("addr add 192.0.2.22/24 dev eth0");
    b.ip("addr add 2001:db8::22/64 dev eth0");
    let [first, second] = [a.start(), b.start()];
    second.set_peer(&PeerConfig { endpoint: None, ..a.peer() }).unwrap();
    for outer in ["192.0.2.22", "2001:db8::22"] {
        first.remove_peer(&b.key().public());
        let endpoint = Some(SocketAddr::new(outer.parse().unwrap(), PORT));
        first.set_peer(&PeerConfig { endpoint, ..b.peer() }).unwrap();
        eventually("a packet arrives", || arrives(a, b));
        assert!(arrives(b, a));
        assert_eq!(status(&first).config.endpoint, endpoint, "not the first address of the host");
        // A host accepts the next handshake of a peer after 20 ms; a lost one is repeated after 5 s.
        std::thread::sleep(Duration::from_millis(50));
    }
    b.ip("addr del 2001:db8::22/64 dev eth0");
    eventually("another address is used when that one is gone", || arrives(b, a));
    assert_eq!(status(&first).config.endpoint, Some("[2001:db8::2]:51820".parse().unwrap()));
}

pub(crate) fn removed_peer_is_cut_off() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let [_first, second] = connected(&hosts);
    eventually("a packet arrives", || arrives(a, b));
    assert!(second.remove_peer(&a.key().public()));
    assert!(!arrives(a, b) && !arrives(b, a));
    assert_eq!(second.peers(), []);
    second.set_peer(&a.peer()).unwrap();
    eventually("a packet arrives after the peer is back", || arrives(a, b));
}

pub(crate) fn peers_need_the_same_preshared_key() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let devices = [a.start(), b.start()];
    let psk = |byte| Some(Secret::new([byte; 32]));
    devices[0].set_peer(&PeerConfig { psk: psk(1), ..b.peer() }).unwrap();
    devices[1].set_peer(&PeerConfig { psk: psk(2), ..a.peer() }).unwrap();
    assert!(!arrives(a, b) && !arrives(b, a));
    devices[1].set_peer(&PeerConfig { psk: psk(1), ..a.peer() }).unwrap();
    eventually("a packet arrives", || arrives(a, b));
    // The session outlives the change of the key on one side.
    devices[0].set_peer(&PeerConfig { psk: psk(3), ..b.peer() }).unwrap();
    assert!(arrives(a, b) && arrives(b, a));
}

/// Settings, keys and other peers change while packets pass in order.
pub(crate) fn changes_lose_no_packet() {
    const PACKETS: u32 = 1500;
    let hosts = hosts();
    let [a, b] = &hosts;
    let devices = connected(&hosts);
    eventually("a packet arrives", || arrives(a, b));
    let receiver = b.udp(b.pod());
    receiver.set_read_timeout(Some(TIMEOUT)).unwrap();
    let (sender, to) = (a.udp(a.pod()), receiver.local_addr().unwrap());
    let sending = std::thread::spawn(move || {
        for number in 0..PACKETS {
            sender.send_to(&number.to_be_bytes(), to).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let receiving = std::thread::spawn(move || {
        let mut bytes = [0; 4];
        for number in 0..PACKETS {
            receiver.recv_from(&mut bytes).unwrap_or_else(|error| panic!("packet {number}: {error}"));
            assert_eq!(u32::from_be_bytes(bytes), number);
        }
    });
    let other = |number: u8| PeerConfig { allowed: vec![format!("10.1.{number}.0/24").parse().unwrap()], ..peer_with_key(number) };
    let mut round = 0_u8;
    while !receiving.is_finished() {
        round = round.wrapping_add(1);
        let keepalive = u16::from(round);
        for number in 100..120 {
            devices[usize::from(round % 2)].set_peer(&other(number)).unwrap();
        }
        // Both sides change the preshared key, one after the other.
        let psk = Some(Secret::new([round / 16 + 1; 32]));
        devices[0].set_peer(&PeerConfig { keepalive, psk: psk.clone(), ..b.peer() }).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        devices[1].update_peer(&PeerConfig { psk, endpoint: None, allowed: Vec::new(), ..a.peer() }).unwrap();
        for number in 100..120 {
            devices[0].remove_peer(&peer_with_key(number).public_key);
        }
    }
    sending.join().unwrap();
    receiving.join().unwrap();
    assert!(round > 16, "the keys were changed");
}

fn peer_with_key(number: u8) -> PeerConfig {
    let public_key = PrivateKey::from_random([number; 32]).public();
    PeerConfig {
        public_key,
        psk: None,
        endpoint: Some(SocketAddr::new([192, 0, 2, number].into(), PORT)),
        allowed: Vec::new(),
        keepalive: 0,
    }
}

pub(crate) fn restarted_device_is_reached_again_within_seconds() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let [_first, second] = connected(&hosts);
    eventually("a packet arrives", || arrives(a, b));
    drop(second);
    let find = || link::get(&mut Socket::open(Protocol::Route).unwrap(), name("wg0")).unwrap();
    eventually("the device is deleted", || b.netns.run(find).unwrap().is_none());
    let second = b.start();
    second.set_peer(&a.peer()).unwrap();
    // The other host would use the lost session for 15 s.
    eventually("a packet arrives after the restart", || arrives(a, b));
}

pub(crate) fn a_host_without_ipv6_is_served() {
    let hosts = hosts();
    for host in &hosts {
        host.netns.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")).unwrap().unwrap();
        host.netns.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")).unwrap().unwrap();
    }
    let [a, b] = &hosts;
    let devices = hosts.each_ref().map(|host| {
        let device = host.netns.run(|| Userspace::start(name("wg0"), &host.key(), PORT, 1420)).unwrap().unwrap();
        host.set_up("wg0", &[&format!("10.1.{}.1/16", host.number)]);
        device
    });
    devices[0].set_peer(&b.peer()).unwrap();
    devices[1].set_peer(&a.peer()).unwrap();
    transfer((a, a.pod()), (b, b.pod()), 1 << 16);
}

pub(crate) fn port_in_use_and_deleted_device_are_reported() {
    let [a, _] = hosts();
    let taken = a.netns.run(|| UdpSocket::bind(("0.0.0.0", PORT))).unwrap().unwrap();
    let error = a.netns.run(|| Userspace::start(name("wg0"), &a.key(), PORT, 1420)).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "cannot bind UDP port 51820: Address already in use (os error 98)");
    drop(taken);
    let device = a.start();
    assert!(device.is_running());
    let again = a.netns.run(|| Userspace::start(name("wg0"), &a.key(), 0, 1420)).unwrap().unwrap_err();
    assert!(again.to_string().starts_with("cannot create the TUN device wg0: "), "{again}");
    a.ip("link delete wg0");
    eventually("the deletion is noticed", || !device.is_running());
    drop(device);
    a.start();
}

/// Debian's wireguard-go on the second host, set by `wg`.
pub(crate) fn another_implementation_is_understood() {
    let hosts = hosts();
    let [a, b] = &hosts;
    let first = a.start();
    let psk = Secret::new([7; 32]);
    first.set_peer(&PeerConfig { psk: Some(psk), ..b.peer() }).unwrap();
    let mut program = b.netns.run(|| Command::new("wireguard-go").args(["-f", "wg0"]).spawn()).unwrap().expect("install wireguard-go");
    let wg = |arguments: &str| {
        let output = b.netns.run(|| Command::new("wg").args(arguments.split(' ')).output()).unwrap().expect("install wireguard-tools");
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let keys = std::path::Path::new("/mnt/wireguard-go");
    std::fs::create_dir_all(keys).unwrap();
    std::fs::write(keys.join("key"), &*b.key().text()).unwrap();
    std::fs::write(keys.join("psk"), "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=").unwrap();
    let run = || {
        let set = format!(
            "set wg0 listen-port {PORT} private-key /mnt/wireguard-go/key peer {} preshared-key /mnt/wireguard-go/psk \
             endpoint 192.0.2.1:{PORT} allowed-ips 10.1.1.0/24,fd00:1::/32",
            a.key().public()
        );
        eventually("wireguard-go is configured", || wg(&set).0);
        b.configure();
        transfer((a, a.pod()), (b, b.pod()), 1 << 20);
        transfer((b, b.pod6()), (a, a.pod6()), 1 << 20);
        assert!(wg("show wg0 transfer").1.starts_with(&a.key().public().to_string()));
        // Each begins a handshake: first ours, then theirs after our restart.
        drop(first);
        let first = a.start();
        let without_greeting = PeerConfig { endpoint: None, psk: Some(Secret::new([7; 32])), ..b.peer() };
        first.set_peer(&without_greeting).unwrap();
        wg(&format!("set wg0 peer {} remove", a.key().public()));
        assert!(wg(&set).0);
        eventually("wireguard-go begins a handshake", || arrives(b, a));
        transfer((a, a.pod()), (b, b.pod()), 1 << 20);
    };
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    program.kill().unwrap();
    program.wait().unwrap();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}
