//! The plugins under load, and killed in the middle of their work.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kernel::netns::Netns;
use lab::ping::ping_all;
use lab::{Lab, StoreKind};
use serde_json::Value;

use crate::cluster::eventually;
use crate::{files, links, plan, start};

pub(crate) fn two_hundred_pods_at_once(root: &Path) {
    let lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let before = links(&lab.hosts[0].netns);
    let pods: Vec<(String, PathBuf, Netns)> = (0..200)
        .map(|i| {
            let (name, netns) = (format!("pod{i}"), Netns::create().unwrap());
            let path = root.join("netns").join(&name);
            netns.bind(&path).unwrap();
            (name, path, netns)
        })
        .collect();
    let each = |verb: &str| {
        let next = AtomicUsize::new(0);
        let outputs = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some((name, path, _)) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let output = lab.cni(0, "flannel", verb, name, path, "eth0").unwrap();
                        outputs.lock().unwrap().push(output);
                    }
                });
            }
        });
        outputs.into_inner().unwrap()
    };
    let addresses: BTreeSet<IpAddr> = each("ADD")
        .iter()
        .map(|output| {
            let result: Value = serde_json::from_str(output).unwrap();
            result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()
        })
        .collect();
    assert_eq!(addresses.len(), 200, "all distinct");
    let targets: Vec<IpAddr> = addresses.iter().copied().collect();
    // From the host itself, and from the other host across the wire.
    for host in &lab.hosts {
        let answered = host.netns.run(|| ping_all(&targets, Duration::from_secs(20))).unwrap().unwrap();
        assert_eq!(answered.len(), 200, "from {}", host.name);
    }
    each("DEL");
    // A second DEL finds nothing and succeeds.
    each("DEL");
    let mut after = links(&lab.hosts[0].netns);
    after.remove("cni0");
    assert_eq!(after, before, "no link is left but the bridge");
    assert_eq!(files(&lab.hosts[0].directory.join("cni")), BTreeSet::from(["last_reserved_ip.0".to_owned(), "lock".to_owned()]));
}

pub(crate) fn killed_plugin_leaves_nothing_after_del(root: &Path) {
    // Without --ip-masq the bridge plugin masquerades, so its rules are among what could be left.
    let mut lab = Lab::wire(plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.start_daemon(0, &["--ip-masq=false"]).unwrap();
    lab.settle().unwrap();
    let netns = &lab.hosts[0].netns;
    let (mut finished, mut killed) = (0, 0);
    for i in 0..150u64 {
        let (name, pod) = (format!("pod{i}"), Netns::create().unwrap());
        let path = root.join("netns").join(&name);
        pod.bind(&path).unwrap();
        let (mut command, conf) = lab.cni_command(0, "flannel", "ADD", &name, &path, "eth0").unwrap();
        let mut child = netns.run(|| command.spawn()).unwrap().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), conf.as_bytes()).unwrap();
        // Each a little later than the one before, over all of the time that an ADD takes and somewhat beyond.
        std::thread::sleep(Duration::from_micros(i * 100));
        child.kill().unwrap();
        match child.wait_with_output().unwrap().status.success() {
            true => finished += 1,
            false => killed += 1,
        }
        lab.cni(0, "flannel", "DEL", &name, &path, "eth0").unwrap();
        drop(pod);
        kernel::netns::unbind(&path).unwrap();
    }
    assert!(killed > 0, "{finished} finished, {killed} killed");
    let left = files(&lab.hosts[0].directory.join("cni"));
    assert!(left.is_subset(&BTreeSet::from(["last_reserved_ip.0".to_owned(), "lock".to_owned()])), "{left:?}");
    eventually("no veth is left", || links(netns).iter().all(|name| !name.starts_with("veth")));
    let mut nft = Command::new("nft");
    let listed = netns.run(|| nft.args(["list", "ruleset"]).output()).unwrap().expect("nft is installed by `cargo xtask test`");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(!text.contains(":pod"), "a container's rule is left:\n{text}");
}
