//! Writes and reads the file for the CNI plugins, `subnet.env`.

use flannel::object::{EnvFile, Object};

use super::{Change, Reading, io_error};
use crate::file;
use crate::netlink::NetlinkError;

pub(super) fn apply(change: Change, wanted: &EnvFile) -> Result<(), NetlinkError> {
    match change {
        Change::Set => file::write_env(wanted).map_err(io_error),
        // The file stays after the daemon has ended, like the routes.
        Change::Delete => Ok(()),
    }
}

pub(super) fn observe(reading: &Reading<'_>, found: &mut Vec<Object>) {
    let file = reading.scope.file.as_deref().and_then(file::read_env);
    found.extend(file.map(|file| Object::EnvFile(Box::new(file))));
}
