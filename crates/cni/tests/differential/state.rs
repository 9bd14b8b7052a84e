//! What is in the kernel and in files, as lines that are the same for both implementations. What differs on purpose, or by
//! chance, is left out here, each with its reason.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use kernel::netns::Netns;
use regex_lite::Regex;
use serde_json::{Value, json};

/// What is read beside links, addresses, routes and files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope {
    pub(crate) iptables: bool,
    pub(crate) nftables: bool,
    pub(crate) limits: bool,
}

/// An answer, normalized.
pub(crate) fn answer(result: &Value) -> String {
    normalize(&serde_json::to_string_pretty(&without_empty(result)).unwrap())
}

/// Objects without what one implementation writes and the other leaves out because it is empty, and without the MTU of an
/// interface, which only our tuning plugin reports (docs/departures.md).
fn without_empty(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let is_left_out = |key: &str, value: &Value| key == "dns" && *value == json!({}) || key == "mtu" && map.contains_key("mac");
            map.iter().map(|(key, value)| (key.clone(), without_empty(value))).filter(|(key, value)| !is_left_out(key, value)).collect()
        }
        Value::Array(list) => list.iter().map(without_empty).collect(),
        other => other.clone(),
    }
}

/// Reads everything, as sorted lines.
pub(crate) fn read<'a>(root: &Path, host: &Netns, pods: impl Iterator<Item = (usize, &'a Netns)>, scope: Scope) -> Vec<String> {
    let mut lines = Vec::new();
    let links = network(host, "host", &mut lines);
    let mut names: Vec<String> = HOST_SYSCTLS.map(ToOwned::to_owned).into();
    names.extend(links.iter().filter(|name| !name.starts_with("veth")).map(|bridge| format!("net/ipv4/conf/{bridge}/route_localnet")));
    sysctls(host, "host", &names, &mut lines);
    for (number, pod) in pods {
        let of = format!("pod{number}");
        let links = network(pod, &of, &mut lines);
        let mut names: Vec<String> = POD_SYSCTLS.map(ToOwned::to_owned).into();
        for link in links.iter().filter(|link| *link != "lo") {
            names.extend(LINK_SYSCTLS.map(|name| name.replace("LINK", link)));
        }
        sysctls(pod, &of, &names, &mut lines);
    }
    if scope.iptables {
        iptables(host, &mut lines);
    }
    if scope.nftables {
        nftables(host, &mut lines);
    }
    if scope.limits {
        limits(host, &links, &mut lines);
    }
    for folder in ["networks/net0", "networks/net1", "tuning"] {
        files(root, folder, &mut lines);
    }
    let mut lines: Vec<String> = lines.iter().map(|line| normalize(line)).collect();
    lines.sort();
    lines
}

const HOST_SYSCTLS: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];
const POD_SYSCTLS: [&str; 3] = ["net/ipv4/conf/all/log_martians", "net/ipv4/ip_local_port_range", "net/core/somaxconn"];
const LINK_SYSCTLS: [&str; 9] = [
    "net/ipv4/conf/LINK/arp_notify",
    "net/ipv4/conf/LINK/arp_filter",
    "net/ipv4/conf/LINK/arp_announce",
    "net/ipv4/conf/LINK/rp_filter",
    "net/ipv4/conf/LINK/log_martians",
    "net/ipv6/conf/LINK/accept_dad",
    "net/ipv6/conf/LINK/autoconf",
    "net/ipv6/conf/LINK/disable_ipv6",
    "net/ipv6/conf/LINK/keep_addr_on_down",
];

fn sysctls(netns: &Netns, of: &str, names: &[String], lines: &mut Vec<String>) {
    let read = || {
        names
            .iter()
            .map(|name| format!("{of} sysctl {name} = {:?}", std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()))
            .collect::<Vec<_>>()
    };
    lines.extend(netns.run(read).unwrap());
}

/// What a program prints in a namespace.
fn output(netns: &Netns, program: &str, args: &[&str], input: &str) -> String {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        netns.run(|| command.spawn()).unwrap().unwrap_or_else(|error| panic!("{program}: {error}: it is installed by `cargo xtask test`"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Links, addresses, routes and policy rules. Returns the names of the links.
fn network(netns: &Netns, of: &str, lines: &mut Vec<String>) -> Vec<String> {
    let text = output(netns, "ip", &["-j", "-d", "-batch", "-"], "link show\naddress show\nroute show table all\nrule show\n");
    let mut lists =
        serde_json::Deserializer::from_str(&text).into_iter::<Value>().map(|list| list.unwrap_or_else(|error| panic!("{error}: {text}")));
    let mut next = || lists.next().and_then(|list| list.as_array().cloned()).unwrap_or_default();
    let (links, addresses, routes, rules) = (next(), next(), next(), next());
    lines.extend(links.iter().map(|link| format!("{of} link {}", self::link(link))));
    for link in &addresses {
        for address in link["addr_info"].as_array().into_iter().flatten() {
            let text = some_of(address, &["family", "local", "prefixlen", "broadcast", "scope"]);
            // Link-local addresses come when the kernel gets to it.
            if !text.contains("fe80") {
                lines.push(format!("{of} address {} {text}", link["ifname"].as_str().unwrap()));
            }
        }
    }
    for route in &routes {
        let text = some_of(route, &["type", "dst", "gateway", "dev", "table", "protocol", "scope", "prefsrc", "metric", "metrics"]);
        // Those of link-local addresses, of multicast, and of the addresses themselves, which are compared as such: they come
        // when the kernel gets to it.
        let by_kernel = ["fe80", "ff00::/8", "multicast", "anycast"].iter().any(|word| text.contains(word)) || route["table"] == "local";
        if !by_kernel {
            lines.push(format!("{of} route {text}"));
        }
    }
    lines.extend(rules.iter().map(|rule| format!("{of} rule {rule}")));
    links.iter().filter_map(|link| link["ifname"].as_str()).map(ToOwned::to_owned).collect()
}

fn some_of(object: &Value, names: &[&str]) -> String {
    names.iter().filter(|name| !object[**name].is_null()).map(|name| format!("{name}={} ", object[*name])).collect()
}

fn link(link: &Value) -> String {
    let mut text = some_of(link, &["ifname", "mtu", "qdisc", "master", "address", "promiscuity", "allmulti"]);
    // Whether there is a carrier at this moment depends on the kernel's workers.
    let flags = link["flags"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let flags: Vec<&str> = flags.filter(|flag| !["NO-CARRIER", "LOWER_UP", "M-DOWN"].contains(flag)).collect();
    text.push_str(&format!("flags={flags:?} "));
    let info = &link["linkinfo"];
    text.push_str(&some_of(info, &["info_kind", "info_slave_kind"]));
    text.push_str(&some_of(&info["info_data"], &["vlan_filtering", "stp_state", "ageing_time", "forward_delay"]));
    text.push_str(&some_of(
        &info["info_slave_data"],
        &["hairpin", "isolated", "guard", "learning", "flood", "mcast_flood", "neigh_suppress"],
    ));
    text
}

fn iptables(host: &Netns, lines: &mut Vec<String>) {
    for (family, program) in [("v4", "iptables-save"), ("v6", "ip6tables-save")] {
        let mut table = String::new();
        let mut places = BTreeMap::new();
        for line in output(host, program, &[], "").lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = name.to_owned();
                places.clear();
            } else if let Some(chain) = line.strip_prefix(':') {
                // A base chain appears when a program looks at its table.
                if chain.contains(" - ") {
                    lines.push(format!("iptables {family} {table} chain {}", chain.split(' ').next().unwrap_or_default()));
                }
            } else if let Some(rule) = line.strip_prefix("-A ") {
                // A rule's place in its chain is part of what it means.
                let place = places.entry(rule.split(' ').next().unwrap_or_default().to_owned()).or_insert(0);
                *place += 1;
                lines.push(format!("iptables {family} {table} rule {place}: {rule}"));
            }
        }
    }
}

fn nftables(host: &Netns, lines: &mut Vec<String>) {
    let (mut table, mut chain, mut place) = (String::new(), String::new(), 0);
    for line in output(host, "nft", &["list", "ruleset"], "").lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            (table, chain, place) = (name.trim_end_matches(" {").to_owned(), String::new(), 0);
        } else if let Some(name) = line.strip_prefix("chain ") {
            (chain, place) = (name.trim_end_matches(" {").to_owned(), 0);
        } else if !line.is_empty() && line != "}" && !line.starts_with('#') {
            place += 1;
            // Which connections to a mapped port are masqueraded differs on purpose (docs/departures.md); and a table's comment
            // is the reference plugin's.
            if table.ends_with("cni_hostport") && (line.ends_with("CNI portmap plugin\"") || chain == "masquerading") {
                continue;
            }
            // Those of iptables are compared as that prints them.
            if !["nat", "filter", "mangle", "raw", "security"]
                .iter()
                .any(|name| table == format!("ip {name}") || table == format!("ip6 {name}"))
            {
                lines.push(format!("nftables {table} {chain} {place}: {line}"));
            }
        }
    }
}

fn limits(host: &Netns, links: &[String], lines: &mut Vec<String>) {
    let filters: String =
        links.iter().filter(|name| name.starts_with("veth")).map(|name| format!("filter show dev {name} ingress\n")).collect();
    let text = output(host, "tc", &["-batch", "-"], &format!("qdisc show\n{filters}"));
    // The reference plugin redirects to the same link twice, the second time without effect, and names a class that no such
    // link has.
    let is_twice = |line: &&str| ["action order 2: mirred", "index "].iter().any(|text| line.trim_start().starts_with(text));
    let lines_of_one = text.lines().filter(|line| !line.starts_with("qdisc noqueue") && !line.trim().is_empty() && !is_twice(line));
    lines.extend(lines_of_one.map(|line| format!("tc {}", line.replace("terminal flowid", "flowid").replace("*flowid 1:1", "flowid"))));
}

fn files(root: &Path, folder: &str, lines: &mut Vec<String>) {
    // The lock is an empty file, which appears at the first use.
    for file in std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten().filter(|file| file.file_name() != "lock") {
        let text = std::fs::read_to_string(file.path()).unwrap_or_default();
        let text = serde_json::from_str::<Value>(&text).map_or(text.replace("\r\n", " "), |value| value.to_string());
        lines.push(format!("file {folder}/{}: {text}", file.file_name().to_string_lossy()));
    }
}

/// Replaces what each implementation draws at random, and what counts the kernel's objects. A pattern is tried where its mark
/// is: most lines have none.
fn normalize(text: &str) -> String {
    use std::sync::OnceLock;
    static PATTERNS: OnceLock<Vec<(&str, Regex, &str)>> = OnceLock::new();
    let patterns = PATTERNS.get_or_init(|| {
        [
            ("02:00:00:00:00:", r"\b02:00:00:00:00:([0-9a-f]{2})\b", "GIVEN-$1"),
            (":", r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC"),
            ("veth", r"veth[0-9a-f]{8}", "vethX"),
            ("bwp", r"bwp[0-9a-f]{12}", "bwpX"),
            ("[", r"\[[0-9]+:[0-9]+\]", "[0:0]"),
            // Ours names an interface that is not the usual one (docs/departures.md).
            (" if: ", r#" if: \\"[a-z0-9]+\\""#, ""),
            // The reference plugin rounds a burst to what is sent in whole microseconds.
            ("burst", r"burst [0-9]+[KMG]?b", "burst B"),
            ("  ", r" +", " "),
        ]
        .map(|(mark, pattern, with)| (mark, Regex::new(pattern).unwrap(), with))
        .into()
    });
    let mut text = text.replace('\t', " ");
    for (mark, pattern, with) in patterns {
        if text.contains(mark) {
            text = pattern.replace_all(&text, *with).into_owned();
        }
    }
    text
}
