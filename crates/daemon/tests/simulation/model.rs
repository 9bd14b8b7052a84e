//! A host without a kernel: its external interface, and a set of objects with the kernel's habits (what goes with a link goes
//! without a word, notifications come late and may be lost, and it refuses now and then).

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use daemon::host::{Host, HostNetwork, Notifications};
use flannel::backend::extension::Command;
use flannel::net::Cidr;
use flannel::node::{Interface, InterfaceAddr, RouteFact};
use flannel::object::{Addr, EnvFile, Key, Lane, Link, LinkKind, Object, ROUTE_PROTOCOL, Sysctl};
use flannel::scope::Scope;
use flannel::{IfName, Observed, Op, OpError, Outcome};
use kernel::netlink::NetlinkError;
use kernel::{Changed, KernelEvent};
use tokio::sync::{Notify, mpsc};

/// Notifications that fit the socket's buffer; with more, all are lost.
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
    next_index: u32,
    /// All that is there, foreign things included.
    pub(crate) objects: Observed,
    heard: Vec<Changed>,
    /// Wakes who carries the news to the daemon that listens.
    news: Arc<Notify>,
    overrun: bool,
    /// One in so many operations is refused; 0 for none.
    pub(crate) refuses: u32,
    /// Routes that the daemon took away.
    pub(crate) deleted: Vec<Key>,
    pub(crate) violations: Vec<String>,
    pub(crate) operations: u64,
}

/// A host. Clones are the same host.
#[derive(Debug, Clone)]
pub(crate) struct ModelHost(Arc<Mutex<Model>>);

pub(crate) fn eth0() -> IfName {
    "eth0".parse().unwrap()
}

async fn moment() {
    tokio::time::sleep(Duration::from_micros(fastrand::u64(0..2_000))).await;
}

impl ModelHost {
    pub(crate) fn new(address: Cidr) -> ModelHost {
        let external = Some(External { index: 2, up: true, address: Some(address), mtu: 1500 });
        let model = Model {
            external,
            next_index: 3,
            objects: Observed::default(),
            heard: Vec::new(),
            news: Arc::default(),
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

    /// Somebody changes something, and those who listen hear of it.
    pub(crate) fn change<T>(&self, f: impl FnOnce(&mut Model) -> T) -> T {
        let mut model = self.lock();
        let result = f(&mut model);
        model.news.notify_one();
        result
    }
}

impl Model {
    fn tell(&mut self, change: Changed) {
        if self.heard.len() >= BUFFER {
            self.overrun = true;
        }
        self.heard.push(change);
    }

    /// Somebody takes an object away.
    pub(crate) fn take(&mut self, key: &Key) {
        self.objects.remove(key);
        match key {
            Key::Link(name) => self.tell(Changed::Link(*name)),
            Key::Addr(name, _) => self.tell(Changed::Link(*name)),
            Key::Ruleset(family) => self.tell(Changed::Rules(*family)),
            Key::PodRules => self.tell(Changed::PodRules),
            Key::EnvFile => self.tell(Changed::File),
            Key::Sysctl(_) => {}
            key => self.tell(Changed::Gone(key.clone())),
        }
    }

    /// Somebody puts an object there, in the place of what was.
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
            Object::Sysctl(..) => None,
            // A foreign route says no more than that ours is not there.
            Object::Route(route) if route.protocol != ROUTE_PROTOCOL => Some(Changed::Gone(object.key())),
            object => Some(Changed::Set(object.clone())),
        };
        self.objects.insert(object);
        change.into_iter().for_each(|change| self.tell(change));
    }

    /// A link that goes down takes routes and neighbours with it, of which nothing is said.
    fn drop_with(&mut self, name: IfName) {
        let gone = |object: &Object| match object {
            Object::Route(route) => route.dev == name,
            Object::Neigh(neigh) => neigh.link == name,
            _ => false,
        };
        let keys: Vec<Key> = self.objects.iter().filter(|(_, object)| gone(object)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.objects.remove(key));
    }

    /// The external interface goes down, or up.
    pub(crate) fn set_external(&mut self, up: bool) {
        if let Some(external) = &mut self.external {
            external.up = up;
            if !up {
                self.drop_with(eth0());
            }
            self.tell(Changed::Link(eth0()));
        }
    }

    /// It has another address, or none. Routes by what it reached go.
    pub(crate) fn set_address(&mut self, address: Option<Cidr>) {
        if let Some(external) = &mut self.external
            && external.address != address
        {
            external.address = address;
            self.drop_with(eth0());
            self.tell(Changed::Link(eth0()));
        }
    }

    pub(crate) fn set_mtu(&mut self, mtu: u32) {
        if let Some(external) = &mut self.external {
            external.mtu = mtu;
            self.tell(Changed::Link(eth0()));
        }
    }

    /// It is gone, and with it the devices that stand on it.
    pub(crate) fn remove_external(&mut self) {
        self.external = None;
        self.drop_with(eth0());
        let on_it = |object: &Object| matches!(object, Object::Link(link) if matches!(link.kind, LinkKind::Vxlan { .. }));
        let links: Vec<Key> = self.objects.iter().filter(|(_, object)| on_it(object)).map(|(key, _)| key.clone()).collect();
        links.iter().for_each(|key| self.take(key));
        self.tell(Changed::Link(eth0()));
    }

    /// It is there again, with another index.
    pub(crate) fn add_external(&mut self, address: Cidr) {
        self.next_index += 1;
        self.external = Some(External { index: self.next_index, up: true, address: Some(address), mtu: 1500 });
        self.tell(Changed::Link(eth0()));
    }

    /// So many notifications of nothing.
    pub(crate) fn flood(&mut self) {
        for _ in 0..=BUFFER {
            self.tell(Changed::Gone(Key::Route("10.244.255.0/24".parse().unwrap(), 0)));
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
            // A sysctl of a link that is missing counts as set.
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
                    self.violations.push(format!("a foreign route is deleted: {op}"));
                }
                if self.objects.get(&op.object().key()).is_some() {
                    self.deleted.push(op.object().key());
                }
            }
            Op::Delete(Object::Link(link)) if !link.name.as_str().starts_with("flannel") => {
                self.violations.push(format!("a foreign link is deleted: {op}"));
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
        let (tell, news) = mpsc::channel(4);
        let waked = {
            let mut model = self.lock();
            (model.heard, model.overrun, model.news) = (Vec::new(), false, Arc::default());
            model.news.clone()
        };
        let host = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = tell.closed() => return,
                    () = waked.notified() => {}
                }
                moment().await;
                let changes = {
                    let mut model = host.lock();
                    let changes = std::mem::take(&mut model.heard);
                    if std::mem::take(&mut model.overrun) { vec![Changed::Everything] } else { changes }
                };
                let heard: Vec<KernelEvent> = changes.into_iter().map(|change| KernelEvent { change, by: None }).collect();
                if !heard.is_empty() && tell.send(Ok(heard)).await.is_err() {
                    return;
                }
            }
        });
        Ok(news)
    }

    fn observe(&self, scope: Scope, lane: Lane) -> impl Future<Output = Result<Observed, NetlinkError>> + use<> {
        let host = self.clone();
        async move {
            moment().await;
            let observed = host.lock().observe(&scope, lane);
            // The answer is older than what happens before it is read.
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
        let mut around = HostNetwork::default();
        if let Some(External { index, up, address, mtu }) = self.lock().external.clone() {
            let addrs = address.map(|cidr| InterfaceAddr { cidr, permanent: true, temporary: false, deprecated: false });
            around.interfaces.push(Interface { index, name: eth0(), mtu, addrs: addrs.into_iter().collect() });
            if let Some(cidr) = address.filter(|_| up) {
                around.routes.push(RouteFact { dst: cidr.subnet(), oif: index, gateway: false });
                around.routes.push(RouteFact { dst: "0.0.0.0/0".parse().unwrap(), oif: index, gateway: true });
            }
        }
        Ok(around)
    }

    async fn link(&self, name: IfName) -> Result<Option<Link>, NetlinkError> {
        moment().await;
        match self.lock().objects.get(&Key::Link(name)) {
            Some(Object::Link(link)) => Ok(Some((**link).clone())),
            _ => Ok(None),
        }
    }

    fn env_file(&self, _: &Path) -> Option<EnvFile> {
        match self.lock().objects.get(&Key::EnvFile) {
            Some(Object::EnvFile(file)) => Some((**file).clone()),
            _ => None,
        }
    }

    async fn run(&self, _: Command) -> anyhow::Result<String> {
        anyhow::bail!("there are no programs here")
    }
}
