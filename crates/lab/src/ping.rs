//! ICMP echo (RFC 792, RFC 4443) by raw sockets: what `ping` does, in the caller's namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flannel::Family;
use kernel::netns::Netns;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto, socket_with};

/// Sockets for echo requests of both families.
#[derive(Debug)]
pub struct Pinger {
    v4: OwnedFd,
    v6: OwnedFd,
    id: u16,
}

impl Pinger {
    /// Opens the sockets in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the privilege is missing (`CAP_NET_RAW`).
    pub fn open() -> io::Result<Pinger> {
        let open = |family, protocol| socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(protocol));
        let v4 = open(AddressFamily::INET, ipproto::ICMP)?;
        let v6 = open(AddressFamily::INET6, ipproto::ICMPV6)?;
        Ok(Pinger { v4, v6, id: fastrand::u16(1..) })
    }

    /// Sends one request; the sequence number comes back with the reply.
    ///
    /// # Errors
    /// When there is no route, or the kernel refuses.
    pub fn send(&self, to: IpAddr, sequence: u16) -> io::Result<()> {
        let (socket, kind) = match to {
            IpAddr::V4(_) => (&self.v4, 8),
            IpAddr::V6(_) => (&self.v6, 128),
        };
        let mut packet = vec![kind, 0, 0, 0];
        packet.extend(self.id.to_be_bytes());
        packet.extend(sequence.to_be_bytes());
        packet.extend([0x66; 48]);
        // The kernel computes ICMPv6's, which covers addresses that only it knows.
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        sendto(socket, &packet, SendFlags::empty(), &SocketAddr::new(to, 0))?;
        Ok(())
    }

    /// Waits for a reply to one of our requests: who sent it, and its sequence number.
    ///
    /// # Errors
    /// When a socket fails.
    pub fn receive(&self, timeout: Duration) -> io::Result<Option<(IpAddr, u16)>> {
        let end = Instant::now() + timeout;
        let mut buffer = [0; 2048];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
            let mut polled = [PollFd::new(&self.v4, PollFlags::IN), PollFd::new(&self.v6, PollFlags::IN)];
            if rustix::event::poll(&mut polled, Some(&left))? == 0 {
                return Ok(None);
            }
            let is_v4 = !polled[0].revents().is_empty();
            let (socket, family) = if is_v4 { (&self.v4, Family::V4) } else { (&self.v6, Family::V6) };
            let (length, _, from) = recvfrom(socket, &mut buffer, RecvFlags::empty())?;
            let from = from.and_then(|from| SocketAddr::try_from(from).ok());
            if let (Some(from), Some((id, sequence))) = (from, reply(&buffer[..length], family))
                && id == self.id
            {
                return Ok(Some((from.ip(), sequence)));
            }
        }
    }
}

/// Pings each target until it answers, at most `timeout` in all, and returns the round trips of those that did.
///
/// # Errors
/// When a socket fails.
pub fn ping_all(targets: &[IpAddr], timeout: Duration) -> io::Result<BTreeMap<IpAddr, Duration>> {
    let pinger = Pinger::open()?;
    let end = Instant::now() + timeout;
    let mut answered = BTreeMap::new();
    let mut sent = BTreeMap::new();
    for sequence in 0u16.. {
        let open: Vec<IpAddr> = targets.iter().filter(|ip| !answered.contains_key(*ip)).copied().collect();
        if open.is_empty() || Instant::now() >= end {
            break;
        }
        for target in &open {
            sent.insert((*target, sequence), Instant::now());
            // No route yet is no answer yet.
            let _ = pinger.send(*target, sequence);
        }
        let round = end.min(Instant::now() + Duration::from_millis(300));
        while open.iter().any(|ip| !answered.contains_key(ip)) {
            let Some((from, sequence)) = pinger.receive(round.saturating_duration_since(Instant::now()))? else { break };
            if let Some(at) = sent.get(&(from, sequence)) {
                answered.entry(from).or_insert(at.elapsed());
            }
        }
    }
    Ok(answered)
}

/// Pings a target each millisecond while `f` runs, and a moment longer; returns how many requests were sent and how many lost.
///
/// # Errors
/// When a socket fails.
pub fn ping_during(from: &Netns, to: IpAddr, f: impl FnOnce()) -> io::Result<(usize, usize)> {
    ping_each(Duration::from_millis(1), from, to, f)
}

/// The same with another time between two requests.
///
/// # Errors
/// When a socket fails.
pub fn ping_each(every: Duration, from: &Netns, to: IpAddr, f: impl FnOnce()) -> io::Result<(usize, usize)> {
    let stop = AtomicBool::new(false);
    let ping = || -> io::Result<(usize, usize)> {
        let pinger = Pinger::open()?;
        let mut open = BTreeSet::new();
        let (mut sent, mut unsent) = (0, 0);
        while !stop.load(Ordering::Relaxed) && sent < u16::MAX {
            // Without a route it is lost at once.
            match pinger.send(to, sent) {
                Ok(()) => drop(open.insert(sent)),
                Err(_) => unsent += 1,
            }
            sent += 1;
            let next = Instant::now() + every;
            while let Some((_, sequence)) = pinger.receive(next.saturating_duration_since(Instant::now()))? {
                open.remove(&sequence);
            }
        }
        let end = Instant::now() + Duration::from_secs(2);
        while !open.is_empty()
            && let Some((_, sequence)) = pinger.receive(end.saturating_duration_since(Instant::now()))?
        {
            open.remove(&sequence);
        }
        Ok((usize::from(sent), open.len() + unsent))
    };
    std::thread::scope(|scope| {
        let pinging = scope.spawn(|| from.run(ping));
        f();
        // Long enough that what follows from the last act is seen as well.
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        pinging.join().map_err(|_| io::Error::other("the pinging thread panicked"))??
    })
}

/// Identifier and sequence number of an echo reply. A raw IPv4 socket shows the IP header, an IPv6 one does not.
fn reply(packet: &[u8], family: Family) -> Option<(u16, u16)> {
    let (header, kind) = match family {
        Family::V4 => (usize::from(packet.first()? & 0xf) * 4, 0),
        Family::V6 => (0, 129),
    };
    let icmp = packet.get(header..)?;
    let number = |at: usize| Some(u16::from_be_bytes(icmp.get(at..at + 2)?.try_into().ok()?));
    (*icmp.first()? == kind).then_some((number(4)?, number(6)?))
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    #[expect(clippy::cast_possible_truncation, reason = "the carries were folded in")]
    let sum = !((folded & 0xffff) + (folded >> 16)) as u16;
    sum
}
