//! Files that others read: never half of one (write beside it, fsync, rename), and `subnet.env` among them, with a note of
//! who wrote it.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use flannel::object::EnvFile;

/// Makes a file have this text, mode 0644, in one step. Folders that are missing are made.
///
/// # Errors
/// When it cannot be written; then the old one stands.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, |_| Ok(()))
}

/// The same, with a look at the new file before it is put in place.
///
/// # Errors
/// When it cannot be written, or the look is not content; then the old one stands.
pub fn replace(path: &Path, text: &str, look: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it names no file"))?.to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
        // Exactly this mode, whatever the umask: plugins of other users read it.
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        look(&file)?;
        std::fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Reads `subnet.env`; `None` if there is none that can be read.
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

/// What tells a file from another that is put in its place, or that somebody wrote to.
fn signature(meta: &Metadata) -> String {
    format!("{} {}.{:09}", meta.ino(), meta.mtime(), meta.mtime_nsec())
}
