//! Leases in each kind of store: acquired, lost, expired, by the thousand.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use daemon::etcd::request_op::Request;
use daemon::etcd::{CompactionRequest, Compare, PutRequest, RangeRequest, RequestOp, TxnRequest, kv_client::KvClient};
use flannel::{Lease, Object};
use kernel::netns::Netns;
use lab::ping::ping_all;
use lab::{Lab, Plan, Pod, PodFamily, STORE, StoreKind};
use serde_json::json;

use crate::cluster::{PROGRAM, eventually, observe, ping_all_from, ping_during, routes};
use crate::{lease, many_leases, plan, start};

pub(crate) fn pods_reach_each_other_and_the_outside(root: &Path, store: StoreKind) {
    for backend in ["host-gw", "vxlan"] {
        let mut lab = start(&root.join(backend), 3, backend, store.clone());
        let pods: Vec<Pod> = (0..3).map(|host| lab.add_pod(host).unwrap()).collect();
        for pod in &pods {
            let mut targets: Vec<IpAddr> = pods.iter().filter(|other| other.name != pod.name).map(|other| other.address).collect();
            // The switch has no route to pods: it answers only because their host masquerades them.
            targets.push(Ipv4Addr::new(10, 0, 0, 254).into());
            let answered = pod.netns.run(|| ping_all(&targets, Duration::from_secs(5))).unwrap().unwrap();
            assert_eq!(answered.keys().copied().collect::<BTreeSet<_>>(), targets.into_iter().collect(), "{backend} {}", pod.name);
        }
        // A host reaches the pods of others too.
        let answered = lab.hosts[0].netns.run(|| ping_all(&[pods[2].address], Duration::from_secs(5))).unwrap().unwrap();
        assert_eq!(answered.len(), 1, "{backend}: from the host");
        for (i, pod) in pods.iter().enumerate() {
            assert_eq!(pod.address.to_string(), format!("10.244.{}.2", i + 1));
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum How {
    OneByOne,
    OneTransaction,
    Before,
}

fn transaction(lab: &Lab, leases: &[Lease]) {
    let put = |lease: &Lease| {
        let key = format!("/coreos.com/network/subnets/{}", flannel::wire::key(&lease.key)).into_bytes();
        let put = PutRequest { key, value: flannel::wire::value(&lease.peer).into_bytes(), ..PutRequest::default() };
        RequestOp { request: Some(Request::RequestPut(put)) }
    };
    in_middle(lab, async || {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{STORE}")).unwrap().connect().await.unwrap();
        // As many operations as a transaction may have.
        for part in leases.chunks(128) {
            let request = TxnRequest { compare: Vec::<Compare>::new(), success: part.iter().map(put).collect(), failure: Vec::new() };
            KvClient::new(channel.clone()).txn(request).await.unwrap();
        }
    });
}

fn in_middle(lab: &Lab, f: impl AsyncFnOnce()) {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    lab.middle.run(|| runtime().block_on(f())).unwrap();
}

pub(crate) fn a_thousand_leases(root: &Path, store: StoreKind, how: How) {
    for backend in ["host-gw", "vxlan"] {
        let leases = many_leases(backend);
        let put_all = |lab: &Lab| match how {
            How::OneTransaction => transaction(lab, &leases),
            How::OneByOne | How::Before => lab
                .with_store(async |store| {
                    for lease in &leases {
                        store.put_lease(lease, 0, 0).await?;
                    }
                    Ok::<(), daemon::store::EtcdError>(())
                })
                .unwrap(),
        };
        let mut lab = Lab::wire(plan(1, backend, store.clone()), &root.join(backend)).unwrap();
        lab.start_store().unwrap();
        lab.put_config().unwrap();
        if how == How::Before {
            put_all(&lab);
        }
        lab.start_daemon(0, &[]).unwrap();
        if how != How::Before {
            lab.wait_state(0, "its own lease", |state| state["store"]["leases"] == 1).unwrap();
            put_all(&lab);
        }
        lab.wait_state(0, "1000 peers", |state| state["peers"]["programmed"] == 1000).unwrap();
        let observed = observe(&lab.hosts[0].netns);
        let wanted: BTreeSet<String> = leases.iter().map(|lease| lease.key.to_string()).collect();
        assert_eq!(routes(&observed), wanted, "{backend}");
        let count = |f: fn(&Object) -> bool| observed.iter().filter(|(_, object)| f(object)).count();
        let entries = if backend == "vxlan" { 1000 } else { 0 };
        assert_eq!(count(|object| matches!(object, Object::Neigh(_))), entries);
        assert_eq!(count(|object| matches!(object, Object::Fdb(_))), entries);

        // And all of them go again.
        lab.with_store(async |store| {
            for entry in store.snapshot().await?.entries.iter().filter(|entry| wanted.contains(&entry.key.to_string())) {
                store.delete_lease(&entry.key, entry.mod_revision).await?;
            }
            Ok::<(), daemon::store::EtcdError>(())
        })
        .unwrap();
        lab.wait_state(0, "no peers", |state| state["store"]["leases"] == 1).unwrap();
        assert_eq!(routes(&observe(&lab.hosts[0].netns)), BTreeSet::new(), "{backend}");
    }
}

pub(crate) fn two_daemons_started_at_once(root: &Path, store: StoreKind) {
    let plan = plan(2, "host-gw", store.clone());
    at_once(&root.join("v4"), plan, 200);
    // With both families, keys that overlap in the one are two keys to the store: there are two IPv4 subnets here, and many
    // of IPv6.
    let mut plan = self::plan(2, "host-gw", store).family(PodFamily::Dual);
    plan.config["SubnetMin"] = "10.244.1.0".into();
    plan.config["SubnetMax"] = "10.244.2.0".into();
    at_once(&root.join("dual"), plan, 40);
}

fn at_once(root: &Path, plan: Plan, trials: usize) {
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    let mut missed = 0;
    for trial in 0..trials {
        for host in 0..2 {
            let _ = std::fs::remove_file(lab.hosts[host].subnet_file());
            lab.start_daemon(host, &[]).unwrap();
        }
        for host in 0..2 {
            if lab.wait_state(host, "the other", |state| state["peers"]["programmed"] == 1).is_err() {
                missed += 1;
                eprintln!("trial {trial}: host {host} missed its peer");
            }
        }
        for host in 0..2 {
            lab.stop_daemon(host, true).unwrap();
        }
        lab.with_store(async |store| {
            for entry in store.snapshot().await?.entries {
                store.delete_lease(&entry.key, entry.mod_revision).await?;
            }
            Ok::<(), daemon::store::EtcdError>(())
        })
        .unwrap();
    }
    assert_eq!(missed, 0, "of {} peers to be found", 2 * trials);
}

pub(crate) fn store_restart_loses_no_packet(root: &Path, store: StoreKind) {
    let mut lab = start(root, 2, "vxlan", store);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let gone = lease(900, "vxlan");
    lab.with_store(async |store| store.put_lease(&gone, 0, 0).await).unwrap();
    lab.wait_state(0, "the third host", |state| state["peers"]["programmed"] == 2).unwrap();
    let netns = Netns::open(&pods[0].path).unwrap();
    let (sent, lost) = ping_during(&netns, pods[1].address, || {
        lab.kill_store().unwrap();
        lab.wait_state(0, "to notice", |state| state["store"]["connected"] == false).unwrap();
        lab.start_store().unwrap();
        // What changes before the daemons are back is seen in their fresh snapshots: one host gone, one new.
        let new = lease(901, "vxlan");
        lab.with_store(async |store| {
            let snapshot = store.snapshot().await?;
            if let Some(entry) = snapshot.entries.iter().find(|entry| entry.key == gone.key) {
                store.delete_lease(&gone.key, entry.mod_revision).await?;
            }
            store.put_lease(&new, 0, 0).await
        })
        .unwrap();
        let wanted = BTreeSet::from([lab.hosts[1].subnet.clone(), new.key.to_string()]);
        eventually("the routes of the fresh snapshot", || routes(&observe(&lab.hosts[0].netns)) == wanted);
        lab.wait_state(0, "the store", |state| state["store"]["connected"] == true).unwrap();
    });
    assert_eq!(lost, 0, "of {sent}");
}

pub(crate) fn lost_lease_is_acquired_again(root: &Path, store: StoreKind) {
    let mut lab = start(root, 2, "vxlan", store);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let netns = Netns::open(&pods[1].path).unwrap();
    let subnet = lab.hosts[0].subnet.clone();
    let own = |store: &daemon::store::Snapshot| {
        store.entries.iter().find(|entry| entry.key.to_string() == subnet).map(|entry| entry.mod_revision)
    };
    let (sent, lost) = ping_during(&netns, pods[0].address, || {
        // Both daemons see the deletion. The one acquires the lease again; the other has no route for as long as that
        // takes. So only this host's own path is promised to carry on.
        let revision = lab.with_store(async |store| store.snapshot().await.map(|s| own(&s))).unwrap().unwrap();
        lab.stop_daemon(1, false).unwrap();
        let key = flannel::wire::parse_key(&subnet.replace('/', "-")).unwrap();
        assert!(lab.with_store(async |store| store.delete_lease(&key, revision).await).unwrap());
        eventually("the same subnet again", || {
            lab.with_store(async |store| store.snapshot().await.map(|s| own(&s))).unwrap().is_some_and(|now| now > revision)
        });
        lab.start_daemon(1, &[]).unwrap();
        lab.settle().unwrap();
    });
    assert_eq!(lost, 0, "of {sent}");
    let state = lab.hosts[0].state().unwrap();
    assert_eq!(state["subnet"], subnet.as_str());

    // Another host took it meanwhile: this one gets another subnet, and the files follow.
    lab.stop_daemon(0, true).unwrap();
    let key = flannel::wire::parse_key(&subnet.replace('/', "-")).unwrap();
    let thief = Lease { key, ..many_leases("vxlan").remove(0) };
    let revision = lab.with_store(async |store| store.snapshot().await.map(|s| own(&s))).unwrap().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.settle().unwrap();
    let revision = lab.with_store(async |store| store.snapshot().await.map(|s| own(&s))).unwrap().unwrap_or(revision);
    assert!(lab.with_store(async |store| store.put_lease(&thief, 0, revision).await).unwrap());
    let state = lab.wait_state(0, "another subnet", |state| state["subnet"] != subnet.as_str()).unwrap();
    let other = state["subnet"].as_str().unwrap().replace(".0/24", ".1/24");
    eventually("subnet.env follows", || {
        std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap().contains(&format!("FLANNEL_SUBNET={other}\n"))
    });
}

pub(crate) fn bad_entry_affects_no_other_lease(root: &Path, store: StoreKind) {
    let mut lab = start(root, 2, "vxlan", store);
    let entries = [
        ("garbage", "garbage"),
        ("10.244.77.0-24", "{\"PublicIP\":\"10.0.0.9\""),
        ("10.244.78.0-24", "{\"PublicIP\":\"10.0.0.9\",\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"zz\"}}"),
        (
            "10.245.1.0-24",
            "{\"PublicIP\":\"10.0.0.9\",\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:09\"}}",
        ),
        ("0.0.0.0-0", "{}"),
        (
            "x10.244.2.0-24",
            "{\"PublicIP\":\"10.0.0.9\",\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:09\"}}",
        ),
        (
            "10.244.79.0-24",
            "{\"PublicIP\":\"10.0.0.9\",\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:0a\"}}",
        ),
    ];
    in_middle(&lab, async || {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{STORE}")).unwrap().connect().await.unwrap();
        for (key, value) in entries {
            let key = format!("/coreos.com/network/subnets/{key}").into_bytes();
            KvClient::new(channel.clone()).put(PutRequest { key, value: value.into(), ..PutRequest::default() }).await.unwrap();
        }
    });
    let good = BTreeSet::from([lab.hosts[1].subnet.clone(), "10.244.79.0/24".to_owned()]);
    let state = lab.wait_state(0, "the good one", |state| state["peers"]["programmed"] == 2).unwrap();
    assert_eq!(routes(&observe(&lab.hosts[0].netns)), good);
    let refused: BTreeSet<&str> = state["peers"]["refused"].as_array().unwrap().iter().map(|r| r["subnet"].as_str().unwrap()).collect();
    assert_eq!(refused, BTreeSet::from(["10.244.78.0/24", "10.245.1.0/24"]));
    // The same picture after a restart, when they come as a list.
    lab.stop_daemon(0, true).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "the good one", |state| state["peers"]["programmed"] == 2).unwrap();
    assert_eq!(routes(&observe(&lab.hosts[0].netns)), good);
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap();
    for what in ["garbage", "10.244.77.0-24", "VtepMAC", "outside the pod network"] {
        assert!(log.contains(what), "{what} is not in\n{log}");
    }
}

pub(crate) fn many_daemons_share_the_network(root: &Path, store: StoreKind) {
    // Twelve hosts for twelve subnets, all at once, all at random.
    let config = json!({ "Network": "10.244.0.0/20", "SubnetLen": 24, "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.12.0", "Backend": { "Type": "host-gw" } });
    let mut lab = Lab::wire(Plan { config, ..plan(12, "host-gw", store) }, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    for host in 0..12 {
        std::fs::remove_file(lab.hosts[host].subnet_file()).unwrap();
        lab.start_daemon(host, &[]).unwrap();
    }
    lab.settle().unwrap();
    let subnets: BTreeSet<String> = lab.hosts.iter().map(|host| host.state().unwrap()["subnet"].as_str().unwrap().to_owned()).collect();
    assert_eq!(subnets.len(), 12, "{subnets:?}");
}

pub(crate) fn store_takes_net_config_once(root: &Path) {
    let mut lab = Lab::wire(plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    let start = |lab: &Lab, config: &str| {
        let mut command = Command::new(PROGRAM);
        command
            .arg("store")
            .arg(format!("--listen={STORE}"))
            .arg("--data-dir")
            .arg(root.join("store"))
            .arg(format!("--net-config={config}"))
            .arg("--insecure");
        kernel::process::die_with_parent(&mut command);
        lab.middle.run(|| command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()).unwrap().unwrap()
    };
    let refused = start(&lab, r#"{"Network":"10.244.0.0"}"#).wait_with_output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--net-config cannot be used: network config: Network"));

    let mut store = start(&lab, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#);
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its lease", |state| state["backend"] == "host-gw").unwrap();
    store.kill().unwrap();
    store.wait().unwrap();
    // An existing configuration stays.
    let mut store = start(&lab, r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let config = lab.with_store(async |store| store.config().await).unwrap().unwrap();
    assert!(String::from_utf8(config).unwrap().contains("10.244.0.0/16"));
    store.kill().unwrap();
    store.wait().unwrap();
}

pub(crate) fn expired_and_compacted_leases_are_followed(root: &Path, store: StoreKind) {
    let mut lab = start(root, 1, "host-gw", store);
    let netns = Netns::open(&root.join("netns/h1")).unwrap();
    let there = |i: usize| {
        let dst = lease(i, "host-gw").key.to_string();
        routes(&observe(&netns)).contains(&dst)
    };
    let put = |lab: &Lab, i: usize, seconds: u64| {
        let lease = lease(i, "host-gw");
        lab.with_store(async |store| {
            let id = store.grant(Duration::from_secs(seconds)).await?;
            store.put_lease(&lease, id, 0).await
        })
        .unwrap();
    };
    let delete = |lab: &Lab, i: usize| {
        let key = lease(i, "host-gw").key;
        lab.with_store(async |store| {
            let snapshot = store.snapshot().await?;
            let entry = snapshot.entries.iter().find(|entry| entry.key == key).unwrap();
            store.delete_lease(&key, entry.mod_revision).await
        })
        .unwrap();
    };
    let compact = |lab: &Lab| {
        let work = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut kv = KvClient::connect(format!("http://{STORE}")).await.unwrap();
                let range = RangeRequest { key: b"/".to_vec(), ..RangeRequest::default() };
                let revision = kv.range(range).await.unwrap().into_inner().header.unwrap().revision;
                kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
            });
        };
        lab.middle.run(work).unwrap();
    };
    // Upstream's TestWatchLeaseRemoved: a lease of three seconds that is not renewed.
    put(&lab, 12, 3);
    eventually("peer added", || there(12));
    eventually("its lease ends", || !there(12));
    // TestWatchSubnetsRecoversFromCompaction, ReportsRemovalAfterCompaction and SurvivesCompactionAfterReconnect.
    put(&lab, 13, 600);
    put(&lab, 14, 600);
    eventually("both are there", || there(13) && there(14));
    compact(&lab);
    put(&lab, 15, 600);
    eventually("a healthy watch goes on over a compaction", || there(15));
    lab.kill_store().unwrap();
    eventually("the daemon has noticed", || lab.hosts[0].state().is_ok_and(|state| state["store"]["connected"] == false));
    lab.start_store().unwrap();
    delete(&lab, 13);
    put(&lab, 16, 600);
    compact(&lab);
    eventually("what happened meanwhile is known, and what is compacted", || !there(13) && there(14) && there(15) && there(16));
    delete(&lab, 14);
    eventually("and what follows", || !there(14));
}
