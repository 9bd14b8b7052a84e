//! Writes `subnet.env` so that no reader ever sees half of it: a temporary file beside it, fsync, rename.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use flannel::subnet_env::{SubnetEnv, previous_subnets};
use flannel::{PerFamily, Picture, Subnet};

/// Where the file is, and what it says beside the lease.
#[derive(Debug, Clone)]
pub struct SubnetFile {
    /// `--subnet-file`
    pub path: PathBuf,
    /// `--ip-masq`
    pub ip_masq: bool,
}

impl SubnetFile {
    /// Writes the file for a node's lease.
    ///
    /// # Errors
    /// When it cannot be written; then the old one stands.
    pub fn write(&self, picture: &Picture) -> anyhow::Result<()> {
        let networks = picture.config().networks.iter().map(|(_, network)| network.network).collect();
        let env =
            SubnetEnv { networks, subnets: *picture.own().subnets(), mtu: picture.backend().mtu(picture.node()), ip_masq: self.ip_masq };
        let written = replace(&self.path, &env.render(), |file| self.sign(file));
        written.with_context(|| format!("cannot write --subnet-file {}", self.path.display()))
    }

    /// Was the file written by this program? A Go flanneld that ran since has put another in its place.
    pub fn is_ours(&self) -> bool {
        let signature = std::fs::metadata(&self.path).map(|meta| signature(&meta));
        signature.is_ok_and(|now| std::fs::read_to_string(self.marker()).is_ok_and(|ours| ours == now))
    }

    /// Notes which file this program is about to put in place.
    fn sign(&self, file: &std::fs::File) -> anyhow::Result<()> {
        write_atomically(&self.marker(), &signature(&file.metadata()?))
    }

    fn marker(&self) -> PathBuf {
        let name = self.path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
        self.path.with_file_name(format!(".{name}.writer"))
    }

    /// The pod networks that the file of a previous run names.
    pub fn previous_networks(&self) -> Vec<Subnet> {
        std::fs::read_to_string(&self.path).map(|text| flannel::subnet_env::previous_networks(&text)).unwrap_or_default()
    }

    /// The subnets that the file of a previous run names; none if there is no such file.
    pub fn previous(&self) -> PerFamily<Subnet> {
        std::fs::read_to_string(&self.path).map(|text| previous_subnets(&text)).unwrap_or_default()
    }
}

/// What tells a file from another that is put in its place.
fn signature(meta: &std::fs::Metadata) -> String {
    use std::os::unix::fs::MetadataExt;
    format!("{} {}.{:09}\n", meta.ino(), meta.mtime(), meta.mtime_nsec())
}

/// Makes a file have this text, mode 0644, in one step: a temporary file beside it, fsync, rename.
///
/// # Errors
/// When it cannot be written; then the old one stands.
pub fn write_atomically(path: &Path, text: &str) -> anyhow::Result<()> {
    replace(path, text, |_| Ok(()))
}

/// The same, with a look at the new file before it is put in place.
///
/// # Errors
/// When it cannot be written, or the look is not content; then the old one stands.
pub fn replace(path: &Path, text: &str, look: impl FnOnce(&std::fs::File) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let name = path.file_name().context("it names no file")?.to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
        // Exactly this mode, whatever the umask: plugins of other users read it.
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        look(&file)?;
        std::fs::rename(&temporary, path)?;
        anyhow::Ok(std::fs::File::open(directory)?.sync_all()?)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}
