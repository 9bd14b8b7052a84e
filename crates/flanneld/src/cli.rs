//! The command line. Flags have upstream's names and Go's spelling (`-name` and `--name`, `=` or a space); each can be
//! given as `FLANNELD_NAME` in the environment. Flags of upstream that are not supported yet are an error that says
//! so: to accept what is then ignored would be a lie.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::embedded::StoreArgs;
use crate::lab::cli::LabArgs;

/// Pod network for containers: every host leases a subnet, every pod reaches every other
#[derive(Debug, Parser)]
#[command(
    name = "flanneld",
    disable_version_flag = true,
    args_conflicts_with_subcommands = true,
    args_override_self = true,
    max_term_width = 110
)]
#[command(
    after_help = "Without a command, flanneld runs the daemon. Every flag of the daemon can be given in the environment:\n--etcd-endpoints is FLANNELD_ETCD_ENDPOINTS, and so on; the command line goes first."
)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The daemon's flags.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What else flanneld can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an embedded store that speaks etcd's v3 API: for one machine, a trial or the lab
    ///
    /// It is a single node: when it is down no lease can be acquired or renewed and no change is heard of, while
    /// routes stay as they are. Leases survive its restart with their whole life before them. It has no TLS, no
    /// authentication and no second member; whoever outgrows it points --etcd-endpoints at an etcd cluster.
    Store(StoreArgs),
    /// Make a cluster on this machine and show what flannel does; needs no root
    Lab(LabArgs),
    /// Print the version
    Version,
}

/// The daemon's flags.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// etcd's endpoints, separated by commas
    #[arg(long, default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379", value_name = "URL[,URL]")]
    pub etcd_endpoints: String,
    /// Prefix of all keys in etcd
    #[arg(long, default_value = "/coreos.com/network", value_name = "PATH")]
    pub etcd_prefix: String,
    /// Interface to the other hosts, by name or address; repeatable, the first usable one counts [default: that of the default route]
    #[arg(long, value_name = "NAME|IP", action = ArgAction::Append)]
    pub iface: Vec<String>,
    /// IPv4 address to publish [default: the interface's]
    #[arg(long, value_name = "IP", value_parser = ipv4)]
    pub public_ip: Option<IpAddr>,
    /// File for the CNI plugins, and the memory of this host's subnet
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    pub subnet_file: PathBuf,
    /// Minutes before its end at which the lease is renewed, 1 to 1439
    #[arg(long, default_value_t = 60, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=1439))]
    pub subnet_lease_renew_margin: u64,
    /// Masquerade what pods send out of the pod network
    #[arg(long, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, value_name = "BOOL", value_parser = go_bool, action = ArgAction::Set)]
    pub ip_masq: bool,
    /// Do not choose source ports at random when masquerading
    #[arg(long, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, value_name = "BOOL", value_parser = go_bool, action = ArgAction::Set)]
    pub ip_masq_fully_random_disable: bool,
    /// Accept forwarded traffic from and to the pod network
    #[arg(long, default_value = "true", default_missing_value = "true", num_args = 0..=1, require_equals = true, value_name = "BOOL", value_parser = go_bool, action = ArgAction::Set)]
    pub iptables_forward_rules: bool,
    /// Address for /healthz, /readyz and /state
    #[arg(long, default_value = "0.0.0.0", value_name = "IP")]
    pub healthz_ip: IpAddr,
    /// Port for /healthz, /readyz and /state; 0 for none
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub healthz_port: u16,
    /// Verbosity of the log: 0 changes of state, 1 and more also how they came about
    #[arg(long, short = 'v', default_value_t = 0, value_name = "LEVEL")]
    pub v: u8,
    /// Print the version and exit
    #[arg(long, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, value_name = "BOOL", value_parser = go_bool, action = ArgAction::Set)]
    pub version: bool,
}

/// Flags of upstream's flanneld that this one does not have yet.
const NOT_YET: [&str; 20] = [
    "etcd-keyfile",
    "etcd-certfile",
    "etcd-cafile",
    "etcd-username",
    "etcd-password",
    "iface-regex",
    "iface-can-reach",
    "public-ipv6",
    "kube-subnet-mgr",
    "kube-api-url",
    "kube-annotation-prefix",
    "kubeconfig-file",
    "iptables-resync",
    "ip-blackhole-route",
    "net-config-path",
    "set-node-network-unavailable",
    "vmodule",
    "log_backtrace_at",
    "logtostderr",
    "alsologtostderr",
];

/// The daemon's flags that take a value behind a space, and those that do not: needed to read the environment before
/// the command line without knowing more than their names.
const RUN_FLAGS: [&str; 13] = [
    "etcd-endpoints",
    "etcd-prefix",
    "iface",
    "public-ip",
    "subnet-file",
    "subnet-lease-renew-margin",
    "ip-masq",
    "ip-masq-fully-random-disable",
    "iptables-forward-rules",
    "healthz-ip",
    "healthz-port",
    "v",
    "version",
];

impl Cli {
    /// Reads the arguments (without the program's name) and the environment.
    ///
    /// # Errors
    /// Text for the operator, with the exit code: 0 for `--help`, 2 for a command line that cannot be used.
    pub fn read(args: impl IntoIterator<Item = String>, env: impl Fn(&str) -> Option<String>) -> Result<Cli, clap::Error> {
        let mut args: Vec<String> = args.into_iter().collect();
        let is_daemon = args.first().is_none_or(|first| first.starts_with('-'));
        if is_daemon {
            args = args.iter().map(|arg| go_spelling(arg)).collect();
            let given = |flag: &str| {
                args.iter().any(|arg| arg.strip_prefix("--").is_some_and(|arg| arg == flag || arg.starts_with(&format!("{flag}="))))
            };
            for flag in NOT_YET {
                if given(flag) {
                    return Err(not_yet(&format!("--{flag}")));
                }
            }
            let mut inherited = Vec::new();
            for flag in RUN_FLAGS.into_iter().chain(NOT_YET) {
                let variable = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
                match env(&variable).filter(|value| !value.is_empty() && !given(flag)) {
                    Some(_) if NOT_YET.contains(&flag) => return Err(not_yet(&variable)),
                    Some(value) if flag != "version" => inherited.push(format!("--{flag}={value}")),
                    _ => {}
                }
            }
            args = inherited.into_iter().chain(args).collect();
        }
        Cli::try_parse_from(std::iter::once("flanneld".to_owned()).chain(args))
    }
}

/// `-name` and `-name=value` as `--name…`; single letters stay.
fn go_spelling(arg: &str) -> String {
    match arg.strip_prefix('-') {
        Some(rest) if !rest.starts_with('-') && rest.split('=').next().is_some_and(|name| name.len() > 1) => format!("--{rest}"),
        Some(rest) if rest.starts_with("v=") => format!("--{rest}"),
        _ => arg.to_owned(),
    }
}

fn not_yet(what: &str) -> clap::Error {
    clap::Error::raw(clap::error::ErrorKind::UnknownArgument, format!("{what} is not supported by this flanneld yet: start without it\n"))
}

fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it must be true or false".to_owned()),
    }
}

fn ipv4(text: &str) -> Result<IpAddr, String> {
    text.parse().map(IpAddr::V4).map_err(|_| "it must be an IPv4 address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str], env: &[(&str, &str)]) -> Result<Cli, String> {
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Cli::read(args.iter().map(ToString::to_string), env).map_err(|error| error.to_string())
    }

    #[test]
    fn gos_spellings_are_equal() {
        for args in [["-iface=eth1", "-ip-masq"], ["--iface=eth1", "--ip-masq=true"], ["-iface=eth1", "--ip-masq=1"]] {
            let run = read(&args, &[]).unwrap().run;
            assert_eq!((run.iface, run.ip_masq), (vec!["eth1".to_owned()], true));
        }
        assert_eq!(read(&["-iface", "eth1", "-v", "3", "--iface", "eth2"], &[]).unwrap().run.iface, ["eth1", "eth2"]);
        assert!(!read(&["--ip-masq", "--ip-masq=false"], &[]).unwrap().run.ip_masq, "the last one counts");
        assert!(!read(&["--iptables-forward-rules=false"], &[]).unwrap().run.iptables_forward_rules);
        assert_eq!(read(&["-v=2"], &[]).unwrap().run.v, 2);
    }

    #[test]
    fn the_environment_counts_where_the_command_line_is_silent() {
        let env = [("FLANNELD_IFACE", "eth7"), ("FLANNELD_IP_MASQ", "true"), ("FLANNELD_ETCD_PREFIX", "")];
        let run = read(&[], &env).unwrap().run;
        assert_eq!((run.iface, run.ip_masq, run.etcd_prefix.as_str()), (vec!["eth7".to_owned()], true, "/coreos.com/network"));
        let run = read(&["--iface=eth1", "-ip-masq=false"], &env).unwrap().run;
        assert_eq!((run.iface, run.ip_masq), (vec!["eth1".to_owned()], false));
    }

    #[test]
    fn what_is_not_supported_yet_says_so() {
        let error = read(&["-kube-subnet-mgr"], &[]).unwrap_err();
        assert!(error.contains("--kube-subnet-mgr is not supported by this flanneld yet"), "{error}");
        let error = read(&[], &[("FLANNELD_ETCD_CAFILE", "/ca.pem")]).unwrap_err();
        assert!(error.contains("FLANNELD_ETCD_CAFILE is not supported"), "{error}");
    }

    #[test]
    fn bad_values_name_the_flag() {
        for (args, flag) in [
            (vec!["--subnet-lease-renew-margin=0"], "--subnet-lease-renew-margin"),
            (vec!["--public-ip=fd00::1"], "--public-ip"),
            (vec!["--ip-masq=maybe"], "--ip-masq"),
            (vec!["--healthz-port=70000"], "--healthz-port"),
            (vec!["--nonsense"], "--nonsense"),
        ] {
            let error = read(&args, &[]).unwrap_err();
            assert!(error.contains(flag), "{error}");
        }
    }

    #[test]
    fn commands_have_their_own_flags() {
        let Some(Command::Store(store)) = read(&["store", "--listen", "10.0.0.1:2379"], &[("FLANNELD_IFACE", "x")]).unwrap().command else {
            panic!("a command")
        };
        assert_eq!(store.listen.to_string(), "10.0.0.1:2379");
    }
}
