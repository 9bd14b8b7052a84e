//! Child processes of a lab.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::ensure;
use kernel::netns::Netns;
use std::os::unix::process::CommandExt;

/// Runs a shell script in a network namespace and returns its output.
///
/// # Errors
/// When it fails; the text has its standard error.
pub fn shell(netns: &Netns, script: &str) -> anyhow::Result<String> {
    netns.run(|| run_script(script))?
}

/// Runs a shell script where the caller is.
pub(crate) fn run_script(script: &str) -> anyhow::Result<String> {
    let output = Command::new("sh").args(["-ec", script]).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Starts a process that ends with this one, its output appended to a log.
pub(crate) fn spawn(command: &mut Command, log: &Path) -> std::io::Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    kernel::process::die_with_parent(command);
    // In a process group of its own: Ctrl-C is for the lab, which decides what ends when.
    command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

/// The last lines of a log, for an error.
pub(crate) fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// The file of a program in `PATH`, or where the system's own are.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}
