//! Checks before a command begins: what it would fail of later is refused at once.

use std::path::Path;

use anyhow::{Context, ensure};

use crate::process::find;

/// Backends that the lab shows by default, and whose faults it knows.
pub(crate) const BACKENDS: [&str; 2] = ["host-gw", "vxlan"];
/// Backends that the lab can show.
const SHOWN: [&str; 3] = ["host-gw", "vxlan", "wireguard"];
/// Programs that faults and checks call.
const PROGRAMS: [&str; 8] = ["ip", "bridge", "nft", "iptables", "iptables-save", "iptables-restore", "ping", "awk"];

/// Refuses a backend whose faults the lab does not know.
pub(crate) fn backend(name: &str) -> anyhow::Result<()> {
    ensure!(BACKENDS.contains(&name), "--backend {name}: the lab knows the faults of {}", BACKENDS.join(" and "));
    Ok(())
}

/// Refuses a backend that the lab cannot show.
pub(crate) fn shown(name: &str) -> anyhow::Result<()> {
    ensure!(SHOWN.contains(&name), "--backend {name}: the lab can show {}", SHOWN.join(", "));
    Ok(())
}

/// Refuses to inject faults without root or without a program that is needed.
pub(crate) fn can_inject(command: &str, etcd: Option<&Path>) -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "lab {command} needs root: run it with sudo");
    let mut missing: Vec<&str> = PROGRAMS.into_iter().filter(|program| find(program).is_none()).collect();
    if let Some(etcd) = etcd {
        ensure!(etcd.is_file(), "--etcd-program {}: no such file", etcd.display());
        missing.extend(["etcdctl"].iter().filter(|program| find(program).is_none()));
    }
    let advice = "on Debian: apt-get install iproute2 nftables iptables iputils-ping gawk etcd-client";
    ensure!(missing.is_empty(), "lab {command} needs these programs, which are not in PATH: {} ({advice})", missing.join(", "));
    Ok(())
}

/// The file of this program.
pub(crate) fn this_program() -> anyhow::Result<std::path::PathBuf> {
    std::env::current_exe().context("cannot find this program's own file")
}
