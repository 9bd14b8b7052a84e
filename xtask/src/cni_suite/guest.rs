//! Specs that a kernel without VLAN filtering of bridges cannot run: they run in the VM, with the reference and with ours.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::departures::Departures;
use super::report::{self, Comparison, Specs};
use super::source::{self, Built};
use super::{DEPARTURES, Job, SUITES, Suite, our_programs, read};
use crate::vm;

/// The suite with these specs.
const SUITE: &str = "bridge";
/// What their names have, as ginkgo takes it.
const FOCUS: &str = "(?i)vlan";
/// The minimum number of them that pass with the reference.
const MIN_PASSED: usize = 90;

/// The runs of the suite in the VM.
pub(crate) struct GuestSuite {
    suite: &'static Suite,
    built: Built,
    ours: PathBuf,
    /// The directory of the reference's results on the VM's kernel.
    reference: PathBuf,
    /// The directory of our results.
    out: PathBuf,
}

impl GuestSuite {
    /// Builds the suite and our programs. `release` names the VM's kernel.
    pub(crate) fn new(release: &str) -> anyhow::Result<GuestSuite> {
        let suite = SUITES.iter().find(|suite| suite.name == SUITE).context("the suite is listed")?;
        let built = source::suites()?;
        let out = std::env::current_dir()?.join("target/cni-suite-vm");
        let ours = our_programs(&built, &out)?;
        let reference = built.reference.join(release);
        std::fs::create_dir_all(&reference)?;
        Ok(GuestSuite { suite, built, ours, reference, out })
    }

    /// The commands to run in the guest, which write their results into `results`. The reference's are kept: they depend on its
    /// sources and on the kernel.
    pub(crate) fn jobs(&self, results: &Path) -> anyhow::Result<Vec<vm::Job>> {
        let mut jobs = Vec::new();
        for is_ours in [false, true] {
            if !is_ours && self.report(&self.reference).is_file() {
                continue;
            }
            let (who, programs) = if is_ours { ("ours", &self.ours) } else { ("reference", &self.built.programs) };
            let job = Job { suite: self.suite, built: &self.built, programs, out: &self.out, is_ours };
            let file = |kind: &str| results.join(format!("{who}.{kind}"));
            let mut command = job.command(&file("json"), &file("calls"))?;
            command.arg(format!("-ginkgo.focus={FOCUS}"));
            // Its result is the report: some specs may fail.
            let success = vm::Success::IfWritten(file("json"));
            jobs.push(vm::Job::logged(format!("cni-suite {SUITE} {FOCUS} with {who}"), command, success, file("log")));
        }
        Ok(jobs)
    }

    /// The files and directories that the commands need.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let suite = [self.built.tests.join(self.suite.program()), self.built.module.join(self.suite.package)];
        suite.into_iter().chain([self.built.programs.clone(), self.ours.clone()]).collect()
    }

    /// Compares the results that came out of the guest, as those of the other suites are.
    pub(crate) fn compare(&self, results: &Path) -> anyhow::Result<()> {
        let (theirs, ours) = (results.join("reference.json"), results.join("ours.json"));
        if theirs.is_file() {
            std::fs::copy(&theirs, self.report(&self.reference))?;
        }
        std::fs::copy(&ours, self.report(&self.out)).context("the guest has no results of our plugins")?;
        let departures = Departures::read(Path::new(DEPARTURES), &SUITES.map(|suite| suite.name))?;
        let calls = std::fs::read_to_string(results.join("ours.calls")).unwrap_or_default();
        let (theirs, ours): (Specs, Specs) = (read(&self.report(&self.reference))?, read(&self.report(&self.out))?);
        let comparison = Comparison::new(self.suite, &theirs, &ours, &calls, &departures);
        println!("{}", report::table(&[comparison.row("bridge, VLANs in the VM")]));
        let mut problems = comparison.problems(SUITE);
        problems.extend(comparison.impossible.iter().map(|spec| format!("{SUITE}: {}: the reference fails: {}", spec.name, spec.message)));
        if comparison.reference < MIN_PASSED {
            problems.push(format!("{SUITE}: {} specs pass with the reference, fewer than {MIN_PASSED}", comparison.reference));
        }
        ensure!(problems.is_empty(), "{} problems in the VM (logs: {})\n{}", problems.len(), results.display(), problems.join("\n"));
        Ok(())
    }

    fn report(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{SUITE}, VLANs.json"))
    }
}
