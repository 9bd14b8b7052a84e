//! placeholder
pub mod pb {
    tonic::include_proto!("etcdserverpb");
}
