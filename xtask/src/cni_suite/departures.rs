//! The list of specs that pass with the reference and, on purpose, not with ours.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};

/// The departures of each suite.
#[derive(Debug, Default)]
pub(super) struct Departures(BTreeMap<String, Vec<Entry>>);

/// An entry of the list: specs that fail for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// A spec's name; `*` stands for any text.
    pub(super) pattern: String,
    /// The reason for the departure.
    pub(super) reason: String,
    /// Its line in the file.
    pub(super) line: usize,
}

impl Entry {
    pub(super) fn covers(&self, spec: &str) -> bool {
        matches(&self.pattern, spec)
    }
}

impl Departures {
    /// Reads the list. Fails if it names an unknown suite.
    pub(super) fn read(file: &Path, suites: &[&str]) -> anyhow::Result<Departures> {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Departures::parse(&text, suites).with_context(|| file.display().to_string())
    }

    /// Parses the list: a line `[suite]`, then reasons at the margin, each with its specs indented below it.
    pub(super) fn parse(text: &str, suites: &[&str]) -> anyhow::Result<Departures> {
        let mut list = Departures::default();
        let (mut suite, mut reason, mut has_specs) = (None, String::new(), true);
        for (line, text) in text.lines().enumerate().map(|(at, text)| (at + 1, text.trim_end())) {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                ensure!(suites.contains(&name), "line {line}: unknown suite {name:?}; known: {}", suites.join(", "));
                ensure!(has_specs, "line {line}: the reason before it has no specs");
                (suite, reason, has_specs) = (Some(name.to_owned()), String::new(), true);
            } else if let Some(pattern) = text.strip_prefix("    ") {
                let suite = suite.clone().with_context(|| format!("line {line}: no [suite] before it"))?;
                ensure!(!reason.is_empty(), "line {line}: a departure needs a reason, at the margin above it");
                let entry = Entry { pattern: pattern.trim().to_owned(), reason: reason.clone(), line };
                list.0.entry(suite).or_default().push(entry);
                has_specs = true;
            } else {
                if has_specs {
                    reason.clear();
                }
                reason = format!("{reason} {text}").trim().to_owned();
                has_specs = false;
            }
        }
        ensure!(has_specs, "the last reason has no specs");
        Ok(list)
    }

    /// The entries of a suite.
    pub(super) fn of(&self, suite: &str) -> &[Entry] {
        self.0.get(suite).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Does a text match a pattern in which `*` stands for any text?
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => {
            let Some(text) = text.strip_prefix(start) else { return false };
            (0..=text.len()).filter(|at| text.is_char_boundary(*at)).any(|at| matches(rest, &text[at..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn star_stands_for_any_text() {
        assert!(matches("a [*] b", "a [1.0.0] b"));
        assert!(matches("*", "") && matches("a*", "a") && matches("a*c*e", "abcde"));
        assert!(!matches("a [*] b", "a [1.0.0] c") && !matches("a", "ab"));
    }

    #[test]
    fn specs_share_the_reason_above_them() {
        let list = Departures::parse("# remark\n[bridge]\nOne\nreason.\n    a\n    b\nAnother.\n    c\n", &["bridge"]).unwrap();
        let entries: Vec<_> = list.of("bridge").iter().map(|entry| (entry.pattern.as_str(), entry.reason.as_str(), entry.line)).collect();
        assert_eq!(entries, [("a", "One reason.", 5), ("b", "One reason.", 6), ("c", "Another.", 8)]);
        assert!(list.of("tuning").is_empty());
    }

    #[test]
    fn departures_without_suite_or_reason_are_refused() {
        let error = |text: &str| Departures::parse(text, &["bridge"]).unwrap_err().to_string();
        assert_eq!(error("[brigde]"), "line 1: unknown suite \"brigde\"; known: bridge");
        assert_eq!(error("    a"), "line 1: no [suite] before it");
        assert_eq!(error("[bridge]\n    a"), "line 2: a departure needs a reason, at the margin above it");
        assert_eq!(error("[bridge]\nReason."), "the last reason has no specs");
    }

    #[test]
    fn checked_in_list_is_readable() {
        let names = super::super::SUITES.map(|suite| suite.name);
        Departures::parse(include_str!("../../../tests/cni-suite/departures.txt"), &names).unwrap();
    }
}
