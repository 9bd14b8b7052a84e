//! Advisory locks on files and folders (`flock`), always with a deadline. They end with the process, however that ends.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

/// Where the locks of namespaces are, one file each. Only root can enter: otherwise any user could stop all work by holding
/// one.
const FOLDER: &str = "/run/flannel-locks";
/// How long a plugin waits for another, or for the daemon.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The longest pause between two attempts.
const PAUSE: Duration = Duration::from_millis(1);

/// Waits until no other process locks an open file or folder, and locks it until it is closed.
///
/// # Errors
/// `TimedOut` when another process holds it all the time; what the kernel answers otherwise.
pub fn acquire(file: impl AsFd, patience: Duration) -> io::Result<()> {
    acquire_unless(file, patience, || false).map(drop)
}

/// The same, unless what the lock is wanted for is done before: then it returns false.
pub(crate) fn acquire_unless(file: impl AsFd, patience: Duration, is_done: impl Fn() -> bool) -> io::Result<bool> {
    let end = Instant::now() + patience;
    let mut pause = PAUSE / 16;
    loop {
        if is_done() {
            return Ok(false);
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(pause);
                // Locks are held for less than a millisecond as a rule.
                pause = (pause * 2).min(PAUSE);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("another process holds it for more than {patience:?}")));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Opens a file, creating it with this mode if it does not exist, and locks it.
///
/// # Errors
/// As [`acquire`], and when it cannot be opened.
pub fn open(path: &Path, mode: u32, patience: Duration) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).read(true).write(true).mode(mode).open(path)?;
    acquire(&file, patience)?;
    Ok(file)
}

/// The lock of a network namespace, held until it is dropped.
#[derive(Debug)]
pub struct Lock(Option<(File, PathBuf)>);

/// Locks the calling thread's network namespace, for programs that read and then change state that others change as well:
/// tables of iptables and nftables, the link of a VLAN. A process must not ask for it twice. Where no lock can be had (a
/// read-only `/run`, no root), the work is done without one.
///
/// # Errors
/// `TimedOut` when another process holds it for ten seconds.
pub fn lock() -> io::Result<Lock> {
    let Ok(namespace) = std::fs::metadata("/proc/thread-self/ns/net") else { return Ok(Lock(None)) };
    let path = PathBuf::from(FOLDER).join(namespace.ino().to_string());
    loop {
        if private_folder(Path::new(FOLDER)).is_err() {
            return Ok(Lock(None));
        }
        match open(&path, 0o600, PATIENCE) {
            // Its last holder may have removed the name: then other processes lock another file.
            Ok(file) if same_file(&file, &path) => return Ok(Lock(Some((file, path)))),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(io::Error::new(error.kind(), format!("cannot lock {}: {error}", path.display())));
            }
            Err(_) => return Ok(Lock(None)),
        }
    }
}

/// Locks a file for this process alone, in a folder that no other user can enter, and leaves in it who holds it: process and host
/// name, which in a container is the pod's. It is held until the returned file is dropped, or the process ends.
///
/// # Errors
/// When the folder or the file cannot be opened; `AddrInUse` with the text that its holder left when it is held all the time.
pub fn alone(folder: &Path, name: &str, patience: Duration) -> io::Result<File> {
    use std::io::Write;
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)?;
    }
    private_folder(folder)?;
    let path = folder.join(name);
    let mut file = match open(&path, 0o600, patience) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            let holder = std::fs::read_to_string(path)?;
            return Err(io::Error::new(io::ErrorKind::AddrInUse, holder.trim().to_owned()));
        }
        other => other?,
    };
    let name = rustix::system::uname();
    file.set_len(0)?;
    write!(file, "pid {} on {}", std::process::id(), name.nodename().to_string_lossy())?;
    Ok(file)
}

/// Makes a folder that only this user can enter, or makes an existing one so. Every user who can open a file can lock it, and so keep others
/// from their work; that needs no right to write.
///
/// # Errors
/// When it cannot be made, or when it is another user's.
pub fn private_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        let text = format!("{} is not a folder of this user: remove it", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    if found.mode() & 0o077 != 0 {
        std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn same_file(file: &File, path: &Path) -> bool {
    let id = |meta: io::Result<std::fs::Metadata>| meta.map(|meta| (meta.dev(), meta.ino())).ok();
    id(file.metadata()) == id(std::fs::metadata(path))
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is held, so that a waiting process sees that the name is gone.
        if let Some((_, path)) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_of_locks_is_made_private() {
        let path = std::env::temp_dir().join(format!("flannel-locks-{}", std::process::id()));
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o7777;
        private_folder(&path).unwrap();
        assert_eq!(mode(), 0o700);
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        private_folder(&path).unwrap();
        assert_eq!(mode(), 0o700);
        std::fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink("/tmp", &path).unwrap();
        assert_eq!(private_folder(&path).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_held_lock_times_out() {
        let path = std::env::temp_dir().join(format!("flannel-lock-{}", std::process::id()));
        let held = open(&path, 0o600, PATIENCE).unwrap();
        let refused = open(&path, 0o600, Duration::from_millis(20)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        drop(held);
        open(&path, 0o600, Duration::ZERO).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
