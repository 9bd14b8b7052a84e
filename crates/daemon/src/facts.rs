//! Facts about this host, as the operator wants them read: at the start, and again when the external interface changes.

use std::net::IpAddr;

use anyhow::{Context, bail};
use flannel::config::BackendConfig;
use flannel::node::Wanted;
use flannel::{Config, Node, PerFamily};

use crate::host::Host;
use crate::settings::RunArgs;

/// What the operator said about the interface and the addresses to publish.
#[derive(Debug, Clone)]
pub struct Facts {
    wanted: Wanted,
    can_reach: Option<IpAddr>,
}

impl Facts {
    /// By the command line, and by what the store says of this node, which goes first.
    pub fn new(args: &RunArgs, stored: &PerFamily<IpAddr>) -> Facts {
        let wanted = Wanted {
            iface: args.iface.clone(),
            iface_regex: args.iface_regex.clone(),
            can_reach: None,
            current: PerFamily::default(),
            public: PerFamily { v4: stored.v4.or(args.public_ip), v6: stored.v6.or(args.public_ipv6) },
        };
        Facts { wanted, can_reach: args.iface_can_reach }
    }

    /// This host as it is now. `current` are the addresses that are in use, if any are.
    ///
    /// # Errors
    /// When the kernel cannot be read, or no interface is as it is wanted.
    pub async fn node(&self, host: &impl Host, config: &Config, current: PerFamily<IpAddr>) -> anyhow::Result<Node> {
        let around = host.surroundings(self.can_reach).await.context("cannot read the kernel's interfaces and routes")?;
        let wanted = Wanted { can_reach: around.reach, current, ..self.wanted.clone() };
        let node = Node::choose(&around.interfaces, &around.routes, &wanted, config)?;
        if config.backend == BackendConfig::HostGw && node.public.v4 != node.addrs.v4 {
            bail!(
                "--public-ip (or the annotation node-public-ip): {} is not the address of {}: host-gw needs the interface's own, because peers use it as gateway",
                list(&node.public),
                node.ext
            );
        }
        Ok(node)
    }
}

/// Addresses for people, IPv4 first.
pub fn list(addrs: &PerFamily<IpAddr>) -> String {
    addrs.iter().map(|(_, ip)| ip.to_string()).collect::<Vec<_>>().join(",")
}
