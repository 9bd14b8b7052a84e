//! Traffic rules while the daemon runs: flushed rules are restored, no process is started while nothing is missing, two
//! daemons share a host, and a change of flavour leaves nothing of the other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Lab, StoreKind};
use serde_json::json;

use crate::{eventually, ping_all_from, plan, shell};

/// A folder with the programs of iptables in one variant, each of which writes its name to a log when it is started.
fn logged_iptables(root: &Path, variant: &str) -> (PathBuf, PathBuf) {
    use std::os::unix::fs::PermissionsExt;
    let (folder, log) = (root.join(format!("iptables-{variant}")), root.join(format!("{variant}.log")));
    std::fs::create_dir_all(&folder).unwrap();
    for stem in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            for name in [format!("{stem}{verb}"), format!("{stem}-{variant}{verb}")] {
                let file = folder.join(&name);
                let script = format!("#!/bin/sh\necho {name} >> {}\nexec /usr/sbin/{stem}-{variant}{verb} \"$@\"\n", log.display());
                std::fs::write(&file, script).unwrap();
                std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
    }
    std::fs::write(&log, "").unwrap();
    (folder, log)
}

pub(crate) fn flushed_rules_are_restored_without_idle_processes(root: &Path) {
    for variant in ["nft", "legacy"] {
        let root = root.join(variant);
        let (folder, log) = logged_iptables(&root, variant);
        let mut plan = plan(1, "host-gw", StoreKind::Embedded);
        plan.config["EnableNFTables"] = false.into();
        plan.env.push(("PATH".to_owned(), format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display())));
        let mut lab = Lab::wire(plan, &root).unwrap();
        lab.start_store().unwrap();
        lab.put_config().unwrap();
        lab.start_daemon(0, &["--iptables-resync=1"]).unwrap();
        lab.settle().unwrap();
        let netns = &lab.hosts[0].netns;
        let rules = || shell(netns, &format!("iptables-{variant} -S; iptables-{variant} -t nat -S"));
        let whole = rules();
        assert_eq!(whole.lines().filter(|line| line.contains("FLANNEL")).count(), 12, "{variant}: {whole}");
        for damage in ["-t nat -F", "-F FLANNEL-FWD", "-D FORWARD 1", "-t nat -I FLANNEL-POSTRTG -s 10.244.0.0/16 -j ACCEPT"] {
            shell(netns, &format!("iptables-{variant} {damage}"));
            let began = Instant::now();
            eventually(&format!("{variant}: rules after {damage}"), || rules() == whole);
            // At once where the kernel announces it, otherwise at the next check.
            let limit = if variant == "nft" { Duration::from_millis(900) } else { Duration::from_secs(5) };
            assert!(began.elapsed() < limit, "{variant}: {damage} stood for {:?}", began.elapsed());
        }
        // What was written is read back once, at the next look. Then: several looks, the restart of a daemon that finds all as it shall be among them, and nothing is written.
        std::thread::sleep(Duration::from_millis(2500));
        std::fs::write(&log, "").unwrap();
        // What another program does in the same tables is looked at without starting one of ours.
        shell(netns, &format!("/usr/sbin/iptables-{variant} -A INPUT -s 198.51.100.7 -j ACCEPT"));
        std::thread::sleep(Duration::from_millis(3500));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "", "{variant}: processes that were started while nothing was missing");
        lab.stop_daemon(0, true).unwrap();
        lab.start_daemon(0, &["--iptables-resync=1"]).unwrap();
        lab.settle().unwrap();
        let started = std::fs::read_to_string(&log).unwrap();
        assert!(!started.contains("restore"), "{variant}: {started}");
    }
}

pub(crate) fn change_of_rule_kind_leaves_no_old_rules(root: &Path) {
    let mut lab = Lab::start(plan(2, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.settle().unwrap();
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    let mut config = plan(2, "vxlan", StoreKind::Embedded).config;
    for nftables in [false, true, false] {
        config["EnableNFTables"] = nftables.into();
        let text = config.to_string();
        lab.with_store(async |store| store.put_config(&text).await).unwrap();
        for host in 0..2 {
            lab.stop_daemon(host, false).unwrap();
            lab.start_daemon(host, &[]).unwrap();
        }
        lab.settle().unwrap();
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        for host in &lab.hosts {
            let tables = || shell(&host.netns, "nft list tables").contains("flannel-ipv4");
            let chains = || shell(&host.netns, "iptables -S; iptables -t nat -S; ip6tables -S; ip6tables -t nat -S").contains("FLANNEL");
            eventually("one flavour alone", || (tables(), chains()) == (nftables, !nftables));
        }
    }
}

pub(crate) fn two_daemons_share_a_host(root: &Path) {
    // Upstream's test_multi: vxlan and host-gw side by side, each with a prefix, a network and a file of its own.
    let mut plan = plan(2, "vxlan", StoreKind::Embedded);
    plan.config["EnableNFTables"] = false.into();
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    let config = json!({ "Network": "10.99.0.0/16", "Backend": { "Type": "host-gw" } }).to_string();
    let access = daemon::store::Access { prefix: "/second/network".to_owned(), ..lab.access() };
    lab.middle
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { daemon::store::Etcd::new(&access).unwrap().put_config(&config).await.unwrap() });
        })
        .unwrap();
    let mut children = Vec::new();
    for (host, at) in lab.hosts.iter().zip(1..) {
        let mut command = Command::new(super::PROGRAM);
        command.arg(format!("--etcd-endpoints={}", access.endpoints)).arg("--etcd-prefix=/second/network").arg("--ip-masq");
        command
            .arg(format!("--subnet-file={}/second.env", host.directory.display()))
            .args(["--healthz-ip=127.0.0.1", "--healthz-port=8090"]);
        std::fs::write(host.directory.join("second.env"), format!("FLANNEL_SUBNET=10.99.{at}.1/24\n")).unwrap();
        let log = std::fs::File::create(host.directory.join("second.log")).unwrap();
        kernel::process::die_with_parent(&mut command);
        children.push(host.netns.run(|| command.stdout(log.try_clone().unwrap()).stderr(log).spawn()).unwrap().unwrap());
    }
    let (one, two) = (&lab.hosts[0].netns, &lab.hosts[1].netns);
    eventually("both have their routes", || {
        let routes = shell(one, "ip route");
        routes.contains("10.99.2.0/24 via 10.0.0.2 dev eth0") && routes.contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1")
    });
    // Addresses of each network, as upstream's test has them, and no way from the one to the other's by the wrong device.
    for (netns, at) in [(one, 1), (two, 2)] {
        shell(
            netns,
            &format!(
                "ip link add pods type bridge; ip link set pods up; ip address add 10.244.{at}.1/32 dev pods; ip address add 10.99.{at}.1/32 dev pods"
            ),
        );
    }
    for network in ["10.244", "10.99"] {
        shell(one, &format!("ping -c 3 -i 0.05 -W 2 -I {network}.1.1 {network}.2.1"));
        shell(two, &format!("ping -c 3 -i 0.05 -W 2 -I {network}.2.1 {network}.1.1"));
    }
    // The chains are shared, and neither takes the other's rules away, nor fights for its own.
    let rules = || shell(one, "iptables -t nat -S FLANNEL-POSTRTG; iptables -S FLANNEL-FWD");
    eventually("the rules of both", || rules().contains("-s 10.244.0.0/16 -m") && rules().contains("-s 10.99.0.0/16 -m"));
    let now = shell(one, "iptables-save -c | grep FLANNEL | grep -v '^\\[0:0\\]'");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!now.is_empty());
    let failed = lab.hosts[0].state().unwrap()["objects"]["failed"].clone();
    assert_eq!(failed, json!([]));
    shell(one, "iptables -F FLANNEL-FWD");
    eventually("the rules of both again", || rules().contains("-s 10.244.0.0/16 -m") && rules().contains("-s 10.99.0.0/16 -m"));
    for mut child in children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
