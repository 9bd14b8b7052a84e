//! What a pod costs: ADD and DEL of the plugin, beside the same links, addresses and routes written by this process, and beside
//! other plugins.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flannel::object::bridge::Port;
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use kernel::{addr, link, route};
use lab::Lab;
use serde_json::{Value, json};

use crate::{NETWORK, lab, name, percentile};

/// Pods that are there while the 1,000th is added. A bridge has at most 1,023 ports.
const MANY: usize = 1_000;
/// Pods that are added one by one.
const ONE_BY_ONE: usize = 100;
/// Pods that are added and deleted eight at a time.
const PARALLEL: usize = 200;

/// A container to be: its name, and its namespace by path and by itself.
type Pod = (String, PathBuf, Netns);

/// A plugin with its configuration.
struct Chain<'a> {
    lab: &'a Lab,
    program: PathBuf,
    conf: Value,
}

impl Chain<'_> {
    fn call(&self, verb: &str, (id, path, _): &Pod) -> Duration {
        let mut command = Command::new(&self.program);
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id).env("CNI_NETNS", path).env("CNI_IFNAME", "eth0");
        command.env("CNI_PATH", self.program.parent().unwrap());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let conf = self.conf.to_string();
        let began = Instant::now();
        let mut child = self.lab.hosts[0].netns.run(|| command.spawn()).unwrap().unwrap();
        child.stdin.take().unwrap().write_all(conf.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let took = began.elapsed();
        assert!(output.status.success(), "{verb} of {id}: {}", String::from_utf8_lossy(&output.stdout));
        took
    }

    /// ADD of each, then DEL of each.
    fn one_by_one(&self, pods: &[Pod]) -> [Vec<Duration>; 2] {
        // The bridge exists after the first.
        for verb in ["ADD", "DEL"] {
            self.call(verb, &pods[0]);
        }
        ["ADD", "DEL"].map(|verb| pods.iter().map(|pod| self.call(verb, pod)).collect())
    }

    /// Pods a second, eight at a time.
    fn parallel(&self, verb: &str, pods: &[Pod]) -> f64 {
        let (next, began) = (AtomicUsize::new(0), Instant::now());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                        self.call(verb, pod);
                    }
                });
            }
        });
        #[expect(clippy::cast_precision_loss, reason = "some hundred")]
        let count = pods.len() as f64;
        count / began.elapsed().as_secs_f64()
    }
}

pub(crate) fn run(root: &Path, plugin: &Path) {
    let mut lab = lab(root, 1, "host-gw", false, 20);
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.settle().unwrap();
    let all: Vec<Pod> = (0..MANY + 20)
        .map(|i| {
            let (id, netns) = (format!("p{i}"), Netns::create().unwrap());
            let path = root.join("netns").join(&id);
            netns.bind(&path).unwrap();
            (id, path, netns)
        })
        .collect();
    // The last ten are for raw ones beside a thousand.
    let (pods, last) = all.split_at(MANY + 10);
    let few = &pods[..ONE_BY_ONE];
    let flannel = |masquerade: bool| {
        let mut conf = lab.cni_conf(0, "flannel");
        conf["delegate"]["ipMasq"] = masquerade.into();
        // The plugin is called where the benchmark runs, not in the host's mount namespace.
        conf["subnetFile"] = json!(lab.hosts[0].subnet_file());
        Chain { lab: &lab, program: root.join("bin/flannel"), conf }
    };
    let chain = flannel(false);
    let plain = chain.one_by_one(few);
    let masqueraded = flannel(true).one_by_one(few);
    let rates = [&chain, &flannel(true)].map(|chain| ["ADD", "DEL"].map(|verb| chain.parallel(verb, &pods[..PARALLEL])));
    let full: Vec<Duration> = pods.iter().map(|pod| chain.call("ADD", pod)).collect();
    let raw_add = |pods: &[Pod]| -> Vec<Duration> {
        let add = |(i, (_, _, pod)): (usize, &Pod)| {
            let began = Instant::now();
            lab.hosts[0].netns.run(|| raw_pod(i, pod)).unwrap();
            began.elapsed()
        };
        pods.iter().enumerate().map(add).collect()
    };
    let raw_full = raw_add(last);
    for (_, _, pod) in last {
        pod.run(|| link::delete(&mut Socket::open(Protocol::Route).unwrap(), name("eth0")).unwrap()).unwrap();
    }
    for pod in pods {
        chain.call("DEL", pod);
    }

    let mut raw = [raw_add(few), Vec::new()];
    for (_, _, pod) in few {
        let began = Instant::now();
        pod.run(|| link::delete(&mut Socket::open(Protocol::Route).unwrap(), name("eth0")).unwrap()).unwrap();
        raw[1].push(began.elapsed());
    }
    // What it costs to start a program that does nothing: this one, asked for its version.
    let start = |_| {
        let began = Instant::now();
        Command::new(plugin).arg("bridge").env("CNI_COMMAND", "VERSION").output().unwrap();
        began.elapsed()
    };
    let start: Vec<Duration> = (0..100).map(start).collect();

    let peer = std::env::var_os("PEER_CNI_DIR").map(PathBuf::from);
    print_times(&lab, few, peer.as_deref(), Times { plain, masqueraded, full, raw, raw_full, start });
    print_rates(&lab, &pods[..PARALLEL], peer.as_deref(), rates);
    for (_, path, _) in &all {
        netns::unbind(path).unwrap();
    }
}

/// How long each call took.
struct Times {
    /// ADD and DEL.
    plain: [Vec<Duration>; 2],
    masqueraded: [Vec<Duration>; 2],
    /// ADD of each of 1,010 pods.
    full: Vec<Duration>,
    /// The same work as ADD and DEL, by this process.
    raw: [Vec<Duration>; 2],
    /// The same beside a thousand pods.
    raw_full: Vec<Duration>,
    /// Of a program that does nothing.
    start: Vec<Duration>,
}

/// Prints the times of pods that are added and deleted one by one, and those of other plugins.
fn print_times(lab: &Lab, pods: &[Pod], peer: Option<&Path>, times: Times) {
    println!("| pods, one by one | p50 ms | p95 ms | raw p50 | raw p95 | ratio of p50 |\n|---|--:|--:|--:|--:|--:|");
    let Times { mut plain, mut masqueraded, mut full, raw: [mut raw_add, mut raw_del], mut raw_full, mut start } = times;
    let line = |what: &str, ours: &mut [Duration], raw: &mut [Duration]| {
        let (p50, raw50) = (percentile(ours, 0.5), percentile(raw, 0.5));
        println!("| {what} | {p50:.2} | {:.2} | {raw50:.2} | {:.2} | {:.2} |", percentile(ours, 0.95), percentile(raw, 0.95), p50 / raw50);
    };
    line("ADD", &mut plain[0], &mut raw_add);
    line("DEL", &mut plain[1], &mut raw_del);
    line("ADD with ipMasq", &mut masqueraded[0], &mut raw_add);
    line("DEL with ipMasq", &mut masqueraded[1], &mut raw_del);
    line("ADD, the first ten", &mut full[..10], &mut raw_add);
    line("ADD, the last ten of 1,010", &mut full[MANY..], &mut raw_full);
    if let Some(folder) = peer {
        for (masquerade, verbs) in [(false, ["ADD, peer", "DEL, peer"]), (true, ["ADD with ipMasq, peer", "DEL with ipMasq, peer"])] {
            let peer = other(lab, folder, masquerade);
            let mut took = peer.one_by_one(pods);
            line(verbs[0], &mut took[0], &mut raw_add);
            line(verbs[1], &mut took[1], &mut raw_del);
        }
    }
    println!("| start of a program that does nothing | {:.2} | {:.2} | | | |", percentile(&mut start, 0.5), percentile(&mut start, 0.95));
}

/// Prints the rates of pods that are added and deleted eight at a time, and those of other plugins.
fn print_rates(lab: &Lab, pods: &[Pod], peer: Option<&Path>, rates: [[f64; 2]; 2]) {
    println!("\n| {PARALLEL} pods, 8 in parallel | ADD/s | DEL/s |\n|---|--:|--:|");
    for (what, [add, del]) in ["ours", "ours, ipMasq"].iter().zip(rates) {
        println!("| {what} | {add:.0} | {del:.0} |");
    }
    if let Some(folder) = peer {
        for masquerade in [false, true] {
            let peer = other(lab, folder, masquerade);
            let rates = ["ADD", "DEL"].map(|verb| peer.parallel(verb, pods));
            println!("| peer{} | {:.0} | {:.0} |", if masquerade { ", ipMasq" } else { "" }, rates[0], rates[1]);
        }
    }
}

/// Other plugins: the whole chain where their folder has a `flannel`, else what it would delegate to, without what its own start costs.
fn other<'a>(lab: &'a Lab, folder: &Path, masquerade: bool) -> Chain<'a> {
    let state = lab.hosts[0].directory.join("peer");
    let ipam = json!({ "type": "host-local", "dataDir": state.join("ipam") });
    let delegate = json!({ "bridge": "peer0", "isDefaultGateway": true, "hairpinMode": true, "ipMasq": masquerade });
    let chain = |kind: &str, conf: Value| Chain { lab, program: folder.join(kind), conf };
    if folder.join("flannel").exists() {
        std::fs::create_dir_all(&state).unwrap();
        let file = state.join("subnet.env");
        let text = format!("FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET=198.19.0.1/20\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=true\n");
        std::fs::write(&file, text).unwrap();
        return chain(
            "flannel",
            json!({
                "cniVersion": "0.3.1", "name": "peer", "type": "flannel", "subnetFile": file, "dataDir": state, "ipam": ipam,
                "delegate": delegate,
            }),
        );
    }
    let mut conf = delegate;
    for (key, value) in [("cniVersion", json!("1.0.0")), ("name", json!("peer")), ("type", json!("bridge")), ("mtu", json!(1500))] {
        conf[key] = value;
    }
    conf["ipam"] = ipam;
    conf["ipam"]["ranges"] = json!([[{ "subnet": "198.19.0.0/20" }]]);
    conf["ipam"]["routes"] = json!([{ "dst": NETWORK }]);
    chain("bridge", conf)
}

fn raw_pod(i: usize, pod: &Netns) {
    use std::os::fd::AsFd;
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let veth = name(&format!("raw{i}"));
    let (this, peer) =
        (link::VethEnd { name: veth, mac: None, netns: None }, link::VethEnd { name: name("eth0"), mac: None, netns: Some(pod.as_fd()) });
    link::create_veth(&mut socket, 1500, this, peer).unwrap();
    let bridge = link::get(&mut socket, name("cni0")).unwrap().unwrap().index;
    let index = link::get(&mut socket, veth).unwrap().unwrap().index;
    link::enslave(&mut socket, index, bridge, Port::default()).unwrap();
    pod.run(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let eth0 = link::get(&mut socket, name("eth0")).unwrap().unwrap().index;
        addr::add(&mut socket, eth0, format!("198.18.0.{}/24", i + 2).parse().unwrap()).unwrap();
        link::set_up(&mut socket, eth0, true).unwrap();
        for dst in ["0.0.0.0/0", NETWORK] {
            route::add(&mut socket, dst.parse().unwrap(), Some("198.18.0.1".parse().unwrap()), eth0).unwrap();
        }
    })
    .unwrap();
}
