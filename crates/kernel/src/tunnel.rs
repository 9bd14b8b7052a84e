//! The data path of the udp backend: a TUN device and a UDP socket, with a thread in each direction. What happens to a
//! packet is decided by [`flannel::backend::udp`]; packets are read and sent in batches where the kernel has several
//! (Linux `Documentation/networking/tuntap.rst`, `recvmmsg(2)`, `sendmmsg(2)`).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, PoisonError, RwLock};

use flannel::backend::udp::{Table, Verdict, inbound, outbound};
use flannel::{Cidr, IfName, Subnet};
use rustix::event::{PollFd, PollFlags};

use crate::sys;

/// Packets that are moved at once.
const BATCH: usize = 64;
/// Bytes of the largest packet.
const LARGEST: usize = 65_535;
/// What is asked for as the socket's buffers: bursts of a fast link wait here.
const BUFFER: libc::c_int = 4 * 1024 * 1024;

/// A running tunnel. It ends, and with it the device, when this is dropped.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// The device.
    pub(crate) name: IfName,
    /// The address that the socket is bound to.
    pub(crate) local: IpAddr,
    /// The UDP port.
    pub(crate) port: u16,
    table: Arc<RwLock<Table>>,
    /// This host's address on the device, by which it answers for what is unreachable.
    own: Arc<RwLock<Ipv4Addr>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Closed to end the threads.
    stop: Option<OwnedFd>,
}

impl Tunnel {
    /// Creates the device, binds the socket and starts to carry packets.
    pub(crate) fn start(name: IfName, local: IpAddr, port: u16) -> io::Result<Tunnel> {
        let IpAddr::V4(address) = local else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the udp backend carries IPv4 only"));
        };
        let device = open_device(name)?;
        let socket = UdpSocket::bind(SocketAddrV4::new(address, port))
            .map_err(|error| io::Error::new(error.kind(), format!("cannot bind UDP {address}:{port}: {error}")))?;
        socket.set_nonblocking(true)?;
        for option in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
            sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, BUFFER)?;
        }
        let (wake, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (table, own) = (Arc::<RwLock<Table>>::default(), Arc::new(RwLock::new(Ipv4Addr::UNSPECIFIED)));
        let (out_device, out_socket, out_wake) = (device.try_clone()?, socket.try_clone()?, wake.try_clone()?);
        let (out_table, out_own) = (table.clone(), own.clone());
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let threads = vec![
            thread("udp-out").spawn(move || {
                while_open(&out_device, &out_wake, |buffers| send_all(&out_device, &out_socket, &out_table, &out_own, port, buffers))
            })?,
            thread("udp-in").spawn(move || while_open(&socket, &wake, |buffers| deliver_all(&device, &socket, buffers)))?,
        ];
        Ok(Tunnel { name, local, port, table, own, threads, stop: Some(stop) })
    }

    /// Are packets carried in both directions? A thread ends when somebody deletes the device.
    pub(crate) fn is_running(&self) -> bool {
        !self.threads.iter().any(std::thread::JoinHandle::is_finished)
    }

    /// Packets for `subnet` go to `host`, or nowhere.
    pub(crate) fn set(&self, subnet: Subnet, host: Option<IpAddr>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        match host {
            Some(IpAddr::V4(host)) => table.insert(subnet, host),
            _ => table.remove(subnet),
        }
    }

    /// The device has this address now.
    pub(crate) fn set_address(&self, address: Cidr) {
        if let IpAddr::V4(ip) = address.addr {
            *self.own.write().unwrap_or_else(PoisonError::into_inner) = ip;
        }
    }

    /// Where packets go.
    pub(crate) fn entries(&self) -> Vec<(Subnet, IpAddr)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.iter().map(|(subnet, host)| (subnet, IpAddr::V4(host))).collect()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

fn open_device(name: IfName) -> io::Result<File> {
    let open = || {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        sys::tun_attach(file.as_fd(), name.as_str())?;
        Ok(file)
    };
    open().map_err(|error: io::Error| {
        let advice = match error.raw_os_error() {
            Some(libc::EBUSY) => ": another process has it, perhaps a second flanneld",
            Some(libc::ENOENT | libc::EPERM | libc::EACCES) => ": the udp backend needs /dev/net/tun; a container must be given it",
            _ => "",
        };
        io::Error::new(error.kind(), format!("cannot create the TUN device {name}: {error}{advice}"))
    })
}

/// Waits for `source` and calls `work` until the other end of `wake` is closed, or the device is deleted.
fn while_open(source: &impl AsFd, wake: &OwnedFd, mut work: impl FnMut(&mut [Vec<u8>]) -> io::Result<()>) {
    let mut buffers = vec![vec![0; LARGEST]; BATCH];
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
            // EBADFD: the device was deleted by somebody. The loop that watches links makes another.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return,
            // What a single packet runs into (no route, no buffer) is that packet's loss.
            _ => {}
        }
    }
}

/// Reads what pods send until there is no more, and sends it to the hosts of its destinations.
fn send_all(
    mut device: &File,
    socket: &UdpSocket,
    table: &RwLock<Table>,
    own: &RwLock<Ipv4Addr>,
    port: u16,
    buffers: &mut [Vec<u8>],
) -> io::Result<()> {
    let mut ready: Vec<(usize, usize, SocketAddrV4)> = Vec::with_capacity(BATCH);
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
        let verdict = outbound(&mut buffer[..length], &table.read().unwrap_or_else(PoisonError::into_inner), own);
        match verdict {
            Verdict::Send(host) => ready.push((at, length, SocketAddrV4::new(host, port))),
            // An answer that cannot be given is missed by its asker alone.
            Verdict::Answer(answer) => drop(device.write_all(&answer)),
            Verdict::Deliver | Verdict::Drop => {}
        }
    }
    let packets: Vec<(&[u8], SocketAddrV4)> = ready.iter().map(|(at, length, to)| (&buffers[*at][..*length], *to)).collect();
    sys::send_many(socket.as_fd(), &packets);
    outcome
}

/// Receives what other hosts send until there is no more, and gives it to this host's kernel.
fn deliver_all(mut device: &File, socket: &UdpSocket, buffers: &mut [Vec<u8>]) -> io::Result<()> {
    let lengths = sys::receive_many(socket.as_fd(), buffers)?;
    for (buffer, length) in buffers.iter_mut().zip(lengths) {
        let packet = buffer.get_mut(..length).unwrap_or_default();
        if inbound(packet) == Verdict::Deliver
            && let Err(error) = device.write_all(packet)
            && error.raw_os_error() == Some(libc::EBADFD)
        {
            return Err(error);
        }
    }
    Ok(())
}
