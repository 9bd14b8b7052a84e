//! Benchmarks: the tables of docs/performance.md, and the instruction count that `check` limits.

use anyhow::{Context, ensure};

use crate::tools::{Step, cargo, cargo_command, host};
use crate::{dist, programs};

/// The limit of the pure core's instructions per lease, from the stored text to the comparison with a kernel that is up to date.
/// The count was 21,950 when the limit was set. It does not depend on the machine's load, so it shows regressions.
const MAX_INSTRUCTIONS: u64 = 23_100;

/// Counts the instructions of the pure core. Fails above [`MAX_INSTRUCTIONS`] per lease.
pub(crate) fn instructions() -> anyhow::Result<()> {
    let (valgrind, tools) = programs::valgrind()?;
    let host = host()?;
    let runner = format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_"));
    let count = |leases: u64| -> anyhow::Result<u64> {
        let mut command = cargo_command();
        command.args([
            "bench",
            "--quiet",
            "--profile",
            "dist",
            "--target",
            &host,
            "--target-dir",
            dist::TARGET,
            "-p",
            "flannel",
            "--bench",
            "core",
            "--",
        ]);
        command.arg(leases.to_string());
        command.env(&runner, format!("{} --tool=cachegrind --cache-sim=no --cachegrind-out-file=/dev/null", valgrind.display()));
        if let Some(folder) = &tools {
            command.env("VALGRIND_LIB", folder);
        }
        let output = command.output().context("cannot start cargo bench")?;
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find_map(|line| line.split_once("refs:")).map(|(_, number)| number.trim().replace(',', ""));
        line.and_then(|number| number.parse().ok()).with_context(|| format!("valgrind reported no instruction count: {text}"))
    };
    let _step = Step::begin("counting the instructions of the pure core");
    let (few, many) = (2_000, 20_000);
    let each = (count(many)? - count(few)?) / (many - few);
    println!("  {each} instructions for each lease");
    ensure!(
        each <= MAX_INSTRUCTIONS,
        "the pure core needs {each} instructions for each lease, more than {MAX_INSTRUCTIONS}: see crates/flannel/benches/core.rs"
    );
    Ok(())
}

/// Runs the benchmarks and prints tables. Writes docs/bench/ unless `quick` is given.
pub(crate) fn bench(args: &[String]) -> anyhow::Result<()> {
    let plugin = dist::dist()?.join("flannel-cni");
    let kubernetes = programs::kubernetes()?;
    let host = host()?;
    let profile = ["bench", "--quiet", "--profile", "dist", "--target", host.as_str(), "--target-dir", dist::TARGET, "-p"];
    let mut command = [&profile[..], &["flanneld", "--bench", "bench", "--"]].concat();
    command.extend(args.iter().map(String::as_str));
    let out = std::env::current_dir()?.join("docs/bench");
    let out = ("FLANNEL_BENCH_OUT", out.as_os_str());
    let env = [("FLANNEL_CNI", plugin.as_os_str()), ("FLANNEL_KUBERNETES", kubernetes.as_os_str()), out];
    // A quick run does not update the published figures.
    let quick = args.iter().any(|arg| arg == "quick");
    cargo(&command, &env[..if quick { 2 } else { 3 }])?;
    if args.iter().any(|arg| arg == "pods") {
        return Ok(());
    }
    cargo(&[&profile[..], &["flannel", "--bench", "core", "--", "10000", "100000"]].concat(), &[])
}
