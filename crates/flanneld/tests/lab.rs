//! Whole clusters in namespaces: real daemons, real stores, the shipped plugin. One `main` instead of the usual
//! harness, because namespaces are entered while the process has one thread.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "lab/adoption.rs"]
mod adoption;
#[path = "lab/attack.rs"]
mod attack;
#[path = "lab/checks.rs"]
mod checks;
#[path = "lab/claims.rs"]
mod claims;
#[path = "lab/cleanup.rs"]
mod cleanup;
#[path = "support/cluster.rs"]
mod cluster;
#[path = "lab/command.rs"]
mod command;
#[path = "support/containers.rs"]
mod containers;
#[path = "lab/flags.rs"]
mod flags;
#[path = "lab/go.rs"]
mod go;
#[path = "lab/hardening.rs"]
mod hardening;
#[path = "lab/heal.rs"]
mod heal;
#[path = "lab/ipip.rs"]
mod ipip;
#[path = "lab/leases.rs"]
mod leases;
#[path = "support/limit.rs"]
mod limit;
#[path = "lab/matrix.rs"]
mod matrix;
#[path = "lab/obstacles.rs"]
mod obstacles;
#[path = "lab/operator.rs"]
mod operator;
#[path = "lab/paths.rs"]
mod paths;
#[path = "lab/plugins.rs"]
mod plugins;
#[path = "lab/pod_rules.rs"]
mod pod_rules;
#[path = "lab/process.rs"]
mod process;
#[path = "lab/readme.rs"]
mod readme;
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
#[path = "lab/wireguard.rs"]
mod wireguard;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cluster::{PROGRAM, eventually, observe, ping_all_from, ping_during};
use flannel::{Lease, LeaseKey, Object, Op, Peer, PerFamily};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::{Kernel, link};
use lab::{Lab, Plan, StoreKind, isolate};
use libtest_mimic::{Arguments, Trial};
use limit::limited;
use serde_json::json;

type Test = fn(&Path);
type StoreTest = fn(&Path, StoreKind);

/// Tests that run with each store.
const STORE_TESTS: [(&str, StoreTest); 10] = [
    ("expired_and_compacted_leases_are_followed", leases::expired_and_compacted_leases_are_followed),
    ("pods_reach_each_other_and_the_outside", leases::pods_reach_each_other_and_the_outside),
    ("a_thousand_leases_put_one_by_one", |root, store| leases::a_thousand_leases(root, store, leases::How::OneByOne)),
    ("a_thousand_leases_in_one_transaction", |root, store| leases::a_thousand_leases(root, store, leases::How::OneTransaction)),
    ("a_thousand_leases_before_the_daemon_starts", |root, store| leases::a_thousand_leases(root, store, leases::How::Before)),
    ("two_daemons_started_at_once_find_each_other_200_times", leases::two_daemons_started_at_once),
    ("store_restart_loses_no_packet", leases::store_restart_loses_no_packet),
    ("lost_lease_is_acquired_again", leases::lost_lease_is_acquired_again),
    ("bad_entry_affects_no_other_lease", leases::bad_entry_affects_no_other_lease),
    ("many_daemons_share_the_network_without_overlap", leases::many_daemons_share_the_network),
];

/// Tests that run once.
const TESTS: &[(&str, Test)] = &[
    ("commands_survive_closed_output", command::commands_survive_closed_output),
    ("lab_never_touches_the_machines_run", command::lab_never_touches_the_machines_run),
    ("readme_first_quarter_works_as_written", readme::first_quarter_works_as_written),
    ("embedded_store_serves_only_clients_with_its_certificate", secure::embedded_store_serves_only_clients_with_its_certificate),
    ("hostile_clients_lose_no_ping", attack::hostile_clients_lose_no_ping),
    ("daemon_keeps_two_capabilities", hardening::daemon_keeps_two_capabilities),
    ("daemon_runs_without_root", hardening::daemon_runs_without_root),
    ("units_allow_what_the_programs_call", hardening::units_allow_what_the_programs_call),
    ("embedded_store_takes_etcds_certificate_flags", secure::embedded_store_takes_etcds_certificate_flags),
    ("cleanup_removes_everything_of_ours_and_nothing_else", cleanup::removes_everything_of_ours_and_nothing_else),
    ("alloc_leases_and_programs_nothing", process::alloc_leases_and_programs_nothing),
    ("udp_on_another_port", process::udp_on_another_port),
    ("foreign_device_with_our_name_is_replaced", process::foreign_device_with_our_name_is_replaced),
    ("interface_changes_are_followed", heal::interface_changes_are_followed),
    ("every_fault_is_repaired", heal::every_fault_is_repaired),
    ("second_address_and_other_name_change_nothing", heal::second_address_and_other_name_change_nothing),
    ("nft_flush_keeps_host_ports", pod_rules::nft_flush_keeps_host_ports),
    ("new_vtep_mac_is_kept_and_published", heal::new_vtep_mac_is_kept_and_published),
    ("full_disk_under_subnet_env_is_reported_and_retried", heal::full_disk_under_subnet_env_is_reported_and_retried),
    ("killed_store_keeps_acknowledged_writes", heal::killed_store_keeps_acknowledged_writes),
    ("full_disk_under_the_store_is_reported_and_loses_nothing", heal::full_disk_under_the_store_is_reported_and_loses_nothing),
    ("host_and_store_events_are_followed", heal::host_and_store_events_are_followed),
    ("etcd_members_fail_in_turn", heal::etcd_members_fail_in_turn),
    ("chaos_run_holds", heal::chaos_run_holds),
    ("daemon_without_store_reports_and_exits_cleanly", process::daemon_without_store_reports_and_exits_cleanly),
    ("flags_are_read_from_the_environment", process::flags_are_read_from_the_environment),
    ("daemon_fails_over_to_another_endpoint", process::daemon_fails_over_to_another_endpoint),
    ("lease_is_renewed_and_reservation_stays", process::lease_is_renewed_and_reservation_stays),
    ("nftables_need_no_program", process::nftables_need_no_program),
    ("flags_do_what_they_say", flags::flags_do_what_they_say),
    ("keys_of_the_configuration_reach_the_kernel", flags::keys_of_the_configuration_reach_the_kernel),
    ("flushed_rules_are_restored_without_idle_processes", rules::flushed_rules_are_restored_without_idle_processes),
    ("change_of_rule_kind_leaves_no_old_rules", rules::change_of_rule_kind_leaves_no_old_rules),
    ("two_daemons_share_a_host", rules::two_daemons_share_a_host),
    ("two_hundred_pods_by_containerd_reach_each_other", runtimes::two_hundred_pods_by_containerd),
    ("podman_runs_pods_that_reach_each_other", runtimes::podman_runs_pods),
    ("a_go_flannelds_node_is_taken_over_without_a_lost_packet", adoption::a_go_node_is_taken_over),
    ("operator_route_is_not_adopted", adoption::operator_route_is_not_adopted),
    ("change_of_pod_network_leaves_no_old_objects", adoption::change_of_pod_network_leaves_no_old_objects),
    ("blackhole_route_covers_unused_addresses", adoption::blackhole_route_covers_unused_addresses),
    ("hundred_restarts_lose_nothing", restarts::hundred_restarts_lose_nothing),
    ("extension_runs_words_or_a_shell_for_each_peer", extension_runs_words_or_a_shell_for_each_peer),
    ("deleted_tun_device_is_restored", deleted_tun_device_is_restored),
    ("wireguard_without_the_kernels_carries_packets", wireguard::user_space_carries_packets),
    ("daemon_restart_loses_no_packet", daemon_restart_loses_no_packet),
    ("deleted_objects_are_restored", deleted_objects_are_restored),
    ("conflict_is_reported_and_rate_limited", conflict_is_reported_and_rate_limited),
    ("a_full_mtu_packet_crosses_vxlan", a_full_mtu_packet_crosses_vxlan),
    ("two_hundred_pods_at_once", plugins::two_hundred_pods_at_once),
    ("killed_plugin_leaves_nothing_after_del", plugins::killed_plugin_leaves_nothing_after_del),
    ("bad_configurations_are_reported_and_retried", obstacles::bad_configurations_are_reported_and_retried),
    ("address_that_peers_cannot_use_is_refused", obstacles::address_that_peers_cannot_use_is_refused),
    ("late_interface_is_waited_for", obstacles::late_interface_is_waited_for),
    ("failing_family_leaves_the_other_alone", obstacles::failing_family_leaves_the_other_alone),
    ("hosts_with_one_address_say_so", checks::hosts_with_one_address_say_so),
    ("hosts_with_one_address_and_one_mac_say_so", checks::hosts_with_one_address_and_one_mac_say_so),
    ("taken_vni_is_named_and_waited_for", checks::a_taken_vni_is_named_and_waited_for),
    ("hanging_commands_delay_no_repair", checks::hanging_commands_delay_no_repair),
    ("interfaces_that_do_not_forward_are_repaired", checks::interfaces_that_do_not_forward_are_repaired),
    ("foreign_settings_of_our_device_are_seen_through", checks::foreign_settings_of_our_device_are_seen_through),
    ("foreign_routes_and_rules_are_named", checks::foreign_routes_and_rules_are_named),
    ("forward_chains_that_drop_are_named", checks::forward_chains_that_drop_are_named),
    ("iptables_jump_goes_before_a_rejecting_rule", checks::iptables_jump_goes_before_a_rejecting_rule),
    ("bridge_of_a_former_network_is_named", checks::bridge_of_a_former_network_is_named),
    ("renamed_and_moved_devices_are_named", checks::renamed_and_moved_devices_are_named),
    ("settings_that_lose_packets_are_named", checks::settings_that_lose_packets_are_named),
    ("ipv4_goes_on_where_ipv6_is_disabled", checks::ipv4_goes_on_where_ipv6_is_disabled),
    ("bad_flags_are_refused", command::bad_flags_are_refused),
    ("store_takes_net_config_once", leases::store_takes_net_config_once),
    ("lab_shows_host_gw_and_vxlan", command::lab_shows_host_gw_and_vxlan),
    ("lab_names_peers_behind_a_router", command::lab_names_peers_behind_a_router),
    ("lab_needs_no_root", command::lab_needs_no_root),
    ("newcomer_takes_nothing_from_a_peer", claims::newcomer_takes_nothing_from_a_peer),
    ("udp_passes_only_packets_between_pods_of_peers", claims::udp_passes_only_packets_between_pods_of_peers),
    ("lock_is_in_a_folder_of_its_own", claims::lock_is_in_a_folder_of_its_own),
    ("twenty_hosts_all_pairs", command::twenty_hosts_all_pairs),
    ("broken_paths_are_logged_and_their_mtu_is_found", paths::broken_paths_are_logged_and_their_mtu_is_found),
    ("a_blackhole_before_a_peers_route_is_seen", paths::a_blackhole_before_a_peers_route_is_seen),
    ("healthy_paths_are_reachable_with_each_backend", paths::healthy_paths_are_reachable_with_each_backend),
    ("measurement_can_be_switched_off", paths::measurement_can_be_switched_off),
    ("status_names_what_is_broken", operator::status_names_what_is_broken),
    ("doctor_asks_the_daemon", operator::doctor_asks_the_daemon),
    ("preflight_names_obstacles", operator::preflight_names_obstacles),
    ("monitor_shows_what_happens", operator::monitor_shows_what_happens),
    ("bugreport_has_no_secret", operator::bugreport_has_no_secret),
    ("ipam_check_frees_only_what_is_dead", operator::ipam_check_frees_only_what_is_dead),
    ("lab_leaves_given_etcd_as_it_was", command::lab_leaves_given_etcd_as_it_was),
    ("kept_lab_can_be_entered_and_killed_lab_leaves_nothing", command::kept_lab_can_be_entered_and_killed_lab_leaves_nothing),
];

/// Tests that need what the kernel of the machine may lack. `cargo xtask vm` runs them in a virtual machine; here they are
/// listed, and ignored.
const VM_TESTS: &[(&str, Test)] = &[
    ("slow_path_is_reachable", paths::slow_path_is_reachable),
    ("bridge_with_vlan_filtering_is_left_alone", heal::bridge_with_vlan_filtering_is_left_alone),
    ("ipip_objects_are_restored", ipip::objects_are_restored),
    ("ipip_of_a_go_flanneld_is_taken_over_without_a_lost_packet", ipip::a_go_node_is_taken_over),
    ("wireguard_two_devices_carry_both_families", wireguard::two_devices_carry_both_families),
    ("wireguard_one_device_carries_both_families", wireguard::one_device_carries_both_families),
    ("wireguard_peers_are_repaired_and_followed", wireguard::peers_are_repaired_and_followed),
    ("wireguard_device_of_go_is_adopted_without_a_lost_packet", wireguard::go_device_is_adopted),
];

fn main() {
    let arguments = Arguments::from_args();
    let scratch = if arguments.list { PathBuf::new() } else { isolate(Path::new(PROGRAM)).expect("these tests need namespaces") };
    let mut trials = Vec::new();
    let trial = |name: String, test: Box<dyn FnOnce(&Path) + Send>| {
        let root = scratch.join(name.replace([' ', ':'], "-"));
        Trial::test(name.clone(), move || {
            // A soak lasts as long as its variable says.
            match std::env::var_os(attack::MINUTES) {
                Some(_) => test(&root),
                None => limited(&name, || test(&root)),
            }
            let _ = std::fs::remove_dir_all(&root);
            Ok(())
        })
    };
    let mut add = |name, test| trials.push(trial(name, test));
    // The longest come first: at the end they would run alone.
    for stand in lab::verdicts::Stand::ALL {
        let test = move |root: &Path| paths::each_broken_path_has_its_verdict(root, stand);
        add(format!("{}: each_broken_path_has_its_verdict", stand.name()), Box::new(test));
    }
    for (name, store) in stores::all() {
        for (test_name, test) in STORE_TESTS {
            let store = store.clone();
            add(format!("{name}: {test_name}"), Box::new(move |root| test(root, store)));
        }
    }
    for &(name, test) in TESTS {
        add(name.to_owned(), Box::new(test));
    }
    for (name, store) in stores::all().into_iter().filter(|(_, store)| matches!(store, StoreKind::Etcd(_))) {
        add(format!("{name}: tls_and_a_password"), Box::new(move |root| secure::tls_and_a_password(root, store, name)));
    }
    for case in matrix::all() {
        add(format!("matrix: {case}"), Box::new(move |root| case.run(root)));
    }
    for case in matrix::ipip() {
        trials.push(trial(format!("matrix: {case}"), Box::new(move |root| case.run(root))).with_kind("vm").with_ignored_flag(true));
    }
    for stand in go::ALL {
        let of = trial(format!("{stand}: go_flanneld_and_ours_in_one_cluster"), Box::new(move |root| go::in_one_cluster(root, stand)));
        trials.push(if stand.needs_vm() {
            of.with_kind("vm go-flannel etcd").with_ignored_flag(true)
        } else {
            of.with_kind("go-flannel etcd")
        });
    }
    for &(name, test) in VM_TESTS {
        trials.push(trial(name.to_owned(), Box::new(test)).with_kind("vm").with_ignored_flag(true));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn plan(hosts: usize, backend: &str, store: StoreKind) -> Plan {
    let program = Path::new(PROGRAM);
    Plan { store, ..Plan::new(hosts, &json!({ "Type": backend }), program) }
}

/// Runs lines of a shell in a namespace, and returns what they print.
#[track_caller]
fn shell(netns: &Netns, script: &str) -> String {
    let mut sh = Command::new("sh");
    sh.args(["-ec", script]).stdin(Stdio::null());
    let output = netns.run(|| sh.output()).unwrap().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn start(root: &Path, hosts: usize, backend: &str, store: StoreKind) -> Lab {
    let mut lab = Lab::start(plan(hosts, backend, store), root).unwrap();
    lab.settle().unwrap();
    lab
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
fn many_leases(backend: &str) -> Vec<Lease> {
    (8..1008).map(|i| lease(i, backend)).collect()
}

fn daemon_restart_loses_no_packet(root: &Path) {
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

fn deleted_objects_are_restored(root: &Path) {
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

fn conflict_is_reported_and_rate_limited(root: &Path) {
    let lab = start(root, 2, "host-gw", StoreKind::Embedded);
    let netns = &lab.hosts[0].netns;
    let whole = observe(netns);
    let objects = || lab.hosts[0].state().unwrap()["objects"].clone();
    eventually("the conflict is reported with the other program", || {
        // It may be deleted already.
        let _ = netns.run(|| Command::new("nft").args(["delete", "table", "ip", "flannel-ipv4"]).output()).unwrap().unwrap();
        let objects = objects();
        let (_, metrics) = lab.hosts[0].get("/metrics").unwrap();
        objects["conflicts"].to_string().contains(r#""by":"nft, process "#)
            && objects["failed"].to_string().contains("conflicting changes by nft, process ")
            && metrics.contains("\nflannel_conflicts 1\n")
    });
    eventually("the rules are back", || observe(netns) == whole);
    eventually("its end is reported", || objects()["conflicts"] == json!([]));
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

fn extension_runs_words_or_a_shell_for_each_peer(root: &Path) {
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

fn deleted_tun_device_is_restored(root: &Path) {
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
