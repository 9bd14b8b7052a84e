//! System calls that no safe wrapper covers: netlink and packet sockets, namespaces' types, and what a child process
//! does between fork and exec. Everything here is a thin function around one call.

use std::io;
use std::mem::{size_of, zeroed};
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
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets an integer socket option.
pub(crate) fn set_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len::<libc::c_int>()) }).map(drop)
}

/// Binds a netlink socket to a port of the kernel's choice and returns the port.
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

/// Sends one datagram; for netlink that is the whole batch or nothing.
pub(crate) fn send(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `data`.
    let sent = unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one datagram and returns its whole length, which exceeds the buffer's when it was cut.
pub(crate) fn recv(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: the pointer and the length describe `buffer`, which is written by the call.
    let got = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags | libc::MSG_TRUNC) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Is the descriptor a network namespace? (`NS_GET_NSTYPE`, `linux/nsfs.h`)
pub(crate) fn is_network_namespace(fd: BorrowedFd<'_>) -> bool {
    // _IO(0xb7, 3): how that is written as a number differs between architectures.
    const NS_GET_NSTYPE: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0xb7, 3);
    // SAFETY: this request takes no argument; on a descriptor that is no namespace it fails with ENOTTY.
    unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) == libc::CLONE_NEWNET }
}

/// Leaves the namespaces given by `CLONE_NEW…` flags for new ones. The caller must have one thread when a user
/// namespace is among them.
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: unshare(2) takes no pointers. None of our flags (user, mount and network namespaces) unshares what
    // Rust's library shares between threads, such as descriptors.
    check(unsafe { libc::unshare(flags) }).map(drop)
}

/// Makes the command's process receive SIGKILL when the thread that spawned it ends, so that nothing outlives a
/// supervisor that crashed.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let die = move || {
        // SAFETY: prctl(PR_SET_PDEATHSIG) takes no pointers.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        // A parent that ended before this call sends no signal any more.
        // SAFETY: getppid(2) takes no arguments and cannot fail.
        if unsafe { libc::getppid() }.cast_unsigned() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: the closure makes two system calls and allocates nothing, so it is sound between fork and exec.
    unsafe { command.pre_exec(die) };
}
