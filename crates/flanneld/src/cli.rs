//! The command line: the daemon's flags, or a command.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use daemon::bugreport::BugreportArgs;
use daemon::cleanup::CleanupArgs;
use daemon::docker_opts::DockerOptsArgs;
use daemon::doctor::DoctorArgs;
use daemon::embedded::StoreArgs;
use daemon::install_cni::InstallCniArgs;
use daemon::ipam::IpamArgs;
use daemon::monitor::MonitorArgs;
use daemon::settings::{self, RunArgs};
use daemon::status::StatusArgs;
use lab::cli::LabArgs;

use crate::pages::CompletionsArgs;

const EXAMPLES: &str = "\
Without a command, flanneld runs the daemon. Every flag of the daemon can be given in the environment:
--etcd-endpoints as FLANNELD_ETCD_ENDPOINTS, and so on; the command line wins.

Examples:
  flanneld lab                                     show a cluster of two hosts on this machine, without root
  flanneld store --listen 10.0.0.1:2379 --data-dir /var/lib/flannel/store \\
    --net-config '{\"Network\": \"10.244.0.0/16\", \"Backend\": {\"Type\": \"vxlan\"}}'
                                                   serve the embedded store to other hosts
  flanneld --etcd-endpoints=https://10.0.0.1:2379 --etcd-cafile=ca.pem --etcd-certfile=client.pem \\
    --etcd-keyfile=client-key.pem --ip-masq --healthz-port=8081
                                                   run the daemon with that store
  flanneld --kube-subnet-mgr --ip-masq             run the daemon in a pod of Kubernetes
  flanneld --iface=eth1 --public-ip=203.0.113.9    … behind NAT, on a host with several interfaces
  curl http://127.0.0.1:8081/state                 ask the daemon for its state
  flanneld status                                  show how this node is, and which peers are not well
  flanneld cleanup --dry-run                       list what flannel left on this host";

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
    after_help = EXAMPLES
)]
pub(crate) struct Cli {
    /// The command.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// The daemon's flags.
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// The operator's commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve an embedded store that speaks etcd's v3 API: for one machine, a trial or the lab
    ///
    /// It is a single node: while it is down, no lease can be acquired or renewed and hosts learn of no changes, but
    /// their routes stay. Leases survive its restart and start their full lifetime again. On an address other than
    /// loopback it serves only clients with a certificate: copy ca.pem, client.pem and client-key.pem from --data-dir to
    /// each host. It has no passwords and no second member; if you need those, use etcd and set --etcd-endpoints.
    Store(StoreArgs),
    /// Make a cluster on this machine and show what flannel does; needs no root
    Lab(LabArgs),
    /// Write options for a Docker daemon from subnet.env; also when called as mk-docker-opts.sh
    DockerOpts(DockerOptsArgs),
    /// Install the CNI plugins and their configuration where container runtimes look for them, each file atomically
    InstallCni(InstallCniArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the man page, in roff
    #[command(hide = true)]
    Man,
    /// Remove what flannel left on this host: devices, routes, rules and files; foreign ones stay
    ///
    /// Stop the daemon and delete this host's pods first. Sysctls (ip_forward) and the plugins in /opt/cni/bin stay.
    Cleanup(CleanupArgs),
    /// Look for problems of this host that lose pods' packets; exit code 1 if there are any
    ///
    /// Each problem is printed with its reason and its fix. Nothing is changed, and the daemon need not run; a running one
    /// is asked for its findings and for paths to peers that are broken.
    Doctor(DoctorArgs),
    /// Show in one screen how this node is: store, node, peers, repairs; exit code 1 if something is degraded, 2 if it is down
    ///
    /// The running daemon is asked by its socket, which only root may use. Without a daemon, the kernel and the subnet file are
    /// read.
    Status(StatusArgs),
    /// Check the addresses that are reserved for this host's pods
    Ipam(IpamArgs),
    /// Print what changes, as it happens: leases, repairs, conflicts, paths, findings
    Monitor(MonitorArgs),
    /// Write an archive with what a maintainer asks for: state, findings, kernel, log, configuration, without secrets
    Bugreport(BugreportArgs),
    /// Print the version
    Version,
}

impl Cli {
    /// Reads the arguments (without the program's name) and the environment. Variables that cannot be used are listed in
    /// [`RunArgs::complaints`].
    ///
    /// # Errors
    /// Text for the operator, with the exit code: 0 for `--help`, 2 for a command line that cannot be used.
    pub(crate) fn read(args: impl IntoIterator<Item = String>, env: impl Fn(&str) -> Option<String>) -> Result<Cli, clap::Error> {
        let (mut args, mut complaints): (Vec<String>, _) = (args.into_iter().collect(), Vec::new());
        if args.first().is_none_or(|first| first.starts_with('-')) {
            (args, complaints) = settings::with_environment(args, env)?;
        }
        let matches =
            settings::go_flags(Cli::command()).try_get_matches_from(std::iter::once("flanneld").chain(args.iter().map(String::as_str)))?;
        let mut cli = Cli::from_arg_matches(&matches)?;
        cli.run = settings::RunArgs { complaints, ..cli.run }.note_sources(&matches);
        Ok(cli)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str], env: &[(&str, &str)]) -> Result<Cli, String> {
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Cli::read(args.iter().map(ToString::to_string), env).map_err(|error| error.to_string())
    }

    #[test]
    fn help_groups_flags_and_ends_with_examples() {
        let help = read(&["--help"], &[]).unwrap_err();
        let mut at = 0;
        for heading in ["\netcd:\n", "\nKubernetes:\n", "\nInterface:\n", "\nTraffic rules and routes:\n", "\nHealth:\n", "\nExamples:\n"] {
            let found = help[at..].find(heading).unwrap_or_else(|| panic!("{heading:?} is missing or out of order in {help}"));
            at += found;
        }
        assert!(help.trim_end().ends_with("list what flannel left on this host"), "{help}");
    }

    #[test]
    fn commands_have_their_own_flags() {
        let Some(Command::Store(store)) = read(&["store", "--listen", "10.0.0.1:2379"], &[("FLANNELD_IFACE", "x")]).unwrap().command else {
            panic!("a command")
        };
        assert_eq!(store.listen.to_string(), "10.0.0.1:2379");
    }
}
