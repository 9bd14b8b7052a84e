//! An index from owners to their addresses, so that not every address file must be read. Each owner has a symbolic link whose
//! name is a hash of the owner and whose target lists the addresses. The index lies beside the network's directory, whose
//! layout is the reference plugin's.
//!
//! The index is a hint that is always verified: an address counts only if its file names the owner. It is complete until another
//! program changes the directory. To detect that, the directory's modification time after our last change is stored in an
//! attribute of the lock file. When the time differs, the directory is scanned once and the index rebuilt.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

/// The extended attribute of the lock file with the directory's modification time after our last change.
const SEEN: &str = "user.flannel.seen";

/// The index of one network's directory.
#[derive(Debug)]
pub(super) struct Index(PathBuf);

impl Index {
    /// The index of a network's directory.
    pub(super) fn of(network: &Path) -> Index {
        let name = network.file_name().unwrap_or_default().to_string_lossy();
        Index(network.with_file_name(format!(".{name}.owners")))
    }

    /// Is the directory unchanged since [`Index::mark_current`]?
    pub(super) fn is_current(&self, network: &Path, lock: &File) -> bool {
        let mut buffer = [0; 64];
        let recorded = rustix::fs::fgetxattr(lock, SEEN, &mut buffer[..]).ok().and_then(|length| buffer.get(..length));
        recorded.is_some() && recorded == modification_time(network).as_deref().map(str::as_bytes) && self.0.is_dir()
    }

    /// Records the directory's present modification time. On a file system without extended attributes the directory is
    /// scanned each time.
    pub(super) fn mark_current(network: &Path, lock: &File) {
        if let Some(now) = modification_time(network) {
            let _ = rustix::fs::fsetxattr(lock, SEEN, now.as_bytes(), rustix::fs::XattrFlags::empty());
        }
    }

    /// The addresses that the index lists for an owner.
    pub(super) fn get(&self, owner: &str) -> Vec<IpAddr> {
        let target = fs::read_link(self.file(owner)).unwrap_or_default();
        target.to_string_lossy().split(',').filter_map(|text| text.parse().ok()).collect()
    }

    /// Writes the addresses that an owner is about to hold; an extra address is harmless. Returns false if the link cannot be
    /// written.
    pub(super) fn set(&self, owner: &str, addresses: &[IpAddr]) -> bool {
        let file = self.file(owner);
        let _ = fs::remove_file(&file);
        if addresses.is_empty() {
            return true;
        }
        let text: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        symlink(text.join(","), &file).is_ok()
    }

    /// Rebuilds the index from all address files. Returns false if it cannot be written.
    pub(super) fn rebuild<'a>(&self, entries: impl Iterator<Item = (&'a str, IpAddr)>) -> bool {
        let _ = fs::remove_dir_all(&self.0);
        if fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.0).is_err() {
            return false;
        }
        let mut entries = entries;
        entries.all(|(owner, address)| {
            let mut addresses = self.get(owner);
            addresses.push(address);
            self.set(owner, &addresses)
        })
    }

    fn file(&self, owner: &str) -> PathBuf {
        self.0.join(format!("{:016x}", hash(owner)))
    }
}

/// The inode and modification time of a directory, to the nanosecond. Kernels from 6.13 on give each observed change its own
/// time; on older ones, two changes within a tick have the same time.
fn modification_time(network: &Path) -> Option<String> {
    let meta = fs::metadata(network).ok()?;
    Some(format!("{} {}.{:09}", meta.ino(), meta.mtime(), meta.mtime_nsec()))
}

/// FNV-1a, which is the same in every build. If the hashes of two owners collide, one of them costs a scan of the directory.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_stable() {
        assert_eq!((hash(""), hash("a"), hash("foobar")), (0xcbf2_9ce4_8422_2325, 0xaf63_dc4c_8601_ec8c, 0x8594_4171_f739_67e8));
    }
}
