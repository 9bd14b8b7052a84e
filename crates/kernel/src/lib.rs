//! Touches. Netlink, nftables, sysctl and namespaces, synchronous, with all of the project's `unsafe` code (in
//! `sys`) and all of its dependencies on Linux.
//!
//! [`Kernel`] belongs to one thread: it reads the kernel into a [`flannel::Observed`] and executes [`flannel::Op`]s,
//! in order, with an outcome for each. It decides nothing, retries nothing and sorts nothing. [`Monitor`] hears what
//! others change. The remaining modules serve the CNI plugins and the lab.

pub mod addr;
pub mod capture;
pub mod child;
pub mod command;
pub mod conntrack;
mod facts;
pub mod file;
pub mod iptables;
pub mod link;
pub mod lock;
pub mod monitor;
pub mod mounts;
pub mod neigh;
pub mod netlink;
pub mod netns;
pub mod nft;
mod object;
pub mod pod_rules;
pub mod pod_table;
pub mod process;
pub mod qdisc;
pub mod route;
#[expect(unsafe_code, reason = "the one file that speaks to libc")]
mod sys;
pub mod sysctl;
mod tunnel;

use std::collections::BTreeMap;

use flannel::IfName;
use netlink::{NetlinkError, Protocol, Socket};

pub use monitor::{Author, Changed, KernelEvent, Monitor};

/// The kernel of the network namespace in which it was opened, as one thread reads and writes it.
#[derive(Debug)]
pub struct Kernel {
    route: Socket,
    /// Opened when the first ruleset is asked for: a host without traffic rules needs no nf_tables.
    netfilter: Option<Socket>,
    iptables: iptables::Cache,
    /// Networks by which rules in chains that are shared with others are told to be ours.
    networks: Vec<flannel::Subnet>,
    /// The udp backend's data path, while it runs.
    tunnel: Option<tunnel::Tunnel>,
    /// Peers for which the extension's commands were run.
    extension: BTreeMap<flannel::LeaseKey, flannel::backend::extension::ExtensionPeer>,
    /// What could not be read, and is not vital.
    trouble: Option<String>,
    /// Interface indexes, valid during one call: they change when somebody creates a link anew.
    indexes: BTreeMap<IfName, u32>,
}

impl Kernel {
    /// Opens the sockets in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses a netlink socket.
    pub fn open() -> Result<Kernel, NetlinkError> {
        Ok(Kernel {
            route: Socket::open(Protocol::Route)?,
            netfilter: None,
            iptables: iptables::Cache::default(),
            networks: Vec::new(),
            tunnel: None,
            extension: BTreeMap::new(),
            trouble: None,
            indexes: BTreeMap::new(),
        })
    }

    /// The netlink port of the route socket: notifications that carry it are echoes of our own changes.
    pub fn port(&self) -> u32 {
        self.route.port()
    }

    /// What the last [`Kernel::observe`] could not read and left out, in words.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// The udp backend's data path, if it runs on this link.
    fn running_tunnel(&self, link: &link::LinkInfo) -> Option<&tunnel::Tunnel> {
        self.tunnel.as_ref().filter(|tunnel| tunnel.name == link.name && link.kind == "tun" && tunnel.is_running())
    }

    fn netfilter(&mut self) -> Result<&mut Socket, NetlinkError> {
        match &mut self.netfilter {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(Socket::open(Protocol::Netfilter)?)),
        }
    }
}
