//! Captures frames on one interface with a packet socket (packet(7)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::sys;

/// A capture on one interface. The kernel buffers frames from [`Capture::open`] on.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
}

impl Capture {
    /// Starts a capture on the interface with this index, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the privilege is missing (`CAP_NET_RAW`) or the interface does not exist.
    pub fn open(index: u32) -> io::Result<Capture> {
        // Protocol 0 captures nothing before the socket is bound, so that no frame of another interface is captured.
        let fd = sys::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        sys::bind_packet(fd.as_fd(), index)?;
        Ok(Capture { fd })
    }

    /// Waits at most `timeout` for the first frame for which `wanted` returns a value, and returns that value.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn find<T>(&self, timeout: Duration, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> io::Result<Option<T>> {
        let end = Instant::now() + timeout;
        let mut buffer = vec![0; 65_536];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut poll = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::IN)];
            let left =
                rustix::event::Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
            if rustix::event::poll(&mut poll, Some(&left))? == 0 {
                return Ok(None);
            }
            let length = sys::recv(self.fd.as_fd(), &mut buffer, libc::MSG_DONTWAIT)?.min(buffer.len());
            if let Some(found) = wanted(&buffer[..length]) {
                return Ok(Some(found));
            }
        }
    }
}
