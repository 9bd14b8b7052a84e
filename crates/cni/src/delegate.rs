//! Calls of another plugin: in this process if the plugin in `CNI_PATH` is this program, else in a new process.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::Plugin;
use crate::protocol::{CniError, Command, DEPTH, Request, string};
use crate::result::CniResult;

/// The number of attempts, one second apart, to start a plugin whose file is being written.
const BUSY_TRIES: u32 = 6;
/// The maximum depth of delegation. `flannel`, its delegate and the IPAM plugin are three.
const MAX_DEPTH: u32 = 8;

/// Runs the plugin that a configuration names in `type` for the attachment of `request`. `field` is the path of that field, for
/// errors.
pub(crate) fn call(request: &Request<'_>, command: Command, conf: &Map<String, Value>, field: &str) -> Result<Option<CniResult>, CniError> {
    let kind = string(conf, "type").ok().flatten().unwrap_or_default();
    call_as(kind, request, command, conf, field)
}

/// Runs the plugin `kind`. An IPAM plugin gets the whole configuration of its caller, whose `type` is the caller's.
pub(crate) fn call_as(
    kind: &str,
    request: &Request<'_>,
    command: Command,
    conf: &Map<String, Value>,
    field: &str,
) -> Result<Option<CniResult>, CniError> {
    if request.depth + 1 >= MAX_DEPTH {
        let text = format!("{field}: {kind:?}: {MAX_DEPTH} plugins called each other: does one delegate to itself?");
        if command == Command::Del {
            // ADD rejects this, so there is nothing to undo.
            eprintln!("{text}");
            return Ok(None);
        }
        return Err(CniError::config(text));
    }
    let file = find(kind, request.path, field)?;
    match Plugin::named(kind).filter(|_| is_this_program(&file)) {
        Some(plugin) => plugin.run(&request.delegated(command, conf)),
        None => execute(&file, request, command, conf),
    }
}

fn find(kind: &str, path: &[PathBuf], field: &str) -> Result<PathBuf, CniError> {
    if kind.is_empty() || kind.contains('/') {
        return Err(CniError::config(format!("{field}: {kind:?} is not the name of a plugin")));
    }
    let found = path.iter().map(|dir| dir.join(kind)).find(|file| file.is_file());
    found.ok_or_else(|| CniError::failed(format!("{field}: failed to find plugin {kind:?} in CNI_PATH {path:?}")))
}

fn is_this_program(file: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    id(file).is_some_and(|file| Some(file) == id(Path::new("/proc/self/exe")))
}

fn execute(file: &Path, request: &Request<'_>, command: Command, conf: &Map<String, Value>) -> Result<Option<CniResult>, CniError> {
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
        let mut process = Process::new(file);
        process.env("CNI_COMMAND", verb).env(DEPTH, (request.depth + 1).to_string());
        match process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn() {
            Ok(child) => break child,
            // Another program is writing the file.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                std::thread::sleep(Duration::from_secs(1))
            }
            Err(error) => return Err(failed("start", &error)),
        }
    };
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that does not read its input may still succeed.
        let _ = stdin.write_all(&serde_json::to_vec(conf).unwrap_or_default());
    }
    let output = child.wait_with_output().map_err(|error| failed("wait for", &error))?;
    let answer: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    if !output.status.success() {
        let error = answer.as_ref().and_then(|answer| {
            let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let code = answer.get("code")?.as_u64().and_then(|code| u32::try_from(code).ok())?;
            Some(CniError { code, msg: text("msg"), details: text("details") })
        });
        return Err(error.unwrap_or_else(|| failed("run", &format!("it ended with {} and printed no error object", output.status))));
    }
    match (command, answer) {
        (Command::Add, Some(answer)) => CniResult::parse(&answer).map(Some),
        (Command::Add, None) => Err(failed("understand", &format!("its result for {} is not JSON", request.name))),
        _ => Ok(None),
    }
}
