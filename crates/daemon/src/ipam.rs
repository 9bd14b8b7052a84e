//! `flanneld ipam check`: compares the addresses that host-local's files reserve with those that interfaces have. `--release` frees what is
//! proved to be dead, under the lock of the plugins; the runtime goes on meanwhile.

mod judge;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use cni::reservations::{self, Locked, Reservation};
use flannel::subnet_env::{previous_networks, previous_subnets};
use kernel::endpoints::Endpoints;
use serde_json::{Value, json};

use self::judge::{Facts, Problem, Report, judge};
use crate::output;
use crate::state::SCHEMA;
use crate::terminal::clean;

/// At most so many processes are looked at.
const PROCESSES: usize = 32_768;

const EXAMPLES: &str = "\
An address is released only if all of this holds: every link of this host leads to a network namespace that was read, and no interface
in any has the address; no process belongs to the container; the runtime's cache names no sandbox of it that still exists; the file is
older than a minute, or of another boot; and the plugins' lock is held. Exit code: 0 if nothing is wrong, 1 if something is.

Examples:
  flanneld ipam check              compare reserved addresses with interfaces
  flanneld ipam check --release    and free those of which nothing is left";

/// Arguments of `flanneld ipam`.
#[derive(Debug, Clone, Args)]
pub struct IpamArgs {
    #[command(subcommand)]
    command: IpamCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum IpamCommand {
    /// Compare the addresses that are reserved for pods with those that exist
    #[command(after_help = EXAMPLES)]
    Check(CheckArgs),
}

/// Arguments of `flanneld ipam check`.
#[derive(Debug, Clone, Args)]
struct CheckArgs {
    /// Free the addresses of which nothing is left
    #[arg(long)]
    release: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The daemon's file: it names the pod network and this host's subnet
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    subnet_file: PathBuf,
    #[command(flatten)]
    dirs: IpamDirs,
}

/// Where reservations are.
#[derive(Debug, Clone, Args)]
pub struct IpamDirs {
    /// host-local's folder, with a folder for each network
    #[arg(long = "ipam-dir", default_value = "/var/lib/cni/networks", value_name = "FOLDER")]
    pub networks: PathBuf,
    /// libcni's cache of results
    #[arg(long = "cni-cache-dir", default_value = "/var/lib/cni/results", value_name = "FOLDER")]
    pub cache: PathBuf,
}

/// Runs the command. Returns whether nothing is wrong.
///
/// # Errors
/// When the files or the kernel cannot be read, or an address that is proved dead cannot be freed.
pub fn run(args: &IpamArgs) -> anyhow::Result<bool> {
    let IpamCommand::Check(args) = &args.command;
    let env = fs::read_to_string(&args.subnet_file).with_context(|| {
        format!("cannot read --subnet-file {}: has flanneld run on this host since it was started?", args.subnet_file.display())
    })?;
    let names = networks(&args.dirs)?;
    let mut locks = BTreeMap::new();
    if args.release {
        // Under the locks no plugin reserves or frees an address: what is read now stays true.
        for name in names {
            if let Some(locked) = Locked::open(&args.dirs.networks, &name).map_err(|error| anyhow!(error))? {
                locks.insert(name, locked);
            }
        }
    }
    let facts = gather(&env, &args.dirs)?;
    let report = judge(&facts);
    let mut released = Vec::new();
    for problem in report.problems.iter().filter(|problem| problem.dead && args.release) {
        let Some((name, locked)) = problem.network.as_ref().and_then(|name| locks.get_key_value(name)) else { continue };
        let one = facts.reservations.get(name).and_then(|list| list.iter().find(|one| one.address == problem.address));
        if let Some(one) = one
            && locked.release(one).map_err(|error| anyhow!(error))?
        {
            released.push(problem.clone());
        }
    }
    drop(locks);
    output::line(if args.json { json(&report, &released) } else { text(&report, &released, args.release) }.trim_end());
    Ok(report.problems.len() == released.len())
}

/// What a check finds, as plain text.
pub(crate) fn plain(subnet_file: &std::path::Path, dirs: &IpamDirs) -> anyhow::Result<String> {
    let env = fs::read_to_string(subnet_file).with_context(|| format!("cannot read {}", subnet_file.display()))?;
    Ok(text(&judge(&gather(&env, dirs)?), &[], false))
}

fn networks(dirs: &IpamDirs) -> anyhow::Result<Vec<String>> {
    let advice = || format!("cannot read --ipam-dir {}: no pod was added yet, or this is a container", dirs.networks.display());
    reservations::networks(&dirs.networks).with_context(advice)
}

/// What is reserved and what exists.
fn gather(env: &str, dirs: &IpamDirs) -> anyhow::Result<Facts> {
    let mut found: BTreeMap<String, Vec<Reservation>> = BTreeMap::new();
    for name in networks(dirs)? {
        let list = reservations::reservations(&dirs.networks, &name).with_context(|| format!("cannot read {}", dirs.networks.display()))?;
        found.insert(name, list);
    }
    let containers: BTreeSet<&str> = found.values().flatten().map(Reservation::container).filter(|id| !id.is_empty()).collect();
    let (running, sandboxes) = (running(&containers), sandboxes(&containers, &dirs.cache));
    #[expect(clippy::disallowed_methods, reason = "files have the wall clock's time")]
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let endpoints = Endpoints::read().map_err(|error| error.to_string());
    Ok(Facts { networks: previous_networks(env), own: previous_subnets(env), reservations: found, endpoints, running, sandboxes, now })
}

/// Those containers that the control group of a process names.
fn running(containers: &BTreeSet<&str>) -> BTreeSet<String> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let groups: BTreeSet<String> = pids.take(PROCESSES).filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()).collect();
    containers.iter().filter(|id| groups.iter().any(|group| group.contains(**id))).map(ToString::to_string).collect()
}

/// Those containers for which libcni's cache names a sandbox that still exists.
fn sandboxes(containers: &BTreeSet<&str>, cache: &std::path::Path) -> BTreeSet<String> {
    let files = fs::read_dir(cache).into_iter().flatten().flatten();
    let documents = files.filter_map(|file| serde_json::from_str::<Value>(&fs::read_to_string(file.path()).ok()?).ok());
    let live = documents.filter_map(|document| {
        let id = document["containerId"].as_str().filter(|id| containers.contains(id))?.to_owned();
        let interfaces = document["result"]["interfaces"].as_array().cloned().unwrap_or_default();
        let mut paths = interfaces.iter().filter_map(|interface| interface["sandbox"].as_str()).chain(document["netns"].as_str());
        paths.any(|path| !path.is_empty() && fs::metadata(path).is_ok()).then_some(id)
    });
    live.collect()
}

/// How the addresses of this host's pods are, for `flanneld status`.
pub(crate) struct Pods {
    pub(crate) is_well: bool,
    pub(crate) text: String,
}

/// Looks at the addresses of this host's pods; `None` where the files cannot be seen.
pub(crate) fn pods(env: &str, dirs: &IpamDirs) -> Option<Pods> {
    let report = judge(&gather(env, dirs).ok()?);
    let count = |kind: judge::Kind| report.problems.iter().filter(|problem| problem.kind == kind).count();
    let others = [
        (count(judge::Kind::Unreserved), "without reservation"),
        (count(judge::Kind::Duplicate), "on two interfaces"),
        (count(judge::Kind::NoInterface), "without interface"),
    ];
    let others = others.iter().filter(|(count, _)| *count > 0).map(|(count, name)| format!(", {count} {name}"));
    let leaked = match report.not_checked.is_empty() {
        true => format!("{} leaked", report.leaked()),
        false => "leaks not checked".to_owned(),
    };
    let hint = if report.problems.is_empty() { "" } else { " (flanneld ipam check)" };
    let text = format!("{}, {leaked}{}{hint}", in_use(&report), others.collect::<String>());
    Some(Pods { is_well: report.problems.is_empty(), text })
}

fn in_use(report: &Report) -> String {
    let capacity = report.capacity.map(|capacity| format!(" of {capacity}")).unwrap_or_default();
    format!("{} addresses in use{capacity}", report.used)
}

fn text(report: &Report, released: &[Problem], release: bool) -> String {
    let mut text = format!("{}, {} leaked\n", in_use(report), report.leaked());
    for problem in &report.problems {
        let outcome = match (problem.kind.is_leak(), released.contains(problem), problem.dead) {
            (_, true, _) => ": released",
            (true, false, true) if release => ": changed meanwhile, not released",
            (true, false, true) => ": --release frees it",
            (true, false, false) => ": not proved dead, so it stays",
            (false, false, _) => "",
        };
        text.push_str(&format!("{} {}: {}{outcome}\n", problem.kind.name(), problem.address, clean(&problem.text)));
    }
    report.not_checked.iter().for_each(|part| text.push_str(&format!("not checked: {}\n", clean(part))));
    if !released.is_empty() {
        text.push_str(&format!("{} released\n", released.len()));
    }
    text
}

fn json(report: &Report, released: &[Problem]) -> String {
    let released: Vec<String> = released.iter().map(|problem| problem.address.to_string()).collect();
    let value = json!({
        "schema": SCHEMA, "used": report.used, "capacity": report.capacity, "leaked": report.leaked(),
        "problems": report.problems, "released": released, "not_checked": report.not_checked,
    });
    serde_json::to_string_pretty(&value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documented_fields_are_those_that_are_written() {
        let problem = Problem {
            address: "10.244.1.2".parse().unwrap(),
            kind: judge::Kind::Leaked,
            network: Some("cbr0".to_owned()),
            text: "x".to_owned(),
            dead: true,
        };
        let report = Report { problems: vec![problem.clone()], ..Report::default() };
        let value: Value = serde_json::from_str(&json(&report, &[problem])).unwrap();
        assert_eq!(crate::state::fields(&value), crate::state::documented("flanneld ipam check --json"));
    }
}
