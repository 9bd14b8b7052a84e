//! Runs the reference plugins' own test suites with our program in place of the plugins. Each spec that passes with the
//! reference must pass with ours, except the departures that a file lists with their reasons.

mod departures;
mod guest;
mod report;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::programs::Need;
use crate::tools::{cargo_command, output};
use departures::Departures;
pub(crate) use guest::GuestSuite;
use report::{Comparison, Specs};
use source::Built;

/// The Go package that replaces the plugins' functions.
const SHIM: &str = include_str!("../../tests/cni-suite/shim/shim.go");
const ISOLATE: &str = "tests/cni-suite/isolate.sh";
const DEPARTURES: &str = "tests/cni-suite/departures.txt";
/// The number of suites that run in parallel. They mostly wait.
const PARALLEL: usize = 2;
/// The time limit of a suite, in seconds.
const TIME_LIMIT: &str = "600";

/// A test suite of the reference.
struct Suite {
    /// Its name in the results and in the list of departures.
    name: &'static str,
    /// Its directory in the module.
    package: &'static str,
    /// A variable that configures the shim.
    env: Option<(&'static str, &'static str)>,
    /// The name prefixes of specs that start plugins as processes. Other specs call a plugin's function.
    process_specs: &'static [&'static str],
    /// The minimum number of specs that pass with the reference. Fewer mean that the suite did not run properly.
    min_passed: usize,
}

/// All suites. The longest come first, so that two parallel runs end at about the same time.
const SUITES: [Suite; 10] = [
    Suite { name: "integration", package: "integration", env: None, process_specs: &[""], min_passed: 3 },
    Suite { name: "bridge", package: "plugins/main/bridge", env: None, process_specs: &[], min_passed: 200 },
    Suite { name: "bandwidth", package: "plugins/meta/bandwidth", env: None, process_specs: &[], min_passed: 30 },
    Suite { name: "portmap", package: "plugins/meta/portmap", env: None, process_specs: &["portmap integration tests"], min_passed: 50 },
    Suite {
        name: "portmap with iptables",
        package: "plugins/meta/portmap",
        env: Some(("SUITE_PORTMAP_BACKEND", "iptables")),
        process_specs: &["portmap integration tests"],
        min_passed: 50,
    },
    Suite { name: "tuning", package: "plugins/meta/tuning", env: None, process_specs: &[], min_passed: 50 },
    Suite { name: "firewall", package: "plugins/meta/firewall", env: None, process_specs: &[], min_passed: 30 },
    Suite { name: "host-local", package: "plugins/ipam/host-local", env: None, process_specs: &[], min_passed: 50 },
    Suite { name: "loopback", package: "plugins/main/loopback", env: None, process_specs: &[""], min_passed: 5 },
    Suite { name: "flannel", package: "plugins/meta/flannel", env: None, process_specs: &[], min_passed: 10 },
];

impl Suite {
    /// The file name of its test program.
    fn program(&self) -> String {
        format!("{}.test", self.package.rsplit('/').next().unwrap_or_default())
    }
}

/// Runs the suites with these names, or all.
pub(crate) fn run(names: &[String]) -> anyhow::Result<()> {
    let chosen: Vec<&Suite> = SUITES.iter().filter(|suite| names.is_empty() || names.iter().any(|name| name == suite.name)).collect();
    let unknown = names.iter().find(|name| SUITES.iter().all(|suite| suite.name != **name));
    if let Some(name) = unknown {
        bail!("unknown suite {name:?}; known: {}", SUITES.map(|suite| suite.name).join(", "));
    }
    Need::Debian.provide()?;
    let departures = Departures::read(Path::new(DEPARTURES), &SUITES.map(|suite| suite.name))?;
    let built = source::suites()?;
    let out = std::env::current_dir()?.join("target/cni-suite");
    let ours = our_programs(&built, &out)?;
    // The reference's results depend on its sources and on the kernel.
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel release")?;
    let reference = built.reference.join(kernel.trim());
    std::fs::create_dir_all(&reference)?;
    let mut jobs = Vec::new();
    for suite in &chosen {
        if !reference.join(format!("{}.json", suite.name)).is_file() {
            jobs.push(Job { suite, built: &built, programs: &built.programs, out: &reference, is_ours: false });
        }
        jobs.push(Job { suite, built: &built, programs: &ours, out: &out, is_ours: true });
    }
    run_all(&jobs)?;
    compare(&chosen, &reference, &out, &departures)
}

/// Creates a directory with our program under the names of its plugins, and the reference's other plugins.
fn our_programs(built: &Built, out: &Path) -> anyhow::Result<PathBuf> {
    let mut command = cargo_command();
    command.args(["build", "-p", "cni", "--bin", "flannel-cni", "--message-format=json-render-diagnostics"]);
    let answer = output(&mut command)?;
    ensure!(answer.status.success(), "cannot build flannel-cni");
    let text = String::from_utf8(answer.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut files = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    let program = files.find(|file| file.ends_with("flannel-cni")).context("cargo built no flannel-cni")?;
    let folder = out.join("programs");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let ours = ["flannel", "bridge", "host-local", "loopback", "portmap", "bandwidth", "firewall", "tuning"];
    for name in ours {
        std::os::unix::fs::symlink(&program, folder.join(name))?;
    }
    for other in std::fs::read_dir(&built.programs)? {
        let other = other?;
        if !ours.iter().any(|name| other.file_name() == *name) {
            std::os::unix::fs::symlink(other.path(), folder.join(other.file_name()))?;
        }
    }
    Ok(folder)
}

/// One run of a suite, with ours or with the reference.
struct Job<'a> {
    suite: &'a Suite,
    built: &'a Built,
    programs: &'a Path,
    /// The directory for its report and its log.
    out: &'a Path,
    is_ours: bool,
}

impl Job<'_> {
    /// The command that runs the suite and writes its report and the list of calls.
    fn command(&self, report: &Path, calls: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount"]).arg(std::env::current_dir()?.join(ISOLATE)).args(["timeout", "-k", "10", TIME_LIMIT]);
        command.arg(self.built.tests.join(self.suite.program())).args(["-ginkgo.seed=1", "-ginkgo.v", "-ginkgo.no-color"]);
        command.arg(format!("-ginkgo.json-report={}", report.display()));
        if !self.is_ours {
            // A spec that passes in one of three attempts can pass on this machine.
            command.arg("-ginkgo.flake-attempts=3");
        }
        let path = std::env::join_paths(
            std::iter::once(self.programs.to_owned())
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).chain(["/usr/sbin".into(), "/sbin".into()])),
        )?;
        command.env("PATH", path).env("SUITE_PROGRAMS", self.programs).env("SUITE_CALLS", calls).envs(self.suite.env);
        if self.is_ours {
            command.env("SUITE_OURS", "1");
        }
        command.current_dir(self.built.module.join(self.suite.package));
        Ok(command)
    }

    fn run(&self) -> anyhow::Result<()> {
        let name = self.suite.name;
        let file = |kind: &str| self.out.join(format!("{name}.{kind}"));
        let (report, calls) = (file("unfinished"), file("calls"));
        let _ = std::fs::remove_file(&calls);
        let _ = std::fs::remove_file(&report);
        let log = std::fs::File::create(file("log"))?;
        let mut command = self.command(&report, &calls)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let start = Instant::now();
        let status = command.status().context("cannot start unshare")?;
        let text = std::fs::read_to_string(&report);
        let text = text.with_context(|| format!("{name} ended with {status} and no report: see {}", file("log").display()))?;
        let specs = Specs::parse(&text).with_context(|| format!("{name}: {}", report.display()))?;
        std::fs::rename(&report, file("json"))?;
        let who = if self.is_ours { "ours" } else { "the reference" };
        println!("  {name} with {who}: {} of {} specs pass, {:.0} s", specs.passed(), specs.len(), start.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Runs all jobs, a few in parallel. Continues after an error.
fn run_all(jobs: &[Job<'_>]) -> anyhow::Result<()> {
    let (next, failed) = (Mutex::new(jobs.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some(job) = { next.lock().expect("no thread panics").next() } {
                    if let Err(error) = job.run() {
                        failed.lock().expect("no thread panics").push(format!("{error:#}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no thread panics");
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// Compares the reports, prints a table, and fails on differences that are not listed as departures.
fn compare(suites: &[&Suite], reference: &Path, out: &Path, departures: &Departures) -> anyhow::Result<()> {
    let read = |folder: &Path, suite: &Suite| read(&folder.join(format!("{}.json", suite.name)));
    let filters_vlans = has_vlan_filtering();
    let (mut rows, mut problems, mut impossible) = (Vec::new(), Vec::new(), BTreeMap::new());
    for suite in suites {
        let calls = std::fs::read_to_string(out.join(format!("{}.calls", suite.name))).unwrap_or_default();
        let comparison = Comparison::new(suite, &read(reference, suite)?, &read(out, suite)?, &calls, departures);
        if comparison.reference < suite.min_passed {
            let text = "specs pass with the reference, fewer than";
            problems.push(format!("{}: {} {text} {}: see {}", suite.name, comparison.reference, suite.min_passed, reference.display()));
        }
        for spec in &comparison.impossible {
            let why = match &spec.name {
                name if name.to_lowercase().contains("vlan") && !filters_vlans => {
                    "the kernel has no VLAN filtering of bridges; `cargo xtask vm` runs them".to_owned()
                }
                _ => format!("the reference fails: {}", spec.message),
            };
            impossible.entry(why).or_insert_with(Vec::new).push(format!("{}: {}", suite.name, spec.name));
        }
        problems.extend(comparison.problems(suite.name));
        rows.push(comparison.row(suite.name));
    }
    println!("{}", report::table(&rows));
    for (why, specs) in &impossible {
        println!("{} specs cannot run here: {why}", specs.len());
        // The VLAN specs are many, and have one reason.
        if !why.starts_with("the kernel") {
            specs.iter().for_each(|spec| println!("  {spec}"));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("the reference plugins' suites: {} problems (logs: {})\n{}", problems.len(), out.display(), problems.join("\n"))
}

/// Reads a report.
fn read(file: &Path) -> anyhow::Result<Specs> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Specs::parse(&text).with_context(|| file.display().to_string())
}

/// Do bridges of this kernel support VLAN filtering? Tries it in a new network namespace.
fn has_vlan_filtering() -> bool {
    let mut command = Command::new("unshare");
    command.args(["--net", "ip", "link", "add", "br0", "type", "bridge", "vlan_filtering", "1"]);
    command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
