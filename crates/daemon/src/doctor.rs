//! `flanneld doctor`: looks at this host once and prints every problem that the checks find, whether the daemon runs or not.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use flannel::check::{Check, Expected, Facts, Finding, HostFacts, run_all};
use flannel::object::{Link, LinkKind};
use flannel::subnet_env::{previous_networks, previous_subnets};
use flannel::{Family, IfName, Mac, PerFamily, Subnet, Vni};
use kernel::Kernel;
use kernel::link::LinkInfo;
use kernel::netlink::{Protocol, Socket};
use serde_json::json;

use crate::output;

/// Arguments of `flanneld doctor`.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The daemon's file: it names the pod network and this host's subnet
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    pub subnet_file: PathBuf,
}

/// Looks at this host and prints what was found. Returns whether nothing was.
///
/// # Errors
/// When the file does not name a pod network, or the kernel cannot be read.
pub fn run(args: &DoctorArgs) -> anyhow::Result<bool> {
    let (expected, host) = gather(&args.subnet_file)?;
    let findings = run_all(Facts { expected: &expected, host: &host });
    let text = if args.json { json(&findings, &host) } else { text(&findings, &host) };
    output::line(text.trim_end());
    Ok(findings.is_empty())
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

fn text(findings: &[Finding], host: &HostFacts) -> String {
    let mut text = String::new();
    for Finding { severity, code, text: problem, fix } in findings {
        text.push_str(&format!("{severity} {code}: {problem}\n"));
        if let Some(reason) = Check::ALL.iter().find(|check| check.code() == *code).map(|check| check.reason()) {
            text.push_str(&format!("  why: {reason}\n"));
        }
        text.push_str(&format!("  fix: {fix}\n"));
    }
    host.unreadable.iter().for_each(|part| text.push_str(&format!("not checked: {part}\n")));
    match findings.len() {
        0 => text.push_str(&format!("no problem found ({} checks)\n", Check::ALL.len())),
        1 => text.push_str("1 problem found\n"),
        count => text.push_str(&format!("{count} problems found\n")),
    }
    text
}

fn json(findings: &[Finding], host: &HostFacts) -> String {
    let value = json!({ "findings": findings, "not_checked": host.unreadable });
    serde_json::to_string_pretty(&value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn problem_reason_and_fix_are_printed() {
        let findings = [Finding::warning("conntrack-full", "the table is nearly full".to_owned(), "sysctl -w x=2")];
        let host = HostFacts { unreadable: vec!["nf_tables: no".to_owned()], ..HostFacts::default() };
        expect![[r#"
            warning conntrack-full: the table is nearly full
              why: When the table is full, the kernel drops the first packet of each new connection.
              fix: sysctl -w x=2
            not checked: nf_tables: no
            1 problem found
        "#]]
        .assert_eq(&text(&findings, &host));
        assert_eq!(text(&[], &HostFacts::default()), format!("no problem found ({} checks)\n", Check::ALL.len()));
        let value: serde_json::Value = serde_json::from_str(&json(&findings, &host)).unwrap();
        assert_eq!(value["findings"][0]["severity"], "warning");
    }
}
