//! Random sequences of calls: valid configurations, and what a runtime does with them. A seed determines all of it.

use fastrand::Rng;
use serde_json::{Map, Value, json};

/// A network: the list of plugins, the first of which makes the attachment.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) name: String,
    pub(crate) version: &'static str,
    pub(crate) plugins: Vec<Value>,
}

impl Network {
    pub(crate) fn speaks(&self, since: &str) -> bool {
        self.version >= since
    }

    pub(crate) fn kind(&self) -> &str {
        self.plugins[0]["type"].as_str().unwrap()
    }

    /// May anything of the list be in iptables?
    pub(crate) fn uses_iptables(&self) -> bool {
        self.plugins.iter().any(|conf| conf["type"] == "firewall" || conf["backend"] == "iptables" || conf["ipMasqBackend"] == "iptables")
    }

    /// May anything of the list be in tables of nftables?
    pub(crate) fn uses_nftables(&self) -> bool {
        self.plugins.iter().any(|conf| conf["backend"] == "nftables" || conf["ipMasqBackend"] == "nftables" || conf["macspoofchk"] == true)
    }

    pub(crate) fn limits(&self) -> bool {
        self.plugins.iter().any(|conf| conf["type"] == "bandwidth")
    }
}

/// A container in a network: what the runtime passes in each call for it.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) pod: usize,
    pub(crate) network: usize,
    pub(crate) ifname: &'static str,
    pub(crate) args: String,
    /// `runtimeConfig` by the place of the plugin in the list.
    pub(crate) runtime: Vec<Value>,
}

/// What another program does, or a host that is shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The interface in the container is deleted.
    InterfaceDeleted,
    /// The interface in the container is set down: its routes go.
    InterfaceDown,
    /// The address files of the network are deleted.
    AddressesForgotten,
    /// The chains of iptables are emptied.
    IptablesFlushed,
    /// The path of the container's namespace is removed.
    NamespaceGone,
    /// The bridge is deleted.
    BridgeDeleted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Add,
    Check,
    Del,
    /// A DEL without `CNI_NETNS`, as after a reboot.
    DelWithoutNamespace,
    /// GC of the attachment's network; all attachments are valid, or all but this one.
    Gc {
        forget: bool,
    },
    Status,
    Event(Event),
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) act: Act,
    pub(crate) attachment: usize,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) pods: usize,
    pub(crate) networks: Vec<Network>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) steps: Vec<Step>,
}

impl std::fmt::Display for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, network) in self.networks.iter().enumerate() {
            network.plugins.iter().try_for_each(|conf| writeln!(f, "network {place}: {conf}"))?;
        }
        for (place, Attachment { pod, network, ifname, args, runtime }) in self.attachments.iter().enumerate() {
            let runtime: Vec<String> = runtime.iter().map(Value::to_string).collect();
            writeln!(
                f,
                "attachment {place}: pod {pod} in network {network} as {ifname}, CNI_ARGS={args:?}, runtimeConfig {}",
                runtime.join(" ")
            )?;
        }
        self.steps
            .iter()
            .enumerate()
            .try_for_each(|(place, step)| writeln!(f, "step {place}: {:?} of attachment {}", step.act, step.attachment))
    }
}

/// Is it true this often in a hundred?
fn percent(rng: &mut Rng, share: u32) -> bool {
    rng.u32(..100) < share
}

fn pick<T: Clone>(rng: &mut Rng, list: &[T]) -> T {
    list[rng.usize(..list.len())].clone()
}

impl Sequence {
    pub(crate) fn new(seed: u64) -> Sequence {
        let rng = &mut Rng::with_seed(seed);
        let mut networks = vec![network(rng, 0)];
        if percent(rng, 35) {
            networks.push(network(rng, 1));
            separate_ports(&mut networks);
        }
        let pods = rng.usize(1..=3);
        let mut attachments = Vec::new();
        for pod in 0..pods {
            for (at, network) in networks.iter().enumerate() {
                if at == 0 || percent(rng, 60) {
                    attachments.push(attachment(rng, network, pod, at));
                }
            }
        }
        let steps = steps(rng, &networks, &attachments);
        Sequence { pods, networks, attachments, steps }
    }
}

/// In nftables the reference plugin names the container alone in its rules, so a DEL in one network removes the ports of the
/// other (docs/departures.md). So one of two networks has its ports in iptables.
fn separate_ports(networks: &mut [Network]) {
    let has_ports = |network: &Network| network.plugins.iter().any(|conf| conf["type"] == "portmap" && conf["backend"] == "nftables");
    if networks.iter().all(has_ports) {
        networks[1].plugins.iter_mut().filter(|conf| conf["type"] == "portmap").for_each(|conf| conf["backend"] = "iptables".into());
    }
}

/// Which families a network has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Families {
    V4,
    V6,
    Both,
}

fn network(rng: &mut Rng, number: usize) -> Network {
    let name = format!("net{number}");
    let version = pick(rng, &["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.0.0", "1.1.0", "1.1.0"]);
    let kind = pick(rng, &["bridge", "bridge", "bridge", "bridge", "bridge", "bridge", "bridge", "bridge", "host-local", "loopback"]);
    let mut first = json!({ "cniVersion": version, "name": name, "type": kind });
    if kind == "loopback" {
        // Before 1.0.0 the reference plugin prints a result of another version's form (docs/departures.md).
        let version = if version < "1.0.0" { "1.0.0" } else { version };
        first["cniVersion"] = version.into();
        return Network { name, version, plugins: vec![first] };
    }
    let families = match rng.u32(..100) {
        0..55 => Families::V4,
        55..85 => Families::Both,
        _ => Families::V6,
    };
    let layer_2 = kind == "bridge" && percent(rng, 6);
    if !layer_2 {
        first["ipam"] = ipam(rng, number, families, version);
    }
    if kind == "host-local" {
        return Network { name, version, plugins: vec![first] };
    }
    bridge(rng, &mut first, number, layer_2);
    let mut plugins = vec![first];
    let mut chain: Vec<&str> = [("portmap", 40), ("bandwidth", 25), ("firewall", 35), ("tuning", 35)]
        .iter()
        .filter(|(_, share)| percent(rng, *share))
        .map(|(name, _)| *name)
        .collect();
    rng.shuffle(&mut chain);
    for kind in chain {
        // It needs addresses and a version of its own.
        if layer_2 && matches!(kind, "portmap" | "firewall") || kind == "firewall" && version < "0.4.0" {
            continue;
        }
        let mut conf = json!({ "cniVersion": version, "name": name, "type": kind });
        match kind {
            "portmap" => portmap(rng, &mut conf),
            "bandwidth" => set(&mut conf, &bandwidth(rng)),
            "firewall" => firewall(rng, &mut conf),
            _ => tuning(rng, &mut conf),
        }
        plugins.push(conf);
    }
    Network { name, version, plugins }
}

fn set(conf: &mut Value, more: &Value) {
    for (key, value) in more.as_object().unwrap() {
        conf[key] = value.clone();
    }
}

fn bridge(rng: &mut Rng, conf: &mut Value, number: usize, layer_2: bool) {
    match rng.u32(..10) {
        // Two networks on one bridge.
        0..3 => {}
        _ => conf["bridge"] = format!("br{number}").into(),
    }
    let flags: &[(&str, u32)] = &[("isGateway", 60), ("hairpinMode", 25), ("portIsolation", 15), ("macspoofchk", 20), ("forceAddress", 15)];
    for (flag, share) in flags {
        if percent(rng, *share) {
            conf[*flag] = percent(rng, 90).into();
        }
    }
    // The second network of a container leaves the default route to the first one: who has it then differs on purpose. With
    // a default route in the IPAM configuration too the reference plugin fails because the route exists.
    let has_default = conf["ipam"].to_string().contains("/0\"");
    if number == 0 && !layer_2 && !has_default && percent(rng, 50) {
        conf["isDefaultGateway"] = true.into();
    }
    if conf["hairpinMode"] != true && percent(rng, 15) {
        conf["promiscMode"] = true.into();
    }
    if percent(rng, 50) {
        conf["ipMasq"] = true.into();
    }
    // Without it the reference plugin takes iptables, ours nftables (docs/departures.md). Of several subnets of a family the
    // reference plugin masquerades in iptables what goes to the second one, because that rule comes after the last.
    let sets = conf["ipam"]["ranges"].to_string();
    let is_single = sets.matches("[{").count() == 1 || sets.contains("fd00") && sets.contains("\"10.") && sets.matches("[{").count() == 2;
    conf["ipMasqBackend"] = pick(rng, if is_single || sets == "null" { &["iptables", "nftables"] } else { &["nftables"] }).into();
    if percent(rng, 70) {
        conf["mtu"] = pick(rng, &[0, 1280, 1400, 1450, 1500, 9000]).into();
    }
    if percent(rng, 15) {
        conf["dns"] = json!({ "nameservers": ["10.1.0.1"], "domain": "e.f", "search": ["a.b"], "options": ["ndots:2"] });
    }
    if layer_2 && percent(rng, 40) {
        conf["disableContainerInterface"] = true.into();
    }
    if percent(rng, 10) {
        conf["args"] = json!({ "cni": { "mac": mac(rng) } });
    }
}

/// A MAC that the normalizing code knows as given.
fn mac(rng: &mut Rng) -> String {
    format!("02:00:00:00:00:{:02x}", rng.u8(..))
}

/// The subnets of a network, distinct by `number`: of each family its range sets.
fn range_set(rng: &mut Rng, number: usize, set: usize, v6: bool) -> Value {
    let base = if v6 { format!("fd00:{}:{set}", number + 17) } else { format!("10.{}.{set}", number + 17) };
    let host = |n: u32| if v6 { format!("{base}::{n:x}") } else { format!("{base}.{n}") };
    let lengths: &[u8] = if v6 { &[64, 64, 112, 124, 125, 126] } else { &[24, 24, 28, 29, 30] };
    let length = pick(rng, lengths);
    let size = 1u32 << (u32::from(if v6 { 128 } else { 32 } - length)).min(8);
    let mut range = Map::new();
    range.insert("subnet".to_owned(), format!("{}/{length}", if v6 { format!("{base}::") } else { host(0) }).into());
    let mut start = 1;
    if size > 4 && percent(rng, 30) {
        start = rng.u32(1..size / 2);
        range.insert("rangeStart".to_owned(), host(start).into());
    }
    if size > 4 && percent(rng, 30) {
        range.insert("rangeEnd".to_owned(), host(rng.u32((start + 1).max(3)..size - 1)).into());
    }
    if percent(rng, 25) {
        range.insert("gateway".to_owned(), host(rng.u32(1..size - 1)).into());
    }
    Value::Object(range)
}

fn ipam(rng: &mut Rng, number: usize, families: Families, version: &str) -> Value {
    let mut ipam = json!({ "type": "host-local", "dataDir": "ROOT/networks" });
    let mut sets = Vec::new();
    let of_families: &[bool] = match families {
        Families::V4 => &[false],
        Families::V6 => &[true],
        Families::Both => &[false, true],
    };
    for v6 in of_families {
        let mut ranges = vec![range_set(rng, number, 0, *v6)];
        if percent(rng, 15) {
            ranges.push(range_set(rng, number, 1, *v6));
        }
        sets.push(Value::Array(ranges));
    }
    if percent(rng, 8) {
        sets.push(json!([range_set(rng, number, 2, of_families[0])]));
    }
    if sets.len() == 1 && percent(rng, 15) {
        set(&mut ipam, &sets[0][0]);
    } else {
        if sets.len() > 1 && percent(rng, 20) {
            sets.reverse();
        }
        ipam["ranges"] = sets.into();
    }
    let mut routes = Vec::new();
    for _ in 0..pick(rng, &[0, 0, 1, 1, 2, 3]) {
        let v6 = pick(rng, of_families);
        let third = rng.u32(0..3);
        let mut route = match (v6, number) {
            (false, 0) if percent(rng, 20) => json!({ "dst": "0.0.0.0/0" }),
            (true, 0) if percent(rng, 20) => json!({ "dst": "::/0" }),
            (false, _) => json!({ "dst": format!("172.{}.{third}.0/24", 16 + number) }),
            (true, _) => json!({ "dst": format!("fd01:{number}:{third}::/48") }),
        };
        // Results of older versions have no options, so the reference bridge does not get them from its IPAM plugin; and it
        // sets no mtu and advmss. Ours sets all (docs/departures.md).
        if version >= "1.1.0" && percent(rng, 20) {
            for (name, value) in [("priority", 7), ("table", 99)] {
                if percent(rng, 50) {
                    route[name] = value.into();
                }
            }
        }
        // One destination twice: which of the two the kernel keeps is not the plugin's decision.
        if !routes.iter().any(|other: &Value| other["dst"] == route["dst"]) {
            routes.push(route);
        }
    }
    if !routes.is_empty() {
        ipam["routes"] = routes.into();
    }
    if percent(rng, 10) {
        ipam["resolvConf"] = "ROOT/resolv.conf".into();
    }
    ipam
}

fn portmap(rng: &mut Rng, conf: &mut Value) {
    let backend = pick(rng, &["iptables", "iptables", "nftables"]);
    conf["backend"] = backend.into();
    if percent(rng, 25) {
        conf["snat"] = percent(rng, 30).into();
    }
    if percent(rng, 15) {
        conf["masqAll"] = true.into();
    }
    if backend == "iptables" {
        match rng.u32(..10) {
            0 | 1 => conf["markMasqBit"] = rng.u32(..32).into(),
            2 => conf["externalSetMarkChain"] = "SET-MARK".into(),
            _ => {}
        }
        if percent(rng, 15) {
            conf["conditionsV4"] = json!(["!", "-d", "192.0.2.0/24"]);
        }
        if percent(rng, 15) {
            conf["conditionsV6"] = json!(["-s", "2001:db8::/32"]);
        }
    }
}

fn bandwidth(rng: &mut Rng) -> Value {
    let mut limits = json!({});
    // A burst holds a frame of any interface here: with less no full packet passes.
    for (rate, burst) in [("ingressRate", "ingressBurst"), ("egressRate", "egressBurst")] {
        if percent(rng, 70) {
            limits[rate] = rng.u64(1_000..10_000_000_000).into();
            limits[burst] = rng.u64(80_000..2_000_000_000).into();
        }
    }
    limits
}

fn firewall(rng: &mut Rng, conf: &mut Value) {
    conf["backend"] = "iptables".into();
    if percent(rng, 50) {
        conf["ingressPolicy"] = pick(rng, &["open", "same-bridge", "isolated"]).into();
    }
    if percent(rng, 15) {
        conf["iptablesAdminChainName"] = "MY-ADMIN".into();
    }
}

/// Sysctls of a network namespace, with values that are not the defaults.
const SYSCTLS: [(&str, &str); 7] = [
    ("net.ipv4.conf.IFNAME.arp_filter", "1"),
    ("net.ipv4.conf.IFNAME.rp_filter", "2"),
    ("net/ipv4/conf/IFNAME/log_martians", "1"),
    ("net.ipv6.conf.IFNAME.autoconf", "0"),
    ("net/ipv4/conf/all/log_martians", "1"),
    // The reference plugin compares with a tab, as the kernel writes it.
    ("net.ipv4.ip_local_port_range", "1024\t65000"),
    ("net.core.somaxconn", "700"),
];

fn tuning(rng: &mut Rng, conf: &mut Value) {
    conf["dataDir"] = "ROOT/tuning".into();
    let attributes = |rng: &mut Rng| {
        let mut some = json!({});
        for (name, value, share) in [
            ("mac", json!(mac(rng)), 25),
            ("mtu", json!(rng.u32(1300..1400)), 25),
            ("promisc", json!(percent(rng, 80)), 25),
            ("allmulti", json!(percent(rng, 60)), 25),
            ("txQLen", json!(rng.u32(1..2000)), 25),
        ] {
            if percent(rng, share) {
                some[name] = value;
            }
        }
        some
    };
    let more = attributes(rng);
    set(conf, &more);
    if percent(rng, 60) {
        let some: Map<String, Value> =
            (0..rng.usize(1..4)).map(|_| pick(rng, &SYSCTLS)).map(|(name, value)| (name.to_owned(), value.into())).collect();
        conf["sysctl"] = some.into();
    }
    if percent(rng, 15) {
        let args = attributes(rng);
        conf["args"] = json!({ "cni": args });
        // Without sysctls in the configuration the reference plugin panics at those of the arguments.
        if conf["sysctl"].is_object() && percent(rng, 50) {
            conf["args"]["cni"]["sysctl"] = json!({ "net.ipv4.conf.IFNAME.arp_announce": "2" });
        }
    }
}

fn attachment(rng: &mut Rng, network: &Network, pod: usize, at: usize) -> Attachment {
    let ifname = match network.kind() {
        "loopback" => "lo",
        _ => ["eth0", "net1"][at],
    };
    let mut args = Vec::new();
    let mut runtime = Vec::new();
    for conf in &network.plugins {
        let mut more = json!({});
        match conf["type"].as_str().unwrap() {
            "bridge" if percent(rng, 15) => more["mac"] = mac(rng).into(),
            "portmap" => more = port_mappings(rng, network, pod),
            "bandwidth" if percent(rng, 30) => more = json!({ "bandwidth": bandwidth(rng) }),
            "tuning" if percent(rng, 10) => more["mac"] = mac(rng).into(),
            _ => {}
        }
        runtime.push(more);
    }
    if network.plugins[0]["ipam"].is_object() && percent(rng, 15) {
        // It may be taken, or no address of the network: then ADD is refused.
        let address = format!("10.{}.0.{}", at + 17, rng.u32(1..8));
        match rng.u32(..3) {
            0 => args.push(format!("IP={address}")),
            1 => runtime[0]["ips"] = json!([address]),
            _ => runtime[0]["ips"] = json!([format!("{address}/24")]),
        }
    }
    if network.kind() == "bridge" && percent(rng, 10) {
        args.push(format!("MAC={}", mac(rng)));
    }
    // Without IgnoreUnknown each reference plugin refuses what another one needs (docs/departures.md); runtimes set it.
    if !args.is_empty() || percent(rng, 30) {
        args.insert(0, "IgnoreUnknown=1".to_owned());
        args.push("K8S_POD_NAME=a".to_owned());
    }
    Attachment { pod, network: at, ifname, args: args.join(";"), runtime }
}

fn port_mappings(rng: &mut Rng, network: &Network, pod: usize) -> Value {
    let ipam = network.plugins[0]["ipam"].to_string();
    // With both families the reference plugin leads a port of an IPv4 address to an IPv6 chain that has no rule for it.
    let only_v4 = !ipam.contains("fd00");
    let mut list = Vec::new();
    for n in 0..pick(rng, &[0, 1, 1, 2, 3, 6]) {
        let mut mapping = json!({ "hostPort": 8000 + 100 * pod + n, "containerPort": rng.u16(1..), "protocol": pick(rng, &["tcp", "tcp", "udp", "sctp"]) });
        if only_v4 && percent(rng, 20) {
            mapping["hostIP"] = pick(rng, &["127.0.0.2", "192.0.2.9", "0.0.0.0"]).into();
        }
        list.push(mapping);
    }
    json!({ "portMappings": list })
}

/// What a runtime does, and what happens to it. At the end it deletes all.
fn steps(rng: &mut Rng, networks: &[Network], attachments: &[Attachment]) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut added = vec![false; attachments.len()];
    let mut gone = vec![false; attachments.len()];
    for _ in 0..rng.usize(2..9) {
        let attachment = rng.usize(..attachments.len());
        let network = &networks[attachments[attachment].network];
        let act = match (added[attachment], gone[attachment], rng.u32(..100)) {
            (_, true, _) => Act::Del,
            (false, _, 0..85) => Act::Add,
            (false, _, 85..92) | (true, _, 0..25) => Act::Del,
            (true, _, 25..28) => Act::DelWithoutNamespace,
            (true, _, 28..70) if network.speaks("0.4.0") && can_check(network) => Act::Check,
            (true, _, 28..78) => Act::Add,
            (true, _, 90..) => Act::Event(event(rng, network)),
            // nftables rules of a forgotten attachment: the reference plugin has no GC for them.
            (_, _, 80..) if network.speaks("1.1.0") => Act::Gc { forget: !network.uses_nftables() && percent(rng, 40) },
            _ if network.speaks("1.1.0") => Act::Status,
            _ => Act::Add,
        };
        match act {
            Act::Add => added[attachment] = true,
            Act::Del | Act::DelWithoutNamespace => added[attachment] = false,
            Act::Event(Event::NamespaceGone) => {
                let pod = attachments[attachment].pod;
                attachments.iter().zip(&mut gone).filter(|(other, _)| other.pod == pod).for_each(|(_, gone)| *gone = true);
            }
            _ => {}
        }
        steps.push(Step { act, attachment });
    }
    for (attachment, is_added) in added.into_iter().enumerate() {
        if is_added || percent(rng, 20) {
            steps.push(Step { act: Act::Del, attachment });
        }
        if percent(rng, 15) {
            steps.push(Step { act: Act::Del, attachment });
        }
    }
    steps
}

/// Does CHECK of the reference plugin accept what its ADD made (docs/departures.md)? A bridge without a gateway has another MAC
/// when ports come and go, and routes of other tables are not found.
fn can_check(network: &Network) -> bool {
    let first = &network.plugins[0];
    network.kind() != "bridge"
        || first["ipam"].is_object()
            && (first["isGateway"] == true || first["isDefaultGateway"] == true)
            && !first["ipam"].to_string().contains("\"table\"")
}

fn event(rng: &mut Rng, network: &Network) -> Event {
    let mut events = vec![Event::InterfaceDeleted, Event::NamespaceGone];
    if network.kind() == "loopback" {
        events = vec![Event::InterfaceDown, Event::NamespaceGone];
    }
    if network.kind() == "bridge" {
        events.extend([Event::BridgeDeleted, Event::InterfaceDown]);
    }
    if network.plugins[0]["ipam"].is_object() {
        events.push(Event::AddressesForgotten);
    }
    if network.uses_iptables() {
        events.push(Event::IptablesFlushed);
    }
    pick(rng, &events)
}
