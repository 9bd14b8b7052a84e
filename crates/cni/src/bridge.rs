//! `bridge`: a veth pair between the container and a bridge of the host (specification, section 7.3). What an ADD made
//! is undone when a later step fails; the bridge itself is never deleted.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ::flannel::{Cidr, Family, IfName, Mac};
use kernel::link::{self, LinkInfo, OPER_UNKNOWN, OPER_UP, PortConfig, VethEnd};
use kernel::netlink::{NetlinkError, Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, masquerade, route, sysctl};
use serde_json::{Map, Value};

use crate::delegate;
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, boolean, field, number, object, string};
use crate::result::{CniResult, Interface, Route};

/// How long the host's end may take to become operational.
const OPERATIONAL: Duration = Duration::from_secs(3);

/// The validated configuration.
struct Config {
    bridge: IfName,
    is_gateway: bool,
    is_default_gateway: bool,
    force_address: bool,
    ip_masq: bool,
    mtu: u32,
    port: PortConfig,
    mac: Option<Mac>,
    /// The IPAM plugin's name; `None` for an attachment without addresses.
    ipam: Option<String>,
}

impl Config {
    fn new(request: &Request) -> Result<Config, CniError> {
        let conf = &request.conf;
        let flag = |name: &str| boolean(conf, name).map(Option::unwrap_or_default);
        for name in ["promiscMode", "macspoofchk", "enabledad", "disableContainerInterface", "preserveDefaultVlan"] {
            // preserveDefaultVlan is on by default and means nothing without a VLAN.
            if name != "preserveDefaultVlan" && flag(name)? {
                return Err(CniError::unsupported(format!("{name}: it is not supported yet: set it to false")));
            }
        }
        if number(conf, "vlan")?.unwrap_or(0) != 0 || field(conf, "vlanTrunk").is_some() {
            return Err(CniError::unsupported("vlan, vlanTrunk: VLANs are not supported yet: leave them out"));
        }
        if string(conf, "ipMasqBackend")?.is_some_and(|backend| backend == "iptables") {
            return Err(CniError::unsupported("ipMasqBackend: iptables is not supported yet: leave it out or set it to nftables"));
        }
        let bridge = string(conf, "bridge")?.filter(|name| !name.is_empty()).unwrap_or("cni0");
        let is_default_gateway = flag("isDefaultGateway")?;
        let ipam = object(conf, "ipam")?.map(|ipam| string(ipam, "type")).transpose()?.flatten();
        Ok(Config {
            bridge: bridge.parse().map_err(|error| CniError::config(format!("bridge: {error}")))?,
            is_gateway: flag("isGateway")? || is_default_gateway,
            is_default_gateway,
            force_address: flag("forceAddress")?,
            ip_masq: flag("ipMasq")?,
            mtu: number(conf, "mtu")?.unwrap_or(0),
            port: PortConfig { hairpin: flag("hairpinMode")?, isolated: flag("portIsolation")? },
            mac: mac(request)?,
            ipam: ipam.filter(|kind| !kind.is_empty()).map(ToOwned::to_owned),
        })
    }
}

/// The container's MAC: of the runtime, else of the arguments in the configuration, else of `CNI_ARGS`.
fn mac(request: &Request) -> Result<Option<Mac>, CniError> {
    let runtime = object(&request.conf, "runtimeConfig")?.map(|runtime| string(runtime, "mac")).transpose()?.flatten();
    let cni = object(&request.conf, "args")?.map(|args| object(args, "cni")).transpose()?.flatten();
    let args = cni.map(|cni| string(cni, "mac")).transpose()?.flatten();
    let text = match runtime.or(args).filter(|text| !text.is_empty()) {
        Some(text) => Some(text),
        None => request.arg("MAC")?,
    };
    text.map(|text| text.parse().map_err(|error| CniError::config(format!("mac: {error}")))).transpose()
}

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
            if Config::new(request)?.ip_masq {
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
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // The error that led here is the one to report; what fails to be undone now, the container's DEL undoes.
        if self.masquerade {
            let _ = masquerade::remove(&self.request.name, &attachment(self.request));
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
    let mut undo = Undo { request, veth: None, ipam: false, masquerade: false };
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;

    let bridge = ensure_bridge(&mut host, config)?;
    let veth = create_veth(&mut host, config, &netns, ifname)?;
    undo.veth = Some(veth.name);

    // Listening begins before the link goes up, so that its becoming operational is not missed.
    let mut news = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    news.join(1).map_err(failed("listen to links"))?;
    link::enslave(&mut host, veth.index, bridge.index, config.port)
        .map_err(failed(format!("make {} a port of {}", veth.name, config.bridge)))?;
    write_sysctl(&format!("net/ipv6/conf/{}/accept_ra", veth.name), "0")?;

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
    let container = configure_container(&netns, ifname, &result, &gateways)?;
    if config.is_gateway {
        for (gateway, len) in &gateways {
            set_gateway(&mut host, &bridge, config, Cidr { addr: *gateway, len: *len })?;
            let forwarding = match Family::of(*gateway) {
                Family::V4 => "net/ipv4/ip_forward",
                Family::V6 => "net/ipv6/conf/all/forwarding",
            };
            write_sysctl(forwarding, "1")?;
        }
    }
    if config.ip_masq && !result.ips.is_empty() {
        undo.masquerade = true;
        let addresses: Vec<Cidr> = result.ips.iter().map(|ip| ip.address).collect();
        masquerade::add(&request.name, &attachment(request), &addresses).map_err(failed("masquerade the container's addresses"))?;
    }
    await_operational(&mut host, &mut news, &veth)?;

    let bridge = link::get_index(&mut host, bridge.index).map_err(failed("read the bridge"))?.unwrap_or(bridge);
    let sandbox = request.netns.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
    let interface = |link: &LinkInfo, sandbox: &str| Interface {
        name: link.name.to_string(),
        mac: link.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        mtu: link.mtu,
        sandbox: sandbox.to_owned(),
    };
    result.interfaces = vec![interface(&bridge, ""), interface(&veth, ""), interface(&container, &sandbox)];
    result.ips.iter_mut().for_each(|ip| ip.interface = Some(2));
    if let Some(dns) = object(&request.conf, "dns")?.filter(|dns| !dns.is_empty()) {
        result.dns = dns.clone();
    }
    (undo.veth, undo.ipam, undo.masquerade) = (None, false, false);
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
fn configure_container(netns: &Netns, ifname: IfName, result: &CniResult, gateways: &[(IpAddr, u8)]) -> Result<LinkInfo, CniError> {
    let configure = || {
        let mut socket = Socket::open(Protocol::Route).map_err(failed("open netlink in the container"))?;
        let look = |socket: &mut Socket| {
            let found = link::get(socket, ifname).map_err(failed(format!("read {ifname} in the container")))?;
            found.ok_or_else(|| CniError::failed(format!("{ifname} was deleted in the container")))
        };
        let index = look(&mut socket)?.index;
        // The address is ours alone: no need to wait for duplicates, and the neighbours shall hear of it.
        write_sysctl(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0")?;
        write_sysctl(&format!("net/ipv4/conf/{ifname}/arp_notify"), "1")?;
        if result.ips.iter().any(|ip| Family::of(ip.address.addr) == Family::V6) {
            write_sysctl(&format!("net/ipv6/conf/{ifname}/disable_ipv6"), "0")?;
            write_sysctl("net/ipv6/conf/lo/disable_ipv6", "0")?;
            write_sysctl(&format!("net/ipv6/conf/{ifname}/keep_addr_on_down"), "1")?;
        }
        for ip in &result.ips {
            addr::add(&mut socket, index, ip.address).map_err(failed(format!("add {} to {ifname} in the container", ip.address)))?;
        }
        link::set_up(&mut socket, index, true).map_err(failed(format!("set {ifname} up in the container")))?;
        for Route { dst, gw, more } in &result.routes {
            if let Some(option) = more.keys().next() {
                return Err(CniError::unsupported(format!("routes: {option} of {dst} is not supported yet: leave it out")));
            }
            let gateway = gw.or_else(|| gateways.iter().map(|(gateway, _)| *gateway).find(|gateway| Family::of(*gateway) == dst.family()));
            route::add(&mut socket, *dst, gateway, index).map_err(failed(format!("add the route to {dst} in the container")))?;
        }
        look(&mut socket)
    };
    netns.run(configure).map_err(|error| CniError::environment(format!("CNI_NETNS: cannot enter it: {error}")))?
}

/// Puts the gateway's address on the bridge and pins the bridge's MAC, which would follow its ports otherwise.
fn set_gateway(host: &mut Socket, bridge: &LinkInfo, config: &Config, gateway: Cidr) -> Result<(), CniError> {
    let name = config.bridge;
    let addrs = addr::list(host, bridge.index).map_err(failed(format!("read the addresses of {name}")))?;
    let same_family = addrs.iter().map(|a| a.addr.cidr).filter(|have| Family::of(have.addr) == Family::of(gateway.addr));
    for have in same_family {
        if have == gateway {
            return Ok(());
        }
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
fn await_operational(host: &mut Socket, news: &mut Socket, veth: &LinkInfo) -> Result<(), CniError> {
    use std::os::fd::AsFd;
    let end = Instant::now() + OPERATIONAL;
    loop {
        let state = link::get_index(host, veth.index).map_err(failed(format!("read {}", veth.name)))?.map(|link| link.operstate);
        match state {
            Some(OPER_UP | OPER_UNKNOWN) => return Ok(()),
            None => return Err(CniError::failed(format!("{} was deleted by somebody", veth.name))),
            Some(_) => {}
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
    // A namespace that is gone took the interface along.
    let netns = request.netns.as_deref().and_then(|path| Netns::open(path).ok());
    if let (Some(netns), Ok(ifname)) = (netns, request.ifname.parse::<IfName>()) {
        let deleted = netns.run(|| Socket::open(Protocol::Route).and_then(|mut socket| link::delete(&mut socket, ifname)));
        match deleted.map_err(|error| CniError::failed(format!("cannot enter CNI_NETNS: {error}")))? {
            Err(error) if !error.is_not_found() => return Err(failed(format!("delete {ifname} in the container"))(error)),
            _ => {}
        }
    }
    // Both are tried: what is left of one must not keep the other.
    let addresses = ipam(request, Command::Del, None);
    let rules =
        if boolean(&request.conf, "ipMasq")?.unwrap_or(false) { masquerade::remove(&request.name, &attachment(request)) } else { Ok(()) };
    addresses?;
    rules.map_err(failed("remove the container's masquerading"))
}

fn check(request: &Request, config: &Config) -> Result<(), CniError> {
    let previous = field(&request.conf, "prevResult").ok_or_else(|| CniError::config("prevResult: CHECK needs it"))?;
    ipam(request, Command::Check, Some(previous))?;
    let want = CniResult::parse(previous)?;
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    let bridge = link::get(&mut host, config.bridge).map_err(failed("read the bridge"))?;
    if bridge.is_none_or(|bridge| bridge.kind != "bridge") {
        return Err(CniError::failed(format!("the bridge {} is gone", config.bridge)));
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
    let told = want.interfaces.iter().find(|i| i.name == ifname.as_str() && !i.sandbox.is_empty());
    if let Some(told) = told.filter(|told| container.mac.map(|mac| mac.to_string()).as_deref() != Some(&told.mac)) {
        return Err(CniError::failed(format!("{ifname} has not the MAC {}", told.mac)));
    }
    for ip in &want.ips {
        if !addrs.iter().any(|a| a.index == container.index && a.addr.cidr == ip.address) {
            return Err(CniError::failed(format!("{} is gone from {ifname} in the container", ip.address)));
        }
    }
    for wanted in &want.routes {
        if !routes.iter().any(|have| have.dst == wanted.dst && wanted.gw.is_none_or(|gw| have.via == Some(gw))) {
            return Err(CniError::failed(format!("the route to {} is gone from the container", wanted.dst)));
        }
    }
    Ok(())
}
