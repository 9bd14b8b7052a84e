//! Runs all tests, or the tests whose names contain a text.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::programs::Need;
use crate::tools::{cargo, cargo_command, output, run, without_package};
use crate::{check, cni_suite, vm};

/// Runs all tests, or those that the arguments select: options of `cargo test` that select packages and targets, a text in the
/// tests' names, and after `--` options for the test programs.
pub(crate) fn test(args: &[String]) -> anyhow::Result<()> {
    match args.split_first() {
        None => everything(),
        Some((first, suites)) if first == "cni-suite" => cni_suite::run(suites),
        Some(_) => some(&Selection::parse(args)?),
    }
}

fn everything() -> anyhow::Result<()> {
    Need::Debian.provide()?;
    check::check()?;
    let mut env = Vec::new();
    for need in Need::ALL {
        env.extend(need.provide()?);
    }
    let mut command: Vec<(&str, &std::ffi::OsStr)> = env.iter().map(|(name, value)| (*name, value.as_os_str())).collect();
    command.push(("RUST_BACKTRACE", "0".as_ref()));
    // Continues after a failed program, so that one long run reports all failures.
    let tested = cargo(&["test", "--workspace", "--no-fail-fast"], &command);
    let outcomes = [tested, vm::run(&[]), cni_suite::run(&[])];
    let failed: Vec<String> = outcomes.into_iter().filter_map(|outcome| Some(format!("{:#}", outcome.err()?))).collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// The tests to run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Options of `cargo test` that select packages and targets.
    pub(crate) cargo: Vec<String>,
    /// A text that the tests' names contain.
    pub(crate) filter: Option<String>,
    /// Options for the test programs.
    pub(crate) harness: Vec<String>,
}

impl Selection {
    pub(crate) fn parse(args: &[String]) -> anyhow::Result<Selection> {
        let mut selection = Selection::default();
        let mut args = args.iter().cloned();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--" => selection.harness.extend(args.by_ref()),
                "-p" | "--package" | "--test" | "--bin" | "--exclude" => {
                    let value = args.next().with_context(|| format!("{arg} needs a name"))?;
                    selection.cargo.extend([arg, value]);
                }
                _ if arg.starts_with('-') => selection.cargo.push(arg),
                _ => {
                    if let Some(first) = selection.filter.replace(arg.clone()) {
                        bail!("{first:?} and {arg:?}: there can be only one FILTER");
                    }
                }
            }
        }
        if !selection.cargo.iter().any(|arg| arg == "-p" || arg.starts_with("--package") || arg == "--workspace") {
            selection.cargo.push("--workspace".to_owned());
        }
        Ok(selection)
    }
}

/// What cargo built for a selection.
pub(crate) struct Built {
    /// The test programs that have selected tests.
    pub(crate) tests: Vec<Program>,
    /// The programs that these tests start.
    pub(crate) programs: Vec<PathBuf>,
}

/// A test program and its selected tests.
pub(crate) struct Program {
    pub(crate) package: String,
    pub(crate) target: String,
    /// The package's directory, in which cargo would start the program.
    pub(crate) folder: PathBuf,
    pub(crate) file: PathBuf,
    pub(crate) tests: Vec<String>,
}

impl Program {
    /// The requirements of some tests. A test names them in its kind (`[kubernetes image] name`), in addition to the Debian
    /// packages. A test without a kind has the requirements of its program.
    pub(crate) fn needs<'a>(&self, tests: impl IntoIterator<Item = &'a String>) -> anyhow::Result<BTreeSet<Need>> {
        let whole: &[Need] = match (self.package.as_str(), self.target.as_str()) {
            ("flannel" | "xtask", _) | (_, "lib" | "bin") | ("daemon", "simulation" | "embedded_limits" | "embedded_config") => &[],
            ("kernel", "netns") | ("cni", "plugins" | "traffic" | "faults" | "robustness") => &[Need::Debian],
            ("cni", "reference" | "differential") => &[Need::Debian, Need::ReferencePlugins],
            ("cni", "runtimes") => &[Need::Debian, Need::Libcni],
            ("flanneld", "lab" | "store_contract") | ("daemon", "etcd_obstacles") => &[Need::Debian, Need::Etcd],
            // An unlisted test program gets all requirements.
            _ => &Need::ALL,
        };
        let mut needs = BTreeSet::new();
        for test in tests {
            match test.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                None => needs.extend(whole),
                Some((kind, _)) => {
                    needs.insert(Need::Debian);
                    for word in kind.split_whitespace() {
                        needs.insert(Need::named(word).with_context(|| format!("{}: unknown kind of test {test:?}", self.target))?);
                    }
                }
            }
        }
        Ok(needs)
    }
}

fn some(selection: &Selection) -> anyhow::Result<()> {
    let built = selection.build()?;
    let mut needs = BTreeSet::new();
    for program in &built.tests {
        needs.extend(program.needs(&program.tests)?);
    }
    let mut env: BTreeMap<&str, OsString> = BTreeMap::from([("RUST_BACKTRACE", "0".into())]);
    for need in needs {
        env.extend(need.provide()?);
    }
    let mut failed = Vec::new();
    for program in &built.tests {
        println!("{} {}: {} tests", program.package, program.target, program.tests.len());
        let mut command = Command::new(&program.file);
        command.args(&selection.filter).args(&selection.harness).current_dir(&program.folder);
        without_package(&mut command);
        command.env("CARGO_MANIFEST_DIR", &program.folder).envs(&env);
        if let Err(error) = run(&mut command) {
            failed.push(format!("{error:#}"));
        }
    }
    // They were ignored above.
    if let Err(error) = vm::run_marked(&built, selection) {
        failed.push(format!("{error:#}"));
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

impl Selection {
    /// Builds the selected test programs, and lists those of their tests that the filter selects.
    pub(crate) fn build(&self) -> anyhow::Result<Built> {
        let mut built = build(&self.cargo)?;
        for program in &mut built.tests {
            program.tests = list(program, self)?;
        }
        built.tests.retain(|program| !program.tests.is_empty());
        ensure!(!built.tests.is_empty(), "no test has {:?} in its name", self.filter.as_deref().unwrap_or_default());
        Ok(built)
    }
}

fn build(cargo: &[String]) -> anyhow::Result<Built> {
    let mut command = cargo_command();
    command.args(["test", "--no-run", "--message-format=json-render-diagnostics"]).args(cargo);
    let output = output(&mut command)?;
    ensure!(output.status.success(), "cannot build the tests");
    let mut built = Built { tests: Vec::new(), programs: Vec::new() };
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line).context("cargo printed no JSON")?;
        let Some(file) = message["executable"].as_str() else { continue };
        if message["profile"]["test"] != true {
            built.programs.push(file.into());
            continue;
        }
        let manifest = Path::new(message["manifest_path"].as_str().context("a target has a manifest")?);
        let folder = manifest.parent().context("a manifest has a folder")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let kind = text(&message["target"]["kind"][0]);
        built.tests.push(Program {
            package: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            target: if kind == "test" { text(&message["target"]["name"]) } else { kind },
            folder: folder.to_owned(),
            file: file.into(),
            tests: Vec::new(),
        });
    }
    built.tests.sort_by(|a, b| (&a.package, &a.target).cmp(&(&b.package, &b.target)));
    Ok(built)
}

/// Lists the selected tests of a program.
fn list(program: &Program, selection: &Selection) -> anyhow::Result<Vec<String>> {
    let mut command = Command::new(&program.file);
    let exact = selection.harness.iter().filter(|arg| *arg == "--exact" || *arg == "--ignored" || *arg == "--include-ignored");
    let output = output(command.args(&selection.filter).args(exact).arg("--list").current_dir(&program.folder))?;
    ensure!(output.status.success(), "{} --list ended with {}", program.file.display(), output.status);
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(ToOwned::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(args: &[&str]) -> Selection {
        Selection::parse(&args.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    fn program(package: &str, target: &str, tests: &[&str]) -> Program {
        let tests = tests.iter().map(ToString::to_string).collect();
        Program { package: package.to_owned(), target: target.to_owned(), folder: PathBuf::new(), file: PathBuf::new(), tests }
    }

    fn needs_of(program: &Program) -> anyhow::Result<BTreeSet<Need>> {
        program.needs(&program.tests)
    }

    #[test]
    fn arguments_are_split_into_cargo_filter_and_harness() {
        let parsed = selection(&["-p", "kernel", "--test", "netns", "route", "--", "--nocapture"]);
        assert_eq!(parsed.cargo, ["-p", "kernel", "--test", "netns"]);
        assert_eq!((parsed.filter.as_deref(), parsed.harness), (Some("route"), vec!["--nocapture".to_owned()]));
        assert_eq!(selection(&["route"]).cargo, ["--workspace"]);
    }

    #[test]
    fn only_the_needs_of_selected_tests_count() {
        let needs = |package: &str, target: &str, tests: &[&str]| needs_of(&program(package, target, tests)).unwrap();
        assert_eq!(needs("flannel", "laws", &["a"]), BTreeSet::new());
        assert_eq!(needs("cni", "reference", &["a"]), BTreeSet::from([Need::Debian, Need::ReferencePlugins]));
        assert_eq!(
            needs("flanneld", "kube", &["[helm] a", "[image kubernetes] b"]),
            BTreeSet::from([Need::Debian, Need::Helm, Need::Image, Need::Kubernetes])
        );
        assert_eq!(needs("flanneld", "lab", &["[vm] a"]), BTreeSet::from([Need::Debian, Need::Vm]));
        assert_eq!(needs("flanneld", "kube", &["[helm] a", "b"]), BTreeSet::from(Need::ALL));
        assert_eq!(needs("flanneld", "unknown", &["a"]), BTreeSet::from(Need::ALL));
    }

    #[test]
    fn unknown_kind_is_refused() {
        assert!(needs_of(&program("flanneld", "kube", &["[hlem] a"])).is_err());
    }
}
