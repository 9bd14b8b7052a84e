//! A plugin that is killed at any of its system calls, a reboot, a DEL that never comes: GC frees every address that no
//! live attachment holds, and never one that is in use.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "support/host.rs"]
mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use host::Host;
use kernel::netns;
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

type Test = fn(&Host);

fn main() {
    let arguments = Arguments::from_args();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
    }
    let tests: [(&str, Test); 5] = [
        ("add_reads_no_other_address_file", add_reads_no_other_address_file),
        ("killed_add_is_collected", |host| killed_at_any_system_call(host, "ADD")),
        ("killed_del_is_collected", |host| killed_at_any_system_call(host, "DEL")),
        ("full_disk_reserves_nothing", full_disk_reserves_nothing),
        ("reboot_frees_earlier_reservations", reboot_frees_earlier_reservations),
    ];
    let trial = |(name, test): (&'static str, Test)| {
        Trial::test(name, move || {
            let host = Host::new(name);
            test(&host);
            host.tear_down();
            Ok(())
        })
    };
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit();
}

fn add_reads_no_other_address_file(host: &Host) {
    let folder = host.root.join("networks/net");
    std::fs::create_dir_all(&folder).unwrap();
    for n in 0..3_000 {
        std::fs::write(folder.join(format!("10.2.{}.{}", n / 250, n % 250)), format!("c{n}\r\neth0")).unwrap();
    }
    for id in ["p1", "p2", "p3", "p4"] {
        host.pod(id);
    }
    // The first reads what it does not know yet.
    host.add("p1");
    let log = host.root.join("opened");
    let opened = |verb: &str, id: &str| {
        let output = call_traced(host, verb, id, &["-e", "trace=open,openat", "-o", &log.to_string_lossy()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        std::fs::read_to_string(&log).unwrap().lines().filter(|line| line.contains("\"10.2.")).count()
    };
    assert_eq!(opened("ADD", "p2"), 0);
    assert_eq!(opened("DEL", "p2"), 0);
    // Another program reserves one: it is seen, though no index has it, and so is what it held when it was here first.
    std::fs::write(folder.join("10.1.17.77"), "p3\r\neth0").unwrap();
    let refused = host.call("flannel", "ADD", "p3", &host.conf("1.0.0")).unwrap_err();
    assert!(refused["msg"].as_str().unwrap().contains("10.1.17.77 has been allocated to p3 eth0"), "{refused}");
    host.call("flannel", "DEL", "p3", &host.conf("1.0.0")).unwrap();
    assert!(!folder.join("10.1.17.77").exists());
    // A wrong index is verified, and a lost one is rebuilt.
    host.add("p4");
    let index = host.root.join("networks/.net.owners");
    assert_eq!(std::fs::read_dir(&index).unwrap().count(), 3_002);
    std::fs::remove_dir_all(&index).unwrap();
    host.call("flannel", "DEL", "p4", &host.conf("1.0.0")).unwrap();
    host.call("flannel", "DEL", "p1", &host.conf("1.0.0")).unwrap();
    assert!(!host.files("networks/net").iter().any(|name| name.starts_with("10.1.")));
}

fn full_disk_reserves_nothing(host: &Host) {
    let small = host.root.join("small");
    std::fs::create_dir_all(&small).unwrap();
    let mount = |options: &str| {
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", options, "small"]).arg(&small).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    mount("size=128k");
    ["p1", "p2"].into_iter().for_each(|id| drop(host.pod(id)));
    // The reservations there, the plugin's own notes on a disk with room; and the other way round.
    for (place, other) in [("networks", "flannel"), ("flannel", "networks")] {
        let mut conf = host.conf("1.0.0");
        let folders = |name: &str| if name == place { small.join(name) } else { host.root.join(other) };
        conf["ipam"]["dataDir"] = folders("networks").to_string_lossy().into_owned().into();
        conf["dataDir"] = folders("flannel").to_string_lossy().into_owned().into();
        let held = || {
            let names = std::fs::read_dir(folders("networks").join("net")).into_iter().flatten().flatten();
            names.map(|file| file.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with("10.1.")).count()
        };
        host.call("flannel", "ADD", "p1", &conf).unwrap();
        let (links, before) = (host.links(), held());
        // Until not one more byte fits.
        let ballast = small.join("ballast");
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[7; 1024]).is_ok() {}
        let refused = host.call("flannel", "ADD", "p2", &conf).unwrap_err();
        let text = refused.to_string();
        assert!(text.contains("No space left on device") && text.contains(&*small.to_string_lossy()), "{place}: {text}");
        assert_eq!((host.links(), held()), (links, before), "{place}: what it made is gone again");
        // A DEL needs no room, and neither does a repeated one.
        host.call("flannel", "DEL", "p1", &conf).unwrap();
        host.call("flannel", "DEL", "p1", &conf).unwrap();
        assert_eq!(held(), 0, "{place}");
        std::fs::remove_file(ballast).unwrap();
        host.call("flannel", "ADD", "p2", &conf).unwrap();
        host.call("flannel", "DEL", "p2", &conf).unwrap();
        assert_eq!(held(), 0, "{place}");
    }
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
}

fn collect(host: &Host, valid: &[&str]) {
    let mut conf = host.conf("1.1.0");
    let valid: Vec<Value> = valid.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
    conf["cni.dev/valid-attachments"] = valid.into();
    host.call("flannel", "GC", "", &conf).unwrap();
}

/// Calls the plugin under a tracer with these options.
fn call_traced(host: &Host, verb: &str, id: &str, options: &[&str]) -> Output {
    let bin = host.root.join("bin");
    let mut strace = Command::new("strace");
    strace.arg("-qq").args(options).arg(bin.join("flannel"));
    strace.env_clear().env("PATH", "/usr/sbin:/usr/bin:/bin").env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id);
    strace.env("CNI_NETNS", host.path(id)).env("CNI_IFNAME", "eth0").env("CNI_PATH", &bin);
    strace.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = host.netns.run(|| strace.spawn()).unwrap().expect("strace is installed by `cargo xtask test`");
    let _ = child.stdin.take().unwrap().write_all(host.conf("1.1.0").to_string().as_bytes());
    child.wait_with_output().unwrap()
}

/// The system calls that a call of the plugin makes, each with how many of its kind there were before it and itself.
fn system_calls(host: &Host, verb: &str, id: &str) -> Vec<(String, usize)> {
    let trace = host.root.join("trace");
    let output = call_traced(host, verb, id, &["-o", &trace.to_string_lossy()]);
    assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let text = std::fs::read_to_string(&trace).unwrap();
    let names = text.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name.to_owned());
    // The tracer's own exec is before there is a plugin.
    let calls = names.filter(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') && name != "execve");
    calls
        .map(|name| {
            let count = counts.entry(name.clone()).or_insert(0);
            *count += 1;
            (name, *count)
        })
        .collect()
}

/// Calls the plugin under a tracer that kills it as it enters this system call; false if it ended before that.
fn call_killed(host: &Host, verb: &str, id: &str, (name, count): &(String, usize)) -> bool {
    let inject = format!("inject={name}:signal=SIGKILL:when={count}");
    let output = call_traced(host, verb, id, &["-o", "/dev/null", "-e", &format!("trace={name}"), "-e", &inject]);
    // The tracer ends as the traced program did.
    let killed = output.status.signal() == Some(9) || output.status.code() == Some(137);
    assert!(killed || output.status.success(), "{verb} at {name} {count}: {} {}", output.status, String::from_utf8_lossy(&output.stderr));
    killed
}

fn killed_at_any_system_call(host: &Host, verb: &str) {
    // Without the daemon's masquerading the bridge masquerades, so that its rules are among what could be left.
    host.subnet_env(false);
    let live = host.pod("live");
    let held = host.call("flannel", "ADD", "live", &host.conf("1.1.0")).unwrap();
    let held: Value = serde_json::from_str(&held).unwrap();
    let held = held["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    let (files, stored, links) = (host.files("networks/net"), host.files("flannel"), host.links());
    assert!(files.contains(&held) && stored == BTreeSet::from(["live".to_owned()]));
    let probe = host.pod("probe");
    if verb == "DEL" {
        host.call("flannel", "ADD", "probe", &host.conf("1.1.0")).unwrap();
    }
    let calls = system_calls(host, verb, "probe");
    drop(probe);
    netns::unbind(&host.path("probe")).unwrap();
    collect(host, &["live"]);
    // Where the next address is looked for is a hint; it moves on.
    let without_hint = |files: BTreeSet<String>| files.into_iter().filter(|name| !name.starts_with("last_")).collect::<BTreeSet<_>>();
    let mut killed = 0;
    for at in &calls {
        let pod = host.pod("victim");
        if verb == "DEL" {
            host.call("flannel", "ADD", "victim", &host.conf("1.1.0")).unwrap();
        }
        killed += usize::from(call_killed(host, verb, "victim", at));
        // The container ended, and the runtime never calls DEL.
        drop(pod);
        netns::unbind(&host.path("victim")).unwrap();
        collect(host, &["live"]);
        assert_eq!(without_hint(host.files("networks/net")), without_hint(files.clone()), "{verb} killed at {at:?}");
        assert_eq!(host.files("flannel"), stored, "{verb} killed at {at:?}");
        assert!(!host.nft().contains("victim"), "{verb} killed at {at:?}: {}", host.nft());
    }
    // A run may make some calls more or fewer than another.
    assert!(killed > 100 && killed + 20 > calls.len(), "{killed} of {} boundaries", calls.len());
    println!("{verb}: killed at {killed} of {} system calls", calls.len());
    // A namespace is torn down by a worker of the kernel, and with it the host's ends of its links.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while host.links() != links {
        assert!(std::time::Instant::now() < end, "{:?} are left", host.links());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(
        held,
        std::fs::read_dir(host.root.join("networks/net"))
            .unwrap()
            .flatten()
            .filter_map(|f| f.file_name().into_string().ok())
            .find(|name| name.starts_with("10."))
            .unwrap()
    );
    drop(live);
}

fn reboot_frees_earlier_reservations(host: &Host) {
    let attribute = "user.flannel.boot_id";
    let folder = host.root.join("networks/net");
    let pods: Vec<_> = ["a", "b", "c"].map(|id| host.pod(id)).into();
    for id in ["a", "b"] {
        host.add(id);
    }
    // Of another implementation, which says nothing of boots.
    std::fs::write(folder.join("10.1.17.9"), "foreign\r\neth0").unwrap();
    // As if the host had been booted since: the reservation of a, and the last look, are of another boot.
    for file in ["10.1.17.2", "lock"] {
        rustix::fs::setxattr(folder.join(file), attribute, b"an earlier boot", rustix::fs::XattrFlags::empty()).unwrap();
    }
    host.add("c");
    let files = host.files("networks/net");
    assert!(!files.contains("10.1.17.2"), "a's address is free: {files:?}");
    assert!(files.contains("10.1.17.3") && files.contains("10.1.17.9"), "b's is of this boot, the other's boot is unknown: {files:?}");
    drop(pods);
}
