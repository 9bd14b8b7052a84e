//! Rights: what the processes keep, what they need, and what the units allow them.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Host, Lab, StoreKind};

use crate::cluster::PROGRAM;
use crate::{eventually, observe, ping_all_from, plan};

/// A user that is not root.
const USER: &str = "--reuid=65534 --regid=65534 --clear-groups";

/// A program that runs flanneld by another one.
fn wrapper(root: &Path, name: &str, line: &str) -> PathBuf {
    std::fs::create_dir_all(root).unwrap();
    // Other users reach the files of this test.
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o777)).unwrap();
    let path = root.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{line}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A line of `/proc/PID/status`.
fn status(host: &Host, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{}/status", host.pid().unwrap())).unwrap();
    text.lines().find_map(|line| line.strip_prefix(&format!("{name}:\t"))).unwrap().to_owned()
}

/// What is deleted comes back.
fn repairs(lab: &Lab, host: usize) {
    let netns = &lab.hosts[host].netns;
    let whole = observe(netns);
    lab.hosts[host].shell("ip route flush proto 241; nft flush ruleset").unwrap();
    eventually("routes and rules come back", || observe(netns) == whole);
}

pub(crate) fn daemon_keeps_two_capabilities(root: &Path) {
    let lab = crate::start(root, 2, "vxlan", StoreKind::Embedded);
    // CAP_NET_ADMIN and CAP_NET_RAW.
    for (name, want) in [("CapPrm", 0x3000), ("CapEff", 0x3000), ("CapBnd", 0x3000), ("CapInh", 0), ("CapAmb", 0), ("NoNewPrivs", 1)] {
        assert_eq!(u64::from_str_radix(&status(&lab.hosts[0], name), 16).unwrap(), want, "{name}");
    }
    repairs(&lab, 0);
    // Commands of an operator may need what the operator has.
    let mut lab = lab;
    lab.stop_daemon(0, false).unwrap();
    lab.start_daemon(0, &["--allow-commands"]).unwrap();
    lab.settle().unwrap();
    assert_ne!(u64::from_str_radix(&status(&lab.hosts[0], "CapBnd"), 16).unwrap(), 0x3000);
}

pub(crate) fn daemon_runs_without_root(root: &Path) {
    for backend in ["vxlan", "host-gw"] {
        let mut lab = Lab::wire(plan(2, backend, StoreKind::Embedded), &root.join(backend)).unwrap();
        lab.start_store().unwrap();
        lab.put_config().unwrap();
        let line = format!("exec setpriv {USER} --inh-caps=+net_admin --ambient-caps=+net_admin {PROGRAM} \"$@\"");
        lab.set_program(&wrapper(root, "unprivileged", &line));
        for host in 0..2 {
            lab.hosts[host].shell("chown -R 65534:65534 /run/flannel").unwrap();
            lab.start_daemon(host, &[]).unwrap();
        }
        lab.settle().unwrap();
        assert_eq!(status(&lab.hosts[0], "Uid"), "65534\t65534\t65534\t65534");
        let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        repairs(&lab, 1);
        ping_all_from(&pods[1].netns, &[pods[0].address]);
    }
}

/// The values of a setting in a unit, one for each line.
fn settings<'a>(unit: &'a str, name: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect()
}

/// The system calls of a set such as `@system-service`.
fn calls(set: &str) -> BTreeSet<String> {
    let output = Command::new("systemd-analyze").args(["syscall-filter", set]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut found = BTreeSet::new();
    for word in String::from_utf8(output.stdout).unwrap().lines().skip(1).map(str::trim).filter(|word| !word.starts_with('#')) {
        match word.starts_with('@') {
            true => found.extend(calls(word)),
            false => drop(found.insert(word.to_owned())),
        }
    }
    found
}

/// What a traced program called, and which families its sockets had.
fn traced(root: &Path, what: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut names, mut families) = (BTreeSet::new(), BTreeSet::new());
    for entry in std::fs::read_dir(root).unwrap().map(Result::unwrap).filter(|entry| entry.file_name().to_string_lossy().starts_with(what))
    {
        for line in std::fs::read_to_string(entry.path()).unwrap().lines() {
            let call = line.split_once(' ').map_or("", |(_, rest)| rest.trim_start());
            let Some((name, rest)) = call.split_once('(').filter(|(name, _)| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
            else {
                continue;
            };
            names.insert(name.to_owned());
            if name == "socket" {
                families.insert(rest.split(',').next().unwrap().to_owned());
            }
        }
    }
    (names, families)
}

pub(crate) fn units_allow_what_the_programs_call(root: &Path) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/systemd");
    for (name, most) in [("flanneld-store.service", "25"), ("flanneld.service", "40")] {
        let mut command = Command::new("systemd-analyze");
        command.args(["security", "--offline=true", "--no-pager", &format!("--threshold={most}")]).arg(folder.join(name));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{name} exposes more than {most}:\n{}", String::from_utf8_lossy(&output.stdout));
    }
    for (backend, nftables) in [("vxlan", true), ("udp", false)] {
        let mut plan = plan(2, backend, StoreKind::Embedded);
        plan.config["EnableNFTables"] = nftables.into();
        plan.secure = Some(lab::Secure::embedded(&root.join(backend).join("store")));
        let mut lab = Lab::wire(plan, &root.join(backend)).unwrap();
        lab.hosts[0].shell(&format!("chown -R 65534:65534 {}", root.join(backend).join("store").display())).unwrap();
        // The rights are the units', and the trace shows what else they would have to allow.
        let line = format!(
            "case $1 in store) rights='{USER} --bounding-set=-all' trace=store;; *) rights=--bounding-set=-all,+net_admin,+net_raw trace=daemon;; esac\n\
             exec setpriv $rights --no-new-privs strace -D -f -qq -o {}/$trace.$$ {PROGRAM} \"$@\"",
            root.display()
        );
        lab.set_program(&wrapper(root, "traced", &line));
        lab.start_store().unwrap();
        eventually("the store has made its certificates", || root.join(backend).join("store/server.pem").exists());
        // A daemon without CAP_DAC_OVERRIDE reads what is root's, as the README's copies are.
        lab.hosts[0].shell(&format!("chown 0:0 {}/client-key.pem", root.join(backend).join("store").display())).unwrap();
        lab.put_config().unwrap();
        for host in 0..2 {
            lab.start_daemon(host, &[]).unwrap();
        }
        lab.settle().unwrap();
        let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        repairs(&lab, 0);
        for host in 0..2 {
            lab.stop_daemon(host, false).unwrap();
        }
    }
    for (name, what) in [("flanneld-store.service", "store."), ("flanneld.service", "daemon.")] {
        let unit = std::fs::read_to_string(folder.join(name)).unwrap();
        let mut allowed = BTreeSet::new();
        for words in settings(&unit, "SystemCallFilter") {
            let all: BTreeSet<String> = words.trim_start_matches('~').split(' ').flat_map(calls).collect();
            match words.starts_with('~') {
                true => allowed.retain(|call| !all.contains(call)),
                false => allowed.extend(all),
            }
        }
        let (called, families) = traced(root, what);
        assert!(called.len() > 20 && allowed.len() > 100, "{name}: {called:?}");
        let refused: Vec<&String> = called.difference(&allowed).collect();
        assert!(refused.is_empty(), "{name} refuses {refused:?}");
        let known: BTreeSet<String> = settings(&unit, "RestrictAddressFamilies")[0].split(' ').map(ToOwned::to_owned).collect();
        let refused: Vec<&String> = families.difference(&known).collect();
        assert!(refused.is_empty(), "{name} refuses sockets of {refused:?}");
    }
}
