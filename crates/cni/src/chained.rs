//! What plugins that follow another in a list share: the result so far, and the attachment's names in it.

use std::net::IpAddr;

use ::flannel::{Cidr, Family, IfName};
use kernel::link;
use kernel::netlink::{NetlinkError, Protocol, Socket};
use kernel::netns::Netns;
use kernel::pod_rules::{Notes, Rules};
use serde_json::Value;

use crate::protocol::{CniError, Request, field};
use crate::result::CniResult;

/// The result of the plugins before this one.
pub(crate) fn previous(request: &Request) -> Result<CniResult, CniError> {
    let previous =
        field(&request.conf, "prevResult").ok_or_else(|| CniError::config("prevResult: this plugin must be called as chained plugin"))?;
    CniResult::parse(previous)
}

/// The same, where it may be missing.
pub(crate) fn previous_if_any(request: &Request) -> Result<Option<CniResult>, CniError> {
    field(&request.conf, "prevResult").map(|value: &Value| CniResult::parse(value)).transpose()
}

/// The first address of a family that the attachment's interface has in the container.
pub(crate) fn container_address(result: &CniResult, request: &Request, family: Family) -> Option<Cidr> {
    let is_container = |index: Option<usize>| match index.and_then(|index| result.interfaces.get(index)) {
        Some(interface) => interface.name == request.ifname && !interface.sandbox.is_empty(),
        // Results of old versions do not say.
        None => index.is_none(),
    };
    result.ips.iter().find(|ip| Family::of(ip.address.addr) == family && is_container(ip.interface)).map(|ip| ip.address)
}

/// All addresses of a result.
pub(crate) fn addresses(result: &CniResult) -> Vec<IpAddr> {
    result.ips.iter().map(|ip| ip.address.addr).collect()
}

/// The attachment's interface name.
pub(crate) fn ifname(request: &Request) -> Result<IfName, CniError> {
    request.ifname.parse().map_err(|error| CniError::environment(format!("CNI_IFNAME: {error}")))
}

/// Runs a function with a netlink socket in the container's namespace.
pub(crate) fn in_container<T>(netns: &Netns, f: impl FnOnce(&mut Socket) -> Result<T, CniError>) -> Result<T, CniError> {
    let work = || f(&mut Socket::open(Protocol::Route).map_err(failed("open netlink in the container"))?);
    netns.run(work).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?
}

/// The index of the host's end of the container's link, if the result tells of one and it is a veth.
pub(crate) fn host_end(result: &CniResult) -> Option<u32> {
    let mut socket = Socket::open(Protocol::Route).ok()?;
    let names = result.interfaces.iter().filter(|interface| interface.sandbox.is_empty()).map(|interface| interface.name.parse());
    let mut links = names.flatten().filter_map(|name| link::get(&mut socket, name).ok().flatten());
    links.find(|link| link.kind == "veth").map(|link| link.index)
}

/// Notes rules that were written, so that the daemon puts them back. Without the note the container has them all the same.
pub(crate) fn note(notes: &Notes, end: u32, request: &Request, rules: Rules) {
    if let Err(error) = notes.keep(end, &request.ifname, rules) {
        eprintln!("nobody will put the container's rules back when they are flushed: {error}");
    }
}

/// Names the act and the object of a kernel error.
pub(crate) fn failed(act: impl std::fmt::Display) -> impl FnOnce(NetlinkError) -> CniError {
    move |error| CniError::failed(format!("cannot {act}: {error}"))
}
