//! The checks at the end of a run: each machine holds one lease and the objects that follow from all leases, foreign routes are there,
//! and no route to a peer was deleted without a reason.

use std::collections::BTreeMap;

use daemon::host::Host;
use flannel::backend::Identity;
use flannel::diff::{Prune, diff};
use flannel::node::Wanted;
use flannel::object::{Key, Lane, route_metric};
use flannel::traffic::{Flavour, TrafficConfig};
use flannel::{Age, Lease, LeaseKey, Node, Peer, PerFamily, Picture, StoreEvent, Subnet};

use super::faults::foreign_keys;
use super::{BEGAN, Cluster, Machine, NETWORK, Record, args, cidr};

impl Cluster {
    pub(super) async fn check(&self) -> Result<Record, String> {
        let snapshot = self.client().snapshot().await.map_err(|error| error.to_string())?;
        let entries: BTreeMap<LeaseKey, (Peer, Age)> =
            snapshot.entries.iter().filter_map(|entry| Some((entry.key, (entry.peer.clone()?, entry.age())))).collect();
        let mut problems = Vec::new();
        let mut held: Vec<LeaseKey> = Vec::new();
        for (at, machine) in self.machines.iter().enumerate() {
            let address = cidr(machine.octet).addr;
            let own: Vec<LeaseKey> = entries.iter().filter(|(_, (peer, _))| peer.public.v4 == Some(address)).map(|(key, _)| *key).collect();
            let in_file = machine.lease_in_file();
            if let (Some(first), Some(now), false) = (machine.first, in_file, machine.may_lose_lease)
                && first != now
            {
                problems.push(format!("machine {at} had {first} and has {now}, although no fault took its lease"));
            }
            let Some(own) = in_file.filter(|key| own.contains(key)) else {
                problems.push(format!("machine {at} has {in_file:?} in its subnet file and {own:?} in the store"));
                continue;
            };
            if let Some(other) = held.iter().find(|other| other.overlaps(&own)) {
                problems.push(format!("machine {at} has {own}, which overlaps {other} of another machine"));
            }
            held.push(own);
            // In a restored store the lease may be attached to another etcd lease until it is renewed.
            let etcd_leases = machine.host.env_file(std::path::Path::new("/")).map(|file| file.etcd_leases).unwrap_or_default();
            problems.extend(self.compare(at, machine, own, etcd_leases, &entries).await);
            problems.extend(self.check_deleted_routes(at, machine));
        }
        for (at, object) in &self.foreign {
            let machine = &self.machines[*at];
            let model = machine.host.lock();
            if !machine.routes_changed && model.objects.get(&object.key()) != Some(object) {
                problems.push(format!("machine {at} lost a foreign route: {object}"));
            }
        }
        if !problems.is_empty() {
            return Err(format!("{}: {}", self.backend, problems.join("; ")));
        }
        let operations = self.machines.iter().map(|machine| machine.host.lock().operations).collect();
        let ended = BEGAN.with_borrow(|began| began.map(|began| began.elapsed()).unwrap_or_default());
        Ok(Record { operations, revision: snapshot.revision, ended })
    }

    /// Checks that a machine holds exactly the objects that a newly started daemon would set.
    async fn compare(
        &self,
        at: usize,
        machine: &Machine,
        own: LeaseKey,
        etcd_leases: Vec<i64>,
        entries: &BTreeMap<LeaseKey, (Peer, Age)>,
    ) -> Vec<String> {
        let network = machine.host.network(None).await.unwrap();
        let node = Node::choose(&network.interfaces, &network.routes, &Wanted::default(), &self.config).unwrap();
        let mac = entries.get(&own).and_then(|(peer, _)| flannel::backend::published_mac(peer, flannel::Family::V4));
        let identity = Identity { macs: PerFamily { v4: mac, v6: None }, public_key: Some(machine.host.lock().key), ..Identity::default() };
        let traffic = TrafficConfig { masquerade: true, fully_random: true, forward: true, flavour: Flavour::Nftables };
        let args = args();
        let mut picture = Picture::new(self.config.clone(), node, identity, traffic, own).with_file(args.subnet_file, true, etcd_leases);
        picture.set_usable(vec![flannel::Family::V4]);
        picture.fold(StoreEvent::Init);
        for (key, (peer, age)) in entries {
            picture.fold(StoreEvent::Apply(Lease { key: *key, peer: peer.clone() }, *age));
        }
        picture.fold(StoreEvent::InitDone);
        let mut observed = machine.host.observe(picture.scope(), Lane::Fast).await.unwrap();
        observed.extend(machine.host.observe(picture.scope(), Lane::Slow).await.unwrap().into_objects());
        let ops = diff(picture.desired(), &observed, Prune::Yes);
        let mut problems: Vec<String> = ops.iter().map(|op| format!("machine {at} needs: {op}")).collect();
        problems.append(&mut machine.host.lock().violations);
        problems
    }

    /// Checks that the daemon deleted the route to a peer no more often than its lease was changed or deleted.
    fn check_deleted_routes(&self, at: usize, machine: &Machine) -> Vec<String> {
        // A change of the host itself is a reason to change routes.
        if machine.routes_changed {
            return Vec::new();
        }
        let truth = self.truth.lock().unwrap();
        let network: Subnet = NETWORK.parse().unwrap();
        let mut deleted: BTreeMap<Subnet, usize> = BTreeMap::new();
        for key in &machine.host.lock().deleted {
            // Only routes with the metric of a peer's route count; a fault added the others.
            match key {
                Key::Route(dst, metric) if *metric == route_metric(network, *dst) => *deleted.entry(*dst).or_default() += 1,
                // With wireguard this is the path to a peer.
                Key::AllowedIp(_, dst) => *deleted.entry(*dst).or_default() += 1,
                _ => {}
            }
        }
        let changes = |of: &dyn Fn(Subnet) -> bool| truth.1.iter().filter(|(_, key)| key.subnets().v4.is_some_and(of)).count();
        // An older lease that is written with a peer's MAC takes the route to that peer. A lease with a stolen MAC has a route while the
        // machine that it was stolen from has no lease, or a younger one.
        let is_thief = |dst| self.thefts > 0 && foreign_keys().any(|foreign| foreign == dst);
        let of_machines = || changes(&|key| foreign_keys().all(|foreign| foreign != key));
        let allowed = |dst: Subnet| self.thefts + changes(&|key| key == dst) + if is_thief(dst) { of_machines() } else { 0 };
        let problem = |(dst, times): (&Subnet, &usize)| {
            let allowed = allowed(*dst);
            (*times > allowed)
                .then(|| format!("machine {at} deleted the route to {dst} {times} times, but its lease changed {allowed} times"))
        };
        deleted.iter().filter_map(problem).collect()
    }
}
