//! Size limits: 600 lines per file before its tests, 80 lines per function.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::pending;
use crate::sources::sources;
use crate::tools::{Step, cargo_command, output};

/// The maximum number of lines of a file before its tests.
const MAX_LINES: usize = 600;

/// Checks the length of all source files.
pub(crate) fn lines() -> anyhow::Result<()> {
    let mut found = BTreeMap::new();
    for source in sources(|path| path.ends_with(".rs"))?.iter().filter(|source| !source.is_generated()) {
        let lines = source.text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        if lines > MAX_LINES {
            found.insert(source.path.clone(), vec![format!("{}: {lines} lines before its tests, more than {MAX_LINES}", source.path)]);
        }
    }
    pending::compare("lines", &found)
}

/// Runs clippy over the workspace. Fails on every warning, except on long functions in files that are listed as pending.
pub(crate) fn clippy() -> anyhow::Result<()> {
    let step = Step::begin("clippy");
    let mut command = cargo_command();
    command.args(["clippy", "--workspace", "--all-targets", "--quiet", "--message-format=json", "--"]);
    let output = output(command.args(["-W", "clippy::too_many_lines"]))?;
    drop(step);
    let (mut long, mut other): (BTreeMap<String, Vec<String>>, usize) = (BTreeMap::new(), 0);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let value: Value = serde_json::from_str(line).context("cargo clippy printed no JSON")?;
        let message = &value["message"];
        if value["reason"] != "compiler-message" || message["spans"].as_array().is_none_or(Vec::is_empty) {
            continue;
        }
        let span = &message["spans"][0];
        let (file, at) = (span["file_name"].as_str().unwrap_or_default(), &span["line_start"]);
        let text = format!("{file}:{at}: {}", message["message"].as_str().unwrap_or_default());
        if message["code"]["code"] == "clippy::too_many_lines" {
            let texts = long.entry(file.to_owned()).or_default();
            // A file can belong to several targets.
            if !texts.contains(&text) {
                texts.push(text);
            }
        } else {
            eprintln!("{}", message["rendered"].as_str().unwrap_or(&text));
            other += 1;
        }
    }
    if other > 0 || !output.status.success() {
        bail!("clippy: {other} warnings or errors");
    }
    pending::compare("functions", &long)
}
