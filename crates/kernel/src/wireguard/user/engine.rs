//! The peers of a device: which of them a packet goes to or came from. Without I/O: the caller passes what it received and sends what
//! it gets.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet as Message, Tunn, TunnResult};
use flannel::Subnet;
use flannel::net::PrefixMap;
use flannel::wireguard::{PrivateKey, PublicKey};

use super::super::{PeerConfig, PeerStatus};
use super::peer::{Endpoint, Identity, Kind, Peer, State};
use crate::tunnel::LARGEST;

/// The number of handshake messages in a second from which on their senders must prove their addresses by a cookie. Each costs three
/// to five multiplications on the curve, about 0.3 ms.
pub(super) const HANDSHAKES: u64 = 500;
/// The number of handshake messages in a second that are accepted from one address under load (the kernel's `ratelimiter.c`).
const HANDSHAKES_OF_SOURCE: u32 = 20;
/// Packet numbers from here on are refused, as the protocol demands (section 6.5 of its paper); the library's own arithmetic would
/// overflow on the last ones.
const LAST_COUNTER: u64 = u64::MAX - (1 << 13);
/// The time after the start in which new peers are greeted with a handshake. They may have sessions with this host that ended with an
/// earlier process, and would send into them for 15 s.
const GREETING_TIME: Duration = Duration::from_secs(60);
/// The number of handshakes that the timer starts in one call.
const STARTS: u32 = 50;
/// The length of a cookie message.
const COOKIE: usize = 64;

/// A buffer with an IP packet.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    /// The buffer: longer than the packet, for padding.
    pub(super) buffer: &'a mut [u8],
    /// The length of the packet.
    pub(super) length: usize,
}

/// Sends a datagram.
pub(super) type Send<'a> = &'a dyn Fn(&[u8], Endpoint);

struct Entry {
    peer: Arc<Peer>,
    allowed: BTreeSet<Subnet>,
    /// The numbers of its sessions: with other keys the number changes.
    indexes: BTreeSet<u32>,
}

#[derive(Default)]
struct Table {
    peers: BTreeMap<PublicKey, Entry>,
    by_index: BTreeMap<u32, Arc<Peer>>,
    routes: PrefixMap<Arc<Peer>>,
    next_index: u32,
}

impl Table {
    /// An unused number of 24 bits: the library uses 8 of the protocol's 32 for the session.
    fn free_index(&mut self) -> u32 {
        loop {
            self.next_index = (self.next_index + 1) & 0x00ff_ffff;
            if !self.by_index.contains_key(&self.next_index) {
                return self.next_index;
            }
        }
    }
}

impl Table {
    /// Gives a subnet to a peer, and takes it from the one that has it. Returns whether the peer exists.
    fn allow(&mut self, key: &PublicKey, subnet: Subnet) -> bool {
        let Some(entry) = self.peers.get_mut(key) else { return false };
        entry.allowed.insert(subnet);
        let peer = entry.peer.clone();
        if let Some(before) = self.routes.insert(subnet, peer.clone())
            && !Arc::ptr_eq(&before, &peer)
            && let Some(entry) = self.peers.get_mut(&before.key)
        {
            entry.allowed.remove(&subnet);
        }
        true
    }

    fn forbid(&mut self, subnet: Subnet) {
        if let Some(peer) = self.routes.remove(subnet)
            && let Some(entry) = self.peers.get_mut(&peer.key)
        {
            entry.allowed.remove(&subnet);
        }
    }

    /// Changes keys of a peer, whose next session gets a number of its own.
    fn renew(&mut self, peer: &Arc<Peer>, change: impl FnOnce(&mut State, u32)) {
        let index = self.free_index();
        let Some(entry) = self.peers.get_mut(&peer.key) else { return };
        let mut state = peer.lock();
        change(&mut state, index);
        let indexes = state.indexes();
        drop(state);
        for gone in entry.indexes.difference(&indexes) {
            self.by_index.remove(gone);
        }
        self.by_index.insert(index, peer.clone());
        entry.indexes = indexes;
    }

    fn remove(&mut self, key: &PublicKey) -> bool {
        let Some(entry) = self.peers.remove(key) else { return false };
        for subnet in entry.allowed {
            self.routes.remove(subnet);
        }
        for index in entry.indexes {
            self.by_index.remove(&index);
        }
        true
    }
}

/// The handshake messages of the present second.
#[derive(Default)]
struct Load {
    since: Option<Instant>,
    all: u64,
    sources: BTreeMap<IpAddr, u32>,
}

/// All peers of a device and their sessions.
pub(super) struct Engine {
    identity: RwLock<Arc<Identity>>,
    load: Mutex<Load>,
    table: RwLock<Table>,
    mtu: AtomicUsize,
    started: Instant,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("key", &self.public_key()).finish_non_exhaustive()
    }
}

impl Engine {
    pub(super) fn new(key: &PrivateKey, mtu: u32) -> Engine {
        // A restarted process begins elsewhere, so that a datagram of an old session rarely meets a new one.
        let next_index = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.subsec_micros());
        let engine = Engine {
            identity: RwLock::new(Arc::new(Identity::new(key))),
            load: Mutex::default(),
            table: RwLock::new(Table { next_index, ..Table::default() }),
            mtu: AtomicUsize::new(0),
            started: Instant::now(),
        };
        engine.set_mtu(mtu);
        engine
    }

    pub(super) fn public_key(&self) -> PublicKey {
        self.identity().key
    }

    fn identity(&self) -> Arc<Identity> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_mtu(&self, mtu: u32) {
        self.mtu.store(usize::try_from(mtu).unwrap_or(LARGEST).min(LARGEST), Ordering::Relaxed);
    }

    pub(super) fn set_key(&self, key: &PrivateKey, now: Instant) {
        let identity = Arc::new(Identity::new(key));
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.remove(&identity.key);
        let peers: Vec<Arc<Peer>> = table.peers.values().map(|entry| entry.peer.clone()).collect();
        for peer in peers {
            table.renew(&peer, |state, index| state.change_identity(identity.clone(), index, now));
        }
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
    }

    pub(super) fn set_peer(&self, config: &PeerConfig, replace: bool) -> io::Result<()> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let identity = self.identity();
        if config.public_key == identity.key {
            let text = format!("cannot add WireGuard peer {}: this is the device's own key", config.public_key);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let known = table.peers.get(&config.public_key).map(|entry| entry.peer.clone());
        let peer = if let Some(peer) = known {
            if peer.lock().psk() != config.psk.as_ref() {
                table.renew(&peer, |state, index| state.change_psk(config.psk.clone(), index, Instant::now()));
            }
            peer
        } else {
            let index = table.free_index();
            let greet = self.started.elapsed() < GREETING_TIME;
            let peer = Arc::new(Peer::new(identity, config, index, greet));
            table.by_index.insert(index, peer.clone());
            let entry = Entry { peer: peer.clone(), allowed: BTreeSet::new(), indexes: BTreeSet::from([index]) };
            table.peers.insert(config.public_key, entry);
            peer
        };
        peer.lock().configure(config.endpoint, config.keepalive);
        let had = table.peers.get(&config.public_key).map(|entry| entry.allowed.clone()).unwrap_or_default();
        for gone in had.into_iter().filter(|subnet| replace && !config.allowed.contains(subnet)) {
            table.forbid(gone);
        }
        for subnet in &config.allowed {
            table.allow(&config.public_key, *subnet);
        }
        Ok(())
    }

    pub(super) fn remove_peer(&self, key: &PublicKey) -> bool {
        self.table.write().unwrap_or_else(PoisonError::into_inner).remove(key)
    }

    pub(super) fn allow(&self, key: &PublicKey, subnet: Subnet) -> bool {
        self.table.write().unwrap_or_else(PoisonError::into_inner).allow(key, subnet)
    }

    pub(super) fn forbid(&self, subnet: Subnet) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).forbid(subnet);
    }

    pub(super) fn peers(&self) -> Vec<PeerStatus> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let status = |entry: &Entry| entry.peer.lock().status(entry.peer.key, entry.allowed.iter().copied().collect());
        table.peers.values().map(status).collect()
    }

    /// Encrypts packets for their peers, each into the buffer of `sealed` with the same number. Returns the number of the buffer, the
    /// length and the address of each datagram to send. A packet for a peer without a session is kept until there is one.
    pub(super) fn seal(&self, packets: &mut [Packet<'_>], sealed: &mut [Vec<u8>], now: Instant) -> Vec<(usize, usize, Endpoint)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let peer = |packet: &Packet<'_>| table.routes.find(Tunn::dst_address(packet.buffer.get(..packet.length)?)?).cloned();
        let peers: Vec<Option<Arc<Peer>>> = packets.iter().map(peer).collect();
        drop(table);
        let mtu = self.mtu.load(Ordering::Relaxed);
        let mut ready = Vec::with_capacity(packets.len());
        let mut numbered = packets.iter_mut().zip(sealed).enumerate();
        let same = |a: &Option<Arc<Peer>>, b: &Option<Arc<Peer>>| a.as_ref().map(Arc::as_ptr) == b.as_ref().map(Arc::as_ptr);
        for run in peers.chunk_by(same) {
            let run_packets = numbered.by_ref().take(run.len());
            let Some(Some(peer)) = run.first() else {
                run_packets.for_each(drop);
                continue;
            };
            let mut peer = peer.lock();
            let path = peer.path();
            for (at, (packet, sealed)) in run_packets {
                let clear = pad(packet, mtu);
                if let Some((length, to)) = peer.seal(path, clear, sealed, now) {
                    ready.push((at, length, to));
                }
            }
        }
        ready
    }

    /// Handles a datagram. Returns the packet in it, if it is one that its sender may send.
    pub(super) fn open<'a>(
        &self,
        datagram: &[u8],
        from: Endpoint,
        now: Instant,
        scratch: &'a mut [u8],
        send: Send<'_>,
    ) -> Option<&'a [u8]> {
        let mut cookie = [0; COOKIE];
        let identity = self.identity();
        let message = match identity.limiter.verify_packet(Some(from.remote.ip()), datagram, &mut cookie) {
            Ok(message) => message,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                send(cookie, from);
                return None;
            }
            Err(_) => return None,
        };
        if matches!(message, Message::HandshakeInit(_) | Message::HandshakeResponse(_)) && !self.admits(from.remote.ip(), now) {
            return None;
        }
        let by_index = |index: u32| {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            table.by_index.get(&(index >> 8)).cloned()
        };
        let (peer, kind) = match message {
            Message::HandshakeInit(init) => {
                let half = parse_handshake_anon(&identity.private, &identity.public, &init).ok()?;
                let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
                (table.peers.get(&PublicKey(half.peer_static_public)).map(|entry| entry.peer.clone()), Kind::Initiation)
            }
            Message::HandshakeResponse(response) => (by_index(response.receiver_idx), Kind::Session(response.receiver_idx >> 8)),
            Message::PacketCookieReply(reply) => (by_index(reply.receiver_idx), Kind::Cookie(reply.receiver_idx >> 8)),
            Message::PacketData(data) => {
                let counter = u64::from_le_bytes(datagram.get(8..16)?.try_into().ok()?);
                if counter >= LAST_COUNTER {
                    return None;
                }
                (by_index(data.receiver_idx), Kind::Session(data.receiver_idx >> 8))
            }
        };
        let peer = peer?;
        let (length, source) = peer.lock().open(kind, datagram, from, now, scratch, send)?;
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let owner = table.routes.find(source)?;
        if Arc::ptr_eq(owner, &peer) { scratch.get(..length) } else { None }
    }

    /// Whether the handshake message of this source is handled. Under load the address is proven by a cookie.
    fn admits(&self, source: IpAddr, now: Instant) -> bool {
        let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        if load.since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_secs(1)) {
            *load = Load { since: Some(now), ..Load::default() };
        }
        load.all += 1;
        if load.all <= HANDSHAKES {
            return true;
        }
        let source = match source {
            IpAddr::V4(_) => source,
            // A host has a whole /64.
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        };
        let count = load.sources.entry(source).or_default();
        *count += 1;
        *count <= HANDSHAKES_OF_SOURCE
    }

    /// Does what is due: handshakes, their repetition, keepalive packets. To be called a few times a second.
    pub(super) fn tick(&self, now: Instant, scratch: &mut [u8], send: Send<'_>) {
        let identity = self.identity();
        identity.limiter.reset_count();
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let peers: Vec<Arc<Peer>> = table.peers.values().map(|entry| entry.peer.clone()).collect();
        drop(table);
        let offset = identity.clock_offset();
        let mut starts = STARTS;
        for peer in peers {
            peer.lock().tick(now, offset, &mut starts, scratch, send);
        }
    }
}

/// The packet with zeros up to a multiple of 16 bytes, but not beyond the MTU: its length tells less about its content.
fn pad<'a>(packet: &'a mut Packet<'_>, mtu: usize) -> &'a [u8] {
    let length = packet.length;
    let padded = length.next_multiple_of(16).min(mtu.max(length)).min(packet.buffer.len());
    packet.buffer[length..padded].fill(0);
    &packet.buffer[..padded]
}

#[cfg(test)]
mod tests;
