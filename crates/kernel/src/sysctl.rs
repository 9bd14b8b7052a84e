//! Sysctls: files below `/proc/sys`, of the calling thread's network namespace where they are per namespace.

use std::io;
use std::path::{Path, PathBuf};

use flannel::Family;

use crate::addr::family_number;
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

/// Does this namespace forward packets of this family (`net/ipv4/ip_forward`, `net/ipv6/conf/all/forwarding`)? Asked by netlink
/// (`linux/netconf.h`): the kernel keeps what was looked up below `/proc/sys/net` by its name alone, so that with a thousand network
/// namespaces each look there walks a list of a thousand, for half a millisecond.
///
/// # Errors
/// What the kernel answers.
pub fn forwards(socket: &mut Socket, family: Family) -> Result<bool, NetlinkError> {
    const RTM_GETNETCONF: u16 = 82;
    const NETCONFA_IFINDEX: u16 = 1;
    const NETCONFA_FORWARDING: u16 = 2;
    const ALL: i32 = -1;
    socket.get(
        RTM_GETNETCONF,
        |body| {
            body.bytes(&[family_number(family), 0, 0, 0]).attr_u32(NETCONFA_IFINDEX, ALL.cast_unsigned());
        },
        |body| {
            let (_, value) = attrs(body.get(4..)?).find(|(kind, _)| *kind == NETCONFA_FORWARDING)?;
            Some(u32_at(value, 0)? != 0)
        },
    )
}
