//! Which program has a port of this host.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use flannel::IfName;

use crate::link;
use crate::monitor::Author;
use crate::netlink::{Protocol, Socket};

/// At most so many processes are looked at.
const PROCESSES: usize = 8_192;
/// `TCP_LISTEN`, as `/proc/net/tcp` has it.
const LISTENING: &str = "0A";

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Whether a port can be had in either family. Only the attempt tells: it is given back at once.
pub fn is_free(transport: Transport, port: u16) -> bool {
    let can_bind = |ip: IpAddr| match transport {
        Transport::Tcp => TcpListener::bind(SocketAddr::new(ip, port)).map(drop),
        Transport::Udp => UdpSocket::bind(SocketAddr::new(ip, port)).map(drop),
    };
    let is_taken = |ip: IpAddr| can_bind(ip).is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse);
    !is_taken(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) && !is_taken(IpAddr::V6(Ipv6Addr::UNSPECIFIED))
}

/// The VXLAN device that has a UDP port: its socket is the kernel's and belongs to no process.
pub fn vxlan_device(port: u16) -> Option<IfName> {
    let links = link::list(&mut Socket::open(Protocol::Route).ok()?).ok()?;
    links.iter().find(|link| link.vxlan.is_some_and(|vxlan| vxlan.port == port)).map(|link| link.name)
}

/// The program that has a port, if this process may know.
pub fn holder(transport: Transport, port: u16) -> Option<Author> {
    let names = match transport {
        Transport::Tcp => ["tcp", "tcp6"],
        Transport::Udp => ["udp", "udp6"],
    };
    let tables = names.iter().filter_map(|name| fs::read_to_string(format!("/proc/net/{name}")).ok());
    let inodes: Vec<String> = tables.flat_map(|table| inodes(&table, transport, port)).collect();
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.take(PROCESSES).find(|pid| has_one(*pid, &inodes)).map(|pid| {
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Author { pid, program: program.trim_end().to_owned() }
    })
}

/// The sockets with a local port in a table of `/proc/net`.
fn inodes(table: &str, transport: Transport, port: u16) -> Vec<String> {
    let wanted = format!("{port:04X}");
    let lines = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let is_open = transport == Transport::Udp || *state == LISTENING;
        (local.rsplit(':').next() == Some(&*wanted) && is_open).then(|| (*inode).to_owned())
    });
    lines.filter(|inode| inode != "0").collect()
}

fn has_one(pid: u32, inodes: &[String]) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut targets = files.filter_map(|file| fs::read_link(file.path()).ok());
    targets.any(|target| {
        let target = target.to_string_lossy();
        target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')).is_some_and(|inode| inodes.iter().any(|one| one == inode))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holder_of_a_port_is_named() {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(!is_free(Transport::Udp, port));
        assert_eq!(holder(Transport::Udp, port).map(|author| author.pid), Some(std::process::id()));
        assert_eq!(holder(Transport::Tcp, port).map(|author| author.pid), None);
        drop(socket);
        assert!(is_free(Transport::Udp, port));
    }
}
