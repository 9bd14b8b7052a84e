//! The stores that every promise is checked against: ours and three real ones.

use std::path::PathBuf;

use lab::StoreKind;

/// Name, and what the lab starts.
pub(crate) fn all() -> Vec<(&'static str, StoreKind)> {
    vec![
        ("embedded", StoreKind::Embedded),
        ("etcd 3.4", StoreKind::Etcd(tool("FLANNEL_ETCD_3_4"))),
        ("etcd 3.5", StoreKind::Etcd(tool("FLANNEL_ETCD_3_5"))),
        ("etcd 3.6", StoreKind::Etcd(tool("FLANNEL_ETCD_3_6"))),
    ]
}

/// A program that `cargo xtask test` installs and names in the environment.
pub(crate) fn tool(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    path.unwrap_or_else(|| panic!("{variable} names no program: run the tests by `cargo xtask test`, which installs what they need"))
}
