//! Kubernetes as the store, with a real API server: clusters in namespaces whose daemons have the service account's token
//! and nothing more. One `main` instead of the usual harness, because namespaces are entered while the process has one
//! thread.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "kube/admission.rs"]
mod admission;
#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/containers.rs"]
mod containers;
#[path = "support/contract.rs"]
mod contract;
#[path = "kube/follow.rs"]
mod follow;
#[path = "kube/join.rs"]
mod join;
#[path = "support/limit.rs"]
mod limit;
#[path = "kube/manifests.rs"]
mod manifests;
#[path = "kube/nodes.rs"]
mod nodes;
#[path = "kube/refusals.rs"]
mod refusals;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cluster::PROGRAM;
use lab::kubernetes::node;
use lab::{Lab, Plan, PodFamily, StoreKind, isolate};
use libtest_mimic::{Arguments, Trial};
use limit::limited;
use serde_json::{Value, json};

type Test = fn(&Path);

/// Programs that `cargo xtask test FILTER` must build for the tests whose names begin so; for all others it is `kubernetes`.
const NEEDS: [(&str, &str); 6] = [
    ("1.28: ", "kubernetes-1.28"),
    ("kubelets_run_our_daemonset", "kubernetes image"),
    ("chart_renders_the_same_objects", "kubernetes helm"),
    ("image_has_everything_it_needs", "image"),
    ("image_names_no_machine_and_no_time", "image"),
    ("installed_files_are_never_seen_half_written", "image"),
];

fn main() {
    let arguments = Arguments::from_args();
    let scratch = if arguments.list { PathBuf::new() } else { isolate(Path::new(PROGRAM)).expect("these tests need namespaces") };
    let mut trials = Vec::new();
    let mut add = |name: String, test: Box<dyn FnOnce(&Path) + Send>| {
        let root = scratch.join(name.replace([' ', ':', ','], "-"));
        let kind = NEEDS.iter().find(|(start, _)| name.starts_with(start)).map_or("kubernetes", |(_, needs)| needs);
        let trial = Trial::test(name.clone(), move || {
            limited(&name, || test(&root));
            let _ = std::fs::remove_dir_all(&root);
            Ok(())
        });
        trials.push(trial.with_kind(kind));
    };
    for backend in ["host-gw", "vxlan"] {
        for (name, family) in [("v4", PodFamily::V4), ("v6", PodFamily::V6), ("dual", PodFamily::Dual)] {
            let test = move |root: &Path| join::three_hosts_join(root, backend, family, Version::Current);
            add(format!("three_hosts_join: {backend} {name}"), Box::new(test));
        }
    }
    for backend in ["vxlan", "host-gw"] {
        for (name, family) in [("v4", PodFamily::V4), ("v6", PodFamily::V6), ("dual", PodFamily::Dual)] {
            let test = move |root: &Path| nodes::kubelets_run_our_daemonset(root, backend, family);
            add(format!("kubelets_run_our_daemonset: {backend} {name}"), Box::new(test));
        }
    }
    let old = Version::Oldest;
    add("1.28: three_hosts_join".to_owned(), Box::new(move |root| join::three_hosts_join(root, "vxlan", PodFamily::Dual, old)));
    add("1.28: node_changes_are_followed".to_owned(), Box::new(move |root| follow::node_changes_are_followed(root, old)));
    let tests: [(&str, Test); 18] = [
        ("address_change_is_followed", join::address_change_is_followed),
        ("following_reports_lists_and_changes", follow::following_reports_lists_and_changes),
        ("our_manifest_upgrades_go_flannels", manifests::our_manifest_upgrades_go_flannels),
        ("chart_renders_the_same_objects", manifests::chart_renders_the_same_objects),
        ("image_has_everything_it_needs", manifests::image_has_everything_it_needs),
        ("image_names_no_machine_and_no_time", manifests::image_names_no_machine_and_no_time),
        ("token_changes_its_own_node_only", admission::token_changes_its_own_node_only),
        ("installed_files_are_never_seen_half_written", manifests::installed_files_are_never_seen_half_written),
        ("lab_shows_kubernetes", lab_shows_kubernetes),
        ("changed_annotations_are_restored", join::changed_annotations_are_restored),
        ("recreated_node_gets_its_new_subnet", join::recreated_node_gets_its_new_subnet),
        ("node_changes_are_followed", |root| follow::node_changes_are_followed(root, Version::Current)),
        ("minute_without_api_server_loses_nothing", follow::minute_without_api_server_loses_nothing),
        ("rotated_token_is_used", follow::rotated_token_is_used),
        ("server_without_streaming_lists_is_followed", follow::server_without_streaming_lists_is_followed),
        ("each_missing_permission_is_reported_and_retried", refusals::each_missing_permission_is_reported_and_retried),
        ("obstacles_to_a_lease_are_reported_and_retried", refusals::obstacles_to_a_lease_are_reported_and_retried),
        ("fatal_settings_end_with_the_fix", refusals::fatal_settings_end_with_the_fix),
    ];
    for (name, test) in tests {
        add(name.to_owned(), Box::new(test));
    }
    for (start, _) in NEEDS {
        assert!(trials.iter().any(|trial| trial.name().starts_with(start)), "NEEDS names {start:?}, but no test begins so");
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn lab_shows_kubernetes(_: &Path) {
    let output = std::process::Command::new(PROGRAM).args(["lab", "--kube", "--family", "dual", "--json"]).output().unwrap();
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert!(output.status.success() && shown["ok"] == true, "{shown} {}", String::from_utf8_lossy(&output.stderr));
    let backends: Vec<&str> = shown["runs"].as_array().unwrap().iter().map(|run| run["backend"].as_str().unwrap()).collect();
    assert_eq!(backends, ["host-gw", "vxlan"]);
    let subnets: Vec<&str> = [0, 1].iter().map(|host| shown["runs"][0]["hosts"][host]["subnet"].as_str().unwrap()).collect();
    assert!(subnets.contains(&"10.244.0.0/24,fd00:244::/64"), "as the controller manager assigns: {subnets:?}");
}

/// Which Kubernetes.
#[derive(Debug, Clone, Copy)]
enum Version {
    /// The current minor.
    Current,
    /// The oldest that builds as a Go module: it knows neither streaming lists nor much else that is new.
    Oldest,
}

/// What `cargo xtask test` builds and names in the environment.
fn tool(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    path.unwrap_or_else(|| panic!("{variable} names no file: run the tests by `cargo xtask test`, which builds what they need"))
}

fn plan(hosts: usize, backend: &str, family: PodFamily, version: Version) -> Plan {
    let program = match version {
        Version::Current => tool("FLANNEL_KUBERNETES"),
        Version::Oldest => tool("FLANNEL_KUBERNETES_1_28"),
    };
    Plan { store: StoreKind::Kubernetes(program), ..Plan::new(hosts, &json!({ "Type": backend }), Path::new(PROGRAM)).family(family) }
}

fn start(root: &Path, hosts: usize, backend: &str, family: PodFamily, version: Version) -> Lab {
    let mut lab = Lab::start(plan(hosts, backend, family, version), root).unwrap();
    lab.settle().unwrap();
    lab
}

/// A field of an object, by kubectl's JSONPath.
fn field(lab: &Lab, object: &str, path: &str) -> String {
    lab.kubectl(&["get", object, "-o", &format!("jsonpath={{{path}}}")], "").unwrap()
}

/// Our annotations of a Node, without their prefix.
fn annotations(lab: &Lab, node: &str) -> BTreeMap<String, String> {
    let text = field(lab, &format!("node/{node}"), ".metadata.annotations");
    let all: BTreeMap<String, String> = if text.is_empty() { BTreeMap::new() } else { serde_json::from_str(&text).unwrap() };
    all.into_iter().filter_map(|(key, value)| Some((key.strip_prefix("flannel.alpha.coreos.com/")?.to_owned(), value))).collect()
}

fn annotate(lab: &Lab, node: &str, pairs: &[&str]) {
    let pairs: Vec<String> = pairs.iter().map(|pair| format!("flannel.alpha.coreos.com/{pair}")).collect();
    let mut args = vec!["annotate", "--overwrite", "node", node];
    args.extend(pairs.iter().map(String::as_str));
    lab.kubectl(&args, "").unwrap();
}

/// A Node as a Go flanneld annotates it, with pod CIDRs assigned by hand.
fn go_node(name: &str, cidrs: &[&str], annotations: &[(&str, &str)]) -> Value {
    let mut node = node(name);
    node["spec"] = json!({ "podCIDR": cidrs[0], "podCIDRs": cidrs });
    for (key, value) in [("kube-subnet-manager", "true")].iter().chain(annotations) {
        node["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{key}")] = (*value).into();
    }
    node
}

fn create(lab: &Lab, objects: &[Value]) {
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
    lab.kubectl(&["create", "-f", "-"], &list.to_string()).unwrap();
}

/// Events of a host's Node: reason and message.
fn events(lab: &Lab, host: &str) -> Vec<(String, String)> {
    let text = lab.kubectl(&["get", "events", "--field-selector", &format!("involvedObject.name={host}"), "-o", "json"], "").unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    let one =
        |event: &Value| (event["reason"].as_str().unwrap_or_default().to_owned(), event["message"].as_str().unwrap_or_default().to_owned());
    list["items"].as_array().unwrap().iter().map(one).collect()
}
