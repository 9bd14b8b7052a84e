//! Runs the operator's commands of the extension backend.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command as Process, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use flannel::backend::extension::Command;

/// How long a command may take: the traffic rules wait for it.
const LIMIT: Duration = Duration::from_secs(60);
/// How long its last words are waited for once it has ended.
const GRACE: Duration = Duration::from_millis(500);

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
    // Who reads nothing need not.
    std::thread::spawn(move || stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes())));
    let (tell, said) = mpsc::channel();
    read(stdout, tell.clone());
    read(stderr, tell);
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
    // What it left running in the background may hold its output open for ever: that is not waited for.
    let mut bytes = Vec::new();
    let last = Instant::now() + GRACE;
    while let Ok(more) = said.recv_timeout(last.saturating_duration_since(Instant::now())) {
        bytes.extend(more);
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    match status {
        Some(status) if status.success() => Ok(text),
        Some(status) => Err(failed(format!("it ended with {status}: {}", text.trim()))),
        None => Err(failed(format!("it did not end within {} s", LIMIT.as_secs()))),
    }
}

/// Hands on what a pipe says, until its end.
fn read(pipe: Option<impl Read + Send + 'static>, tell: mpsc::Sender<Vec<u8>>) {
    let Some(mut pipe) = pipe else { return };
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            if tell.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
}
