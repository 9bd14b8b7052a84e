//! The optional policy by which a flannel pod's token can change the status of its own Node only.

use std::path::Path;

use lab::{Lab, PodFamily};
use serde_json::json;

use crate::cluster::eventually;
use crate::{Version, annotations, create, plan};

const POLICY: &str = include_str!("../../../../deploy/kubernetes/own-node-only.yml");

/// A token of flannel's service account: of a pod on this Node, or, without one, of none.
fn token(lab: &Lab, node: Option<&str>) -> String {
    let mut args = vec!["create", "token", "flannel", "-n", "kube-flannel", "--duration", "1h"];
    let pod = node.map(|node| format!("flannel-on-{node}"));
    if let (Some(pod), Some(node)) = (&pod, node) {
        let spec =
            json!({ "nodeName": node, "serviceAccountName": "flannel", "containers": [{ "name": "kube-flannel", "image": "flannel" }] });
        let pod_object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": pod, "namespace": "kube-flannel" }, "spec": spec,
        });
        create(lab, &[pod_object]);
        args.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
    }
    lab.kubectl(&args, "").unwrap().trim().to_owned()
}

/// Annotates a Node by way of its status, as the daemon does.
fn patch(lab: &Lab, token: &str, node: &str) -> Result<(), String> {
    let patch = json!({ "metadata": { "annotations": { "flannel.alpha.coreos.com/public-ip": "192.0.2.66" } } }).to_string();
    let args = ["patch", "node", node, "--subresource=status", "--type=strategic", "-p", &patch, "--token", token];
    lab.kubectl(&args, "").map(drop).map_err(|error| format!("{error:#}"))
}

pub(crate) fn token_changes_its_own_node_only(root: &Path) {
    let mut lab = Lab::wire(plan(2, "vxlan", PodFamily::V4, Version::Current), root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    // kubectl reads a status before it changes it; the daemon does not.
    lab.kubectl(&["create", "clusterrole", "read-status", "--verb=get", "--resource=nodes/status"], "").unwrap();
    let bind = ["create", "clusterrolebinding", "read-status", "--clusterrole=read-status", "--serviceaccount=kube-flannel:flannel"];
    lab.kubectl(&bind, "").unwrap();
    let (first, second, unbound) = (token(&lab, Some("h1")), token(&lab, Some("h2")), token(&lab, None));
    patch(&lab, &first, "h2").unwrap_or_else(|error| panic!("without the policy each token may change each Node: {error}"));
    lab.kubectl(&["apply", "--validate=strict", "-f", "-"], POLICY).unwrap();
    let text = "this token is of a pod on Node h1: a flannel pod may change its own Node only";
    eventually("the policy is in force", || patch(&lab, &first, "h2").is_err_and(|error| error.contains(text)));
    assert_eq!(patch(&lab, &first, "h1"), Ok(()));
    assert_eq!(patch(&lab, &second, "h2"), Ok(()));
    assert!(patch(&lab, &second, "h1").is_err());
    let refused = patch(&lab, &unbound, "h1").unwrap_err();
    assert!(refused.contains("this token names no Node"), "{refused}");
    // Others are not concerned.
    crate::annotate(&lab, "h1", &["public-ip-", "public-ip-overwrite-"]);

    // The daemon: with a token of another Node it says what is wrong, with its own it works.
    let file = lab.kubernetes().join("token");
    std::fs::write(&file, &second).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    eventually("the refusal is on /readyz", || {
        lab.hosts[0].get("/readyz").is_ok_and(|(status, text)| status == 503 && text.contains("may change its own Node only"))
    });
    lab.stop_daemon(0, true).unwrap();
    std::fs::write(&file, &first).unwrap();
    lab.start_daemon(0, &[]).unwrap();
    lab.wait_state(0, "its lease", |state| state["store"]["connected"] == true).unwrap();
    assert_eq!(annotations(&lab, "h1").get("public-ip").map(String::as_str), Some("10.0.0.1"));
}
