//! `flanneld cleanup` removes everything of flannel's from a host and nothing else.

use std::path::Path;
use std::process::Command;

use lab::stage::observe;
use lab::{Host, StoreKind};

use crate::cluster::PROGRAM;
use crate::start;

pub(crate) fn cleanup(host: &Host, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(PROGRAM);
    command.arg("cleanup").args(args);
    host.mounts.enter(&mut command).unwrap();
    let output = host.netns.run(|| command.output()).unwrap().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

pub(crate) fn removes_everything_of_ours_and_nothing_else(root: &Path) {
    for (backend, nftables) in [("vxlan", true), ("host-gw", false)] {
        let mut plan = crate::plan(2, backend, StoreKind::Embedded);
        plan.config["EnableNFTables"] = nftables.into();
        let mut lab = lab::Lab::start(plan, &root.join(backend)).unwrap();
        lab.settle().unwrap();
        let pod = lab.add_pod(0).unwrap();
        lab.map_port(&pod, "ADD", 8090).unwrap();
        let foreign = "ip route add 10.244.99.0/24 via 10.0.0.2 proto static
             ip route add 192.0.2.0/24 via 10.0.0.2
             ip route add 198.51.100.0/24 via 10.0.0.2 proto 241
             ip link add flannel.77 type bridge
             ip link add flannel.78 type vxlan id 78 dstport 8478 local 10.0.0.1
             ip addr add 10.99.0.0/32 dev flannel.78
             nft add table inet foreign
             iptables -N FOREIGN; iptables -A FORWARD -s 10.244.0.0/16 -j FOREIGN
             mkdir -p /run/flannel; echo text > /run/flannel/foreign";
        lab.hosts[0].shell(foreign).unwrap();
        let rest = |host: &Host| {
            host.shell(
                "ip route show 10.244.99.0/24; ip route show 192.0.2.0/24; ip route show 198.51.100.0/24; ip -br link show flannel.77
                 ip -br link show flannel.78; nft list table inet foreign; iptables -S FOREIGN; iptables -S FORWARD | grep FOREIGN
                 cat /run/flannel/foreign; cat /proc/sys/net/ipv4/ip_forward",
            )
            .unwrap()
        };
        let before = rest(&lab.hosts[0]);
        let (ok, text) = cleanup(&lab.hosts[0], &[]);
        assert!(!ok && text.contains("is running with --subnet-file /run/flannel/subnet.env: stop it first"), "{text}");

        lab.stop_daemon(0, false).unwrap();
        let whole = observe(&lab, 0).unwrap();
        let (ok, listed) = cleanup(&lab.hosts[0], &["--dry-run"]);
        assert!(
            ok && listed.contains("would remove file /run/flannel/subnet.env") && listed.contains("host ports of container"),
            "{listed}"
        );
        assert_eq!(observe(&lab, 0).unwrap(), whole, "a dry run changes nothing");

        // The pod still lives: its bridge stays.
        let (ok, text) = cleanup(&lab.hosts[0], &["--network=10.244.0.0/16"]);
        assert!(ok && text.contains("kept bridge cni0: it has 1 ports") && text.contains("removed folder /run/flannel/pods\n"), "{text}");
        let would: Vec<String> = listed.lines().filter_map(|line| line.strip_prefix("would remove ")).map(ToOwned::to_owned).collect();
        let removed: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("removed "))
            .filter(|line| !line.starts_with("folder "))
            .map(ToOwned::to_owned)
            .collect();
        assert_eq!(removed, would, "a dry run lists exactly what is removed");
        let left = lab.hosts[0].shell("ip -d link; ip route; nft list ruleset; iptables-save; ls -A /run/flannel").unwrap();
        for gone in ["flannel.1:", "10.244.2.0", "flannel-ipv4", "FLANNEL-", "dnat to", "subnet.env"] {
            assert!(!left.contains(gone), "{backend}: {gone} is left in\n{left}");
        }
        assert_eq!(rest(&lab.hosts[0]), before, "{backend}: foreign objects stay");
        let (ok, text) = cleanup(&lab.hosts[0], &["--network=10.244.0.0/16"]);
        assert!(ok && text.contains("nothing of flannel's is left on this host"), "{text}");
    }
    // A host whose pods are gone: its bridge goes too.
    let mut lab = start(&root.join("bridge"), 1, "vxlan", StoreKind::Embedded);
    let pod = lab.add_pod(0).unwrap();
    lab.cni(0, "flannel", "DEL", &pod.name, &pod.path, "eth0").unwrap();
    lab.stop_daemon(0, false).unwrap();
    let (ok, text) = cleanup(&lab.hosts[0], &[]);
    assert!(ok && text.contains("removed bridge cni0\n"), "{text}");
    let (ok, text) = cleanup(&lab.hosts[0], &["--dry-run"]);
    assert!(ok && text.contains("nothing of flannel's is left on this host"), "{text}");
}
