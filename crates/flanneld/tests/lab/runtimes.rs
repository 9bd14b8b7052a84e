//! Real container runtimes as callers of our plugins: containerd by `ctr run --cni`, and podman with its CNI backend. They
//! run in a process namespace of the test's, so that nothing of them outlives it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use flannel::Cidr;
use kernel::addr;
use kernel::netns::Netns;
use lab::ping::ping_all;
use lab::{Lab, StoreKind};
use serde_json::{Value, json};

use crate::cluster::eventually;
use crate::containers::{Sandbox, cgroup, image};
use crate::{files, links, start};

/// A folder with a host's list of plugins, as a runtime reads it.
fn conf_list(lab: &Lab, host: usize, name: &str) -> PathBuf {
    let folder = lab.hosts[host].directory.join("net.d");
    std::fs::create_dir_all(&folder).unwrap();
    let mut flannel = lab.cni_conf(host, "flannel");
    // The sandbox has a `/run` of its own.
    flannel["subnetFile"] = json!(lab.hosts[host].subnet_file());
    let version = flannel["cniVersion"].take();
    let list = json!({ "cniVersion": version, "name": name, "plugins": [flannel, { "type": "portmap", "capabilities": { "portMappings": true } }] });
    std::fs::write(folder.join("10-flannel.conflist"), list.to_string()).unwrap();
    folder
}

const PODS: usize = 200;

/// Each container reaches each, across the hosts and on its own.
fn each_reaches_each(sandbox: &Sandbox, netns: &Path, ctr: &str) {
    let tasks = sandbox.run(netns, &format!("{ctr} task ls"));
    let spaces: Vec<Netns> =
        tasks.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).map(|pid| sandbox.netns(pid)).collect();
    assert_eq!(spaces.len(), PODS, "{tasks}");
    let address = |netns: &Netns| {
        let found =
            netns.run(|| addr::list(&mut kernel::netlink::Socket::open(kernel::netlink::Protocol::Route).unwrap(), 0).unwrap()).unwrap();
        found.iter().map(|a| a.addr.cidr).find(|cidr: &Cidr| cidr.addr.to_string().starts_with("10.244.")).unwrap().addr
    };
    let addresses: Vec<IpAddr> = spaces.iter().map(address).collect();
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), PODS);
    // Those of the other host from each; those of its own host from one of each host only, because the kernel's table of
    // neighbours has 1,024 entries for all namespaces together.
    let of = |ip: &IpAddr| ip.to_string().starts_with("10.244.1.");
    for (at, netns) in spaces.iter().enumerate() {
        let all = at < 2;
        let targets: Vec<IpAddr> = addresses.iter().filter(|ip| all || of(ip) != of(&addresses[at])).copied().collect();
        let answered = netns.run(|| ping_all(&targets, Duration::from_secs(20))).unwrap().unwrap();
        assert_eq!(answered.len(), targets.len(), "from {}", addresses[at]);
    }
}

/// GC of each host, with no container left.
fn collect_garbage(lab: &Lab) {
    for host in 0..2 {
        assert!(files(&lab.hosts[host].directory.join("cni")).len() > PODS / 2, "nothing was returned yet");
        let mut conf = lab.cni_conf(host, "flannel");
        conf["cniVersion"] = "1.1.0".into();
        conf["name"] = "cbr0".into();
        conf["cni.dev/valid-attachments"] = Value::Array(Vec::new());
        let (mut command, _) = lab.cni_command(host, "flannel", "GC", "", Path::new(""), "").unwrap();
        let mut child = lab.hosts[host].netns.run(|| command.spawn()).unwrap().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), conf.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

pub(crate) fn two_hundred_pods_by_containerd(root: &Path) {
    let lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let before: Vec<BTreeSet<String>> = lab.hosts.iter().map(|host| links(&host.netns)).collect();
    let sandbox = Sandbox::new();
    let image = image(&root.join("oci"));
    let place = root.join("containerd");
    std::fs::create_dir_all(&place).unwrap();
    let socket = place.join("sock");
    let config = format!(
        "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n[grpc]\n  address = \"{0}/sock\"\n",
        place.display()
    );
    std::fs::write(place.join("config.toml"), config).unwrap();
    let netns = |host: usize| root.join("netns").join(format!("h{}", host + 1));
    let mut containerd = sandbox
        .shell(&root.join("netns/middle"), &format!("exec containerd -c {0}/config.toml > {0}/log 2>&1", place.display()))
        .spawn()
        .expect("containerd is installed by `cargo xtask test`");
    eventually("containerd listens", || socket.exists());
    let ctr = format!("ctr -a {}", socket.display());
    eventually("the image is there", || {
        sandbox.shell(&netns(0), &format!("{ctr} image import {}", image.display())).output().unwrap().status.success()
    });
    // ctr looks for plugins and their list in fixed places.
    let lists = [0, 1].map(|host| conf_list(&lab, host, "cbr0"));
    let with_cni = |host: usize, command: &str| {
        let list = &lists[host];
        format!(
            "exec unshare -m sh -ec 'mount --bind {}/bin /opt/cni/bin; mount -t tmpfs none /etc/cni; mkdir /etc/cni/net.d; mount --bind {} /etc/cni/net.d; exec {ctr} {command}'",
            root.display(),
            list.display()
        )
    };
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let pod = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if pod >= PODS {
                        return;
                    }
                    let script = with_cni(
                        pod % 2,
                        &format!("run -d --cni --cgroup /{}/pod{pod} --snapshotter native localhost/pod:1 pod{pod}", cgroup()),
                    );
                    sandbox.run(&netns(pod % 2), &script);
                }
            });
        }
    });
    each_reaches_each(&sandbox, &netns(0), &ctr);
    // ctr forgets the network of what it started detached: GC collects it.
    sandbox
        .run(&netns(0), &format!("for i in $(seq 0 {}); do {ctr} task rm -f pod$i; {ctr} container rm pod$i; done 2> /dev/null", PODS - 1));
    collect_garbage(&lab);
    // One that ctr stays with is returned by its own DEL.
    let mut attached = sandbox.shell(
        &netns(0),
        &with_cni(0, &format!("run --rm --cni --cgroup /{}/attached --snapshotter native localhost/pod:1 attached", cgroup())),
    );
    let mut child = attached.stdout(Stdio::null()).spawn().unwrap();
    eventually("it runs", || sandbox.shell(&netns(0), &format!("{ctr} task ls | grep -q attached.*RUNNING")).status().unwrap().success());
    assert_eq!(files(&lab.hosts[0].directory.join("cni")).len(), 5, "an address, its owner, a configuration, a lock and a hint");
    sandbox.run(&netns(0), &format!("{ctr} task kill -s KILL attached"));
    child.wait().unwrap();
    for (host, before) in lab.hosts.iter().zip(before) {
        assert_eq!(
            files(&host.directory.join("cni")),
            BTreeSet::from(["last_reserved_ip.0".to_owned(), "lock".to_owned()]),
            "{}",
            host.name
        );
        eventually("no link is left but the bridge", || {
            let mut now = links(&host.netns);
            now.remove("cni0");
            now == before
        });
    }
    let _ = containerd.kill();
    let _ = containerd.wait();
}

pub(crate) fn podman_runs_pods(root: &Path) {
    let lab = start(root, 2, "host-gw", StoreKind::Embedded);
    let sandbox = Sandbox::new();
    image(&root.join("oci"));
    let mut containers = Vec::new();
    for host in 0..2 {
        let place = lab.hosts[host].directory.join("podman");
        std::fs::create_dir_all(&place).unwrap();
        let config = format!(
            "[containers]\nlog_driver = \"k8s-file\"\n[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{}/bin\"]\nnetwork_config_dir = \"{}\"\n",
            root.display(),
            conf_list(&lab, host, "flan").display()
        );
        std::fs::write(place.join("containers.conf"), config).unwrap();
        // Its folders must have short names.
        let podman = format!(
            "env CONTAINERS_CONF={}/containers.conf podman --root /opt/{host}/root --runroot /opt/{host}/run --tmpdir /opt/{host}/tmp --storage-driver vfs",
            place.display()
        );
        let netns = root.join("netns").join(format!("h{}", host + 1));
        sandbox.run(&netns, &format!("{podman} import {}/oci/layer.tar localhost/pod:1", root.display()));
        let limits = "--ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --cgroup-parent";
        let server = "sh -c 'while :; do echo here | /bin/busybox nc -l -p 80; done'";
        let id = sandbox.run(
            &netns,
            &format!(
                "{podman} run -d --network flan -p 8088:80 {limits} /{} --entrypoint '[\"/bin/busybox\"]' localhost/pod:1 {server}",
                cgroup()
            ),
        );
        let address = sandbox.run(
            &netns,
            &format!("{podman} inspect -f '{{{{range .NetworkSettings.Networks}}}}{{{{.IPAddress}}}}{{{{end}}}}' {}", id.trim()),
        );
        containers.push((podman, netns, address.trim().to_owned()));
    }
    // Each host reaches the other's container, and by its published port.
    for (host, other) in [(0, 1), (1, 0)] {
        for target in [format!("{} 80", containers[other].2), format!("{} 8088", lab.hosts[other].address)] {
            let ask = format!("for i in 1 2 3 4 5; do /bin/busybox nc -w 2 {target} < /dev/null | grep here && break; sleep 0.2; done");
            let got = sandbox.run(&containers[host].1, &ask);
            assert_eq!(got, "here\n", "{target} from {}", lab.hosts[host].name);
        }
    }
    for (host, (podman, netns, _)) in lab.hosts.iter().zip(&containers) {
        sandbox.run(netns, &format!("{podman} rm -f -a -t 0"));
        assert_eq!(
            files(&host.directory.join("cni")),
            BTreeSet::from(["last_reserved_ip.0".to_owned(), "lock".to_owned()]),
            "{}",
            host.name
        );
        eventually("no veth is left", || links(&host.netns).iter().all(|name| !name.starts_with("veth")));
    }
}
