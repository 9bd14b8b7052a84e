//! A model of a host's kernel: an external interface, and a set of objects that behaves like the kernel. Objects that depend on a link
//! go with it without a notification, notifications are late and may be lost, and some operations are refused.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use daemon::host::{Host, HostNetwork, Notifications};
use flannel::backend::extension::Command;
use flannel::check::{Expected, HostFacts};
use flannel::net::Cidr;
use flannel::node::{Interface, InterfaceAddr, RouteFact};
use flannel::object::{Addr, EnvFile, Key, Lane, Link, LinkKind, Object, ROUTE_PROTOCOL, Sysctl, WgPeer};
use flannel::scope::Scope;
use flannel::wireguard::PublicKey;
use flannel::{IfName, Observed, Op, OpError, Outcome};
use kernel::netlink::NetlinkError;
use kernel::{Changed, KernelEvent};
use tokio::sync::{Notify, mpsc};

/// The number of notifications that fit into the socket's buffer; if there are more, all are lost (overrun).
const BUFFER: usize = 40;

/// The external interface.
#[derive(Debug, Clone)]
pub(crate) struct External {
    pub(crate) index: u32,
    pub(crate) up: bool,
    pub(crate) address: Option<Cidr>,
    pub(crate) mtu: u32,
}

#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) external: Option<External>,
    /// Its WireGuard key, which it keeps.
    pub(crate) key: PublicKey,
    next_index: u32,
    /// All objects, including foreign ones.
    pub(crate) objects: Observed,
    pending: Vec<Changed>,
    /// Wakes the task that delivers notifications to the daemon.
    wake: Arc<Notify>,
    overrun: bool,
    /// One in this many operations is refused; 0 means none.
    pub(crate) refuses: u32,
    /// Routes that the daemon deleted.
    pub(crate) deleted: Vec<Key>,
    pub(crate) violations: Vec<String>,
    pub(crate) operations: u64,
}

/// A handle of a host. Clones refer to the same host.
#[derive(Debug, Clone)]
pub(crate) struct ModelHost(Arc<Mutex<Model>>);

pub(crate) fn eth0() -> IfName {
    "eth0".parse().unwrap()
}

/// The WireGuard key of the host with this address.
pub(crate) fn key_of(address: IpAddr) -> PublicKey {
    let last = match address {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    PublicKey([last; 32])
}

async fn moment() {
    tokio::time::sleep(Duration::from_micros(fastrand::u64(0..2_000))).await;
}

impl ModelHost {
    pub(crate) fn new(address: Cidr) -> ModelHost {
        let external = Some(External { index: 2, up: true, address: Some(address), mtu: 1500 });
        let model = Model {
            external,
            key: key_of(address.addr),
            next_index: 3,
            objects: Observed::default(),
            pending: Vec::new(),
            wake: Arc::default(),
            overrun: false,
            refuses: 0,
            deleted: Vec::new(),
            violations: Vec::new(),
            operations: 0,
        };
        ModelHost(Arc::new(Mutex::new(model)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another program changes something; the daemon gets a notification.
    pub(crate) fn change<T>(&self, f: impl FnOnce(&mut Model) -> T) -> T {
        let mut model = self.lock();
        let result = f(&mut model);
        model.wake.notify_one();
        result
    }
}

impl Model {
    fn notify(&mut self, change: Changed) {
        if self.pending.len() >= BUFFER {
            self.overrun = true;
        }
        self.pending.push(change);
    }

    /// Another program removes an object.
    pub(crate) fn remove(&mut self, key: &Key) {
        self.objects.remove(key);
        self.drop_subnets_of(key);
        match key {
            Key::Link(name) => self.notify(Changed::Link(*name)),
            Key::Addr(name, _) => self.notify(Changed::Link(*name)),
            Key::Ruleset(family) => self.notify(Changed::Rules(*family)),
            Key::PodRules => self.notify(Changed::PodRules),
            Key::EnvFile => self.notify(Changed::File),
            Key::Sysctl(_) => {}
            // The kernel does not announce changes of WireGuard's peers.
            Key::WgPeer(..) | Key::AllowedIp(..) => {}
            key => self.notify(Changed::Gone(key.clone())),
        }
    }

    /// Another program adds or replaces an object.
    pub(crate) fn put(&mut self, object: Object) {
        let change = match &object {
            Object::Link(link) => {
                if !link.up {
                    self.drop_with(link.name);
                }
                Some(Changed::Link(link.name))
            }
            Object::Addr(Addr { link: name, .. }) => Some(Changed::Link(*name)),
            Object::Ruleset(rules) => Some(Changed::Rules(rules.family)),
            Object::PodRules(_) => Some(Changed::PodRules),
            Object::EnvFile(_) => Some(Changed::File),
            Object::Sysctl(..) | Object::WgPeer(_) | Object::AllowedIp(_) => None,
            // A foreign route means that the daemon's route with this key is gone.
            Object::Route(route) if route.protocol != ROUTE_PROTOCOL => Some(Changed::Gone(object.key())),
            object => Some(Changed::Set(object.clone())),
        };
        self.objects.insert(object);
        change.into_iter().for_each(|change| self.notify(change));
    }

    /// The subnets of a WireGuard peer go with it.
    fn drop_subnets_of(&mut self, gone: &Key) {
        let Key::WgPeer(link, key) = gone else { return };
        let of_it = |object: &Object| matches!(object, Object::AllowedIp(ip) if (ip.link, ip.peer) == (*link, *key));
        let keys: Vec<Key> = self.objects.iter().filter(|(_, object)| of_it(object)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.objects.remove(key));
    }

    /// When a link goes down, its routes and neighbours go without a notification.
    fn drop_with(&mut self, name: IfName) {
        let gone = |object: &Object| match object {
            Object::Route(route) => route.dev == name,
            Object::Neigh(neigh) => neigh.link == name,
            _ => false,
        };
        let keys: Vec<Key> = self.objects.iter().filter(|(_, object)| gone(object)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.objects.remove(key));
    }

    /// The external interface goes up or down.
    pub(crate) fn set_external(&mut self, up: bool) {
        if let Some(external) = &mut self.external {
            external.up = up;
            if !up {
                self.drop_with(eth0());
            }
            self.notify(Changed::Link(eth0()));
        }
    }

    /// The external interface gets another address, or none. Its routes go.
    pub(crate) fn set_address(&mut self, address: Option<Cidr>) {
        if let Some(external) = &mut self.external
            && external.address != address
        {
            external.address = address;
            self.drop_with(eth0());
            self.notify(Changed::Link(eth0()));
        }
    }

    pub(crate) fn set_mtu(&mut self, mtu: u32) {
        if let Some(external) = &mut self.external {
            external.mtu = mtu;
            self.notify(Changed::Link(eth0()));
        }
    }

    /// The external interface is deleted, and with it the devices on top of it.
    pub(crate) fn remove_external(&mut self) {
        self.external = None;
        self.drop_with(eth0());
        let on_it = |object: &Object| matches!(object, Object::Link(link) if matches!(link.kind, LinkKind::Vxlan { .. }));
        let links: Vec<Key> = self.objects.iter().filter(|(_, object)| on_it(object)).map(|(key, _)| key.clone()).collect();
        links.iter().for_each(|key| self.remove(key));
        self.notify(Changed::Link(eth0()));
    }

    /// The external interface is added again, with another index.
    pub(crate) fn add_external(&mut self, address: Cidr) {
        self.next_index += 1;
        self.external = Some(External { index: self.next_index, up: true, address: Some(address), mtu: 1500 });
        self.notify(Changed::Link(eth0()));
    }

    /// Causes an overrun by notifications about a route that does not exist.
    pub(crate) fn flood(&mut self) {
        for _ in 0..=BUFFER {
            self.notify(Changed::Gone(Key::Route("10.244.255.0/24".parse().unwrap(), 0)));
        }
    }

    fn refuse(errno: i32, text: &str) -> Outcome {
        Err(OpError { errno, text: text.to_owned() })
    }

    /// Is it a sysctl of an interface that is missing?
    fn lacks_interface_of(&self, path: &str) -> bool {
        let Some(name) = path.split('/').nth(3).and_then(|name| name.parse::<IfName>().ok()).filter(|name| name.as_str() != "all") else {
            return false;
        };
        let is_external = name == eth0() && self.external.is_some();
        !is_external && [Key::Link(name), Key::Bridge(name)].iter().all(|key| self.objects.get(key).is_none())
    }

    fn execute(&mut self, op: &Op) -> Outcome {
        self.operations += 1;
        if self.refuses > 0 && fastrand::u32(..self.refuses) == 0 {
            return Model::refuse(105, "no buffer space");
        }
        let is_up = |model: &Model, name: IfName| match model.objects.get(&Key::Link(name)) {
            Some(Object::Link(link)) => link.up,
            _ => name == eth0() && model.external.as_ref().is_some_and(|external| external.up),
        };
        let has_link = |model: &Model, name: IfName| model.objects.get(&Key::Link(name)).is_some();
        match op {
            Op::Set(Object::Link(link)) => {
                if self.external.is_none() {
                    return Model::refuse(19, "there is no interface eth0");
                }
                if let Some(Object::Link(have)) = self.objects.get(&Key::Link(link.name))
                    && matches!(have.kind, LinkKind::Other(_))
                {
                    return Model::refuse(17, "file exists");
                }
            }
            Op::Set(Object::Addr(Addr { link: name, .. })) if !has_link(self, *name) => return Model::refuse(19, "no such device"),
            Op::Set(Object::Neigh(neigh)) if !has_link(self, neigh.link) => return Model::refuse(19, "no such device"),
            Op::Set(Object::Fdb(fdb)) if !has_link(self, fdb.link) => return Model::refuse(19, "no such device"),
            Op::Set(Object::WgPeer(peer)) if !has_link(self, peer.link) => return Model::refuse(19, "no such device"),
            Op::Set(Object::AllowedIp(allowed)) => {
                if !has_link(self, allowed.link) {
                    return Model::refuse(19, "no such device");
                }
                // The kernel creates the peer, without an endpoint.
                if self.objects.get(&Key::WgPeer(allowed.link, allowed.peer)).is_none() {
                    let (link, public_key) = (allowed.link, allowed.peer);
                    let peer = WgPeer { link, public_key, endpoint: None, keepalive: 0, psk: None, handshake: None };
                    self.objects.insert(Object::WgPeer(Box::new(peer)));
                }
            }
            Op::Delete(Object::AllowedIp(_)) if self.objects.get(&op.object().key()).is_some() => self.deleted.push(op.object().key()),
            Op::Delete(Object::WgPeer(_)) => self.drop_subnets_of(&op.object().key()),
            // A sysctl of a link that does not exist counts as set.
            Op::Set(Object::Sysctl(Sysctl { path, .. })) if self.lacks_interface_of(path) => return Ok(()),
            Op::Set(Object::Route(route)) => {
                if !is_up(self, route.dev) {
                    return Model::refuse(100, "network is down");
                }
                let reached = |via: IpAddr| {
                    let address = self.external.as_ref().and_then(|external| external.address);
                    address.is_some_and(|address| address.subnet().contains(via))
                };
                if !route.onlink && route.via.is_some_and(|via| !reached(via)) {
                    return Model::refuse(101, "network is unreachable");
                }
            }
            Op::Delete(Object::Route(route)) => {
                if route.protocol != ROUTE_PROTOCOL {
                    self.violations.push(format!("the daemon deleted a foreign route: {op}"));
                }
                if self.objects.get(&op.object().key()).is_some() {
                    self.deleted.push(op.object().key());
                }
            }
            Op::Delete(Object::Link(link)) if !link.name.as_str().starts_with("flannel") => {
                self.violations.push(format!("the daemon deleted a foreign link: {op}"));
            }
            _ => {}
        }
        self.objects.apply(op);
        Ok(())
    }

    fn observe(&self, scope: &Scope, lane: Lane) -> Observed {
        let ours = |object: &Object| match object {
            Object::Link(link) => scope.links.contains(&link.name),
            Object::Addr(Addr { link, .. }) => scope.links.contains(link),
            Object::Neigh(neigh) => scope.links.contains(&neigh.link),
            Object::Fdb(fdb) => scope.links.contains(&fdb.link),
            Object::WgPeer(peer) => scope.links.contains(&peer.link),
            Object::AllowedIp(allowed) => scope.links.contains(&allowed.link),
            Object::Route(route) => scope.has_route(route),
            Object::Sysctl(Sysctl { path, .. }) => scope.sysctls.iter().any(|(wanted, _)| wanted == path),
            Object::Ruleset(rules) => scope.rulesets.contains(&rules.family),
            Object::PodRules(_) => scope.pod_rules,
            Object::EnvFile(file) => scope.file.as_ref() == Some(&file.path),
            _ => false,
        };
        let in_lane = |object: &Object| object.kind().lane() == lane;
        self.objects.iter().map(|(_, object)| object.clone()).filter(ours).filter(in_lane).collect()
    }
}

impl Host for ModelHost {
    fn watch(&self, _: Scope, _: IfName) -> Result<Notifications, NetlinkError> {
        let (sender, notifications) = mpsc::channel(4);
        let wake = {
            let mut model = self.lock();
            (model.pending, model.overrun, model.wake) = (Vec::new(), false, Arc::default());
            model.wake.clone()
        };
        let host = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    () = wake.notified() => {}
                }
                moment().await;
                let changes = {
                    let mut model = host.lock();
                    let changes = std::mem::take(&mut model.pending);
                    if std::mem::take(&mut model.overrun) { vec![Changed::Everything] } else { changes }
                };
                let events: Vec<KernelEvent> = changes.into_iter().map(|change| KernelEvent { change, by: None }).collect();
                if !events.is_empty() && sender.send(Ok(events)).await.is_err() {
                    return;
                }
            }
        });
        Ok(notifications)
    }

    fn observe(&self, scope: Scope, lane: Lane) -> impl Future<Output = Result<Observed, NetlinkError>> + use<> {
        let host = self.clone();
        async move {
            moment().await;
            let observed = host.lock().observe(&scope, lane);
            // More can happen before the daemon reads the answer.
            moment().await;
            Ok(observed)
        }
    }

    fn apply(&self, ops: Vec<Op>, _: Lane) -> impl Future<Output = Vec<(Op, Outcome)>> + use<> {
        let host = self.clone();
        async move {
            moment().await;
            let outcomes: Vec<Outcome> = {
                let mut model = host.lock();
                ops.iter().map(|op| model.execute(op)).collect()
            };
            moment().await;
            ops.into_iter().zip(outcomes).collect()
        }
    }

    async fn network(&self, _: Option<IpAddr>) -> Result<HostNetwork, NetlinkError> {
        moment().await;
        let mut network = HostNetwork::default();
        if let Some(External { index, up, address, mtu }) = self.lock().external.clone() {
            let addrs = address.map(|cidr| InterfaceAddr { cidr, permanent: true, temporary: false, deprecated: false });
            network.interfaces.push(Interface { index, name: eth0(), mtu, addrs: addrs.into_iter().collect() });
            if let Some(cidr) = address.filter(|_| up) {
                network.routes.push(RouteFact { dst: cidr.subnet(), oif: index, gateway: false });
                network.routes.push(RouteFact { dst: "0.0.0.0/0".parse().unwrap(), oif: index, gateway: true });
            }
        }
        Ok(network)
    }

    async fn link(&self, name: IfName) -> Result<Option<Link>, NetlinkError> {
        moment().await;
        match self.lock().objects.get(&Key::Link(name)) {
            Some(Object::Link(link)) => Ok(Some((**link).clone())),
            _ => Ok(None),
        }
    }

    fn inspect(&self, _: Expected) -> impl Future<Output = (HostFacts, Duration)> + use<> {
        std::future::ready(<(HostFacts, Duration)>::default())
    }

    fn env_file(&self, _: &Path) -> Option<EnvFile> {
        match self.lock().objects.get(&Key::EnvFile) {
            Some(Object::EnvFile(file)) => Some((**file).clone()),
            _ => None,
        }
    }

    async fn wireguard_key(&self, _: &Path) -> Result<PublicKey, String> {
        moment().await;
        Ok(self.lock().key)
    }

    async fn run(&self, _: Command) -> anyhow::Result<String> {
        anyhow::bail!("the simulation cannot run programs")
    }
}
