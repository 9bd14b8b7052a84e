//! `bridge`: a veth pair between the container and a bridge of the host (specification, section 7.3). What an ADD made
//! is undone when a later step fails; the bridge itself is never deleted.

mod config;
mod masq;
mod vlan;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ::flannel::{Cidr, Family, IfName, Mac};
use kernel::link::{self, LinkInfo, OPER_UNKNOWN, OPER_UP, VethEnd};
use kernel::netlink::{NetlinkError, Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, masquerade, route, spoofcheck, sysctl};
use serde_json::{Map, Value};

use crate::delegate;
use crate::lock;
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, boolean, field, number, object, string};
use crate::result::{CniResult, Interface, Route};
use config::Config;
use vlan::Vlans;

/// How long the host's end may take to become operational.
const OPERATIONAL: Duration = Duration::from_secs(3);
/// How long the look for duplicate addresses may take.
const UNIQUE: Duration = Duration::from_secs(5);

pub(crate) fn run(request: &Request) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => add(request, &Config::new(request)?).map(Some),
        Command::Del => del(request).map(|()| None),
        Command::Check => check(request, &Config::new(request)?).map(|()| None),
        Command::Gc => {
            let valid: Vec<String> =
                request.valid_attachments()?.iter().map(|(container, ifname)| format!("{ifname}:{container}")).collect();
            // Both are tried, as for a DEL.
            let addresses = ipam(request, Command::Gc, None);
            if Config::new(request)?.ip_masq.is_some() {
                let notes = lock::notes()?;
                notes.retain_masquerade(&request.name, &valid);
                masquerade::retain(&request.name, &valid).map_err(failed("remove the masquerading of containers that are gone"))?;
            }
            addresses.map(|_| None)
        }
        Command::Status => {
            Config::new(request)?;
            ipam(request, Command::Status, None).map(|_| None)
        }
        Command::Version => Ok(None),
    }
}

/// Calls the IPAM plugin of the configuration, if there is one, with the whole configuration.
fn ipam(request: &Request, command: Command, previous: Option<&Value>) -> Result<Option<CniResult>, CniError> {
    let kind = object(&request.conf, "ipam")?.map(|ipam| string(ipam, "type")).transpose()?.flatten();
    let Some(kind) = kind.filter(|kind| !kind.is_empty()) else { return Ok(None) };
    let mut conf: Map<String, Value> = request.conf.clone();
    if let Some(previous) = previous {
        conf.insert("prevResult".to_owned(), previous.clone());
    }
    delegate::call_as(kind, request, command, conf, "ipam.type")
}

/// Names the act and the object of a kernel error.
fn failed(act: impl std::fmt::Display) -> impl FnOnce(NetlinkError) -> CniError {
    move |error| CniError::failed(format!("cannot {act}: {error}"))
}

/// What is undone, last first, unless the ADD succeeds.
struct Undo<'a> {
    request: &'a Request,
    veth: Option<IfName>,
    ipam: bool,
    masquerade: bool,
    spoofcheck: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // The error that led here is the one to report; what fails to be undone now, the container's DEL undoes.
        if self.masquerade {
            let _ = masq::remove(self.request);
        }
        if self.spoofcheck {
            let _ = spoofcheck::remove(&self.request.container_id, &self.request.ifname);
        }
        if let Some(veth) = self.veth {
            let _ = Socket::open(Protocol::Route).and_then(|mut socket| link::delete(&mut socket, veth));
        }
        if self.ipam {
            let _ = ipam(self.request, Command::Del, None);
        }
    }
}

fn add(request: &Request, config: &Config) -> Result<CniResult, CniError> {
    let netns = open_netns(request)?;
    let ifname: IfName = request.ifname.parse().map_err(|error| CniError::environment(format!("CNI_IFNAME: {error}")))?;
    let mut undo = Undo { request, veth: None, ipam: false, masquerade: false, spoofcheck: false };
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;

    let bridge = ensure_bridge(&mut host, config)?;
    let veth = create_veth(&mut host, config, &netns, ifname)?;
    undo.veth = Some(veth.name);

    // Listening begins before the link goes up, so that its becoming operational is not missed.
    link::enslave(&mut host, veth.index, bridge.index, config.port)
        .map_err(failed(format!("make {} a port of {}", veth.name, config.bridge)))?;
    write_sysctl(&format!("net/ipv6/conf/{}/accept_ra", veth.name), "0")?;
    if let Some(vlans) = &config.vlans {
        vlans.set_port(&mut host, &veth)?;
    }
    if config.spoofcheck {
        undo.spoofcheck = true;
        let mac = container_mac(&netns, ifname)?;
        spoofcheck::add(&request.container_id, &request.ifname, veth.name, mac).map_err(failed("hold the container to its MAC"))?;
    }

    let mut result = CniResult::default();
    if config.ipam.is_some() {
        result = ipam(request, Command::Add, None)?.unwrap_or_default();
        // Not before: a refusal may be about an address that an earlier ADD of this container holds.
        undo.ipam = true;
        if result.ips.is_empty() {
            return Err(CniError::failed("the IPAM plugin returned no address"));
        }
    }
    let gateways = complete(&mut result, config);
    let container = configure_container(&netns, ifname, &result, &gateways, config)?;
    let mut more = Vec::new();
    if config.is_gateway && !gateways.is_empty() {
        // With a VLAN the gateway is on a link of its own, which is a port of that VLAN.
        let holder = match config.vlans.as_ref().and_then(Vlans::own) {
            Some(vlan) => {
                let (gateway, port) = vlan::gateway(&mut host, &bridge, vlan, config.mtu)?;
                more = vec![gateway.clone(), port];
                gateway
            }
            None => bridge.clone(),
        };
        for (gateway, len) in &gateways {
            set_gateway(&mut host, &holder, config, Cidr { addr: *gateway, len: *len })?;
            let family = Family::of(*gateway);
            // A kernel that does not answer is asked in the other way.
            if !sysctl::forwards(&mut host, family).unwrap_or(false) {
                write_sysctl(family.forwarding(), "1")?;
            }
        }
    }
    if let Some(backend) = config.ip_masq.filter(|_| !result.ips.is_empty()) {
        undo.masquerade = true;
        let addresses: Vec<Cidr> = result.ips.iter().map(|ip| ip.address).collect();
        masq::add(request, backend, &addresses, veth.index)?;
    }
    // A container's end that stays down keeps the host's end from becoming operational.
    if !config.leave_down {
        await_operational(&mut host, &veth)?;
    }

    let bridge = link::get_index(&mut host, bridge.index).map_err(failed("read the bridge"))?.unwrap_or(bridge);
    let sandbox = request.netns.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
    let interface = |link: &LinkInfo, sandbox: &str| Interface {
        name: link.name.to_string(),
        mac: link.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        sandbox: sandbox.to_owned(),
        ..Interface::default()
    };
    result.interfaces = vec![interface(&bridge, ""), interface(&veth, ""), interface(&container, &sandbox)];
    result.interfaces.extend(more.iter().map(|link| interface(link, "")));
    result.ips.iter_mut().for_each(|ip| ip.interface = Some(2));
    if let Some(dns) = object(&request.conf, "dns")?.filter(|dns| !dns.is_empty()) {
        result.dns = dns.clone();
    }
    (undo.veth, undo.ipam, undo.masquerade, undo.spoofcheck) = (None, false, false, false);
    Ok(result)
}

fn attachment(request: &Request) -> String {
    format!("{}:{}", request.ifname, request.container_id)
}

fn write_sysctl(name: &str, value: &str) -> Result<(), CniError> {
    sysctl::write(name, value).map_err(|error| CniError::failed(error.to_string()))
}

fn ensure_bridge(host: &mut Socket, config: &Config) -> Result<LinkInfo, CniError> {
    let name = config.bridge;
    let look = |host: &mut Socket| link::get(host, name).map_err(failed(format!("read the bridge {name}")));
    let found = match look(host)? {
        Some(found) => found,
        None => {
            match link::create_bridge(host, name, config.mtu) {
                // Another ADD was faster.
                Err(error) if !error.is_exists() => return Err(failed(format!("create the bridge {name}"))(error)),
                _ => {}
            }
            write_sysctl(&format!("net/ipv6/conf/{name}/accept_ra"), "0")?;
            // While its link-local address is looked for a duplicate, two seconds, the bridge resolves no pod.
            write_sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
            look(host)?.ok_or_else(|| CniError::failed(format!("the bridge {name} was deleted at once")))?
        }
    };
    if found.kind != "bridge" {
        return Err(CniError::config(format!("bridge: {name:?} already exists but is not a bridge: choose another name")));
    }
    if config.vlans.is_some() {
        link::set_vlan_filtering(host, found.index)
            .map_err(failed(format!("make {name} tell VLANs apart (does this kernel have CONFIG_BRIDGE_VLAN_FILTERING?)")))?;
    }
    if config.promiscuous && !found.promiscuous {
        link::set_promiscuous(host, found.index, true).map_err(failed(format!("make {name} promiscuous")))?;
    }
    if !found.up {
        link::set_up(host, found.index, true).map_err(failed(format!("set {name} up")))?;
    }
    Ok(found)
}

/// Creates the pair with its ends where they belong, and returns the host's end.
fn create_veth(host: &mut Socket, config: &Config, netns: &Netns, ifname: IfName) -> Result<LinkInfo, CniError> {
    use std::os::fd::AsFd;
    for _ in 0..10 {
        let name: IfName = format!("veth{:08x}", fastrand::u32(..)).parse().expect("it has 12 bytes");
        let (this, peer) =
            (VethEnd { name, mac: None, netns: None }, VethEnd { name: ifname, mac: config.mac, netns: Some(netns.as_fd()) });
        match link::create_veth(host, config.mtu, this, peer) {
            Ok(()) => {
                return link::get(host, name)
                    .map_err(failed(format!("read {name}")))?
                    .ok_or_else(|| CniError::failed(format!("{name} was deleted at once")));
            }
            Err(error) if error.is_exists() => {
                // Which of the two names is taken? The container's is final.
                let taken = netns.run(|| Socket::open(Protocol::Route).and_then(|mut socket| link::get(&mut socket, ifname)));
                if matches!(taken, Ok(Ok(Some(_)))) {
                    return Err(CniError::failed(format!("container veth name ({ifname:?}) already exists")));
                }
            }
            Err(error) => return Err(failed(format!("create a veth pair for {ifname}"))(error)),
        }
    }
    Err(CniError::failed("no free name for the host's end of the veth pair"))
}

/// Fills in gateways and the default route, and returns each family's gateway with its prefix length.
fn complete(result: &mut CniResult, config: &Config) -> Vec<(IpAddr, u8)> {
    let mut gateways: Vec<(IpAddr, u8)> = Vec::new();
    for ip in &mut result.ips {
        if config.is_gateway && ip.gateway.is_none() {
            ip.gateway = Some(ip.address.subnet().first_host());
        }
        if let Some(gateway) = ip.gateway.filter(|gateway| !gateways.iter().any(|(known, _)| known == gateway)) {
            gateways.push((gateway, ip.address.len));
        }
    }
    if config.is_default_gateway {
        for family in Family::ALL {
            let gateway = gateways.iter().find(|(gateway, _)| Family::of(*gateway) == family).map(|(gateway, _)| *gateway);
            let has_default =
                result.routes.iter().any(|route| route.dst.family() == family && route.dst.prefix_len() == 0 && route.gw.is_some());
            if let Some(gateway) = gateway.filter(|_| !has_default) {
                let dst = Cidr { addr: family.unspecified(), len: 0 }.subnet();
                result.routes.push(Route { dst, gw: Some(gateway), more: Map::new() });
            }
        }
    }
    gateways
}

/// Addresses, state and routes of the container's end. The namespace is entered once.
fn configure_container(
    netns: &Netns,
    ifname: IfName,
    result: &CniResult,
    gateways: &[(IpAddr, u8)],
    config: &Config,
) -> Result<LinkInfo, CniError> {
    let configure = || {
        let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink in the container"))?;
        let look = |socket: &mut Socket| {
            let found = link::get(socket, ifname).map_err(failed(format!("read {ifname} in the container")))?;
            found.ok_or_else(|| CniError::failed(format!("{ifname} was deleted in the container")))
        };
        let index = look(&mut socket)?.index;
        if config.ipam.is_none() {
            if !config.leave_down {
                link::set_up(&mut socket, index, true).map_err(failed(format!("set {ifname} up in the container")))?;
            }
            return look(&mut socket);
        }
        // The address is ours alone: no need to wait for duplicates, unless told so; the neighbours shall hear of it.
        let dad = if config.dad { "1" } else { "0" };
        write_sysctl(&format!("net/ipv6/conf/{ifname}/accept_dad"), dad)?;
        if config.dad {
            write_sysctl(&format!("net/ipv6/conf/{ifname}/enhanced_dad"), "1")?;
        }
        link::set_ipv4_conf(&mut socket, index, link::ARP_NOTIFY, 1)
            .map_err(failed(format!("let {ifname} tell of itself in the container")))?;
        if result.ips.iter().any(|ip| Family::of(ip.address.addr) == Family::V6) {
            write_sysctl(&format!("net/ipv6/conf/{ifname}/disable_ipv6"), "0")?;
            write_sysctl("net/ipv6/conf/lo/disable_ipv6", "0")?;
            write_sysctl(&format!("net/ipv6/conf/{ifname}/keep_addr_on_down"), "1")?;
        }
        for ip in &result.ips {
            let added =
                if config.dad { addr::add_with_dad(&mut socket, index, ip.address) } else { addr::add(&mut socket, index, ip.address) };
            added.map_err(failed(format!("add {} to {ifname} in the container", ip.address)))?;
        }
        link::set_up(&mut socket, index, true).map_err(failed(format!("set {ifname} up in the container")))?;
        if config.dad && gateways.iter().any(|(gateway, _)| gateway.is_ipv6()) {
            await_unique(&mut socket, index)?;
        }
        for Route { dst, gw, more } in &result.routes {
            let options = route_options(more)?;
            // A destination on the link has no gateway.
            let on_link = options.scope == Some(253);
            let gateway = gw.or_else(|| gateways.iter().map(|(gateway, _)| *gateway).find(|gateway| Family::of(*gateway) == dst.family()));
            let gateway = gateway.filter(|_| !on_link || gw.is_some());
            route::add_with(&mut socket, *dst, gateway, index, options)
                .map_err(failed(format!("add the route to {dst} in the container")))?;
        }
        look(&mut socket)
    };
    netns.run(configure).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?
}

/// What a route of the configuration says beside destination and gateway. What is unknown is left alone, as Go does it.
fn route_options(more: &Map<String, Value>) -> Result<route::Options, CniError> {
    let positive = |name: &str| number(more, name).map(|value| value.filter(|value| *value > 0));
    let scope =
        number(more, "scope")?.map(|scope| u8::try_from(scope).map_err(|_| CniError::config("routes: scope: it must be at most 255")));
    Ok(route::Options {
        mtu: positive("mtu")?,
        advmss: positive("advmss")?,
        priority: positive("priority")?,
        table: number(more, "table")?,
        scope: scope.transpose()?,
    })
}

/// Waits until the kernel has found no duplicate of the interface's IPv6 addresses.
fn await_unique(socket: &mut Socket, index: u32) -> Result<(), CniError> {
    let end = Instant::now() + UNIQUE;
    loop {
        let addrs = addr::list(socket, index).map_err(failed("read the container's addresses"))?;
        let own = || addrs.iter().filter(|a| a.index == index && a.addr.cidr.addr.is_ipv6());
        if let Some(twice) = own().find(|a| a.duplicate) {
            return Err(CniError::failed(format!("{} is somebody else's already (duplicate address detection)", twice.addr.cidr.addr)));
        }
        if !own().any(|a| a.tentative) {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(CniError::failed(format!("duplicate address detection did not end within {} s", UNIQUE.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The MAC of the container's end.
fn container_mac(netns: &Netns, ifname: IfName) -> Result<Mac, CniError> {
    let look = || Socket::open(Protocol::Route).and_then(|mut socket| link::get(&mut socket, ifname));
    let found = netns.run(look).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?;
    let found = found.map_err(failed(format!("read {ifname} in the container")))?;
    found.and_then(|link| link.mac).ok_or_else(|| CniError::failed(format!("{ifname} has no MAC")))
}

/// Puts the gateway's address on the bridge and pins the bridge's MAC, which would follow its ports otherwise.
fn set_gateway(host: &mut Socket, bridge: &LinkInfo, config: &Config, gateway: Cidr) -> Result<(), CniError> {
    let name = bridge.name;
    let addrs = addr::list(host, bridge.index).map_err(failed(format!("read the addresses of {name}")))?;
    // One that it has beside does no harm.
    if addrs.iter().any(|a| a.addr.cidr == gateway) {
        return Ok(());
    }
    let same_family = addrs.iter().map(|a| a.addr.cidr).filter(|have| Family::of(have.addr) == Family::of(gateway.addr));
    for have in same_family {
        // Several IPv6 networks may share a bridge; of IPv4 there is one.
        if have.addr.is_ipv6() && !have.subnet().overlaps(gateway.subnet()) {
            continue;
        }
        if !config.force_address {
            return Err(CniError::failed(format!(
                "{:?} already has an IP address different from {gateway}: it has {have}; delete that, or set forceAddress",
                name.as_str()
            )));
        }
        addr::delete(host, bridge.index, have).map_err(failed(format!("remove {have} from {name}")))?;
    }
    match addr::add(host, bridge.index, gateway) {
        // Another ADD was faster.
        Err(error) if !error.is_exists() => return Err(failed(format!("add {gateway} to {name}"))(error)),
        _ => {}
    }
    let current = link::get_index(host, bridge.index).map_err(failed(format!("read {name}")))?;
    match current.and_then(|link| link.mac) {
        Some(mac) => link::set_mac(host, bridge.index, mac).map_err(failed(format!("pin the MAC of {name}"))),
        None => Ok(()),
    }
}

/// Waits until the host's end forwards: the bridge lets a port in when its operational state says so, which comes
/// from a kernel worker a moment after it was set up.
fn await_operational(host: &mut Socket, veth: &LinkInfo) -> Result<(), CniError> {
    use std::os::fd::AsFd;
    let end = Instant::now() + OPERATIONAL;
    let mut is_up = || match link::get_index(host, veth.index).map_err(failed(format!("read {}", veth.name)))? {
        Some(link) => Ok(matches!(link.operstate, OPER_UP | OPER_UNKNOWN)),
        None => Err(CniError::failed(format!("{} was deleted by somebody", veth.name))),
    };
    // As a rule it is by now, and nobody has to listen.
    if is_up()? {
        return Ok(());
    }
    let mut news = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    news.join(1).map_err(failed("listen to links"))?;
    loop {
        if is_up()? {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        let fd = news.as_fd();
        let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
        if left.is_zero() || rustix::event::poll(&mut poll, Some(&timeout)).is_ok_and(|ready| ready == 0) {
            return Err(CniError::failed(format!("{} did not become operational within {} s", veth.name, OPERATIONAL.as_secs())));
        }
        // What the news say is read from the link itself; lost ones do no harm.
        while news.notifications(false, |_| {}).is_ok() {}
    }
}

fn del(request: &Request) -> Result<(), CniError> {
    // First, because the kernel is done with it by the time that the link is gone. What the container still sends meanwhile
    // comes to nothing in any case.
    let masquerades = boolean(&request.conf, "ipMasq");
    let rules = masquerades.and_then(|on| if on == Some(true) { masq::remove(request).map(Some) } else { Ok(None) });
    delete_link(request)?;
    // All are tried: what is left of one must not keep the other.
    let addresses = ipam(request, Command::Del, None);
    if boolean(&request.conf, "macspoofchk")?.unwrap_or(false)
        && let Err(error) = spoofcheck::remove(&request.container_id, &request.ifname)
    {
        eprintln!("bridge: cannot remove what held the container to its MAC: {error}");
    }
    addresses?;
    rules.map(drop)
}

/// Deletes the container's end, if there is one: a namespace that is gone took it along.
fn delete_link(request: &Request) -> Result<(), CniError> {
    let netns = request.netns.as_deref().and_then(|path| Netns::open(path).ok());
    if let (Some(netns), Ok(ifname)) = (netns, request.ifname.parse::<IfName>()) {
        let deleted = netns.run(|| Socket::open(Protocol::Route).and_then(|mut socket| link::delete(&mut socket, ifname)));
        match deleted.map_err(|error| CniError::failed(format!("cannot enter CNI_NETNS: {error}")))? {
            Err(error) if !error.is_not_found() => return Err(failed(format!("delete {ifname} in the container"))(error)),
            _ => {}
        }
    }
    Ok(())
}

fn check(request: &Request, config: &Config) -> Result<(), CniError> {
    let previous = field(&request.conf, "prevResult").ok_or_else(|| CniError::config("prevResult: CHECK needs it"))?;
    ipam(request, Command::Check, Some(previous))?;
    let want = CniResult::parse(previous)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let bridge = link::get(&mut host, config.bridge).map_err(failed("read the bridge"))?;
    if bridge.as_ref().is_none_or(|bridge| bridge.kind != "bridge") {
        return Err(CniError::failed(format!("the bridge {} is gone", config.bridge)));
    }
    if config.promiscuous && bridge.as_ref().is_some_and(|bridge| !bridge.promiscuous) {
        return Err(CniError::failed(format!("the bridge {} is not promiscuous", config.bridge)));
    }
    let netns = open_netns(request)?;
    let ifname: IfName = request.ifname.parse().map_err(|error| CniError::environment(format!("CNI_IFNAME: {error}")))?;
    let look = || {
        let mut socket = Socket::open(Protocol::Route)?;
        let Some(found) = link::get(&mut socket, ifname)? else { return Ok(None) };
        let mut routes = Vec::new();
        for family in Family::ALL {
            routes.extend(route::list(&mut socket, family, route::Filter::Oif(found.index))?);
        }
        let addrs = addr::list(&mut socket, found.index)?;
        Ok(Some((found, addrs, routes)))
    };
    let found = netns.run(look).map_err(|error| CniError::failed(format!("cannot enter CNI_NETNS: {error}")))?;
    let Some((container, addrs, routes)) = found.map_err(failed(format!("read {ifname} in the container")))? else {
        return Err(CniError::failed(format!("{ifname} is gone from the container")));
    };
    // The host's end that ADD told of must still be a port of the bridge.
    if let Some(told) = want.interfaces.get(1).filter(|told| told.sandbox.is_empty()) {
        let port =
            told.name.parse().ok().map(|name| link::get(&mut host, name)).transpose().map_err(failed("read the host's end"))?.flatten();
        if port.is_none_or(|port| bridge.as_ref().is_none_or(|bridge| port.master != bridge.index)) {
            return Err(CniError::failed(format!("{} is no port of {}", told.name, config.bridge)));
        }
    }
    let told = want.interfaces.iter().find(|i| i.name == ifname.as_str() && !i.sandbox.is_empty());
    if let Some(told) = told.filter(|told| container.mac.map(|mac| mac.to_string()).as_deref() != Some(&told.mac)) {
        return Err(CniError::failed(format!("{ifname} has not the MAC {}", told.mac)));
    }
    for ip in &want.ips {
        if !addrs.iter().any(|a| a.index == container.index && a.addr.cidr == ip.address) {
            return Err(CniError::failed(format!("{} is gone from {ifname} in the container", ip.address)));
        }
    }
    // Of other tables than the main one nothing was read.
    let in_main = |route: &&Route| route.more.get("table").and_then(Value::as_u64).is_none_or(|table| table == 0 || table == 254);
    for wanted in want.routes.iter().filter(in_main) {
        if !routes.iter().any(|have| have.dst == wanted.dst && wanted.gw.is_none_or(|gw| have.via == Some(gw))) {
            return Err(CniError::failed(format!("the route to {} is gone from the container", wanted.dst)));
        }
    }
    Ok(())
}
