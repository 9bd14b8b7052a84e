//! Runs the operator's commands of the extension backend.

use std::io;
use std::process::Command as Process;
use std::time::Duration;

use flannel::backend::extension::Command;

use crate::child::{self, Limits};

/// The limits of a command: a minute, and 64 KiB of output, the most that a lease's `BackendData` could hold.
const LIMITS: Limits = Limits { time: Duration::from_secs(60), output: 64 << 10 };
/// The number of characters of a failed command's output that its error quotes.
const QUOTED: usize = 300;

/// Runs a command to its end and returns its output, standard error after standard output.
///
/// # Errors
/// When it cannot be started, fails, or exceeds `LIMITS`; the text quotes the end of its output.
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
