//! The screen of `flanneld status`. Pure.

use std::time::Duration;

use super::document::{Document, PathState, Peer};
use super::rows::{Health, Level, Row};
use crate::clock::short;
use crate::terminal::{Color, Style, columns, wrap};

/// Peers that are not well, and findings, on the screen without `--all`.
const SHOWN: usize = 50;
/// Columns of a row's name and level.
const NAME: usize = 9;
const LEVEL: usize = 6;

/// How the screen is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    pub(super) style: Style,
    /// Whether peers that are well are listed, too.
    pub(super) all: bool,
}

impl Screen {
    /// The screen for a daemon's state.
    pub(super) fn show(self, document: &Document, rows: &[Row]) -> String {
        let mut text = self.header(document);
        rows.iter().for_each(|row| text.push_str(&self.row(row)));
        text.push_str(&self.findings(document));
        text + &self.peers(document)
    }

    fn header(self, document: &Document) -> String {
        let Document { version, backend, subnet, node, uptime_s, .. } = document;
        let vni = document.vni.map(|vni| format!("VNI {vni}"));
        let port = document.port.map(|port| format!("UDP {port}"));
        let tunnel: Vec<String> = vni.into_iter().chain(port).collect();
        let tunnel = if tunnel.is_empty() { String::new() } else { format!(" ({})", tunnel.join(", ")) };
        let up = short(Duration::from_secs(*uptime_s));
        let line = format!("flannel {version}  {backend}{tunnel}  subnet {subnet}  node {node}  up {up}");
        wrap(&line, self.style.width, 2) + "\n"
    }

    pub(super) fn row(self, row: &Row) -> String {
        let (level, color) = match row.level {
            Level::Ok => ("OK", Color::Green),
            Level::Warn => ("WARN", Color::Yellow),
            Level::Fail => ("FAIL", Color::Red),
        };
        let indent = NAME + LEVEL;
        let text = wrap(&row.text, self.style.width.map(|width| width.saturating_sub(indent)), 0);
        let text = text.replace('\n', &format!("\n{}", " ".repeat(indent)));
        format!("{:NAME$}{}{}{text}\n", row.name, self.style.paint(color, level), " ".repeat(LEVEL - level.len()))
    }

    fn findings(self, document: &Document) -> String {
        let mut text = String::new();
        for finding in document.findings.iter().take(SHOWN) {
            let color = if finding.severity == "error" { Color::Red } else { Color::Yellow };
            let head = format!("{} {}", finding.severity, finding.code);
            let body = wrap(&format!("{head}: {}", finding.text), self.style.width, 2);
            text.push_str(&format!("\n{}{}", self.style.paint(color, &head), body.strip_prefix(&head).unwrap_or(&body)));
            if !finding.fix.is_empty() {
                text.push_str(&format!("\n  fix: {}", wrap(&finding.fix, self.style.width.map(|width| width.saturating_sub(7)), 7)));
            }
        }
        if document.findings.len() > SHOWN {
            text.push_str(&format!("\n… {} more findings (flanneld doctor)", document.findings.len() - SHOWN));
        }
        if text.is_empty() { text } else { text + "\n" }
    }

    fn peers(self, document: &Document) -> String {
        let is_listed = |peer: &&Peer| self.all || Health::of(peer).is_shown();
        let limit = if self.all { usize::MAX } else { SHOWN };
        let listed: Vec<&Peer> = document.peers.list.iter().filter(is_listed).take(limit).collect();
        let bad = document.peers.list.iter().filter(|peer| Health::of(peer).is_shown()).count();
        let mut text = String::new();
        if !listed.is_empty() {
            let lines: Vec<Line> = listed.iter().flat_map(|peer| lines(peer, self.all)).collect();
            text.push('\n');
            text.push_str(&self.table(&lines));
        }
        let well = document.peers.list.len() - bad;
        if bad > listed.len() {
            text.push_str(&format!("… {} more are not well (--all)\n", bad - listed.len()));
        }
        if !self.all && well > 0 && bad > 0 {
            text.push_str(&format!("… {well} more {} well or not measured (--all)\n", if well == 1 { "is" } else { "are" }));
        }
        text
    }

    fn table(self, lines: &[Line]) -> String {
        const HEAD: [&str; 7] = ["SUBNET", "VIA", "PATH", "REACH", "RTT ms", "LOSS", "SINCE"];
        let mut widths = HEAD.map(columns);
        for line in lines {
            for (width, cell) in widths.iter_mut().zip(&line.cells) {
                *width = (*width).max(columns(cell));
            }
        }
        let join = |cells: &[String; 7]| -> String {
            let cells = cells.iter().zip(widths).map(|(cell, width)| format!("{cell}{}", " ".repeat(width - columns(cell))));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let mut text = join(&HEAD.map(ToOwned::to_owned)) + "\n";
        let full = widths.iter().sum::<usize>() + 2 * (widths.len() - 1);
        for line in lines {
            let cells = join(&line.cells);
            // Cells are padded before they are coloured.
            let painted = match line.color {
                Some(color) => cells.replacen(&line.cells[3], &self.style.paint(color, &line.cells[3]), 1),
                None => cells.clone(),
            };
            text.push_str(&painted);
            if !line.reason.is_empty() {
                let fits = self.style.width.is_none_or(|width| full + 2 + columns(&line.reason) <= width);
                match fits {
                    true => text.push_str(&format!("{}{}", " ".repeat(full - columns(&cells) + 2), line.reason)),
                    false => text.push_str(&format!("\n  {}", wrap(&line.reason, self.style.width.map(|width| width - 2), 2))),
                }
            }
            text.push('\n');
        }
        text
    }
}

/// A line of the table.
struct Line {
    cells: [String; 7],
    color: Option<Color>,
    reason: String,
}

/// The lines of a peer: one for each path that is to be shown, or one for the peer.
fn lines(peer: &Peer, all: bool) -> Vec<Line> {
    let via = peer.public_ip.clone().unwrap_or_else(|| "–".to_owned());
    let is_bad = |path: &PathState| !matches!(path.verdict.as_str(), "reachable" | "unmeasured");
    let none = || "–".to_owned();
    let whole = || {
        let reason = match peer.state.as_str() {
            "refused" => peer.reasons.join("; "),
            "failed" => format!("the kernel does not take {}", peer.object.as_deref().unwrap_or("an object of it")),
            "doubtful" => "the store lost its lease; its routes stay for five minutes".to_owned(),
            _ => String::new(),
        };
        let color = (peer.state != "programmed").then_some(Color::Red);
        let reach = if peer.state == "programmed" { "unmeasured".to_owned() } else { peer.state.clone() };
        Line { cells: [peer.subnet.clone(), via.clone(), none(), reach, none(), none(), none()], color, reason }
    };
    let shown: Vec<&PathState> = peer.paths.iter().filter(|path| all || is_bad(path)).collect();
    if shown.is_empty() || matches!(peer.state.as_str(), "refused" | "failed") {
        return vec![whole()];
    }
    let line = |path: &PathState| {
        let loss = (path.probes > 0).then(|| format!("{}%", u64::from(path.lost) * 100 / u64::from(path.probes)));
        let rtt = path.rtt_ms.map(|rtt| format!("{rtt:.1}"));
        let cells = [
            peer.subnet.clone(),
            via.clone(),
            path.family.clone(),
            path.verdict.clone(),
            rtt.unwrap_or_else(none),
            loss.unwrap_or_else(none),
            short(Duration::from_secs(path.since_s)),
        ];
        let error = path.error.as_ref().map(|error| format!(" (cannot send: {error})")).unwrap_or_default();
        let color = if is_bad(path) { Some(Color::Red) } else { (path.verdict == "reachable").then_some(Color::Green) };
        Line { cells, color, reason: path.reason.clone().unwrap_or_default() + &error }
    };
    shown.into_iter().map(line).collect()
}
