//! The limits in `docs/security.md` are those of the sources, and the tests that it names exist.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The constants of a source file that are numbers or times, times in seconds.
fn constants(source: &str) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for line in source.lines() {
        let Some((_, rest)) = line.split_once("const ") else { continue };
        let Some(((name, _), value)) = rest.split_once(" = ").and_then(|(left, value)| Some((left.split_once(": ")?, value))) else {
            continue;
        };
        if let Some(value) = value.split(';').next().and_then(|value| evaluate(value, &found)) {
            found.insert(name.to_owned(), value);
        }
    }
    found
}

/// A number, a name, a product, sum or shift, and `Duration::from_secs` of such.
fn evaluate(text: &str, known: &BTreeMap<String, u64>) -> Option<u64> {
    let text = text.trim();
    let inner = |prefix: &str| text.strip_prefix(prefix)?.strip_suffix(')').filter(|inner| !inner.contains(')'));
    if let Some(inner) = inner("Duration::from_secs(").or_else(|| inner("(")) {
        return evaluate(inner, known);
    }
    for (operator, apply) in [(" + ", u64::checked_add as fn(u64, u64) -> Option<u64>), (" * ", u64::checked_mul)] {
        if let Some((left, right)) = text.split_once(operator) {
            return apply(evaluate(left, known)?, evaluate(right, known)?);
        }
    }
    if let Some((left, right)) = text.split_once(" << ") {
        return Some(evaluate(left, known)? << evaluate(right, known)?);
    }
    text.replace('_', "").parse().ok().or_else(|| known.get(text).copied())
}

/// A number as the page writes it: `64`, `16 KiB`, `1.5 MiB`, `5 s`.
fn number(text: &str) -> Option<u64> {
    let (digits, unit) = text.split_once(' ').unwrap_or((text, ""));
    let unit = match unit {
        "" | "s" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return None,
    };
    match digits.split_once('.') {
        None => Some(digits.parse::<u64>().ok()? * unit),
        Some((whole, tenths)) => {
            Some(whole.parse::<u64>().ok()? * unit + tenths.parse::<u64>().ok().filter(|tenths| *tenths < 10)? * unit / 10)
        }
    }
}

/// Every test's name, and every function's.
fn names(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            names(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            for line in std::fs::read_to_string(&path).unwrap().lines() {
                found.extend(line.split_once("fn ").and_then(|(_, rest)| rest.split_once('(')).map(|(name, _)| name.to_owned()));
            }
        }
    }
}

#[test]
fn limits_on_the_page_are_those_of_the_sources() {
    let page = std::fs::read_to_string(repository().join("docs/security.md")).unwrap();
    let mut tests = BTreeSet::new();
    names(&repository().join("crates"), &mut tests);
    let (mut file, mut known, mut listed) = (String::new(), BTreeMap::new(), BTreeMap::<String, BTreeSet<String>>::new());
    for line in page.lines() {
        if let Some((_, path)) = line.strip_prefix("### ").and_then(|title| title.split_once("(`")) {
            path.trim_end_matches("`)").clone_into(&mut file);
            known = constants(&std::fs::read_to_string(repository().join(&file)).unwrap());
        }
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let &[name, value, reason, test] = &cells[..] else { continue };
        if file.is_empty() || name == "Constant" || name.starts_with("---") {
            continue;
        }
        assert_eq!(number(value), known.get(name).copied(), "{file}: {name}: the page has {value}");
        assert!(!reason.is_empty(), "{file}: {name} has no reason");
        let test = test.trim_matches('`');
        assert!(test == "–" || tests.contains(test), "{file}: {name}: there is no test {test}");
        listed.entry(file.clone()).or_default().insert(name.to_owned());
    }
    for file in ["crates/daemon/src/embedded/limits.rs", "crates/daemon/src/store/limits.rs"] {
        let all: BTreeSet<String> = constants(&std::fs::read_to_string(repository().join(file)).unwrap()).into_keys().collect();
        assert_eq!(listed.get(file), Some(&all), "{file}: constants and rows");
    }
    assert!(listed.len() >= 8, "{listed:?}");
}
