//! `loopback`: sets `lo` up in the container's namespace (specification, section 7.6).

use kernel::link;
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use serde_json::Value;

use crate::protocol::{CniError, Command, Request};
use crate::result::{CniResult, Interface, Ip};

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => {
            set(request, true)?;
            result(request).map(Some)
        }
        Command::Del => {
            // If the namespace is gone, there is no lo to set down.
            if request.netns.is_some_and(|path| Netns::open(path).is_ok()) {
                set(request, false)?;
            }
            Ok(None)
        }
        Command::Check => match in_container(request, |socket, lo| Ok(link::get(socket, lo)?.is_some_and(|link| link.up)))? {
            true => Ok(None),
            false => Err(CniError::failed("lo is not up")),
        },
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

fn set(request: &Request<'_>, up: bool) -> Result<(), CniError> {
    in_container(request, |socket, lo| {
        let index = link::get(socket, lo)?.map_or(1, |link| link.index);
        link::set_up(socket, index, up)
    })
}

fn in_container<T>(
    request: &Request<'_>,
    f: impl FnOnce(&mut Socket, ::flannel::IfName) -> Result<T, kernel::netlink::NetlinkError>,
) -> Result<T, CniError> {
    let netns = open_netns(request)?;
    let lo = "lo".parse().expect("it is a name");
    let done = netns.run(|| f(&mut Socket::open(Protocol::Route)?, lo));
    let done = done.map_err(|error| CniError::failed(format!("cannot enter CNI_NETNS: {error}")))?;
    done.map_err(|error| CniError::failed(format!("lo: {error}")))
}

/// The container's network namespace.
pub(crate) fn open_netns(request: &Request<'_>) -> Result<Netns, CniError> {
    let path = request.netns.ok_or_else(|| CniError::environment("required env variables [CNI_NETNS] missing"))?;
    Netns::open(path).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot open {}: {error}", path.display())))
}

fn result(request: &Request<'_>) -> Result<CniResult, CniError> {
    if let Some(previous) = request.conf.get("prevResult").filter(|value| !value.is_null()) {
        return CniResult::parse(previous);
    }
    let sandbox = request.netns.map(|path| path.display().to_string()).unwrap_or_default();
    let lo = Interface { name: "lo".to_owned(), mac: "00:00:00:00:00:00".to_owned(), mtu: 0, sandbox, ..Interface::default() };
    let ip = |text: &str| Ip { interface: Some(0), address: text.parse().expect("it is an address"), gateway: None };
    Ok(CniResult {
        interfaces: vec![lo],
        ips: vec![ip("127.0.0.1/8"), ip("::1/128")],
        routes: Vec::new(),
        dns: serde_json::Map::<String, Value>::new(),
    })
}
