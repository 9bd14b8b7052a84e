//! The part of the etcd v3 API that the daemon uses: [`crate::store`] uses the client side, [`crate::embedded`] the server
//! side.
//!
//! `etcd/generated.rs` is generated from `proto/etcd.proto` and checked in, so that a build of the daemon does not build
//! a protobuf compiler first. `UPDATE_EXPECT=1 cargo test -p xtask --test generated` writes it again; without
//! `UPDATE_EXPECT` the same test compares it with the definition.

#[rustfmt::skip]
#[expect(missing_docs, clippy::allow_attributes, clippy::too_many_lines, reason = "generated code")]
mod generated;

pub use generated::*;

/// The `range_end` of the range of all keys with this prefix (etcd API, "key ranges"): the prefix up to its last byte below 0xff, with
/// that byte incremented. If all bytes are 0xff, it is the end of the key space.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}
