//! Runs the operator's commands of the extension backend.

use std::io;
use std::process::Command as Process;
use std::time::Duration;

use flannel::backend::extension::Command;

use crate::child::{self, Limits};

/// A command may take a minute and print 64 KiB, which is what a lease's `BackendData` could hold at most.
const LIMITS: Limits = Limits { time: Duration::from_secs(60), output: 64 << 10 };
/// Characters of a failed command's output that are repeated in its error.
const QUOTED: usize = 300;

/// Runs a command to its end and returns what it printed, standard error behind standard output.
///
/// # Errors
/// When it cannot be started, fails, or exceeds `LIMITS`; the text ends with the last that it printed.
pub fn run(command: &Command) -> io::Result<String> {
    let words = command.words(child::variable);
    let Some((program, args)) = words.split_first() else { return Ok(String::new()) };
    let failed = |what: String| io::Error::other(format!("{command}: {what}"));
    let mut process = Process::new(program);
    process.args(args).envs(command.env.iter().map(|(name, value)| (name, value)));
    let ended = child::run(&mut process, &command.stdin, LIMITS).map_err(|error| failed(format!("cannot start {program}: {error}")))?;
    let text = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
    match ended.status {
        Some(_) if ended.is_cut => Err(failed(format!("it printed more than {} bytes", LIMITS.output))),
        Some(status) if status.success() => Ok(text),
        Some(status) => {
            let text = text.trim();
            let cut = text.char_indices().rev().nth(QUOTED - 1).map_or(0, |(at, _)| at);
            Err(failed(format!("it ended with {status}: {}", &text[cut..])))
        }
        None => Err(failed(format!("it did not end within {} s", LIMITS.time.as_secs()))),
    }
}
