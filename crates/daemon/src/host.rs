//! The host that a node runs on, as the loop sees it: its kernel's state, its notifications, and a way to change it. The
//! real one is [`KernelThread`](crate::kernel_thread::KernelThread); the simulation has another, without a kernel.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use flannel::backend::extension::Command;
use flannel::check::{Expected, HostFacts};
use flannel::node::{Interface, Reach, RouteFact};
use flannel::object::Lane;
use flannel::object::{EnvFile, Link};
use flannel::scope::Scope;
use flannel::wireguard::PublicKey;
use flannel::{IfName, Observed, Op, Outcome};
use kernel::netlink::NetlinkError;
use kernel::{Drops, KernelEvent};
use tokio::sync::mpsc;

/// What the host tells, in the order in which it tells it.
pub type Notifications = mpsc::Receiver<Result<Vec<KernelEvent>, NetlinkError>>;

/// The facts from which the external interface is chosen.
#[derive(Debug, Clone, Default)]
pub struct HostNetwork {
    /// All interfaces.
    pub interfaces: Vec<Interface>,
    /// The main table's unicast routes.
    pub routes: Vec<RouteFact>,
    /// How the kernel would reach the address that was asked for.
    pub reach: Option<(IpAddr, Result<Reach, String>)>,
}

/// A host.
pub trait Host {
    /// Subscribes to what changes in `scope` and at the external interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn watch(&self, scope: Scope, external: IfName) -> Result<Notifications, NetlinkError>;

    /// Reads what of `scope` is there, of the kinds of one lane.
    ///
    /// # Errors
    /// When the kernel refuses to be read.
    fn observe(&self, scope: Scope, lane: Lane) -> impl Future<Output = Result<Observed, NetlinkError>> + use<Self>;

    /// Executes operations of one lane and returns them with their outcomes. They begin at once, as far as the host can, not when they
    /// are waited for; of one lane, those that are begun later are executed later.
    fn apply(&self, ops: Vec<Op>, lane: Lane) -> impl Future<Output = Vec<(Op, Outcome)>> + use<Self>;

    /// Reads interfaces and routes, and asks how `reach` is reached.
    ///
    /// # Errors
    /// When the kernel refuses to be read.
    fn network(&self, reach: Option<IpAddr>) -> impl Future<Output = Result<HostNetwork, NetlinkError>>;

    /// One link by name.
    ///
    /// # Errors
    /// When the kernel refuses to be read.
    fn link(&self, name: IfName) -> impl Future<Output = Result<Option<Link>, NetlinkError>>;

    /// Reads the facts for the checks, and returns the processor time that it took. No repair waits for it.
    fn inspect(&self, expected: Expected) -> impl Future<Output = (HostFacts, Duration)> + use<Self>;

    /// The file for the CNI plugins, if one is there.
    fn env_file(&self, path: &Path) -> Option<EnvFile>;

    /// Reads this host's WireGuard key from its file, which is created if it is missing, and returns the public part. Devices are given the
    /// private part, which no object has.
    ///
    /// # Errors
    /// The file, the problem and the fix.
    fn wireguard_key(&self, file: &Path) -> impl Future<Output = Result<PublicKey, String>>;

    /// The counters of packets that the udp backend dropped.
    fn drops(&self) -> Drops {
        Drops::default()
    }

    /// Runs one of the extension's commands and returns what it prints.
    ///
    /// # Errors
    /// When it fails; the text is its own.
    fn run(&self, command: Command) -> impl Future<Output = anyhow::Result<String>>;
}
