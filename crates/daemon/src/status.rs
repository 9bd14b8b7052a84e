//! `flanneld status`: one screen about this node, by the daemon's socket; without a daemon, by the kernel and the subnet file.

mod cold;
mod document;
mod rows;
mod screen;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use self::document::Document;
use self::rows::{Level, Row, is_measuring, rows};
use self::screen::Screen;
use crate::ipam::{self, IpamDirs};
use crate::output;
use crate::socket::{self, AskError};
use crate::state::SCHEMA;
use crate::terminal::{Style, clean, cleaned};

/// Pause between two questions of `--wait`.
const AGAIN: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Exit code: 0 if all is well, 1 if something is degraded, 2 if the node is down or no daemon runs.

Examples:
  flanneld status                      one screen: store, node, peers, repairs, and the peers that are not well
  flanneld status --all                list every peer
  flanneld status --wait=60s           wait until all is well, at most a minute (after an installation)
  flanneld status --json | jq .status  for programs; fields: docs/state.md";

/// Arguments of `flanneld status`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Wait until all is well
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "30s", value_parser = time)]
    pub wait: Option<Duration>,
    /// List the peers that are well, too
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub daemon: DaemonArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub dirs: IpamDirs,
}

/// Which daemon is asked.
#[derive(Debug, Clone, Args)]
pub struct DaemonArgs {
    /// The daemon's socket [default: flanneld.sock beside --subnet-file]
    #[arg(long, value_name = "FILE")]
    pub socket: Option<PathBuf>,
    /// The daemon's file
    #[arg(long, default_value = "/run/flannel/subnet.env", value_name = "FILE")]
    pub subnet_file: PathBuf,
}

impl DaemonArgs {
    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| socket::beside(&self.subnet_file))
    }
}

/// Parses a time: `30s`, `2m`, or a number of seconds.
fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let number: u64 = number.parse().map_err(|_| "write a time as 30s or 2m".to_owned())?;
    Ok(Duration::from_secs(number.saturating_mul(unit)))
}

/// What was found out.
struct Found {
    /// What is printed: the screen, or the document.
    text: String,
    level: Level,
    /// Whether more will be known soon.
    is_early: bool,
}

/// Prints the status. Returns the exit code.
///
/// # Errors
/// When the daemon's answer cannot be read, or without a daemon the kernel.
pub fn run(args: &StatusArgs) -> anyhow::Result<u8> {
    let end = args.wait.map(|wait| Instant::now() + wait);
    loop {
        let found = look(args, Style::of_stdout())?;
        if found.level == Level::Ok && !found.is_early || end.is_none_or(|end| Instant::now() >= end) {
            output::line(found.text.trim_end());
            return Ok(match found.level {
                Level::Ok => 0,
                Level::Warn => 1,
                Level::Fail => 2,
            });
        }
        std::thread::sleep(AGAIN);
    }
}

/// The screen as plain text.
pub(crate) fn plain(args: &StatusArgs) -> anyhow::Result<String> {
    look(args, Style::PLAIN).map(|found| found.text)
}

fn look(args: &StatusArgs, style: Style) -> anyhow::Result<Found> {
    let screen = Screen { style, all: args.all };
    match socket::ask(&args.daemon.socket(), "/state") {
        Ok(text) => {
            let value: Value = serde_json::from_str(&text).context("the daemon's answer is not JSON")?;
            Ok(of_daemon(value, pods(args), screen, args.json)?)
        }
        Err(AskError::Starting(text)) => {
            let row = Row { name: "Node", level: Level::Fail, text: clean(&text) };
            Ok(show(&[row], None, screen, args.json, |screen, rows| rows.iter().map(|row| screen.row(row)).collect()))
        }
        Err(error @ AskError::Absent(..)) => Ok(cold::look(&args.daemon, pods(args), &error.to_string(), screen, args.json)),
        Err(error) => Err(error.into()),
    }
}

/// The row about the addresses of this host's pods.
fn pods(args: &StatusArgs) -> Row {
    let env = std::fs::read_to_string(&args.daemon.subnet_file).unwrap_or_default();
    match ipam::pods(&env, &args.dirs) {
        Some(pods) => Row { name: "Pods", level: if pods.is_well { Level::Ok } else { Level::Warn }, text: clean(&pods.text) },
        // No pod yet, or a container that does not see the host's files.
        None => {
            Row { name: "Pods", level: Level::Ok, text: format!("no reservations in {}", clean(&args.dirs.networks.display().to_string())) }
        }
    }
}

fn of_daemon(value: Value, pods: Row, screen: Screen, json: bool) -> anyhow::Result<Found> {
    let document: Document = serde_json::from_value(cleaned(value.clone())).context("the daemon's answer has another shape")?;
    let mut rows = rows(&document, pods);
    if document.schema > SCHEMA {
        let text = format!("the daemon ({}) is newer than this program; some of its state may not be shown", document.version);
        rows.push(Row { name: "Version", level: Level::Warn, text });
    }
    let found = show(&rows, Some(value), screen, json, |screen, rows| screen.show(&document, rows));
    Ok(Found { is_early: is_measuring(&document), ..found })
}

/// The screen or the document, with the highest level of the rows.
fn show(rows: &[Row], state: Option<Value>, screen: Screen, json: bool, text: impl Fn(Screen, &[Row]) -> String) -> Found {
    let level = rows.iter().map(|row| row.level).max().unwrap_or(Level::Ok);
    let status = match level {
        Level::Ok => "well",
        Level::Warn => "degraded",
        Level::Fail => "down",
    };
    let text = match json {
        true => {
            let value = json!({ "schema": SCHEMA, "status": status, "rows": rows, "state": state });
            serde_json::to_string_pretty(&value).unwrap_or_default()
        }
        false => text(screen, rows),
    };
    Found { text, level, is_early: false }
}
