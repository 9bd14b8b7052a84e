//! Stores that want a client certificate: an etcd, which also wants a user with a password, and the embedded one.

use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Lab, STORE, Secure, StoreKind};
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};

use crate::cluster::PROGRAM;
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
    Secure { ca: write("ca.pem", ca.pem()), server: Some(server), client, login: None }
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

pub(crate) fn embedded_store_serves_only_clients_with_its_certificate(root: &Path) {
    let mut plan = plan(2, "vxlan", StoreKind::Embedded);
    let own = Secure::embedded(&root.join("own/store"));
    plan.secure = Some(own.clone());
    let mut lab = Lab::start(plan, &root.join("own")).unwrap();
    lab.settle().unwrap();
    let pods = [lab.add_pod(0).unwrap(), lab.add_pod(1).unwrap()];
    ping_all_from(&pods[0].netns, &[pods[1].address]);

    // A stranger has no certificate, one of its own, or no TLS.
    let foreign = certificates(&root.join("foreign"));
    let etcdctl = tool("FLANNEL_ETCDCTL_3_5");
    let list = |lab: &Lab, scheme: &str, files: &[(&'static str, &Path)]| {
        let mut command = Command::new(&etcdctl);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &format!("{scheme}://{STORE}"), "--dial-timeout=2s", "--command-timeout=2s"]);
        command.args(files.iter().flat_map(|(flag, file)| [std::ffi::OsStr::new(flag), file.as_os_str()]));
        lab.middle.run(|| command.args(["get", "--prefix", "/coreos.com"]).output()).unwrap().unwrap()
    };
    let right = [("--cacert", &*own.ca), ("--cert", &*own.client.0), ("--key", &*own.client.1)];
    let output = list(&lab, "https", &right);
    assert!(String::from_utf8_lossy(&output.stdout).contains("/coreos.com/network/subnets/10.244.1.0-24"), "{output:?}");
    let strange = [("--cacert", &*own.ca), ("--cert", &*foreign.client.0), ("--key", &*foreign.client.1)];
    for (scheme, files) in [("https", &right[..1]), ("https", &strange), ("http", &[])] {
        let output = list(&lab, scheme, files);
        assert!(!output.status.success() && output.stdout.is_empty(), "{scheme} {files:?}: {output:?}");
    }
    let log = || std::fs::read_to_string(root.join("own/store.log")).unwrap();
    eventually("it says who was refused", || log().contains("client refused"));
    assert!(log().matches("client refused").count() == 1, "no stranger fills the log: {}", log());

    // A daemon with another certificate says which flags are wrong.
    lab.stop_daemon(1, false).unwrap();
    let flag = |name: &str, file: &Path| format!("--etcd-{name}file={}", file.display());
    lab.start_daemon(1, &[&flag("cert", &foreign.client.0), &flag("key", &foreign.client.1)]).unwrap();
    let daemon = lab.hosts[1].log();
    eventually("the daemon names the flags", || std::fs::read_to_string(&daemon).unwrap().contains("--etcd-certfile and --etcd-keyfile"));
    lab.stop_daemon(1, false).unwrap();
    lab.start_daemon(1, &[]).unwrap();
    // After a restart the same certificates are valid.
    let before = [&own.ca, &own.client.0, &own.client.1].map(|file| std::fs::read(file).unwrap());
    lab.kill_store().unwrap();
    lab.start_store().unwrap();
    lab.settle().unwrap();
    for host in 0..2 {
        eventually("the store is followed again", || lab.hosts[host].state().is_ok_and(|state| state["store"]["connected"] == true));
    }
    assert_eq!([&own.ca, &own.client.0, &own.client.1].map(|file| std::fs::read(file).unwrap()), before);
}

pub(crate) fn embedded_store_takes_etcds_certificate_flags(root: &Path) {
    let mut plan = plan(1, "host-gw", StoreKind::Embedded);
    plan.secure = Some(certificates(&root.join("tls")));
    let mut lab = Lab::start(plan, &root.join("lab")).unwrap();
    lab.settle().unwrap();
    // All of them are replaced on disk: new connections use the new ones, without a restart.
    certificates(&root.join("tls"));
    assert!(lab.with_store(async |store| store.config().await).unwrap().is_some());
    let refused = |flags: &[&str]| {
        let mut command = Command::new(PROGRAM);
        let output =
            command.args(["store", "--listen=127.0.0.1:0"]).arg("--data-dir").arg(root.join("refused")).args(flags).output().unwrap();
        assert!(!output.status.success(), "{flags:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let files = ["--cert-file=/nowhere/cert.pem", "--key-file=/nowhere/key.pem", "--trusted-ca-file=/nowhere/ca.pem"];
    assert!(refused(&files).contains("--trusted-ca-file /nowhere/ca.pem cannot be read"));
    assert!(refused(&files[..2]).contains("--cert-file needs --trusted-ca-file"));
    assert!(refused(&files[..1]).contains("--key-file"));
    assert!(refused(&["--client-cert-auth"]).contains("--client-cert-auth needs --cert-file, --key-file and --trusted-ca-file"));
    assert!(refused(&["--insecure", files[0], files[1]]).contains("cannot be used with"));
}
