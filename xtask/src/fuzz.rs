//! Tests with random input: fuzz targets and simulated clusters.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use crate::tools::{cargo, cargo_command, host, run, step};

/// Runs COUNT simulated clusters, with seeds from FROM on.
pub(crate) fn simulate(args: &[String]) -> anyhow::Result<()> {
    let number = |at: usize, default: &str| args.get(at).map_or(default, String::as_str).to_owned();
    let (count, from) = (number(0, "10000"), number(1, "0"));
    let command = ["test", "--quiet", "--profile", "simulation", "-p", "daemon", "--test", "simulation"];
    cargo(&command, &[("FLANNEL_SEEDS", count.as_ref()), ("FLANNEL_SEEDS_FROM", from.as_ref())])
}

/// Runs each fuzz target for the given number of seconds.
pub(crate) fn fuzz(args: &[String]) -> anyhow::Result<()> {
    let seconds: u32 = args.first().map_or(Ok(30), |text| text.parse().with_context(|| format!("{text:?} is not a number of seconds")))?;
    let host = host()?;
    // The flags with which cargo-fuzz enables libFuzzer's instrumentation, so that cargo-fuzz need not be installed.
    let flags = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                 -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";
    let mut build = cargo_command();
    build.args(["+nightly", "build", "--release", "--quiet", "--manifest-path", "fuzz/Cargo.toml", "--target", &host]);
    step("building the fuzz targets with the nightly compiler", build.env("RUSTFLAGS", flags))?;
    let programs = Path::new("fuzz/target").join(host).join("release");
    for file in std::fs::read_dir("fuzz/fuzz_targets").context("cannot list fuzz/fuzz_targets")? {
        let name = file?.path().file_stem().and_then(OsStr::to_str).context("a fuzz target has a name")?.to_owned();
        let corpus = Path::new("fuzz/corpus").join(&name);
        std::fs::create_dir_all(&corpus)?;
        println!("fuzz {name} for {seconds} s");
        run(Command::new(programs.join(&name)).arg(&corpus).args([
            format!("-max_total_time={seconds}"),
            "-max_len=4096".to_owned(),
            "-verbosity=0".to_owned(),
            "-print_final_stats=1".to_owned(),
        ]))?;
    }
    Ok(())
}
