//! An etcd that wants a client certificate, and a user with a password.

use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Lab, STORE, Secure, StoreKind};
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};

use crate::stores::tool;
use crate::{eventually, ping_all_from, plan};

const PASSWORD: &str = "correct-horse-battery";

/// An authority, and a certificate each for the server and for its clients.
fn certificates(folder: &Path) -> Secure {
    std::fs::create_dir_all(folder).unwrap();
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca: Certificate = params.self_signed(&ca_key).unwrap();
    let signed = |name: &str, usage: &[ExtendedKeyUsagePurpose]| -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![STORE.ip().to_string()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = usage.to_vec();
        let cert = params.signed_by(&key, &ca, &ca_key).unwrap();
        (write(&format!("{name}.pem"), cert.pem()), write(&format!("{name}.key"), key.serialize_pem()))
    };
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    // etcd's own gateway is a client of its server with the server's certificate.
    let (server, client) = (signed("server", &[ServerAuth, ClientAuth]), signed("client", &[ClientAuth]));
    Secure { ca: write("ca.pem", ca.pem()), server, client, login: None }
}

pub(crate) fn tls_and_a_password(root: &Path, store: StoreKind, version: &str) {
    let secure = certificates(&root.join("tls"));
    let mut plan = plan(2, "vxlan", store);
    plan.secure = Some(secure.clone());
    let mut lab = Lab::wire(plan, root).unwrap();
    lab.start_store().unwrap();
    lab.put_config().unwrap();
    for host in 0..2 {
        lab.start_daemon(host, &[]).unwrap();
    }
    lab.settle().unwrap();
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);

    // From now on etcd wants a password as well.
    let etcdctl = tool(if version == "etcd 3.4" { "FLANNEL_ETCDCTL_3_4" } else { "FLANNEL_ETCDCTL_3_5" });
    let control = |args: &[&str]| {
        let mut command = Command::new(&etcdctl);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &format!("https://{STORE}")]);
        command.arg("--cacert").arg(&secure.ca).arg("--cert").arg(&secure.client.0).arg("--key").arg(&secure.client.1);
        let output = lab.middle.run(|| command.args(args).output()).unwrap().unwrap();
        assert!(output.status.success(), "etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    control(&["user", "add", &format!("root:{PASSWORD}")]);
    control(&["user", "grant-role", "root", "root"]);
    control(&["user", "add", &format!("flannel:{PASSWORD}")]);
    control(&["role", "add", "flannel"]);
    control(&["role", "grant-permission", "flannel", "--prefix=true", "readwrite", "/coreos.com/network"]);
    control(&["user", "grant-role", "flannel", "flannel"]);
    control(&["auth", "enable"]);
    for host in 0..2 {
        lab.stop_daemon(host, false).unwrap();
    }
    lab.set_login("flannel", PASSWORD);
    for host in 0..2 {
        lab.start_daemon(host, &[]).unwrap();
    }
    lab.settle().unwrap();
    ping_all_from(&pods[0].netns, &[pods[1].address]);
    // A store that restarts has forgotten its tokens: the daemons log in again. All certificates are others by now, the
    // authority's too.
    lab.kill_store().unwrap();
    certificates(&root.join("tls"));
    lab.start_store().unwrap();
    for host in 0..2 {
        eventually("the store is followed again", || lab.hosts[host].state().is_ok_and(|state| state["store"]["connected"] == true));
    }
    // With a wrong password the daemon waits, and says which flags are wrong.
    lab.stop_daemon(1, false).unwrap();
    let right = std::fs::read_to_string(lab.hosts[1].log()).unwrap();
    lab.set_login("flannel", "wrong");
    lab.start_daemon(1, &[]).unwrap();
    let log = lab.hosts[1].log();
    eventually("the daemon names the flags", || std::fs::read_to_string(&log).unwrap().contains("--etcd-username, --etcd-password"));
    assert!(!right.contains(PASSWORD), "no log has the password");
}
