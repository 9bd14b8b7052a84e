//! A WireGuard device that this process carries itself, for kernels without WireGuard: a TUN device and a UDP socket. Handshakes and
//! ciphers are boringtun's; which peer a packet belongs to, and when, is decided in `engine` and `peer`, as the kernel does it
//! (`drivers/net/wireguard`).

mod engine;
mod peer;

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flannel::wireguard::{PrivateKey, PublicKey};
use flannel::{IfName, Subnet};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::{PeerConfig, PeerStatus};
use crate::sys::{self, Datagram, Received};
use crate::tunnel::{BATCH, BUFFER, LARGEST, batch_buffers, open_device, while_open};
use engine::{Engine, Packet};
use peer::{Endpoint, OVERHEAD};

/// The period of the timers of the protocol, whose shortest time is 5 s.
const TICK: Duration = Duration::from_millis(250);
/// How long a thread waits for space in the socket's buffer, before it drops a packet.
const PATIENCE: Duration = Duration::from_millis(100);

/// A running device. Dropping it stops the threads and deletes the device.
#[derive(Debug)]
pub struct Userspace {
    name: IfName,
    port: u16,
    engine: Arc<Engine>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Closed to stop the threads.
    stop: Option<OwnedFd>,
}

impl Userspace {
    /// Creates the device, binds the socket for both address families and starts the threads. The caller brings the device up and
    /// sets its MTU, which must also be stated here: packets are padded up to it. With port 0 the kernel chooses one.
    ///
    /// # Errors
    /// When the device cannot be created, or the port is in use.
    pub fn start(name: IfName, key: &PrivateKey, port: u16, mtu: u32) -> io::Result<Userspace> {
        let device = open_device(name, "wireguard")?;
        let transport =
            Transport::open(port).map_err(|error| io::Error::new(error.kind(), format!("cannot bind UDP port {port}: {error}")))?;
        let port = transport.socket.local_addr()?.port();
        let (wake, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let engine = Arc::new(Engine::new(key, mtu));
        let (out_device, out_transport, out_engine, out_wake) =
            (device.try_clone()?, transport.try_clone()?, engine.clone(), wake.try_clone()?);
        let (timer_transport, timer_engine, timer_wake) = (transport.try_clone()?, engine.clone(), wake.try_clone()?);
        let in_engine = engine.clone();
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let threads = vec![
            thread("wg-out").spawn(move || {
                let mut sealed = batch_buffers(LARGEST + OVERHEAD);
                while_open(&out_device, &out_wake, |buffers| send_all(&out_device, &out_transport, &out_engine, buffers, &mut sealed));
            })?,
            thread("wg-in").spawn(move || {
                let mut scratch = vec![0; LARGEST + OVERHEAD];
                while_open(&transport.socket, &wake, |buffers| deliver_all(&device, &transport, &in_engine, buffers, &mut scratch));
            })?,
            thread("wg-timer").spawn(move || {
                let mut scratch = vec![0; LARGEST + OVERHEAD];
                while sleep(&timer_wake, TICK) {
                    timer_engine.tick(Instant::now(), &mut scratch, &|datagram, to| timer_transport.send(datagram, to));
                }
            })?,
        ];
        Ok(Userspace { name, port, engine, threads, stop: Some(stop) })
    }

    /// The name of the device.
    pub fn name(&self) -> IfName {
        self.name
    }

    /// The UDP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The public key of this device.
    pub fn public_key(&self) -> PublicKey {
        self.engine.public_key()
    }

    /// Whether all threads are running. A thread ends when another program deletes the device.
    pub fn is_running(&self) -> bool {
        !self.threads.iter().any(std::thread::JoinHandle::is_finished)
    }

    /// States that the MTU of the device was changed.
    pub fn set_mtu(&self, mtu: u32) {
        self.engine.set_mtu(mtu);
    }

    /// Gives the device another private key, which is used from the next handshakes on; they begin soon. Sessions go on until then, for
    /// at most their lifetime. A peer whose key is the new one is removed.
    pub fn set_key(&self, key: &PrivateKey) {
        self.engine.set_key(key, Instant::now());
    }

    /// Adds a peer, or changes the one with this key; its session is kept, also if the preshared key is another: that is used from the
    /// next handshake on, which begins soon. The peer has the stated subnets and no others; a subnet that was another peer's moves to
    /// this one. Without an endpoint, the known one is kept.
    ///
    /// # Errors
    /// When the key is this device's own.
    pub fn set_peer(&self, peer: &PeerConfig) -> io::Result<()> {
        self.engine.set_peer(peer, true)
    }

    /// The same, but the peer keeps the subnets that it has.
    ///
    /// # Errors
    /// When the key is this device's own.
    pub fn update_peer(&self, peer: &PeerConfig) -> io::Result<()> {
        self.engine.set_peer(peer, false)
    }

    /// Gives a subnet to a peer, and takes it from the one that has it. Returns whether the peer exists.
    pub fn allow(&self, peer: &PublicKey, subnet: Subnet) -> bool {
        self.engine.allow(peer, subnet)
    }

    /// Takes a subnet from the peer that has it.
    pub fn forbid(&self, subnet: Subnet) {
        self.engine.forbid(subnet);
    }

    /// Removes a peer and its session. Returns whether there was one with this key.
    pub fn remove_peer(&self, key: &PublicKey) -> bool {
        self.engine.remove_peer(key)
    }

    /// All peers, by public key.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.engine.peers()
    }
}

impl Drop for Userspace {
    fn drop(&mut self) {
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has also ended.
            let _ = thread.join();
        }
    }
}

/// The UDP socket. It carries both address families, or only IPv4 where the kernel has no IPv6.
#[derive(Debug)]
struct Transport {
    socket: UdpSocket,
    v6: bool,
}

impl Transport {
    fn open(port: u16) -> io::Result<Transport> {
        let (socket, v6) = match sys::socket(libc::AF_INET6, libc::SOCK_DGRAM, 0) {
            Ok(socket) => (socket, true),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => (sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?, false),
            Err(error) => return Err(error),
        };
        let fd = socket.as_fd();
        if v6 {
            sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
            // Answers leave from the address that the peer sent to, which its firewall expects.
            sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
        }
        for (force, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
            sys::set_option(fd, libc::SOL_SOCKET, force, BUFFER).or_else(|_| sys::set_option(fd, libc::SOL_SOCKET, plain, BUFFER))?;
        }
        // As the kernel's WireGuard does: a datagram that a router on the way cannot carry whole is fragmented, not lost.
        sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        let address: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        rustix::net::bind(fd, &SocketAddr::new(address, port))?;
        let socket = UdpSocket::from(socket);
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Transport { socket, v6 })
    }

    fn try_clone(&self) -> io::Result<Transport> {
        Ok(Transport { socket: self.socket.try_clone()?, v6: self.v6 })
    }

    fn datagram<'a>(&self, bytes: &'a [u8], to: Endpoint) -> Datagram<'a> {
        let (remote, source) = match to.remote {
            SocketAddr::V4(remote) if self.v6 => (SocketAddrV6::new(remote.ip().to_ipv6_mapped(), remote.port(), 0, 0).into(), to.local),
            SocketAddr::V6(_) if self.v6 => (to.remote, to.local),
            _ => (to.remote, None),
        };
        Datagram { bytes, to: remote, source }
    }

    /// Sends one datagram. An error (no route, no space) affects this one only.
    fn send(&self, bytes: &[u8], to: Endpoint) {
        sys::send_many(self.socket.as_fd(), &[self.datagram(bytes, to)]);
    }
}

/// Waits, and returns whether the other end of `wake` is still open.
fn sleep(wake: &OwnedFd, time: Duration) -> bool {
    let time = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
    let mut polled = [PollFd::new(wake, PollFlags::IN)];
    match rustix::event::poll(&mut polled, Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => polled[0].revents().is_empty(),
        Err(_) => false,
    }
}

/// Reads pending packets from the device, and sends them encrypted to the peers of their destinations.
fn send_all(mut device: &File, transport: &Transport, engine: &Engine, buffers: &mut [Vec<u8>], sealed: &mut [Vec<u8>]) -> io::Result<()> {
    let mut packets: Vec<Packet<'_>> = Vec::with_capacity(BATCH);
    let mut outcome = Ok(());
    for buffer in buffers {
        match device.read(buffer) {
            Ok(length) => packets.push(Packet { buffer, length }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    let ready = engine.seal(&mut packets, sealed, Instant::now());
    let datagram = |(at, length, to): &(usize, usize, Endpoint)| transport.datagram(&sealed[*at][..*length], *to);
    sys::send_many(transport.socket.as_fd(), &ready.iter().map(datagram).collect::<Vec<_>>());
    outcome
}

/// Receives pending datagrams, and passes the packets in them to this host's kernel.
fn deliver_all(mut device: &File, transport: &Transport, engine: &Engine, buffers: &mut [Vec<u8>], scratch: &mut [u8]) -> io::Result<()> {
    let received = sys::receive_many(transport.socket.as_fd(), buffers)?;
    let now = Instant::now();
    for (buffer, Received { length, from, destination }) in buffers.iter().zip(received) {
        let from = Endpoint::new(from, destination);
        let datagram = buffer.get(..length).unwrap_or_default();
        let Some(packet) = engine.open(datagram, from, now, scratch, &|datagram, to| transport.send(datagram, to)) else { continue };
        match device.write_all(packet) {
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
            // Another error affects this packet only.
            _ => {}
        }
    }
    Ok(())
}
