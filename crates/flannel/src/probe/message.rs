//! The datagram that daemons of this project exchange as a probe. All numbers are big-endian.
//!
//! | bytes | meaning |
//! |---|---|
//! | 0–3 | `FLPB` |
//! | 4 | version of this format: 1 |
//! | 5 | 1 request, 2 reply |
//! | 6 | 1 if it was sent to the peer's end of the pod network, 0 if to its published address |
//! | 7 | reply: 1 if the daemon is ready |
//! | 8–15 | token of the request; the reply has the same |
//! | 16–23 | reply: token of the last request of this peer that arrived through the pod network, or 0 |
//! | 24–27 | reply: objects that the daemon could not apply, at most 65,535 |
//! | 28–31 | reply: MTU for pods, in bytes |
//! | 32–47 | reply: the daemon's version, ASCII, filled up with zeros |
//!
//! Zeros follow up to the length that is measured. A reply has the length of its request, so that it cannot amplify.

/// Bytes of the shortest message.
pub const MIN: usize = 48;
const MAGIC: [u8; 5] = *b"FLPB\x01";

/// What a daemon says about itself in its replies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Its version.
    pub version: String,
    /// Whether it is ready.
    pub ready: bool,
    /// Objects that it could not apply.
    pub failures: u32,
    /// Its MTU for pods, in bytes.
    pub mtu: u32,
}

/// A message that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A request.
    Request {
        /// Its token.
        token: u64,
        /// Whether it came through the pod network.
        overlay: bool,
    },
    /// A reply.
    Reply {
        /// The token of its request.
        token: u64,
        /// The last request that arrived there through the pod network; 0 if there was none.
        arrived: u64,
        /// The peer's summary.
        summary: Summary,
    },
}

/// A request of `length` bytes, at least [`MIN`].
pub fn request(token: u64, overlay: bool, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(MIN)];
    bytes[..5].copy_from_slice(&MAGIC);
    bytes[5] = 1;
    bytes[6] = u8::from(overlay);
    bytes[8..16].copy_from_slice(&token.to_be_bytes());
    bytes
}

/// The reply to a request, of the same length.
pub fn reply(request: &[u8], arrived: u64, summary: &Summary) -> Vec<u8> {
    let mut bytes = request.to_vec();
    bytes[5] = 2;
    bytes[7] = u8::from(summary.ready);
    bytes[16..24].copy_from_slice(&arrived.to_be_bytes());
    bytes[24..28].copy_from_slice(&summary.failures.min(u32::from(u16::MAX)).to_be_bytes());
    bytes[28..32].copy_from_slice(&summary.mtu.to_be_bytes());
    bytes[32..MIN].fill(0);
    for (to, from) in bytes[32..MIN].iter_mut().zip(summary.version.bytes()) {
        *to = from;
    }
    bytes
}

/// Reads a message; `None` if it is none, or one of another version.
pub fn parse(bytes: &[u8]) -> Option<Message> {
    let head: &[u8; MIN] = bytes.first_chunk()?;
    let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let token = |at: usize| u64::from(number(at)) << 32 | u64::from(number(at + 4));
    match (head[..5] == MAGIC, head[5]) {
        (true, 1) => Some(Message::Request { token: token(8), overlay: head[6] == 1 }),
        (true, 2) => {
            // Text of a stranger, shown to operators: printable ASCII or nothing.
            let version = head[32..].iter().copied().take_while(u8::is_ascii_graphic).map(char::from).collect();
            let summary = Summary { version, ready: head[7] == 1, failures: number(24), mtu: number(28) };
            Some(Message::Reply { token: token(8), arrived: token(16), summary })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reply_has_the_length_of_its_request_and_round_trips() {
        let summary = Summary { version: "0.1.0".to_owned(), ready: true, failures: 3, mtu: 1450 };
        let sent = request(7, true, 1422);
        assert_eq!(parse(&sent), Some(Message::Request { token: 7, overlay: true }));
        let answer = reply(&sent, 5, &summary);
        assert_eq!(answer.len(), sent.len());
        assert_eq!(parse(&answer), Some(Message::Reply { token: 7, arrived: 5, summary }));
    }

    #[test]
    fn other_bytes_are_no_message() {
        let mut other = request(7, true, 60);
        other[4] = 2;
        assert_eq!(parse(&other), None);
        other[4] = 1;
        other[5] = 3;
        assert_eq!(parse(&other), None);
        assert_eq!(parse(&request(7, true, 60)[..47]), None);
        let mut text = reply(&request(7, false, 48), 0, &Summary { version: "1\x1b[31m".to_owned(), ..Summary::default() });
        assert!(matches!(parse(&text), Some(Message::Reply { summary, .. }) if summary.version == "1"));
        text.truncate(20);
        assert_eq!(parse(&text), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }
    }
}
