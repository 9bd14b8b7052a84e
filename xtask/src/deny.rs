//! Checks dependencies with cargo-deny: always licences, sources and duplicates; advisories if their database can be downloaded
//! or was downloaded earlier.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::tools::{cargo_command, cargo_program, run};

const VERSION: &str = "0.20.2";
/// The time limit of the download of the advisory database.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(60);

/// Checks the dependencies. Returns the part that could not be checked, if any.
pub(crate) fn check() -> anyhow::Result<Option<String>> {
    let program = cargo_program("cargo-deny", VERSION)?;
    let deny = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["--log-level", "error", "--workspace", "--all-features"]).args(args);
        command
    };
    // cargo-deny reads the manifests of all platforms' dependencies, so those that no build here needs are downloaded too.
    run(cargo_command().args(["fetch", "--locked", "--quiet"]))?;
    run(deny(&["--offline"]).args(["check", "--hide-inclusion-graph", "bans", "licenses", "sources"]))?;
    let mut fetch = deny(&["fetch", "db"]);
    let fetched = finishes_within(fetch.stdout(Stdio::null()).stderr(Stdio::null()), DOWNLOAD_LIMIT)?;
    if !fetched && !has_database() {
        return Ok(Some(
            "advisories were NOT checked: https://github.com/rustsec/advisory-db cannot be downloaded and no copy is in the cargo home"
                .into(),
        ));
    }
    run(deny(&["--offline"]).args(["check", "--hide-inclusion-graph", "advisories"]))?;
    Ok((!fetched).then(|| "advisories were checked with an OLD copy of the database: a new one cannot be downloaded".to_owned()))
}

/// Does the cargo home have a copy of the advisory database?
fn has_database() -> bool {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let folder = home.map(|home| home.join("advisory-dbs")).and_then(|folder| std::fs::read_dir(folder).ok());
    folder.is_some_and(|entries| entries.flatten().any(|entry| entry.path().join("crates").is_dir()))
}

/// Runs a command for at most `limit`. Returns true if it succeeds in time.
fn finishes_within(command: &mut Command, limit: Duration) -> anyhow::Result<bool> {
    let mut child = command.spawn().context("cannot start cargo-deny")?;
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
}
