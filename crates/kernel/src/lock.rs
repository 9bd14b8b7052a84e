//! One at a time in a network namespace, for whoever reads and then changes what others read and change as well: tables of
//! iptables and nftables, the link of a VLAN.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

/// Where the locks are, a file a namespace. Only root can enter: else anybody could stop all work by holding one.
const FOLDER: &str = "/run/flannel-locks";
/// How long another's work is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Held until it is dropped; it ends with the process as well, however that ends.
#[derive(Debug)]
pub struct Lock(Option<(File, PathBuf)>);

/// Waits for the lock of the calling thread's network namespace. A process must not ask for it twice. Where there can be no
/// lock (a read-only `/run`, no root), there is none: the work is done all the same.
///
/// # Errors
/// `TimedOut` when somebody holds it for ten seconds.
pub fn lock() -> io::Result<Lock> {
    let Ok(namespace) = std::fs::metadata("/proc/thread-self/ns/net") else { return Ok(Lock(None)) };
    let path = PathBuf::from(FOLDER).join(namespace.ino().to_string());
    let end = Instant::now() + PATIENCE;
    loop {
        let _ = DirBuilder::new().mode(0o700).create(FOLDER);
        let Ok(file) = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path) else { return Ok(Lock(None)) };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Its last holder may have taken the name away: then this is nobody's lock any more.
            Ok(()) if same_file(&file, &path) => return Ok(Lock(Some((file, path)))),
            Ok(()) => continue,
            Err(_) if Instant::now() > end => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} is held by another process", path.display())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Waits a while for a file to be this process's alone, and leaves in it who has it: process and host name, which in a
/// container is the pod's. It is held until the returned file is dropped, or the process ends.
///
/// # Errors
/// When the file cannot be had; `AddrInUse` with the text that its holder left when it is held all the time.
pub fn alone(path: &Path, patience: Duration) -> io::Result<File> {
    use std::io::{Read, Write};
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = File::options().create(true).truncate(false).read(true).write(true).mode(0o644).open(path)?;
    let end = Instant::now() + patience;
    while let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK {
            return Err(error.into());
        }
        if Instant::now() > end {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            return Err(io::Error::new(io::ErrorKind::AddrInUse, holder.trim().to_owned()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let name = rustix::system::uname();
    file.set_len(0)?;
    write!(file, "pid {} on {}", std::process::id(), name.nodename().to_string_lossy())?;
    Ok(file)
}

fn same_file(file: &File, path: &std::path::Path) -> bool {
    let id = |meta: io::Result<std::fs::Metadata>| meta.map(|meta| (meta.dev(), meta.ino())).ok();
    id(file.metadata()) == id(std::fs::metadata(path))
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is held, so that whoever waits sees that the name is gone.
        if let Some((_, path)) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}
