//! Plays a sequence of calls as libcni does, and notes after each step what was answered and what is in the kernel and in
//! files.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kernel::netns::{self, Netns};
use serde_json::{Value, json};

use crate::sequence::{Act, Attachment, Event, Network, Sequence, Step};
use crate::state::{self, Scope};

/// Whose plugins are called.
#[derive(Debug, Clone)]
pub(crate) enum Implementation {
    Ours,
    /// A folder of programs.
    Reference(PathBuf),
}

impl Implementation {
    fn program(&self, plugin: &str) -> PathBuf {
        match self {
            Implementation::Ours => PathBuf::from(env!("CARGO_BIN_EXE_flannel-cni")),
            Implementation::Reference(folder) => folder.join(plugin),
        }
    }
}

/// A step with what came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) step: Step,
    pub(crate) answer: String,
    pub(crate) state: Vec<String>,
}

/// A host with its containers, for one implementation.
struct Life<'a> {
    sequence: &'a Sequence,
    implementation: &'a Implementation,
    root: &'a Path,
    host: Netns,
    pods: Vec<Netns>,
    /// The result of each attachment's last ADD, as libcni caches it.
    cached: Vec<Option<Value>>,
}

/// Plays a sequence in namespaces of its own. Both implementations use the same paths, one after the other.
pub(crate) fn play(sequence: &Sequence, implementation: &Implementation, root: &Path) -> Vec<Outcome> {
    let _ = std::fs::remove_dir_all(root);
    std::fs::create_dir_all(root.join("bin")).unwrap();
    for plugin in cni::NAMES {
        std::os::unix::fs::symlink(implementation.program(plugin), root.join("bin").join(plugin)).unwrap();
    }
    std::fs::write(root.join("resolv.conf"), "nameserver 10.1.0.1\nnameserver fd00::1\nsearch a.b c.d\ndomain e.f\noptions ndots:2\n")
        .unwrap();
    let pods: Vec<Netns> = (0..sequence.pods).map(|_| Netns::create().unwrap()).collect();
    for (number, pod) in pods.iter().enumerate() {
        pod.bind(&root.join(format!("ns{number}"))).unwrap();
    }
    let cached = sequence.attachments.iter().map(|_| None).collect();
    let mut life = Life { sequence, implementation, root, host: Netns::create().unwrap(), pods, cached };
    life.prepare();
    let outcomes = sequence.steps.iter().enumerate().map(|(at, step)| life.outcome(at, *step)).collect();
    life.end();
    outcomes
}

impl Life<'_> {
    fn prepare(&self) {
        let needs_chain =
            self.sequence.networks.iter().flat_map(|network| &network.plugins).any(|conf| conf["externalSetMarkChain"].is_string());
        if needs_chain {
            for program in ["iptables", "ip6tables"] {
                self.run(&self.host, program, &["-t", "nat", "-N", "SET-MARK"]);
            }
        }
    }

    fn end(self) {
        self.host.run(kernel::pod_rules::clear).unwrap();
        for number in 0..self.pods.len() {
            let path = self.root.join(format!("ns{number}"));
            if path.exists() {
                netns::unbind(&path).unwrap();
            }
        }
        std::fs::remove_dir_all(self.root).unwrap();
    }

    fn run(&self, netns: &Netns, program: &str, args: &[&str]) {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // What an event is about may not exist.
        let _ = netns.run(|| command.status()).unwrap().unwrap();
    }

    fn outcome(&mut self, at: usize, step: Step) -> Outcome {
        let answer = self.act(step);
        let attachment = &self.sequence.attachments[step.attachment];
        let is_last = at + 1 == self.sequence.steps.len();
        let network = &self.sequence.networks[attachment.network];
        let whole = |uses: fn(&Network) -> bool| uses(network) || is_last && self.sequence.networks.iter().any(uses);
        let scope =
            Scope { iptables: whole(Network::uses_iptables), nftables: whole(Network::uses_nftables), limits: whole(Network::limits) };
        // What changes nothing, or is no plugin's work, is seen after the next step.
        if !is_last && matches!(step.act, Act::Check | Act::Status | Act::Event(_)) {
            return Outcome { step, answer, state: Vec::new() };
        }
        // A step changes one container; the others are read at the end.
        let pods = self.pods.iter().enumerate().filter(|(number, _)| is_last || *number == attachment.pod);
        Outcome { step, answer, state: state::read(self.root, &self.host, pods, scope) }
    }

    fn act(&mut self, step: Step) -> String {
        let at = step.attachment;
        match step.act {
            Act::Add => match self.add(at) {
                Ok(result) => {
                    let text = state::answer(&result);
                    self.cached[at] = Some(result);
                    text
                }
                Err(error) => {
                    // What the reference plugins leave of a failed ADD, ours undo. A runtime deletes after it in any case.
                    let deleted = self.del(at, true);
                    format!("{error}; then DEL: {deleted}")
                }
            },
            Act::Check => self.each(at, "CHECK", false, |_| {}),
            Act::Del => self.del(at, true),
            Act::DelWithoutNamespace => self.del(at, false),
            Act::Gc { forget } => self.gc(at, forget),
            Act::Status => self.each(at, "STATUS", false, |_| {}),
            Act::Event(event) => {
                self.happen(at, event);
                "done".to_owned()
            }
        }
    }

    fn place(&self, at: usize) -> (&Attachment, &Network) {
        let attachment = &self.sequence.attachments[at];
        (attachment, &self.sequence.networks[attachment.network])
    }

    /// The configuration of a plugin of the list, as libcni passes it.
    fn conf(&self, at: usize, plugin: usize, previous: Option<&Value>) -> Value {
        let (attachment, network) = self.place(at);
        let text = network.plugins[plugin].to_string().replace("ROOT", &self.root.to_string_lossy());
        let mut conf: Value = serde_json::from_str(&text).unwrap();
        let runtime = &attachment.runtime[plugin];
        if runtime.as_object().is_some_and(|runtime| !runtime.is_empty()) {
            conf["runtimeConfig"] = runtime.clone();
        }
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        conf
    }

    fn add(&self, at: usize) -> Result<Value, String> {
        let mut result = None;
        for plugin in 0..self.place(at).1.plugins.len() {
            let conf = self.conf(at, plugin, result.as_ref());
            let text = self.call(at, "ADD", &conf, true).map_err(|error| format!("plugin {plugin}: {error}"))?;
            result = Some(serde_json::from_str(&text).map_err(|_| format!("plugin {plugin}: no result"))?);
        }
        Ok(result.unwrap())
    }

    fn del(&mut self, at: usize, with_namespace: bool) -> String {
        let network = self.place(at).1;
        // Since 0.4.0 the runtime passes the result.
        let previous = self.cached[at].clone().filter(|_| network.speaks("0.4.0"));
        for plugin in (0..network.plugins.len()).rev() {
            let conf = self.conf(at, plugin, previous.as_ref());
            if let Err(error) = self.call(at, "DEL", &conf, with_namespace) {
                return format!("plugin {plugin}: {error}");
            }
        }
        self.cached[at] = None;
        "deleted".to_owned()
    }

    /// Calls each plugin of the list in order, with the cached result.
    fn each(&self, at: usize, verb: &str, all: bool, change: impl Fn(&mut Value)) -> String {
        let network = self.place(at).1;
        let mut errors = Vec::new();
        for plugin in 0..network.plugins.len() {
            let mut conf = self.conf(at, plugin, self.cached[at].as_ref().filter(|_| verb == "CHECK"));
            change(&mut conf);
            match self.call(at, verb, &conf, true) {
                Ok(text) if text.trim().is_empty() => {}
                Ok(text) => errors.push(format!("plugin {plugin} printed {text}")),
                Err(error) => errors.push(format!("plugin {plugin}: {error}")),
            }
            if !all && !errors.is_empty() {
                break;
            }
        }
        if errors.is_empty() { "fine".to_owned() } else { errors.join("; ") }
    }

    fn gc(&self, at: usize, forget: bool) -> String {
        let network = self.sequence.attachments[at].network;
        let attached = self.cached.iter().zip(&self.sequence.attachments).enumerate();
        let valid: Vec<Value> = attached
            .filter(|(other, (cached, attachment))| cached.is_some() && attachment.network == network && !(forget && *other == at))
            .map(|(_, (_, attachment))| json!({ "containerID": id(attachment), "ifname": attachment.ifname }))
            .collect();
        // A Go slice without elements is null.
        let valid = if valid.is_empty() { Value::Null } else { valid.into() };
        let change = |conf: &mut Value| conf["cni.dev/valid-attachments"] = valid.clone();
        let answer = self.each(at, "GC", true, change);
        // The reference bridge does not pass GC on to its IPAM plugin, ours does (docs/departures.md).
        if matches!(self.implementation, Implementation::Reference(_)) && self.place(at).1.kind() == "bridge" {
            let mut conf = self.conf(at, 0, None);
            if conf["ipam"].is_object() {
                change(&mut conf);
                conf["type"] = "host-local".into();
                self.call(at, "GC", &conf, true).unwrap();
            }
        }
        answer
    }

    fn call(&self, at: usize, verb: &str, conf: &Value, with_namespace: bool) -> Result<String, String> {
        let attachment = &self.sequence.attachments[at];
        let bin = self.root.join("bin");
        let mut command = Command::new(bin.join(conf["type"].as_str().unwrap()));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("CNI_COMMAND", verb).env("CNI_PATH", &bin);
        command.env("CNI_CONTAINERID", id(attachment)).env("CNI_IFNAME", attachment.ifname).env("CNI_ARGS", &attachment.args);
        let path = self.root.join(format!("ns{}", attachment.pod));
        command.env("CNI_NETNS", if with_namespace { path.as_os_str() } else { "".as_ref() });
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.host.run(|| command.spawn()).unwrap().unwrap();
        // A plugin that reads nothing may end before.
        let _ = child.stdin.take().unwrap().write_all(conf.to_string().as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        if output.status.success() {
            return Ok(text);
        }
        let error: Value = serde_json::from_str(&text).unwrap_or_default();
        if std::env::var_os("FLANNEL_SEED").is_some() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            println!("{:?}: {verb} of attachment {at} by {}: {error} {stderr}", self.implementation, conf["type"]);
        }
        // The words are each implementation's own. Where the reference plugins say 999 for whatever is wrong, ours tell a
        // configuration that cannot be used (7, 2, 6) from work that failed (docs/departures.md).
        Err(match error["code"].as_u64() {
            Some(2 | 5 | 6 | 7 | 999) => "error 999".to_owned(),
            code => format!("error {code:?}"),
        })
    }

    fn happen(&self, at: usize, event: Event) {
        let (attachment, network) = self.place(at);
        let pod = &self.pods[attachment.pod];
        match event {
            Event::InterfaceDeleted => self.run(pod, "ip", &["link", "delete", attachment.ifname]),
            Event::InterfaceDown => self.run(pod, "ip", &["link", "set", attachment.ifname, "down"]),
            Event::AddressesForgotten => {
                for file in std::fs::read_dir(self.root.join("networks").join(&network.name)).into_iter().flatten().flatten() {
                    if file.file_name().to_string_lossy().parse::<std::net::IpAddr>().is_ok() {
                        std::fs::remove_file(file.path()).unwrap();
                    }
                }
            }
            Event::IptablesFlushed => {
                for program in ["iptables", "ip6tables"] {
                    for table in ["nat", "filter"] {
                        self.run(&self.host, program, &["-t", table, "-F"]);
                    }
                }
            }
            Event::NamespaceGone => {
                let path = self.root.join(format!("ns{}", attachment.pod));
                if path.exists() {
                    netns::unbind(&path).unwrap();
                }
            }
            Event::BridgeDeleted => {
                let bridge = network.plugins[0]["bridge"].as_str().filter(|name| !name.is_empty()).unwrap_or("cni0");
                self.run(&self.host, "ip", &["link", "delete", bridge]);
            }
        }
    }
}

fn id(attachment: &Attachment) -> String {
    format!("pod{}", attachment.pod)
}
