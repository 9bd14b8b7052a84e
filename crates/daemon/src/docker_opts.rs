//! `flanneld docker-opts`: converts `subnet.env` into options for a Docker daemon, as upstream's script `mk-docker-opts.sh` does
//! (specification, section 8.5). The program can also be installed under the name of the script.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use flannel::{Family, Subnet};
use kernel::netlink::{Protocol, Socket};
use kernel::route;

use crate::output;

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
    /// Ignored, as everything behind the first word that is no option.
    #[arg(hide = true, trailing_var_arg = true)]
    pub rest: Vec<String>,
}

/// The name of upstream's script.
pub const SCRIPT: &str = "mk-docker-opts.sh";

/// Writes the file with the options. The script sources the subnet file, so a variable may also come from the environment, and a
/// missing file is no error.
///
/// # Errors
/// When a file cannot be read or written, a value is invalid, or the subnet is routed through a gateway. Nothing is written
/// then.
pub fn run(args: &DockerOptsArgs) -> anyhow::Result<()> {
    let shown = args.env.display();
    let text = match std::fs::read_to_string(&args.env) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            output::error_line(format_args!("-f: {shown} does not exist: using the variables of the environment"));
            String::new()
        }
        read => read.with_context(|| format!("-f: cannot read {shown}"))?,
    };
    let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let variables: Variables = environment.chain(assignments(&text)).collect();
    let rendered = render(&variables, args).with_context(|| shown.to_string())?;
    if let Some(subnet) = variables.get("FLANNEL_SUBNET").and_then(|subnet| subnet.parse().ok()) {
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

type Variables = BTreeMap<String, String>;

/// The assignments of a file that a shell sources: quotes are removed, comments and `export` are left out, and a line may have several.
fn assignments(text: &str) -> impl Iterator<Item = (String, String)> {
    text.lines().flat_map(words).filter_map(|word| {
        let (name, value) = word.split_once('=')?;
        let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        is_name.then(|| (name.to_owned(), value.to_owned()))
    })
}

/// The words of a shell's line, without expansions.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quote) = (vec![None::<String>], None);
    for c in line.chars() {
        let word = words.last_mut().expect("it is never empty");
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() || c == ';' => words.push(None),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.into_iter().flatten().collect()
}

fn render(found: &Variables, args: &DockerOptsArgs) -> anyhow::Result<String> {
    const PREFIX: &str = "DOCKER_OPT_";
    let get = |name: &str| found.get(name).filter(|value| !value.is_empty());
    // Variables of other names are options of the operator.
    let mut options: Variables =
        found.iter().filter(|(name, _)| name.starts_with(PREFIX)).map(|(name, value)| (name.clone(), value.clone())).collect();
    let mut put = |name: &str, option: String| drop(options.insert(format!("{PREFIX}{name}"), option));
    if let Some(subnet) = get("FLANNEL_SUBNET") {
        put("BIP", format!("--bip={subnet}"));
    }
    if let Some(masq) = get("FLANNEL_IPMASQ").filter(|_| !args.no_ip_masq) {
        // If flanneld masquerades, Docker must not.
        let inverse = match masq.as_str() {
            "true" => "false",
            "false" => "true",
            other => anyhow::bail!("FLANNEL_IPMASQ: {other:?} is neither true nor false"),
        };
        put("IPMASQ", format!("--ip-masq={inverse}"));
    }
    if let Some(mtu) = get("FLANNEL_MTU") {
        put("MTU", format!("--mtu={mtu}"));
    }
    let both = args.individual == args.combined;
    let mut lines = String::new();
    if both || args.individual {
        options.iter().for_each(|(name, option)| lines.push_str(&format!("{name}=\"{option}\"\n")));
    }
    if both || args.combined {
        let all: String = options.values().map(|option| format!(" {option}")).collect();
        lines.push_str(&format!("{}=\"{}{all}\"\n", args.key, found.get(&args.key).map_or("", String::as_str)));
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
        assert_eq!(render(&assignments(ENV).collect(), &args).unwrap(), want);
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
        let with_debug = assignments("DOCKER_OPTS=--debug").chain(assignments(ENV)).collect();
        assert!(render(&with_debug, &args).unwrap().starts_with("DOCKER_OPTS=\"--debug --bip="));
        let bad = render(&assignments("FLANNEL_IPMASQ=maybe").collect(), &args).unwrap_err();
        assert_eq!(bad.to_string(), "FLANNEL_IPMASQ: \"maybe\" is neither true nor false");
        let own = assignments("DOCKER_OPT_LOG='--log-level=debug' DOCKER_OPT_MTU=--mtu=9\nFLANNEL_MTU=1450 FLANNEL_SUBNET=''").collect();
        assert_eq!(
            render(&own, &Cli::parse_from(["x"]).args).unwrap(),
            "DOCKER_OPT_LOG=\"--log-level=debug\"\nDOCKER_OPT_MTU=\"--mtu=1450\"\nDOCKER_OPTS=\" --log-level=debug --mtu=1450\"\n"
        );
    }

    #[test]
    fn files_are_read_as_a_shell_reads_them() {
        let read = |text: &str| assignments(text).map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("|");
        assert_eq!(
            read("export A=1 # one\n # B=2\nC='x # y';D=\"a b\"c\nE=\nnot an assignment\n=7\nF-G=1\nH=a#b"),
            "A=1|C=x # y|D=a bc|E=|H=a#b"
        );
    }

    #[test]
    fn what_follows_the_first_word_is_ignored() {
        let args = Cli::parse_from(["x", "-i", "word", "-c", "-x"]).args;
        assert!(args.individual && !args.combined);
    }
}
