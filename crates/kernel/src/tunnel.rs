//! The data path of the udp backend: a TUN device and a UDP socket, with a thread for each direction. [`flannel::backend::udp`] decides
//! what happens to a packet. Packets are read and sent in batches (Linux `Documentation/networking/tuntap.rst`, `recvmmsg(2)`,
//! `sendmmsg(2)`).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use flannel::backend::udp::{DropReason, Table, Verdict, inbound, outbound};
use flannel::{Cidr, IfName, Subnet};
use rustix::event::{PollFd, PollFlags};

use crate::sys::{self, Datagram, Received};

/// The number of packets in a batch.
pub(crate) const BATCH: usize = 64;
/// The size of the largest packet in bytes.
pub(crate) const LARGEST: usize = 65_535;
/// The requested size of the socket's buffers, which hold bursts of a fast link.
pub(crate) const BUFFER: libc::c_int = 4 * 1024 * 1024;
/// The number of packets that wait in the device while its thread waits for a processor. TUN's own 500 are 8 ms at 700 Mbit/s, and
/// more is lost; hardware devices have 1,000.
const QUEUE: libc::c_int = 1000;

/// Counts the packets that the data path drops, by reason. Clones are the same counters.
#[derive(Debug, Clone, Default)]
pub struct Drops(Arc<[AtomicU64; DropReason::ALL.len()]>);

impl Drops {
    fn count(&self, reason: DropReason) {
        for (counter, of) in self.0.iter().zip(DropReason::ALL) {
            if of == reason {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The packets dropped since the start, by reason.
    pub fn read(&self) -> Vec<(DropReason, u64)> {
        self.0.iter().zip(DropReason::ALL).map(|(counter, reason)| (reason, counter.load(Ordering::Relaxed))).collect()
    }
}

/// The same if they are the same counters: what they count may differ from one moment to the next.
impl PartialEq for Drops {
    fn eq(&self, other: &Drops) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Drops {}

/// What both threads need.
#[derive(Debug, Clone)]
struct Shared {
    table: Arc<RwLock<Table>>,
    /// The address that the socket is bound to: the table assigns this host's subnet to it.
    local: Ipv4Addr,
    drops: Drops,
}

/// A running tunnel. Dropping it stops the threads and deletes the device.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// The device.
    pub(crate) name: IfName,
    /// The address that the socket is bound to.
    pub(crate) local: IpAddr,
    /// The UDP port.
    pub(crate) port: u16,
    shared: Shared,
    /// This host's address on the device, the source of "unreachable" answers.
    own: Arc<RwLock<Ipv4Addr>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Closed to stop the threads.
    stop: Option<OwnedFd>,
}

impl Tunnel {
    /// Creates the device, binds the socket and starts the threads.
    pub(crate) fn start(name: IfName, local: IpAddr, port: u16, drops: &Drops) -> io::Result<Tunnel> {
        let IpAddr::V4(address) = local else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the udp backend carries IPv4 only"));
        };
        let device = open_device(name, "udp")?;
        let socket = UdpSocket::bind(SocketAddrV4::new(address, port))
            .map_err(|error| io::Error::new(error.kind(), format!("cannot bind UDP {address}:{port}: {error}")))?;
        socket.set_nonblocking(true)?;
        for option in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
            sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, BUFFER)?;
        }
        let (wake, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let shared = Shared { table: Arc::default(), local: address, drops: drops.clone() };
        let own = Arc::new(RwLock::new(Ipv4Addr::UNSPECIFIED));
        let (out_device, out_socket, out_wake) = (device.try_clone()?, socket.try_clone()?, wake.try_clone()?);
        let (out_shared, in_shared, out_own) = (shared.clone(), shared.clone(), own.clone());
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let threads = vec![
            thread("udp-out").spawn(move || {
                while_open(&out_device, &out_wake, |buffers| send_all(&out_device, (&out_socket, port), &out_shared, &out_own, buffers))
            })?,
            thread("udp-in").spawn(move || while_open(&socket, &wake, |buffers| deliver_all(&device, &socket, &in_shared, buffers)))?,
        ];
        Ok(Tunnel { name, local, port, shared, own, threads, stop: Some(stop) })
    }

    /// Whether both threads are running. A thread ends when another program deletes the device.
    pub(crate) fn is_running(&self) -> bool {
        !self.threads.iter().any(std::thread::JoinHandle::is_finished)
    }

    /// Forwards packets for `subnet` to `host`, or drops them if there is none.
    pub(crate) fn set(&self, subnet: Subnet, host: Option<IpAddr>) {
        let mut table = self.shared.table.write().unwrap_or_else(PoisonError::into_inner);
        match host {
            Some(IpAddr::V4(host)) => table.insert(subnet, host),
            _ => table.remove(subnet),
        }
    }

    /// Sets the address of the device, if it is an IPv4 address.
    pub(crate) fn set_address(&self, address: Cidr) {
        if let IpAddr::V4(ip) = address.addr {
            *self.own.write().unwrap_or_else(PoisonError::into_inner) = ip;
        }
    }

    /// The entries of the forwarding table.
    pub(crate) fn entries(&self) -> Vec<(Subnet, IpAddr)> {
        let table = self.shared.table.read().unwrap_or_else(PoisonError::into_inner);
        table.iter().map(|(subnet, host)| (subnet, IpAddr::V4(host))).collect()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has also ended.
            let _ = thread.join();
        }
    }
}

/// Creates a TUN device for a backend.
pub(crate) fn open_device(name: IfName, backend: &str) -> io::Result<File> {
    let open = || {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        sys::tun_attach(file.as_fd(), name.as_str())?;
        let socket = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        sys::set_queue_length(socket.as_fd(), name.as_str(), QUEUE)?;
        Ok(file)
    };
    open().map_err(|error: io::Error| {
        let advice = match error.raw_os_error() {
            Some(libc::EBUSY) => ": another process uses it, possibly a second flanneld".to_owned(),
            Some(libc::ENOENT | libc::EPERM | libc::EACCES) => {
                format!(": the {backend} backend needs /dev/net/tun: add this device to the container")
            }
            _ => String::new(),
        };
        io::Error::new(error.kind(), format!("cannot create the TUN device {name}: {error}{advice}"))
    })
}

/// Buffers for a batch. Each is allocated as zeros, so that only the pages that packets use take memory.
pub(crate) fn batch_buffers(length: usize) -> Vec<Vec<u8>> {
    (0..BATCH).map(|_| vec![0; length]).collect()
}

/// Waits for `source` and calls `work` until the other end of `wake` is closed, or the device is deleted.
pub(crate) fn while_open(source: &impl AsFd, wake: &OwnedFd, mut work: impl FnMut(&mut [Vec<u8>]) -> io::Result<()>) {
    let mut buffers = batch_buffers(LARGEST);
    loop {
        let mut polled = [PollFd::new(source, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        if !polled[1].revents().is_empty() {
            return;
        }
        match work(&mut buffers) {
            // EBADFD: another program deleted the device. The reconciler creates it again.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return,
            // Other errors (no route, no buffer) affect a single packet.
            _ => {}
        }
    }
}

/// Reads pending packets from the device, and sends them to the hosts of their destinations.
fn send_all(
    mut device: &File,
    (socket, port): (&UdpSocket, u16),
    shared: &Shared,
    own: &RwLock<Ipv4Addr>,
    buffers: &mut [Vec<u8>],
) -> io::Result<()> {
    let mut ready: Vec<(usize, usize, SocketAddr)> = Vec::with_capacity(BATCH);
    let mut outcome = Ok(());
    for (at, buffer) in buffers.iter_mut().enumerate() {
        let length = match device.read(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        };
        let own = *own.read().unwrap_or_else(PoisonError::into_inner);
        let table = shared.table.read().unwrap_or_else(PoisonError::into_inner);
        let verdict = outbound(&mut buffer[..length], &table, shared.local, own);
        drop(table);
        match verdict {
            Verdict::Send(host) => ready.push((at, length, SocketAddrV4::new(host, port).into())),
            // A lost answer affects only the sender of the packet.
            Verdict::Answer(answer) => drop(device.write_all(&answer)),
            Verdict::Drop(reason) => shared.drops.count(reason),
            Verdict::Deliver => {}
        }
    }
    let datagram = |(at, length, to): &(usize, usize, SocketAddr)| Datagram { bytes: &buffers[*at][..*length], to: *to, source: None };
    sys::send_many(socket.as_fd(), &ready.iter().map(datagram).collect::<Vec<_>>());
    outcome
}

/// Receives pending packets from other hosts, and passes those of peers to this host's kernel.
fn deliver_all(mut device: &File, socket: &UdpSocket, shared: &Shared, buffers: &mut [Vec<u8>]) -> io::Result<()> {
    let received = sys::receive_many(socket.as_fd(), buffers)?;
    let table = shared.table.read().unwrap_or_else(PoisonError::into_inner);
    for (buffer, Received { length, from, .. }) in buffers.iter_mut().zip(received) {
        let packet = buffer.get_mut(..length).unwrap_or_default();
        let IpAddr::V4(sender) = from.ip() else { continue };
        match inbound(packet, sender, &table, shared.local) {
            Verdict::Deliver => match device.write_all(packet) {
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                // Another error affects this packet only.
                _ => {}
            },
            Verdict::Drop(reason) => shared.drops.count(reason),
            Verdict::Send(_) | Verdict::Answer(_) => {}
        }
    }
    Ok(())
}
