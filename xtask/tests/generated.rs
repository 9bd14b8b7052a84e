//! The checked-in generated code agrees with its definition. `UPDATE_EXPECT=1` regenerates it.

use std::path::Path;

use expect_test::expect_file;

#[test]
fn etcd_messages_match_their_definition() {
    // protox is a protobuf compiler in Rust, so that no `protoc` is needed.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/daemon/proto");
    let descriptors = protox::compile([folder.join("etcd.proto")], [&folder]).expect("proto/etcd.proto compiles");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("etcd-messages");
    std::fs::create_dir_all(&out).expect("the target folder is writable");
    tonic_prost_build::configure().emit_rerun_if_changed(false).out_dir(&out).compile_fds(descriptors).expect("the definition generates");
    let generated = std::fs::read_to_string(out.join("etcdserverpb.rs")).expect("one file is generated");
    expect_file!["../../crates/daemon/src/etcd/generated.rs"].assert_eq(&generated);
}
