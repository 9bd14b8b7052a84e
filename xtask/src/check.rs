//! The checks that need neither root nor other programs.

use std::time::Instant;

use anyhow::bail;

use crate::tools::{cargo_command, run, step};
use crate::{bench, deny, limits, words};

/// A step. Returns the part that could not be checked, if any.
type Step = fn() -> anyhow::Result<Option<String>>;

/// Runs all steps, continues after a failure, and lists the failed steps.
pub(crate) fn check() -> anyhow::Result<()> {
    let steps: [(&str, Step); 8] = [
        ("formatting", || run(cargo_command().args(["fmt", "--all", "--check"])).map(|()| None)),
        ("words", || words::check().map(|()| None)),
        ("lines in a file", || limits::lines().map(|()| None)),
        ("clippy, and lines in a function", || limits::clippy().map(|()| None)),
        ("docs", || docs().map(|()| None)),
        ("dependencies", deny::check),
        ("pure tests and laws", || pure_tests().map(|()| None)),
        ("instruction count", || bench::instructions().map(|()| None)),
    ];
    let (mut table, mut failed) = (Vec::new(), Vec::new());
    for (name, check) in steps {
        println!("check: {name}");
        let start = Instant::now();
        let outcome = check();
        let result = match &outcome {
            Ok(None) => "ok".to_owned(),
            Ok(Some(missing)) => format!("ok, but {missing}"),
            Err(error) => {
                eprintln!("{error:#}");
                failed.push(name);
                "FAILED".to_owned()
            }
        };
        table.push(format!("  {:>5.1} s  {name}: {result}", start.elapsed().as_secs_f64()));
    }
    println!("check:\n{}", table.join("\n"));
    if !failed.is_empty() {
        bail!("check failed: {}", failed.join("; "));
    }
    Ok(())
}

fn docs() -> anyhow::Result<()> {
    let mut command = cargo_command();
    command.args(["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings");
    step("cargo doc", &mut command)
}

/// Runs the unit tests of all packages, the laws of the package `flannel`, and the comparison of generated code with its
/// definition.
fn pure_tests() -> anyhow::Result<()> {
    let cargo = |name: &str, args: &[&str]| step(name, cargo_command().args(["test", "--quiet"]).args(args));
    cargo("unit tests", &["--workspace", "--lib", "--bins"])?;
    cargo("laws, and generated code", &["-p", "flannel", "-p", "xtask", "--test", "laws", "--test", "generated"])
}
