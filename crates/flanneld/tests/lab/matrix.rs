//! Every family with every backend that carries it, in every flavour of the traffic rules, on a switch and across a router: pods reach
//! each other with packets of every size, and the outside, where iptables lets nothing through by itself.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kernel::netns::Netns;
use lab::ping::ping_all;
use lab::{Lab, Plan, Pod, PodFamily, Topology};
use serde_json::{Value, json};

#[derive(Clone, Copy, PartialEq)]
enum Rules {
    Nftables,
    IptablesNft,
    IptablesLegacy,
}

#[derive(Clone, Copy, PartialEq)]
enum Backend {
    HostGw,
    Vxlan,
    DirectRouting,
    Udp,
    Ipip,
    IpipDirectRouting,
}

#[derive(Clone, Copy)]
pub(crate) struct Case {
    family: PodFamily,
    backend: Backend,
    rules: Rules,
    topology: Topology,
}

/// Where there is a case: host-gw does not cross a router, udp carries IPv4.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in [PodFamily::V4, PodFamily::V6, PodFamily::Dual] {
        for backend in [Backend::HostGw, Backend::Vxlan, Backend::DirectRouting, Backend::Udp] {
            for rules in [Rules::Nftables, Rules::IptablesNft, Rules::IptablesLegacy] {
                for topology in [Topology::Switch, Topology::Router] {
                    let carries = backend != Backend::Udp || family == PodFamily::V4;
                    if carries && (topology == Topology::Switch || backend != Backend::HostGw) {
                        cases.push(Case { family, backend, rules, topology });
                    }
                }
            }
        }
    }
    cases
}

/// The cases that need a kernel with IPIP.
pub(crate) fn ipip() -> Vec<Case> {
    let backends = [(Backend::Ipip, Topology::Router), (Backend::IpipDirectRouting, Topology::Switch)];
    let case = |(backend, topology)| Case { family: PodFamily::V4, backend, rules: Rules::Nftables, topology };
    backends.into_iter().map(case).collect()
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = match self.backend {
            Backend::HostGw => "host-gw",
            Backend::Vxlan => "vxlan",
            Backend::DirectRouting => "vxlan+DirectRouting",
            Backend::Udp => "udp",
            Backend::Ipip => "ipip",
            Backend::IpipDirectRouting => "ipip+DirectRouting",
        };
        let rules = match self.rules {
            Rules::Nftables => "nftables",
            Rules::IptablesNft => "iptables-nft",
            Rules::IptablesLegacy => "iptables-legacy",
        };
        write!(f, "{} {backend} {rules} {}", format!("{:?}", self.family).to_lowercase(), format!("{:?}", self.topology).to_lowercase())
    }
}

impl Case {
    fn plan(&self) -> Plan {
        let backend: Value = match self.backend {
            Backend::HostGw => json!({ "Type": "host-gw" }),
            Backend::Vxlan => json!({ "Type": "vxlan" }),
            Backend::DirectRouting => json!({ "Type": "vxlan", "DirectRouting": true }),
            // What upstream takes when nothing is said.
            Backend::Udp => Value::Null,
            Backend::Ipip => json!({ "Type": "ipip" }),
            Backend::IpipDirectRouting => json!({ "Type": "ipip", "DirectRouting": true }),
        };
        let mut plan = Plan { topology: self.topology, ..Plan::new(3, &backend, Path::new(super::PROGRAM)) }.family(self.family);
        if backend.is_null() {
            plan.config.as_object_mut().unwrap().remove("Backend");
        }
        plan.config["EnableNFTables"] = (self.rules == Rules::Nftables).into();
        plan
    }

    pub(crate) fn run(&self, root: &Path) {
        let mut plan = self.plan();
        if self.rules == Rules::IptablesLegacy {
            // A host whose `iptables` is the legacy one.
            let folder = root.join("legacy");
            std::fs::create_dir_all(&folder).unwrap();
            for stem in ["iptables", "ip6tables"] {
                for (name, target) in [("", "-legacy"), ("-save", "-legacy-save"), ("-restore", "-legacy-restore")] {
                    std::os::unix::fs::symlink(format!("/usr/sbin/{stem}{target}"), folder.join(format!("{stem}{name}"))).unwrap();
                }
            }
            plan.env.push(("PATH".to_owned(), format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display())));
        }
        let mut lab = Lab::wire(plan, root).unwrap();
        lab.start_store().unwrap();
        lab.put_config().unwrap();
        for host in 0..3 {
            self.deny_forwarding(&lab.hosts[host].netns);
            lab.start_daemon(host, &[]).unwrap();
        }
        lab.settle().unwrap();
        let pods: Vec<Pod> = (0..3).map(|host| lab.add_pod(host).unwrap()).collect();
        for pod in &pods {
            let mut targets: Vec<IpAddr> =
                pods.iter().filter(|other| other.name != pod.name).flat_map(|other| other.addresses.clone()).collect();
            // The middle has no route to pods: it answers only because their host masquerades them.
            if self.family != PodFamily::V6 {
                targets.push("10.0.0.254".parse().unwrap());
            }
            if self.family != PodFamily::V4 {
                targets.push("fd00:10::fe".parse().unwrap());
            }
            let answered = pod.netns.run(|| ping_all(&targets, Duration::from_secs(5))).unwrap().unwrap();
            let silent: Vec<&IpAddr> = targets.iter().filter(|ip| !answered.contains_key(ip)).collect();
            assert!(silent.is_empty(), "{self}: {} gets no answer from {silent:?}", pod.name);
        }
        self.assert_no_finding(&mut lab);
        for target in &pods[1].addresses {
            let mtu = self.mtu(target);
            assert!(ping_unfragmented(&pods[0].netns, target, mtu), "{self}: {mtu} bytes to {target}");
            assert!(!ping_unfragmented(&pods[0].netns, target, mtu + 1), "{self}: {} bytes to {target}", mtu + 1);
        }
    }

    /// A healthy host has no finding, also while pods come and go.
    fn assert_no_finding(&self, lab: &mut Lab) {
        let more: Vec<Pod> = (0..3).map(|host| lab.add_pod(host).unwrap()).collect();
        more.iter().for_each(|pod| drop(lab.cni(pod.host, "flannel", "DEL", &pod.name, &pod.path, "eth0").unwrap()));
        for host in &lab.hosts {
            assert_eq!(host.state().unwrap()["findings"], json!([]), "{self}: {}", host.name);
            let log = std::fs::read_to_string(host.log()).unwrap();
            assert!(!log.contains("check found a problem"), "{self}: {}\n{log}", host.name);
        }
    }

    /// How large a packet to a pod of another host may be.
    fn mtu(&self, target: &IpAddr) -> u32 {
        match (self.backend, self.family, target.is_ipv4()) {
            (Backend::HostGw, ..) => 1500,
            (Backend::Udp, ..) => 1472,
            (Backend::Ipip | Backend::IpipDirectRouting, ..) => 1480,
            (_, _, true) => 1450,
            // On a switch DirectRouting uses no device, and the pod's own MTU counts.
            (Backend::DirectRouting, PodFamily::Dual, false) if self.topology == Topology::Switch => 1450,
            (_, _, false) => 1430,
        }
    }

    /// iptables whose policy for forwarded packets is DROP, as Docker sets it. That no rule of nftables can override
    /// it is why there are two flavours.
    fn deny_forwarding(&self, netns: &Netns) {
        let variant = match self.rules {
            Rules::Nftables => return,
            Rules::IptablesNft => "nft",
            Rules::IptablesLegacy => "legacy",
        };
        for stem in ["iptables", "ip6tables"] {
            let mut command = Command::new(format!("{stem}-{variant}"));
            let status = netns.run(|| command.args(["-P", "FORWARD", "DROP"]).status()).unwrap();
            assert!(status.expect("iptables is installed by `cargo xtask test`").success());
        }
    }
}

/// One echo request of `size` bytes, IP header included, that no router may fragment.
pub(crate) fn ping_unfragmented(from: &Netns, to: &IpAddr, size: u32) -> bool {
    let headers = if to.is_ipv4() { 28 } else { 48 };
    let mut ping = Command::new("ping");
    ping.args(["-M", "do", "-c", "1", "-W", "2", "-s", &(size - headers).to_string(), &to.to_string()]);
    let output = from.run(|| ping.output()).unwrap().expect("ping is installed by `cargo xtask test`");
    output.status.success()
}
