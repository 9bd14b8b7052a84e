//! Sockets for path probes: ICMP echoes (RFC 792, RFC 4443) and datagrams that are never fragmented.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use flannel::Family;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::sys;

/// `IP_PMTUDISC_PROBE` and `IPV6_PMTUDISC_PROBE` (`linux/in.h`, `linux/in6.h`): packets are not fragmented, and a path MTU that the kernel
/// remembers does not count.
const PMTUDISC_PROBE: libc::c_int = 3;
/// Bytes of an ICMP header and a token.
const ECHO: usize = 16;

/// A raw ICMP socket for echo requests and their replies, which does not wait; needs `CAP_NET_RAW`. It has the type of the sockets that
/// send and receive in the same way. `id` tells its replies from those of other programs.
///
/// # Errors
/// When the kernel refuses.
pub fn echoes(family: Family, id: u16) -> io::Result<UdpSocket> {
    let (domain, protocol) = match family {
        Family::V4 => (libc::AF_INET, libc::IPPROTO_ICMP),
        Family::V6 => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
    };
    let fd = sys::socket(domain, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol)?;
    sys::set_filter(fd.as_fd(), &replies_only(family, id))?;
    forbid_fragments(fd.as_fd(), family)?;
    Ok(fd.into())
}

/// An echo request that has `length` bytes with its IP header, and carries the token.
pub fn echo_request(family: Family, id: u16, length: u32, token: u64) -> Vec<u8> {
    let (kind, header) = match family {
        Family::V4 => (8, 20),
        Family::V6 => (128, 40),
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX).saturating_sub(header).clamp(ECHO, usize::from(u16::MAX) - header);
    let mut packet = vec![0; length];
    packet[0] = kind;
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[8..ECHO].copy_from_slice(&token.to_be_bytes());
    if family == Family::V4 {
        // The kernel computes that of ICMPv6.
        let checksum = checksum(&packet);
        packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

/// The token of a reply, as the socket of [`echoes`] receives it: those of IPv4 begin with the IP header.
pub fn echo_token(family: Family, packet: &[u8]) -> Option<u64> {
    let header = match family {
        Family::V4 => usize::from(packet.first()? & 0xf) * 4,
        Family::V6 => 0,
    };
    packet.get(header + 8..header + ECHO)?.try_into().ok().map(u64::from_be_bytes)
}

/// Bytes of a reply that must be read for its token: an IPv4 header has up to 60.
pub const ECHO_REPLY: usize = 60 + ECHO;

/// A UDP socket for probes on all addresses of a family, which does not wait.
///
/// # Errors
/// When the port is taken, or the kernel refuses.
pub fn datagrams(family: Family, port: u16) -> io::Result<UdpSocket> {
    let (domain, any) = match family {
        Family::V4 => (AddressFamily::INET, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        Family::V6 => (AddressFamily::INET6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    };
    let fd = rustix::net::socket_with(domain, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if family == Family::V6 {
        rustix::net::sockopt::set_ipv6_v6only(&fd, true)?;
    }
    forbid_fragments(fd.as_fd(), family)?;
    rustix::net::bind(&fd, &SocketAddr::new(any, port))?;
    Ok(fd.into())
}

fn forbid_fragments(fd: BorrowedFd<'_>, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTUDISC_PROBE),
        Family::V6 => {
            sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, PMTUDISC_PROBE)?;
            // Else the sender itself makes fragments.
            sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1)
        }
    }
}

/// A filter that accepts echo replies with this identifier. The data of IPv4 begins with the IP header, that of IPv6 with ICMPv6's.
fn replies_only(family: Family, id: u16) -> Vec<libc::sock_filter> {
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k };
    let test = |k, jf| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, jf, k);
    let verdict = |k| op(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let (kind, mode) = match family {
        Family::V4 => (0, libc::BPF_IND),
        Family::V6 => (129, libc::BPF_ABS),
    };
    let skip_header = (family == Family::V4).then(|| op(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0, 0));
    let tests = [
        op(libc::BPF_LD | libc::BPF_B | mode, 0, 0, 0),
        test(kind, 3),
        op(libc::BPF_LD | libc::BPF_H | mode, 0, 0, 4),
        test(u32::from(id), 1),
        verdict(u32::MAX),
        verdict(0),
    ];
    skip_header.into_iter().chain(tests).collect()
}

/// The Internet checksum (RFC 1071) of a packet whose checksum field is zero.
fn checksum(packet: &[u8]) -> u16 {
    let words = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    let sum = words.fold(0u32, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    });
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_to_zero() {
        let mut packet = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1, 0xff, 0xff, 0xab];
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&packet), 0);
        assert_eq!(checksum(&[0; 8]), 0xffff);
    }

    #[test]
    fn a_request_has_its_length_and_its_token_is_found_in_the_reply() {
        for (family, header) in [(Family::V4, 20), (Family::V6, 40)] {
            let request = echo_request(family, 7, 1450, 0x0102_0304_0506_0708);
            assert_eq!(request.len(), 1450 - header);
            let mut reply = if family == Family::V4 { vec![0x45; 20] } else { Vec::new() };
            reply.extend(&request);
            assert_eq!(echo_token(family, &reply), Some(0x0102_0304_0506_0708));
            assert_eq!(echo_token(family, &reply[..10]), None);
            assert_eq!(echo_request(family, 7, 0, 1).len(), 16);
        }
        assert_eq!(echo_token(Family::V4, &[0x4f; 60]), None);
        assert_eq!(echo_token(Family::V4, &[]), None);
    }
}
