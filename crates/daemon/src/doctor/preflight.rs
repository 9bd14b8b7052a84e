//! `flanneld doctor --preflight`: gathers the facts for an installation. Nothing of the host is changed: what must be tried is tried in a
//! network namespace that ends at once.

use std::fs;
use std::path::Path;

use anyhow::Context;
use flannel::check::preflight::{PreflightFacts, TakenPort};
use flannel::check::{Check, Expected, Facts};
use flannel::object::{Link, LinkKind, Object, ROUTE_PROTOCOL};
use flannel::traffic::{Flavour, TrafficConfig, rulesets};
use flannel::{Cidr, Family, IfName, Mac, Op, PerFamily, Subnet, Vni};
use kernel::Kernel;
use kernel::netlink::{Protocol, Socket};
use kernel::netns::Netns;
use kernel::route::{self, Filter};
use kernel::sockets::{self, Transport};

use super::DoctorArgs;
use crate::socket;

/// The name under which flannel's configuration is installed.
const OWN_CONF: &str = "10-flannel.conflist";

/// The facts, and what could not be found out.
pub(super) fn gather(args: &DoctorArgs) -> anyhow::Result<(PreflightFacts, Vec<String>)> {
    let mut not_checked = Vec::new();
    let mut kernel = Kernel::open().context("cannot open the kernel's sockets")?;
    let interfaces = kernel.interfaces().context("cannot read the kernel's addresses")?;
    let name = |index: u32| interfaces.iter().find(|interface| interface.index == index).map(|interface| interface.name);
    let facts = kernel.route_facts().context("cannot read the kernel's routes")?;
    let default = facts.iter().find(|route| route.dst.prefix_len() == 0);
    let external = default.and_then(|route| interfaces.iter().find(|interface| interface.index == route.oif));
    let mut socket = Socket::open(Protocol::Route)?;
    let mut routes = Vec::new();
    for family in Family::ALL {
        let found = route::list(&mut socket, family, Filter::All).context("cannot read the kernel's routes")?;
        let foreign = found.into_iter().filter(|route| route.dst.prefix_len() > 0 && route.protocol != ROUTE_PROTOCOL);
        routes.extend(foreign.map(|route| (route.dst, name(route.oif))).filter(|(_, dev)| !dev.is_some_and(is_own)));
    }
    if args.network.is_empty() {
        not_checked.push("pod network: give --network CIDR".to_owned());
    }
    let mut facts = PreflightFacts {
        external: external.map(|interface| (interface.name, interface.mtu)),
        networks: args.network.clone(),
        addresses: interfaces
            .iter()
            .filter(|interface| !is_own(interface.name))
            .flat_map(|interface| interface.addrs.iter().map(|addr| (interface.name, addr.cidr)))
            .collect::<Vec<(IfName, Cidr)>>(),
        routes,
        missing_folders: [&args.cni_conf_dir, &args.cni_bin_dir]
            .into_iter()
            .filter(|path| !path.is_dir())
            .map(|p| p.display().to_string())
            .collect(),
        first_conf: first_conf(&args.cni_conf_dir),
        ..PreflightFacts::default()
    };
    match Netns::create() {
        Ok(netns) => (facts.vxlan, facts.nf_tables) = netns.run(|| (vxlan().err(), nf_tables().err()))?,
        Err(error) => not_checked.push(format!("VXLAN devices and nftables: cannot make a network namespace: {error} (run as root)")),
    }
    facts.tun = fs::File::options().read(true).write(true).open("/dev/net/tun").err().map(|error| format!("/dev/net/tun: {error}"));
    match socket::ask(&args.daemon.socket(), "/healthz") {
        Ok(_) => not_checked.push("ports: flanneld is running and has them".to_owned()),
        Err(_) => facts.ports = ports(args),
    }
    let mut expected = Expected { external: facts.external.map(|(name, _)| name), bridge: "cni0".parse().ok(), ..Expected::default() };
    for network in &args.network {
        expected.networks.set(network.family(), Some(*network));
        expected.own.set(network.family(), Some(*network));
        expected.addresses.set(network.family(), Some(network.first_host()));
    }
    let host = kernel.inspect(&expected);
    facts.forward = Check::Forward.run(Facts { expected: &expected, host: &host });
    not_checked.extend(host.unreadable);
    Ok((facts, not_checked))
}

/// Is it a device of flannel's, or the pods' bridge, of an earlier installation?
fn is_own(name: IfName) -> bool {
    name.as_str().starts_with("flannel") || name.as_str() == "cni0"
}

/// Makes a VXLAN device in this namespace.
fn vxlan() -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let lower: IfName = "preflight0".parse().map_err(|_| "no name".to_owned())?;
    let mut socket = Socket::open(Protocol::Route).map_err(|error| text(&error))?;
    kernel::link::create_bridge(&mut socket, lower, 1500, None).map_err(|error| text(&error))?;
    let vni = Vni::new(1).ok_or("no VNI")?;
    let kind = LinkKind::Vxlan { vni, port: 8472, local: Family::V4.unspecified(), lower, gbp: false, learning: false };
    let name = "flannel.1".parse().map_err(|_| "no name".to_owned())?;
    apply(Object::Link(Link { name, kind, mac: Mac([2, 0, 0, 0, 0, 1]), mtu: 1450, up: false }.into()))
}

/// Makes the table of the daemon's rules in this namespace.
fn nf_tables() -> Result<(), String> {
    let traffic = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: Flavour::Nftables };
    let networks: PerFamily<Subnet> = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: None };
    let ruleset = rulesets(traffic, &networks, &networks).into_iter().next().ok_or("no rules")?;
    apply(Object::Ruleset(ruleset))
}

fn apply(object: Object) -> Result<(), String> {
    let mut kernel = Kernel::open().map_err(|error| error.to_string())?;
    kernel.apply(&[Op::Set(object)]).remove(0).map_err(|error| error.to_string())
}

/// The ports that flannel needs and another program has.
fn ports(args: &DoctorArgs) -> Vec<TakenPort> {
    let wanted = [
        (Transport::Udp, args.port, "vxlan", "Backend.Port in the network config"),
        (Transport::Udp, 8285, "the backend udp", "Backend.Port in the network config"),
        (Transport::Udp, args.probe_port, "path probes", "--probe-port on all hosts"),
        (Transport::Tcp, args.healthz_port, "health", "--healthz-port"),
    ];
    let taken = wanted.into_iter().filter(|(transport, port, ..)| *port > 0 && !sockets::is_free(*transport, *port));
    taken
        .filter_map(|(transport, port, purpose, setting)| {
            let device = (transport == Transport::Udp).then(|| sockets::vxlan_device(port)).flatten();
            if device.is_some_and(is_own) {
                return None;
            }
            let device = device.map(|device| format!("VXLAN device {device}"));
            let by = device.or_else(|| sockets::holder(transport, port).map(|program| program.to_string()));
            let protocol = if transport == Transport::Udp { "UDP" } else { "TCP" };
            Some(TakenPort { protocol, port, purpose, setting, by })
        })
        .collect()
}

/// The first configuration in a folder, if it is another network's and comes before flannel's.
fn first_conf(folder: &Path) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let is_conf = |name: &String| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end));
    let first = names.filter(is_conf).min()?;
    let path = folder.join(&first);
    let is_flannel = fs::read_to_string(&path).is_ok_and(|text| {
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let plugins = value["plugins"].as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        plugins.iter().any(|plugin| plugin["type"] == "flannel")
    });
    (!is_flannel && first.as_str() < OWN_CONF).then(|| path.display().to_string())
}
