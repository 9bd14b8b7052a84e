//! Whole clusters in namespaces: real daemons, real stores, the shipped plugin. One `main` instead of the usual
//! harness, because namespaces are entered while the process has one thread.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "lab/adoption.rs"]
mod adoption;
#[path = "lab/checks.rs"]
mod checks;
#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/containers.rs"]
mod containers;
#[path = "lab/flags.rs"]
mod flags;
#[path = "lab/heal.rs"]
mod heal;
#[path = "lab/matrix.rs"]
mod matrix;
#[path = "lab/pod_rules.rs"]
mod pod_rules;
#[path = "lab/process.rs"]
mod process;
#[path = "lab/restarts.rs"]
mod restarts;
#[path = "lab/rules.rs"]
mod rules;
#[path = "lab/runtimes.rs"]
mod runtimes;
#[path = "lab/secure.rs"]
mod secure;
#[path = "support/stores.rs"]
mod stores;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cluster::{PROGRAM, eventually, observe, ping_all_from, ping_during, routes};
use daemon::etcd::request_op::Request;
use daemon::etcd::{CompactionRequest, Compare, PutRequest, RangeRequest, RequestOp, TxnRequest, kv_client::KvClient};
use flannel::{Lease, LeaseKey, Object, Op, Peer, PerFamily};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{Kernel, link};
use lab::ping::ping_all;
use lab::{Lab, Plan, Pod, PodFamily, STORE, StoreKind, isolate};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

type Test = fn(&Path);
type StoreTest = fn(&Path, StoreKind);

fn main() {
    let arguments = Arguments::from_args();
    let scratch = if arguments.list { PathBuf::new() } else { isolate(Path::new(PROGRAM)).expect("these tests need namespaces") };
    let mut trials = Vec::new();
    let mut add = |name: String, test: Box<dyn FnOnce(&Path) + Send>| {
        let root = scratch.join(name.replace([' ', ':'], "-"));
        trials.push(Trial::test(name, move || {
            test(&root);
            let _ = std::fs::remove_dir_all(&root);
            Ok(())
        }));
    };
    for (name, store) in stores::all() {
        let tests: [(&str, StoreTest); 10] = [
            ("what_expires_and_what_is_compacted_is_followed", what_expires_and_what_is_compacted),
            ("pods_reach_each_other_and_the_outside", pods_reach_each_other_and_the_outside),
            ("a_thousand_leases_put_one_by_one", |root, store| a_thousand_leases(root, store, How::OneByOne)),
            ("a_thousand_leases_in_one_transaction", |root, store| a_thousand_leases(root, store, How::OneTransaction)),
            ("a_thousand_leases_before_the_daemon_starts", |root, store| a_thousand_leases(root, store, How::Before)),
            ("two_daemons_started_at_once_find_each_other_200_times", two_daemons_started_at_once),
            ("a_store_that_restarts_costs_no_reply", a_store_that_restarts_costs_no_reply),
            ("a_lost_lease_is_acquired_again", a_lost_lease_is_acquired_again),
            ("one_bad_entry_harms_no_other", one_bad_entry_harms_no_other),
            ("many_daemons_share_the_network_without_overlap", many_daemons_share_the_network),
        ];
        for (test_name, test) in tests {
            let store = store.clone();
            add(format!("{name}: {test_name}"), Box::new(move |root| test(root, store)));
        }
    }
    let others: [(&str, Test); 55] = [
        ("alloc_leases_and_programs_nothing", process::alloc_leases_and_programs_nothing),
        ("udp_on_another_port", process::udp_on_another_port),
        ("a_foreign_device_of_our_name_is_replaced", process::a_foreign_device_of_our_name),
        ("the_interface_changes_and_all_follow", heal::the_interface_changes),
        ("every_fault_is_put_right", heal::every_fault_is_put_right),
        ("a_second_address_and_another_name_change_nothing", heal::a_second_address_and_another_name),
        ("a_flush_does_not_take_the_ports_of_pods", pod_rules::a_flush_does_not_take_the_ports_of_pods),
        ("a_vteps_new_mac_is_kept_and_told", heal::a_vteps_new_mac_is_kept_and_told),
        ("a_full_disk_under_subnet_env_is_told_and_waited_out", heal::a_full_disk_under_subnet_env),
        ("a_store_that_is_killed_forgets_nothing_acknowledged", heal::a_store_that_is_killed_forgets_nothing_acknowledged),
        ("a_full_disk_under_the_store_is_told_and_loses_nothing", heal::a_full_disk_under_the_store),
        ("what_happens_to_hosts_and_the_store_is_followed", heal::what_happens_to_hosts_and_the_store_is_followed),
        ("three_members_of_etcd_may_fail_in_turn", heal::three_members_of_etcd),
        ("chaos_holds", heal::chaos_holds),
        ("a_daemon_without_a_store_says_so_and_ends_well", process::a_daemon_without_a_store),
        ("all_flags_by_the_environment", process::all_flags_by_the_environment),
        ("another_endpoint_takes_over", process::another_endpoint_takes_over),
        ("a_lease_is_renewed_and_a_reservation_stays_one", process::a_lease_is_renewed_and_a_reservation_stays_one),
        ("nftables_need_no_program", process::nftables_need_no_program),
        ("flags_do_what_they_say", flags::flags_do_what_they_say),
        ("keys_of_the_configuration_reach_the_kernel", flags::keys_of_the_configuration_reach_the_kernel),
        ("flushed_rules_come_back_and_nothing_is_started_meanwhile", rules::flushed_rules_come_back),
        ("a_change_of_flavour_leaves_nothing_of_the_other", rules::a_change_of_flavour_leaves_nothing_of_the_other),
        ("two_daemons_share_a_host", rules::two_daemons_share_a_host),
        ("two_hundred_pods_by_containerd_reach_each_other", runtimes::two_hundred_pods_by_containerd),
        ("podman_runs_pods_that_reach_each_other", runtimes::podman_runs_pods),
        ("a_go_flannelds_node_is_taken_over_without_a_lost_packet", adoption::a_go_node_is_taken_over),
        ("an_operators_route_is_not_taken_for_a_go_flannelds", adoption::an_operators_route_is_not_taken_for_a_go_flannelds),
        ("a_change_of_the_pod_network_leaves_nothing_of_the_old_one", adoption::a_change_of_the_pod_network_leaves_nothing_of_the_old_one),
        ("a_blackhole_route_holds_what_no_pod_has", adoption::a_blackhole_route_holds_what_no_pod_has),
        ("a_hundred_restarts_lose_nothing", restarts::a_hundred_restarts),
        ("the_extension_runs_words_or_a_shell_for_each_peer", the_extension_runs_commands),
        ("a_deleted_tun_device_comes_back", a_deleted_tun_device_comes_back),
        ("a_daemon_that_restarts_costs_no_reply", a_daemon_that_restarts_costs_no_reply),
        ("what_somebody_deletes_comes_back", what_somebody_deletes_comes_back),
        ("a_conflict_slows_repairs_and_names_the_program", a_conflict_slows_repairs_and_names_the_program),
        ("a_full_mtu_packet_crosses_vxlan", a_full_mtu_packet_crosses_vxlan),
        ("two_hundred_pods_at_once", two_hundred_pods_at_once),
        ("a_killed_plugin_leaves_nothing_that_del_does_not_return", a_killed_plugin_leaves_nothing),
        ("bad_configurations_are_waited_out", bad_configurations_are_waited_out),
        ("an_address_that_peers_cannot_use_is_refused", an_address_that_peers_cannot_use_is_refused),
        ("a_late_interface_is_waited_for", a_late_interface_is_waited_for),
        ("one_family_that_fails_leaves_the_other_alone", one_family_that_fails_leaves_the_other_alone),
        ("hosts_with_one_address_say_so", checks::hosts_with_one_address_say_so),
        ("a_taken_vni_is_named_and_waited_for", checks::a_taken_vni_is_named_and_waited_for),
        ("interfaces_that_do_not_forward_are_repaired", checks::interfaces_that_do_not_forward_are_repaired),
        ("foreign_settings_of_our_device_are_seen_through", checks::foreign_settings_of_our_device_are_seen_through),
        ("bad_flags_are_refused", bad_flags_are_refused),
        ("the_store_can_be_told_the_network", the_store_can_be_told_the_network),
        ("the_lab_shows_host_gw_and_vxlan", the_lab_shows_host_gw_and_vxlan),
        ("the_lab_names_peers_behind_a_router", the_lab_names_peers_behind_a_router),
        ("the_lab_needs_no_root", the_lab_needs_no_root),
        ("twenty_hosts_all_pairs", twenty_hosts_all_pairs),
        ("the_lab_uses_a_given_etcd_and_leaves_it_as_it_was", the_lab_uses_a_given_etcd),
        ("a_kept_lab_can_be_entered_and_a_killed_one_leaves_nothing", a_kept_lab_can_be_entered),
    ];
    for (name, test) in others {
        add(name.to_owned(), Box::new(test));
    }
    for (name, store) in stores::all().into_iter().filter(|(_, store)| matches!(store, StoreKind::Etcd(_))) {
        add(format!("{name}: tls_and_a_password"), Box::new(move |root| secure::tls_and_a_password(root, store, name)));
    }
    for case in matrix::all() {
        add(format!("matrix: {case}"), Box::new(move |root| case.run(root)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn plan(hosts: usize, backend: &str, store: StoreKind) -> Plan {
    let program = Path::new(PROGRAM);
    Plan { store, ..Plan::new(hosts, &json!({ "Type": backend }), program) }
}

fn start(root: &Path, hosts: usize, backend: &str, store: StoreKind) -> Lab {
    let mut lab = Lab::start(plan(hosts, backend, store), root).unwrap();
    lab.settle().unwrap();
    lab
}

fn pods_reach_each_other_and_the_outside(root: &Path, store: StoreKind) {
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
enum How {
    OneByOne,
    OneTransaction,
    Before,
}

fn lease(i: usize, backend: &str) -> Lease {
    let v4 = format!("10.244.{}.0/26", i / 4).parse::<flannel::Cidr>().unwrap();
    let IpAddr::V4(base) = v4.addr else { unreachable!() };
    let network = IpAddr::V4(Ipv4Addr::from_bits(base.to_bits() + 64 * u32::try_from(i % 4).unwrap()));
    let key = LeaseKey::new(PerFamily { v4: flannel::Subnet::new(network, 26).ok(), v6: None }).unwrap();
    let host = u8::try_from(20 + i % 200).unwrap();
    let public = PerFamily { v4: Some(IpAddr::V4(Ipv4Addr::new(10, 0, 0, host))), v6: None };
    let [a, b] = u16::try_from(i).unwrap().to_be_bytes();
    let data = (backend == "vxlan").then(|| format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:{a:02x}:{b:02x}\"}}").into());
    Lease { key, peer: Peer { public, backend_type: backend.into(), backend_data: PerFamily { v4: data, v6: None } } }
}

/// A thousand leases, beginning behind the one of host 1.
fn leases(backend: &str) -> Vec<Lease> {
    (8..1008).map(|i| lease(i, backend)).collect()
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

fn a_thousand_leases(root: &Path, store: StoreKind, how: How) {
    for backend in ["host-gw", "vxlan"] {
        let leases = leases(backend);
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

fn two_daemons_started_at_once(root: &Path, store: StoreKind) {
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

fn a_store_that_restarts_costs_no_reply(root: &Path, store: StoreKind) {
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
        let new = leases("vxlan").remove(1);
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

fn a_lost_lease_is_acquired_again(root: &Path, store: StoreKind) {
    let mut lab = start(root, 2, "vxlan", store);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let netns = Netns::open(&pods[1].path).unwrap();
    let subnet = lab.hosts[0].subnet.clone();
    let own = |store: &daemon::store::Snapshot| {
        store.entries.iter().find(|entry| entry.key.to_string() == subnet).map(|entry| entry.mod_revision)
    };
    let (sent, lost) = ping_during(&netns, pods[0].address, || {
        // Both daemons hear of the deletion; the one acquires again, and the other must not be without a route for
        // longer than that takes. So only this host's own path is promised to carry on: from outside it is one gap.
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

    // Taken by somebody else meanwhile: another subnet, and the files say so.
    lab.stop_daemon(0, true).unwrap();
    let key = flannel::wire::parse_key(&subnet.replace('/', "-")).unwrap();
    let thief = Lease { key, ..leases("vxlan").remove(0) };
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

fn one_bad_entry_harms_no_other(root: &Path, store: StoreKind) {
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

fn many_daemons_share_the_network(root: &Path, store: StoreKind) {
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

fn a_daemon_that_restarts_costs_no_reply(root: &Path) {
    for backend in ["host-gw", "vxlan"] {
        let mut lab = start(&root.join(backend), 2, backend, StoreKind::Embedded);
        let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        let netns = Netns::open(&pods[0].path).unwrap();
        let before = observe(&lab.hosts[0].netns);
        let (sent, lost) = ping_during(&netns, pods[1].address, || {
            for round in 0..6 {
                let status = lab.stop_daemon(0, round % 2 == 0).unwrap();
                assert_eq!(status.success(), round % 2 == 1, "SIGTERM is a clean end");
                lab.start_daemon(0, &[]).unwrap();
                lab.settle().unwrap();
            }
        });
        assert_eq!(lost, 0, "{backend}: of {sent}");
        assert_eq!(observe(&lab.hosts[0].netns), before, "{backend}: the same subnet, MAC and objects");
    }
}

fn what_somebody_deletes_comes_back(root: &Path) {
    for backend in ["host-gw", "vxlan"] {
        let lab = start(&root.join(backend), 3, backend, StoreKind::Embedded);
        let netns = &lab.hosts[0].netns;
        let whole = observe(netns);
        let objects: Vec<Object> = whole.iter().map(|(_, object)| object.clone()).collect();
        assert!(objects.len() >= 3, "{objects:?}");
        for object in objects {
            let op = Op::Delete(object.clone());
            netns.run(|| Kernel::open().unwrap().apply(std::slice::from_ref(&op)).remove(0)).unwrap().unwrap();
            eventually(&format!("{backend}: {object} comes back"), || observe(netns) == whole);
        }
        // The external interface goes down and up: the kernel drops the routes without a word.
        for up in [false, true] {
            netns
                .run(|| {
                    let mut socket = Socket::open(Protocol::Route).unwrap();
                    let eth0 = link::get(&mut socket, "eth0".parse().unwrap()).unwrap().unwrap().index;
                    link::set_up(&mut socket, eth0, up).unwrap();
                })
                .unwrap();
        }
        eventually(&format!("{backend}: all comes back with the interface"), || observe(netns) == whole);
    }
}

fn a_conflict_slows_repairs_and_names_the_program(root: &Path) {
    let lab = start(root, 2, "host-gw", StoreKind::Embedded);
    let netns = &lab.hosts[0].netns;
    let whole = observe(netns);
    let told = || lab.hosts[0].state().unwrap()["objects"]["conflicts"].to_string();
    eventually("the fight is told, and who it is", || {
        // When it is away already, it is as good.
        let _ = netns.run(|| Command::new("nft").args(["delete", "table", "ip", "flannel-ipv4"]).output()).unwrap().unwrap();
        told().contains(r#""by":"nft, process "#)
    });
    assert!(lab.hosts[0].state().unwrap()["objects"]["failed"].to_string().contains("conflicting changes by nft, process "));
    let (status, metrics) = lab.hosts[0].get("/metrics").unwrap();
    assert!(status == 200 && metrics.contains("\nflannel_conflicts 1\n"), "{metrics}");
    eventually("peace brings it back", || observe(netns) == whole);
    eventually("and is told as well", || told() == "[]");
}

fn a_full_mtu_packet_crosses_vxlan(root: &Path) {
    let mut lab = start(root, 2, "vxlan", StoreKind::Embedded);
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    let mtu = pods[0].netns.run(|| link::get(&mut Socket::open(Protocol::Route).unwrap(), "eth0".parse().unwrap()).unwrap().unwrap().mtu);
    assert_eq!(mtu.unwrap(), 1450);
    // Don't fragment: 1450 - 28 bytes fit, one more does not.
    let ping = |size: u32| {
        let target = pods[1].address.to_string();
        let mut command = Command::new("ping");
        command
            .args(["-c", "3", "-i", "0.05", "-W", "2", "-M", "do", "-s"])
            .arg(size.to_string())
            .arg(target)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        pods[0].netns.run(|| command.status()).unwrap().expect("ping is installed by `cargo xtask test`").success()
    };
    assert!(ping(1422));
    assert!(!ping(1423));
}

fn two_hundred_pods_at_once(root: &Path) {
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

fn a_killed_plugin_leaves_nothing(root: &Path) {
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

/// Runs a daemon that must end by itself, and returns its exit code and what it said.
fn refused(lab: &mut Lab, config: Option<&Value>, raw: Option<&str>, args: &[&str]) -> (i32, String) {
    if let Some(text) = config.map(ToString::to_string).as_deref().or(raw) {
        lab.with_store(async |store| store.put_config(text).await).unwrap();
    }
    let _ = std::fs::remove_file(lab.hosts[0].log());
    lab.start_daemon(0, args).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let pid = lab.hosts[0].pid().unwrap();
    // A process that ended and was not waited for is a zombie.
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default().contains(") Z ") {
        assert!(Instant::now() < end, "it goes on:\n{}", std::fs::read_to_string(lab.hosts[0].log()).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = lab.stop_daemon(0, true).unwrap();
    (status.code().unwrap_or(-1), std::fs::read_to_string(lab.hosts[0].log()).unwrap_or_default())
}

/// A daemon waits for a usable configuration: each obstacle is logged once and is on /readyz, the kernel is not touched meanwhile, and the
/// first usable configuration is followed.
fn bad_configurations_are_waited_out(root: &Path) {
    let mut lab = Lab::wire(plan(1, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    let cases = [
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan""#, "not a JSON object"),
        (r#"{"Network":"10.244.0.0/33","Backend":{"Type":"vxlan"}}"#, "Network: \"10.244.0.0/33\" is not a network in CIDR form"),
        (
            r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#,
            "Network: the pod network 10.0.0.0/8 contains this host's own address 10.0.0.1",
        ),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#, "SubnetLen: 31 is out of range"),
        (
            r#"{"Network":"10.244.0.0/16","SubnetMin":"10.245.0.0","Backend":{"Type":"vxlan"}}"#,
            "SubnetMin: 10.245.0.0 is outside the pod network",
        ),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}"#, "Backend.Type: \"carrier-pigeon\" is an unknown backend"),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}"#, "Backend.VNI: 99999999 is out of range"),
        (r#"{"Network":"10.244.0.0/16","Backend":{}}"#, "Backend.Type is missing"),
        (r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#, "carries IPv4 only"),
        (r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#, "IPv6Network is missing"),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"extension","PreStartupCommand":"false"}}"#,
            "start flanneld with --allow-commands if everyone who can write to the store may do that",
        ),
    ];
    let put = |lab: &mut Lab, text: &str| lab.with_store(async |store| store.put_config(text).await).unwrap();
    let log = |lab: &Lab| std::fs::read_to_string(lab.hosts[0].log()).unwrap_or_default();
    put(&mut lab, cases[0].0);
    lab.start_daemon(0, &[]).unwrap();
    for (config, wanted) in cases {
        put(&mut lab, config);
        eventually(wanted, || log(&lab).contains(wanted));
        // The log escapes quotation marks, /readyz does not.
        let (status, text) = lab.hosts[0].get("/readyz").unwrap();
        assert!(status == 503 && text.contains(wanted), "{config}: {wanted:?} is not in {text}");
    }
    assert!(lab.hosts[0].pid().is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists()), "it goes on");
    let observed = observe(&lab.hosts[0].netns);
    assert!(observed.is_empty(), "the kernel is untouched: {observed:?}");
    put(&mut lab, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#);
    eventually("the usable configuration is followed", || lab.hosts[0].get("/readyz").is_ok_and(|(status, _)| status == 200));
    for wanted in cases.map(|(_, wanted)| wanted.replace('"', "\\\"")) {
        assert_eq!(log(&lab).matches(&wanted).count(), 1, "{wanted:?} is logged once");
    }
}

fn an_address_that_peers_cannot_use_is_refused(root: &Path) {
    let mut lab = Lab::wire(plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    let good = json!({ "Network": "10.244.0.0/16", "Backend": { "Type": "host-gw" } });
    let (code, said) = refused(&mut lab, Some(&good), None, &["--public-ip=192.0.2.1", "--iface=eth0"]);
    assert_eq!((code, said.contains("192.0.2.1 is not the address of eth0")), (1, true), "{said}");
    let observed = observe(&lab.hosts[0].netns);
    assert!(observed.is_empty(), "the kernel is untouched: {observed:?}");
}

/// An interface, an address or a default route that comes late is waited for.
fn a_late_interface_is_waited_for(root: &Path) {
    let mut lab = Lab::wire(plan(1, "vxlan", StoreKind::Embedded), root).unwrap();
    lab.start_store().unwrap();
    put_config(&mut lab, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let ip = |lab: &Lab, args: &[&str]| {
        let output = lab.hosts[0].netns.run(|| Command::new("ip").args(args).output()).unwrap().unwrap();
        assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    lab.start_daemon(0, &["--iface=late0"]).unwrap();
    let pending = |lab: &Lab| lab.hosts[0].get("/readyz").unwrap_or_default();
    eventually("the missing interface is named", || pending(&lab).1.contains("--iface late0: there is no such interface"));
    ip(&lab, &["link", "add", "late0", "type", "bridge"]);
    eventually("the missing address is named", || pending(&lab).1.contains("interface late0 has no usable IPv4 address"));
    ip(&lab, &["addr", "add", "192.0.2.7/24", "dev", "late0"]);
    ip(&lab, &["link", "set", "late0", "up"]);
    eventually("the daemon is ready once the interface is", || pending(&lab).0 == 200);
    assert_eq!(lab.hosts[0].state().unwrap()["public_ip"], "192.0.2.7");
}

fn put_config(lab: &mut Lab, text: &str) {
    lab.with_store(async |store| store.put_config(text).await).unwrap();
}

/// IPv4 goes on, at the start and later, while IPv6 cannot be set up; when it can, it is.
fn one_family_that_fails_leaves_the_other_alone(root: &Path) {
    let mut lab = Lab::wire(plan(2, "vxlan", StoreKind::Embedded).family(PodFamily::Dual), root).unwrap();
    lab.start_store().unwrap();
    put_config(&mut lab, r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#);
    // 1300 leaves 1230 bytes for IPv6 in VXLAN.
    set_mtu(&lab, 1300);
    (0..2).for_each(|host| lab.start_daemon(host, &[]).unwrap());
    for host in 0..2 {
        eventually("IPv4 is ready without IPv6", || lab.hosts[host].get("/readyz").is_ok_and(|(status, _)| status == 200));
        let (_, text) = lab.hosts[host].get("/readyz").unwrap();
        assert!(text.contains("note: IPv6 does not work on this node: the MTU of eth0 is 1300"), "{text}");
        let state = lab.wait_state(host, "the peer", |state| state["conditions"][0]["code"] == "family-down").unwrap();
        assert!(state["conditions"][0]["text"].as_str().unwrap().contains("set it to 1350 or more"), "{state}");
    }
    let file = |lab: &Lab| std::fs::read_to_string(lab.hosts[0].subnet_file()).unwrap();
    assert!(!file(&lab).contains("IPV6"), "pods are not offered IPv6: {}", file(&lab));
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    // IPv4 goes on while IPv6 comes back.
    let netns = Netns::open(&pods[0].path).unwrap();
    let (_, lost) = ping_during(&netns, pods[1].address, || {
        set_mtu(&lab, 1500);
        eventually("IPv6 is offered", || file(&lab).contains("FLANNEL_IPV6_SUBNET="));
    });
    assert_eq!(lost, 0);
    eventually("no condition is left", || lab.hosts[0].state().is_ok_and(|state| state["conditions"] == json!([])));
}

fn set_mtu(lab: &Lab, mtu: u32) {
    for host in &lab.hosts {
        let mtu = mtu.to_string();
        let output = host.netns.run(|| Command::new("ip").args(["link", "set", "eth0", "mtu", &mtu]).output()).unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn bad_flags_are_refused(_: &Path) {
    // What is no flag, or no value of its kind, is 2; what turns out to be of no use, 1.
    for (args, code, wanted) in [
        (vec!["--etcd-endpoints=ftp://x:1"], 1, "--etcd-endpoints"),
        (vec!["--etcd-endpoints=ftp://127.0.0.1:2379"], 1, "an endpoint looks like"),
        (vec!["--etcd-cafile=/nowhere.pem"], 1, "--etcd-cafile /nowhere.pem: No such file"),
        (vec!["--etcd-certfile=/nowhere.pem"], 1, "--etcd-certfile /nowhere.pem: it needs --etcd-keyfile"),
        (vec!["--healthz-port=x"], 2, "--healthz-port"),
        (vec!["--nonsense"], 2, "--nonsense"),
        (vec!["--ip-masq", "true"], 2, "true"),
        (vec!["--subnet-lease-renew-margin=1440"], 2, "--subnet-lease-renew-margin"),
        (vec!["frobnicate"], 2, "frobnicate"),
        (vec!["lab", "--hosts=0"], 1, "--hosts"),
        (vec!["lab", "--backend=udp"], 1, "--backend"),
    ] {
        let output = Command::new(PROGRAM).args(&args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(said.contains(wanted), "{args:?}: {said}");
    }
    assert!(Command::new(PROGRAM).arg("--help").output().unwrap().status.success());
    assert!(Command::new(PROGRAM).arg("--version").output().unwrap().status.success());
}

fn the_store_can_be_told_the_network(root: &Path) {
    let mut lab = Lab::wire(plan(1, "host-gw", StoreKind::Embedded), root).unwrap();
    let start = |lab: &Lab, config: &str| {
        let mut command = Command::new(PROGRAM);
        command
            .arg("store")
            .arg(format!("--listen={STORE}"))
            .arg("--data-dir")
            .arg(root.join("store"))
            .arg(format!("--net-config={config}"));
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
    // What is there already stays.
    let mut store = start(&lab, r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let config = lab.with_store(async |store| store.config().await).unwrap().unwrap();
    assert!(String::from_utf8(config).unwrap().contains("10.244.0.0/16"));
    store.kill().unwrap();
    store.wait().unwrap();
}

/// Runs the lab command and returns whether it succeeded, and its document.
fn lab_command(program: &Path, args: &[&str], uid: Option<u32>) -> (bool, Value) {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    command.arg("lab").arg("--json").args(args);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().unwrap();
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), document)
}

fn the_lab_shows_host_gw_and_vxlan(_: &Path) {
    let (ok, document) = lab_command(Path::new(PROGRAM), &[], None);
    assert!(ok, "{document:#}");
    let [host_gw, vxlan] = document["runs"].as_array().unwrap().as_slice() else { panic!("two runs") };
    let mac = |run: &Value, host: usize| run["hosts"][host]["mac"].as_str().unwrap().to_owned();
    for (run, backend) in [(host_gw, "host-gw"), (vxlan, "vxlan")] {
        assert_eq!(run["backend"], backend);
        assert_eq!(run["pairs"], json!({ "answered": 2, "all": 2 }));
        assert_eq!(run["hosts"][0]["subnet"], "10.244.1.0/24");
        assert_eq!(run["hosts"][1]["pod"]["address"], "10.244.2.2");
    }
    assert_eq!(host_gw["hosts"][0]["routes"], json!(["10.244.2.0/24 via 10.0.0.2 dev eth0"]));
    assert_eq!(vxlan["hosts"][0]["routes"], json!(["10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink"]));
    let plain = format!("{} > {} | 10.244.1.2 > 10.244.2.2 ttl 63 | ICMP echo request", mac(host_gw, 0), mac(host_gw, 1));
    assert_eq!(host_gw["packet"], plain.as_str());
    let outer = format!("{} > {} | 10.0.0.1 > 10.0.0.2 ttl 64 | UDP 8472 | VXLAN VNI 1 | ", mac(vxlan, 0), mac(vxlan, 1));
    let packet = vxlan["packet"].as_str().unwrap();
    assert!(packet.starts_with(&outer) && packet.ends_with(" | 10.244.1.2 > 10.244.2.2 ttl 63 | ICMP echo request"), "{packet}");
}

fn the_lab_names_peers_behind_a_router(_: &Path) {
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--topology", "router", "--backend", "vxlan"], None);
    assert!(ok, "{document:#}");
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--topology", "router", "--backend", "host-gw", "--hosts", "3"], None);
    assert!(!ok);
    let run = &document["runs"][0];
    // Hosts 1 and 3 share a link; host 2 is behind the router.
    assert_eq!(run["hosts"][0]["routes"], json!(["10.244.3.0/24 via 10.0.0.3 dev eth0"]));
    let refused = run["hosts"][0]["refused"][0].as_str().unwrap();
    assert!(refused.starts_with("10.244.2.0/24: its address 10.0.1.2 is not on the link of eth0"), "{refused}");
    assert_eq!(run["pairs"], json!({ "answered": 2, "all": 6 }));
}

fn the_lab_needs_no_root(root: &Path) {
    // A copy where everybody may execute it: the build directory may not be open to others.
    let program = root.join("flanneld");
    std::fs::create_dir_all(root).unwrap();
    std::fs::copy(PROGRAM, &program).unwrap();
    // Who runs the tests without root shows it in any case.
    let nobody = rustix::process::geteuid().is_root().then_some(65_534);
    let (ok, document) = lab_command(&program, &[], nobody);
    assert!(ok, "{document:#}");
}

fn the_lab_uses_a_given_etcd(root: &Path) {
    std::fs::create_dir_all(root).unwrap();
    link::set_up(&mut Socket::open(Protocol::Route).unwrap(), 1, true).unwrap();
    let url = "http://127.0.0.1:23790";
    let mut etcd = Command::new(stores::tool("FLANNEL_ETCD_3_4"));
    etcd.args(["--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", "http://127.0.0.1:23800", "--data-dir"])
        .arg(root.join("data"));
    kernel::process::die_with_parent(&mut etcd);
    let mut etcd = etcd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let ctl = |args: &[&str]| {
        let output = Command::new(stores::tool("FLANNEL_ETCDCTL_3_4"))
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={url}"))
            .args(args)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    eventually("etcd serves", || ctl(&["put", "/coreos.com/network/config", "somebody else's"]).0);
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--etcd", url, "--backend", "vxlan"], None);
    assert!(ok, "{document:#}");
    assert_eq!(document["runs"][0]["pairs"], json!({ "answered": 2, "all": 2 }));
    assert_eq!(ctl(&["get", "--prefix", "/"]).1, "/coreos.com/network/config\nsomebody else's\n");
    etcd.kill().unwrap();
    etcd.wait().unwrap();
}

fn a_kept_lab_can_be_entered(_: &Path) {
    use std::io::BufRead;
    let mut lab = Command::new(PROGRAM)
        .args(["lab", "--keep", "--backend", "vxlan", "--hosts", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(lab.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("flanneld lab exec h3-pod --")), "it says how to enter");
    let exec = |args: &[&str]| Command::new(PROGRAM).args(["lab", "exec"]).args(args).output().unwrap();
    let text =
        |output: std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    eventually("it can be entered", || exec(&["h1", "--", "true"]).status.success());
    let routes = text(exec(&["h1", "--", "ip", "route"]));
    assert!(routes.contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1"), "{routes}");
    assert!(exec(&["h3-pod", "--", "ping", "-c", "1", "-W", "5", "10.244.1.2"]).status.success());
    assert!(text(exec(&["h9", "--", "true"])).contains("there is no \"h9\" in the lab: it has h1, h2, h3, h1-pod, h2-pod, h3-pod"));
    let second = Command::new(PROGRAM).args(["lab", "--keep"]).output().unwrap();
    assert!(text(second).contains("a lab of yours is up already"));

    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", lab.id())).unwrap();
    let children: Vec<&str> = children.split_whitespace().collect();
    assert_eq!(children.len(), 4, "a store and three daemons");
    lab.kill().unwrap();
    lab.wait().unwrap();
    let runs = |pid: &&str| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    eventually("all its processes are gone", || !children.iter().any(runs));
    assert!(text(exec(&["h1", "--", "true"])).contains("no lab of yours is up"));
}

fn twenty_hosts_all_pairs(_: &Path) {
    let (ok, document) = lab_command(Path::new(PROGRAM), &["--hosts", "20", "--backend", "vxlan"], None);
    assert!(ok, "{document:#}");
    assert_eq!(document["runs"][0]["pairs"], json!({ "answered": 380, "all": 380 }));
}

fn the_extension_runs_commands(root: &Path) {
    // host-gw, as the operator would write it: once in plain words, once for a shell.
    let words = json!({
        "Type": "extension",
        "PreStartupCommand": "echo data of $NODE_NAME",
        "SubnetAddCommand": "ip route replace $SUBNET via ${PUBLIC_IP}",
        "SubnetRemoveCommand": "ip route del $SUBNET",
    });
    let shell = json!({
        "Type": "extension",
        "Shell": true,
        "PreStartupCommand": "echo data of $NODE_NAME",
        "PostStartupCommand": format!("echo $NETWORK $SUBNET $PUBLIC_IP >> {}/post", root.display()),
        "SubnetAddCommand": format!("read data; ip route replace $SUBNET via $PUBLIC_IP && echo \"$SUBNET $data\" >> {}/added", root.display()),
        "SubnetRemoveCommand": "ip route del $SUBNET",
    });
    for (name, backend) in [("words", words), ("shell", shell)] {
        let mut plan = Plan::new(2, &backend, Path::new(PROGRAM));
        plan.env.push(("NODE_NAME".to_owned(), "here".to_owned()));
        plan.env.push(("FLANNELD_ALLOW_COMMANDS".to_owned(), "true".to_owned()));
        let mut lab = Lab::start(plan, &root.join(name)).unwrap();
        lab.settle().unwrap();
        let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
        let data = snapshot.entries[0].peer.as_ref().unwrap().backend_data.v4.clone();
        assert_eq!(data.as_deref(), Some("\"data of here\""), "{name}");
        // A peer that goes takes its route along.
        let key = snapshot.entries.iter().find(|entry| entry.key.to_string() == "10.244.2.0/24").unwrap();
        lab.stop_daemon(1, false).unwrap();
        lab.with_store(async |store| store.delete_lease(&key.key, key.mod_revision).await).unwrap();
        let route = || {
            let mut ip = Command::new("ip");
            let output = lab.hosts[0].netns.run(|| ip.args(["route", "show", "10.244.2.0/24"]).output()).unwrap().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        eventually("the route is gone", || route().is_empty());
    }
    let added = std::fs::read_to_string(root.join("added")).unwrap();
    assert!(added.contains("10.244.2.0/24 data of here\n"), "{added}");
    let post = std::fs::read_to_string(root.join("post")).unwrap();
    assert!(post.contains("10.244.0.0/16 10.244.1.0/24 10.0.0.1\n"), "{post}");
}

fn a_deleted_tun_device_comes_back(root: &Path) {
    let mut plan = plan(2, "udp", StoreKind::Embedded);
    plan.config.as_object_mut().unwrap().remove("Backend");
    let mut lab = Lab::start(plan, root).unwrap();
    lab.settle().unwrap();
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    let mut ip = Command::new("ip");
    let deleted = lab.hosts[0].netns.run(|| ip.args(["link", "delete", "flannel0"]).status()).unwrap().unwrap();
    assert!(deleted.success());
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    ping_all_from(&pods[1].netns, &[pods[0].address]);
    // A lease of udp names no backend (section 0, point 4), and is followed when it moves to another host.
    let snapshot = lab.with_store(async |store| store.snapshot().await).unwrap();
    assert!(snapshot.entries.iter().all(|entry| entry.peer.as_ref().unwrap().backend_type.is_empty()));
}

fn what_expires_and_what_is_compacted(root: &Path, store: StoreKind) {
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
    // Upstream's TestWatchLeaseRemoved: a lease of three seconds, which nobody renews.
    put(&lab, 12, 3);
    eventually("the peer is there", || there(12));
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

fn links(netns: &Netns) -> BTreeSet<String> {
    netns
        .run(|| link::list(&mut Socket::open(Protocol::Route).unwrap()).unwrap().iter().map(|link| link.name.to_string()).collect())
        .unwrap()
}

fn files(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found
}
