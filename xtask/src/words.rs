//! The check of words: code, logs and docs use the terms of the field and name who acts.
//!
//! A text is split into lower-case words, at every character that is not a letter and at each change from lower to upper case, so that `leave_seed`, `LeaveSeed` and "leave seed" are the same phrase.

use std::collections::BTreeMap;

use crate::pending;
use crate::sources::sources;

/// Banned phrases, and their replacements.
const PHRASES: [(&str, &str); 45] = [
    ("anew", "again"),
    ("nobody", "name the actor: no process, no host, no peer"),
    ("somebody", "name the actor: another program, an operator"),
    ("hears", "receives, is notified"),
    ("heard", "received, notified"),
    ("told", "reported, logged, given"),
    ("this cannot be set", "failed to apply {object}"),
    ("kernel takes it", "applied after earlier failures"),
    ("undoes what", "conflicting changes by {program}"),
    ("undoes it", "conflicting changes by {program}"),
    ("putting right", "repairing"),
    ("put right", "repaired"),
    ("puts right", "repairs"),
    ("their routes go", "removing routes of {whom}"),
    ("peer is there", "peer added"),
    ("store is not followed", "store watch lost"),
    ("as it should be", "name the state"),
    ("let it tell", "enable"),
    ("tell of itself", "announce itself"),
    ("tell vlans apart", "enable VLAN filtering"),
    ("has not the", "does not have the"),
    ("somebody else s", "in use"),
    ("how they came about", "debug details"),
    ("that no log shows", "redacted in logs"),
    ("without nothing", "drop_empty"),
    ("surroundings", "HostNetwork"),
    ("leave seed", "cache_snapshot"),
    ("paint node", "rebuild_node_objects"),
    ("order of doing", "apply order"),
    ("those who", "name them"),
    ("who waits", "waiters"),
    ("wants the same thing otherwise", "manages the same object"),
    ("want the same thing otherwise", "manage the same object"),
    ("is no news", "is ignored"),
    ("what is said", "name it: the message, the report"),
    ("what is there", "name it: the existing objects"),
    ("what is missing is", "a missing tool …"),
    ("is a failure that names it", "fails the run and is named"),
    ("says of it", "reports about it"),
    ("said of it", "reported about it"),
    ("lives through", "runs"),
    ("thereof", "of it"),
    ("therein", "in it"),
    ("whoever", "name the actor"),
    ("no one", "name the actor: no process, no host, no peer"),
];

/// Banned identifiers, and their replacements. Case-sensitive, because the lower-case words are ordinary ones.
const IDENTIFIERS: [(&str, &str); 5] =
    [("Heard", "KernelEvent"), ("Obstacle", "StoreError"), ("Held", "LeaseHandle"), ("Lay", "Connector"), ("Wire", "Transport")];

/// The comment that allows banned words in its line, or in the next line if it stands alone: `words: allow (reason)`.
const ALLOW: &str = "words: allow (";

/// Exempt files: this file lists the banned words, the other one the files that still have them.
const EXEMPT: [&str; 2] = ["xtask/src/words.rs", "xtask/pending.toml"];

/// Checks all sources and docs; each file that breaks the rule must be in `xtask/pending.toml`.
pub(crate) fn check() -> anyhow::Result<()> {
    let wanted = |path: &str| {
        let checked = [".rs", ".md", ".toml", ".proto"].iter().any(|end| path.ends_with(end)) || path.starts_with("deploy/");
        checked && !EXEMPT.contains(&path)
    };
    let phrases: Vec<Phrase> = PHRASES.iter().map(|(phrase, advice)| Phrase { words: words(phrase), text: phrase, advice }).collect();
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources(wanted)?.iter().filter(|source| !source.is_generated()) {
        let problems = problems(&source.text, &phrases);
        if !problems.is_empty() {
            let lines = problems.into_iter().map(|(line, problem)| format!("{}:{line}: {problem}", source.path));
            found.insert(source.path.clone(), lines.collect());
        }
    }
    pending::compare("words", &found)
}

struct Phrase {
    words: Vec<String>,
    text: &'static str,
    advice: &'static str,
}

/// The lines of a text that break the rule, with the reasons.
fn problems(text: &str, phrases: &[Phrase]) -> Vec<(usize, String)> {
    let mut problems = Vec::new();
    let mut previous = "";
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        match allowance(line).or_else(|| allowance(previous).filter(|_| is_comment(previous))) {
            Some(true) => {}
            Some(false) => problems.push((number, format!("{ALLOW}…) needs a reason"))),
            None => {
                let line = words(line);
                for phrase in phrases.iter().filter(|phrase| line.windows(phrase.words.len()).any(|window| window == phrase.words)) {
                    problems.push((number, format!("\"{}\": {}", phrase.text, phrase.advice)));
                }
            }
        }
        if allowance(line).is_none() {
            for (name, advice) in IDENTIFIERS.iter().filter(|(name, _)| has_identifier(line, name)) {
                problems.push((number, format!("`{name}`: {advice}")));
            }
        }
        previous = line;
    }
    problems
}

/// Does a line allow banned words, with a reason?
fn allowance(line: &str) -> Option<bool> {
    let (_, rest) = line.split_once(ALLOW)?;
    Some(rest.split_once(')').is_some_and(|(reason, _)| !reason.trim().is_empty()))
}

fn is_comment(line: &str) -> bool {
    ["//", "#", "<!--"].iter().any(|start| line.trim_start().starts_with(start))
}

/// A name of a type in code, such as `Held {`, and not the first word of a sentence.
fn has_identifier(line: &str, name: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let mut rest = code;
    while let Some((before, after)) = rest.split_once(name) {
        let begins = !before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '"');
        let ends = after.starts_with(['<', '>', ',', ')', '{', ':', ';', '(', '&']) || after.starts_with(" {") || after.starts_with(" =");
        if begins && ends && !before.trim_end().ends_with('.') {
            return true;
        }
        rest = after;
    }
    false
}

/// The lower-case words of a text.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut lower) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        if !c.is_alphabetic() || (lower && c.is_uppercase()) {
            words.extend(Some(std::mem::take(&mut word)).filter(|word| !word.is_empty()));
        }
        if c.is_alphabetic() {
            word.extend(c.to_lowercase());
        }
        lower = c.is_lowercase();
    }
    words.extend(Some(word).filter(|word| !word.is_empty()));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, String)> {
        let phrases: Vec<Phrase> = PHRASES.iter().map(|(phrase, advice)| Phrase { words: words(phrase), text: phrase, advice }).collect();
        problems(text, &phrases)
    }

    #[test]
    fn identifiers_are_split_into_words() {
        assert_eq!(words("fn who_waits(KernelHeard: u8) // Anew"), ["fn", "who", "waits", "kernel", "heard", "u", "anew"]);
    }

    #[test]
    fn every_phrase_is_found_in_prose_and_in_identifiers() {
        for (phrase, _) in PHRASES {
            assert!(!found(phrase).is_empty(), "{phrase}");
            let identifier = format!("fn it_{}() {{}}", phrase.replace(' ', "_"));
            assert!(!found(&identifier).is_empty(), "{identifier}");
        }
    }

    #[test]
    fn parts_of_other_words_are_not_found() {
        assert!(found("renewed, overheard, untold, Heardle").is_empty());
    }

    #[test]
    fn allowance_needs_a_reason_and_covers_one_line() {
        assert!(found("// nobody // words: allow (the name of the Unix user)").is_empty());
        assert!(found("# words: allow (the name of the Unix user)\nuser: nobody").is_empty());
        assert_eq!(found("# words: allow (the Unix user)\nuser: nobody\nuser: nobody").len(), 1);
        assert_eq!(found("user: nobody # words: allow ()").len(), 1);
    }

    #[test]
    fn identifiers_count_only_as_types() {
        for line in ["struct Held {", "x: Vec<Heard>,", "Obstacle::Gone", "fn f(lay: Lay)"] {
            assert_eq!(found(line).iter().filter(|(_, text)| text.starts_with('`')).count(), 1, "{line}");
        }
        for line in ["// Wire, in a sentence", "\"Wire\"", "Wireguard {", "MyWire {"] {
            assert!(!found(line).iter().any(|(_, text)| text.starts_with('`')), "{line}");
        }
    }
}
