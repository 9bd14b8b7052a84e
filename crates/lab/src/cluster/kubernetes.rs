//! The control plane of a lab in Kubernetes mode: a real API server with its etcd, the controllers that assign pod CIDRs to
//! Nodes, our own manifest, a Node for each host, and the service account's token, which is all that the daemons get.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::{Lab, START_TIMEOUT, STORE};
use crate::plan::{Families, StoreKind};
use crate::process::{spawn, tail};

/// The manifest that operators apply.
const MANIFEST: &str = include_str!("../../../../deploy/kubernetes/kube-flannel.yml");
/// The API server's port.
const PORT: u16 = 6443;
/// etcd, on the control plane's loopback address.
const ETCD: &str = "http://127.0.0.1:2379";
/// Lifetime of the daemons' token. A lab is not kept up longer.
const TOKEN: &str = "24h";
/// The administrator's token.
const ADMIN: &str = "admin";

/// The program that contains all of Kubernetes' parts, where `cargo xtask test` and `cargo xtask kubernetes` put it.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("FLANNEL_KUBERNETES") {
        return Ok(path.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let folder = cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("flannel-tests");
    let built = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let built = built.filter(|entry| entry.file_name().to_string_lossy().starts_with("kubernetes-v"));
    let newest = built.max_by_key(|entry| entry.metadata().and_then(|meta| meta.modified()).ok());
    newest
        .map(|entry| entry.path())
        .context("--kube needs a Kubernetes control plane: `cargo xtask kubernetes` builds one (in about ten minutes, once)")
}

impl Lab {
    /// Starts the control plane; one that was killed continues with its data.
    pub(super) fn start_kubernetes(&mut self, program: &Path) -> anyhow::Result<()> {
        let folder = self.kubernetes();
        let is_new = !folder.join("ca.crt").exists();
        if is_new {
            self.prepare_kubernetes(program, &folder)?;
        }
        let programs = [
            ("etcd", etcd_flags(&folder)),
            ("kube-apiserver", self.apiserver_flags(&folder)),
            ("kube-controller-manager", self.controller_flags(&folder)),
        ];
        for (name, args) in programs {
            let log = self.root.join(format!("{name}.log"));
            let mut command = Command::new(program);
            let more = self.plan.kubernetes_flags.iter().filter(|(program, _)| *program == name).map(|(_, flag)| flag);
            command.arg(name).args(args).args(more);
            let child = self.middle.run(|| spawn(&mut command, &log))?.with_context(|| format!("cannot start {}", program.display()))?;
            self.store.push(child);
        }
        self.wait_for_api()?;
        if is_new {
            self.kubectl(&["apply", "--validate=strict", "-f", "-"], MANIFEST).context("cannot apply our own manifest")?;
            self.make_nodes()?;
            self.renew_token(TOKEN)?;
        }
        Ok(())
    }

    fn apiserver_flags(&self, folder: &Path) -> Vec<String> {
        let file = |name: &str| folder.join(name).display().to_string();
        let address = STORE.ip();
        // The API server has an IPv4 address, so the first service network has one too.
        let services = if Families::of(&self.plan.config).v6 { "10.96.0.0/16,fd00:96::/112" } else { "10.96.0.0/16" };
        vec![
            format!("--etcd-servers={ETCD}"),
            format!("--bind-address={address}"),
            format!("--secure-port={PORT}"),
            format!("--advertise-address={address}"),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("sa.key")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            format!("--service-cluster-ip-range={services}"),
            "--endpoint-reconciler-type=none".into(),
            "--enable-priority-and-fairness=false".into(),
            "--allow-privileged=true".into(),
            "--profiling=false".into(),
        ]
    }

    fn controller_flags(&self, folder: &Path) -> Vec<String> {
        let file = |name: &str| folder.join(name).display().to_string();
        let families = Families::of(&self.plan.config);
        let network = |key: &str| self.plan.config[key].as_str().unwrap_or_default().to_owned();
        let (mut pods, mut flags) = (Vec::new(), Vec::new());
        if families.v4 {
            pods.push(network("Network"));
            flags.push("--node-cidr-mask-size-ipv4=24".to_owned());
        }
        if families.v6 {
            pods.push(network("IPv6Network"));
            flags.push("--node-cidr-mask-size-ipv6=64".to_owned());
        }
        flags.extend([
            format!("--kubeconfig={}", file("admin.kubeconfig")),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
            "--controllers=node-ipam-controller".to_owned(),
            "--allocate-node-cidrs=true".to_owned(),
            format!("--cluster-cidr={}", pods.join(",")),
            format!("--root-ca-file={}", file("ca.crt")),
            format!("--service-account-private-key-file={}", file("sa.key")),
            "--profiling=false".to_owned(),
        ]);
        flags
    }

    /// The control plane's files: certificates, data, the token of the daemons.
    pub fn kubernetes(&self) -> PathBuf {
        self.root.join("kubernetes")
    }

    /// A folder with `kubectl`, for users who enter the lab.
    pub(crate) fn tools(&self) -> PathBuf {
        self.kubernetes().join("bin")
    }

    fn prepare_kubernetes(&self, program: &Path, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        certificates(program, folder, 0)?;
        let kubectl = self.tools().join("kubectl");
        kernel::file::replace(&kubectl, &format!("#!/bin/sh\nexec '{}' kubectl \"$@\"\n", program.display()), |file| {
            file.set_permissions(std::fs::Permissions::from_mode(0o755))
        })?;
        std::fs::write(folder.join("tokens.csv"), format!("{ADMIN},admin,admin,system:masters\n"))?;
        for (name, user) in [("admin", json!({ "token": ADMIN })), ("flannel", json!({ "tokenFile": folder.join("token") }))] {
            // Daemons verify the server. The lab's own tools do not: tests give the server a bad certificate.
            let cluster = match name {
                "admin" => json!({ "server": self.api_url(), "insecure-skip-tls-verify": true }),
                _ => json!({ "server": self.api_url(), "certificate-authority": folder.join("ca.crt") }),
            };
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "lab",
                "clusters": [{ "name": "lab", "cluster": cluster }],
                "users": [{ "name": name, "user": user }],
                "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": name } }],
            });
            std::fs::write(folder.join(format!("{name}.kubeconfig")), config.to_string())?;
        }
        Ok(())
    }

    /// Ends the controllers: from now on no pod CIDR is assigned.
    ///
    /// # Errors
    /// When their end cannot be awaited.
    pub fn stop_controllers(&mut self) -> anyhow::Result<()> {
        let mut controllers = self.store.pop().context("the control plane is not running")?;
        controllers.kill()?;
        controllers.wait()?;
        Ok(())
    }

    /// Creates certificates for the API server's next start, valid from so many hours ahead. With 0 hours they are of an
    /// authority that the daemons do not know; otherwise the daemons know it.
    ///
    /// # Errors
    /// When they cannot be created.
    pub fn new_certificates(&self, hours: u32) -> anyhow::Result<()> {
        let StoreKind::Kubernetes(program) = &self.plan.store else { bail!("this lab has no Kubernetes") };
        let folder = self.kubernetes();
        let known = std::fs::read(folder.join("ca.crt"))?;
        certificates(program, &folder, hours)?;
        if hours == 0 {
            std::fs::copy(folder.join("ca.crt"), folder.join("other-ca.crt"))?;
            std::fs::write(folder.join("ca.crt"), known)?;
        }
        Ok(())
    }

    /// The API server's URL.
    pub fn api_url(&self) -> String {
        format!("https://{}:{PORT}", STORE.ip())
    }

    fn wait_for_api(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + 4 * START_TIMEOUT;
        loop {
            // kubectl is slow to start, so the port is tried first.
            let listens = self.middle.run(|| TcpStream::connect((STORE.ip(), PORT)))?.is_ok();
            if listens && self.kubectl(&["get", "--raw", "/readyz"], "").is_ok() {
                return Ok(());
            }
            for (child, name) in self.store.iter_mut().zip(["etcd", "kube-apiserver", "kube-controller-manager"]) {
                if let Some(status) = child.try_wait()? {
                    bail!("{name} ended with {status}:\n{}", tail(&self.root.join(format!("{name}.log"))));
                }
            }
            ensure!(Instant::now() < end, "the API server is not ready:\n{}", tail(&self.root.join("kube-apiserver.log")));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// A Node for each host, as a kubelet would register it.
    fn make_nodes(&self) -> anyhow::Result<()> {
        let items: Vec<Value> = self.hosts.iter().map(|host| node(&host.name)).collect();
        self.kubectl(&["apply", "-f", "-"], &json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string())?;
        let end = Instant::now() + START_TIMEOUT;
        while self.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].spec.podCIDR}"], "")?.split_whitespace().count() < self.hosts.len()
        {
            ensure!(Instant::now() < end, "no pod CIDRs are assigned:\n{}", tail(&self.root.join("kube-controller-manager.log")));
        }
        Ok(())
    }

    /// Writes a new token of the service account where the daemons read it.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn renew_token(&self, life: &str) -> anyhow::Result<()> {
        let token = self.kubectl(&["create", "token", "flannel", "-n", "kube-flannel", "--duration", life], "")?;
        Ok(kernel::file::write(&self.kubernetes().join("token"), token.trim())?)
    }

    /// Runs kubectl as administrator and returns its standard output.
    ///
    /// # Errors
    /// When it fails; the text has its standard error.
    pub fn kubectl(&self, args: &[&str], stdin: &str) -> anyhow::Result<String> {
        let StoreKind::Kubernetes(program) = &self.plan.store else { bail!("this lab has no Kubernetes") };
        let folder = self.kubernetes();
        let mut command = Command::new(program);
        command.arg("kubectl").args(args).arg("--kubeconfig").arg(folder.join("admin.kubeconfig")).env("HOME", &folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child: Child = self.middle.run(|| command.spawn())?.with_context(|| format!("cannot start {}", program.display()))?;
        child.stdin.take().context("kubectl has no input")?.write_all(stdin.as_bytes())?;
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), stderr.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The subnets that a host's Node was assigned.
    ///
    /// # Errors
    /// When none are assigned in time.
    pub fn pod_cidrs(&self, host: usize) -> anyhow::Result<String> {
        let end = Instant::now() + START_TIMEOUT;
        loop {
            let cidrs = self.kubectl(&["get", "node", &self.hosts[host].name, "-o", "jsonpath={.spec.podCIDRs[*]}"], "")?;
            if !cidrs.is_empty() {
                return Ok(cidrs.replace(' ', ","));
            }
            ensure!(Instant::now() < end, "no pod CIDR is assigned:\n{}", tail(&self.root.join("kube-controller-manager.log")));
        }
    }

    /// Adds the flags and variables with which a host's daemon uses Kubernetes.
    pub(super) fn kubernetes_flags(&self, host: usize, command: &mut Command) {
        let folder = self.kubernetes();
        command.arg("--kube-subnet-mgr").arg(format!("--kubeconfig-file={}", folder.join("flannel.kubeconfig").display()));
        command.arg(format!("--net-config-path={}", self.net_conf().display()));
        command.env("NODE_NAME", &self.hosts[host].name);
    }

    /// The file that takes the place of the ConfigMap.
    pub fn net_conf(&self) -> PathBuf {
        self.root.join("net-conf.json")
    }
}

fn etcd_flags(folder: &Path) -> Vec<String> {
    vec![
        format!("--data-dir={}", folder.join("etcd").display()),
        "--unsafe-no-fsync".into(),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--log-level=warn".into(),
    ]
}

fn certificates(program: &Path, folder: &Path, hours: u32) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(["certificates", &hours.to_string()]).arg(folder).arg(STORE.ip().to_string()).args([
        "127.0.0.1",
        "10.96.0.1",
        "fd00:96::1",
    ]);
    let made = command.output().with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(made.status.success(), "cannot create certificates: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

/// A Node without podCIDR and annotations, as a kubelet registers it.
pub fn node(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": { "kubernetes.io/os": "linux", "kubernetes.io/hostname": name } } })
}
