//! Reads facts about this host: interfaces, routes and single links.

use flannel::IfName;
use flannel::node::Interface;

use crate::netlink::NetlinkError;
use crate::{Kernel, addr, link, route};

impl Kernel {
    /// Reads all interfaces with their addresses, from which the external interface is chosen.
    ///
    /// # Errors
    /// The error that the kernel returns.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, NetlinkError> {
        let addrs = addr::list(&mut self.route, 0)?;
        let mut links = link::list(&mut self.route)?;
        links.sort_by_key(|link| link.index);
        let of = |index| addrs.iter().filter(move |a| a.index == index).map(|a| a.addr).collect();
        Ok(links.iter().map(|link| Interface { index: link.index, name: link.name, mtu: link.mtu, addrs: of(link.index) }).collect())
    }

    /// Reads the unicast routes of the main table, from which the external interface is chosen.
    ///
    /// # Errors
    /// The error that the kernel returns.
    pub fn route_facts(&mut self) -> Result<Vec<flannel::node::RouteFact>, NetlinkError> {
        route::facts(&mut self.route)
    }

    /// Looks up the route to an address.
    ///
    /// # Errors
    /// The error that the kernel returns, such as `ENETUNREACH`.
    pub fn reach(&mut self, ip: std::net::IpAddr) -> Result<flannel::node::Reach, NetlinkError> {
        route::reach(&mut self.route, ip)
    }

    /// Reads one link by name; `None` if it does not exist.
    ///
    /// # Errors
    /// The error that the kernel returns.
    pub fn link(&mut self, name: IfName) -> Result<Option<flannel::object::Link>, NetlinkError> {
        let Some(info) = link::get(&mut self.route, name)? else { return Ok(None) };
        let lower = info.vxlan.map(|vxlan| link::get_index(&mut self.route, vxlan.lower)).transpose()?.flatten();
        Ok(Some(link::to_object(&info, |index| lower.as_ref().filter(|lower| lower.index == index).map(|lower| lower.name))))
    }
}
