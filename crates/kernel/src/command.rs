//! Runs the operator's commands of the extension backend.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use flannel::backend::extension::Command;

/// How long a command may take: the traffic rules wait for it.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs a command to its end and returns what it printed, on standard output and error.
///
/// # Errors
/// When it cannot be started, fails, or takes more than a minute; the text has its last words.
pub fn run(command: &Command) -> io::Result<String> {
    let words = command.words(|name| std::env::var(name).ok());
    let Some((program, args)) = words.split_first() else { return Ok(String::new()) };
    let failed = |what: String| io::Error::other(format!("{command}: {what}"));
    let mut process = Process::new(program);
    process.args(args).envs(command.env.iter().map(|(name, value)| (name, value)));
    // A group of its own, so that all that it started can be ended with it.
    process.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = process.spawn().map_err(|error| failed(format!("cannot start {program}: {error}")))?;
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = command.stdin.clone();
    std::thread::scope(|scope| {
        // Who reads nothing need not.
        scope.spawn(move || stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes())));
        let out = scope.spawn(move || read(stdout));
        let err = scope.spawn(move || read(stderr));
        let end = Instant::now() + LIMIT;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break Some(status),
                None if Instant::now() > end => break None,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if status.is_none() {
            let _ = rustix::process::kill_process_group(rustix::process::Pid::from_child(&child), rustix::process::Signal::KILL);
            child.wait()?;
        }
        let text = out.join().unwrap_or_default() + &err.join().unwrap_or_default();
        match status {
            Some(status) if status.success() => Ok(text),
            Some(status) => Err(failed(format!("it ended with {status}: {}", text.trim()))),
            None => Err(failed(format!("it did not end within {} s", LIMIT.as_secs()))),
        }
    })
}

fn read(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    // What was read before an error is what there is.
    let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}
