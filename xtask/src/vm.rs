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

use crate::programs::Need;
use crate::test::{Built, Program, Selection};
use crate::tools::{Step, run as run_command};
use cpio::Archive;
use guest::Machine;
pub(crate) use image::kernel;

const INIT: &str = include_str!("../../tests/vm/init");
/// The test programs that have tests for the VM, as options of `cargo test`.
const TARGETS: &[&str] = &["-p", "kernel", "-p", "cni", "-p", "flanneld", "--test", "netns", "--test", "plugins", "--test", "lab"];
/// Tests that also run in the VM: package, test program, and its arguments. They show that what passes here passes on a kernel of
/// Debian, which has no need of WireGuard in user space.
const ALSO: &[(&str, &str, &[&str])] =
    &[("kernel", "netns", &["--skip", "userspace_wireguard"]), ("flanneld", "lab", &["a_full_mtu_packet_crosses_vxlan"])];
/// The limits of one test program and of the guest, for the tests of every run.
const LIMITS: [Duration; 2] = [Duration::from_mins(6), Duration::from_mins(8)];
/// The same for tests that the user selects.
const SELECTED_LIMITS: [Duration; 2] = [Duration::from_mins(25), Duration::from_mins(30)];

/// A test program, or another command, that runs in the guest.
struct Job {
    name: String,
    folder: PathBuf,
    file: PathBuf,
    args: Vec<String>,
}

impl Job {
    fn test(program: &Program, args: Vec<String>) -> Job {
        let name = [&[program.package.clone(), program.target.clone()], args.as_slice()].concat().join(" ");
        Job { name, folder: program.folder.clone(), file: program.file.clone(), args }
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
    boot(&built, &jobs, needs, if args.is_empty() { LIMITS } else { SELECTED_LIMITS })
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
    boot(built, &jobs, needs, SELECTED_LIMITS)
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

/// Builds the guest, runs the jobs in it, and fails if one fails.
fn boot(built: &Built, jobs: &[Job], needs: BTreeSet<Need>, [limit, total]: [Duration; 2]) -> anyhow::Result<()> {
    let kernel = kernel()?;
    let out = std::env::current_dir()?.join("target/vm");
    std::fs::create_dir_all(&out)?;
    let mut env = BTreeMap::from([("RUST_BACKTRACE", OsString::from("0"))]);
    for need in needs {
        env.extend(need.provide()?);
    }
    let image = out.join("image.cpio");
    {
        let _step = Step::begin("building the image of the VM");
        let mut archive = image::base(&kernel, INIT)?;
        checkout(&mut archive, &std::env::current_dir()?)?;
        for program in built.programs.iter().chain(jobs.iter().map(|job| &job.file)) {
            archive.copy(&stripped(program, &out)?, program);
            image::libraries(&mut archive, program)?;
        }
        for file in env.values().map(Path::new).filter(|value| value.is_absolute() && value.exists()) {
            image::program(&mut archive, file)?;
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
    let ended = guest::boot(&Machine { kernel: &kernel.file, image: &image, log: &out.join("console.log"), limit, total })?;
    ensure!(ended.len() == jobs.len(), "the guest ran {} of {} commands", ended.len(), jobs.len());
    let failed: Vec<String> =
        ended.iter().filter(|end| end.code != 0).map(|end| format!("{} ended with {} in the VM", end.name, end.code)).collect();
    if !failed.is_empty() {
        bail!("{} (console: {})", failed.join("; "), out.join("console.log").display());
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
    let mut text = format!("cd {} || exit\n", quoted(&job.folder.to_string_lossy()));
    for (name, value) in env {
        text.push_str(&format!("export {name}={}\n", quoted(&value.to_string_lossy())));
    }
    text.push_str(&format!("export CARGO_MANIFEST_DIR={}\nexec", quoted(&job.folder.to_string_lossy())));
    for word in [job.file.to_string_lossy().into_owned()].iter().chain(&job.args) {
        text.push_str(&format!(" {}", quoted(word)));
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
        let job = Job { name: String::new(), folder: "/a b".into(), file: "/x/test".into(), args: vec!["it's".to_owned()] };
        let text = script_of(&job, &BTreeMap::from([("K", OsString::from("$v"))]));
        assert_eq!(text, "cd '/a b' || exit\nexport K='$v'\nexport CARGO_MANIFEST_DIR='/a b'\nexec '/x/test' 'it'\\''s'\n");
    }
}
