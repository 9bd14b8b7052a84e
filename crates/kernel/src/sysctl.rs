//! Reads and writes sysctls: files under `/proc/sys`. Those of the network belong to the calling thread's network namespace.

use std::io;
use std::path::{Path, PathBuf};

use flannel::Family;

use crate::addr::family_number;
use crate::link;
use crate::netlink::{NetlinkError, Socket, attrs, u32_at};

fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

/// Reads a sysctl; `None` if the kernel does not have it. Names use slashes, because an interface name may contain a dot.
///
/// # Errors
/// When it exists and cannot be read.
pub fn read(name: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path(name)) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets a sysctl. Nothing is written when it has the value already, so that a read-only `/proc/sys` with the right values is no
/// error; a sysctl that the kernel does not have (IPv6 is disabled) counts as set.
///
/// # Errors
/// When it exists, has another value, and cannot be written; the text names it.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    match read(name) {
        Ok(None) => return Ok(()),
        Ok(Some(have)) if have == value => return Ok(()),
        _ => {}
    }
    std::fs::write(path(name), value).map_err(|error| io::Error::new(error.kind(), format!("sysctl {name} = {value}: {error}")))
}

/// Whether this namespace forwards packets of a family ([`Family::forwarding`]). Read by netlink (`linux/netconf.h`), because the
/// kernel hashes the entries under `/proc/sys/net` of all namespaces by name alone: with a thousand network namespaces each lookup
/// walks a list of a thousand entries, which takes half a millisecond.
///
/// # Errors
/// The error that the kernel returns.
pub fn forwards(socket: &mut Socket, family: Family) -> Result<bool, NetlinkError> {
    const RTM_GETNETCONF: u16 = 82;
    socket.get(
        RTM_GETNETCONF,
        |body| {
            body.bytes(&[family_number(family), 0, 0, 0]).attr_u32(NETCONFA_IFINDEX, ALL.cast_unsigned());
        },
        |body| decode_forwarding(body).map(|(_, _, on)| on),
    )
}

/// The message that announces a change of a namespace's settings (`linux/rtnetlink.h`).
pub(crate) const RTM_NEWNETCONF: u16 = 80;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
/// `NETCONFA_IFINDEX_ALL`
const ALL: i32 = -1;

/// Decodes a netconf message (`linux/netconf.h`): a family, the index of an interface (`None` for the whole namespace), and whether
/// it forwards packets of the family. Returns `None` for a message about something else.
pub(crate) fn decode_forwarding(body: &[u8]) -> Option<(Family, Option<u32>, bool)> {
    let family = Family::ALL.into_iter().find(|family| body.first() == Some(&family_number(*family)))?;
    let number =
        |wanted| attrs(body.get(4..).unwrap_or_default()).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| u32_at(value, 0));
    let index = number(NETCONFA_IFINDEX)?;
    let is_on = number(NETCONFA_FORWARDING)? != 0;
    match index.cast_signed() {
        ALL => Some((family, None, is_on)),
        1.. => Some((family, Some(index), is_on)),
        // The defaults for new interfaces.
        _ => None,
    }
}

/// Reads a sysctl of the desired state; `None` if the kernel does not have it or it cannot be read.
pub(crate) fn value(socket: &mut Socket, path: &str) -> Option<String> {
    match Family::ALL.into_iter().find(|family| family.forwarding() == path) {
        Some(family) => forwards(socket, family).ok().map(on_off),
        None => read(path).ok().flatten(),
    }
}

/// Formats the value of a boolean sysctl.
pub(crate) fn on_off(on: bool) -> String {
    if on { "1" } else { "0" }.to_owned()
}

/// Sets a sysctl of the desired state. If IPv4 forwarding cannot be enabled because `/proc/sys` is read-only, as in a container, it is
/// enabled on each existing interface by netlink. That is a stopgap, and the error is returned nevertheless.
///
/// # Errors
/// The error that the kernel returns; the text names the sysctl.
pub(crate) fn set(socket: &mut Socket, path: &str, value: &str) -> Result<(), NetlinkError> {
    let Err(error) = write(path, value) else { return Ok(()) };
    let mut message = error.to_string();
    if path == Family::V4.forwarding() && value == "1" {
        // Bridge ports do not route. An error is ignored: an interface that was just deleted, or has no IPv4, does not route either.
        for link in link::list(socket)?.iter().filter(|link| link.master == 0) {
            let _ = link::set_ipv4_conf(socket, link.index, link::FORWARDING, 1);
        }
        message.push_str("; enabled on each existing interface by netlink until then");
    }
    if let (Some((Family::V4, interface)), "1") = (Family::of_forwarding(path), value) {
        let index = link::get(socket, interface)?
            .map(|link| link.index)
            .ok_or_else(|| NetlinkError::Refused { errno: libc::ENODEV, message: format!("there is no interface {interface}") })?;
        return link::set_ipv4_conf(socket, index, link::FORWARDING, 1);
    }
    let errno = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => libc::EROFS,
        io::ErrorKind::PermissionDenied => libc::EACCES,
        io::ErrorKind::InvalidInput => libc::EINVAL,
        _ => libc::EIO,
    };
    Err(NetlinkError::Refused { errno, message })
}
