//! A limit on the time of each test.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Several times what the longest test needs on a busy machine.
const LIMIT: Duration = Duration::from_mins(15);

/// Runs a test, and ends the whole test program with a message if it does not return in time. A thread cannot be ended from outside, and a
/// test that hangs without a name costs far more than the tests that no longer run.
pub(crate) fn limited(name: &str, test: impl FnOnce()) {
    let (done, running) = channel::<()>();
    let watched = name.to_owned();
    std::thread::spawn(move || {
        if running.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            println!("test {watched} did not return within {LIMIT:?}; ending the test program");
            std::process::exit(101);
        }
    });
    test();
    drop(done);
}
