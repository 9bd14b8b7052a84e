//! `bandwidth`: limits what an attachment receives and sends by token buckets: on the host's end of its veth pair, and on
//! an intermediate link for what that end receives (specification, section 7.6).

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

/// How long a packet may wait for its turn.
const LATENCY_MS: u64 = 25;

/// Bits a second and bits of a burst.
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

/// What the container receives, and what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Limits {
    ingress: Option<Limit>,
    egress: Option<Limit>,
}

fn limits(request: &Request) -> Result<Limits, CniError> {
    let of = |map: &Map<String, Value>| {
        let number = |name: &str| match field(map, name) {
            None => Ok(0),
            Some(value) => value.as_u64().ok_or_else(|| CniError::decode(format!("{name}: it must be a whole number of at least 0"))),
        };
        let limit = |rate: &str, burst: &str| match (number(rate)?, number(burst)?) {
            (0, 0) => Ok(None),
            (_, 0) => Err(CniError::config(format!("{burst}: it must be more than 0 where {rate} is"))),
            (0, _) => Err(CniError::config(format!("{rate}: it must be more than 0 where {burst} is"))),
            (_, burst_bits) if burst_bits / 8 >= 1 << 32 => Err(CniError::config(format!("{burst}: it must be less than 4 GiB"))),
            (rate_bits, burst) if rate_bits >= 8 => Ok(Some(Limit { rate: rate_bits, burst })),
            _ => Err(CniError::config(format!("{rate}: it must be at least 8 bits a second"))),
        };
        Ok(Limits { ingress: limit("ingressRate", "ingressBurst")?, egress: limit("egressRate", "egressBurst")? })
    };
    // What the configuration says goes before what the runtime says.
    let own = of(&request.conf)?;
    if own != Limits::default() {
        return Ok(own);
    }
    let runtime = object(&request.conf, "runtimeConfig")?.map(|runtime| object(runtime, "bandwidth")).transpose()?.flatten();
    runtime.map_or(Ok(Limits::default()), of)
}

/// The name of the intermediate link: a prefix, and as much of a digest as a name takes.
fn ifb(request: &Request) -> IfName {
    // The usual interface has upstream's name for it, so that its plugin and ours can undo what the other did.
    let ifname = if request.ifname == "eth0" { "" } else { &request.ifname };
    let digest = Sha512::digest(format!("{}{}{ifname}", request.name, request.container_id));
    let mut name = format!("bwp{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    name.truncate(15);
    name.parse().expect("it has 15 bytes, none of them special")
}

pub(crate) fn run(request: &Request) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => add(request).map(Some),
        Command::Del => {
            let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
            match link::delete(&mut socket, ifb(request)) {
                Err(error) if !error.is_not_found() => Err(failed(format!("delete {}", ifb(request)))(error)),
                _ => Ok(None),
            }
        }
        Command::Check => check(request).map(|()| None),
        Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

/// The host's end of the attachment's veth pair.
fn host_end(host: &mut Socket, request: &Request, netns: &Netns) -> Result<LinkInfo, CniError> {
    let name = ifname(request)?;
    let container = in_container(netns, |socket| link::get(socket, name).map_err(failed(format!("read {name} in the container"))))?;
    let container = container.ok_or_else(|| CniError::failed(format!("there is no {name} in the container")))?;
    let peer = link::get_index(host, container.link).map_err(failed("read the host's end"))?;
    peer.filter(|peer| peer.kind == "veth")
        .ok_or_else(|| CniError::failed(format!("{name} has no other end on the host: it must be a veth")))
}

fn add(request: &Request) -> Result<CniResult, CniError> {
    let (limits, mut result) = (limits(request)?, previous(request)?);
    if limits == Limits::default() {
        return Ok(result);
    }
    let netns = open_netns(request)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let veth = host_end(&mut host, request, &netns)?;
    if let Some(ingress) = limits.ingress {
        qdisc::limit(&mut host, veth.index, ingress.bucket()).map_err(failed(format!("limit what {} sends", veth.name)))?;
    }
    if let Some(egress) = limits.egress {
        let name = ifb(request);
        match link::create_ifb(&mut host, name, veth.mtu) {
            Err(error) if !error.is_exists() => return Err(failed(format!("create {name}"))(error)),
            _ => {}
        }
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

fn check(request: &Request) -> Result<(), CniError> {
    let (limits, _) = (limits(request)?, previous(request)?);
    if limits == Limits::default() {
        return Ok(());
    }
    let netns = open_netns(request)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let veth = host_end(&mut host, request, &netns)?;
    let mut is_limited = |index: u32, limit: Limit, what: &str| {
        let found = qdisc::get(&mut host, index).map_err(failed("read the limits"))?;
        match found.is_some_and(|found| found.rate == limit.bucket().rate) {
            true => Ok(()),
            false => Err(CniError::failed(format!("the limit on what the container {what} is gone"))),
        }
    };
    if let Some(ingress) = limits.ingress {
        is_limited(veth.index, ingress, "receives")?;
    }
    if let Some(egress) = limits.egress {
        let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
        let between = link::get(&mut socket, ifb(request)).map_err(failed("read the intermediate link"))?;
        is_limited(between.map_or(0, |link| link.index), egress, "sends")?;
    }
    Ok(())
}
