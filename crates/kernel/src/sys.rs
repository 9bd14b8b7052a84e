//! System calls that no safe wrapper covers: netlink and packet sockets, the type of a namespace, and the steps of a child process
//! between fork and exec. Each function is a thin wrapper around one call.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn len<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("socket addresses and options are small")
}

/// Opens a socket, close-on-exec.
pub(crate) fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets an integer socket option.
pub(crate) fn set_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len::<libc::c_int>()) }).map(drop)
}

/// Reads a socket option into a buffer that also holds the request, as ip_tables requires.
pub(crate) fn get_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut size = libc::socklen_t::try_from(buffer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the pointers describe `buffer` and `size`, which are written by the call, `buffer` within its length.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut size) }).map(drop)
}

/// Attaches a classic BPF filter to a socket (`linux/filter.h`): messages that it rejects are not queued.
pub(crate) fn set_filter(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let count = libc::c_ushort::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: count, filter: program.as_ptr().cast_mut() };
    // SAFETY: the pointer and the length describe `program`, which points to as many instructions as it says; the kernel copies them.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const program).cast(), len::<libc::sock_fprog>())
    };
    check(set).map(drop)
}

/// Binds a netlink socket to a port that the kernel chooses, and returns the port.
pub(crate) fn bind_netlink(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: all-zero is a valid sockaddr_nl.
    let mut address: libc::sockaddr_nl = unsafe { zeroed() };
    address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).expect("AF_NETLINK is 16");
    let mut size = len::<libc::sockaddr_nl>();
    // SAFETY: the pointer and the length describe `address`.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) })?;
    // SAFETY: the pointers describe `address` and `size`, which are written by the call.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut size) })?;
    Ok(address.nl_pid)
}

/// Binds a packet socket to an interface.
pub(crate) fn bind_packet(fd: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET).expect("AF_PACKET is 17");
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).expect("ETH_P_ALL is 3").to_be();
    address.sll_ifindex = i32::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the pointer and the length describe `address`.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len::<libc::sockaddr_ll>()) }).map(drop)
}

/// Sends one datagram. For netlink, either the whole batch is sent or nothing.
pub(crate) fn send(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `data`.
    let sent = unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one datagram and returns its whole length, which exceeds the length of the buffer if it was truncated.
pub(crate) fn recv(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: the pointer and the length describe `buffer`, which is written by the call.
    let got = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags | libc::MSG_TRUNC) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Receives one datagram of a netlink socket, and the port that sent it: 0 is the kernel. The length is as for [`recv`].
pub(crate) fn recv_netlink(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: libc::c_int) -> io::Result<(usize, u32)> {
    // SAFETY: all-zero is a valid sockaddr_nl.
    let mut sender: libc::sockaddr_nl = unsafe { zeroed() };
    let mut size = len::<libc::sockaddr_nl>();
    let (data, from) = (buffer.as_mut_ptr().cast(), (&raw mut sender).cast());
    // SAFETY: the pointers describe `buffer` with its length, `sender` and its size, which are written by the call.
    let got = unsafe { libc::recvfrom(fd.as_raw_fd(), data, buffer.len(), flags | libc::MSG_TRUNC, from, &raw mut size) };
    let length = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    Ok((length, sender.nl_pid))
}

/// Attaches a descriptor of `/dev/net/tun` to a TUN device with this name, which carries IP packets without a header (`TUNSETIFF` with
/// `IFF_TUN | IFF_NO_PI`, `linux/if_tun.h`).
pub(crate) fn tun_attach(fd: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    const TUNSETIFF: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<libc::c_int>(b'T', 202);
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the request reads and writes one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF as _, &raw mut request) }).map(drop)
}

/// Sets the number of packets that wait in an interface (`SIOCSIFTXQLEN`, netdevice(7)), by any socket in its network namespace.
pub(crate) fn set_queue_length(socket: BorrowedFd<'_>, name: &str, length: libc::c_int) -> io::Result<()> {
    let mut request = interface_request(name);
    // The member with the length has no name in libc; like `ifru_metric` it is an int at the start of the union.
    request.ifr_ifru.ifru_metric = length;
    // SAFETY: the request reads one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFTXQLEN as _, &raw mut request) }).map(drop)
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// The address of a UDP socket, of either family. Both begin with the family (`sockaddr(3type)`).
#[repr(C)]
union SocketAddress {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl SocketAddress {
    fn unspecified() -> SocketAddress {
        // SAFETY: all-zero is a valid sockaddr_in6, which is the largest member.
        SocketAddress { v6: unsafe { zeroed() } }
    }

    fn new(to: SocketAddr) -> SocketAddress {
        let mut address = SocketAddress::unspecified();
        match to {
            SocketAddr::V4(to) => {
                // SAFETY: all-zero is a valid sockaddr_in.
                let mut v4: libc::sockaddr_in = unsafe { zeroed() };
                v4.sin_family = libc::sa_family_t::try_from(libc::AF_INET).expect("AF_INET is 2");
                v4.sin_port = to.port().to_be();
                v4.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
                address.v4 = v4;
            }
            SocketAddr::V6(to) => {
                // SAFETY: all-zero is a valid sockaddr_in6.
                let mut v6: libc::sockaddr_in6 = unsafe { zeroed() };
                v6.sin6_family = libc::sa_family_t::try_from(libc::AF_INET6).expect("AF_INET6 is 10");
                v6.sin6_port = to.port().to_be();
                v6.sin6_addr.s6_addr = to.ip().octets();
                v6.sin6_flowinfo = to.flowinfo();
                v6.sin6_scope_id = to.scope_id();
                address.v6 = v6;
            }
        }
        address
    }

    fn read(&self) -> SocketAddr {
        // SAFETY: both members begin with the family, and every bit pattern is valid for it.
        if libc::c_int::from(unsafe { self.family }) == libc::AF_INET6 {
            // SAFETY: the union is initialized in full (zeroed at first), and every bit pattern is a valid sockaddr_in6.
            let v6 = unsafe { self.v6 };
            SocketAddrV6::new(v6.sin6_addr.s6_addr.into(), u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into()
        } else {
            // SAFETY: as above, for sockaddr_in.
            let v4 = unsafe { self.v4 };
            SocketAddrV4::new(v4.sin_addr.s_addr.to_ne_bytes().into(), u16::from_be(v4.sin_port)).into()
        }
    }
}

/// A datagram to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Datagram<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) to: SocketAddr,
    /// The address to send it from, for IPv6 sockets (which have IPv4 addresses as mapped ones). If this host does not have it any more,
    /// the kernel chooses.
    pub(crate) source: Option<Ipv6Addr>,
}

/// A received datagram, whose bytes are in the buffer with its number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received {
    /// 0 if it did not fit.
    pub(crate) length: usize,
    pub(crate) from: SocketAddr,
    /// The address that it was sent to, for IPv6 sockets with `IPV6_RECVPKTINFO`.
    pub(crate) destination: Option<Ipv6Addr>,
}

/// A control message with an address of this host (`IPV6_PKTINFO`, RFC 3542). The data follow the header without a gap (cmsg(3)).
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    info: libc::in6_pktinfo,
}

impl Control {
    fn empty() -> Control {
        // SAFETY: all-zero is a valid cmsghdr and a valid in6_pktinfo.
        unsafe { zeroed() }
    }

    fn source(address: Ipv6Addr) -> Control {
        let mut control = Control::empty();
        control.header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<libc::in6_pktinfo>()) as _;
        (control.header.cmsg_level, control.header.cmsg_type) = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);
        control.info.ipi6_addr.s6_addr = address.octets();
        control
    }

    fn destination(&self, message: &libc::mmsghdr) -> Option<Ipv6Addr> {
        let present = message.msg_hdr.msg_controllen >= (size_of::<libc::cmsghdr>() + size_of::<libc::in6_pktinfo>()) as _;
        let kind = (self.header.cmsg_level, self.header.cmsg_type);
        (present && kind == (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO)).then(|| self.info.ipi6_addr.s6_addr.into())
    }
}

/// Sends datagrams, as many in one call as the kernel accepts. Datagrams that cannot be sent are skipped.
pub(crate) fn send_many(fd: BorrowedFd<'_>, datagrams: &[Datagram<'_>]) {
    let mut addresses: Vec<SocketAddress> = datagrams.iter().map(|datagram| SocketAddress::new(datagram.to)).collect();
    let part = |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut parts: Vec<libc::iovec> = datagrams.iter().map(|datagram| part(datagram.bytes)).collect();
    let mut controls: Vec<Control> = datagrams.iter().filter_map(|datagram| datagram.source).map(Control::source).collect();
    let mut messages: Vec<libc::mmsghdr> = addresses.iter_mut().zip(&mut parts).map(|(address, part)| message(address, part)).collect();
    let mut controls = controls.iter_mut();
    for (message, datagram) in messages.iter_mut().zip(datagrams) {
        message.msg_hdr.msg_namelen = if datagram.to.is_ipv4() { len::<libc::sockaddr_in>() } else { len::<libc::sockaddr_in6>() };
        if let Some(control) = datagram.source.and_then(|_| controls.next()) {
            attach(message, control);
        }
    }
    let mut from = 0;
    while from < messages.len() {
        let count = libc::c_uint::try_from(messages.len() - from).unwrap_or(libc::c_uint::MAX);
        // SAFETY: each of the `count` headers points to an address and a part, and may point to a control message, that live in the
        // vectors above; the kernel only reads them and what the parts point to.
        let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), messages[from..].as_mut_ptr(), count, 0) };
        // An error concerns the first message.
        match usize::try_from(sent) {
            Err(_) if messages[from].msg_hdr.msg_controllen > 0 => {
                messages[from].msg_hdr.msg_control = std::ptr::null_mut();
                messages[from].msg_hdr.msg_controllen = 0;
            }
            Err(_) => from += 1,
            Ok(sent) => from += sent.max(1),
        }
    }
}

/// Receives as many datagrams as there are buffers, without waiting.
pub(crate) fn receive_many(fd: BorrowedFd<'_>, buffers: &mut [Vec<u8>]) -> io::Result<Vec<Received>> {
    let mut addresses: Vec<SocketAddress> = buffers.iter().map(|_| SocketAddress::unspecified()).collect();
    let mut controls: Vec<Control> = buffers.iter().map(|_| Control::empty()).collect();
    let mut parts: Vec<libc::iovec> =
        buffers.iter_mut().map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }).collect();
    let mut messages: Vec<libc::mmsghdr> = addresses.iter_mut().zip(&mut parts).map(|(address, part)| message(address, part)).collect();
    for (message, control) in messages.iter_mut().zip(&mut controls) {
        attach(message, control);
    }
    let count = libc::c_uint::try_from(messages.len()).unwrap_or(libc::c_uint::MAX);
    // SAFETY: each of the `count` headers points to an address, a control message and a part in the vectors above, and each part to a
    // buffer of its length; the call writes addresses, control messages and buffers, of which every bit pattern is valid.
    let got = check(unsafe { libc::recvmmsg(fd.as_raw_fd(), messages.as_mut_ptr(), count, libc::MSG_DONTWAIT, std::ptr::null_mut()) })?;
    let whole = |message: &libc::mmsghdr| message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
    let received = |((message, address), control): ((&libc::mmsghdr, &SocketAddress), &Control)| Received {
        length: if whole(message) { usize::try_from(message.msg_len).unwrap_or(0) } else { 0 },
        from: address.read(),
        destination: control.destination(message),
    };
    let filled = messages.iter().zip(&addresses).zip(&controls).take(usize::try_from(got).unwrap_or(0));
    Ok(filled.map(received).collect())
}

fn message(address: &mut SocketAddress, part: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: all-zero is a valid mmsghdr.
    let mut message: libc::mmsghdr = unsafe { zeroed() };
    message.msg_hdr.msg_name = std::ptr::from_mut(address).cast();
    message.msg_hdr.msg_namelen = len::<SocketAddress>();
    message.msg_hdr.msg_iov = part;
    message.msg_hdr.msg_iovlen = 1;
    message
}

fn attach(message: &mut libc::mmsghdr, control: &mut Control) {
    message.msg_hdr.msg_control = std::ptr::from_mut(control).cast();
    message.msg_hdr.msg_controllen = size_of::<Control>() as _;
}

/// Whether the descriptor refers to a network namespace (`NS_GET_NSTYPE`, `linux/nsfs.h`).
pub(crate) fn is_network_namespace(fd: BorrowedFd<'_>) -> bool {
    // _IO(0xb7, 3), whose numeric value differs between architectures.
    const NS_GET_NSTYPE: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0xb7, 3);
    // SAFETY: this request takes no argument; on a descriptor that is not a namespace it fails with ENOTTY.
    unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) == libc::CLONE_NEWNET }
}

/// Moves the calling thread into new namespaces, given by `CLONE_NEW…` flags. For a user namespace the process must have only one
/// thread.
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: unshare(2) takes no pointers. None of our flags (user, mount and network namespaces) unshares what
    // Rust's library shares between threads, such as descriptors.
    check(unsafe { libc::unshare(flags) }).map(drop)
}

/// Makes the command's process receive SIGKILL when the thread that spawned it ends, so that it does not outlive a crashed supervisor.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let die = move || {
        // SAFETY: prctl(PR_SET_PDEATHSIG) takes no pointers.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        // A parent that ended before this call sends no signal.
        // SAFETY: getppid(2) takes no arguments and cannot fail.
        if unsafe { libc::getppid() }.cast_unsigned() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: the closure makes two system calls and allocates nothing, so it is sound between fork and exec.
    unsafe { command.pre_exec(die) };
}

/// Makes the command's process enter a mount namespace before it starts its program.
pub(crate) fn enter_mount_namespace(command: &mut Command, namespace: OwnedFd) {
    // SAFETY: setns(2) takes no pointers.
    let enter = move || check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) }).map(drop);
    // SAFETY: the closure makes one system call and allocates nothing, so it is sound between fork and exec.
    unsafe { command.pre_exec(enter) };
}

/// Limits the allocator to one arena (mallopt(3)).
pub(crate) fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointers. The caller must call it before it starts threads, but safety does not depend on that.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Returns the allocator's free pages to the kernel (malloc_trim(3)).
pub(crate) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers and may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
