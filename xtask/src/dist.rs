//! Builds the installed files: programs, completions, man page, container image.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use crate::tools::{Step, cargo_command, host, output, run, step};

/// The shells with completions, and the file names that they expect.
const SHELLS: [(&str, &str); 3] = [("bash", "flanneld.bash"), ("fish", "flanneld.fish"), ("zsh", "_flanneld")];

/// Builds the installed files and returns their directory. The plugin is linked statically, because it is started for each pod
/// and then loads no libraries. The daemon is linked dynamically, because glibc resolves names with loadable modules.
pub(crate) fn dist() -> anyhow::Result<PathBuf> {
    let folder = std::env::current_dir()?.join("target/dist");
    let daemon = build("flanneld", Linking::Dynamic)?.join("flanneld");
    let plugin = build("cni", Linking::Static)?.join("flannel-cni");
    std::fs::create_dir_all(&folder)?;
    for (from, name) in [(&daemon, "flanneld"), (&plugin, "flannel-cni")] {
        let to = folder.join(name);
        // Removed first, because the old program may be running.
        let _ = std::fs::remove_file(&to);
        std::fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    for name in ["flannel", "bridge", "host-local", "loopback", "portmap", "bandwidth", "firewall", "tuning"] {
        let link = folder.join(name);
        let _ = std::fs::remove_file(&link);
        std::fs::hard_link(folder.join("flannel-cni"), &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    let write = |args: &[&str], file: PathBuf| {
        let output = output(Command::new(&daemon).args(args))?;
        ensure!(output.status.success(), "flanneld {} ended with {}", args.join(" "), output.status);
        std::fs::write(&file, output.stdout).with_context(|| format!("cannot write {}", file.display()))
    };
    let completions = folder.join("completions");
    std::fs::create_dir_all(&completions)?;
    for (shell, name) in SHELLS {
        write(&["completions", shell], completions.join(name))?;
    }
    write(&["man"], folder.join("flanneld.8"))?;
    Ok(folder)
}

/// How a program is linked with the C library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Linking {
    /// With the C library of the machine.
    Dynamic,
    /// With its own copy, so that the program needs no other file.
    Static,
}

/// The target directory for the profile `dist`. Cargo's default, `target/dist`, is the directory of the installed files.
pub(crate) const TARGET: &str = "target/optimized";

/// Builds a package's programs with the profile `dist` and returns their directory. Passes `--target`, so that the flags do not
/// apply to build scripts, which both kinds of linking share.
fn build(package: &str, linking: Linking) -> anyhow::Result<PathBuf> {
    let host = host()?;
    let mut command = cargo_command();
    command.args(["build", "--locked", "--profile", "dist", "--quiet", "-p", package, "--target", &host, "--target-dir", TARGET]);
    command.env("CARGO_ENCODED_RUSTFLAGS", flags(linking)?.join("\x1f"));
    let kind = if linking == Linking::Static { "statically linked" } else { "dynamically linked" };
    step(format!("building {package}, optimized and {kind}"), &mut command)?;
    Ok(std::env::current_dir()?.join(TARGET).join(host).join("dist"))
}

/// The compiler's flags. Paths of this machine are remapped, so that a build in another directory produces identical programs.
/// A static program is still position-independent (static-pie), so that an attacker cannot predict its addresses. That costs each
/// start of a plugin 30 of 500 µs, and four page faults.
fn flags(linking: Linking) -> anyhow::Result<Vec<String>> {
    let home = |variable: &str, folder: &str| {
        let default = std::env::var_os("HOME").map(|home| Path::new(&home).join(folder));
        std::env::var_os(variable).map(PathBuf::from).or(default).with_context(|| format!("neither {variable} nor HOME is set"))
    };
    let remapped =
        [(home("RUSTUP_HOME", ".rustup")?, "/rustup"), (home("CARGO_HOME", ".cargo")?, "/cargo"), (std::env::current_dir()?, "/flannel")];
    let mut flags: Vec<String> = remapped.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())).collect();
    if linking == Linking::Static {
        flags.extend(["-C".to_owned(), "target-feature=+crt-static".to_owned()]);
    }
    Ok(flags)
}

/// Builds the container image and returns its archive. Downloads nothing: the image starts from an empty file system. Here the
/// daemon is linked statically too; it resolves names by DNS and /etc/hosts, which are built into glibc.
pub(crate) fn image() -> anyhow::Result<PathBuf> {
    let folder = std::env::current_dir()?.join("target/image");
    let bin = folder.join("rootfs/opt/bin");
    let _ = std::fs::remove_dir_all(folder.join("rootfs"));
    std::fs::create_dir_all(&bin)?;
    for (package, program) in [("flanneld", "flanneld"), ("cni", "flannel-cni")] {
        std::fs::copy(build(package, Linking::Static)?.join(program), bin.join(program))
            .with_context(|| format!("cannot copy {program}"))?;
        // The symbol table is a sixth of the file, and useless without a debugger.
        run(Command::new("strip").arg("--strip-all").arg(bin.join(program)))?;
    }
    for name in ["install-conf", "mk-docker-opts.sh"] {
        std::os::unix::fs::symlink("flanneld", bin.join(name))?;
    }
    let (tag, archive) = (format!("localhost/flannel:{}", env!("CARGO_PKG_VERSION")), folder.join("flannel.tar"));
    let _ = std::fs::remove_file(&archive);
    // A separate store, so that the machine's images are not changed.
    let store = std::env::temp_dir().join(format!("flannel-image-{}", std::process::id()));
    let podman = |args: &[&OsStr]| {
        let mut command = Command::new("podman");
        command.arg("--root").arg(store.join("root")).arg("--runroot").arg(store.join("run")).arg("--tmpdir").arg(store.join("tmp"));
        run(command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]).args(args).stdout(Stdio::null()))
    };
    let file = Path::new("deploy/image/Containerfile");
    let packing = Step::begin("packing the container image");
    // With a fixed timestamp, the same programs produce the same image.
    let built = podman(&[
        "build".as_ref(),
        "--quiet".as_ref(),
        "--timestamp=0".as_ref(),
        "--tag".as_ref(),
        tag.as_ref(),
        "--file".as_ref(),
        file.as_ref(),
        folder.as_ref(),
    ])
    .and_then(|()| podman(&["save".as_ref(), "--quiet".as_ref(), "--output".as_ref(), archive.as_ref(), tag.as_ref()]));
    drop(packing);
    let _ = std::fs::remove_dir_all(&store);
    built.context("cannot build the image with podman")?;
    let size = std::fs::metadata(&archive)?.len();
    ensure!(size < 20_000_000, "the image has {size} bytes: it must stay under 20 MB");
    Ok(archive)
}
