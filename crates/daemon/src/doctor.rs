//! `flanneld doctor`: looks at this host once and prints every problem that the checks find, whether the daemon runs or not. A running one
//! adds what only it knows: the paths that it measured, the objects that the kernel refuses. `--preflight` looks before an installation.

mod daemon;
mod preflight;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use flannel::check::{Check, Expected, Facts, Finding, HostFacts, Severity, run_all};
use flannel::object::{Link, LinkKind};
use flannel::subnet_env::{previous_networks, previous_subnets};
use flannel::{Family, IfName, Mac, PerFamily, Subnet, Vni};
use kernel::Kernel;
use kernel::link::LinkInfo;
use kernel::netlink::{Protocol, Socket};
use serde::Serialize;
use serde_json::json;

use crate::output;
use crate::socket::{self, AskError};
use crate::state::SCHEMA;
use crate::status::DaemonArgs;
use crate::terminal::clean;

const EXAMPLES: &str = "\
Exit code: 0 if nothing was found, 1 if there are problems.

Examples:
  flanneld doctor                                      all checks; with a running daemon its findings and broken paths, too
  flanneld doctor --preflight --network 10.244.0.0/16  before an installation: kernel, ports, MTU, overlaps, firewall, CNI
  flanneld doctor --json | jq -r '.findings[].code'    for programs; fields: docs/state.md";

/// Arguments of `flanneld doctor`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub daemon: DaemonArgs,
    /// Look for what would keep flannel from working on this host, before it is installed
    #[arg(long)]
    pub preflight: bool,
    /// A pod network to be; repeatable
    #[arg(long, value_name = "CIDR", requires = "preflight", help_heading = "Preflight")]
    pub network: Vec<Subnet>,
    /// UDP port of vxlan
    #[arg(long, default_value_t = 8472, value_name = "PORT", requires = "preflight", help_heading = "Preflight")]
    pub port: u16,
    /// UDP port of the path probes; 0: not checked
    #[arg(long, default_value_t = 8286, value_name = "PORT", requires = "preflight", help_heading = "Preflight")]
    pub probe_port: u16,
    /// TCP port of the health server; 0: not checked
    #[arg(long, default_value_t = 8081, value_name = "PORT", requires = "preflight", help_heading = "Preflight")]
    pub healthz_port: u16,
    /// The container runtime's folder for configurations
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "FOLDER", requires = "preflight", help_heading = "Preflight")]
    pub cni_conf_dir: PathBuf,
    /// The container runtime's folder for plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "FOLDER", requires = "preflight", help_heading = "Preflight")]
    pub cni_bin_dir: PathBuf,
}

/// A finding of this program or of a daemon.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Shown {
    severity: Severity,
    code: String,
    text: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    fix: String,
}

impl Shown {
    fn new(severity: Severity, code: &str, text: impl Into<String>, fix: impl Into<String>) -> Shown {
        Shown { severity, code: code.to_owned(), text: text.into(), fix: fix.into() }
    }

    /// Why it matters.
    fn reason(&self) -> Option<&'static str> {
        let of_check = Check::ALL.iter().find(|check| check.code() == self.code).map(|check| check.reason());
        let mut others = daemon::CODES.iter().chain(&flannel::check::preflight::CODES);
        of_check.or_else(|| others.find(|(code, _)| *code == self.code).map(|(_, reason)| *reason))
    }
}

impl From<Finding> for Shown {
    fn from(finding: Finding) -> Shown {
        Shown::new(finding.severity, finding.code, finding.text, finding.fix)
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Diagnosis {
    findings: Vec<Shown>,
    not_checked: Vec<String>,
    /// Who looked.
    by: By,
}

/// Who looked for problems.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum By {
    /// The checks of this program.
    #[default]
    Checks,
    /// These, and the daemon.
    Daemon,
    /// The checks before an installation.
    Preflight,
}

/// Looks at this host and prints what was found. Returns whether nothing was.
///
/// # Errors
/// When the file does not name a pod network, or the kernel cannot be read.
pub fn run(args: &DoctorArgs) -> anyhow::Result<bool> {
    let diagnosis = if args.preflight { before_installation(args)? } else { diagnose(&args.daemon)? };
    let text = if args.json { json(&diagnosis) } else { text(&diagnosis) };
    output::line(text.trim_end());
    Ok(diagnosis.findings.iter().all(|finding| finding.severity == Severity::Info))
}

fn before_installation(args: &DoctorArgs) -> anyhow::Result<Diagnosis> {
    let (facts, not_checked) = preflight::gather(args)?;
    let findings = flannel::check::preflight::run(&facts).into_iter().map(Shown::from).collect();
    Ok(Diagnosis { findings, not_checked, by: By::Preflight })
}

/// What is found, as plain text.
pub(crate) fn plain(daemon: &DaemonArgs) -> anyhow::Result<String> {
    diagnose(daemon).map(|diagnosis| text(&diagnosis))
}

/// The facts that the checks see.
pub(crate) fn facts(subnet_file: &Path) -> anyhow::Result<String> {
    gather(subnet_file).map(|(expected, host)| format!("{expected:#?}\n{host:#?}\n"))
}

fn diagnose(args: &DaemonArgs) -> anyhow::Result<Diagnosis> {
    let mut diagnosis = Diagnosis::default();
    match socket::ask(&args.socket(), "/state") {
        Ok(text) => {
            let state = serde_json::from_str(&text).context("the daemon's answer is not JSON")?;
            diagnosis.findings = daemon::findings(state).context("the daemon's answer has another shape")?;
            diagnosis.by = By::Daemon;
        }
        Err(AskError::Starting(text)) => diagnosis.findings.push(daemon::waits(&text)),
        Err(error) => diagnosis.not_checked.push(format!("paths to peers: {error}")),
    }
    match gather(&args.subnet_file) {
        Ok((expected, host)) => {
            let cold = run_all(Facts { expected: &expected, host: &host }).into_iter().map(Shown::from);
            // The daemon knows its devices better: where it has a finding of the same code, its text counts.
            let of_daemon: Vec<String> = diagnosis.findings.iter().map(|finding| finding.code.clone()).collect();
            let is_new = |finding: &Shown| !of_daemon.contains(&finding.code) || finding.code == "device-moved";
            diagnosis.findings.extend(cold.filter(is_new));
            diagnosis.not_checked.extend(host.unreadable);
        }
        // A daemon that is starting has no file yet.
        Err(error) if !diagnosis.findings.is_empty() => diagnosis.not_checked.push(format!("{error:#}")),
        Err(error) => return Err(error),
    }
    diagnosis.findings.sort();
    diagnosis.findings.dedup();
    Ok(diagnosis)
}

/// What this host should be like, by its subnet file and its devices, and what it is like.
pub(crate) fn gather(subnet_file: &Path) -> anyhow::Result<(Expected, HostFacts)> {
    let path = subnet_file.display();
    let file = fs::read_to_string(subnet_file)
        .with_context(|| format!("cannot read --subnet-file {path}: has flanneld run on this host since it was started?"))?;
    let networks = previous_networks(&file);
    anyhow::ensure!(!networks.is_empty(), "--subnet-file {path} names no pod network (FLANNEL_NETWORK)");
    let mut kernel = Kernel::open().context("cannot open the kernel's sockets")?;
    let links = kernel::link::list(&mut Socket::open(Protocol::Route)?).context("cannot read the kernel's links")?;
    let expected = expected(&networks, &file, &links);
    // The default route leads through the external interface, unless a flag names another.
    let interfaces = kernel.interfaces().context("cannot read the kernel's addresses")?;
    let routes = kernel.route_facts().context("cannot read the kernel's routes")?;
    let external =
        routes.iter().find(|route| route.dst.prefix_len() == 0).and_then(|route| interfaces.iter().find(|i| i.index == route.oif));
    let gateways = |family: &Family| expected.own.get(*family).map(|own| own.first_host());
    let is_bridge = |name: &IfName| {
        let holds = |gateway| interfaces.iter().any(|i| i.name == *name && i.addrs.iter().any(|addr| Some(addr.cidr.addr) == gateway));
        links.iter().any(|link| link.name == *name && link.kind == "bridge") && Family::ALL.iter().any(|family| holds(gateways(family)))
    };
    let bridge = interfaces.iter().map(|interface| interface.name).find(is_bridge);
    let address = |family: Family| external?.addrs.iter().map(|addr| addr.cidr.addr).find(|ip| Family::of(*ip) == family);
    let addresses = PerFamily { v4: address(Family::V4), v6: address(Family::V6) };
    let expected = Expected { external: external.map(|interface| interface.name), addresses, bridge, ..expected };
    let host = kernel.inspect(&expected);
    Ok((expected, host))
}

fn expected(networks: &[Subnet], file: &str, links: &[LinkInfo]) -> Expected {
    let mut expected = Expected { own: previous_subnets(file), ..Expected::default() };
    for family in Family::ALL {
        expected.networks.set(family, networks.iter().find(|network| network.family() == family).copied());
        let prefix = if family == Family::V4 { "flannel." } else { "flannel-v6." };
        let device = links.iter().find(|link| link.name.as_str().starts_with(prefix) && link.kind == "vxlan");
        expected.devices.set(family, device.map(|link| link.name));
    }
    if expected.devices.is_empty() {
        // It may be elsewhere. Without the network config its VNI and port are those of the default.
        expected.links.extend(default_device());
    }
    expected
}

/// The VXLAN device of a network config without VNI and port.
fn default_device() -> Option<Link> {
    let (name, lower) = ("flannel.1".parse().ok()?, "eth0".parse().ok()?);
    let kind = LinkKind::Vxlan { vni: Vni::new(1)?, port: 8472, local: Family::V4.unspecified(), lower, gbp: false, learning: false };
    Some(Link { name, kind, mac: Mac([0; 6]), mtu: 0, up: true })
}

fn text(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    for finding in &diagnosis.findings {
        text.push_str(&format!("{} {}: {}\n", finding.severity, clean(&finding.code), clean(&finding.text)));
        if let Some(reason) = finding.reason() {
            text.push_str(&format!("  why: {reason}\n"));
        }
        if !finding.fix.is_empty() {
            // A fix may have the lines of a file.
            let fix: Vec<String> = finding.fix.lines().map(clean).collect();
            text.push_str(&format!("  fix: {}\n", fix.join("\n")));
        }
    }
    diagnosis.not_checked.iter().for_each(|part| text.push_str(&format!("not checked: {}\n", clean(part))));
    let by = match diagnosis.by {
        By::Checks => format!("{} checks", Check::ALL.len()),
        By::Daemon => format!("{} checks and the daemon's", Check::ALL.len()),
        By::Preflight => "before an installation".to_owned(),
    };
    match diagnosis.findings.len() {
        0 => text.push_str(&format!("no problem found ({by})\n")),
        1 => text.push_str("1 problem found\n"),
        count => text.push_str(&format!("{count} problems found\n")),
    }
    text
}

fn json(diagnosis: &Diagnosis) -> String {
    let value = json!({ "schema": SCHEMA, "findings": diagnosis.findings, "not_checked": diagnosis.not_checked });
    serde_json::to_string_pretty(&value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn problem_reason_and_fix_are_printed() {
        let findings = vec![
            Shown::from(Finding::warning("conntrack-full", "the table is nearly full".to_owned(), "sysctl -w x=2")),
            Shown::new(Severity::Warning, "path-one-way", "a peer's\u{1b}[2J text", "line 1\nline\r 2"),
        ];
        let diagnosis = Diagnosis { findings, not_checked: vec!["nf_tables: no".to_owned()], by: By::Daemon };
        expect![[r#"
            warning conntrack-full: the table is nearly full
              why: When the table is full, the kernel drops the first packet of each new connection.
              fix: sysctl -w x=2
            warning path-one-way: a peer's\u{1b}[2J text
              why: Packets arrive and the answers are lost, or the other way round.
              fix: line 1
            line\r 2
            not checked: nf_tables: no
            2 problems found
        "#]]
        .assert_eq(&text(&diagnosis));
        assert_eq!(text(&Diagnosis::default()), format!("no problem found ({} checks)\n", Check::ALL.len()));
        let value: serde_json::Value = serde_json::from_str(&json(&diagnosis)).unwrap();
        assert_eq!((&value["findings"][0]["severity"], &value["schema"]), (&"warning".into(), &1.into()));
        assert_eq!(crate::state::fields(&value), crate::state::documented("flanneld doctor --json"));
    }
}
