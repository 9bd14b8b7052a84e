//! Facts about this host, as the operator wants them read: at the start, and again when the external interface changes.

use std::net::IpAddr;

use flannel::backend::{Identity, Local, Problem};
use flannel::node::{Wanted, check_regex};
use flannel::{Config, Node, PerFamily};
use thiserror::Error;

use crate::host::Host;
use crate::settings::RunArgs;

/// What the operator said about the interface and the addresses to publish.
#[derive(Debug, Clone)]
pub struct Facts {
    wanted: Wanted,
    can_reach: Option<IpAddr>,
    /// Do flags alone say which addresses are published?
    publishes_by_flags: bool,
}

impl Facts {
    /// By the command line, and by what the store says of this node, which goes first.
    ///
    /// # Errors
    /// When an `--iface-regex` is no regular expression.
    pub fn new(args: &RunArgs, stored: &PerFamily<IpAddr>) -> anyhow::Result<Facts> {
        for text in &args.iface_regex {
            check_regex(text).map_err(|error| anyhow::anyhow!("--iface-regex {text}: {error}"))?;
        }
        let wanted = Wanted {
            iface: args.iface.clone(),
            iface_regex: args.iface_regex.clone(),
            can_reach: None,
            current: PerFamily::default(),
            partial: false,
            public: PerFamily { v4: stored.v4.or(args.public_ip), v6: stored.v6.or(args.public_ipv6) },
        };
        Ok(Facts { wanted, can_reach: args.iface_can_reach, publishes_by_flags: stored.is_empty() })
    }

    /// Whether the default route alone says which interface is the external one.
    pub fn follows_default_route(&self) -> bool {
        let Wanted { iface, iface_regex, can_reach: _, current: _, partial: _, public } = &self.wanted;
        iface.is_empty() && iface_regex.is_empty() && self.can_reach.is_none() && public.is_empty()
    }

    /// This host as it is now. `current` are the addresses that are in use, if any are. With `partial` IPv6 is left out if
    /// it has no address.
    ///
    /// # Errors
    /// When the kernel cannot be read, no interface is as it is wanted, or no address family can work on it.
    pub async fn node(&self, host: &impl Host, config: &Config, current: PerFamily<IpAddr>, partial: bool) -> Result<Node, FactsError> {
        let network = host.network(self.can_reach).await;
        let network = network.map_err(|error| FactsError::Passing(format!("cannot read the kernel's interfaces and routes: {error}")))?;
        let wanted = Wanted { can_reach: network.reach, current, partial, ..self.wanted.clone() };
        let node =
            Node::choose(&network.interfaces, &network.routes, &wanted, config).map_err(|error| FactsError::Passing(error.to_string()))?;
        let local = Local { config, node: &node, identity: &Identity::default() };
        let problems: Vec<Option<Problem>> = config.networks.iter().map(|(family, _)| config.backend.problem(local, family)).collect();
        // With one family that works the node works.
        let Some(all) = problems.into_iter().collect::<Option<Vec<Problem>>>() else { return Ok(node) };
        let text = all.iter().map(|problem| problem.text.as_str()).collect::<Vec<_>>().join("; ");
        let by_flags = self.publishes_by_flags && all.iter().all(|problem| problem.is_published_address);
        Err(if by_flags { FactsError::Flags(text) } else { FactsError::Passing(text) })
    }
}

/// Why there are no facts about this host.
#[derive(Debug, Error)]
pub enum FactsError {
    /// It may pass: an interface, an address or a route is missing now.
    #[error("{0}")]
    Passing(String),
    /// Only other flags will help.
    #[error("{0}")]
    Flags(String),
}

/// Addresses for people, IPv4 first.
pub fn list(addrs: &PerFamily<IpAddr>) -> String {
    addrs.iter().map(|(_, ip)| ip.to_string()).collect::<Vec<_>>().join(",")
}
