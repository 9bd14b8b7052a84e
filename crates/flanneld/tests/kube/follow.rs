//! What happens to Nodes is followed, whatever happens to the API server.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use daemon::etcd::kv_client::KvClient;
use daemon::etcd::{CompactionRequest, RangeRequest};
use daemon::notice::Notices;
use daemon::ready::Ready;
use daemon::settings::RunArgs;
use daemon::store::{Kube, kube};
use flannel::{Lease, LeaseKey, Object};
use kernel::netns::Netns;
use lab::{Lab, PodFamily};

use crate::cluster::{eventually, observe, ping_all_from, ping_during, routes};
use crate::{Version, annotate, annotations, create, events, go_node, plan, start};

const CIDRS: [[&str; 2]; 4] = [
    ["10.244.100.0/24", "fd00:244:0:100::/64"],
    ["10.244.101.0/24", "fd00:244:0:101::/64"],
    ["10.244.102.0/24", "fd00:244:0:102::/64"],
    ["10.244.103.0/24", "fd00:244:0:103::/64"],
];

/// A dual-stack Node of a Go flanneld with vxlan.
fn vxlan_node(i: usize) -> serde_json::Value {
    let mac = |family: u8| format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:0{family}:{:02x}"}}"#, 16 + i);
    go_node(
        &format!("n{i}"),
        &CIDRS[i],
        &[
            ("backend-type", "vxlan"),
            ("public-ip", &format!("10.0.0.{}", 100 + i)),
            ("backend-data", &mac(4)),
            ("public-ipv6", &format!("fd00:10::{}", 100 + i)),
            ("backend-v6-data", &mac(6)),
        ],
    )
}

/// Peers' entries in a host's kernel, as text: what points where.
fn entries(lab: &Lab) -> BTreeSet<String> {
    let show = |device: &str| {
        let script = format!("ip neigh show dev {device} nud permanent; bridge fdb show dev {device}");
        let output = lab.hosts[0].netns.run(|| Command::new("sh").args(["-c", &script]).output()).unwrap().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    ["flannel.1", "flannel-v6.1"]
        .iter()
        .flat_map(|device| show(device).lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>())
        .collect()
}

fn has(lab: &Lab, words: &[&str]) -> bool {
    entries(lab).iter().any(|line| words.iter().all(|word| line.contains(word)))
}

pub(crate) fn node_changes_are_followed(root: &Path, version: Version) {
    let mut lab = start(root, 1, "vxlan", PodFamily::Dual, version);
    create(&lab, &[vxlan_node(0), vxlan_node(1)]);
    lab.wait_state(0, "two peers", |state| state["peers"]["programmed"] == 2).unwrap();
    assert!(has(&lab, &["02:00:00:00:04:10", "dst 10.0.0.100"]) && has(&lab, &["02:00:00:00:06:11", "dst fd00:10::101"]));

    // One family alone changes: that is followed, and the other is not touched.
    annotate(&lab, "n0", &[r#"backend-v6-data={"VNI":1,"VtepMAC":"02:00:00:00:06:ff"}"#]);
    eventually("the IPv6 VTEP follows", || has(&lab, &["02:00:00:00:06:ff", "dst fd00:10::100"]) && !has(&lab, &["02:00:00:00:06:10"]));
    annotate(&lab, "n1", &["public-ip=10.0.0.200"]);
    eventually("the IPv4 address follows", || has(&lab, &["02:00:00:00:04:11", "dst 10.0.0.200"]) && !has(&lab, &["dst 10.0.0.101"]));
    assert!(has(&lab, &["02:00:00:00:04:10", "dst 10.0.0.100"]) && has(&lab, &["02:00:00:00:06:11", "dst fd00:10::101"]));

    // An unreadable annotation costs no peer its route.
    annotate(&lab, "n0", &["public-ip=nonsense"]);
    annotate(&lab, "n1", &["backend-data={"]);
    create(&lab, &[go_node("bad", &CIDRS[2], &[("backend-type", "vxlan"), ("public-ip", "x")]), vxlan_node(3)]);
    lab.wait_state(0, "the third peer", |state| state["peers"]["programmed"] == 3).unwrap();
    assert!(has(&lab, &["02:00:00:00:04:10", "dst 10.0.0.100"]) && has(&lab, &["02:00:00:00:04:11", "dst 10.0.0.200"]));
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
    for (node, problem) in
        [("n0", "public-ip: \\\"nonsense\\\" is not an IPv4 address"), ("n1", "backend-data: it is not valid JSON"), ("bad", "public-ip")]
    {
        assert!(log.lines().any(|line| line.contains(&format!("node=\"{node}\"")) && line.contains(problem)), "{node}: {log}");
    }
    annotate(&lab, "bad", &["public-ip=10.0.0.102", r#"backend-data={"VNI":1,"VtepMAC":"02:00:00:00:04:12"}"#]);
    eventually("the corrected annotation is followed", || has(&lab, &["02:00:00:00:04:12", "dst 10.0.0.102"]));

    // Another encapsulation is refused by name, with an Event.
    annotate(&lab, "n0", &["public-ip=10.0.0.100", "backend-type=host-gw"]);
    lab.wait_state(0, "the refusal", |state| state["peers"]["refused"].to_string().contains("\\\"host-gw\\\"")).unwrap();
    eventually("the Event is there", || {
        events(&lab, "h1").iter().any(|(reason, text)| {
            reason == "PeerUnreachable"
                && text.contains("10.244.100.0/24")
                && text.contains("its backend type is \"host-gw\", this host's is \"vxlan\"")
        })
    });

    // Deleted, and made again under the same name with another subnet.
    lab.kubectl(&["delete", "node", "n0", "n1", "bad"], "").unwrap();
    lab.wait_state(0, "one peer", |state| state["store"]["leases"] == 2).unwrap();
    eventually("nothing is left of them", || entries(&lab).iter().filter(|line| line.contains("02:00:00:00:04:")).count() == 2);
    let mut again = vxlan_node(2);
    again["metadata"]["name"] = "n0".into();
    create(&lab, &[again]);
    lab.wait_state(0, "it again", |state| state["peers"]["programmed"] == 2).unwrap();
    let observed = observe(&lab.hosts[0].netns);
    assert_eq!(routes(&observed), BTreeSet::from(["10.244.102.0/24".to_owned(), "10.244.103.0/24".to_owned()]));
    assert_eq!(observed.iter().filter(|(_, object)| matches!(object, Object::Fdb(_))).count(), 2);
}

fn compact(lab: &Lab) {
    let work = async || {
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:2379").connect().await.unwrap();
        let mut kv = KvClient::new(channel);
        let now = kv.range(RangeRequest { key: b"x".to_vec(), ..RangeRequest::default() }).await.unwrap().into_inner();
        let revision = now.header.unwrap().revision;
        kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    };
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    lab.middle.run(|| runtime().block_on(work())).unwrap();
}

fn nft(netns: &Netns, script: &str) {
    let output = netns.run(|| Command::new("nft").arg(script).output()).unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn minute_without_api_server_loses_nothing(root: &Path) {
    let mut lab = start(root, 2, "vxlan", PodFamily::Dual, Version::Current);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &pods[1].addresses);
    create(&lab, &[vxlan_node(0), vxlan_node(1)]);
    lab.wait_state(0, "three peers", |state| state["peers"]["programmed"] == 3).unwrap();
    lab.wait_state(1, "three peers", |state| state["peers"]["programmed"] == 3).unwrap();
    let netns = Netns::open(&pods[0].path).unwrap();
    let [to, to6] = pods[1].addresses[..] else { panic!("two families") };
    let all = |lab: &Lab| {
        let show = "ip route show proto 241; ip -6 route show proto 241";
        let output = lab.hosts[0].netns.run(|| Command::new("sh").args(["-c", show]).output()).unwrap().unwrap();
        let mut all = entries(lab);
        all.extend(String::from_utf8(output.stdout).unwrap().lines().map(ToOwned::to_owned));
        all
    };
    let before = all(&lab);
    assert!(before.len() >= 18, "routes, neighbours and forwarding entries of three peers in two families: {before:#?}");
    let gone = Instant::now();
    let (sent, lost) = ping_during(&netns, to, || {
        lab.kill_store().unwrap();
        lab.wait_state(0, "to notice", |state| state["store"]["connected"] == false).unwrap();
        std::thread::sleep(Duration::from_secs(45));
        assert_eq!(all(&lab), before, "nothing is lost meanwhile");
        ping_all_from(&netns, &[to6]);
    });
    assert_eq!(lost, 0, "of {sent}");
    // It comes back for others, and what they change is compacted away before the daemons hear of it.
    nft(
        &lab.middle,
        "add table inet away { chain input { type filter hook input priority 0; ip saddr { 10.0.0.1, 10.0.0.2 } tcp dport 6443 reject with tcp reset; }; }",
    );
    lab.start_store().unwrap();
    lab.kubectl(&["delete", "node", "n0"], "").unwrap();
    create(&lab, &[vxlan_node(2)]);
    annotate(&lab, "n1", &["public-ip=10.0.0.201"]);
    compact(&lab);
    lab.kill_store().unwrap();
    eventually("not ready after a minute", || {
        gone.elapsed() > Duration::from_secs(60)
            && lab.hosts[0].get("/readyz").is_ok_and(|(status, body)| status == 503 && body.contains("the store ("))
    });
    let (sent, lost) = ping_during(&netns, to, || {
        lab.start_store().unwrap();
        nft(&lab.middle, "delete table inet away");
        eventually("all changes are there", || {
            has(&lab, &["02:00:00:00:04:11", "dst 10.0.0.201"])
                && has(&lab, &["02:00:00:00:04:12", "dst 10.0.0.102"])
                && !has(&lab, &["02:00:00:00:04:10"])
        });
        lab.wait_state(0, "ready again", |state| state["store"]["connected"] == true).unwrap();
    });
    assert_eq!(lost, 0, "of {sent}");
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
    assert!(log.contains("too old resource version"), "the place was forgotten: {log}");
}

pub(crate) fn rotated_token_is_used(root: &Path) {
    let mut lab = crate::Lab::wire(plan(1, "vxlan", PodFamily::V4, Version::Current), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    // A token that ends with a Secret that it is bound to.
    let secret = r#"{"apiVersion":"v1","kind":"Secret","metadata":{"name":"life","namespace":"kube-flannel"}}"#;
    lab.kubectl(&["create", "-f", "-"], secret).unwrap();
    let bound = ["create", "token", "flannel", "-n", "kube-flannel", "--bound-object-kind=Secret", "--bound-object-name=life"];
    let token = lab.kubectl(&bound, "").unwrap();
    std::fs::write(lab.kubernetes().join("token"), token.trim()).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
    let before = annotations(&lab, "h1");
    // As kubelet does it: the new one is there while the old one is still good. A client looks once a minute.
    lab.renew_token("10m").unwrap();
    std::thread::sleep(Duration::from_secs(61));
    lab.kubectl(&["delete", "secret", "life", "-n", "kube-flannel"], "").unwrap();
    annotate(&lab, "h1", &["public-ip-"]);
    eventually("the new token is used to write", || annotations(&lab, "h1") == before);
    // And to watch, once the old connection is gone.
    lab.kill_store().unwrap();
    lab.start_store().unwrap();
    create(
        &lab,
        &[go_node(
            "n0",
            &["10.244.100.0/24"],
            &[("backend-type", "vxlan"), ("public-ip", "10.0.0.100"), ("backend-data", r#"{"VNI":1,"VtepMAC":"02:00:00:00:04:10"}"#)],
        )],
    );
    lab.wait_state(0, "the new peer", |state| state["peers"]["programmed"] == 1).unwrap();
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
    assert!(!log.contains("Unauthorized"), "{log}");
}

pub(crate) fn server_without_streaming_lists_is_followed(root: &Path) {
    let mut plan = plan(1, "vxlan", PodFamily::Dual, Version::Current);
    plan.kubernetes_flags.push(("kube-apiserver", "--feature-gates=WatchList=false".to_owned()));
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    // More than are read one by one, so that whole Nodes are listed too, and more than a page of those.
    const MANY: usize = 225;
    let many: Vec<serde_json::Value> = (0..MANY)
        .map(|i| {
            let mac = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:07:{i:02x}"}}"#);
            let (v4, v6) = (format!("10.244.{}.0/24", 30 + i), format!("fd00:244:0:{:x}::/64", 0x100 + i));
            go_node(
                &format!("m{i}"),
                &[&v4, &v6],
                &[("backend-type", "vxlan"), ("public-ip", &format!("10.0.0.{}", 10 + i)), ("backend-data", &mac)],
            )
        })
        .collect();
    create(&lab, &many);
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "all peers", |state| state["store"]["leases"] == MANY + 1).unwrap();
    assert_eq!(routes(&observe(&lab.hosts[0].netns)).len(), MANY);
    // They publish no IPv6 address: that family of theirs is refused, by name, and the other is not affected.
    let refused = lab.hosts[0].state().unwrap()["peers"]["refused"].as_array().unwrap().len();
    assert_eq!(refused, MANY);
    lab.kubectl(&["delete", "node", "m0"], "").unwrap();
    eventually("its route goes", || routes(&observe(&lab.hosts[0].netns)).len() == MANY - 1);
    lab.stop_daemon(0, false).unwrap();

    // Here a list is a right of its own; and this daemon finds its Node by the name of its pod, of the server by its
    // address, and of another prefix.
    let pod = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"flannel-x","namespace":"kube-flannel"},"spec":{"nodeName":"h1","serviceAccountName":"flannel","automountServiceAccountToken":false,"containers":[{"name":"c","image":"i"}]}}"#;
    lab.kubectl(&["create", "-f", "-"], pod).unwrap();
    lab.kubectl(
        &["patch", "clusterrole", "flannel", "--type=json", "-p", r#"[{"op":"replace","path":"/rules/1/verbs","value":["get","watch"]}]"#],
        "",
    )
    .unwrap();
    lab.set_env(&[("NODE_NAME", ""), ("POD_NAME", "flannel-x"), ("POD_NAMESPACE", "kube-flannel")]);
    let url = format!("--kube-api-url={}", lab.api_url());
    lab.start_daemon(0, &[&url, "--kube-annotation-prefix=example.org/net"]).unwrap();
    eventually("the right is named", || {
        lab.hosts[0].get("/readyz").is_ok_and(|(status, body)| status == 503 && body.contains("cannot list resource \"nodes\""))
    });
    lab.kubectl(&["apply", "-f", "-"], include_str!("../../../../deploy/kubernetes/kube-flannel.yml")).unwrap();
    lab.wait_state(0, "its own lease", |state| state["store"]["leases"] == 1).unwrap();
    let own = lab.kubectl(&["get", "node", "h1", "-o", "jsonpath={.metadata.annotations.example\\.org/net-public-ip}"], "").unwrap();
    assert_eq!(own, "10.0.0.1");
}

/// Changes leases as Nodes.
struct Hand<'a>(&'a Lab);

fn host_gw_node(lease: &Lease) -> serde_json::Value {
    let public = lease.peer.public.v4.unwrap().to_string();
    let data = [("backend-type", "host-gw"), ("public-ip", public.as_str()), ("backend-data", "null")];
    go_node(&name(&lease.key), &[&lease.key.to_string()], &data)
}

fn name(key: &LeaseKey) -> String {
    format!("n{}", key.to_string().replace(['.', '/'], "-"))
}

impl crate::contract::Hand for Hand<'_> {
    async fn put(&mut self, lease: &Lease) {
        self.0.kubectl(&["apply", "-f", "-"], &host_gw_node(lease).to_string()).unwrap();
    }

    async fn spoil(&mut self, key: &LeaseKey) {
        let mut node = host_gw_node(&Lease { key: *key, peer: crate::contract::lease(1, "192.0.2.1").peer });
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] = "nonsense".into();
        self.0.kubectl(&["apply", "-f", "-"], &node.to_string()).unwrap();
    }

    async fn delete(&mut self, key: &LeaseKey) {
        self.0.kubectl(&["delete", "node", &name(key)], "").unwrap();
    }

    async fn put_all(&mut self, leases: &[Lease]) {
        create(self.0, &leases.iter().map(host_gw_node).collect::<Vec<_>>());
    }
}

/// The contract of every store, with the daemon's own permissions.
pub(crate) fn following_reports_lists_and_changes(root: &Path) {
    let mut lab = Lab::wire(plan(1, "host-gw", PodFamily::V4, Version::Current), root).unwrap();
    lab.start_store().unwrap();
    let kubeconfig = format!("--kubeconfig-file={}", lab.kubernetes().join("flannel.kubeconfig").display());
    let args = RunArgs::read(["--kube-subnet-mgr".to_owned(), kubeconfig], |_| None).unwrap();
    let access = kube::Access::new(&args, |name| (name == "NODE_NAME").then(|| "h1".to_owned())).unwrap();
    let work = async || {
        let Ok(store) = Kube::connect(&access, Ready::default(), Notices::new().0).await else { panic!("no client") };
        let mut hand = Hand(&lab);
        let contract = crate::contract::following_reports_lists_and_changes(store, &mut hand);
        tokio::time::timeout(Duration::from_secs(60), contract).await.expect("the store answers");
    };
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    lab.middle.run(|| runtime().block_on(work())).unwrap();
}
