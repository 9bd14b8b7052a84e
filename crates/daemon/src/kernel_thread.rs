//! The threads that speak to the kernel. The fast one writes and reads all that the kernel answers at once, and never waits for a lock or a
//! child process; the slow one does the rest ([`Lane`]), so that a command that hangs delays no repair. Each owns its sockets; a queue
//! leads in, an answer comes out of each job. A third thread reads the facts for the checks, which may take long on a host with many
//! routes and rules; a fourth listens to the kernel's notifications.

use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel::backend::extension::Command;
use flannel::check::{Expected, HostFacts};
use flannel::object::{EnvFile, Lane, Link};
use flannel::scope::Scope;
use flannel::wireguard::PublicKey;
use flannel::{IfName, Observed, Op, Outcome};
use kernel::netlink::NetlinkError;
use kernel::{Drops, Kernel, Monitor};
use tokio::sync::{mpsc, oneshot};

use crate::host::{Host, HostNetwork, Notifications};

type Job = Box<dyn FnOnce(&mut Kernel) + Send>;

/// A handle to the threads, which end with the last handle.
#[derive(Debug, Clone)]
pub struct KernelThread {
    fast: Sender<Job>,
    slow: Sender<Job>,
    checks: Sender<Job>,
    /// The netlink port of the fast thread's socket.
    port: u32,
    drops: Drops,
    /// The last part that could not be read, so that it is not logged each time.
    unreadable: Arc<Mutex<Option<String>>>,
}

impl KernelThread {
    /// Starts the threads in the network namespace of the caller.
    ///
    /// # Errors
    /// When the kernel refuses a netlink socket.
    pub fn start() -> Result<KernelThread, NetlinkError> {
        let kernel = Kernel::open()?;
        let (port, drops) = (kernel.port(), kernel.drops());
        let (fast, slow) = (spawn("kernel", kernel)?, spawn("kernel-slow", Kernel::open()?)?);
        let checks = spawn("kernel-checks", Kernel::open()?)?;
        Ok(KernelThread { fast, slow, checks, port, drops, unreadable: Arc::default() })
    }

    /// Waits until the jobs that are queued now are done, up to a limit: a batch that has begun is finished.
    pub async fn finish(&self, limit: Duration) {
        let both = async { tokio::join!(self.call(Lane::Fast, |_| ()), self.call(Lane::Slow, |_| ())) };
        if tokio::time::timeout(limit, both).await.is_err() {
            tracing::warn!(seconds = limit.as_secs(), "kernel operations still running at exit");
        }
    }

    /// Runs a function on the kernel. It is in the queue before its end is waited for.
    fn call<T: Send + 'static, F>(&self, lane: Lane, f: F) -> impl Future<Output = T> + use<T, F>
    where
        F: FnOnce(&mut Kernel) -> T + Send + 'static,
    {
        ask(
            match lane {
                Lane::Fast => &self.fast,
                Lane::Slow => &self.slow,
            },
            f,
        )
    }
}

/// Puts a job into the queue of a thread.
fn ask<T: Send + 'static, F>(jobs: &Sender<Job>, f: F) -> impl Future<Output = T> + use<T, F>
where
    F: FnOnce(&mut Kernel) -> T + Send + 'static,
{
    let (reply, answer) = oneshot::channel();
    let job: Job = Box::new(move |kernel| {
        // The caller may have stopped waiting; the job is done all the same.
        let _ = reply.send(f(kernel));
    });
    let alive = "a kernel thread ends with its last handle, and its panic ends the process";
    if jobs.send(job).is_err() {
        unreachable!("{alive}");
    }
    async move { answer.await.expect(alive) }
}

fn spawn(name: &str, mut kernel: Kernel) -> Result<Sender<Job>, NetlinkError> {
    let (jobs, inbox) = std::sync::mpsc::channel::<Job>();
    let work = move || inbox.into_iter().for_each(|job| job(&mut kernel));
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(|error| NetlinkError::Socket("start its thread", error))?;
    Ok(jobs)
}

impl Host for KernelThread {
    fn watch(&self, scope: Scope, external: IfName) -> Result<Notifications, NetlinkError> {
        listen(Monitor::open(scope, external, self.port)?)
    }

    fn observe(&self, scope: Scope, lane: Lane) -> impl Future<Output = Result<Observed, NetlinkError>> + use<> {
        let unreadable = Arc::clone(&self.unreadable);
        let read = self.call(lane, move |kernel| (kernel.observe_lane(&scope, lane), kernel.take_read_error()));
        async move {
            let (observed, trouble) = read.await;
            // Only the slow lane has parts that may be unreadable without harm to the rest.
            if lane == Lane::Slow
                && std::mem::replace(&mut *unreadable.lock().unwrap_or_else(PoisonError::into_inner), trouble.clone()) != trouble
                && let Some(trouble) = trouble
            {
                tracing::warn!(%trouble, "cannot read object");
            }
            observed
        }
    }

    fn apply(&self, ops: Vec<Op>, lane: Lane) -> impl Future<Output = Vec<(Op, Outcome)>> + use<> {
        self.call(lane, move |kernel| {
            let outcomes = kernel.apply(&ops);
            ops.into_iter().zip(outcomes).collect()
        })
    }

    async fn network(&self, reach: Option<IpAddr>) -> Result<HostNetwork, NetlinkError> {
        self.call(Lane::Fast, move |kernel| {
            let reach = reach.map(|ip| (ip, kernel.reach(ip).map_err(|error| error.to_string())));
            Ok(HostNetwork { interfaces: kernel.interfaces()?, routes: kernel.route_facts()?, reach })
        })
        .await
    }

    async fn link(&self, name: IfName) -> Result<Option<Link>, NetlinkError> {
        self.call(Lane::Fast, move |kernel| kernel.link(name)).await
    }

    fn inspect(&self, expected: Expected) -> impl Future<Output = (HostFacts, Duration)> + use<> {
        ask(&self.checks, move |kernel| {
            let began = kernel::process::thread_cpu_time();
            let facts = kernel.inspect(&expected);
            (facts, kernel::process::thread_cpu_time().saturating_sub(began))
        })
    }

    fn env_file(&self, path: &Path) -> Option<EnvFile> {
        kernel::file::read_env(path)
    }

    async fn wireguard_key(&self, file: &Path) -> Result<PublicKey, String> {
        let file = file.to_owned();
        self.call(Lane::Fast, move |kernel| {
            let key = kernel::wireguard::key_file(&file)?;
            let public = key.public();
            kernel.set_wireguard_key(key);
            Ok(public)
        })
        .await
    }

    fn drops(&self) -> Drops {
        self.drops.clone()
    }

    async fn run(&self, command: Command) -> anyhow::Result<String> {
        Ok(self.call(Lane::Slow, move |_| kernel::command::run(&command)).await?)
    }
}

/// Starts the thread that listens. While the loop takes no notifications it waits; those that the kernel cannot keep meanwhile become
/// [`kernel::Changed::Everything`]. It ends with the receiver, or with the first error that it sends.
///
/// # Errors
/// When there can be no thread.
fn listen(mut monitor: Monitor) -> Result<Notifications, NetlinkError> {
    let (tell, news) = mpsc::channel(4);
    let work = move || {
        loop {
            let events = monitor.wait().and_then(|()| monitor.drain());
            let last = events.is_err();
            let nothing = events.as_ref().is_ok_and(Vec::is_empty);
            if !nothing && tell.blocking_send(events).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new().name("monitor".to_owned()).spawn(work).map_err(|error| NetlinkError::Socket("start its thread", error))?;
    Ok(news)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn finish_waits_for_queued_jobs_of_both_lanes_up_to_its_limit() {
        let threads = KernelThread::start().unwrap();
        let done = Arc::new(AtomicU32::new(0));
        for lane in [Lane::Fast, Lane::Slow, Lane::Fast] {
            let done = Arc::clone(&done);
            // The caller does not wait, as when the loop is dropped at SIGTERM.
            drop(threads.call(lane, move |_| {
                std::thread::sleep(Duration::from_millis(20));
                done.fetch_add(1, Ordering::SeqCst);
            }));
        }
        threads.finish(Duration::from_secs(10)).await;
        assert_eq!(done.load(Ordering::SeqCst), 3);
        drop(threads.call(Lane::Slow, |_| std::thread::sleep(Duration::from_secs(1))));
        let began = std::time::Instant::now();
        threads.finish(Duration::from_millis(50)).await;
        assert!(began.elapsed() < Duration::from_millis(900), "a hanging command does not hold up the exit");
    }

    #[tokio::test]
    async fn a_hanging_slow_job_delays_no_fast_one() {
        let threads = KernelThread::start().unwrap();
        drop(threads.call(Lane::Slow, |_| std::thread::sleep(Duration::from_secs(1))));
        let began = std::time::Instant::now();
        threads.call(Lane::Fast, |_| ()).await;
        assert!(began.elapsed() < Duration::from_millis(900));
    }
}
