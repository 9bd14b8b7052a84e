//! WireGuard devices of the kernel, by generic netlink (`linux/wireguard.h`, `linux/genetlink.h`). Many changes of peers are one message;
//! a dump of a device has several, and a peer with many subnets may continue in the next one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use flannel::wireguard::{KEY_LEN, PrivateKey, PublicKey, Secret};
use flannel::{IfName, Subnet};

use super::{Device, PeerChange, PeerConfig, PeerStatus};
use crate::netlink::{Batch, Body, NetlinkError, Protocol, Socket, attrs, str_in, u16_at};

/// `struct genlmsghdr`: command, version, reserved.
const GENL_HDRLEN: usize = 4;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const WG_GENL_NAME: &str = "wireguard";
const WG_GENL_VERSION: u8 = 1;
const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;

const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;

const WGPEER_F_REMOVE_ME: u32 = 1;

const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_PRESHARED_KEY: u16 = 2;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;

const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// Changes of peers in one message. A change has at most about 150 bytes, and the attribute that holds all of them at most 65,535.
const CHANGES: usize = 256;

/// The peer that takes a subnet away from its owner, and is removed with it: kernels before 6.17 have no request that only removes a subnet.
/// Its name is its key.
const REMOVER: PublicKey = PublicKey(*b"flannel takes away a peer subnet");

/// A socket for WireGuard's family.
#[derive(Debug)]
pub(super) struct Generic {
    socket: Socket,
    family: u16,
}

impl Generic {
    /// Opens a socket; `None` if the kernel has no WireGuard, or has not loaded it.
    pub(super) fn open() -> Result<Option<Generic>, NetlinkError> {
        let mut socket = Socket::open(Protocol::Generic)?;
        let family = socket.get(
            GENL_ID_CTRL,
            |body| {
                body.bytes(&[CTRL_CMD_GETFAMILY, 1, 0, 0]).attr_str(CTRL_ATTR_FAMILY_NAME, WG_GENL_NAME);
            },
            |body| attrs(body.get(GENL_HDRLEN..)?).find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID).and_then(|(_, id)| u16_at(id, 0)),
        );
        match family {
            Ok(family) => Ok(Some(Generic { socket, family })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a device with its peers.
    pub(super) fn device(&mut self, name: IfName) -> Result<Device, NetlinkError> {
        let parts = self.socket.dump(
            self.family,
            |body| {
                body.bytes(&[WG_CMD_GET_DEVICE, WG_GENL_VERSION, 0, 0]).attr_str(WGDEVICE_A_IFNAME, name.as_str());
            },
            decode,
        )?;
        #[expect(clippy::disallowed_methods, reason = "the kernel states the time of a handshake by this clock")]
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(merge(parts, now))
    }

    /// Sets a device's key and port, which changes nothing if it has them.
    pub(super) fn set_device(&mut self, name: IfName, key: &PrivateKey, port: u16) -> Result<(), NetlinkError> {
        self.socket.request(self.family, 0, |body| {
            begin(body, name).attr(WGDEVICE_A_PRIVATE_KEY, key.bytes()).attr(WGDEVICE_A_LISTEN_PORT, &port.to_ne_bytes());
        })
    }

    /// Changes peers of one device, in order, with an outcome for each change. The kernel stops at the first change of a message that it
    /// refuses, so those of such a message are sent again one by one.
    pub(super) fn change(&mut self, name: IfName, changes: &[PeerChange<'_>]) -> Vec<Result<(), NetlinkError>> {
        let mut outcomes = Vec::with_capacity(changes.len());
        for some in changes.chunks(CHANGES) {
            match self.send(name, some) {
                Ok(()) => outcomes.resize_with(outcomes.len() + some.len(), || Ok(())),
                Err(error) if some.len() == 1 => outcomes.push(Err(error)),
                Err(_) => outcomes.extend(some.iter().map(|one| self.send(name, std::slice::from_ref(one)))),
            }
        }
        outcomes
    }

    fn send(&mut self, name: IfName, changes: &[PeerChange<'_>]) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.message(self.family, 0, |body| {
            begin(body, name).nest(WGDEVICE_A_PEERS, |peers| encode(peers, changes));
        });
        self.socket.execute(batch).pop().unwrap_or(Err(NetlinkError::Garbled("no outcome")))
    }
}

fn begin<'a, 'b>(body: &'a mut Body<'b>, name: IfName) -> &'a mut Body<'b> {
    body.bytes(&[WG_CMD_SET_DEVICE, WG_GENL_VERSION, 0, 0]).attr_str(WGDEVICE_A_IFNAME, name.as_str())
}

/// Appends changes as elements of the list of peers. Elements of a list have the kind 0.
fn encode(peers: &mut Body<'_>, changes: &[PeerChange<'_>]) {
    let mut peer = |key: &PublicKey, flags: u32, rest: &dyn Fn(&mut Body<'_>)| {
        peers.nest(0, |peer| {
            peer.attr(WGPEER_A_PUBLIC_KEY, &key.0);
            if flags != 0 {
                peer.attr_u32(WGPEER_A_FLAGS, flags);
            }
            rest(peer);
        });
    };
    // One peer takes away all subnets of a run: the kernel waits for its readers with each peer that it removes.
    for run in changes.chunk_by(|one, other| matches!((one, other), (PeerChange::Forbid(_), PeerChange::Forbid(_)))) {
        match run[0] {
            PeerChange::Set(wanted) => peer(&wanted.public_key, 0, &|peer| {
                // The key of zeros removes one that another program left.
                peer.attr(WGPEER_A_PRESHARED_KEY, wanted.psk.as_ref().map_or([0; KEY_LEN].as_slice(), |psk| psk.bytes()));
                if let Some(endpoint) = wanted.endpoint {
                    peer.attr(WGPEER_A_ENDPOINT, &socket_address(endpoint));
                }
                peer.attr(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &wanted.keepalive.to_ne_bytes());
            }),
            PeerChange::Remove(key) => peer(key, WGPEER_F_REMOVE_ME, &|_| {}),
            // A peer that is missing is created, without an endpoint: asked only to change it, the kernel would do nothing without an
            // error.
            PeerChange::Allow(allowed) => peer(&allowed.peer, 0, &|peer| allow(peer, [allowed.subnet])),
            PeerChange::Forbid(_) => {
                let subnets = || run.iter().filter_map(|change| if let PeerChange::Forbid(subnet) = change { Some(*subnet) } else { None });
                peer(&REMOVER, 0, &|peer| allow(peer, subnets()));
                peer(&REMOVER, WGPEER_F_REMOVE_ME, &|_| {});
            }
        }
    }
}

fn allow(peer: &mut Body<'_>, subnets: impl IntoIterator<Item = Subnet>) {
    peer.nest(WGPEER_A_ALLOWEDIPS, |list| {
        for subnet in subnets {
            let family = if subnet.network().is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let family = u16::try_from(family).expect("families are small numbers");
            list.nest(0, |ip| {
                ip.attr(WGALLOWEDIP_A_FAMILY, &family.to_ne_bytes()).attr_ip(WGALLOWEDIP_A_IPADDR, subnet.network());
                ip.attr(WGALLOWEDIP_A_CIDR_MASK, &[subnet.prefix_len()]);
            });
        }
    });
}

/// `struct sockaddr_in` or `struct sockaddr_in6`
fn socket_address(endpoint: SocketAddr) -> Vec<u8> {
    let family = if endpoint.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = u16::try_from(family).expect("families are small numbers").to_ne_bytes().to_vec();
    bytes.extend(endpoint.port().to_be_bytes());
    match endpoint {
        SocketAddr::V4(endpoint) => {
            bytes.extend(endpoint.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(endpoint) => {
            bytes.extend([0; 4]);
            bytes.extend(endpoint.ip().octets());
            bytes.extend(endpoint.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn socket_address_in(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16_at(bytes, 0)?);
    let port = u16::from_be(u16_at(bytes, 2)?);
    let ip = match family {
        libc::AF_INET => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?)),
        libc::AF_INET6 => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// What one message of a dump says about a device.
#[derive(Debug, Clone, Default)]
struct Part {
    public_key: Option<PublicKey>,
    port: Option<u16>,
    peers: Vec<PeerPart>,
}

/// A peer, or the rest of one whose subnets did not fit into the message before.
#[derive(Debug, Clone)]
struct PeerPart {
    config: PeerConfig,
    /// The time of the last handshake, since 1970.
    handshake: Option<Duration>,
    received: u64,
    sent: u64,
}

/// Decodes a message of a dump. What cannot be read is left out.
fn decode(body: &[u8]) -> Option<Part> {
    let mut part = Part::default();
    for (kind, value) in attrs(body.get(GENL_HDRLEN..)?) {
        match kind {
            // The kernel sends the name with each message.
            WGDEVICE_A_IFNAME => drop(str_in(value)?),
            WGDEVICE_A_PUBLIC_KEY => part.public_key = key(value),
            WGDEVICE_A_LISTEN_PORT => part.port = u16_at(value, 0),
            WGDEVICE_A_PEERS => part.peers.extend(attrs(value).filter_map(|(_, peer)| decode_peer(peer))),
            _ => {}
        }
    }
    Some(part)
}

fn decode_peer(bytes: &[u8]) -> Option<PeerPart> {
    let find = |wanted| attrs(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let config = PeerConfig {
        public_key: find(WGPEER_A_PUBLIC_KEY).and_then(key)?,
        psk: find(WGPEER_A_PRESHARED_KEY).and_then(key).map(|PublicKey(bytes)| Secret::new(bytes)),
        endpoint: find(WGPEER_A_ENDPOINT).and_then(socket_address_in),
        allowed: find(WGPEER_A_ALLOWEDIPS).into_iter().flat_map(attrs).filter_map(|(_, ip)| decode_allowed(ip)).collect(),
        keepalive: find(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL).and_then(|value| u16_at(value, 0)).unwrap_or(0),
    };
    Some(PeerPart {
        config,
        handshake: find(WGPEER_A_LAST_HANDSHAKE_TIME).and_then(time),
        received: find(WGPEER_A_RX_BYTES).and_then(u64_in).unwrap_or(0),
        sent: find(WGPEER_A_TX_BYTES).and_then(u64_in).unwrap_or(0),
    })
}

fn decode_allowed(bytes: &[u8]) -> Option<Subnet> {
    let find = |wanted| attrs(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let ip = find(WGALLOWEDIP_A_IPADDR).and_then(crate::netlink::ip_in)?;
    Subnet::new(ip, *find(WGALLOWEDIP_A_CIDR_MASK)?.first()?).ok()
}

/// A key; `None` for the key of zeros, which stands for none.
fn key(bytes: &[u8]) -> Option<PublicKey> {
    let key: [u8; KEY_LEN] = bytes.try_into().ok()?;
    (key != [0; KEY_LEN]).then_some(PublicKey(key))
}

/// `struct __kernel_timespec`; zero means never.
fn time(bytes: &[u8]) -> Option<Duration> {
    let seconds = u64_in(bytes.get(..8)?)?;
    let nanoseconds = u64_in(bytes.get(8..16)?)?;
    let time = Duration::new(seconds, u32::try_from(nanoseconds).ok().filter(|nanoseconds| *nanoseconds < 1_000_000_000)?);
    (time > Duration::ZERO).then_some(time)
}

fn u64_in(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_ne_bytes)
}

/// Puts the messages of a dump together. A peer that the last message began with other subnets continues in the next one.
fn merge(parts: Vec<Part>, now: Duration) -> Device {
    let mut device = Device::default();
    for part in parts {
        device.public_key = device.public_key.or(part.public_key);
        device.port = device.port.or(part.port);
        for PeerPart { config, handshake, received, sent } in part.peers {
            match device.peers.last_mut().filter(|last| last.config.public_key == config.public_key) {
                Some(last) => last.config.allowed.extend(config.allowed),
                None => {
                    let handshake = handshake.map(|at| now.saturating_sub(at));
                    device.peers.push(PeerStatus { config, handshake, received, sent });
                }
            }
        }
    }
    device
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::messages;
    use flannel::object::{AllowedIp, WgPeer};
    use proptest::prelude::*;

    /// The body of a message that `write` fills.
    fn message(write: impl FnOnce(&mut Body<'_>)) -> Vec<u8> {
        let mut batch = Batch::new();
        batch.message(99, 0, |body| {
            body.bytes(&[WG_CMD_GET_DEVICE, WG_GENL_VERSION, 0, 0]);
            write(body);
        });
        batch.bytes_for_tests().to_vec()
    }

    fn body(message: &[u8]) -> &[u8] {
        messages(message).next().unwrap().body
    }

    fn peer(n: u8) -> WgPeer {
        WgPeer {
            link: "flannel-wg".parse().unwrap(),
            public_key: PublicKey([n; KEY_LEN]),
            endpoint: "[2001:db8::2]:51820".parse().ok(),
            keepalive: 25,
            psk: Some(Secret::new([7; KEY_LEN])),
            handshake: None,
        }
    }

    fn allowed(n: u8, subnet: &str) -> AllowedIp {
        AllowedIp { link: "flannel-wg".parse().unwrap(), subnet: subnet.parse().unwrap(), peer: PublicKey([n; KEY_LEN]) }
    }

    #[test]
    fn written_peer_is_read_back() {
        let (wanted, subnet, v6) = (peer(1), allowed(1, "10.244.2.0/24"), allowed(1, "fc00:0:0:2::/64"));
        let changes = [PeerChange::Set(&wanted), PeerChange::Allow(&subnet), PeerChange::Allow(&v6)];
        let bytes = message(|body| {
            body.attr_str(WGDEVICE_A_IFNAME, "flannel-wg").attr(WGDEVICE_A_PUBLIC_KEY, &[9; KEY_LEN]);
            body.attr(WGDEVICE_A_LISTEN_PORT, &51820u16.to_ne_bytes());
            body.nest(WGDEVICE_A_PEERS, |peers| encode(peers, &changes));
        });
        let device = merge(vec![decode(body(&bytes)).unwrap()], Duration::ZERO);
        assert_eq!((device.public_key, device.port), (Some(PublicKey([9; KEY_LEN])), Some(51820)));
        // Each change is an element, and the reader takes them as continuations.
        let config = PeerConfig {
            public_key: wanted.public_key,
            psk: wanted.psk.clone(),
            endpoint: wanted.endpoint,
            allowed: vec![subnet.subnet, v6.subnet],
            keepalive: 25,
        };
        assert_eq!(device.peers, [PeerStatus { config, handshake: None, received: 0, sent: 0 }]);
    }

    #[test]
    fn peer_continues_in_the_next_message() {
        let part = |subnets: &[&str], peers: &[u8]| {
            let bytes = message(|body| {
                body.nest(WGDEVICE_A_PEERS, |list| {
                    for n in peers {
                        list.nest(0, |peer| {
                            peer.attr(WGPEER_A_PUBLIC_KEY, &[*n; KEY_LEN]);
                            peer.attr(WGPEER_A_LAST_HANDSHAKE_TIME, &[100u64.to_ne_bytes(), 5u64.to_ne_bytes()].concat());
                            allow(peer, subnets.iter().map(|subnet| subnet.parse().unwrap()));
                        });
                    }
                });
            });
            decode(body(&bytes)).unwrap()
        };
        let parts = vec![part(&["10.0.0.0/24"], &[1, 2]), part(&["10.0.1.0/24"], &[2, 3])];
        let device = merge(parts, Duration::from_secs(130));
        let found: Vec<(u8, usize)> = device.peers.iter().map(|peer| (peer.config.public_key.0[0], peer.config.allowed.len())).collect();
        assert_eq!(found, [(1, 1), (2, 2), (3, 1)]);
        assert_eq!(device.peers[0].handshake.map(|age| age.as_secs()), Some(29));
    }

    #[test]
    fn zero_stands_for_no_key_and_no_handshake() {
        assert_eq!((key(&[0; KEY_LEN]), time(&[0; 16])), (None, None));
        assert_eq!(time(&[1u64.to_ne_bytes(), 2_000_000_000u64.to_ne_bytes()].concat()), None);
    }

    #[test]
    fn a_full_message_stays_below_the_limit_of_an_attribute() {
        let wanted = peer(1);
        let changes = vec![PeerChange::Set(&wanted); CHANGES];
        let bytes = message(|body| _ = body.nest(WGDEVICE_A_PEERS, |peers| encode(peers, &changes)));
        assert!(bytes.len() < usize::from(u16::MAX), "{}", bytes.len());
        let subnet = PeerChange::Forbid("fc00:0:0:2::/64".parse().unwrap());
        let changes = vec![subnet; CHANGES];
        let bytes = message(|body| _ = body.nest(WGDEVICE_A_PEERS, |peers| encode(peers, &changes)));
        assert!(bytes.len() < usize::from(u16::MAX), "{}", bytes.len());
    }

    proptest! {
        #[test]
        fn decoder_reads_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Some(part) = decode(&bytes) {
                merge(vec![part], Duration::ZERO);
            }
            decode_peer(&bytes);
            decode_allowed(&bytes);
            socket_address_in(&bytes);
        }

        #[test]
        fn decoder_reads_damaged_messages(at in 0usize..400, with in any::<u8>(), cut in 0usize..400) {
            let (wanted, subnet) = (peer(1), allowed(1, "10.244.2.0/24"));
            let changes = [PeerChange::Set(&wanted), PeerChange::Allow(&subnet)];
            let mut bytes = message(|body| _ = body.nest(WGDEVICE_A_PEERS, |peers| encode(peers, &changes)));
            let at = 16 + at % (bytes.len() - 16);
            bytes[at] = with;
            let end = 16 + cut % (bytes.len() - 16);
            decode(&bytes[16..end]);
            if let Some(part) = decode(&bytes[16..]) {
                merge(vec![part], Duration::ZERO);
            }
        }
    }
}
