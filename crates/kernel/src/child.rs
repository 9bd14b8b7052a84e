//! Runs child processes with limits on time and output, and with a reduced environment.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The environment variables that a child inherits. The others are withheld, because one may be a password.
const KEPT: [&str; 10] = ["PATH", "XTABLES_LOCKFILE", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "NODE_NAME", "POD_NAME", "POD_NAMESPACE"];
/// How long to wait for output after a child has ended: a process that it left running may keep the pipe open forever.
const GRACE: Duration = Duration::from_millis(500);

/// The limits of a child.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The run time.
    pub time: Duration,
    /// The number of bytes on standard output, and on standard error.
    pub output: usize,
}

/// The result of a child.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if it was killed because it exceeded the time limit.
    pub status: Option<ExitStatus>,
    /// Its standard output, up to the limit.
    pub stdout: Vec<u8>,
    /// Its standard error, up to the limit.
    pub stderr: Vec<u8>,
    /// Whether its output exceeded the limit.
    pub is_cut: bool,
}

/// An environment variable that children inherit.
pub fn variable(name: &str) -> Option<String> {
    KEPT.contains(&name).then(|| std::env::var(name).ok()).flatten()
}

/// Runs a child to its end, in its own process group. If it exceeds the time limit, the whole group is killed.
///
/// # Errors
/// When it cannot be started.
pub fn run(command: &mut Command, input: &str, limits: Limits) -> io::Result<Ended> {
    let explicit: Vec<_> = command.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
    command.env_clear().envs(KEPT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))));
    command.envs(explicit.into_iter().filter_map(|(name, value)| Some((name, value?))));
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = input.to_owned();
    // A child may ignore its input.
    std::thread::spawn(move || stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes())));
    let (stdout, stderr) = (collect(stdout, limits.output), collect(stderr, limits.output));
    let end = Instant::now() + limits.time;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break Some(status),
            None if Instant::now() > end => break None,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    if status.is_none() {
        let _ = rustix::process::kill_process_group(rustix::process::Pid::from_child(&child), rustix::process::Signal::KILL);
        child.wait()?;
    }
    let last = Instant::now() + GRACE;
    let ((stdout, more), (stderr, more_errors)) = (gather(&stdout, last), gather(&stderr, last));
    Ok(Ended { status, stdout, stderr, is_cut: more || more_errors })
}

/// A part of the output; `true` with the first part beyond the limit.
type Part = (Vec<u8>, bool);

/// Reads a pipe to its end and passes on the output up to the limit. It reads on beyond the limit, so that the child is not blocked.
fn collect(pipe: Option<impl Read + Send + 'static>, limit: usize) -> mpsc::Receiver<Part> {
    let (send, parts) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        std::thread::spawn(move || {
            let (mut buffer, mut left) = ([0; 4096], limit);
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                let kept = length.min(left);
                let is_cut = kept < length;
                left -= kept;
                if (kept > 0 || is_cut) && send.send((buffer[..kept].to_vec(), is_cut)).is_err() {
                    return;
                }
                if is_cut {
                    // Read and discard the rest.
                    while let Ok(1..) = pipe.read(&mut buffer) {}
                    return;
                }
            }
        });
    }
    parts
}

fn gather(parts: &mpsc::Receiver<Part>, end: Instant) -> Part {
    let mut all = Vec::new();
    while let Ok((part, is_cut)) = parts.recv_timeout(end.saturating_duration_since(Instant::now())) {
        all.extend(part);
        if is_cut {
            return (all, true);
        }
    }
    (all, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str, input: &str, time: Duration) -> Ended {
        run(Command::new("/bin/sh").args(["-c", line]).env("OWN", "1"), input, Limits { time, output: 1000 }).unwrap()
    }

    #[test]
    fn children_get_input_and_only_kept_variables() {
        let ended = shell("cat; env | sort", "input\n", Duration::from_secs(10));
        let text = String::from_utf8(ended.stdout).unwrap();
        assert!(text.starts_with("input\n") && text.contains("OWN=1") && text.contains("PATH="), "{text}");
        assert!(!text.contains("CARGO"), "cargo sets CARGO_… variables for a test: {text}");
    }

    #[test]
    fn output_is_cut_at_the_limit_and_the_child_continues() {
        let ended = shell("head -c 1000000 /dev/zero; echo failed >&2; exit 3", "", Duration::from_secs(10));
        assert_eq!((ended.stdout.len(), ended.is_cut, ended.status.and_then(|status| status.code())), (1000, true, Some(3)));
        assert_eq!(ended.stderr, b"failed\n");
    }

    #[test]
    fn child_is_killed_with_its_group_at_the_time_limit() {
        let began = Instant::now();
        let ended = shell("echo begun; sleep 60 & sleep 60", "", Duration::from_millis(100));
        assert!(ended.status.is_none() && ended.stdout == b"begun\n" && began.elapsed() < Duration::from_secs(20));
    }
}
