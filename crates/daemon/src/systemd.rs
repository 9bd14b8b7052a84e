//! The service manager's protocol (sd_notify(3)): without `NOTIFY_SOCKET` there is none to notify.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The node is set up.
pub(crate) fn notify_ready() {
    notify("READY=1");
}

/// The start goes on for this much longer: the unit's start timeout must not end a daemon that waits for its store.
pub(crate) fn extend_start(by: Duration) {
    notify(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros()));
}

fn notify(text: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, message = text, "cannot notify the service manager");
    }
}
