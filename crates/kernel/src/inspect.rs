//! Gathers the facts for the checks (`flannel::check`): reads, and judges nothing. A part that cannot be read is named in
//! [`HostFacts::unreadable`].

mod files;
mod filter;
mod legacy;
mod namespaces;
mod routing;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use flannel::check::{Address, Expected, HostFacts, SeenLink};
use flannel::object::LinkKind;
use flannel::{Family, IfName};

use crate::link::LinkInfo;
use crate::netlink::NetlinkError;
use crate::{Kernel, addr, link};

/// What an inspection remembers for the next ones.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Since when an address has been tentative.
    tentative: BTreeMap<(IfName, IpAddr), Instant>,
    /// Counts of packets that reverse-path filtering dropped, oldest first.
    rp_dropped: Vec<(Instant, u64)>,
}

/// Drops of reverse-path filtering count for so long.
const RP_WINDOW: Duration = Duration::from_secs(150);

impl Kernel {
    /// Reads the facts about this host that the checks need.
    pub fn inspect(&mut self, expected: &Expected) -> HostFacts {
        let mut facts = HostFacts::default();
        let links = match link::list(&mut self.route) {
            Ok(links) => links,
            Err(error) => {
                facts.unreadable.push(format!("links: {error}"));
                return facts;
            }
        };
        facts.links = links.iter().map(|link| seen(link, &links)).collect();
        note(&mut facts, "addresses", self.addresses(&links), |facts, found| facts.addresses = found);
        let names: BTreeMap<u32, IfName> = links.iter().map(|link| (link.index, link.name)).collect();
        let routing = routing::read(&mut self.route, expected, &names);
        note(&mut facts, "routes and rules", routing, |facts, found| {
            (facts.routes, facts.defaults, facts.rules, facts.tables) = (found.routes, found.defaults, found.rules, found.tables);
        });
        self.inspect_filters(&names, &mut facts);
        if lacks_device(expected, &facts) {
            facts.elsewhere = namespaces::search(expected);
        }
        self.inspect_files(expected, &links, &mut facts);
        facts
    }

    fn addresses(&mut self, links: &[LinkInfo]) -> Result<Vec<Address>, NetlinkError> {
        let found = addr::list(&mut self.route, 0)?;
        let (now, mut tentative) = (Instant::now(), BTreeMap::new());
        let mut addresses = Vec::new();
        for info in found {
            let Some(link) = links.iter().find(|link| link.index == info.index).map(|link| link.name) else { continue };
            let key = (link, info.addr.cidr.addr);
            let since =
                info.tentative.then(|| *tentative.entry(key).or_insert(self.inspection.tentative.get(&key).copied().unwrap_or(now)));
            let seconds = since.map(|since| u32::try_from(now.duration_since(since).as_secs()).unwrap_or(u32::MAX));
            addresses.push(Address { link, cidr: info.addr.cidr, duplicate: info.duplicate, tentative: seconds });
        }
        self.inspection.tentative = tentative;
        Ok(addresses)
    }

    fn inspect_filters(&mut self, names: &BTreeMap<u32, IfName>, facts: &mut HostFacts) {
        match self.netfilter().and_then(|socket| filter::read(socket, names)) {
            Ok(found) => (facts.filter, facts.has_kube_proxy) = (found.chains, found.has_kube_proxy),
            Err(error) if crate::nft::is_without_nf_tables(&error) => {}
            Err(error) => facts.unreadable.push(format!("nf_tables: {error}")),
        }
        for family in Family::ALL {
            match legacy::forward(family) {
                Ok(None) => {}
                Ok(Some(chain)) => {
                    let mut filter = facts.filter.get(family).cloned().unwrap_or_default();
                    filter.chains.push(chain);
                    facts.filter.set(family, Some(filter));
                }
                Err(error) => facts.unreadable.push(format!("ip_tables for {family}: {error}")),
            }
        }
        facts.has_kube_proxy |= legacy::has_kube_proxy() || facts.links.iter().any(|link| link.name.as_str() == "kube-ipvs0");
    }

    fn inspect_files(&mut self, expected: &Expected, links: &[LinkInfo], facts: &mut HostFacts) {
        let root = Path::new("/");
        let devices = expected.links.iter().map(|link| link.name).chain(expected.bridge);
        let ours: Vec<&LinkInfo> = devices.filter_map(|name| links.iter().find(|link| link.name == name)).collect();
        let path = expected.external.and_then(|name| links.iter().find(|link| link.name == name)).into_iter().chain(ours.iter().copied());
        let path: Vec<IfName> = path.map(|link| link.name).collect();
        facts.rp_filter = path.iter().filter_map(|name| Some((*name, files::rp_filter(root, *name)?))).collect();
        facts.rp_dropped = self.rp_dropped(files::rp_dropped(root));
        facts.ipv6_disabled = path.iter().copied().filter(|name| files::is_ipv6_disabled(root, *name)).collect();
        facts.bridge_calls = files::bridge_calls(root);
        facts.conntrack = files::conntrack(root);
        let entries = |family| self.transient_neighbours(family);
        facts.neighbours = files::neighbours(root, entries);
        facts.managed = ours.iter().flat_map(|link| files::managers(root, link.index).into_iter().map(|by| (link.name, by))).collect();
    }

    /// Entries of the neighbour table that count against its limit; the daemon's permanent ones do not.
    fn transient_neighbours(&mut self, family: Family) -> u64 {
        crate::neigh::count_transient(&mut self.route, family).ok().and_then(|count| u64::try_from(count).ok()).unwrap_or(0)
    }

    /// How much the counter has grown within the window.
    fn rp_dropped(&mut self, count: Option<u64>) -> u64 {
        let Some(count) = count else { return 0 };
        let now = Instant::now();
        let samples = &mut self.inspection.rp_dropped;
        // The newest sample outside the window is kept, as its beginning.
        while samples.get(1).is_some_and(|(at, _)| now.duration_since(*at) > RP_WINDOW) {
            samples.remove(0);
        }
        samples.push((now, count));
        count.saturating_sub(samples[0].1)
    }
}

fn seen(link: &LinkInfo, all: &[LinkInfo]) -> SeenLink {
    let is_pod = |port: &LinkInfo| port.master == link.index && port.kind == "veth" && port.reaches_elsewhere;
    SeenLink {
        name: link.name,
        kind: link.kind.clone(),
        vxlan: link.vxlan.map(|vxlan| (vxlan.vni, vxlan.port)),
        has_pods: link.kind == "bridge" && all.iter().any(is_pod),
    }
}

/// Whether a VXLAN device of the daemon is missing here, under any name.
fn lacks_device(expected: &Expected, facts: &HostFacts) -> bool {
    expected.links.iter().any(|link| match link.kind {
        LinkKind::Vxlan { vni, port, .. } => {
            !facts.links.iter().any(|seen| seen.name == link.name || seen.vxlan == Some((vni.get(), port)))
        }
        LinkKind::Ipip { .. } | LinkKind::Udp { .. } | LinkKind::WireGuard { .. } | LinkKind::Other(_) => false,
    })
}

fn note<T>(facts: &mut HostFacts, part: &str, read: Result<T, NetlinkError>, put: impl FnOnce(&mut HostFacts, T)) {
    match read {
        Ok(found) => put(facts, found),
        Err(error) => facts.unreadable.push(format!("{part}: {error}")),
    }
}
