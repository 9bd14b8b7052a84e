//! The daemon's settings: its command line and its environment. Flags have the names of Go flannel and accept Go's spelling
//! (`-name` and `--name`, `=` or a space); each can be given as `FLANNELD_NAME` in the environment.

mod environment;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, FromArgMatches};

pub use environment::{unknown_variables, with_environment};

/// The daemon's flags.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Endpoints of etcd, separated by commas
    #[arg(long, default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379", value_name = "URL[,URL]", help_heading = "etcd")]
    pub etcd_endpoints: String,
    /// Were the endpoints named, on the command line or in the environment? Set from where the value came.
    #[arg(skip)]
    pub etcd_endpoints_named: bool,
    /// Prefix of all keys in etcd
    #[arg(long, default_value = "/coreos.com/network", value_name = "PATH", help_heading = "etcd")]
    pub etcd_prefix: String,
    /// Private key of the client certificate, in PEM form
    #[arg(long, value_name = "FILE", help_heading = "etcd")]
    pub etcd_keyfile: Option<PathBuf>,
    /// Client certificate, in PEM form
    #[arg(long, value_name = "FILE", help_heading = "etcd")]
    pub etcd_certfile: Option<PathBuf>,
    /// Certificates that sign etcd's certificate, in PEM form [default: the system's]
    #[arg(long, value_name = "FILE", help_heading = "etcd")]
    pub etcd_cafile: Option<PathBuf>,
    /// User name at etcd
    #[arg(long, value_name = "NAME", help_heading = "etcd")]
    pub etcd_username: Option<String>,
    /// Password of that user; prefer FLANNELD_ETCD_PASSWORD, which other users of this host cannot read
    #[arg(long, value_name = "TEXT", hide_default_value = true, help_heading = "etcd")]
    pub etcd_password: Option<Secret>,
    /// Run the commands of a network config in etcd (Backend.Type extension) on this host, as root; everyone who can write to etcd can then
    /// run commands here
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set, help_heading = "etcd")]
    pub allow_commands: bool,
    /// Renew the lease this many minutes before it expires, 1 to 1439
    #[arg(long, default_value_t = 60, value_name = "MINUTES", value_parser = clap::value_parser!(u64).range(1..=1439), help_heading = "etcd")]
    pub subnet_lease_renew_margin: u64,
    /// Store leases in Kubernetes Node objects instead of etcd; the variable NODE_NAME names this host's Node
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set, help_heading = "Kubernetes")]
    pub kube_subnet_mgr: bool,
    /// Address of the API server [default: that of the cluster in which this pod runs]
    #[arg(long, value_name = "URL", help_heading = "Kubernetes")]
    pub kube_api_url: Option<String>,
    /// Prefix of the Node annotations
    #[arg(long, default_value = "flannel.alpha.coreos.com", value_name = "PREFIX", help_heading = "Kubernetes")]
    pub kube_annotation_prefix: String,
    /// File with the API server's address and credentials [default: the pod's service account]
    #[arg(long, value_name = "FILE", help_heading = "Kubernetes")]
    pub kubeconfig_file: Option<PathBuf>,
    /// File with the network configuration
    #[arg(long, default_value = "/etc/kube-flannel/net-conf.json", value_name = "FILE", help_heading = "Kubernetes")]
    pub net_config_path: PathBuf,
    /// Set the Node's condition NetworkUnavailable to false once the peers are programmed
    #[arg(long, default_value = "true", value_name = "BOOL", action = ArgAction::Set, help_heading = "Kubernetes")]
    pub set_node_network_unavailable: bool,
    /// Interface that leads to the other hosts, by name or address; repeatable, the first usable one is taken [default: that of the default route]
    #[arg(long, value_name = "NAME|IP", action = ArgAction::Append, help_heading = "Interface")]
    pub iface: Vec<String>,
    /// Regular expression that matches the name or an address of that interface; repeatable, tried after --iface
    #[arg(long, value_name = "REGEX", action = ArgAction::Append, help_heading = "Interface")]
    pub iface_regex: Vec<String>,
    /// Take the interface by which the kernel reaches this address; tried last
    #[arg(long, value_name = "IP", help_heading = "Interface")]
    pub iface_can_reach: Option<IpAddr>,
    /// IPv4 address to publish [default: the interface's]
    #[arg(long, value_name = "IP", value_parser = ipv4, help_heading = "Interface")]
    pub public_ip: Option<IpAddr>,
    /// IPv6 address to publish [default: the interface's]
    #[arg(long, value_name = "IP", value_parser = ipv6, help_heading = "Interface")]
    pub public_ipv6: Option<IpAddr>,
    /// Masquerade traffic that pods send out of the pod network
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set, help_heading = "Traffic rules and routes")]
    pub ip_masq: bool,
    /// Masquerade without random source ports
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set, help_heading = "Traffic rules and routes")]
    pub ip_masq_fully_random_disable: bool,
    /// Accept forwarded traffic from and to the pod network
    #[arg(long, default_value = "true", value_name = "BOOL", action = ArgAction::Set, help_heading = "Traffic rules and routes")]
    pub iptables_forward_rules: bool,
    /// Seconds between two checks of what the kernel does not announce: iptables-legacy rules
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Traffic rules and routes")]
    pub iptables_resync: u64,
    /// Add a blackhole route for addresses of this host's subnet that no pod has
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set, help_heading = "Traffic rules and routes")]
    pub ip_blackhole_route: bool,
    /// Address of the health server: /healthz, /readyz, /state, /metrics. It has no authentication: 0.0.0.0 serves every client that
    /// reaches this host [default: all addresses, for clients on this host only]
    #[arg(long, value_name = "IP", help_heading = "Health")]
    pub healthz_ip: Option<IpAddr>,
    /// Port of the health server; 0 turns it off
    #[arg(long, default_value_t = 0, value_name = "PORT", value_parser = port, allow_negative_numbers = true, help_heading = "Health")]
    pub healthz_port: u16,
    /// Measure the paths to all peers, by at most ten probes a second in all
    #[arg(long, default_value = "on", value_name = "on|off", value_parser = switch, action = ArgAction::Set, help_heading = "Health")]
    pub probe: bool,
    /// UDP port of the probes between daemons, the same on all hosts; 0: peers' probes are not answered, and only their kernels are asked
    #[arg(long, default_value_t = 8286, value_name = "PORT", help_heading = "Health")]
    pub probe_port: u16,
    /// File with this host's subnet and MTU: read by the CNI plugins, and by flanneld at its next start
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE", help_heading = "Files, log and version")]
    pub subnet_file: PathBuf,
    /// Socket for flanneld status, doctor, monitor and bugreport, for root only; off: none [default: flanneld.sock beside --subnet-file]
    #[arg(long, value_name = "FILE", help_heading = "Files, log and version")]
    pub socket: Option<PathBuf>,
    /// Log verbosity: 0 logs changes of state, 1 adds debug details, 4 adds traces
    #[arg(
        long,
        short = 'v',
        default_value_t = 0,
        value_name = "LEVEL",
        allow_negative_numbers = true,
        help_heading = "Files, log and version"
    )]
    pub v: i32,
    /// Libraries that log more than warnings, each with a level as of -v: `h2=4,hyper=1`
    #[arg(long, value_name = "NAME=LEVEL,…", hide_short_help = true, help_heading = "Files, log and version")]
    pub vmodule: Option<String>,
    /// Accepted for compatibility with Go flannel; has no effect
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE", hide_short_help = true, help_heading = "Files, log and version")]
    pub log_backtrace_at: Option<String>,
    /// Print the version and exit
    #[arg(long, default_value = "false", value_name = "BOOL", action = ArgAction::Set, help_heading = "Files, log and version")]
    pub version: bool,
    /// Variables of the environment whose value cannot be used, as warnings for the log.
    #[arg(skip)]
    pub complaints: Vec<String>,
}

/// A secret: redacted in logs.
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
        let (args, complaints) = with_environment(args.into_iter().collect(), env)?;
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

/// Makes boolean flags behave as Go's: `--flag` and `--flag=false`, but not `--flag false`.
pub fn go_flags(command: clap::Command) -> clap::Command {
    command.mut_args(|arg| match is_boolean(&arg) {
        true => arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_parser(go_bool),
        false => arg,
    })
}

fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it must be true or false".to_owned()),
    }
}

/// Does the flag take its value with `=` only, as a boolean flag of Go does?
fn is_boolean(arg: &clap::Arg) -> bool {
    matches!(arg.get_value_names(), Some([name]) if name == "BOOL")
}

fn ipv4(text: &str) -> Result<IpAddr, String> {
    text.parse().map(IpAddr::V4).map_err(|_| "it must be an IPv4 address".to_owned())
}

fn ipv6(text: &str) -> Result<IpAddr, String> {
    text.parse().map(IpAddr::V6).map_err(|_| "it must be an IPv6 address".to_owned())
}

/// Parses `on` or `off`.
fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

/// Parses a port. As in Go flannel, a negative number means none.
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
    fn go_spellings_are_accepted() {
        for args in [["-iface=eth1", "-ip-masq"], ["--iface=eth1", "--ip-masq=true"], ["-iface=eth1", "--ip-masq=1"]] {
            let run = read(&args, &[]).unwrap();
            assert_eq!((run.iface, run.ip_masq), (vec!["eth1".to_owned()], true));
        }
        assert_eq!(read(&["-iface", "eth1", "-v", "3", "--iface", "eth2"], &[]).unwrap().iface, ["eth1", "eth2"]);
        assert!(!read(&["--ip-masq", "--ip-masq=false"], &[]).unwrap().ip_masq, "the last one wins");
        assert!(!read(&["--iptables-forward-rules=false"], &[]).unwrap().iptables_forward_rules);
        assert_eq!(read(&["-v=2"], &[]).unwrap().v, 2);
    }

    #[test]
    fn command_line_wins_over_environment() {
        let env = [("FLANNELD_IFACE", "eth7"), ("FLANNELD_IP_MASQ", "true"), ("FLANNELD_ETCD_PREFIX", "")];
        let run = read(&[], &env).unwrap();
        assert_eq!((run.iface, run.ip_masq, run.etcd_prefix.as_str()), (vec!["eth7".to_owned()], true, "/coreos.com/network"));
        let run = read(&["--iface=eth1", "-ip-masq=false"], &env).unwrap();
        assert_eq!((run.iface, run.ip_masq), (vec!["eth1".to_owned()], false));
    }

    #[test]
    fn every_go_flag_exists_with_its_default() {
        // Section 1.1 of the specification, row by row: the flag, a value, the default. One default differs: 0.0.0.0 for
        // --healthz-ip, which here serves other hosts only if it is given.
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
            ("healthz-ip", "192.0.2.1", ""),
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
                assert!(read(&[&format!("--{flag}"), value], &[]).is_err(), "--{flag} {value}: Go stops reading flags at {value}");
            }
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag)).unwrap();
            let have: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            assert_eq!(have.join(","), default, "{flag}");
            let variable = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(read(&[], &[(&variable, value)]).unwrap().complaints, Vec::<String>::new(), "{variable}");
        }
        // The flags that upstream does not have.
        let own = ["allow-commands", "probe", "probe-port", "socket"];
        let flags: Vec<_> = command.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| !own.contains(flag)).collect();
        assert_eq!(flags.len(), rows.len(), "a flag that Go flannel does not have");
    }

    #[test]
    fn empty_values_count_as_unset() {
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
    fn booleans_are_spelled_as_in_go() {
        for (text, want) in
            [("1", true), ("t", true), ("T", true), ("TRUE", true), ("True", true), ("0", false), ("f", false), ("False", false)]
        {
            assert_eq!(read(&[&format!("-ip-masq={text}")], &[]).unwrap().ip_masq, want, "{text}");
        }
        assert!(read(&["-ip-masq=yes"], &[]).is_err());
    }

    #[test]
    fn unusable_variables_are_reported_and_ignored() {
        let env =
            [("FLANNELD_IP_MASQ", "maybe"), ("FLANNELD_IFACE", "eth7"), ("FLANNELD_VERSION", "true"), ("FLANNELD_HEALTHZ_PORT", "70000")];
        let run = read(&[], &env).unwrap();
        assert_eq!((run.ip_masq, run.iface, run.version, run.healthz_port), (false, vec!["eth7".to_owned()], false, 0));
        assert_eq!(run.complaints.len(), 2);
        assert!(run.complaints.iter().any(|text| text.starts_with("FLANNELD_IP_MASQ has a value that cannot be used")));
    }

    #[test]
    fn debug_output_hides_the_password() {
        let run = read(&["--etcd-password=hush"], &[]).unwrap();
        assert!(!format!("{run:?}").contains("hush"));
        assert_eq!(run.etcd_password, Some(Secret("hush".to_owned())));
    }

    #[test]
    fn stray_words_are_refused_with_the_fix() {
        for (args, want) in [
            (&["--ip-masq", "true", "--iface=eth1"][..], "unexpected word \"true\" after --ip-masq: write --ip-masq=true"),
            (&["-ip-masq", "false"], "write --ip-masq=false"),
            (&["--iface", "eth1", "eth2"], "unexpected word \"eth2\""),
            (&["-v", "3", "--healthz-port=1", "x"], "unexpected word \"x\""),
        ] {
            let error = read(args, &[]).unwrap_err();
            assert!(error.contains(want) && error.contains("Go flannel stops reading flags"), "{error}");
        }
        assert!(read(&["-v", "3", "--iface", "eth1", "--ip-masq", "--healthz-port", "-1"], &[]).is_ok());
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
