//! Netlink messages as bytes: building them in one buffer, and reading attributes out of them (`linux/netlink.h`).

use std::ops::Range;

use super::{NLM_F_ACK, NLM_F_REQUEST};

pub(super) const HEADER: usize = 16;

/// Complete netlink messages in one buffer.
#[derive(Debug, Default)]
pub struct Batch {
    pub(super) buffer: Vec<u8>,
    /// The start of each message.
    pub(super) starts: Vec<usize>,
    /// The messages with an attribute that is too long for its length field. They are not sent.
    oversized: Vec<usize>,
}

impl Batch {
    /// Makes an empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Appends a message with its type, its flags in addition to `NLM_F_REQUEST`, and the content that `body` writes.
    pub fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Body<'_>)) -> &mut Batch {
        let start = self.buffer.len();
        self.starts.push(start);
        self.buffer.extend([0; 4]);
        self.buffer.extend(kind.to_ne_bytes());
        self.buffer.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        self.buffer.extend([0; 8]);
        let mut is_oversized = false;
        body(&mut Body { buffer: &mut self.buffer, is_oversized: &mut is_oversized });
        if is_oversized {
            self.oversized.push(self.starts.len() - 1);
        }
        let length = u32::try_from(self.buffer.len() - start).expect("a message is smaller than 4 GiB");
        self.buffer[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        pad(&mut self.buffer);
        self
    }

    /// The number of messages.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is no message.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The messages as they would be sent.
    #[cfg(test)]
    pub(crate) fn bytes_for_tests(&self) -> &[u8] {
        &self.buffer
    }

    /// Refuses messages that cannot be sent, as the kernel refuses one that is too long.
    pub(super) fn check(&self, from: usize, to: usize) -> std::io::Result<()> {
        let is_oversized = self.oversized.iter().any(|at| (from..to).contains(at));
        if is_oversized { Err(std::io::Error::from_raw_os_error(libc::EMSGSIZE)) } else { Ok(()) }
    }

    pub(super) fn ask_for_ack(&mut self, start: usize) {
        let flags = u16_at(&self.buffer, start + 6).unwrap_or(0) | NLM_F_ACK;
        self.buffer[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
    }

    /// The range of bytes that a range of messages has in the buffer.
    pub(super) fn byte_range(&self, messages: Range<usize>) -> Range<usize> {
        self.starts[messages.start]..self.starts.get(messages.end).copied().unwrap_or(self.buffer.len())
    }
}

fn pad(buffer: &mut Vec<u8>) {
    buffer.resize(buffer.len().next_multiple_of(4), 0);
}

/// The content of a message or of a nested attribute.
#[derive(Debug)]
pub struct Body<'a> {
    buffer: &'a mut Vec<u8>,
    is_oversized: &'a mut bool,
}

impl Body<'_> {
    /// Appends raw bytes, such as the fixed header of the family.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.buffer.extend_from_slice(bytes);
        self
    }

    /// The offset in the batch at which the next byte is written, for [`Body::set`].
    pub fn offset(&self) -> usize {
        self.buffer.len()
    }

    /// Overwrites the byte at an offset in the batch.
    pub fn set(&mut self, offset: usize, byte: u8) {
        self.buffer[offset] = byte;
    }

    /// Appends an attribute.
    pub fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        match u16::try_from(value.len() + 4) {
            Ok(length) => {
                self.buffer.extend(length.to_ne_bytes());
                self.buffer.extend(kind.to_ne_bytes());
                self.buffer.extend_from_slice(value);
                pad(self.buffer);
            }
            Err(_) => *self.is_oversized = true,
        }
        self
    }

    /// Appends a 32-bit attribute in host order.
    pub fn attr_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a zero-terminated string attribute.
    pub fn attr_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Appends an address attribute in network order.
    pub fn attr_ip(&mut self, kind: u16, ip: std::net::IpAddr) -> &mut Self {
        match ip {
            std::net::IpAddr::V4(ip) => self.attr(kind, &ip.octets()),
            std::net::IpAddr::V6(ip) => self.attr(kind, &ip.octets()),
        }
    }

    /// Appends an attribute with the nested attributes that `inside` writes.
    pub fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Body<'_>)) -> &mut Self {
        const NLA_F_NESTED: u16 = 0x8000;
        let start = self.buffer.len();
        self.buffer.extend([0; 2]);
        self.buffer.extend((kind | NLA_F_NESTED).to_ne_bytes());
        inside(&mut Body { buffer: self.buffer, is_oversized: self.is_oversized });
        match u16::try_from(self.buffer.len() - start) {
            Ok(length) => self.buffer[start..start + 2].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => *self.is_oversized = true,
        }
        self
    }
}

/// The attributes in `bytes`: kind without flags, and value. The iterator ends at the first truncated attribute.
pub fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// The 16-bit number in host order at this offset.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// The 32-bit number in host order at this offset.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// The address in an attribute of 4 or 16 bytes.
pub fn ip_in(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}

/// The text in an attribute, up to its terminating zero.
pub fn str_in(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).ok()
}

/// A received message.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// `nlmsg_seq`
    pub seq: u32,
    /// `nlmsg_pid`: in a notification, the port ID of the process that caused the change, or 0.
    pub port: u32,
    /// The content after the header.
    pub body: &'a [u8],
}

/// The messages in a datagram. The iterator ends at the first truncated message.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let body = bytes.get(HEADER..length)?;
        let (kind, flags) = (u16_at(bytes, 4)?, u16_at(bytes, 6)?);
        let (seq, port) = (u32_at(bytes, 8)?, u32_at(bytes, 12)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Received { kind, flags, seq, port, body })
    })
}
