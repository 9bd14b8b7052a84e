//! The `lab` command: makes one or two labs, shows what they do, and says whether it was right.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::show::{Report, show};
use crate::{Lab, Plan, PodFamily, StoreKind, Topology, chaos, exec, faults, isolate, kubernetes, outside};

/// What `flanneld lab` is told.
#[derive(Debug, Clone, Args)]
pub struct LabArgs {
    /// Number of hosts, each with one pod
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub hosts: usize,
    /// One L2 network, or two with a router between them
    #[arg(long, value_enum, default_value_t = Topology::Switch)]
    pub topology: Topology,
    /// Backend: host-gw or vxlan [default: one after the other on a switch, vxlan across a router]
    #[arg(long, value_name = "TYPE")]
    pub backend: Option<String>,
    /// Which addresses pods have
    #[arg(long, value_enum, default_value_t = PodFamily::V4)]
    pub family: PodFamily,
    /// Use the etcd at this address instead of an embedded store; the lab writes below a /flannel-lab/ prefix of its own, which it deletes at its end
    #[arg(long, value_name = "URL")]
    pub etcd: Option<String>,
    /// Keep leases in a real Kubernetes API server, started in the lab; `cargo xtask kubernetes` builds it once
    #[arg(long, conflicts_with = "etcd")]
    pub kube: bool,
    /// Stay up and print how to enter each host and pod
    #[arg(long)]
    pub keep: bool,
    /// Print one JSON document instead of text
    #[arg(long)]
    pub json: bool,
    /// Something else to do.
    #[command(subcommand)]
    pub command: Option<LabCommand>,
}

/// What else the lab can do.
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
    /// Make each thing go wrong that the lab knows, and print how soon it is right again (needs ip and nft)
    Faults(faults::FaultsArgs),
    /// Let everything go wrong at random, and see that pods reach each other all the same (needs ip and nft)
    Chaos(chaos::ChaosArgs),
    /// Connect to addresses outside for a lab (started by the lab itself)
    #[command(hide = true)]
    Outside,
}

/// Runs the command. Must be called while the process has one thread.
pub fn main(args: LabArgs) -> ExitCode {
    let done = match &args.command {
        Some(LabCommand::Exec { place, command }) => exec::run(place, command).map(|()| true),
        Some(LabCommand::Faults(args)) => {
            this_program().and_then(|program| faults::measure(&program, &isolate(&program)?, args).map(|()| true))
        }
        Some(LabCommand::Chaos(args)) => this_program().and_then(|program| chaos::run(&program, &isolate(&program)?, args)),
        Some(LabCommand::Outside) => outside::serve().map(|()| true),
        None => run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("flanneld lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn this_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot tell where this program is")
}

/// True if every lab did what it should.
fn run(args: &LabArgs) -> anyhow::Result<bool> {
    let program = this_program()?;
    let backends: Vec<String> = match (&args.backend, args.topology) {
        (Some(backend), _) => vec![backend.clone()],
        (None, Topology::Switch) => vec!["host-gw".to_owned(), "vxlan".to_owned()],
        (None, Topology::Router) => vec!["vxlan".to_owned()],
    };
    // Before anything is made: is this a configuration at all?
    for backend in &backends {
        let config = Plan::new(args.hosts, &json!({ "Type": backend }), &program).config;
        flannel::Config::parse(&config.to_string()).with_context(|| format!("--backend {backend}"))?;
        ensure!(matches!(backend.as_str(), "host-gw" | "vxlan"), "--backend {backend}: the lab shows host-gw and vxlan");
    }
    let store = match &args.etcd {
        None if args.kube => StoreKind::Kubernetes(kubernetes::program()?),
        None => StoreKind::Embedded,
        Some(url) => StoreKind::Outside(
            url.strip_prefix("http://")
                .map(|rest| rest.trim_end_matches('/').to_owned())
                .context("--etcd: it looks like http://127.0.0.1:2379")?,
        ),
    };
    if args.etcd.is_some() {
        outside::prepare(&program)?;
    }
    let claimed = if args.keep { Some(exec::claim()?) } else { None };
    let scratch = isolate(&program)?;

    let mut reports: Vec<Report> = Vec::new();
    let last = backends.len() - 1;
    for (i, backend) in backends.iter().enumerate() {
        // Nothing that is in a store outside is touched.
        let prefix =
            if args.etcd.is_some() { format!("/flannel-lab/{:016x}", fastrand::u64(..)) } else { "/coreos.com/network".to_owned() };
        let plan = Plan {
            topology: args.topology,
            store: store.clone(),
            prefix,
            ..Plan::new(args.hosts, &json!({ "Type": backend }), &program).family(args.family)
        };
        progress(args, &format!("{backend}: starting {} hosts on a {:?}", args.hosts, args.topology).to_lowercase());
        let root = scratch.join(format!("lab{i}"));
        let mut lab = Lab::start(plan, &root)?;
        progress(args, "waiting until every daemon has seen every host");
        lab.settle()?;
        progress(args, "making a pod on each host and pinging");
        let (report, pods) = show(&mut lab, backend)?;
        if !args.json {
            print!("{}", report.text());
        }
        reports.push(report);
        if let Some(listener) = claimed.as_ref().filter(|_| i == last) {
            let mut places: Vec<_> = lab.hosts.iter().map(|host| (host.name.clone(), root.join("netns").join(&host.name))).collect();
            places.extend(pods.iter().map(|pod| (pod.name.clone(), pod.path.clone())));
            keep(args, &reports, &places);
            exec::tell(listener, &places);
        }
        if args.etcd.is_some() {
            // A daemon whose lease is deleted acquires another.
            (0..args.hosts).try_for_each(|host| lab.stop_daemon(host, true).map(drop))?;
            lab.with_store(async |store| store.delete_everything().await)?;
        }
    }
    if args.json {
        println!("{}", document(&reports));
    }
    Ok(reports.iter().all(Report::is_right))
}

fn progress(args: &LabArgs, text: &str) {
    if !args.json {
        eprintln!("· {text}");
    }
}

fn keep(args: &LabArgs, reports: &[Report], places: &[(String, std::path::PathBuf)]) {
    if args.json {
        println!("{}", document(reports));
        return;
    }
    println!("The lab stays up until Ctrl-C. From another terminal:");
    for (name, _) in places {
        println!("    flanneld lab exec {name} -- ip route");
    }
}

fn document(reports: &[Report]) -> String {
    let runs: Vec<Value> = reports.iter().map(Report::json).collect();
    serde_json::to_string_pretty(&json!({ "ok": reports.iter().all(Report::is_right), "runs": runs })).unwrap_or_default()
}
