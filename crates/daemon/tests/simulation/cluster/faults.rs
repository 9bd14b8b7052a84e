//! The faults of a run: what operators, hosts, connections, daemons and the store do to a cluster.

use std::time::Duration;

use daemon::embedded::memory::Backup;
use flannel::object::{AllowedIp, EnvFile, Key, Link, LinkKind, Object, Route, Sysctl, WgPeer};
use flannel::wireguard::PublicKey;
use flannel::{LeaseKey, Mac, Peer, Subnet};

use super::{Cluster, cidr, pick};
use crate::wire::Mode;

impl Cluster {
    pub(super) async fn inject_fault(&mut self) {
        let at = fastrand::usize(..self.machines.len());
        let fault = fastrand::u32(..23);
        tracing::info!(at, fault, "injecting fault");
        match fault {
            0 | 1 => self.put_foreign_lease().await,
            2 => self.delete_lease(false).await,
            3 => {
                self.machines.iter_mut().for_each(|machine| machine.may_lose_lease = true);
                self.delete_lease(true).await;
            }
            4 => self.put_raw(format!("10.244.{}.0-24", fastrand::u8(200..204)), b"{\"PublicIP\":".to_vec()).await,
            5..=7 => self.remove_object(at),
            8..=10 => self.change_object(at),
            11 => {
                self.machines[at].routes_changed = true;
                match fastrand::u32(..5) {
                    0 => self.machines[at].host.change(|model| model.set_external(false)),
                    1 => self.machines[at].host.change(|model| model.remove_external()),
                    2 => {
                        let other = cidr(100 + self.machines[at].octet);
                        self.machines[at].host.change(|model| model.set_address(Some(other)));
                    }
                    3 => self.machines[at].host.change(|model| model.set_address(None)),
                    _ => {
                        let mtu = fastrand::u32(1_280..=9_000);
                        self.machines[at].host.change(|model| model.set_mtu(mtu));
                    }
                }
            }
            12 => self.restore_interface(at),
            13 => self.machines[at].host.change(|model| model.flood()),
            14 => {
                if let Some(daemon) = self.machines[at].daemon.take() {
                    daemon.abort();
                }
            }
            15 => *self.machines[at].crash_after.borrow_mut() = Some(fastrand::u32(..40)),
            16 => self.start(at),
            17 | 18 => {
                let mode =
                    pick(&[Mode::Open, Mode::Open, Mode::Refused, Mode::Silent, Mode::Slow(700), Mode::Slow(6_000), Mode::NoAnswers]);
                tracing::info!(?mode, "changing connection mode");
                self.machines[at].cable.set(mode);
            }
            19 => match fastrand::u32(..4) {
                0 => self.store.compact(),
                1 => self.backup = Some(self.store.backup()),
                2 => self.restart_store(None).await,
                _ => {
                    let backup = self.backup.take().unwrap_or_else(|| self.empty.clone());
                    self.restart_store(Some(backup)).await;
                }
            },
            20 => self.machines[at].host.lock().refuses = pick(&[0, 2, 5, 20]),
            21 => {
                self.machines[at].may_lose_lease = true;
                self.overwrite_lease(at).await;
            }
            _ => self.add_foreign_route(at),
        }
    }

    /// Breaks all connections, as when the server restarts, possibly with an older backup.
    async fn restart_store(&mut self, backup: Option<Backup>) {
        // A restored store may assign a lost lease to another host.
        self.machines.iter_mut().for_each(|machine| machine.may_lose_lease |= backup.is_some());
        let before: Vec<Mode> = self.machines.iter().map(|machine| machine.cable.set(Mode::Refused)).collect();
        if let Some(backup) = backup {
            self.store.restore(&backup);
            // The recorder lists the leases before any daemon can reconnect, so that it misses nothing.
            self.operator.set(Mode::Refused);
            self.operator.set(Mode::Open);
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1_000..3_000))).await;
        self.machines.iter().zip(before).for_each(|(machine, mode)| {
            machine.cable.set(mode);
        });
    }

    /// A lease of a host that is not simulated. Two of these hosts publish the VTEP MAC or the WireGuard key of another one: whichever lease is younger is
    /// refused.
    async fn put_foreign_lease(&mut self) {
        let octet = fastrand::u8(210..214);
        let mut peer = self.peer(octet);
        let machine = |peer: &&Peer| self.machines.iter().any(|machine| peer.public.v4 == Some(cidr(machine.octet).addr));
        let victim = match octet {
            212 => Some(self.peer(210)),
            213 => self.truth.lock().unwrap().0.iter().map(|(_, peer)| peer).find(machine).cloned(),
            _ => None,
        };
        if let Some(victim) = victim {
            self.thefts += 1;
            peer.backend_data = victim.backend_data;
        }
        self.put_raw(format!("10.244.{}.0-24", fastrand::u8(200..204)), flannel::wire::value(&peer).into_bytes()).await;
    }

    /// An operator deletes a lease: of a simulated machine, or a foreign one.
    async fn delete_lease(&self, ours: bool) {
        let keys: Vec<LeaseKey> = self.truth.lock().unwrap().0.iter().map(|(key, _)| *key).collect();
        let is_foreign = |key: &&LeaseKey| key.subnets().v4.is_some_and(|subnet| foreign_keys().any(|foreign| foreign == subnet));
        let keys: Vec<LeaseKey> = keys.iter().filter(|key| is_foreign(key) != ours).copied().collect();
        if !keys.is_empty() {
            self.delete_raw(flannel::wire::key(&pick(&keys))).await;
        }
    }

    /// Overwrites a machine's lease with one of another host: the machine must choose another subnet.
    async fn overwrite_lease(&self, at: usize) {
        let own = cidr(self.machines[at].octet).addr;
        let key = self.truth.lock().unwrap().0.iter().find(|(_, peer)| peer.public.v4 == Some(own)).map(|(key, _)| *key);
        if let Some(key) = key {
            self.put_raw(flannel::wire::key(&key), flannel::wire::value(&self.peer(220)).into_bytes()).await;
        }
    }

    fn remove_object(&mut self, at: usize) {
        let removed = self.machines[at].host.change(|model| {
            let keys: Vec<Key> = model.objects.iter().filter(|(_, object)| !is_foreign(object)).map(|(key, _)| key.clone()).collect();
            let key = (!keys.is_empty()).then(|| keys[fastrand::usize(..keys.len())].clone());
            key.iter().for_each(|key| model.remove(key));
            key
        });
        // A host that loses its file and gets another address while no daemon runs cannot find its lease.
        self.machines[at].may_lose_lease |= removed == Some(Key::EnvFile);
    }

    fn change_object(&mut self, at: usize) {
        let objects: Vec<Object> = {
            let model = self.machines[at].host.lock();
            model.objects.iter().map(|(_, object)| object.clone()).filter(|object| !is_foreign(object)).collect()
        };
        if objects.is_empty() {
            return;
        }
        let changed = match objects[fastrand::usize(..objects.len())].clone() {
            Object::Link(link) => Object::Link(Box::new(match fastrand::u32(..4) {
                0 => Link { mtu: 1_300, ..*link },
                1 => Link { up: false, ..*link },
                2 => Link { kind: LinkKind::Other("dummy".to_owned()), ..*link },
                _ => {
                    self.machines[at].routes_changed = true;
                    Link { mac: Mac::local([fastrand::u8(..), 1, 2, 3, 4, 5]), ..*link }
                }
            })),
            Object::Route(route) => match fastrand::bool() {
                true => Object::Route(Route { via: Some(cidr(99).addr), ..route }),
                false => Object::Route(Route { metric: route.metric + 1_000, ..route }),
            },
            Object::Neigh(neigh) => Object::Neigh(flannel::object::Neigh { mac: Mac([2, 9, 9, 9, 9, 9]), ..neigh }),
            Object::Fdb(fdb) => Object::Fdb(flannel::object::Fdb { dst: cidr(99).addr, ..fdb }),
            Object::WgPeer(peer) => Object::WgPeer(Box::new(match fastrand::bool() {
                true => WgPeer { endpoint: "10.0.0.99:7".parse().ok(), ..*peer },
                false => WgPeer { keepalive: 9, ..*peer },
            })),
            Object::AllowedIp(allowed) => Object::AllowedIp(Box::new(AllowedIp { peer: PublicKey([99; 32]), ..*allowed })),
            Object::Sysctl(Sysctl { path, .. }) => Object::Sysctl(Sysctl { path, value: "1".to_owned() }),
            Object::EnvFile(file) => Object::EnvFile(Box::new(EnvFile { text: "FLANNEL_MTU=1\n".to_owned(), ours: false, ..*file })),
            Object::Ruleset(mut rules) => {
                rules.chains.truncate(1);
                Object::Ruleset(rules)
            }
            other => other,
        };
        self.machines[at].may_lose_lease |= matches!(changed, Object::EnvFile(_));
        self.machines[at].host.change(|model| model.put(changed));
    }

    fn add_foreign_route(&mut self, at: usize) {
        let dst = format!("10.244.{}.0/24", fastrand::u8(..)).parse().unwrap();
        let route = Route { dst, metric: 7_777, via: Some(cidr(254).addr), dev: crate::model::eth0(), onlink: false, protocol: 4 };
        // The route goes with the interface, so it is expected only if the interface is never changed.
        self.machines[at].host.change(|model| model.put(Object::Route(route)));
        self.foreign.push((at, Object::Route(route)));
    }

    fn restore_interface(&mut self, at: usize) {
        let own = cidr(self.machines[at].octet);
        self.machines[at].host.change(|model| {
            if model.external.is_none() {
                model.add_external(own);
            }
            model.set_external(true);
            model.set_address(Some(own));
        });
    }

    pub(super) async fn end_faults(&mut self) {
        tracing::info!("ending faults");
        for at in 0..self.machines.len() {
            self.machines[at].cable.set(Mode::Open);
            self.machines[at].host.lock().refuses = 0;
            *self.machines[at].crash_after.borrow_mut() = None;
            self.restore_interface(at);
            self.start(at);
        }
        for octet in 200..204 {
            self.delete_raw(format!("10.244.{octet}.0-24")).await;
        }
        for _ in 0..2 {
            self.put_foreign_lease().await;
        }
    }
}

pub(super) fn foreign_keys() -> impl Iterator<Item = Subnet> {
    (200..204).map(|octet| format!("10.244.{octet}.0/24").parse().unwrap())
}

fn is_foreign(object: &Object) -> bool {
    matches!(object, Object::Route(route) if route.protocol == 4)
}
