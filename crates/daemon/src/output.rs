//! Lines for the operator on standard output and standard error. A reader that has gone away (`flanneld lab | head`) is not an
//! error: the command carries on, its remaining lines are dropped, and [`is_closed`] lets a long command stop early.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static CLOSED: AtomicBool = AtomicBool::new(false);

/// Writes a line to standard output.
pub fn line(text: impl Display) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        CLOSED.store(true, Ordering::Relaxed);
    }
}

/// Writes a line to standard error.
pub fn error_line(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Could a line not be written to standard output?
pub fn is_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}
