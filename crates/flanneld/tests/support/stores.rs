//! The stores that every promise is checked against: ours and three real ones.

use std::path::PathBuf;

use lab::StoreKind;

/// Name, and what the lab starts.
pub(crate) fn all() -> Vec<(&'static str, StoreKind)> {
    vec![
        ("embedded", StoreKind::Embedded),
        ("etcd 3.4", StoreKind::Etcd(program("FLANNEL_ETCD_3_4"))),
        ("etcd 3.5", StoreKind::Etcd(program("FLANNEL_ETCD_3_5"))),
        ("etcd 3.6", StoreKind::Etcd(program("FLANNEL_ETCD_3_6"))),
    ]
}

/// The program that a variable names. That it is missing shows where a test starts it: tests can be listed without it.
fn program(variable: &str) -> PathBuf {
    let unset = || format!("${variable}, which `cargo xtask test` sets").into();
    std::env::var_os(variable).unwrap_or_else(unset).into()
}

/// A program that `cargo xtask test` installs and names in the environment.
pub(crate) fn tool(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    path.unwrap_or_else(|| panic!("{variable} names no program: run the tests by `cargo xtask test`, which installs what they need"))
}
