//! Linux networking I/O: netlink, nftables, sysctls and namespaces. All calls are synchronous. All of the project's `unsafe` code (in
//! `sys`) and all of its dependencies on Linux are here.
//!
//! [`Kernel`] belongs to one thread: it reads the kernel into a [`flannel::Observed`] and executes [`flannel::Op`]s, in order, with an
//! outcome for each. It does not decide, retry or sort. [`Monitor`] reports changes that other programs make. The remaining modules
//! serve the CNI plugins and the lab.

pub mod addr;
pub mod capture;
pub mod child;
pub mod command;
pub mod conntrack;
pub mod endpoints;
mod facts;
pub mod file;
mod inspect;
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
pub mod probe;
pub mod process;
pub mod qdisc;
pub mod route;
pub mod sockets;
#[expect(unsafe_code, reason = "the one file that calls libc directly")]
mod sys;
pub mod sysctl;
mod tunnel;
pub mod wireguard;

use std::collections::BTreeMap;

use flannel::IfName;
use netlink::{NetlinkError, Protocol, Socket};

pub use monitor::{Author, Changed, KernelEvent, Monitor};
pub use tunnel::Drops;

/// Access to the kernel's state of one network namespace, for one thread.
#[derive(Debug)]
pub struct Kernel {
    route: Socket,
    /// Opened at the first access to a ruleset: a host without traffic rules needs no nf_tables.
    netfilter: Option<Socket>,
    iptables: iptables::Cache,
    /// The networks that identify the daemon's rules in chains that it shares with others.
    networks: Vec<flannel::Subnet>,
    /// The udp backend's data path, while it is running.
    tunnel: Option<tunnel::Tunnel>,
    /// WireGuard devices, and this host's key for them.
    wireguard: wireguard::WireGuard,
    /// The packets that the data path dropped, in all tunnels since the start.
    drops: Drops,
    /// Peers for which the commands of the extension backend were run.
    extension: BTreeMap<flannel::LeaseKey, flannel::backend::extension::ExtensionPeer>,
    /// The error of a read that did not fail as a whole.
    read_error: Option<String>,
    /// What the last inspections found.
    inspection: inspect::Memory,
    /// Interface indexes, valid during one call: they change when another program recreates a link.
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
            wireguard: wireguard::WireGuard::default(),
            drops: Drops::default(),
            extension: BTreeMap::new(),
            read_error: None,
            inspection: inspect::Memory::default(),
            indexes: BTreeMap::new(),
        })
    }

    /// The netlink port of the route socket: notifications that carry it are echoes of the daemon's own changes.
    pub fn port(&self) -> u32 {
        self.route.port()
    }

    /// The object that the last [`Kernel::observe`] could not read, with the reason.
    pub fn take_read_error(&mut self) -> Option<String> {
        self.read_error.take()
    }

    /// The counters of packets that the udp backend dropped.
    pub fn drops(&self) -> Drops {
        self.drops.clone()
    }

    /// The udp backend's data path, if it is running on this link.
    fn running_tunnel(&self, link: &link::LinkInfo) -> Option<&tunnel::Tunnel> {
        self.tunnel.as_ref().filter(|tunnel| tunnel.name == link.name && link.kind == "tun" && tunnel.is_running())
    }

    /// Gives this host's private key for WireGuard devices.
    pub fn set_wireguard_key(&mut self, key: flannel::wireguard::PrivateKey) {
        self.wireguard.set_key(key);
    }

    fn netfilter(&mut self) -> Result<&mut Socket, NetlinkError> {
        match &mut self.netfilter {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(Socket::open(Protocol::Netfilter)?)),
        }
    }
}
