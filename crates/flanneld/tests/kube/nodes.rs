//! A whole cluster as people have it: kubelet, kube-proxy, the scheduler and containerd on each host, our image, and our
//! manifest as it is. The daemon runs as the manifest says, by the token that kubelet gives it, and pods are made by the
//! plugins and the list that its init container installed.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use kernel::netns::Netns;
use lab::{Lab, PodFamily};
use serde_json::{Value, json};

use crate::cluster::{eventually, ping_all_from, ping_during};
use crate::containers::{Sandbox, cgroup, image};
use crate::{Version, events, field, plan, tool};

/// The services' network of the lab.
const SERVICES: &str = "10.96.0.0/16";

struct Node {
    sandbox: Sandbox,
    netns: PathBuf,
    folder: PathBuf,
    programs: Vec<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        for program in &mut self.programs {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

impl Node {
    fn shell(&self, script: &str) -> String {
        self.sandbox.run(&self.netns, script)
    }

    fn start(&mut self, name: &str, script: &str) {
        let script = format!("exec {script} > {}/{name}.log 2>&1", self.folder.display());
        self.programs.push(self.sandbox.shell(&self.netns, &script).stdout(Stdio::null()).spawn().unwrap());
    }

    fn log(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.folder.join(format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with(['E', 'F']) || line.contains("level=error")).collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

/// A host with containerd and both images, before a kubelet.
fn node(lab: &Lab, host: usize, pod_image: &Path) -> Node {
    let name = lab.hosts[host].name.clone();
    let folder = lab.hosts[host].directory.join("node");
    std::fs::create_dir_all(&folder).unwrap();
    let netns = lab.hosts[host].directory.parent().unwrap().join("netns").join(&name);
    let mut node = Node { sandbox: Sandbox::new(), netns, folder: folder.clone(), programs: Vec::new() };
    // The runtime's list has a fixed place. And kubelet would set three sysctls of the whole machine: it finds them as it
    // wants them.
    node.shell(
        "mkdir -p /etc/cni/net.d; mount -t tmpfs none /etc/cni/net.d; mkdir /run/fake
         for v in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
           f=/run/fake/$(basename ${v%%=*}); echo ${v#*=} > $f; mount --bind $f /proc/sys/${v%%=*}; done",
    );
    // kube-proxy rewrites what has a route at all; a host's way out is one in earnest.
    node.shell(&format!("ip route replace {SERVICES} dev eth0"));
    let place = folder.display();
    std::fs::write(
        folder.join("containerd.toml"),
        format!(
            "version = 2\nroot = \"{place}/root\"\nstate = \"{place}/state\"\ndisabled_plugins = [\"io.containerd.internal.v1.opt\", \"io.containerd.snapshotter.v1.overlayfs\", \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\"]\n\
             [grpc]\n  address = \"{place}/sock\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"localhost/pod:1\"\n  restrict_oom_score_adj = true\n  disable_apparmor = true\n  netns_mounts_under_state_dir = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"native\"\n  default_runtime_name = \"runc\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n"
        ),
    )
    .unwrap();
    node.start("containerd", &format!("containerd -c {place}/containerd.toml"));
    let socket = folder.join("sock");
    eventually("containerd listens", || socket.exists());
    let ours = tool("FLANNEL_IMAGE").display().to_string();
    for image in [pod_image.display().to_string(), ours] {
        let import = format!("ctr -a {place}/sock -n k8s.io image import --snapshotter native {image}");
        eventually("the image is there", || node.sandbox.shell(&node.netns, &import).output().unwrap().status.success());
    }
    node
}

/// Starts a host's kubelet and kube-proxy.
fn join(lab: &Lab, node: &mut Node, host: usize) {
    let (name, folder) = (&lab.hosts[host].name, node.folder.display().to_string());
    let control = lab.kubernetes();
    let config = control.join("admin.kubeconfig");
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{folder}/sock"),
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "cgroupDriver": "cgroupfs", "failCgroupV1": false, "cgroupRoot": format!("/{}/{name}", cgroup()),
        "cgroupsPerQOS": false, "enforceNodeAllocatable": [], "oomScoreAdj": 0, "failSwapOn": false,
        "localStorageCapacityIsolation": false, "makeIPTablesUtilChains": false, "resolvConf": "",
        "evictionHard": { "memory.available": "1Mi" }, "imageGCHighThresholdPercent": 100,
        "podLogsDir": format!("{folder}/podlogs"), "volumePluginDir": format!("{folder}/plugins"), "syncFrequency": "2s",
    });
    std::fs::write(node.folder.join("kubelet.yaml"), kubelet.to_string()).unwrap();
    let networks = match lab.hosts[host].address6 {
        None => "10.244.0.0/16",
        Some(_) => "10.244.0.0/16,fd00:244::/48",
    };
    let proxy = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": { "kubeconfig": config }, "mode": "nftables", "hostnameOverride": name, "clusterCIDR": networks,
        "conntrack": { "maxPerCore": 0, "min": 0 }, "healthzBindAddress": "127.0.0.1:10256",
    });
    std::fs::write(node.folder.join("proxy.yaml"), proxy.to_string()).unwrap();
    let program = tool("FLANNEL_KUBERNETES").display().to_string();
    node.start("kube-proxy", &format!("{program} kube-proxy --config={folder}/proxy.yaml"));
    let address = lab.hosts[host].address;
    node.start(
        "kubelet",
        &format!(
            "{program} kubelet --config={folder}/kubelet.yaml --kubeconfig={} --root-dir={folder}/kubelet --cert-dir={folder}/pki --hostname-override={name} --node-ip={address}",
            config.display()
        ),
    );
}

/// A pod that answers on port 80 with its name.
fn pod(name: &str, host: &str, port: u16) -> Value {
    let script = format!("while :; do echo {name} | /bin/busybox nc -l -p 80; done");
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": "answers" } },
        "spec": {
            "nodeName": host, "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 1,
            // No other condition of the node's counts here.
            "tolerations": [{ "operator": "Exists" }],
            "containers": [{
                "name": "main", "image": "localhost/pod:1", "imagePullPolicy": "Never", "command": ["/bin/busybox", "sh", "-c", script],
                "ports": [{ "containerPort": 80, "hostPort": port }],
            }],
        },
    })
}

fn wait(what: &str, nodes: &[Node], lab: &Lab, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(90);
    while !done() {
        if Instant::now() > end {
            let logs: Vec<String> =
                nodes.iter().flat_map(|node| ["kubelet", "containerd"].map(|name| format!("{name}: {}", node.log(name)))).collect();
            let pods = lab.kubectl(&["get", "pods", "-A", "-o", "wide"], "").unwrap_or_default();
            let events = lab.kubectl(&["get", "events", "-A", "--sort-by=.lastTimestamp"], "").unwrap_or_default();
            panic!("{what}: not within 90 s\n{pods}\n{events}\n{}", logs.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Two hosts with all their programs, whose kubelets register their Nodes themselves.
fn start(root: &Path, backend: &str, family: PodFamily) -> (Lab, Vec<Node>) {
    let mut plan = plan(2, backend, family, Version::Current);
    let config = plan.config.clone();
    for flag in ["--kubelet-preferred-address-types=InternalIP", "--endpoint-reconciler-type=lease"] {
        plan.kubernetes_flags.push(("kube-apiserver", flag.to_owned()));
    }
    let controllers = "daemonset-controller,serviceaccount-controller,root-ca-certificate-publisher-controller,endpointslice-controller,namespace-controller,garbage-collector-controller,taint-eviction-controller,node-lifecycle-controller";
    plan.kubernetes_flags.push(("kube-controller-manager", format!("--controllers={controllers}")));
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    // The manifest is the same for all; the ConfigMap is what an operator changes.
    let data = json!({ "data": { "net-conf.json": config.to_string() } });
    lab.kubectl(&["-n", "kube-flannel", "patch", "configmap", "kube-flannel-cfg", "--type=merge", "-p", &data.to_string()], "").unwrap();
    // Kubelets register their Nodes themselves.
    lab.kubectl(&["delete", "nodes", "--all"], "").unwrap();
    let program = tool("FLANNEL_KUBERNETES").display().to_string();
    let pod_image = image(&root.join("oci"));
    let mut nodes: Vec<Node> = (0..2).map(|host| node(&lab, host, &pod_image)).collect();
    for (host, node) in nodes.iter_mut().enumerate() {
        join(&lab, node, host);
    }
    let scheduler = format!(
        "{program} kube-scheduler --kubeconfig={}/admin.kubeconfig --leader-elect=false --secure-port=0",
        lab.kubernetes().display()
    );
    nodes[0].start("kube-scheduler", &scheduler);
    (lab, nodes)
}

fn daemons_ready(lab: &Lab) -> bool {
    lab.kubectl(&["-n", "kube-flannel", "get", "daemonset", "kube-flannel-ds", "-o", "jsonpath={.status.numberReady}"], "")
        .is_ok_and(|ready| ready == "2")
}

/// Waits for the daemons and the Nodes, and looks at what they report and at what the init containers installed.
fn nodes_become_ready(lab: &Lab, nodes: &[Node]) {
    wait("the DaemonSet is ready on both nodes", nodes, lab, || daemons_ready(lab));
    wait("both nodes are ready", nodes, lab, || {
        lab.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}"], "")
            .is_ok_and(|text| text == "True True")
    });
    for host in ["h1", "h2"] {
        let condition = |kind: &str| field(lab, &format!("node/{host}"), &format!(".status.conditions[?(@.type==\"{kind}\")].reason"));
        assert_eq!(condition("NetworkUnavailable"), "FlannelIsUp");
        assert!(
            events(lab, host).iter().all(|(reason, _)| !["PeerUnreachable", "KernelRefused", "Forbidden"].contains(&reason.as_str())),
            "{:?}",
            events(lab, host)
        );
    }
    // The files of the init container, as a runtime finds them.
    for node in nodes {
        let installed = node.shell("ls /opt/cni/bin; ls -A /etc/cni/net.d; cat /run/flannel/subnet.env");
        for name in ["bridge", "flannel", "host-local", "loopback", "portmap", "10-flannel.conflist", "FLANNEL_IPMASQ=true"] {
            assert!(installed.contains(name), "{installed}");
        }
    }
}

/// Creates a pod on each host, and a service of both. Returns the pods' addresses, which are of their Nodes' pod CIDRs.
fn create_pods(lab: &Lab, nodes: &[Node], has_service: bool) -> Vec<Vec<IpAddr>> {
    let pods = [pod("p1", "h1", 8077), pod("p2", "h2", 8077)];
    crate::create(lab, &pods);
    let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "answers" }, "spec": { "clusterIP": "10.96.0.77", "selector": { "app": "answers" }, "ports": [{ "port": 80 }] } });
    if has_service {
        crate::create(lab, &[service]);
    }
    wait("both pods are ready", nodes, lab, || {
        lab.kubectl(&["get", "pods", "p1", "p2", "-o", "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}"], "")
            .is_ok_and(|text| text == "True True")
    });
    let addresses: Vec<Vec<IpAddr>> = ["p1", "p2"]
        .iter()
        .map(|name| field(lab, &format!("pod/{name}"), ".status.podIPs[*].ip").split(' ').map(|ip| ip.parse().unwrap()).collect())
        .collect();
    for (host, addresses) in addresses.iter().enumerate() {
        let cidrs = lab.pod_cidrs(host).unwrap();
        assert_eq!(addresses.len(), cidrs.split(',').count(), "{addresses:?} of {cidrs}");
        for address in addresses {
            let mut subnets = cidrs.split(',').map(|cidr| cidr.parse::<flannel::Subnet>().unwrap());
            assert!(subnets.any(|subnet| subnet.contains(*address)), "{address} is not of {cidrs}");
        }
    }
    addresses
}

fn pods_answer(lab: &Lab, nodes: &[Node], addresses: &[Vec<IpAddr>], has_service: bool) {
    let ask = |node: usize, target: &str, want: &str| {
        let script =
            format!("for i in 1 2 3 4 5 6 7 8; do /bin/busybox nc -w 2 {target} < /dev/null | grep -E '{want}' && break; sleep 0.3; done");
        let got = nodes[node].shell(&script);
        assert!(got.starts_with('p'), "{target} from {node}: {got:?}");
    };
    // By the other's address, by its host's port, and by the service's address; and by the port again after a deletion of
    // the plugin's rules, which the daemon knows by its own mount of /run/flannel.
    for (node, other) in [(0, 1), (1, 0)] {
        let want = format!("^p{}$", other + 1);
        let ports: Vec<String> = addresses[other]
            .iter()
            .filter_map(|address| lab.hosts[other].addresses().into_iter().find(|host| host.is_ipv4() == address.is_ipv4()))
            .map(|host| format!("{host} 8077"))
            .collect();
        addresses[other].iter().for_each(|address| ask(node, &format!("{address} 80"), &want));
        ports.iter().for_each(|port| ask(node, port, &want));
        if has_service {
            ask(node, "10.96.0.77 80", "^p[12]$");
        }
        let deleted = nodes[other].shell("nft list tables | grep cni_hostport | while read table; do nft delete $table; echo $table; done");
        assert!(deleted.contains("cni_hostport"), "{deleted}");
        ports.iter().for_each(|port| ask(node, port, &want));
    }
}

/// The namespace of a pod on a host.
fn pod_netns(node: &Node, name: &str) -> Netns {
    let place = node.folder.display();
    let list = node.shell(&format!("ctr -a {place}/sock -n k8s.io containers ls -q 'labels.\"io.kubernetes.pod.name\"=={name},labels.\"io.cri-containerd.kind\"==container'"));
    let tasks = node.shell(&format!("ctr -a {place}/sock -n k8s.io task ls"));
    let pid = tasks.lines().find(|line| line.starts_with(list.trim())).and_then(|line| line.split_whitespace().nth(1)).unwrap();
    node.sandbox.netns(pid)
}

pub(crate) fn kubelets_run_our_daemonset(root: &Path, backend: &str, family: PodFamily) {
    let (lab, nodes) = start(root, backend, family);
    nodes_become_ready(&lab, &nodes);
    // A service has IPv4 here.
    let has_service = family != PodFamily::V6;
    let addresses = create_pods(&lab, &nodes, has_service);
    pods_answer(&lab, &nodes, &addresses, has_service);
    // The way from pod to pod, in the pods themselves; and the daemons are rolled over while it is used.
    let spaces = [pod_netns(&nodes[0], "p1"), pod_netns(&nodes[1], "p2")];
    ping_all_from(&spaces[0], &addresses[1]);
    ping_all_from(&spaces[1], &addresses[0]);
    // Forwarding is switched off, and the daemon's /proc/sys is read-only: pods still reach each other, and an Event says so.
    if family != PodFamily::V6 {
        let write = || std::fs::write("/proc/sys/net/ipv4/ip_forward", "0");
        lab.hosts[0].netns.run(write).unwrap().unwrap();
        let v4: Vec<IpAddr> = addresses[1].iter().copied().filter(IpAddr::is_ipv4).collect();
        ping_all_from(&spaces[0], &v4);
        eventually("an Event reports it", || {
            events(&lab, "h1").iter().any(|(reason, text)| reason == "KernelRefused" && text.contains("ip_forward"))
        });
    }
    // Which takes its time: each daemon is probed before the next one's turn.
    if (backend, family) == ("vxlan", PodFamily::V4) {
        let names = || -> BTreeSet<String> {
            lab.kubectl(&["-n", "kube-flannel", "get", "pods", "-o", "name"], "").unwrap().lines().map(ToOwned::to_owned).collect()
        };
        let before = names();
        let (sent, lost) = ping_during(&spaces[0], addresses[1][0], || {
            lab.kubectl(&["-n", "kube-flannel", "rollout", "restart", "daemonset", "kube-flannel-ds"], "").unwrap();
            wait("the daemons are rolled over", &nodes, &lab, || daemons_ready(&lab) && names().is_disjoint(&before) && names().len() == 2);
        });
        assert_eq!(lost, 0, "of {sent}");
    }
    drop(spaces);

    lab.kubectl(&["delete", "pod", "p1", "p2", "--timeout=60s"], "").unwrap();
    for node in &nodes {
        eventually("no veth and no address of theirs is left", || {
            let left = node
                .shell("ip -o link | grep -c ' veth' || true; ls /var/lib/cni/networks/cbr0 | grep -vc -e last_reserved -e lock || true");
            left == "0\n0\n"
        });
    }
}
