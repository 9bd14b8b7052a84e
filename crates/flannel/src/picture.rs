//! Folds store events into the desired state of the kernel, one lease at a time. The cost of an event does not depend on the number
//! of leases.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::backend::{Context, Identity, Local, Part, Refusal};
use crate::check::Expected;
use crate::config::Config;
use crate::desired::{Changes, Claims, Desired, Lost, Owner};
use crate::lease::{Age, LeaseKey, LeaseSet, Peer, StoreEvent};
use crate::net::{Cidr, Family, Mac, PerFamily, Subnet};
use crate::node::Node;
use crate::object::bridge::keep;
use crate::object::{AllowedIp, Blackhole, EnvFile, Key, LinkKind, Object, PodRules, Sysctl, WgPeer, route_metric};
use crate::observed::Observed;
use crate::scope::{Adopt, Scope};
use crate::store_trust::is_list_older;
use crate::subnet_env::SubnetEnv;
use crate::traffic::iptables::Variant;
use crate::traffic::{self, Flavour, TrafficConfig};

/// The number of etcd leases that are remembered: the daemon gets another one at each start.
const REMEMBERED: usize = 64;

/// The state of this node: its configuration, the leases of the cluster and the desired kernel objects.
#[derive(Debug, Clone)]
pub struct Picture {
    config: Config,
    node: Node,
    identity: Identity,
    traffic: TrafficConfig,
    blackhole: bool,
    retired: Vec<Subnet>,
    /// `--subnet-file` and `--ip-masq`
    file: Option<(PathBuf, bool)>,
    /// The families that `subnet.env` offers to pods; while empty, the file is not written.
    usable: Vec<Family>,
    etcd_leases: Vec<i64>,
    own: LeaseKey,
    leases: LeaseSet,
    desired: Desired,
    refusals: BTreeMap<LeaseKey, Vec<Refusal>>,
}

/// The leases and kernel objects that an event affects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Leases that were added, changed or removed, and those that are refused, or are not refused any longer, because of that.
    pub leases: Vec<LeaseKey>,
    /// Kernel objects that may have to change.
    pub keys: Vec<Key>,
}

impl Picture {
    /// Makes the picture of a node that has a lease and no peers yet.
    pub fn new(config: Config, node: Node, identity: Identity, traffic: TrafficConfig, own: LeaseKey) -> Picture {
        let (leases, desired, refusals) = (LeaseSet::default(), Desired::default(), BTreeMap::new());
        let (blackhole, retired, file, usable, etcd_leases) = (false, Vec::new(), None, Vec::new(), Vec::new());
        let mut picture =
            Picture { config, node, identity, traffic, blackhole, retired, file, usable, etcd_leases, own, leases, desired, refusals };
        picture.rebuild_node_objects();
        picture
    }

    /// The operator's command to run once this host has its lease, with the config field that holds it.
    pub fn after_lease(&self) -> Option<(&'static str, crate::backend::extension::Command)> {
        self.config.backend.after_lease(self.context())
    }

    /// Sets whether this node's subnets get a blackhole route (`--ip-blackhole-route`), and the pod networks of earlier runs on this
    /// host, whose leftover rules are removed.
    #[must_use]
    pub fn with(mut self, blackhole: bool, earlier: &[Subnet]) -> Picture {
        let current = |net: &&Subnet| !self.config.networks.iter().any(|(_, network)| network.network == **net);
        self.retired = earlier.iter().filter(current).copied().collect();
        self.blackhole = blackhole;
        self.rebuild_node_objects();
        self
    }

    /// Adds the file for the CNI plugins (`--subnet-file`), which states whether the daemon masquerades (`--ip-masq`).
    #[must_use]
    pub fn with_file(mut self, path: PathBuf, ip_masq: bool, etcd_leases: Vec<i64>) -> Picture {
        self.file = Some((path, ip_masq));
        self.etcd_leases = etcd_leases;
        self.rebuild_node_objects();
        self
    }

    /// Offers these families to pods in `subnet.env`. The file is not written before the first call.
    pub fn set_usable(&mut self, usable: Vec<Family>) -> Vec<Key> {
        if self.usable == usable {
            return Vec::new();
        }
        self.usable = usable;
        self.rebuild_node_objects()
    }

    /// The families that are offered to pods.
    pub fn usable(&self) -> &[Family] {
        &self.usable
    }

    /// The reason why a family cannot work on this host at present, with the fix.
    pub fn problem(&self, family: Family) -> Option<String> {
        self.config.backend.problem(self.local(), family).map(|problem| problem.text)
    }

    /// Remembers the etcd lease that this node's lease is attached to now.
    pub fn add_etcd_lease(&mut self, etcd_lease: i64) -> Vec<Key> {
        if etcd_lease == 0 || self.etcd_leases.last() == Some(&etcd_lease) {
            return Vec::new();
        }
        self.etcd_leases.push(etcd_lease);
        let superfluous = self.etcd_leases.len().saturating_sub(REMEMBERED);
        self.etcd_leases.drain(..superfluous);
        self.rebuild_node_objects()
    }

    /// Folds in a store event.
    pub fn fold(&mut self, event: StoreEvent) -> Touched {
        self.fold_all([event])
    }

    /// Folds in store events, and then rebuilds the objects of each changed lease once.
    pub fn fold_all(&mut self, events: impl IntoIterator<Item = StoreEvent>) -> Touched {
        let mut leases = Vec::new();
        for event in events {
            if event == StoreEvent::InitDone && is_list_older(&self.leases, &self.own) {
                self.leases.fold(StoreEvent::Older);
            }
            leases.extend(self.leases.fold(event));
        }
        self.rebuild_leases(leases)
    }

    /// Removes the leases that are still in doubt: no host wrote them again ([`crate::store_trust`]).
    pub fn give_up_doubtful(&mut self) -> Touched {
        let leases = self.leases.give_up();
        self.rebuild_leases(leases)
    }

    fn rebuild_leases(&mut self, mut leases: Vec<LeaseKey>) -> Touched {
        leases.sort_unstable();
        leases.dedup();
        let Changes { keys, contested } = self.rebuild_lease_objects(&leases);
        leases.extend(contested);
        leases.sort_unstable();
        leases.dedup();
        Touched { leases, keys }
    }

    /// Keeps the kernel objects of leases whose value cannot be read: the previous run of the daemon could read it. So an unreadable
    /// value and a restart together do not cut off a peer.
    pub fn keep_unreadable(&mut self, observed: &Observed) {
        let own = self.own;
        let mut keep = Vec::new();
        for (key, age) in self.leases.unreadable().filter(|(key, _)| !key.overlaps(&own)) {
            let (mut objects, mut hosts) = (Vec::new(), PerFamily::default());
            for (family, subnet) in key.subnets().iter() {
                if let Some((peer, allowed)) = self.wireguard_peer(observed, *subnet) {
                    hosts.set(family, peer.endpoint.map(|endpoint| endpoint.ip()));
                    // It may serve both families.
                    if !objects.contains(&Object::WgPeer(peer.clone())) {
                        objects.push(Object::WgPeer(peer));
                    }
                    objects.push(Object::AllowedIp(allowed));
                    continue;
                }
                let route =
                    self.config.network(family).and_then(|network| observed.get(&Key::Route(*subnet, route_metric(network, *subnet))));
                let Some(Object::Route(route)) = route else { continue };
                objects.push(Object::Route(*route));
                hosts.set(family, route.via);
                let Some(Object::Neigh(neigh)) = route.via.and_then(|via| observed.get(&Key::Neigh(route.dev, via))) else { continue };
                objects.push(Object::Neigh(*neigh));
                let Some(Object::Fdb(fdb)) = observed.get(&Key::Fdb(neigh.link, neigh.mac)) else { continue };
                objects.push(Object::Fdb(*fdb));
                hosts.set(family, Some(fdb.dst));
            }
            keep.push(Claims { owner: Owner::Lease(*key), age, hosts, objects });
        }
        let Changes { contested, .. } = self.desired.set_parts(keep);
        self.note_refusals(&contested);
    }

    /// The WireGuard peer that has a subnet, with the object that gives it that.
    fn wireguard_peer(&self, observed: &Observed, subnet: Subnet) -> Option<(Box<WgPeer>, Box<AllowedIp>)> {
        let link = self.config.backend.device(subnet.family())?;
        let Object::AllowedIp(allowed) = observed.get(&Key::AllowedIp(link, subnet))? else { return None };
        let Object::WgPeer(peer) = observed.get(&Key::WgPeer(link, allowed.peer))? else { return None };
        Some((peer.clone(), allowed.clone()))
    }

    /// Takes the endpoints of WireGuard peers that moved while their sessions live as those that are desired: WireGuard itself follows
    /// a peer, and putting its former address back would cut it off. Call it with what was just read.
    pub fn accept_roaming(&self, observed: &mut Observed) {
        let roamed = |object: &Object| match (object, self.desired.get(&object.key())?) {
            (Object::WgPeer(have), Object::WgPeer(want)) if have.may_roam() && have.endpoint != want.endpoint => {
                Some(Object::WgPeer(Box::new(WgPeer { endpoint: want.endpoint, ..(**have).clone() })))
            }
            _ => None,
        };
        let is_peer = |object: &&Object| matches!(object, Object::WgPeer(_));
        let moved: Vec<Object> = observed.iter().map(|(_, object)| object).filter(is_peer).filter_map(roamed).collect();
        moved.into_iter().for_each(|object| observed.insert(object));
    }

    /// Sets this node's lease and rebuilds all objects.
    pub fn set_own(&mut self, own: LeaseKey) -> Vec<Key> {
        self.own = own;
        let all: Vec<LeaseKey> = self.leases.iter().map(|(key, _)| *key).collect();
        let mut keys = self.rebuild_node_objects();
        keys.extend(self.rebuild_lease_objects(&all).keys);
        keys
    }

    /// Sets the facts of this host, such as the interface's address and MTU, and rebuilds all objects.
    pub fn set_node(&mut self, node: Node) -> Vec<Key> {
        self.node = node;
        self.set_own(self.own)
    }

    /// Adopts VTEP MAC addresses that another program set, and rebuilds all objects.
    pub fn set_macs(&mut self, macs: PerFamily<Mac>) -> Vec<Key> {
        self.identity.macs = macs;
        self.set_own(self.own)
    }

    /// The MAC addresses that another program gave to this host's VTEPs, if the devices match the desired state otherwise. An address
    /// that a peer uses already is ignored.
    pub fn foreign_macs(&self, observed: &Observed) -> Option<PerFamily<Mac>> {
        let before = self.identity.macs;
        let mut macs = before;
        for want in self.desired.part(&Owner::Node) {
            let (Object::Link(want), Some(Object::Link(have))) = (want, observed.get(&want.key())) else { continue };
            let LinkKind::Vxlan { local, .. } = want.kind else { continue };
            let is_free = self.desired.get(&Key::Fdb(want.name, have.mac)).is_none();
            if have.kind == want.kind && have.mac.is_unicast() && is_free {
                macs.set(Family::of(local), Some(have.mac));
            }
        }
        (macs != before).then_some(macs)
    }

    /// Records the bridge of this host's pods as desired state. Returns the objects that may have to change.
    pub fn keep_bridge(&mut self, observed: &Observed) -> Vec<Key> {
        let gateways = self.gateways();
        let known = match self.desired.part(&Owner::Pods).first() {
            Some(Object::Bridge(known)) => Some(&**known),
            _ => None,
        };
        let kept = keep(known, observed.bridge(), &gateways);
        match (kept, known) {
            (Some(kept), Some(known)) if kept == *known => vec![Key::Bridge(known.name)],
            (None, None) => Vec::new(),
            (None, Some(_)) => self.desired.set_part(Owner::Pods, Vec::new()),
            (Some(kept), _) => {
                // The bridge is a gateway, so the plugin has enabled forwarding. It is kept enabled, also on each interface that pods'
                // packets pass: one that was created with forwarding off drops them, whatever the switch for all says.
                let of = |family| kept.addrs.iter().any(|addr| gateways.contains(addr) && Family::of(addr.addr) == family);
                let forwarding = Family::ALL.into_iter().filter(|family| of(*family)).flat_map(|family| {
                    let devices = [Some(kept.name), Some(self.node.ext), self.config.backend.device(family)];
                    let each = devices.into_iter().flatten().map(move |device| family.forwarding_of(device));
                    [family.forwarding().to_owned()].into_iter().chain(each)
                });
                let sysctls: Vec<Object> = forwarding.map(|path| Object::Sysctl(Sysctl { path, value: "1".to_owned() })).collect();
                let bridge = Object::Bridge(Box::new(kept));
                self.desired.set_part(Owner::Pods, [bridge].into_iter().chain(sysctls).collect())
            }
        }
    }

    /// Frees the memory that a long list left unused.
    pub fn pack(&mut self) {
        self.leases.pack();
        self.desired.pack();
    }

    fn gateways(&self) -> Vec<Cidr> {
        self.own.subnets().iter().map(|(_, own)| Cidr { addr: own.first_host(), len: own.prefix_len() }).collect()
    }

    fn rebuild_node_objects(&mut self) -> Vec<Key> {
        let mut networks = PerFamily::default();
        for (family, network) in self.config.networks.iter() {
            networks.set(family, Some(network.network));
        }
        let mut objects = self.config.backend.node_objects(self.context());
        objects.extend(traffic::objects(self.traffic, &networks, self.own.subnets()));
        if self.blackhole {
            objects.extend(self.own.subnets().iter().map(|(_, subnet)| Object::Blackhole(Blackhole { dst: *subnet })));
        }
        if let Some((path, ip_masq)) = &self.file {
            let is_usable = |family: &Family| self.usable.contains(family);
            let networks = networks.iter().filter(|(family, _)| is_usable(family)).map(|(_, network)| *network).collect();
            let mut subnets = *self.own.subnets();
            Family::ALL.into_iter().filter(|family| !is_usable(family)).for_each(|family| subnets.set(family, None));
            let env = SubnetEnv { networks, subnets, mtu: self.mtu(), ip_masq: *ip_masq };
            if !subnets.is_empty() {
                objects.push(Object::EnvFile(Box::new(EnvFile {
                    path: path.clone(),
                    text: env.render(),
                    etcd_leases: self.etcd_leases.clone(),
                    ours: true,
                })));
            }
            objects.push(Object::PodRules(PodRules { missing: 0 }));
        }
        self.desired.set_part(Owner::Node, objects)
    }

    fn rebuild_lease_objects(&mut self, keys: &[LeaseKey]) -> Changes {
        let parts = keys.iter().map(|key| self.claims_of(*key)).collect();
        let changes = self.desired.set_parts(parts);
        self.note_refusals(&changes.contested);
        changes
    }

    /// What a lease claims; the reasons for what it cannot have are recorded.
    fn claims_of(&mut self, key: LeaseKey) -> Claims {
        let (Part { objects, hosts, refusals }, age) = self.part_of(key);
        self.set_refusals(key, refusals);
        Claims { owner: Owner::Lease(key), age, hosts, objects }
    }

    fn part_of(&self, key: LeaseKey) -> (Part, Age) {
        match self.leases.get_with_age(&key) {
            Some((peer, age)) => (self.config.backend.peer_part(self.context(), &key, peer), age),
            None => (Part::default(), Age::UNKNOWN),
        }
    }

    fn set_refusals(&mut self, key: LeaseKey, refusals: Vec<Refusal>) {
        if refusals.is_empty() {
            self.refusals.remove(&key);
        } else {
            self.refusals.insert(key, refusals);
        }
    }

    /// Records the refusals of leases that claim what others claim.
    fn note_refusals(&mut self, contested: &[LeaseKey]) {
        for key in contested {
            let mut refusals = self.part_of(*key).0.refusals;
            refusals.extend(self.desired.refused(*key).map(|(family, lost)| self.refusal(family, lost)));
            self.set_refusals(*key, refusals);
        }
    }

    fn refusal(&self, family: Family, lost: &Lost) -> Refusal {
        let holder = match lost.holder {
            Owner::Lease(holder) => holder,
            Owner::Node | Owner::Pods => self.own,
        };
        match lost.key {
            Some(Key::Fdb(_, mac)) => Refusal::OlderMac(mac, holder),
            Some(Key::WgPeer(_, key)) => Refusal::OlderKey(key, holder),
            _ => Refusal::OverlapsOlder(family, holder),
        }
    }

    /// The kernel state to read for a comparison with this picture. Rules are read for both families and both flavours, because those
    /// of an earlier run must be removed.
    pub fn scope(&self) -> Scope {
        let networks = || self.config.networks.iter();
        let mut scope = Scope { networks: networks().map(|(_, network)| network.network).collect(), ..Scope::default() };
        // Read even if not desired yet, so that their values are known when the first pod is added.
        scope.sysctls = Family::ALL.map(|family| (family.forwarding().to_owned(), "1".to_owned())).into();
        scope.rulesets = Family::ALL.into();
        scope.iptables = Family::ALL.into();
        scope.retired.clone_from(&self.retired);
        scope.file = self.file.as_ref().map(|(path, _)| path.clone());
        scope.gateways = self.gateways();
        scope.pod_rules = self.file.is_some();
        scope.bridge = self.desired.part(&Owner::Pods).first().and_then(|object| match object {
            Object::Bridge(bridge) => Some(bridge.name),
            _ => None,
        });
        for object in self.desired.part(&Owner::Node).iter().chain(self.desired.part(&Owner::Pods)) {
            match object {
                Object::Link(link) => scope.links.push(link.name),
                Object::Sysctl(Sysctl { path, value }) if !scope.sysctls.iter().any(|(known, _)| known == path) => {
                    scope.sysctls.push((path.clone(), value.clone()));
                }
                _ => {}
            }
        }
        scope
    }

    /// Like [`Picture::scope`], and with the plain routes that a Go flanneld may have left on this host.
    pub fn scope_with_adoption(&self) -> Scope {
        let own = |family| self.own.subnets().get(family).map(|own| own.prefix_len());
        let networks = self.config.networks.iter().map(|(family, network)| (network.network, own(family)));
        // All hosts have subnets of the same size.
        let subnets = networks.filter_map(|(network, len)| Some((network, len?))).collect();
        Scope { adopt: Some(Adopt { dev: self.node.ext, subnets }), ..self.scope() }
    }

    fn local(&self) -> Local<'_> {
        Local { config: &self.config, node: &self.node, identity: &self.identity }
    }

    fn context(&self) -> Context<'_> {
        Context { local: self.local(), own: self.own }
    }

    /// The state that checks compare this host with.
    pub fn expected(&self) -> Expected {
        if !self.config.backend.carries_packets() {
            return Expected::default();
        }
        let (mut networks, mut devices) = (PerFamily::default(), PerFamily::default());
        for (family, network) in self.config.networks.iter() {
            networks.set(family, Some(network.network));
            devices.set(family, self.config.backend.device(family));
        }
        let links = self.desired.part(&Owner::Node).iter().filter_map(|object| match object {
            Object::Link(link) => Some((**link).clone()),
            _ => None,
        });
        Expected {
            networks,
            own: *self.own.subnets(),
            external: Some(self.node.ext),
            addresses: self.node.addrs,
            devices,
            links: links.collect(),
            refused: Vec::new(),
            retired: self.retired.clone(),
            bridge: self.scope().bridge,
            chosen_by_default_route: false,
        }
    }

    /// The network configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// This host.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The MTU for pods, in bytes.
    pub fn mtu(&self) -> u32 {
        self.config.backend.mtu(self.local())
    }

    /// The MTU of each family's data path, in bytes.
    pub fn path_mtus(&self) -> PerFamily<u32> {
        let mut mtus = PerFamily::default();
        for (family, _) in self.config.networks.iter() {
            mtus.set(family, Some(self.config.backend.path_mtu(self.local(), family)));
        }
        mtus
    }

    /// The form in which the traffic rules are written; `none` where there are none to write.
    pub fn rules(&self) -> &'static str {
        match self.traffic {
            TrafficConfig { masquerade: false, forward: false, .. } => "none",
            TrafficConfig { flavour: Flavour::Nftables, .. } => "nftables",
            TrafficConfig { flavour: Flavour::Iptables(Variant::Nft), .. } => "iptables-nft",
            TrafficConfig { flavour: Flavour::Iptables(Variant::Legacy), .. } => "iptables-legacy",
        }
    }

    /// This host's lease.
    pub fn own(&self) -> LeaseKey {
        self.own
    }

    /// What this host publishes with its lease.
    pub fn own_peer(&self) -> Peer {
        self.config.backend.own_peer(self.local())
    }

    /// The known leases.
    pub fn leases(&self) -> &LeaseSet {
        &self.leases
    }

    /// The desired state of the kernel.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The reasons why peers are not programmed, by lease.
    pub fn refusals(&self) -> &BTreeMap<LeaseKey, Vec<Refusal>> {
        &self.refusals
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Age, Lease};
    use crate::object::bridge::Bridge;
    use crate::store_trust::doubt_deletes;
    use crate::traffic::Flavour;

    fn key(text: &str) -> LeaseKey {
        LeaseKey::new(PerFamily { v4: text.parse().ok(), v6: None }).unwrap()
    }

    /// Host 1 of a pod network, with plain routes.
    fn picture() -> Picture {
        let config = Config::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#).unwrap();
        let addrs = PerFamily { v4: "192.0.2.1".parse().ok(), v6: None };
        let ext = "eth0".parse().unwrap();
        let node = Node { ext, mtu: 1500, addrs, public: addrs, routes: vec![("192.0.2.0/24".parse().unwrap(), true)] };
        let identity = Identity::default();
        let traffic = TrafficConfig { masquerade: false, fully_random: false, forward: false, flavour: Flavour::Nftables };
        Picture::new(config, node, identity, traffic, key("10.244.1.0/24"))
    }

    fn list(picture: &mut Picture, hosts: &[u8]) -> Touched {
        let lease = |host: &u8| {
            let public = PerFamily { v4: format!("192.0.2.{host}").parse().ok(), v6: None };
            let peer = Peer { public, backend_type: "host-gw".into(), ..Peer::default() };
            StoreEvent::Apply(Lease { key: key(&format!("10.244.{host}.0/24")), peer }, Age::UNKNOWN)
        };
        let leases = hosts.iter().map(lease);
        picture.fold_all([StoreEvent::Init].into_iter().chain(leases).chain([StoreEvent::InitDone]))
    }

    #[test]
    fn list_without_own_lease_puts_missing_leases_in_doubt() {
        let mut picture = picture();
        list(&mut picture, &[1, 2, 3]);
        assert_eq!(list(&mut picture, &[1, 2]).leases, [key("10.244.3.0/24")], "a list with the own lease is trusted");
        assert_eq!(list(&mut picture, &[]), Touched::default());
        // A lease that is listed again is no longer in doubt; the rest is removed after the grace time.
        assert_eq!(list(&mut picture, &[1]), Touched::default());
        let Touched { leases, keys } = picture.give_up_doubtful();
        assert_eq!((leases, keys), (vec![key("10.244.2.0/24")], vec![Key::Route("10.244.2.0/24".parse().unwrap(), 2)]));
        assert!(picture.leases().get(&key("10.244.1.0/24")).is_some());
    }

    #[test]
    fn leases_deleted_with_own_lease_are_put_in_doubt() {
        let delete = |octet: u8| StoreEvent::Delete(key(&format!("10.244.{octet}.0/24")));
        let mut picture = picture();
        list(&mut picture, &[1, 2, 3]);
        let mut events = [delete(2)];
        doubt_deletes(picture.own, &mut events);
        assert_eq!(picture.fold_all(events).leases, [key("10.244.2.0/24")], "a single deletion is trusted");
        let mut events = [delete(1), delete(3), delete(9)];
        doubt_deletes(picture.own, &mut events);
        assert_eq!(picture.fold_all(events).leases, [key("10.244.1.0/24")]);
        assert_eq!(picture.leases().doubtful().iter().copied().collect::<Vec<_>>(), [key("10.244.3.0/24")]);
        assert!(picture.leases().get(&key("10.244.3.0/24")).is_some());
    }

    /// Host 1 of a pod network, with vxlan.
    fn vxlan() -> Picture {
        let config = Config::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
        let Picture { node, traffic, own, .. } = picture();
        let identity = Identity { macs: PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, 1])), v6: None }, ..Identity::default() };
        Picture::new(config, node, identity, traffic, own)
    }

    fn apply(subnet: &str, age: u64, ip: &str, mac: u8) -> StoreEvent {
        let value =
            format!(r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{mac:02x}"}}}}"#);
        StoreEvent::Apply(Lease { key: key(subnet), peer: crate::wire::parse_value(value.as_bytes()).unwrap() }, Age::created(age))
    }

    fn texts(picture: &Picture, subnet: &str) -> Vec<String> {
        picture.refusals().get(&key(subnet)).into_iter().flatten().map(ToString::to_string).collect()
    }

    #[test]
    fn newcomer_with_a_peers_mac_is_refused_until_the_peer_is_gone() {
        let mut picture = vxlan();
        picture.fold(apply("10.244.5.0/24", 7, "192.0.2.5", 5));
        let before: Vec<Object> = picture.desired().iter().map(|(_, object)| object.clone()).collect();
        let thief = apply("10.244.2.0/24", 8, "192.0.2.66", 5);
        assert_eq!(picture.fold(thief).leases, [key("10.244.2.0/24")]);
        assert_eq!(picture.desired().iter().map(|(_, object)| object.clone()).collect::<Vec<_>>(), before, "nothing of the victim changes");
        let text = "its VTEP MAC 02:00:00:00:00:05 is that of lease 10.244.5.0/24, which is older: a cloned machine, or a host that takes another one's packets?";
        assert_eq!((texts(&picture, "10.244.2.0/24"), texts(&picture, "10.244.5.0/24")), (vec![text.to_owned()], vec![]));
        // A rewrite keeps the age; a lease that is created again is a newcomer.
        picture.fold(apply("10.244.5.0/24", 7, "192.0.2.55", 5));
        assert_eq!(texts(&picture, "10.244.5.0/24"), [""; 0]);
        let touched = picture.fold(StoreEvent::Delete(key("10.244.5.0/24")));
        assert_eq!(touched.leases, [key("10.244.2.0/24"), key("10.244.5.0/24")], "the newcomer is admitted");
        assert_eq!(texts(&picture, "10.244.2.0/24"), [""; 0]);
        picture.fold(apply("10.244.5.0/24", 9, "192.0.2.5", 5));
        assert_eq!(texts(&picture, "10.244.5.0/24").len(), 1);
    }

    #[test]
    fn newcomer_within_a_peers_subnet_is_refused() {
        let mut picture = vxlan();
        picture.fold_all([apply("10.244.4.0/23", 3, "192.0.2.4", 4), apply("10.244.5.128/25", 5, "192.0.2.66", 6)]);
        assert_eq!(
            texts(&picture, "10.244.5.128/25"),
            ["its IPv4 subnet overlaps lease 10.244.4.0/23, which is older and of another host"]
        );
        assert_eq!(texts(&picture, "10.244.4.0/23"), [""; 0]);
        // The other way round.
        picture.fold(apply("10.244.0.0/22", 9, "192.0.2.66", 7));
        assert_eq!(texts(&picture, "10.244.0.0/22").len(), 1, "it contains this host's own subnet");
        picture.fold(apply("10.244.4.0/22", 9, "192.0.2.66", 7));
        assert_eq!(texts(&picture, "10.244.4.0/22"), ["its IPv4 subnet overlaps lease 10.244.4.0/23, which is older and of another host"]);
    }

    #[test]
    fn leases_of_one_host_do_not_contradict_each_other() {
        let mut picture = vxlan();
        // The former lease of a host that has another one now.
        picture.fold_all([apply("10.244.4.0/23", 3, "192.0.2.4", 4), apply("10.244.5.128/25", 5, "192.0.2.4", 4)]);
        assert_eq!(picture.refusals().len(), 0);
        assert_eq!(picture.desired().iter().filter(|(key, _)| matches!(key, Key::Route(..))).count(), 2);
        picture.fold(StoreEvent::Delete(key("10.244.4.0/23")));
        assert_eq!(picture.desired().iter().filter(|(key, _)| matches!(key, Key::Fdb(..))).count(), 1, "the entry stays");
    }

    #[test]
    fn own_address_and_mac_are_never_taken() {
        let mut picture = vxlan();
        picture.fold_all([apply("10.244.2.0/24", 0, "192.0.2.1", 5), apply("10.244.3.0/24", 0, "192.0.2.3", 1)]);
        assert_eq!(
            (texts(&picture, "10.244.2.0/24"), texts(&picture, "10.244.3.0/24")),
            (
                vec!["its public address 192.0.2.1 is this host's own: a stale lease of this host, or a second daemon".to_owned()],
                vec!["its VTEP MAC 02:00:00:00:00:01 is this host's own: a cloned machine?".to_owned()]
            )
        );
    }

    #[test]
    fn kept_bridge_enables_forwarding() {
        let mut picture = picture();
        let bridge = Bridge {
            name: "cni0".parse().unwrap(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            up: true,
            promiscuous: false,
            vlans: false,
            route_localnet: false,
            addrs: ["10.244.1.1/24".parse().unwrap()].into(),
            ports: BTreeMap::new(),
            loose: [].into(),
        };
        let observed: Observed = [Object::Bridge(Box::new(bridge))].into_iter().collect();
        let forwarding = Object::Sysctl(Sysctl { path: "net/ipv4/ip_forward".to_owned(), value: "1".to_owned() });
        assert_eq!(picture.desired().get(&forwarding.key()), None);
        let touched = picture.keep_bridge(&observed);
        let of = |name: &str| Key::Sysctl(Family::V4.forwarding_of(name.parse().unwrap()));
        assert_eq!(touched, [Key::Bridge("cni0".parse().unwrap()), of("cni0"), of("eth0"), forwarding.key()]);
        assert_eq!(picture.desired().get(&forwarding.key()), Some(&forwarding));
    }

    const KEY: &str = "BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU=";

    /// Host 1 of a pod network, with wireguard.
    fn wireguard() -> Picture {
        let config = Config::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard"}}"#).unwrap();
        let Picture { node, traffic, own, .. } = picture();
        let identity = Identity { public_key: Some(crate::wireguard::PublicKey([1; 32])), ..Identity::default() };
        Picture::new(config, node, identity, traffic, own)
    }

    fn apply_key(subnet: &str, age: u64, ip: &str) -> StoreEvent {
        let value = format!(r#"{{"PublicIP":"{ip}","BackendType":"wireguard","BackendData":{{"PublicKey":"{KEY}","Port":7}}}}"#);
        StoreEvent::Apply(Lease { key: key(subnet), peer: crate::wire::parse_value(value.as_bytes()).unwrap() }, Age::created(age))
    }

    fn peers(picture: &Picture) -> Vec<String> {
        let is_peer = |object: &&Object| matches!(object, Object::WgPeer(_) | Object::AllowedIp(_));
        picture.desired().iter().map(|(_, object)| object).filter(is_peer).map(ToString::to_string).collect()
    }

    #[test]
    fn younger_lease_with_the_key_of_another_host_is_refused() {
        let mut picture = wireguard();
        picture.fold_all([apply_key("10.244.2.0/24", 8, "192.0.2.2"), apply_key("10.244.5.0/24", 7, "192.0.2.5")]);
        let older =
            [format!("peer {KEY} dev flannel-wg endpoint 192.0.2.5:7"), format!("allowed-ip 10.244.5.0/24 peer {KEY} dev flannel-wg")];
        assert_eq!(peers(&picture), older);
        let text = format!(
            "its WireGuard key {KEY} is that of lease 10.244.5.0/24, which is older: a cloned machine, or a host that takes another one's packets?"
        );
        assert_eq!(picture.refusals()[&key("10.244.2.0/24")].iter().map(ToString::to_string).collect::<Vec<_>>(), [text]);
        picture.fold(StoreEvent::Delete(key("10.244.5.0/24")));
        assert_eq!((peers(&picture).len(), picture.refusals().len()), (2, 0));
    }

    #[test]
    fn two_leases_of_one_host_share_a_wireguard_peer() {
        let mut picture = wireguard();
        picture.fold_all([apply_key("10.244.2.0/24", 8, "192.0.2.5"), apply_key("10.244.5.0/24", 7, "192.0.2.5")]);
        assert_eq!((peers(&picture).len(), picture.refusals().len()), (3, 0), "{:?}", peers(&picture));
        let touched = picture.fold(StoreEvent::Delete(key("10.244.5.0/24")));
        assert_eq!(peers(&picture).len(), 2);
        assert!(picture.desired().get(&touched.keys[0]).is_some(), "the peer stays: {:?}", touched.keys);
    }

    #[test]
    fn endpoint_that_wireguard_followed_is_accepted_while_its_session_lives() {
        let mut picture = wireguard();
        picture.fold(apply_key("10.244.5.0/24", 7, "192.0.2.5"));
        let moved = |handshake| -> Observed {
            let objects = picture.desired().iter().map(|(_, object)| match object {
                Object::WgPeer(peer) => {
                    Object::WgPeer(Box::new(WgPeer { endpoint: "192.0.2.99:40000".parse().ok(), handshake, ..(**peer).clone() }))
                }
                other => other.clone(),
            });
            objects.collect()
        };
        let ops = |handshake| {
            let mut observed = moved(handshake);
            picture.accept_roaming(&mut observed);
            crate::diff::diff(picture.desired(), &observed, crate::diff::Prune::Yes).len()
        };
        assert_eq!([Some(10), Some(180), None].map(ops), [0, 1, 1]);
    }
}
