//! What a real etcd refuses is waited for: each obstacle has one text that names the fix, and passes when it is removed. etcd 3.4
//! serves on a port of the loopback device.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use daemon::notice::Notices;
use daemon::ready::Ready;
use daemon::settings::{RunArgs, Secret};
use daemon::store::{Access, Etcd, Kube, Store, StoreError, kube};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;
const PASSWORD: &str = "correct-horse-battery";

/// A program that `cargo xtask test` installs and names in the environment.
fn tool(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    path.unwrap_or_else(|| panic!("{variable} names no program: run the tests by `cargo xtask test`, which installs what they need"))
}

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("flannel-obstacles-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An etcd, which ends with this value.
struct Server {
    child: Child,
    port: u16,
    _folder: Folder,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl Server {
    fn start(scheme: &str, args: &[&str]) -> Server {
        let folder = Folder::new();
        let (port, peer) = (free_port(), free_port());
        let (client, peer) = (format!("{scheme}://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
        let child = Command::new(tool("FLANNEL_ETCD_3_4"))
            .arg("--data-dir")
            .arg(folder.0.join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer, "--initial-cluster", &format!("default={peer}")])
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { child, port, _folder: folder };
        let end = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(Instant::now() < end, "etcd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn control(&self, args: &[&str]) {
        let output = Command::new(tool("FLANNEL_ETCDCTL_3_4"))
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints=http://127.0.0.1:{}", self.port))
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn access(&self, scheme: &str) -> Access {
        Access { endpoints: format!("{scheme}://127.0.0.1:{}", self.port), prefix: "/flannel".to_owned(), ..Access::default() }
    }
}

/// Asks for the network config until the obstacle has the expected text; a server that just started may say other things first.
#[track_caller]
fn waits_for(access: &Access, text: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let mut texts = Vec::new();
    let mut store = None;
    while Instant::now() < end && texts.len() < 3 {
        let answer = runtime.block_on(async {
            if store.is_none() {
                store = Some(Etcd::new(access)?);
            }
            Store::config(store.as_ref().unwrap()).await
        });
        match answer {
            Err(StoreError::Passing(notice)) if notice.text.contains(text) => texts.push(notice.text),
            Err(StoreError::Passing(notice)) if texts.is_empty() => eprintln!("{}", notice.text),
            other => panic!("{other:?} after {texts:?}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(texts.len(), 3, "no obstacle with {text:?}");
    texts.dedup();
    assert_eq!(texts.len(), 1, "one obstacle has one text: {texts:?}");
    assert!(texts[0].matches("transport").count() == 0 && texts[0].len() < 400, "{texts:?}");
    assert!(!texts[0].contains(PASSWORD));
}

#[track_caller]
fn passes(access: &Access) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(async { Store::config(&Etcd::new(access).unwrap()).await });
    assert!(answer.is_ok(), "{answer:?}");
}

#[test]
fn refused_user_and_permission_are_waited_for() {
    let server = Server::start("http", &[]);
    server.control(&["put", "/flannel/config", CONFIG]);
    server.control(&["user", "add", &format!("root:{PASSWORD}")]);
    server.control(&["user", "grant-role", "root", "root"]);
    server.control(&["user", "add", &format!("flannel:{PASSWORD}")]);
    server.control(&["role", "add", "flannel"]);
    server.control(&["user", "grant-role", "flannel", "flannel"]);
    passes(&server.access("http"));
    server.control(&["auth", "enable"]);

    let login = |user: &str, password: &str| Some((user.to_owned(), Secret(password.to_owned())));
    waits_for(&server.access("http"), "user name is empty; give --etcd-username and --etcd-password");
    let wrong = Access { login: login("flannel", "wrong"), ..server.access("http") };
    waits_for(&wrong, "--etcd-username, --etcd-password: etcdserver: authentication failed");
    let unknown = Access { login: login("stranger", PASSWORD), ..server.access("http") };
    waits_for(&unknown, "--etcd-username, --etcd-password: etcdserver: authentication failed");
    let right = Access { login: login("flannel", PASSWORD), ..server.access("http") };
    waits_for(&right, "permission denied; grant a role of user flannel (--etcd-username) the permission readwrite on the prefix /flannel");
    // The default endpoints do not get the password.
    let default = Access { is_default: true, ..right.clone() };
    waits_for(&default, "the password is not sent to the default endpoints");
    let as_root = [&format!("--user=root:{PASSWORD}"), "role", "grant-permission", "flannel", "--prefix=true", "readwrite", "/flannel"];
    server.control(&as_root);
    passes(&right);
}

/// An authority's certificate, and a certificate with its key that it signed, as files.
fn certificates(folder: &Path, name: &str) -> (PathBuf, PathBuf, PathBuf) {
    let write = |end: &str, text: String| {
        let path = folder.join(format!("{name}-{end}"));
        std::fs::write(&path, text).unwrap();
        path
    };
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca = params.self_signed(&ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = params.signed_by(&key, &ca, &ca_key).unwrap();
    write("ca-key.pem", ca_key.serialize_pem());
    (write("ca.pem", ca.pem()), write("cert.pem", cert.pem()), write("key.pem", key.serialize_pem()))
}

#[test]
fn refused_certificates_and_missing_files_are_waited_for() {
    let folder = Folder::new();
    let (ca, cert, key) = certificates(&folder.0, "server");
    let (other_ca, other_cert, other_key) = certificates(&folder.0, "other");
    let file = |path: &Path| path.to_str().unwrap().to_owned();
    let args = ["--cert-file", &file(&cert), "--key-file", &file(&key), "--trusted-ca-file", &file(&ca), "--client-cert-auth"];
    let server = Server::start("https", &args);
    let right = Access { ca: Some(ca.clone()), cert: Some(cert), key: Some(key), ..server.access("https") };
    waits_for(&right, "there is no network config in etcd yet");

    let none = Access { cert: None, key: None, ..right.clone() };
    waits_for(&none, "etcd refuses this host's certificate: --etcd-certfile and --etcd-keyfile must be");
    let foreign = Access { cert: Some(other_cert), key: Some(other_key), ..right.clone() };
    waits_for(&foreign, "etcd refuses this host's certificate: --etcd-certfile and --etcd-keyfile must be");
    let distrusted = Access { ca: Some(other_ca), ..right.clone() };
    waits_for(&distrusted, "is not signed by an authority that --etcd-cafile names");
    let elsewhere = Access { endpoints: right.endpoints.replace("127.0.0.1", "localhost"), ..right.clone() };
    waits_for(&elsewhere, "does not name the host of --etcd-endpoints");
    let missing = Access { ca: Some(folder.0.join("later.pem")), ..right.clone() };
    waits_for(&missing, "cannot use --etcd-cafile");
    std::fs::write(folder.0.join("later.pem"), "half a fi").unwrap();
    waits_for(&missing, "it has no CERTIFICATE in PEM form");
    std::fs::copy(&ca, folder.0.join("later.pem")).unwrap();
    waits_for(&missing, "there is no network config in etcd yet");
}

/// A key, and a certificate of X.509 version 1, signed by the authority.
fn version_1_certificate(folder: &Path, (ca, ca_key): (&Path, &Path)) -> (PathBuf, PathBuf) {
    let [key, request, cert] = ["v1-key.pem", "v1.csr", "v1.pem"].map(|name| folder.join(name));
    let openssl = |args: &[&str]| {
        let output = Command::new("openssl").args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let [key_path, request_path, cert_path, ca, ca_key] = [&key, &request, &cert, ca, ca_key].map(|path| path.to_str().unwrap());
    openssl(&["req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=client", "-keyout", key_path, "-out", request_path]);
    openssl(&["x509", "-req", "-in", request_path, "-CA", ca, "-CAkey", ca_key, "-set_serial", "7", "-days", "2", "-out", cert_path]);
    assert!(openssl(&["x509", "-noout", "-text", "-in", cert_path]).contains("Version: 1 "));
    (cert, key)
}

#[test]
fn client_certificates_of_version_1_are_used() {
    let folder = Folder::new();
    let (ca, cert, key) = certificates(&folder.0, "server");
    let client = version_1_certificate(&folder.0, (&ca, &folder.0.join("server-ca-key.pem")));
    let file = |path: &Path| path.to_str().unwrap().to_owned();
    let args = ["--cert-file", &file(&cert), "--key-file", &file(&key), "--trusted-ca-file", &file(&ca), "--client-cert-auth"];
    let server = Server::start("https", &args);
    let right = Access { ca: Some(ca.clone()), cert: Some(client.0.clone()), key: Some(client.1.clone()), ..server.access("https") };
    waits_for(&right, "there is no network config in etcd yet");
    // The key of another certificate is found out before it is used.
    let mixed = Access { key: Some(key), ..right };
    waits_for(&mixed, "server-key.pem: the key is not that of the certificate");

    // The API server is not there, which is all that is wrong with this kubeconfig.
    let config = folder.0.join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{}', certificate-authority: '{}'}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {{client-certificate: '{}', client-key: '{}'}}}}]\n",
        free_port(),
        file(&ca),
        file(&client.0),
        file(&client.1)
    );
    std::fs::write(&config, text).unwrap();
    let args = RunArgs::read(["--kube-subnet-mgr".to_owned(), format!("--kubeconfig-file={}", config.display())], |_| None).unwrap();
    let access = kube::Access::new(&args, |name| (name == "NODE_NAME").then(|| "node".to_owned())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let connected = runtime.block_on(Kube::connect(&access, Ready::default(), Notices::new().0)).map(drop);
    assert!(connected.is_ok(), "{connected:?}");
}

#[test]
fn wrong_scheme_is_named() {
    let folder = Folder::new();
    let (ca, cert, key) = certificates(&folder.0, "server");
    let file = |path: &Path| path.to_str().unwrap().to_owned();
    let tls = Server::start("https", &["--cert-file", &file(&cert), "--key-file", &file(&key)]);
    waits_for(&tls.access("http"), "the endpoint speaks TLS: write https:// in --etcd-endpoints");
    let plain = Server::start("http", &[]);
    let access = Access { ca: Some(ca), ..plain.access("https") };
    waits_for(&access, "the endpoint is a plain etcd, without TLS: write http:// in --etcd-endpoints");
}

#[test]
fn endpoints_are_tried_in_turn_and_shown_without_credentials() {
    let server = Server::start("http", &[]);
    server.control(&["put", "/flannel/config", CONFIG]);
    let closed = free_port();
    let list = format!(" \"http://127.0.0.1:{closed}\", 'http://user:hush@127.0.0.1:{}' , ", server.port);
    let access = Access { endpoints: list, ..server.access("http") };
    passes(&access);
    drop(server);
    waits_for(&access, "connection refused");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(async { Etcd::new(&access).unwrap().config().await.unwrap_err() });
    assert!(!format!("{error} {error:?} {access:?}").contains("hush"));
}
