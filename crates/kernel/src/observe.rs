//! Reads what is there, limited to what is ours, into an [`Observed`].

use std::collections::BTreeMap;

use flannel::desired::{Fdb, LinkKind, Neigh, Object, Route, Scope};
use flannel::node::Interface;
use flannel::traffic::iptables::Variant;
use flannel::{Family, IfName, Observed};

use crate::netlink::NetlinkError;
use crate::route::{Filter, RouteInfo};
use crate::{Kernel, addr, bridge, link, neigh, nft, route, sysctl};

impl Kernel {
    /// Reads what of `scope` is there.
    ///
    /// # Errors
    /// When the kernel refuses to be read; then nothing is known, which is not the same as nothing being there.
    pub fn observe(&mut self, scope: &Scope) -> Result<Observed, NetlinkError> {
        // Gathered first: a map that is built in one go is half as large.
        let mut observed: Vec<Object> = Vec::new();
        // All names at once: routes and VXLAN devices refer to interfaces by index.
        let needs_links = !(scope.links.is_empty() && scope.networks.is_empty() && scope.sysctls.is_empty() && scope.gateways.is_empty());
        let links = if needs_links { link::list(&mut self.route)? } else { Vec::new() };
        let names: BTreeMap<u32, IfName> = links.iter().map(|link| (link.index, link.name)).collect();
        let name_of = |index: u32| names.get(&index).copied();
        for info in links.iter().filter(|link| scope.links.contains(&link.name)) {
            let name = info.name;
            let mut object = link::to_object(info, name_of);
            if let Some(tunnel) = self.tunnel.as_ref().filter(|tunnel| tunnel.name == name && info.kind == "tun" && tunnel.is_running()) {
                object.kind = LinkKind::Udp { local: tunnel.local, port: tunnel.port };
                tunnel.entries().into_iter().for_each(|(subnet, host)| observed.push(Object::Forward(subnet, host)));
            }
            observed.push(Object::Link(Box::new(object)));
            for found in addr::list(&mut self.route, info.index)?.iter().filter(|a| a.index == info.index && is_ours(a, scope)) {
                observed.push(Object::Addr(name, found.addr.cidr));
            }
            for entry in neigh::list(&mut self.route, info.index)? {
                observed.push(Object::Neigh(Neigh { link: name, ip: entry.ip, mac: entry.mac }));
            }
            if info.vxlan.is_some() {
                for entry in neigh::list_fdb(&mut self.route, info.index)? {
                    observed.push(Object::Fdb(Fdb { link: name, mac: entry.mac, dst: entry.ip }));
                }
            }
            // Our own routes through it come with all of ours.
            self.observe_routes(Filter::BootOif(info.index), scope, name_of, &mut observed)?;
        }
        bridge::observe(&mut self.route, &links, scope)?.into_iter().for_each(|bridge| observed.push(Object::Bridge(Box::new(bridge))));
        let adopt = scope.adopt.iter().filter_map(|adopt| links.iter().find(|link| link.name == adopt.dev));
        for external in adopt {
            self.observe_routes(Filter::BootOif(external.index), scope, name_of, &mut observed)?;
        }
        self.observe_routes(Filter::Ours, scope, name_of, &mut observed)?;
        if !scope.networks.is_empty() {
            self.extension.values().for_each(|peer| observed.push(Object::Extension(Box::new(peer.clone()))));
        }
        for family in scope.networks.iter().map(|network| network.family()) {
            let blackholes = route::list_blackholes(&mut self.route, family)?;
            let ours = blackholes.into_iter().filter(|dst| scope.networks.iter().any(|network| network.covers(*dst)));
            ours.for_each(|dst| observed.push(Object::Blackhole(dst)));
        }
        for (path, wanted) in &scope.sysctls {
            // What the kernel does not have for a link that is there (IPv6 switched off) cannot be other than it shall be.
            let on_a_link = links.iter().any(|link| path.split('/').any(|part| part == link.name.as_str()));
            let value = sysctl::value(&mut self.route, path).or_else(|| on_a_link.then(|| wanted.clone()));
            value.into_iter().for_each(|value| observed.push(Object::Sysctl(path.clone(), value)));
        }
        scope.file.as_deref().and_then(crate::file::read_env).into_iter().for_each(|file| observed.push(Object::EnvFile(Box::new(file))));
        if scope.pod_rules {
            match self.observe_pod_rules() {
                Ok(wrong) => observed.push(Object::PodRules(wrong)),
                Err(error) => self.trouble = Some(format!("the plugins' rules: {error}")),
            }
        }
        for family in &scope.rulesets {
            match self.netfilter().and_then(|socket| nft::list(socket, *family)) {
                Ok(found) => found.into_iter().for_each(|ruleset| observed.push(Object::Ruleset(ruleset))),
                // A kernel without nf_tables holds no rules.
                Err(error) if matches!(error.errno(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)) => {}
                Err(error) => return Err(error),
            }
        }
        if !scope.networks.is_empty() {
            self.networks = [scope.networks.as_slice(), scope.retired.as_slice()].concat();
        }
        for (family, variant) in scope.iptables.iter().flat_map(|family| Variant::ALL.map(|variant| (*family, variant))) {
            if variant == Variant::Nft && self.netfilter().is_err() {
                continue;
            }
            let Kernel { netfilter, iptables, networks, .. } = self;
            match crate::iptables::observe(netfilter.as_mut(), iptables, family, variant, networks) {
                Ok(found) => found.into_iter().for_each(|rules| observed.push(Object::Iptables(rules))),
                // What cannot be read is as it was, as far as is known; nothing else is to suffer from it.
                Err(error) => self.trouble = Some(format!("{family} rules of iptables-{variant}: {error}")),
            }
        }
        Ok(observed.into_iter().collect())
    }

    fn observe_routes(
        &mut self,
        filter: Filter,
        scope: &Scope,
        name_of: impl Fn(u32) -> Option<IfName>,
        observed: &mut Vec<Object>,
    ) -> Result<(), NetlinkError> {
        if scope.networks.is_empty() {
            return Ok(());
        }
        for family in Family::ALL {
            for found in route::list(&mut self.route, family, filter)? {
                // A route whose interface went away this instant is gone as well.
                let route = name_of(found.oif).map(|dev| to_route(&found, dev));
                route.filter(|route| scope.has_route(route)).into_iter().for_each(|route| observed.push(Object::Route(route)));
            }
        }
        Ok(())
    }

    /// All interfaces with their addresses: the facts from which the external interface is chosen.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, NetlinkError> {
        let addrs = addr::list(&mut self.route, 0)?;
        let mut links = link::list(&mut self.route)?;
        links.sort_by_key(|link| link.index);
        let of = |index| addrs.iter().filter(move |a| a.index == index).map(|a| a.addr).collect();
        Ok(links.iter().map(|link| Interface { index: link.index, name: link.name, mtu: link.mtu, addrs: of(link.index) }).collect())
    }

    /// The unicast routes of the main table: the other facts from which the external interface is chosen.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn route_facts(&mut self) -> Result<Vec<flannel::node::RouteFact>, NetlinkError> {
        route::facts(&mut self.route)
    }

    /// How the kernel would send to an address.
    ///
    /// # Errors
    /// What the kernel answers: that it is unreachable, for one.
    pub fn reach(&mut self, ip: std::net::IpAddr) -> Result<flannel::node::Reach, NetlinkError> {
        route::reach(&mut self.route, ip)
    }

    /// One link by name.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn link(&mut self, name: IfName) -> Result<Option<flannel::desired::Link>, NetlinkError> {
        let Some(info) = link::get(&mut self.route, name)? else { return Ok(None) };
        let lower = info.vxlan.map(|vxlan| link::get_index(&mut self.route, vxlan.lower)).transpose()?.flatten();
        Ok(Some(link::to_object(&info, |index| lower.as_ref().filter(|lower| lower.index == index).map(|lower| lower.name))))
    }
}

/// Does an address on a link of ours count as ours? Of IPv4 those in a pod network: what somebody else put there beside
/// stays. Of IPv6 all but the link-local one that the kernel itself gives (specification, section 5.1).
fn is_ours(info: &addr::AddrInfo, scope: &Scope) -> bool {
    let ip = info.addr.cidr.addr;
    match Family::of(ip) {
        Family::V4 => scope.networks.iter().chain(&scope.retired).any(|network| network.contains(ip)),
        Family::V6 => !info.link_scope,
    }
}

pub(crate) fn to_route(info: &RouteInfo, dev: IfName) -> Route {
    Route { dst: info.dst, metric: info.metric, via: info.via, dev, onlink: info.onlink, protocol: info.protocol }
}
