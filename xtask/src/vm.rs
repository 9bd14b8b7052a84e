//! Runs tests in a virtual machine, on a kernel that has what this machine's may lack: WireGuard, IPIP, ESP, VLANs, netem. The
//! guest is Debian's cloud kernel in QEMU, without acceleration; its programs are those of this machine.

mod cpio;
mod guest;
mod image;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::cni_suite::GuestSuite;
use crate::programs::Need;
use crate::test::{Built, Program, Selection};
use crate::tools::{Step, run as run_command};
use cpio::Archive;
use guest::Machine;
pub(crate) use image::kernel;

const INIT: &str = include_str!("../../tests/vm/init");
/// The guest's directory of files that come out of it.
const RESULTS: &str = "/vm/results";
/// The test programs that have tests for the VM, as options of `cargo test`.
const TARGETS: &[&str] = &["-p", "kernel", "-p", "cni", "-p", "flanneld", "--test", "netns", "--test", "traffic", "--test", "lab"];
/// Tests that also run in the VM: package, test program and its arguments. They show that what passes here passes on a kernel
/// of Debian, which has no need of WireGuard in user space. Two more of `netns` start so many processes that they would take as long as
/// all others.
const ALSO: &[(&str, &str, &[&str])] = &[
    (
        "kernel",
        "netns",
        &["--skip", "missing_pod_rules_are_restored", "--skip", "iptables_rules_are_written", "--skip", "userspace_wireguard"],
    ),
    ("flanneld", "lab", &["a_full_mtu_packet_crosses_vxlan"]),
];
/// The limits of one test program and of the guest, for the tests of every run: several times what they take on an idle machine.
const LIMITS: [Duration; 2] = [Duration::from_mins(8), Duration::from_mins(20)];
/// The same for tests that the user selects.
const SELECTED_LIMITS: [Duration; 2] = [Duration::from_mins(25), Duration::from_mins(30)];

/// When a job has succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Success {
    /// Its command ends with 0.
    IfZero,
    /// Its command has written this file, however it ends.
    IfWritten(PathBuf),
}

/// A command that runs in the guest.
pub(crate) struct Job {
    name: String,
    command: Command,
    success: Success,
    /// The guest's file for its output, if that is not the console.
    output: Option<PathBuf>,
}

impl Job {
    /// A command with its environment and directory, whose output is a file. The guest must have its files.
    pub(crate) fn logged(name: String, command: Command, success: Success, output: PathBuf) -> Job {
        Job { name, command, success, output: Some(output) }
    }

    fn test(program: &Program, args: Vec<String>) -> Job {
        let name = [&[program.package.clone(), program.target.clone()], args.as_slice()].concat().join(" ");
        let mut command = Command::new(&program.file);
        command.args(args).current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder).env("RUST_BACKTRACE", "0");
        Job { name, command, success: Success::IfZero, output: None }
    }
}

/// Runs the tests for the VM, or those that the arguments select, as `cargo xtask test` has them.
pub(crate) fn run(args: &[String]) -> anyhow::Result<()> {
    Need::Debian.provide()?;
    Need::Vm.provide()?;
    let mut selection = Selection::parse(args)?;
    if selection.cargo == ["--workspace"] {
        selection.cargo = TARGETS.iter().map(ToString::to_string).collect();
    }
    let built = selection.build()?;
    let mut jobs = Vec::new();
    let mut needs = BTreeSet::new();
    for program in &built.tests {
        if args.is_empty() {
            // Only the tests for the VM, and those of the list.
            jobs.extend(marked(program, &selection, &mut needs)?);
            let also = ALSO.iter().filter(|(package, target, _)| program.package == *package && program.target == *target);
            jobs.extend(also.map(|(_, _, args)| Job::test(program, args.iter().map(ToString::to_string).collect())));
        } else if !program.tests.is_empty() {
            let args = selection.filter.iter().chain(&selection.harness).cloned().chain(["--include-ignored".to_owned()]);
            jobs.push(Job::test(program, args.collect()));
            needs.extend(program.needs(&program.tests)?);
        }
    }
    ensure!(!jobs.is_empty(), "no test has {:?} in its name", selection.filter.as_deref().unwrap_or_default());
    let limits = if args.is_empty() { LIMITS } else { SELECTED_LIMITS };
    boot(&built, jobs, needs, args.is_empty(), limits)
}

/// Runs those tests of a selection that are marked for the VM.
pub(crate) fn run_marked(built: &Built, selection: &Selection) -> anyhow::Result<()> {
    let (mut jobs, mut needs) = (Vec::new(), BTreeSet::new());
    for program in &built.tests {
        jobs.extend(marked(program, selection, &mut needs)?);
    }
    if jobs.is_empty() {
        return Ok(());
    }
    boot(built, jobs, needs, false, SELECTED_LIMITS)
}

/// Those selected tests of a program that are marked for the VM. They are ignored elsewhere.
fn marked(program: &Program, selection: &Selection, needs: &mut BTreeSet<Need>) -> anyhow::Result<Option<Job>> {
    let tests: Vec<&String> = program.tests.iter().filter(|test| is_marked(test)).collect();
    if tests.is_empty() {
        return Ok(None);
    }
    needs.extend(program.needs(tests)?);
    let args = selection.filter.iter().chain(&selection.harness).cloned().chain(["--ignored".to_owned()]);
    Ok(Some(Job::test(program, args.collect())))
}

/// Is a test for the VM? Its kind says so: `[vm] name`.
fn is_marked(test: &str) -> bool {
    let kind = test.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    kind.is_some_and(|(kind, _)| kind.split_whitespace().any(|word| word == "vm"))
}

/// Builds the guest, runs the jobs in it, and fails if one fails. With `suites`, the suites of the reference plugins run too.
fn boot(built: &Built, mut jobs: Vec<Job>, needs: BTreeSet<Need>, suites: bool, [limit, total]: [Duration; 2]) -> anyhow::Result<()> {
    let kernel = kernel()?;
    let out = std::env::current_dir()?.join("target/vm");
    let results = out.join("results");
    let _ = std::fs::remove_dir_all(&results);
    std::fs::create_dir_all(&results)?;
    let mut env = BTreeMap::new();
    for need in needs {
        env.extend(need.provide()?);
    }
    let suite = if suites { Some(GuestSuite::new(&kernel.release())?) } else { None };
    let tests: Vec<PathBuf> = jobs.iter().map(|job| job.command.get_program().into()).collect();
    if let Some(suite) = &suite {
        // They come first: modules that other tests load add a link to each namespace, which the suites do not expect.
        jobs.splice(0..0, suite.jobs(Path::new(RESULTS))?);
    }
    let image = out.join("image.cpio");
    {
        let _step = Step::begin("building the image of the VM");
        let mut archive = image::base(&kernel, INIT)?;
        archive.directory(Path::new(RESULTS), 0o755);
        checkout(&mut archive, &std::env::current_dir()?)?;
        for file in suite.iter().flat_map(GuestSuite::files).chain(env.values().map(PathBuf::from)).filter(|file| file.exists()) {
            image::program(&mut archive, &file)?;
        }
        for program in built.programs.iter().chain(&tests) {
            image::libraries(&mut archive, program)?;
            archive.copy(&stripped(program, &out)?, program);
        }
        let mut commands = String::new();
        for (number, job) in jobs.iter().enumerate() {
            let script = format!("/vm/{number}");
            archive.text(Path::new(&script), script_of(job, &env), 0o644);
            writeln!(commands, "run {} {} {script}", quoted(&job.name), limit.as_secs())?;
        }
        archive.text(Path::new("/vm/commands"), commands, 0o644);
        archive.write(&image)?;
    }
    let tar = out.join("results.tar");
    let log = out.join("console.log");
    let ended = guest::boot(&Machine { kernel: &kernel.file, image: &image, results: &tar, log: &log, limit, total })?;
    ensure!(ended.len() == jobs.len(), "the guest ran {} of {} commands", ended.len(), jobs.len());
    run_command(Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(&results)).context("the guest's results are incomplete")?;
    let mut failed = Vec::new();
    for (job, end) in jobs.iter().zip(&ended) {
        let succeeded = match &job.success {
            Success::IfZero => end.code == 0,
            Success::IfWritten(file) => results.join(file.strip_prefix(RESULTS).unwrap_or(file)).is_file(),
        };
        if !succeeded {
            let how = match end.code {
                // SIGTERM, or SIGKILL after it, from the guest's `timeout`.
                137 | 143 => format!("did not end within {} s", limit.as_secs()),
                code => format!("ended with {code}"),
            };
            failed.push(format!("{} {how} in the VM (console: {})", job.name, log.display()));
        }
    }
    if let Some(Err(error)) = suite.map(|suite| suite.compare(&results)) {
        failed.push(format!("{error:#}"));
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

/// Adds the files of the checkout, which tests may read, without what is built.
fn checkout(archive: &mut Archive, root: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        if !["target", ".git"].iter().any(|left_out| name == *left_out) {
            archive.add(&entry.path())?;
        }
    }
    Ok(())
}

/// A copy of a program without its debug information, which is most of it.
fn stripped(program: &Path, out: &Path) -> anyhow::Result<PathBuf> {
    let file = out.join(program.file_name().context("a program has a name")?);
    let time = |file: &Path| file.metadata().and_then(|metadata| metadata.modified());
    if time(&file).is_ok_and(|made| time(program).is_ok_and(|built| made > built)) {
        return Ok(file);
    }
    run_command(Command::new("strip").args(["--strip-debug", "-o"]).arg(&file).arg(program))?;
    Ok(file)
}

/// The shell's commands for a job.
fn script_of(job: &Job, env: &BTreeMap<&str, OsString>) -> String {
    let mut text = String::new();
    if let Some(folder) = job.command.get_current_dir() {
        text.push_str(&format!("cd {} || exit\n", quoted(&folder.to_string_lossy())));
    }
    let own = job.command.get_envs().filter_map(|(name, value)| Some((name.to_string_lossy(), value?.to_string_lossy())));
    let all = env.iter().map(|(name, value)| ((*name).into(), value.to_string_lossy()));
    for (name, value) in all.chain(own) {
        text.push_str(&format!("export {name}={}\n", quoted(&value)));
    }
    text.push_str("exec");
    for word in std::iter::once(job.command.get_program()).chain(job.command.get_args()) {
        text.push_str(&format!(" {}", quoted(&word.to_string_lossy())));
    }
    if let Some(file) = &job.output {
        text.push_str(&format!(" >{} 2>&1", quoted(&file.to_string_lossy())));
    }
    text.push('\n');
    text
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_marks_a_test_for_the_vm() {
        assert!(is_marked("[vm] a") && is_marked("[etcd vm] a"));
        assert!(!is_marked("vm") && !is_marked("[kubernetes] vm") && !is_marked("embedded: [vm] a"));
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        let mut command = Command::new("/x/test");
        command.arg("it's").current_dir("/a b").env("L", "1");
        let job = Job::logged(String::new(), command, Success::IfZero, "/log".into());
        let text = script_of(&job, &BTreeMap::from([("K", OsString::from("$v"))]));
        assert_eq!(text, "cd '/a b' || exit\nexport K='$v'\nexport L='1'\nexec '/x/test' 'it'\\''s' >'/log' 2>&1\n");
    }
}
