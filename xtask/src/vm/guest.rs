//! Boots the guest, shows its console, and ends it when it takes too long.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::tools::find;

/// The time in which the guest must begin its first command. It takes three to five seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_mins(2);
/// The time that a command may take beyond its own limit, which the guest keeps itself.
const GRACE: Duration = Duration::from_secs(30);
/// The number of last lines of the console that an error shows.
const SHOWN_LINES: usize = 40;

/// A command that ran in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) name: String,
    pub(super) code: i32,
}

/// A line of the guest's init.
#[derive(Debug, PartialEq, Eq)]
enum Mark {
    Started,
    Begin(String),
    End(Ended),
    Done,
}

impl Mark {
    /// Finds a mark in a line of the console. Output without a newline may stand before it.
    fn parse(line: &str) -> Option<Mark> {
        let (_, rest) = line.split_once("@vm ")?;
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        match word {
            "started" => Some(Mark::Started),
            "done" => Some(Mark::Done),
            "begin" => Some(Mark::Begin(rest.to_owned())),
            "end" => {
                let (code, name) = rest.split_once(' ')?;
                Some(Mark::End(Ended { name: name.to_owned(), code: code.parse().ok()? }))
            }
            _ => None,
        }
    }
}

/// The running guest. It ends with this value.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the guest is started with.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) image: &'a Path,
    /// The file for the archive of the guest's results.
    pub(super) results: &'a Path,
    /// The file for all that the guest prints.
    pub(super) log: &'a Path,
    /// The limit of a command.
    pub(super) limit: Duration,
    /// The limit of all commands.
    pub(super) total: Duration,
}

/// Boots the guest and returns the commands that it ran. Fails where it does not begin, a command hangs, or it ends before
/// its time.
pub(super) fn boot(machine: &Machine<'_>) -> anyhow::Result<Vec<Ended>> {
    let qemu = find("qemu-system-x86_64").context("qemu-system-x86_64 is not in PATH")?;
    let mut command = Command::new(qemu);
    command.args(["-M", "pc", "-m", "2048", "-display", "none", "-vga", "none", "-net", "none", "-monitor", "none"]);
    command.args(["-no-reboot", "-serial", "stdio", "-kernel"]).arg(machine.kernel).arg("-initrd").arg(machine.image);
    let mut results = OsString::from("file,id=results,path=");
    results.push(machine.results);
    command.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=results,name=results", "-chardev"]).arg(results);
    // A panic ends the machine, as `-no-reboot` lets no kernel begin again.
    command.args(["-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr tsc=unstable"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let start = Instant::now();
    let mut guest = Guest(command.spawn().context("cannot start qemu-system-x86_64")?);
    let console = guest.0.stdout.take().context("qemu has a console")?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut log = File::create(machine.log).with_context(|| format!("cannot write {}", machine.log.display()))?;
    follow(machine, start, &lines, &mut log)
}

fn follow(machine: &Machine<'_>, start: Instant, lines: &Receiver<String>, log: &mut File) -> anyhow::Result<Vec<Ended>> {
    let (mut ended, mut shown, mut running) = (Vec::new(), Vec::new(), None);
    let (mut limit, mut since) = (BOOT_LIMIT, start);
    loop {
        let end = (since + limit).min(start + machine.total);
        let line = match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(error) => {
                let what = running.unwrap_or_else(|| "its boot".to_owned());
                let why = match error {
                    RecvTimeoutError::Timeout => format!("did not end {what} within {} s", since.elapsed().as_secs()),
                    RecvTimeoutError::Disconnected => format!("ended during {what}"),
                };
                bail!("the guest {why}; its console ({}) ends with\n{}", machine.log.display(), shown.join("\n"));
            }
        };
        writeln!(log, "{line}").with_context(|| format!("cannot write {}", machine.log.display()))?;
        match Mark::parse(&line) {
            None => println!("  {line}"),
            Some(Mark::Started) => println!("  booted in {:.1} s", start.elapsed().as_secs_f64()),
            Some(Mark::Begin(name)) => {
                println!("{name} (in the VM)");
                (limit, since, running) = (machine.limit + GRACE, Instant::now(), Some(name));
            }
            Some(Mark::End(end)) => {
                println!("  {}: {:.0} s", end.name, since.elapsed().as_secs_f64());
                (limit, since, running) = (GRACE, Instant::now(), None);
                ended.push(end);
            }
            Some(Mark::Done) => return Ok(ended),
        }
        shown.push(line);
        if shown.len() > SHOWN_LINES {
            shown.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(limit: u64) -> (Machine<'static>, std::path::PathBuf) {
        let limit = Duration::from_millis(limit);
        let file = Path::new("/dev/null");
        (Machine { kernel: file, image: file, results: file, log: file, limit, total: Duration::from_mins(1) }, file.into())
    }

    fn followed(lines: &[&str]) -> anyhow::Result<Vec<Ended>> {
        let (machine, log) = machine(10);
        let (sender, receiver) = channel();
        lines.iter().for_each(|line| sender.send((*line).to_owned()).unwrap());
        drop(sender);
        follow(&machine, Instant::now(), &receiver, &mut File::create(log).unwrap())
    }

    #[test]
    fn commands_and_their_codes_are_found() {
        let lines = ["[    2.1] x", "@vm started", "@vm begin kernel netns", "test a ... @vm end 101 kernel netns", "@vm done"];
        assert_eq!(followed(&lines).unwrap(), [Ended { name: "kernel netns".to_owned(), code: 101 }]);
    }

    #[test]
    fn guest_that_ends_early_is_an_error_with_its_console() {
        let error = followed(&["@vm started", "@vm begin lab", "Kernel panic"]).unwrap_err().to_string();
        assert!(error.contains("ended during lab") && error.contains("Kernel panic"), "{error}");
    }

    #[test]
    fn hung_guest_is_named_with_its_command() {
        let (mut machine, log) = machine(0);
        machine.total = Duration::from_millis(50);
        let (sender, receiver) = channel();
        sender.send("@vm begin lab".to_owned()).unwrap();
        let error = follow(&machine, Instant::now(), &receiver, &mut File::create(log).unwrap()).unwrap_err().to_string();
        assert!(error.contains("did not end lab within"), "{error}");
    }
}
