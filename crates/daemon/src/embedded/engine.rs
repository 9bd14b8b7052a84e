//! The thread that owns state and file. What waits together is done together: one transaction on disk answers many.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tonic::Status;

use super::disk::Disk;
use super::state::{Saved, State};

/// Jobs in one transaction: enough to share a write among all who wait, few enough to answer soon.
const BATCH: usize = 256;

/// Executed on the state; what it returns is called with the fate of the transaction and answers.
type Job = Box<dyn FnOnce(&mut State, Instant) -> Answer + Send>;
type Answer = Box<dyn FnOnce(Result<(), Status>) + Send>;

/// A handle to the engine.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    jobs: Jobs,
    revision: watch::Receiver<i64>,
}

/// Where requests are executed.
#[derive(Debug, Clone)]
enum Jobs {
    /// By the thread that owns state and file.
    Thread(Sender<Job>),
    /// At once, on a state that nobody keeps.
    Memory(Memory),
}

/// A store that is in memory alone and lives by tokio's clock, which a test may hold. Clones are the same store.
#[derive(Debug, Clone)]
pub(super) struct Memory(Arc<Mutex<(State, Vec<watch::Sender<i64>>)>>);

impl Memory {
    /// An empty store.
    pub(super) fn new() -> Memory {
        Memory(Arc::new(Mutex::new((State::new(Saved::default(), now()), Vec::new()))))
    }

    /// Runs a function on the state, whose leases end when their time has come.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut State, Instant) -> T) -> T {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, listeners) = &mut *inner;
        let now = now();
        state.expire(now);
        let result = f(state, now);
        drop(state.take_changes());
        listeners.retain(|listener| !listener.is_closed());
        for listener in listeners {
            listener.send_if_modified(|revision| std::mem::replace(revision, state.revision()) != state.revision());
        }
        result
    }

    pub(super) fn engine(&self) -> Engine {
        // A channel for each: who of several receivers of one is woken first is left to chance, and a simulation has none.
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (tell, revision) = watch::channel(inner.0.revision());
        inner.1.push(tell);
        Engine { jobs: Jobs::Memory(self.clone()), revision }
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Engine {
    /// Loads the state and starts the thread. It ends when the last handle is gone.
    pub(super) fn start(mut disk: Disk) -> anyhow::Result<Engine> {
        let state = State::new(disk.load()?, Instant::now());
        let (jobs, inbox) = std::sync::mpsc::channel();
        let (publish, revision) = watch::channel(state.revision());
        std::thread::Builder::new().name("store".to_owned()).spawn(move || run(state, disk, &inbox, &publish))?;
        Ok(Engine { jobs: Jobs::Thread(jobs), revision })
    }

    /// Executes a function on the state and returns its result once what it changed is on disk.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut State, Instant) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let (reply, result) = oneshot::channel();
        let job: Job = Box::new(move |state, now| {
            let outcome = f(state, now);
            Box::new(move |written| {
                // Who asked may have gone away; the change stands all the same.
                let _ = reply.send(written.and(outcome));
            })
        });
        let gone = || Status::unavailable("the store is shutting down");
        match &self.jobs {
            Jobs::Thread(jobs) => jobs.send(job).map_err(|_| gone())?,
            Jobs::Memory(memory) => memory.with(job)(Ok(())),
        }
        result.await.map_err(|_| gone())?
    }

    /// The revision that is on disk, and news of it.
    pub(super) fn revision(&self) -> watch::Receiver<i64> {
        self.revision.clone()
    }
}

fn run(mut state: State, mut disk: Disk, inbox: &Receiver<Job>, publish: &watch::Sender<i64>) {
    loop {
        let wait = state.next_expiry().map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        let first = match inbox.recv_timeout(wait) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let now = Instant::now();
        state.expire(now);
        let jobs = first.into_iter().chain(inbox.try_iter()).take(BATCH);
        let answers: Vec<Answer> = jobs.map(|job| job(&mut state, now)).collect();

        let changes = state.take_changes();
        let written = if changes.is_empty() { Ok(()) } else { disk.write(&changes, state.revision()) };
        let fate = match written {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "cannot write the store's file: the requests are refused and the store ends");
                Err(Status::unavailable(format!("the store cannot write its file: {error}")))
            }
        };
        for answer in answers {
            answer(fate.clone());
        }
        // Memory is ahead of the disk now, and the database refuses to go on: the next start reads what is there.
        if fate.is_err() {
            return;
        }
        publish.send_if_modified(|revision| std::mem::replace(revision, state.revision()) != state.revision());
    }
}
