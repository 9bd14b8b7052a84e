//! Files that other programs read, written in one step: a reader sees the old content or the new, never a part. This is the
//! only such writer of the project. `subnet.env` is one of them, with a note of who wrote it.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use flannel::object::EnvFile;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// What happens to a file that has the name already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced. Several processes may write it at the same time.
    Replace,
    /// It is replaced, and no other process writes it at the same time: the file beside it has a fixed name ([`scratch`]), so
    /// that what a killed process left is overwritten by the next.
    ReplaceAlone,
    /// It stays, and the write fails with `AlreadyExists`.
    Keep,
}

/// How a file is written.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// Its mode, whatever the umask is.
    pub mode: u32,
    /// Must it survive a power cut once the call returned?
    pub durable: bool,
    /// What happens to a file that has the name already.
    pub existing: Existing,
}

/// Makes a file have this text, mode 0644, durably and in one step. Folders that are missing are created.
///
/// # Errors
/// When it cannot be written; then the old one stays.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, |_| Ok(()))
}

/// The same, with a look at the new file before it is put in place.
///
/// # Errors
/// When it cannot be written, or the look fails; then the old one stays.
pub fn replace(path: &Path, text: &str, look: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    put(path, text.as_bytes(), How { mode: 0o644, durable: true, existing: Existing::Replace }, look)
}

/// Makes a file have this content in one step. Folders that are missing are created.
///
/// # Errors
/// When it cannot be written, or the look at the new file fails; then the old one stays.
pub fn put(path: &Path, content: &[u8], how: How, look: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if how.existing == Existing::Keep
        && let Some(file) = open_nameless(folder, how.mode)?
    {
        fill(&file, content, how, look)?;
        // Linked under its name, exclusively: killed before, the process leaves nothing.
        rustix::fs::linkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), CWD, path, AtFlags::SYMLINK_FOLLOW)?;
        return if how.durable { File::open(folder)?.sync_all() } else { Ok(()) };
    }
    let mut beside = scratch(path)?;
    if how.existing == Existing::Replace {
        beside.as_mut_os_string().push(format!(".{}", std::process::id()));
    }
    let written = (|| {
        // One that a killed process left may have been linked under another name: writing into it would change that.
        let _ = std::fs::remove_file(&beside);
        let open = || OpenOptions::new().write(true).create_new(true).mode(how.mode).open(&beside);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(folder)?;
                open()?
            }
            other => other?,
        };
        fill(&file, content, how, look)?;
        match how.existing {
            Existing::Keep => {
                std::fs::hard_link(&beside, path)?;
                std::fs::remove_file(&beside)?;
            }
            Existing::Replace | Existing::ReplaceAlone => std::fs::rename(&beside, path)?,
        }
        if how.durable { File::open(folder)?.sync_all() } else { Ok(()) }
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

/// Where [`put`] writes a file before it has its name, where no other process writes it at the same time.
///
/// # Errors
/// When the path names no file.
pub fn scratch(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it names no file"))?;
    Ok(path.with_file_name(format!(".{}", name.to_string_lossy())))
}

/// Opens a file without a name; `None` where the file system has none, or the folder does not exist yet.
fn open_nameless(folder: &Path, mode: u32) -> io::Result<Option<File>> {
    match rustix::fs::openat(CWD, folder, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(mode)) {
        Ok(fd) => Ok(Some(fd.into())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn fill(mut file: &File, content: &[u8], how: How, look: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    if how.mode & 0o077 != 0 {
        // Programs of other users read it: the umask must not narrow its mode.
        file.set_permissions(Permissions::from_mode(how.mode))?;
    }
    file.write_all(content)?;
    look(file)?;
    if how.durable { file.sync_all() } else { Ok(()) }
}

/// Reads `subnet.env`; `None` if it does not exist or cannot be read.
pub fn read_env(path: &Path) -> Option<EnvFile> {
    let mut file = File::open(path).ok()?;
    let mut text = String::new();
    io::Read::read_to_string(&mut file, &mut text).ok()?;
    let now = signature(&file.metadata().ok()?);
    // The first line names the file, the second the etcd leases.
    let noted = std::fs::read_to_string(marker(path)).unwrap_or_default();
    let ours = noted.lines().next() == Some(now.as_str());
    let etcd_leases = noted.lines().nth(1).unwrap_or_default().split(' ').filter_map(|id| id.parse().ok()).collect();
    Some(EnvFile { path: path.to_owned(), text, etcd_leases, ours })
}

/// Writes `subnet.env`, and beside it a note of which file it is.
pub(crate) fn write_env(file: &EnvFile) -> io::Result<()> {
    let leases: Vec<String> = file.etcd_leases.iter().map(ToString::to_string).collect();
    let note = |new: &File| write(&marker(&file.path), &format!("{}\n{}\n", signature(&new.metadata()?), leases.join(" ")));
    replace(&file.path, &file.text, note)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot write --subnet-file {}: {error}", file.path.display())))
}

fn marker(path: &Path) -> PathBuf {
    let name = path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    path.with_file_name(format!(".{name}.writer"))
}

/// What distinguishes a file from another that is put in its place, or that another program wrote to.
fn signature(meta: &Metadata) -> String {
    format!("{} {}.{:09}", meta.ino(), meta.mtime(), meta.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_appears_in_one_step_or_not_at_all() {
        let folder = std::env::temp_dir().join(format!("flannel-file-{}", std::process::id()));
        let path = folder.join("sub/name");
        let how = |existing| How { mode: 0o600, durable: false, existing };
        for existing in [Existing::Keep, Existing::Replace, Existing::ReplaceAlone] {
            put(&path, format!("{existing:?}").as_bytes(), how(existing), |_| Ok(())).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{existing:?}"));
        }
        let refused = put(&path, b"other", how(Existing::Keep), |_| Ok(())).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        put(&path, b"other", how(Existing::Replace), |_| Err(io::Error::other("look"))).unwrap_err();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "ReplaceAlone");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.join("sub")).unwrap().count(), 1, "nothing is left beside it");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
