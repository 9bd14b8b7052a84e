//! ICMP echo (RFC 792) by a raw socket: what `ping` does, in the namespace of whoever calls.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with};

/// A socket for echo requests.
#[derive(Debug)]
pub struct Pinger {
    fd: OwnedFd,
    id: u16,
}

impl Pinger {
    /// Opens the socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the privilege is missing (`CAP_NET_RAW`).
    pub fn open() -> io::Result<Pinger> {
        let fd = socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(ipproto::ICMP))?;
        Ok(Pinger { fd, id: fastrand::u16(1..) })
    }

    /// Sends one request; the sequence number comes back with the reply.
    ///
    /// # Errors
    /// When there is no route, or the kernel refuses.
    pub fn send(&self, to: Ipv4Addr, sequence: u16) -> io::Result<()> {
        let mut packet = vec![8, 0, 0, 0];
        packet.extend(self.id.to_be_bytes());
        packet.extend(sequence.to_be_bytes());
        packet.extend([0x66; 48]);
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        sendto(&self.fd, &packet, SendFlags::empty(), &SocketAddrV4::new(to, 0))?;
        Ok(())
    }

    /// Waits for a reply to one of our requests: who sent it, and its sequence number.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn receive(&self, timeout: Duration) -> io::Result<Option<(Ipv4Addr, u16)>> {
        let end = Instant::now() + timeout;
        let mut buffer = [0; 2048];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
            if rustix::event::poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&left))? == 0 {
                return Ok(None);
            }
            let (length, _) = recv(&self.fd, &mut buffer, RecvFlags::empty())?;
            if let Some((from, id, sequence)) = reply(&buffer[..length])
                && id == self.id
            {
                return Ok(Some((from, sequence)));
            }
        }
    }
}

/// Pings each target until it answers, at most `timeout` in all, and returns the round trips of those that did.
///
/// # Errors
/// When the socket fails.
pub fn ping_all(targets: &[Ipv4Addr], timeout: Duration) -> io::Result<BTreeMap<Ipv4Addr, Duration>> {
    let pinger = Pinger::open()?;
    let end = Instant::now() + timeout;
    let mut answered = BTreeMap::new();
    let mut sent = BTreeMap::new();
    for sequence in 0u16.. {
        let open: Vec<Ipv4Addr> = targets.iter().filter(|ip| !answered.contains_key(*ip)).copied().collect();
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

fn reply(packet: &[u8]) -> Option<(Ipv4Addr, u16, u16)> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let from = <[u8; 4]>::try_from(packet.get(12..16)?).ok()?;
    let icmp = packet.get(header..)?;
    let number = |at: usize| Some(u16::from_be_bytes(icmp.get(at..at + 2)?.try_into().ok()?));
    (*icmp.first()? == 0).then_some((from.into(), number(4)?, number(6)?))
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    #[expect(clippy::cast_possible_truncation, reason = "the carries were folded in")]
    let sum = !((folded & 0xffff) + (folded >> 16)) as u16;
    sum
}
