//! `bridge`: connects the container to a bridge of the host by a veth pair (specification, section 7.3). If a step of ADD
//! fails, the earlier steps are undone; the bridge itself is never deleted.

mod check;
mod config;
mod container;
mod masq;
mod vlan;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ::flannel::pod::{Table, masquerade, spoofcheck};
use ::flannel::{Cidr, Family, IfName, Mac};
use kernel::link::{self, LinkInfo, OPER_UNKNOWN, OPER_UP, VethEnd};
use kernel::netlink::{NetlinkError, Protocol, Socket};
use kernel::netns::Netns;
use kernel::{addr, pod_table, sysctl};
use serde_json::Map;

use crate::delegate;
use crate::lock;
use crate::loopback::open_netns;
use crate::protocol::{CniError, Command, Request, boolean, object, string};
use crate::result::{CniResult, Interface, Route};
use config::Config;
use vlan::Vlans;

/// How long the host's end may take to become operational.
const OPERATIONAL: Duration = Duration::from_secs(3);

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    match request.command {
        Command::Add => add(request, &Config::new(request)?).map(Some),
        Command::Del => del(request).map(|()| None),
        Command::Check => check::check(request, &Config::new(request)?).map(|()| None),
        Command::Gc => gc(request).map(|()| None),
        Command::Status => {
            Config::new(request)?;
            ipam(request, Command::Status).map(|_| None)
        }
        Command::Version => Ok(None),
    }
}

fn gc(request: &Request<'_>) -> Result<(), CniError> {
    let valid = request.valid_attachments()?;
    // As in DEL, an error of the IPAM plugin must not keep stale rules.
    let addresses = ipam(request, Command::Gc);
    if Config::new(request)?.ip_masq.is_some() {
        let notes = lock::notes()?;
        notes.retain_masquerade(request.name, &valid);
        let stale = pod_table::remove(&[Table::Masquerade], |rule| masquerade::is_stale(rule, request.name, &valid));
        drop(stale.map_err(failed("remove the masquerading of containers that ended"))?);
    }
    addresses.map(drop)
}

/// Calls the IPAM plugin of the configuration, if there is one, with the whole configuration.
fn ipam(request: &Request<'_>, command: Command) -> Result<Option<CniResult>, CniError> {
    let kind = object(request.conf, "ipam").and_then(|ipam| ipam.map_or(Ok(None), |ipam| string(ipam, "type")));
    // DEL ignores an invalid field, which ADD rejects.
    let kind = if command == Command::Del { kind.ok().flatten() } else { kind? };
    let Some(kind) = kind else { return Ok(None) };
    delegate::call_as(kind, request, command, request.conf, "ipam.type")
}

/// Adds the act and the object to a kernel error.
fn failed(act: impl std::fmt::Display) -> impl FnOnce(NetlinkError) -> CniError {
    move |error| CniError::failed(format!("cannot {act}: {error}"))
}

/// Undoes the steps of an ADD in reverse order, unless the ADD succeeds.
struct Undo<'a> {
    request: &'a Request<'a>,
    veth: Option<IfName>,
    ipam: bool,
    masquerade: bool,
    spoofcheck: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // The error of the ADD is reported. If a step cannot be undone now, DEL of the container does.
        if self.masquerade {
            let _ = masq::remove(self.request);
        }
        if self.spoofcheck {
            let _ = remove_spoofcheck(self.request);
        }
        if let Some(veth) = self.veth {
            let _ = Socket::open(Protocol::Route).and_then(|mut socket| link::delete(&mut socket, veth));
        }
        if self.ipam {
            let _ = ipam(self.request, Command::Del);
        }
    }
}

fn add(request: &Request<'_>, config: &Config) -> Result<CniResult, CniError> {
    let netns = open_netns(request)?;
    let ifname: IfName = request.ifname.parse().map_err(|error| CniError::environment(format!("CNI_IFNAME: {error}")))?;
    let mut undo = Undo { request, veth: None, ipam: false, masquerade: false, spoofcheck: false };
    let mut host = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;

    let bridge = ensure_bridge(&mut host, config)?;
    let veth = create_veth(&mut host, config, &netns, ifname)?;
    undo.veth = Some(veth.name);

    link::enslave(&mut host, veth.index, bridge.index, config.port)
        .map_err(failed(format!("make {} a port of {}", veth.name, config.bridge)))?;
    prefer_sysctl(&format!("net/ipv6/conf/{}/accept_ra", veth.name), "0");
    if let Some(vlans) = &config.vlans {
        vlans.set_port(&mut host, &veth)?;
    }
    if config.spoofcheck {
        undo.spoofcheck = true;
        let mac = container::mac(&netns, ifname)?;
        let (chains, rules) = spoofcheck::rules(&request.attachment(), veth.name, mac);
        pod_table::add_with_chains(Table::Spoofcheck, &chains, &rules).map_err(failed("install MAC spoof protection"))?;
    }

    let mut result = CniResult::default();
    if config.ipam.is_some() {
        result = ipam(request, Command::Add)?.unwrap_or_default();
        // Set only after success: the plugin may have failed because an earlier ADD of this container holds an address.
        undo.ipam = true;
        if result.ips.is_empty() {
            return Err(CniError::failed("the IPAM plugin returned no address"));
        }
    }
    let gateways = complete(&mut result, config);
    let container = container::configure(&netns, ifname, &mut result, &gateways, config)?;
    let mut vlan_gateway = None;
    if config.is_gateway && !gateways.is_empty() {
        // With a VLAN, the gateway's address is on a separate link, which is a port of that VLAN.
        let holder = match config.vlans.as_ref().and_then(Vlans::of_gateway) {
            Some(vlans) => vlan_gateway.insert(vlan::gateway(&mut host, &bridge, &vlans, config.mtu)?).clone(),
            None => bridge.clone(),
        };
        for family in Family::ALL {
            let of_family: Vec<_> = gateways.iter().filter(|(gateway, _)| Family::of(*gateway) == family).collect();
            for (gateway, len) in &of_family {
                set_gateway(&mut host, &holder, config, Cidr { addr: *gateway, len: *len })?;
            }
            // If the kernel does not report the setting, write it.
            if !of_family.is_empty() && !sysctl::forwards(&mut host, family).unwrap_or(false) {
                write_sysctl(family.forwarding(), "1")?;
            }
        }
    }
    if let Some(backend) = config.ip_masq.filter(|_| !result.ips.is_empty()) {
        undo.masquerade = true;
        let addresses: Vec<Cidr> = result.ips.iter().map(|ip| ip.address).collect();
        masq::add(request, backend, &addresses, veth.index)?;
    }
    // While the container's end is down, the host's end cannot become operational.
    if !config.leave_down {
        await_operational(&mut host, &veth)?;
    }

    if result.ips.is_empty() && !request.speaks("0.3.0") {
        let text = "cannot convert: no valid IP addresses: the result of CNI version";
        return Err(CniError::config(format!("ipam: {text} {} needs one: set ipam, or cniVersion 0.3.0 or later", request.version)));
    }
    let bridge = link::get_index(&mut host, bridge.index).map_err(failed("read the bridge"))?.unwrap_or(bridge);
    let sandbox = request.netns.map(|path| path.display().to_string()).unwrap_or_default();
    let interface = |link: &LinkInfo, sandbox: &str| Interface {
        name: link.name.to_string(),
        mac: link.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        sandbox: sandbox.to_owned(),
        ..Interface::default()
    };
    result.interfaces = vec![interface(&bridge, ""), interface(&veth, ""), interface(&container, &sandbox)];
    result.interfaces.extend(vlan_gateway.iter().map(|link| interface(link, "")));
    result.ips.iter_mut().for_each(|ip| ip.interface = Some(2));
    if let Some(dns) = object(request.conf, "dns")?.filter(|dns| !dns.is_empty()) {
        result.dns = dns.clone();
    }
    (undo.veth, undo.ipam, undo.masquerade, undo.spoofcheck) = (None, false, false, false);
    Ok(result)
}

fn write_sysctl(name: &str, value: &str) -> Result<(), CniError> {
    sysctl::write(name, value).map_err(|error| CniError::failed(error.to_string()))
}

/// Sets an optional sysctl. If `/proc/sys` is read-only, the kernel's default stays.
fn prefer_sysctl(name: &str, value: &str) {
    if let Err(error) = sysctl::write(name, value) {
        eprintln!("bridge: {error}");
    }
}

fn remove_spoofcheck(request: &Request<'_>) -> Result<(), NetlinkError> {
    let attachment = request.attachment();
    // Jumps are removed before the chains that they lead to.
    drop(pod_table::remove(&[Table::Spoofcheck], |rule| spoofcheck::is_of(rule, &attachment))?);
    pod_table::remove_chains(Table::Spoofcheck, &spoofcheck::chains(&attachment))
}

fn ensure_bridge(host: &mut Socket, config: &Config) -> Result<LinkInfo, CniError> {
    let name = config.bridge;
    let look = |host: &mut Socket| link::get(host, name).map_err(failed(format!("read the bridge {name}")));
    let (found, is_new) = match look(host)? {
        Some(found) => (found, false),
        None => {
            match link::create_bridge(host, name, config.mtu, Some(random_mac())) {
                // Another ADD created it at the same time.
                Err(error) if !error.is_exists() => return Err(failed(format!("create the bridge {name}"))(error)),
                _ => {}
            }
            prefer_sysctl(&format!("net/ipv6/conf/{name}/accept_ra"), "0");
            // Duplicate address detection of the link-local address takes two seconds, during which the bridge cannot resolve pods.
            prefer_sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0");
            (look(host)?.ok_or_else(|| CniError::failed(format!("the bridge {name} was deleted at once")))?, true)
        }
    };
    if found.kind != "bridge" {
        return Err(CniError::config(format!("bridge: {name:?} already exists but is not a bridge: choose another name")));
    }
    if !is_new && !has_own_mac(name) {
        pin_mac(host, &found)?;
    }
    if config.vlans.is_some() {
        link::set_vlan_filtering(host, found.index)
            .map_err(failed(format!("enable VLAN filtering on {name} (does this kernel have CONFIG_BRIDGE_VLAN_FILTERING?)")))?;
    }
    if config.promiscuous && !found.promiscuous {
        link::set_promiscuous(host, found.index, true).map_err(failed(format!("make {name} promiscuous")))?;
    }
    if !found.up {
        link::set_up(host, found.index, true).map_err(failed(format!("set {name} up")))?;
    }
    Ok(found)
}

/// A random MAC like those of the kernel: unicast, locally administered.
fn random_mac() -> Mac {
    let mut mac = [0; 6];
    mac.fill_with(|| fastrand::u8(..));
    mac[0] = mac[0] & 0xfe | 0x02;
    Mac(mac)
}

/// Was the bridge's MAC set (`NET_ADDR_SET`), so that it does not follow its ports? Without sysfs it counts as not set;
/// setting it again only makes the kernel resolve neighbours again.
fn has_own_mac(bridge: IfName) -> bool {
    std::fs::read_to_string(format!("/sys/class/net/{bridge}/addr_assign_type")).is_ok_and(|text| text.trim() == "3")
}

/// Pins the present MAC of a bridge before a port is added. Otherwise the bridge has the lowest MAC of its ports, which changes
/// with its pods, and each change cuts the other pods off until they resolve their gateway again.
fn pin_mac(host: &mut Socket, bridge: &LinkInfo) -> Result<(), CniError> {
    // The kernel zeroes the MAC when the last port is removed.
    let mac = bridge.mac.filter(|mac| mac.0 != [0; 6]).unwrap_or_else(random_mac);
    link::set_mac(host, bridge.index, mac).map_err(failed(format!("pin the MAC of {}", bridge.name)))
}

/// Creates the veth pair with each end in its namespace, and returns the host's end.
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
                // Either of the two names may be taken. Only the host's can be replaced by another one.
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
        // The first gateway of each family, in the order of the addresses.
        for ip in &result.ips {
            let family = Family::of(ip.address.addr);
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

/// Puts the gateway's address on the bridge.
fn set_gateway(host: &mut Socket, bridge: &LinkInfo, config: &Config, gateway: Cidr) -> Result<(), CniError> {
    let name = bridge.name;
    let addrs = addr::list(host, bridge.index).map_err(failed(format!("read the addresses of {name}")))?;
    // Further addresses are harmless.
    if addrs.iter().any(|a| a.addr.cidr == gateway) {
        return Ok(());
    }
    let same_family = addrs.iter().map(|a| a.addr.cidr).filter(|have| Family::of(have.addr) == Family::of(gateway.addr));
    for have in same_family {
        // Several IPv6 networks may share a bridge, but only one IPv4 network.
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
        // Another ADD added it at the same time.
        Err(error) if !error.is_exists() => Err(failed(format!("add {gateway} to {name}"))(error)),
        _ => Ok(()),
    }
}

/// Waits until the host's end forwards. The bridge enables a port when it becomes operational, which a kernel worker sets a
/// moment after the link was set up.
fn await_operational(host: &mut Socket, veth: &LinkInfo) -> Result<(), CniError> {
    use std::os::fd::AsFd;
    let end = Instant::now() + OPERATIONAL;
    let mut is_up = || match link::get_index(host, veth.index).map_err(failed(format!("read {}", veth.name)))? {
        Some(link) => Ok(matches!(link.operstate, OPER_UP | OPER_UNKNOWN)),
        None => Err(CniError::failed(format!("{} was deleted by another program", veth.name))),
    };
    // Usually it is operational by now, and no notification is needed.
    if is_up()? {
        return Ok(());
    }
    let mut events = Socket::open(Protocol::Route).map_err(failed("open netlink"))?;
    events.join(1).map_err(failed("subscribe to link events"))?;
    loop {
        if is_up()? {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        let fd = events.as_fd();
        let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
        if left.is_zero() || rustix::event::poll(&mut poll, Some(&timeout)).is_ok_and(|ready| ready == 0) {
            return Err(CniError::failed(format!("{} did not become operational within {} s", veth.name, OPERATIONAL.as_secs())));
        }
        // The state is read from the link itself, so lost events are harmless.
        while events.notifications(false, |_| {}).is_ok() {}
    }
}

/// Removes all state of the attachment. Ignores errors in the configuration, which ADD rejects.
fn del(request: &Request<'_>) -> Result<(), CniError> {
    let flag = |name: &str| boolean(request.conf, name).ok().flatten() == Some(true);
    // Rules are removed first, because the kernel then frees them while the link is deleted. Packets that the container still
    // sends get no answer in any case.
    let rules = if flag("ipMasq") { masq::remove(request).map(Some) } else { Ok(None) };
    delete_link(request)?;
    // Continues after an error, so that one failed step does not prevent the others.
    let addresses = ipam(request, Command::Del);
    if flag("macspoofchk")
        && let Err(error) = remove_spoofcheck(request)
    {
        eprintln!("bridge: cannot remove MAC spoof protection: {error}");
    }
    addresses?;
    rules.map(drop)
}

/// Deletes the container's end, unless it was deleted with its namespace.
fn delete_link(request: &Request<'_>) -> Result<(), CniError> {
    let netns = request.netns.and_then(|path| Netns::open(path).ok());
    if let (Some(netns), Ok(ifname)) = (netns, request.ifname.parse::<IfName>()) {
        let deleted = netns.run(|| Socket::open(Protocol::Route).and_then(|mut socket| link::delete(&mut socket, ifname)));
        match deleted.map_err(|error| CniError::failed(format!("cannot enter CNI_NETNS: {error}")))? {
            Err(error) if !error.is_not_found() => return Err(failed(format!("delete {ifname} in the container"))(error)),
            _ => {}
        }
    }
    Ok(())
}
