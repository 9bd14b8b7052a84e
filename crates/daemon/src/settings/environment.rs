//! The daemon's command line in one spelling, completed by `FLANNELD_…` variables of the environment.

use clap::Args;
use clap::error::ErrorKind;

use super::{RunArgs, is_boolean, parse};

/// Returns the daemon's arguments in one spelling, preceded by those that the environment gives, and a warning for each
/// variable whose value cannot be used. Such a variable counts as unset, as in Go flannel: a daemon that started with this
/// environment before still starts.
///
/// # Errors
/// When a word stands where a flag is expected. Go stops reading flags there, silently.
pub fn with_environment(args: Vec<String>, env: impl Fn(&str) -> Option<String>) -> Result<(Vec<String>, Vec<String>), clap::Error> {
    let args = drop_empty_flags(args.iter().map(|arg| go_spelling(arg)).collect());
    refuse_stray_words(&args)?;
    let given =
        |flag: &str| args.iter().any(|arg| arg.strip_prefix("--").is_some_and(|arg| arg == flag || arg.starts_with(&format!("{flag}="))));
    let (mut inherited, mut complaints) = (Vec::new(), Vec::new());
    for flag in flags().get_arguments().filter_map(clap::Arg::get_long).filter(|flag| *flag != "version" && !given(flag)) {
        let variable = variable(flag);
        let Some(value) = env(&variable).filter(|value| !value.is_empty()) else { continue };
        let arg = format!("--{flag}={value}");
        match parse(std::slice::from_ref(&arg)) {
            Ok(_) => inherited.push(arg),
            // The value itself is not repeated: it may be secret.
            Err(_) => complaints.push(format!("{variable} has a value that cannot be used and is ignored; see --help")),
        }
    }
    Ok((inherited.into_iter().chain(args).collect(), complaints))
}

/// Returns a warning for each of these variables that begins with `FLANNELD_` and names no flag, with the nearest one that does.
pub fn unknown_variables(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let known: Vec<String> = flags().get_arguments().filter_map(clap::Arg::get_long).map(variable).collect();
    let mut warnings = Vec::new();
    for name in names.into_iter().filter(|name| name.starts_with("FLANNELD_") && !known.contains(name)) {
        let nearest = known.iter().min_by_key(|other| distance(&name, other)).map_or("", String::as_str);
        warnings.push(format!("{name} is not a setting and is ignored; did you mean {nearest}?"));
    }
    warnings
}

fn flags() -> clap::Command {
    RunArgs::augment_args(clap::Command::new("flanneld"))
}

fn variable(flag: &str) -> String {
    format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"))
}

/// Drops flags that have no default and are given an empty value (`--public-ip=`), as a unit file with an unset variable
/// gives them: for Go such a flag is unset.
fn drop_empty_flags(args: Vec<String>) -> Vec<String> {
    let command = flags();
    let optional = |flag: &str| {
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag));
        arg.is_some_and(|arg| arg.get_default_values().is_empty())
    };
    let mut kept = Vec::new();
    let mut rest = args.into_iter().peekable();
    while let Some(arg) = rest.next() {
        let flag = arg.strip_prefix("--").unwrap_or_default();
        if flag.strip_suffix('=').is_some_and(optional) {
            continue;
        }
        if optional(flag) && rest.next_if(String::is_empty).is_some() {
            continue;
        }
        kept.push(arg);
    }
    kept
}

/// Spells `-name` and `-name=value` as `--name…`; single letters stay.
fn go_spelling(arg: &str) -> String {
    match arg.strip_prefix('-') {
        Some(rest) if !rest.starts_with('-') && rest.split('=').next().is_some_and(|name| name.len() > 1) => format!("--{rest}"),
        Some(rest) if rest.starts_with("v=") => format!("--{rest}"),
        _ => arg.to_owned(),
    }
}

fn refuse_stray_words(args: &[String]) -> Result<(), clap::Error> {
    let command = flags();
    let mut boolean = None;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let Some(name) = arg.strip_prefix('-').map(|name| name.trim_start_matches('-')) else {
            let (after, fix) = match boolean {
                Some(flag) => (format!(" after --{flag}"), format!("write --{flag}={arg}")),
                None => (String::new(), "the daemon takes flags only; a command comes before all flags".to_owned()),
            };
            let text =
                format!("unexpected word {arg:?}{after}: {fix}. Go flannel stops reading flags at such a word and ignores the rest.\n");
            return Err(clap::Error::raw(ErrorKind::UnknownArgument, text));
        };
        let known =
            command.get_arguments().find(|arg| arg.get_long() == Some(name) || arg.get_short().is_some_and(|c| name == c.to_string()));
        boolean = known.filter(|arg| is_boolean(arg)).and(Some(name));
        if known.is_some_and(|arg| !is_boolean(arg)) {
            rest.next();
        }
    }
    Ok(())
}

/// The number of characters to insert, delete or replace to get from one name to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (at, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (column, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_variables_are_reported_with_the_nearest_name() {
        let names = ["FLANNELD_ETCD_ENDPOINT", "FLANNELD_IPMASQ", "FLANNELD_IFACE", "FLANNELD_VERSION", "HOME", "FLANNEL_MTU"];
        let warnings = unknown_variables(names.map(str::to_owned));
        assert_eq!(
            warnings,
            [
                "FLANNELD_ETCD_ENDPOINT is not a setting and is ignored; did you mean FLANNELD_ETCD_ENDPOINTS?",
                "FLANNELD_IPMASQ is not a setting and is ignored; did you mean FLANNELD_IP_MASQ?",
            ]
        );
    }

    #[test]
    fn distance_counts_edits() {
        for (from, to, want) in [("", "", 0), ("a", "", 1), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2)] {
            assert_eq!(distance(from, to), want, "{from} {to}");
        }
    }
}
