//! The reservations, for a program that compares them with what exists. Reading takes no lock and creates no file.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::{Store, boot_id, read_boot_id};
use crate::flannel::remove_file;

/// A reserved address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reservation {
    /// The address.
    pub address: IpAddr,
    /// The file's content: container and interface, in two lines; files of old versions name the container alone.
    content: String,
    /// Since when it is reserved: the file's modification time, in seconds since 1970.
    pub since: u64,
    /// Whether it was reserved before this host was booted; `None` if the file does not say.
    pub is_of_another_boot: Option<bool>,
}

impl Reservation {
    /// A reservation, for tests of its readers.
    pub fn new(address: IpAddr, container: &str, ifname: &str, since: u64, is_of_another_boot: Option<bool>) -> Reservation {
        Reservation { address, content: format!("{container}\r\n{ifname}"), since, is_of_another_boot }
    }

    /// The container.
    pub fn container(&self) -> &str {
        self.content.lines().next().unwrap_or_default().trim()
    }

    /// The interface in it.
    pub fn ifname(&self) -> Option<&str> {
        self.content.lines().nth(1).map(str::trim)
    }

    /// How long it has been reserved, at this time in seconds since 1970.
    pub fn age(&self, now: u64) -> Duration {
        Duration::from_secs(now.saturating_sub(self.since))
    }
}

/// The names of the networks in a data directory.
///
/// # Errors
/// When the directory cannot be read.
pub fn networks(data_dir: &Path) -> std::io::Result<Vec<String>> {
    let entries = fs::read_dir(data_dir)?.flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    // The index of a network is hidden beside it.
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    Ok(names)
}

/// The reservations of a network, in the order of addresses.
///
/// # Errors
/// When its directory cannot be read.
pub fn reservations(data_dir: &Path, network: &str) -> std::io::Result<Vec<Reservation>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data_dir.join(network))?.flatten() {
        let Some(address) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A plugin may remove a file meanwhile.
        let Ok(file) = fs::File::open(entry.path()) else { continue };
        let (Ok(meta), Ok(content)) = (file.metadata(), fs::read_to_string(entry.path())) else { continue };
        let boot = read_boot_id(&file).zip(boot_id());
        found.push(Reservation {
            address,
            content: content.trim().to_owned(),
            since: u64::try_from(meta.mtime()).unwrap_or(0),
            is_of_another_boot: boot.map(|(reserved_in, now)| reserved_in != now),
        });
    }
    found.sort();
    Ok(found)
}

/// A network's reservations, locked against plugins.
pub struct Locked(Store);

impl Locked {
    /// Locks a network's reservations; `None` if the network does not exist.
    ///
    /// # Errors
    /// When another process holds the lock all the time.
    pub fn open(data_dir: &Path, network: &str) -> Result<Option<Locked>, String> {
        Store::open_existing(&data_dir.join(network)).map(|store| store.map(Locked)).map_err(|error| error.to_string())
    }

    /// Frees an address if its reservation is still this one. Returns whether it did.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn release(&self, reservation: &Reservation) -> Result<bool, String> {
        if self.0.owner_of(reservation.address).as_deref() != Some(&reservation.content) {
            return Ok(false);
        }
        // The index may name more than there is.
        remove_file(&self.0.directory.join(reservation.address.to_string())).map_err(|error| error.to_string())?;
        self.0.mark_index_current();
        Ok(true)
    }
}
