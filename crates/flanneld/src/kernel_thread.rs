//! The one thread of the daemon that writes to the kernel: it owns the sockets, a bounded channel leads in, an answer
//! comes out of each command. And the one that listens: what it hears goes out by a bounded channel.

use flannel::desired::Scope;
use flannel::{Observed, Op, Outcome};
use kernel::netlink::NetlinkError;
use kernel::{Changed, Kernel, Monitor};
use tokio::sync::{mpsc, oneshot};

type Job = Box<dyn FnOnce(&mut Kernel) + Send>;

/// A handle to the thread, which ends with the last handle.
#[derive(Debug, Clone)]
pub struct KernelThread {
    jobs: mpsc::Sender<Job>,
    port: u32,
    /// What was said to be unreadable last, so that it is not said each time.
    said: std::cell::RefCell<Option<String>>,
}

impl KernelThread {
    /// Starts the thread in the network namespace of the caller.
    ///
    /// # Errors
    /// When the kernel refuses a netlink socket.
    pub fn start() -> Result<KernelThread, NetlinkError> {
        let mut kernel = Kernel::open()?;
        let port = kernel.port();
        let (jobs, mut inbox) = mpsc::channel::<Job>(4);
        let work = move || {
            while let Some(job) = inbox.blocking_recv() {
                job(&mut kernel);
            }
        };
        std::thread::Builder::new()
            .name("kernel".to_owned())
            .spawn(work)
            .map_err(|error| NetlinkError::Socket("start its thread", error))?;
        Ok(KernelThread { jobs, port, said: std::cell::RefCell::new(None) })
    }

    /// The netlink port of the thread's socket.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Runs a function on the kernel.
    pub async fn call<T: Send + 'static>(&self, f: impl FnOnce(&mut Kernel) -> T + Send + 'static) -> T {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |kernel| {
            // Who asked may have been stopped; the work is done all the same.
            let _ = reply.send(f(kernel));
        });
        let alive = "the kernel thread ends with its last handle, and its panic ends the process";
        if self.jobs.send(job).await.is_err() {
            unreachable!("{alive}");
        }
        answer.await.expect(alive)
    }

    /// Reads what of `scope` is there.
    ///
    /// # Errors
    /// When the kernel refuses to be read.
    pub async fn observe(&self, scope: Scope) -> Result<Observed, NetlinkError> {
        let (observed, trouble) = self.call(move |kernel| (kernel.observe(&scope), kernel.take_trouble())).await;
        if trouble != self.said.replace(trouble.clone())
            && let Some(trouble) = trouble
        {
            tracing::warn!("cannot read {trouble}; the rest is not affected");
        }
        observed
    }

    /// Executes operations and returns them with their outcomes.
    pub async fn apply(&self, ops: Vec<Op>) -> Vec<(Op, Outcome)> {
        self.call(move |kernel| {
            let outcomes = kernel.apply(&ops);
            ops.into_iter().zip(outcomes).collect()
        })
        .await
    }
}

/// What the kernel tells, in the order in which it tells it.
pub type News = mpsc::Receiver<Result<Vec<Changed>, NetlinkError>>;

/// Starts the thread that listens. While nobody takes its news it waits; what the kernel cannot keep meanwhile becomes
/// [`Changed::Everything`]. It ends with the receiver, or with the first error that it sends.
///
/// # Errors
/// When there can be no thread.
pub fn listen(mut monitor: Monitor) -> Result<News, NetlinkError> {
    let (tell, news) = mpsc::channel(4);
    let work = move || {
        loop {
            let heard = monitor.wait().and_then(|()| monitor.drain());
            let last = heard.is_err();
            let nothing = heard.as_ref().is_ok_and(Vec::is_empty);
            if !nothing && tell.blocking_send(heard).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new().name("monitor".to_owned()).spawn(work).map_err(|error| NetlinkError::Socket("start its thread", error))?;
    Ok(news)
}
