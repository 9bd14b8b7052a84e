//! The reference plugins' own test suites, run with our program in place of the plugins: spec by spec, what passes with the
//! reference must pass with ours, except the departures that a file lists with their reasons.

mod departures;
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
use report::{Comparison, Specs};
use source::Built;

/// The Go package that replaces the plugins' functions.
const SHIM: &str = include_str!("../../tests/cni-suite/shim/shim.go");
const ISOLATE: &str = "tests/cni-suite/isolate.sh";
const DEPARTURES: &str = "tests/cni-suite/departures.txt";
/// Suites that run at once: they wait as much as they compute.
const AT_ONCE: usize = 2;
/// Seconds that a suite may take.
const LIMIT: &str = "600";

/// A suite of the reference, and how it is run.
struct Suite {
    /// What the results and the list of departures call it.
    name: &'static str,
    /// Its folder in the module.
    package: &'static str,
    /// A variable of the shim.
    env: Option<(&'static str, &'static str)>,
    /// Specs that start programs by themselves, by the start of their names, beside those that call a plugin's function.
    starts: &'static [&'static str],
    /// Specs that pass with the reference at least: fewer show that the suite did not run as it should.
    least: usize,
}

/// All suites. The longest come first, because two run at once.
const SUITES: [Suite; 10] = [
    Suite { name: "integration", package: "integration", env: None, starts: &[""], least: 3 },
    Suite { name: "bridge", package: "plugins/main/bridge", env: None, starts: &[], least: 200 },
    Suite { name: "bandwidth", package: "plugins/meta/bandwidth", env: None, starts: &[], least: 30 },
    Suite { name: "portmap", package: "plugins/meta/portmap", env: None, starts: &["portmap integration tests"], least: 50 },
    Suite {
        name: "portmap with iptables",
        package: "plugins/meta/portmap",
        env: Some(("SUITE_PORTMAP_BACKEND", "iptables")),
        starts: &["portmap integration tests"],
        least: 50,
    },
    Suite { name: "tuning", package: "plugins/meta/tuning", env: None, starts: &[], least: 50 },
    Suite { name: "firewall", package: "plugins/meta/firewall", env: None, starts: &[], least: 30 },
    Suite { name: "host-local", package: "plugins/ipam/host-local", env: None, starts: &[], least: 50 },
    Suite { name: "loopback", package: "plugins/main/loopback", env: None, starts: &[""], least: 5 },
    Suite { name: "flannel", package: "plugins/meta/flannel", env: None, starts: &[], least: 10 },
];

impl Suite {
    /// The name of its program.
    fn program(&self) -> String {
        format!("{}.test", self.package.rsplit('/').next().unwrap_or_default())
    }
}

/// Runs the suites, or those with these names.
pub(crate) fn run(names: &[String]) -> anyhow::Result<()> {
    let chosen: Vec<&Suite> = SUITES.iter().filter(|suite| names.is_empty() || names.iter().any(|name| name == suite.name)).collect();
    let unknown = names.iter().find(|name| SUITES.iter().all(|suite| suite.name != **name));
    if let Some(name) = unknown {
        bail!("there is no suite {name:?}: {}", SUITES.map(|suite| suite.name).join(", "));
    }
    Need::Debian.provide()?;
    let departures = Departures::read(Path::new(DEPARTURES), &SUITES.map(|suite| suite.name))?;
    let built = source::suites()?;
    let out = std::env::current_dir()?.join("target/cni-suite");
    let ours = our_programs(&built, &out)?;
    // What the reference does depends on the kernel beside its own sources.
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's version")?;
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

/// A folder with our program under the names of its plugins, beside the reference's others.
fn our_programs(built: &Built, out: &Path) -> anyhow::Result<PathBuf> {
    let mut command = cargo_command();
    command.args(["build", "-p", "cni", "--bin", "flannel-cni", "--message-format=json-render-diagnostics"]);
    let answer = output(&mut command)?;
    ensure!(answer.status.success(), "flannel-cni cannot be built");
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

/// One run of a suite.
struct Job<'a> {
    suite: &'a Suite,
    built: &'a Built,
    programs: &'a Path,
    /// Where its report and its log go.
    out: &'a Path,
    is_ours: bool,
}

impl Job<'_> {
    fn run(&self) -> anyhow::Result<()> {
        let Suite { name, package, env, .. } = self.suite;
        let file = |kind: &str| self.out.join(format!("{name}.{kind}"));
        let (report, calls) = (file("unfinished"), file("calls"));
        let _ = std::fs::remove_file(&calls);
        let _ = std::fs::remove_file(&report);
        let log = std::fs::File::create(file("log"))?;
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount"]).arg(std::env::current_dir()?.join(ISOLATE)).args(["timeout", "-k", "10", LIMIT]);
        command.arg(self.built.tests.join(self.suite.program())).args(["-ginkgo.seed=1", "-ginkgo.v", "-ginkgo.no-color"]);
        command.arg(format!("-ginkgo.json-report={}", report.display()));
        if !self.is_ours {
            // The question is whether a spec can pass here.
            command.arg("-ginkgo.flake-attempts=3");
        }
        let path = std::env::join_paths(
            std::iter::once(self.programs.to_owned())
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).chain(["/usr/sbin".into(), "/sbin".into()])),
        )?;
        command.env("PATH", path).env("SUITE_PROGRAMS", self.programs).env("SUITE_CALLS", &calls).envs(*env);
        if self.is_ours {
            command.env("SUITE_OURS", "1");
        }
        command.current_dir(self.built.module.join(package)).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
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

/// Runs the jobs, a few at once. All run, also after one has failed.
fn run_all(jobs: &[Job<'_>]) -> anyhow::Result<()> {
    let (next, failed) = (Mutex::new(jobs.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
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

/// Compares the reports, prints a table, and fails on what is not as listed.
fn compare(suites: &[&Suite], reference: &Path, out: &Path, departures: &Departures) -> anyhow::Result<()> {
    let read = |folder: &Path, suite: &Suite| -> anyhow::Result<Specs> {
        let file = folder.join(format!("{}.json", suite.name));
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Specs::parse(&text).with_context(|| file.display().to_string())
    };
    let filters_vlans = has_vlan_filtering();
    let (mut rows, mut problems, mut impossible) = (Vec::new(), Vec::new(), BTreeMap::new());
    for suite in suites {
        let calls = std::fs::read_to_string(out.join(format!("{}.calls", suite.name))).unwrap_or_default();
        let comparison = Comparison::new(suite, &read(reference, suite)?, &read(out, suite)?, &calls, departures);
        if comparison.reference < suite.least {
            let text = "specs pass with the reference, fewer than";
            problems.push(format!("{}: {} {text} {}: see {}", suite.name, comparison.reference, suite.least, reference.display()));
        }
        for spec in &comparison.impossible {
            let why = match &spec.name {
                name if name.to_lowercase().contains("vlan") && !filters_vlans => "the kernel has no VLAN filtering of bridges".to_owned(),
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
        // VLANs are many, and all the same.
        if !why.starts_with("the kernel") {
            specs.iter().for_each(|spec| println!("  {spec}"));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("the reference plugins' suites: {} problems (logs: {})\n{}", problems.len(), out.display(), problems.join("\n"))
}

/// Can this kernel's bridges filter VLANs? Tried in a namespace of its own.
fn has_vlan_filtering() -> bool {
    let mut command = Command::new("unshare");
    command.args(["--net", "ip", "link", "add", "br0", "type", "bridge", "vlan_filtering", "1"]);
    command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
