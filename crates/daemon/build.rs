//! Compiles `proto/etcd.proto` to client and server stubs. `protox` is a protobuf compiler in Rust, so that a
//! machine with Rust and a C compiler, and no `protoc`, builds the daemon.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/etcd.proto");
    let descriptors = protox::compile(["proto/etcd.proto"], ["proto"])?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).compile_fds(descriptors)?;
    Ok(())
}
