//! Obstacles are named in one line, on `/readyz` and as an Event, and retried where that helps.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, PodFamily};
use serde_json::json;

use crate::cluster::{PROGRAM, eventually};
use crate::{Version, annotate, events, plan};

fn wire(root: &Path) -> Lab {
    let mut lab = Lab::wire(plan(1, "vxlan", PodFamily::V4, Version::Current), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    lab
}

fn readyz(lab: &Lab) -> String {
    lab.hosts[0].get("/readyz").map(|(_, body)| body).unwrap_or_default()
}

/// The daemon does not get ready, and says why there, in its log and, unless it may not, as an Event.
#[track_caller]
fn check(lab: &Lab, reason: &str, words: &[&str]) {
    let says = |text: &str| words.iter().all(|word| text.contains(word));
    let end = Instant::now() + Duration::from_secs(20);
    while !says(&readyz(lab)) {
        let log = || std::fs::read_to_string(lab.hosts[0].log()).unwrap();
        assert!(Instant::now() < end, "/readyz does not say {words:?} but {:?}; the log:\n{}", readyz(lab), log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = std::fs::read_to_string(lab.hosts[0].log()).unwrap().replace("\\\"", "\"");
    assert!(log.lines().any(says), "{log}");
    if !reason.is_empty() {
        eventually("the Event is there", || events(lab, "h1").iter().any(|(kind, text)| kind == reason && says(text)));
    }
}

fn ready(lab: &mut Lab) {
    lab.wait_state(0, "to be ready", |state| state["store"]["connected"] == true).unwrap();
}

pub(crate) fn each_missing_permission_is_reported_and_retried(root: &Path) {
    let mut lab = wire(root);
    let role = lab.kubectl(&["get", "clusterrole", "flannel", "-o", "json"], "").unwrap();
    let mut role: serde_json::Value = serde_json::from_str(&role).unwrap();
    // Whatever version is there is replaced.
    role["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    for (resource, verb) in [("nodes", "get"), ("nodes", "list"), ("nodes", "watch"), ("nodes/status", "patch")] {
        let mut less = role.clone();
        for rule in less["rules"].as_array_mut().unwrap() {
            if rule["resources"] == json!([resource]) {
                rule["verbs"].as_array_mut().unwrap().retain(|have| have != verb);
                // A rule must have a verb.
                if rule["verbs"] == json!([]) {
                    rule["verbs"] = json!(["delete"]);
                }
            }
        }
        lab.kubectl(&["replace", "-f", "-"], &less.to_string()).unwrap();
        // A list that streams is a watch.
        if verb == "list" {
            lab.start_daemon(0, &[]).unwrap();
            ready(&mut lab);
        } else {
            annotate(&lab, "h1", &["public-ip-"]);
            lab.start_daemon(0, &[]).unwrap();
            if verb == "watch" {
                check(&lab, "StoreNotFollowed", &["cannot watch resource \"nodes\"", "apply the ClusterRole"]);
            } else {
                check(&lab, "Forbidden", &[&format!("cannot {verb} resource \"{resource}\""), "apply the ClusterRole"]);
            }
        }
        lab.kubectl(&["replace", "-f", "-"], &role.to_string()).unwrap();
        // It gets there by itself.
        ready(&mut lab);
        lab.stop_daemon(0, true).unwrap();
    }
    // Without the right to write Events, as under upstream's role, everything else works.
    let mut less = role.clone();
    less["rules"].as_array_mut().unwrap().retain(|rule| rule["resources"] != json!(["events"]));
    lab.kubectl(&["replace", "-f", "-"], &less.to_string()).unwrap();
    std::fs::write(lab.net_conf(), "{").unwrap();
    lab.start_daemon(0, &[]).unwrap();
    check(&lab, "", &["net-conf.json", "not a JSON object"]);
    lab.put_config().unwrap();
    ready(&mut lab);
}

pub(crate) fn obstacles_to_a_lease_are_reported_and_retried(root: &Path) {
    let mut lab = wire(root);
    lab.pod_cidrs(0).unwrap();
    // The ConfigMap is broken, or missing, or says another network than the controller manager.
    std::fs::write(lab.net_conf(), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vlxan"}}"#).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    check(
        &lab,
        "BadNetworkConfig",
        &["key net-conf.json of ConfigMap kube-flannel-cfg", "Backend.Type", "\"vlxan\" is an unknown backend"],
    );
    std::fs::remove_file(lab.net_conf()).unwrap();
    check(&lab, "BadNetworkConfig", &["cannot read --net-config-path", "No such file"]);
    std::fs::write(lab.net_conf(), r#"{"Network":"10.99.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#).unwrap();
    check(&lab, "BadPodCIDR", &["Node h1: its pod CIDR 10.244.0.0/24 lies outside the pod network 10.99.0.0/16", "--cluster-cidr"]);
    assert!(crate::annotations(&lab, "h1").is_empty(), "nothing unusable is published");
    lab.stop_daemon(0, true).unwrap();

    // No controller assigns pod CIDRs.
    lab.put_config().unwrap();
    lab.kubectl(&["delete", "node", "h1"], "").unwrap();
    lab.kill_store().unwrap();
    lab.start_store().unwrap();
    lab.stop_controllers().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    check(&lab, "NoNode", &["there is no Node h1"]);
    crate::create(&lab, &[lab::kubernetes::node("h1")]);
    check(&lab, "NoPodCIDR", &["Node h1: it has no spec.podCIDR: start kube-controller-manager with --allocate-node-cidrs"]);
    annotate(&lab, "h1", &["public-ip-overwrite=nonsense"]);
    lab.kubectl(&["patch", "node", "h1", "-p", r#"{"spec":{"podCIDR":"10.244.9.0/24","podCIDRs":["10.244.9.0/24"]}}"#], "").unwrap();
    check(&lab, "BadAnnotation", &["public-ip-overwrite: \"nonsense\" is not an IPv4 address"]);
    annotate(&lab, "h1", &["public-ip-overwrite-"]);
    ready(&mut lab);
    lab.stop_daemon(0, true).unwrap();

    // No such interface: it may come later.
    lab.start_daemon(0, &["--iface=nope"]).unwrap();
    check(&lab, "NoInterface", &["--iface nope: there is no such interface"]);
    lab.stop_daemon(0, true).unwrap();

    // The API server's certificate is of another authority, or not valid yet: the clocks differ.
    lab.kill_store().unwrap();
    lab.start_daemon(0, &[]).unwrap();
    check(&lab, "", &["the API server https://10.0.0.254:6443/ does not answer", "Connection refused"]);
    lab.new_certificates(1).unwrap();
    lab.start_store().unwrap();
    lab.stop_daemon(0, true).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    check(&lab, "", &["certificate", "compare this host's clock with the dates of the API server's certificate"]);
    lab.kill_store().unwrap();
    lab.new_certificates(0).unwrap();
    lab.start_store().unwrap();
    check(&lab, "", &["is signed by another authority"]);
    lab.stop_daemon(0, true).unwrap();
    std::fs::rename(lab.kubernetes().join("other-ca.crt"), lab.kubernetes().join("ca.crt")).unwrap();
    std::fs::write(lab.kubernetes().join("token"), "nonsense").unwrap();
    lab.start_daemon(0, &[]).unwrap();
    check(&lab, "", &["Unauthorized", "the token is expired, revoked or not valid yet"]);
}

pub(crate) fn fatal_settings_end_with_the_fix(root: &Path) {
    std::fs::create_dir_all(root).unwrap();
    let config = root.join("kubeconfig");
    std::fs::write(&config, "{").unwrap();
    let config = format!("--kubeconfig-file={}", config.display());
    let subnet_file = format!("--subnet-file={}", root.join("subnet.env").display());
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 5] = [
        (&[], &[], "--kube-subnet-mgr: NODE_NAME is not set: give the container the variable NODE_NAME from the field spec.nodeName"),
        (&[], &[("POD_NAME", "x")], "NODE_NAME is not set"),
        (&[], &[("NODE_NAME", "Not/A Name")], "NODE_NAME: \"Not/A Name\" is not a name in Kubernetes"),
        (&[], &[("NODE_NAME", "h1")], "this is not a pod with a service account: give --kubeconfig-file"),
        (&["--kube-annotation-prefix=org"], &[("NODE_NAME", "h1")], "--kube-annotation-prefix: \"org\" is not a valid annotation prefix"),
    ];
    for (flags, env, want) in cases {
        let mut command = Command::new(PROGRAM);
        for variable in ["NODE_NAME", "POD_NAME", "POD_NAMESPACE", "KUBERNETES_SERVICE_HOST", "KUBECONFIG"] {
            command.env_remove(variable);
        }
        let began = Instant::now();
        let output = command.arg("--kube-subnet-mgr").args(flags).envs(env.iter().copied()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(want), "{said}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    // A kubeconfig that is being written may be whole at the next attempt: it is waited for.
    let mut command = Command::new(PROGRAM);
    command.args(["--kube-subnet-mgr", &config, &subnet_file]).env("NODE_NAME", "h1").env_remove("POD_NAME");
    let mut daemon = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(daemon.stderr.take().unwrap()).lines();
    let waiting = log.any(|line| line.unwrap().contains("cannot use --kubeconfig-file"));
    let ended = daemon.try_wait().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(waiting && ended.is_none(), "it names the file and goes on: {ended:?}");
}
