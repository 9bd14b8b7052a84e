//! Progress of a long command on standard error, with an estimate of the time that is left.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often a line is written where standard error is no terminal.
const PAUSE: Duration = Duration::from_secs(10);

/// Counts what is done in units of work.
#[derive(Debug)]
pub(crate) struct Progress {
    total: f64,
    done: f64,
    began: Instant,
    shown: Option<Instant>,
    is_terminal: bool,
}

impl Progress {
    pub(crate) fn new(total: f64) -> Progress {
        Progress { total, done: 0.0, began: Instant::now(), shown: None, is_terminal: std::io::stderr().is_terminal() }
    }

    /// Shows what is about to be done.
    pub(crate) fn show(&mut self, what: &str) {
        if !self.is_terminal && self.shown.is_some_and(|shown| shown.elapsed() < PAUSE) {
            return;
        }
        self.shown = Some(Instant::now());
        let text = format!("· {}: {what}", estimate(self.done / self.total, self.began.elapsed()));
        let mut stderr = std::io::stderr().lock();
        // On a terminal the line is written over.
        let _ = if self.is_terminal { write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush()) } else { writeln!(stderr, "{text}") };
    }

    /// Adds work that is done.
    pub(crate) fn add(&mut self, units: f64) {
        self.done += units;
    }

    /// Clears the line, before something else is written.
    pub(crate) fn clear(&self) {
        if self.is_terminal {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

/// The share that is done and, once there is enough to go by, the time that is left.
fn estimate(share: f64, elapsed: Duration) -> String {
    let percent = share * 100.0;
    if share < 0.02 || elapsed < Duration::from_secs(2) {
        return format!("{percent:3.0} %");
    }
    let left = elapsed.as_secs_f64() * (1.0 / share - 1.0);
    match left {
        ..90.0 => format!("{percent:3.0} %, about {left:.0} s left"),
        _ => format!("{percent:3.0} %, about {:.0} min left", left / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimate_extrapolates_from_the_work_done() {
        for (share, seconds, want) in [
            (0.0, 0, "  0 %"),
            (0.01, 60, "  1 %"),
            (0.25, 10, " 25 %, about 30 s left"),
            (0.1, 60, " 10 %, about 9 min left"),
            (1.0, 60, "100 %, about 0 s left"),
        ] {
            assert_eq!(estimate(share, Duration::from_secs(seconds)), want);
        }
    }
}
