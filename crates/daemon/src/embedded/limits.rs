//! What a client of the embedded store may use: etcd's own limits where it has one, and what a cluster of a few thousand hosts
//! needs where it has none.

use std::time::Duration;

/// The largest request, in bytes: etcd's default (`--max-request-bytes`).
pub(super) const REQUEST: usize = 1_572_864;
/// What a request is decoded up to, in bytes, so that a larger one is refused with etcd's error: etcd's overhead for gRPC.
pub(super) const DECODED: usize = REQUEST + (512 << 10);
/// The largest request that opens a watch or renews a lease, in bytes: it names a key and the end of a range.
pub(super) const CONTROL: usize = 64 << 10;
/// Operations in each list of a transaction, and comparisons: etcd's default (`--max-txn-ops`).
pub(super) const OPERATIONS: usize = 128;
/// Operations of a transaction with all transactions nested in it; etcd has no limit for these.
pub(super) const NESTED_OPERATIONS: usize = 512;
/// How deep transactions may be nested. No known client nests at all.
pub(super) const NESTING: usize = 4;
/// The largest answer, in bytes. A list of 10,000 leases has 2.5 MB.
pub(super) const ANSWER: usize = 16 << 20;
/// Answers larger than [`SMALL`] that are in memory at the same time, because their clients are still reading them.
pub(super) const LARGE_ANSWERS: usize = 16;
/// An answer up to this many bytes counts as small: the events of a watch are cut into such.
pub(super) const SMALL: usize = 64 << 10;
/// Keys and values together, in bytes. 10,000 leases need 3 MB.
pub(super) const DATABASE: usize = 64 << 20;
/// What a key costs beside its bytes, when they are counted.
pub(super) const KEY_OVERHEAD: usize = 256;
/// Events that are kept for watches that come back; older ones are compacted, and such a watch lists again.
pub(super) const HISTORY: usize = 10_000;
/// Bytes of those events.
pub(super) const HISTORY_BYTES: usize = 32 << 20;
/// Leases. Each host has one.
pub(super) const LEASES: usize = 32_768;
/// Watches of one stream, and of all streams. Each host has two.
pub(super) const STREAM_WATCHES: usize = 128;
pub(super) const WATCHES: usize = 16_384;
/// Streams of one connection that are open at the same time.
pub(super) const STREAMS: u32 = 64;
/// Connections, and connections from one address. Each host has one.
pub(super) const CONNECTIONS: usize = 4_096;
pub(super) const CONNECTIONS_PER_ADDRESS: usize = 256;
/// Connections whose TLS handshake goes on; a new one takes the place of the oldest.
pub(super) const HANDSHAKES: usize = 128;
/// Requests that wait for the engine.
pub(super) const QUEUE: usize = 1_024;
/// Bytes of requests that are being received or executed, all clients together.
pub(super) const REQUESTS_BYTES: usize = 64 << 20;
/// How long a client may take to send a request, for its TLS handshake, and until it speaks HTTP/2.
pub(super) const SENDING: Duration = Duration::from_secs(10);
/// How long a client may take to read an answer. A watch that is slower is ended; its client lists again.
pub(super) const READING: Duration = Duration::from_secs(30);
/// The size of the list of headers of a request, in bytes.
pub(super) const HEADERS: u32 = 16 << 10;
/// The cache of the database file, in bytes: all data is in memory as well.
pub(super) const FILE_CACHE: usize = 4 << 20;
