//! Functions for chained plugins: the previous result, and the attachment's interfaces in it.

use std::net::IpAddr;

use ::flannel::pod::note::Rules;
use ::flannel::{Cidr, Family, IfName};
use kernel::link;
use kernel::netlink::{NetlinkError, Protocol, Socket};
use kernel::netns::Netns;
use kernel::pod_rules::Notes;

use crate::protocol::{CniError, Request, field};
use crate::result::CniResult;

/// The result of the previous plugins.
pub(crate) fn previous(request: &Request<'_>) -> Result<CniResult, CniError> {
    let previous = field(request.conf, "prevResult")
        .ok_or_else(|| CniError::config("prevResult: missing: this plugin must be called as chained plugin"))?;
    CniResult::parse(previous)
}

/// The valid entries of the result of the previous plugins. DEL finds by them what ADD created.
pub(crate) fn previous_leniently(request: &Request<'_>) -> CniResult {
    field(request.conf, "prevResult").map(CniResult::parse_leniently).unwrap_or_default()
}

/// The first address of a family that the attachment's interface has in the container.
pub(crate) fn container_address(result: &CniResult, request: &Request<'_>, family: Family) -> Option<Cidr> {
    let is_container = |index: Option<usize>| match index.and_then(|index| result.interfaces.get(index)) {
        Some(interface) => interface.name == request.ifname && !interface.sandbox.is_empty(),
        // Results of old versions do not name the interface.
        None => index.is_none(),
    };
    result.ips.iter().find(|ip| Family::of(ip.address.addr) == family && is_container(ip.interface)).map(|ip| ip.address)
}

/// All addresses of a result.
pub(crate) fn addresses(result: &CniResult) -> Vec<IpAddr> {
    result.ips.iter().map(|ip| ip.address.addr).collect()
}

/// The addresses that the attachment has in the container; empty if the result does not name any.
pub(crate) fn container_addresses(result: &CniResult, request: &Request<'_>) -> Vec<IpAddr> {
    Family::ALL.iter().filter_map(|family| container_address(result, request, *family)).map(|cidr| cidr.addr).collect()
}

/// The attachment's interface name.
pub(crate) fn ifname(request: &Request<'_>) -> Result<IfName, CniError> {
    request.ifname.parse().map_err(|error| CniError::environment(format!("CNI_IFNAME: {error}")))
}

/// Runs a function with a netlink socket in the container's namespace.
pub(crate) fn in_container<T>(netns: &Netns, f: impl FnOnce(&mut Socket) -> Result<T, CniError>) -> Result<T, CniError> {
    let work = || f(&mut Socket::open(Protocol::Route).map_err(failed("open netlink in the container"))?);
    netns.run(work).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?
}

/// The index of the host's end of the container's link, if the result names one and it is a veth.
pub(crate) fn host_end(result: &CniResult) -> Option<u32> {
    let mut socket = Socket::open(Protocol::Route).ok()?;
    let names = result.interfaces.iter().filter(|interface| interface.sandbox.is_empty()).map(|interface| interface.name.parse());
    let mut links = names.flatten().filter_map(|name| link::get(&mut socket, name).ok().flatten());
    links.find(|link| link.kind == "veth").map(|link| link.index)
}

/// Keeps a note of the written rules, so that the daemon can restore them. The rules are in effect even if this fails.
pub(crate) fn note(notes: &Notes, end: u32, request: &Request<'_>, rules: Rules) {
    if let Err(error) = notes.keep(end, request.ifname, rules) {
        eprintln!("flanneld will not restore the container's rules when they are flushed: {error}");
    }
}

/// Adds the act and the object to a kernel error.
pub(crate) fn failed(act: impl std::fmt::Display) -> impl FnOnce(NetlinkError) -> CniError {
    move |error| CniError::failed(format!("cannot {act}: {error}"))
}
