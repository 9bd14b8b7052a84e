//! What a store may send to this daemon. Every client of etcd, and every Node's own flanneld, can write there.

/// The longest answer of etcd that is decoded, in bytes. A list of 10,000 leases is 2.5 MB; a client without a limit would
/// take whatever a server sends.
pub(super) const ANSWER: usize = 64 << 20;
/// The longest value of a lease that is read, in bytes. One of vxlan has 150; one of extension has what its command printed.
pub(super) const LEASE_VALUE: usize = 16 << 10;
/// The longest `BackendType` that is kept, in bytes. The longest that upstream has is `tencent-vpc`.
pub(super) const BACKEND_TYPE: usize = 64;
/// The longest network configuration that is read, in bytes.
pub(super) const CONFIG: usize = 64 << 10;
/// The longest life that is believed of an etcd lease, in seconds: a year. What is added to a clock must not overflow it.
pub(super) const LEASE_TTL: u64 = 365 * 86_400;
/// Entries of which it is remembered that a problem was reported.
pub(super) const REPORTED: usize = 1_000;
