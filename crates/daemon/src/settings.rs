//! The daemon's settings: its command line and its environment. Flags have upstream's names and Go's spelling (`-name` and
//! `--name`, `=` or a space); each can be given as `FLANNELD_NAME` in the environment.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, FromArgMatches};

/// The daemon's flags.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// etcd's endpoints, separated by commas
    #[arg(long, default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379", value_name = "URL[,URL]")]
    pub etcd_endpoints: String,
    /// Were the endpoints named, on the command line or in the environment? Set from where the value came.
    #[arg(skip)]
    pub etcd_endpoints_named: bool,
    /// Prefix of all keys in etcd
    #[arg(long, default_value = "/coreos.com/network", value_name = "PATH")]
    pub etcd_prefix: String,
    /// Private key of the client certificate, in PEM form
    #[arg(long, value_name = "FILE")]
    pub etcd_keyfile: Option<PathBuf>,
    /// Client certificate, in PEM form
    #[arg(long, value_name = "FILE")]
    pub etcd_certfile: Option<PathBuf>,
    /// Certificates that etcd's own is checked against, in PEM form [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,
    /// User at etcd
    #[arg(long, value_name = "NAME")]
    pub etcd_username: Option<String>,
    /// The user's password; better given as FLANNELD_ETCD_PASSWORD, which other users of this host cannot read
    #[arg(long, value_name = "TEXT", hide_default_value = true)]
    pub etcd_password: Option<Secret>,
    /// Interface to the other hosts, by name or address; repeatable, the first usable one counts [default: that of the default route]
    #[arg(long, value_name = "NAME|IP", action = ArgAction::Append)]
    pub iface: Vec<String>,
    /// The same by a regular expression that matches an address or the name; repeatable, tried after --iface
    #[arg(long, value_name = "REGEX", action = ArgAction::Append)]
    pub iface_regex: Vec<String>,
    /// The interface by which the kernel reaches this address; tried last
    #[arg(long, value_name = "IP")]
    pub iface_can_reach: Option<IpAddr>,
    /// IPv4 address to publish [default: the interface's]
    #[arg(long, value_name = "IP", value_parser = ipv4)]
    pub public_ip: Option<IpAddr>,
    /// IPv6 address to publish [default: the interface's]
    #[arg(long, value_name = "IP", value_parser = ipv6)]
    pub public_ipv6: Option<IpAddr>,
    /// File for the CNI plugins, and the memory of this host's subnet
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    pub subnet_file: PathBuf,
    /// Minutes before its end at which the lease is renewed, 1 to 1439
    #[arg(long, default_value_t = 60, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=1439))]
    pub subnet_lease_renew_margin: u64,
    /// Masquerade what pods send out of the pod network
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set)]
    pub ip_masq: bool,
    /// Do not choose source ports at random when masquerading
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set)]
    pub ip_masq_fully_random_disable: bool,
    /// Accept forwarded traffic from and to the pod network
    #[arg(long, default_value = "true", value_name = "BOOL", action = ArgAction::Set)]
    pub iptables_forward_rules: bool,
    /// Seconds between two looks at what the kernel does not announce: iptables-legacy rules
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub iptables_resync: u64,
    /// Blackhole what is sent to addresses of this host's subnet that no pod has
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set)]
    pub ip_blackhole_route: bool,
    /// Address for /healthz, /readyz and /state
    #[arg(long, default_value = "0.0.0.0", value_name = "IP")]
    pub healthz_ip: IpAddr,
    /// Port for /healthz, /readyz and /state; 0 for none
    #[arg(long, default_value_t = 0, value_name = "PORT", value_parser = port, allow_negative_numbers = true)]
    pub healthz_port: u16,
    /// Run the commands of a network config in etcd (Backend.Type extension) on this host, as root. Whoever can write to etcd can then
    /// run commands here
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set)]
    pub allow_commands: bool,
    /// Keep leases in Kubernetes' Node objects instead of etcd; NODE_NAME names this host's
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set)]
    pub kube_subnet_mgr: bool,
    /// With --kube-subnet-mgr: the API server [default: a pod's own cluster]
    #[arg(long, value_name = "URL")]
    pub kube_api_url: Option<String>,
    /// With --kube-subnet-mgr: prefix of the annotations
    #[arg(long, default_value = "flannel.alpha.coreos.com", value_name = "PREFIX")]
    pub kube_annotation_prefix: String,
    /// With --kube-subnet-mgr: how to reach the API server [default: a pod's service account]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig_file: Option<PathBuf>,
    /// With --kube-subnet-mgr: the network configuration
    #[arg(long, default_value = "/etc/kube-flannel/net-conf.json", value_name = "FILE")]
    pub net_config_path: PathBuf,
    /// With --kube-subnet-mgr: set the Node's condition NetworkUnavailable to false once pods reach each other
    #[arg(long, default_value = "true", value_name = "BOOL", action = ArgAction::Set)]
    pub set_node_network_unavailable: bool,
    /// Verbosity of the log: 0 changes of state, 1 and more also how they came about
    #[arg(long, short = 'v', default_value_t = 0, value_name = "LEVEL", allow_negative_numbers = true)]
    pub v: i32,
    /// Taken from upstream's command line; this program has no files of Go to tell apart
    #[arg(long, value_name = "PATTERN=N,…", hide_short_help = true)]
    pub vmodule: Option<String>,
    /// Taken from upstream's command line; see --vmodule
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE", hide_short_help = true)]
    pub log_backtrace_at: Option<String>,
    /// Print the version and exit
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set)]
    pub version: bool,
    /// What of the environment could not be used.
    #[arg(skip)]
    pub complaints: Vec<String>,
}

/// A text that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Secret {
        Secret(text)
    }
}

impl RunArgs {
    /// Reads the daemon's arguments (without the program's name) and its environment.
    ///
    /// # Errors
    /// Text for the operator, with the exit code: 0 for `--help`, 2 for a command line that cannot be used.
    pub fn read(args: impl IntoIterator<Item = String>, env: impl Fn(&str) -> Option<String>) -> Result<RunArgs, clap::Error> {
        let (args, complaints) = with_environment(args.into_iter().collect(), env);
        let args = parse(&args)?;
        Ok(RunArgs { complaints, ..args })
    }

    /// Notes which values were given and which are defaults.
    #[must_use]
    pub fn note_sources(self, matches: &clap::ArgMatches) -> RunArgs {
        let etcd_endpoints_named = matches.value_source("etcd_endpoints") == Some(clap::parser::ValueSource::CommandLine);
        RunArgs { etcd_endpoints_named, ..self }
    }
}

fn command() -> clap::Command {
    go_flags(RunArgs::augment_args(clap::Command::new("flanneld").args_override_self(true)))
}

fn parse(args: &[String]) -> Result<RunArgs, clap::Error> {
    let matches = command().try_get_matches_from(std::iter::once("flanneld").chain(args.iter().map(String::as_str)))?;
    Ok(RunArgs::from_arg_matches(&matches)?.note_sources(&matches))
}

/// What Go calls a boolean flag: `--flag` and `--flag=false`, but not `--flag false`.
pub fn go_flags(command: clap::Command) -> clap::Command {
    command.mut_args(|arg| match arg.get_value_names() {
        Some([name]) if name == "BOOL" => arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_parser(go_bool),
        _ => arg,
    })
}

/// The daemon's arguments in one spelling, behind those that the environment gives; and the variables whose value cannot be used.
/// Such a variable counts as unset, as upstream has it: an environment that used to start a daemon still does.
pub fn with_environment(args: Vec<String>, env: impl Fn(&str) -> Option<String>) -> (Vec<String>, Vec<String>) {
    let args = drop_empty_flags(args.iter().map(|arg| go_spelling(arg)).collect());
    let given =
        |flag: &str| args.iter().any(|arg| arg.strip_prefix("--").is_some_and(|arg| arg == flag || arg.starts_with(&format!("{flag}="))));
    let flags = RunArgs::augment_args(clap::Command::new("flanneld"));
    let (mut inherited, mut complaints) = (Vec::new(), Vec::new());
    for flag in flags.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| *flag != "version" && !given(flag)) {
        let variable = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
        let Some(value) = env(&variable).filter(|value| !value.is_empty()) else { continue };
        let arg = format!("--{flag}={value}");
        match parse(std::slice::from_ref(&arg)) {
            Ok(_) => inherited.push(arg),
            // The value itself is not repeated: it may be secret.
            Err(_) => complaints.push(format!("{variable} has a value that cannot be used, see --help: going on without it")),
        }
    }
    (inherited.into_iter().chain(args).collect(), complaints)
}

/// Leaves out flags without a default that are given nothing (`--public-ip=`), as an unset variable of a unit file makes
/// them: to Go that is as good as not given.
fn drop_empty_flags(args: Vec<String>) -> Vec<String> {
    let command = RunArgs::augment_args(clap::Command::new("flanneld"));
    let optional = |flag: &str| {
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag));
        arg.is_some_and(|arg| arg.get_default_values().is_empty())
    };
    let mut kept = Vec::new();
    let mut rest = args.into_iter().peekable();
    while let Some(arg) = rest.next() {
        let flag = arg.strip_prefix("--").unwrap_or_default();
        if flag.strip_suffix('=').is_some_and(optional) {
            continue;
        }
        if optional(flag) && rest.next_if(String::is_empty).is_some() {
            continue;
        }
        kept.push(arg);
    }
    kept
}

/// `-name` and `-name=value` as `--name…`; single letters stay.
fn go_spelling(arg: &str) -> String {
    match arg.strip_prefix('-') {
        Some(rest) if !rest.starts_with('-') && rest.split('=').next().is_some_and(|name| name.len() > 1) => format!("--{rest}"),
        Some(rest) if rest.starts_with("v=") => format!("--{rest}"),
        _ => arg.to_owned(),
    }
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

fn ipv6(text: &str) -> Result<IpAddr, String> {
    text.parse().map(IpAddr::V6).map_err(|_| "it must be an IPv6 address".to_owned())
}

/// A port; upstream takes a negative one for none.
fn port(text: &str) -> Result<u16, String> {
    let number: i64 = text.parse().map_err(|_| "it must be a port, or 0 for none".to_owned())?;
    u16::try_from(number.max(0)).map_err(|_| "a port is at most 65535".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str], env: &[(&str, &str)]) -> Result<RunArgs, String> {
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        RunArgs::read(args.iter().map(ToString::to_string), env).map_err(|error| error.to_string())
    }

    #[test]
    fn gos_spellings_are_equal() {
        for args in [["-iface=eth1", "-ip-masq"], ["--iface=eth1", "--ip-masq=true"], ["-iface=eth1", "--ip-masq=1"]] {
            let run = read(&args, &[]).unwrap();
            assert_eq!((run.iface, run.ip_masq), (vec!["eth1".to_owned()], true));
        }
        assert_eq!(read(&["-iface", "eth1", "-v", "3", "--iface", "eth2"], &[]).unwrap().iface, ["eth1", "eth2"]);
        assert!(!read(&["--ip-masq", "--ip-masq=false"], &[]).unwrap().ip_masq, "the last one counts");
        assert!(!read(&["--iptables-forward-rules=false"], &[]).unwrap().iptables_forward_rules);
        assert_eq!(read(&["-v=2"], &[]).unwrap().v, 2);
    }

    #[test]
    fn the_environment_counts_where_the_command_line_is_silent() {
        let env = [("FLANNELD_IFACE", "eth7"), ("FLANNELD_IP_MASQ", "true"), ("FLANNELD_ETCD_PREFIX", "")];
        let run = read(&[], &env).unwrap();
        assert_eq!((run.iface, run.ip_masq, run.etcd_prefix.as_str()), (vec!["eth7".to_owned()], true, "/coreos.com/network"));
        let run = read(&["--iface=eth1", "-ip-masq=false"], &env).unwrap();
        assert_eq!((run.iface, run.ip_masq), (vec!["eth1".to_owned()], false));
    }

    #[test]
    fn every_flag_of_upstream_is_there_with_its_default() {
        // Section 1.1 of the specification, row by row: the flag, a value, and what it is without one.
        let rows = [
            ("etcd-endpoints", "http://a:1,http://b:2", "http://127.0.0.1:4001,http://127.0.0.1:2379"),
            ("etcd-prefix", "/x", "/coreos.com/network"),
            ("etcd-keyfile", "/k", ""),
            ("etcd-certfile", "/c", ""),
            ("etcd-cafile", "/ca", ""),
            ("etcd-username", "u", ""),
            ("etcd-password", "p", ""),
            ("iface", "eth1", ""),
            ("iface-regex", "eth.*", ""),
            ("iface-can-reach", "192.0.2.1", ""),
            ("subnet-file", "/s", "/run/flannel/subnet.env"),
            ("public-ip", "192.0.2.1", ""),
            ("public-ipv6", "2001:db8::1", ""),
            ("subnet-lease-renew-margin", "1439", "60"),
            ("ip-masq", "true", "false"),
            ("ip-masq-fully-random-disable", "true", "false"),
            ("kube-subnet-mgr", "true", "false"),
            ("kube-api-url", "https://k", ""),
            ("kube-annotation-prefix", "p", "flannel.alpha.coreos.com"),
            ("kubeconfig-file", "/k", ""),
            ("version", "true", "false"),
            ("healthz-ip", "127.0.0.1", "0.0.0.0"),
            ("healthz-port", "-1", "0"),
            ("iptables-resync", "7", "5"),
            ("iptables-forward-rules", "false", "true"),
            ("ip-blackhole-route", "true", "false"),
            ("net-config-path", "/n", "/etc/kube-flannel/net-conf.json"),
            ("set-node-network-unavailable", "false", "true"),
            ("v", "4", "0"),
            ("vmodule", "a=1", ""),
            ("log_backtrace_at", "a.go:1", ""),
        ];
        let command = RunArgs::augment_args(clap::Command::new("x"));
        for (flag, value, default) in rows {
            for text in [format!("-{flag}={value}"), format!("--{flag}={value}")] {
                assert!(read(&[&text], &[]).is_ok(), "{text}");
            }
            if value.parse::<bool>().is_err() {
                assert!(read(&[&format!("-{flag}"), value], &[]).is_ok(), "-{flag} {value}");
            } else {
                assert!(read(&[&format!("--{flag}")], &[]).is_ok(), "--{flag}");
                assert!(read(&[&format!("--{flag}"), value], &[]).is_err(), "--{flag} {value}: to Go, {value} would end the flags");
            }
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag)).unwrap();
            let have: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            assert_eq!(have.join(","), default, "{flag}");
            let variable = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(read(&[], &[(&variable, value)]).unwrap().complaints, Vec::<String>::new(), "{variable}");
        }
        // The flags that upstream does not have.
        let own = ["allow-commands"];
        let flags: Vec<_> = command.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| !own.contains(flag)).collect();
        assert_eq!(flags.len(), rows.len(), "a flag that upstream does not have");
    }

    #[test]
    fn a_flag_that_is_given_nothing_is_not_given() {
        let args = ["--public-ip=", "--iface=", "--iface-can-reach", "", "-etcd-cafile=", "--etcd-username=", "--ip-masq"];
        let run = read(&args, &[("FLANNELD_IFACE", "eth7")]).unwrap();
        assert_eq!((run.public_ip, run.iface_can_reach, run.etcd_cafile, run.etcd_username), (None, None, None, None));
        assert_eq!((run.iface, run.ip_masq), (vec!["eth7".to_owned()], true));
    }

    #[test]
    fn default_endpoints_are_known_from_named_ones() {
        const DEFAULT: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";
        assert!(!read(&[], &[]).unwrap().etcd_endpoints_named);
        assert!(read(&[&format!("--etcd-endpoints={DEFAULT}")], &[]).unwrap().etcd_endpoints_named);
        assert!(read(&[], &[("FLANNELD_ETCD_ENDPOINTS", DEFAULT)]).unwrap().etcd_endpoints_named);
        assert!(!read(&[], &[("FLANNELD_ETCD_ENDPOINTS", "")]).unwrap().etcd_endpoints_named);
    }

    #[test]
    fn go_truths() {
        for (text, want) in
            [("1", true), ("t", true), ("T", true), ("TRUE", true), ("True", true), ("0", false), ("f", false), ("False", false)]
        {
            assert_eq!(read(&[&format!("-ip-masq={text}")], &[]).unwrap().ip_masq, want, "{text}");
        }
        assert!(read(&["-ip-masq=yes"], &[]).is_err());
    }

    #[test]
    fn a_variable_that_cannot_be_used_is_reported_and_left_out() {
        let env =
            [("FLANNELD_IP_MASQ", "maybe"), ("FLANNELD_IFACE", "eth7"), ("FLANNELD_VERSION", "true"), ("FLANNELD_HEALTHZ_PORT", "70000")];
        let run = read(&[], &env).unwrap();
        assert_eq!((run.ip_masq, run.iface, run.version, run.healthz_port), (false, vec!["eth7".to_owned()], false, 0));
        assert_eq!(run.complaints.len(), 2);
        assert!(run.complaints.iter().any(|text| text.starts_with("FLANNELD_IP_MASQ has a value that cannot be used")));
    }

    #[test]
    fn a_password_is_in_no_debug_output() {
        let run = read(&["--etcd-password=hush"], &[]).unwrap();
        assert!(!format!("{run:?}").contains("hush"));
        assert_eq!(run.etcd_password, Some(Secret("hush".to_owned())));
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
}
