//! The files that may still break a rule, from `xtask/pending.toml`. The list may only become shorter: a file that keeps the
//! rule must be removed from it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail};

const FILE: &str = "xtask/pending.toml";

/// The rules that a file can be listed for.
const RULES: [&str; 3] = ["words", "lines", "functions"];

/// Compares the files that break a rule, with the places in each, with the files that are listed for that rule.
pub(crate) fn compare(rule: &str, found: &BTreeMap<String, Vec<String>>) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(FILE).with_context(|| format!("cannot read {FILE}"))?;
    let lists = parse(&text)?;
    let listed = lists.get(rule).cloned().unwrap_or_default();
    let new = found.iter().filter(|(file, _)| !listed.contains(*file)).flat_map(|(_, texts)| texts.clone());
    let clean = listed
        .iter()
        .filter(|file| !found.contains_key(*file))
        .map(|file| format!("{file}: keeps the rule: remove it from {FILE} ({rule})"));
    let mut problems: Vec<String> = new.chain(clean).collect();
    let count = problems.len();
    if count == 0 {
        if !listed.is_empty() {
            println!("  {} files are still exempt ({FILE}, {rule})", listed.len());
        }
        return Ok(());
    }
    if count > 100 {
        problems.truncate(100);
        problems.push(format!("and {} more", count - 100));
    }
    bail!("{rule}: {count} places\n{}", problems.join("\n"))
}

/// Parses the subset of TOML that the file uses: `name = [` … `]` with a string on each line.
fn parse(text: &str) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut lists: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut open: Option<String> = None;
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        let wrong = || format!("{FILE}:{number}: {line:?} is neither NAME = [, a quoted path with a comma, nor ]");
        match &open {
            _ if line.is_empty() || line.starts_with('#') => {}
            None => {
                let (name, rest) = line.split_once('=').with_context(wrong)?;
                let name = name.trim();
                anyhow::ensure!(RULES.contains(&name), "{FILE}:{number}: unknown rule {name:?}; known: {}", RULES.join(", "));
                lists.entry(name.to_owned()).or_default();
                match rest.trim() {
                    "[" => open = Some(name.to_owned()),
                    "[]" => {}
                    _ => bail!(wrong()),
                }
            }
            Some(_) if line == "]" => open = None,
            Some(name) => {
                let path = line.trim_end_matches(',').strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).with_context(wrong)?;
                lists.entry(name.clone()).or_default().insert(path.to_owned());
            }
        }
    }
    Ok(lists)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_by_rule() {
        let lists = parse("# reason\nwords = [\n    \"a.rs\",\n    \"b.md\",\n]\nlines = []\n").unwrap();
        assert_eq!(lists["words"], BTreeSet::from(["a.rs".to_owned(), "b.md".to_owned()]));
        assert!(lists["lines"].is_empty());
    }

    #[test]
    fn unknown_rule_is_refused_with_its_line() {
        let error = parse("\nwrods = []\n").unwrap_err().to_string();
        assert!(error.starts_with("xtask/pending.toml:2: unknown rule \"wrods\""), "{error}");
    }

    #[test]
    fn checked_in_list_is_readable() {
        parse(include_str!("../pending.toml")).unwrap();
    }
}
