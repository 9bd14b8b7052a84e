//! Ctrl-C in a long command: the first ends it after the present step, with what it has measured so far; the second at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use daemon::output;
use tokio::signal::unix::{SignalKind, signal};

/// Tells whether the command was asked to end.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens from now on, on a thread of its own. Must be called after [`crate::isolate`], which wants one thread.
    pub(crate) fn listen() -> anyhow::Result<Interrupt> {
        let flag = Arc::new(AtomicBool::new(false));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let set = flag.clone();
        std::thread::spawn(move || {
            runtime.block_on(async {
                let (Ok(mut interrupt), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else { return };
                for _ in 0..2 {
                    tokio::select! { _ = interrupt.recv() => {}, _ = term.recv() => {} }
                    if set.swap(true, Ordering::Relaxed) {
                        std::process::exit(130);
                    }
                    output::error_line("\ninterrupted: ending after the present step; press Ctrl-C again to end at once");
                }
            });
        });
        Ok(Interrupt(flag))
    }

    /// Was it asked to end, or is its output read no more?
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed) || output::is_closed()
    }
}
