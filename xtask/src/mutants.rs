//! Mutation testing with cargo-mutants, which changes the code one place at a time. If no test fails, a test is missing.

use std::process::Command;

use crate::tools::{cargo_program, run};

const VERSION: &str = "27.1.0";

/// Runs cargo-mutants over a package, by default `flannel`. Passes further arguments to cargo-mutants.
pub(crate) fn mutants(args: &[String]) -> anyhow::Result<()> {
    let (package, rest) = match args.split_first() {
        Some((first, rest)) if !first.starts_with('-') => (first.as_str(), rest),
        _ => ("flannel", args),
    };
    let program = cargo_program("cargo-mutants", VERSION)?;
    // With the arguments that `cargo mutants` would pass. The results are in target/mutants.out.
    let mut command = Command::new(program);
    run(command.args(["mutants", "--package", package, "--output", "target", "--no-shuffle"]).args(rest))
}
