//! Sysctls: files below `/proc/sys`, of the calling thread's network namespace where they are per namespace.

use std::io;
use std::path::{Path, PathBuf};

use flannel::Family;

use crate::addr::family_number;
use crate::link;
use crate::netlink::{NetlinkError, Socket, attrs, u32_at};

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

/// Does this namespace forward packets of this family ([`Family::forwarding`])? Asked by netlink
/// (`linux/netconf.h`): the kernel keeps what was looked up below `/proc/sys/net` by its name alone, so that with a thousand network
/// namespaces each look there walks a list of a thousand, for half a millisecond.
///
/// # Errors
/// What the kernel answers.
pub fn forwards(socket: &mut Socket, family: Family) -> Result<bool, NetlinkError> {
    const RTM_GETNETCONF: u16 = 82;
    socket.get(
        RTM_GETNETCONF,
        |body| {
            body.bytes(&[family_number(family), 0, 0, 0]).attr_u32(NETCONFA_IFINDEX, ALL.cast_unsigned());
        },
        |body| decode_forwarding(body).map(|(_, on)| on),
    )
}

/// What is announced of all interfaces' forwarding, by `RTM_NEWNETCONF`.
pub(crate) const RTM_NEWNETCONF: u16 = 80;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
/// `NETCONFA_IFINDEX_ALL`
const ALL: i32 = -1;

/// Whether the namespace forwards packets of a family, as a message of `linux/netconf.h` says; `None` if it says nothing of that,
/// or of one interface.
pub(crate) fn decode_forwarding(body: &[u8]) -> Option<(Family, bool)> {
    let family = Family::ALL.into_iter().find(|family| body.first() == Some(&family_number(*family)))?;
    let number =
        |wanted| attrs(body.get(4..).unwrap_or_default()).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| u32_at(value, 0));
    (number(NETCONFA_IFINDEX)? == ALL.cast_unsigned()).then_some(())?;
    Some((family, number(NETCONFA_FORWARDING)? != 0))
}

/// The value of a sysctl among those that shall be kept; `None` if the kernel does not have it or does not say.
pub(crate) fn value(socket: &mut Socket, path: &str) -> Option<String> {
    match Family::ALL.into_iter().find(|family| family.forwarding() == path) {
        Some(family) => forwards(socket, family).ok().map(on_off),
        None => read(path).ok().flatten(),
    }
}

/// The value of a sysctl that is a switch.
pub(crate) fn on_off(on: bool) -> String {
    if on { "1" } else { "0" }.to_owned()
}

/// Makes a sysctl have this value. Forwarding of IPv4 that is not to be had because `/proc/sys` is read-only, as in a container, is
/// switched on at each interface there is; that is no more than a makeshift, and an error all the same.
///
/// # Errors
/// What the kernel answers; the text names the sysctl.
pub(crate) fn set(socket: &mut Socket, path: &str, value: &str) -> Result<(), NetlinkError> {
    let Err(error) = write(path, value) else { return Ok(()) };
    let mut message = error.to_string();
    if path == Family::V4.forwarding() && value == "1" {
        // Ports of a bridge forward nothing themselves. One that goes this instant, or has no IPv4, forwards nothing either.
        for link in link::list(socket)?.iter().filter(|link| link.master == 0) {
            let _ = link::set_ipv4_conf(socket, link.index, link::FORWARDING, 1);
        }
        message.push_str("; until then it is on at each interface there is now, by netlink");
    }
    let errno = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => libc::EROFS,
        io::ErrorKind::PermissionDenied => libc::EACCES,
        io::ErrorKind::InvalidInput => libc::EINVAL,
        _ => libc::EIO,
    };
    Err(NetlinkError::Refused { errno, message })
}
