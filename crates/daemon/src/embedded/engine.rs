//! The thread that owns the state and the file. Requests that wait together are executed together: one transaction on disk
//! acknowledges many.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot, watch};
use tonic::Status;

use super::disk::Disk;
use super::limits;
use super::state::{Saved, State};

/// Jobs in one transaction: enough to share a write among all that wait, few enough to answer soon.
const BATCH: usize = 256;
/// After this long without a request, or this long with them, freed memory is given back to the kernel.
const RELEASE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// Executed on the state; the function that it returns is called with the outcome of the transaction, and answers.
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
    Thread(Sender<Job>, Arc<Semaphore>),
    /// At once, on a state that is in memory alone.
    Memory(Memory),
}

/// A store that is in memory alone and uses tokio's clock, which tests control. Clones are the same store.
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
        // A channel for each: the order in which several receivers of one are woken is random, and a simulation must not be.
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (publish, revision) = watch::channel(inner.0.revision());
        inner.1.push(publish);
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
        let queue = Arc::new(Semaphore::new(limits::QUEUE));
        Ok(Engine { jobs: Jobs::Thread(jobs, queue), revision })
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
                // The client may have gone away; the change stands.
                let _ = reply.send(written.and(outcome));
            })
        });
        let gone = || Status::unavailable("the store is shutting down");
        match &self.jobs {
            Jobs::Thread(jobs, queue) => {
                // The place goes with the job, because a client that goes away does not take its job out of the queue.
                let place = queue.clone().acquire_owned().await.map_err(|_| gone())?;
                let job: Job = Box::new(move |state, now| {
                    drop(place);
                    job(state, now)
                });
                jobs.send(job).map_err(|_| gone())?;
            }
            Jobs::Memory(memory) => memory.with(job)(Ok(())),
        }
        result.await.map_err(|_| gone())?
    }

    /// The revision that is on disk, and its changes.
    pub(super) fn revision(&self) -> watch::Receiver<i64> {
        self.revision.clone()
    }
}

fn run(mut state: State, mut disk: Disk, inbox: &Receiver<Job>, publish: &watch::Sender<i64>) {
    let mut released = Instant::now();
    let mut is_dirty = false;
    loop {
        let idle = if is_dirty { RELEASE.0 } else { Duration::from_secs(3600) };
        let wait = state.next_expiry().map_or(idle, |at| at.saturating_duration_since(Instant::now()).min(idle));
        let first = match inbox.recv_timeout(wait) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let now = Instant::now();
        if is_dirty && (first.is_none() || now.duration_since(released) > RELEASE.1) {
            kernel::process::release_memory();
            (is_dirty, released) = (false, now);
        }
        is_dirty |= first.is_some();
        state.expire(now);
        let jobs = first.into_iter().chain(inbox.try_iter()).take(BATCH);
        let answers: Vec<Answer> = jobs.map(|job| job(&mut state, now)).collect();

        let changes = state.take_changes();
        let written = if changes.is_empty() { Ok(()) } else { disk.write(&changes, state.revision()) };
        let outcome = match written {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "failed to write the store's file; requests are refused and the store exits");
                Err(Status::unavailable(format!("the store cannot write its file: {error}")))
            }
        };
        for answer in answers {
            answer(outcome.clone());
        }
        // Memory is ahead of the disk now, and the database refuses to go on: the next start reads the file.
        if outcome.is_err() {
            return;
        }
        publish.send_if_modified(|revision| std::mem::replace(revision, state.revision()) != state.revision());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_that_wait_are_bounded_and_none_is_lost() {
        let folder = std::env::temp_dir().join(format!("flannel-engine-{}", std::process::id()));
        let engine = Engine::start(Disk::open(&folder, 1).unwrap()).unwrap();
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let blocked = engine.clone();
        let mut calls =
            vec![tokio::spawn(async move { blocked.call(move |_, _| gate.recv().map_err(|_| Status::internal("no gate"))).await })];
        for _ in 0..limits::QUEUE + 10 {
            let engine = engine.clone();
            calls.push(tokio::spawn(async move { engine.call(|_, _| Ok(())).await }));
        }
        let Jobs::Thread(_, queue) = &engine.jobs else { panic!("a thread") };
        // Jobs of one batch leave the queue as they begin, the first of which blocks.
        while queue.available_permits() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        open.send(()).unwrap();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert_eq!(queue.available_permits(), limits::QUEUE);
        drop(engine);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
