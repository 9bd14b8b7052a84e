//! `lab verdicts`: breaks the path to a host in many ways, and compares what each daemon says about it with what is true.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use daemon::output;
use serde_json::{Value, json};

use crate::cluster::Lab;
use crate::plan::{Plan, PodFamily, StoreKind};
use crate::progress::Progress;

/// A verdict that does not come within this time is missing. With three hosts, each path has its turn every second; what is refined by
/// further measures takes some turns.
const LIMIT: Duration = Duration::from_secs(20);
/// Seconds that a cause takes, for the estimate.
const UNITS: f64 = 7.0;

/// Arguments of `lab verdicts`.
#[derive(Debug, Clone, Args)]
pub struct VerdictsArgs {
    /// Only the causes whose name, or whose lab, has this in it
    #[arg(value_name = "TEXT", default_value = "")]
    pub filter: String,
    /// Print one JSON document instead of a table
    #[arg(long)]
    pub json: bool,
}

/// The labs in which paths are broken. Each has three hosts on a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    /// VXLAN.
    Vxlan,
    /// VXLAN, where host 1 alone measures: the others answer as hosts of Go flannel do, by their kernels.
    Kernels,
    /// host-gw, with a pod on each host.
    HostGw,
    /// udp.
    Udp,
    /// VXLAN with both families.
    Dual,
}

impl Stand {
    /// All of them.
    pub const ALL: [Stand; 5] = [Stand::Vxlan, Stand::Kernels, Stand::HostGw, Stand::Udp, Stand::Dual];

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Stand::Vxlan => "vxlan",
            Stand::Kernels => "vxlan, peers as Go's",
            Stand::HostGw => "host-gw",
            Stand::Udp => "udp",
            Stand::Dual => "vxlan, both families",
        }
    }

    fn backend(self) -> &'static str {
        match self {
            Stand::Vxlan | Stand::Kernels | Stand::Dual => "vxlan",
            Stand::HostGw => "host-gw",
            Stand::Udp => "udp",
        }
    }
}

/// Something that breaks paths, or does not.
#[derive(Debug, Clone, Copy)]
pub struct Cause {
    /// What happens.
    pub name: &'static str,
    /// Where it happens.
    pub stand: Stand,
    /// How it is done.
    act: Act,
    /// What host 1 says about host 2, host 2 about host 1, and host 3 about host 2: `R`eachable, `U`nderlay-down, `O`verlay-broken,
    /// `M`tu-too-large, `C`hecksum-broken, `1` one-way, `?` unmeasured, `-` nothing that counts. With both families: IPv4, IPv6 of host 1.
    wanted: &'static str,
}

/// How paths are broken.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// nftables rules of host 2 (or 1), for what comes in and what goes out, ahead of all others.
    Rules(usize, &'static str, &'static str),
    /// A script on a host, and the one that takes it back.
    Script(usize, &'static str, &'static str),
    /// The daemon of host 2 is killed, and then this script runs. Its next start puts all right.
    Dead(&'static str),
}

const fn rules(name: &'static str, stand: Stand, wanted: &'static str, input: &'static str, output: &'static str) -> Cause {
    Cause { name, stand, act: Act::Rules(1, input, output), wanted }
}

const fn script(name: &'static str, stand: Stand, wanted: &'static str, run: &'static str, undo: &'static str) -> Cause {
    Cause { name, stand, act: Act::Script(0, run, undo), wanted }
}

const fn dead(name: &'static str, stand: Stand, wanted: &'static str, run: &'static str) -> Cause {
    Cause { name, stand, act: Act::Dead(run), wanted }
}

/// All causes. Host 2 is broken, unless the name says host 1; the addresses are 10.0.0.1, 10.0.0.2 and 10.0.0.3.
pub const CAUSES: [Cause; 51] = [
    rules("cut off from all hosts", Stand::Vxlan, "UUU", "iifname eth0 drop", "oifname eth0 drop"),
    rules("cut off from host 1", Stand::Vxlan, "UUR", "ip saddr 10.0.0.1 drop", "ip daddr 10.0.0.1 drop"),
    rules("packets from host 1 are dropped", Stand::Vxlan, "1UR", "ip saddr 10.0.0.1 drop", ""),
    rules("packets to host 1 are dropped", Stand::Vxlan, "U1R", "", "ip daddr 10.0.0.1 drop"),
    rules("VXLAN is dropped", Stand::Vxlan, "OOO", "udp dport 8472 drop", "udp dport 8472 drop"),
    rules(
        "VXLAN with host 1 is dropped",
        Stand::Vxlan,
        "OOR",
        "ip saddr 10.0.0.1 udp dport 8472 drop",
        "ip daddr 10.0.0.1 udp dport 8472 drop",
    ),
    rules("VXLAN from host 1 is dropped", Stand::Vxlan, "11R", "ip saddr 10.0.0.1 udp dport 8472 drop", ""),
    rules("VXLAN to host 1 is dropped", Stand::Vxlan, "11R", "", "ip daddr 10.0.0.1 udp dport 8472 drop"),
    rules("all UDP is dropped", Stand::Vxlan, "OOO", "iifname eth0 meta l4proto udp drop", "oifname eth0 meta l4proto udp drop"),
    rules("pings are dropped", Stand::Vxlan, "RRR", "meta l4proto icmp drop", ""),
    rules("probes of daemons are dropped", Stand::Vxlan, "RRR", "udp dport 8286 drop", ""),
    rules("TCP to closed ports is dropped", Stand::Vxlan, "RRR", "tcp dport 8286 drop", ""),
    rules("pings and probes of daemons are dropped", Stand::Vxlan, "???", "udp dport 8286 drop; meta l4proto icmp drop", ""),
    rules(
        "TCP and UDP of the pod network are dropped, as by bad checksums",
        Stand::Vxlan,
        "CCC",
        "iifname flannel.1 meta l4proto { tcp, udp } drop",
        "",
    ),
    rules(
        "packets over 1400 bytes from host 1 are dropped",
        Stand::Vxlan,
        "MMR",
        "ip saddr 10.0.0.1 udp dport 8472 meta length > 1400 drop",
        "",
    ),
    rules("packets over 1000 bytes are dropped", Stand::Vxlan, "MMM", "udp dport 8472 meta length > 1000 drop", ""),
    script(
        "host 1 has a blackhole for half of the subnet",
        Stand::Vxlan,
        "O1R",
        "ip route add blackhole 10.244.2.0/25",
        "ip route del blackhole 10.244.2.0/25",
    ),
    script(
        "host 1 has an unreachable route",
        Stand::Vxlan,
        "O1R",
        "ip route add unreachable 10.244.2.0/25",
        "ip route del unreachable 10.244.2.0/25",
    ),
    script(
        "host 1 has a prohibited route",
        Stand::Vxlan,
        "O1R",
        "ip route add prohibit 10.244.2.0/25",
        "ip route del prohibit 10.244.2.0/25",
    ),
    script(
        "host 1 routes half of the subnet to a dead gateway",
        Stand::Vxlan,
        "--R",
        "ip route add 10.244.2.0/25 via 10.0.0.99",
        "ip route del 10.244.2.0/25 via 10.0.0.99",
    ),
    script(
        "host 1 has a rule that refuses the subnet",
        Stand::Vxlan,
        "O1R",
        "ip rule add to 10.244.2.0/24 blackhole",
        "ip rule del to 10.244.2.0/24 blackhole",
    ),
    Cause {
        name: "host 1 drops what it sends to the subnet",
        stand: Stand::Vxlan,
        act: Act::Rules(0, "", "ip daddr 10.244.2.0 drop"),
        wanted: "O1R",
    },
    Cause {
        name: "the interface is down",
        stand: Stand::Vxlan,
        act: Act::Script(1, "ip link set eth0 down", "ip link set eth0 up; ip route replace default via 10.0.0.254 dev eth0"),
        wanted: "U-U",
    },
    dead("the daemon is killed", Stand::Vxlan, "R-R", "true"),
    dead("the daemon is killed, its VXLAN device deleted", Stand::Vxlan, "O-O", "ip link del flannel.1"),
    dead("the daemon is killed, its VXLAN device set down", Stand::Vxlan, "O-O", "ip link set flannel.1 down"),
    dead("the daemon is killed, its VXLAN device without address", Stand::Vxlan, "O-O", "ip addr flush dev flannel.1"),
    dead("the daemon is killed, its route to host 1 deleted", Stand::Vxlan, "O-R", "ip route del 10.244.1.0/24"),
    dead("the daemon is killed, its neighbours deleted", Stand::Vxlan, "O-O", "ip neigh flush nud permanent dev flannel.1"),
    dead(
        "the daemon is killed, its FDB deleted",
        Stand::Vxlan,
        "O-O",
        "bridge fdb show dev flannel.1 | while read mac rest; do bridge fdb del $mac dev flannel.1; done",
    ),
    dead(
        "the daemon is killed, its VXLAN device has another VNI",
        Stand::Vxlan,
        "O-O",
        "ip link del flannel.1; ip link add flannel.1 type vxlan id 7 dstport 8472 dev eth0; ip link set flannel.1 up",
    ),
    dead(
        "the daemon is killed, its VXLAN device has another port",
        Stand::Vxlan,
        "O-O",
        "ip link del flannel.1; ip link add flannel.1 type vxlan id 1 dstport 4789 dev eth0; ip link set flannel.1 up",
    ),
    dead("the daemon is killed, the host is gone", Stand::Vxlan, "U-U", "ip link set eth0 down"),
    rules("cut off from host 1", Stand::Kernels, "U--", "ip saddr 10.0.0.1 drop", "ip daddr 10.0.0.1 drop"),
    rules("packets from host 1 are dropped", Stand::Kernels, "U--", "ip saddr 10.0.0.1 drop", ""),
    rules("VXLAN is dropped", Stand::Kernels, "O--", "udp dport 8472 drop", "udp dport 8472 drop"),
    rules("VXLAN from host 1 is dropped", Stand::Kernels, "O--", "ip saddr 10.0.0.1 udp dport 8472 drop", ""),
    rules(
        "packets over 1400 bytes from host 1 are dropped",
        Stand::Kernels,
        "M--",
        "ip saddr 10.0.0.1 udp dport 8472 meta length > 1400 drop",
        "",
    ),
    rules("TCP of the pod network is dropped, as by bad checksums", Stand::Kernels, "C--", "iifname flannel.1 meta l4proto tcp drop", ""),
    rules("TCP to closed ports is dropped", Stand::Kernels, "R--", "tcp dport 8286 drop", ""),
    rules("pings are dropped", Stand::Kernels, "?--", "meta l4proto icmp drop", ""),
    dead("the daemon is killed, its VXLAN device deleted", Stand::Kernels, "O--", "ip link del flannel.1"),
    rules("cut off from host 1", Stand::HostGw, "UUR", "ip saddr 10.0.0.1 drop", "ip daddr 10.0.0.1 drop"),
    rules("packets over 1400 bytes are dropped", Stand::HostGw, "MMM", "iifname eth0 meta length > 1400 drop", ""),
    rules("pings are dropped", Stand::HostGw, "RRR", "meta l4proto icmp drop", ""),
    script(
        "host 1 has a blackhole for half of the subnet",
        Stand::HostGw,
        "ORR",
        "ip route add blackhole 10.244.2.0/25",
        "ip route del blackhole 10.244.2.0/25",
    ),
    dead("the daemon is killed", Stand::HostGw, "R-R", "true"),
    rules("UDP 8285 is dropped", Stand::Udp, "OOO", "udp dport 8285 drop", "udp dport 8285 drop"),
    dead("the daemon is killed, and with it the path", Stand::Udp, "O-O", "true"),
    rules("VXLAN over IPv6 is dropped", Stand::Dual, "RO", "ip6 nexthdr udp udp dport 8472 drop", "ip6 nexthdr udp udp dport 8472 drop"),
    rules("VXLAN over IPv4 is dropped", Stand::Dual, "OR", "ip protocol udp udp dport 8472 drop", "ip protocol udp udp dport 8472 drop"),
];

/// Which host says something, about which one, by which family.
type View = (usize, usize, &'static str);

impl Cause {
    fn views(&self) -> Vec<(View, char)> {
        let places: &[View] = match self.stand {
            Stand::Dual => &[(0, 1, "ipv4"), (0, 1, "ipv6")],
            Stand::Vxlan | Stand::Kernels | Stand::HostGw | Stand::Udp => &[(0, 1, "ipv4"), (1, 0, "ipv4"), (2, 1, "ipv4")],
        };
        places.iter().copied().zip(self.wanted.chars()).filter(|(_, letter)| *letter != '-').collect()
    }

    /// Whether the cause is one of a filter.
    fn fits(&self, filter: &str) -> bool {
        self.name.contains(filter) || self.stand.name().contains(filter)
    }
}

fn verdict_of(letter: char) -> &'static str {
    match letter {
        'R' => "reachable",
        'U' => "underlay-down",
        'O' => "overlay-broken",
        'M' => "mtu-too-large",
        'C' => "checksum-broken",
        '1' => "one-way",
        _ => "unmeasured",
    }
}

/// What was seen of a cause.
#[derive(Debug)]
struct Row {
    cause: Cause,
    /// What each view said, and after how long all of them said what they should.
    said: Vec<String>,
    after: Duration,
    /// What host 1 said in words.
    text: String,
    is_right: bool,
}

/// Breaks paths in all ways that fit the filter and prints a table. True if every daemon said what is true.
pub(crate) fn run(program: &Path, scratch: &Path, args: &VerdictsArgs) -> anyhow::Result<bool> {
    let causes: Vec<Cause> = CAUSES.into_iter().filter(|cause| cause.fits(&args.filter)).collect();
    ensure!(!causes.is_empty(), "no cause and no lab has {:?} in its name", args.filter);
    #[expect(clippy::cast_precision_loss, reason = "a small number, for an estimate")]
    let mut progress = Progress::new(causes.len() as f64 * UNITS);
    let mut rows = Vec::new();
    let mut outcome = Ok(());
    for stand in Stand::ALL {
        let causes: Vec<Cause> = causes.iter().copied().filter(|cause| cause.stand == stand).collect();
        if causes.is_empty() || outcome.is_err() {
            continue;
        }
        progress.show(&format!("{}: starting 3 hosts", stand.name()));
        let root = scratch.join(stand.name().replace([' ', ','], "-"));
        outcome = try_all(stand, &causes, program, &root, &mut |row| {
            progress.show(&format!("{}: {}", stand.name(), row.cause.name));
            progress.add(UNITS);
            rows.push(row);
        });
    }
    progress.clear();
    print(&rows, args.json);
    outcome.map(|()| rows.iter().all(|row| row.is_right))
}

/// Breaks paths in one lab, in all ways that belong to it.
///
/// # Errors
/// When a daemon does not say what is true: the text has the cause and what it says.
pub fn check(stand: Stand, program: &Path, root: &Path) -> anyhow::Result<()> {
    let causes: Vec<Cause> = CAUSES.into_iter().filter(|cause| cause.stand == stand).collect();
    let mut wrong = Vec::new();
    try_all(stand, &causes, program, root, &mut |row| {
        println!("{}", markdown(&row));
        if !row.is_right {
            wrong.push(markdown(&row));
        }
    })?;
    ensure!(wrong.is_empty(), "wrong verdicts:\n{}", wrong.join("\n"));
    Ok(())
}

fn try_all(stand: Stand, causes: &[Cause], program: &Path, root: &Path, done: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let mut plan = Plan { store: StoreKind::Embedded, ..Plan::new(3, &json!({ "Type": stand.backend() }), program) };
    if stand == Stand::Dual {
        plan = plan.family(PodFamily::Dual);
    }
    if stand == Stand::Kernels {
        plan.env.push(("FLANNELD_PROBE".to_owned(), "off".to_owned()));
    }
    let mut lab = Lab::start(plan, root)?;
    lab.settle()?;
    if stand == Stand::Kernels {
        lab.stop_daemon(0, false)?;
        lab.start_daemon(0, &["--probe=on"])?;
        lab.settle()?;
    }
    let mut pods = Vec::new();
    if stand == Stand::HostGw {
        pods = (0..3).map(|host| lab.add_pod(host)).collect::<Result<_, _>>()?;
    }
    wait_until_reachable(&lab, stand).context("before anything was broken")?;
    // Every path has had some turns: bridges have answered, and daemons know each other.
    std::thread::sleep(Duration::from_secs(5));
    for cause in causes {
        let row = try_one(&mut lab, cause).with_context(|| format!("{}: {}", stand.name(), cause.name))?;
        done(row);
    }
    drop(pods);
    Ok(())
}

fn try_one(lab: &mut Lab, cause: &Cause) -> anyhow::Result<Row> {
    let began = Instant::now();
    let undo = break_path(lab, cause.act)?;
    let views = cause.views();
    let wanted: Vec<&str> = views.iter().map(|(_, letter)| verdict_of(*letter)).collect();
    // What stays reachable is so from the beginning: it must still be so after a while.
    let is_harmless = wanted.iter().all(|wanted| *wanted == "reachable");
    let settled = began + if is_harmless { Duration::from_secs(5) } else { Duration::ZERO };
    let (said, is_right) = loop {
        let said: Vec<Value> = views.iter().map(|(view, _)| path(lab, *view)).collect();
        let is_right = said.iter().zip(&wanted).all(|(said, wanted)| said["verdict"] == *wanted);
        if (is_right && Instant::now() >= settled) || (is_harmless && !is_right) || began.elapsed() > LIMIT {
            break (said, is_right);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let after = began.elapsed();
    match undo {
        Some((host, script)) => drop(lab.hosts[host].shell(&script)?),
        None => {
            lab.hosts[1].shell("ip link set eth0 up; ip route replace default via 10.0.0.254 dev eth0")?;
            lab.start_daemon(1, &[])?;
            lab.settle()?;
        }
    }
    wait_until_reachable(lab, cause.stand).context("after the cause was taken back")?;
    let error = said[0]["error"].as_str().map(|error| format!(" ({error})")).unwrap_or_default();
    let text = format!("{}{error}", said[0]["reason"].as_str().unwrap_or_default());
    let said = said.iter().map(|said| said["verdict"].as_str().unwrap_or_default().to_owned()).collect();
    Ok(Row { cause: *cause, said, after, text, is_right })
}

/// Breaks the path, and returns how it is taken back: a script on a host, or a new start of host 2's daemon.
fn break_path(lab: &mut Lab, act: Act) -> anyhow::Result<Option<(usize, String)>> {
    match act {
        Act::Rules(host, input, output) => {
            let chain = |hook: &str, rule: &str| format!("chain {hook} {{ type filter hook {hook} priority -400; {rule}; }};");
            let chains = [("input", input), ("output", output)].into_iter().filter(|(_, rule)| !rule.is_empty());
            let chains: String = chains.map(|(hook, rule)| chain(hook, rule)).collect();
            lab.hosts[host].shell(&format!("nft 'table inet broken {{ {chains} }}'"))?;
            Ok(Some((host, "nft delete table inet broken".to_owned())))
        }
        Act::Script(host, run, undo) => {
            lab.hosts[host].shell(run)?;
            Ok(Some((host, undo.to_owned())))
        }
        Act::Dead(run) => {
            lab.stop_daemon(1, true)?;
            lab.hosts[1].shell(run)?;
            Ok(None)
        }
    }
}

/// What a host says about its path to another one.
fn path(lab: &Lab, (from, to, family): View) -> Value {
    let Ok(state) = lab.hosts[from].state() else { return Value::Null };
    let subnet = format!("10.244.{}.0/", to + 1);
    let peers = state["peers"]["list"].as_array();
    let peer = peers.into_iter().flatten().find(|peer| peer["subnet"].as_str().is_some_and(|text| text.starts_with(&subnet)));
    let paths = peer.and_then(|peer| peer["paths"].as_array()).into_iter().flatten();
    paths.into_iter().find(|path| path["family"] == family).cloned().unwrap_or_default()
}

fn wait_until_reachable(lab: &Lab, stand: Stand) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    let hosts = if stand == Stand::Kernels { 1 } else { 3 };
    let families: &[&str] = if stand == Stand::Dual { &["ipv4", "ipv6"] } else { &["ipv4"] };
    let pairs = (0..hosts).flat_map(|from| (0..3).map(move |to| (from, to))).filter(|(from, to)| from != to);
    let views: Vec<View> = pairs.flat_map(|(from, to)| families.iter().map(move |family| (from, to, *family))).collect();
    loop {
        let broken = views.iter().find(|view| path(lab, **view)["verdict"] != "reachable");
        let Some(view) = broken else { return Ok(()) };
        ensure!(Instant::now() < end, "not reachable within {LIMIT:?}: {view:?}: {}", path(lab, *view));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn markdown(row: &Row) -> String {
    let mut said = row.said.iter();
    let wanted = row.cause.wanted.chars();
    let mut columns: Vec<&str> = wanted.map(|letter| if letter == '-' { "–" } else { said.next().map_or("", String::as_str) }).collect();
    columns.resize(3, "–");
    let wrong = match row.is_right {
        true => String::new(),
        false => format!(
            "**wrong**: wanted {}; ",
            row.cause.views().iter().map(|(_, letter)| verdict_of(*letter)).collect::<Vec<_>>().join(", ")
        ),
    };
    let (name, lab, after) = (row.cause.name, row.cause.stand.name(), row.after.as_secs_f64());
    format!("| {name} | {lab} | {} | {after:.1} | {wrong}{} |", columns.join(" | "), row.text)
}

fn print(rows: &[Row], as_json: bool) {
    if as_json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|row| {
                json!({
                    "cause": row.cause.name, "lab": row.cause.stand.name(), "verdicts": row.said, "reason": row.text,
                    "after_s": (row.after.as_secs_f64() * 10.0).round() / 10.0,
                })
            })
            .collect();
        return output::line(serde_json::to_string_pretty(&rows).unwrap_or_default());
    }
    output::line("| cause, at host 2 | lab | host 1 about 2 | host 2 about 1 | host 3 about 2 | after s | in words, by host 1 |");
    output::line("|---|---|---|---|---|--:|---|");
    rows.iter().for_each(|row| output::line(markdown(row)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_named_once_and_says_what_is_wanted() {
        for (i, cause) in CAUSES.iter().enumerate() {
            let length = if cause.stand == Stand::Dual { 2 } else { 3 };
            assert_eq!(cause.wanted.len(), length, "{}", cause.name);
            assert!(cause.wanted.chars().all(|letter| "RUOMC1?-".contains(letter)), "{}", cause.name);
            assert!(
                CAUSES[..i].iter().all(|other| (other.name, other.stand) != (cause.name, cause.stand)),
                "{} is there twice",
                cause.name
            );
        }
    }
}
