//! Our plugins beside the reference plugins v1.10.0, field by field: the same calls on the same namespaces give the same
//! results, error codes, links, addresses, routes, rules and files. What differs on purpose is taken out here, each with
//! its reason, and listed in `docs/departures.md`.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "reference/cases.rs"]
mod cases;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kernel::netns::{self, Netns};
use libtest_mimic::{Arguments, Trial};
use regex_lite::Regex;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_flannel-cni");

/// A command for a list of configurations, of which each but the first is chained to the one before it.
#[derive(Clone)]
struct Call {
    verb: &'static str,
    id: &'static str,
    list: Vec<Value>,
    env: Vec<(&'static str, &'static str)>,
}

struct Case {
    name: String,
    calls: Vec<Call>,
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    if !arguments.list {
        netns::isolate(Path::new("/mnt")).expect("these tests need namespaces");
    }
    for case in cases::all() {
        trials.push(Trial::test(format!("reference: {}", case.name), move || {
            compare(&case);
            Ok(())
        }));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn compare(case: &Case) {
    let reference = std::env::var_os("FLANNEL_REFERENCE_PLUGINS").map(PathBuf::from);
    let reference = reference.expect("FLANNEL_REFERENCE_PLUGINS is not set: run the tests by `cargo xtask test`");
    // Both have the same path, so that it looks the same in what they say; one after the other.
    let root = Path::new("/mnt").join(case.name.replace([' ', ':', ','], "-"));
    let theirs = life_of(case, &root, |_, name| reference.join(name));
    let ours = life_of(case, &root, |_, _| PathBuf::from(PROGRAM));
    let end = theirs.last().unwrap().1.clone();
    let refused = theirs.iter().any(|(answer, _)| answer.starts_with("error"));
    for ((step, theirs), ours) in case.calls.iter().zip(theirs).zip(ours) {
        assert_eq!(ours.0, theirs.0, "{}: what {} of {} answers; left is ours", case.name, step.verb, step.id);
        if ours.0.starts_with("error") {
            // What the reference plugins leave of a failed ADD, ours undo.
            continue;
        }
        let (only_ours, only_theirs): (Vec<_>, Vec<_>) = (
            ours.1.iter().filter(|line| !theirs.1.contains(line)).collect(),
            theirs.1.iter().filter(|line| !ours.1.contains(line)).collect(),
        );
        assert!(
            only_ours.is_empty() && only_theirs.is_empty(),
            "{}: after {} of {}:\nonly ours: {only_ours:#?}\nonly theirs: {only_theirs:#?}",
            case.name,
            step.verb,
            step.id
        );
        assert_eq!(ours.1.len(), theirs.1.len(), "{}: after {}: some line is there twice", case.name, step.verb);
    }
    if !case.swaps() || refused {
        return;
    }
    // Switched in the middle of a pod's life, there and back: what the one made the other checks and takes away.
    for (who, began_by_us) in [("reference, then ours", false), ("ours, then reference", true)] {
        let plugin = |step: usize, name: &str| if (step == 0) == began_by_us { PathBuf::from(PROGRAM) } else { reference.join(name) };
        let life = life_of(case, &root, plugin);
        for ((answer, _), step) in life.iter().zip(&case.calls) {
            assert!(!answer.starts_with("error"), "{}: {who}: {}: {answer}", case.name, step.verb);
        }
        let last = &life.last().unwrap().1;
        let left: Vec<_> = last.iter().filter(|line| !end.contains(line)).collect();
        assert!(left.is_empty(), "{}: {who}: left behind: {left:#?}", case.name);
    }
}

impl Case {
    /// Is this the plain life of one container?
    fn swaps(&self) -> bool {
        let verbs: Vec<&str> = self.calls.iter().map(|call| call.verb).collect();
        matches!(verbs[..], ["ADD", "CHECK", "DEL", "DEL"] | ["ADD", "DEL", "DEL"])
    }
}

/// Plays a case, and returns what each call answered and what there was afterwards.
fn life_of(case: &Case, root: &Path, plugin: impl Fn(usize, &str) -> PathBuf) -> Vec<(String, Vec<String>)> {
    let _ = std::fs::remove_dir_all(root);
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::write(
        root.join("resolv.conf"),
        "# a remark\nnameserver 10.1.0.1\nnameserver fd00::1\nsearch a.b c.d\ndomain e.f\noptions ndots:2 rotate\n",
    )
    .unwrap();
    let (host, pod) = (Netns::create().unwrap(), Netns::create().unwrap());
    pod.bind(&root.join("ns")).unwrap();
    let mut seen = Vec::new();
    let mut result = Value::Null;
    for (at, step) in case.calls.iter().enumerate() {
        for name in cni::NAMES {
            let link = root.join("bin").join(name);
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(plugin(at, name), link).unwrap();
        }
        let answer = play(step, root, &host, &mut result, case.name.starts_with("protocol"));
        seen.push((answer, state(root, &host, &pod)));
    }
    netns::unbind(&root.join("ns")).unwrap();
    std::fs::remove_dir_all(root).unwrap();
    seen
}

fn play(step: &Call, root: &Path, host: &Netns, result: &mut Value, case_is_protocol: bool) -> String {
    let mut list: Vec<&Value> = step.list.iter().collect();
    if step.verb == "DEL" {
        list.reverse();
    }
    let mut answers = String::new();
    for (at, conf) in list.into_iter().enumerate() {
        let mut conf: Value = serde_json::from_str(&conf.to_string().replace("ROOT", &root.to_string_lossy())).unwrap();
        let first = step.verb == "ADD" && at == 0;
        if conf.is_object() && !first && !result.is_null() {
            conf["prevResult"] = result.clone();
        }
        let plugin = conf["type"].as_str().or(step.list[0]["type"].as_str()).unwrap_or("bridge").to_owned();
        let bin = root.join("bin");
        let mut command = Command::new(bin.join(plugin));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("CNI_COMMAND", step.verb).env("CNI_CONTAINERID", step.id);
        command
            .env("CNI_NETNS", root.join("ns"))
            .env("CNI_IFNAME", if conf["type"] == "loopback" { "lo" } else { "eth0" })
            .env("CNI_PATH", &bin);
        command.envs(step.env.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = host.run(|| command.spawn()).unwrap().unwrap();
        let _ = child.stdin.take().unwrap().write_all(conf.to_string().as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if !output.status.success() {
            // The words are each implementation's own; the code is the specification's. Where the reference plugins say
            // 999 for whatever is wrong, ours tell a configuration that cannot be used (7, 2, 6) from work that failed.
            return match answer["code"].as_u64() {
                Some(2 | 5 | 6 | 7 | 999) if !case_is_protocol => "error 999".to_owned(),
                code => format!("error {code:?}"),
            };
        }
        if step.verb == "ADD" {
            *result = answer.clone();
        }
        answers = normalize(&serde_json::to_string_pretty(&sorted(answer)).unwrap());
    }
    answers
}

/// Objects without what one implementation says and the other leaves out because it is nothing.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().map(|(key, value)| (key, sorted(value))).filter(|(key, value)| !(key == "dns" && *value == json!({}))).collect()
        }
        Value::Array(list) => list.into_iter().map(sorted).collect(),
        other => other,
    }
}

/// The objects in the two namespaces, and the files.
fn state(root: &Path, host: &Netns, pod: &Netns) -> Vec<String> {
    let run = |netns: &Netns, script: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-c", script]).stdin(Stdio::null()).stderr(Stdio::null());
        let output = netns.run(|| sh.output()).unwrap().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let inside = run(
        pod,
        "ip -d -o link; ip -o address; ip route show table all; ip -6 route show table all
         cd /proc/sys/net; grep -H . ipv4/conf/eth0/arp_notify ipv4/conf/eth0/arp_filter ipv4/conf/all/log_martians ipv6/conf/eth0/accept_dad ipv6/conf/eth0/keep_addr_on_down",
    );
    let outside = run(
        host,
        "ip -o link; ip -o address show dev cni0; ip route; ip -6 route; bridge -d link; tc qdisc; tc filter show parent ffff: dev $(ls /sys/class/net | grep veth)
         iptables-save -t nat; iptables-save -t filter; ip6tables-save -t nat; ip6tables-save -t filter
         nft list table inet cni_plugins_masquerade; nft list table bridge nat
         cd /proc/sys/net; grep -H . ipv4/ip_forward ipv6/conf/all/forwarding ipv4/conf/cni0/route_localnet ipv6/conf/cni0/accept_ra",
    );
    let mut files = String::new();
    for folder in ["networks/net", "tuning"] {
        let mut names: Vec<_> = std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten().map(|file| file.path()).collect();
        names.sort();
        for file in names {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            let text = serde_json::from_str::<Value>(&text).map_or(text.replace('\n', " "), |value| value.to_string());
            files.push_str(&format!("file {folder}/{}: {text}\n", file.file_name().unwrap().to_string_lossy()));
        }
    }
    let text = normalize(&format!("{inside}{outside}{files}"));
    let mut places = std::collections::BTreeMap::new();
    // A rule's place in its chain is part of what it means.
    let placed = |line: &str| {
        if line.starts_with('*') {
            places.clear();
        }
        let Some(chain) = line.strip_prefix("-A ").and_then(|rest| rest.split(' ').next()) else { return line.to_owned() };
        let place = places.entry(chain.to_owned()).or_insert(0);
        *place += 1;
        format!("{line} (rule {place})")
    };
    let mut lines: Vec<String> = text.lines().map(placed).filter(|line| !is_noise(line)).collect();
    lines.sort();
    lines
}

/// Lines that tell of the moment and not of the plugin, and those that differ on purpose.
fn is_noise(line: &str) -> bool {
    line.starts_with('#')
        || line.starts_with(":INPUT")
        || line.trim().is_empty()
        // Link-local addresses come when the kernel gets to it.
        || line.contains("fe80") || line.contains("ff00::/8") && line.contains("dev ") || line.contains("anycast")
        || line.contains("dev lo") && line.contains("local ")
        // The bridge's own table of multicast groups and timers.
        || line.starts_with("qdisc noqueue")
}

fn normalize(text: &str) -> String {
    let mut text = text.to_owned();
    for (pattern, with) in [
        (r"\b02:00:00:00:00:([0-9a-f]{2})\b", "GIVEN-$1"),
        (r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC"),
        (r"veth[0-9a-f]{8}", "vethX"),
        (r"bwp[0-9a-f]{12}", "bwpX"),
        // Ours says whose it is: two interfaces of a container would share the reference plugin's link.
        (r"\\ +alias cni:[0-9a-f]{32}", ""),
        (r"(?m)^[0-9]+: ", "N: "),
        (r"@if[0-9]+", "@ifN"),
        (r"link-netnsid [0-9]+", "link-netnsid N"),
        (r"\[[0-9]+:[0-9]+\]", "[0:0]"),
        (r"state (UP|UNKNOWN|LOWERLAYERDOWN|DOWN)", "state S"),
        (r" ?(tentative|noprefixroute|nodad|dadfailed|optimistic)\b", ""),
        (r"state (forwarding|disabled|learning|listening)", "state S"),
        (r"linkdown", ""),
        // The reference plugins say 0 for the queue of a veth, which has none.
        (r"qlen [0-9]+", ""),
        (r"[ \t]+", " "),
        (r"(?m) +$", ""),
        (r"NO-CARRIER,", ""),
    ] {
        text = Regex::new(pattern).unwrap().replace_all(&text, with).into_owned();
    }
    text
}
