//! The part of the etcd v3 API that we speak, generated from `proto/etcd.proto`: the client's side is used by
//! [`crate::store`], the server's by [`crate::embedded`].

#[expect(missing_docs, clippy::allow_attributes, reason = "generated code")]
mod generated {
    tonic::include_proto!("etcdserverpb");
}

pub use generated::*;

/// The `range_end` with which a range covers all keys that begin with `prefix`: the prefix with its last byte that
/// can be raised raised by one (etcd API, "key ranges"). All bytes 0xff: to the end of the key space.
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
