//! Which addresses an attachment holds, without reading every address file: a symbolic link for each owner, named by a hash of
//! it, that names its addresses. It lies beside the network's folder, which stays as the reference plugin has it.
//!
//! It is a hint that is always verified: an address counts only if its file names the owner. It is complete as long as no other
//! program changed the folder, as the folder's time of change shows; the last one seen is noted on the lock's file. Otherwise the
//! folder is read once, and the index rebuilt.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

/// The extended attribute of the lock's file that has the folder's time of change after our last work.
const SEEN: &str = "user.flannel.seen";

/// The index of one network's folder.
#[derive(Debug)]
pub(super) struct Index(PathBuf);

impl Index {
    /// The index that belongs to a network's folder.
    pub(super) fn of(network: &Path) -> Index {
        let name = network.file_name().unwrap_or_default().to_string_lossy();
        Index(network.with_file_name(format!(".{name}.owners")))
    }

    /// Is the folder unchanged since [`Index::note`]?
    pub(super) fn is_current(&self, network: &Path, lock: &File) -> bool {
        let mut buffer = [0; 64];
        let noted = rustix::fs::fgetxattr(lock, SEEN, &mut buffer[..]).ok().and_then(|length| buffer.get(..length));
        noted.is_some() && noted == changed(network).as_deref().map(str::as_bytes) && self.0.is_dir()
    }

    /// Notes the folder as it is now. Where a file system has no attributes the folder is read each time.
    pub(super) fn note(network: &Path, lock: &File) {
        if let Some(now) = changed(network) {
            let _ = rustix::fs::fsetxattr(lock, SEEN, now.as_bytes(), rustix::fs::XattrFlags::empty());
        }
    }

    /// The addresses that an owner holds by the index.
    pub(super) fn get(&self, owner: &str) -> Vec<IpAddr> {
        let target = fs::read_link(self.file(owner)).unwrap_or_default();
        target.to_string_lossy().split(',').filter_map(|text| text.parse().ok()).collect()
    }

    /// Writes what an owner is going to hold; an address too many does no harm. False if it cannot be written.
    pub(super) fn set(&self, owner: &str, addresses: &[IpAddr]) -> bool {
        let file = self.file(owner);
        let _ = fs::remove_file(&file);
        if addresses.is_empty() {
            return true;
        }
        let text: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        symlink(text.join(","), &file).is_ok()
    }

    /// Rebuilds it from all address files. False if it cannot be written.
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

/// When a folder was changed last, to the nanosecond. Kernels from 6.13 on give each observed change its own
/// time; before, two within a tick have the same.
fn changed(network: &Path) -> Option<String> {
    let meta = fs::metadata(network).ok()?;
    Some(format!("{} {}.{:09}", meta.ino(), meta.mtime(), meta.mtime_nsec()))
}

/// FNV-1a: the same in every build. If two owners share a name, one of them costs a reading of the folder.
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
