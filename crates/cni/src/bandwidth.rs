//! `bandwidth`: limits the traffic of an attachment with token buckets. Traffic to the container is limited on the host's end
//! of its veth pair, traffic from it on an intermediate link (specification, section 7.6).

use ::flannel::IfName;
use kernel::link::{self, LinkInfo};
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::qdisc::{self, Bucket};
use serde_json::{Map, Value};
use sha2::{Digest, Sha512};

use crate::chained::{failed, ifname, in_container, previous};
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, field, object};
use crate::result::{CniResult, Interface};

/// How long a packet may wait to be sent.
const LATENCY_MS: u64 = 25;
/// Bytes of a frame's Ethernet header.
const FRAME_HEADER: u64 = 14;

/// A rate in bits a second and a burst in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit {
    rate: u64,
    burst: u64,
}

impl Limit {
    fn bucket(self) -> Bucket {
        let (rate, burst) = (self.rate / 8, self.burst / 8);
        let limit = (rate * LATENCY_MS / 1000).saturating_add(burst);
        Bucket { rate, burst: u32::try_from(burst).unwrap_or(u32::MAX), limit: u32::try_from(limit).unwrap_or(u32::MAX) }
    }
}

/// The limits on traffic to the container (ingress) and from it (egress).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Limits {
    ingress: Option<Limit>,
    egress: Option<Limit>,
}

impl Limits {
    /// Warnings about bursts below one frame. Such a bucket never lets a full packet pass, and connections stall.
    fn warnings(&self, mtu: u32) -> Vec<String> {
        let needed = (u64::from(mtu) + FRAME_HEADER) * 8;
        let limits = [(self.ingress, "ingressBurst"), (self.egress, "egressBurst")].into_iter();
        let small = limits.filter_map(|(limit, field)| Some((limit?.burst, field))).filter(|(burst, _)| *burst < needed);
        small
            .map(|(burst, field)| {
                format!(
                    "{field}: {burst} bits are less than one frame of an interface with MTU {mtu}, so no full packet can pass: \
                     set at least {needed}"
                )
            })
            .collect()
    }
}

fn limits(request: &Request<'_>) -> Result<Limits, CniError> {
    let of = |map: &Map<String, Value>| {
        let number = |name: &str| match field(map, name) {
            None => Ok(0),
            Some(value) => value.as_u64().ok_or_else(|| CniError::decode(format!("{name} must be a whole number of at least 0"))),
        };
        let limit = |rate: &str, burst: &str| match (number(rate)?, number(burst)?) {
            (0, 0) => Ok(None),
            (_, 0) => Err(CniError::config(format!("{burst}: if rate is set, burst must also be set: {rate} is"))),
            (0, _) => Err(CniError::config(format!("{rate}: if burst is set, rate must also be set: {burst} is"))),
            (_, burst_bits) if burst_bits / 8 >= u64::from(u32::MAX) => {
                Err(CniError::config(format!("{burst} must be less than 34359738360 bits (4 GiB)")))
            }
            (rate_bits, burst) if rate_bits >= 8 => Ok(Some(Limit { rate: rate_bits, burst })),
            _ => Err(CniError::config(format!("{rate} must be at least 8 bits a second"))),
        };
        Ok(Limits { ingress: limit("ingressRate", "ingressBurst")?, egress: limit("egressRate", "egressBurst")? })
    };
    // The configuration takes precedence over the runtime.
    let own = of(request.conf)?;
    if own != Limits::default() {
        return Ok(own);
    }
    let runtime = request.runtime_config()?.map(|runtime| object(runtime, "bandwidth")).transpose()?.flatten();
    runtime.map_or(Ok(Limits::default()), of)
}

/// The possible names of the attachment's intermediate link: the reference plugin's, which all interfaces of the container
/// in this network would share, and a name of its own for further interfaces.
fn ifb_names(request: &Request<'_>) -> [IfName; 2] {
    let name = |ifname: &str| {
        let digest = Sha512::digest(format!("{}{}{ifname}", request.name, request.container_id));
        let mut name = format!("bwp{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        name.truncate(15);
        name.parse().expect("it has 15 bytes, none of them special")
    };
    [name(""), name(request.ifname)]
}

/// The alias of an intermediate link, which names its owner. Links of the reference plugin have no alias.
fn alias(request: &Request<'_>) -> String {
    let tag = request.attachment().tag().0;
    format!("cni:{}", tag.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// Creates the attachment's intermediate link, or returns the one that an earlier ADD left.
fn create_ifb(host: &mut Socket, request: &Request<'_>, mtu: u32) -> Result<IfName, CniError> {
    let [shared, own] = ifb_names(request);
    for name in [shared, own] {
        match link::create_ifb(host, name, mtu, &alias(request)) {
            Ok(()) => return Ok(name),
            Err(error) if error.is_exists() => {}
            Err(error) => return Err(failed(format!("create {name}"))(error)),
        }
        let holder = link::alias(host, name).map_err(failed(format!("read {name}")))?.unwrap_or_default();
        // A link without an alias was created by another implementation, which knows only one interface per container.
        if name == own || holder == alias(request) || holder.is_empty() && request.ifname == "eth0" {
            return Ok(name);
        }
    }
    Ok(own)
}

/// The name of the attachment's intermediate link; `None` if there is none.
fn find_ifb(host: &mut Socket, request: &Request<'_>) -> Result<Option<IfName>, CniError> {
    let [shared, own] = ifb_names(request);
    let mut holder = |name: IfName| link::alias(host, name).map_err(failed(format!("read {name}")));
    if holder(own)?.is_some() {
        return Ok(Some(own));
    }
    Ok(holder(shared)?.filter(|holder| holder.is_empty() || *holder == alias(request)).map(|_| shared))
}

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => add(request).map(Some),
        Command::Del => {
            let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
            let Some(name) = find_ifb(&mut host, request)? else { return Ok(None) };
            match link::delete(&mut host, name) {
                Err(error) if !error.is_not_found() => Err(failed(format!("delete {name}"))(error)),
                _ => Ok(None),
            }
        }
        Command::Check => check(request).map(|()| None),
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

/// The host's end of the attachment's veth pair. The result must name it: an index alone may be that of another link, if the
/// container's peer is in a third namespace.
fn host_end(host: &mut Socket, request: &Request<'_>, netns: &Netns, result: &CniResult) -> Result<LinkInfo, CniError> {
    let name = ifname(request)?;
    let container = in_container(netns, |socket| link::get(socket, name).map_err(failed(format!("read {name} in the container"))))?;
    let container = container.ok_or_else(|| CniError::failed(format!("{name} does not exist in the container")))?;
    let peer = link::get_index(host, container.link).map_err(failed("read the host's end"))?;
    let peer = peer.filter(|peer| peer.kind == "veth");
    let peer = peer.ok_or_else(|| CniError::failed(format!("{name} has no peer on the host: it must be a veth")))?;
    match result.interfaces.iter().any(|interface| interface.sandbox.is_empty() && interface.name == peer.name.as_str()) {
        true => Ok(peer),
        false => Err(CniError::failed(format!("prevResult: it does not list {}, the host's end of {name}", peer.name))),
    }
}

fn add(request: &Request<'_>) -> Result<CniResult, CniError> {
    let (limits, mut result) = (limits(request)?, previous(request)?);
    if limits == Limits::default() {
        return Ok(result);
    }
    let netns = open_netns(request)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let veth = host_end(&mut host, request, &netns, &result)?;
    limits.warnings(veth.mtu).iter().for_each(|warning| eprintln!("bandwidth: {warning}"));
    if let Some(ingress) = limits.ingress {
        qdisc::limit(&mut host, veth.index, ingress.bucket()).map_err(failed(format!("limit what {} sends", veth.name)))?;
    }
    if let Some(egress) = limits.egress {
        let name = create_ifb(&mut host, request, veth.mtu)?;
        let between = link::get(&mut host, name).map_err(failed(format!("read {name}")))?;
        let between = between.ok_or_else(|| CniError::failed(format!("{name} was deleted at once")))?;
        let limited =
            qdisc::redirect(&mut host, veth.index, between.index).and_then(|()| qdisc::limit(&mut host, between.index, egress.bucket()));
        if let Err(error) = limited {
            let _ = link::delete(&mut host, name);
            return Err(failed(format!("limit what {} receives", veth.name))(error));
        }
        result.interfaces.push(Interface {
            name: name.to_string(),
            mac: between.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            ..Interface::default()
        });
    }
    Ok(result)
}

fn check(request: &Request<'_>) -> Result<(), CniError> {
    let (limits, result) = (limits(request)?, previous(request)?);
    if limits == Limits::default() {
        return Ok(());
    }
    let netns = open_netns(request)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let veth = host_end(&mut host, request, &netns, &result)?;
    let mut is_limited = |index: u32, limit: Limit, what: &str| {
        let found = qdisc::get(&mut host, index).map_err(failed("read the limits"))?;
        match found.is_some_and(|found| found.rate == limit.bucket().rate) {
            true => Ok(()),
            false => Err(CniError::failed(format!("the limit on what the container {what} is missing"))),
        }
    };
    if let Some(ingress) = limits.ingress {
        is_limited(veth.index, ingress, "receives")?;
    }
    if let Some(egress) = limits.egress {
        let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
        let name = find_ifb(&mut socket, request)?;
        let between = name.map(|name| link::get(&mut socket, name)).transpose().map_err(failed("read the intermediate link"))?.flatten();
        is_limited(between.map_or(0, |link| link.index), egress, "sends")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_below_a_frame_is_a_warning() {
        let limits = |burst| Limits { ingress: None, egress: Some(Limit { rate: 8_000, burst }) };
        assert!(limits((1450 + 14) * 8).warnings(1450).is_empty() && Limits::default().warnings(1450).is_empty());
        let warnings = limits((1450 + 14) * 8 - 1).warnings(1450);
        assert!(warnings.len() == 1 && warnings[0].starts_with("egressBurst: 11711 bits"), "{warnings:?}");
    }
}
