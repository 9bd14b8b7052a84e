//! The one thread of the daemon that writes to the kernel: it owns the sockets, a queue leads in (as long as what its callers wait
//! for), an answer comes out of each command. And the one that listens: what it hears goes out by a bounded channel.

use std::net::IpAddr;
use std::path::Path;

use flannel::backend::extension::Command;
use flannel::desired::{EnvFile, Link, Scope};
use flannel::{IfName, Observed, Op, Outcome};
use kernel::netlink::NetlinkError;
use kernel::{Kernel, Monitor};
use tokio::sync::{mpsc, oneshot};

use crate::host::{Host, News, Surroundings};

type Job = Box<dyn FnOnce(&mut Kernel) + Send>;

/// A handle to the thread, which ends with the last handle.
#[derive(Debug, Clone)]
pub struct KernelThread {
    jobs: std::sync::mpsc::Sender<Job>,
    /// The netlink port of the thread's socket.
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
        let (jobs, inbox) = std::sync::mpsc::channel::<Job>();
        let work = move || inbox.into_iter().for_each(|job| job(&mut kernel));
        std::thread::Builder::new()
            .name("kernel".to_owned())
            .spawn(work)
            .map_err(|error| NetlinkError::Socket("start its thread", error))?;
        Ok(KernelThread { jobs, port, said: std::cell::RefCell::new(None) })
    }

    /// Runs a function on the kernel. It is in the queue before its end is waited for.
    fn call<T: Send + 'static, F>(&self, f: F) -> impl Future<Output = T> + use<T, F>
    where
        F: FnOnce(&mut Kernel) -> T + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |kernel| {
            // Who asked may have been stopped; the work is done all the same.
            let _ = reply.send(f(kernel));
        });
        let alive = "the kernel thread ends with its last handle, and its panic ends the process";
        if self.jobs.send(job).is_err() {
            unreachable!("{alive}");
        }
        async move { answer.await.expect(alive) }
    }
}

impl Host for KernelThread {
    fn watch(&self, scope: Scope, external: IfName) -> Result<News, NetlinkError> {
        listen(Monitor::open(scope, external, self.port)?)
    }

    async fn observe(&self, scope: Scope) -> Result<Observed, NetlinkError> {
        let (observed, trouble) = self.call(move |kernel| (kernel.observe(&scope), kernel.take_trouble())).await;
        if trouble != self.said.replace(trouble.clone())
            && let Some(trouble) = trouble
        {
            tracing::warn!("cannot read {trouble}; the rest is not affected");
        }
        observed
    }

    fn apply(&self, ops: Vec<Op>) -> impl Future<Output = Vec<(Op, Outcome)>> + use<> {
        self.call(move |kernel| {
            let outcomes = kernel.apply(&ops);
            ops.into_iter().zip(outcomes).collect()
        })
    }

    async fn surroundings(&self, reach: Option<IpAddr>) -> Result<Surroundings, NetlinkError> {
        self.call(move |kernel| {
            let reach = reach.map(|ip| (ip, kernel.reach(ip).map_err(|error| error.to_string())));
            Ok(Surroundings { interfaces: kernel.interfaces()?, routes: kernel.route_facts()?, reach })
        })
        .await
    }

    async fn link(&self, name: IfName) -> Result<Option<Link>, NetlinkError> {
        self.call(move |kernel| kernel.link(name)).await
    }

    fn env_file(&self, path: &Path) -> Option<EnvFile> {
        kernel::file::read_env(path)
    }

    async fn run(&self, command: Command) -> anyhow::Result<String> {
        Ok(self.call(move |_| kernel::command::run(&command)).await?)
    }
}

/// Starts the thread that listens. While nobody takes its news it waits; what the kernel cannot keep meanwhile becomes
/// [`kernel::Changed::Everything`]. It ends with the receiver, or with the first error that it sends.
///
/// # Errors
/// When there can be no thread.
fn listen(mut monitor: Monitor) -> Result<News, NetlinkError> {
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
