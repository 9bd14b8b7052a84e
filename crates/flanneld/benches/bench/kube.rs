//! Kubernetes mode at scale: Nodes of a real size on a real API server, and their heartbeats.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flannel::object::Key;
use flannel::scope::Scope;
use futures_util::AsyncReadExt;
use http::Request;
use kernel::Kernel;
use kube::config::{KubeConfigOptions, Kubeconfig};
use lab::{Lab, Plan, StoreKind};
use serde_json::{Value, json};

use super::{NETWORK, PROGRAM, idle, lease, many_neighbours, millis, rss};

/// Requests of ours that are under way together.
const TOGETHER: usize = 32;
/// How often a kubelet writes its Node's status, at the most.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// A Node as a kubelet keeps it: images, conditions, addresses; annotated by a flanneld.
fn node(i: usize) -> Value {
    // The first /24 is the own Node's.
    let lease = lease(i + 1, "vxlan", false);
    let (cidr, public) = (lease.key.to_string(), lease.peer.public.v4.unwrap().to_string());
    let images: Vec<Value> = (0..50)
        .map(|n| json!({ "names": [format!("registry.example/team-{n}/service@sha256:{n:064x}"), format!("registry.example/team-{n}/service:v1.{n}.0")], "sizeBytes": 50_000_000 + n }))
        .collect();
    let conditions: Vec<Value> = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"].iter().map(|kind| condition(kind, 0)).collect();
    let mut annotations = json!({ "node.alpha.kubernetes.io/ttl": "0", "volumes.kubernetes.io/controller-managed-attach-detach": "true" });
    for (key, value) in [
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("public-ip", &public),
        ("backend-data", lease.peer.backend_data.v4.as_deref().unwrap()),
    ] {
        annotations[format!("flannel.alpha.coreos.com/{key}")] = value.into();
    }
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name(i), "annotations": annotations, "labels": {
            "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name(i),
            "kubernetes.io/os": "linux", "node.kubernetes.io/instance-type": "standard-8", "topology.kubernetes.io/region": "north", "topology.kubernetes.io/zone": "north-1" } },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": public }, { "type": "Hostname", "address": name(i) }],
            "capacity": { "cpu": "8", "memory": "32Gi", "pods": "110" }, "allocatable": { "cpu": "8", "memory": "31Gi", "pods": "110" },
            "conditions": conditions, "images": images,
            "nodeInfo": { "machineID": "m", "systemUUID": "u", "bootID": "b", "kernelVersion": "6.1", "osImage": "Linux", "containerRuntimeVersion": "containerd://2", "kubeletVersion": "v1.37.2", "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64" },
        },
    })
}

fn name(i: usize) -> String {
    format!("node-{i:05}.cluster.example")
}

fn condition(kind: &str, beat: usize) -> Value {
    let time = format!("2026-01-01T{:02}:{:02}:{:02}Z", beat / 3600 % 24, beat / 60 % 60, beat % 60);
    json!({ "type": kind, "status": if kind == "Ready" { "True" } else { "False" }, "reason": "KubeletHasIt", "message": "kubelet is posting ready status",
        "lastHeartbeatTime": time, "lastTransitionTime": "2026-01-01T00:00:00Z" })
}

async fn client(lab: &Lab) -> kube::Client {
    let file = Kubeconfig::read_from(lab.kubernetes().join("admin.kubeconfig")).unwrap();
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    kube::Client::try_from(config).unwrap()
}

fn request(method: &str, path: &str, content_type: &str, body: &Value) -> Request<Vec<u8>> {
    Request::builder().method(method).uri(path).header("content-type", content_type).body(body.to_string().into_bytes()).unwrap()
}

/// Sends the requests that `make` makes for 0 to `count`, many at a time.
async fn send_all(client: &kube::Client, count: usize, make: impl Fn(usize) -> Request<Vec<u8>>) {
    let next = AtomicUsize::new(0);
    let one = async || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            client.request::<Value>(make(i)).await.unwrap();
        }
    };
    futures_util::future::join_all((0..TOGETHER).map(|_| one())).await;
}

/// Bytes that the host has received, TLS and headers with them: nothing but the daemon speaks there.
fn received(lab: &Lab) -> u64 {
    let output = lab.hosts[0].netns.run(|| Command::new("ip").args(["-s", "-j", "link", "show", "eth0"]).output()).unwrap().unwrap();
    let links: Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["stats64"]["rx"]["bytes"].as_u64().unwrap()
}

/// What one who watches whole Nodes receives meanwhile, as Go flanneld does: bytes of JSON, without TLS. The server ends
/// the watch of who is slow; it is begun again from now, so what is counted is the least.
async fn watch_whole(client: &kube::Client, bytes: &AtomicU64) {
    loop {
        let list: Value = client.request(Request::get("/api/v1/nodes?limit=1").body(Vec::new()).unwrap()).await.unwrap();
        let version = list["metadata"]["resourceVersion"].as_str().unwrap();
        let path = format!("/api/v1/nodes?watch=true&resourceVersion={version}&timeoutSeconds=600");
        let request = Request::get(path).header("accept-encoding", "identity").body(Vec::new()).unwrap();
        let mut stream = Box::pin(client.request_stream(request).await.unwrap());
        let mut buffer = vec![0; 1 << 20];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            bytes.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// What heartbeats cost.
struct Heartbeats {
    /// Seconds of CPU.
    cpu: f64,
    beats: usize,
    /// Received by the daemon's host.
    bytes: u64,
    /// Received by one who watches whole Nodes.
    whole_bytes: u64,
    took: Duration,
}

impl Heartbeats {
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    fn print(&self) {
        println!(
            "  heartbeats: {} Node statuses in {:.0} s ({:.0}/s): {:.1} MB received ({:.0} bytes each; whole Nodes, as JSON: {:.1} MB, {:.0} bytes each), CPU {:.2} s ({:.0} µs each)",
            self.beats,
            self.took.as_secs_f64(),
            self.beats as f64 / self.took.as_secs_f64(),
            mb(self.bytes),
            self.bytes as f64 / self.beats as f64,
            mb(self.whole_bytes),
            self.whole_bytes as f64 / self.beats as f64,
            self.cpu,
            self.cpu * 1e6 / self.beats as f64,
        );
    }
}

/// Writes every Node's status once in ten seconds, as far as this machine can.
fn heartbeats(lab: &Lab, size: usize, minutes: f64) -> Heartbeats {
    let whole = AtomicU64::new(0);
    let mut done = Heartbeats { cpu: 0.0, beats: 0, bytes: 0, whole_bytes: 0, took: Duration::ZERO };
    lab.middle
        .run(|| {
            runtime().block_on(async {
                let client = client(lab).await;
                let work = async {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    let (before, bytes_before, began) = (whole.load(Ordering::Relaxed), received(lab), Instant::now());
                    let cpu_before = super::used(lab);
                    let mut beat = 0;
                    while began.elapsed().as_secs_f64() < 60.0 * minutes {
                        beat += 1;
                        let round = Instant::now();
                        send_all(&client, size, |i| {
                            let patch = json!({ "status": { "conditions": [condition("Ready", beat)] } });
                            request(
                                "PATCH",
                                &format!("/api/v1/nodes/{}/status", name(i + 1)),
                                "application/strategic-merge-patch+json",
                                &patch,
                            )
                        })
                        .await;
                        done.beats += size;
                        tokio::time::sleep(HEARTBEAT.saturating_sub(round.elapsed())).await;
                    }
                    done.took = began.elapsed();
                    done.cpu = super::used(lab) - cpu_before;
                    done.bytes = received(lab) - bytes_before;
                    done.whole_bytes = whole.load(Ordering::Relaxed) - before;
                };
                tokio::select! { () = work => {}, () = watch_whole(&client, &whole) => {} }
            });
        })
        .unwrap();
    done
}

pub(crate) fn run(root: &Path, size: usize, minutes: f64) {
    let program = std::env::var_os("FLANNEL_KUBERNETES").expect("run this by `cargo xtask bench`, which builds Kubernetes");
    let config = json!({ "Network": NETWORK, "EnableNFTables": true, "Backend": { "Type": "vxlan" } });
    let mut plan =
        Plan { config, store: StoreKind::Kubernetes(program.into()), ..Plan::new(1, &json!({ "Type": "vxlan" }), Path::new(PROGRAM)) };
    plan.kubernetes_flags.push(("kube-apiserver", "--max-requests-inflight=0".to_owned()));
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.hosts[0].netns.run(many_neighbours).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    // They have what they need: our own Node's pod CIDR is assigned, all others bring theirs.
    lab.stop_controllers().unwrap();
    lab.middle
        .run(|| {
            runtime().block_on(async {
                send_all(&client(&lab).await, size, |i| request("POST", "/api/v1/nodes", "application/json", &node(i + 1))).await
            })
        })
        .unwrap();

    let before = received(&lab);
    let began = Instant::now();
    lab.start_daemon(0, &["--set-node-network-unavailable=false"]).unwrap();
    while !lab.hosts[0].get("/readyz").is_ok_and(|(status, _)| status == 200) {
        assert!(began.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = millis(began.elapsed());
    let start_bytes = received(&lab) - before;
    let scope = Scope { networks: vec![NETWORK.parse().unwrap()], ..Scope::default() };
    let count = || {
        let observed = lab.hosts[0].netns.run(|| Kernel::open().unwrap().observe(&scope).unwrap()).unwrap();
        observed.iter().filter(|(key, _)| matches!(key, Key::Route(..))).count()
    };
    assert_eq!(count(), size);
    std::thread::sleep(Duration::from_secs(3));
    let quiet_cpu = idle(&lab, Duration::from_secs_f64(60.0 * minutes));

    let heartbeats = heartbeats(&lab, size, minutes);
    assert_eq!(count(), size);
    println!(
        "\nKubernetes {size} Nodes, vxlan: start to all programmed {start:.0} ms, {:.1} MB received; RSS {:.1} MB; CPU without heartbeats {quiet_cpu:.3} s/min",
        mb(start_bytes),
        rss(&lab)
    );
    heartbeats.print();
}
