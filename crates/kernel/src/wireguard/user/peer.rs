//! A peer: its session, the packets that wait for one, and its timers.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use flannel::Subnet;
use flannel::wireguard::{PrivateKey, PublicKey, Secret};

use super::super::{PeerConfig, PeerStatus};
use super::engine::{HANDSHAKES, Send};

/// The bytes that a buffer must have in addition to a packet. The protocol adds 32; the library wants 148 for a handshake.
pub(super) const OVERHEAD: usize = 160;
/// The number of packets that wait for a session.
const QUEUE: usize = 256;
/// The time after which a session is not used any more (`REJECT_AFTER_TIME`).
const LIFETIME: Duration = Duration::from_secs(180);
/// The number of sessions with former keys that are kept: keys may change faster than handshakes succeed.
const FORMER: usize = 3;
/// The time between two handshakes that this peer begins (the kernel's `INITIATIONS_PER_SECOND`).
pub(super) const BETWEEN_INITIATIONS: Duration = Duration::from_millis(20);
/// The time between two attempts to begin a handshake with this peer, when the first was not answered as expected.
const BETWEEN_ATTEMPTS: Duration = Duration::from_secs(1);
/// The time after which a peer that receives data has sent something (`KEEPALIVE_TIMEOUT`).
const SILENCE: Duration = Duration::from_secs(10);
/// The change of the wall clock after which handshakes are stamped with the new time.
const CLOCK_STEP: Duration = Duration::from_secs(10);

/// Where a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// Its address. Mapped ones are given as IPv4.
    pub(super) remote: SocketAddr,
    /// The address of this host that it sends to, from which it expects answers; IPv4 as mapped.
    pub(super) local: Option<Ipv6Addr>,
}

impl Endpoint {
    pub(super) fn new(remote: SocketAddr, local: Option<Ipv6Addr>) -> Endpoint {
        let remote = match remote.ip().to_canonical() {
            IpAddr::V4(ip) => SocketAddr::new(ip.into(), remote.port()),
            // With its scope, which a link-local address needs.
            IpAddr::V6(_) => remote,
        };
        Endpoint { remote, local }
    }
}

/// The keys of this host.
pub(super) struct Identity {
    pub(super) private: x25519::StaticSecret,
    pub(super) public: x25519::PublicKey,
    /// The same, in this project's type.
    pub(super) key: PublicKey,
    /// Checks the handshake messages of all senders.
    pub(super) limiter: RateLimiter,
    /// The engine has checked each message already, so that sessions accept all.
    unlimited: Arc<RateLimiter>,
    started: Instant,
}

impl Identity {
    pub(super) fn new(key: &PrivateKey) -> Identity {
        let private = x25519::StaticSecret::from(*key.bytes());
        let public = x25519::PublicKey::from(&private);
        let unlimited = Arc::new(RateLimiter::new(&public, u64::MAX));
        let limiter = RateLimiter::new(&public, HANDSHAKES);
        Identity { private, public, key: PublicKey(public.to_bytes()), limiter, unlimited, started: Instant::now() }
    }

    /// The wall clock minus the monotonic clock: it grows when the wall clock is set forward.
    pub(super) fn clock_offset(&self) -> Duration {
        std::time::UNIX_EPOCH.elapsed().unwrap_or_default().saturating_sub(self.started.elapsed())
    }

    fn tunn(&self, peer: PublicKey, psk: Option<&Secret>, index: u32) -> Tunn {
        let psk = psk.map(|psk| *psk.bytes());
        // The keepalive interval can change, which the library does not offer: keepalive packets are sent by `State::tick`.
        Tunn::new(self.private.clone(), x25519::PublicKey::from(peer.0), psk, None, index, Some(self.unlimited.clone()))
    }
}

/// What kind of datagram was received; with the number that this host gave to the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The first message of a handshake.
    Initiation,
    /// The answer to this host's first message, or data.
    Session(u32),
    /// A demand to prove the address.
    Cookie(u32),
}

/// Which session packets are sent in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// The present one.
    Present,
    /// One with former keys.
    Former,
    /// There is none.
    None,
}

/// A peer, for all threads.
pub(super) struct Peer {
    pub(super) key: PublicKey,
    state: Mutex<State>,
}

impl Peer {
    /// A new peer. With `greet` a handshake is begun without a packet to send.
    pub(super) fn new(identity: Arc<Identity>, config: &PeerConfig, index: u32, greet: bool) -> Peer {
        let state = State {
            identity,
            key: config.public_key,
            index,
            psk: config.psk.clone(),
            keepalive: Duration::ZERO,
            endpoint: None,
            tunn: None,
            former: Vec::new(),
            queue: VecDeque::new(),
            handshake: None,
            initiated: None,
            attempted: None,
            traffic: None,
            accepted: None,
            greet,
            received: 0,
            sent: 0,
        };
        Peer { key: config.public_key, state: Mutex::new(state) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The library's part of a session.
struct Session {
    /// The number by which the peer addresses it.
    index: u32,
    tunn: Box<Tunn>,
    /// [`Identity::clock_offset`] when it was made: the library stamps handshakes by the clock of that time.
    offset: Duration,
}

impl Session {
    /// Whether packets can be sent in it.
    fn is_usable(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some()
    }
}

/// The state of a peer.
pub(super) struct State {
    identity: Arc<Identity>,
    key: PublicKey,
    /// The number of the present session.
    index: u32,
    psk: Option<Secret>,
    keepalive: Duration,
    endpoint: Option<Endpoint>,
    /// Made when it is first needed: it costs a multiplication on the curve and some kilobytes.
    tunn: Option<Session>,
    /// Sessions with former keys, the latest first, and when they end.
    former: Vec<(Session, Instant)>,
    /// The packets that wait for a session, the oldest first.
    queue: VecDeque<Vec<u8>>,
    /// When the last handshake was completed.
    handshake: Option<Instant>,
    /// When the last handshake of the peer was accepted.
    initiated: Option<Instant>,
    /// When this host last attempted a handshake outside of the library's own repetitions.
    attempted: Option<Instant>,
    /// When a datagram was last sent or accepted; `None`: a keepalive packet is due.
    traffic: Option<Instant>,
    /// When a datagram was last accepted.
    accepted: Option<Instant>,
    greet: bool,
    received: u64,
    sent: u64,
}

impl State {
    pub(super) fn psk(&self) -> Option<&Secret> {
        self.psk.as_ref()
    }

    pub(super) fn configure(&mut self, endpoint: Option<SocketAddr>, keepalive: u16) {
        let endpoint = endpoint.map(|remote| Endpoint::new(remote, None));
        if endpoint.is_some_and(|new| self.endpoint.is_none_or(|old| old.remote != new.remote)) {
            self.endpoint = endpoint;
        }
        let keepalive = Duration::from_secs(keepalive.into());
        if self.keepalive.is_zero() && !keepalive.is_zero() {
            self.traffic = None;
        }
        self.keepalive = keepalive;
    }

    /// Uses another preshared key from the next handshake on.
    pub(super) fn change_psk(&mut self, psk: Option<Secret>, index: u32, now: Instant) {
        self.psk = psk;
        self.renew(index, now);
    }

    /// Uses another key of this host from the next handshake on.
    pub(super) fn change_identity(&mut self, identity: Arc<Identity>, index: u32, now: Instant) {
        self.identity = identity;
        self.renew(index, now);
    }

    /// Begins a handshake soon. The present session goes on until then, for at most its lifetime.
    fn renew(&mut self, index: u32, now: Instant) {
        if let Some(session) = self.tunn.take() {
            // A session that the peer began may be in use there, but not yet here.
            let begun = self.initiated.map(|at| now.saturating_duration_since(at));
            let age = session.tunn.time_since_last_handshake().or(begun);
            if let Some(rest) = age.and_then(|age| LIFETIME.checked_sub(age)) {
                self.former.insert(0, (session, now + rest));
                self.former.truncate(FORMER);
            }
        }
        (self.index, self.greet) = (index, true);
    }

    /// The numbers of its sessions.
    pub(super) fn indexes(&self) -> BTreeSet<u32> {
        self.former.iter().map(|(session, _)| session.index).chain([self.index]).collect()
    }

    pub(super) fn status(&self, public_key: PublicKey, allowed: Vec<Subnet>) -> PeerStatus {
        let keepalive = u16::try_from(self.keepalive.as_secs()).unwrap_or(u16::MAX);
        let age = self.tunn.as_ref().and_then(|session| session.tunn.time_since_last_handshake());
        PeerStatus {
            config: PeerConfig {
                public_key,
                psk: self.psk.clone(),
                endpoint: self.endpoint.map(|endpoint| endpoint.remote),
                allowed,
                keepalive,
            },
            handshake: age.or_else(|| self.handshake.map(|at| at.elapsed())),
            received: self.received,
            sent: self.sent,
        }
    }

    fn tunn(&mut self) -> &mut Tunn {
        let make = || Session {
            index: self.index,
            tunn: Box::new(self.identity.tunn(self.key, self.psk.as_ref(), self.index)),
            offset: self.identity.clock_offset(),
        };
        &mut self.tunn.get_or_insert_with(make).tunn
    }

    /// The session for packets from now on.
    pub(super) fn path(&self) -> Path {
        if self.tunn.as_ref().is_some_and(Session::is_usable) {
            Path::Present
        } else if self.former.iter().any(|(session, _)| session.is_usable()) {
            Path::Former
        } else {
            Path::None
        }
    }

    /// Encrypts a packet, or keeps it and begins a handshake. Returns the length of the datagram, which may be either, and its address.
    pub(super) fn seal(&mut self, path: Path, packet: &[u8], out: &mut [u8], now: Instant) -> Option<(usize, Endpoint)> {
        let to = self.endpoint?;
        let session = match path {
            Path::Present => self.tunn.as_mut(),
            Path::Former => self.former.iter_mut().map(|(session, _)| session).find(|session| session.is_usable()),
            Path::None => None,
        };
        let Some(session) = session else {
            if self.queue.len() >= QUEUE {
                self.queue.pop_front();
            }
            self.queue.push_back(packet.to_vec());
            return self.initiate(out, now).map(|length| (length, to));
        };
        let TunnResult::WriteToNetwork(datagram) = session.tunn.encapsulate(packet, out) else { return None };
        let length = datagram.len();
        self.count_sent(length, now);
        Some((length, to))
    }

    /// Begins a handshake, unless one is in progress.
    fn initiate(&mut self, out: &mut [u8], now: Instant) -> Option<usize> {
        let TunnResult::WriteToNetwork(datagram) = self.tunn().format_handshake_initiation(out, false) else { return None };
        let length = datagram.len();
        self.attempted = Some(now);
        self.count_sent(length, now);
        Some(length)
    }

    fn count_sent(&mut self, length: usize, now: Instant) {
        self.sent += u64::try_from(length).unwrap_or(0);
        self.traffic = Some(now);
    }

    /// Handles a datagram. A packet is left at the start of `scratch`: returns its length and source.
    pub(super) fn open(
        &mut self,
        kind: Kind,
        datagram: &[u8],
        from: Endpoint,
        now: Instant,
        scratch: &mut [u8],
        send: Send<'_>,
    ) -> Option<(usize, IpAddr)> {
        let tunn = match kind {
            Kind::Initiation if self.initiated.is_some_and(|at| now.saturating_duration_since(at) < BETWEEN_INITIATIONS) => return None,
            Kind::Initiation => self.tunn(),
            Kind::Session(index) | Kind::Cookie(index) => {
                let sessions = self.tunn.iter_mut().chain(self.former.iter_mut().map(|(session, _)| session));
                &mut sessions.into_iter().find(|session| session.index == index)?.tunn
            }
        };
        let mut reply = 0;
        let packet = match tunn.decapsulate(Some(from.remote.ip()), datagram, scratch) {
            TunnResult::WriteToTunnelV4(packet, source) => Some((packet.len(), IpAddr::V4(source))),
            TunnResult::WriteToTunnelV6(packet, source) => Some((packet.len(), IpAddr::V6(source))),
            TunnResult::WriteToNetwork(datagram) => {
                reply = datagram.len();
                None
            }
            TunnResult::Done => None,
            TunnResult::Err(_) => return None,
        };
        if matches!(kind, Kind::Cookie(_)) {
            return None;
        }
        self.received += u64::try_from(datagram.len()).unwrap_or(0);
        (self.endpoint, self.traffic, self.accepted) = (Some(from), Some(now), Some(now));
        if kind == Kind::Initiation {
            self.initiated = Some(now);
        }
        if reply > 0 {
            send(&scratch[..reply], from);
            self.count_sent(reply, now);
        }
        self.flush(now, send);
        packet
    }

    /// Sends the packets that waited for a session. The lock on this peer keeps later packets behind them.
    fn flush(&mut self, now: Instant, send: Send<'_>) {
        if self.queue.is_empty() || self.path() == Path::None {
            return;
        }
        let mut out = Vec::new();
        while let Some(packet) = self.queue.pop_front() {
            out.resize(packet.len() + OVERHEAD, 0);
            if let Some((length, to)) = self.seal(self.path(), &packet, &mut out, now) {
                send(&out[..length], to);
            }
        }
    }

    /// Does what is due. Begins at most `starts` handshakes, which it counts down.
    pub(super) fn tick(&mut self, now: Instant, offset: Duration, starts: &mut u32, scratch: &mut [u8], send: Send<'_>) {
        self.former.retain(|(_, end)| now < *end);
        let mut length = 0;
        if let Some(session) = &mut self.tunn {
            match session.tunn.update_timers(scratch) {
                TunnResult::WriteToNetwork(datagram) => length = datagram.len(),
                // It was tried for 90 s: what waits is too old.
                TunnResult::Err(WireGuardError::ConnectionExpired) => self.queue.clear(),
                _ => {}
            }
            if let Some(age) = session.tunn.time_since_last_handshake() {
                self.handshake = now.checked_sub(age).or(self.handshake);
            } else if offset > session.offset + CLOCK_STEP {
                // A host that booted without the time stamped its handshakes too low for peers that know it from earlier.
                (self.tunn, length) = (None, 0);
                self.greet = true;
            }
        }
        let elapsed = |at: Option<Instant>| at.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let Some(to) = &mut self.endpoint else { return };
        if length > 0 && elapsed(self.accepted) >= SILENCE {
            // It does not answer: the address of this host may be one that does not lead to it any more.
            to.local = None;
        }
        let to = *to;
        if length > 0 {
            send(&scratch[..length], to);
            self.count_sent(length, now);
        }
        let keepalive = !self.keepalive.is_zero() && elapsed(self.traffic) >= self.keepalive;
        let path = self.path();
        let datagram = if path == Path::Present {
            self.greet = false;
            if keepalive { self.seal(path, &[], scratch, now) } else { None }
        } else if (keepalive || self.greet || !self.queue.is_empty()) && elapsed(self.attempted) >= BETWEEN_ATTEMPTS && *starts > 0 {
            *starts -= 1;
            (self.greet, self.attempted, self.traffic) = (false, Some(now), Some(now));
            self.initiate(scratch, now).map(|length| (length, to))
        } else {
            None
        };
        if let Some((length, to)) = datagram {
            send(&scratch[..length], to);
        }
    }
}
