//! What the guest consists of: a kernel of Debian with its modules, and programs of this machine with their libraries, at the
//! paths that they have here.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::cpio::Archive;
use crate::programs::unpack_dependency;
use crate::tools::{Step, cache, find, output, run};

/// The Debian package that names the current kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// Folders of modules that tests may need.
const MODULES: &[&str] =
    &["crypto", "lib", "net", "arch/x86/crypto", "drivers/net", "drivers/virtio", "drivers/char", "fs/overlayfs", "fs/fuse"];
/// Folders among them that no test can need: drivers of hardware.
const NO_MODULES: &[&str] =
    &["drivers/net/ethernet", "drivers/net/wireless", "drivers/net/usb", "drivers/net/can", "net/sunrpc", "net/ceph"];

/// Programs that tests start. Busybox stands in for all others that it has.
const PROGRAMS: &[&str] = &[
    "sh",
    "bash",
    "ip",
    "bridge",
    "tc",
    "ss",
    "nft",
    "ping",
    "mount",
    "umount",
    "unshare",
    "nsenter",
    "kill",
    "sleep",
    "cat",
    "dd",
    "tar",
    "timeout",
    "strace",
    "iptables",
    "ip6tables",
    "iptables-save",
    "ip6tables-save",
    "iptables-restore",
    "ip6tables-restore",
    "iptables-nft",
    "ip6tables-nft",
    "iptables-nft-save",
    "iptables-nft-restore",
    "ip6tables-nft-save",
    "ip6tables-nft-restore",
    "iptables-legacy",
    "ip6tables-legacy",
    "iptables-legacy-save",
    "iptables-legacy-restore",
    "ip6tables-legacy-save",
    "ip6tables-legacy-restore",
    "xtables-nft-multi",
    "xtables-legacy-multi",
    "setpriv",
    "dbus-daemon",
];

/// Files that these programs read.
const FILES: &[&str] =
    &["/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/protocols", "/etc/services", "/etc/iproute2", "/etc/ld.so.cache"];

/// The kernel of the guest.
pub(crate) struct GuestKernel {
    /// The file that is booted.
    pub(super) file: PathBuf,
    /// The folder of its modules, `…/lib/modules/RELEASE`.
    modules: PathBuf,
}

impl GuestKernel {
    /// Its release, as `uname -r` prints it.
    pub(super) fn release(&self) -> String {
        self.modules.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// The kernel, downloaded into the cache on first use.
pub(crate) fn kernel() -> anyhow::Result<GuestKernel> {
    ensure!(cfg!(target_arch = "x86_64"), "the VM is a machine of x86_64, which cannot run the programs of this one");
    let folder = cache()?.join("vm-kernel");
    if !folder.is_dir() {
        let _step = Step::begin("unpacking Debian's cloud kernel into the cache");
        let unfinished = cache()?.join(format!(".vm-kernel.{}", std::process::id()));
        let package = unpack_dependency(KERNEL_PACKAGE, "linux-image-", &unfinished)?;
        let modules = release(&unfinished)?;
        run(Command::new("busybox").arg("depmod").arg("-b").arg(&unfinished).arg(modules.file_name().unwrap_or_default()))?;
        println!("  {package}");
        if let Err(error) = std::fs::rename(&unfinished, &folder) {
            // Another run may have unpacked it at the same time.
            ensure!(folder.is_dir(), "cannot keep the kernel in {}: {error}", folder.display());
            std::fs::remove_dir_all(&unfinished)?;
        }
    }
    let mut kernel = GuestKernel { file: PathBuf::new(), modules: release(&folder)? };
    kernel.file = folder.join("boot").join(format!("vmlinuz-{}", kernel.release()));
    ensure!(kernel.file.is_file(), "Debian's kernel package has no {}: remove {}", kernel.file.display(), folder.display());
    Ok(kernel)
}

/// The folder of the modules of the only kernel in a folder.
fn release(folder: &Path) -> anyhow::Result<PathBuf> {
    let modules = folder.join("lib/modules");
    let mut found = std::fs::read_dir(&modules).with_context(|| format!("cannot read {}", modules.display()))?;
    Ok(found.next().with_context(|| format!("{} is empty", modules.display()))??.path())
}

/// The guest's files without those of the tests.
pub(super) fn base(kernel: &GuestKernel, init: &str) -> anyhow::Result<Archive> {
    let mut archive = Archive::default();
    for folder in ["/proc", "/sys", "/dev", "/run", "/root", "/mnt", "/media", "/srv", "/opt", "/etc", "/var/lib", "/var/log", "/var/tmp"] {
        archive.directory(Path::new(folder), 0o755);
    }
    archive.directory(Path::new("/tmp"), 0o1777);
    for folder in ["/bin", "/sbin", "/lib", "/lib64"] {
        if let Ok(target) = std::fs::read_link(folder) {
            archive.link(Path::new(folder), &target);
            archive.directory(&Path::new("/").join(target), 0o755);
        }
    }
    for (name, text) in [("hostname", "guest\n"), ("hosts", "127.0.0.1 localhost guest\n::1 localhost\n"), ("resolv.conf", "")] {
        archive.text(&Path::new("/etc").join(name), text.to_owned(), 0o644);
    }
    archive.link(Path::new("/var/run"), Path::new("/run"));
    archive.text(Path::new("/init"), init.to_owned(), 0o755);
    for name in PROGRAMS {
        program(&mut archive, &find(name).with_context(|| format!("{name}, which the guest needs, is not in PATH"))?)?;
    }
    for file in FILES {
        archive.add(Path::new(file))?;
    }
    // iptables loads its extensions by name.
    for folder in std::fs::read_dir("/usr/lib")?.filter_map(|entry| Some(entry.ok()?.path().join("xtables"))).filter(|path| path.is_dir()) {
        archive.add(&folder)?;
    }
    busybox(&mut archive)?;
    add_modules(&mut archive, kernel)?;
    Ok(archive)
}

/// Adds a program of this machine and the libraries that it needs.
pub(super) fn program(archive: &mut Archive, program: &Path) -> anyhow::Result<()> {
    archive.add(program)?;
    libraries(archive, program)
}

/// Adds the libraries that a program needs.
pub(super) fn libraries(archive: &mut Archive, program: &Path) -> anyhow::Result<()> {
    // A static program has none, and ldd then fails.
    let answer = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot start ldd")?;
    for line in String::from_utf8_lossy(&answer.stdout).lines() {
        let (name, rest) = line.trim().split_once(" => ").unwrap_or(("", line.trim()));
        ensure!(rest != "not found", "{} needs {name}, which is not installed", program.display());
        if let Some(library) = rest.split_whitespace().next().map(Path::new).filter(|path| path.is_absolute() && !archive.has(path)) {
            archive.add(library)?;
        }
    }
    Ok(())
}

/// Adds busybox, under the names of all programs that the guest has not.
fn busybox(archive: &mut Archive) -> anyhow::Result<()> {
    let busybox = find("busybox").context("busybox, which the guest needs, is not in PATH")?;
    archive.copy(&busybox.canonicalize()?, Path::new("/usr/bin/busybox"));
    let answer = output(Command::new(&busybox).arg("--list"))?;
    for name in String::from_utf8(answer.stdout)?.split_whitespace() {
        let places = ["/usr/bin", "/usr/sbin"].map(|folder| Path::new(folder).join(name));
        if !places.iter().any(|place| archive.has(place)) {
            places.iter().for_each(|place| archive.link(place, Path::new("/bin/busybox")));
        }
    }
    Ok(())
}

fn add_modules(archive: &mut Archive, kernel: &GuestKernel) -> anyhow::Result<()> {
    // The kernel's program looks for them in /lib, which is a link on most machines.
    let place = Path::new("/lib").canonicalize()?.join("modules").join(kernel.modules.file_name().unwrap_or_default());
    let mut folders: Vec<PathBuf> = MODULES.iter().map(|folder| kernel.modules.join("kernel").join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            if !path.is_dir() {
                archive.copy(&path, &place.join(path.strip_prefix(&kernel.modules)?));
            } else if !NO_MODULES.iter().any(|name| path.ends_with(name)) {
                folders.push(path);
            }
        }
    }
    for entry in std::fs::read_dir(&kernel.modules)? {
        let path = entry?.path();
        if path.is_file() {
            archive.copy(&path, &place.join(path.file_name().unwrap_or_default()));
        }
    }
    Ok(())
}
