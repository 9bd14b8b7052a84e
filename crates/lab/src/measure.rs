//! `lab faults`: measures how soon each fault is repaired and each event is followed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use daemon::output;
use serde_json::{Value, json};

use crate::events::{self, ClusterEvent};
use crate::faults::{self, FAULTS, Fault, Measured, Noticed};
use crate::interrupt::Interrupt;
use crate::plan::{Plan, StoreKind};
use crate::progress::Progress;
use crate::stage::Stage;

/// The labs in which faults are measured: backend, nftables or iptables.
const LABS: [(&str, bool); 3] = [("host-gw", true), ("vxlan", true), ("vxlan", false)];
/// Rounds of a fault that only the audit finds: each takes up to a minute.
const AUDIT_ROUNDS: usize = 2;
/// Units of work for the estimate, about a second each: a fault, a fault for the audit, an event.
const UNITS: (f64, f64, f64) = (0.5, 40.0, 6.0);

/// Arguments of `lab faults`.
#[derive(Debug, Clone, Args)]
pub struct FaultsArgs {
    /// Number of hosts, 2 to 20
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub hosts: usize,
    /// Rounds of each fault; events of a whole host or of the store get a tenth as many
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub rounds: usize,
    /// An etcd program: also start three members of it and let those fail (needs etcdctl)
    #[arg(long, value_name = "PROGRAM")]
    pub etcd_program: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Refuses arguments that cannot be used.
pub(crate) fn check(args: &FaultsArgs) -> anyhow::Result<()> {
    ensure!((2..=20).contains(&args.hosts), "--hosts: {} is out of range 2 to 20", args.hosts);
    ensure!((1..=10_000).contains(&args.rounds), "--rounds: {} is out of range 1 to 10000", args.rounds);
    crate::check::can_inject("faults", args.etcd_program.as_deref())
}

/// Measures all faults and events and prints a table, also of a run that fails or is interrupted. True if the run is complete.
///
/// # Errors
/// When something is not repaired in time: the text says what.
pub(crate) fn run(program: &Path, scratch: &Path, args: &FaultsArgs) -> anyhow::Result<bool> {
    let mut run = Run { args, rows: Vec::new(), progress: Progress::new(work(args)), interrupt: Interrupt::listen()? };
    let outcome = run.all(program, scratch);
    run.progress.clear();
    run.print()?;
    if !matches!(outcome, Ok(true)) && !args.json {
        output::error_line("the run is not complete: these are the results so far");
    }
    outcome
}

fn rounds_of(fault: &Fault, rounds: usize) -> usize {
    if fault.noticed == Noticed::Audit { rounds.min(AUDIT_ROUNDS) } else { rounds }
}

fn units_of(fault: &Fault) -> f64 {
    if fault.noticed == Noticed::Audit { UNITS.1 } else { UNITS.0 }
}

#[expect(clippy::cast_precision_loss, reason = "small numbers, for an estimate")]
fn work(args: &FaultsArgs) -> f64 {
    let mut units = 0.0;
    let of_events = |count: usize| (count * args.rounds.div_ceil(10)) as f64 * UNITS.2;
    for (backend, nftables) in LABS {
        let fitting = FAULTS.iter().filter(|fault| fault.fits(backend, nftables));
        units += fitting.map(|fault| rounds_of(fault, args.rounds) as f64 * units_of(fault)).sum::<f64>();
        if nftables {
            units += of_events(events::HOSTS.len() + events::STORES.len());
        }
    }
    units + if args.etcd_program.is_some() { of_events(events::etcd::ETCD.len()) } else { 0.0 }
}

struct Run<'a> {
    args: &'a FaultsArgs,
    rows: Vec<Row>,
    progress: Progress,
    interrupt: Interrupt,
}

impl Run<'_> {
    /// False if it was interrupted.
    fn all(&mut self, program: &Path, scratch: &Path) -> anyhow::Result<bool> {
        for (backend, nftables) in LABS {
            let mut plan = Plan::new(self.args.hosts, &json!({ "Type": backend }), program);
            plan.config["EnableNFTables"] = nftables.into();
            let place = format!("{backend}, {}", if nftables { "nftables" } else { "iptables" });
            self.progress.show(&format!("{place}: starting {} hosts", self.args.hosts));
            let mut stage = Stage::new(plan, &scratch.join(place.replace(", ", "-")))?;
            if !self.faults(&stage, &place, backend, nftables)? {
                return Ok(false);
            }
            let events: Vec<ClusterEvent> = events::HOSTS.iter().chain(&events::STORES).copied().collect();
            if nftables && !self.events(&mut stage, &events)? {
                return Ok(false);
            }
        }
        let Some(etcd) = &self.args.etcd_program else { return Ok(true) };
        self.progress.show("starting three members of etcd");
        let mut stage = Stage::new(Plan::members(etcd, self.args.hosts, program), &scratch.join("etcd"))?;
        self.events(&mut stage, &events::etcd::ETCD)
    }

    /// Measures each fault in each round. Rounds are the outer loop: no object is struck so often that the daemon takes it for
    /// a conflict with another program.
    fn faults(&mut self, stage: &Stage, place: &str, backend: &str, nftables: bool) -> anyhow::Result<bool> {
        let mut rows: BTreeMap<usize, Row> = BTreeMap::new();
        let mut outcome = Ok(true);
        'rounds: for round in 0..self.args.rounds {
            for (at, fault) in FAULTS.iter().enumerate().filter(|(_, fault)| fault.fits(backend, nftables)) {
                if round >= rounds_of(fault, self.args.rounds) {
                    continue;
                }
                if self.interrupt.is_set() {
                    outcome = Ok(false);
                    break 'rounds;
                }
                self.progress.show(&format!("{place}, round {} of {}: {}", round + 1, self.args.rounds, fault.name));
                match faults::once(&stage.lab, &stage.pods, round % self.args.hosts, fault) {
                    Ok(measured) => rows.entry(at).or_insert_with(|| Row::new(fault.name, place, Some(fault.noticed))).push(measured),
                    Err(error) => {
                        outcome = Err(error);
                        break 'rounds;
                    }
                }
                self.progress.add(units_of(fault));
            }
        }
        self.rows.extend(rows.into_values());
        outcome
    }

    fn events(&mut self, stage: &mut Stage, events: &[ClusterEvent]) -> anyhow::Result<bool> {
        let is_vxlan = stage.is_vxlan();
        let place = match stage.lab.plan.store {
            StoreKind::Members(_) => format!("{}, etcd", stage.lab.plan.backend()),
            _ => stage.lab.plan.backend().to_owned(),
        };
        let rounds = self.args.rounds.div_ceil(10);
        for event in events.iter().filter(|event| is_vxlan || !event.vxlan) {
            for round in 0..rounds {
                if self.interrupt.is_set() {
                    return Ok(false);
                }
                self.progress.show(&format!("{place}: {}", event.name));
                let (repaired, lost) = events::once(stage, event, round % stage.pods.len())?;
                let measured = Measured { repaired, lost, said: None };
                if round == 0 {
                    self.rows.push(Row::new(event.name, &place, None));
                }
                if let Some(row) = self.rows.last_mut() {
                    row.push(measured);
                }
                self.progress.add(UNITS.2);
            }
        }
        Ok(true)
    }

    fn print(&self) -> anyhow::Result<()> {
        if self.args.json {
            output::line(serde_json::to_string_pretty(&self.rows.iter().map(Row::json).collect::<Vec<_>>())?);
            return Ok(());
        }
        output::line(
            "| fault | lab | noticed by | rounds | repaired, p50 ms | p99 ms | lost pings of one a ms, p50 | p99 | the daemon said, p50 ms |",
        );
        output::line("|---|---|---|--:|--:|--:|--:|--:|---|");
        self.rows.iter().for_each(|row| output::line(row.text()));
        Ok(())
    }
}

/// Measurements of one fault or event in one lab.
#[derive(Debug, Clone)]
struct Row {
    name: String,
    place: String,
    /// How a fault is noticed; an event of the cluster has none.
    noticed: Option<Noticed>,
    /// Time of each round until the state was as before, or as the event asks for; ordered.
    repaired: Vec<Duration>,
    /// Echo requests, one each millisecond, that were lost in each round; ordered.
    lost: Vec<usize>,
    /// The daemon's first line about each round, with its time; ordered by time.
    said: Vec<(Duration, String)>,
}

impl Row {
    fn new(name: &str, place: &str, noticed: Option<Noticed>) -> Row {
        Row { name: name.to_owned(), place: place.to_owned(), noticed, repaired: Vec::new(), lost: Vec::new(), said: Vec::new() }
    }

    fn push(&mut self, Measured { repaired, lost, said }: Measured) {
        self.repaired.push(repaired);
        self.lost.push(lost);
        self.said.extend(said.map(|(event, after)| (after, event)));
        self.said.sort();
        self.repaired.sort();
        self.lost.sort_unstable();
    }

    fn percentile<T: Copy>(values: &[T], percent: usize) -> Option<T> {
        values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied()
    }

    fn millis(&self, percent: usize) -> f64 {
        Row::percentile(&self.repaired, percent).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }

    /// A line of the table.
    fn text(&self) -> String {
        let noticed = match self.noticed {
            Some(Noticed::Event) => "notification",
            Some(Noticed::Audit) => "audit",
            None => "-",
        };
        let lost = |percent| Row::percentile(&self.lost, percent).map_or("-".to_owned(), |lost| lost.to_string());
        let slow = if self.noticed.is_some() && self.millis(99) > 100.0 { " (over 100)" } else { "" };
        format!(
            "| {} | {} | {noticed} | {} | {:.1} | {:.1}{slow} | {} | {} | {} |",
            self.name,
            self.place,
            self.repaired.len(),
            self.millis(50),
            self.millis(99),
            lost(50),
            lost(99),
            self.daemon_said()
        )
    }

    /// What the daemon logged in the median round, and when; how often, if not in each round.
    fn daemon_said(&self) -> String {
        let Some((after, event)) = self.said.get(self.said.len().saturating_sub(1) / 2) else { return "–".to_owned() };
        let times = match self.said.len() == self.repaired.len() {
            true => String::new(),
            false => format!(" ({} of {})", self.said.len(), self.repaired.len()),
        };
        format!("{event}, {:.1}{times}", after.as_secs_f64() * 1e3)
    }

    fn json(&self) -> Value {
        json!({
            "fault": self.name, "lab": self.place, "rounds": self.repaired.len(),
            "notified": self.noticed.map(|noticed| noticed == Noticed::Event),
            "p50_ms": self.millis(50), "p99_ms": self.millis(99),
            "said": self.daemon_said(),
            "lost_p50": Row::percentile(&self.lost, 50), "lost_p99": Row::percentile(&self.lost, 99),
        })
    }
}
