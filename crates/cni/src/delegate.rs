//! Calling another plugin: in this process where `CNI_PATH` gives this very program, by a process of its own
//! otherwise.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::Plugin;
use crate::protocol::{CniError, Command, Request};
use crate::result::CniResult;

/// How often a plugin whose file is being written is tried, a second apart.
const BUSY_TRIES: u32 = 6;

/// Runs the plugin of a configuration for the attachment of `request`.
pub(crate) fn call(request: &Request, command: Command, conf: Map<String, Value>, field: &str) -> Result<Option<CniResult>, CniError> {
    let kind = conf.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    call_as(&kind, request, command, conf, field)
}

/// The same for a plugin whose name stands elsewhere: an IPAM plugin gets the whole configuration of its caller.
pub(crate) fn call_as(
    kind: &str,
    request: &Request,
    command: Command,
    conf: Map<String, Value>,
    field: &str,
) -> Result<Option<CniResult>, CniError> {
    let file = find(kind, &request.path, field)?;
    match Plugin::named(kind).filter(|_| is_this_program(&file)) {
        Some(plugin) => plugin.run(&request.with_conf(command, conf)?),
        None => execute(&file, request, command, &conf),
    }
}

fn find(kind: &str, path: &[PathBuf], field: &str) -> Result<PathBuf, CniError> {
    if kind.is_empty() || kind.contains('/') {
        return Err(CniError::config(format!("{field}: {kind:?} is no plugin's name")));
    }
    let found = path.iter().map(|dir| dir.join(kind)).find(|file| file.is_file());
    found.ok_or_else(|| CniError::failed(format!("{field}: failed to find plugin {kind:?} in CNI_PATH {path:?}")))
}

fn is_this_program(file: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    id(file).is_some_and(|file| Some(file) == id(Path::new("/proc/self/exe")))
}

fn execute(file: &Path, request: &Request, command: Command, conf: &Map<String, Value>) -> Result<Option<CniResult>, CniError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| CniError::failed(format!("cannot {what} plugin {}: {error}", file.display()));
    let verb = match command {
        Command::Add => "ADD",
        Command::Del => "DEL",
        Command::Check => "CHECK",
        Command::Gc => "GC",
        Command::Status => "STATUS",
        Command::Version => "VERSION",
    };
    let mut tries = 0;
    let mut child = loop {
        tries += 1;
        let spawned =
            Process::new(file).env("CNI_COMMAND", verb).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        match spawned {
            Ok(child) => break child,
            // Somebody is just installing it.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                std::thread::sleep(Duration::from_secs(1))
            }
            Err(error) => return Err(failed("start", &error)),
        }
    };
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that reads nothing may still succeed.
        let _ = stdin.write_all(Value::Object(conf.clone()).to_string().as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed("wait for", &error))?;
    let answer: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    if !output.status.success() {
        let error = answer.as_ref().and_then(|answer| {
            let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let code = answer.get("code")?.as_u64().and_then(|code| u32::try_from(code).ok())?;
            Some(CniError { code, msg: text("msg"), details: text("details") })
        });
        return Err(error.unwrap_or_else(|| failed("run", &format!("it ended with {} and without an answer", output.status))));
    }
    match (command, answer) {
        (Command::Add, Some(answer)) => CniResult::parse(&answer).map(Some),
        (Command::Add, None) => Err(failed("understand", &format!("its result for {} is no JSON", request.name))),
        _ => Ok(None),
    }
}
