//! Runs other programs. Errors name the program, and long steps report progress.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// The interval at which a long step prints its duration.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);

/// Changes the current directory to the project's root.
pub(crate) fn enter_root() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent directory")?;
    std::env::set_current_dir(root).with_context(|| format!("cannot enter {}", root.display()))
}

/// Prints a step's name, and its duration every fifteen seconds until it is dropped.
pub(crate) struct Step {
    name: String,
    start: Instant,
    /// Dropped to end the printer thread.
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
            while ended.recv_timeout(PROGRESS_INTERVAL) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
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
        if self.start.elapsed() > PROGRESS_INTERVAL {
            println!("  {}: {} s", self.name, self.start.elapsed().as_secs());
        }
    }
}

/// Runs a command that may take minutes without output, as a [`Step`].
pub(crate) fn step(name: impl Into<String>, command: &mut Command) -> anyhow::Result<()> {
    let _step = Step::begin(name);
    run(command)
}

/// A command that runs `cargo` with the environment of the shell.
pub(crate) fn cargo_command() -> Command {
    let mut command = Command::new("cargo");
    without_package(&mut command);
    command
}

/// Removes the variables that the `cargo run` of this program set. Build scripts that read them (as ring's does) would run
/// again, and all dependent crates be rebuilt, at each change between `cargo xtask` and `cargo`.
pub(crate) fn without_package(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
}

/// Runs `cargo` with arguments and environment variables. Cargo's own output shows the progress.
pub(crate) fn cargo(args: &[&str], env: &[(&str, &OsStr)]) -> anyhow::Result<()> {
    println!("cargo {}", args.join(" "));
    run(cargo_command().args(args).envs(env.iter().copied()))
}

/// Runs a command to its end. Fails if the command fails.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(status.success(), "{} ended with {status}", text(command));
    Ok(())
}

/// Runs a command and returns its status and standard output; standard error is passed on.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<Output> {
    command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {:?}", command.get_program()))
}

/// A command line as text, for errors.
fn text(command: &Command) -> String {
    let args = command.get_args().map(|arg| arg.to_string_lossy().into_owned());
    let words: Vec<String> = std::iter::once(command.get_program().to_string_lossy().into_owned()).chain(args).collect();
    words.join(" ")
}

/// Finds a program in PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // The PATH of an ordinary user may lack these directories, in which Debian installs nft and ip.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The directory of programs that all checkouts share. Creates it if it does not exist.
pub(crate) fn cache() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let folder = home.context("neither XDG_CACHE_HOME nor HOME is set")?.join("flannel-tests");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// The target triple of this machine, from rustc.
pub(crate) fn host() -> anyhow::Result<String> {
    let output = output(Command::new("rustc").arg("-vV"))?;
    let text = String::from_utf8(output.stdout)?;
    text.lines().find_map(|line| line.strip_prefix("host: ")).map(ToOwned::to_owned).context("rustc -vV prints no host")
}

/// The path of a program that cargo installs into the cache on first use.
pub(crate) fn cargo_program(name: &str, version: &str) -> anyhow::Result<PathBuf> {
    let folder = cache()?.join(format!("{name}-{version}"));
    let program = folder.join("bin").join(name);
    if !program.is_file() {
        let mut command = cargo_command();
        command.args(["install", "--quiet", "--locked", "--version", version, name, "--root"]).arg(&folder);
        // Built outside the checkout, whose toolchain and target directory do not apply.
        command.current_dir(cache()?).env_remove("CARGO_TARGET_DIR");
        step(format!("building {name} {version}"), &mut command).with_context(|| format!("cannot install {name} {version}"))?;
    }
    Ok(program)
}

/// Downloads a package from PyPI into a directory.
pub(crate) fn pip(package: &str, folder: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--root-user-action=ignore", "--target"]);
    command.arg(folder).arg(package);
    step(format!("downloading {package} from PyPI"), &mut command)
        .with_context(|| format!("cannot install {package}: the tests need python3 with pip for it"))
}
