//! A netlink client (`linux/netlink.h`; Linux `Documentation/userspace-api/netlink/intro.rst`). Messages are built in one buffer, a
//! batch is one `send`, and answers are matched by sequence number. Strict checking is enabled, so that the kernel filters dumps;
//! extended acks become part of the error.

mod message;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use flannel::OpError;
use thiserror::Error;

use self::message::HEADER;
pub use self::message::{Batch, Body, Received, attrs, ip_in, messages, str_in, u16_at, u32_at};
use crate::sys;

/// The netlink family of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`: links, addresses, routes, neighbours.
    Route,
    /// `NETLINK_NETFILTER`: nf_tables.
    Netfilter,
    /// `NETLINK_GENERIC`: WireGuard.
    Generic,
}

/// The error of a netlink operation.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// The socket itself failed.
    #[error("netlink socket: cannot {0}: {1}")]
    Socket(&'static str, io::Error),
    /// The kernel refused the request.
    #[error("{}{}", io::Error::from_raw_os_error(*.errno), if .message.is_empty() { String::new() } else { format!(" ({})", .message) })]
    Refused {
        /// The error number of `errno.h`.
        errno: i32,
        /// The kernel's extended ack; may be empty.
        message: String,
    },
    /// Concurrent changes interrupted each attempt at a dump.
    #[error("the kernel's tables changed during each of {0} dumps")]
    Unstable(u32),
    /// The kernel's answer cannot be read.
    #[error("unexpected netlink answer: {0}")]
    Garbled(&'static str),
}

impl NetlinkError {
    /// The kernel's error number, if the kernel returned one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetlinkError::Refused { errno, .. } => Some(*errno),
            NetlinkError::Socket(_, error) => error.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the object does not exist (ENOENT, ESRCH, ENODEV, EADDRNOTAVAIL).
    pub fn is_not_found(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL))
    }

    /// Whether the object exists already (EEXIST).
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// Converts this into the error of an operation: the act and the reason.
    pub fn into_op_error(self, act: &dyn std::fmt::Display) -> OpError {
        OpError { errno: self.errno().unwrap_or(libc::EIO), text: format!("{act}: {self}") }
    }
}

/// `NLM_F_REQUEST`
const NLM_F_REQUEST: u16 = 0x1;
/// `NLM_F_ACK`
const NLM_F_ACK: u16 = 0x4;
/// `NLM_F_DUMP`
const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_DUMP_INTR`
const NLM_F_DUMP_INTR: u16 = 0x10;
/// `NLM_F_REPLACE`
pub const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`
pub const APPEND: u16 = 0x800;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// The number of messages in one `send`. More would gain little, because the kernel's work dominates, and if all fail, an answer for
/// each must fit into the receive buffer.
const CHUNK: usize = 256;

/// The size of the receive buffer in user space. The datagrams of a dump are much smaller. From this size on the allocator maps fresh
/// pages, which need no clearing and use no memory until they are touched.
const BUFFER: usize = 256 * 1024;

/// The requested size of the socket's receive buffer in the kernel, which may grant less.
const KERNEL_BUFFER: libc::c_int = 4 * 1024 * 1024;

/// A netlink socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    seq: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open(protocol: Protocol) -> Result<Socket, NetlinkError> {
        let number = match protocol {
            Protocol::Route => libc::NETLINK_ROUTE,
            Protocol::Netfilter => libc::NETLINK_NETFILTER,
            Protocol::Generic => libc::NETLINK_GENERIC,
        };
        let fd = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, number).map_err(|e| NetlinkError::Socket("open it", e))?;
        let set = |option| sys::set_option(fd.as_fd(), libc::SOL_NETLINK, option, 1).map_err(|e| NetlinkError::Socket("set an option", e));
        set(libc::NETLINK_EXT_ACK)?;
        set(libc::NETLINK_CAP_ACK)?;
        if protocol == Protocol::Route {
            set(libc::NETLINK_GET_STRICT_CHK)?;
        }
        // A size above the system's limit needs CAP_NET_ADMIN in the initial user namespace; without it the limit is enough.
        if sys::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, KERNEL_BUFFER).is_err() {
            sys::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, KERNEL_BUFFER)
                .map_err(|e| NetlinkError::Socket("size its buffer", e))?;
        }
        let port = sys::bind_netlink(fd.as_fd()).map_err(|e| NetlinkError::Socket("bind it", e))?;
        Ok(Socket { fd, port, seq: 0, buffer: vec![0; BUFFER] })
    }

    /// Joins a multicast group.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn join(&self, group: u32) -> Result<(), NetlinkError> {
        let group = libc::c_int::try_from(group).expect("groups are small numbers");
        sys::set_option(self.fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
            .map_err(|e| NetlinkError::Socket("join a multicast group", e))
    }

    /// Filters out notifications of these kinds that are caused by the socket with this port, so that they neither fill the queue nor
    /// wake the reader.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub(crate) fn filter_echoes(&self, kinds: &[u16], port: u32) -> Result<(), NetlinkError> {
        // Offsets of nlmsg_type and nlmsg_pid in struct nlmsghdr (linux/netlink.h). They are in host byte order; BPF loads in network
        // byte order.
        const KIND: u32 = 4;
        const PORT: u32 = 12;
        let step = |code: u32, (jt, jf), k| libc::sock_filter { code: u16::try_from(code).expect("codes are small"), jt, jf, k };
        let skip = |count: usize| u8::try_from(count).expect("kinds are few");
        let is = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let mut program = vec![step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, (0, 0), KIND)];
        for (at, kind) in kinds.iter().enumerate() {
            // Jump over the other kinds and the next instruction.
            program.push(step(is, (skip(kinds.len() - at), 0), kind.to_be().into()));
        }
        program.push(step(libc::BPF_RET | libc::BPF_K, (0, 0), u32::MAX));
        program.push(step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), PORT));
        program.push(step(is, (0, 1), port.to_be()));
        program.push(step(libc::BPF_RET | libc::BPF_K, (0, 0), 0));
        program.push(step(libc::BPF_RET | libc::BPF_K, (0, 0), u32::MAX));
        sys::set_filter(self.fd.as_fd(), &program).map_err(|e| NetlinkError::Socket("give it a filter", e))
    }

    /// The port that the kernel gave the socket.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sends one request and waits for its ack.
    ///
    /// # Errors
    /// The error that the kernel returns.
    pub fn request(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Body<'_>)) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.message(kind, flags, body);
        self.execute(batch).pop().unwrap_or(Err(NetlinkError::Garbled("no outcome")))
    }

    /// Sends requests in order and returns an outcome for each. Only the last request of a chunk asks for an acknowledgement; a request
    /// that fails is answered in any case.
    pub fn execute(&mut self, mut batch: Batch) -> Vec<Result<(), NetlinkError>> {
        let mut outcomes = Vec::with_capacity(batch.len());
        let mut from = 0;
        while from < batch.len() {
            let to = batch.len().min(from + CHUNK);
            match self.chunk(&mut batch, from, to, &mut outcomes) {
                Ok(()) => {}
                // Answers were lost, or the chunk did not fit. Every request is idempotent, so send each again by itself.
                Err(NetlinkError::Socket(_, error)) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EMSGSIZE)) => {
                    outcomes.truncate(from);
                    self.discard();
                    for at in from..to {
                        let outcome = self.chunk(&mut batch, at, at + 1, &mut outcomes);
                        if let Err(error) = outcome {
                            outcomes.truncate(at);
                            outcomes.push(Err(error));
                        }
                    }
                }
                Err(error) => {
                    outcomes.truncate(from);
                    let text = error.to_string();
                    outcomes.push(Err(error));
                    outcomes.resize_with(to, || Err(NetlinkError::Refused { errno: libc::EIO, message: text.clone() }));
                }
            }
            from = to;
        }
        outcomes
    }

    /// Discards pending answers: after an overrun, the socket receives nothing more until its queue was found empty.
    fn discard(&mut self) {
        loop {
            match receive(self.fd.as_fd(), &mut self.buffer, libc::MSG_DONTWAIT) {
                Err(error) if error.errno() == Some(libc::EAGAIN) => return,
                Err(error) if error.errno() != Some(libc::ENOBUFS) => return,
                _ => {}
            }
        }
    }

    /// Sends the messages `from..to` and appends an outcome for each.
    fn chunk(
        &mut self,
        batch: &mut Batch,
        from: usize,
        to: usize,
        outcomes: &mut Vec<Result<(), NetlinkError>>,
    ) -> Result<(), NetlinkError> {
        batch.check(from, to).map_err(|e| NetlinkError::Socket("send", e))?;
        let first = self.seq.wrapping_add(1);
        for at in from..to {
            self.seq = self.seq.wrapping_add(1);
            let start = batch.starts[at];
            batch.buffer[start + 8..start + 12].copy_from_slice(&self.seq.to_ne_bytes());
            if at + 1 == to {
                batch.ask_for_ack(start);
            }
        }
        self.send(&batch.buffer[batch.byte_range(from..to)])?;

        let base = outcomes.len();
        outcomes.resize_with(base + (to - from), || Ok(()));
        let last = self.seq;
        loop {
            let datagram = receive(self.fd.as_fd(), &mut self.buffer, 0)?;
            for message in messages(datagram) {
                let offset = message.seq.wrapping_sub(first);
                let Some(offset) = usize::try_from(offset).ok().filter(|offset| *offset < to - from) else { continue };
                if message.kind == NLMSG_ERROR {
                    outcomes[base + offset] = error_in(&message);
                    if message.seq == last {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Sends one request whose answer is one message, and decodes the answer with `read`.
    ///
    /// # Errors
    /// The error that the kernel returns.
    pub fn get<T>(
        &mut self,
        kind: u16,
        body: impl FnOnce(&mut Body<'_>),
        read: impl FnOnce(&[u8]) -> Option<T>,
    ) -> Result<T, NetlinkError> {
        self.begin(kind, 0, body)?;
        let datagram = receive(self.fd.as_fd(), &mut self.buffer, 0)?;
        let message = messages(datagram).find(|m| m.seq == self.seq).ok_or(NetlinkError::Garbled("an answer to another request"))?;
        if message.kind == NLMSG_ERROR {
            error_in(&message)?;
        }
        read(message.body).ok_or(NetlinkError::Garbled("a field is missing"))
    }

    /// Requests a dump and collects the messages that `read` decodes. A dump that a concurrent change made inconsistent is repeated.
    ///
    /// # Errors
    /// The error that the kernel returns; [`NetlinkError::Unstable`] when the changes do not pause.
    pub fn dump<T>(
        &mut self,
        kind: u16,
        body: impl Fn(&mut Body<'_>),
        mut read: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        const TRIES: u32 = 10;
        for _ in 0..TRIES {
            self.begin(kind, NLM_F_DUMP, &body)?;
            let mut found = Vec::new();
            let mut interrupted = false;
            'dump: loop {
                let datagram = receive(self.fd.as_fd(), &mut self.buffer, 0)?;
                for message in messages(datagram).filter(|m| m.seq == self.seq) {
                    interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                    match message.kind {
                        NLMSG_ERROR => error_in(&message)?,
                        NLMSG_DONE => {
                            let errno = u32_at(message.body, 0).map_or(0, u32::cast_signed);
                            if errno < 0 {
                                return Err(NetlinkError::Refused { errno: -errno, message: ext_ack(&message.body[4..]) });
                            }
                            break 'dump;
                        }
                        _ => found.extend(read(message.body)),
                    }
                }
            }
            if !interrupted {
                return Ok(found);
            }
        }
        Err(NetlinkError::Unstable(TRIES))
    }

    fn begin(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Body<'_>)) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.message(kind, flags, body);
        batch.check(0, 1).map_err(|e| NetlinkError::Socket("send", e))?;
        self.seq = self.seq.wrapping_add(1);
        batch.buffer[8..12].copy_from_slice(&self.seq.to_ne_bytes());
        self.send(&batch.buffer)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        sys::send(self.fd.as_fd(), bytes).map_err(|e| NetlinkError::Socket("send", e))
    }

    /// Sends messages as one nf_tables transaction: all take effect or none. The batch holds the content; this function adds the
    /// messages that begin and end the transaction.
    ///
    /// # Errors
    /// The error that the kernel returns for the first message that it refused.
    pub fn transaction(&mut self, subsystem: u16, mut batch: Batch) -> Result<(), NetlinkError> {
        const BEGIN: u16 = 16;
        const END: u16 = 17;
        batch.check(0, batch.len()).map_err(|e| NetlinkError::Socket("send", e))?;
        let nfgenmsg = [0, 0, subsystem.to_be_bytes()[0], subsystem.to_be_bytes()[1]];
        let mut whole = Batch::new();
        whole.message(BEGIN, 0, |body| {
            body.bytes(&nfgenmsg);
        });
        let offset = whole.buffer.len();
        whole.starts.extend(batch.starts.iter().map(|start| start + offset));
        whole.buffer.append(&mut batch.buffer);
        let first = self.seq.wrapping_add(1);
        let last = whole.len() - 1;
        whole.message(END, 0, |body| {
            body.bytes(&nfgenmsg);
        });
        for (at, start) in whole.starts.clone().into_iter().enumerate() {
            self.seq = self.seq.wrapping_add(1);
            whole.buffer[start + 8..start + 12].copy_from_slice(&self.seq.to_ne_bytes());
            if at == last {
                whole.ask_for_ack(start);
            }
        }
        self.discard();
        self.send(&whole.buffer)?;

        let last = first.wrapping_add(u32::try_from(last).expect("a transaction has few messages"));
        let mut outcome = Ok(());
        loop {
            let datagram = receive(self.fd.as_fd(), &mut self.buffer, 0)?;
            let ours = |m: &Received<'_>| m.kind == NLMSG_ERROR && m.seq.wrapping_sub(first) <= last.wrapping_sub(first);
            for message in messages(datagram).filter(ours) {
                let answer = error_in(&message);
                if outcome.is_ok() && answer.is_err() {
                    outcome = answer;
                }
                // The kernel answers the begin message if it refuses the whole transaction, and otherwise the last message.
                if message.seq == first || message.seq == last {
                    return outcome;
                }
            }
        }
    }

    /// Receives a notification and calls `each` with each of its messages.
    ///
    /// # Errors
    /// `ENOBUFS` in [`NetlinkError::Socket`] when notifications were lost; `EAGAIN` when `wait` is false and none is pending.
    pub fn notifications(&mut self, wait: bool, mut each: impl FnMut(Received<'_>)) -> Result<(), NetlinkError> {
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        let datagram = receive(self.fd.as_fd(), &mut self.buffer, flags)?;
        messages(datagram).for_each(&mut each);
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn receive<'a>(fd: BorrowedFd<'_>, buffer: &'a mut [u8], flags: libc::c_int) -> Result<&'a [u8], NetlinkError> {
    let length = loop {
        match sys::recv_netlink(fd, buffer, flags) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another program can send to this socket's port, with a sequence number that it guesses. The kernel's port is 0.
            Ok((_, sender)) if sender != 0 => {}
            other => break other.map(|(length, _)| length).map_err(|e| NetlinkError::Socket("receive", e))?,
        }
    };
    buffer.get(..length).ok_or(NetlinkError::Garbled("a message larger than the buffer"))
}

/// The outcome in a `struct nlmsgerr`: error 0 is an ack.
fn error_in(message: &Received<'_>) -> Result<(), NetlinkError> {
    let errno = u32_at(message.body, 0).ok_or(NetlinkError::Garbled("a truncated error"))?.cast_signed();
    if errno == 0 {
        return Ok(());
    }
    // The request's header follows; because of NETLINK_CAP_ACK, its content does not.
    let message = ext_ack(message.body.get(4 + HEADER..).unwrap_or(&[]));
    Err(NetlinkError::Refused { errno: -errno, message })
}

/// `NLMSGERR_ATTR_MSG`
fn ext_ack(bytes: &[u8]) -> String {
    attrs(bytes).find(|(kind, _)| *kind == 1).and_then(|(_, text)| str_in(text)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_decoded() {
        let mut batch = Batch::new();
        batch.message(16, 0, |body| {
            body.bytes(&[0; 16]).attr_str(3, "eth0").nest(18, |inner| {
                inner.attr(1, b"abc").attr_u32(2, 7);
            });
        });
        let message = messages(&batch.buffer).next().unwrap();
        let found: Vec<_> = attrs(&message.body[16..]).collect();
        assert_eq!(found[0], (3, b"eth0\0".as_slice()));
        let inner: Vec<_> = attrs(found[1].1).collect();
        assert_eq!(inner, [(1, b"abc".as_slice()), (2, 7u32.to_ne_bytes().as_slice())]);
    }

    #[test]
    fn oversized_attribute_is_an_error_of_its_message_only() {
        let mut batch = Batch::new();
        let longest = vec![0; usize::from(u16::MAX) - 4];
        let longer = [longest.as_slice(), &[0]].concat();
        batch.message(16, 0, |body| _ = body.attr(1, &longest));
        batch.message(16, 0, |body| _ = body.attr(1, &longer).attr_u32(2, 7));
        batch.message(16, 0, |body| _ = body.nest(3, |inside| _ = inside.attr(1, &longest).attr(2, b"more")));
        batch.message(16, 0, |body| _ = body.attr_str(1, &"x".repeat(70_000)));
        batch.message(16, 0, |body| _ = body.attr_u32(2, 7));
        let outcomes: Vec<bool> = (0..5).map(|at| batch.check(at, at + 1).is_ok()).collect();
        assert_eq!(outcomes, [true, false, false, false, true]);
        assert_eq!(batch.check(0, 5).unwrap_err().raw_os_error(), Some(libc::EMSGSIZE));
    }

    #[test]
    fn truncated_input_ends_the_iteration() {
        assert_eq!(attrs(&[8, 0, 1, 0, 1, 2]).count(), 0);
        assert_eq!(attrs(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(messages(&[20, 0, 0, 0, 1, 0]).count(), 0);
    }
}
