//! `flanneld docker-opts`: converts `subnet.env` into options for a Docker daemon, as upstream's script `mk-docker-opts.sh` does
//! (specification, section 8.5). The program can also be installed under the name of the script.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use flannel::{Family, Subnet};
use kernel::netlink::{Protocol, Socket};
use kernel::route;

/// The arguments of `docker-opts`.
#[derive(Debug, Clone, Args)]
pub struct DockerOptsArgs {
    /// Subnet file that flanneld wrote
    #[arg(short = 'f', default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    pub env: PathBuf,
    /// File to write
    #[arg(short = 'd', default_value = "/run/docker_opts.env", value_name = "FILE")]
    pub output: PathBuf,
    /// Write each option as a separate variable [default: both this and -c]
    #[arg(short = 'i')]
    pub individual: bool,
    /// Write all options as one variable
    #[arg(short = 'c')]
    pub combined: bool,
    /// Name of the variable with all options
    #[arg(short = 'k', default_value = "DOCKER_OPTS", value_name = "NAME")]
    pub key: String,
    /// Omit --ip-masq
    #[arg(short = 'm')]
    pub no_ip_masq: bool,
}

/// The name of upstream's script.
pub const SCRIPT: &str = "mk-docker-opts.sh";

/// Writes the file with the options.
///
/// # Errors
/// When a file cannot be read or written, a value is invalid, or the subnet is routed through a gateway. Nothing is written
/// then.
pub fn run(args: &DockerOptsArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.env).with_context(|| format!("-f: cannot read {}", args.env.display()))?;
    let rendered = render(&text, args, |name| std::env::var(name).ok()).with_context(|| args.env.display().to_string())?;
    if let Some(subnet) = variables(&text).get("FLANNEL_SUBNET").and_then(|subnet| subnet.parse().ok()) {
        refuse_routed_subnet(subnet, &args.env)?;
    }
    kernel::file::write(&args.output, &rendered).with_context(|| format!("-d: cannot write {}", args.output.display()))
}

/// Refuses a subnet that this host reaches through a gateway: Docker would assign another host's addresses.
fn refuse_routed_subnet(subnet: Subnet, env: &Path) -> anyhow::Result<()> {
    let mut socket = Socket::open(Protocol::Route)?;
    let routes = route::list(&mut socket, Family::V4, route::Filter::All).context("cannot read the routes")?;
    ensure!(
        !routes.iter().any(|route| route.dst == subnet && route.gateway),
        "FLANNEL_SUBNET {subnet} is routed through a gateway: another host owns it; is {} stale? restart flanneld",
        env.display()
    );
    Ok(())
}

fn variables(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.trim(), value.trim().trim_matches('"'))).collect()
}

fn render(text: &str, args: &DockerOptsArgs, env: impl Fn(&str) -> Option<String>) -> anyhow::Result<String> {
    let found = variables(text);
    let mut options = Vec::new();
    if let Some(subnet) = found.get("FLANNEL_SUBNET") {
        options.push(("BIP", format!("--bip={subnet}")));
    }
    if let Some(masq) = found.get("FLANNEL_IPMASQ").filter(|_| !args.no_ip_masq) {
        // If flanneld masquerades, Docker must not.
        let inverse = match *masq {
            "true" => "false",
            "false" => "true",
            other => anyhow::bail!("FLANNEL_IPMASQ: {other:?} is neither true nor false"),
        };
        options.push(("IPMASQ", format!("--ip-masq={inverse}")));
    }
    if let Some(mtu) = found.get("FLANNEL_MTU") {
        options.push(("MTU", format!("--mtu={mtu}")));
    }
    let both = args.individual == args.combined;
    let mut lines = String::new();
    if both || args.individual {
        options.iter().for_each(|(name, option)| lines.push_str(&format!("DOCKER_OPT_{name}=\"{option}\"\n")));
    }
    if both || args.combined {
        let all: String = options.iter().map(|(_, option)| format!(" {option}")).collect();
        lines.push_str(&format!("{}=\"{}{all}\"\n", args.key, env(&args.key).unwrap_or_default()));
    }
    Ok(lines)
}

/// Whether the program was called by the name of the script.
pub fn called_as(name: Option<std::ffi::OsString>) -> bool {
    name.is_some_and(|name| Path::new(&name).file_name().is_some_and(|file| file == SCRIPT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: DockerOptsArgs,
    }

    const ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

    fn check(args: &str, want: &str) {
        let args = Cli::parse_from(std::iter::once("x").chain(args.split_whitespace())).args;
        assert_eq!(render(ENV, &args, |_| None).unwrap(), want);
    }

    #[test]
    fn options_match_the_cases_of_upstream() {
        let three = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=false\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n";
        let all = "\" --bip=10.1.74.1/24 --ip-masq=false --mtu=1472\"\n";
        check("", &format!("{three}DOCKER_OPTS={all}"));
        check("-i", three);
        check("-c", &format!("DOCKER_OPTS={all}"));
        check("-k DOCKER_NETWORK_OPTIONS", &format!("{three}DOCKER_NETWORK_OPTIONS={all}"));
        check(
            "-m",
            "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\nDOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n",
        );
    }

    #[test]
    fn options_are_appended_to_those_in_the_environment() {
        let args = Cli::parse_from(["x", "-c"]).args;
        let env = |name: &str| (name == "DOCKER_OPTS").then(|| "--debug".to_owned());
        assert!(render(ENV, &args, env).unwrap().starts_with("DOCKER_OPTS=\"--debug --bip="));
        let bad = render("FLANNEL_IPMASQ=maybe", &args, |_| None).unwrap_err();
        assert_eq!(bad.to_string(), "FLANNEL_IPMASQ: \"maybe\" is neither true nor false");
    }
}
