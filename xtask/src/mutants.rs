//! Mutation testing with cargo-mutants: it changes the code, one place at a time, and a change that no test notices is a
//! missing test.

use std::process::Command;

use crate::tools::{cargo_program, run};

const VERSION: &str = "27.1.0";

/// Runs cargo-mutants over a package, `flannel` unless one is named. What follows goes to cargo-mutants.
pub(crate) fn mutants(args: &[String]) -> anyhow::Result<()> {
    let (package, rest) = match args.split_first() {
        Some((first, rest)) if !first.starts_with('-') => (first.as_str(), rest),
        _ => ("flannel", args),
    };
    let program = cargo_program("cargo-mutants", VERSION)?;
    // Called as cargo would call it. The results are in target/mutants.out.
    let mut command = Command::new(program);
    run(command.args(["mutants", "--package", package, "--output", "target", "--no-shuffle"]).args(rest))
}
