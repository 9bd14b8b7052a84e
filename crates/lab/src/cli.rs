//! The `lab` command: builds one or two labs, shows what they do, and tells whether it was right.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use daemon::output;
use serde_json::{Value, json};

use crate::check::this_program;
use crate::cluster::{Lab, Pod, check_hosts, kubernetes, outside};
use crate::plan::{Plan, PodFamily, StoreKind, Topology};
use crate::show::{Report, show};
use crate::{chaos, check, exec, isolate, keep, measure, verdicts};

/// Arguments of `flanneld lab`.
#[derive(Debug, Clone, Args)]
pub struct LabArgs {
    /// Number of hosts, each with one pod; 1 to 200
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub hosts: usize,
    /// One L2 network, or two with a router between them
    #[arg(long, value_enum, default_value_t = Topology::Switch)]
    pub topology: Topology,
    /// Backend: host-gw, vxlan or wireguard [default: one after the other on a switch, vxlan across a router]
    #[arg(long, value_name = "TYPE")]
    pub backend: Option<String>,
    /// Which addresses pods have
    #[arg(long, value_enum, default_value_t = PodFamily::V4)]
    pub family: PodFamily,
    /// Use the etcd at this address instead of an embedded store; the lab writes below a /flannel-lab/ prefix of its own and deletes that at its end
    #[arg(long, value_name = "URL")]
    pub etcd: Option<String>,
    /// Store leases in a real Kubernetes API server, started in the lab; build it once with `cargo xtask kubernetes`
    #[arg(long, conflicts_with = "etcd")]
    pub kube: bool,
    /// Stay up and print a tour: lines to paste into another terminal
    #[arg(long)]
    pub keep: bool,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub json: bool,
    /// A command of the lab.
    #[command(subcommand)]
    pub command: Option<LabCommand>,
}

/// Commands of the lab.
#[derive(Debug, Clone, Subcommand)]
pub enum LabCommand {
    /// Run a command in a host or pod of the lab that is kept up
    Exec {
        /// h1, h1-pod, …
        place: String,
        /// The command, after --
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Inject each fault that the lab knows and print how soon it is repaired (needs root, ip, nft and iptables)
    Faults(measure::FaultsArgs),
    /// Inject faults at random and check that pods still reach each other (needs root, ip, nft and iptables)
    Chaos(chaos::ChaosArgs),
    /// Break the path to a host in many ways and print what each daemon says about it (needs root, ip, bridge and nft)
    Verdicts(verdicts::VerdictsArgs),
    /// Connect to addresses outside for a lab (started by the lab itself)
    #[command(hide = true)]
    Outside,
}

/// Runs the command. Must be called while the process has one thread.
pub fn main(args: LabArgs) -> ExitCode {
    let done = match &args.command {
        Some(LabCommand::Exec { place, command }) => exec::run(place, command).map(|()| true),
        Some(LabCommand::Faults(args)) => faults(args),
        Some(LabCommand::Chaos(args)) => chaos(args),
        Some(LabCommand::Verdicts(args)) => verdicts(args),
        Some(LabCommand::Outside) => outside::serve().map(|()| true),
        None => run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            output::error_line(format_args!("flanneld lab: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn faults(args: &measure::FaultsArgs) -> anyhow::Result<bool> {
    measure::check(args)?;
    let program = this_program()?;
    measure::run(&program, &isolate(&program)?, args)
}

fn chaos(args: &chaos::ChaosArgs) -> anyhow::Result<bool> {
    chaos::check(args)?;
    let program = this_program()?;
    chaos::run(&program, &isolate(&program)?, args)
}

fn verdicts(args: &verdicts::VerdictsArgs) -> anyhow::Result<bool> {
    check::can_inject("verdicts", None)?;
    let program = this_program()?;
    verdicts::run(&program, &isolate(&program)?, args)
}

/// Runs the labs. True if every lab did what it should.
fn run(args: &LabArgs) -> anyhow::Result<bool> {
    check_hosts(args.hosts)?;
    let backends: Vec<&str> = match (&args.backend, args.topology) {
        (Some(backend), _) => vec![backend.as_str()],
        (None, Topology::Switch) => check::BACKENDS.to_vec(),
        (None, Topology::Router) => vec!["vxlan"],
    };
    backends.iter().try_for_each(|backend| check::shown(backend))?;
    let program = this_program()?;
    let store = store(args)?;
    if args.etcd.is_some() {
        outside::prepare(&program)?;
    }
    let claimed = if args.keep { Some(exec::claim()?) } else { None };
    let scratch = isolate(&program)?;

    let mut reports: Vec<Report> = Vec::new();
    for (i, backend) in backends.iter().enumerate() {
        let mut lab = start(args, backend, &program, &store, &scratch.join(format!("lab{i}")))?;
        progress(args, "creating a pod on each host and pinging");
        let (report, pods) = show(&mut lab, backend)?;
        if !args.json {
            output::line(report.text().trim_end());
        }
        reports.push(report);
        if let Some(listener) = claimed.as_ref().filter(|_| i == backends.len() - 1) {
            stay(args, &lab, &pods, &program, &reports, listener);
        }
        if args.etcd.is_some() {
            // A running daemon would acquire a new lease.
            (0..args.hosts).try_for_each(|host| lab.stop_daemon(host, true).map(drop))?;
            lab.with_store(async |store| store.delete_everything().await)?;
        }
    }
    if args.json {
        output::line(document(&reports));
    }
    Ok(reports.iter().all(Report::is_right))
}

fn store(args: &LabArgs) -> anyhow::Result<StoreKind> {
    Ok(match &args.etcd {
        None if args.kube => StoreKind::Kubernetes(kubernetes::program()?),
        None => StoreKind::Embedded,
        Some(url) => StoreKind::Outside(
            url.strip_prefix("http://")
                .map(|rest| rest.trim_end_matches('/').to_owned())
                .with_context(|| format!("--etcd {url}: it must look like http://127.0.0.1:2379"))?,
        ),
    })
}

fn start(args: &LabArgs, backend: &str, program: &Path, store: &StoreKind, root: &Path) -> anyhow::Result<Lab> {
    // A prefix of its own in a store outside: nothing else there is touched.
    let prefix = if args.etcd.is_some() { format!("/flannel-lab/{:016x}", fastrand::u64(..)) } else { "/coreos.com/network".to_owned() };
    let plan = Plan {
        topology: args.topology,
        store: store.clone(),
        prefix,
        ..Plan::new(args.hosts, &json!({ "Type": backend }), program).family(args.family)
    };
    progress(args, &format!("{backend}: starting {} hosts on a {:?}", args.hosts, args.topology).to_lowercase());
    let mut lab = Lab::start(plan, root)?;
    progress(args, "waiting until every daemon knows every host");
    lab.settle()?;
    Ok(lab)
}

fn progress(args: &LabArgs, text: &str) {
    if !args.json {
        output::error_line(format_args!("· {text}"));
    }
}

/// Prints the tour and lets other processes in, for the rest of the process's life.
fn stay(args: &LabArgs, lab: &Lab, pods: &[Pod], program: &Path, reports: &[Report], listener: &UnixListener) {
    match args.json {
        true => output::line(document(reports)),
        false => output::line(format_args!("\n{}", keep::tour(lab, pods, program))),
    }
    // Who does not read the tour (`lab --keep | head -1`) cannot follow it either.
    if !output::is_closed() {
        exec::serve(listener, &keep::directory(lab, pods));
    }
}

fn document(reports: &[Report]) -> String {
    let runs: Vec<Value> = reports.iter().map(Report::json).collect();
    serde_json::to_string_pretty(&json!({ "ok": reports.iter().all(Report::is_right), "runs": runs })).unwrap_or_default()
}
