//! Sysctls: files below `/proc/sys`, of the calling thread's network namespace where they are per namespace.

use std::io;
use std::path::{Path, PathBuf};

fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

/// Reads a sysctl, named with slashes because an interface name may contain a dot; `None` if the kernel does not have
/// it.
///
/// # Errors
/// When it is there and cannot be read.
pub fn read(name: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path(name)) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a sysctl have this value. Nothing is written when it has it, so that a read-only `/proc/sys` whose values
/// are right does no harm; a sysctl that the kernel does not have (IPv6 switched off) counts as set.
///
/// # Errors
/// When it is there, different, and cannot be written; the text names it.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    match read(name) {
        Ok(None) => return Ok(()),
        Ok(Some(have)) if have == value => return Ok(()),
        _ => {}
    }
    std::fs::write(path(name), value).map_err(|error| io::Error::new(error.kind(), format!("sysctl {name} = {value}: {error}")))
}
