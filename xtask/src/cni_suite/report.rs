//! Parses the reports of the test suites and compares them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Suite;
use super::departures::Departures;

/// The specs of one run, by name.
#[derive(Debug, Default)]
pub(super) struct Specs(BTreeMap<String, Outcome>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Passed,
    /// The suite skips it.
    Skipped,
    /// The beginning of the failure's message, and its location.
    Failed(String),
}

impl Specs {
    /// Reads the report that ginkgo writes.
    pub(super) fn parse(text: &str) -> anyhow::Result<Specs> {
        let reports: Value = serde_json::from_str(text).context("the report is not JSON")?;
        let mut specs = Specs::default();
        for spec in reports.as_array().into_iter().flatten().filter_map(|report| report["SpecReports"].as_array()).flatten() {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let state = text(&spec["State"]);
            if text(&spec["LeafNodeType"]) != "It" {
                ensure!(state == "passed", "{} {state}: {}", text(&spec["LeafNodeType"]), text(&spec["Failure"]["Message"]));
                continue;
            }
            let name = path(spec["ContainerHierarchyTexts"].as_array().into_iter().flatten().chain([&spec["LeafNodeText"]]).map(text));
            // Several specs may share a name.
            let numbered = |number: usize| if number == 1 { name.clone() } else { format!("{name} #{number}") };
            let name = (1..).map(numbered).find(|name| !specs.0.contains_key(name)).unwrap_or_default();
            let outcome = match state.as_str() {
                "passed" => Outcome::Passed,
                "skipped" | "pending" => Outcome::Skipped,
                _ => Outcome::Failed(failure(&spec["Failure"])),
            };
            specs.0.insert(name, outcome);
        }
        ensure!(!specs.0.is_empty(), "the report has no specs");
        Ok(specs)
    }

    /// The number of specs.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The number of specs that passed.
    pub(super) fn passed(&self) -> usize {
        self.0.values().filter(|outcome| **outcome == Outcome::Passed).count()
    }
}

/// The full name of a spec: the names of its containers, then its own.
fn path(texts: impl Iterator<Item = String>) -> String {
    texts.collect::<Vec<_>>().join(" > ")
}

/// The beginning of a failure's message, and its location.
fn failure(failure: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let message = format!("{} {}", text(&failure["Message"]), text(&failure["ForwardedPanic"]));
    let short: String = message.trim().chars().take(300).collect();
    let file = text(&failure["Location"]["FileName"]);
    format!("{short} ({}:{})", file.rsplit('/').next().unwrap_or_default(), failure["Location"]["LineNumber"])
}

/// A failed spec and the message of its failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) name: String,
    pub(super) message: String,
}

/// The comparison of one suite's results with the reference and with ours.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    specs: usize,
    /// Specs that run a plugin.
    running: usize,
    /// Specs that pass with the reference.
    pub(super) reference: usize,
    /// Of these, specs that pass with ours.
    ours: usize,
    departures: usize,
    skipped: usize,
    /// Specs that fail with the reference.
    pub(super) impossible: Vec<Failure>,
    /// Specs that pass with the reference only, and are not listed.
    new: Vec<Failure>,
    /// Entries of the list whose specs pass.
    stale: Vec<String>,
}

impl Comparison {
    /// Compares two runs. `calls` has a line for each call of a plugin's function, with the spec's name.
    pub(super) fn new(suite: &Suite, reference: &Specs, ours: &Specs, calls: &str, departures: &Departures) -> Comparison {
        let calls: BTreeSet<String> =
            calls.lines().filter_map(|line| serde_json::from_str(line).ok()).map(|texts: Vec<String>| path(texts.into_iter())).collect();
        let mut found = Comparison { specs: reference.len(), ..Comparison::default() };
        let entries = departures.of(suite.name);
        let mut used = BTreeSet::new();
        for (name, theirs) in &reference.0 {
            let plain = name.rsplit_once(" #").map_or(name.as_str(), |(plain, _)| plain);
            found.running += usize::from(calls.contains(plain) || suite.process_specs.iter().any(|prefix| name.starts_with(prefix)));
            let entry = entries.iter().find(|entry| entry.covers(name));
            used.extend(entry.map(|entry| entry.line));
            match (theirs, ours.0.get(name)) {
                (Outcome::Skipped, _) => found.skipped += 1,
                (Outcome::Failed(message), _) => found.impossible.push(Failure { name: name.clone(), message: message.clone() }),
                (Outcome::Passed, Some(Outcome::Passed)) => {
                    (found.reference, found.ours) = (found.reference + 1, found.ours + 1);
                    found.stale.extend(entry.map(|entry| format!("{name}: passes: remove the entry (line {})", entry.line)));
                }
                (Outcome::Passed, outcome) => {
                    found.reference += 1;
                    let message = match outcome {
                        Some(Outcome::Failed(message)) => message.clone(),
                        Some(_) => "skipped".to_owned(),
                        None => "absent".to_owned(),
                    };
                    match entry {
                        Some(_) => found.departures += 1,
                        None => found.new.push(Failure { name: name.clone(), message }),
                    }
                }
            }
        }
        let unused = entries.iter().filter(|entry| !used.contains(&entry.line));
        found.stale.extend(unused.map(|entry| format!("{}: there is no such spec: remove the entry (line {})", entry.pattern, entry.line)));
        found
    }

    /// The differences that are not listed as departures, one line each.
    pub(super) fn problems(&self, suite: &str) -> Vec<String> {
        let new = self.new.iter().map(|spec| format!("{suite}: {}: passes with the reference only: {}", spec.name, spec.message));
        new.chain(self.stale.iter().map(|text| format!("{suite}: {}: {text}", super::DEPARTURES))).collect()
    }

    /// The suite's line in the table.
    pub(super) fn row(&self, suite: &str) -> Row {
        let numbers = [self.specs, self.running, self.reference, self.ours, self.departures, self.impossible.len(), self.skipped];
        Row { suite: suite.to_owned(), numbers }
    }
}

/// A line of the table.
pub(super) struct Row {
    suite: String,
    numbers: [usize; COLUMNS.len()],
}

const COLUMNS: [&str; 7] =
    ["specs", "run a plugin", "pass with the reference", "and with ours", "departures", "cannot run here", "skipped"];

/// Formats the table of all suites, with a total.
pub(super) fn table(rows: &[Row]) -> String {
    let sum = |at: usize| rows.iter().map(|row| row.numbers[at]).sum();
    let total = Row { suite: "all".to_owned(), numbers: std::array::from_fn(sum) };
    let mut text = format!("{:<22}", "suite");
    COLUMNS.iter().for_each(|column| text.push_str(&format!("  {column}")));
    for row in rows.iter().chain([&total]) {
        text.push_str(&format!("\n{:<22}", row.suite));
        COLUMNS.iter().zip(row.numbers).for_each(|(column, number)| text.push_str(&format!("  {number:>width$}", width = column.len())));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn specs(list: &[(&str, &str)]) -> Specs {
        let spec = |(name, state): &(&str, &str)| {
            json!({ "LeafNodeType": "It", "ContainerHierarchyTexts": ["s"], "LeafNodeText": name, "State": state,
                    "Failure": { "Message": "no\n  way", "Location": { "FileName": "/a/b.go", "LineNumber": 7 } } })
        };
        Specs::parse(&json!([{ "SpecReports": list.iter().map(spec).collect::<Vec<_>>() }]).to_string()).unwrap()
    }

    const SUITE: Suite = Suite { name: "bridge", package: "x/bridge", env: None, process_specs: &[], min_passed: 0 };

    #[test]
    fn new_failure_and_stale_entry_are_problems() {
        let theirs = specs(&[("a", "passed"), ("b", "passed"), ("c", "passed"), ("d", "failed"), ("e", "skipped")]);
        let ours = specs(&[("a", "failed"), ("b", "failed"), ("c", "passed"), ("d", "passed"), ("e", "skipped")]);
        let list = Departures::parse("[bridge]\nReason.\n    s > b\n    s > c\n    s > x\n", &["bridge"]).unwrap();
        let found = Comparison::new(&SUITE, &theirs, &ours, "[\"s\",\"a\"]\n[\"s\",\"a\"]\n", &list);
        assert_eq!(found.row("bridge").numbers, [5, 1, 3, 1, 1, 1, 1]);
        assert_eq!(
            found.problems("bridge"),
            [
                "bridge: s > a: passes with the reference only: no way (b.go:7)",
                "bridge: tests/cni-suite/departures.txt: s > c: passes: remove the entry (line 4)",
                "bridge: tests/cni-suite/departures.txt: s > x: there is no such spec: remove the entry (line 5)",
            ]
        );
        assert_eq!(found.impossible[0].name, "s > d");
    }

    #[test]
    fn departure_that_cannot_run_here_is_not_stale() {
        let list = Departures::parse("[bridge]\nReason.\n    s > a\n", &["bridge"]).unwrap();
        let found = Comparison::new(&SUITE, &specs(&[("a", "failed")]), &specs(&[("a", "passed")]), "", &list);
        assert!(found.problems("bridge").is_empty());
    }

    #[test]
    fn specs_of_one_name_get_numbers() {
        let theirs = specs(&[("a", "passed"), ("a", "passed")]);
        assert_eq!((theirs.len(), theirs.passed()), (2, 2));
        assert!(theirs.0.contains_key("s > a #2"));
    }

    #[test]
    fn failed_setup_is_an_error() {
        let report = json!([{ "SpecReports": [{ "LeafNodeType": "BeforeSuite", "State": "failed", "Failure": { "Message": "x" } }] }]);
        assert!(Specs::parse(&report.to_string()).is_err() && Specs::parse("[]").is_err());
    }
}
