//! `flanneld monitor`: prints what changes, as it happens, by the daemon's socket.

use clap::Args;
use clap::builder::PossibleValuesParser;
use serde::Deserialize;

use crate::events::TYPES;
use crate::output;
use crate::socket;
use crate::status::DaemonArgs;
use crate::terminal::{Color, Style, clean};

const EXAMPLES: &str = "\
It ends with the daemon, or when the reader goes away.

Examples:
  flanneld monitor                            leases, repairs, conflicts, paths, findings, as they change
  flanneld monitor --type repair,conflict     who changes flannel's objects?
  flanneld monitor --json | jq -r .subject    a line of JSON for each event; fields: docs/state.md";

/// Arguments of `flanneld monitor`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct MonitorArgs {
    /// Print a line of JSON for each event
    #[arg(long)]
    pub json: bool,
    /// Only events of these types; repeatable
    #[arg(long = "type", value_name = "TYPE[,TYPE]", value_delimiter = ',', value_parser = PossibleValuesParser::new(TYPES))]
    pub types: Vec<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub daemon: DaemonArgs,
}

/// An event as it comes.
#[derive(Debug, Deserialize)]
struct Line {
    time: String,
    #[serde(rename = "type")]
    kind: String,
    action: String,
    subject: String,
    #[serde(default)]
    text: String,
    by: Option<String>,
}

/// Prints events until the daemon ends.
///
/// # Errors
/// When no daemon answers.
pub fn run(args: &MonitorArgs) -> anyhow::Result<()> {
    let style = Style::of_stdout();
    socket::follow(&args.daemon.socket(), |line| {
        if let Some(shown) = show(line, args.json, &args.types, style) {
            output::line(shown);
        }
        !output::is_closed()
    })?;
    output::error_line("flanneld: the daemon ended the stream of events");
    Ok(())
}

/// What is printed for a line of the stream; `None` for an empty one, and for a type that is not wanted.
fn show(line: &str, json: bool, types: &[String], style: Style) -> Option<String> {
    let event: Line = serde_json::from_str(line).ok()?;
    // What was left out may be of any type.
    if !types.is_empty() && event.kind != "more" && !types.contains(&event.kind) {
        return None;
    }
    if json {
        return Some(line.to_owned());
    }
    let Line { time, kind, action, subject, text, by } = event;
    let color = match (kind.as_str(), action.as_str()) {
        ("lease" | "store", _) => None,
        (_, "ended") => Some(Color::Green),
        ("repair", _) => Some(Color::Yellow),
        _ => Some(Color::Red),
    };
    let head = clean(&format!("{kind:<8} {action:<7}"));
    let head = color.map_or(head.clone(), |color| style.paint(color, &head));
    let text = if text.is_empty() { String::new() } else { format!("  {text}") };
    let by = by.map(|by| format!(" (changed by {by})")).unwrap_or_default();
    Some(format!("{}  {head}  {}", clean(&time), clean(&format!("{subject}{text}{by}"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    const REPAIR: &str = r#"{"time":"2026-11-28T15:00:00.000Z","type":"repair","action":"made","subject":"route","text":"set route 10.244.2.0/24","by":"ip, process 7"}"#;

    #[test]
    fn events_are_lines_and_foreign_text_is_escaped() {
        let hostile = r#"{"time":"2026-11-28T15:00:01.000Z","type":"lease","action":"added","subject":"10.244.9.0/24","text":"via 10.0.0.9, refused: \u001b]0;x\u0007\nforged"}"#;
        let ended = r#"{"time":"2026-11-28T15:00:02.000Z","type":"path","action":"ended","subject":"10.244.9.0/24 by IPv4"}"#;
        let color = Style { color: true, width: None };
        let lines: Vec<String> = [(REPAIR, Style::PLAIN), (hostile, Style::PLAIN), (ended, color)]
            .iter()
            .filter_map(|(line, style)| show(line, false, &[], *style))
            .collect();
        expect![[r#"
            2026-11-28T15:00:00.000Z  repair   made     route  set route 10.244.2.0/24 (changed by ip, process 7)
            2026-11-28T15:00:01.000Z  lease    added    10.244.9.0/24  via 10.0.0.9, refused: \u{1b}]0;x\u{7}\nforged
            2026-11-28T15:00:02.000Z  [32mpath     ended  [0m  10.244.9.0/24 by IPv4"#]]
        .assert_eq(&lines.join("\n"));
    }

    #[test]
    fn types_are_chosen_and_json_is_passed_on() {
        let types = ["conflict".to_owned()];
        assert_eq!(show(REPAIR, true, &types, Style::PLAIN), None);
        assert_eq!(show(REPAIR, true, &[], Style::PLAIN).as_deref(), Some(REPAIR));
        assert_eq!(show("", false, &[], Style::PLAIN), None);
        assert!(show(&REPAIR.replace("repair", "more"), true, &types, Style::PLAIN).is_some());
    }
}
